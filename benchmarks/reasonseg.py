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
from functools import partial

import numpy as np

from benchmarks.media import read_image
from benchmarks.metrics import by_kind, mean_picture, overlap, score_picture
from benchmarks.mini import put, rectangles, stills
from benchmarks.samples import Benchmark, Sample, files_of, named, polygon_mask, require, with_masks
from trust.errors import BadInput, reading
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
        try:
            record = read_json(path)
        except BadInput:
            # JSON that is broken fails again.
            record = read_json(path, encoding="cp1252")
        texts = require(record, "text", path, list)
        shapes = require(record, "shapes", path, list)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"'text' is no list of phrasings in {path}")
        kind = "long" if record.get("is_sentence") else "short"
        stem = os.path.basename(path).removesuffix(".json")
        picture = path.removesuffix(".json") + ".jpg"
        if split != "train":
            texts = texts[:1]
        for i, text in enumerate(texts):
            sample = Sample("vos", "reasonseg", f"{split}/{stem}", str(i), text, kind, [stem], [picture])
            sample.objects = 1
            sample.ids = ("target",)
            sample.extra["ignore"] = partial(named, sample, lisa_mask, picture, path, shapes, IGNORED)
            samples.append(with_masks(sample, lisa_mask, picture, path, shapes, TARGET))
    return samples


def lisa_mask(picture, path, shapes, value, indices=None):
    """bool [1, 1, H, W]: the pixels of `value`, TARGET or IGNORED. Raises BadInput that names a bad shape."""
    width, height = read_image(picture).size
    # Of the shapes that are drawn.
    values = []
    masks = []
    for i, shape in enumerate(shapes):
        where = f"{path}: shape {i}"
        with reading(where):
            label = require(shape, "label", where, str).lower()
            points = np.array(require(shape, "points", where, list))
            if points.dtype.kind not in ("i", "f") or points.shape != (len(points), 2):
                raise BadInput(f"no corners in {where}")
            if label != "flag":
                corners = [tuple(corner) for corner in points.astype(int).tolist()]
                values.append(IGNORED if "ignore" in label else TARGET)
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
    name="reasonseg",
    folder="reasonseg",
    splits=("train", "val", "test"),
    read=read_reasonseg,
    tested="val",
    task="image",
    score=score_reasonseg,
    subsets=reasonseg_subsets,
    columns=("gIoU", "cIoU", "gIoU_fg", "cIoU_fg"),
    paired="IoU",
    mini=mini_reasonseg,
)
