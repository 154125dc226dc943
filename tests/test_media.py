"""Media files: videos, folders of frames, pictures, sounds, and what is broken in them."""
import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from benchmarks.media import open_video, read_image, read_sound
from tests.world import jpeg, naming, noise_picture, write_avi


# ---- reading pictures and videos -------------------------------------------------------------------
def red_picture(size, red):
    return Image.new("RGB", size, (red, 0, 0))


def redness(picture):
    """Red of one pixel, away from the corner."""
    return picture.getpixel((9, 9))[0]


def test_folder_of_frames_in_the_order_of_their_numbers(tmp_path):
    for n, name in enumerate(["frame_2.png", "frame_9.jpg", "frame_10.JPEG", "frame_11.png"]):
        picture = red_picture((20, 12), 60 * n)
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    frames, fps = open_video(str(tmp_path))
    assert len(frames) == 4
    assert fps == 2.0
    assert frames[0].size == (20, 12)
    assert frames[0].mode == "RGB"
    for t in range(4):
        assert round(redness(frames[t]) / 60) == t


def test_pictures_of_every_mode_become_rgb(tmp_path):
    file = str(tmp_path / "picture.png")
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (5, 4)).save(file)
        picture = read_image(file)
        assert (picture.mode, picture.size) == ("RGB", (5, 4))


def test_video_file(tmp_path):
    file = tmp_path / "clip.avi"
    jpegs = []
    for t in range(6):
        jpegs.append(jpeg(red_picture((48, 32), 40 * t)))
    write_avi(file, (48, 32), jpegs, 5)
    frames, fps = open_video(str(file))
    assert len(frames) == 6
    assert fps == 5.0
    assert frames[0].size == (48, 32)
    # In any order.
    for t in (5, 0, 3):
        assert round(redness(frames[t]) / 40) == t
    assert read_sound(str(file)) is None


# decord 0.6.0 gives frames of a width of 8, 12, 16, 24, 48 or 72 pixels too many channels
# (github.com/dmlc/decord/issues/93): their lines are padded, and the padding is taken for channels.
@pytest.mark.parametrize("width", [
    64,
    62,
    # decord gives these too many channels.
    48,
    24,
])
def test_frames_of_a_video_file_are_its_pictures(tmp_path, width):
    column = np.arange(width)
    row = np.arange(32)[:, None]
    pixels = np.zeros((32, width, 3), np.uint8)
    pixels[..., 0] = 3 * column
    pixels[..., 1] = 7 * row
    content = jpeg(Image.fromarray(pixels))
    write_avi(tmp_path / "clip.avi", (width, 32), [content] * 3, 5)
    frames, _ = open_video(str(tmp_path / "clip.avi"))
    assert (frames[1].mode, frames[1].size) == ("RGB", (width, 32))
    difference = np.array(frames[1]).astype(int) - pixels
    assert abs(difference).mean() < 6


# ---- reading sounds --------------------------------------------------------------------------------
def tone(rate, pitch=440.0, seconds=1.5):
    time = np.arange(int(rate * seconds)) / rate
    return 0.5 * np.sin(2 * np.pi * pitch * time)


def stored(wave, kind):
    """A wave in [-1, 1] as a wav file of that type stores it."""
    if kind == np.uint8:
        # Unsigned around 128.
        return (wave * 128 + 128).round().astype(kind)
    if np.issubdtype(kind, np.integer):
        wave = wave * -float(np.iinfo(kind).min)
    return wave.astype(kind)


def amplitudes(sound):
    """Amplitude of every whole pitch, from one second away from the ends."""
    return abs(np.fft.rfft(sound[4000:20000])) / 8000


