"""What a benchmark is, what a sample of it is, and what the readers of several benchmarks share.

    Benchmark.read -> Samples, whose videos and masks are still unread -> checked -> load -> Clip

If a small file cannot be read, that is an error at once. If something is wrong with one sample, the others go
on: its `broken` or its `fault` says so, or `load` or `read_masks` raises an error that begins with its name.

Letters: O objects, T frames, H W pixels.
"""
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from benchmarks.media import LONGEST_SOUND, SOUND_SLACK, open_video, read_image, read_sound
from benchmarks.metrics import by_kind, score_video
from data import FPS, SAMPLE_RATE, Clip, Frames, check_text, spread
from trust.errors import BadInput, reading
from trust.files import check_name, read_json

# ---- limits: no real dataset comes near, and what is beyond could take all time or memory ----------
# Characters of what is said of a sample. It may quote what a file holds.
LONGEST_REASON = 600
# Pixels of a mask whose frame is not known. The largest video, 8K, has half as many.
MOST_PIXELS = 2**26
# Pixels of all masks of a sample together.
MOST_MASKED = 2**33
# Pixels of the outlines of a picture's polygons together. Those of a person have a few thousand.
MOST_OUTLINE = 2**21


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
    # As Clip.truth. "size": (H, W) that the picture must have; "references": media of the query.
    truth: dict = field(default_factory=dict)
    fault: str = ""            # why it is not trained on, if the small files tell
    broken: str = ""           # why it is not evaluated, either: what its record says cannot be used
    fps: float = FPS           # of `pictures`
    objects: int = 0           # how many objects the target has
    null: bool = False         # whether it names nothing on purpose, so that its masks may be empty
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
        return f"{self.dataset}/{self.place}"

    @property
    def place(self) -> str:
        """Folder of the prediction, below that of all predictions."""
        return f"{self.folder or self.video}/{self.expression}"


@dataclass(frozen=True)
class Benchmark:
    """All that the programs know of a benchmark. It stands at the end of the benchmark's file."""
    read: Callable             # (root, split) -> list of Samples
    # As in benchmarks.Entry, from where find_benchmark fills them in.
    name: str = ""
    folder: str = ""
    splits: tuple = ()
    tested: str = ""
    aliases: tuple = ()
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
    # A questions.Quiz: how its questions are scored. Its samples are questions.Question, without masks.
    quiz: object = None
    # (root, videos) writes a miniature of its files.
    mini: Callable | None = None


# ---- broken samples --------------------------------------------------------------------------------
@contextmanager
def faults_of(sample: Sample):
    """A BadInput inside breaks this sample alone. The first one is kept."""
    try:
        yield
    except BadInput as error:
        sample.broken = sample.broken or str(error)[:LONGEST_REASON]


