"""Media files: videos, folders of frames, pictures, sounds.

A broken file raises BadInput that names it. Letters: T frames, H W pixels.
"""
import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import wavfile
from scipy.signal import resample_poly

from data import FPS, SAMPLE_RATE, Clip, Frames
from trust.errors import BadInput, one_line


def open_video(path) -> tuple[Frames, float]:
    """Frames and fps of a video file, or of a folder of numbered pictures (at 2 fps).

    Raises FileNotFoundError for a missing path and BadInput for one without readable frames. Later frames are
    read on demand: one that cannot be decoded, or has another size than the first, raises BadInput then.
    """
    if os.path.isdir(path):
        return open_folder(path), FPS
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such video file or folder of frames: {path}")
    # This loads ffmpeg, so it stands only where a video file is opened.
    import decord

    def read(t):
        try:
            return rgb_picture(video[t].asnumpy())
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise BadInput(f"cannot read video: {path} ({one_line(error)})") from None

    try:
        video = decord.VideoReader(path)
    except (decord.DECORDError, RuntimeError) as error:
        raise BadInput(f"cannot read video: {path} ({one_line(error)})") from None
    read(0)
    return Frames(read, range(len(video))), float(video.get_avg_fps())


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
    names = [name for name in os.listdir(path) if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    if not names:
        raise BadInput(f"no .jpg or .png frames in folder: {path}")

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


def read_image(path) -> Image.Image:
    """An RGB picture. Raises BadInput naming a file that is missing or cannot be decoded."""
    try:
        return Image.open(path).convert("RGB")
    # Pillow raises all of these for broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read image: {path} ({one_line(error)})") from None


def read_sound(path) -> np.ndarray | None:
    """Mono float32 sound at 16 kHz of a wav file, or of a video file's soundtrack (None if it has none).

    Raises BadInput naming a file that is missing or cannot be decoded.
    """
    if not path.lower().endswith(".wav"):
        return sound_of_video(path)
    try:
        rate, sound = wavfile.read(path)
    # scipy raises many kinds of errors over malformed files.
    except Exception as error:
        raise BadInput(f"cannot read sound: {path} ({one_line(error)})") from None
    if rate == 0 or not np.isfinite(sound).all():
        raise BadInput(f"cannot read sound: {path} (its sample rate is 0, or a sample is not finite)")
    # 8-bit wav is unsigned around 128; the other whole numbers are signed.
    if sound.dtype == np.uint8:
        sound = (sound.astype(np.float32) - 128) / 128
    elif sound.dtype.kind == "i":
        sound = sound / -float(np.iinfo(sound.dtype).min)
    if sound.ndim == 2:
        sound = sound.mean(axis=1)
    common = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(sound, SAMPLE_RATE // common, rate // common).astype(np.float32)


def sound_of_video(path) -> np.ndarray | None:
    """As read_sound, of a video file."""
    import decord
    try:
        sound = decord.AudioReader(path, sample_rate=SAMPLE_RATE, mono=True)[:].asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        if "find audio stream" in str(error):
            return None
        raise BadInput(f"cannot read sound: {path} ({one_line(error)})") from None
    return sound[0].astype(np.float32)


def video_clip(path: str, query: str, sound: str | None) -> Clip:
    """The clip of a video file or a folder of frames, with the sound of the file `sound`, else its own.

    Raises FileNotFoundError or BadInput, naming the file.
    """
    frames, fps = open_video(path)
    wave = None
    if sound is not None:
        wave = read_sound(sound)
        if wave is None:
            raise BadInput(f"no sound in: {sound}")
    elif Path(path).is_file():
        wave = read_sound(path)
    return Clip(path, frames, query, fps, wave)
