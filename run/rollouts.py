"""What a person sees of a run while it runs.

    out/NAME/rollouts/step-000045.jsonl    a line for each prompt that was looked at: query, completions,
                                           their terms, rewards, advantages, keyframes, boxes and J
    out/NAME/rollouts/step-000045.zip      its pictures and sounds, by the names in the lines
    out/NAME/report.html                   the page of both, and of the log
    out/NAME/curves.png                    a few of its curves

`train` calls `Album.look` after each step. Nothing here draws a random number or changes a model. An error is
a warning. Only the first process looks, at its own prompts.

G: completions of a group.
"""
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.results import whole_file
from data import TASKS, own_boxes
from report.draw import Shown, draw_case, draw_sheet, is_tracked
from report.page import write_page
from report.training import training_page
from run.boards import start_boards
from run.log import plot, read_rows, warned
from segment import to_source, track_groups
from trust.files import PARTIAL

PROMPTS = 3        # of a batch that are looked at
VALIDATED = 4      # validation clips that are looked at
NAME = re.compile(rf"step-([0-9]{{6,}})\.(?:jsonl|zip)(?:{re.escape(PARTIAL)})?")


class Album:
    """Looks at a run. On other processes than the first it does nothing."""

    def __init__(self, out: str, settings, run: dict, start: int, rank: int):
        """start: the step that the run begins or goes on with. Later looks, of steps done again, are lost."""
        self.out = out
        self.settings = settings
        self.run = run
        self.first = rank == 0
        self.fixed = []     # validation clips since the last look: (clip, answers)
        self.boards = start_boards(settings, out, run, start, self.first)
        if self.first:
            with warned(f"removing looks in {out}/rollouts"):
                remove_looks(out, start)

    def write(self, row: dict) -> None:
        """Passes a line of the log on to the boards."""
        for board in self.boards:
            with warned("writing to a board"):
                board.write(row)

    def keep(self, clip, text: str, boxes: dict, terms: dict, reward: float, tokens: int) -> None:
        """Keeps the answer to a validation clip for the next look, if it is one of the first ones."""
        if self.first and len(self.fixed) < VALIDATED:
            facts = dict(terms=terms, reward=float(reward), tokens=tokens)
            self.fixed.append((clip, text, boxes, facts))

    def look(self, step: int, groups: list, systems, watch) -> None:
        """Writes the files of a step, the page and curves.png, where they are due. Forgets the groups' clips.

        It is called after a checkpoint is saved, so that no step is lost by it.
        """
        last = step + 1 == self.settings.steps
        due = last or step == 0 or (step + 1) % self.settings.look_every == 0
        if self.first and (due or self.fixed):
            watch.begin("look")
            self.write_files(step, groups[:PROMPTS] if due else [], systems)
            watch.end()
        self.fixed = []
        # They would stay in memory while the next ones are read.
        for group in groups:
            group.clip = None

    def write_files(self, step: int, groups: list, systems) -> None:
        plot(self.out)
        with warned("looking at the rollouts"):
            cases = [case_of_group(group, systems) for group in groups]
            cases += [case_of_answer(*answer, systems) for answer in self.fixed]
            write_look(self.out, step + 1, cases)
            for board in self.boards:
                for number, (clip, answers, _) in enumerate(cases):
                    board.show(f"rollouts/{number}", draw_sheet(clip, answers[:4]), step)
        write_report(self.out, self.run)


# ---- a look ----------------------------------------------------------------------------------------
def case_of_group(group, systems) -> tuple:
    """(clip, G answers, further values) of a group. The best completion comes first."""
    clip = group.clip
    masks = tracked(clip, group.boxes, systems)
    lengths = group.mask.sum(1).tolist()
    answers = []
    for g in np.argsort(-group.advantages.numpy(), kind="stable").tolist():
        facts = dict(terms=group.terms[g], reward=float(group.rewards[g]),
                     advantage=float(group.advantages[g]), tokens=int(lengths[g]))
        answers.append(shown_answer(clip, group.texts[g], group.boxes[g], masks[g], facts, systems))
    return clip, answers, dict(fixed=False, seed=group.seed, fault=group.fault)