def checked(samples: list[Sample]) -> list[Sample]:
    """The samples of a split, of which those are marked as broken that cannot be used.

    Here is checked what all benchmarks have in common: names that become paths, queries, places of
    predictions. `load` and `read_masks` of a broken sample raise a BadInput that says why it is.
    """
    listed = [sample for sample in samples if sample.make is None]
    places = Counter(sample.place for sample in listed)
    folders = set()
    for folder in {sample.folder or sample.video for sample in listed}:
        parts = folder.split("/")
        folders.update("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    public = any(sample.read_masks is not None for sample in listed)
    problems = {}
    for sample in listed:
        with faults_of(sample):
            check_names(sample, problems)
            if places[sample.place] > 1:
                raise BadInput("another expression of the video has the same id")
            if sample.place in folders:
                raise BadInput("another video has the name of its prediction's folder")
            check_text(sample.query, "the query")
            if not sample.pictures:
                raise BadInput("no frames")
        if sample.broken:
            close(sample, public)
    return samples


def check_names(sample, problems):
    """Raises BadInput where a name of a sample could not be part of a path.

    problems: {id of a list of frames' names: what is wrong with it}, because a video's samples share it
    """
    check_name(sample.video, "video", slashes=True)
    check_name(sample.folder or "none", "folder")
    check_name(sample.expression, "id of an expression")
    key = id(sample.names)
    if key not in problems:
        problems[key] = ""
        try:
            for name in sample.names:
                check_name(name, "frame")
            if len(set(sample.names)) < len(sample.names):
                raise BadInput("two frames have the same name")
        except BadInput as error:
            problems[key] = str(error)
    if problems[key]:
        raise BadInput(problems[key])


def close(sample, public):
    """Makes a broken sample say why at every use. public: whether its benchmark's masks are."""
    sample.fault = sample.broken
    # Its names may hold anything, and are printed.
    sample.video = shown(sample.video)
    sample.folder = shown(sample.folder)
    sample.expression = shown(sample.expression)
    if public:
        sample.read_masks = partial(refuse, sample)


def shown(name):
    name = str(name)[:100]
    return name if name.isprintable() else ascii(name)


def refuse(sample, indices=None):
    raise BadInput(f"{sample.name}: {sample.broken}")


# ---- reading a sample ------------------------------------------------------------------------------
def load(sample: Sample, most_frames=None, whole_sound=False) -> Clip:
    """The Clip of a sample, shown at 2 frames a second, its frames still unread.

    most_frames   at most so many frames, evenly spaced; only their masks are decoded
    whole_sound   whether a sound that ends before its video is an error
    Raises BadInput that names the sample and the file at fault.
    """
    if sample.broken:
        refuse(sample)
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
        if not sample.null and not masks.any((1, 2, 3)).all():
            # An object may be out of sight on these frames only.
            check_target(sample, sample.read_masks())
    sound = None
    if sample.sound is not None:
        sound = named(sample, read_long_sound, sample.sound, len(frames) / fps, whole_sound)
    frames = frames.pick(indices)
    return Clip(
        sample.name, frames, sample.query, FPS, sound, masks,
        sample.kind, sample.task, sample.truth)


def named(sample: Sample, read: Callable, *arguments):
    """read(*arguments). Its errors become BadInput, with the sample's name at the beginning."""
    if sample.broken:
        refuse(sample)
    try:
        return read(*arguments)
    except (OSError, ValueError) as error:
        raise BadInput(f"{sample.name}: {str(error)[:LONGEST_REASON]}") from None


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


def read_long_sound(path: str, seconds: float, whole: bool) -> np.ndarray | None:
    """read_sound(path), cut SOUND_SLACK after its video of `seconds`.

    whole: raises BadInput where the sound ends before its video.
    """
    sound = read_sound(path, seconds + SOUND_SLACK)
    if sound is not None and whole:
        check_length(sound, seconds, path)
    return sound


def check_length(sound: np.ndarray, seconds: float, path: str) -> str:
    """What there is to say of a sound that goes on after its video of `seconds`; "" where it does not.

    Raises BadInput where it ends before its video.
    """
    length = len(sound) / SAMPLE_RATE
    lengths = f"sound of {length:.1f} s, video of {seconds:.1f} s: {path}"
    if length < min(seconds, LONGEST_SOUND) - SOUND_SLACK:
        raise BadInput(lengths)
    return lengths if length > seconds + 1 else ""


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


def check_target(sample: Sample, masks: np.ndarray) -> None:
    """Raises BadInput where an object that a sample names is on no frame.

    masks: bool [O, T, H, W] of all frames. A null sample may have none, and one that has a fault because it
    names no object.
    """
    if sample.null or sample.fault or masks.any((1, 2, 3)).all():
        return
    o = int(masks.any((1, 2, 3)).argmin())
    which = sample.ids[o] if len(sample.ids) == len(masks) else "the target"
    raise BadInput(f"{sample.name}: the masks of {which} are empty on all frames")


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


def expressions(dataset: str, path: str, words: str, *folders: str) -> Iterator[tuple]:
    """(sample, where, record, entry) of every expression in a JSON file of videos.

    words    the key of the query
    folders  hold the frames: the first that has the video
    where    the expression's place in the file, for messages
    record   the video's entry in the file;  entry  the expression's
    The samples of a video share names and paths. Otherwise ReVOS would need millions of paths in memory.
    """
    videos = require(read_json(path), "videos", path, dict)
    for video, record in videos.items():
        names = require(record, "frames", f"{path}: {video}", list)
        entries = require(record, "expressions", f"{path}: {video}", (dict, list))
        places = [os.path.join(folder, video) for folder in folders]
        place = next(filter(os.path.isdir, places), places[0])
        pictures = [os.path.join(place, f"{name}.jpg") for name in names]
        # The keys of a dict are the expressions' ids. In a list, each expression holds its own id.
        listed = enumerate(entries) if isinstance(entries, list) else entries.items()
        for key, entry in listed:
            where = f"{path}: {shown(video)}/{shown(key)}"
            sample = Sample("vos", dataset, video, f"entry {key}", "", "", names, pictures)
            with faults_of(sample):
                if isinstance(entries, list):
                    key = require(entry, "exp_id", where, (int, str))
                sample.expression = str(key)
                sample.query = require(entry, words, where, str)
            yield sample, where, record, entry


def rle_samples(dataset: str, root: str, meta: str, mask_file: str, table, mend=False) -> list[tuple]:
    """[(sample, where, expression)] in the layout of ReVOS and MeViS.

    root       holds the frames, in JPEGImages or, in Sa2VA's copy, without that level
    meta       path of the JSON file of videos
    mask_file  path of the masks; table  its contents, None where the masks are not public
    mend       as in rle_masks
    """
    folders = os.path.join(root, "JPEGImages"), root
    samples = []
    for sample, where, _, entry in expressions(dataset, meta, "exp", *folders):
        if table is not None:
            sample.kind = "single"
            with faults_of(sample):
                read_ids(sample, where, entry, mask_file, table)
            with_masks(sample, rle_masks, sample, sample.ids, mask_file, table, False, mend)
        samples.append((sample, where, entry))
    return samples


def read_ids(sample, where, entry, mask_file, table):
    """Fills in which annotations are a sample's target. An id that comes twice is one object, and a fault."""
    listed = []
    for number in require(entry, "anno_id", where, list):
        if type(number) not in (int, str):
            raise BadInput(f"an id in 'anno_id' is a {type(number).__name__} in {where}")
        listed.append(str(number))
    ids = list(dict.fromkeys(listed))
    for key in ids:
        rles = require(table, key, mask_file, list)
        if len(rles) != len(sample.names):
            count = len(sample.names)
            raise BadInput(f"{len(rles)} masks of annotation {key} for {count} frames: {mask_file}")
    sample.ids = tuple(ids)
    sample.objects = len(ids)
    if len(ids) > 1:
        sample.kind = "multi"
    if not ids:
        sample.fault = f"names no object: {where}"
    elif len(ids) < len(listed):
        sample.fault = f"names an object twice: {where}"


# ---- masks -----------------------------------------------------------------------------------------
def rle_mask(rle: dict, where: str, frame: tuple | None = None) -> np.ndarray:
    """bool [H, W] of a COCO run-length encoding. Raises BadInput where it is none.

    frame: (H, W) that it must have. Nothing is allocated before its size is checked.
    """
    size = require(rle, "size", where, list)
    runs = require(rle, "counts", where, (str, list))
    if [type(length) for length in size] != [int, int] or min(size) < 1:
        raise BadInput(f"no run-length encoding: {where}")
    H, W = size
    if frame is not None and (H, W) != frame:
        raise BadInput(f"mask of {W} x {H}, frame of {frame[1]} x {frame[0]}: {where}")
    pixels = H * W
    if pixels > MOST_PIXELS:
        raise BadInput(f"mask of {W} x {H}, more than {MOST_PIXELS} pixels: {where}")
    misfit = f"counts that do not fill a mask of size {size} in {where}"
    # A number has up to six characters.
    if len(runs) > 6 * (pixels + 1):
        raise BadInput(misfit)
    if isinstance(runs, str):
        runs = decompressed(runs, where)
    elif not all(type(length) is int and abs(length) <= pixels for length in runs):
        raise BadInput(misfit)
    runs = np.array(runs, np.int64)
    # The sum of few large numbers could overflow.
    if len(runs) == 0 or runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise BadInput(misfit)
    # Background and mask take turns, column by column.
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(W, H).T


def decompressed(counts: str, where: str) -> np.ndarray:
    """The runs that COCO's compressed form encodes.

    A number is a few characters, the lowest bits first. A character holds 6 bits: five of the number, and one
    that says whether another character follows. From the fourth number on, each is the difference to the
    number two places before.
    """
    # Characters beyond ASCII become one that encodes nothing, either.
    bits = np.frombuffer(counts.encode("ascii", "replace"), np.uint8)
    bits = bits.astype(np.int64) - 48
    if len(bits) == 0 or bits[-1] >= 32 or bits.min() < 0 or bits.max() > 63:
        raise BadInput(f"malformed counts in {where}")
    # For each number: its last character, its first, and how many it has.
    last = np.flatnonzero(bits < 32)
    first = np.r_[0, last[:-1] + 1]
    lengths = last - first + 1
    if lengths.max() > 6:
        raise BadInput(f"malformed counts in {where}")
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
    ids    keys of the annotations in `table`, which holds the contents of the file `path`. Each has a list of
           a mask for each frame (see read_ids)
    union  O is 1: the union of all ids
    mend   resize a mask of another size than its frame, and note it in sample.mended; else raise BadInput
    """
    width, height = sample.read_picture(sample.pictures[0]).size
    if indices is None:
        indices = range(len(sample.names))
    objects = 1 if union else max(len(ids), 1)
    check_amount(objects * len(indices) * height * width, path)
    masks = np.zeros((objects, len(indices), height, width), bool)
    for o, key in enumerate(ids):
        for t, index in enumerate(indices):
            rle = table[key][index]
            if rle is None:
                continue
            where = f"annotation {key}, frame {sample.names[index]}: {path}"
            mask = rle_mask(rle, where, None if mend else (height, width))
            if mask.shape != (height, width):
                size = f"{mask.shape[1]} x {mask.shape[0]}"
                sample.mended.add(f"mask of {size}, frame of {width} x {height}: {where}")
                picture = Image.fromarray(mask)
                mask = np.array(picture.resize((width, height), Image.NEAREST))
            masks[0 if union else o, t] |= mask
    return masks


def check_amount(pixels: int, where) -> None:
    """Raises BadInput where the masks of one sample have so many pixels that memory might not suffice."""
    if pixels > MOST_MASKED:
        raise BadInput(f"masks of {pixels} pixels together, more than {MOST_MASKED}: {where}")


def read_labels(paths: list, grey=False, indices=None) -> np.ndarray:
    """uint8 [T, H, W] of mask pictures: the indices of a palette, or with `grey` the brightness."""
    if indices is not None:
        paths = [paths[index] for index in indices]
    labels = []
    for path in paths:
        picture = read_image(path, "L" if grey else None, "mask")
        check_amount(len(paths) * picture.width * picture.height, path)
        label = np.array(picture)
        if label.ndim != 2 or label.itemsize > 1 or (labels and label.shape != labels[0].shape):
            problem = "not one number of 8 bits a pixel or not as large as the first"
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


def near_corners(polygons: list, height: int, width: int, where: str) -> list[np.ndarray]:
    """[corners, 2] of each polygon, whose corners are pairs of numbers (x, y).

    Raises BadInput where they are not, or lie farther beside the picture than it is large. Annotators click
    in the picture. Drawing takes time and memory by the length of the outlines, and pycocotools crashes over
    numbers that are large or not finite.
    """
    size = np.array([width, height])
    outline = 0
    arrays = []
    for polygon in polygons:
        with reading(where):
            points = np.array(polygon)
        if points.dtype.kind not in ("i", "f") or points.shape != (len(polygon), 2) or not len(points):
            raise BadInput(f"no corners in {where}")
        # NaN fails the comparison.
        if not ((points >= -size) & (points <= 2 * size)).all():
            raise BadInput(f"a corner far beside the picture of {width} x {height} in {where}")
        steps = abs(points - np.roll(points, 1, axis=0))
        outline += steps.max(1).sum()
        arrays.append(points)
    if outline > MOST_OUTLINE:
        raise BadInput(f"outlines of {outline:.0f} pixels, more than {MOST_OUTLINE}: {where}")
    return arrays


def polygon_mask(corners: list, height: int, width: int) -> np.ndarray:
    """bool [H, W] of a polygon and its outline; corners are pairs of whole numbers (x, y).

    Equals OpenCV's fillPoly with polylines, pixel for pixel, as long as the corners are inside the picture.
    """
    mask = np.zeros((height, width), bool)
    # y and x of each point where the outline crosses a row.
    ys = []
    xs = []
    for a, b in zip(corners, corners[1:] + corners[:1]):
        x, y = line_pixels(min(a, b), max(a, b))
        inside = (0 <= x) & (x < width) & (0 <= y) & (y < height)
        mask[y[inside], x[inside]] = True
        top, bottom = (a, b) if a[1] <= b[1] else (b, a)
        rows = bottom[1] - top[1]
        down = np.arange(rows)
        ys.append(top[1] + down)
        xs.append(top[0] + down * (bottom[0] - top[0]) / max(rows, 1))
    y = np.concatenate(ys)
    x = np.concatenate(xs)
    order = np.lexsort((x, y))
    y = y[order]
    # A row is inside between its first crossing and its second, its third and its fourth, ...
    left = np.ceil(x[order][::2]).clip(0, width).astype(int)
    right = (np.floor(x[order][1::2]) + 1).clip(0, width).astype(int)
    inside = (0 <= y[::2]) & (y[::2] < height)
    changes = np.zeros((height, width + 1), np.int32)
    np.add.at(changes, (y[::2][inside], left[inside]), 1)
    np.add.at(changes, (y[::2][inside], right[inside]), -1)
    return mask | (changes.cumsum(1)[:, :-1] > 0)


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
