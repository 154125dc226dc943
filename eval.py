"""Evaluates a policy on a benchmark: `python eval.py --bench toy --policy DIR --out DIR`.

System 1 sees at most 24 frames of a clip; the policy (or --system2) grounds its keyframes; SAM2 runs over every frame. Prints a
table and writes results.json: J (region similarity), F (boundary accuracy) and their mean, overall and per kind of query; the
share of keyframes on which the target is to be seen; the share of well-formed answers. `--against OTHER/results.json` adds the
paired difference to another evaluation of the same clips, with its 95 % interval.
"""
import argparse
import json
import math
import os
import sys

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

from data import BadInput, Processor, open_data, read_json, reading
from model import Thinker
from rewards import format_reward
from segment import TOY_POLICY, TOY_SAM2, Parser, Tracker, at_least, device, fail, find_config, segment

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
    parser.add_argument("--bench", default="toy", help="toy")
    parser.add_argument("--split", default="test", help="of the benchmark; toy: test, pairs (unseen colour-shape pairs), long")
    parser.add_argument("--policy", default=TOY_POLICY, help="directory of a Thinker, or of a full Qwen2.5-Omni")
    parser.add_argument("--system2", help="directory of another Thinker that grounds; by default the policy does")
    parser.add_argument("--sam2", help="SAM2 config; by default told by the weights' name")
    parser.add_argument("--sam2_weights", default=TOY_SAM2)
    parser.add_argument("--clips", type=at_least(1), default=200, help="how many clips of the toy world")
    parser.add_argument("--batch", type=at_least(1), default=16, help="clips at a time")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=1024)
    parser.add_argument("--against", help="results.json of another evaluation, for the paired difference")
    parser.add_argument("--out", default="out/eval")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(arguments)
    try:
        run(a)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


def run(a):
    data, written = open_data(a.bench, a.split, a.clips), os.path.join(a.out, "results.json")
    if a.against and os.path.realpath(a.against) == os.path.realpath(written):
        raise BadInput(f"{written} would replace what it is compared with; give another --out")
    others = read_others(a.against, data.names) if a.against else None
    os.makedirs(a.out, exist_ok=True)
    dtype = torch.bfloat16 if a.device.startswith("cuda") else torch.float32
    processor, policy = Processor(a.policy), Thinker.from_pretrained(a.policy, dtype, a.device)
    system2 = policy if a.system2 is None else Thinker.from_pretrained(a.system2, dtype, a.device)
    tracker = Tracker.from_pretrained(a.sam2 or find_config(a.sam2_weights), a.sam2_weights, a.device)
    results = evaluate(data, policy, system2, processor, tracker, a.batch, a.max_new_tokens)
    summary = averages(results)
    print(table(summary))
    report = dict(bench=a.bench, split=a.split, policy=a.policy, summary=summary, clips=results)
    write(report, written)
    if others is not None:
        mean, half = paired_difference(results, others)
        interval = "" if half is None else f" +- {100 * half:.1f} (95 % interval of the paired difference)"
        print(f"J&F against {a.against}: {100 * mean:+.1f}{interval}")
        report["against"] = dict(file=a.against, difference=mean, half_interval=half)
        write(report, written)
    print(f"written: {written}")


def write(report, path):
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
