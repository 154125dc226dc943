"""What the two systems see and say: clips, the toy world, prompts, media patches, position ids, the reading of answers, and the
real datasets. As a program it checks, shows and mimics these: `python data.py check | show | mini --bench NAME ...`.

    dataset -> Sample -> load -> Clip                                      (real data; the toy world makes Clips itself)
    Clip -> prompt_inputs / grounding_prompt -> Processor -> Inputs        (on the way into a Thinker)
    text -> parse_moments / keyframes / parse_boxes                        (on the way out of it)

Letters: T frames, O objects, H W pixels, P prompt tokens, N patches, M images or videos, p side of a patch.
Everything later in the project sees only `Clip`, `Inputs` and parsed answers; where a clip came from stays in here.
"""
import argparse
import csv
import glob
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.io import wavfile
from scipy.signal import resample_poly
from tqdm import tqdm

FPS = 2.0              # clips are always presented at 2 frames a second (method.md, 1)
SAMPLE_RATE = 16000    # of every soundtrack, Hz


class BadInput(ValueError):
    """What the user gave cannot be used; the message names it. Programs end with it in one line; other errors are bugs."""


@contextmanager
def reading(path):
    """Whatever goes wrong inside is the fault of the file at `path`: BadInput names it. For what trips over malformed files in
    many ways, plain Exception among them. BadInput from inside has its own words and passes."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"cannot use {path} ({one_line(error)})") from error


def one_line(error, most=160):
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def read_json(path, kind=dict, encoding="utf-8"):
    """What a JSON file holds, an object or, with kind=list, a list. Raises FileNotFoundError or BadInput naming the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    with reading(path), open(path, encoding=encoding) as file:
        value = json.load(file)
        if not isinstance(value, kind):
            raise ValueError(f"a {kind.__name__} expected, not a {type(value).__name__}")
    return value


POLICY_EXPECTED = ("expected a directory of Qwen2.5-Omni or of its Thinker alone; get the weights with: "
                   "hf download Qwen/Qwen2.5-Omni-7B --local-dir DIR")


def check_policy_folder(path):
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path} is no directory; {POLICY_EXPECTED}")
    config = os.path.join(path, "config.json")
    if not os.path.isfile(config):
        raise FileNotFoundError(f"no such file: {config}; {POLICY_EXPECTED}")


