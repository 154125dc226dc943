"""Video-R1-260k (arXiv 2503.21776): questions on videos and pictures to train on.

    video_r1/
      Video-R1-260k.json
          [{"problem_id", "problem", "data_type", "problem_type", "options", "solution", "path"}]
      <path>    a video file (data_type "video") or a picture

problem holds the question, solution the answer between answer tags. It has no metric.
"""
import os
import struct

import numpy as np
from PIL import Image

from benchmarks.mini import encoded, put
from benchmarks.samples import Benchmark, Sample, faults_of, require
from benchmarks.toy import CANVAS, toy_scene
from data import FPS, QUESTION_FORMS, SAMPLE_RATE, answer_text, check_text
from rewards import parse_number
from trust.errors import BadInput
from trust.files import check_name, read_json


def read_video_r1(root: str, split: str) -> list[Sample]:
    """All samples. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    path = f"{root}/Video-R1-260k.json"
    samples = []
    for i, item in enumerate(read_json(path, list)):
        sample = Sample("qa", "video_r1", "item", str(i), "", "", [], [])
        samples.append(sample)
        with faults_of(sample):
            read_question(sample, item, root, f"{path}: item {i}")
    return samples


def read_question(sample, item, root, where):
    """Fills in what an item of the file says. Raises BadInput for what cannot be asked or rewarded."""
    sample.query = require(item, "problem", where, str)
    file = os.path.normpath(require(item, "path", where, str))
    sample.video = check_name(file, where, slashes=True)
    location = os.path.join(root, file)
    sample.pictures = [location]
    media = require(item, "data_type", where, str)
    if media == "video":
        sample.sound = location
    elif media == "image":
        sample.names = [os.path.splitext(os.path.basename(file))[0]]
    else:
        raise BadInput(f"data_type {media[:80]!r} is neither video nor image in {where}")
    sample.kind = require(item, "problem_type", where, str)
    if sample.kind not in QUESTION_FORMS:
        raise BadInput(f"problem_type {sample.kind[:80]!r} is unknown in {where}")
    options = item.get("options")
    if options is None:
        options = []
    if not isinstance(options, list):
        raise BadInput(f"'options' is a {type(options).__name__} in {where}")
    for option in options:
        check_text(option, f"an option in {where}")
    check_text(sample.query + "".join(options), f"the question with its options in {where}")
    solution = check_text(require(item, "solution", where), f"the solution in {where}").strip()
    if "<answer>" in solution:
        solution = check_text(answer_text(solution), f"the answer in the solution in {where}")
    # No answer could be right.
    fitting = [option for option in options if option.strip().startswith(solution)]
    if sample.kind == "multiple choice" and not fitting:
        raise BadInput(f"the solution {solution[:80]!r} is none of the options in {where}")
    if sample.kind in ("numerical", "regression") and parse_number(solution) is None:
        raise BadInput(f"the solution {solution[:80]!r} is no number in {where}")
    sample.truth = dict(type=sample.kind, options=options, solution=solution)


# ---- the miniature ---------------------------------------------------------------------------------
def mini_video_r1(root: str, videos: int):
    """Videos and pictures take turns. Each has a question of every type."""
    items = []
    for i in range(videos):
        scene = toy_scene("train", i)
        thing = scene.things[0]
        if i % 2 == 0:
            media = "video"
            path = f"./STAR/toy{i}.avi"
            put(video_file(scene.pictures, scene.sound), f"{root}/{path}")
        else:
            media = "image"
            path = f"./Chart/toy{i}.jpg"
            put(scene.pictures[0], f"{root}/{path}")
        questions = (
            ("multiple choice", "Which of these colours is to be seen?", "B"),
            ("numerical", "How many objects are there?", str(len(scene.things))),
            ("OCR", "Write down the first object's colour.", thing.colour),
            ("free-form", "What does the first object look like?", f"It is a {thing.name}."),
            ("regression", "How many pixels wide is the picture?", str(CANVAS)),
        )
        for n, (kind, question, answer) in enumerate(questions):
            items.append(dict(
                problem_id=5 * i + n,
                problem=question,
                data_type=media,
                problem_type=kind,
                options=["A. pink", f"B. {thing.colour}"] if kind == "multiple choice" else [],
                solution=f"<answer>{answer}</answer>",
                path=path,
            ))
    put(items, f"{root}/Video-R1-260k.json")


def video_file(pictures, sound):
    """Bytes of an AVI file: pictures [T, H, W, 3] at FPS as JPEG, mono sound as 16-bit PCM.

    Fields that are not used are 0: an x in a format of struct is such a byte.
    """
    T, height, width, _ = pictures.shape
    fps = int(FPS)
    pcm = (sound * 32767).astype("<i2")
    # Microseconds a frame, frames, streams, width, height.
    header = struct.pack("<I12xI4xI4xII16x", 1_000_000 // fps, T, 2, width, height)
    # Size of this header, width, height, planes, bits a pixel, codec, bytes a picture.
    codec = struct.pack("<IiiHH4sI16x", 40, width, height, 1, 24, b"MJPG", 3 * width * height)
    video = stream(b"vidsMJPG", fps, T, 0, codec)
    # Codec (PCM), channels, samples a second, bytes a second, bytes a sample, bits a sample.
    codec = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    audio = stream(b"auds\0\0\0\0", SAMPLE_RATE, len(pcm), 2, codec)
    body = b"movi"
    for picture, part in zip(pictures, np.array_split(pcm, T)):
        body += chunk(b"00dc", encoded(Image.fromarray(picture), "jpeg"))
        body += chunk(b"01wb", part.tobytes())
    headers = b"hdrl" + chunk(b"avih", header) + video + audio
    return chunk(b"RIFF", b"AVI " + chunk(b"LIST", headers) + chunk(b"LIST", body))


def stream(kind, rate, length, unit, codec):
    """A stream's header and format: `length` units, `rate` a second, of `unit` bytes (0: they differ)."""
    header = kind + struct.pack("<12xII4xI8xI8x", 1, rate, length, unit)
    return chunk(b"LIST", b"strl" + chunk(b"strh", header) + chunk(b"strf", codec))


def chunk(tag, content):
    """A chunk of a RIFF file. An odd content is padded, which its length does not count."""
    return tag + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


VIDEO_R1 = Benchmark(
    read=read_video_r1,
    per_video=False,
    mini=mini_video_r1,
)
