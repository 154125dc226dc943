"""What a benchmark is, what a sample of it is, and what the readers of several benchmarks share.

    Benchmark.read -> Samples, whose videos and masks are still unread -> load -> Clip

If a small file cannot be read, that is an error at once. If something is wrong with one sample, its `fault`
says so, or `load` or `read_masks` raises an error that begins with the sample's name.

Letters: O objects, T frames, H W pixels.
"""
import glob
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from benchmarks.media import open_video, read_image, read_sound
from benchmarks.metrics import by_kind, score_video
from data import FPS, SAMPLE_RATE, Clip, Frames, spread
from trust.errors import BadInput
from trust.files import read_json

# Seconds by which a sound may end before its video.
SOUND_SLACK = 0.5


@dataclass
class Sample:
    """One query of one video or picture."""
    task: str                  # a name in data.TASKS
    dataset: str
    video: str                 # names the video within the dataset (with slashes in ReVOS)
    expression: str            # id of the query within the video
    query: str
    kind: str                  # subset for the tables
    names: Sequence            # of the frames, and so of the predicted masks; empty for a video file
    pictures: list             # paths of the frames, or one path of a video file
    # (indices=None) -> bool [O, T, H, W] of these frames, or of all; None where the masks are not public.
    read_masks: Callable | None = None
    sound: str | None = None   # path of a wav, or of a video file with a soundtrack
    # As Clip.truth. "size": (H, W) that the picture must have.
    truth: dict = field(default_factory=dict)
    fault: str = ""            # why it is not trained on, if the small files tell
    fps: float = FPS           # of `pictures`
    objects: int = 0           # how many objects the target has
    # Ids of the target's objects. Samples of a video with the same ids share their masks.
    ids: tuple = ()
    folder: str = ""           # folder of the prediction; "": the video's name
    scored: list | None = None   # names of the frames that count; None: all
    # Faults that were repaired while the masks were read.
    mended: set = field(default_factory=set)
    read_picture: Callable = read_image   # path -> RGB picture
    make: Callable | None = None          # () -> Clip, of a sample that no file holds
    # Values that only the benchmark's own file uses.
    extra: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.video}/{self.expression}"


@dataclass(frozen=True)
class Benchmark:
    """All that the programs know of a benchmark. It stands at the end of the benchmark's file."""
    name: str
    folder: str                # under --data_root; "" where nothing is read
    splits: tuple
    read: Callable             # (root, split) -> list of Samples
    aliases: tuple = ()        # other names of it in --data
    tested: str = ""           # splits that are evaluated, by commas; "": it is only trained on
    task: str = ""             # the task at evaluation, if not the sample's own
    usual: int | None = None   # how many samples are evaluated without --limit; None: all
    # (sample, true, pred) -> values of one sample. true is [O, T, H, W], pred is [T, H, W], and each is None
    # if it is missing or cannot be read.
    score: Callable = score_video
    # rows -> {subset: {column: value, "expressions": count}}. A row holds the values of one sample.
    subsets: Callable = by_kind
    # (samples, source, rows) -> more subsets, for metrics that need all predictions of a video together. The
    # source of predictions is that of benchmarks/predictions.py.
    joint: Callable | None = None
    columns: tuple = ("J", "F", "J&F")
    # {column: its decimals in the table}, for columns that do not have 2.
    decimals: dict = field(default_factory=dict)
    worst: str = "0"           # what a missing prediction scores, in words
    paired: str = "J&F"        # the value of a sample that --against compares
    # (samples, seed) -> those that are trained on; None: all.
    choose: Callable | None = None
    # An epoch visits each video once, under one random expression. False: each sample once.
    per_video: bool = True
    archive: str = "Annotations"   # top folder of the server's zip
    # (out, samples, readable) writes more official files.
    export: Callable | None = None
    # (root, videos) writes a miniature of its files.
    mini: Callable | None = None


