"""Media files: videos, folders of frames, pictures, sounds.

A broken file raises BadInput that names it, and so does one whose header claims more than these limits: it is
refused before memory is taken. Letters: T frames, H W pixels.
"""
import io
import math
import os
import re
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import wavfile
from scipy.signal import resample_poly

from data import FPS, SAMPLE_RATE, Clip, Frames, check_text
from trust.errors import BadInput, one_line
from trust.files import check_file

# Pillow could open more kinds. For some of them it starts other programs.
PICTURE_KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PICTURE_NAMES = (".jpg", ".jpeg", ".png")

# Pillow warns beyond it: one such picture takes a quarter of a GB. 8K video has 33 million pixels.
MOST_PIXELS = 1024 ** 3 // 12
# 18 hours at 30 frames a second.
MOST_VIDEO_FRAMES = 2_000_000
# From a picture every 100 seconds to the fastest cameras.
LEAST_FPS = 0.01
MOST_FPS = 1000

# Seconds; what follows is not read. At 25 tokens a second, these fill the 32,768 positions of Qwen2.5-Omni.
LONGEST_SOUND = 1200
# Seconds by which a sound and its video may differ.
SOUND_SLACK = 0.5
# Hz. No recorder is slower or faster, and resampling takes memory that grows with the rate.
LEAST_RATE = 1000
MOST_RATE = 768_000
# Of a rate to SAMPLE_RATE, as a fraction: the filter has 20 times as many numbers. 192 kHz has 12 steps.
MOST_STEPS = 50_000
# Ambisonics of the seventh order has as many.
MOST_CHANNELS = 64
# Numbers in all channels: 1 GB while it is resampled. LONGEST_SOUND has 115 million at 48 kHz in stereo.
MOST_SAMPLES = 2 ** 27
# Parts of a wav file before its samples. Real files have a handful.
MOST_CHUNKS = 1000
# Bytes. Programs that write wav files into a pipe do not know their size, and claim this or more.
UNKNOWN_SIZE = 0x7FFFF000
# Far beyond [-1, 1], but some files hold floats in units of 16 bits. Squares of much larger ones overflow.
LOUDEST = 1e6


# ---- any file --------------------------------------------------------------------------------------
def check_readable(kind: str, path) -> None:
    """check_file, whose errors become a BadInput: "cannot read KIND: ..." """
    try:
        check_file(path)
    except (OSError, BadInput) as error:
        raise BadInput(f"cannot read {kind}: {error}") from None


@contextmanager
def decoding(kind: str, path, problem=""):
    """Turns any error inside into a BadInput: "cannot read KIND: PATH (PROBLEM)".

    For decoders, which raise many kinds of errors over broken files. problem: by default the error itself.
    """
    try:
        yield
    except BadInput as error:
        raise BadInput(f"cannot read {kind}: {path} ({error})") from None
    except Exception as error:
        raise BadInput(f"cannot read {kind}: {path} ({problem or one_line(error)})") from None


