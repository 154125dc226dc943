"""What the two systems see, what they are asked, and how their answers are read.

    Clip -> prompt_inputs -> Inputs -> System 1 -> text -> frames_to_ground -> {frame: description}
    (picture, description) -> grounding_prompt -> Inputs -> System 2 -> text -> parse_boxes -> boxes

`benchmarks/` says where clips come from. A task is one kind of question to System 1, or to System 2. Its
prompt stands here, beside the reading of its answer; its reward stands in rewards.py.

Letters: T frames, O objects, H W pixels, P prompt tokens, N patches, M images or videos, p side of a patch in
pixels.
"""
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

if __name__ == "__main__":
    # `python data.py check | show | mini` is a program of benchmarks/, as this file knows no dataset.
    import runpy
    runpy.run_module("benchmarks.check", run_name="__main__")
    sys.exit()

import numpy as np
import torch
import torch.nn.functional as F

from trust.errors import BadInput, reading
from trust.files import read_json
from trust.options import MOST_FRAMES
from trust.plugged import inside_picture
from trust.policy import (
    check_fit,
    check_prompts,
    check_template,
    find_template,
    kept_files,
    positions_of_time,
    read_policy_config,
    read_preprocessing,
)

FPS = 2.0              # frames a second at which System 1 is shown every clip (paper, section 3.1)
SAMPLE_RATE = 16000    # of every soundtrack, Hz
KEYFRAMES = 4          # most keyframes of an answer, and how many the reward prefers (the paper's K_0)
LONGEST_QUERY = 8000   # characters; queries for masks have under 500, questions with a text a few thousand

# x1, y1, x2, y2 in pixels, corners inside the box.
Box = tuple[float, float, float, float]


# ---- clips -----------------------------------------------------------------------------------------
class Frames:
    """The pictures of a video: `frames[t]` reads frame t, an RGB PIL image at source size."""

    def __init__(self, read, indices):
        self.read = read
        self.indices = list(indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, t):
        return self.read(self.indices[t])

    def pick(self, indices) -> "Frames":
        """A view on some of the frames; nothing is read."""
        return Frames(self.read, [self.indices[t] for t in indices])


@dataclass
class Clip:
    """One sample. Frame t is shown at t / fps seconds."""
    name: str
    frames: Frames                     # T pictures of H x W
    query: str
    fps: float = FPS
    sound: np.ndarray | None = None    # mono float32 in [-1, 1] at 16 kHz
    masks: np.ndarray | None = None    # bool [O, T, H, W], visible parts of the target; None where unknown
    kind: str = ""                     # kind of query, for the tables
    task: str = "vos"                  # a name in TASKS
    # "image": box and points in source pixels; "qa": type, options, solution, perhaps task. In all: "show" in
    # place of the task's way.
    truth: dict = field(default_factory=dict)
    fault: str = ""                    # why the clip could not be read; this one is blank then
    size: tuple = field(init=False)    # (H, W) of the source

    def __post_init__(self):
        if self.masks is None:
            width, height = self.frames[0].size
            self.size = (height, width)
        else:
            self.size = self.masks.shape[2:]

    def sampled(self, most=MOST_FRAMES) -> tuple["Clip", list[int]]:
        """(clip, indices): at most `most` evenly spaced frames at 2 fps, and which source frames they are.

        The sound stays whole.
        """
        indices = spread(len(self.frames), most)
        if len(indices) == len(self.frames):
            return replace(self, fps=FPS), indices
        masks = None if self.masks is None else self.masks[:, indices]
        return replace(self, frames=self.frames.pick(indices), masks=masks, fps=FPS), indices


def spread(T: int, most: int) -> list[int]:
    """Indices of at most `most` evenly spaced frames among T, the first and the last included."""
    if T <= most:
        return list(range(T))
    return np.linspace(0, T - 1, most).round().astype(int).tolist()


# ---- reading what a model wrote --------------------------------------------------------------------
# Nothing here raises for any text, and everything is linear in its length. A policy in training writes
# anything: one bad completion costs its reward, not the run.

NULL = "null"      # the whole answer, in every task, that says there is no such object
FARTHEST = 1e6     # pixels; no image is larger


def answer_text(text: str) -> str:
    """What stands between the first `<answer>` and the next `</answer>`, stripped; "" without both."""
    _, _, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if closed else ""


