"""What a page shows of one clip: a record for a line of JSON, and small pictures beside it.

    clip, answers -- draw_case --> record, {name: bytes}

A clip's frames are one picture, a strip from top to bottom. Each answer's masks are another one of the same
size, transparent where there is none. So a page shows frame t of both by moving them, and nothing is stored
twice: a picture's name is the hash of its bytes.

Letters: O objects, T frames, H W pixels of the source, n shown frames of h w pixels.
"""
import hashlib
import io
import wave
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy.signal import resample_poly

from benchmarks.pictures import overlay
from data import SAMPLE_RATE, TASKS, Clip, format_time, prompt, spread
from rewards import mask_box, region_similarity

# Frames of a clip that are shown: evenly spaced ones, and all keyframes.
MOST_FRAMES = 40
# Keyframes of an answer that are shown. Answers of others may name any number.
MOST_KEYFRAMES = 8
# Pixels of a frame's longer side, and qualities of WebP. The first pair whose strip fits is taken.
SIDES = (320, 320, 256, 192, 144, 96)
QUALITIES = (80, 60, 55, 50, 40, 30)
LARGEST_STRIP = 200_000    # bytes
LONGEST_STRIP = 16_383     # pixels, of WebP
# Sound is kept as speech on a telephone is: 8 bits, 8 kHz, so many seconds.
SOUND_RATE = 8000
LONGEST_SOUND = 10

# Colours of masks: index 1 and 2 of the strips, as (red, green, blue, alpha).
PREDICTED = ((255, 122, 24, 115), (255, 122, 24, 255))
TRUE = ((255, 255, 255, 235), (20, 20, 20, 150))


@dataclass
class Shown:
    """One answer to a clip. Frames are those of the clip."""
    text: str                       # System 1's completion
    keyframes: dict                 # {frame: description}
    boxes: dict                     # {frame: [box in source pixels]}
    masks: dict | None = None       # {frame: bool [H, W]}; None where there are none
    facts: dict = field(default_factory=dict)    # further values for the record: reward, terms, ...


# ---- a clip with its answers -----------------------------------------------------------------------
def draw_case(clip: Clip, answers: list[Shown], true: dict | None = None) -> tuple[dict, dict]:
    """(record, {name: bytes of a picture or a sound}) of a clip and its answers.

    true: {frame: bool [O, H, W]}; by default clip.masks, if its task looks at masks.
    """
    T = len(clip.frames)
    if true is None and clip.masks is not None:
        true = {t: clip.masks[:, t] for t in range(T)}
    true = true or {}
    times = shown_times(T, answers)
    files = {}
    pictures = [clip.frames[t] for t in times]
    strip, size = draw_strip(pictures)
    record = dict(
        clip=clip.name,
        query=clip.query,
        kind=clip.kind,
        task=clip.task,
        prompt=prompt_text(clip),
        fps=clip.fps,
        frames=T,
        size=list(clip.size),
        times=times,
        strip=kept(files, strip, "webp"),
        visible=[visible_area(true[t]) if t in true else None for t in times],
        truth=None,
        sound=None,
    )
    if any(mask.any() for mask in true.values()):
        unions = [true[t].any(0) if t in true else None for t in times]
        record["truth"] = kept(files, draw_truth(unions, size), "png")
    if clip.sound is not None:
        record["sound"] = kept(files, wav(clip.sound), "wav")
    if "solution" in clip.truth:
        record["question"] = {name: clip.truth[name] for name in ("type", "options", "solution")}
    record["answers"] = [draw_answer(clip, answer, true, times, size, files) for answer in answers]
    return record, files


def shown_times(T: int, answers: list[Shown]) -> list[int]:
    """The frames that are shown, in order."""
    times = set(spread(T, MOST_FRAMES))
    for answer in answers:
        times.update(answer_frames(answer, T))
    return sorted(times)


def answer_frames(answer: Shown, T: int) -> list[int]:
    """The first frames that an answer names, as keyframes or by boxes."""
    named = sorted({*answer.keyframes, *answer.boxes})
    return [t for t in named if 0 <= t < T][:MOST_KEYFRAMES]


