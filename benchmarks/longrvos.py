"""Long-RVOS (arXiv 2505.12702): expressions that name an object of a video of a minute or more.

    longrvos/{train,valid,test}/
      meta_expressions.json
          {"videos": {video: {"frames": [name], "expressions": {id: {"exp", "obj_id", "type"}}}}}
      JPEGImages/<video>/<frame>.jpg
      Annotations/<video>/<obj_id>/<frame>.png    0 or 255; a frame without the object has no file

exp holds the words; type is static (looks), dynamic (motion) or hybrid. The masks of all splits are public.

The official metric: J and F, and how well the times fit at which the object is in view

    tIoU    frames on which both the object and the prediction are, over frames on which either is
    vIoU    sum of J over the former frames, over the number of the latter

Both are 1 where there are neither. Means are over the expressions, of each type and of all. Quirk: the
official script loses expressions without a word where the first frame of one is missing. Here they score 0.

Letters: T frames, H W pixels.
"""
import os
from functools import partial

import numpy as np

from benchmarks.metrics import boundary_accuracy, by_kind, mean_row
from benchmarks.mini import ask, put, write_clips
from benchmarks.samples import (
    Benchmark,
    Sample,
    check_amount,
    expressions,
    faults_of,
    read_labels,
    require,
    with_masks,
)
from rewards import region_similarity
from trust.errors import BadInput
from trust.files import check_name

KINDS = ("static", "dynamic", "hybrid")
COLUMNS = ("J", "F", "tIoU", "vIoU")


def read_longrvos(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    folder = f"{root}/{split}"
    meta = f"{folder}/meta_expressions.json"
    samples = []
    for sample, where, _, entry in expressions("longrvos", meta, "exp", f"{folder}/JPEGImages"):
        samples.append(sample)
        with faults_of(sample):
            read_target(sample, where, entry, f"{folder}/Annotations/{sample.video}")
    return samples


def read_target(sample, where, entry, annotations):
    """Fills in the kind and the object of an expression. Raises BadInput where its entry is malformed."""
    kind = require(entry, "type", where, str)
    if kind not in KINDS:
        raise BadInput(f"type {kind[:80]!r} is none of {', '.join(KINDS)} in {where}")
    sample.kind = kind
    number = check_name(str(require(entry, "obj_id", where, (str, int))), where)
    sample.ids = (number,)
    sample.objects = 1
    check_name(sample.video, where, slashes=True)
    masks = f"{annotations}/{number}"
    # Files may be missing, and so a missing folder would be an object that is never in view.
    if not os.path.isdir(masks):
        sample.fault = f"no such folder of masks: {masks}"
    with_masks(sample, object_masks, sample, masks)


def object_masks(sample, folder, indices=None):
    """bool [1, T, H, W] of the object with masks in `folder`, for all frames or these indices."""
    if indices is None:
        indices = range(len(sample.names))
    if not os.path.isdir(folder):
        raise BadInput(f"no such folder of masks: {folder}")
    width, height = sample.read_picture(sample.pictures[0]).size
    check_amount(len(indices) * height * width, folder)
    masks = np.zeros((1, len(indices), height, width), bool)
    for t, index in enumerate(indices):
        path = f"{folder}/{sample.names[index]}.png"
        if not os.path.lexists(path):
            continue
        mask = read_labels([path], grey=True)[0] > 0
        if mask.shape != (height, width):
            size = f"{mask.shape[1]} x {mask.shape[0]}"
            raise BadInput(f"mask of {size}, frame of {width} x {height}: {path}")
        masks[0, t] = mask
    return masks


# ---- the official metric ---------------------------------------------------------------------------
def score_longrvos(sample: Sample, true, pred) -> dict:
    """J, F, tIoU and vIoU of one expression, in per cent."""
    if pred is None:
        return dict.fromkeys(COLUMNS, 0.0)
    true = true.any(0)
    J = region_similarity(pred, true)              # [T], as the next ones
    F = boundary_accuracy(pred, true)
    there = true.any((1, 2))
    predicted = pred.any((1, 2))
    both = there & predicted
    either = int((there | predicted).sum())
    tIoU = vIoU = 1.0
    if either:
        tIoU = both.sum() / either
        vIoU = J[both].sum() / either
    values = dict(J=J.mean(), F=F.mean(), tIoU=tIoU, vIoU=vIoU)
    return {column: 100 * float(value) for column, value in values.items()}


def longrvos_subsets(rows: list[dict]) -> dict:
    return by_kind(rows, partial(mean_row, columns=COLUMNS))


# ---- the miniature ---------------------------------------------------------------------------------
def mini_longrvos(root: str, videos: int):
    """Toy clips have no hybrid queries: a thing is named by its looks, and by what singles it out in time."""
    for split in ("train", "valid", "test"):
        folder = f"{root}/{split}"
        meta = {}
        for video, scene, names in write_clips(f"{folder}/JPEGImages", split, range(videos), "toy_{}"):
            for o, masks in enumerate(scene.masks):
                for name, mask in zip(names, masks):
                    if mask.any():
                        put(mask.astype(np.uint8) * 255, f"{folder}/Annotations/{video}/{o}/{name}.png")
            queries = []
            # An expression means one thing. The toy's last query means two, and is left out.
            for kind, query, (o,) in ask(scene)[:-1]:
                queries.append((KINDS[kind == "reasoning"], query, o))
                if kind == "reasoning":
                    queries.append(("hybrid", query.replace("object", scene.things[o].name), o))
            entries = {}
            for n, (kind, query, o) in enumerate(queries):
                entries[str(n)] = dict(exp=query, obj_id=o, type=kind)
            meta[video] = dict(frames=names, expressions=entries)
        put(dict(videos=meta), f"{folder}/meta_expressions.json")


LONGRVOS = Benchmark(
    read=read_longrvos,
    score=score_longrvos,
    subsets=longrvos_subsets,
    columns=("J", "F", "J&F", "tIoU", "vIoU"),
    mini=mini_longrvos,
)
