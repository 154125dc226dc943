"""Checks benchmarks, shows samples, writes miniatures: `python data.py check | show | mini --bench NAME ...`

Letters: T frames, H W pixels.
"""
import math
import os
import sys

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks import BENCHMARKS, add_roots, chosen_root, find_benchmark, open_split
from benchmarks.mini import write_mini
from benchmarks.pictures import tint
from benchmarks.samples import Benchmark, Sample, fitting_masks, load, open_frames, read_long_sound
from data import prompt
from trust.errors import BadInput, fail
from trust.options import MOST_FRAMES, Parser, at_least

DESCRIPTION = """check reads a dataset and names what is broken (exit code 1); show writes one sample as a
picture and its prompt; mini writes a miniature in its layout."""


# ---- check -----------------------------------------------------------------------------------------
def check(benchmark: Benchmark, split: str, root: str) -> int:
    """Reads a split, prints what it holds and a line for each broken sample. Returns how many are broken.

    All samples are read, or as many as are usually evaluated, if the benchmark says so.
    """
    place = f"{benchmark.name}/{split}"
    try:
        samples = open_split(benchmark, split, root)[:benchmark.usual]
    except (OSError, ValueError) as error:
        print(f"broken: {place}: {error}")
        return 1
    seen = {}
    broken = 0
    for sample in tqdm(samples, desc=place, unit="sample", disable=None):
        try:
            inspect(sample, seen)
        except BadInput as error:
            broken += 1
            tqdm.write(f"broken: {error}")
    print_counts(place, samples, seen, broken)
    return broken


def print_counts(place, samples, seen, broken):
    videos = {sample.video for sample in samples}
    masks = sum(sample.read_masks is not None for sample in samples)
    frames = sum(result[0] for result in seen.values() if isinstance(result, tuple))
    sounds = sum(seen.get(("sound", video)) is True for video in videos)
    print(f"{place}: {len(videos)} videos, {len(samples)} expressions ({masks} with masks), {frames} frames, "
          f"{sounds} sounds, {broken} broken")


def inspect(sample: Sample, seen: dict) -> None:
    """Raises BadInput for the first fault of a sample.

    seen: results and errors of reading, for other samples with the same files. Keys are ("frames", video),
    ("sound", video) and ("masks", video, *ids of the objects).
    """
    if sample.fault:
        raise BadInput(f"{sample.name}: {sample.fault}")
    if sample.make is not None:
        inspect_made(sample, seen)
        return
    _, seconds = read_once(seen, ("frames", sample.video), sample, inspect_frames, sample)
    if sample.sound is not None:
        read_once(seen, ("sound", sample.video), sample, inspect_sound, sample.sound, seconds)
    # Errors of masks name the sample, so they are not kept for other samples.
    key = ("masks", sample.video, *sample.ids)
    if sample.read_masks is not None and key not in seen:
        fitting_masks(sample)
        if sample.mended:
            raise BadInput(f"{sample.name}: {min(sample.mended)} (is resized)")
        seen[key] = True


def inspect_made(sample, seen):
    clip = load(sample)
    seen["frames", sample.video] = len(clip.frames), len(clip.frames) / clip.fps
    seen["sound", sample.video] = clip.sound is not None


def read_once(seen, key, sample, read, *arguments):
    """seen[key], filled by read(*arguments) the first time. Its error is raised for every sample."""
    if key not in seen:
        try:
            seen[key] = read(*arguments)
        except (OSError, ValueError) as error:
            seen[key] = error
    result = seen[key]
    if isinstance(result, Exception):
        problem = str(result).removeprefix(sample.name + ": ")
        raise BadInput(f"{sample.name}: {problem}")
    return result


def inspect_frames(sample):
    """(number of frames, seconds) of a video. Of a video file, only the first and the last frame are read."""
    if not sample.pictures:
        raise BadInput("no frames")
    frames, fps = open_frames(sample)
    if not sample.names:
        frames[len(frames) - 1]
        return len(frames), len(frames) / fps
    sizes = {}
    for path in sample.pictures:
        width, height = sample.read_picture(path).size
        sizes[height, width] = path
    if len(sizes) != 1:
        raise BadInput(f"frames of several sizes: {', '.join(sizes.values())}")
    size = sample.truth.get("size")
    if size is not None and size not in sizes:
        raise BadInput(f"not {size[0]} x {size[1]} pixels: {sample.pictures[0]}")
    return len(sample.names), len(sample.names) / fps


def inspect_sound(path, seconds):
    """Whether there is a sound."""
    return read_long_sound(path, seconds) is not None


# ---- show ------------------------------------------------------------------------------------------
def show(sample: Sample, out: str) -> None:
    """Writes OUT/sample.png, a sheet of the frames with the target in red, and OUT/prompt.txt."""
    clip = load(sample, most_frames=MOST_FRAMES)
    texts = [sample.name]
    for message in prompt(clip):
        for part in message["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
    os.makedirs(out, exist_ok=True)
    draw_sheet(clip).save(os.path.join(out, "sample.png"))
    with open(os.path.join(out, "prompt.txt"), "w", encoding="utf-8") as file:
        file.write("\n\n".join(texts) + "\n")


def draw_sheet(clip):
    """One picture of all frames of a clip, six in a row."""
    T = len(clip.frames)
    H, W = clip.size
    width = 240
    height = round(width * H / W)
    columns = min(T, 6)
    rows = math.ceil(T / columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for t in range(T):
        picture = draw_target(clip, t).resize((width, height))
        sheet.paste(picture, (t % columns * width, t // columns * height))
    return sheet


def draw_target(clip, t):
    """Frame t with the target's masks in red, or its true box."""
    pixels = np.array(clip.frames[t])
    if clip.masks is not None:
        tint(pixels, clip.masks[:, t].any(0))
    picture = Image.fromarray(pixels)
    if "box" in clip.truth:
        ImageDraw.Draw(picture).rectangle(clip.truth["box"], outline=(255, 40, 40), width=4)
    return picture


# ---- the program -----------------------------------------------------------------------------------
def main(arguments=None):
    parser = Parser(description=DESCRIPTION)
    parser.add_argument("action", choices=("check", "show", "mini"))
    parser.add_argument("--bench", required=True, choices=[benchmark.name for benchmark in BENCHMARKS])
    add_roots(parser)
    parser.add_argument("--split", help="check: by default all; show: by default the first")
    parser.add_argument("--index", type=at_least(0), default=0, help="show: which sample of the split")
    parser.add_argument("--videos", type=at_least(1), default=4, help="mini: how many in every split")
    parser.add_argument("--out", default="out/data", help="show: folder of the files; mini: data root")
    options = parser.parse_args(arguments)
    benchmark = find_benchmark(options.bench)
    splits = benchmark.splits
    if options.split is not None:
        if options.split not in splits:
            parser.error(f"unknown split of {benchmark.name}: {options.split} (known: {', '.join(splits)})")
        splits = (options.split,)
    try:
        root = chosen_root(benchmark, options)
        if options.action == "mini":
            root = os.path.join(options.out, benchmark.folder)
            write_mini(benchmark, root, options.videos)
            print(f"written: {root}")
        elif options.action == "show":
            samples = open_split(benchmark, splits[0], root)
            if options.index >= len(samples):
                raise BadInput(f"--index {options.index}: there are {len(samples)} samples")
            show(samples[options.index], options.out)
            print(f"written: {options.out}/sample.png, prompt.txt")
        else:
            broken = sum(check(benchmark, split, root) for split in splits)
            sys.exit(int(broken > 0))
    except (OSError, ValueError) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
