"""Checks benchmarks, shows samples, writes miniatures: `python data.py check | show | mini --bench NAME ...`

Letters: T frames, H W pixels.
"""
import math
import os
import sys
import textwrap
from dataclasses import replace

from benchmarks import (
    add_roots,
    all_names,
    check_root,
    chosen_root,
    find_benchmark,
    find_entry,
    open_split,
    split_names,
)
from trust.errors import BadInput, fail, one_line
from trust.files import writing
from trust.options import MOST_FRAMES, Parser, at_least, check_out
from trust.program import begin_program

DESCRIPTION = """check reads a dataset and names what is broken (exit code 1); show writes one sample as a
picture and its prompt; mini writes a miniature in its layout."""


# ---- options ---------------------------------------------------------------------------------------
def read_options(arguments: list[str] | None = None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=DESCRIPTION)
    parser.add_argument("action", choices=("check", "show", "mini"))
    parser.add_argument("--bench", required=True, choices=all_names(), help="the dataset")
    add_roots(parser)
    parser.add_argument("--split", help="check: by default all; show: by default the first")
    parser.add_argument("--ask", help="show: as at evaluation; refavs: by frames or by its first frame")
    parser.add_argument("--index", type=at_least(0), default=0, help="show: which sample of the split")
    parser.add_argument("--videos", type=at_least(1), default=4, help="mini: how many in every split")
    parser.add_argument("--out", metavar="DIR", default="out/data",
                        help="show: folder of the files; mini: data root")
    options = parser.parse_args(arguments)
    try:
        entry = find_entry(options.bench)
        if options.split is not None:
            split_names(entry, options.split)
        if options.action != "check":
            check_out(options.out)
        if options.action != "mini":
            check_root(entry, chosen_root(entry, options))
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return options


if __name__ == "__main__":
    begin_program()
    # A wrong option is told now: the imports below take seconds.
    read_options()

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from benchmarks.media import read_sound
from benchmarks.mini import write_mini
from benchmarks.questions import Question, frame_window, open_media, read_clip, read_subtitles
from benchmarks.references import read_reference
from benchmarks.samples import (
    Benchmark,
    Sample,
    check_length,
    check_target,
    fitting_masks,
    load,
    open_frames,
)
from data import encodable, format_time, prompt


# ---- check -----------------------------------------------------------------------------------------
def check(benchmark: Benchmark, split: str, root: str) -> int:
    """Reads a split, prints what it holds and a line for each broken sample. Returns how many are broken.

    All samples are read, or as many as are usually evaluated, if the benchmark says so. Any other error than
    BadInput is a fault of the reader: it breaks the sample, too, and its line names the kind of the error.
    """
    place = f"{benchmark.name}/{split}"
    try:
        samples = open_split(benchmark, split, root)[:benchmark.usual]
    except Exception as error:
        report(f"broken: {place}: {reason(error)}")
        return 1
    seen = {}
    broken = 0
    for sample in tqdm(samples, desc=place, unit="sample", disable=None):
        try:
            inspect(sample, seen)
        except BadInput as error:
            broken += 1
            report(f"broken: {error}")
        except Exception as error:
            broken += 1
            report(f"broken: {sample.name}: {reason(error)}")
    print_counts(place, samples, seen, broken)
    return broken


def reason(error) -> str:
    """The message of an error that was expected, else its kind as well."""
    return str(error) if isinstance(error, (OSError, BadInput)) else one_line(error)


def report(text: str) -> None:
    """Prints one line, whatever a file's name holds."""
    tqdm.write(" ".join(encodable(text).splitlines()))


def print_counts(place, samples, seen, broken):
    videos = {sample.video for sample in samples}
    masks = sum(sample.read_masks is not None for sample in samples)
    frames = sum(result[0] for result in seen.values() if isinstance(result, tuple))
    # Of each sound, what there is to say of its length.
    sounds = [result for key, result in seen.items() if key[0] == "sound" and isinstance(result, str)]
    cut = sum(result != "" for result in sounds)
    print(f"{place}: {len(videos)} videos, {len(samples)} expressions ({masks} with masks), {frames} frames, "
          f"{len(sounds)} sounds{f' ({cut} cut)' if cut else ''}, {broken} broken")


