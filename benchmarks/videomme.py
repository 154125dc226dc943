"""Video-MME (arXiv 2405.21075): questions about short, medium and long videos. 900 videos, 2700 rows.

    videomme/
      videomme/test-00000-of-00001.parquet     needs pyarrow; or the same rows as videomme/test.jsonl
      data/<videoID>.mp4                       of the unpacked videos_chunked_*.zip; some are .MP4 or .mkv
      subtitle/<videoID>.srt                   of 744 videos

A row has video_id, duration (short, medium, long), domain, sub_category, videoID (that of the files),
question_id, task_type, question, options ["A. ..."], answer (a letter).

`official` is the published extraction: the first capital letter A to D anywhere in the reply, once "Answer:"
is taken out. The other lead-in phrases that it takes out have no such letter, or never fit, as commas are
missing between them: so "Best answer: C" is a B. Rows without a letter leave the denominator. `lmms-eval`
counts them as wrong. `VLMEvalKit` is its rule without a judge.

OUT/videomme.json is the result file of the official scorer. Its responses are the answers alone, as the
scorer would read the reasoning. It wants all 300 videos of a duration: a video without any reply is marked as
missing. `--subtitles true` gives those of the frames that are shown.

Qwen2.5-Omni hears the first 300 s of a sound: of the medium and long videos, the rest is seen and not heard.
The frames of a video of more than 20 minutes stand closer together in the prompt than in time, and its sound
does not: there they do not agree.
"""
import json
import os
import re

from benchmarks.mini import put, split_scene
from benchmarks.questions import group_of, new_question, set_choice, without_letters
from benchmarks.quiz import Quiz
from benchmarks.refcocog_2k_840 import import_pyarrow
from benchmarks.replies import lmms_letter, official_text, vlmeval_letter
from benchmarks.reports import write_json
from benchmarks.samples import Benchmark, faults_of, require
from benchmarks.video_r1 import video_file
from data import parse_json
from trust.errors import BadInput, reading
from trust.files import check_file, check_name

PARQUET = "videomme/test-00000-of-00001.parquet"
LINES = "videomme/test.jsonl"
ENDINGS = (".mp4", ".MP4", ".mkv", ".webm")
# What the result file says of a video and of a question.
VIDEO_KEYS = ("video_id", "duration", "domain", "sub_category")
QUESTION_KEYS = ("question_id", "task_type", "question", "answer")


