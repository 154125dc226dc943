"""What the two systems see and say: clips, the toy world, prompts, media patches, position ids, and the reading of answers.

    Clip -> global_prompt / grounding_prompt -> Processor -> Inputs        (on the way into a Thinker)
    text -> parse_moments / keyframes / parse_boxes                        (on the way out of it)

Letters: T frames, O objects, H W pixels, P prompt tokens, N patches, M images or videos, p side of a patch.
Everything later in the project sees only `Clip`, `Inputs` and parsed answers; where a clip came from stays in here.
"""
import json
import math
import os
import re
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import wavfile
from scipy.signal import resample_poly

FPS = 2.0              # clips are always presented at 2 frames a second (method.md, 1)
SAMPLE_RATE = 16000    # of every soundtrack, Hz


class BadInput(ValueError):
    """What the user gave cannot be used; the message names it. Programs end with it in one line; other errors are bugs."""


@contextmanager
def reading(path):
    """Whatever goes wrong inside is the fault of the file at `path`: BadInput names it. For libraries that trip over malformed
    files in many ways, plain Exception among them."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"cannot use {path} ({one_line(error)})") from error


def one_line(error, most=160):
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or BadInput naming the file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    with reading(path), open(path, encoding="utf-8") as file:
        value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object expected, not a {type(value).__name__}")
    return value


def check_policy_folder(path):
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path} is no directory; get the weights with: "
                                f"hf download Qwen/Qwen2.5-Omni-7B --local-dir {path}")


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


def _messages(text, media):
    return [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": media}]}]


# ---------------------------------------------------------------------------------------------------------------------
# Processor: messages and media -> Inputs
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Inputs:
    """One prompt, ready for a Thinker."""
    ids: torch.Tensor                    # (P,) int64, a media placeholder once per media token
    positions: torch.Tensor              # (3, P) int64: time, height, width (TMRoPE)
    patches: torch.Tensor | None = None  # (N, 3 * 2 * p * p) float32, images and videos in order of appearance
    grid: torch.Tensor | None = None     # (M, 3) int64: patches in time, height, width
    mel: torch.Tensor | None = None      # (bins, mel frames) float32
    scale: tuple = (1.0, 1.0)            # source pixels per pixel of the resized picture, (x, y)


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
        return self._inputs(messages, pixels, self.pair / fps, None if sound is None else self._mel(sound))

    def image_inputs(self, messages, image):
        """Inputs of a prompt with one PIL picture; `scale` maps boxes back to its own pixels."""
        height, width = self._resized(image.size, self.image_tokens)
        inputs = self._inputs(messages, _resize(image, height, width)[None], 1.0, None)
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

    def _inputs(self, messages, pixels, seconds, mel):
        """Inputs of text, one image or video, text; `seconds` is the time that a temporal patch lasts."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, kind, after = re.split(r"<\|vision_bos\|><\|(IMAGE|VIDEO)\|><\|vision_eos\|>", text)
        patches, grid = self._patches(pixels)
        media, where, end = self._media(grid[0], getattr(self, kind.lower()), seconds, mel)
        with_sound = mel is not None
        opening = [self.marks["vision_bos"]] + [self.marks["audio_bos"]] * with_sound       # these two share a position
        closing = [self.marks["audio_eos"]] * with_sound + [self.marks["vision_eos"]]
        head, tail = self._text(before), self._text(after)
        start, stop = len(head), len(head) + 1 + end
        ids = torch.cat([head, torch.tensor(opening), media, torch.tensor(closing), tail])
        line = torch.cat([torch.arange(start), torch.full((len(opening),), start)])
        rest = torch.cat([torch.full((len(closing),), stop), stop + 1 + torch.arange(len(tail))])
        positions = torch.cat([line.expand(3, -1), where + start + 1, rest.expand(3, -1)], dim=1)
        return Inputs(ids, positions, patches, grid, mel)

    def _text(self, text):
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    def _media(self, grid, placeholder, seconds, mel):
        """Placeholder ids (M,), their positions (3, M) counted from 0, and the position that follows. Video and sound take
        turns, a chunk of `self.chunk` positions each; the text goes on after the last chunk (as in transformers)."""
        t, h, w = grid.tolist()
        time = (torch.arange(t) * seconds * self.per_second).long()
        axes = torch.meshgrid(time, torch.arange(h // self.merge), torch.arange(w // self.merge), indexing="ij")
        where = torch.stack(axes).flatten(1)                                                # (3, t * h/m * w/m)
        ids = torch.full((where.shape[1],), placeholder)
        turn = where[0] // self.chunk * 2
        if mel is not None:
            count = ((mel.shape[1] - 1) // 2 - 1) // 2 + 1                                  # the audio tower halves twice
            heard = torch.arange(count)
            ids = torch.cat([ids, torch.full((count,), self.audio)])
            where = torch.cat([where, heard.expand(3, -1)], dim=1)
            turn = torch.cat([turn, heard // self.chunk * 2 + 1])
        order = turn.argsort(stable=True)
        return ids[order], where[:, order], int(where[:, turn == turn.max()].max()) + 1

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
# Datasets
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
        """The clips' names, without making the clips."""
        return [f"{self.split}/{index}" for index in range(self.length)]


def open_data(name, split, length=100_000):
    """The dataset of that name. Raises BadInput for an unknown name or split."""
    if name != "toy":
        raise BadInput(f"unknown dataset: {name} (known: toy)")
    if split not in TOY_SPLITS:
        raise BadInput(f"unknown toy split: {split} (known: {', '.join(TOY_SPLITS)})")
    return ToyData(split, length)


def sample_order(length, seed, epoch):
    """The order in which an epoch visits a dataset; the same on every process."""
    return np.random.default_rng([seed, epoch]).permutation(length)