def case_of_answer(clip, text, boxes, facts, systems) -> tuple:
    """(clip, [answer], further values) of a validation clip."""
    masks = tracked(clip, [boxes], systems)
    answer = shown_answer(clip, text, boxes, masks[0], facts, systems)
    return clip, [answer], dict(fixed=True, seed=0, fault=clip.fault)


def tracked(clip, boxes, systems) -> list:
    """Masks of G completions, {frame: bool [H, W]} each; None where the task has none.

    SAM2 runs once more for them: training keeps no masks.
    """
    if not is_tracked(clip):
        return [None] * len(boxes)
    masks, = track_groups(systems.tracker, [clip], [boxes])    # [G, T, H, W]
    return [dict(enumerate(frames)) for frames in masks]


def shown_answer(clip, text, boxes, masks, facts, systems) -> Shown:
    """An answer as it is shown. In a picture, System 1 draws the box itself."""
    keyframes = TASKS[clip.task].to_ground(clip, text)
    own = own_boxes(clip, text)
    if own:
        processor = systems.processor
        height, width = clip.size
        rows, columns = processor.resized((width, height), processor.image_tokens)
        scale = width / columns, height / rows
        boxes = {0: [to_source(box, scale, clip.size) for box in own]}
    return Shown(text, keyframes, boxes, masks, facts)


# ---- files -----------------------------------------------------------------------------------------
def look_path(out: str, step: int, kind: str) -> str:
    return os.path.join(out, "rollouts", f"step-{step:06d}.{kind}")


def write_look(out: str, step: int, cases: list) -> None:
    """Writes the two files of a step. The lines come last: a look is whole where they are."""
    os.makedirs(os.path.join(out, "rollouts"), exist_ok=True)
    lines = []
    files = {}
    for clip, answers, facts in cases:
        record, pictures = draw_case(clip, answers)
        lines.append(json.dumps(dict(step=step) | facts | record) + "\n")
        files |= pictures
    # The pictures are compressed already.
    with whole_file(look_path(out, step, "zip")) as path, zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with whole_file(look_path(out, step, "jsonl")) as path:
        Path(path).write_text("".join(lines), encoding="utf-8")


def look_steps(out: str) -> dict:
    """{step: its files} of all looks, in order of time. Some may be unfinished."""
    steps = {}
    for path in sorted(Path(out, "rollouts").glob("step-*")):
        match = NAME.fullmatch(path.name)
        if match:
            steps.setdefault(int(match[1]), []).append(path)
    return dict(sorted(steps.items()))


def remove_looks(out: str, start: int) -> None:
    """Removes the looks of steps after `start`, which a run that goes on does again, and unfinished files."""
    for step, paths in look_steps(out).items():
        whole = Path(look_path(out, step, "jsonl")) in paths
        for path in paths:
            if step > start or not whole or path.suffix == PARTIAL:
                path.unlink()


def read_looks(out: str) -> list:
    """(records, its Pictures) of each look that is whole, in order of time."""
    looks = []
    for step, paths in look_steps(out).items():
        lines = Path(look_path(out, step, "jsonl"))
        if lines not in paths:
            continue
        with warned(f"reading {lines}"):
            with open(lines, encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
            if not all({"fixed", "answers", "times"} <= set(record) for record in records):
                raise ValueError("it holds other records")
            looks.append((records, Pictures(look_path(out, step, "zip"))))
    return looks


class Pictures(Mapping):
    """{name: bytes} of a look's .zip. Each is read when asked for: a long run has more than memory takes.

    One that is damaged is empty.
    """

    def __init__(self, path: str):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.names = set(archive.namelist())

    def __contains__(self, name):
        return name in self.names

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        with warned(f"reading {self.path}"), zipfile.ZipFile(self.path) as archive:
            return archive.read(name)
        return b""


def write_report(out: str, run: dict) -> None:
    """Writes report.html from the files of the run. An error is a warning."""
    path = os.path.join(out, "report.html")
    with warned(f"writing {path}"):
        rows = read_rows(os.path.join(out, "metrics.jsonl"))
        write_page(path, training_page(run, rows, read_looks(out)))
