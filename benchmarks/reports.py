"""Reports of evaluations, results.json: written, and compared with one another."""
import json
import math
import os

from benchmarks.metrics import paired_difference
from trust.errors import BadInput, reading
from trust.files import read_json, writing


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
