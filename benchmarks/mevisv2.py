"""MeViSv2 (arXiv 2512.10945): MeViS with more expressions, some of which mean nothing in their video.

    mevisv2/
      {train,valid_u,valid}/    as in mevis.py

An expression without a target has an empty anno_id. The masks of valid are the server's, as in MeViS:
codabench.org/competitions/11420 takes an archive of the same form. The spoken versions of the expressions are
not read: how their files are named is not published.

The metric of the challenges (PVUW, LSVOS) from 2025 on: beside J and F over all expressions

    N-acc    share of the expressions without a target that are answered by no pixel on any frame
    T-acc    share of the others that are answered by some pixel on some frame
    Final    mean of J&F, N-acc and T-acc

A frame on which nothing is and nothing is predicted has J = F = 1, as everywhere.
"""
from functools import partial

from benchmarks.metrics import by_kind, mean_row, score_video
from benchmarks.mevis import mini_mevis
from benchmarks.samples import Benchmark, Sample, require, rle_samples
from trust.files import read_json

NO_TARGET = "no target"


def read_mevisv2(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    folder = f"{root}/{split}"
    meta = f"{folder}/meta_expressions.json"
    mask_file = f"{folder}/mask_dict.json"
    table = None if split == "valid" else read_json(mask_file)
    samples = []
    for sample, where, entry in rle_samples("mevisv2", folder, meta, mask_file, table):
        samples.append(sample)
        if table is None or sample.broken:
            continue
        # It names no object on purpose.
        if not require(entry, "anno_id", where, list):
            sample.kind = NO_TARGET
            sample.null = True
            sample.fault = ""
    return samples


# ---- the official metric ---------------------------------------------------------------------------
def score_mevisv2(sample: Sample, true, pred) -> dict:
    """J and F of one expression; `right`: whether it is answered by something, or by nothing, as it should.

    A missing prediction is no answer, and wrong.
    """
    answered = pred is not None and bool(pred.any())
    right = pred is not None and answered != sample.null
    return score_video(sample, true, pred) | dict(null=sample.null, right=right)


def mevisv2_subsets(rows: list[dict]) -> dict:
    return by_kind(rows, mean_mevisv2)


def mean_mevisv2(rows: list[dict]) -> dict:
    """J, F, J&F, and the accuracies of the expressions that there are. Final needs all three."""
    means = mean_row(rows)
    for column, null in (("N-acc", True), ("T-acc", False)):
        rights = [row["right"] for row in rows if row["null"] == null]
        if rights:
            means[column] = 100 * sum(rights) / len(rights)
    if "N-acc" in means and "T-acc" in means:
        means["Final"] = (means["J&F"] + means["N-acc"] + means["T-acc"]) / 3
    return means


MEVISV2 = Benchmark(
    read=read_mevisv2,
    score=score_mevisv2,
    subsets=mevisv2_subsets,
    columns=("J", "F", "J&F", "N-acc", "T-acc", "Final"),
    archive="",
    # Some expressions mean nothing.
    mini=partial(mini_mevis, kinds=("referring", "reasoning", "null")),
)
