"""Evaluates a policy on a benchmark, or predictions of any model:

    python eval.py --bench toy --policy DIR --out DIR
    torchrun --nproc_per_node 8 eval.py --bench revos --data_root DIR --policy DIR --sam2_weights FILE --out DIR
    python eval.py --bench revos --data_root DIR --predictions DIR --out DIR

System 1 sees at most 24 frames of a clip; the policy (or --system2) grounds its keyframes; SAM2 runs over every frame at source
size. A real benchmark's predictions go to OUT/Annotations in its official layout, an expression at a time, so that the same
command goes on after an interruption; then they are scored with the official metrics. Prints a table and writes results.json.
The toy world's columns: J (region similarity), F (boundary accuracy) and their mean; the share of keyframes on which the target
is to be seen; the share of well-formed answers. `--against OTHER/results.json` adds the paired difference to another evaluation
of the same toy clips, with its 95 % interval.
"""
import argparse
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from data import BadInput, Parser, Processor, add_roots, at_least, dataset_root, fail, load, open_real, open_toy, read_json, \
    reading, rle_mask, roots_given
from model import Thinker
from rewards import box_iou, format_reward, mask_box
from segment import TOY_POLICY, TOY_SAM2, Tracker, device, find_config, plugged, segment

COLUMNS = ("J", "F", "J&F", "visible", "format")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------
# The two metrics of every video object segmentation benchmark, as the DAVIS evaluation defines them. No resizing
# and no void: masks are compared at the source's size. Letters: T frames, H W pixels.


def region_similarity(pred, true) -> np.ndarray:
    """J [T]: IoU of the masks of each frame, 1 where both are empty.

    pred, true  [T, H, W], bool or 0 and anything else (0/255). Raises ValueError where their shapes differ."""
    pred, true = _mask_pair(pred, true)
    shared, union = (pred & true).sum((1, 2)), (pred | true).sum((1, 2))
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def boundary_accuracy(pred, true) -> np.ndarray:
    """F [T]: harmonic mean of the boundaries' precision and recall, within 0.8% of the image's diagonal.

    pred, true  as in region_similarity. The image's border is no boundary: a full mask has none, and is equal to
    an empty one here."""
    pred, true = _mask_pair(pred, true)
    radius = math.ceil(0.008 * math.hypot(*pred.shape[1:]))                   # pixels
    return np.array([_frame_accuracy(_boundary(p), _boundary(t), radius) for p, t in zip(pred, true)])


def _mask_pair(pred, true) -> tuple[np.ndarray, np.ndarray]:
    pred, true = np.asarray(pred, dtype=bool), np.asarray(true, dtype=bool)   # 255 becomes True
    if pred.ndim != 3 or pred.shape != true.shape:
        raise ValueError(f"pred {pred.shape} and true {true.shape} must be the same [T, H, W]")
    return pred, true


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels [H, W] that differ from the neighbour to the right, below, or both: lines one pixel wide."""
    padded = np.pad(mask, ((0, 1), (0, 1)), "edge")                           # beyond the border nothing changes
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)


def _frame_accuracy(pred: np.ndarray, true: np.ndarray, radius: int) -> float:
    """F of two boundary maps [H, W]."""
    if not (pred.any() and true.any()):
        return float(pred.any() == true.any())                                # 1 if neither has a boundary
    rows, columns = (pred | true).any(1).nonzero()[0], (pred | true).any(0).nonzero()[0]
    # Only distances between boundary pixels matter, so their common box is enough: several times faster.
    crop = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    precision, recall = _share_near(pred[crop], true[crop], radius), _share_near(true[crop], pred[crop], radius)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _share_near(boundary: np.ndarray, other: np.ndarray, radius: int) -> float:
    """Share of `boundary`'s pixels within `radius` of `other`: what dilating `other` by a disk would cover."""
    return float((distance_transform_edt(~other)[boundary] <= radius).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Predictions: one folder per expression, one picture per frame, gray, 0 or 255
# ---------------------------------------------------------------------------------------------------------------------
PARTIAL = ".partial"     # ends the names of what is not finished


def prediction_folder(directory, sample):
    """Where the prediction of a sample lies below a directory that may or may not have the level Annotations."""
    return os.path.join(_top(directory), sample.extra.get("folder", sample.video), sample.expression)


def _top(directory):
    inner = os.path.join(directory, "Annotations")
    return inner if os.path.isdir(inner) else directory


def write_prediction(out, sample, masks):
    """Writes masks, bool [T, H, W], into OUT/Annotations. The folder appears whole or not at all: an expression whose
    folder exists is finished, also after an interruption."""
    if len(masks) != len(sample.names):
        raise BadInput(f"{len(masks)} masks for the {len(sample.names)} frames of {sample.name}")
    os.makedirs(os.path.join(out, "Annotations"), exist_ok=True)
    folder = prediction_folder(out, sample)
    shutil.rmtree(folder + PARTIAL, ignore_errors=True)          # of an interrupted run
    os.makedirs(folder + PARTIAL)
    for name, mask in zip(sample.names, masks):
        Image.fromarray(np.asarray(mask, np.uint8) * 255).save(os.path.join(folder + PARTIAL, f"{name}.png"))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + PARTIAL, folder)


