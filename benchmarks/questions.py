"""Questions about videos, pictures and sounds: what the benchmarks that ask them share.

    Question -> read_clip -> Inputs (in workers, ahead of time) -> System 1 -> OUT/answers-RANK.jsonl
    Question and its reply -> a row -> a table: `ours` beside `official`

A question is shown in real time: frame t of the prompt stands at the second at which it is in the video, so
that pictures and sound agree (up to 20 minutes, of which 300 s are heard). Nothing is drawn and nothing is
tracked: neither System 2 nor SAM2 is loaded.

Letters: T frames.
"""
import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.media import (
    LONGEST_SOUND,
    SOUND_SLACK,
    check_pixels,
    check_readable,
    decoding,
    is_picture,
    open_video,
    read_sound,
)
from benchmarks.samples import Sample, named, require
from data import (
    FPS,
    LONGEST_QUERY,
    QUESTION_TASK,
    SAMPLE_RATE,
    Clip,
    Frames,
    Processor,
    check_text,
    prompt_inputs,
    spread,
)
from trust.errors import BadInput, one_line
from trust.files import check_file, check_name
from trust.options import MOST_FRAMES
from trust.workers import begin_reading, no_room, prepare_to_fork, share

YES_NO = "nothing but yes or no"
SENTENCE = "one sentence"
# Asked without reasoning.
DIRECT_TASK = (
    QUESTION_TASK[0],
    "Write between <answer> and </answer> {form}.\n",
    "Form: <answer>...</answer>\n",
)
# Frames a second of a gif that does not say how long its frames last.
GIF_FPS = 25.0
# Bytes of a file of subtitles. Those of an hour have 100,000.
LARGEST_SUBTITLES = 1 << 24


# ---- questions -------------------------------------------------------------------------------------
@dataclass
class Question(Sample):
    """One question. Its `pictures` are one path: a video file, a folder of frames at `fps`, or a picture.

    truth: type and options of data.py's task "qa"; `solution` is a letter, Yes, No, or a sentence.
    """
    start: float | None = None    # seconds; only what is between them is shown and heard. None: all
    end: float | None = None
    subtitles: str = ""           # path of an srt file, "" without
    choices: list = field(default_factory=list)    # texts of the options, without letters
    form: str = ""                # what the answer is, in place of what its type says
    groups: dict = field(default_factory=dict)     # {what the tables are divided by: this question's part}
    graded: bool = True           # False: no parser can tell whether the answer is right

    @property
    def solution(self) -> str:
        return self.truth.get("solution", "")


def new_question(dataset: str, video, number) -> Question:
    """A question that still says nothing. `number` is unique in its split."""
    return Question("qa", dataset, str(video), str(number), "", "", [], [], truth=dict(solution=""))


def set_choice(sample: Question, choices, letter: str, where: str) -> None:
    """Makes it a multiple choice among texts. Raises BadInput where the letter is none of them."""
    if not isinstance(choices, list) or not 2 <= len(choices) <= 8:
        raise BadInput(f"the options are no list of 2 to 8 texts in {where}")
    for choice in choices:
        check_text(choice, f"an option in {where}")
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if letter not in letters:
        raise BadInput(f"the answer {str(letter)[:80]!r} is none of the options in {where}")
    options = [f"{name}. {choice}" for name, choice in zip(letters, choices)]
    check_text(sample.query + "".join(options), f"the question with its options in {where}")
    sample.choices = choices
    sample.truth = dict(type="multiple choice", options=options, solution=letter)


def set_free(sample: Question, solution: str, form: str) -> None:
    """Makes it a question whose answer is of a form of its own: YES_NO or SENTENCE."""
    sample.form = form
    sample.truth = dict(type="free-form", options=[], solution=solution)


def without_letters(options, where: str) -> list:
    """The texts of options that begin with their letters, "A. ..."."""
    if not isinstance(options, list):
        raise BadInput(f"the options are no list in {where}")
    texts = []
    for i, option in enumerate(options):
        check_text(option, f"an option in {where}")
        letter = chr(ord("A") + i)
        match = re.match(rf"\s*{letter}\s*[.):]\s*(.+)", option, re.DOTALL)
        if not match:
            raise BadInput(f"option {i} does not begin with {letter}. in {where}")
        texts.append(match[1].strip())
    return texts


def set_bounds(sample: Question, start, end, where: str) -> None:
    """Seconds between which it is shown. Raises BadInput where they are none."""
    for value in (start, end):
        if type(value) not in (int, float) or not 0 <= value < 1e6:
            raise BadInput(f"start and end are no seconds: {str(start)[:40]}, {str(end)[:40]} in {where}")
    if start > end:
        raise BadInput(f"it ends at {end} s, before it starts at {start} s, in {where}")
    sample.start = float(start)
    sample.end = float(end)