def inspect(sample: Sample, seen: dict) -> None:
    """Raises BadInput for the first fault of a sample.

    seen: results and errors of reading, for other samples with the same files. Keys are ("frames", video),
    ("sound", video), ("reference", path) and ("masks", video, *ids of the objects).
    """
    if sample.fault:
        raise BadInput(f"{sample.name}: {sample.fault}")
    if sample.make is not None:
        inspect_made(sample, seen)
        return
    if isinstance(sample, Question):
        inspect_question(sample, seen)
        return
    # They are read with the first frame, whose errors are kept for all samples of the video.
    for _, kind, path in sample.truth.get("references", ()):
        read_once(seen, ("reference", path), sample, read_reference, kind, path)
    _, seconds = read_once(seen, ("frames", sample.video), sample, inspect_frames, sample)
    if sample.sound is not None:
        read_once(seen, ("sound", sample.video), sample, inspect_sound, sample, seconds)
    # Errors of masks name the sample, so they are not kept for other samples.
    key = ("masks", sample.video, *sample.ids)
    if sample.read_masks is not None and key not in seen:
        check_target(sample, fitting_masks(sample))
        if sample.mended:
            raise BadInput(f"{sample.name}: {min(sample.mended)} (is resized)")
        seen[key] = True


def inspect_made(sample, seen):
    clip = load(sample)
    seen["frames", sample.video] = len(clip.frames), len(clip.frames) / clip.fps
    seen["sound", sample.video] = None if clip.sound is None else ""


def inspect_question(sample, seen):
    media = sample.pictures[0], sample.start, sample.end
    read_once(seen, ("frames", *media), sample, inspect_media, sample)
    if sample.sound is not None:
        read_once(seen, ("sound", *media), sample, inspect_heard, sample)
    if sample.subtitles:
        read_once(seen, ("subtitles", sample.subtitles), sample, read_subtitles, sample.subtitles)


def inspect_media(sample):
    """(number of frames, seconds) of what a question shows. Only the first and the last frame are read."""
    frames, fps = open_media(sample)
    window = frame_window(sample, len(frames), fps)
    for t in {window[0], window[-1]}:
        frames[t]
    return len(window), len(window) / fps


def inspect_heard(sample):
    clip = read_clip(sample, most_frames=1)
    return None if clip.sound is None else ""


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


def inspect_sound(sample, seconds):
    """What there is to say of the length of a sound, beside a video of `seconds`; None without a sound."""
    sound = read_sound(sample.sound)
    if sound is None:
        return None
    longer = check_length(sound, seconds, sample.sound)
    if longer:
        report(f"cut: {sample.name}: {longer}")
    return longer


# ---- show ------------------------------------------------------------------------------------------
CELL = 240      # pixels a frame is wide
TALLEST = 720   # and at most high
MARGIN = 12
INK = (25, 25, 25)
GREY = (110, 110, 110)
WHITE = (255, 255, 255)


def show(sample: Sample, out: str) -> None:
    """Writes OUT/sample.png, a sheet of the frames with the target outlined, and OUT/prompt.txt."""
    if isinstance(sample, Question):
        clip = read_clip(sample)
    else:
        clip = load(sample, most_frames=MOST_FRAMES)
    texts = [sample.name]
    for message in prompt(clip):
        for part in message["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
    for mark, _, path in sample.truth.get("references", ()):
        texts.append(f"{mark}: {path}")
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "sample.png")
    with writing(path):
        draw_sheet(clip, sample).save(path)
    path = os.path.join(out, "prompt.txt")
    with writing(path), open(path, "w", encoding="utf-8") as file:
        file.write("\n\n".join(map(encodable, texts)) + "\n")


