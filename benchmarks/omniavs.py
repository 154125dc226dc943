"""OmniAVS (ICCV 2025): expressions of text, speech, sounds and pictures that mean objects of a video.

    omniavs/
      meta_expressions_{train,test}.jsonl
          a line {"video_name", "exp_id", "expr", "expr_type", "obj_id": [id], "expl",
                  "referring_speech", "referring_sound", "referring_image": a file's name or null}
      video_dict.json
          {video: {"file_name": [picture], "duration", "mask_dict": {id: [run lengths or null]}}}
      images/<video>/<picture>
      audios/<video>.mp3
      referrings/{referring_speeches,referring_sounds,referring_images}/<file>

expr holds the words. <audio> and <image> in it mark where the sound and the picture stand. In the four
types with speech, the words are heard and not read: expr is not in the prompt, and what else there is follows
the speech. An empty obj_id is an expression without a target. expl says why the target is meant, where it is
not empty. An expression's id is its type and its exp_id.

The official metric: J and F of each expression. Without a target both are 1 where nothing at all is
predicted, else 0. A type's J&F is the mean of its mean J and mean F, and overall is the mean over the types.
Explanations have METEOR, whose overall value is the mean of the types text and speech. Quirk: by a slip, the
official script takes the first object of an expression for each of its objects. The column J&F is of the
union of the objects, the column `official` of the first object alone.

Letters: O objects, T frames, H W pixels.
"""
import json
import os
from dataclasses import replace

import numpy as np

from benchmarks.media import LEAST_FPS, MOST_FPS
from benchmarks.metrics import boundary_accuracy, mean_row, meteor, of_kind
from benchmarks.mini import put, sound_file, write_clips
from benchmarks.references import refer
from benchmarks.samples import Benchmark, Sample, faults_of, require, rle_masks, shown, with_masks
from data import FPS
from rewards import mask_box, region_similarity
from trust.errors import BadInput, reading
from trust.files import check_file, check_name, distinct, no_number, read_json

KINDS = (
    "text", "speech", "text_sound", "speech_sound",
    "text_image", "speech_image", "text_sound_image", "speech_sound_image",
)
# What stands in a query, by the part of a type's name: the mark, the kind of file, where the files lie.
REFERENCES = {
    "speech": ("<speech>", "audio", "referring_speeches"),
    "sound": ("<audio>", "audio", "referring_sounds"),
    "image": ("<image>", "image", "referring_images"),
}
# The queries of types with speech: the words are not read.
SPOKEN = {
    "speech": "what is said here: <speech>",
    "sound": ", where the sound is <audio>",
    "image": ", where the picture is <image>",
}