# ---- reading a sample ------------------------------------------------------------------------------
def load(sample: Sample, most_frames=None, whole_sound=False) -> Clip:
    """The Clip of a sample, shown at 2 frames a second, its frames still unread.

    most_frames   at most so many frames, evenly spaced; only their masks are decoded
    whole_sound   whether a sound that ends before its video is an error
    Raises BadInput that names the sample and the file at fault.
    """
    if sample.make is not None:
        clip = sample.make()
        if most_frames:
            clip, _ = clip.sampled(most_frames)
        return clip

    frames, fps = named(sample, open_frames, sample)
    indices = spread(len(frames), most_frames or len(frames))
    masks = None
    if sample.read_masks is not None:
        masks = fitting_masks(sample, indices)
    sound = None
    if sample.sound is not None:
        seconds = len(frames) / fps if whole_sound else 0
        sound = named(sample, read_long_sound, sample.sound, seconds)
    frames = frames.pick(indices)
    return Clip(
        sample.name, frames, sample.query, FPS, sound, masks,
        sample.kind, sample.task, sample.truth)


def named(sample: Sample, read: Callable, *arguments):
    """read(*arguments). Its errors become BadInput, with the sample's name at the beginning."""
    try:
        if not sample.pictures:
            raise BadInput("no frames")
        return read(*arguments)
    except (OSError, ValueError) as error:
        raise BadInput(f"{sample.name}: {error}") from None


def with_masks(sample: Sample, read: Callable, *arguments) -> Sample:
    """Makes read(*arguments, indices) the sample's read_masks(indices). Returns the sample."""
    sample.read_masks = partial(named, sample, read, *arguments)
    return sample


def open_frames(sample: Sample) -> tuple[Frames, float]:
    """(frames, fps) of a sample's video."""
    if not sample.names:
        return open_video(sample.pictures[0])
    read = partial(named, sample, sample.read_picture)
    return Frames(read, sample.pictures), sample.fps


def read_long_sound(path: str, seconds: float) -> np.ndarray | None:
    """read_sound(path). Raises BadInput where it ends before its video of `seconds`."""
    sound = read_sound(path)
    if sound is None:
        return None
    length = len(sound) / SAMPLE_RATE
    if length < seconds - SOUND_SLACK:
        raise BadInput(f"sound of {length:.1f} s, video of {seconds:.1f} s: {path}")
    return sound


def fitting_masks(sample: Sample, indices: Sequence | None = None) -> np.ndarray:
    """read_masks(indices). Raises BadInput where they do not have the size of the first frame."""
    masks = sample.read_masks(indices)
    rows, columns = masks.shape[2:]
    path = sample.pictures[0]
    width, height = named(sample, sample.read_picture, path).size
    if (rows, columns) != (height, width):
        sizes = f"masks of {columns} x {rows}, frames of {width} x {height}"
        raise BadInput(f"{sample.name}: {sizes}: {path}")
    return masks


# ---- small files -----------------------------------------------------------------------------------
def require(record, key, where: str, kind=object):
    """record[key] of a JSON object. Raises BadInput that says where it is missing or of another type."""
    if not isinstance(record, dict) or key not in record:
        raise BadInput(f"no {key!r} in {where}")
    if not isinstance(record[key], kind):
        raise BadInput(f"{key!r} is a {type(record[key]).__name__} in {where}")
    return record[key]


def files_of(folder: str, ending: str) -> list[str]:
    """Sorted paths of a folder's files. Raises FileNotFoundError where there are none."""
    pattern = os.path.join(glob.escape(folder), f"*.{ending}")
    files = glob.glob(pattern)
    if not files:
        raise FileNotFoundError(f"no *.{ending} in {folder}")
    return sorted(files)


