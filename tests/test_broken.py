"""Broken datasets: whatever is wrong with a file or a field, `check` names it in one line, or it is harmless.

tests/mutate.py makes the cases. For each: `check` ends with 0 or 1 and prints whole lines. If it is content,
training reads every sample that is tried and evaluation scores it. If it is not, they say one line, too.
Nothing is read beside the dataset, nothing is written beside the output, and no case takes more than LONGEST
seconds or MEMORY bytes. No model is loaded.

Another process takes the cases in turn, because some might end it.
"""
import contextlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import sys
import traceback
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import check, find_benchmark, open_split
from benchmarks.predictions import write_prediction, zip_predictions
from benchmarks.reports import score_table
from benchmarks.samples import load
from data import Processor, prompt_inputs
from eval import score_predictions
from run.draw import read_clip, training_sources
from tests.mutate import LAYOUTS, decoys, find_cases, link_copy, write_layout
from tests.world import evaluate_here, train_here
from trust.errors import BadInput
from trust.options import TOY_POLICY

LONGEST = 30             # seconds
MEMORY = 2 * 2**30       # bytes
LONGEST_LINE = 1000      # characters
# Cases of each layout in the quick suite: 330 in all, or 360 with pyarrow.
QUICK = 30
# What is said where memory did not suffice.
TOO_LARGE = re.compile("MemoryError|Unable to allocate|bad_alloc|Cannot allocate")


