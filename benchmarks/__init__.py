"""The benchmarks: one file each, and one entry in the list below. No other code asks for a benchmark's name.

A benchmark's file holds its reader, its official metric and layout, the writer of its miniature, and its
record, a samples.Benchmark.
"""
import argparse
import os

from benchmarks.mevis import MEVIS
from benchmarks.reasonseg import REASONSEG
from benchmarks.reasonvos import REASONVOS
from benchmarks.refavs import REFAVS
from benchmarks.refcoco import REFCOCO, REFCOCO_PLUS, REFCOCOG
from benchmarks.refcocog_2k_840 import REFCOCOG_2K_840
from benchmarks.refdavis import REFDAVIS
from benchmarks.refytvos import REFYTVOS
from benchmarks.revos import REVOS
from benchmarks.samples import Benchmark, Sample
from benchmarks.toy import TOY
from benchmarks.video_r1 import VIDEO_R1
from trust.errors import BadInput

# An alias holds before the name of a later benchmark: --data refcocog means REFCOCOG_2K_840.
BENCHMARKS = (
    TOY,
    REVOS,
    MEVIS,
    REFAVS,
    REFCOCOG_2K_840,
    REFCOCO,
    REFCOCO_PLUS,
    REFCOCOG,
    REASONSEG,
    REFDAVIS,
    REFYTVOS,
    REASONVOS,
    VIDEO_R1,
)


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name. Raises BadInput where there is none."""
    for benchmark in BENCHMARKS:
        if benchmark.name == name:
            return benchmark
    known = ", ".join(benchmark.name for benchmark in BENCHMARKS)
    raise BadInput(f"unknown dataset: {name} (known: {known})")


def trained_names() -> list[str]:
    """Names of the benchmarks that can be trained on."""
    return [benchmark.name for benchmark in BENCHMARKS if "train" in benchmark.splits]


def trained_on(name: str) -> Benchmark:
    """The benchmark of a name or an alias, with a split to train on. Raises BadInput where there is none."""
    trainable = [benchmark for benchmark in BENCHMARKS if "train" in benchmark.splits]
    for benchmark in trainable:
        if name == benchmark.name or name in benchmark.aliases:
            return benchmark
    known = ", ".join(benchmark.name for benchmark in trainable)
    raise BadInput(f"{name or 'an empty name'} is nothing to train on (known: {known})")


def open_split(benchmark: Benchmark, split: str, root: str) -> list[Sample]:
    """The samples of a split of the benchmark that lies at `root`.

    Raises BadInput for an unknown split or a malformed small file, FileNotFoundError for a missing one.
    """
    if split not in benchmark.splits:
        known = ", ".join(benchmark.splits)
        raise BadInput(f"unknown split of {benchmark.name}: {split} (known: {known})")
    return benchmark.read(root, split)


# ---- where they lie --------------------------------------------------------------------------------
def folders() -> list[str]:
    """The benchmarks' folders, each once: some share one."""
    names = dict.fromkeys(benchmark.folder for benchmark in BENCHMARKS)
    return [name for name in names if name]


def add_roots(parser: argparse.ArgumentParser) -> None:
    """Adds the options --data_root and, for a folder that lies elsewhere, --FOLDER_root."""
    parser.add_argument(
        "--data_root", default=".", metavar="DIR", help="holds one folder per dataset (default: .)")
    for folder in folders():
        parser.add_argument(f"--{folder}_root", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def roots_given(options: argparse.Namespace) -> dict[str, str]:
    """{folder: where it lies} of the options --FOLDER_root."""
    given = {}
    for folder in folders():
        root = getattr(options, f"{folder}_root", None)
        if root is not None:
            given[folder] = root
    return given


def chosen_root(benchmark: Benchmark, options: argparse.Namespace) -> str:
    """Where the one benchmark of a command line lies. Raises BadInput for a root that means nothing to it."""
    roots = roots_given(options)
    for folder in roots:
        if folder != benchmark.folder:
            raise BadInput(f"--{folder}_root means nothing to --bench {benchmark.name}")
    return dataset_root(benchmark, options.data_root, roots)


def dataset_root(benchmark: Benchmark, data_root: str, roots: dict[str, str]) -> str:
    """Where a benchmark lies: in roots[folder], else in data_root/folder."""
    return roots.get(benchmark.folder) or os.path.join(data_root, benchmark.folder)