def prompt_text(clip: Clip) -> str:
    """The texts of System 1's prompt, without the example's random times."""
    texts = []
    for message in prompt(clip):
        for part in message["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
    return "\n".join(texts)


def draw_answer(clip, answer, true, times, size, files) -> dict:
    """The record of one answer. Its masks are added to `files`."""
    keyframes = []
    for t in answer_frames(answer, len(clip.frames)):
        keyframes.append(dict(
            frame=t,
            time=format_time(t / clip.fps),
            description=answer.keyframes.get(t, ""),
            boxes=[[round(float(value), 1) for value in box] for box in answer.boxes.get(t, ())],
            true=true_boxes(clip, true.get(t))))
    record = dict(text=answer.text, keyframes=keyframes, J=None, masks=None) | answer.facts
    if answer.masks is not None:
        record["J"] = [frame_J(answer.masks.get(t), true.get(t)) for t in times]
        shown = [answer.masks.get(t) for t in times]
        record["masks"] = kept(files, draw_predicted(shown, size), "png")
    return record


def visible_area(masks) -> float:
    """Share of the picture that the target, bool [O, H, W], takes."""
    return round(float(masks.any(0).mean()), 5)


def true_boxes(clip, masks) -> list:
    """The true boxes on a frame with these masks, bool [O, H, W] or None."""
    if clip.task == "image" and "box" in clip.truth:
        return [[float(value) for value in clip.truth["box"]]]
    if masks is None:
        return []
    boxes = [mask_box(mask) for mask in masks]
    return [list(box) for box in boxes if box]


def frame_J(mask, true) -> float | None:
    """J of a frame; None where one of the masks is not known."""
    if mask is None or true is None:
        return None
    return round(float(region_similarity(mask[None], true.any(0)[None])[0]), 4)


def kept(files, content, kind) -> str:
    """Adds a file and returns its name, which is its hash."""
    name = f"{hashlib.sha256(content).hexdigest()[:12]}.{kind}"
    files[name] = content
    return name


# ---- pictures and sound ----------------------------------------------------------------------------
def draw_strip(pictures: list) -> tuple[bytes, tuple]:
    """(n frames from top to bottom as one WebP, (w, h) of a frame). Frames are never enlarged."""
    width, height = pictures[0].size
    tallest = LONGEST_STRIP // len(pictures)
    for side, quality in zip(SIDES, QUALITIES):
        scale = min(1, side / max(width, height), tallest / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        strip = Image.new("RGB", (size[0], len(pictures) * size[1]))
        for i, picture in enumerate(pictures):
            small = picture if picture.size == size else picture.resize(size, Image.BICUBIC, reducing_gap=2)
            strip.paste(small, (0, i * size[1]))
        file = io.BytesIO()
        strip.save(file, "webp", quality=quality)
        if file.tell() <= LARGEST_STRIP:
            break
    return file.getvalue(), size


def draw_predicted(masks: list, size: tuple) -> bytes:
    """A strip of n masks, bool [H, W] or None: filled, with an edge."""
    parts = []
    for mask in masks:
        small = resized(mask, size)
        inside = shrunk(small)
        parts.append(small.astype(np.uint8) + (small & ~inside))
    return png(parts, PREDICTED)


def draw_truth(masks: list, size: tuple) -> bytes:
    """A strip of n masks, bool [H, W] or None: a light outline with a dark one around it."""
    parts = []
    for mask in masks:
        small = resized(mask, size)
        around = ~shrunk(~small)
        line = small & ~shrunk(small)
        parts.append(line.astype(np.uint8) + 2 * (around & ~small))
    return png(parts, TRUE)


def resized(mask, size) -> np.ndarray:
    """bool [h, w] of a mask; all False without one."""
    if mask is None:
        return np.zeros(size[::-1], bool)
    return np.array(Image.fromarray(np.asarray(mask, bool)).resize(size, Image.NEAREST))


def shrunk(mask) -> np.ndarray:
    """Pixels whose four neighbours are in the mask. Beyond the border, pixels are repeated."""
    padded = np.pad(mask, 1, "edge")
    inside = mask & padded[:-2, 1:-1] & padded[2:, 1:-1]
    return inside & padded[1:-1, :-2] & padded[1:-1, 2:]


def png(parts, colours) -> bytes:
    """Parts of indices 0 (transparent), 1 and 2, from top to bottom, as a PNG with a palette."""
    image = Image.fromarray(np.concatenate(parts).astype(np.uint8), "P")
    palette = [0, 0, 0]
    alpha = [0]
    for *colour, opacity in colours:
        palette += colour
        alpha.append(opacity)
    image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "png", transparency=bytes(alpha), bits=2, optimize=True)
    return file.getvalue()


def wav(sound: np.ndarray) -> bytes:
    """The first LONGEST_SOUND seconds of a sound at 16 kHz, as loud as 8 bits allow."""
    sound = np.nan_to_num(sound[:LONGEST_SOUND * SAMPLE_RATE])
    sound = resample_poly(sound, SOUND_RATE, SAMPLE_RATE)
    loudest = max(float(np.abs(sound).max(initial=0)), 1e-6)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(1)
        writer.setframerate(SOUND_RATE)
        writer.writeframes((sound / loudest * 127 + 128).astype(np.uint8).tobytes())
    return file.getvalue()


# ---- sheets: for logs that take pictures -----------------------------------------------------------
def draw_sheet(clip: Clip, answers: list[Shown], columns: int = 6) -> Image.Image:
    """One picture: a row for each answer, of evenly spaced frames with its masks and boxes."""
    times = spread(len(clip.frames), columns)
    empty = np.zeros(clip.size, bool)
    cells = []
    for answer in answers:
        masks = answer.masks or {}
        for t in times:
            cells.append(overlay(clip.frames[t], masks.get(t, empty), answer.boxes.get(t, ())))
    width, height = cells[0].size
    sheet = Image.new("RGB", (len(times) * width, len(answers) * height))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % len(times) * width, i // len(times) * height))
    return sheet


def is_tracked(clip: Clip) -> bool:
    """Whether the clip's task is one of masks on all frames."""
    return TASKS[clip.task].tracked
