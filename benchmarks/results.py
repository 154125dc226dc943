"""What segment.py writes of a clip, in this order:

    OUT/answer.json         the answer of the two systems, before SAM2 begins
    OUT/masks/00000.png     ... as they are made, one a frame, gray, 0 or 255, at source size
    OUT/overlay.webp        an animation of at most MOST_PICTURES frames
    OUT/sheet.png           the keyframes, then evenly spaced frames

A file is complete or not there. T frames, H W pixels.
"""
import json
import os
import re
import sys
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.media import is_picture
from benchmarks.pictures import animation, overlay
from benchmarks.predictions import read_mask
from data import Clip, answer_text, format_time, spread
from trust.errors import BadInput
from trust.files import PARTIAL, check_inside

MOST_PICTURES = 240
# Of a sheet: columns, and evenly spaced frames.
COLUMNS = 4
SPACED = 12
GAP = 8    # pixels
# Endings of the names of videos, in a folder of them.
VIDEO_NAMES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


# ---- which videos ----------------------------------------------------------------------------------
def listed_videos(path: str | None, out: str) -> list[tuple]:
    """(video, folder of its files) of each video in a folder of videos; else of the one that is named."""
    if path is None or not os.path.isdir(path):
        return [(path, out)]
    # Hidden files are no videos: macOS puts one beside every file.
    names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
    videos = [name for name in names if name.lower().endswith(VIDEO_NAMES)]
    # Frames of one video may have a few files beside them, and videos a cover.
    if len(videos) <= sum(map(is_picture, names)):
        return [(path, out)]
    return [(os.path.join(path, name), os.path.join(out, name)) for name in videos]


@contextmanager
def told_alone(several: bool, failed: list):
    """Where there are several videos, one that cannot be read is told in a line and added to `failed`."""
    try:
        yield
    # A link that leads nowhere is a FileNotFoundError.
    except (BadInput, FileNotFoundError) as error:
        if not several:
            raise
        tqdm.write(f"no masks: {error}", file=sys.stderr)
        failed.append(error)


# ---- files -----------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: str):
    """The path of an unfinished file. At the end it replaces the one at `path`; after an error it is removed.

    An OSError inside is raised as one that names `path`.
    """
    unfinished = path + PARTIAL
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error})") from None
    finally:
        if os.path.lexists(unfinished):
            os.unlink(unfinished)


def mask_file(out: str, t: int) -> str:
    return os.path.join(out, "masks", f"{t:05d}.png")


def write_results(out: str, clip: Clip, answer, masks) -> int:
    """Writes all files.

    answer: an `Answer` of segment.py. masks: an iterator of T masks, bool [H, W].
    Returns how many masks are not empty. Raises OSError that names a file that cannot be written. The masks
    before an error stay, and a KeyboardInterrupt says how many.
    """
    os.makedirs(os.path.join(out, "masks"), exist_ok=True)
    remove_results(out)
    write_answer(out, clip, answer)
    seen = write_masks(out, masks, len(clip.frames))
    write_overlay(out, clip, answer.boxes)
    return seen


def remove_results(out: str) -> None:
    """Removes what an earlier clip has left in OUT: it may have been longer. Other files stay."""
    old = [os.path.join(out, "overlay.webp"), os.path.join(out, "sheet.png")]
    for name in os.listdir(os.path.join(out, "masks")):
        if re.fullmatch(rf"\d{{5,}}\.png({re.escape(PARTIAL)})?", name):
            old.append(os.path.join(out, "masks", name))
    for path in old:
        check_inside(path, out)
        if os.path.lexists(path):
            os.unlink(path)


def write_answer(out: str, clip: Clip, answer) -> None:
    keyframes = []
    for t, description in answer.keyframes.items():
        keyframes.append(dict(frame=t, time=t / clip.fps, description=description, boxes=answer.boxes[t]))
    content = dict(
        clip=clip.name,
        query=clip.query,
        frames=len(clip.frames),
        reasoning=answer.text.partition("<think>")[2].partition("</think>")[0],
        answer=answer_text(answer.text),
        text=answer.text,
        keyframes=keyframes)
    with whole_file(os.path.join(out, "answer.json")) as path, open(path, "w") as file:
        json.dump(content, file, indent=1)


def write_masks(out: str, masks, T: int) -> int:
    """Writes each mask when it comes. A bar on stderr shows frames a second and the time left."""
    written = 0
    seen = 0
    try:
        for mask in tqdm(masks, total=T, desc="masks", unit=" frames"):
            with whole_file(mask_file(out, written)) as path:
                Image.fromarray(mask.astype(np.uint8) * 255).save(path, "png")
            written += 1
            seen += bool(mask.any())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{written} of {T} masks are in {out}/masks") from None
    return seen


def write_overlay(out: str, clip: Clip, boxes: dict) -> None:
    """Writes the animation of the written masks, and the sheet. Frames are read again: few are held.

    boxes: {frame: [boxes]}; these frames are shown in any case.
    """
    T = len(clip.frames)
    times = {*spread(T, MOST_PICTURES - len(boxes)), *boxes}
    pictures = {}
    for t in tqdm(sorted(times), desc="overlay", unit=" frames"):
        mask = read_mask(mask_file(out, t), clip.size)
        pictures[t] = overlay(clip.frames[t], mask, boxes.get(t, ()))
    with whole_file(os.path.join(out, "overlay.webp")) as path, open(path, "wb") as file:
        file.write(animation(pictures, T, clip.fps))
    with whole_file(os.path.join(out, "sheet.png")) as path:
        sheet(pictures, boxes, clip.fps).save(path, "png")


def sheet(pictures: dict, boxes: dict, fps: float) -> Image.Image:
    """One picture: the keyframes, which begin a row, then evenly spaced frames, each with its time.

    pictures: {frame: picture}. boxes: those of the keyframes, {frame: [boxes]}.
    """
    shown = sorted(pictures)
    spaced = [shown[i] for i in spread(len(shown), SPACED)]
    rows = []
    for times in (sorted(boxes), spaced):
        rows += [times[i:i + COLUMNS] for i in range(0, len(times), COLUMNS)]
    width, height = pictures[shown[0]].size
    font = ImageFont.load_default(size=max(12, width // 24))
    width += GAP
    height += GAP
    whole = Image.new("RGB", (COLUMNS * width - GAP, len(rows) * height - GAP), "white")
    draw = ImageDraw.Draw(whole)
    for y, times in enumerate(rows):
        for x, t in enumerate(times):
            whole.paste(pictures[t], (x * width, y * height))
            text = format_time(t / fps) + " keyframe" * (t in boxes)
            place = (x * width + 8, (y + 1) * height - GAP - 8)
            draw.text(place, text, "white", font, "ls", stroke_width=2, stroke_fill="black")
    return whole


def interrupted(stop: KeyboardInterrupt) -> int:
    """Prints one line on stderr for Ctrl-C. Returns the exit code."""
    print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
    return 130
