"""ReasonSeg (LISA, arXiv 2308.00692): phrasings that describe an object of a picture by reasoning.

    reasonseg/{train,val,test}/
      <name>.jpg
      <name>.json    {"text": [phrasing], "is_sentence": bool, "shapes": [{"label", "points": [[x, y]]}]}

A shape is a polygon of the target, or, with "ignore" in its label, of what is to be ignored. Shapes with
the label "flag" are skipped, and smaller shapes are drawn over larger ones. A few files are written in
cp1252. In training every phrasing is a sample, a clip of one frame. In evaluation only the first one is,
and a box is asked for.

The metrics are RefCOCO's gIoU and cIoU, in two ways that are published. LISA leaves out the pixels to be
ignored. Seg-Zero (arXiv 2503.06520) and VisionReasoner (arXiv 2505.12081) count them as target: the columns
`_fg`. Quirk: where both masks are empty, IoU is 1 for LISA and 0 for the others.
Letters: O objects, H W pixels.
"""
import json
import os
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.media import read_image
from benchmarks.metrics import by_kind, mean_picture, overlap, score_picture
from benchmarks.mini import put, rectangles, stills
from benchmarks.samples import (
    Benchmark,
    Sample,
    faults_of,
    files_of,
    named,
    near_corners,
    polygon_mask,
    require,
    with_masks,
)
from trust.errors import BadInput
from trust.files import read_json

# Values of a drawn picture.
TARGET = 1
IGNORED = 2


def read_reasonseg(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing.

    extra["ignore"]  () -> bool [1, 1, H, W]: pixels to be ignored
    """
    samples = []
    for path in files_of(f"{root}/{split}", "json"):
        stem = os.path.basename(path).removesuffix(".json")
        picture = path.removesuffix(".json") + ".jpg"
        sample = Sample("vos", "reasonseg", f"{split}/{stem}", "0", "", "short", [stem], [picture])
        sample.objects = 1
        sample.ids = ("target",)
        texts = [""]
        shapes = []
        with faults_of(sample):
            record = read_record(path)
            texts = require(record, "text", path, list) or texts
            shapes = require(record, "shapes", path, list)
            if record.get("is_sentence"):
                sample.kind = "long"
        if split != "train":
            texts = texts[:1]
        for i, text in enumerate(texts):
            asked = replace(sample, expression=str(i), query=text, extra={})
            asked.extra["ignore"] = partial(named, asked, lisa_mask, picture, path, shapes, IGNORED)
            samples.append(with_masks(asked, lisa_mask, picture, path, shapes, TARGET))
    return samples


def read_record(path):
    try:
        return read_json(path)
    except BadInput:
        # JSON that is broken fails again.
        return read_json(path, encoding="cp1252")


def lisa_mask(picture, path, shapes, value, indices=None):
    """bool [1, 1, H, W]: the pixels of `value`, TARGET or IGNORED. Raises BadInput that names a bad shape."""
    width, height = read_image(picture).size
    values = []
    outlines = []
    for i, shape in enumerate(shapes):
        where = f"{path}: shape {i}"
        label = require(shape, "label", where, str).lower()
        points = require(shape, "points", where, list)
        points, = near_corners([points], height, width, where)
        if label != "flag":
            values.append(IGNORED if "ignore" in label else TARGET)
            outlines.append(points)
    masks = []
    for points in near_corners(outlines, height, width, path):
        corners = [tuple(corner) for corner in points.astype(int).tolist()]
        masks.append(polygon_mask(corners, height, width))
    drawn = np.zeros((height, width), np.uint8)
    areas = [mask.sum() for mask in masks]
    # The largest first.
    for i in np.argsort(areas)[::-1]:
        drawn[masks[i]] = values[i]
    return (drawn == value)[None, None]


# ---- the metrics -----------------------------------------------------------------------------------
def score_reasonseg(sample: Sample, true, pred) -> dict:
    """What `score_picture` gives without the pixels to be ignored; and I, U, IoU `_fg` with them as target.

    true [O, 1, H, W], pred [1, H, W]
    """
    if true is None:
        return score_picture(sample, None, None) | dict(I_fg=0, U_fg=0, IoU_fg=0.0)
    ignore = sample.extra["ignore"]()                # [1, 1, H, W]
    I, U = overlap(true | ignore, pred)
    if pred is not None:
        pred = pred & ~ignore[0]
    values = score_picture(sample, true & ~ignore, pred)
    return values | dict(I_fg=I, U_fg=U, IoU_fg=100 * I / max(U, 1))


def reasonseg_subsets(rows: list[dict]) -> dict:
    """Both ways, overall and for long queries (sentences) and short ones."""
    return by_kind(rows, partial(mean_picture, endings=("", "_fg")))


# ---- the miniature ---------------------------------------------------------------------------------
def mini_reasonseg(root: str, videos: int):
    """A picture's first thing is the target, the second is to be ignored. Every second file is in cp1252."""
    for split in ("train", "val", "test"):
        for i, (picture, masks, names) in enumerate(stills(split, videos)):
            shapes = []
            for label, mask in zip(("target", "ignore"), masks):
                for x1, y1, x2, y2 in rectangles(mask):
                    shapes.append(dict(label=label, points=[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]))
            shapes.append(dict(label="flag", points=[[0, 0]]))
            record = dict(
                text=[f"what is a {names[0]}?", f"voil\xe0, a {names[0]}"],
                is_sentence=i % 2 == 0,
                shapes=shapes,
            )
            encoding = ("utf-8", "cp1252")[i % 2]
            content = json.dumps(record, ensure_ascii=False).encode(encoding)
            put(picture, f"{root}/{split}/{i}.jpg")
            put(content, f"{root}/{split}/{i}.json")


REASONSEG = Benchmark(
    read=read_reasonseg,
    task="image",
    score=score_reasonseg,
    subsets=reasonseg_subsets,
    columns=("gIoU", "cIoU", "gIoU_fg", "cIoU_fg"),
    paired="IoU",
    mini=mini_reasonseg,
)