def open_predictions(path):
    """A directory as it is, or the contents of a .json of run lengths. Raises one clear error naming what is neither."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such directory or .json of predictions: {path}")
    if os.path.isdir(path):
        return path
    videos = read_json(path)
    for video, found in videos.items():
        if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
            raise BadInput(f"not {{video: {{expression: {{\"prediction_masks\": [...]}}}}}}: {video} in {path}")
    return videos


def read_prediction(source, sample, size):
    """bool [T, H, W] of a sample, None if there is nothing of it.

    source  a directory, or {video: {expression: {"prediction_masks": [run lengths of each frame, or null]}}} (open_predictions).
    size  (H, W) of the frames. Raises ValueError naming the frame that is missing, broken or of another size. T frames are
    sample.extra["scored"] where not all of them count."""
    if isinstance(source, dict):
        return _from_json(source, sample, size)
    folder = prediction_folder(source, sample)
    if not os.path.isdir(folder):
        return None
    return np.stack([_read_mask(os.path.join(folder, f"{name}.png"), size) for name in scored_names(sample)])


def scored_names(sample):
    return sample.extra.get("scored", sample.names)


def is_whole(source, sample):
    """Whether all frames of a sample have a prediction, which is not read."""
    if isinstance(source, dict):
        return sample.expression in source.get(sample.video, {})
    folder = prediction_folder(source, sample)
    return all(os.path.isfile(os.path.join(folder, f"{name}.png")) for name in sample.names)


def _read_mask(path, size):
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("L")) > 0            # 1 and 255 alike
    except (OSError, SyntaxError, ValueError) as error:          # Pillow raises any of them for a broken picture
        raise BadInput(f"cannot read predicted mask: {path} ({error})") from None
    if mask.shape != tuple(size):
        raise BadInput(f"predicted mask of wrong size: {path} is {mask.shape[0]} x {mask.shape[1]}, "
                         f"its frame {size[0]} x {size[1]}")
    return mask


def _from_json(source, sample, size):
    found = source.get(sample.video, {}).get(sample.expression)
    if found is None:
        return None
    runs = found.get("prediction_masks")
    if not isinstance(runs, list) or len(runs) != len(sample.names):
        raise BadInput(f"prediction_masks of {sample.name} are not a list of {len(sample.names)}, one per frame")
    where = f"the prediction of {sample.name}"
    with reading(where):
        runs = [runs[sample.names.index(name)] for name in scored_names(sample)]
        masks = np.stack([np.zeros(size, bool) if rle is None else rle_mask(rle, where) for rle in runs])
    if masks.shape[1:] != tuple(size):
        raise BadInput(f"prediction of {sample.name}: masks of {masks.shape[1]} x {masks.shape[2]}, its frames of {size[0]} x "
                       f"{size[1]}")
    return masks


def zip_predictions(bench, samples, directory, out):
    """OUT/BENCH.zip of the samples' predictions as the benchmark's server takes them; returns its path."""
    if not os.path.isdir(_top(directory)):
        raise FileNotFoundError(f"no folder of predictions to pack: {_top(directory)}")
    path = os.path.join(out, f"{bench}.zip")
    top = "" if bench == "mevis" else "Annotations"              # the videos of MeViS are the top of its archive
    files = [os.path.join(prediction_folder(directory, sample), f"{name}.png") for sample in samples for name in sample.names]
    with zipfile.ZipFile(path + PARTIAL, "w") as archive:        # stored: the pictures are compressed already
        for file in sorted(filter(os.path.isfile, files)):
            archive.write(file, os.path.join(top, os.path.relpath(file, _top(directory))))
    os.replace(path + PARTIAL, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One expression: score(sample, true [O, T, H, W], pred [T, H, W] or None) -> its values
# ---------------------------------------------------------------------------------------------------------------------
def score_video(sample, true, pred):
    """J and F, means over all frames: MeViS, ReasonVOS, Ref-DAVIS B."""
    if pred is None:
        return dict(J=0.0, F=0.0)
    true = true.any(0)
    return dict(J=100 * region_similarity(pred, true).mean(), F=100 * boundary_accuracy(pred, true).mean())


def score_revos(sample, true, pred):
    """J, F, accuracy A and robustness R, each rounded to two decimals, as the official script does before it averages.

    R is 1 - (pixels found beside the target) / (pixels of any object of the video that an expression means), at least 0.
    The script computes it and A in bytes: two objects of a target make a pixel 2, which equals no prediction and weighs
    1 - 2 = 255; and from pictures of 0/255, the usual ones, each wrong pixel counts 255 times and none found is right.
    Published values look to be of that kind: `_x255`. Plain A and R take a found pixel as 1.

    sample.extra["foreground"]  () -> bool [1, T, H, W]: union over all objects that any expression of the video means;
    sample.extra["resized"]  masks that did not have the size of their frames: over these the script gives up, and scores 0."""
    if pred is None:
        return dict(J=0.0, F=0.0, **dict.fromkeys(("A", "R", "A_x255", "R_x255"), 0.0))
    count, allowed = true.sum(0, dtype=np.uint8), sample.extra["foreground"]().any(0).sum((1, 2))    # [T, H, W], [T]
    if sample.extra.get("resized"):
        raise BadInput(f"{sample.name}: {min(sample.extra['resized'])}")
    values = score_video(sample, true, pred)
    for ending, unit in ("", 1), ("_x255", 255):
        found = pred * np.uint8(unit)
        wrong = ((1 - count) * found).sum((1, 2))                # [T]; the product is a byte, the sum is not
        values["A" + ending] = 100 * (count == found).mean()
        values["R" + ending] = 100 * np.maximum(1 - wrong / (allowed + 1e-6), 0).mean()
    return {key: round(value, 2) for key, value in values.items()}


def score_refavs(sample, true, pred):
    """Ref-AVS, at 256 x 256 as officially. Its F is none of boundaries.

    J  mean over frames of the IoU; of a frame without target, of the share of pixels rightly left out.
    F  precision and recall of regions with beta^2 = 0.3, means over the frames with target, best of 255 thresholds. A
       binary mask knows two: 0, which takes the whole frame, and all others. `frames` and `curve`, the sum at either,
       are for refavs_subsets, which takes the best of several expressions together.
    S  sqrt(share of the pixels found), 0 to 1, which should be 0 for what is not there; 1 if missing."""
    if pred is None:
        frames = len(sample.names) if true is None else int(true.any((0, 2, 3)).sum())
        return dict(J=0.0, F=0.0, S=1.0, area=1.0, frames=frames, curve=[0.0, 0.0])
    true, pred = at_256(true.any(0)), at_256(pred)
    target = true.any((1, 2))                                    # bool [T]
    J = np.where(target, region_similarity(pred, true), 1 - pred.mean((1, 2))).mean()
    curve = [region_f(np.ones_like(true), true)[target].sum(), region_f(pred, true)[target].sum()]
    area, frames = pred.mean(), int(target.sum())
    return dict(J=100 * J, F=100 * max(curve) / max(frames, 1), S=math.sqrt(area), area=area, frames=frames, curve=curve)


def at_256(masks):
    """bool [T, H, W] -> [T, 256, 256]: all pixels that a bilinear resize of 0/255 leaves above 0 (rounded, not smoothed),
    which makes masks a little larger."""
    values = 255 * torch.from_numpy(np.ascontiguousarray(masks))[None].float()
    return torch.nn.functional.interpolate(values, (256, 256), mode="bilinear")[0].numpy() >= 0.5


def region_f(pred, true):
    """[T] weighted harmonic mean of precision and recall of the pixels of masks [T, H, W]; 0 where none is right."""
    right = (pred & true).sum((1, 2))
    precision, recall = (right / np.maximum(mask.sum((1, 2)), 1) for mask in (pred, true))
    return 1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-20)


def score_picture(sample, true, pred):
    """RefCOCO, +, g: pixels of intersection I and union U, and IoU, 1 where both masks are empty; whether the boxes around the
    masks have an IoU above 0.5."""
    I, U = _overlap(true, pred)
    boxed = pred is not None and true.any() and pred.any()
    found = bool(boxed and box_iou(mask_box(true.any((0, 1))), mask_box(pred[0]))[0, 0] > 0.5)
    return dict(I=I, U=U, IoU=100 * (I / (U + 1e-5) + (U == 0 and pred is not None)), found=found)


def score_reasonseg(sample, true, pred):
    """I, U, IoU in both ways that are published: as score_picture without the pixels marked "ignore" (LISA), and, `_fg`, with
    these as part of the target and IoU 0 where both masks are empty (Seg-Zero, VisionReasoner).

    sample.extra["ignore"]  () -> bool [1, 1, H, W]."""
    if true is None:
        return score_picture(sample, None, None) | dict(I_fg=0, U_fg=0, IoU_fg=0.0)
    ignore = sample.extra["ignore"]()[0]                         # [1, H, W]
    I, U = _overlap(true | ignore, pred)
    kept = score_picture(sample, true & ~ignore, None if pred is None else pred & ~ignore)
    return kept | dict(I_fg=I, U_fg=U, IoU_fg=100 * I / max(U, 1))


def _overlap(true, pred):
    """Pixels of intersection and union of true [O, 1, H, W] and pred [1, H, W]. A missing prediction has found nothing."""
    true = np.zeros((1, 1, 1), bool) if true is None else true.any(0)
    pred = np.zeros_like(true) if pred is None else pred
    return int((pred & true).sum()), int((pred | true).sum())


# ---------------------------------------------------------------------------------------------------------------------
# All expressions: subsets(rows) -> {subset: {column: value, "expressions": count}}
# ---------------------------------------------------------------------------------------------------------------------
def mean_row(rows, columns=("J", "F")):
    """Mean of each column over the rows, and J&F, the mean of the two means; None without rows."""
    means = {c: float(np.mean([row[c] for row in rows])) if rows else None for c in columns}
    return means | {"J&F": (means["J"] + means["F"]) / 2 if rows else None, "expressions": len(rows)}


def mean_picture(rows):
    """gIoU, the mean of the IoUs, cIoU, all intersections over all unions, and Acc@0.5, the share of boxes found."""
    values = {"expressions": len(rows), "Acc@0.5": 100 * float(np.mean([row["found"] for row in rows]))}
    for end in ("", "_fg") if "I_fg" in rows[0] else ("",):
        I, U, ious = (np.array([row[key + end] for row in rows], float) for key in ("I", "U", "IoU"))
        values |= {"gIoU" + end: float(ious.mean()), "cIoU" + end: float(100 * I.sum() / (U.sum() + 1e-10))}
    return values


def by_kind(rows, average=mean_row):
    """Expressions weigh the same, overall and in each kind where there are several."""
    kinds = sorted({row["kind"] for row in rows})
    return {"overall": average(rows)} | {kind: average(_of(rows, kind)) for kind in kinds if len(kinds) > 1}


def _of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def revos_subsets(rows):
    """Overall is the mean of referring and reasoning, whatever their numbers of expressions; hallucination (type 2) is in
    no other subset. Single and multi: by the number of objects of the two kinds' expressions (not in the official script)."""
    columns = ("J", "F", "A", "R", "A_x255", "R_x255")
    kinds = ("referring", "reasoning", "hallucination")
    referring, reasoning, hallucination = (mean_row(_of(rows, kind), columns) for kind in kinds)
    plain = [row for row in rows if row["kind"] != "hallucination"]
    both = {c: (referring[c] + reasoning[c]) / 2 if referring["expressions"] and reasoning["expressions"] else None
            for c in (*columns, "J&F")}
    return dict(referring=referring, reasoning=reasoning, overall=both | dict(expressions=len(plain)),
                single=mean_row([row for row in plain if row["objects"] == 1], columns),
                multi=mean_row([row for row in plain if row["objects"] > 1], columns), hallucination=hallucination)