# ---- one case --------------------------------------------------------------------------------------
class Examiner:
    """Treats broken copies of a layout's miniature as the programs do, and notes what is wrong with that."""

    def __init__(self, layout, original, place):
        self.layout = layout
        self.benchmark = find_benchmark(layout.bench)
        self.original = original
        self.place = place
        self.processor = Processor(TOY_POLICY)
        self.count = 0
        self.opened = []

    def note_open(self, event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            self.opened.append(os.path.abspath(arguments[0]))

    def examine(self, case) -> list[str]:
        """The faults over a case, or over the unchanged miniature (None)."""
        self.count += 1
        sandbox = self.place / f"{os.getpid()}-{self.count}"
        inner = sandbox / "1/2/3/4"
        root = inner / self.layout.folder
        out = inner / "out"
        decoys(inner, self.original)
        # A name that leaves by some steps finds them, too.
        for folder in list(inner.parents)[:4]:
            (folder / "outside").symlink_to(inner / "outside")
        link_copy(self.original, root)
        out.mkdir()
        os.chdir(inner)
        self.faults = []
        try:
            if case is not None:
                case.apply(root)
            before = listing(sandbox, out)
            self.opened.clear()
            self.treat(case, root, out)
            for path in dict.fromkeys(self.opened):
                if is_below(path, sandbox) and not is_below(path, root) and not is_below(path, out):
                    self.faults.append(f"opens {path}")
            changed = dict(before.items() ^ listing(sandbox, out).items())
            self.faults += [f"changes {path}" for path in sorted(changed)]
        except Exception:
            self.faults.append(f"cannot be tried: {last_lines()}")
        finally:
            os.chdir(self.place)
            shutil.rmtree(sandbox, ignore_errors=True)
        return self.faults

    def treat(self, case, root, out):
        self.content = True
        lines = self.check(root)
        self.content = not lines
        if lines and not any(self.names(line, case) for line in lines):
            self.faults.append(f"check names neither file nor sample: {lines[0]}")
        if self.layout.split == "train":
            self.attempt("training", self.train, root)
        self.attempt("evaluation", self.evaluate, root, out)

    def attempt(self, what, action, *arguments):
        """Runs it. It may say what is wrong with the data, if check says so, too."""
        try:
            action(*arguments)
        except (BadInput, OSError) as error:
            self.hear(what, str(error))
        except BaseException:
            self.faults.append(f"{what} ends in a traceback: {last_lines()}")

    def hear(self, what, message):
        if self.content:
            self.faults.append(f"check is content, but {what} is not: {message[:LONGEST_LINE]}")
        if TOO_LARGE.search(message):
            self.faults.append(f"{what} asks for too much memory: {message[:LONGEST_LINE]}")

    def check(self, root) -> list[str]:
        """The lines on what is broken."""
        arguments = ["check", "--bench", self.layout.bench, "--split", self.layout.split]
        arguments += [f"--{self.layout.folder}_root", str(root)]
        printed = io.StringIO()
        code = "none"
        # Warnings of libraries go to stderr.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            try:
                check.main(arguments)
            except SystemExit as error:
                code = error.code
            except BaseException:
                self.faults.append(f"check ends in a traceback: {last_lines()}")
                return ["a traceback"]
        broken = []
        for line in printed.getvalue().split("\n")[:-1]:
            if line.startswith("broken: "):
                broken.append(line)
            elif not line.startswith((f"{self.layout.bench}/{self.layout.split}: ", "cut: ")):
                self.faults.append(f"check prints {line[:LONGEST_LINE]!r}")
            if len(line) > LONGEST_LINE:
                self.faults.append(f"check prints a line of {len(line)} characters: {line[:200]}")
            if TOO_LARGE.search(line):
                self.faults.append(f"check asks for too much memory: {line[:LONGEST_LINE]}")
        if code != int(bool(broken)):
            self.faults.append(f"check ends with {code} and {len(broken)} lines on what is broken")
        return broken

    def names(self, line, case) -> bool:
        """Whether a line on what is broken names the case's file or a sample, or says that there is none."""
        line = line.removeprefix(f"broken: {self.layout.bench}/{self.layout.split}: ")
        known = [f"{self.layout.bench}/", "no samples in the split"]
        if case is not None:
            known.append(Path(case.file).name)
        return any(name in line for name in known)

    def train(self, root):
        """What training does with data before a model sees it."""
        sources, _ = training_sources(self.layout.bench, "", {self.layout.folder: str(root)}, seed=0)
        source = sources[0]
        samples = sum(source.items, [])
        for sample in some(samples):
            clip = read_clip(source, [sample], np.random.default_rng(0))
            if clip.fault:
                self.hear("training", clip.fault)
            prompt_inputs(self.processor, clip, np.random.default_rng(0))

    def evaluate(self, root, out):
        """What evaluation does, with the true masks as predictions."""
        benchmark = self.benchmark
        samples = some(open_split(benchmark, self.layout.split, str(root)))
        for sample in samples:
            try:
                self.predict(sample, str(out))
            except (BadInput, OSError) as error:
                self.hear("prediction", str(error))
        public = [sample for sample in samples if sample.read_masks]
        if public:
            with contextlib.redirect_stderr(io.StringIO()):
                results = score_predictions(benchmark, public, str(out), workers=1)
            score_table(benchmark, results)
            for problem in results["broken"]:
                self.hear("scoring", problem)
            readable = {row["name"] for row in results["expressions"] if row["problem"] is None}
            if benchmark.export is not None:
                benchmark.export(str(out), public, readable)
        if benchmark.tested:
            zip_predictions(benchmark, samples, str(out), str(out))

    def predict(self, sample, out):
        task = self.benchmark.task or sample.task
        clip = load(replace(sample, read_masks=None, task=task))
        if self.layout.split != "train":
            prompt_inputs(self.processor, clip)
        if self.benchmark.tested:
            masks = np.zeros((len(sample.names), *clip.size), bool)
            if sample.read_masks is not None:
                true = sample.read_masks().any(0)
                masks = true if true.shape == masks.shape else masks
            write_prediction(out, sample, masks)


def some(entries: list) -> list:
    """The first entry and the last one: the cases change these."""
    return entries if len(entries) <= 2 else [entries[0], entries[-1]]


def is_below(path, folder) -> bool:
    return Path(path).is_relative_to(folder)


def last_lines() -> str:
    """Where the current exception was raised, and what it says."""
    *_, (place, line) = traceback.walk_tb(sys.exc_info()[2])
    code = place.f_code
    message = "".join(traceback.format_exception_only(*sys.exc_info()[:2]))
    return f"{Path(code.co_filename).name}:{line} in {code.co_name}: {message.strip()[-LONGEST_LINE:]}"


def listing(folder, left_out) -> dict:
    """{path: kind, size and time} of all that lies in a folder, but not below `left_out`."""
    facts = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            facts[path] = status.st_mode, status.st_size, status.st_mtime_ns
        folders[:] = [name for name in folders if os.path.join(place, name) != str(left_out)]
    facts.pop(str(left_out))
    return facts


# ---- the process that takes the cases --------------------------------------------------------------
def serve(pipe, examiner, cases):
    """Takes numbers of cases from the pipe and sends their faults."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # ffmpeg writes there itself.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.addaudithook(examiner.note_open)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    for number in iter(pipe.recv, None):
        pipe.send(examiner.examine(None if number < 0 else cases[number]))


class Worker:
    """A process that serves. It is started again for the case after one that ended it."""

    def __init__(self, *arguments):
        self.arguments = arguments
        self.process = None

    def ask(self, number) -> list[str]:
        if self.process is None:
            self.start()
        try:
            self.pipe.send(number)
            if self.pipe.poll(LONGEST):
                return self.pipe.recv()
            self.process.kill()
            self.end()
            return [f"takes more than {LONGEST} seconds"]
        except (EOFError, OSError):
            code = self.end()
            return [f"ends the process with {code}"]

    def start(self):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()

    def end(self):
        self.process.join()
        code = self.process.exitcode
        self.process = None
        return code

    def close(self):
        if self.process is not None:
            self.pipe.send(None)
            self.end()


# These have done harm before, and are always among the chosen ones.
KNOWN = ("a pipe", "length 2^31", "a memo of 2^31", "object 200", "16 bits", "climbs", "2^31 - 1 Hz")


def chosen(cases: list, most: int) -> list:
    """At most `most` of the cases, always the same: half of whole files, half of fields."""
    cases = sorted(cases, key=lambda case: (case.kind not in KNOWN, zlib.crc32(case.name.encode())))
    files = [case for case in cases if not case.field]
    fields = [case for case in cases if case.field]
    files = files[:max(most // 2, most - len(fields))]
    return files + fields[:most - len(files)]


def faults_of(layout, place, most) -> list[str]:
    """A line for each fault over at most so many cases of a layout."""
    if layout.bench == "refcocog_2k_840":
        pytest.importorskip("pyarrow")
    original = place / "original"
    write_layout(layout, original)
    cases = chosen(find_cases(layout, original), most)
    worker = Worker(Examiner(layout, original, place), cases)
    faults = []
    # -1 is the miniature as it is.
    for number in range(-1, len(cases)):
        name = cases[number].name if number >= 0 else f"{layout.name} unchanged"
        faults += [f"{name}: {fault}" for fault in worker.ask(number)]
    worker.close()
    return faults


each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@each_layout
def test_a_broken_dataset_is_named_or_harmless(layout, tmp_path):
    faults = faults_of(layout, tmp_path, QUICK)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@each_layout
def test_every_broken_dataset_is_named_or_harmless(layout, tmp_path):
    faults = faults_of(layout, tmp_path, sys.maxsize)
    assert not faults, "\n".join(faults)


# ---- the programs ----------------------------------------------------------------------------------
# A layout, and the end of the name of a case that does no harm.
HARMLESS = (
    ("revos-train", ".exp: chat tokens"),
    ("revos-train", "mask_dict.json : with a byte order mark"),
    ("mevis-train", ".jpg : alpha"),
    ("mevis-valid", ".exp: braces"),
    ("refavs-train", "audio.wav : stereo"),
    ("refavs-train", ".png : 16 bits"),
    ("refcoco-train", "protocol 0"),
    ("reasonseg-train", ".jpg : a link to its copy"),
    ("reasonseg-val", ".text.*: right to left"),
    ("refdavis-valid", ".exp: right to left"),
    ("refytvos-valid", ".jpg : turned by exif"),
    ("reasonvos-test", ".png : palette"),
    ("video_r1-train", ".options: empty list"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name, ending", HARMLESS)
def test_the_programs_run_on_what_check_passes(name, ending, tmp_path, monkeypatch):
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    benchmark = find_benchmark(layout.bench)
    original = tmp_path / "original"
    root = tmp_path / "data"
    write_layout(layout, original)
    decoys(tmp_path, original)
    link_copy(original, root)
    case = next(case for case in find_cases(layout, original) if case.name.endswith(ending))
    case.apply(root)
    folder = [f"--{layout.folder}_root", root]
    with pytest.raises(SystemExit) as end:
        check.main(["check", "--bench", layout.bench, "--split", layout.split, *map(str, folder)])
    assert end.value.code == 0
    if layout.split == "train":
        small = ["--steps", 1, "--batch", 1, "--updates", 1, "--workers", 0]
        rows = train_here(tmp_path, monkeypatch, "--data", layout.bench, *folder, *small)
        assert len(rows) == 1
    if benchmark.tested:
        split = ["--split", layout.split, "--limit", 2]
        results = evaluate_here(tmp_path / "eval", "--bench", layout.bench, *folder, *split)
        assert results.get("broken", []) == []
        assert results.get("missing", 0) == 0