def import_decord():
    """decord, without what ffmpeg would print. It loads ffmpeg, so it is imported only where it is needed."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    return decord


@contextmanager
def quiet():
    """Hides what decord prints. It writes to the process's stderr and knows nothing of Python's."""
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def check_pixels(size: tuple) -> None:
    """Raises BadInput for a picture of more than MOST_PIXELS; size: (width, height)."""
    width, height = size
    if width * height > MOST_PIXELS:
        raise BadInput(f"{width} x {height} pixels, more than {MOST_PIXELS}")


# ---- videos ----------------------------------------------------------------------------------------
def open_video(path) -> tuple[Frames, float]:
    """Frames and fps of a video file, of a folder of numbered pictures, or of one picture (at 2 fps).

    Raises FileNotFoundError for a missing path and BadInput for one without readable frames. Later frames are
    read on demand: one that cannot be decoded, or has another size than the first, raises BadInput then.
    """
    if os.path.isdir(path):
        return open_folder(path), FPS
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such video file or folder of frames: {path}")
    check_readable("video", path)
    if is_picture(path):
        read_image(path)
        return Frames(read_image, [path]), FPS
    check_avi(path)
    decord = import_decord()

    def read(t):
        with decoding("video", path, f"frame {t} cannot be decoded"):
            return rgb_picture(video[t].asnumpy())

    with decoding("video", path, "no video stream in it that decord can decode"), quiet():
        video = decord.VideoReader(path)
        T = len(video)
        fps = float(video.get_avg_fps())
        # NaN fails the comparison.
        if not LEAST_FPS <= fps <= MOST_FPS or T > MOST_VIDEO_FRAMES:
            raise BadInput(f"it claims {T} frames at {fps} a second")
    first = read(0)
    with decoding("video", path):
        check_pixels(first.size)
    return Frames(read, range(T)), fps


def check_avi(path) -> None:
    """Raises BadInput where the header of an AVI file claims more frames than the file has bytes.

    decord takes memory for as many as are claimed, and ends the process where that does not suffice.
    """
    with open(path, "rb") as file:
        head = file.read(2 ** 16)
        size = os.fstat(file.fileno()).st_size
    if head[8:12] != b"AVI ":
        return
    # The kind of a stream stands 4 bytes after the tag of its header, the number of frames 36 bytes after.
    for match in re.finditer(b"strh....vids", head, re.DOTALL):
        frames = int.from_bytes(head[match.start() + 40:match.start() + 44], "little")
        if frames > size:
            raise BadInput(f"cannot read video: {path} (it claims {frames} frames in {size} bytes)")


def is_picture(path) -> bool:
    return path.lower().endswith(PICTURE_NAMES)


def rgb_picture(pixels) -> Image.Image:
    """The picture of a frame as decord gives it, uint8 [H, W, channels].

    For some narrow videos, decord 0.6 takes the padding at the end of lines for more channels. The first
    W x 3 numbers of a line are always its pixels.
    """
    height, width = pixels.shape[:2]
    lines = pixels.reshape(height, -1)[:, :3 * width]
    return Image.fromarray(lines.reshape(height, width, 3))


def open_folder(path) -> Frames:
    """The .jpg and .png pictures of a folder, in the order of the numbers in their names."""
    # Hidden files are no frames: macOS puts one beside every file.
    entries = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
    names = [name for name in entries if is_picture(name)]
    if not names:
        others = f" (it holds {entries[0]}; name one video, or one folder of frames)" if entries else ""
        raise BadInput(f"no .jpg or .png frames in folder: {path}{others}")

    def numbers(name):
        return [int(digits) for digits in re.findall(r"\d+", name)], name

    # 2.png comes before 10.png.
    names.sort(key=numbers)
    size = read_image(os.path.join(path, names[0])).size

    def read(name):
        file = os.path.join(path, name)
        picture = read_image(file)
        if picture.size != size:
            raise BadInput(f"frame of {picture.size} pixels, but the first has {size}: {file}")
        return picture

    return Frames(read, names)


# ---- pictures --------------------------------------------------------------------------------------
def read_image(path, mode: str | None = "RGB", kind="image", content=None) -> Image.Image:
    """A picture in a mode of Pillow; None: as it is stored. Raises BadInput naming what cannot be decoded.

    kind: what it is, for messages. content: an open file in place of the one at `path`.
    """
    if content is None:
        check_readable(kind, path)
    with decoding(kind, path), warnings.catch_warnings():
        # Pillow warns of many pixels, which are refused below, and of oddities that do no harm.
        warnings.simplefilter("ignore")
        with Image.open(content or path, formats=PICTURE_KINDS) as picture:
            check_pixels(picture.size)
            return picture.convert(mode) if mode else picture.copy()


# ---- sounds ----------------------------------------------------------------------------------------
def read_sound(path, longest: float = LONGEST_SOUND) -> np.ndarray | None:
    """Mono float32 sound at 16 kHz of a wav file, or of a video file's soundtrack (None if it has none).

    longest: seconds of it that are read, at most LONGEST_SOUND. Raises BadInput naming a file that is missing
    or cannot be decoded.
    """
    check_readable("sound", path)
    longest = min(longest, LONGEST_SOUND)
    if not path.lower().endswith(".wav"):
        return sound_of_video(path, longest)
    with decoding("sound", path):
        rate, sound = read_wav(path, longest)
        check_samples(sound)
        # 8-bit wav is unsigned around 128; the other whole numbers are signed.
        if sound.dtype == np.uint8:
            sound = (sound.astype(np.float32) - 128) / 128
        elif sound.dtype.kind == "i":
            sound = sound / -float(np.iinfo(sound.dtype).min)
        if sound.ndim == 2:
            sound = sound.mean(axis=1)
        common = math.gcd(rate, SAMPLE_RATE)
        return resample_poly(sound, SAMPLE_RATE // common, rate // common).astype(np.float32)


def check_samples(sound) -> None:
    """Raises BadInput where a float is no sample of a sound."""
    # NaN fails the comparison.
    if sound.dtype.kind == "f" and not (abs(sound) <= LOUDEST).all():
        raise BadInput(f"a sample is not between {-LOUDEST:g} and {LOUDEST:g}")


def read_wav(path, longest) -> tuple[int, np.ndarray]:
    """(rate, samples as stored, [N] or [N, channels]) of the first `longest` seconds of a wav file."""
    with open(path, "rb") as file:
        form, size = read_wav_header(file)
        _, channels, rate, _, block, _ = struct.unpack("<HHIIHH", form[:16])
        if not LEAST_RATE <= rate <= MOST_RATE:
            raise BadInput(f"its rate is {rate} Hz, not {LEAST_RATE} to {MOST_RATE}")
        if rate // math.gcd(rate, SAMPLE_RATE) > MOST_STEPS:
            raise BadInput(f"its rate of {rate} Hz has too little in common with {SAMPLE_RATE} Hz")
        if not 1 <= channels <= MOST_CHANNELS:
            raise BadInput(f"it has {channels} channels, not 1 to {MOST_CHANNELS}")
        # The longest kind of number has 8 bytes.
        if not channels <= block <= 8 * channels:
            raise BadInput(f"a sample of its {channels} channels has {block} bytes")
        frames = min(size // block, math.ceil(longest * rate))
        if frames * channels > MOST_SAMPLES:
            raise BadInput(f"it has {frames * channels} samples, more than {MOST_SAMPLES}")
        content = file.read(frames * block)
    # scipy sees a file of what is needed, without what else the file claims.
    chunks = b"WAVE" + wav_chunk(b"fmt ", form) + wav_chunk(b"data", content)
    return wavfile.read(io.BytesIO(wav_chunk(b"RIFF", chunks)))


def read_wav_header(file) -> tuple[bytes, int]:
    """(its format, bytes of its samples) of an open wav file, which is left where the samples begin."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise BadInput("no wav file")
    form = b""
    for _ in range(MOST_CHUNKS):
        tag, size = struct.unpack("<4sI", file.read(8))
        if tag == b"data":
            break
        start = file.tell()
        if tag == b"fmt ":
            # No form is longer.
            form = file.read(min(size, 40))
        # Chunks begin at even places.
        file.seek(start + size + size % 2)
    else:
        raise BadInput(f"no samples in its first {MOST_CHUNKS} chunks")
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left < size < UNKNOWN_SIZE:
        raise BadInput(f"it should have {size} bytes of samples, but {left} are there")
    return form, min(size, left)


