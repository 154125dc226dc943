"""What the writers of miniatures share: toy clips in exactly the layouts of the real benchmarks.

A benchmark's own writer, mini(root, videos), makes its folder `root` with `videos` clips in every split.
Letters: O objects, T frames, H W pixels.
"""
import io
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from scipy.io import wavfile

from benchmarks.toy import Scene, toy_queries, toy_scene
from data import SAMPLE_RATE
from trust.errors import BadInput


def write_mini(benchmark, root: str, videos=4):
    """Writes the miniature of a benchmark into `root`.

    Raises BadInput where it has none, or where `root` is not empty.
    """
    if benchmark.mini is None:
        raise BadInput(f"{benchmark.name} has no miniature")
    if os.path.isdir(root) and os.listdir(root):
        raise BadInput(f"{root} is not empty; give another --out")
    benchmark.mini(root, videos)


def put(content, *path: str):
    """Writes bytes, a picture or its array, or a JSON value; makes the folders."""
    file = os.path.join(*path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    if isinstance(content, Image.Image):
        content.save(file, quality=95)
        return
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    with open(file, "wb") as out:
        out.write(content)


def write_clips(root: str, split: str, indices: Iterable, key: str, form="{:05d}", first=0, step=1):
    """Writes the frames of toy clips into root/VIDEO and yields (video, scene, names of its frames) of each.

    key   form of a video's name, filled with its index
    form  of a frame's name, filled with first, first + step, ...
    """
    for index in indices:
        video = key.format(index)
        scene = split_scene(split, index)
        names = []
        for t, picture in enumerate(scene.pictures):
            name = form.format(first + step * t)
            put(picture, root, video, name + ".jpg")
            names.append(name)
        yield video, scene, names


def split_scene(split: str, index: int) -> Scene:
    """A toy scene for a split of a real benchmark: train shows the toy's train, all others the toy's test."""
    return toy_scene("train" if split == "train" else "test", index)


def ask(scene: Scene, kinds=("referring", "reasoning")) -> list[tuple]:
    """[(kind, query, indices of the things it means)] of a toy scene. The last query means two things."""
    queries = []
    for kind, query, target in toy_queries(scene):
        targets = [] if target is None else [target]
        if kind in kinds:
            queries.append((kind, query, targets))
    first, second = scene.things[:2]
    queries.append(("referring", f"the {first.name} and the {second.name}", [0, 1]))
    return queries


def stills(split: str, videos: int) -> Iterator[tuple]:
    """(picture [H, W, 3], masks [O, H, W], names of the things) of one frame of each toy scene.

    It is the frame that shows most things. Masks and names are those of the things it shows.
    """
    for index in range(videos):
        scene = split_scene(split, index)
        seen = scene.masks.any((2, 3))
        t = seen.sum(0).argmax()
        visible = np.flatnonzero(seen[:, t])
        names = [scene.things[o].name for o in visible]
        yield scene.pictures[t], scene.masks[visible, t], names


def rectangles(mask: np.ndarray) -> Iterator[tuple]:
    """(x1, y1, x2, y2) of every run of every row of a mask [H, W]. The corners are pixels of the mask."""
    for y, row in enumerate(mask):
        # Where the first run begins, where it has ended, where the second begins, ...
        changes = np.diff(np.r_[0, row, 0])
        ends = changes.nonzero()[0].tolist()
        for start, stop in zip(ends[::2], ends[1::2]):
            yield start, y, stop - 1, y


def sound_file(sound: np.ndarray) -> bytes:
    """A sound, float32 at 16 kHz, as the bytes of a wav file."""
    buffer = io.BytesIO()
    wavfile.write(buffer, SAMPLE_RATE, (sound * 32767).astype(np.int16))
    return buffer.getvalue()


def encoded(picture: Image.Image, form: str) -> bytes:
    """A picture as the bytes of a file: form "png" or "jpeg"."""
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=95)
    return buffer.getvalue()
