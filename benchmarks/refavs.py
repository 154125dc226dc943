"""Ref-AVS (arXiv 2407.10957): expressions that name an object of a video of ten seconds, also by its sound.

    refavs/
      metadata.csv                                columns vid, uid, split, fid, exp
      media/<folder>/frames/{0 ... 9}.jpg         one frame a second
      media/<folder>/audio.wav
      gt_mask/<folder>/fid_<fid>/0000{0 ... 9}.png

The folder is the uid without its last two parts; it is not the vid. Uids repeat, so an expression's id is its
row. Some rows are of a split TODO and are not used.

The official metric: J, F and S at 256 x 256 pixels. Quirks: F is one of regions, not of boundaries. A null
expression names what is not there and has S, the root of the share of pixels that are predicted all the same.
The others have J and F. Means are over batches of 4 expressions in the order of the csv, and each batch takes
F's best threshold for all its frames.

Letters: O objects, T frames, H W pixels.
"""
import csv
import io
import itertools
import math
import os
from dataclasses import replace

import numpy as np
import torch
from scipy.io import wavfile

from benchmarks.metrics import mean_row, of_kind
from benchmarks.mini import put
from benchmarks.samples import Benchmark, Sample, faults_of, label_masks, with_masks
from benchmarks.toy import toy_scene
from data import SAMPLE_RATE
from rewards import region_similarity
from trust.errors import BadInput, reading
from trust.files import check_file, check_name

SPLITS = ("train", "val", "test_s", "test_u", "test_n")
FRAMES = range(10)    # of every video
ROWS = 1600           # of the split train that are trained on, as in the paper
BATCH = 4             # expressions of a batch of the official evaluation