def refavs_subsets(rows):
    """The official unit is the batch: 4 expressions in the order of the csv, of which F takes the best threshold together
    and S the root of the mean area. Null expressions have an S, the others J and F."""
    found = {}
    for kind in ("seen", "unseen"):
        batches = [dict(J=np.mean([row["J"] for row in batch]), F=_best_f(batch)) for batch in _batches(_of(rows, kind))]
        found[kind] = mean_row(batches) | dict(expressions=len(_of(rows, kind)))
    S = [math.sqrt(np.mean([row["area"] for row in batch])) for batch in _batches(_of(rows, "null"))]
    return found | {"null": dict(S=float(np.mean(S)) if S else None, expressions=len(_of(rows, "null")))}


def _batches(rows, size=4):
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def _best_f(batch):
    frames = sum(row["frames"] for row in batch)
    return 100 * np.sum([row["curve"] for row in batch], 0).max() / max(frames, 1)


def davis_subsets(rows):
    """Protocol B of Ref-DAVIS: J and F of each expression's masks, rounded at the end. Protocol A: davis_protocol_a."""
    return {"protocol B": {key: round(value, 2) for key, value in mean_row(rows).items()}}


def davis_protocol_a(samples, source, readable):
    """{subset: columns}: the unsupervised evaluation of DAVIS 2017, objects weighing the same, for each annotator's
    expressions and their mean. The object of what is not in `readable` (names) scores 0, and so does all of a video whose
    annotation is broken; officially the evaluation ends there.

    sample.extra: "annotator" 0 to 3; "annotation" () -> uint8 [T, H, W], objects 1, 2, ..., 255 for void; "ids": [its number]."""
    objects = {}
    for (annotator, video), group in annotator_videos(samples).items():
        try:
            annotation = group[0].extra["annotation"]()
        except BadInput:                                         # each of its rows names it
            scores = [(0.0, 0.0)] * len(group)
        else:
            found = indexed_masks(group, source, annotation.shape, readable)
            missing = [(p, int(sample.extra["ids"][0])) for p, sample in enumerate(group, 1) if sample.name not in readable]
            scores = match_objects(found, annotation, missing)
        objects.setdefault(annotator, []).extend(scores)
    found = {f"annotator {k}": mean_row([dict(J=J, F=F) for J, F in many]) for k, many in sorted(objects.items())}
    mean = mean_row([row for row in found.values() if row["expressions"]])
    return {"protocol A": mean | dict(expressions=len(samples))} | found


