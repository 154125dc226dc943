"""MVBench (arXiv 2311.17005): 20 tasks of 200 questions about short clips.

    mvbench/
      json/<task>.json      [{"video", "question", "candidates": [text], "answer": text}]
      video/<folder>/<video>    of the unpacked archives; FOLDERS has the folder of each task

Bounded tasks have start and end, in seconds. The videos of episodic_reasoning are folders of pictures at 3 a
second, whose first is 00001.jpg. Those of action_antonym are webm. The 320 clips of NTU RGB+D that
fine_grained_pose needs are withheld, and users bring them: so the rows "19 tasks" are without it. What is not
there is skipped and counted.

`official` is the published match: the first word of the reply's first line, without points and in lower case,
must be part of "(b)", or hold it. Quirk: an empty reply is right. The published prompt begins the reply with
"Best option:(", which ours does not. `lmms-eval` takes the first word A to E; empty replies leave its
denominator. `VLMEvalKit` is its rule without a judge.
"""
import os

from benchmarks.mini import put, split_scene
from benchmarks.questions import file_of, new_question, set_bounds, set_choice
from benchmarks.quiz import Quiz, by_groups, mean_part
from benchmarks.replies import LETTERS, lmms_accepts, vlmeval_letter
from benchmarks.samples import Benchmark, faults_of, require
from benchmarks.video_r1 import video_file
from trust.files import read_json

BOUNDED = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "object_interaction": "star/Charades_v1_480",
    "action_localization": "sta/sta_video",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
}
FOLDERS = BOUNDED | {
    "object_existence": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "counterfactual_inference": "clevrer/video_validation",
    "object_shuffle": "perception/videos",
    "action_count": "perception/videos",
    "state_change": "perception/videos",
    "character_order": "perception/videos",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "scene_transition": "scene_qa/video",
    "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa",
}
FRAMES = "episodic_reasoning"
FRAMES_FPS = 3.0
WITHHELD = "fine_grained_pose"


def read_mvbench(root: str, split: str) -> list:
    """All samples. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    samples = []
    for task in FOLDERS:
        path = f"{root}/json/{task}.json"
        for i, item in enumerate(read_json(path, list)):
            sample = new_question("mvbench", task, i)
            sample.kind = task
            sample.groups = dict(task=task)
            samples.append(sample)
            with faults_of(sample):
                read_item(sample, item, root, f"{path}: item {i}")
    return samples


def read_item(sample, item, root, where):
    task = sample.kind
    video = require(item, "video", where, str)
    sample.pictures = [file_of(f"{root}/video/{FOLDERS[task]}", video, where)]
    sample.video = f"{task}/{video}"
    if task == FRAMES:
        sample.fps = FRAMES_FPS
    else:
        sample.sound = sample.pictures[0]
    if task in BOUNDED:
        set_bounds(sample, require(item, "start", where), require(item, "end", where), where)
    sample.query = require(item, "question", where, str)
    candidates = require(item, "candidates", where, list)
    answer = require(item, "answer", where, str)
    letter = LETTERS[candidates.index(answer)] if answer in candidates[:len(LETTERS)] else answer
    set_choice(sample, candidates, letter, where)


# ---- the metric ------------------------------------------------------------------------------------
def mvbench_accepts(reply: str, letter: str) -> bool:
    """Whether the published match takes a reply for this letter."""
    word = reply.split("\n")[0].lower().split(" ")[0]
    true = f"({letter.lower()})"
    return word.replace(".", "") in true or true in word


def official(text: str | None, sample) -> bool:
    return text is not None and mvbench_accepts(text, sample.solution)


def lmms(text: str | None, sample) -> bool | None:
    return lmms_accepts(text, sample.solution) if text else None


def vlmeval(text: str | None, sample) -> bool:
    return text is not None and vlmeval_letter(text, sample.choices) == sample.solution


def mvbench_parts(rows: list[dict], columns) -> dict:
    """All rows, those without the withheld task, and each task."""
    parts = by_groups(rows, columns)
    parts.pop("overall")
    some = [row for row in rows if row["kind"] != WITHHELD]
    tasks = {f"{len(FOLDERS)} tasks": mean_part(rows, columns)}
    tasks[f"{len(FOLDERS) - 1} tasks"] = mean_part(some, columns)
    return tasks | parts


# ---- the miniature ---------------------------------------------------------------------------------
def mini_mvbench(root: str, videos: int):
    """`videos` questions of each task. Their files have the endings of the real ones, and all are AVI."""
    endings = {"action_antonym": "webm", WITHHELD: "avi"}
    for task, folder in FOLDERS.items():
        items = []
        for i in range(videos):
            scene = split_scene("test", i)
            video = f"toy{i}.{endings.get(task, 'mp4')}"
            place = f"{root}/video/{folder}"
            if task == FRAMES:
                video = f"toy{i}"
                for t, picture in enumerate(scene.pictures):
                    put(picture, f"{place}/{video}/{t + 1:05d}.jpg")
            elif not os.path.exists(f"{place}/{video}"):
                put(video_file(scene.pictures, scene.sound), f"{place}/{video}")
            candidates = ["Nothing.", f"A {scene.things[0].name}.", "A dog.", "A house."][:3 + i % 2]
            item = dict(video=video, question="What is to be seen?", candidates=candidates,
                        answer=candidates[i % 3])
            if task in BOUNDED:
                item |= dict(start=0.5, end=2.0)
            items.append(item)
        put(items, f"{root}/json/{task}.json")


MVBENCH = Benchmark(
    read=read_mvbench,
    per_video=False,
    paired="ours",
    quiz=Quiz(
        parsers={"official": official, "lmms-eval": lmms, "VLMEvalKit": vlmeval},
        parts=mvbench_parts,
        note="20 tasks: all rows. 19 tasks: without fine_grained_pose, whose clips are withheld. "
             "official: an empty answer is right.",
    ),
    mini=mini_mvbench,
)