def read_refavs(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    path = f"{root}/metadata.csv"
    names = [f"{t:05d}" for t in FRAMES]
    kind = "unseen" if split == "test_u" else "seen"
    samples = []
    for i, row in enumerate(read_rows(path)):
        if row["split"] is None:
            raise BadInput(f"row {i} has no split: {path}")
        if row["split"] == split:
            sample = Sample("avs", "refavs", "row", str(i), "", kind, names, [])
            samples.append(sample)
            with faults_of(sample):
                read_row(sample, row, root, f"row {i} of {path}")
    return samples


def read_rows(path):
    """The rows of the csv, each {column: text}."""
    check_file(path)
    # A byte order mark at the start is skipped.
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for column in ("uid", "split", "fid", "exp"):
            count = (reader.fieldnames or []).count(column)
            if count != 1:
                raise BadInput(f"{count or 'no'} column {column!r} in {path}")
        return list(reader)


def read_row(sample, row, root, where):
    """Fills in what a row says. Raises BadInput where it is not of its form."""
    # Cells beyond the columns are under None, missing cells are None.
    if None in row or None in row.values():
        raise BadInput(f"{where} does not fit the columns")
    sample.query = row["exp"]
    if "\n" in row["exp"]:
        raise BadInput(f"the expression of {where} has several lines: is a quote not closed?")
    if row["uid"].count("_") < 2:
        raise BadInput(f"the uid of {where} has fewer than three parts")
    folder, category, _ = row["uid"].rsplit("_", 2)
    sample.video = check_name(folder, where)
    if category == "null":
        sample.kind = "null"
        sample.null = True
    media = f"{root}/media/{folder}"
    sample.pictures = [f"{media}/frames/{t}.jpg" for t in FRAMES]
    sample.sound = f"{media}/audio.wav"
    sample.fps = 1.0
    sample.objects = 1
    sample.ids = (row["fid"],)
    masks = f"{root}/gt_mask/{folder}/" + check_name(f"fid_{row['fid']}", where)
    if not os.path.isdir(masks):
        sample.fault = f"no such folder of masks: {masks}"
    labels = [f"{masks}/{name}.png" for name in sample.names]
    with_masks(sample, label_masks, labels, None)


def choose_rows(samples: list[Sample], seed: int) -> list[Sample]:
    """ROWS of the samples, drawn by the seed, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(samples))[:ROWS]
    return [samples[i] for i in sorted(drawn)]


# ---- the official metric ---------------------------------------------------------------------------
def score_refavs(sample: Sample, true, pred) -> dict:
    """J and F, in per cent, and S of one expression.

    J  mean over the frames of the IoU, or, in a frame without target, of the share of pixels rightly left out
    F  mean over the frames with target of the F of regions, at the best of 255 thresholds. A binary mask
       has two: at threshold 0 it is the whole frame, at all others itself
    S  square root of the share of pixels that are predicted, 0 to 1. It should be 0 for what is not there,
       and is 1 where the prediction is missing

    For `refavs_subsets`: area, the share under the root; frames, the number of frames with target; curve, the
    sums of F over these frames at the two thresholds.
    """
    if pred is None:
        frames = len(sample.names)
        if true is not None:
            frames = int(true.any((0, 2, 3)).sum())
        return dict(J=0.0, F=0.0, S=1.0, area=1.0, frames=frames, curve=[0.0, 0.0])
    true = at_256(true.any(0))
    pred = at_256(pred)
    target = true.any((1, 2))                            # bool [T]
    J = np.where(target, region_similarity(pred, true), 1 - pred.mean((1, 2)))
    curve = []
    for masks in (np.ones_like(true), pred):
        curve.append(region_f(masks, true)[target].sum())
    frames = int(target.sum())
    F = 100 * max(curve) / max(frames, 1)
    area = pred.mean()
    return dict(J=100 * J.mean(), F=F, S=math.sqrt(area), area=area, frames=frames, curve=curve)


def at_256(masks):
    """bool [T, H, W] -> [T, 256, 256]: all pixels that a bilinear resize of 0/255 leaves above 0.

    Values are rounded and not smoothed, so masks become a little larger.
    """
    values = 255 * torch.from_numpy(np.ascontiguousarray(masks))[None].float()
    resized = torch.nn.functional.interpolate(values, (256, 256), mode="bilinear")
    return resized[0].numpy() >= 0.5


def region_f(pred, true):
    """F [T] of the pixels of masks [T, H, W], from precision P and recall R: 1.3 P R / (0.3 P + R).

    0 where no pixel is right.
    """
    right = (pred & true).sum((1, 2))
    precision = right / np.maximum(pred.sum((1, 2)), 1)
    recall = right / np.maximum(true.sum((1, 2)), 1)
    return 1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-20)


def refavs_subsets(rows: list[dict]) -> dict:
    """J and F of the kinds seen and unseen, and S of null: means over the batches of each kind."""
    subsets = {}
    for kind in ("seen", "unseen"):
        expressions = of_kind(rows, kind)
        means = []
        for batch in batches(expressions):
            # The sums of F over all frames of the batch, one for each threshold.
            curve = np.sum(column(batch, "curve"), 0)
            frames = sum(column(batch, "frames"))
            F = 100 * curve.max() / max(frames, 1)
            means.append(dict(J=np.mean(column(batch, "J")), F=F))
        subsets[kind] = mean_row(means) | dict(expressions=len(expressions))
    expressions = of_kind(rows, "null")
    roots = []
    for batch in batches(expressions):
        roots.append(math.sqrt(np.mean(column(batch, "area"))))
    S = float(np.mean(roots)) if roots else None
    subsets["null"] = dict(S=S, expressions=len(expressions))
    return subsets


def batches(rows):
    return [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]


def column(rows, key):
    return [row[key] for row in rows]


# ---- the miniature ---------------------------------------------------------------------------------
def mini_refavs(root: str, videos: int):
    """Videos of null expressions have empty masks and a name that says so, as the original ones.

    A thing that is never in sight has no expression.
    """
    rows = [("vid", "uid", "split", "fid", "exp")]
    for (s, split), i in itertools.product(enumerate(SPLITS), range(videos)):
        scene = toy_scene("long", 10 * s + i)
        scene = replace(scene, pictures=scene.pictures[:10], masks=scene.masks[:, :10])
        video = f"toy-{s}-{i}_0_10000"
        folder = video
        masks = scene.masks
        names = [thing.name for thing in scene.things]
        null = split == "test_n" or (split, i) == ("train", 0)
        if null:
            folder = f"null_{'cm'[i % 2]}-{video}"
            masks = np.zeros_like(masks[:1])
            names = ["left", "right", "first", "last"]
        write_media(root, folder, scene, masks)
        for o, name in enumerate(names):
            if not null and not masks[o].any():
                continue
            category = "null" if null else name.replace(" ", "-")
            uid = f"{folder}_{category}_{o + 1}"
            rows.append((video, uid, split, 0 if null else o, f"The {name} object, wherever it is"))
    rows.append((*rows[-1][:4], "a second expression of the same uid"))
    rows.append((*rows[1][:2], "TODO", 0, "not to be used"))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    put(text.getvalue().encode(), f"{root}/metadata.csv")


def write_media(root, folder, scene, masks):
    """Frames, sound, and masks [O, T, H, W] of a toy scene of ten frames."""
    for t in FRAMES:
        put(scene.pictures[t], f"{root}/media/{folder}/frames/{t}.jpg")
        for o, mask in enumerate(masks[:, t]):
            put(mask.astype(np.uint8) * 255, f"{root}/gt_mask/{folder}/fid_{o}/{t:05d}.png")
    # Half a second of the toy world is a second here.
    sound = np.repeat(scene.sound.reshape(10, -1), 2, axis=0).ravel()
    wavfile.write(f"{root}/media/{folder}/audio.wav", SAMPLE_RATE, (sound * 32767).astype(np.int16))


REFAVS = Benchmark(
    read=read_refavs,
    score=score_refavs,
    subsets=refavs_subsets,
    columns=("J", "F", "J&F", "S"),
    decimals={"S": 3},
    worst="0 (S: 1)",
    choose=choose_rows,
    per_video=False,
    mini=mini_refavs,
)
