"""The metrics of the benchmarks, held against brute force and cases worked out by hand.

Sections: F, the samples that these tests score, then a section for each benchmark's metric, then all of them.
Letters: O objects, T frames, H W pixels, J region similarity, F boundary accuracy, I intersection, U union.
"""
import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from pytest import approx

from benchmarks import BENCHMARKS, find_benchmark, open_split
from benchmarks.metrics import boundary_accuracy
from benchmarks.predictions import prediction_folder, write_prediction
from benchmarks.reasonseg import score_reasonseg
from benchmarks.refavs import at_256, refavs_subsets, region_f, score_refavs
from benchmarks.refdavis import davis_subsets, match_objects, write_davis
from benchmarks.reports import score_table
from benchmarks.revos import revos_subsets, score_revos
from benchmarks.samples import Sample, load
from eval import score_predictions, score_sample
from trust.errors import BadInput

# Those of questions have other metrics.
NAMES = [entry.name for entry in BENCHMARKS if find_benchmark(entry.name).quiz is None]
TESTED = [entry.name for entry in BENCHMARKS if entry.tested and entry.name in NAMES]


def pixels(mask) -> set:
    """{(y, x)} of the pixels of a mask [H, W]."""
    places = np.argwhere(mask).tolist()
    return {tuple(place) for place in places}


def slow_j(pred, true):
    """J of two masks [H, W]."""
    p = pixels(pred)
    t = pixels(true)
    return len(p & t) / len(p | t) if p | t else 1.0


def slow_f(pred, true):
    """F of two masks [H, W] by the letter of DAVIS: shifts, and a dilation by a disk in loops."""
    radius = math.ceil(0.008 * math.hypot(*pred.shape))
    p = slow_boundary(pred)
    t = slow_boundary(true)
    precision = slow_share(p, t, radius)
    recall = slow_share(t, p, radius)
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def slow_boundary(mask):
    height, width = mask.shape
    lines = set()
    for y, x in np.ndindex(height, width):
        below = min(y + 1, height - 1)
        right = min(x + 1, width - 1)
        for neighbour in ((below, x), (y, right), (below, right)):
            if mask[neighbour] != mask[y, x]:
                lines.add((y, x))
    return lines


def slow_share(points, others, radius):
    """Share of the points that lie within the radius of one of the others."""
    if not points:
        return 1.0
    steps = range(-radius, radius + 1)
    near = set()
    for dy, dx in itertools.product(steps, steps):
        if dy * dy + dx * dx <= radius * radius:
            near |= {(y + dy, x + dx) for y, x in others}
    return len(points & near) / len(points)


def slow_means(preds, trues):
    """Means of J and of F over frames, in per cent."""
    J = list(map(slow_j, preds, trues))
    F = list(map(slow_f, preds, trues))
    return 100 * np.mean(J), 100 * np.mean(F)


def columns_of(row, names) -> list:
    """The values of some columns, named in one text."""
    return [row[name] for name in names.split()]


# ---- F ---------------------------------------------------------------------------------------------
# Radius 1, 3, 1.
@pytest.mark.parametrize("height, width", [(17, 23), (40, 250), (1, 9)])
def test_f_against_loops(height, width):
    rng = np.random.default_rng(0)
    true = np.zeros((12, height, width), dtype=bool)
    for mask in true:
        top = rng.integers(0, height)
        left = rng.integers(0, width)
        rows = rng.integers(1, height + 1)
        columns = rng.integers(1, width + 1)
        mask[top:top + rows, left:left + columns] = True
    noise = rng.random(true.shape) < 0.02
    pred = np.roll(true, (1, 2), (1, 2)) ^ noise
    # One of them is empty, the other, both.
    true[[0, 2]] = False
    pred[[1, 2]] = False
    # One of them is full, the other, both. Then one is full and one is empty.
    true[[3, 5]] = True
    pred[[4, 5, 6]] = True
    true[6] = False
    F = boundary_accuracy(pred, true)
    expected = list(map(slow_f, pred, true))
    assert F == approx(np.array(expected))
    # Numbers of any unit mean the same.
    same = boundary_accuracy(pred * np.uint8(255), true * 1)
    assert (same == F).all()


