"""ReVOS (arXiv 2407.11325): expressions that name objects of a video, describe them by reasoning, or mean
nothing in it (hallucination).

    revos/
      meta_expressions_{train,valid}_.json
          {"videos": {video: {"frames": [name], "expressions": {id: {"exp", "anno_id", "type_id"}}}}}
      mask_dict.json                    {annotation: [run lengths of each frame, or null]}
      JPEGImages/<video>/<frame>.jpg    Sa2VA's copy has no level JPEGImages

exp holds the words, anno_id the annotations of the objects, and type_id is an index into KINDS. A few masks
do not have the size of their frames. They are resized, and `check` names them.

The official metric: J, F, accuracy A and robustness R of each expression, rounded to two decimals before they
are averaged. Overall is the mean of referring and reasoning. Quirks: A and R are computed in bytes, and the
official script fails for a mask that does not have the size of its frame. See `score_revos`.

Letters: O objects, T frames, H W pixels.
"""
import itertools
from functools import partial

import numpy as np

from benchmarks.metrics import mean_row, of_kind, score_video
from benchmarks.mini import ask, put, write_clips
from benchmarks.samples import Benchmark, Sample, faults_of, named, require, rle_masks, rle_samples
from benchmarks.toy import CANVAS, Scene
from trust.errors import BadInput
from trust.files import read_json

KINDS = ("referring", "reasoning", "hallucination")
COLUMNS = ("J", "F", "A", "R", "A_x255", "R_x255")


def read_revos(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing.

    extra["foreground"]  () -> bool [1, T, H, W]: the union of all objects that the video's expressions name
    """
    meta = f"{root}/meta_expressions_{split}_.json"
    mask_file = f"{root}/mask_dict.json"
    table = read_json(mask_file)
    samples = []
    # {video: {annotation: None}} in the order of the file; complete when all samples are listed.
    used = {}
    for sample, where, entry in rle_samples("revos", root, meta, mask_file, table, mend=True):
        with faults_of(sample):
            type_id = require(entry, "type_id", where, int)
            if type_id not in (0, 1, 2):
                raise BadInput(f"type_id {type_id} is none of 0, 1, 2 in {where}")
            sample.kind = KINDS[type_id]
        sample.null = sample.kind == "hallucination"
        if sample.null and not sample.ids:
            # It names no object on purpose.
            sample.fault = ""
        ids = used.setdefault(sample.video, {})
        ids.update(dict.fromkeys(sample.ids))
        union = mend = True
        sample.extra["foreground"] = partial(
            named, sample, rle_masks, sample, ids, mask_file, table, union, mend)
        samples.append(sample)
    return samples


# ---- the official metric ---------------------------------------------------------------------------
def score_revos(sample: Sample, true, pred) -> dict:
    """J, F, A and R of one expression, in per cent, each rounded to two decimals.

    A is the share of right pixels. R is 1 - (predicted pixels outside the target) / (foreground pixels), at
    least 0. The official script computes both in bytes, from the number of target objects at each pixel:

    * Where two objects overlap, the number is 2. It equals no prediction, and weighs 1 - 2 = 255 in R.
    * In a prediction of 0 and 255, the usual one, no target pixel is right in A, and a wrong pixel counts 255
      times in R. Published values seem to be computed so: the columns `_x255`. The columns A and R read 255
      as 1.

    Raises BadInput where a mask was resized, because the official script fails there.
    """
    if pred is None:
        return dict.fromkeys(COLUMNS, 0.0)
    foreground = sample.extra["foreground"]()
    foreground = foreground.any(0).sum((1, 2))                   # pixels of each frame, [T]
    if sample.mended:
        raise BadInput(f"{sample.name}: {min(sample.mended)}")
    count = true.sum(0, dtype=np.uint8)                          # [T, H, W]
    values = score_video(sample, true, pred)
    for ending, unit in (("", 1), ("_x255", 255)):
        predicted = pred * np.uint8(unit)
        # The product is a byte, the sum is not.
        wrong = ((1 - count) * predicted).sum((1, 2))            # [T]
        robustness = np.maximum(1 - wrong / (foreground + 1e-6), 0)
        values["A" + ending] = 100 * (count == predicted).mean()
        values["R" + ending] = 100 * robustness.mean()
    return {column: round(value, 2) for column, value in values.items()}


def revos_subsets(rows: list[dict]) -> dict:
    """Means of each subset. Overall is the mean of referring and reasoning, None if one has no expressions.

    Hallucination is in no other subset. Single and multi, by the number of objects, are not in the official
    script.
    """
    plain = [row for row in rows if row["kind"] != "hallucination"]
    subsets = {
        "referring": of_kind(rows, "referring"),
        "reasoning": of_kind(rows, "reasoning"),
        "overall": plain,
        "single": [row for row in plain if row["objects"] == 1],
        "multi": [row for row in plain if row["objects"] > 1],
        "hallucination": of_kind(rows, "hallucination"),
    }
    means = {name: mean_row(subset, COLUMNS) for name, subset in subsets.items()}
    for column in (*COLUMNS, "J&F"):
        both = [means["referring"][column], means["reasoning"][column]]
        means["overall"][column] = None if None in both else sum(both) / 2
    return means


# ---- the miniature ---------------------------------------------------------------------------------
def mini_revos(root: str, videos: int):
    """Even videos lie in OVIS and odd ones in UVO, where frames have other names."""
    images = f"{root}/JPEGImages"
    table = {}
    for split in ("train", "valid"):
        ovis = write_clips(images, split, range(0, videos, 2), f"OVIS/train/{split}-{{}}", "img_{:07d}", 1)
        uvo = write_clips(images, split, range(1, videos, 2), f"UVO/all/-{split}-{{}}", first=120, step=5)
        meta = {}
        for video, scene, names in itertools.chain(ovis, uvo):
            meta[video] = dict(
                vid_id=len(meta),
                height=CANVAS,
                width=CANVAS,
                frames=names,
                expressions=annotate(scene, table, ("referring", "reasoning", "null")),
            )
        put(dict(videos=meta), f"{root}/meta_expressions_{split}_.json")
    put(table, f"{root}/mask_dict.json")


def annotate(scene: Scene, table: dict, kinds: tuple) -> dict:
    """{id: expression} of a toy scene, for its queries of these kinds. Its masks go into the table."""
    from pycocotools import mask as coco
    first = 1000 + len(table)
    for o, masks in enumerate(scene.masks):
        runs = []
        for mask in masks:
            rle = coco.encode(np.asfortranarray(mask, np.uint8))
            rle["counts"] = rle["counts"].decode()
            runs.append(rle if mask.any() else None)
        table[str(first + o)] = runs
    expressions = {}
    for i, (kind, query, things) in enumerate(ask(scene, kinds)):
        ids = [first + o for o in things]
        expression = dict(exp=query, obj_id=things, anno_id=ids, type_id=kinds.index(kind))
        expressions[str(2 * i)] = expression
    return expressions


REVOS = Benchmark(
    read=read_revos,
    score=score_revos,
    subsets=revos_subsets,
    columns=("J", "F", "J&F", "A", "R", "A_x255", "R_x255"),
    mini=mini_revos,
)