def annotator_videos(samples):
    """{(annotator, video): its samples, one per object, in the order of the file}."""
    groups = {}
    for sample in sorted(samples, key=lambda s: int(s.expression)):
        groups.setdefault((sample.extra["annotator"], sample.video), []).append(sample)
    return groups


def indexed_masks(group, source, shape, readable):
    """uint8 [T, H, W]: 1 where the first sample's mask is, 2 where the second's is and not the first's, and so on."""
    indexed = np.zeros(shape, np.uint8)
    for index, sample in reversed(list(enumerate(group, 1))):
        masks = read_prediction(source, sample, shape[1:]) if sample.name in readable else None
        if masks is not None:
            indexed[masks] = index
    return indexed


def match_objects(found, annotation, missing=()):
    """(J, F) of every true object of one video, in per cent, under the assignment with the best sum of J and F. missing: pairs
    (proposal, object) that score 0 whatever they are matched with, as there is no prediction.

    found, annotation  uint8 [T, H, W]. True objects are those up to the highest index on the first frame. Void pixels
    belong to no mask. Proposals are as many as the highest index found, and at least as many as objects."""
    void = annotation == 255
    objects = int(annotation[0][~void[0]].max(initial=0))
    proposals = max(int(found.max()), objects)
    table = np.zeros((2, proposals, objects))                    # J and F
    for p, o in np.ndindex(proposals, objects):
        pred, true = (found == p + 1) & ~void, annotation == o + 1
        table[:, p, o] = region_similarity(pred, true).mean(), boundary_accuracy(pred, true).mean()
    for p, o in missing:
        table[:, p - 1:p], table[:, :, o - 1:o] = 0, 0
    rows, columns = linear_sum_assignment(table.sum(0), maximize=True)
    return [tuple(100 * table[:, p, o]) for p, o in zip(rows, columns)]