def draw_sheet(clip, sample):
    """One picture of all frames of a clip, six in a row, and below it what the sample is."""
    T = len(clip.frames)
    H, W = clip.size
    # A single picture is larger.
    width = CELL if T > 1 else 3 * CELL
    height = min(max(1, round(width * H / W)), TALLEST)
    columns = min(T, 6)
    rows = math.ceil(T / columns)
    caption = draw_caption(clip, sample, columns * width)
    sheet = Image.new("RGB", (columns * width, rows * height + caption.height), WHITE)
    for t in range(T):
        cell = draw_target(clip, t, width, height)
        if T > 1:
            label(cell, format_time(t / clip.fps))
        sheet.paste(cell, (t % columns * width, t // columns * height))
    sheet.paste(caption, (0, rows * height))
    return sheet


def draw_target(clip, t, width, height):
    """Frame t of that size. The target keeps its colours, in a white outline with a dark edge."""
    picture = clip.frames[t].resize((width, height), Image.BICUBIC)
    if clip.masks is not None:
        mask = Image.fromarray(clip.masks[:, t].any(0)).convert("L")
        mask = mask.resize((width, height), Image.NEAREST)
        outer = mask.filter(ImageFilter.MaxFilter(7))
        outline = mask.filter(ImageFilter.MaxFilter(5))
        picture.paste(INK, mask=subtract(outer, outline))
        picture.paste(WHITE, mask=subtract(outline, mask))
    draw = ImageDraw.Draw(picture)
    H, W = clip.size
    if "box" in clip.truth:
        corners = [value * s for value, s in zip(clip.truth["box"], (width / W, height / H) * 2)]
        draw.rectangle(corners, outline=INK, width=7)
        inner = (corners[0] + 2, corners[1] + 2, corners[2] - 2, corners[3] - 2)
        draw.rectangle(inner, outline=WHITE, width=3)
    return picture


def subtract(large, small):
    """The mask of pixels that are in one mask, but not in the other; pictures of 0 and 255."""
    return Image.fromarray(np.asarray(large) - np.asarray(small))


def label(picture, text):
    """Writes a short text into the lower left corner."""
    draw = ImageDraw.Draw(picture)
    font = letters(13)
    place = (6, picture.height - 8)
    draw.text(place, text, WHITE, font, "ls", stroke_width=2, stroke_fill=INK)


def letters(size):
    """A font that has the letters of Europe. Those of other languages stand in prompt.txt only."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts/ttf")
    return ImageFont.truetype(os.path.join(folder, "DejaVuSans.ttf"), size)


def draw_caption(clip, sample, width):
    """A strip of that width with the sample's query, kind and name."""
    target = "" if clip.masks is None or clip.masks.any() else "nothing to be found"
    facts = [clip.kind, target, sample.name]
    parts = [(clip.query, 20, INK), (" · ".join(filter(None, facts)), 14, GREY)]
    strip = Image.new("RGB", (width, 1000), WHITE)
    draw = ImageDraw.Draw(strip)
    y = MARGIN
    for text, size, colour in parts:
        font = letters(size)
        for line in wrapped(text, font, width - 2 * MARGIN):
            draw.text((MARGIN, y), line, colour, font)
            y += round(1.4 * size)
    return strip.crop((0, 0, width, y + MARGIN))


def wrapped(text, font, width):
    """At most eight lines of a text that are at most so many pixels wide."""
    text = encodable(" ".join(text.split()))
    letter = font.getlength(text) / max(len(text), 1)
    # Some lines have wider letters than the whole.
    count = max(1, int(0.9 * width / max(letter, 1)))
    return textwrap.wrap(text, count, max_lines=8, placeholder=" ...")


# ---- the program -----------------------------------------------------------------------------------
def main(arguments=None):
    options = read_options(arguments)
    benchmark = find_benchmark(options.bench, options.ask)
    splits = benchmark.splits
    if options.split is not None:
        splits = split_names(benchmark, options.split)
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
            sample = samples[options.index]
            if options.ask is not None:
                sample = replace(sample, task=benchmark.task)
            show(sample, options.out)
            print(f"written: {options.out}/sample.png, prompt.txt")
        else:
            broken = sum(check(benchmark, split, root) for split in splits)
            sys.exit(int(broken > 0))
    except (OSError, ValueError) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
