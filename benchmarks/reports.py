"""Reports of evaluations: means and tables; results.json, written and compared with one another."""
import json
import math
import os

import numpy as np

from benchmarks.metrics import paired_difference
from benchmarks.predictions import scored_names
from benchmarks.samples import Benchmark, Sample
from trust.errors import BadInput, reading
from trust.files import read_json, writing

# What is known of System 1's answers, beside a benchmark's own columns.
ANSWER_COLUMNS = ("visible", "format")


# ---- results and their table -----------------------------------------------------------------------
def visible_share(sample, true, keyframes) -> float | None:
    """Share of the keyframes on which the target is visible. true: its masks [O, T, H, W] on scored frames.

    Keyframes that are not scored are left out. None without keyframes or without a target.
    """
    visible = dict(zip(scored_names(sample), true.any((0, 2, 3))))
    # Answers of others may name frames that are not there.
    names = [sample.names[t] for t in keyframes if 0 <= t < len(sample.names)]
    shown = [visible[name] for name in names if name in visible]
    if not shown or not true.any():
        return None
    return float(np.mean(shown))


def total(benchmark: Benchmark, samples: list[Sample], rows: list[dict], source) -> dict:
    """Results of all rows: {"summary", "subsets", "expressions": rows, "missing": count, "broken": messages}.

    subsets: {subset: {column: value, "expressions": count}}. summary: the same as {"subset column": value}.
    """
    subsets = benchmark.subsets(rows)
    if benchmark.joint is not None:
        subsets = benchmark.joint(samples, source, rows) | subsets
    add_answers(rows, subsets)
    summary = {}
    for name, subset in subsets.items():
        for column in (*benchmark.columns, *ANSWER_COLUMNS):
            if column in subset:
                summary[f"{name} {column}"] = subset[column]
    broken = [row["problem"] for row in rows if row["problem"] not in (None, "missing")]
    missing = sum(row["problem"] == "missing" for row in rows)
    return dict(summary=summary, subsets=subsets, expressions=rows, missing=missing, broken=broken)


def add_answers(rows, subsets):
    """Adds to subsets the means of `visible` and `format`, in per cent, over the rows that have a value.

    A subset named after a kind takes the rows of that kind. `overall`, or a subset of as many expressions as
    there are rows, takes all rows. Other subsets get none: their rows are not known here.
    """
    for name, subset in subsets.items():
        part = rows
        if name != "overall" and subset["expressions"] != len(rows):
            part = [row for row in rows if row["kind"] == name]
        for column in ANSWER_COLUMNS:
            values = [row[column] for row in part if row.get(column) is not None]
            if values:
                subset[column] = 100 * float(np.mean(values))


def score_table(benchmark: Benchmark, results: dict) -> str:
    """The subsets as a table, and a line each on what is missing and what is broken."""
    columns = list(benchmark.columns)
    for column in ANSWER_COLUMNS:
        if any(column in subset for subset in results["subsets"].values()):
            columns.append(column)
    lines = [f"{'':20}" + "".join(f"{column:>9}" for column in columns) + f"{'expressions':>13}"]
    for name, subset in results["subsets"].items():
        line = f"{name:20}"
        for column in columns:
            value = subset.get(column)
            cell = "" if value is None else f"{value:.{benchmark.decimals.get(column, 2)}f}"
            line += f"{cell:>9}"
        lines.append(line + f"{subset['expressions']:13}")
    count = len(results["expressions"])
    broken = results["broken"]
    worst = f"scored {benchmark.worst}"
    if results["missing"]:
        lines.append(f"no prediction, {worst}: {results['missing']} of {count} expressions")
    if broken:
        lines.append(f"cannot be read, {worst}: {len(broken)} of {count} expressions, first: {broken[0]}")
    return "\n".join(lines)


# ---- files -----------------------------------------------------------------------------------------
def write_json(value, path):
    """Writes a JSON file, which is complete at any time, even if several processes write it."""
    partial = f"{path}.partial{os.getpid()}"
    with writing(path), open(partial, "w") as file:
        json.dump(value, file, indent=1)
    os.replace(partial, path)


def read_others(options, samples, column) -> dict:
    """{name: value} of the rows of --against. Raises BadInput where they are not of these samples."""
    file = options.against
    written = f"{options.out}/results.json"
    if os.path.realpath(file) == os.path.realpath(written):
        raise BadInput(f"{written} would replace what it is compared with; give another --out")
    report = read_json(file)
    with reading(file):
        others = values_of(report, column)
        if not all(map(math.isfinite, others.values())):
            raise ValueError(f"a {column} is not a number")
    # Questions say whether they are graded.
    public = [sample for sample in samples if getattr(sample, "graded", sample.read_masks)]
    if others.keys() != {sample.name for sample in public}:
        raise BadInput(f"not an evaluation of the same samples: {file}")
    return others


def values_of(report, column) -> dict:
    """{name: value} of the rows that have one."""
    return {row["name"]: row[column] for row in report["expressions"] if row[column] is not None}


def compare(report, others, column, file):
    """Prints the paired difference to another evaluation and adds it to the report."""
    values = values_of(report, column)
    mean, half = paired_difference(values, others)
    interval = "" if half is None else f" +- {half:.1f} (95 % interval of the paired difference)"
    print(f"{column} against {file}: {mean:+.1f}{interval}")
    report["against"] = dict(file=file, difference=mean, half_interval=half)