def write_davis(out, samples, readable):
    """OUT/anno_0 ... anno_3/<video>/<frame>.png, indexed, from OUT/Annotations: what the DAVIS 2017 evaluation takes. A video
    without a readable prediction is left out."""
    for (annotator, video), group in annotator_videos(samples).items():
        if not any(sample.name in readable for sample in group):
            continue
        shape = group[0].extra["annotation"]().shape
        folder = os.path.join(out, f"anno_{annotator}", video)
        os.makedirs(folder, exist_ok=True)
        for name, indices in zip(group[0].names, indexed_masks(group, out, shape, readable)):
            Image.fromarray(indices).save(os.path.join(folder, f"{name}.png"))


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks
# ---------------------------------------------------------------------------------------------------------------------
VIDEO = dict(score=score_video, subsets=by_kind, columns=("J", "F", "J&F"), split="valid")
PICTURE = dict(score=score_picture, subsets=lambda rows: by_kind(rows, mean_picture), columns=("gIoU", "cIoU", "Acc@0.5"),
               split="val", task="image")
BENCHES = {
    "revos": VIDEO | dict(score=score_revos, subsets=revos_subsets, columns=("J", "F", "J&F", "A", "R", "A_x255", "R_x255")),
    "mevis": VIDEO | dict(split="valid_u"), "reasonvos": VIDEO | dict(split="test"),
    "refdavis": VIDEO | dict(subsets=davis_subsets), "refytvos": VIDEO,
    "refavs": dict(score=score_refavs, subsets=refavs_subsets, columns=("J", "F", "J&F", "S"), split="test_s,test_u,test_n"),
    "refcoco": PICTURE, "refcoco+": PICTURE, "refcocog": PICTURE,
    "reasonseg": PICTURE | dict(score=score_reasonseg, columns=("gIoU", "cIoU", "gIoU_fg", "cIoU_fg")),
}


def score_sample(bench, sample, source):
    """One row: name, kind, objects, the benchmark's values, and as `problem` None, "missing", or what cannot be read."""
    score, true, problem = BENCHES[bench]["score"], None, None
    try:
        true = sample.read_masks()
        pred = read_prediction(source, sample, true.shape[2:])
        values, problem = score(sample, true, pred), "missing" if pred is None else None
    except (OSError, ValueError) as error:
        values, problem = score(sample, true, None), str(error)
    return dict(name=sample.name, kind=sample.kind, objects=sample.extra.get("objects"), problem=problem) | values