@pytest.mark.parametrize("rate", [16000, 44100, 8000, 48000])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_of_every_kind(tmp_path, rate, kind, channels):
    file = tmp_path / "tone.WAV"
    wave = stored(tone(rate), kind)
    if channels == 2:
        silence = stored(0 * tone(rate), kind)
        wave = np.stack([wave, silence], axis=1)
    wavfile.write(file, rate, wave)
    sound = read_sound(str(file))
    assert (sound.dtype, sound.ndim) == (np.float32, 1)
    assert abs(len(sound) - 24000) <= 1
    spectrum = amplitudes(sound)
    assert spectrum.argmax() == 440
    assert spectrum[440] == pytest.approx(0.5 / channels, rel=0.02)
    assert np.delete(spectrum, range(435, 446)).max() < 0.005


def test_soundtrack_of_a_container(tmp_path):
    """A wav file of another name is read as a video file is."""
    file = tmp_path / "tone.mp4"
    wavfile.write(file, 44100, stored(tone(44100), np.int16))
    sound = read_sound(str(file))
    assert sound.dtype == np.float32
    assert abs(len(sound) - 24000) < 100
    spectrum = amplitudes(sound)
    assert spectrum.argmax() == 440
    assert spectrum[440] == pytest.approx(0.5, rel=0.02)


# ---- files that cannot be read ---------------------------------------------------------------------
READERS = [
    (open_video, "clip.mp4"),
    (read_sound, "clip.mp4"),
    (read_sound, "clip.wav"),
    (read_image, "clip.png"),
]
BROKEN = [
    b"",
    b"hello" * 100,
    b"RIFF\x24\0\0\0WAVE",
    b"RIFF\x24\0\0\0WAVEfmt ",
    b"RIFF\x24\0\0\0WAVEdata",
]


@pytest.mark.parametrize("read, name", READERS)
def test_missing_files_are_named(tmp_path, read, name):
    error = FileNotFoundError if read is open_video else ValueError
    with naming(tmp_path / name, error):
        read(str(tmp_path / name))


@pytest.mark.parametrize("read, name", READERS)
@pytest.mark.parametrize("content", BROKEN)
def test_broken_files_are_named(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with naming(tmp_path / name):
        read(str(tmp_path / name))


@pytest.mark.parametrize("rate, sound", [
    (0, np.zeros(9, np.int16)),
    (16000, np.array([0, np.nan], np.float32)),
    (8000, np.array([np.inf, 0])),
])
def test_sounds_that_are_none_are_named(tmp_path, rate, sound):
    wavfile.write(tmp_path / "a.wav", rate, sound)
    with naming(tmp_path / "a.wav"):
        read_sound(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("error", [
    SyntaxError("broken PNG"), ValueError("too large"), Image.DecompressionBombError("bomb")])
def test_whatever_pillow_raises_names_the_picture(tmp_path, monkeypatch, error):
    noise_picture(8, 8).save(tmp_path / "a.png")

    def convert(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", convert)
    with naming(tmp_path / "a.png"):
        read_image(str(tmp_path / "a.png"))


def test_frames_of_different_sizes_are_named(tmp_path):
    for t, width in enumerate((60, 60, 61)):
        noise_picture(width, 60).save(tmp_path / f"{t}.png")
    frames, _ = open_video(str(tmp_path))
    assert frames[1].size == (60, 60)
    with naming(tmp_path / "2.png"):
        frames[2]


def test_an_empty_folder_is_named(tmp_path):
    with naming(tmp_path, ValueError):
        open_video(str(tmp_path))


def test_broken_frames_of_a_folder_are_named(tmp_path):
    noise_picture(60, 60).save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[:2000])
    frames, _ = open_video(str(tmp_path))
    assert frames[0].size == (60, 60)
    with naming(tmp_path / "2.png", ValueError):
        frames[1]


def test_broken_frames_of_a_video_file_are_named(tmp_path):
    file = tmp_path / "clip.avi"
    jpegs = [jpeg(noise_picture(64, 48, t)) for t in range(40)]
    jpegs.insert(30, bytes(500))
    write_avi(file, (64, 48), jpegs, 5)
    with naming(file, ValueError):
        # The decoder works ahead and may meet the broken frame here.
        frames, _ = open_video(str(file))
        frames[30]
