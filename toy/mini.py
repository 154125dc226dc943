"""Miniature datasets: toy clips in exactly the layouts of the real ones (`python data.py mini --bench NAME --out DIR`).

A writer makes the folder of its dataset, with `videos` clips in every split.
"""
import csv
import io
import itertools
import json
import os
import pickle
import struct
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy.io import wavfile

from data import CANVAS, FPS, REFER_UMD, REFER_UNC, SAMPLE_RATE, SIDE, BadInput, _pyarrow, toy_queries, toy_scene


def put(content, *path):
    """Writes bytes, a picture or its array, or a JSON value; makes the folders."""
    path = os.path.join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, (np.ndarray, Image.Image)):
        picture = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        picture.save(path, quality=95)
        return
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content).encode())


def write_clips(root, split, indices, key, form="{:05d}", first=0, step=1):
    """(key, scene, names of its frames) of toy clips, with the frames written."""
    for i in indices:
        scene = toy_scene("train" if split == "train" else "test", i)
        names = [form.format(first + step * t) for t in range(len(scene.pictures))]
        for name, picture in zip(names, scene.pictures):
            put(picture, root, key.format(i), name + ".jpg")
        yield key.format(i), scene, names


def ask(scene, kinds=("referring", "reasoning")):
    """(kind, query, things) of a toy scene; the last query means two things."""
    found = [(kind, query, [] if thing is None else [thing]) for kind, query, thing in toy_queries(scene) if kind in kinds]
    return found + [("referring", f"the {scene.things[0].name} and the {scene.things[1].name}", [0, 1])]


def annotate(scene, table, kinds):
    """ReVOS' expressions of a scene; its masks go into the table."""
    from pycocotools import mask as coco
    ids = [1000 + len(table) + o for o in range(len(scene.things))]
    for number, masks in zip(ids, scene.masks):
        rles = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
        table[str(number)] = [dict(size=rle["size"], counts=rle["counts"].decode()) if mask.any() else None
                              for rle, mask in zip(rles, masks)]
    return {str(2 * i): dict(exp=query, obj_id=things, anno_id=[ids[o] for o in things], type_id=kinds.index(kind))
            for i, (kind, query, things) in enumerate(ask(scene, kinds))}


def revos(root, videos):
    table = {}
    for split in ("train", "valid"):
        clips = itertools.chain(
            write_clips(f"{root}/JPEGImages", split, range(0, videos, 2), f"OVIS/train/{split}-{{}}", "img_{:07d}", 1),
            write_clips(f"{root}/JPEGImages", split, range(1, videos, 2), f"UVO/all/-{split}-{{}}", first=120, step=5))
        meta = {key: dict(vid_id=i, height=CANVAS, width=CANVAS, frames=names,
                          expressions=annotate(scene, table, ("referring", "reasoning", "null")))
                for i, (key, scene, names) in enumerate(clips)}
        put(dict(videos=meta), root, f"meta_expressions_{split}_.json")
    put(table, root, "mask_dict.json")


def mevis(root, videos):
    for split in ("train", "valid_u", "valid"):
        meta, table, keys = {}, {}, ("exp",) if split == "valid" else ("exp", "obj_id", "anno_id")
        clips = range(videos, 2 * videos) if split == "valid" else range(videos)                 # those of valid_u are other ones
        for key, scene, names in write_clips(f"{root}/{split}/JPEGImages", split, clips, "{:012x}"):
            expressions = annotate(scene, table, ("referring", "reasoning"))
            meta[key] = dict(frames=names, expressions={id: {k: e[k] for k in keys} for id, e in expressions.items()})
        put(dict(videos=meta), root, split, "meta_expressions.json")
        if split != "valid":
            put(table, root, split, "mask_dict.json")