def expressions(path: str, *folders: str) -> Iterator[tuple]:
    """(video, where, record, names, pictures, id, expression) of every expression in a JSON file of videos.

    where     the expression's place in the file, for messages
    record    the video's entry in the file
    names     of the video's frames
    pictures  paths of the frames, in the first of `folders` that has the video
    The expressions of a video share these lists. Otherwise ReVOS would need millions of paths in memory.
    """
    videos = require(read_json(path), "videos", path, dict)
    for video, record in videos.items():
        where = f"{path}: {video}"
        names = require(record, "frames", where, list)
        entries = require(record, "expressions", where, (dict, list))
        places = [os.path.join(folder, video) for folder in folders]
        place = next(filter(os.path.isdir, places), places[0])
        pictures = [os.path.join(place, f"{name}.jpg") for name in names]
        # The keys of a dict are the expressions' ids. In a list, each expression holds its own id.
        if isinstance(entries, dict):
            entries = entries.items()
        else:
            entries = [(str(require(entry, "exp_id", where)), entry) for entry in entries]
        for key, entry in entries:
            yield video, f"{where}/{key}", record, names, pictures, key, entry


def rle_samples(dataset: str, root: str, meta: str, mask_file: str, table, mend=False) -> list[tuple]:
    """[(sample, where, expression)] in the layout of ReVOS and MeViS.

    root       holds the frames, in JPEGImages or, in Sa2VA's copy, without that level
    meta       path of the JSON file of videos
    mask_file  path of the masks; table  its contents, None where the masks are not public
    mend       as in rle_masks
    """
    folders = os.path.join(root, "JPEGImages"), root
    samples = []
    for video, where, _, names, pictures, key, entry in expressions(meta, *folders):
        ids = []
        if table is not None:
            ids = [str(number) for number in require(entry, "anno_id", where, list)]
        query = require(entry, "exp", where, str)
        sample = Sample("vos", dataset, video, key, query, "", names, pictures)
        sample.ids = tuple(ids)
        sample.objects = len(ids)
        if table is not None:
            sample.kind = "multi" if len(ids) > 1 else "single"
            sample.fault = "" if ids else f"names no object: {where}"
            with_masks(sample, rle_masks, sample, ids, mask_file, table, False, mend)
        samples.append((sample, where, entry))
    return samples


# ---- masks -----------------------------------------------------------------------------------------
def rle_mask(rle: dict, where: str) -> np.ndarray:
    """bool [H, W] of a COCO run-length encoding. Raises BadInput where it is none."""
    size = require(rle, "size", where, list)
    runs = require(rle, "counts", where, (str, list))
    if isinstance(runs, str):
        runs = decompressed(runs, where)
    runs = np.asarray(runs)
    kinds = [type(length) for length in size]
    if runs.dtype.kind != "i" or kinds != [int, int]:
        raise BadInput(f"no run-length encoding: {where}")
    H, W = size
    if runs.min() < 0 or runs.sum() != H * W:
        raise BadInput(f"runs of {runs.sum()} pixels for a mask of size {size} in {where}")
    # Background and mask take turns, column by column.
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(W, H).T


def decompressed(counts: str, where: str) -> np.ndarray:
    """The runs that COCO's compressed form encodes.

    A number is a few characters, the lowest bits first. A character holds 6 bits: five of the number, and one
    that says whether another character follows. From the fourth number on, each is the difference to the
    number two places before.
    """
    bits = np.frombuffer(counts.encode(), np.uint8)
    bits = bits.astype(np.int64) - 48
    if len(bits) == 0 or bits[-1] >= 32 or bits.min() < 0 or bits.max() > 63:
        raise BadInput(f"malformed counts in {where}")
    # For each number: its last character, its first, and how many it has.
    last = np.flatnonzero(bits < 32)
    first = np.r_[0, last[:-1] + 1]
    lengths = last - first + 1
    # For each character: by how much its bits are shifted within the number.
    shift = 5 * (np.arange(len(bits)) - np.repeat(first, lengths))
    runs = np.add.reduceat((bits & 31) << shift, first)
    # Two's complement: the highest bit of a number is its sign.
    negative = bits[last] >> 4 & 1
    runs -= negative << 5 * lengths
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def rle_masks(
    sample: Sample,
    ids,
    path: str,
    table: dict,
    union: bool,
    mend: bool,
    indices=None,
) -> np.ndarray:
    """bool [O, T, H, W] of annotations, for all frames or these indices.

    A null in the table is an empty mask. Without ids there is one object with empty masks.
    ids    keys of the annotations in `table`, which holds the contents of the file `path`
    union  O is 1: the union of all ids
    mend   resize a mask of another size than its frame, and note it in sample.mended; else raise BadInput
    """
    width, height = sample.read_picture(sample.pictures[0]).size
    if indices is None:
        indices = range(len(sample.names))
    objects = 1 if union else max(len(ids), 1)
    masks = np.zeros((objects, len(indices), height, width), bool)
    for o, key in enumerate(ids):
        rles = require(table, key, path, list)
        if len(rles) != len(sample.names):
            raise BadInput(f"{len(rles)} masks of annotation {key} for {len(sample.names)} frames: {path}")
        for t, index in enumerate(indices):
            if rles[index] is None:
                continue
            where = f"annotation {key}, frame {sample.names[index]}: {path}"
            mask = rle_mask(rles[index], where)
            if mask.shape != (height, width):
                fault = f"mask of {mask.shape[1]} x {mask.shape[0]}, frame of {width} x {height}: {where}"
                if not mend:
                    raise BadInput(fault)
                sample.mended.add(fault)
                picture = Image.fromarray(mask)
                mask = np.array(picture.resize((width, height), Image.NEAREST))
            masks[0 if union else o, t] |= mask
    return masks


