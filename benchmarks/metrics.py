"""The metrics that several benchmarks share: values of one sample, and their means over all samples.

J and F are those of the DAVIS evaluation (J is rewards.region_similarity). Masks are compared at the source's
size, and all pixels count. Values are in per cent unless their function says otherwise.
Letters: O objects, T frames, H W pixels, J region similarity, F boundary accuracy, I intersection, U union.
"""
import math
from collections.abc import Callable

import numpy as np
from scipy.ndimage import distance_transform_edt

from rewards import box_iou, mask_box, mask_pair, region_similarity


# ---- boundary accuracy -----------------------------------------------------------------------------
def boundary_accuracy(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """F [T], 0 to 1: harmonic mean of the boundaries' precision and recall.

    A boundary pixel is right if the other boundary is within 0.8 % of the picture's diagonal. The picture's
    border is no boundary, so a full mask has none, as an empty one.
    pred, true: [T, H, W], bool or 0 and anything else (0/255). Raises ValueError where their shapes differ.
    """
    pred, true = mask_pair(pred, true)
    _, H, W = pred.shape
    diagonal = math.hypot(H, W)
    radius = math.ceil(0.008 * diagonal)
    values = []
    for p, t in zip(pred, true):
        value = frame_accuracy(boundary(p), boundary(t), radius)
        values.append(value)
    return np.array(values)


def boundary(mask):
    """Pixels [H, W] that differ from the neighbour to the right, below, or both: lines one pixel wide."""
    # Beyond the border, pixels are repeated, so there is no boundary.
    padded = np.pad(mask, (0, 1), "edge")
    right = padded[:-1, 1:]
    below = padded[1:, :-1]
    both = padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)


def frame_accuracy(pred, true, radius):
    """F, 0 to 1, of two boundaries [H, W]: 1 if both are empty, 0 if only one is."""
    if not (pred.any() and true.any()):
        return float(pred.any() == true.any())
    # Only distances between boundary pixels matter, so their common box is enough: several times faster.
    either = pred | true
    y = np.flatnonzero(either.any(1))
    x = np.flatnonzero(either.any(0))
    rows = slice(y[0], y[-1] + 1)
    columns = slice(x[0], x[-1] + 1)
    pred = pred[rows, columns]
    true = true[rows, columns]
    precision = share_near(pred, true, radius)
    recall = share_near(true, pred, radius)
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def share_near(pixels, others, radius):
    """Share of the set pixels of `pixels` [H, W] within `radius` pixels of those of `others`."""
    distance = distance_transform_edt(~others)
    near = distance[pixels] <= radius
    return float(near.mean())


# ---- one sample ------------------------------------------------------------------------------------
# (sample, true, pred) -> values. true [O, T, H, W] or None where it cannot be read; pred [T, H, W] or None
# where it is missing.
def score_video(sample, true, pred) -> dict:
    """J and F, means over all frames."""
    if pred is None:
        return dict(J=0.0, F=0.0)
    true = true.any(0)
    J = 100 * region_similarity(pred, true).mean()
    F = 100 * boundary_accuracy(pred, true).mean()
    return dict(J=J, F=F)


def score_picture(sample, true, pred) -> dict:
    """I and U in pixels, IoU, and `found`: whether the boxes around the masks have an IoU above 0.5.

    IoU is 100 if both masks are empty.
    """
    I, U = overlap(true, pred)
    IoU = 100 * (I / (U + 1e-5))
    if U == 0 and pred is not None:
        IoU = 100.0
    same_box = False
    if pred is not None and pred.any() and true.any():
        box = mask_box(pred[0])
        true_box = mask_box(true.any((0, 1)))
        iou = box_iou(true_box, box)[0, 0]
        same_box = bool(iou > 0.5)
    return dict(I=I, U=U, IoU=IoU, found=same_box)


def overlap(true, pred) -> tuple[int, int]:
    """(I, U) of true [O, 1, H, W] and pred [1, H, W], in pixels. Without pred I is 0, without true both."""
    if true is None:
        return 0, 0
    true = true.any(0)
    if pred is None:
        pred = np.zeros_like(true)
    I = int((pred & true).sum())
    U = int((pred | true).sum())
    return I, U


def meteor(reference: str, text: str) -> float | None:
    """METEOR, 0 to 1, of a text against a reference, both split at blanks.

    None without nltk or its data of WordNet.
    """
    try:
        from nltk.translate.meteor_score import single_meteor_score
        return float(single_meteor_score(reference.split(), text.split()))
    # nltk raises LookupError where its data is missing.
    except (ImportError, LookupError):
        return None


# ---- all samples: rows -> {subset: {column: value, "expressions": count}} --------------------------
def mean_row(rows: list[dict], columns=("J", "F")) -> dict:
    """Means of the columns, J&F (the mean of the means of J and F), and the number of rows.

    Means are None without rows.
    """
    means = {}
    for column in columns:
        values = [row[column] for row in rows]
        means[column] = float(np.mean(values)) if values else None
    means["J&F"] = None
    if rows:
        means["J&F"] = (means["J"] + means["F"]) / 2
    means["expressions"] = len(rows)
    return means


def mean_picture(rows: list[dict], endings=("",)) -> dict:
    """Acc@0.5, the share of `found`; gIoU, the mean of the IoUs; cIoU, all intersections over all unions.

    endings: of the names I, U and IoU in the rows. Each gives one gIoU and one cIoU.
    """
    means = {}
    means["expressions"] = len(rows)
    hits = [row["found"] for row in rows]
    means["Acc@0.5"] = 100 * float(np.mean(hits))
    for end in endings:
        I = U = 0
        ious = []
        for row in rows:
            I += row["I" + end]
            U += row["U" + end]
            ious.append(row["IoU" + end])
        means["gIoU" + end] = float(np.mean(ious))
        means["cIoU" + end] = 100 * I / (U + 1e-10)
    return means


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def by_kind(rows: list[dict], mean: Callable = mean_row) -> dict:
    """mean(rows) of all rows, and of each kind where there are several."""
    subsets = {"overall": mean(rows)}
    kinds = sorted({row["kind"] for row in rows})
    if len(kinds) > 1:
        for kind in kinds:
            subsets[kind] = mean(of_kind(rows, kind))
    return subsets


def picture_subsets(rows: list[dict]) -> dict:
    """Means of what `score_picture` gives, overall and of each kind."""
    return by_kind(rows, mean_picture)


def paired_difference(values: dict, others: dict) -> tuple[float, float | None]:
    """(mean of values - others, half the width of its 95 % interval), both {name: value}. One value: None."""
    differences = np.array([value - others[name] for name, value in values.items()])
    mean = float(differences.mean())
    if len(differences) == 1:
        return mean, None
    return mean, float(1.96 * differences.std(ddof=1) / math.sqrt(len(differences)))