def refavs(root, videos):
    rows = [("vid", "uid", "split", "fid", "exp")]
    for (s, split), i in itertools.product(enumerate(("train", "val", "test_s", "test_u", "test_n")), range(videos)):
        scene = toy_scene("long", 10 * s + i)
        scene = replace(scene, pictures=scene.pictures[:10], masks=scene.masks[:, :10])
        null, video = split == "test_n" or (split, i) == ("train", 0), f"toy-{s}-{i}_0_10000"
        folder = ("null_c-", "null_m-")[i % 2] * null + video
        names = [("null", place, 0) for place in ("left", "right", "first", "last")] if null else [
            (thing.name.replace(" ", "-"), thing.name, o) for o, thing in enumerate(scene.things)]
        for n, (category, name, o) in enumerate(names):
            rows.append((video, f"{folder}_{category}_{n + 1}", split, o, f"The {name} object, wherever it is"))
            for t, mask in enumerate(scene.masks[o]):
                put(mask.astype(np.uint8) * 255 * (not null), root, "gt_mask", folder, f"fid_{o}", f"{t:05d}.png")
        for t, picture in enumerate(scene.pictures):
            put(picture, root, "media", folder, f"frames/{t}.jpg")
        sound = np.repeat(scene.sound.reshape(10, -1), 2, axis=0).ravel()        # half a second of the toy world is one here
        wavfile.write(os.path.join(root, "media", folder, "audio.wav"), SAMPLE_RATE, (sound * 32767).astype(np.int16))
    rows += [(*rows[-1][:4], "a second expression of the same uid"), (*rows[1][:2], "TODO", 0, "not to be used")]
    with open(os.path.join(root, "metadata.csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)


def stills(split, videos):
    """(picture [H, W, 3], masks [O, H, W] of the things to be seen, their names) of each toy scene's fullest frame."""
    for i in range(videos):
        scene = toy_scene("train" if split == "train" else "test", i)
        t = scene.masks.any((2, 3)).sum(0).argmax()
        seen = [o for o in range(len(scene.things)) if scene.masks[o, t].any()]
        yield scene.pictures[t], scene.masks[seen, t], [scene.things[o].name for o in seen]


def rectangles(mask):
    """(x1, y1, x2, y2), corners inside it, of every run of every row of a mask [H, W]: polygons that are it to the pixel."""
    for y, row in enumerate(mask):
        ends = np.flatnonzero(np.diff(np.r_[0, row, 0])).tolist()
        yield from ((x1, y, x2 - 1, y) for x1, x2 in zip(ends[::2], ends[1::2]))


def refcocog_2k_840(root, videos):
    pyarrow, rows = _pyarrow(), []
    for i, (picture, masks, names) in enumerate(stills("train", videos)):
        large = Image.fromarray(picture).resize((SIDE, SIDE))
        ys, xs = (np.array(masks[0].nonzero()) * SIDE / CANVAS + 0.5).astype(int)
        a, b, c, d = ((xs.min(), ys.min()), (xs.max(), ys.max()), *((xs[len(xs) * k // 3], ys[len(ys) * k // 3]) for k in (1, 2)))
        solution = "<box>({},{}),({},{})</box><points>({},{}),({},{})</points>".format(*a, *b, *c, *d)
        rows.append(dict(id=f"refcocog_{i}", problem=f"the {names[0]}", solution=solution, img_height=CANVAS, img_width=CANVAS,
                         image=dict(bytes=encoded(large, "png"), path=None)))
    os.makedirs(os.path.join(root, "data"), exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), os.path.join(root, "data/train-00000-of-00001.parquet"), 2)


def encoded(picture, form):
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=95)
    return buffer.getvalue()


def refer(root, videos):
    for folder, by, splits in (("refcoco", "unc", REFER_UNC), ("refcoco+", "unc", REFER_UNC), ("refcocog", "umd", REFER_UMD)):
        images, annotations, refs = [], [], []
        for split, (picture, masks, names) in ((split, found) for split in splits for found in stills(split, videos)):
            image, file = len(images) + 1, f"COCO_train2014_{len(images) + 1:012d}.jpg"
            images.append(dict(id=image, file_name=file, height=CANVAS, width=CANVAS))
            put(picture, root, "images/mscoco/images/train2014", file)
            for mask, name in zip(masks, names):
                number = len(refs) + 1
                shape = [[x1, y1, x2 + 1, y1, x2 + 1, y2 + 1, x1, y2 + 1] for x1, y1, x2, y2 in rectangles(mask)]
                annotations.append(dict(id=number, image_id=image, segmentation=shape))
                sentences = [dict(sent=text, sent_id=2 * number + k) for k, text in enumerate((f"the {name}", name))]
                refs.append(dict(ref_id=number, ann_id=number, image_id=image, split=split, sentences=sentences))
        put(dict(images=images, annotations=annotations), root, folder, "instances.json")
        put(pickle.dumps(refs, protocol=2), root, folder, f"refs({by}).p")


def reasonseg(root, videos):
    for split in ("train", "val", "test"):
        for i, (picture, masks, names) in enumerate(stills(split, videos)):
            shapes = [dict(label=label, points=[[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
                      for label, mask in zip(("target", "ignore"), masks) for x1, y1, x2, y2 in rectangles(mask)]
            record = dict(text=[f"what is a {names[0]}?", f"voil\xe0, a {names[0]}"], is_sentence=i % 2 == 0,
                          shapes=shapes + [dict(label="flag", points=[[0, 0]])])
            put(picture, root, split, f"{i}.jpg")
            put(json.dumps(record, ensure_ascii=False).encode(("utf-8", "cp1252")[i % 2]), root, split, f"{i}.json")


def refdavis(root, videos):
    meta = {}
    visible = (i for i in itertools.count() if toy_scene("test", i).masks[:, 0].any())       # DAVIS takes objects from frame 0
    for key, scene, names in write_clips(f"{root}/valid/JPEGImages", "valid", itertools.islice(visible, videos), "toy-{}"):
        numbers = np.arange(1, len(scene.things) + 1)[:, None, None, None]
        labels = (scene.masks * numbers).sum(0).astype(np.uint8)                 # [T, H, W]
        labels[:, 0][labels[:, 0] == 0] = 255
        for name, label in zip(names, labels):
            picture = Image.fromarray(label)
            picture.putpalette(np.arange(256).repeat(3).tolist())                # makes its mode P
            put(picture, root, "valid/Annotations", key, name + ".png")
        texts = [(thing, text) for thing in scene.things for text in ("the {}", "a {}", "{}", "the {} that moves")]
        meta[key] = dict(frames=names, expressions={str(k): dict(exp=text.format(thing.name), obj_id=str(k // 4 + 1))
                                                    for k, (thing, text) in enumerate(texts)})
    put(dict(videos=meta), root, "meta_expressions/valid/meta_expressions.json")


def refytvos(root, videos):
    meta = {}
    for key, scene, names in write_clips(f"{root}/valid/JPEGImages", "valid", range(2 * videos), "{:010x}", step=5):
        meta[key] = dict(frames=names, expressions={str(n): dict(exp=q) for n, (_, q, _) in enumerate(ask(scene))})
    put(dict(videos=meta), root, "meta_expressions/valid/meta_expressions.json")
    put(dict(videos=dict(list(meta.items())[videos:])), root, "meta_expressions/test/meta_expressions.json")


def reasonvos(root, videos):
    meta = {}
    for key, scene, names in write_clips(f"{root}/JPEGImages", "test", range(videos), "toy_{}"):
        for (o, masks), t in itertools.product(enumerate(scene.masks), range(len(names))):
            put(masks[t].astype(np.uint8) * 255, root, "Annotations", f"mevis_{key}_{o}", names[t] + ".png")
        meta[key] = dict(source="MeViS", frames=names, expressions=[
            dict(obj_id=str(o), exp_id=n, exp_text=query, is_sent=kind == "reasoning")
            for n, (kind, query, (o,)) in enumerate(ask(scene)[:-1])])
    put(dict(videos=meta), root, "meta_expressions.json")


def video_r1(root, videos):
    items = []
    for i in range(videos):
        scene, still = toy_scene("train", i), i % 2 == 1
        path = f"./{'Chart' if still else 'STAR'}/toy{i}.{'jpg' if still else 'avi'}"
        put(scene.pictures[0] if still else video_file(scene.pictures, scene.sound), root, path)
        colour = scene.things[0].colour
        items += [dict(problem_id=5 * i + n, problem=question, data_type="image" if still else "video", problem_type=kind,
                       options=["A. pink", f"B. {colour}"] * (n == 0), solution=f"<answer>{answer}</answer>", path=path)
                  for n, (kind, question, answer) in enumerate((
                      ("multiple choice", "Which of these colours is to be seen?", "B"),
                      ("numerical", "How many objects are there?", str(len(scene.things))),
                      ("OCR", "Write down the first object's colour.", colour),
                      ("free-form", "What does the first object look like?", f"It is a {scene.things[0].name}."),
                      ("regression", "How many pixels wide is the picture?", str(CANVAS))))]
    put(items, root, "Video-R1-260k.json")


def video_file(pictures, sound):
    """Bytes of an AVI file: pictures [T, h, w, 3] at 2 frames a second as JPEG, sound as 16-bit PCM."""
    def chunk(tag, content):
        return tag + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def stream(kind, rate, length, unit, form):                  # a stream's header, then its format
        head = kind + struct.pack("<10I4H", 0, 0, 0, 1, rate, 0, length, 0, 0, unit, 0, 0, 0, 0)
        return chunk(b"LIST", b"strl" + chunk(b"strh", head) + chunk(b"strf", form))

    (T, h, w, _), fps, pcm = pictures.shape, int(FPS), (sound * 32767).astype("<i2")
    head = b"hdrl" + chunk(b"avih", struct.pack("<14I", 1_000_000 // fps, 0, 0, 0, T, 0, 2, 0, w, h, 0, 0, 0, 0)) + stream(
        b"vidsMJPG", fps, T, 0, struct.pack("<IiiHH4s5I", 40, w, h, 1, 24, b"MJPG", 3 * w * h, 0, 0, 0, 0)) + stream(
        b"auds\0\0\0\0", SAMPLE_RATE, len(pcm), 2, struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16))
    body = b"movi" + b"".join(chunk(b"00dc", encoded(Image.fromarray(picture), "jpeg")) + chunk(b"01wb", heard.tobytes())
                              for picture, heard in zip(pictures, np.array_split(pcm, T)))
    return chunk(b"RIFF", b"AVI " + chunk(b"LIST", head) + chunk(b"LIST", body))


WRITERS = dict(revos=revos, mevis=mevis, refavs=refavs, refcocog_2k_840=refcocog_2k_840, refer_seg=refer, reasonseg=reasonseg,
               refdavis=refdavis, refytvos=refytvos, reasonvos=reasonvos, video_r1=video_r1)


def write_mini(root, videos=4):
    """Writes the miniature of a dataset; the name of the folder `root` tells which. Raises BadInput where there is something."""
    if os.path.isdir(root) and os.listdir(root):
        raise BadInput(f"{root} is not empty; give another --out")
    WRITERS[os.path.basename(root)](root, videos)
