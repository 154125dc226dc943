"""AVHBench (arXiv 2410.18325): does one hear what is only seen, or see what is only heard?

    avhbench/
      QA.json               [{"video_id", "task", "text", "label"}]
      videos/<video_id>.mp4     with sound; or directly in avhbench/

Splits: test, the questions of three tasks that are answered with Yes or No (5302 rows); captions, the task
"AV Captioning" (1106 rows), which no parser grades.

No scorer was ever published. The leaderboard shows accuracy, precision, recall, F1 and the share of Yes per
task, and mixes two conventions. Here Yes is the positive class, and a reply that is neither is wrong and not
Yes. Half of the labels of each task are Yes, so a constant Yes has an accuracy of 50. `overall` is the micro
mean over the three tasks, as Omni-R1 prints it; others leave out tasks. `loose` reads as others do: Yes where
"yes" stands anywhere in the reply, else No.

Captions are written to OUT/captions.json. METEOR is added where nltk and its wordnet are installed.
"""
import os

import numpy as np

from benchmarks.mini import put, split_scene
from benchmarks.questions import (
    SENTENCE,
    YES_NO,
    file_of,
    new_question,
    set_free,
)
from benchmarks.quiz import Quiz, mean_part
from benchmarks.reports import write_json
from benchmarks.samples import Benchmark, faults_of, require
from benchmarks.video_r1 import video_file
from trust.errors import BadInput
from trust.files import check_name, read_json

TASKS = ("Audio-driven Video Hallucination", "Video-driven Audio Hallucination", "AV Matching")
CAPTIONING = "AV Captioning"
COLUMNS = ("ours", "precision", "recall", "F1", "Yes", "loose")


def read_avhbench(root: str, split: str) -> list:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    path = f"{root}/QA.json"
    folder = f"{root}/videos" if os.path.isdir(f"{root}/videos") else root
    samples = []
    for i, item in enumerate(read_json(path, list)):
        where = f"{path}: item {i}"
        captioning = isinstance(item, dict) and item.get("task") == CAPTIONING
        # What has no task is in the split that is tested.
        if captioning != (split == "captions"):
            continue
        sample = new_question("avhbench", "item", i)
        samples.append(sample)
        with faults_of(sample):
            read_item(sample, item, folder, where)
    return samples


def read_item(sample, item, folder, where):
    # First, so that a row counts in its task whatever else is wrong with it.
    task = require(item, "task", where, str)
    if task not in (*TASKS, CAPTIONING):
        raise BadInput(f"task {task[:80]!r} is unknown in {where}")
    sample.kind = task
    sample.groups = dict(task=task)
    sample.graded = task != CAPTIONING
    sample.video = check_name(require(item, "video_id", where, str), where)
    sample.pictures = [file_of(folder, f"{sample.video}.mp4", where)]
    sample.sound = sample.pictures[0]
    sample.query = require(item, "text", where, str)
    label = require(item, "label", where, str)
    if task == CAPTIONING:
        set_free(sample, label, SENTENCE)
        return
    if label not in ("Yes", "No"):
        raise BadInput(f"the label {label[:80]!r} is neither Yes nor No in {where}")
    set_free(sample, label, YES_NO)


# ---- the metric ------------------------------------------------------------------------------------
def loose(text: str | None, sample) -> bool:
    """Whether a reply is right, if "yes" anywhere in it means Yes and all else No."""
    if text is None:
        return False
    return ("yes" in text.lower()) == (sample.solution == "Yes")


def avhbench_parts(rows: list[dict], columns) -> dict:
    """The figures of all rows, and of each task. Captions have a part of their own."""
    asked = [row for row in rows if row["kind"] != CAPTIONING]
    captions = [row for row in rows if row["kind"] == CAPTIONING]
    parts = {}
    if asked:
        parts["overall"] = yes_no_part(asked)
    # A row whose task is not known counts in the whole alone.
    for task in dict.fromkeys(row["kind"] for row in asked if row["kind"]):
        parts[task] = yes_no_part([row for row in asked if row["kind"] == task])
    if captions:
        parts[CAPTIONING] = mean_part(captions, ()) | caption_part(captions)
    return parts


def yes_no_part(rows: list[dict]) -> dict:
    """Accuracies, precision, recall and F1 with Yes as positive, and the share of Yes among all rows."""
    part = mean_part(rows, ("ours", "loose"))
    said = np.array([row["said"] == "Yes" for row in rows])
    true = np.array([row["solution"] == "Yes" for row in rows])
    hits = (said & true).sum()
    part["precision"] = 100 * float(hits / max(said.sum(), 1))
    part["recall"] = 100 * float(hits / max(true.sum(), 1))
    part["F1"] = 200 * float(hits / max(said.sum() + true.sum(), 1))
    part["Yes"] = 100 * float(said.mean())
    return part


# ---- captions --------------------------------------------------------------------------------------
def caption_part(rows: list[dict]) -> dict:
    """{"METEOR": mean in per cent} where it can be computed, else {}. A row without a caption counts 0."""
    score = find_meteor()
    if score is None:
        return {}
    return {"METEOR": 100 * float(np.mean([score(row["solution"], row["said"]) for row in rows]))}


def find_meteor():
    """(reference, caption) -> METEOR, 0 to 1; None without nltk or without its wordnet."""
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None

    def score(reference, caption):
        return meteor_score([reference.lower().split()], caption.lower().split())

    return score


def export_captions(out: str, samples: list, rows: list[dict]) -> list[str]:
    """OUT/captions.json: [{"video_id", "text", "label", "caption"}], for whoever scores them."""
    captions = []
    for sample, row in zip(samples, rows):
        if sample.kind == CAPTIONING:
            captions.append(dict(
                video_id=sample.video, text=sample.query, label=sample.solution, caption=row["said"]))
    if not captions:
        return []
    path = f"{out}/captions.json"
    write_json(captions, path)
    lines = [f"written: {path}"]
    if find_meteor() is None:
        lines.append("no METEOR: it needs nltk and its wordnet")
    return lines


# ---- the miniature ---------------------------------------------------------------------------------
def mini_avhbench(root: str, videos: int):
    """Each video has a question of every task with the label Yes, one with No, and a caption."""
    items = []
    for i in range(videos):
        scene = split_scene("test", i)
        video = f"{i:05d}"
        put(video_file(scene.pictures, scene.sound), f"{root}/videos/{video}.mp4")
        thing = scene.things[0].name
        questions = (
            (TASKS[0], f"Is the {thing} visible in the video?", "Yes"),
            (TASKS[0], "Is the dog visible in the video?", "No"),
            (TASKS[1], f"Is the {thing} making sound in the audio?", "Yes" if scene.sounding == 0 else "No"),
            (TASKS[1], "Is the dog making sound in the audio?", "No"),
            (TASKS[2], "Are the contexts of audio and visual content matching?", "Yes"),
            (CAPTIONING, "Describe what you see and hear in a single sentence.", f"A {thing} moves about."),
        )
        for task, text, label in questions:
            items.append(dict(video_id=video, task=task, text=text, label=label))
    put(items, f"{root}/QA.json")


AVHBENCH = Benchmark(
    read=read_avhbench,
    per_video=False,
    paired="ours",
    quiz=Quiz(
        parsers=dict(loose=loose),
        parts=avhbench_parts,
        columns=(*COLUMNS, "METEOR"),
        export=export_captions,
        note="No official scorer exists. Yes is positive; what cannot be read is wrong, and not Yes.",
    ),
    mini=mini_avhbench,
)