def test_f_edge_cases():
    empty = np.zeros((1, 20, 20), bool)
    full = ~empty
    square = np.zeros((1, 20, 20), bool)
    square[0, 5:10, 5:10] = True
    cases = [
        (empty, empty, 1),
        (full, full, 1),
        (full, empty, 1),
        (square, empty, 0),
        (empty, square, 0),
        (square, full, 0),
        (square, square, 1),
    ]
    for pred, true, expected in cases:
        assert boundary_accuracy(pred, true)[0] == expected
    wide = np.zeros((1, 20, 21), bool)
    with pytest.raises(ValueError, match=r"\(1, 20, 20\).*\(1, 20, 21\)"):
        boundary_accuracy(empty, wide)


def test_boundary_tolerance_follows_the_diagonal():
    """At 256 x 256 the radius is ceil(0.008 * 362) = 3: a shift by 3 pixels costs nothing, one by 4 does."""
    true = np.zeros((1, 256, 256), dtype=bool)
    true[0, 100:150, 100:150] = True
    near = np.roll(true, 3, axis=2)
    far = np.roll(true, 4, axis=2)
    assert boundary_accuracy(near, true) == 1.0
    assert boundary_accuracy(far, true) < 1.0


# ---- samples to score ------------------------------------------------------------------------------
def blobs(seed, *shape):
    """Random rectangles, bool [..., H, W]; some are empty, one is full."""
    rng = np.random.default_rng(seed)
    H, W = shape[-2:]
    masks = np.zeros(shape, bool)
    for mask in masks.reshape(-1, H, W):
        top = rng.integers(0, H)
        left = rng.integers(0, W)
        rows = rng.integers(0, H)
        columns = rng.integers(0, W)
        mask[top:top + rows, left:left + columns] = True
    mask[:] = True
    return masks


def a_sample(true, expression="0", video="v", kind="", **fields):
    """Sample of masks [O, T, H, W], as the readers make it."""
    T = true.shape[1]
    names = [f"{5 * t:05d}" for t in range(T)]
    sample = Sample("vos", "bench", video, expression, "", kind, names, [], **fields)
    sample.read_masks = lambda: true
    return sample


def revos_sample(true, foreground=None, expression="0", kind="referring"):
    """foreground: [T, H, W]; without it, all that is foreground is the target."""
    if foreground is None:
        foreground = true.any(0)
    sample = a_sample(true, expression, kind=kind, objects=len(true))
    sample.extra["foreground"] = lambda: foreground[None]
    return sample


