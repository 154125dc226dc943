"""Broken datasets: miniatures of every layout, with one file or one field changed at a time.

    LAYOUTS -> write_layout -> find_cases -> Case.apply(root of a copy)

A copy shares its files with the original by hard links, so a file is removed before it is written. Values
that lead out of the dataset lead into the sandbox around it (see `decoys`), never to a file of the system.
"""
import csv
import io
import json
import os
import pickle
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import wavfile

from benchmarks import find_benchmark
from tests.world import write_miniature


# ---- layouts ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """One split of a benchmark. `other`: a pattern of paths that only other splits use."""
    bench: str
    split: str
    other: str = "nothing"

    @property
    def name(self) -> str:
        return f"{self.bench}-{self.split}"

    @property
    def folder(self) -> str:
        return find_benchmark(self.bench).folder


LAYOUTS = (
    Layout("revos", "train", "valid"),
    Layout("mevis", "train", "^valid"),
    Layout("mevis", "valid", "^train|^valid_u"),
    Layout("refavs", "train", "toy-[1-4]-"),
    Layout("refcoco", "train", r"^refcoco\+|^refcocog"),
    Layout("refcocog_2k_840", "train"),
    Layout("reasonseg", "train", "^val|^test"),
    Layout("reasonseg", "val", "^train|^test"),
    Layout("refdavis", "valid"),
    Layout("refytvos", "valid"),
    Layout("reasonvos", "test"),
    Layout("mevisv2", "train", "^valid"),
    Layout("omniavs", "train", "test"),
    Layout("longrvos", "train", "^valid|^test"),
    Layout("video_r1", "train"),
)
# Layouts whose first video shows not all that there is: a null clip, no cp1252, no picture.
TWO_VIDEOS = ("refavs", "reasonseg", "video_r1")


def write_layout(layout: Layout, root: Path) -> None:
    """The miniature of a layout, without the files of other splits."""
    videos = 2 if layout.bench in TWO_VIDEOS else 1
    write_miniature(find_benchmark(layout.bench), root, videos)
    for path in files_in(root):
        if re.search(layout.other, str(path.relative_to(root))):
            path.unlink()


def files_in(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def link_copy(root: Path, copy: Path) -> None:
    """A copy of a folder whose files are hard links to the original ones."""
    for folder, _, names in os.walk(root):
        place = copy / Path(folder).relative_to(root)
        place.mkdir(parents=True)
        for name in names:
            os.link(os.path.join(folder, name), place / name)


def decoys(sandbox: Path, root: Path) -> None:
    """Good files beside a dataset, for names and links that lead out of it.

    OUTSIDE/x.ENDING is a file of each kind. OUTSIDE/x and OUTSIDE/x/frames hold the dataset's own names.
    """
    outside = sandbox / "outside"
    frames = outside / "x/frames"
    frames.mkdir(parents=True)
    for path in files_in(root):
        example = outside / f"x{path.suffix}"
        for place in (example, outside / "x" / path.name, frames / path.name):
            if not place.exists():
                os.link(path, place)


# ---- cases -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One change of one file. `field`: where in its record; "" for the file as a whole."""
    layout: Layout
    file: str
    field: str
    kind: str
    change: Callable     # (path of the file) -> None

    @property
    def name(self) -> str:
        return f"{self.layout.name} {self.file} {self.field}: {self.kind}"

    def apply(self, root: Path) -> None:
        self.change(root / self.file)


def find_cases(layout: Layout, root: Path) -> list[Case]:
    """All cases of the layout whose miniature lies at `root`."""
    cases = []
    for path in one_of_each(root):
        file = str(path.relative_to(root))
        for kind, change in file_changes(path):
            cases.append(Case(layout, file, "", kind, change))
        for field, kind, change in field_changes(path):
            cases.append(Case(layout, file, field, kind, change))
    return cases


def one_of_each(root: Path) -> list[Path]:
    """The first and the last file of each role: names that differ only in digits have one."""
    roles = {}
    for path in files_in(root):
        role = re.sub(r"\d+", "N", str(path.relative_to(root)))
        roles.setdefault(role, []).append(path)
    chosen = []
    for paths in roles.values():
        chosen += sorted({paths[0], paths[-1]})
    return chosen


# ---- a file as a whole -----------------------------------------------------------------------------
def write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def rewrite(path: Path, change: Callable) -> None:
    """change: bytes -> bytes"""
    write(path, change(path.read_bytes()))


def made(change: Callable) -> Callable:
    """A change of a file by what it does to the bytes."""
    return partial(rewrite, change=change)


def instead(path: Path, make: Callable, *arguments) -> None:
    """Something else than a file: make(path, *arguments)."""
    path.unlink()
    make(path, *arguments)


def link_to_decoy(path: Path) -> None:
    path.unlink()
    path.symlink_to(outside_of(path) / f"x{path.suffix}")


def link_to_copy(path: Path) -> None:
    """The good file lies elsewhere, as where datasets are linked together."""
    target = outside_of(path) / f"same{path.suffix}"
    target.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)