def read_omniavs(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing.

    truth["explanation"]  why the target is meant; "" where it is not said
    truth["words"]        expr; in the types with speech, the policy does not read it
    """
    path = f"{root}/video_dict.json"
    videos = read_json(path)
    read = {}    # video: its names, pictures and frames a second, which its samples share
    samples = []
    meta = f"{root}/meta_expressions_{split}.jsonl"
    for number, line in read_lines(meta):
        where = f"{meta}, line {number}"
        sample = Sample("vos", "omniavs", "line", str(number), "", "", [], [])
        samples.append(sample)
        with faults_of(sample):
            references = read_expression(sample, line, root, where)
            video = sample.video
            record = require(videos, video, path, dict)
            if video not in read:
                read[video] = read_video(record, root, video, f"{path}: {shown(video)}")
            sample.names, sample.pictures, sample.fps = read[video]
            read_target(sample, line, record, path, where)
            if references:
                refer(sample, references)
    return samples


def read_lines(path):
    """Yields (number, object) of each line of a file. Raises BadInput for a line that is no JSON object."""
    check_file(path)
    with reading(path), open(path, encoding="utf-8-sig") as file:
        lines = file.readlines()
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        with reading(f"{path}, line {number}"):
            line = json.loads(text, object_pairs_hook=distinct, parse_constant=no_number)
            if not isinstance(line, dict):
                raise ValueError(f"a dict expected, not a {type(line).__name__}")
        yield number, line


def read_expression(sample, line, root, where):
    """Fills in what a line says -> its references. Raises BadInput where it is not of its form."""
    sample.video = check_name(require(line, "video_name", where, str), where, slashes=True)
    kind = require(line, "expr_type", where, str)
    if kind not in KINDS:
        raise BadInput(f"expr_type {shown(kind)!r} is none of {', '.join(KINDS)} in {where}")
    sample.kind = kind
    # The types may count by themselves.
    sample.expression = f"{kind}_{require(line, 'exp_id', where, (int, str))}"
    words = require(line, "expr", where, str)
    sample.query = words
    parts = kind.split("_")
    if "speech" in parts:
        sample.query = "".join(SPOKEN[part] for part in parts)
    references = []
    for part in parts:
        if part in REFERENCES:
            mark, medium, folder = REFERENCES[part]
            name = check_name(require(line, f"referring_{part}", where, str), where)
            references.append((mark, medium, f"{root}/referrings/{folder}/{name}"))
    sample.sound = f"{root}/audios/{sample.video}.mp3"
    sample.truth["words"] = words
    sample.truth["explanation"] = "" if line.get("expl") is None else require(line, "expl", where, str)
    return references


def read_video(record, root, video, where):
    """(names, pictures, frames a second) of a video. Raises BadInput where its record is not of its form."""
    files = require(record, "file_name", where, list)
    duration = require(record, "duration", where, (int, float))
    if not all(isinstance(file, str) for file in files):
        raise BadInput(f"a file_name is no text in {where}")
    if duration <= 0 or not LEAST_FPS <= len(files) / duration <= MOST_FPS:
        raise BadInput(f"duration {str(duration)[:20]} of {len(files)} frames in {where}")
    names = [os.path.splitext(file)[0] for file in files]
    pictures = [f"{root}/images/{video}/{file}" for file in files]
    return names, pictures, len(files) / duration


def read_target(sample, line, record, path, where):
    """Fills in which objects are meant, and how their masks are read."""
    listed = require(line, "obj_id", where, list)
    table = require(record, "mask_dict", f"{path}: {shown(sample.video)}", dict)
    for number in listed:
        if type(number) not in (int, str):
            raise BadInput(f"an id in 'obj_id' is a {type(number).__name__} in {where}")
        rles = require(table, str(number), f"{path}: {shown(sample.video)}", list)
        if len(rles) != len(sample.names):
            count = len(sample.names)
            raise BadInput(f"{len(rles)} masks of object {number} for {count} frames: {path}")
    ids = list(dict.fromkeys(map(str, listed)))
    sample.ids = tuple(ids)
    sample.objects = len(ids)
    sample.null = not ids
    if len(ids) < len(listed):
        sample.fault = f"names an object twice: {where}"
    # A copy, because masks need the size of the first frame, and none of the references read with it.
    with_masks(sample, rle_masks, replace(sample), ids, path, table, False, False)


# ---- the official metric ---------------------------------------------------------------------------
def score_omniavs(sample: Sample, true, pred) -> dict:
    """J and F of the union of the objects, and `official`, the J&F of the first object; in per cent.

    For `omniavs_subsets`: explanation, the true one.
    """
    values = dict(J=0.0, F=0.0, official=0.0)
    if pred is not None:
        J, F = rate(true.any(0), pred)
        values = dict(J=J, F=F, official=(J + F) / 2)
        if len(true) > 1:
            values["official"] = sum(rate(true[0], pred)) / 2
    words = sample.truth.get("words", "")
    return values | dict(words=words, explanation=sample.truth.get("explanation", ""))


def rate(true, pred):
    """(J, F), in per cent, of masks [T, H, W]."""
    if not true.any():
        same = 0.0 if pred.any() else 100.0
        return same, same
    J = region_similarity(pred, true).mean()
    F = boundary_accuracy(pred, true).mean()
    return 100 * float(J), 100 * float(F)


def omniavs_subsets(rows: list[dict]) -> dict:
    """Means of each type that there is. Overall is the mean over these types."""
    kinds = {}
    for kind in (*KINDS, ""):
        part = of_kind(rows, kind)
        if part:
            kinds[kind] = mean_row(part, ("J", "F", "official")) | mean_meteor(part)
    overall = {}
    for column in ("J", "F", "J&F", "official"):
        overall[column] = float(np.mean([means[column] for means in kinds.values()]))
    explained = [kinds[kind]["METEOR"] for kind in ("text", "speech") if "METEOR" in kinds.get(kind, {})]
    # As officially, without one of the two there is no mean.
    if len(explained) == 2:
        overall["METEOR"] = sum(explained) / 2
    overall["expressions"] = len(rows)
    return dict(overall=overall) | kinds


def mean_meteor(rows):
    """{"METEOR": mean of the expressions with an explanation, in per cent}; {} where it is not known.

    What System 1 thinks is compared. An expression that it did not answer counts 0.
    """
    explained = [row for row in rows if row["explanation"]]
    if not any("text" in row for row in explained):
        return {}
    values = []
    for row in explained:
        thought = row.get("text", "").partition("<think>")[2].partition("</think>")[0]
        values.append(meteor(row["explanation"], thought))
    if None in values:
        return {}
    return dict(METEOR=100 * float(np.mean(values)))


# ---- the miniature ---------------------------------------------------------------------------------
def mini_omniavs(root: str, videos: int):
    """The eight types of each clip, and one without a target. Training has one with two objects, too.

    Nobody speaks in the toy world: what is heard as speech is the tone of the thing that is meant. The files
    .mp3 hold the bytes of wav, as nothing here writes mp3. Readers go by the content.
    """
    table = {}
    for split in ("train", "test"):
        lines = []
        for video, scene, names in write_clips(f"{root}/images", split, range(videos), split + "_{}"):
            files = [f"{name}.jpg" for name in names]
            put(sound_file(scene.sound), f"{root}/audios/{video}.mp3")
            table[video] = dict(file_name=files, duration=len(files) / FPS, mask_dict=mask_dict(scene))
            lines += toy_lines(root, video, scene, split)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        put(text.encode(), f"{root}/meta_expressions_{split}.jsonl")
    put(table, f"{root}/video_dict.json")


def mask_dict(scene):
    """{number of a thing: [run lengths or null]}; the numbers begin at 1."""
    from pycocotools import mask as coco
    table = {}
    for o, masks in enumerate(scene.masks):
        runs = []
        for mask in masks:
            rle = coco.encode(np.asfortranarray(mask, np.uint8))
            rle["counts"] = rle["counts"].decode()
            runs.append(rle if mask.any() else None)
        table[str(o + 1)] = runs
    return table


def toy_lines(root, video, scene, split):
    """The lines of a toy clip. Each type means the next thing in sight."""
    seen = np.flatnonzero(scene.masks.any((1, 2, 3))).tolist()
    lines = []
    for n, kind in enumerate(KINDS):
        o = seen[n % len(seen)]
        likeness = []
        if "image" in kind:
            likeness.append("looks like <image>")
        if "sound" in kind:
            likeness.append("sounds like <audio>")
        name = scene.things[o].name
        words = f"the object that {' and '.join(likeness)}" if likeness else f"the {name}"
        files = write_references(root, f"{video}_{n}", kind, scene, o)
        expl = f"Only this object is a {name}." if n < 2 else None
        lines.append(toy_line(video, n, words, kind, [o + 1], expl) | files)
    lines.append(toy_line(video, len(KINDS), "the grey cube", "text", [], ""))
    if split == "train":
        things = [f"the {scene.things[o].name}" for o in seen[:2]]
        words = " and ".join(things)
        lines.append(toy_line(video, len(KINDS) + 1, words, "text", [o + 1 for o in seen[:2]], None))
    return lines


def toy_line(video, number, words, kind, ids, expl):
    files = dict.fromkeys(("referring_speech", "referring_sound", "referring_image"))
    return dict(video_name=video, exp_id=number, expr=words, expr_type=kind, obj_id=ids, expl=expl) | files


def write_references(root, name, kind, scene, o):
    """Writes the sound and the picture of a thing where its type asks for them -> their names in the line."""
    files = {}
    for part in kind.split("_"):
        if part not in REFERENCES:
            continue
        _, medium, folder = REFERENCES[part]
        files[f"referring_{part}"] = name + (".jpg" if medium == "image" else ".wav")
        content = sound_file(replace(scene, sounding=o).sound) if medium == "audio" else portrait(scene, o)
        put(content, f"{root}/referrings/{folder}", files[f"referring_{part}"])
    return files


def portrait(scene, o):
    """The part of a picture [h, w, 3] that shows a thing, on the frame on which it is largest."""
    t = scene.masks[o].sum((1, 2)).argmax()
    x1, y1, x2, y2 = map(int, mask_box(scene.masks[o, t]))
    return scene.pictures[t, y1:y2 + 1, x1:x2 + 1]


OMNIAVS = Benchmark(
    read=read_omniavs,
    score=score_omniavs,
    subsets=omniavs_subsets,
    columns=("J", "F", "J&F", "official", "METEOR"),
    mini=mini_omniavs,
)