def is_null(answer: str) -> bool:
    """Whether the answer says that there is no such object."""
    return answer.strip() == NULL


def blocks(answer: str) -> list[str]:
    """The `{…}` blocks in order: each runs from a `{` to the next `}`, so none holds another."""
    # What follows the last `}` is closed by nothing.
    pieces = answer.split("}")[:-1]
    return [piece[piece.index("{"):] + "}" for piece in pieces if "{" in piece]


def parse_json(text: str):
    """The JSON value of `text`, or None where it is ill-formed, too deep, or holds too long an integer."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_numbers(value, count: int) -> tuple[float, ...] | None:
    """A JSON list of exactly `count` pixel coordinates as floats, else None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    for number in value:
        # bool is no number here, and NaN fails the comparison.
        if type(number) not in (int, float) or not abs(number) <= FARTHEST:
            return None
    return tuple(float(number) for number in value)


def parse_box(value) -> Box | None:
    """A JSON list [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2 as floats, else None."""
    box = parse_numbers(value, 4)
    return box if box and box[0] <= box[2] and box[1] <= box[3] else None


# ---- prompts: what all tasks share -----------------------------------------------------------------
# The query stands before the media. After them, a small model hardly learns to use it.

SYSTEM = "You watch videos, listen to their sound, and point out what you are asked for."


def plain(text: str) -> str:
    """User or model text without special tokens of the chat format."""
    return encodable(text.replace("<|", "< |"))


def encodable(text: str) -> str:
    """The text with "?" for half of a surrogate pair, which no tokenizer accepts.

    Such halves come from JSON ("\\ud83d") or from an undecodable byte of the command line.
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def check_text(text, what: str) -> str:
    """The text of a user or a dataset, unchanged. Raises BadInput where it is empty or too long.

    The time of a prompt grows with the square of its length.
    """
    if not isinstance(text, str):
        raise BadInput(f"{what} is a {type(text).__name__}")
    if not any(character.isprintable() and character != " " for character in text):
        raise BadInput(f"{what} is empty")
    if len(text) > LONGEST_QUERY:
        raise BadInput(f"{what} has {len(text)} characters, more than {LONGEST_QUERY}")
    return text


def format_time(seconds: float) -> str:
    """A time as "mm:ss.ff"."""
    # Rounded before it is divided: there is no "00:60.00".
    minutes, hundredths = divmod(round(seconds * 100), 6000)
    return f"{minutes:02d}:{hundredths / 100:05.2f}"


def messages(text: str, *media: str) -> list[dict]:
    """Chat messages: the sentence SYSTEM, then the text and its media ("image", "video" or "audio")."""
    system = [{"type": "text", "text": SYSTEM}]
    user = [{"type": "text", "text": text}]
    user += [{"type": kind} for kind in media]
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


# ---- task "vos": keyframes of a video --------------------------------------------------------------
KEYFRAME_TASK = (
    "Task: find this in the video: {query}\n",
    "The video shows 2 frames per second, from 00:00.00 to {end}, with its sound if it has any. ",
    "First reason between <think> and </think>: which object is meant, what does it look like, and when is "
    f"it in plain view? Then choose 1 to {KEYFRAMES} short moments at which it is large and unobstructed, "
    "and write them between <answer> and </answer> as a JSON list with one entry per moment. Times are "
    "minutes:seconds.hundredths. Each description must single the object out in that one picture by its "
    "looks and place alone, without sound, motion or other moments. If no such object is ever to be seen, "
    "the answer is null.\n",
    'Form: <think>...</think><answer>[{{"start_time": "{first}", "end_time": "{second}", '
    '"description": "..."}}]</answer>\n',
)
# The number of digits is bounded, against overflow and slow parsing.
TIME = re.compile(r"([0-9]{1,6}):([0-9]{1,6}\.[0-9]{1,6})")


def keyframe_prompt(clip: Clip, rng=None) -> list[dict]:
    """Messages that show System 1 a whole clip.

    rng: a numpy Generator that draws the times of the example, so that copying them does not pay. Without it
    they are those of the first frame.
    """
    T = len(clip.frames)
    examples = [0, 0] if rng is None else sorted(rng.integers(0, T, 2))
    first, second = (format_time(t / clip.fps) for t in examples)
    text = "".join(KEYFRAME_TASK)
    text = text.format(query=plain(clip.query), end=format_time(T / clip.fps), first=first, second=second)
    return messages(text, "video")


@dataclass
class Moment:
    """One `{…}` block of an answer: when the target is there, and what it looks like then."""
    start: float | None   # seconds; None where no time can be read
    end: float | None     # seconds
    description: str      # "" where there is none
    parsed: bool          # both times and the description can be read
    frames: list[int]     # frames in the interval; empty unless parsed and start <= end <= duration


def parse_time(value) -> float | None:
    """Seconds from a string that begins with `minutes:seconds.fraction`, as "01:02.50" -> 62.5; else None."""
    match = TIME.match(value) if isinstance(value, str) else None
    return 60.0 * float(match[1]) + float(match[2]) if match else None


def parse_moments(text: str, frames: int, fps: float) -> list[Moment]:
    """One Moment per block of the completion's answer, for a clip of `frames` frames at `fps` per second."""
    return [parse_moment(block, frames, fps) for block in blocks(answer_text(text))]