def outside_of(path: Path) -> Path:
    """The folder of decoys of the sandbox that a file is in."""
    return next(folder / "outside" for folder in path.parents if (folder / "outside").is_dir())


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def forbid(path: Path) -> None:
    rewrite(path, bytes)
    path.chmod(0)


ANY_FILE = {
    "missing": Path.unlink,
    "empty": made(lambda content: b""),
    "half": made(lambda content: content[:len(content) // 2]),
    "without its last byte": made(lambda content: content[:-1]),
    "without its first byte": made(lambda content: content[1:]),
    "zero bytes": made(lambda content: bytes(len(content))),
    "zero bytes at the end": made(lambda content: content + bytes(1000)),
    "noise": made(lambda content: noise(len(content))),
    "noise in the middle": made(lambda content: spoiled(content, len(content) // 2, 16)),
    "noise after the head": made(lambda content: spoiled(content, 16, 16)),
    "twice": made(lambda content: content + content),
    "a line of text": made(lambda content: b"version https://git-lfs.github.com/spec/v1\n"),
    "a page": made(lambda content: b"<!DOCTYPE html><html><body>404</body></html>"),
    "a folder": partial(instead, make=Path.mkdir),
    "a pipe": partial(instead, make=os.mkfifo),
    "a link to nothing": partial(instead, make=lambda path: path.symlink_to("nothing")),
    "a link to itself": partial(instead, make=lambda path: path.symlink_to(path.name)),
    "a link to its folder": partial(instead, make=lambda path: path.symlink_to(".")),
    "a link to a device": partial(instead, make=lambda path: path.symlink_to("/dev/zero")),
    "a link to another file": link_to_decoy,
    "a link to its copy": link_to_copy,
}
if os.getuid() != 0:
    ANY_FILE["unreadable"] = forbid


def spoiled(content: bytes, start: int, size: int) -> bytes:
    return content[:start] + noise(size) + content[start + size:]


def file_changes(path: Path) -> Iterator[tuple]:
    """(kind, change) for a file, by its ending."""
    changes = dict(ANY_FILE)
    if path.suffix == ".json":
        changes |= TEXTS | JSONS
    elif path.suffix == ".csv":
        changes |= TEXTS | TABLES
    elif path.suffix == ".p":
        changes |= PICKLES
    elif path.suffix in (".jpg", ".png"):
        changes |= PICTURES
    elif path.suffix == ".wav":
        changes |= SOUNDS
    elif path.suffix == ".avi":
        changes |= VIDEOS
    yield from changes.items()


# ---- text ------------------------------------------------------------------------------------------
def encode_again(path: Path, encoding: str) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    write(path, text.encode(encoding, "replace"))


TEXTS = {
    "with a byte order mark": partial(encode_again, encoding="utf-8-sig"),
    "utf-16": partial(encode_again, encoding="utf-16"),
    "utf-16 without a mark": partial(encode_again, encoding="utf-16-le"),
    "utf-32": partial(encode_again, encoding="utf-32"),
    "utf-7": partial(encode_again, encoding="utf-7"),
    "ebcdic": partial(encode_again, encoding="cp500"),
    "a byte of latin-1": made(lambda content: content.replace(b"the", b"th\xe9", 1)),
    "lines end in CRLF": made(lambda content: content.replace(b"\n", b"\r\n") + b"\r\n"),
    "nul bytes between": made(lambda content: content.replace(b",", b",\0", 3)),
}
JSONS = {
    "null": made(lambda content: b"null"),
    "a list": made(lambda content: b"[" + content + b"]"),
    "an empty list": made(lambda content: b"[]"),
    "an empty object": made(lambda content: b"{}"),
    "a number": made(lambda content: b"1e999"),
    "a million brackets": made(lambda content: b"[" * 1_000_000),
    "a number of 100,000 digits": made(lambda content: b"9" * 100_000),
    "a comma at the end": made(lambda content: content[:-1] + b"," + content[-1:]),
    "a remark": made(lambda content: b"// made by hand\n" + content),
    "json lines": made(lambda content: content + b"\n" + content),
}
TABLES = {
    "without its header": made(lambda content: content.partition(b"\n")[2]),
    "nothing but its header": made(lambda content: content.partition(b"\n")[0] + b"\n"),
    "semicolons": made(lambda content: content.replace(b",", b";")),
    "an open quote": made(lambda content: content.replace(b"The", b'"The', 1)),
    "an open quote in a cell": made(lambda content: content.replace(b",The", b',"The', 1)),
    "a cell of a megabyte": made(lambda content: content.replace(b"The", b"T" * 10**6, 1)),
    "blank lines": made(lambda content: content.replace(b"\n", b"\n\n")),
    "carriage returns": made(lambda content: content.replace(b"\r\n", b"\r")),
}


class Payload:
    """A pickle of it would make a file in the sandbox."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_payload(path: Path) -> None:
    write(path, pickle.dumps([Payload(str(outside_of(path) / "payload"))], protocol=2))


PICKLES = {
    "a payload": write_payload,
    "a set": made(lambda content: pickle.dumps({1, 2})),
    "no list": made(lambda content: pickle.dumps({"refs": 3})),
    "protocol 0": made(lambda content: pickle.dumps(pickle.loads(content), protocol=0)),
    "protocol 5": made(lambda content: pickle.dumps(pickle.loads(content), protocol=5)),
    "protocol 99": made(lambda content: b"\x80\x63" + content[2:]),
    "a text of a terabyte": made(lambda content: b"\x80\x04\x8d" + struct.pack("<Q", 2**40)),
    "a memo of 2^31": made(lambda content: b"\x80\x02]r\xff\xff\xff\x7f."),
    "a list in itself": made(lambda content: b"\x80\x02]q\x00h\x00a."),
    "doubled 40 times": made(lambda content: b"\x80\x02]q\x00" + b"(h\x00h\x00l" * 40 + b"."),
}


# ---- pictures --------------------------------------------------------------------------------------
def redraw(path: Path, form: str | None = None, change: Callable | None = None, **options) -> None:
    """The same picture, changed, and perhaps in another format. Its name stays."""
    with Image.open(path) as picture:
        form = form or picture.format
        picture.load()
    if change is not None:
        picture = change(picture)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    write(path, buffer.getvalue())


def drawn(form: str, change: Callable, **options) -> Callable:
    return partial(redraw, form=form, change=change, **options)


def resized(width: int, height: int, picture):
    return picture.resize((width, height))


def to_16_bit(picture):
    return Image.fromarray(np.array(picture.convert("L")).astype(np.uint16) * 257)


def chunked(tag: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with a right checksum."""
    body = tag + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def lying_png(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG whose header promises a picture that is not there."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunked(b"IHDR", header)
    return start + chunked(b"IDAT", content) + chunked(b"IEND", b"")


def wordy_png(content: bytes) -> bytes:
    """A good PNG with 200 MB of compressed text."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(buffer, "png")
    good = buffer.getvalue()
    text = b"word\0\0" + zlib.compress(bytes(200_000_000), 9)
    return good[:33] + chunked(b"zTXt", text) + good[33:]


def save_frames(path: Path, form: str) -> None:
    with Image.open(path) as picture:
        first = picture.convert("RGB")
    second = Image.new("RGB", first.size)
    redraw(path, form=form, change=lambda _: first, save_all=True, append_images=[second])


PICTURES = {
    "one pixel": partial(redraw, change=partial(resized, 1, 1)),
    "one line": partial(redraw, change=partial(resized, 128, 1)),
    "one column": partial(redraw, change=partial(resized, 1, 5000)),
    "larger": partial(redraw, change=partial(resized, 160, 130)),
    "on its side": partial(redraw, change=partial(resized, 96, 128)),
    "turned": partial(redraw, change=lambda picture: picture.transpose(Image.ROTATE_90)),
    "grey": partial(redraw, change=lambda picture: picture.convert("L")),
    "1 bit": drawn("png", lambda picture: picture.convert("1")),
    "16 bits": drawn("png", to_16_bit),
    "32 bits": drawn("tiff", lambda picture: picture.convert("I")),
    "float": drawn("tiff", lambda picture: picture.convert("F")),
    "alpha": drawn("png", lambda picture: picture.convert("RGBA")),
    "grey with alpha": drawn("png", lambda picture: picture.convert("LA")),
    "all in alpha": drawn("png", lambda picture: Image.new("RGBA", picture.size, (0, 0, 0, 0))),
    "palette": drawn("png", lambda picture: picture.convert("RGB").quantize(8)),
    "colours": drawn("png", lambda picture: picture.convert("RGB")),
    "four inks": drawn("jpeg", lambda picture: picture.convert("CMYK")),
    "lab": drawn("tiff", lambda picture: Image.new("LAB", picture.size)),
    "black": partial(redraw, change=lambda picture: Image.new(picture.mode, picture.size)),
    "white": partial(redraw, change=lambda picture: Image.new("L", picture.size, 255)),
    "object 200": drawn("png", lambda picture: Image.new("L", picture.size, 200)),
    "a bitmap": drawn("bmp", lambda picture: picture.convert("RGB")),
    "webp": drawn("webp", lambda picture: picture.convert("RGB")),
    "gif": drawn("gif", lambda picture: picture.convert("RGB")),
    "postscript": drawn("eps", lambda picture: picture.convert("RGB")),
    "an icon": drawn("ico", lambda picture: picture.convert("RGB")),
    "a pdf": drawn("pdf", lambda picture: picture.convert("RGB")),
    "targa": drawn("tga", lambda picture: picture.convert("RGB")),
    "pixmap": drawn("ppm", lambda picture: picture.convert("RGB")),
    "two frames": partial(save_frames, form="gif"),
    "two pages": partial(save_frames, form="tiff"),
    "a header of 20000 x 20000": made(lambda content: lying_png(20000, 20000)),
    "a header of 0 x 0": made(lambda content: lying_png(0, 0)),
    "a header of 2^31 x 1": made(lambda content: lying_png(2**31 - 1, 1)),
    "a header of 12000 x 12000": made(lambda content: lying_png(12000, 12000)),
    "a header of its size": made(lambda content: lying_png(128, 128, b"nothing")),
    "200 MB of text": made(wordy_png),
    "turned by exif": drawn("jpeg", lambda picture: picture.convert("RGB"),
                            exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "broken exif": drawn("jpeg", lambda picture: picture.convert("RGB"),
                         exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + noise(40)),
}


# ---- sounds ----------------------------------------------------------------------------------------
def wave_bytes(rate=16000, channels=1, bits=16, form=1, data=b"", promised=None, block=None) -> bytes:
    """A wav file, whose header may lie. promised: bytes of data by the header."""
    if block is None:
        block = channels * bits // 8
    size = len(data) if promised is None else promised
    head = struct.pack("<HHIIHH", form, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def resound(path: Path, rate=16000, change: Callable | None = None) -> None:
    """The same sound at another rate, or changed."""
    _, sound = wavfile.read(path)
    if change is not None:
        sound = change(sound)
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, sound)
    write(path, buffer.getvalue())


def with_header(**header) -> Callable:
    return made(lambda content: wave_bytes(data=content[44:], **header))


def filled(kind, value) -> Callable:
    """A sound of ten seconds with one odd number in the middle."""
    def change(sound):
        odd = sound.astype(kind) / 32768
        odd[len(odd) // 2] = value
        return odd
    return partial(resound, change=change)


SOUNDS = {
    "8 kHz": partial(resound, rate=8000),
    "44.1 kHz": partial(resound, rate=44100),
    "16001 Hz": partial(resound, rate=16001),
    "1 Hz": with_header(rate=1),
    "0 Hz": with_header(rate=0),
    "2^31 - 1 Hz": with_header(rate=2**31 - 1),
    "2^32 - 1 Hz": with_header(rate=2**32 - 1),
    "a prime rate": with_header(rate=15_999_989),
    "stereo": partial(resound, change=lambda sound: np.stack([sound, sound], 1)),
    "8 channels": partial(resound, change=lambda sound: np.stack([sound] * 8, 1)),
    "0 channels": with_header(channels=0),
    "65535 channels": with_header(channels=65535),
    "8 bits": partial(resound, change=lambda sound: (sound // 256 + 128).astype(np.uint8)),
    "24 bits": with_header(bits=24),
    "32 bits": partial(resound, change=lambda sound: sound.astype(np.int32) * 65536),
    "64 bits": partial(resound, change=lambda sound: sound.astype(np.int64)),
    "0 bits": with_header(bits=0),
    "7 bits": with_header(bits=7),
    "65528 bits": with_header(bits=65528),
    "float": partial(resound, change=lambda sound: (sound / 32768).astype(np.float32)),
    "double": partial(resound, change=lambda sound: sound / 32768),
    "NaN": filled(np.float32, np.nan),
    "infinite": filled(np.float32, np.inf),
    "1e300": filled(np.float64, 1e300),
    "1e38": filled(np.float32, 1e38),
    "silence": partial(resound, change=np.zeros_like),
    "no samples": partial(resound, change=lambda sound: sound[:0]),
    "one sample": partial(resound, change=lambda sound: sound[:1]),
    "a hundred samples": partial(resound, change=lambda sound: sound[:100]),
    "half as long": partial(resound, change=lambda sound: sound[:len(sound) // 2]),
    "20 times as long": partial(resound, change=lambda sound: np.tile(sound, 20)),
    "more promised": with_header(promised=2**32 - 1),
    "2 GiB promised": with_header(promised=2**31),
    "nothing promised": with_header(promised=0),
    "an odd number promised": with_header(promised=12345),
    "blocks of 0": with_header(block=0),
    "blocks of 65535": with_header(block=65535),
    "mp3 inside": with_header(form=85),
    "a-law": with_header(form=6, bits=8),
    "an unknown format": with_header(form=0x1234),
    "big-endian": made(lambda content: b"RIFX" + content[4:]),
    "rf64": made(lambda content: b"RF64" + content[4:]),
    "no data": made(lambda content: content[:36]),
    "no format": made(lambda content: content[:12] + content[36:]),
    "an endless list": made(lambda content: content[:12] + b"LIST\0\0\0\0" * 10000),
}


# ---- videos ----------------------------------------------------------------------------------------
def patched(mark: bytes, offset: int, form: str, *values) -> Callable:
    """Other numbers at some bytes after the first `mark`."""
    def change(content):
        start = content.index(mark) + len(mark) + offset
        new = struct.pack(form, *values)
        return content[:start] + new + content[start + len(new):]
    return made(change)


VIDEOS = {
    # In avih: microseconds a frame at 4, frames at 20, width and height at 36. In strh: scale and rate at 24,
    # length at 36. In the picture's format: width and height at 8.
    "no time a frame": patched(b"avih", 4, "<I", 0),
    "no frames": patched(b"avih", 20, "<I", 0),
    "2^31 frames": patched(b"avih", 20, "<I", 2**31 - 1),
    "0 x 0 by its header": patched(b"avih", 36, "<II", 0, 0),
    "100000 x 100000 by its header": patched(b"avih", 36, "<II", 100_000, 100_000),
    "scale 0": patched(b"strh", 24, "<I", 0),
    "rate 0": patched(b"strh", 28, "<I", 0),
    "rate 2^31": patched(b"strh", 28, "<I", 2**31 - 1),
    "1000 frames a second": patched(b"strh", 28, "<I", 1000),
    "a frame an hour": patched(b"strh", 24, "<II", 3600, 1),
    "length 0": patched(b"strh", 36, "<I", 0),
    "length 2^31": patched(b"strh", 36, "<I", 2**31 - 1),
    "0 x 0": patched(b"strf", 8, "<ii", 0, 0),
    "-128 x -128": patched(b"strf", 8, "<ii", -128, -128),
    "30000 x 30000": patched(b"strf", 8, "<ii", 30_000, 30_000),
    "an unknown codec": made(lambda content: content.replace(b"MJPG", b"XYZW")),
    "another codec": made(lambda content: content.replace(b"MJPG", b"H264")),
    "no pictures": made(lambda content: content.replace(b"00dc", b"00xx")),
    "no sound": made(lambda content: content.replace(b"01wb", b"01xx")),
    "two streams of sound": made(lambda content: content.replace(b"vids", b"auds")),
    "a broken picture": made(lambda content: spoiled(content, content.index(b"00dc") + 8, 600)),
    "the last picture broken": partial(
        rewrite, change=lambda content: spoiled(content, content.rindex(b"00dc") + 8, 600)),
    "a sound of 65535 channels": made(lambda content: loud(content, 2, 65535, "<H")),
    "a sound of 0 Hz": made(lambda content: loud(content, 4, 0, "<I")),
    "a sound of 2^31 Hz": made(lambda content: loud(content, 4, 2**31 - 1, "<I")),
    "a picture": made(lambda content: content[content.index(b"\xff\xd8"):]),
}


def loud(content: bytes, offset: int, value: int, form: str) -> bytes:
    """Another number in the format of the sound: its second "strf"."""
    start = content.rindex(b"strf") + 8 + offset
    new = struct.pack(form, value)
    return content[:start] + new + content[start + len(new):]


# ---- fields of records -----------------------------------------------------------------------------
OUTSIDE = "<outside>"        # becomes the path of the decoys
STRINGS = {
    "empty text": "",
    "blank text": " \n\t",
    "words": "some words",
    "digits": "12",
    "a square": "²",
    "arabic digits": "٣",
    "half a character": "\ud83d",
    "right to left": "\u202eתמונה",
    "an escape": "\x1b[2J",
    "a nul byte": "a\0b",
    "a line break": "a\nbroken: b",
    "leaves": "../../../../../outside/x",
    "climbs": "..",
    "stays": ".",
    "slash": "a/b",
    "ends in a slash": "a/",
    "backslash": "..\\x",
    "leaves, in three parts": "../../../../../outside/x_a_1",
    "absolute": OUTSIDE + "/x",
    "absolute, a picture": OUTSIDE + "/x.jpg",
    "absolute, a video": OUTSIDE + "/x.avi",
    "a pattern": "*[0-9]?",
    "chat tokens": "<|im_end|><|VIDEO|><answer>",
    "braces": "{query} {0} %s",
    "long": "x" * 100_000,
    "300 letters": "ü" * 300,
}
VALUES = STRINGS | {
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "seven": 7,
    "half": 0.5,
    "a billion": 10**9,
    "minus a billion": -10**9,
    "1e18": 10**18,
    "1e300": 1e300,
    "10**400": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "empty list": [],
    "empty object": {},
    "list of null": [None],
    "list of lists": [[]],
    "list of NaN": [float("nan")] * 6,
    "list of billions": [10**9] * 6,
    "list of texts": ["a", "b"],
    "an object": {"a": 1},
    "many": list(range(10_000)),
}


def field_changes(path: Path) -> Iterator[tuple]:
    """(field, kind, change) for a file of records."""
    if path.suffix == ".json":
        yield from tree_changes(load_json, dump_json, load_json(path))
    elif path.suffix == ".jsonl":
        yield from tree_changes(load_lines, dump_lines, load_lines(path))
    elif path.suffix == ".p":
        yield from tree_changes(load_pickle, dump_pickle, load_pickle(path))
    elif path.suffix == ".csv":
        yield from table_changes(path)
    elif path.suffix == ".parquet":
        for field, kind, change in tree_changes(load_parquet, dump_parquet, load_parquet(path)):
            if can_be_dumped(path, change):
                yield field, kind, change


def load_json(path):
    return json.loads(path.read_bytes().decode("utf-8", "replace"))


def dump_json(path, record):
    # A key that comes twice cannot stand in a dict: it has a mark until here.
    text = json.dumps(record).replace(TWICE, "")
    write(path, text.encode())


def load_lines(path):
    return [json.loads(line) for line in path.read_bytes().decode("utf-8", "replace").splitlines()]


def dump_lines(path, records):
    lines = [json.dumps(record).replace(TWICE, "") for record in records]
    write(path, "\n".join(lines).encode())


def load_pickle(path):
    return pickle.loads(path.read_bytes())


def dump_pickle(path, record):
    write(path, pickle.dumps(record, protocol=2))


def load_parquet(path):
    from pyarrow import parquet
    return parquet.read_table(path).to_pylist()


def dump_parquet(path, record):
    """Raises what pyarrow raises for values that a table cannot hold."""
    import pyarrow
    from pyarrow import parquet
    table = pyarrow.Table.from_pylist(record)
    content = io.BytesIO()
    parquet.write_table(table, content)
    write(path, content.getvalue())


def can_be_dumped(path, change) -> bool:
    """Whether a table can hold the changed value."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        (Path(folder) / "outside").mkdir()
        try:
            change(copy)
        except Exception:
            return False
    return True


TWICE = "(twice)"


def tree_changes(load: Callable, dump: Callable, record) -> Iterator[tuple]:
    """Changes of every node of a tree of dicts and lists, of which each role comes once.

    load: path -> record. dump: (path, record) -> None.
    """
    def change(trail, edit):
        return partial(edit_file, load=load, dump=dump, trail=trail, edit=edit)

    for field, trail, parent in nodes(record):
        for kind, value in VALUES.items():
            yield field, kind, change(trail, partial(replace_node, value))
        yield field, "removed", change(trail, remove_node)
        yield field, "twice", change(trail, double_node)
        if isinstance(parent, dict) and is_map(parent):
            for kind, key in STRINGS.items():
                yield field, f"its name: {kind}", change(trail, partial(rename_node, key))


def nodes(value, field="", trail=()) -> Iterator[tuple]:
    """(field, trail, parent) of every node below: of each dict all fields, of lists and maps one entry."""
    if isinstance(value, dict):
        entries = list(value.items())
        if is_map(value):
            entries = entries[:1]
    elif isinstance(value, list):
        # Null stands for an empty mask, and has no fields.
        full = [i for i, entry in enumerate(value) if entry is not None]
        entries = [(i, value[i]) for i in full[:1]]
    else:
        return
    for key, entry in entries:
        one = isinstance(value, list) or is_map(value)
        name = f"{field}.{'*' if one else key}"
        yield name, (*trail, key), value
        yield from nodes(entry, name, (*trail, key))


def is_map(record: dict) -> bool:
    """Whether the keys of a dict are ids, not names of fields: then they have digits."""
    return any(re.search(r"\d", key) for key in record)


def edit_file(path, load, dump, trail, edit):
    record = load(path)
    parent = record
    for key in trail[:-1]:
        parent = parent[key]
    edit(parent, trail[-1], outside_of(path))
    dump(path, record)


def replace_node(value, parent, key, outside):
    parent[key] = placed(value, outside)


def placed(value, outside):
    """The value, with the true path of the decoys."""
    return value.replace(OUTSIDE, str(outside)) if isinstance(value, str) else value


def remove_node(parent, key, outside):
    del parent[key]


def double_node(parent, key, outside):
    if isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key + TWICE] = parent[key]


def rename_node(name, parent, key, outside):
    parent[placed(name, outside)] = parent.pop(key)


# ---- tables ----------------------------------------------------------------------------------------
def table_changes(path: Path) -> Iterator[tuple]:
    """Changes of one cell of every column of a csv, of a row, and of the header."""
    header, *rows = read_rows(path)
    numbers = {"negative": "-1", "huge": "9" * 400, "NaN": "NaN", "null": "null", "half": "0.5"}
    for column, name in enumerate(header):
        for kind, value in (STRINGS | numbers).items():
            for row in (0, 1):
                where = name if row else f"header {name}"
                yield where, kind, partial(edit_rows, edit=partial(replace_cell, row, column, value))
        for kind, edit in (("cell removed", remove_cell), ("cell twice", double_cell)):
            yield name, kind, partial(edit_rows, edit=partial(edit, 1, column))
        yield name, "column removed", partial(edit_rows, edit=partial(remove_column, column))
    yield "row", "twice", partial(edit_rows, edit=lambda rows, outside: rows.insert(2, rows[1]))
    yield "row", "removed", partial(edit_rows, edit=lambda rows, outside: rows.pop(1))
    yield "row", "empty", partial(edit_rows, edit=lambda rows, outside: rows[1].clear())


def read_rows(path):
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def edit_rows(path, edit):
    rows = read_rows(path)
    edit(rows, outside_of(path))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write(path, text.getvalue().encode("utf-8", "surrogatepass"))


def replace_cell(row, column, value, rows, outside):
    rows[row][column] = placed(value, outside)


def remove_cell(row, column, rows, outside):
    del rows[row][column]


def double_cell(row, column, rows, outside):
    rows[row].insert(column, rows[row][column])


def remove_column(column, rows, outside):
    for row in rows:
        del row[column]