def wav_chunk(tag: bytes, content: bytes) -> bytes:
    return tag + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def sound_of_video(path, longest) -> np.ndarray | None:
    """As read_sound, of a video file."""
    decord = import_decord()
    try:
        with quiet():
            sound = decord.AudioReader(path, sample_rate=SAMPLE_RATE, mono=True)
    except Exception as error:
        if "find audio stream" in str(error):
            return None
        raise BadInput(f"cannot read sound: {path} (no sound in it that decord can decode)") from None
    # decord's own slices make a list of all indices.
    sound = sound._array[0, :round(longest * SAMPLE_RATE)].astype(np.float32)
    with decoding("sound", path):
        check_samples(sound)
    return sound


def video_clip(path: str, query: str, sound: str | None) -> Clip:
    """The clip of a video file, a folder of frames or a picture, with the sound of a file, else its own.

    The sound of a video file is cut where the video ends. A folder does not say how long its video is. Raises
    FileNotFoundError or BadInput, naming the file, or that the query is none.
    """
    check_text(query, "--query")
    frames, fps = open_video(path)
    longest = LONGEST_SOUND
    is_video = Path(path).is_file() and not is_picture(path)
    if is_video:
        longest = len(frames) / fps + SOUND_SLACK
    wave = None
    if sound is not None:
        wave = read_sound(sound, longest)
        if wave is None:
            raise BadInput(f"no sound in: {sound}")
    elif is_video:
        wave = read_sound(path, longest)
    return Clip(path, frames, query, fps, wave)