def parse_moment(block: str, frames: int, fps: float) -> Moment:
    fields = parse_json(block) or {}
    start = parse_time(fields.get("start_time"))
    end = parse_time(fields.get("end_time"))
    description = parse_description(fields.get("description"))
    parsed = start is not None and end is not None and description != ""
    inside = []
    if parsed and start <= end <= frames / fps:
        first = min(int(start * fps), frames - 1)
        last = min(int(end * fps), frames - 1)
        inside = list(range(first, last + 1))
    return Moment(start, end, description, parsed, inside)


def parse_description(value) -> str:
    """The stripped text of a description; "" for what describes nothing."""
    if not isinstance(value, str):
        return ""
    description = encodable(value).strip()
    # Blank, invisible, or the dots of the prompt's example.
    if not any(map(str.isalnum, description)):
        return ""
    return description


def keyframes(moments: list[Moment], most: int = KEYFRAMES) -> dict[int, str]:
    """{frame: description} of the first `most` distinct frames. The first block with a frame describes it."""
    described: dict[int, str] = {}
    for moment in moments:
        for frame in moment.frames:
            described.setdefault(frame, moment.description)
    return {frame: described[frame] for frame in sorted(described)[:most]}


def show_video(processor: "Processor", clip: Clip, prompt: list[dict]) -> "Inputs":
    return processor.video_inputs(prompt, clip.frames, clip.fps, clip.sound)


def ground_keyframes(clip: Clip, text: str) -> dict[int, str]:
    return keyframes(parse_moments(text, len(clip.frames), clip.fps))


# ---- task "avs": the first frame and the sound -----------------------------------------------------
FIRST_FRAME_TASK = (
    "Task: find this in the video: {query}\n",
    "You are shown the first frame of the video and hear its sound. Reason between <think> and </think> "
    "about which object is meant. Then describe it between <answer> and </answer> by its looks and place in "
    "that frame alone, so that somebody who hears nothing finds it. If there is no such object, the answer "
    "is null.\n",
    "Form: <think>...</think><answer>...</answer>\n",
)


def picture_media(clip):
    """What is shown and heard of a clip's first frame and sound."""
    return ["image"] if clip.sound is None else ["image", "audio"]


def first_frame_prompt(clip: Clip, rng=None) -> list[dict]:
    """Messages that show System 1 the first frame of a clip and let it hear the sound."""
    return messages("".join(FIRST_FRAME_TASK).format(query=plain(clip.query)), *picture_media(clip))


def show_first_frame(processor: "Processor", clip: Clip, prompt: list[dict]) -> "Inputs":
    return processor.image_inputs(prompt, clip.frames[0], clip.sound)


def ground_first_frame(clip: Clip, text: str) -> dict[int, str]:
    answer = answer_text(text)
    return {0: answer} if answer and not is_null(answer) else {}


# ---- task "image": a box and two points in a picture -----------------------------------------------
PICTURE_TASK = (
    "Task: find in this picture: {query}\n",
    "First reason between <think> and </think>. Then write between <answer> and </answer> the box around the "
    "object and two points well inside it, far from each other, all in pixels of the picture.\n",
    'Form: <think>...</think><answer>{{"bbox_2d": [x1, y1, x2, y2], "points_1": [x, y], '
    '"points_2": [x, y]}}</answer>\n',
)


def picture_prompt(clip: Clip, rng=None) -> list[dict]:
    """Messages that show System 1 one picture and ask for a box and two points."""
    return messages("".join(PICTURE_TASK).format(query=plain(clip.query)), "image")