def fail(error):
    """One line on stderr; the exit code of a program that was asked for what cannot be done."""
    print("error:", *str(error).splitlines(), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse prints its usage, many lines, before an error; this one ends as everything else does."""
    place = ""    # where the arguments come from, for the message

    def error(self, message):
        sys.exit(fail(f"{self.place}{message}"))


def at_least(least):
    """An argparse type: whole numbers from `least` on."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)
    return whole_number


# ---------------------------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------------------------
class Frames:
    """The pictures of a video, each read only when it is asked for: `frames[t]` is an RGB PIL image at source size."""

    def __init__(self, read, indices):
        self.read, self.indices = read, list(indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, t):
        return self.read(self.indices[t])

    def pick(self, indices):
        """A view on some of the frames; nothing is read."""
        return Frames(self.read, [self.indices[t] for t in indices])


@dataclass
class Clip:
    """One sample. Frame t is presented at t / fps seconds; masks are those of the target, at source size."""
    name: str
    frames: Frames                       # T pictures of [H, W]
    query: str
    fps: float = FPS
    sound: np.ndarray | None = None      # mono float32 in [-1, 1] at 16 kHz
    masks: np.ndarray | None = None      # bool [O, T, H, W], visible parts of the target's objects; None where unknown
    kind: str = ""                       # kind of query, for the tables
    task: str = "vos"                    # "vos" keyframes, boxes, masks; "avs" first frame and sound; "image" a box and two
                                         # points; "qa" a question
    truth: dict = field(default_factory=dict)    # of "image": box, points (source pixels); of "qa": type, options, solution
    fault: str = ""                      # why it could not be read, where a blank clip stands in for it
    size: tuple = field(init=False)      # (H, W) of the source

    def __post_init__(self):
        if self.masks is None:
            width, height = self.frames[0].size
            self.size = (height, width)
        else:
            self.size = self.masks.shape[2:]

    def sampled(self, most=24):
        """(clip, indices): at most `most` evenly spaced frames presented at 2 fps, as System 1 sees them, and which
        source frames they are. The sound stays whole."""
        T = len(self.frames)
        if T <= most:
            return replace(self, fps=FPS), list(range(T))
        indices = np.linspace(0, T - 1, most).round().astype(int).tolist()
        masks = None if self.masks is None else self.masks[:, indices]
        return replace(self, frames=self.frames.pick(indices), masks=masks, fps=FPS), indices


def open_video(path):
    """Frames and fps of a video file (decord) or of a folder of numbered pictures (presented at 2 fps).

    Raises FileNotFoundError for a missing path, BadInput for one that holds no readable frames. Later frames are
    read on demand: one that cannot be decoded, or has another size than the first, raises BadInput then.
    """
    if os.path.isdir(path):
        names = [n for n in os.listdir(path) if n.lower().endswith((".jpg", ".jpeg", ".png"))]
        names.sort(key=lambda n: ([int(digits) for digits in re.findall(r"\d+", n)], n))         # 2.png before 10.png
        if not names:
            raise BadInput(f"no .jpg or .png frames in folder: {path}")
        size = read_image(os.path.join(path, names[0])).size

        def read(name):
            picture = read_image(os.path.join(path, name))
            if picture.size != size:
                raise BadInput(f"frame of {picture.size} pixels, but the first has {size}: {os.path.join(path, name)}")
            return picture

        return Frames(read, names), FPS
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such video file or folder of frames: {path}")
    import decord                        # only needed for video files; loads ffmpeg

    def read(t):
        try:
            return Image.fromarray(video[t].asnumpy())
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise BadInput(f"cannot read video: {path} ({one_line(error)})") from None

    try:
        video = decord.VideoReader(path)
    except (decord.DECORDError, RuntimeError) as error:
        raise BadInput(f"cannot read video: {path} ({one_line(error)})") from None
    read(0)
    return Frames(read, range(len(video))), float(video.get_avg_fps())


def read_image(path):
    """RGB picture; raises BadInput naming a file that is missing or cannot be decoded."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:        # Pillow raises all of them
        raise BadInput(f"cannot read image: {path} ({one_line(error)})") from None


def read_sound(path):
    """Mono float32 sound at 16 kHz of a wav file, or of a video file's soundtrack (None if it has none).

    Raises BadInput naming a file that is missing or cannot be decoded."""
    if not path.lower().endswith(".wav"):
        return _sound_of_video(path)
    try:
        rate, sound = wavfile.read(path)
    except Exception as error:           # scipy trips over malformed files in many ways, not only by ValueError
        raise BadInput(f"cannot read sound: {path} ({one_line(error)})") from None
    if rate == 0 or not np.isfinite(sound).all():
        raise BadInput(f"cannot read sound: {path} (its sample rate is 0, or a sample is not finite)")
    if sound.dtype == np.uint8:          # 8-bit wav is unsigned around 128, the other whole numbers are signed
        sound = (sound.astype(np.float32) - 128) / 128
    elif sound.dtype.kind == "i":
        sound = sound / -float(np.iinfo(sound.dtype).min)
    if sound.ndim == 2:
        sound = sound.mean(axis=1)
    common = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(sound, SAMPLE_RATE // common, rate // common).astype(np.float32)


def _sound_of_video(path):
    import decord
    try:
        return decord.AudioReader(path, sample_rate=SAMPLE_RATE, mono=True)[:].asnumpy()[0].astype(np.float32)
    except (decord.DECORDError, RuntimeError) as error:
        if "find audio stream" in str(error):
            return None
        raise BadInput(f"cannot read sound: {path} ({one_line(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# The toy world: everything follows from (split, index)
# ---------------------------------------------------------------------------------------------------------------------
CANVAS = 128
COLOURS = {"red": (220, 45, 40), "green": (40, 185, 70), "blue": (50, 85, 230),
           "yellow": (235, 215, 50), "purple": (165, 60, 205), "white": (240, 240, 240)}
SHAPES = ("circle", "square", "triangle")
UNSEEN_PAIRS = (("red", "triangle"), ("blue", "square"), ("yellow", "circle"))   # only in the split "pairs"
PITCH = dict(zip(COLOURS, (300, 420, 588, 823, 1152, 1613)))                     # Hz: a colour has a pitch ...
OVERTONES = {"circle": {1: 1.0}, "square": {1: 1.0, 3: 0.6, 5: 0.4}, "triangle": {1: 1.0, 2: 1.0}}   # ... a shape a timbre
TOY_SPLITS = ("train", "test", "pairs", "long")
TOY_KINDS = ("referring", "reasoning", "sound", "null")


@dataclass
class Thing:
    """One moving object of the toy world. Centres and radii are per frame, in pixels; alive says when it is on stage."""
    colour: str
    shape: str
    centre: np.ndarray     # [T, 2] x, y
    radius: np.ndarray     # [T]
    alive: np.ndarray      # bool [T]
    speed: float           # pixels a frame
    growth: float          # relative change of the radius over the clip

    @property
    def name(self):
        return f"{self.colour} {self.shape}"


@dataclass
class Scene:
    """A toy clip before a query is chosen: its things, pictures, and masks of the visible parts."""
    things: list           # O things, drawn in this order: later ones hide earlier ones
    pictures: np.ndarray   # uint8 [T, H, W, 3]
    masks: np.ndarray      # bool [O, T, H, W]
    sounding: int | None   # which thing sounds while it is on screen

    @property
    def sound(self):
        """Mono 16 kHz: the sounding thing's pitch and timbre while some of it is seen, over faint noise."""
        T = len(self.pictures)
        time = np.arange(int(T / FPS * SAMPLE_RATE)) / SAMPLE_RATE
        wave = 0.002 * np.random.default_rng(T).standard_normal(len(time))
        if self.sounding is not None:
            thing = self.things[self.sounding]
            seen = self.masks[self.sounding].any(axis=(1, 2))                    # [T]
            tone = sum(a * np.sin(2 * np.pi * PITCH[thing.colour] * k * time) for k, a in OVERTONES[thing.shape].items())
            wave += 0.2 * tone * seen[(time * FPS).astype(int)]
        return wave.astype(np.float32)


def _rng(split, index):
    return np.random.default_rng([zlib.crc32(split.encode()), index])


def _move(rng, T):
    """Centre [T, 2], radius [T], alive [T], speed and growth of one thing that stays, enters, leaves or visits."""
    low, high = 4, CANVAS - 4                                                    # walls for its centre: half of it may be outside
    way = rng.choice(["stay", "enter", "leave", "visit"], p=[0.1, 0.65, 0.15, 0.1])
    steps, cut = np.arange(T), int(rng.integers(round(0.3 * T), round(0.7 * T) + 1))
    first = int(rng.integers(1, T - 4))
    length = int(rng.integers(3, min(T // 2, T - 1 - first) + 1))
    k = {"stay": steps, "enter": steps - cut, "leave": cut - 1 - steps,          # steps from the edge it crosses
         "visit": np.minimum(steps - first, first + length - 1 - steps)}[way]    # [T]
    speed, angle = rng.uniform(1, 9), rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    start = rng.uniform(low + 14, high - 14, 2)
    if way != "stay":
        axis, side = rng.integers(2), rng.integers(2)
        start[axis] = (low, high)[side]
        velocity[axis] = (1, -1)[side] * max(abs(velocity[axis]), 4)
    path = start + k[:, None] * velocity
    centre = low + (high - low) - np.abs((path - low) % (2 * (high - low)) - (high - low))   # walls reflect
    growth = float(rng.choice([0, 0, 0.8, -0.45]))
    radius = np.clip(rng.uniform(11, 18) * (1 + growth * steps / T), 7, 26)
    return centre, radius, k >= 0, float(np.linalg.norm(velocity)), growth


def _background(rng):
    """Textured grey canvas, float [H, W, 3]."""
    coarse = Image.fromarray(rng.integers(20, 130, (6, 6), dtype=np.uint8)).resize((CANVAS, CANVAS), Image.BICUBIC)
    tint = rng.uniform(0.75, 1.05, 3)
    return np.asarray(coarse, np.float32)[..., None] * tint + rng.normal(0, 6, (CANVAS, CANVAS, 1))


def _inside(shape, x, y, r):
    """bool [H, W]: pixels of a shape of radius r centred at (x, y); pixel centres sit at whole numbers."""
    yy, xx = np.mgrid[0:CANVAS, 0:CANVAS]
    if shape == "circle":
        return (xx - x) ** 2 + (yy - y) ** 2 <= r * r
    if shape == "square":
        return (abs(xx - x) <= 0.9 * r) & (abs(yy - y) <= 0.9 * r)
    return (abs(yy - y) <= r) & (abs(xx - x) <= (yy - (y - r)) / 2)


def toy_scene(split, index):
    """The scene of a toy clip. Splits: train; test (same distribution); pairs (one thing of an unseen colour-shape pair);
    long (17 to 24 frames instead of 8 to 16)."""
    rng = _rng(split, index)
    T = int(rng.integers(17, 25) if split == "long" else rng.integers(8, 17))
    kinds = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS]
    chosen = [kinds[i] for i in rng.choice(len(kinds), rng.integers(2, 5), replace=False)]
    if split == "pairs":
        chosen[0] = UNSEEN_PAIRS[rng.integers(len(UNSEEN_PAIRS))]
    things = [Thing(colour, shape, *_move(rng, T)) for colour, shape in chosen]
    pictures = np.repeat(_background(rng)[None], T, 0)
    owner = np.full((T, CANVAS, CANVAS), -1)
    for t in range(T):
        for i, thing in enumerate(things):                                       # later things hide earlier ones
            if thing.alive[t]:
                spot = _inside(thing.shape, *thing.centre[t], thing.radius[t])
                pictures[t][spot] = COLOURS[thing.colour]
                owner[t][spot] = i
    pictures = (pictures + rng.normal(0, 4, (1, CANVAS, CANVAS, 1))).clip(0, 255).astype(np.uint8)
    masks = np.stack([owner == i for i in range(len(things))])                   # [O, T, H, W]
    sounding = int(rng.integers(len(things))) if rng.random() < 0.7 else None
    return Scene(things, pictures, masks, sounding)


def toy_queries(scene):
    """Every query that has exactly one right answer in the scene: list of (kind, query, thing index or None for null)."""
    things, seen = scene.things, scene.masks.any(axis=(2, 3))                    # [O, T]
    T, found = seen.shape[1], []
    for i, thing in enumerate(things):
        found.append(("referring", f"the {thing.name}", i))
        if sum(other.colour == thing.colour for other in things) == 1:
            found.append(("referring", f"the {thing.colour} object", i))
        if sum(other.shape == thing.shape for other in things) == 1:
            found.append(("referring", f"the {thing.shape}", i))
    first = np.where(seen.any(1), seen.argmax(1), T)                             # first and last frame of each thing
    last = np.where(seen.any(1), T - 1 - seen[:, ::-1].argmax(1), -1)
    grown = np.array([thing.radius[b] - thing.radius[min(a, T - 1)] for thing, a, b in zip(things, first, last)])    # while seen
    for query, score in (("the object that enters last", first), ("the object that leaves first", -last),
                         ("the object that moves fastest", [thing.speed / 2 for thing in things]),
                         ("the object that stays longest", seen.sum(1)),
                         ("the object that grows", 2 * (grown >= 1)), ("the object that shrinks", 2 * (grown <= -1))):
        order = np.argsort(score)
        if score[order[-1]] - score[order[-2]] >= 1 and score[order[-1]] != 0:   # a clear winner
            found.append(("reasoning", query, int(order[-1])))
    if scene.sounding is not None:
        found.append(("sound", "the object that makes the sound", scene.sounding))
    else:
        found.append(("null", "the object that makes the sound", None))
    names = {thing.name for thing in things} | {f"{c} {s}" for c, s in UNSEEN_PAIRS}      # no training that these never exist
    found += [("null", f"the {c} {s}", None) for c in COLOURS for s in SHAPES if f"{c} {s}" not in names][:: 3]
    return [(kind, query, i) for kind, query, i in found if i is None or seen[i].any()]


def toy_clip(split, index):
    """The toy world's sample (split, index); see toy_scene for the splits. A clip's kind is drawn first, then the query."""
    if split not in TOY_SPLITS:
        raise BadInput(f"unknown toy split: {split} (one of {', '.join(TOY_SPLITS)})")
    rng, scene = _rng(split + " query", index), toy_scene(split, index)
    queries = [q for q in toy_queries(scene) if split != "pairs" or q[2] in (0, None)]
    kinds = [kind for kind in TOY_KINDS if any(q[0] == kind for q in queries)]
    shares = np.array([{"referring": 0.3, "reasoning": 0.3, "sound": 0.4, "null": 0.06}[kind] for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    choices = [q for q in queries if q[0] == kind]
    _, query, target = choices[rng.integers(len(choices))]
    return scene_clip(scene, f"{split}/{index}", kind, query, target)


def scene_clip(scene, name, kind, query, target):
    """The clip of a scene under one query; a null query's masks are [1, T, H, W] and empty."""
    masks = np.zeros_like(scene.masks[:1]) if target is None else scene.masks[target:target + 1]
    frames = Frames(lambda t: Image.fromarray(scene.pictures[t]), range(len(scene.pictures)))
    return Clip(name, frames, query, FPS, scene.sound, masks, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: plain sentences of ours, the query before the media (method.md, 1)
# ---------------------------------------------------------------------------------------------------------------------
SYSTEM = "You watch videos, listen to their sound, and point out what you are asked for."
GLOBAL_TASK = (
    "Task: find this in the video: {query}\n",
    "The video shows 2 frames per second, from 00:00.00 to {end}, with its sound if it has any. ",
    "First reason between <think> and </think>: which object is meant, what does it look like, and when is it in plain view? "
    "Then choose 1 to 4 short moments at which it is large and unobstructed, and write them between <answer> and </answer> "
    "as a JSON list with one entry per moment. Times are minutes:seconds.hundredths. Each description must single the object "
    "out in that one picture by its looks and place alone, without sound, motion or other moments. "
    "If no such object is ever to be seen, the answer is null.\n",
    'Form: <think>...</think><answer>[{{"start_time": "{first}", "end_time": "{second}", "description": "..."}}]</answer>\n',
)
GROUNDING_TASK = (
    "Task: find in this picture: {query}\n",
    'Answer with a JSON list that holds {{"bbox_2d": [x1, y1, x2, y2]}} for every such object, in pixels of the picture, '
    "or with null if there is none.\n",
)
FIRST_FRAME_TASK = (
    "Task: find this in the video: {query}\n",
    "You are shown the first frame of the video and hear its sound. Reason between <think> and </think> about which object is "
    "meant. Then describe it between <answer> and </answer> by its looks and place in that frame alone, so that somebody who "
    "hears nothing finds it. If there is no such object, the answer is null.\n",
    "Form: <think>...</think><answer>...</answer>\n",
)
PICTURE_TASK = (
    "Task: find in this picture: {query}\n",
    "First reason between <think> and </think>. Then write between <answer> and </answer> the box around the object and two "
    "points well inside it, far from each other, all in pixels of the picture.\n",
    'Form: <think>...</think><answer>{{"bbox_2d": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}}</answer>\n',
)
QUESTION_TASK = (
    "Question: {query}\n{options}",
    "First reason between <think> and </think>. Then write between <answer> and </answer> {form}.\n",
    "Form: <think>...</think><answer>...</answer>\n",
)
QUESTION_FORMS = {"multiple choice": "nothing but the letter of the right option", "numerical": "nothing but the number",
                  "regression": "nothing but the number", "OCR": "the text as it is written there", "free-form": "the answer"}
NULL = "null"          # the agreed way, in every task, to say that there is no such object


def format_time(seconds):
    """"mm:ss.ff" of a time in seconds."""
    minutes, hundredths = divmod(round(seconds * 100), 6000)                     # rounded first: no "00:60.00"
    return f"{minutes:02d}:{hundredths / 100:05.2f}"


def plain(text):
    """User or model text that can hold no special token of the chat format, and no half of a surrogate pair (an undecodable
    byte of the command line), which no tokenizer accepts: it becomes "?"."""
    return text.replace("<|", "< |").encode("utf-8", "replace").decode("utf-8")


def global_prompt(clip, rng=None):
    """Messages that show System 1 a whole clip. `rng` (numpy Generator) draws the example times anew, so that they are
    not worth copying; without it they are those of the first frame."""
    T = len(clip.frames)
    first, second = sorted(rng.integers(0, T, 2)) if rng is not None else (0, 0)
    text = "".join(GLOBAL_TASK).format(query=plain(clip.query), end=format_time(T / clip.fps), first=format_time(first / clip.fps),
                                       second=format_time(second / clip.fps))
    return _messages(text, "video")


def grounding_prompt(description):
    """Messages that show System 2 one picture and ask for the boxes of what is described."""
    return _messages("".join(GROUNDING_TASK).format(query=plain(description)), "image")


def first_frame_prompt(clip):
    """Messages that show System 1 the first frame of a clip and let it hear the sound."""
    return _messages("".join(FIRST_FRAME_TASK).format(query=plain(clip.query)), "image", *["audio"] * (clip.sound is not None))


def picture_prompt(clip):
    """Messages that show System 1 one picture and ask for a box and two points."""
    return _messages("".join(PICTURE_TASK).format(query=plain(clip.query)), "image")


def question_prompt(clip):
    """Messages that ask a question about a picture, or about a video with its sound."""
    options = "".join(plain(option) + "\n" for option in clip.truth["options"])
    text = "".join(QUESTION_TASK).format(query=plain(clip.query), options=options, form=QUESTION_FORMS[clip.truth["type"]])
    return _messages(text, "image" if len(clip.frames) == 1 else "video")


def _messages(text, *media):
    return [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [{"type": "text", "text": text}, *({"type": kind} for kind in media)]}]


def prompt(clip, rng=None):
    """Messages of System 1's prompt for a clip's task; `rng` as in global_prompt."""
    if clip.task == "vos":
        return global_prompt(clip, rng)
    return {"avs": first_frame_prompt, "image": picture_prompt, "qa": question_prompt}[clip.task](clip)


def prompt_inputs(processor, clip, rng=None):
    """Inputs of System 1's prompt for a clip's task."""
    if clip.task == "avs":
        return processor.image_inputs(prompt(clip), clip.frames[0], clip.sound)
    if clip.task == "image" or (clip.task == "qa" and len(clip.frames) == 1):
        return processor.image_inputs(prompt(clip), clip.frames[0])
    return processor.video_inputs(prompt(clip, rng), clip.frames, clip.fps, clip.sound)


# ---------------------------------------------------------------------------------------------------------------------
# Processor: messages and media -> Inputs
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Inputs:
    """One prompt, ready for a Thinker."""
    ids: torch.Tensor                    # (P,) int64, a media placeholder once per media token
    positions: torch.Tensor              # (3, P) int64: time, height, width (TMRoPE)
    patches: torch.Tensor | None = None  # (N, 3 * 2 * p * p) float32, of the image or video
    grid: torch.Tensor | None = None     # (M, 3) int64: patches in time, height, width
    mel: torch.Tensor | None = None      # (bins, mel frames) float32
    scale: tuple = (1.0, 1.0)            # source pixels per pixel of the resized picture, (x, y)


MEDIA = re.compile(r"<\|(?:vision|audio)_bos\|><\|(IMAGE|VIDEO|AUDIO)\|><\|(?:vision|audio)_eos\|>")


class Processor:
    """Tokenizer, chat template and preprocessing values of a checkpoint directory, and what they do to a prompt.

    Equal to transformers' Qwen2_5OmniProcessor and get_rope_index on the same media (proved in the tests), with frames
    resized to a number of visual tokens rather than between two numbers of pixels. A sound too short for one sound token
    (three frames of its spectrogram) counts as none.
    """

    def __init__(self, path):
        """Raises FileNotFoundError or BadInput naming what is missing or malformed."""
        from transformers import AutoConfig, AutoTokenizer, WhisperFeatureExtractor
        check_policy_folder(path)
        self.path = path
        preprocessing, settings, tokenizer, template = (os.path.join(path, name) for name in (
            "preprocessor_config.json", "config.json", "tokenizer.json", "chat_template.json"))
        vision, config = read_json(preprocessing), read_json(settings)
        read_json(os.path.join(path, "tokenizer_config.json"))   # the tokenizer would load without it, but lack the template
        with reading(settings):
            AutoConfig.from_pretrained(path, local_files_only=True)      # so does the tokenizer, but it is not to blame
        with reading(tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        with reading(preprocessing):
            self.features = WhisperFeatureExtractor.from_pretrained(path, local_files_only=True)
            self.patch, self.merge, self.pair = (int(vision[k]) for k in ("patch_size", "merge_size", "temporal_patch_size"))
            self.mean, self.std = torch.tensor(vision["image_mean"]), torch.tensor(vision["image_std"])
            self.video_tokens = int(vision.get("video_tokens", 128))     # visual tokens a frame, System 1 (method.md, 1)
            self.image_tokens = int(vision.get("image_tokens", 900))     # and a picture, System 2
        with reading(settings):
            config = config.get("thinker_config", config)
            self.per_second = config.get("position_id_per_seconds", 25)  # position ids a second of video or sound
            self.chunk = int(self.per_second * config.get("seconds_per_chunk", 2))   # ids after which video and sound take turns
        if self.tokenizer.chat_template is None:                 # older checkpoints keep it in a file of its own
            older = read_json(template)
            with reading(template):
                self.tokenizer.chat_template = older["chat_template"]
        token = self.tokenizer.convert_tokens_to_ids
        self.image, self.video, self.audio = (token(f"<|{m}|>") for m in ("IMAGE", "VIDEO", "AUDIO"))
        self.marks = {k: token(f"<|{k}|>") for k in ("vision_bos", "vision_eos", "audio_bos", "audio_eos")}
        if None in (self.image, self.video, self.audio, *self.marks.values()):
            raise BadInput(f"cannot use {tokenizer} (it lacks the special tokens of Qwen2.5-Omni)")
        self.eos_ids = {self.tokenizer.eos_token_id, token("<|im_end|>"), token("<|endoftext|>")} - {None}

    def video_inputs(self, messages, frames, fps=FPS, sound=None):
        """Inputs of a prompt with one video of T frames and, where there is one, its sound interleaved."""
        height, width = self._resized(frames[0].size, self.video_tokens)
        pixels = torch.stack([_resize(frames[t], height, width) for t in range(len(frames))])    # [T, 3, h, w]
        return self._inputs(messages, *self._patches(pixels), self.pair / fps, None if sound is None else self._mel(sound))

    def image_inputs(self, messages, image, sound=None, like=None):
        """Inputs of a prompt with one PIL picture, and a sound apart; `scale` maps boxes back to the picture's own pixels.
        like: Inputs of the same picture, whose patches these share, so that the vision tower sees them once."""
        height, width = self._resized(image.size, self.image_tokens)
        patches, grid = (like.patches, like.grid) if like else self._patches(_resize(image, height, width)[None])
        inputs = self._inputs(messages, patches, grid, 1.0, None if sound is None else self._mel(sound))
        inputs.scale = (image.size[0] / width, image.size[1] / height)
        return inputs

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _resized(self, size, tokens):
        """(height, width) of a (width, height) picture: multiples of one token's side, at most `tokens` of them, aspect
        ratio kept as well as that allows. Pictures are never enlarged beyond the nearest multiple."""
        side = self.patch * self.merge
        width, height = size
        shrink = min(1.0, math.sqrt(tokens * side * side / (width * height)))
        rows, columns = max(1, round(height * shrink / side)), max(1, round(width * shrink / side))
        while rows * columns > tokens:
            rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
        return rows * side, columns * side

    def _patches(self, pixels):
        """uint8 [T, 3, h, w] -> patches (N, 3 * pair * p * p) in the vision tower's order, and their grid (1, 3)."""
        p, m, n = self.patch, self.merge, self.pair
        pixels = (pixels.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % n, -1, -1, -1)])           # repeat the last frame
        t, h, w = len(pixels) // n, pixels.shape[2] // p, pixels.shape[3] // p
        x = pixels.view(t, n, 3, h // m, m, p, w // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, h/m, w/m, m, m, 3, n, p, p
        return x.reshape(t * h * w, 3 * n * p * p), torch.tensor([[t, h, w]])

    def _mel(self, sound):
        """Log-mel spectrogram (bins, mel frames) of a 16 kHz sound, padded with one window of silence, in whole hops, on the
        side where transformers pads with minutes of it. None where it is too short for one sound token."""
        out = self.features(sound, sampling_rate=SAMPLE_RATE, padding="max_length", max_length=len(sound) + self.features.n_fft,
                            pad_to_multiple_of=self.features.hop_length, return_attention_mask=True, return_tensors="pt")
        mel = out["input_features"][0][:, out["attention_mask"][0].bool()]
        return mel if mel.shape[1] >= 3 else None                # the audio tower halves twice: fewer leave no token

    def _inputs(self, messages, patches, grid, seconds, mel):
        """Inputs of text with at most one image or video and one sound. A sound that the messages give no place of its own
        is that of the video. `seconds` is the time that a temporal patch lasts."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = MEDIA.split(text)                                                          # text and media take turns
        ids, positions, start = [], [], 0
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                new = self._text(piece)
                where, end = torch.arange(len(new)).expand(3, -1), len(new)
            elif piece == "AUDIO":
                new, where, end = self._wrapped(["audio"], *self._sound(mel))
            elif mel is not None and "AUDIO" not in pieces:
                new, where, end = self._wrapped(["vision", "audio"], *self._interleaved(grid[0], seconds, mel))
            else:
                new, where, end = self._wrapped(["vision"], *self._vision(grid[0], getattr(self, piece.lower()), seconds))
            ids.append(new)
            positions.append(where + start)
            start += end
        return Inputs(torch.cat(ids), torch.cat(positions, dim=1), patches, grid, mel)

    def _text(self, text):
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    # Each of these makes (ids (M,), positions (3, M) counted from 0, the position that follows).
    def _vision(self, grid, placeholder, seconds):
        t, h, w = grid.tolist()
        time = (torch.arange(t) * seconds * self.per_second).long()
        axes = torch.meshgrid(time, torch.arange(h // self.merge), torch.arange(w // self.merge), indexing="ij")
        where = torch.stack(axes).flatten(1)                                                # (3, t * h/m * w/m)
        return torch.full((where.shape[1],), placeholder), where, int(where.max()) + 1

    def _sound(self, mel):
        count = 0 if mel is None else ((mel.shape[1] - 1) // 2 - 1) // 2 + 1                # the audio tower halves twice
        return torch.full((count,), self.audio), torch.arange(count).expand(3, -1), count

    def _interleaved(self, grid, seconds, mel):
        """Video and sound take turns, a chunk of `self.chunk` positions each; the text goes on after the last chunk (as in
        transformers)."""
        video, sound = self._vision(grid, self.video, seconds), self._sound(mel)
        ids, where = torch.cat([video[0], sound[0]]), torch.cat([video[1], sound[1]], dim=1)
        turn = where[0] // self.chunk * 2 + (ids == self.audio)
        order = turn.argsort(stable=True)
        return ids[order], where[:, order], int(where[:, turn == turn.max()].max()) + 1

    def _wrapped(self, kinds, ids, where, end):
        """Media between their marks; the marks of a video and its sound share a position."""
        opening = [self.marks[f"{kind}_bos"] for kind in kinds]
        closing = [self.marks[f"{kind}_eos"] for kind in reversed(kinds)]
        first, last = (torch.full((3, len(kinds)), at) for at in (0, end + 1))
        return torch.cat([torch.tensor(opening), ids, torch.tensor(closing)]), torch.cat([first, where + 1, last], dim=1), end + 2

    def save(self, path):
        """Copies every small file of the directory that is not weights: tokenizer, template, preprocessing."""
        os.makedirs(path, exist_ok=True)
        for name in os.listdir(self.path):
            if name.endswith((".json", ".txt", ".jinja")) and name != "config.json" and "safetensors" not in name:
                shutil.copy(os.path.join(self.path, name), path)


def _resize(image, height, width):
    """uint8 [3, height, width] of a PIL picture, bicubic with antialiasing as transformers does it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reading what a model wrote. Nothing here raises, whatever the text, and everything is linear in its length:
# a policy in training writes anything, and one bad completion must cost its reward, not the run.
# ---------------------------------------------------------------------------------------------------------------------
TIME = re.compile(r"([0-9]{1,6}):([0-9]{1,6}\.[0-9]{1,6})")       # digits are bounded: no overflow, no slow parsing
BOX = re.compile(r'"bbox_2d"\s*:\s*(\[[^\[\]]*\])')
FARTHEST = 1e6                                                   # pixels; no image is larger


@dataclass
class Moment:
    """One `{…}` block of an answer: when the target is there, and what it looks like then."""
    start: float | None   # seconds; None where no time can be read
    end: float | None     # seconds
    description: str      # "" where there is none
    parsed: bool          # both times and the description can be read
    frames: list[int]     # the clip's frames in the interval; empty unless parsed and start <= end <= duration


def answer_text(text: str) -> str:
    """What stands between the first `<answer>` and the next `</answer>`, stripped; "" without both."""
    _, _, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if closed else ""


def is_null(answer: str) -> bool:
    """Whether the answer says, in the form agreed for every task, that there is no such object."""
    return answer.strip() == NULL


def blocks(answer: str) -> list[str]:
    """The `{…}` blocks in order: each runs from a `{` to the next `}`, so none holds another."""
    pieces = answer.split("}")[:-1]                              # what follows the last `}` is closed by nothing
    return [piece[piece.index("{"):] + "}" for piece in pieces if "{" in piece]


def parse_json(text: str):
    """The JSON value of `text`, or None where it is ill-formed, too deep, or an integer of too many digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_time(value) -> float | None:
    """Seconds from a string that begins with `minutes:seconds.fraction`, as "01:02.50" -> 62.5; else None."""
    match = TIME.match(value) if isinstance(value, str) else None
    return 60.0 * float(match[1]) + float(match[2]) if match else None


def parse_moments(text: str, frames: int, fps: float) -> list[Moment]:
    """One Moment per block of the completion's answer, for a clip of `frames` frames at `fps` per second."""
    return [_moment(block, frames, fps) for block in blocks(answer_text(text))]


def _moment(block: str, frames: int, fps: float) -> Moment:
    fields = parse_json(block) or {}
    start, end = parse_time(fields.get("start_time")), parse_time(fields.get("end_time"))
    description = fields.get("description")
    if not isinstance(description, str):
        description = ""
    # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer accepts: it becomes "?".
    description = description.encode("utf-8", "replace").decode("utf-8").strip()
    if not any(map(str.isalnum, description)):     # blank, invisible, or the dots of the prompt's example: it describes nothing
        description = ""
    parsed = start is not None and end is not None and description != ""
    inside = []
    if parsed and start <= end <= frames / fps:
        first, last = (min(int(second * fps), frames - 1) for second in (start, end))
        inside = list(range(first, last + 1))
    return Moment(start, end, description, parsed, inside)


def keyframes(moments: list[Moment], most: int = 4) -> dict[int, str]:
    """The first `most` distinct frames in time order -> the description of the first block that covers each."""
    described: dict[int, str] = {}
    for moment in moments:
        for frame in moment.frames:
            described.setdefault(frame, moment.description)
    return {frame: described[frame] for frame in sorted(described)[:most]}


def parse_numbers(value, count: int) -> tuple[float, ...] | None:
    """A JSON list of exactly `count` pixel coordinates as floats, else None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(type(v) in (int, float) and abs(v) <= FARTHEST for v in value):   # no bool; NaN fails the comparison
        return None
    return tuple(float(v) for v in value)


def parse_box(value) -> tuple[float, float, float, float] | None:
    """A JSON list [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2 as floats, else None."""
    box = parse_numbers(value, 4)
    return box if box and box[0] <= box[2] and box[1] <= box[3] else None


def parse_boxes(text: str, most: int = 16) -> list[tuple[float, float, float, float]]:
    """The first `most` well-formed `"bbox_2d": [x1, y1, x2, y2]` anywhere in System 2's answer.

    Pixels of the image it was shown. Ill-formed boxes are dropped. The bound keeps a degenerate answer that
    repeats one box for ever from filling SAM2's memory."""
    boxes = (parse_box(parse_json(match[1])) for match in BOX.finditer(text))
    return [box for box in boxes if box][:most]


# ---------------------------------------------------------------------------------------------------------------------
# Real datasets. A reader lists a split's samples from the small files; pictures, masks and sound wait for load(). A small
# file that cannot be read is an error at once; what is wrong with one sample is its `fault`, or an error of load().
# ---------------------------------------------------------------------------------------------------------------------
REVOS_KINDS = ("referring", "reasoning", "hallucination")        # by type_id
SOUND_SLACK = 0.5                                                # seconds by which a sound may end before its video
SIDE = 840                                                       # pixels, of the square pictures of refcocog_2k_840


@dataclass
class Sample:
    """One query of one video or picture, nothing read yet; load() reads it."""
    task: str            # "vos": keyframes, boxes, masks; "avs": first frame and sound; "image": a box and two points; "qa": text
    dataset: str
    video: str           # names the video within the dataset (with slashes in ReVOS)
    expression: str      # id of the query within the video
    query: str
    kind: str            # subset for the tables
    names: list          # of the frames, as predictions are to be named; none for a video file
    pictures: list       # paths of the frames (also FILE.parquet#ROW), or one path of a video file
    extra: dict = field(default_factory=dict)    # what scoring needs; ids of the target's objects, objects: how many
    read_masks: Callable | None = None           # (indices=None) -> bool [O, T, H, W] of these frames, by default of all
    sound: str | None = None                     # path of a wav, or of a video file with a soundtrack
    truth: dict = field(default_factory=dict)    # "image": box, points, size (H, W), stored pixels; "qa": type, options, solution
    fault: str = ""                              # why not to train on it, where the small files tell

    @property
    def name(self):
        return f"{self.dataset}/{self.video}/{self.expression}"


def load(sample, most_objects=None, most_frames=None, whole_sound=False):
    """The Clip of a sample, presented at 2 fps, its frames still unread; most_frames: only so many of them, evenly spaced, and
    only their masks decoded. Raises BadInput naming the sample, and the file that is to blame; also for more than
    `most_objects` objects, as a right answer would be wrong without some of them, and with `whole_sound` for a sound that
    ends before its video."""
    if most_objects and sample.extra.get("objects", 0) > most_objects:
        raise BadInput(f"{sample.name}: {sample.extra['objects']} objects, more than {most_objects}")
    frames, fps = _named(sample, _open, sample)
    indices = list(range(len(frames)))
    if most_frames and len(frames) > most_frames:
        indices = np.linspace(0, len(frames) - 1, most_frames).round().astype(int).tolist()      # as in Clip.sampled
    masks = None if sample.read_masks is None else _fitting_masks(sample, indices)
    least = len(frames) / fps if whole_sound else 0
    sound = None if sample.sound is None else _named(sample, _read_long_sound, sample.sound, least)
    return Clip(sample.name, frames.pick(indices), sample.query, FPS, sound, masks, sample.kind, sample.task, sample.truth)


def training_samples(name, root, seed=0, most_objects=3):
    """(samples, dropped): what epochs are drawn from, and a line for each sample left out. Of Ref-AVS 1600 rows, by the seed."""
    samples, dropped = [], []
    for sample in open_real(name, "train", root):
        objects = sample.extra.get("objects", 0)
        fault = f"{objects} objects, more than {most_objects}" if objects > most_objects else sample.fault
        if fault:
            dropped.append(f"{sample.name}: {fault}")
        else:
            samples.append(sample)
    if name == "refavs":
        samples = [samples[i] for i in sorted(np.random.default_rng(seed).permutation(len(samples))[:1600])]
    return samples, dropped


def open_real(name, split, root):
    """Samples of a split. Raises BadInput for an unknown name or split or a malformed small file, FileNotFoundError for a
    missing one."""
    if name not in DATASETS:
        raise BadInput(f"unknown dataset: {name} (known: toy, {', '.join(DATASETS)})")
    reader, splits, _ = DATASETS[name]
    if split not in splits:
        raise BadInput(f"unknown split of {name}: {split} (known: {', '.join(splits)})")
    return reader(root, split)


def _named(sample, read, *arguments):
    """read(*arguments), with errors that begin with the sample's name."""
    try:
        if not sample.pictures:
            raise BadInput("no frames")
        return read(*arguments)
    except (OSError, ValueError) as error:
        raise BadInput(f"{sample.name}: {error}") from None


def _with_masks(sample, read, *arguments):
    sample.read_masks = partial(_named, sample, read, *arguments)
    return sample


def _open(sample):
    """(frames, fps) of a sample's video."""
    if sample.names:
        return Frames(partial(_named, sample, read_picture), sample.pictures), sample.extra.get("fps", FPS)
    return open_video(sample.pictures[0])


def _read_long_sound(path, seconds):
    """read_sound(path), held against the length of its video; it may only be missing from a video file."""
    sound = read_sound(path)
    if sound is not None and len(sound) / SAMPLE_RATE < seconds - SOUND_SLACK:
        raise BadInput(f"sound of {len(sound) / SAMPLE_RATE:.1f} s, video of {seconds:.1f} s: {path}")
    return sound


def _fitting_masks(sample, indices=None):
    """read_masks(), held against the size of the first frame."""
    masks = sample.read_masks(indices)
    (width, height), (rows, columns) = _named(sample, read_picture, sample.pictures[0]).size, masks.shape[2:]
    if (rows, columns) != (height, width):
        raise BadInput(f"{sample.name}: masks of {columns} x {rows}, frames of {width} x {height}: {sample.pictures[0]}")
    return masks


def _get(record, key, where, kind=object):
    """record[key] of a JSON object; BadInput says where it is missing or of another kind."""
    if not isinstance(record, dict) or key not in record:
        raise BadInput(f"no {key!r} in {where}")
    if not isinstance(record[key], kind):
        raise BadInput(f"{key!r} is a {type(record[key]).__name__} in {where}")
    return record[key]


# ---- masks and pictures ----------------------------------------------------------------------------------------------
def rle_mask(rle, where):
    """bool [H, W] of a COCO run-length encoding; BadInput where it is none. Compressed, a number is a few characters of 5 bits,
    and from the fourth on it is the difference to the one before the last."""
    size, runs = _get(rle, "size", where, list), _get(rle, "counts", where, (str, list))
    if isinstance(runs, str):
        bits = np.frombuffer(runs.encode(), np.uint8).astype(np.int64) - 48
        if len(bits) == 0 or bits.min() < 0 or bits.max() > 63 or bits[-1] >= 32:
            raise BadInput(f"malformed counts in {where}")
        last = np.flatnonzero(bits < 32)                                         # bit 5: the number goes on
        first = np.r_[0, last[:-1] + 1]
        place = 5 * (np.arange(len(bits)) - np.repeat(first, last - first + 1))
        runs = np.add.reduceat((bits & 31) << place, first) - ((bits[last] >> 4 & 1) << place[last] + 5)     # bit 4: negative
        runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    runs = np.asarray(runs)
    if runs.dtype.kind != "i" or [type(n) for n in size] != [int, int]:
        raise BadInput(f"no run-length encoding: {where}")
    if runs.min() < 0 or runs.sum() != size[0] * size[1]:
        raise BadInput(f"runs of {runs.sum()} pixels for a mask of size {size} in {where}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def _rle_masks(sample, ids, path, table, union, indices=None):
    """bool [O, T, H, W] of annotations in `table`, the contents of file `path`; null is an empty mask, no annotation one empty
    object. union: O is 1. A mask not as large as the frame is an error; with a set extra["resized"] it is resized and noted."""
    width, height = read_picture(sample.pictures[0]).size
    indices = range(len(sample.names)) if indices is None else indices
    masks = np.zeros((1 if union else max(len(ids), 1), len(indices), height, width), bool)
    for o, key in enumerate(ids):
        rles = _get(table, key, path, list)
        if len(rles) != len(sample.names):
            raise BadInput(f"{len(rles)} masks of annotation {key} for {len(sample.names)} frames: {path}")
        for t, i in enumerate(indices):
            if rles[i] is None:
                continue
            where = f"annotation {key}, frame {sample.names[i]}: {path}"
            mask = rle_mask(rles[i], where)
            if mask.shape != (height, width):
                fault = f"mask of {mask.shape[1]} x {mask.shape[0]}, frame of {width} x {height}: {where}"
                if "resized" not in sample.extra:
                    raise BadInput(fault)
                sample.extra["resized"].add(fault)
                mask = np.array(Image.fromarray(mask).resize((width, height), Image.NEAREST))
            masks[0 if union else o, t] |= mask
    return masks


def _read_labels(paths, grey=False, indices=None):
    """uint8 [T, H, W] of mask pictures: a palette's indices, or with `grey` how light each pixel is."""
    labels = []
    for path in paths if indices is None else [paths[i] for i in indices]:
        try:
            picture = Image.open(path)
            label = np.array(picture.convert("L") if grey else picture)
        except (OSError, SyntaxError) as error:
            raise BadInput(f"cannot read mask: {path} ({error})") from None
        if label.ndim != 2 or label.shape != (labels or [label])[0].shape:
            raise BadInput(f"mask of shape {label.shape}, not one number a pixel or not as large as the first: {path}")
        labels.append(label)
    return np.stack(labels)


def _label_masks(paths, value, indices=None):
    """bool [1, T, H, W]: where the label is `value`; for None, where it is not black."""
    labels = _read_labels(paths, value is None, indices)
    return (labels > 0 if value is None else labels == value)[None]


def read_picture(path):
    """RGB picture of a file, or of FILE.parquet#ROW."""
    if ".parquet#" not in path:
        return read_image(path)
    file, row = path.rsplit("#", 1)
    row, file = int(row), _parquet(file)
    with reading(path):
        for group in range(file.num_row_groups):                 # one group is read: all pictures would fill the memory
            count = file.metadata.row_group(group).num_rows
            if row < count:
                cell = file.read_row_group(group, ["image"])["image"][row].as_py()
                break
            row -= count
        return Image.open(io.BytesIO(cell["bytes"])).convert("RGB")


def _pyarrow():
    try:
        import pyarrow.parquet
        return pyarrow
    except ImportError:
        raise BadInput("parquet files need pyarrow: pip install pyarrow") from None


@lru_cache(maxsize=8)
def _parquet(path):
    library = _pyarrow()
    with reading(path):
        return library.parquet.ParquetFile(path, memory_map=True)


def polygon_mask(corners, height, width):
    """bool [H, W] of a polygon with whole-numbered corners and of its outline, pixel for pixel what OpenCV's fillPoly and
    polylines draw as long as the corners are inside the picture."""
    mask, crossings = np.zeros((height, width), bool), []
    for a, b in zip(corners, corners[1:] + corners[:1]):
        (x, y), (x2, y2) = min(a, b), max(a, b)                                  # left to right
        dx, dy, down = x2 - x, abs(y2 - y), 1 if y2 > y else -1
        along = np.arange(max(dx, dy) + 1)
        long = max(dx, dy, 1)
        aside = (2 * along * min(dx, dy) + long - 1) // (2 * long)               # rounded, halves down
        columns, rows = (x + along, y + down * aside) if dx >= dy else (x + aside, y + down * along)
        inside = (0 <= columns) & (columns < width) & (0 <= rows) & (rows < height)
        mask[rows[inside], columns[inside]] = True
        (x, y), (x2, y2) = sorted((a, b), key=lambda corner: corner[1])          # top to bottom
        crossings += [(y + i, x + i * (x2 - x) / (y2 - y)) for i in range(y2 - y)]
    crossings.sort()
    for (row, left), (_, right) in zip(crossings[::2], crossings[1::2]):
        if 0 <= row < height:
            mask[row, max(int(np.ceil(left)), 0):max(int(np.floor(right)) + 1, 0)] = True
    return mask


# ---- videos ----------------------------------------------------------------------------------------------------------
def _expressions(path, *folders):
    """(video, where, record, names, pictures, id, expression) of every expression in a file of videos, each of which lies in one
    of the folders. A video's expressions share the two lists: ReVOS would otherwise hold millions of paths."""
    for video, record in _get(read_json(path), "videos", path, dict).items():
        where = f"{path}: {video}"
        names, entries = _get(record, "frames", where, list), _get(record, "expressions", where, (dict, list))
        folder = next((f for f in folders if os.path.isdir(os.path.join(f, video))), folders[0])
        pictures = [os.path.join(folder, video, f"{name}.jpg") for name in names]
        pairs = entries.items() if isinstance(entries, dict) else [(str(_get(e, "exp_id", where)), e) for e in entries]
        for key, entry in pairs:
            yield video, f"{where}/{key}", record, names, pictures, key, entry


def _rle_samples(dataset, root, meta, mask_file, table):
    """Samples of the layout of ReVOS and MeViS; Sa2VA's copy has no level JPEGImages. table None: no masks."""
    samples = []
    for video, where, _, names, pictures, key, entry in _expressions(meta, os.path.join(root, "JPEGImages"), root):
        ids = [] if table is None else [str(i) for i in _get(entry, "anno_id", where, list)]
        kind, query = "" if table is None else "multi" if len(ids) > 1 else "single", _get(entry, "exp", where, str)
        sample = Sample("vos", dataset, video, key, query, kind, names, pictures, dict(ids=ids, objects=len(ids)))
        if table is not None:
            _with_masks(sample, _rle_masks, sample, ids, mask_file, table, False)
            sample.fault = "" if ids else f"names no object: {where}"
        samples.append((sample, where, entry))
    return samples


def revos(root, split):
    """ReVOS. extra["foreground"]() is bool [1, T, H, W], the union of all objects that expressions of the video mean: R divides
    by it. A few masks are not as large as the frames; they are resized."""
    meta, mask_file = os.path.join(root, f"meta_expressions_{split}_.json"), os.path.join(root, "mask_dict.json")
    table, used, samples = read_json(mask_file), {}, []
    for sample, where, entry in _rle_samples("revos", root, meta, mask_file, table):
        type_id = _get(entry, "type_id", where, int)
        if type_id not in (0, 1, 2):
            raise BadInput(f"type_id {type_id} is none of 0, 1, 2 in {where}")
        sample.kind = REVOS_KINDS[type_id]
        sample.fault = "" if sample.kind == "hallucination" else sample.fault    # that kind is to name none
        ids = used.setdefault(sample.video, {})                                  # complete when all samples are listed
        ids |= dict.fromkeys(sample.extra["ids"])
        sample.extra |= dict(type_id=type_id, resized=set(),
                             foreground=partial(_named, sample, _rle_masks, sample, ids, mask_file, table, True))
        samples.append(sample)
    return samples


def mevis(root, split):
    """MeViS; the masks of "valid" are the server's."""
    root = os.path.join(root, split)
    mask_file = os.path.join(root, "mask_dict.json")
    table = None if split == "valid" else read_json(mask_file)
    return [sample for sample, _, _ in _rle_samples("mevis", root, os.path.join(root, "meta_expressions.json"), mask_file, table)]


def refdavis(root, split):
    """Ref-DAVIS17 as converted for ReferFormer. extra["annotator"]: 0 to 3; extra["annotation"](): uint8 [T, H, W] of the video's
    object numbers, 255 where protocol A does not look."""
    meta, samples = os.path.join(root, "meta_expressions", split, "meta_expressions.json"), []
    for video, where, _, names, pictures, key, entry in _expressions(meta, os.path.join(root, split, "JPEGImages")):
        number = str(_get(entry, "obj_id", where, (str, int)))
        if not (key.isdigit() and number.isdigit()):
            raise BadInput(f"the expression's id or obj_id is no number in {where}")
        labels = [os.path.join(root, split, "Annotations", video, f"{name}.png") for name in names]
        kind, extra = ("first frame", "full video")[int(key) % 2], dict(ids=[number], objects=1, annotator=int(key) % 4)
        sample = Sample("vos", "refdavis", video, key, _get(entry, "exp", where, str), kind, names, pictures, extra)
        sample.extra["annotation"] = partial(_named, sample, _read_labels, labels)
        samples.append(_with_masks(sample, _label_masks, labels, int(number)))
    return samples


def refytvos(root, split):
    """Ref-YouTube-VOS: the videos listed for valid and not for test, 202 in all; the masks are the server's."""
    meta, test = (os.path.join(root, "meta_expressions", s, "meta_expressions.json") for s in ("valid", "test"))
    hidden = _get(read_json(test), "videos", test, dict)
    return [Sample("vos", "refytvos", video, key, _get(entry, "exp", where, str), "", names, pictures)
            for video, where, _, names, pictures, key, entry in _expressions(meta, os.path.join(root, "valid", "JPEGImages"))
            if video not in hidden]


def reasonvos(root, split):
    """ReasonVOS. extra["folder"]: where the object's masks and predictions lie; extra["scored"]: names of the frames that count,
    those with a mask."""
    meta, samples = os.path.join(root, "meta_expressions.json"), []
    for video, where, record, names, pictures, key, entry in _expressions(meta, os.path.join(root, "JPEGImages")):
        source, number = _get(record, "source", where, str), str(_get(entry, "obj_id", where, (str, int)))
        folder = f"{source}_{video}_{number}"
        if not os.path.isdir(os.path.join(root, "Annotations", folder)):         # sources are spelt in any case
            folder = f"{source.lower()}_{video}_{number}"
        labels = [os.path.join(root, "Annotations", folder, f"{name}.png") for name in names]
        found = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(labels[0])), "*.png"))) if labels else []
        scored = [os.path.splitext(os.path.basename(path))[0] for path in found] or names
        extra = dict(ids=[number], objects=1, folder=folder, scored=scored)
        kind = "sentence" if entry.get("is_sent") else "phrase"
        sample = Sample("vos", "reasonvos", video, key, _get(entry, "exp_text", where, str), kind, names, pictures, extra)
        samples.append(_with_masks(sample, _scored_masks, labels, found or labels))
    return samples


def _scored_masks(labels, scored, indices=None):
    """bool [1, T, H, W] of the frames that count, or of the frames asked for."""
    return _label_masks(scored if indices is None else [labels[i] for i in indices], None)


def refavs(root, split):
    """Ref-AVS. An expression's id is its row, as uids repeat; its media lie under the uid less the last two parts, not under
    the vid."""
    path, samples = os.path.join(root, "metadata.csv"), []
    with reading(path), open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for column in ("uid", "split", "fid", "exp"):
            if column not in (reader.fieldnames or ()):
                raise BadInput(f"no column {column!r} in {path}")
        rows = list(reader)
    for i, row in enumerate(rows):
        if None in row or None in row.values():                                  # more or fewer cells than columns
            raise BadInput(f"row {i} does not fit the columns: {path}")
        if row["split"] != split:                                                # some are marked TODO
            continue
        if row["uid"].count("_") < 2:
            raise BadInput(f"the uid of row {i} has fewer than three parts: {path}")
        folder, category, _ = row["uid"].rsplit("_", 2)
        kind = "null" if category == "null" else "unseen" if split == "test_u" else "seen"
        media, truth = os.path.join(root, "media", folder), os.path.join(root, "gt_mask", folder, f"fid_{row['fid']}")
        pictures, labels = ([os.path.join(f, form.format(t)) for t in range(10)]
                            for f, form in ((os.path.join(media, "frames"), "{}.jpg"), (truth, "{:05d}.png")))
        sample = Sample("avs", "refavs", folder, str(i), row["exp"], kind, [f"{t:05d}" for t in range(10)], pictures,
                        dict(ids=[row["fid"]], objects=1, uid=row["uid"], fps=1.0), sound=os.path.join(media, "audio.wav"))
        sample.fault = "" if os.path.isdir(truth) else f"no such folder of masks: {truth}"
        samples.append(_with_masks(sample, _label_masks, labels, None))
    return samples


# ---- pictures and questions ------------------------------------------------------------------------------------------
def refcocog_2k_840(root, split):
    """Pictures resized to 840 x 840, with a box and two points of the target in their pixels."""
    files, samples = _files(os.path.join(root, "data"), "parquet"), []
    pair, columns = r"\((\d+),(\d+)\),\((\d+),(\d+)\)", ["id", "problem", "solution", "img_height", "img_width"]
    for path in files:
        table = _parquet(path)
        for column in (*columns, "image"):
            if column not in table.schema_arrow.names:
                raise BadInput(f"no column {column!r} in {path}")
        with reading(path):
            rows = table.read(columns).to_pylist()
        for i, row in enumerate(rows):
            key, query, solution = (_get(row, column, f"row {i}: {path}", str) for column in columns[:3])
            match = re.search(f"<box>{pair}</box><points>{pair}</points>", solution)
            if not match:
                raise BadInput(f"no box and two points in the solution of row {i}: {path}")
            numbers = [float(digits) for digits in match.groups()]
            samples.append(Sample("image", "refcocog_2k_840", key, "0", query, "", [key], [f"{path}#{i}"],
                                  dict(original=(row["img_height"], row["img_width"])),
                                  truth=dict(box=tuple(numbers[:4]), points=[numbers[4:6], numbers[6:]], size=(SIDE, SIDE))))
    return samples


def _files(folder, ending):
    """Sorted paths of a folder's files; FileNotFoundError where there are none."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), f"*.{ending}")))
    if not files:
        raise FileNotFoundError(f"no *.{ending} in {folder}")
    return files


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise ValueError(f"holds {module}.{name}, not plain data")             # a pickle could run any code by such a name


def _read_pickle(path):
    """The list in a pickle of plain data."""
    with reading(path), open(path, "rb") as file:
        value = _PlainUnpickler(file, encoding="latin1").load()                  # written by Python 2
        if not isinstance(value, list):
            raise ValueError(f"a list expected, not a {type(value).__name__}")
    return value


def refer(name, by, root, split):
    """RefCOCO, RefCOCO+ or RefCOCOg: every sentence is a sample."""
    path, refs = os.path.join(root, name, "instances.json"), os.path.join(root, name, f"refs({by}).p")
    instances, references, samples = read_json(path), _read_pickle(refs), []
    images = {_get(i, "id", path, (int, str)): i for i in _get(instances, "images", path, list)}
    annotations = {_get(a, "id", path, (int, str)): a for a in _get(instances, "annotations", path, list)}
    for ref in references:
        if _get(ref, "split", refs) != split:
            continue
        where, number = f"{path} (reference {_get(ref, 'ref_id', refs)})", _get(ref, "ann_id", refs, (int, str))
        image = _get(images, _get(ref, "image_id", refs, (int, str)), where)
        shape = _get(_get(annotations, number, where), "segmentation", where, (list, dict))
        picture = os.path.join(root, "images/mscoco/images/train2014", _get(image, "file_name", where, str))
        stem = os.path.splitext(os.path.basename(picture))[0]
        for sentence in _get(ref, "sentences", refs, list):
            key, query = str(_get(sentence, "sent_id", refs)), _get(sentence, "sent", refs, str)
            sample = Sample("vos", name, stem, key, query, "", [stem], [picture], dict(ids=[str(number)], objects=1))
            samples.append(_with_masks(sample, _coco_mask, picture, shape, where))
    return samples


def _coco_mask(picture, shape, where, indices=None):
    """bool [1, 1, H, W] of a COCO segmentation: polygons, each a list of x, y, x, y, ..., or a run-length encoding."""
    if isinstance(shape, dict):
        return rle_mask(shape, where)[None, None]
    from pycocotools import mask as coco
    if not shape or any(not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 for polygon in shape):
        raise BadInput(f"no polygons in {where}")
    width, height = read_picture(picture).size
    with reading(where):
        union = coco.merge(coco.frPyObjects(shape, height, width))               # where polygons overlap, a pixel counts once
    return rle_mask(dict(union, counts=union["counts"].decode()), where)[None, None]


def reasonseg(root, split):
    """ReasonSeg: a sample a picture, in training a sample a phrasing. extra["ignore"](): bool [1, 1, H, W], the part that LISA
    leaves out of I and U and that Seg-Zero's copy counts as target."""
    samples = []
    for path in _files(os.path.join(root, split), "json"):
        try:
            record = read_json(path)
        except BadInput:                                       # a few files; JSON that is broken fails again
            record = read_json(path, encoding="cp1252")
        texts, shapes = _get(record, "text", path, list), _get(record, "shapes", path, list)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"'text' is no list of phrasings in {path}")
        picture, stem = path[:-5] + ".jpg", os.path.basename(path)[:-5]
        for i, text in enumerate(texts if split == "train" else texts[:1]):
            sample = Sample("vos", "reasonseg", f"{split}/{stem}", str(i), text, "long" if record.get("is_sentence") else "short",
                            [stem], [picture], dict(ids=["target"], objects=1))
            sample.extra["ignore"] = partial(_named, sample, _lisa_mask, picture, path, shapes, True)
            samples.append(_with_masks(sample, _lisa_mask, picture, path, shapes, False))
    return samples


def _lisa_mask(picture, path, shapes, ignored, indices=None):
    """bool [1, 1, H, W] of the target, or of what is to be ignored. Smaller shapes are drawn over larger ones, as in LISA."""
    (width, height), drawn = read_picture(picture).size, []
    for i, shape in enumerate(shapes):
        where = f"{path}: shape {i}"
        with reading(where):
            label, points = _get(shape, "label", where, str).lower(), np.array(_get(shape, "points", where, list))
            if points.dtype.kind not in "if" or points.shape != (len(points), 2):
                raise BadInput(f"no corners in {where}")
            if label != "flag":
                drawn.append(("ignore" in label, polygon_mask([tuple(c) for c in points.astype(int).tolist()], height, width)))
    labels = np.zeros((height, width), np.uint8)
    for i in np.argsort([mask.sum() for _, mask in drawn])[::-1]:
        labels[drawn[i][1]] = 1 + drawn[i][0]
    return (labels == 1 + ignored)[None, None]


def video_r1(root, split):
    """Video-R1-260k: questions on videos and pictures. truth["solution"]: the text between the answer tags."""
    path, samples = os.path.join(root, "Video-R1-260k.json"), []
    for i, item in enumerate(read_json(path, list)):
        query, media, kind, file, solution = (_get(item, k, f"{path}: item {i}", str) for k in (
            "problem", "data_type", "problem_type", "path", "solution"))
        picture, is_video = os.path.normpath(os.path.join(root, file)), media == "video"
        truth = dict(type=kind, options=item.get("options") or [], solution=answer_text(solution) or solution.strip())
        names, sound = ([], picture) if is_video else ([os.path.splitext(os.path.basename(file))[0]], None)
        key = str(item.get("problem_id", i))
        video = os.path.normpath(file)
        samples.append(Sample("qa", "video_r1", video, key, query, kind, names, [picture], sound=sound, truth=truth))
    return samples


REFER_UNC, REFER_UMD = ("train", "val", "testA", "testB"), ("train", "val", "test")
DATASETS = {                 # name: reader, splits, folder under the data root
    "revos": (revos, ("train", "valid"), "revos"),
    "mevis": (mevis, ("train", "valid_u", "valid"), "mevis"),
    "refavs": (refavs, ("train", "val", "test_s", "test_u", "test_n"), "refavs"),
    "refcocog_2k_840": (refcocog_2k_840, ("train",), "refcocog_2k_840"),
    "refcoco": (partial(refer, "refcoco", "unc"), REFER_UNC, "refer_seg"),
    "refcoco+": (partial(refer, "refcoco+", "unc"), REFER_UNC, "refer_seg"),
    "refcocog": (partial(refer, "refcocog", "umd"), REFER_UMD, "refer_seg"),
    "reasonseg": (reasonseg, ("train", "val", "test"), "reasonseg"),
    "refdavis": (refdavis, ("valid",), "refdavis"),
    "refytvos": (refytvos, ("valid",), "refytvos"),
    "reasonvos": (reasonvos, ("test",), "reasonvos"),
    "video_r1": (video_r1, ("train",), "video_r1"),
}
FOLDERS = list(dict.fromkeys(folder for *_, folder in DATASETS.values()))



# ---------------------------------------------------------------------------------------------------------------------
# What is trained on
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class ToyData:
    """`length` clips of a toy split; `data[i]` makes the i-th."""
    split: str
    length: int

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return toy_clip(self.split, index)

    @property
    def names(self):
        return [f"{self.split}/{index}" for index in range(self.length)]


@dataclass(eq=False)
class Source:
    """A training set of one task: every epoch visits each item once, and read(item, rng) makes a Clip of it."""
    task: str
    items: Sequence      # of masks: videos, as the list of their expressions; of everything else one question each
    read: Callable


def training_sources(names, data_root, roots, seed):
    """(Sources of a comma-separated list of datasets, a line for each sample left out). roots: {folder: where it lies, if not in
    data_root}. Raises BadInput or FileNotFoundError naming what is unknown, missing or malformed."""
    sources, dropped = [], []
    known = ["toy", *(name for name, (_, splits, _) in DATASETS.items() if "train" in splits)]
    for name in names.split(","):
        if name not in known:
            raise BadInput(f"--data {names}: {name or 'an empty name'} is nothing to train on (known: {', '.join(known)})")
    for name in names.split(","):
        if name == "toy":
            sources.append(Source("vos", range(100_000), lambda index, rng: toy_clip("train", index)))
            continue
        name = {"refcocog": "refcocog_2k_840"}.get(name, name)   # the pictures of RefCOCOg that are trained on
        samples, left_out = training_samples(name, dataset_root(name, data_root, roots), seed)
        items = {}
        for sample in samples:
            items.setdefault(sample.video if sample.task == "vos" else sample.name, []).append(sample)
        if not items:
            raise BadInput(f"no sample of {name} can be trained on")
        sources.append(Source(samples[0].task, list(items.values()), _any_expression))
        dropped += left_out
    return tuple(sources), dropped


def _any_expression(samples, rng):
    return load(samples[rng.integers(len(samples))], most_frames=24, whole_sound=True)


def epoch_length(sources, size):
    """Steps of `size` items in an epoch."""
    counts = {}
    for source in sources:
        counts[source.task] = counts.get(source.task, 0) + len(source.items)
    return sum(-(-count // size) for count in counts.values())


@lru_cache(maxsize=2)
def epoch_plan(sources, size, seed, epoch):
    """The steps of an epoch, each a list of `size` (source, item); the same on every process. A step is of one task, so that all
    processes do the same; every item comes once, and a task's last step is filled up with its first items."""
    rng, steps = np.random.default_rng([seed, epoch]), []
    for task in dict.fromkeys(source.task for source in sources):
        entries = [(source, item) for source in sources if source.task == task for item in source.items]
        order = rng.permutation(len(entries))
        order = np.resize(order, (-(-len(order) // size), size))                 # repeats from the start
        steps.append([[entries[i] for i in step] for step in order])
    turns = rng.permutation(np.repeat(np.arange(len(steps)), [len(part) for part in steps]))
    queues = [iter(part) for part in steps]
    return [next(queues[turn]) for turn in turns]


def read_clip(source, item, rng):
    """The Clip of an item with its pictures read. What is broken becomes a blank clip of the same task with the reason as its
    `fault`: it takes part in a step, as all processes must, and counts for nothing."""
    try:
        clip = source.read(item, rng)
        pictures = [clip.frames[t] for t in range(len(clip.frames))]
        return replace(clip, frames=Frames(pictures.__getitem__, range(len(pictures))))
    except (OSError, BadInput) as error:
        blank = Frames([Image.new("RGB", (56, 56))].__getitem__, [0])
        truth = dict(box=(0, 0, 1, 1), points=[[0, 0], [1, 1]], type="free-form", options=[], solution="")
        return Clip("blank", blank, "", masks=np.zeros((1, 1, 56, 56), bool), task=source.task, truth=truth, fault=str(error))


def open_toy(split, length):
    if split not in TOY_SPLITS:
        raise BadInput(f"unknown toy split: {split} (known: {', '.join(TOY_SPLITS)})")
    return ToyData(split, length)


def add_roots(parser):
    """Options --data_root and, for each dataset that lies elsewhere, --FOLDER_root."""
    parser.add_argument("--data_root", default=".", metavar="DIR", help="holds one folder per dataset (default: .)")
    for folder in FOLDERS:
        parser.add_argument(f"--{folder}_root", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def roots_given(a):
    """{folder: where it lies} of parsed options."""
    return {folder: getattr(a, f"{folder}_root") for folder in FOLDERS if hasattr(a, f"{folder}_root")}


def dataset_root(name, data_root, roots):
    """Where a dataset lies: roots[folder] or the folder in data_root. Raises BadInput for an unknown name."""
    if name not in DATASETS:
        raise BadInput(f"unknown dataset: {name} (known: toy, {', '.join(DATASETS)})")
    folder = DATASETS[name][2]
    return roots.get(folder) or os.path.join(data_root, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Programs: python data.py check | show | mini
# ---------------------------------------------------------------------------------------------------------------------
def check(name, split, root):
    """Reads all of a split, prints what it holds and every broken sample in a line -> how many are broken."""
    try:
        samples, seen, broken = open_real(name, split, root), {}, 0
    except (OSError, ValueError) as error:
        print(f"broken: {name}/{split}: {error}")
        return 1
    for sample in tqdm(samples, desc=f"{name}/{split}", unit="sample", disable=None):
        try:
            inspect(sample, seen)
        except BadInput as error:
            broken += 1
            tqdm.write(f"broken: {error}")
    videos, masks = {sample.video for sample in samples}, sum(sample.read_masks is not None for sample in samples)
    frames = sum(found[0] for found in seen.values() if isinstance(found, tuple))
    sounds = sum(seen.get(("sound", video)) is True for video in videos)
    print(f"{name}/{split}: {len(videos)} videos, {len(samples)} expressions ({masks} with masks), {frames} frames, "
          f"{sounds} sounds, {broken} broken")
    return broken


def inspect(sample, seen):
    """Raises BadInput for the first thing that is wrong with a sample. `seen` keeps what was read, or the error, for the
    samples that share it: a video's frames, its sound, and the masks of the same objects."""
    def once(key, read, *arguments):
        if key not in seen:
            try:
                seen[key] = read(*arguments)
            except (OSError, ValueError) as error:
                seen[key] = error
        if isinstance(seen[key], Exception):
            raise BadInput(f"{sample.name}: {str(seen[key]).removeprefix(sample.name + ': ')}")
        return seen[key]

    if sample.fault:
        raise BadInput(f"{sample.name}: {sample.fault}")
    _, seconds = once(("frames", sample.video), _inspect_frames, sample)
    if sample.sound is not None:
        once(("sound", sample.video), _inspect_sound, sample.sound, seconds)
    key = ("masks", sample.video, *sample.extra.get("ids", ()))
    if sample.read_masks is not None and key not in seen:        # errors name the sample: not kept for others
        _fitting_masks(sample)
        for fault in sorted(sample.extra.get("resized", ())):
            raise BadInput(f"{sample.name}: {fault} (is resized)")
        seen[key] = True


def _inspect_frames(sample):
    """(frames, seconds) of a video; of a video file the first and the last frame are read."""
    if not sample.pictures:
        raise BadInput("no frames")
    if not sample.names:
        frames, fps = open_video(sample.pictures[0])
        frames[len(frames) - 1]
        return len(frames), len(frames) / fps
    sizes = {read_picture(path).size: path for path in sample.pictures}
    if len(sizes) != 1:
        raise BadInput(f"frames of several sizes: {', '.join(sizes.values())}")
    if "size" in sample.truth and sample.truth["size"] not in sizes:             # it is square
        raise BadInput(f"not {SIDE} x {SIDE} pixels: {sample.pictures[0]}")
    return len(sample.names), len(sample.names) / sample.extra.get("fps", FPS)


def _inspect_sound(path, seconds):
    return _read_long_sound(path, seconds) is not None


def show(sample, out):
    """Writes sample.png, a sheet of up to 24 frames with the target tinted red, and prompt.txt."""
    clip, _ = load(sample, most_frames=24).sampled()
    w, h = 240, round(240 * clip.size[0] / clip.size[1])
    columns = min(len(clip.frames), 6)
    sheet = Image.new("RGB", (columns * w, math.ceil(len(clip.frames) / columns) * h))
    for t in range(len(clip.frames)):
        pixels = np.array(clip.frames[t])
        if clip.masks is not None:
            target = clip.masks[:, t].any(0)
            pixels[target] = pixels[target] // 2 + np.array([127, 20, 20], np.uint8)
        picture = Image.fromarray(pixels)
        if "box" in clip.truth:
            ImageDraw.Draw(picture).rectangle(clip.truth["box"], outline=(255, 40, 40), width=4)
        sheet.paste(picture.resize((w, h)), (t % columns * w, t // columns * h))
    texts = [part["text"] for message in prompt(clip) for part in message["content"] if part["type"] == "text"]
    os.makedirs(out, exist_ok=True)
    sheet.save(os.path.join(out, "sample.png"))
    with open(os.path.join(out, "prompt.txt"), "w", encoding="utf-8") as file:
        file.write("\n\n".join([sample.name, *texts]) + "\n")


def main(arguments=None):
    parser = Parser(description="check reads a dataset and names what is broken (exit code 1); show writes one "
                                 "sample as a picture and its prompt; mini writes a miniature in its layout.")
    parser.add_argument("action", choices=("check", "show", "mini"))
    parser.add_argument("--bench", required=True, choices=DATASETS)
    add_roots(parser)
    parser.add_argument("--split", help="check: by default all; show: by default the first")
    parser.add_argument("--index", type=at_least(0), default=0, help="show: which sample of the split")
    parser.add_argument("--videos", type=at_least(1), default=4, help="mini: how many in every split")
    parser.add_argument("--out", default="out/data", help="show: folder of the two files; mini: data root to be made")
    a = parser.parse_args(arguments)
    _, splits, folder = DATASETS[a.bench]
    if a.split not in (None, *splits):
        parser.error(f"unknown split of {a.bench}: {a.split} (known: {', '.join(splits)})")
    root = dataset_root(a.bench, a.data_root, roots_given(a))
    try:
        if a.action == "mini":
            from toy.mini import write_mini              # the only thing that makes data, and no training needs it
            write_mini(os.path.join(a.out, folder), a.videos)
        elif a.action == "show":
            samples = open_real(a.bench, a.split or splits[0], root)
            if not 0 <= a.index < len(samples):
                raise BadInput(f"--index {a.index}: there are {len(samples)} samples")
            show(samples[a.index], a.out)
        else:
            sys.exit(int(sum(check(a.bench, split, root) for split in ([a.split] if a.split else splits)) > 0))
    except (OSError, ValueError) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