def group_of(record, key: str, where: str) -> str:
    """A short text by which tables are divided."""
    value = require(record, key, where, str)
    if not value.strip() or len(value) > 100 or not value.isprintable():
        raise BadInput(f"{key!r} is no short text in {where}")
    return value


def file_of(root: str, name, where: str) -> str:
    """A file below a folder, by its name in a record. Raises BadInput for one that leads out of it."""
    return os.path.join(root, check_name(name, where, slashes=True))


# ---- media -----------------------------------------------------------------------------------------
def open_media(sample: Question) -> tuple[Frames, float]:
    """(all frames of its file or folder, frames a second)"""
    path = sample.pictures[0]
    if path.lower().endswith(".gif"):
        return open_gif(path)
    frames, fps = open_video(path)
    return frames, sample.fps if os.path.isdir(path) else fps


def open_gif(path: str) -> tuple[Frames, float]:
    """As open_video, of an animation, by Pillow."""
    check_readable("video", path)
    with decoding("video", path), Image.open(path, formats=("GIF",)) as gif:
        check_pixels(gif.size)
        count = gif.n_frames
        milliseconds = gif.info.get("duration") or 1000 / GIF_FPS

    def read(t):
        with decoding("video", path), Image.open(path, formats=("GIF",)) as gif:
            gif.seek(t)
            # A later frame may enlarge the picture.
            check_pixels(gif.size)
            return gif.convert("RGB")

    return Frames(read, range(count)), 1000 / milliseconds


def frame_window(sample: Question, count: int, fps: float) -> range:
    """The frames between its bounds. The first picture of a folder has the number 1 (MVBench's count)."""
    if sample.start is None:
        return range(count)
    lowest = int(os.path.isdir(sample.pictures[0]))
    first = max(lowest, round(sample.start * fps)) - lowest
    last = min(round(sample.end * fps) - lowest, count - 1)
    if first > last:
        seconds = f"{sample.start:g} to {sample.end:g} s of {count / fps:.1f} s"
        raise BadInput(f"no frame from {seconds}: {sample.pictures[0]}")
    return range(first, last + 1)


def read_clip(
    sample: Question,
    most_frames: int = MOST_FRAMES,
    hear: bool = True,
    think: bool = True,
    subtitles: bool = False,
) -> Clip:
    """The Clip of a question: at most `most_frames` frames, at most two a second, evenly spaced.

    hear: whether its sound is given; think: whether it asks to reason; subtitles: whether those of the frames
    are given. Raises BadInput that names the sample and the file at fault.
    """
    return named(sample, show_clip, sample, most_frames, hear, think, subtitles)


def show_clip(sample, most_frames, hear, think, subtitles):
    frames, fps = open_media(sample)
    window = frame_window(sample, len(frames), fps)
    seconds = len(window) / fps
    # A video stays one, however short.
    most = min(most_frames, max(2, math.ceil(seconds * FPS)))
    indices = [window[i] for i in spread(len(window), most)]
    sound = None
    if hear and sample.sound is not None:
        sound = sound_between(sample, window[0] / fps, seconds)
    spoken = ""
    if subtitles and sample.subtitles:
        lines = lines_at(read_subtitles(sample.subtitles), [t / fps for t in indices])
        spoken = "\n".join(lines)[:LONGEST_QUERY]
    # Positions of longer videos would be beyond those that policies know.
    rate = max(len(indices) / seconds, len(indices) / LONGEST_SOUND)
    media = dict(subtitles=spoken)
    clip = Clip(sample.name, frames.pick(indices), "", rate, sound, task=sample.task, truth=media)
    return asked_about(clip, sample, think)


def asked_about(clip: Clip, sample: Question, think: bool) -> Clip:
    """The clip of the media of a question, asked that question."""
    spoken = clip.truth["subtitles"]
    query = f"{sample.query}\nSubtitles:\n{spoken}" if spoken else sample.query
    truth = sample.truth | dict(task=question_task(sample.form, think), subtitles=spoken)
    return replace(clip, name=sample.name, query=query, kind=sample.kind, truth=truth)


def question_task(form: str, think: bool) -> str:
    """The text of a prompt, in place of data.QUESTION_TASK."""
    text = "".join(QUESTION_TASK if think else DIRECT_TASK)
    return text.replace("{form}", form) if form else text


def sound_between(sample: Question, start: float, seconds: float) -> np.ndarray | None:
    """Its sound from `start` on, cut SOUND_SLACK after its video's end. A picture's sound is whole."""
    if is_picture(sample.pictures[0]):
        return read_sound(sample.sound)
    sound = read_sound(sample.sound, start + seconds + SOUND_SLACK)
    if sound is None:
        return None
    sound = sound[round(start * SAMPLE_RATE):]
    return sound if len(sound) else None