def show_picture(processor: "Processor", clip: Clip, prompt: list[dict]) -> "Inputs":
    return processor.image_inputs(prompt, clip.frames[0])


def ground_nothing(clip: Clip, text: str) -> dict[int, str]:
    return {}


def picture_box(clip: Clip, text: str) -> list[Box]:
    return parse_boxes(answer_text(text), most=1)


# ---- task "qa": a question about a picture or a video ----------------------------------------------
QUESTION_TASK = (
    "Question: {query}\n{options}",
    "First reason between <think> and </think>. Then write between <answer> and </answer> {form}.\n",
    "Form: <think>...</think><answer>...</answer>\n",
)
QUESTION_FORMS = {
    "multiple choice": "nothing but the letter of the right option",
    "numerical": "nothing but the number",
    "regression": "nothing but the number",
    "OCR": "the text as it is written there",
    "free-form": "the answer",
}


def question_prompt(clip: Clip, rng=None) -> list[dict]:
    """Messages that ask a question about a picture or a video, with its sound.

    truth may hold "task", which takes the place of QUESTION_TASK.
    """
    options = "".join(plain(option) + "\n" for option in clip.truth["options"])
    text = "".join(clip.truth.get("task", QUESTION_TASK))
    text = text.format(query=plain(clip.query), options=options, form=QUESTION_FORMS[clip.truth["type"]])
    media = picture_media(clip) if len(clip.frames) == 1 else ["video"]
    return messages(text, *media)


def show_question(processor: "Processor", clip: Clip, prompt: list[dict]) -> "Inputs":
    show = show_first_frame if len(clip.frames) == 1 else show_video
    return show(processor, clip, prompt)


# ---- task "grounding": System 2, boxes in one picture ----------------------------------------------
GROUNDING_TASK = (
    "Task: find in this picture: {query}\n",
    'Answer with a JSON list that holds {{"bbox_2d": [x1, y1, x2, y2]}} for every such object, in pixels of '
    "the picture, or with null if there is none.\n",
)
BOX = re.compile(r'"bbox_2d"\s*:\s*(\[[^\[\]]*\])')


def grounding_prompt(description: str) -> list[dict]:
    """Messages that show System 2 one picture and ask for the boxes of what is described.

    A description is cut at LONGEST_QUERY characters: a completion may be one long description.
    """
    description = plain(description[:LONGEST_QUERY])
    return messages("".join(GROUNDING_TASK).format(query=description), "image")


def parse_boxes(text: str, most: int = 16) -> list[Box]:
    """The first `most` well-formed `"bbox_2d": [x1, y1, x2, y2]` anywhere in System 2's answer.

    Pixels of the image it was shown. Ill-formed boxes are dropped. The bound keeps a degenerate answer that
    repeats one box for ever from filling SAM2's memory.
    """
    boxes = []
    for match in BOX.finditer(text):
        box = parse_box(parse_json(match[1]))
        if box:
            boxes.append(box)
    return boxes[:most]


def to_source(box: Box, scale: tuple, size: tuple) -> Box:
    """A box in pixels of a resized picture -> source pixels, inside the (H, W) picture.

    scale: source pixels per pixel of the resized picture, (x, y).
    """
    height, width = size
    source = [value * s for value, s in zip(box, scale * 2)]
    return inside_picture(source, (width, height))


def request_prompt(clip: Clip, rng=None) -> list[dict]:
    """Messages that show the policy what System 2 would be shown. The clip is one picture, described."""
    return grounding_prompt(clip.query)


# ---- the tasks -------------------------------------------------------------------------------------
def no_boxes(clip: Clip, text: str) -> list[Box]:
    return []


@dataclass(frozen=True)
class Task:
    """One kind of question to the policy. A new one is an entry of TASKS and a branch of `reward_terms`."""
    prompt: Callable                  # (clip, rng) -> messages
    show: Callable                    # (processor, clip, messages) -> Inputs: what is seen and heard
    to_ground: Callable               # (clip, text) -> {frame: description} that System 2 has to find
    own_boxes: Callable = no_boxes    # (clip, text) -> boxes that System 1 draws, in its picture's pixels
    tracked: bool = False             # whether the reward looks at SAM2's masks