def read_labels(paths: list, grey=False, indices=None) -> np.ndarray:
    """uint8 [T, H, W] of mask pictures: the indices of a palette, or with `grey` the brightness."""
    if indices is not None:
        paths = [paths[index] for index in indices]
    labels = []
    for path in paths:
        try:
            picture = Image.open(path)
            if grey:
                picture = picture.convert("L")
            label = np.array(picture)
        except (OSError, SyntaxError) as error:
            raise BadInput(f"cannot read mask: {path} ({error})") from None
        if label.ndim != 2 or (labels and label.shape != labels[0].shape):
            problem = "not one number a pixel or not as large as the first"
            raise BadInput(f"mask of shape {label.shape}, {problem}: {path}")
        labels.append(label)
    return np.stack(labels)


def label_masks(paths: list, value: int | None, indices=None) -> np.ndarray:
    """bool [1, T, H, W]: where the mask pictures hold `value`; for None, where they are not black."""
    if value is None:
        masks = read_labels(paths, True, indices) > 0
    else:
        masks = read_labels(paths, False, indices) == value
    return masks[None]


def polygon_mask(corners: list, height: int, width: int) -> np.ndarray:
    """bool [H, W] of a polygon and its outline; corners are pairs of whole numbers (x, y).

    Equals OpenCV's fillPoly with polylines, pixel for pixel, as long as the corners are inside the picture.
    """
    mask = np.zeros((height, width), bool)
    # (y, x) of each point where the outline crosses a row.
    crossings = []
    for a, b in zip(corners, corners[1:] + corners[:1]):
        x, y = line_pixels(min(a, b), max(a, b))
        inside = (0 <= x) & (x < width) & (0 <= y) & (y < height)
        mask[y[inside], x[inside]] = True
        top, bottom = (a, b) if a[1] <= b[1] else (b, a)
        rows = bottom[1] - top[1]
        for row in range(rows):
            x = top[0] + row * (bottom[0] - top[0]) / rows
            crossings.append((top[1] + row, x))
    crossings.sort()
    # A row is inside between its first crossing and its second, its third and its fourth, ...
    for (row, left), (_, right) in zip(crossings[::2], crossings[1::2]):
        if 0 <= row < height:
            start = max(math.ceil(left), 0)
            stop = max(math.floor(right) + 1, 0)
            mask[row, start:stop] = True
    return mask


def line_pixels(left, right):
    """x and y of the pixels of a line, from its left end (x, y) to its right end."""
    x, y = left
    dx = right[0] - x
    dy = abs(right[1] - y)
    down = 1 if right[1] > y else -1
    along = np.arange(max(dx, dy) + 1)
    steps = max(dx, dy, 1)
    # The quotient, rounded; halves are rounded down.
    aside = (2 * along * min(dx, dy) + steps - 1) // (2 * steps)
    if dx >= dy:
        return x + along, y + down * aside
    return x + aside, y + down * along