def score_predictions(bench, samples, directory, workers=8):
    """Scores predictions of any model, `workers` expressions at a time -> results of `total`.

    samples  all expressions of a split, in the order of its file. directory  as write_prediction makes it, with or without
    the level Annotations, or a .json of run lengths. Raises ValueError where the masks are not public."""
    if not samples or any(sample.read_masks is None for sample in samples):
        raise BadInput(f"nothing to score in {bench}: " + ("its masks are not public" if samples else "no samples"))
    source = open_predictions(directory)
    with ThreadPoolExecutor(workers) as pool:                    # distances and decoding leave Python's lock alone
        todo = pool.map(lambda sample: score_sample(bench, sample, source), samples)
        rows = list(tqdm(todo, total=len(samples), desc="scores", unit="expression"))
    return total(bench, samples, rows, source)


def total(bench, samples, rows, source):
    """{"bench", "summary", "subsets", "expressions": rows, "missing": count, "broken": messages} of the rows of all samples.

    subsets  {subset: {column: value, "expressions": count}}; summary  the same flat, {"subset column": value}."""
    subsets = BENCHES[bench]["subsets"](rows)
    if bench == "refdavis":
        subsets = davis_protocol_a(samples, source, readable(rows)) | subsets
    summary = {f"{name} {c}": row[c] for name, row in subsets.items() for c in BENCHES[bench]["columns"] if c in row}
    problems = [row["problem"] for row in rows if row["problem"]]
    return dict(bench=bench, summary=summary, subsets=subsets, expressions=rows, missing=problems.count("missing"),
                broken=[problem for problem in problems if problem != "missing"])


def readable(rows):
    """Names of the samples whose prediction, and truth, could be read."""
    return {row["name"] for row in rows if row["problem"] is None}