TASKS = {
    "vos": Task(keyframe_prompt, show_video, ground_keyframes, tracked=True),
    "avs": Task(first_frame_prompt, show_first_frame, ground_first_frame),
    "image": Task(picture_prompt, show_picture, ground_nothing, own_boxes=picture_box),
    "qa": Task(question_prompt, show_question, ground_nothing),
    "grounding": Task(request_prompt, show_picture, ground_nothing),
}


def prompt(clip: Clip, rng=None) -> list[dict]:
    """Messages of System 1's prompt for a clip's task; `rng` as in keyframe_prompt."""
    return TASKS[clip.task].prompt(clip, rng)


def prompt_inputs(processor: "Processor", clip: Clip, rng=None) -> "Inputs":
    """Inputs of System 1's prompt for a clip's task."""
    show = clip.truth.get("show", TASKS[clip.task].show)
    return show(processor, clip, prompt(clip, rng))


def frames_to_ground(clip: Clip, text: str) -> dict[int, str]:
    """{frame: description} of one completion: what System 2 has to find."""
    return TASKS[clip.task].to_ground(clip, text)


def own_boxes(clip: Clip, text: str) -> list[Box]:
    """Boxes that System 1 draws itself on frame 0, in pixels of the resized picture it sees."""
    return TASKS[clip.task].own_boxes(clip, text)


# ---- Processor: messages and media -> Inputs -------------------------------------------------------
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
# Of the prompts of all tasks.
MEDIA_OF_PROMPTS = (("video",), ("image",), ("image", "audio"))