def read_videomme(root: str, split: str) -> list:
    """All samples. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    path, rows = read_rows(root)
    samples = []
    for i, row in enumerate(rows):
        sample = new_question("videomme", "row", i)
        samples.append(sample)
        with faults_of(sample):
            read_row(sample, row, root, f"{path}: row {i}")
    return samples


def read_rows(root: str) -> tuple[str, list]:
    """(path, rows as dicts) of the parquet file, or of the lines that stand in for it."""
    path = f"{root}/{LINES}"
    if os.path.exists(path):
        check_file(path)
        with reading(path), open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
        rows = [parse_json(line) for line in lines if line.strip()]
        if not any(isinstance(row, dict) for row in rows):
            raise BadInput(f"cannot use {path} (a JSON object on each line expected)")
        return path, rows
    path = f"{root}/{PARQUET}"
    check_file(path)
    library = import_pyarrow()
    with reading(path):
        return path, library.parquet.ParquetFile(path).read().to_pylist()


def read_row(sample, row, root, where):
    """extra: what the result file says of the row."""
    name = check_name(require(row, "videoID", where, str), where)
    sample.video = name
    sample.pictures = [find_video(root, name)]
    sample.sound = sample.pictures[0]
    subtitles = f"{root}/subtitle/{name}.srt"
    if os.path.exists(subtitles):
        sample.subtitles = subtitles
    sample.query = require(row, "question", where, str)
    sample.kind = group_of(row, "duration", where)
    sample.groups = {"duration": sample.kind}
    for key in ("domain", "sub_category", "task_type"):
        sample.groups[key] = group_of(row, key, where)
    options = require(row, "options", where, list)
    set_choice(sample, without_letters(options, where), require(row, "answer", where, str), where)
    sample.extra["video"] = {key: group_of(row, key, where) for key in VIDEO_KEYS}
    question = {key: require(row, key, where, str) for key in QUESTION_KEYS}
    sample.extra["question"] = question | dict(options=options)


def find_video(root: str, name: str) -> str:
    for ending in ENDINGS:
        path = f"{root}/data/{name}{ending}"
        if os.path.exists(path):
            return path
    return f"{root}/data/{name}{ENDINGS[0]}"


# ---- the metric ------------------------------------------------------------------------------------
def videomme_letter(reply: str) -> str:
    """The letter that the published extraction finds in a reply, or ""."""
    match = re.search("[ABCD]", reply.replace("Answer:", ""))
    return match[0] if match else ""


def official(text: str | None, sample) -> bool | None:
    letter = "" if text is None else videomme_letter(text)
    return letter == sample.solution if letter else None


def lmms(text: str | None, sample) -> bool:
    return text is not None and lmms_letter(text) == sample.solution


def vlmeval(text: str | None, sample) -> bool:
    return text is not None and vlmeval_letter(text, sample.choices) == sample.solution


def export_results(out: str, samples: list, rows: list[dict]) -> list[str]:
    """OUT/videomme.json, a JSON list with an object for each video."""
    videos = {}
    for sample, row in zip(samples, rows):
        if sample.broken:
            continue
        video = videos.setdefault(sample.video, sample.extra["video"] | dict(missing=True, questions=[]))
        response = "" if row["text"] is None else official_text(row["text"])
        video["questions"].append(sample.extra["question"] | dict(response=response))
        if row["text"] is not None:
            video["missing"] = False
    path = f"{out}/videomme.json"
    write_json(list(videos.values()), path)
    lines = [f"written: {path}"]
    missing = sum(video["missing"] for video in videos.values())
    if missing or len(videos) < 900:
        lines.append(f"{len(videos) - missing} of 900 videos have a reply: the official scorer wants all 300 "
                     f"of a duration")
    return lines


# ---- the miniature ---------------------------------------------------------------------------------
def mini_videomme(root: str, videos: int):
    """Three questions a video. Every second video has subtitles. Without pyarrow the rows are lines."""
    rows = []
    for i in range(videos):
        scene = split_scene("test", i)
        name = f"-toy{i}_x"
        put(video_file(scene.pictures, scene.sound), f"{root}/data/{name}.mp4")
        if i % 2 == 0:
            put(subtitle_file(len(scene.pictures) // 2).encode(), f"{root}/subtitle/{name}.srt")
        duration = ("short", "medium", "long")[i % 3]
        for k, task in enumerate(("Counting Problem", "Object Recognition", "Temporal Perception")):
            options = ["A. One.", f"B. A {scene.things[0].name}.", "C. Three.", "D. None of these."]
            rows.append(dict(
                video_id=f"{i + 1:03d}",
                duration=duration,
                domain="Knowledge" if i % 2 else "Life Record",
                sub_category="Astronomy" if i % 2 else "Handicraft",
                url="",
                videoID=name,
                question_id=f"{i + 1:03d}-{k + 1}",
                task_type=task,
                question="What is to be seen?",
                options=options,
                answer="BCD"[k],
            ))
    try:
        library = import_pyarrow()
    except BadInput:
        put("\n".join(map(json.dumps, rows)).encode(), f"{root}/{LINES}")
        return
    os.makedirs(f"{root}/videomme", exist_ok=True)
    library.parquet.write_table(library.Table.from_pylist(rows), f"{root}/{PARQUET}")


def subtitle_file(seconds: int) -> str:
    parts = []
    for t in range(seconds):
        times = f"00:00:{t:02d},000 --> 00:00:{t:02d},900"
        parts.append(f"{t + 1}\n{times}\n<font color=\"white\">It is second {t}.</font>\n")
    return "\n".join(parts)


VIDEOMME = Benchmark(
    read=read_videomme,
    per_video=False,
    paired="ours",
    quiz=Quiz(
        parsers={"official": official, "lmms-eval": lmms, "VLMEvalKit": vlmeval},
        export=export_results,
        note="official: rows without a letter leave the denominator.",
    ),
    mini=mini_videomme,
)
