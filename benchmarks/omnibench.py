"""OmniBench (arXiv 2409.15272): questions that need a picture and a sound at once. 1142 rows.

    omnibench/
      dataset/batch-5_1142_20240817.jsonl    a line each: {"index", "task type", "audio type", "question",
                                             "options": [text], "answer": text, "audio_path", "image_path"}
      mm_data/audio/<audio_path>             mp3
      mm_data/image/<image_path>             png or jpg

The answer is the text of an option. Rows are counted by audio type and by task type.

`official` is the published rule: "(B)", else "B ", else "B.", else, in a reply of more than five words, an
option's text; of several the last; none is wrong. It looks for capital letters in prose. Quirk: the true
answer's text goes through the same rule, so "A man is talking." is the letter A, whatever it was: where the
rule finds a letter in the true text, that letter is the truth, else the option's. `by letter` takes the
option's letter always. `lmms-eval` is the rule without options' texts.
"""
import io
import json
import os

from scipy.io import wavfile

from benchmarks.mini import put, stills
from benchmarks.questions import file_of, group_of, new_question, set_choice
from benchmarks.quiz import Quiz
from benchmarks.replies import LETTERS, MARKS
from benchmarks.samples import Benchmark, faults_of, require
from benchmarks.toy import toy_scene
from data import SAMPLE_RATE, parse_json
from trust.errors import BadInput, reading
from trust.files import check_file

FILE = "dataset/batch-5_1142_20240817.jsonl"


def read_omnibench(root: str, split: str) -> list:
    """All samples. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    path = f"{root}/{FILE}"
    samples = []
    for i, item in enumerate(read_lines(path)):
        sample = new_question("omnibench", "row", i)
        samples.append(sample)
        with faults_of(sample):
            read_row(sample, item, root, f"{path}: line {i + 1}")
    return samples


def read_lines(path: str) -> list:
    """The JSON values of a file's lines; None for one that is none."""
    check_file(path)
    with reading(path), open(path, encoding="utf-8-sig") as file:
        lines = file.read().split("\n")
    values = [parse_json(line) for line in lines if line.strip()]
    if not any(isinstance(value, dict) for value in values):
        raise BadInput(f"cannot use {path} (a JSON object on each line expected)")
    return values


def read_row(sample, item, root, where):
    sample.query = require(item, "question", where, str)
    picture = file_of(f"{root}/mm_data/image", require(item, "image_path", where, str), where)
    sample.pictures = [picture]
    sample.video = os.path.splitext(os.path.basename(picture))[0]
    sample.names = [sample.video]
    sample.sound = file_of(f"{root}/mm_data/audio", require(item, "audio_path", where, str), where)
    sample.kind = group_of(item, "audio type", where)
    sample.groups = {"audio": sample.kind, "task": group_of(item, "task type", where)}
    options = require(item, "options", where, list)
    answer = require(item, "answer", where, str)
    letter = LETTERS[options.index(answer)] if answer in options[:len(LETTERS)] else answer
    set_choice(sample, options, letter, where)


# ---- the metric ------------------------------------------------------------------------------------
def omnibench_letter(reply: str, options: list[str], texts: bool = True) -> str:
    """The letter that the published rule finds in a reply, or "".

    texts: whether an option's text counts where no letter is found.
    """
    text = reply
    for mark in MARKS[:-1]:
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[:len(options)]
    for form in ("({})", "{} ", "{}."):
        found = {}
        for letter in letters:
            if form.format(letter) in text:
                # Letters inside words count where they are found, but not for which is the last.
                last = form if form == "({})" else " {} "
                found[letter] = text.rfind(last.format(letter))
        if found:
            return max(found, key=found.get)
    if not texts or len(text.split()) <= 5:
        return ""
    low = text.lower()
    found = {letter: low.rfind(option.lower()) for letter, option in zip(letters, options)}
    found = {letter: place for letter, place in found.items() if place >= 0}
    return max(found, key=found.get) if found else ""


def official(text: str | None, sample) -> bool:
    if text is None:
        return False
    options = sample.choices
    answer = options[LETTERS.index(sample.solution)]
    true = omnibench_letter(answer, options) or sample.solution
    return omnibench_letter(text, options) == true


def official_letter(text: str | None, sample) -> bool:
    return text is not None and omnibench_letter(text, sample.choices) == sample.solution


def lmms(text: str | None, sample) -> bool:
    return text is not None and omnibench_letter(text, sample.choices, texts=False) == sample.solution


# ---- the miniature ---------------------------------------------------------------------------------
def mini_omnibench(root: str, videos: int):
    """A question of each type of audio about every picture. The sounds are wav files with the name of mp3."""
    lines = []
    kinds = ("speech", "sound event", "music")
    tasks = ("Action and Activity", "Count and Quantity", "Plot Inference")
    for i, (picture, _, names) in enumerate(stills("test", videos)):
        for k, (kind, task) in enumerate(zip(kinds, tasks)):
            number = len(lines)
            # Names of the real files have several dots, too.
            sound = f"{number}-0001.mp4.mp3.mp3"
            image = f"{number}-0001.png"
            put(wav_file(toy_scene("test", i).sound), f"{root}/mm_data/audio/{sound}")
            put(picture, f"{root}/mm_data/image/{image}")
            options = ["A dog barks.", f"The {names[0]} sounds.", "It rains.", "Nobody is there."]
            item = {"index": number, "task type": task, "audio type": kind,
                    "question": "What is seen and heard?", "options": options, "answer": options[(k + 1) % 4],
                    "audio_path": sound, "image_path": image, "audio content": "", "image content": ""}
            lines.append(json.dumps(item))
    put("\n".join(lines).encode(), f"{root}/{FILE}")


def wav_file(sound) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, SAMPLE_RATE, (sound * 32767).astype("<i2"))
    return file.getvalue()


OMNIBENCH = Benchmark(
    read=read_omnibench,
    per_video=False,
    paired="ours",
    quiz=Quiz(parsers={"official": official, "by letter": official_letter, "lmms-eval": lmms}),
    mini=mini_omnibench,
)