class Processor:
    """Turns messages and media into Inputs, by the tokenizer and preprocessing values of a directory.

    Tests prove that the result is that of transformers' Qwen2_5OmniProcessor and get_rope_index on the same
    media. But frames are resized to a number of visual tokens, not to between two numbers of pixels. A sound
    too short for one sound token (three frames of its spectrogram) counts as no sound.
    """

    def __init__(self, path, video_tokens: int = 0, image_tokens: int = 0):
        """video_tokens: visual tokens of a frame of a video. image_tokens: of a picture.

        0 means what the directory's preprocessor_config.json says, else 128 and 900 (paper, section 3.1).
        Raises FileNotFoundError or BadInput, naming what is missing or malformed.
        """
        _, thinker = read_policy_config(path)
        self.path = path
        self.budgets = {}
        if video_tokens:
            self.budgets["video_tokens"] = video_tokens
        if image_tokens:
            self.budgets["image_tokens"] = image_tokens
        self.read_preprocessing(os.path.join(path, "preprocessor_config.json"))
        self.read_config(os.path.join(path, "config.json"), thinker)
        self.read_tokenizer(os.path.join(path, "tokenizer.json"))
        check_fit(self)
        self.check_tokenizer()

    def read_preprocessing(self, file):
        from transformers import WhisperFeatureExtractor
        values = read_preprocessing(file, SAMPLE_RATE) | self.budgets
        self.patch = values["patch_size"]
        self.merge = values["merge_size"]
        self.pair = values["temporal_patch_size"]
        self.mean = torch.tensor(values["image_mean"])
        self.std = torch.tensor(values["image_std"])
        self.video_tokens = values.get("video_tokens", 128)
        self.image_tokens = values.get("image_tokens", 900)
        with reading(file):
            self.features = WhisperFeatureExtractor.from_dict(values)
            # Some values are used only now.
            self.spectrogram(np.zeros(SAMPLE_RATE, np.float32))

    def read_config(self, file, thinker):
        from transformers import AutoConfig
        with reading(file):
            # The tokenizer reads it too, but its errors would name another file.
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        self.config = getattr(config, "thinker_config", config)
        # Position ids of a second of video or sound, and of a turn when the two take turns.
        self.per_second, self.chunk = positions_of_time(thinker, file)

    def read_tokenizer(self, file):
        from transformers import AutoTokenizer
        self.template = find_template(self.path)
        with reading(file):
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False)
        if self.tokenizer.chat_template is None:
            # Older checkpoints keep it in a file of its own.
            self.tokenizer.chat_template = read_json(self.template).get("chat_template")
        check_template(self.tokenizer.chat_template, self.template)
        token = self.tokenizer.convert_tokens_to_ids
        self.image = token("<|IMAGE|>")
        self.video = token("<|VIDEO|>")
        self.audio = token("<|AUDIO|>")
        brackets = ("vision_bos", "vision_eos", "audio_bos", "audio_eos")
        self.marks = {name: token(f"<|{name}|>") for name in brackets}
        if None in (self.image, self.video, self.audio, *self.marks.values()):
            raise BadInput(f"cannot use {file} (it lacks the special tokens of Qwen2.5-Omni)")
        self.eos_ids = {self.tokenizer.eos_token_id, token("<|im_end|>"), token("<|endoftext|>")} - {None}

    def check_tokenizer(self):
        """Tries the prompts. Warns where they have too many tokens.

        The toy's tokenizer has one token for each sentence.
        """
        text = "".join(KEYFRAME_TASK)
        chats = [messages(text, *media) for media in MEDIA_OF_PROMPTS]
        tokens = check_prompts(self, chats, MEDIA, text)
        if tokens > len(text) / 3:
            print(f"warning: the tokenizer of {self.path} cuts the prompt's {len(text)} letters into "
                  f"{tokens} tokens; it was made for other sentences than those of data.py", file=sys.stderr)

    def render(self, messages) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def video_inputs(self, messages, frames, fps=FPS, sound=None) -> Inputs:
        """Inputs of a prompt with one video of T frames and, where there is one, its sound interleaved."""
        height, width = self.resized(frames[0].size, self.video_tokens)
        pixels = torch.stack([resize(frames[t], height, width) for t in range(len(frames))])    # [T, 3, h, w]
        patches, grid = self.to_patches(pixels)
        mel = self.spectrogram(sound)
        return self.assemble(messages, [self.video_part(grid, fps, mel)], patches, grid, mel)

    def image_inputs(self, messages, image, sound=None, like: Inputs | None = None) -> Inputs:
        """Inputs of a prompt with one PIL picture and perhaps a sound. `scale` maps boxes to source pixels.

        like: Inputs of the same picture. The new ones share its patches, and the vision tower sees them once.
        """
        height, width = self.resized(image.size, self.image_tokens)
        if like is None:
            patches, grid = self.to_patches(resize(image, height, width)[None])
        else:
            patches = like.patches
            grid = like.grid
        mel = self.spectrogram(sound)
        parts = [
            self.bracket(["vision"], *self.place_vision(grid, self.image, 1.0)),
            self.bracket(["audio"], *self.place_sound(mel)),
        ]
        inputs = self.assemble(messages, parts, patches, grid, mel)
        inputs.scale = (image.size[0] / width, image.size[1] / height)
        return inputs

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_text(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    def resized(self, size, tokens) -> tuple[int, int]:
        """(height, width) in pixels for a picture of `size` (width, height): at most `tokens` visual tokens.

        Both are multiples of a token's side, and the aspect ratio is kept as well as that allows. No picture
        is enlarged beyond the nearest multiple.
        """
        side = self.patch * self.merge
        width, height = size
        shrink = min(1.0, math.sqrt(tokens * side * side / (width * height)))
        rows = max(1, round(height * shrink / side))
        columns = max(1, round(width * shrink / side))
        while rows * columns > tokens:
            if rows >= columns:
                rows -= 1
            else:
                columns -= 1
        return rows * side, columns * side

    def to_patches(self, pixels):
        """uint8 [T, 3, h, w] -> patches (N, 3 * n * p * p) in the vision tower's order, their grid (1, 3).

        n: frames of a patch. m: patches along a side of a visual token.
        """
        p = self.patch
        m = self.merge
        n = self.pair
        pixels = (pixels.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        # The last frame is repeated until the last pair is full.
        pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % n, -1, -1, -1)])
        t = len(pixels) // n
        h = pixels.shape[2] // p
        w = pixels.shape[3] // p
        x = pixels.view(t, n, 3, h // m, m, p, w // m, m, p)
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)    # t, h/m, w/m, m, m, 3, n, p, p
        return x.reshape(t * h * w, 3 * n * p * p), torch.tensor([[t, h, w]])

    def spectrogram(self, sound):
        """Log-mel spectrogram (bins, mel frames) of a 16 kHz sound, or None if too short for a sound token.

        One window of silence is added at the end, up to whole hops. transformers adds minutes of it there. As
        in transformers, nothing is heard after `features.n_samples` (300 s for Qwen2.5-Omni).
        """
        if sound is None:
            return None
        longest = min(len(sound) + self.features.n_fft, self.features.n_samples)
        out = self.features(sound, sampling_rate=SAMPLE_RATE, padding="max_length", max_length=longest,
                            pad_to_multiple_of=self.features.hop_length, return_attention_mask=True,
                            return_tensors="pt")
        mel = out["input_features"][0][:, out["attention_mask"][0].bool()]
        return mel if sound_tokens(mel) else None

    def assemble(self, messages, parts, patches, grid, mel) -> Inputs:
        """Inputs of text and media.

        parts: (ids, positions, end) of each medium between its marks, in the order of their places
        patches, grid, mel: of all media, in the same order
        """
        # Text at even places, the name of a medium at odd ones.
        pieces = MEDIA.split(self.render(messages))
        ids = []
        positions = []
        start = 0
        for place, piece in enumerate(pieces):
            new, where, end = parts[place // 2] if place % 2 else self.place_text(piece)
            ids.append(new)
            positions.append(where + start)
            start += end
        return Inputs(torch.cat(ids), torch.cat(positions, dim=1), patches, grid, mel)

    # Each of these returns the ids of its tokens, their positions (3, tokens) counted from 0, and the
    # position after them.

    def place_text(self, text):
        ids = self.encode_text(text)
        return ids, torch.arange(len(ids)).expand(3, -1), len(ids)

    def video_part(self, grid, fps, mel):
        """A video between its marks, and its sound interleaved where there is one."""
        seconds = self.pair / fps
        if mel is None:
            return self.bracket(["vision"], *self.place_vision(grid, self.video, seconds))
        return self.bracket(["vision", "audio"], *self.interleave(grid, seconds, mel))

    def place_vision(self, grid, placeholder, seconds):
        t, h, w = grid[0].tolist()
        time = (torch.arange(t) * seconds * self.per_second).long()
        rows = torch.arange(h // self.merge)
        columns = torch.arange(w // self.merge)
        axes = torch.meshgrid(time, rows, columns, indexing="ij")
        where = torch.stack(axes).flatten(1)    # (3, t * h/m * w/m)
        return torch.full((where.shape[1],), placeholder), where, int(where.max()) + 1

    def place_sound(self, mel):
        count = sound_tokens(mel)
        return torch.full((count,), self.audio), torch.arange(count).expand(3, -1), count

    def interleave(self, grid, seconds, mel):
        """Video and sound take turns, a chunk of `self.chunk` positions each.

        The text continues after the last chunk, as in transformers.
        """
        video_ids, video_where, _ = self.place_vision(grid, self.video, seconds)
        sound_ids, sound_where, _ = self.place_sound(mel)
        ids = torch.cat([video_ids, sound_ids])
        where = torch.cat([video_where, sound_where], dim=1)
        turn = where[0] // self.chunk * 2 + (ids == self.audio)
        order = turn.argsort(stable=True)
        return ids[order], where[:, order], int(where[:, turn == turn.max()].max()) + 1

    def bracket(self, kinds, ids, where, end):
        """Media between their marks. The marks of a video and its sound share a position."""
        opening = torch.tensor([self.marks[f"{kind}_bos"] for kind in kinds])
        closing = torch.tensor([self.marks[f"{kind}_eos"] for kind in reversed(kinds)])
        first = torch.full((3, len(kinds)), 0)
        last = torch.full((3, len(kinds)), end + 1)
        return torch.cat([opening, ids, closing]), torch.cat([first, where + 1, last], dim=1), end + 2

    def save(self, path) -> None:
        """Copies the directory's small files, but no weights: tokenizer, template, preprocessing.

        Numbers of visual tokens that were given are written to preprocessor_config.json: they stay with the
        policy.
        """
        os.makedirs(path, exist_ok=True)
        for name in kept_files(self.path):
            shutil.copyfile(os.path.join(self.path, name), os.path.join(path, name))
        if self.budgets:
            file = os.path.join(path, "preprocessor_config.json")
            values = read_json(file) | self.budgets
            with open(file, "w", encoding="utf-8") as target:
                json.dump(values, target, indent=1)


def sound_tokens(mel: torch.Tensor | None) -> int:
    """Sound tokens of a spectrogram (bins, mel frames): the audio tower halves the frames twice."""
    return 0 if mel is None else (mel.shape[1] + 1) // 4


def resize(image, height, width):
    """uint8 [3, height, width] of a PIL picture, bicubic with antialiasing as in transformers."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