# ---- subtitles -------------------------------------------------------------------------------------
STAMP = r"(\d{1,3}):(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
# A subtitle ends at a blank line, and some have no words.
SPAN = re.compile(rf"{STAMP}[ \t]*-->[ \t]*{STAMP}[^\n]*\n((?:[^\n]*\S[^\n]*(?:\n|\Z))*)")


def read_subtitles(path: str) -> list[tuple]:
    """[(start, end, text)] of an srt file, in seconds. Raises BadInput where it is none."""
    check_file(path)
    if os.path.getsize(path) > LARGEST_SUBTITLES:
        raise BadInput(f"too large for subtitles: {path}")
    with decoding("subtitles", path), open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read()
    spans = []
    for match in SPAN.finditer(text):
        *stamps, words = match.groups()
        h, m, s, ms, h2, m2, s2, ms2 = map(int, stamps)
        start = 3600 * h + 60 * m + s + ms / 1000
        end = 3600 * h2 + 60 * m2 + s2 + ms2 / 1000
        words = " ".join(re.sub(r"<[^<>]*>", "", words).split())
        spans.append((start, end, words))
    if text.strip() and not spans:
        raise BadInput(f"no subtitles in: {path}")
    return spans


def lines_at(spans: list, times: list[float]) -> list[str]:
    """The first subtitle that is shown at each of these seconds; a line that comes again is left out."""
    lines = {}
    for time in times:
        fitting = [words for start, end, words in spans if start <= time <= end and words]
        if fitting:
            lines[fitting[0]] = True
    return list(lines)


# ---- read ahead ------------------------------------------------------------------------------------
@dataclass
class Prepared:
    """Questions about the same media, ready for System 1."""
    numbers: list     # of the questions in a list
    inputs: list      # data.Inputs of each; None where `problem` says why not
    problem: str = ""    # without the name of a question


@dataclass
class Preparation:
    """Item k is Prepared of the k-th group of questions that share their media, or why there is no room."""
    processor: Processor
    samples: list
    groups: list      # lists of numbers of samples
    options: object

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, k):
        numbers = self.groups[k]
        samples = [self.samples[i] for i in numbers]
        options = self.options
        controls = options.frames, options.sound, options.think, options.subtitles
        try:
            clip = read_clip(samples[0], *controls)
            pictures = [clip.frames[t] for t in range(len(clip.frames))]
            clip = replace(clip, frames=Frames(pictures.__getitem__, range(len(pictures))))
            inputs = []
            for sample in samples:
                asked = asked_about(clip, sample, options.think)
                inputs.append(prompt_inputs(self.processor, asked))
                # The vision tower sees them once.
                inputs[-1].patches = inputs[0].patches
        except (OSError, ValueError) as error:
            problem = str(error).removeprefix(f"{samples[0].name}: ")
            return Prepared(numbers, [None] * len(numbers), problem)
        tensors = [value for own in inputs for value in vars(own).values()]
        return share(tensors) or Prepared(numbers, inputs)


def group_questions(samples: list[Question], most: int = 8) -> list[list]:
    """Numbers of the samples, those with the same media together, at most so many in a group."""
    groups = []
    newest = {}    # of each medium: its group that is not full
    for i, sample in enumerate(samples):
        if sample.broken:
            groups.append([i])
            continue
        key = sample.pictures[0], sample.sound, sample.start, sample.end
        if key not in newest or len(newest[key]) == most:
            newest[key] = []
            groups.append(newest[key])
        newest[key].append(i)
    return groups


def prepare(processor: Processor, samples: list, options) -> Iterator[Prepared]:
    """Reads media in workers, ahead of time. Raises BadInput where a worker has died."""
    ahead = None
    context = None
    if options.workers:
        ahead = 4
        context = "fork"
    items = Preparation(processor, samples, group_questions(samples), options)
    prepare_to_fork()
    loader = iter(DataLoader(
        items, batch_size=None, num_workers=options.workers, prefetch_factor=ahead,
        worker_init_fn=begin_worker, multiprocessing_context=context))
    for _ in range(len(items)):
        try:
            item = next(loader)
        except RuntimeError as error:
            if not options.workers:
                raise
            raise BadInput(f"a worker that reads media has died ({one_line(error)}); "
                           f"the same command goes on where it was") from None
        if isinstance(item, str):
            raise no_room(item)
        yield item


def begin_worker(_) -> None:
    begin_reading()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(items: Iterator, size: int, pool: int = 4) -> Iterator[list]:
    """Batches of (number, Inputs) with prompts of similar length, from a pool of so many batches."""
    waiting = []
    for number, inputs in items:
        waiting.append((number, inputs))
        if len(waiting) >= pool * size:
            waiting.sort(key=prompt_length)
            # The longest: if memory does not suffice, that is told at once.
            yield waiting[-size:]
            del waiting[-size:]
    waiting.sort(key=prompt_length)
    while waiting:
        yield waiting[-size:]
        del waiting[-size:]


def prompt_length(item) -> int:
    return len(item[1].ids)
