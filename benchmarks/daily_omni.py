"""Daily-Omni (arXiv 2505.17862): what is seen and heard at the same time. 684 videos, 1197 questions.

    daily_omni/
      qa.json               [{"Question", "Choice": ["A. ..."], "Answer": letter, "video_id", "Type",
                            "video_category", "video_duration": "30s" or "60s"}]
      Videos/<video_id>/<video_id>_video.mp4      with sound; <video_id>_audio.wav beside it is not read

`official` is the published rule: the letter at the very start of the reply, in any case, so that "Answer: B"
is an A. Rows whose video is missing, or that failed, leave the denominator.
"""
import re

from benchmarks.mini import put, split_scene
from benchmarks.questions import file_of, group_of, new_question, set_choice, without_letters
from benchmarks.quiz import Quiz
from benchmarks.samples import Benchmark, faults_of, require
from benchmarks.video_r1 import video_file
from trust.files import check_name, read_json


def read_daily_omni(root: str, split: str) -> list:
    """All samples. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    path = f"{root}/qa.json"
    samples = []
    for i, item in enumerate(read_json(path, list)):
        sample = new_question("daily_omni", "item", i)
        samples.append(sample)
        with faults_of(sample):
            read_item(sample, item, root, f"{path}: item {i}")
    return samples


def read_item(sample, item, root, where):
    name = check_name(require(item, "video_id", where, str), where)
    sample.video = name
    sample.pictures = [file_of(f"{root}/Videos/{name}", f"{name}_video.mp4", where)]
    sample.sound = sample.pictures[0]
    sample.query = require(item, "Question", where, str)
    sample.kind = group_of(item, "Type", where)
    sample.groups = {
        "type": sample.kind,
        "duration": group_of(item, "video_duration", where),
        "category": group_of(item, "video_category", where),
    }
    texts = without_letters(require(item, "Choice", where, list), where)
    set_choice(sample, texts, require(item, "Answer", where, str), where)


# ---- the metric ------------------------------------------------------------------------------------
def daily_omni_letter(reply: str) -> str:
    """The letter that the published rule finds in a reply, or ""."""
    match = re.match("[A-D]", reply.strip(), re.IGNORECASE)
    return match[0].upper() if match else ""


def official(text: str | None, sample) -> bool | None:
    return None if text is None else daily_omni_letter(text) == sample.solution


# ---- the miniature ---------------------------------------------------------------------------------
def mini_daily_omni(root: str, videos: int):
    items = []
    for i in range(videos):
        scene = split_scene("test", i)
        # Some real ids begin like an option of a command line.
        video = f"-toy{i}"
        put(video_file(scene.pictures, scene.sound), f"{root}/Videos/{video}/{video}_video.mp4")
        put(b"", f"{root}/Videos/{video}/{video}_audio.wav")
        for k, kind in enumerate(("Event Sequence", "AV Event Alignment")):
            choices = ["A. A dog \u2192 a cat", f"B. A {scene.things[0].name}", "C. Rain", "D. Silence"]
            items.append(dict(
                Question="What is seen while the tone is heard?",
                Choice=choices,
                Answer="ABCD"[(i + k) % 4],
                video_id=video,
                Type=kind,
                video_category="Howto & Style" if i % 2 else "Music",
                video_duration="60s" if i % 2 else "30s",
            ))
    put(items, f"{root}/qa.json")


DAILY_OMNI = Benchmark(
    read=read_daily_omni,
    per_video=False,
    paired="ours",
    quiz=Quiz(
        parsers=dict(official=official),
        note="official: rows that were not asked leave the denominator.",
    ),
    mini=mini_daily_omni,
)
