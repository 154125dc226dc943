"""The benchmarks: one file each, and one entry in the list below. No other code asks for a benchmark's name.

A benchmark's file holds its reader, its official metric and layout, the writer of its miniature, and its
record, a samples.Benchmark. An entry holds what the options of programs need. The file is imported when the
benchmark is used: a wrong option is told before anything slow is imported.
"""
import argparse
import importlib
import os
from dataclasses import asdict, dataclass, replace

from trust.errors import BadInput
from trust.options import at_least, true_or_false


@dataclass(frozen=True)
class Entry:
    """What the programs know of a benchmark before its file is imported."""
    name: str
    record: str             # where its record is: FILE.NAME, a file of this folder
    folder: str             # under --data_root; "" where nothing is read
    splits: tuple
    tested: str = ""        # splits that are evaluated, by commas; "": it is only trained on
    aliases: tuple = ()     # other names of it in --data
    # ((word of --ask, task), ...): how it can be asked at evaluation, by default as the first says. Empty: as
    # its record says, and there is no --ask.
    asks: tuple = ()


# An alias holds before the name of a later benchmark: --data refcocog means refcocog_2k_840.
BENCHMARKS = (
    Entry("toy", "toy.TOY", "",
          ("train", "test", "pairs", "long", "crowd", "reasoning", "absent", "heard", "silent", "swapped"),
          "test"),
    Entry("revos", "revos.REVOS", "revos", ("train", "valid"), "valid"),
    Entry("mevis", "mevis.MEVIS", "mevis", ("train", "valid_u", "valid"), "valid_u"),
    Entry("refavs", "refavs.REFAVS", "refavs", ("train", "val", "test_s", "test_u", "test_n"),
          "test_s,test_u,test_n", asks=(("frames", "vos"), ("first", "avs"))),
    Entry("refcocog_2k_840", "refcocog_2k_840.REFCOCOG_2K_840", "refcocog_2k_840", ("train",),
          aliases=("refcocog",)),
    Entry("refcoco", "refcoco.REFCOCO", "refer_seg", ("train", "val", "testA", "testB"), "val"),
    Entry("refcoco+", "refcoco.REFCOCO_PLUS", "refer_seg", ("train", "val", "testA", "testB"), "val"),
    Entry("refcocog", "refcoco.REFCOCOG", "refer_seg", ("train", "val", "test"), "val"),
    Entry("reasonseg", "reasonseg.REASONSEG", "reasonseg", ("train", "val", "test"), "val"),
    Entry("refdavis", "refdavis.REFDAVIS", "refdavis", ("valid",), "valid"),
    Entry("refytvos", "refytvos.REFYTVOS", "refytvos", ("valid",), "valid"),
    Entry("reasonvos", "reasonvos.REASONVOS", "reasonvos", ("test",), "test"),
    Entry("mevisv2", "mevisv2.MEVISV2", "mevisv2", ("train", "valid_u", "valid"), "valid_u"),
    Entry("omniavs", "omniavs.OMNIAVS", "omniavs", ("train", "test"), "test"),
    Entry("longrvos", "longrvos.LONGRVOS", "longrvos", ("train", "valid", "test"), "valid"),
    Entry("video_r1", "video_r1.VIDEO_R1", "video_r1", ("train",)),
    Entry("avhbench", "avhbench.AVHBENCH", "avhbench", ("test", "captions"), "test"),
    Entry("omnibench", "omnibench.OMNIBENCH", "omnibench", ("test",), "test"),
    Entry("videomme", "videomme.VIDEOMME", "videomme", ("test",), "test"),
    Entry("mvbench", "mvbench.MVBENCH", "mvbench", ("test",), "test"),
    Entry("daily_omni", "daily_omni.DAILY_OMNI", "daily_omni", ("test",), "test"),
    Entry("toy_four", "toy.TOY_FOUR", "", ("train",)),
)


# ---- names -----------------------------------------------------------------------------------------
def all_names() -> list[str]:
    return [entry.name for entry in BENCHMARKS]


def tested_names() -> list[str]:
    """Names of the benchmarks that can be evaluated."""
    return [entry.name for entry in BENCHMARKS if entry.tested]


def trained_names() -> list[str]:
    """Names of the benchmarks that can be trained on."""
    return [entry.name for entry in BENCHMARKS if "train" in entry.splits]


def find_entry(name: str) -> Entry:
    """The entry of a name. Raises BadInput where there is none."""
    for entry in BENCHMARKS:
        if entry.name == name:
            return entry
    raise BadInput(f"unknown dataset: {name} (known: {', '.join(all_names())})")


