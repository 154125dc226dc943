"""What segment.py writes of a clip, in this order:

    OUT/answer.json         the answer of the two systems, before SAM2 begins
    OUT/masks/00000.png     ... as they are made, one a frame, gray, 0 or 255, at source size
    OUT/overlay.webp        an animation of at most MOST_PICTURES frames

A file is complete or not there. T frames, H W pixels.
"""
import json
import os
import re
import sys
from contextlib import contextmanager

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.pictures import animation, overlay
from benchmarks.predictions import read_mask
from data import Clip, answer_text, spread
from trust.files import PARTIAL, check_inside

MOST_PICTURES = 240


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
    old = [os.path.join(out, "overlay.webp")]
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
    """Writes the animation of the written masks. Frames are read again, so that few pictures are held.

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


def interrupted(stop: KeyboardInterrupt) -> int:
    """Prints one line on stderr for Ctrl-C. Returns the exit code."""
    print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
    return 130