def score_table(results):
    """The subsets as a table, and a line each on what is missing and what is broken."""
    columns, count = BENCHES[results["bench"]]["columns"], len(results["expressions"])
    lines = [f"{'':14}" + "".join(f"{c:>9}" for c in columns) + f"{'expressions':>13}"]
    for name, row in results["subsets"].items():
        cells = ["" if row.get(c) is None else f"{row[c]:.3f}" if c == "S" else f"{row[c]:.2f}" for c in columns]
        lines.append(f"{name:14}" + "".join(f"{cell:>9}" for cell in cells) + f"{row['expressions']:13}")
    worst = "scored 0 (S: 1)" if "S" in columns else "scored 0"
    if results["missing"]:
        lines.append(f"no prediction, {worst}: {results['missing']} of {count} expressions")
    if results["broken"]:
        lines.append(f"cannot be read, {worst}: {len(results['broken'])} of {count} expressions, first: {results['broken'][0]}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def score(clip, text, chosen, masks):
    """One clip's results. `visible`: share of its keyframes on which the target is to be seen, None without keyframes or
    without a target."""
    true = clip.masks.any(0)                                                                    # [T, H, W]
    J, F = region_similarity(masks, true).mean(), boundary_accuracy(masks, true).mean()
    seen = [bool(true[t].any()) for t in chosen] if true.any() else []
    return {"clip": clip.name, "kind": clip.kind, "query": clip.query, "J": J, "F": F, "J&F": (J + F) / 2,
            "visible": float(np.mean(seen)) if seen else None, "format": format_reward(text), "keyframes": list(chosen),
            "text": text}


def evaluate(data, policy, system2, processor, tracker, batch, max_new_tokens):
    """Results of every clip of a dataset, `batch` clips at a time."""
    results = []
    for first in tqdm(range(0, len(data), batch), desc="clips", unit="batch"):
        clips = [data[i] for i in range(first, min(first + batch, len(data)))]
        found = segment(policy, system2, processor, tracker, clips, max_new_tokens)
        results += [score(clip, text, chosen, masks) for clip, (text, chosen, _, masks) in zip(clips, found)]
    return results


def averages(results):
    """{group: {column: mean, "clips": count}} overall and per kind of query; clips without a value are left out of it."""
    kinds = sorted({r["kind"] for r in results})
    groups = {"overall": results} | {kind: [r for r in results if r["kind"] == kind] for kind in kinds}
    return {name: {c: _mean([r[c] for r in rows if r[c] is not None]) for c in COLUMNS} | dict(clips=len(rows))
            for name, rows in groups.items()}


def _mean(values):
    return float(np.mean(values)) if values else None


def paired_difference(results, others):
    """J&F of results minus that of others, clip by clip -> (mean, half the width of its 95 % interval; None for one clip).
    Raises BadInput where the clips differ."""
    if [r["clip"] for r in results] != [r["clip"] for r in others]:
        raise BadInput("the two evaluations are not of the same clips")
    difference = np.array([r["J&F"] - o["J&F"] for r, o in zip(results, others)])
    half = float(1.96 * difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else None
    return float(difference.mean()), half


def read_others(path, names):
    """Results of another evaluation. Raises BadInput where they are not results, or not of the clips of these names."""
    report = read_json(path)
    with reading(path):
        others = report["clips"]
        if not all(math.isfinite(other["J&F"]) for other in others):
            raise ValueError("a J&F is not a number")
        clips = [other["clip"] for other in others]
    if clips != names:
        raise BadInput(f"not an evaluation of the same clips: {path}")
    return others


def table(summary):
    lines = [f"{'':12}" + "".join(f"{c:>9}" for c in (*COLUMNS, "clips"))]
    for name, row in summary.items():
        cells = ["" if row[c] is None else f"{100 * row[c]:.1f}" for c in COLUMNS]
        lines.append(f"{name:12}" + "".join(f"{c:>9}" for c in (*cells, row["clips"])))
    return "\n".join(lines)


def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="toy", choices=["toy", *BENCHES])
    parser.add_argument("--split", help="of the benchmark, several by commas; toy: test, pairs (unseen colour-shape pairs), long")
    add_roots(parser)
    parser.add_argument("--predictions", metavar="DIR", help="scores what is there, of any model, instead of a policy")
    parser.add_argument("--policy", default=TOY_POLICY, help="directory of a Thinker, or of a full Qwen2.5-Omni")
    parser.add_argument("--system2", nargs="+", default=["policy"], metavar="WHO",
                        help="who grounds: policy, reference DIR (another Thinker), or FILE.py with a function boxes (README)")
    parser.add_argument("--sam2", help="SAM2 config; by default told by the weights' name")
    parser.add_argument("--sam2_weights", default=TOY_SAM2)
    parser.add_argument("--clips", type=at_least(1), help="how many clips of the toy world (default: 200)")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many expressions, for a quick look")
    parser.add_argument("--zip", action="store_true", help="packs the predictions for the benchmark's server")
    parser.add_argument("--batch", type=at_least(1), default=16, help="clips at a time")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--against", help="results.json of another evaluation, for the paired difference")
    parser.add_argument("--out", default="out/eval")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(data_root=None)
    a = parser.parse_args(arguments)
    foreign = ("predictions", "limit", "zip", "data_root", *(f"{folder}_root" for folder in roots_given(a)))
    for name in foreign if a.bench == "toy" else ("clips", "against"):
        if getattr(a, name):
            parser.error(f"--{name} means nothing to --bench {a.bench}")
    try:
        run_toy(a) if a.bench == "toy" else run_bench(a)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


def load_models(a):
    """(policy, system2, processor, tracker)."""
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    processor, policy = Processor(a.policy), Thinker.from_pretrained(a.policy, dtype, a.device)
    tracker = Tracker.from_pretrained(a.sam2 or find_config(a.sam2_weights), a.sam2_weights, a.device)
    who = a.system2
    if who == ["policy"]:
        system2 = policy
    elif len(who) == 2 and who[0] == "reference":
        system2 = Thinker.from_pretrained(who[1], dtype, a.device)
    elif len(who) == 1 and who[0].endswith(".py"):
        system2 = plugged(who[0])
    else:
        raise BadInput(f"--system2 {' '.join(who)}: must be policy, reference DIR, or FILE.py")
    return policy, system2, processor, tracker


def run_toy(a):
    data, written = open_toy(a.split or "test", a.clips or 200), os.path.join(a.out, "results.json")
    if a.against and os.path.realpath(a.against) == os.path.realpath(written):
        raise BadInput(f"{written} would replace what it is compared with; give another --out")
    others = read_others(a.against, data.names) if a.against else None
    os.makedirs(a.out, exist_ok=True)
    results = evaluate(data, *load_models(a), a.batch, a.max_new_tokens)
    summary = averages(results)
    print(table(summary))
    report = dict(bench=a.bench, split=data.split, policy=a.policy, summary=summary, clips=results)
    write(report, written)
    if others is not None:
        mean, half = paired_difference(results, others)
        interval = "" if half is None else f" +- {100 * half:.1f} (95 % interval of the paired difference)"
        print(f"J&F against {a.against}: {100 * mean:+.1f}{interval}")
        report["against"] = dict(file=a.against, difference=mean, half_interval=half)
        write(report, written)
    print(f"written: {written}")


def run_bench(a):
    """A real benchmark: predicts what is not yet predicted, every process its share, then scores."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    root = dataset_root(a.bench, a.data_root or ".", roots_given(a))
    splits = (a.split or BENCHES[a.bench]["split"]).split(",")
    whole = [sample for split in splits for sample in open_real(a.bench, split, root)]
    samples = whole[:a.limit]
    os.makedirs(a.out, exist_ok=True)
    if a.predictions is None:
        claim = claimed(a, root)
        done = len(samples) - len(unpredicted(a.out, samples))
        if done and rank == 0:
            print(f"{done} of {len(samples)} expressions were already there")
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))           # only to wait for each other at the end
        if a.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        predict(a, samples[rank::world], claim, rank)
        if world > 1:
            dist.barrier()
    if rank == 0:
        conclude(a, splits, samples, len(whole))


def conclude(a, splits, samples, count):
    """Scores what has public masks, counts what is for a server, and packs. count: of the expressions, also those that --limit
    leaves out."""
    predictions, written = a.predictions or a.out, os.path.join(a.out, "results.json")
    report = dict(bench=a.bench, split=splits, policy=None if a.predictions else a.policy, predictions=predictions)
    scored, hidden = ([sample for sample in samples if bool(sample.read_masks) == public] for public in (True, False))
    if scored or not hidden:
        results = score_predictions(a.bench, scored, predictions)
        print(score_table(results))
        report |= results
        if a.bench == "refdavis" and not a.predictions:
            write_davis(a.out, scored, readable(results["expressions"]))
    if hidden:
        source = open_predictions(predictions)
        missing = sum(not is_whole(source, sample) for sample in hidden)
        print(f"{len(hidden)} expressions are for the server, their true masks are not public")
        print(f"no prediction: {missing} of {len(hidden)}")
        report["hidden"] = dict(expressions=len(hidden), missing=missing)
    write(report, written)
    if a.zip:
        part = f" (partial: --limit {a.limit}, of {count} expressions)" if len(samples) < count else ""
        print(f"packed: {zip_predictions(a.bench, hidden or samples, predictions, a.out)}{part}")
    print(f"written: {written}")


def claimed(a, root):
    """What OUT/run.json says, or is to say, of whose predictions are there, as they are never made twice. Raises BadInput where
    it says something else."""
    path = os.path.join(a.out, "run.json")
    ours = dict(bench=a.bench, split=a.split or BENCHES[a.bench]["split"], data=os.path.realpath(root),
                policy=os.path.realpath(a.policy), policy_weights=fingerprint(a.policy), system2=a.system2,
                system2_weights=fingerprint(*a.system2[1:]), sam2_weights=os.path.realpath(a.sam2_weights),
                max_new_tokens=a.max_new_tokens)
    theirs = read_json(path) if os.path.exists(path) else ours
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise BadInput(f"{a.out} holds predictions with {key} {theirs.get(key)}, not {value}: give another --out")
    return ours


def fingerprint(*directories):
    """Another one when weights in the directories have changed, by their names, sizes and times."""
    patterns = [os.path.join(glob.escape(directory), "*.safetensors") for directory in directories]
    facts = [(os.path.basename(file), os.stat(file).st_size, os.stat(file).st_mtime_ns)
             for pattern in patterns for file in sorted(glob.glob(pattern))]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def unpredicted(out, samples):
    return [sample for sample in samples if not os.path.isdir(prediction_folder(out, sample))]


def predict(a, samples, claim, rank):
    """Writes the masks of every sample that has none yet, and what System 1 said to OUT/answers-RANK.jsonl. One that cannot be
    read is named, and stays without."""
    todo = unpredicted(a.out, samples)
    if not todo:
        return
    models = load_models(a)                                      # claims OUT only if they are there
    path = os.path.join(a.out, "run.json")
    write(claim, f"{path}{PARTIAL}{os.getpid()}")
    os.replace(f"{path}{PARTIAL}{os.getpid()}", path)            # whole at any time, as all processes do this
    with open(os.path.join(a.out, f"answers-{rank}.jsonl"), "a") as answers, \
            tqdm(total=len(samples), initial=len(samples) - len(todo), desc=a.bench, unit="expression", disable=rank > 0) as bar:
        for first in range(0, len(todo), a.batch):
            part = todo[first:first + a.batch]
            try:
                predict_batch(a, part, models, answers)
            except BadInput:                                     # one of them is to blame: each on its own
                for sample in part:
                    try:
                        predict_batch(a, [sample], models, answers)
                    except BadInput as error:
                        tqdm.write(f"no prediction for {sample.name}: {error}", file=sys.stderr)
            bar.update(len(part))


def predict_batch(a, samples, models, answers):
    task = BENCHES[a.bench].get("task")                          # pictures are asked for a box instead of moments
    clips = [load(replace(sample, read_masks=None, task=task or sample.task)) for sample in samples]
    for sample, (text, chosen, boxes, masks) in zip(samples, segment(*models, clips, a.max_new_tokens)):
        write_prediction(a.out, sample, masks)
        answers.write(json.dumps(dict(name=sample.name, query=sample.query, text=text, keyframes=chosen, boxes=boxes)) + "\n")
        answers.flush()


def write(report, path):
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