def asked_task(entry, ask: str | None) -> str | None:
    """The task of a word of --ask, by default of the first; None where the entry has no such words.

    Raises BadInput for another word.
    """
    tasks = dict(entry.asks)
    if ask is None:
        return next(iter(tasks.values()), None)
    if ask not in tasks:
        known = f"known: {', '.join(tasks)}" if tasks else "it is asked in one way only"
        raise BadInput(f"--ask {ask} means nothing to --bench {entry.name} ({known})")
    return tasks[ask]


def trained_entries(names: str) -> list[Entry]:
    """The entries to train on of names or aliases, by commas. Raises BadInput for others, or one twice."""
    found = []
    for name in names.split(","):
        entries = [entry for entry in BENCHMARKS if "train" in entry.splits]
        fitting = [entry for entry in entries if name in (entry.name, *entry.aliases)]
        if not fitting:
            known = ", ".join(trained_names())
            problem = f"{name or 'an empty name'} is nothing to train on (known: {known})"
            raise BadInput(f"--data {names}: {problem}")
        if fitting[0] in found:
            raise BadInput(f"--data {names}: {fitting[0].name} is named twice")
        found.append(fitting[0])
    return found


def split_names(entry: Entry, names: str) -> list[str]:
    """Splits by commas, as a list. Raises BadInput for one that is unknown or named twice."""
    splits = names.split(",")
    for split in splits:
        if split not in entry.splits:
            known = ", ".join(entry.splits)
            raise BadInput(f"unknown split of {entry.name}: {split} (known: {known})")
        if splits.count(split) > 1:
            raise BadInput(f"the split {split} is named twice: {names}")
    return splits


# ---- records ---------------------------------------------------------------------------------------
def find_benchmark(name: str, ask: str | None = None):
    """The samples.Benchmark of a name: the record of its file, with the facts of its entry.

    ask: how it is asked at evaluation, a word of Entry.asks. Raises BadInput for an unknown name or word.
    """
    entry = find_entry(name)
    facts = asdict(entry)
    del facts["asks"]
    if entry.asks:
        facts["task"] = asked_task(entry, ask)
    file, _, record = facts.pop("record").partition(".")
    module = importlib.import_module(f"benchmarks.{file}")
    return replace(getattr(module, record), **facts)


def open_split(benchmark, split: str, root: str) -> list:
    """The Samples of a split of the benchmark that lies at `root`.

    Raises BadInput for an unknown or empty split or a malformed small file, FileNotFoundError for a missing
    one.
    """
    split_names(find_entry(benchmark.name), split)
    samples = benchmark.read(root, split)
    if not samples:
        raise BadInput(f"no samples in the split {split} of {benchmark.name}: {root}")
    # What samples imports is slow, so it is imported only where a benchmark's file is.
    from benchmarks.samples import checked
    return checked(samples)


# ---- questions -------------------------------------------------------------------------------------
def add_controls(parser: argparse.ArgumentParser) -> None:
    """Adds the options of benchmarks that ask questions."""
    add = parser.add_argument
    add("--think", type=true_or_false, default=True, help="questions: whether System 1 is asked to reason")
    add("--sound", type=true_or_false, default=True, help="questions: whether sound is given")
    add("--subtitles", type=true_or_false, default=False,
        help="questions: whether subtitles of the frames are given, where there are any")
    add("--workers", type=at_least(0), default=2, help="questions: processes that read media ahead of time")


# ---- where they lie --------------------------------------------------------------------------------
def folders() -> list[str]:
    """The benchmarks' folders, each once: some share one."""
    names = dict.fromkeys(entry.folder for entry in BENCHMARKS)
    return [name for name in names if name]


def add_roots(parser: argparse.ArgumentParser) -> None:
    """Adds the options --data_root and, for a folder that lies elsewhere, --FOLDER_root."""
    parser.add_argument(
        "--data_root", default=".", metavar="DIR",
        help="holds one folder per dataset (default: .); for one elsewhere: --revos_root DIR, ...")
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


def chosen_root(entry, options: argparse.Namespace) -> str:
    """Where the one benchmark of a command line lies.

    Raises BadInput for a root or an --ask that means nothing to it.
    """
    asked_task(find_entry(entry.name), getattr(options, "ask", None))
    roots = roots_given(options)
    for folder in roots:
        if folder != entry.folder:
            raise BadInput(f"--{folder}_root means nothing to --bench {entry.name}")
    return dataset_root(entry, options.data_root, roots)


def dataset_root(entry, data_root: str, roots: dict[str, str]) -> str:
    """Where a benchmark lies: in roots[folder], else in data_root/folder."""
    return roots.get(entry.folder) or os.path.join(data_root, entry.folder)


def check_root(entry, root: str) -> None:
    """Raises FileNotFoundError where a benchmark's folder is missing."""
    if entry.folder and not os.path.isdir(root):
        raise FileNotFoundError(f"no such folder of {entry.name}: {root} (--data_root DIR holds the folder "
                                f"{entry.folder}; or --{entry.folder}_root DIR)")