def encode(mask) -> dict:
    """A mask [H, W] as COCO's compressed run lengths."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    rle["counts"] = rle["counts"].decode()
    return rle


# ---- ReVOS -----------------------------------------------------------------------------------------
REVOS_COLUMNS = "J F A R A_x255 R_x255"


def slow_revos(true, pred, foreground, unit):
    """A and R of one expression, pixel by pixel, bytes kept in 0 ... 255 by hand."""
    A = []
    R = []
    for t in range(len(pred)):
        right = wrong = allowed = 0
        for y, x in np.ndindex(pred.shape[1:]):
            count = int(true[:, t, y, x].sum())
            predicted = unit * int(pred[t, y, x])
            right += count == predicted
            wrong += (1 - count) % 256 * predicted % 256
            allowed += int(foreground[t, y, x])
        A.append(right / pred[t].size)
        R.append(max(1 - wrong / (allowed + 1e-6), 0))
    return 100 * np.mean(A), 100 * np.mean(R)


@pytest.mark.parametrize("seed", range(3))
def test_revos_against_loops(seed):
    true = blobs(seed, 3, 5, 14, 18)
    pred = blobs(seed + 10, 5, 14, 18)
    # Both are empty on frame 1, the prediction is on frame 2.
    true[:, 1] = False
    pred[1:3] = False
    foreground = true.any(0) | blobs(seed + 20, 5, 14, 18)
    pred[3] = foreground[3] = true[0, 3]
    true[1:, 3] = False
    values = score_revos(revos_sample(true, foreground), true, pred)
    slow = {}
    slow["J"], slow["F"] = slow_means(pred, true.any(0))
    slow["A"], slow["R"] = slow_revos(true, pred, foreground, 1)
    slow["A_x255"], slow["R_x255"] = slow_revos(true, pred, foreground, 255)
    assert values.keys() == slow.keys()
    for column, value in values.items():
        assert value == round(value, 2)
        assert value == approx(round(slow[column], 2), abs=1e-9)


def test_revos_robustness_by_hand():
    true = np.zeros((1, 1, 40, 40), bool)
    # 400 pixels.
    true[0, 0, 5:25, 5:25] = True
    pred = true[0].copy()
    # And 5 % beside them.
    pred[0, 25, 5:25] = True
    values = score_revos(revos_sample(true), true, pred)
    assert (values["R"], values["R_x255"]) == (95.0, 0.0)
    assert values["A"] == round(100 * 1580 / 1600, 2)
    assert values["A_x255"] == round(100 * 1180 / 1600, 2)

    # Two objects share 200 pixels: the number there is 2.
    twice = np.concatenate([true, true])
    twice[1, 0, 15:, :] = False
    values = score_revos(revos_sample(twice), twice, true[0])
    # Each of them weighs 255.
    assert values["R"] == 0.0
    # 255 * 255 is 1 in a byte.
    assert values["R_x255"] == 50.0
    assert values["A"] == round(100 * 1400 / 1600, 2)
    assert values["J"] == values["F"] == 100.0


def test_revos_edge_cases():
    empty = np.zeros((1, 1, 20, 20), bool)
    full = ~empty
    square = np.zeros((1, 1, 20, 20), bool)
    square[..., 5:10, 5:10] = True
    cases = [
        (empty, empty, [100, 100, 100, 100, 100, 100]),
        (empty, square, [0, 0, 93.75, 0, 93.75, 0]),
        (full, full, [100, 100, 100, 100, 0, 100]),
        (empty, full, [0, 100, 0, 0, 0, 0]),
    ]
    for true, pred, expected in cases:
        values = score_revos(revos_sample(true), true, pred[0])
        assert columns_of(values, REVOS_COLUMNS) == expected
    nothing = score_revos(revos_sample(empty), empty, None)
    assert nothing == dict.fromkeys(REVOS_COLUMNS.split(), 0.0)


def test_revos_gives_up_over_masks_of_another_size_than_their_frames(tmp_path):
    revos = find_benchmark("revos")
    true = blobs(0, 1, 3, 9, 11)
    sample = revos_sample(true)
    write_prediction(tmp_path, sample, true[0])
    assert score_sample(revos, sample, tmp_path)["J"] == 100
    sample.mended.add("mask of 4 x 4, frame of 11 x 9")
    row = score_sample(revos, sample, tmp_path)
    assert row["J"] == row["R"] == 0
    assert row["problem"] == "bench/v/0: mask of 4 x 4, frame of 11 x 9"


def revos_row(kind, J, F, objects):
    row = dict(kind=kind, objects=objects, J=J, F=F)
    return row | dict(A=J, R=F, A_x255=J, R_x255=F)


def test_revos_overall_is_the_mean_of_two_kinds():
    rows = [
        revos_row("referring", 40.0, 60.0, 1),
        revos_row("referring", 50.0, 70.0, 2),
        revos_row("referring", 60.0, 80.0, 1),
        revos_row("reasoning", 10.0, 20.0, 3),
        revos_row("hallucination", 0.0, 0.0, 0),
    ]
    subsets = revos_subsets(rows)
    overall = columns_of(subsets["overall"], "J F J&F R expressions")
    assert overall == [30.0, 45.0, 37.5, 45.0, 4]
    referring = columns_of(subsets["referring"], "J F J&F expressions")
    assert referring == [50.0, 70.0, 60.0, 3]
    hallucination = columns_of(subsets["hallucination"], "J&F expressions")
    assert hallucination == [0.0, 1]
    assert subsets["single"]["J&F"] == 60.0
    assert subsets["multi"]["J&F"] == 37.5
    # A look at a few expressions.
    assert revos_subsets(rows[:3])["overall"]["J"] is None
    published = [
        revos_row("referring", 53.2, 64.1, 1),
        revos_row("reasoning", 41.9, 53.7, 1),
    ]
    assert revos_subsets(published)["overall"]["J"] == approx(47.55)


# ---- Ref-AVS ---------------------------------------------------------------------------------------
def slow_resize(mask, y, x):
    """Pixel (y, x) of a mask [H, W] resized to 256 x 256, 0 to 255.

    Bilinear: pixel centres at halves, the border repeated.
    """
    H, W = mask.shape
    v = max((y + 0.5) * H / 256 - 0.5, 0)
    u = max((x + 0.5) * W / 256 - 0.5, 0)
    top = int(v)
    left = int(u)
    below = min(top + 1, H - 1)
    right = min(left + 1, W - 1)
    # Shares of the pixels below and to the right.
    v -= top
    u -= left
    upper = (1 - u) * mask[top, left] + u * mask[top, right]
    lower = (1 - u) * mask[below, left] + u * mask[below, right]
    return 255 * ((1 - v) * upper + v * lower)


def test_a_pixel_is_foreground_if_a_resized_mask_touches_it():
    """Values are rounded to whole numbers."""
    small = blobs(0, 3, 40, 30)[1]
    large = blobs(4, 2, 300, 270)[0]
    diagonal = np.eye(257, 259, dtype=bool)
    places = range(0, 256, 3)
    for mask in (small, large, diagonal):
        resized = at_256(mask[None])[0]
        for y, x in itertools.product(places, places):
            expected = slow_resize(mask, y, x) >= 0.5
            assert resized[y, x] == expected


def refavs_batch(seed, count=4, T=3):
    """Samples and predictions of 256 x 256, with frames of both kinds of emptiness."""
    true = blobs(seed, count, 1, T, 256, 256)
    pred = blobs(seed + 50, count, T, 256, 256)
    true[0, :, 1] = False
    pred[1, 0] = False
    samples = []
    for i, masks in enumerate(true):
        samples.append(a_sample(masks, str(i), kind="seen"))
    return samples, pred


def slow_refavs(samples, preds):
    """J, F, S of one batch as the official functions compute them, from logits of the masks."""
    true = np.concatenate([sample.read_masks().any(0) for sample in samples])
    true = torch.from_numpy(true).float()
    logits = np.where(np.concatenate(preds), 20.0, -20.0)
    p = torch.from_numpy(logits).float().sigmoid()
    thresholds = torch.linspace(0, 1 - 1e-10, 255)
    ious = []
    curves = []
    # t, q: [256, 256]
    for t, q in zip(true, p):
        predicted = (q > 0.4).float()
        if t.sum() == 0:
            ious.append(float((1 - predicted).mean()))
            continue
        shared = (predicted * t).sum()
        union = (predicted + t).clamp(max=1).sum()
        ious.append(float(shared / (union + 1e-7)))
        curves.append([slow_region_f(q, t, threshold) for threshold in thresholds])
    F = max(np.mean(curves, 0)) if curves else 0.0
    area = (p > 0.5).float().mean()
    return [100 * np.mean(ious), 100 * F, math.sqrt(area)]


def slow_region_f(q, t, threshold):
    hit = (q >= threshold).float()
    right = (hit * t).sum()
    precision = right / (hit.sum() + 1e-20)
    recall = right / (t.sum() + 1e-20)
    value = 1.3 * precision * recall / (0.3 * precision + recall)
    return float(value.nan_to_num())


def test_refavs_against_255_thresholds():
    samples, preds = refavs_batch(0)
    rows = []
    for sample, pred in zip(samples, preds):
        values = score_refavs(sample, sample.read_masks(), pred)
        rows.append(dict(kind="seen") | values)
        alone = slow_refavs([sample], [pred])
        assert columns_of(values, "J F S") == approx(alone, abs=1e-3)
    J, F, S = slow_refavs(samples, preds)
    seen = columns_of(refavs_subsets(rows)["seen"], "J F J&F")
    assert seen == approx([J, F, (J + F) / 2], abs=1e-3)
    for row in rows:
        row["kind"] = "null"
    assert refavs_subsets(rows)["null"]["S"] == approx(S)


def test_refavs_takes_the_best_threshold_and_the_root_batch_by_batch():
    # Batches of 4 and of 2.
    curves = [[0.9, 0.1], [0.9, 0.1], [0.0, 0.8], [0.0, 0.8]]
    curves += [[0.2, 0.6], [0.2, 0.0]]
    rows = []
    for curve in curves:
        rows.append(dict(kind="seen", J=50.0, frames=1, curve=curve))
    subsets = refavs_subsets(rows)
    seen = subsets["seen"]
    assert seen["F"] == approx(100 * (0.45 + 0.3) / 2)
    assert seen["expressions"] == 6
    assert subsets["unseen"]["J"] is None
    assert subsets["null"]["S"] is None
    areas = [0.0, 0.0, 0.0, 0.04, 1.0]
    nulls = [dict(kind="null", area=area) for area in areas]
    subsets = refavs_subsets(nulls)
    assert subsets["null"]["S"] == approx((0.1 + 1) / 2)


def test_refavs_edge_cases():
    empty = np.zeros((1, 2, 256, 256), bool)
    quarter = empty.copy()
    quarter[..., :128, :128] = True
    # Without a target, J is the share that is left out.
    values = score_refavs(a_sample(empty), empty, quarter[0])
    assert columns_of(values, "J F S") == [75.0, 0.0, 0.5]
    # An empty prediction has the F of the whole frame.
    values = score_refavs(a_sample(quarter), quarter, empty[0])
    assert values["J"] == 0.0
    whole = 1.3 * 0.25 / (0.3 * 0.25 + 1)
    assert values["F"] == approx(100 * whole)
    values = score_refavs(a_sample(quarter), quarter, quarter[0])
    assert columns_of(values, "J F") == approx([100.0, 100.0])

    quarter[0, 1] = False
    missing = score_refavs(a_sample(quarter), quarter, None)
    # As much weight as a wrong prediction.
    assert missing["frames"] == 1
    # An S of 0 would be the best.
    assert columns_of(missing, "J F S") == [0.0, 0.0, 1.0]
    assert not region_f(quarter[0], empty[0]).any()


# ---- RefCOCO ---------------------------------------------------------------------------------------
def refcoco_rows(trues, preds):
    benchmark = find_benchmark("refcocog")
    rows = []
    for true, pred in zip(trues, preds):
        values = benchmark.score(a_sample(true), true, pred)
        rows.append(values | dict(kind=""))
    return rows


def test_pictures_against_sets():
    benchmark = find_benchmark("refcocog")
    true = blobs(1, 4, 2, 1, 20, 30)
    pred = blobs(2, 4, 1, 20, 30)
    # Both are empty: IoU 1.
    true[2] = False
    pred[2] = False
    true[3, :, :, 4:] = False
    rows = refcoco_rows(true, pred)
    ious = []
    I = U = 0
    for t, p in zip(true, pred):
        target = pixels(t.any((0, 1)))
        predicted = pixels(p[0])
        shared = len(target & predicted)
        union = len(target | predicted)
        ious.append(shared / (union + 1e-5) if union else 1)
        I += shared
        U += union
    overall = benchmark.subsets(rows)["overall"]
    assert overall["gIoU"] == approx(100 * np.mean(ious))
    assert overall["cIoU"] == approx(100 * I / U)
    hits = [row["found"] for row in rows]
    assert overall["Acc@0.5"] == 100 * np.mean(hits)
    # The area of what is missing counts in cIoU.
    missing = refcoco_rows(true, [None] * 4)
    area = len(pixels(true[0].any((0, 1))))
    assert missing[0] == dict(I=0, U=area, IoU=0, found=False, kind="")
    assert missing[2]["IoU"] == 0


def test_boxes_are_found_above_one_half():
    true = np.zeros((2, 1, 20, 20), bool)
    pred = np.zeros((1, 20, 20), bool)
    # The box around both objects has 10 x 10 pixels.
    true[0, 0, 5, 5:15] = True
    true[1, 0, 5:15, 5] = True
    for width in (0, 5, 6, 10):
        pred[0, [5, 14], 5:5 + width] = True
        rows = refcoco_rows([true], [pred])
        same = width > 5
        assert rows[0]["found"] is same
        subsets = find_benchmark("refcocog").subsets(rows)
        assert subsets["overall"]["Acc@0.5"] == 100 * same


def test_a_picture_without_a_readable_prediction_counts_its_area_in_ciou(tmp_path):
    true = np.zeros((1, 1, 9, 11), bool)
    true[..., 2:5, 3:8] = True
    write_prediction(tmp_path, a_sample(true), true[0])
    Image.new("L", (9, 9)).save(tmp_path / "Annotations/v/0/00000.png")
    row = score_sample(find_benchmark("refcoco"), a_sample(true), tmp_path)
    assert columns_of(row, "I U IoU") == [0, 15, 0]
    assert "wrong size" in row["problem"]


# ---- ReasonSeg -------------------------------------------------------------------------------------
def reasonseg_sample(true, ignore):
    """true, ignore: [1, 1, H, W]"""
    sample = a_sample(true)
    sample.extra["ignore"] = lambda: ignore
    return sample


def test_reasonseg_takes_ignore_both_ways():
    true = blobs(1, 2, 1, 1, 20, 30)[0]
    ignore = blobs(2, 2, 20, 30)[0]
    pred = blobs(3, 2, 1, 20, 30)[0]
    true[0, 0] &= ~ignore
    values = score_reasonseg(reasonseg_sample(true, ignore[None, None]), true, pred)
    p = pixels(pred[0])
    t = pixels(true[0, 0])
    i = pixels(ignore)
    assert p & i
    assert t
    I = len((p & t) - i)
    U = len((p | t) - i)
    assert columns_of(values, "I U") == [I, U]
    assert values["IoU"] == approx(100 * I / (U + 1e-5))
    I_fg = len(p & (t | i))
    U_fg = len(p | t | i)
    assert columns_of(values, "I_fg U_fg") == [I_fg, U_fg]

    # LISA's rule for what is empty, and Seg-Zero's.
    nothing = np.zeros_like(true)
    both = score_reasonseg(reasonseg_sample(nothing, nothing), nothing, nothing[0])
    assert columns_of(both, "IoU IoU_fg") == [100, 0]
    missing = score_reasonseg(a_sample(true), None, None)
    assert missing["IoU_fg"] == 0
    for row in (values, both):
        row["kind"] = ""
    subsets = find_benchmark("reasonseg").subsets([values, both])
    assert subsets["overall"]["cIoU_fg"] == approx(100 * I_fg / U_fg)


# ---- Ref-DAVIS -------------------------------------------------------------------------------------
def davis_video(seed):
    """uint8 annotation [T, H, W] of 2 objects and void, and the masks [2, T, H, W] of two predictions."""
    masks = blobs(seed, 3, 3, 16, 20)
    pred = blobs(seed + 9, 2, 3, 16, 20)
    annotation = np.zeros((3, 16, 20), np.uint8)
    annotation[masks[0]] = 1
    annotation[masks[1]] = 2
    annotation[:, 3:6, 2:9] = 255
    annotation[0, 0, 0] = 2
    annotation[2] = 1
    return annotation, pred


def merge(pred, second):
    """uint8 [T, H, W] of two predictions: 1, and `second` where only the second is."""
    merged = np.zeros(pred[0].shape, np.uint8)
    merged[pred[1]] = second
    merged[pred[0]] = 1
    return merged


@pytest.mark.parametrize("seed", range(3))
def test_davis_matches_objects_as_well_as_any_permutation(seed):
    annotation, pred = davis_video(seed)
    # Object 2 is proposed and empty.
    merged = merge(pred, 3)
    void = annotation == 255
    table = {}
    for p, o in itertools.product((1, 2, 3), (1, 2)):
        proposal = (merged == p) & ~void
        table[p, o] = slow_means(proposal, annotation == o)
    assignments = []
    for first, second in itertools.permutations((1, 2, 3), 2):
        assignments.append([table[first, 1], table[second, 2]])
    best = max(assignments, key=np.sum)
    ours = match_objects(merged, annotation)
    assert np.sum(ours, 0) == approx(np.sum(best, 0))
    # Nothing is found: still two objects.
    assert len(match_objects(merged * 0, annotation)) == 2
    # The objects are those of the first frame.
    annotation[0] = 0
    assert match_objects(merged, annotation) == []


def davis_samples(annotation):
    """Two objects of one video, four annotators each."""
    samples = []
    for k in range(8):
        number = 1 + k // 4
        true = (annotation == number)[None]
        sample = a_sample(true, str(k), ids=(str(number),))
        sample.extra["annotator"] = k % 4
        sample.extra["annotation"] = lambda: annotation
        samples.append(sample)
    return samples


def readable(results) -> set:
    """Names of the samples whose prediction, and truth, could be read."""
    rows = results["expressions"]
    return {row["name"] for row in rows if row["problem"] is None}


def read_numbers(path):
    """uint8 [H, W] of a picture."""
    with Image.open(path) as picture:
        return np.array(picture)


def test_davis_protocols(tmp_path):
    annotation, pred = davis_video(0)
    samples = davis_samples(annotation)
    for k, sample in enumerate(samples):
        masks = pred[k // 4]
        if sample.extra["annotator"] < 2:
            masks = sample.read_masks()[0] | (annotation == 255)
        write_prediction(tmp_path, sample, masks)
    results = score_predictions(find_benchmark("refdavis"), samples[::-1], tmp_path)
    subsets = results["subsets"]
    # Void does not count, but for protocol B it does.
    assert subsets["annotator 0"]["J&F"] == subsets["annotator 1"]["J&F"] == 100
    assert subsets["protocol B"]["J"] < 100
    # The first object wins.
    merged = merge(pred, 2)
    J, F = np.mean(match_objects(merged, annotation), 0)
    assert columns_of(subsets["annotator 3"], "J F") == approx([J, F])
    assert subsets["protocol A"]["J"] == approx((200 + 2 * J) / 4)

    write_davis(tmp_path, samples, {sample.name for sample in samples})
    for name, numbers in zip(samples[0].names, merged):
        written = read_numbers(tmp_path / f"anno_2/v/{name}.png")
        assert (written == numbers).all()


def test_davis_protocol_a_scores_0_where_there_is_no_prediction(tmp_path):
    annotation, _ = davis_video(0)
    # There is nothing to find on this frame, which is no merit.
    annotation[1][annotation[1] == 1] = 0
    samples = davis_samples(annotation)
    for sample in samples[1:]:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    # Annotator 1's second object.
    (tmp_path / "Annotations/v/5/00005.png").write_bytes(b"")
    results = score_predictions(find_benchmark("refdavis"), samples, tmp_path)
    assert results["missing"] == len(results["broken"]) == 1
    for annotator, J in enumerate((50, 50, 100, 100)):
        subset = results["subsets"][f"annotator {annotator}"]
        assert subset["J"] == approx(J)

    write_davis(tmp_path, samples, readable(results))
    written = read_numbers(tmp_path / "anno_0/v/00005.png")
    expected = np.where(annotation[1] == 2, 2, 0)
    assert (written == expected).all()


def test_davis_protocol_b_rounds_at_the_end():
    first = dict(J=12.346, F=20.0)
    second = dict(J=12.348, F=20.001)
    means = davis_subsets([first, second])["protocol B"]
    assert means == {"J": 12.35, "F": 20.0, "J&F": 16.17, "expressions": 2}


def test_a_broken_annotation_of_davis_scores_its_video_0_and_is_named(copy, tmp_path):
    root = copy("refdavis")
    benchmark = find_benchmark("refdavis")
    samples = open_split(benchmark, "valid", root)
    for sample in samples:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    path = root / "valid/Annotations" / samples[0].video / "00003.png"
    path.write_bytes(path.read_bytes()[:60])
    results = score_predictions(benchmark, samples, tmp_path)
    here = [sample for sample in samples if sample.video == samples[0].video]
    assert len(results["broken"]) == len(here)
    assert all(str(path) in message for message in results["broken"])
    # Share of the objects.
    whole = 1 - len(here) / len(samples)
    assert 0 < whole < 1
    assert results["subsets"]["protocol A"]["J"] == approx(100 * whole)
    write_davis(tmp_path, samples, readable(results))
    folders = list((tmp_path / "anno_0").iterdir())
    assert [folder.name for folder in folders] == [samples[-1].video]


# ---- ReasonVOS -------------------------------------------------------------------------------------
def test_reasonvos_scores_the_frames_that_have_a_mask(copy, tmp_path):
    root = copy("reasonvos")
    benchmark = find_benchmark("reasonvos")
    sample = open_split(benchmark, "test", root)[0]
    runs = [encode(mask) for mask in sample.read_masks()[0]]
    write_prediction(tmp_path, sample, sample.read_masks()[0])
    mask = root / "Annotations" / sample.folder / f"{sample.names[2]}.png"
    mask.unlink()
    # A prediction there is not even read.
    folder = Path(prediction_folder(tmp_path, sample))
    (folder / mask.name).write_bytes(b"")
    runs[2] = None

    sample = open_split(benchmark, "test", root)[0]
    one_json = tmp_path / "found.json"
    entries = {sample.expression: dict(prediction_masks=runs)}
    one_json.write_text(json.dumps({sample.video: entries}))
    for source in (tmp_path, one_json):
        results = score_predictions(benchmark, [sample], source)
        assert results["summary"]["overall J&F"] == 100
        assert not results["broken"]
    T = len(sample.names)
    assert sample.read_masks().shape[1] == T - 1
    assert load(sample, most_frames=2).masks.shape[1] == 2


# ---- MeViS -----------------------------------------------------------------------------------------
def test_mevis_weighs_expressions_and_counts_what_is_missing(tmp_path):
    mevis = find_benchmark("mevis")
    true = blobs(0, 4, 2, 3, 12, 16)
    pred = blobs(1, 4, 3, 12, 16)
    samples = []
    for i, masks in enumerate(true):
        samples.append(a_sample(masks, str(i)))
    for sample, masks in zip(samples[:3], pred):
        write_prediction(tmp_path, sample, masks)
    # The third is of a wrong size, the fourth is missing.
    Image.new("L", (17, 12)).save(tmp_path / "Annotations/v/2/00005.png")
    results = score_predictions(mevis, samples, tmp_path, workers=2)
    first = slow_means(pred[0], true[0].any(0))
    second = slow_means(pred[1], true[1].any(0))
    J, F = np.sum([first, second], 0) / 4
    means = {"overall J": J, "overall F": F, "overall J&F": (J + F) / 2}
    assert results["summary"] == approx(means)
    assert results["missing"] == len(results["broken"]) == 1
    names = [row["name"] for row in results["expressions"]]
    assert names == [sample.name for sample in samples]

    # results.json can be printed again.
    text = score_table(mevis, json.loads(json.dumps(results)))
    assert "no prediction, scored 0: 1 of 4 expressions" in text
    assert "00005.png is 12 x 17, its frame 12 x 16" in text
    assert f"{results['summary']['overall J&F']:.2f}" in text
    other = score_table(find_benchmark("refavs"), results)
    assert "no prediction, scored 0 (S: 1): 1 of 4" in other


# ---- every benchmark -------------------------------------------------------------------------------
KINDS = {
    "revos": ("referring", "reasoning", "hallucination"),
    "refavs": ("seen", "unseen", "null"),
}


def samples_for(name):
    """Four samples of each kind, with all that any metric asks for."""
    kinds = KINDS.get(name, ("",))
    T = 1 if name.startswith(("refcoco", "reasonseg")) else 2
    samples = []
    for i, kind in enumerate(kinds * 4):
        true = np.zeros((1, T, 64, 64), bool)
        if kind not in ("hallucination", "null"):
            true[..., 8:40, 8:40] = True
        sample = a_sample(true, str(i), kind=kind, ids=("1",), objects=1 + i // 6)
        sample.extra["foreground"] = sample.read_masks
        sample.extra["ignore"] = partial(np.zeros_like, true)
        sample.extra["annotator"] = i % 4
        sample.extra["annotation"] = partial(true[0].astype, np.uint8)
        samples.append(sample)
    return samples


def assert_best(summary, but=("A_x255",)):
    """but: columns that are not looked at. In bytes, no target pixel of A is right."""
    assert summary
    for column, value in summary.items():
        best = 0 if column == "null S" else 100
        if not column.endswith(but):
            assert value == approx(best, abs=1e-4), column


def assert_worst(summary):
    assert summary
    for column, value in summary.items():
        worst = 1 if column == "null S" else 0
        assert value == worst, column


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_rates_the_truth_and_nothing_at_all(name, tmp_path):
    benchmark = find_benchmark(name)
    samples = samples_for(name)
    nothing = score_predictions(benchmark, samples, tmp_path)
    assert nothing["missing"] == len(samples)
    assert_worst(nothing["summary"])
    for sample in samples:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    best = score_predictions(benchmark, samples, tmp_path / "Annotations")
    assert best["missing"] == 0
    assert not best["broken"]
    assert_best(best["summary"])
    assert "cannot be read" not in score_table(benchmark, best)


@pytest.mark.parametrize("name", TESTED)
def test_every_benchmark_rates_the_truth_of_its_own_samples(name, minis, tmp_path):
    """As above, of the samples of its own reader."""
    benchmark = find_benchmark(name)
    root = minis(name) if benchmark.mini else ""
    samples = []
    for split in benchmark.tested.split(","):
        samples += open_split(benchmark, split, root)
    if benchmark.usual:
        samples = samples[:20]
    if samples[0].read_masks is None:
        pytest.skip("its masks are not public")
    nothing = score_predictions(benchmark, samples, tmp_path)
    assert_worst(nothing["summary"])
    for sample in samples:
        masks = sample.read_masks().any(0)
        write_prediction(tmp_path, sample, masks)
    best = score_predictions(benchmark, samples, tmp_path)
    # The truth leaves out what is to be ignored, which is a fault in the columns _fg.
    assert_best(best["summary"], but=("A_x255", "_fg"))


@pytest.mark.parametrize("name", NAMES)
def test_hidden_masks_are_not_scored(name, tmp_path):
    sample = a_sample(blobs(0, 1, 2, 4, 4))
    sample.read_masks = None
    message = re.escape(f"{name}: its masks are not public")
    with pytest.raises(BadInput, match=message):
        score_predictions(find_benchmark(name), [sample], tmp_path)


def test_broken_truth_scores_0_and_is_named(tmp_path):
    sample = a_sample(blobs(0, 1, 2, 4, 4))

    def broken():
        raise ValueError("mask of wrong length: v/0 in mask_dict.json")

    sample.read_masks = broken
    for name in NAMES:
        row = score_sample(find_benchmark(name), sample, str(tmp_path))
        assert "mask_dict.json" in row["problem"]
        assert row.get("J", 0) == row.get("IoU", 0) == 0
