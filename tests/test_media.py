"""Media files: videos, folders of frames, pictures, sounds, and what is broken in them."""
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from benchmarks import media
from benchmarks.media import open_video, read_image, read_sound, video_clip
from data import LONGEST_QUERY
from tests.world import jpeg, naming, noise_picture, riff_chunk, write_avi
from trust.errors import BadInput


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


@pytest.mark.parametrize("read, name", READERS)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_named_at_once(tmp_path, read, name, make):
    """A pipe that nobody fills would be waited for, and a device never ends."""
    if read is open_video and make is os.mkdir:
        pytest.skip("a folder of frames")
    make(tmp_path / name)
    with naming(tmp_path / name):
        read(str(tmp_path / name))


def test_entries_of_a_folder_that_are_no_files_are_named(tmp_path):
    noise_picture(60, 60).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / ".1.png").write_bytes(b"hidden")
    frames, _ = open_video(str(tmp_path))
    assert len(frames) == 2
    with naming(tmp_path / "2.png"):
        frames[1]


# ---- limits ----------------------------------------------------------------------------------------
def write_wav(path, rate=16000, channels=1, bits=16, data=bytes(3200), claimed=None, kind=1, before=b""):
    """A wav file whose header may claim anything. claimed: bytes of its samples."""
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * block % 2**32, block, bits)
    size = len(data) if claimed is None else claimed
    content = b"WAVE" + before + riff_chunk(b"fmt ", form) + b"data" + struct.pack("<I", size) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(content)) + content)
    return str(path)


@pytest.mark.parametrize("header, problem", [
    (dict(rate=2**31 - 1), "its rate is 2147483647 Hz"),
    (dict(rate=1), "its rate is 1 Hz"),
    (dict(rate=767_999), "too little in common"),
    (dict(channels=0), "it has 0 channels"),
    (dict(channels=5000), "it has 5000 channels"),
    (dict(bits=1024), "has 128 bytes"),
    (dict(bits=0), "has 0 bytes"),
    (dict(claimed=10_000), "should have 10000 bytes of samples, but 3200 are there"),
    (dict(claimed=2**30), "should have 1073741824 bytes"),
    (dict(before=riff_chunk(b"JUNK", b"") * 2000), "no samples in its first"),
    (dict(kind=3, bits=32, data=np.array([0, 1e30], np.float32).tobytes()), "a sample is not between"),
    (dict(kind=3, bits=64, data=np.array([0, 1e300]).tobytes()), "a sample is not between"),
    (dict(kind=6, bits=8), "ALAW"),
])
def test_headers_of_sounds_have_limits(tmp_path, monkeypatch, header, problem):
    """What cannot be is refused before the samples are resampled."""
    path = write_wav(tmp_path / "a.wav", **header)
    monkeypatch.setattr(media, "resample_poly", None)
    with pytest.raises(BadInput, match=problem) as caught:
        read_sound(path)
    assert str(caught.value).startswith(f"cannot read sound: {path} (")


@pytest.mark.parametrize("header, length", [
    (dict(), 1600),
    (dict(data=b""), 0),
    # As a program writes into a pipe.
    (dict(claimed=2**32 - 1), 1600),
    (dict(before=riff_chunk(b"LIST", b"abc")), 1600),
    (dict(bits=24, channels=8, data=bytes(24 * 100)), 100),
    (dict(bits=8, data=b"\x80" * 1601), 1601),
    (dict(rate=192_000), 134),
    (dict(rate=44_101), 581),
])
def test_unusual_sounds_are_read(tmp_path, header, length):
    sound = read_sound(write_wav(tmp_path / "a.wav", **header))
    assert (sound.dtype, sound.shape) == (np.float32, (length,))


def test_sounds_have_a_most_number_of_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MOST_SAMPLES", 1000)
    assert len(read_sound(write_wav(tmp_path / "a.wav", data=bytes(2000)))) == 1000
    with naming(tmp_path / "b.wav"):
        read_sound(write_wav(tmp_path / "b.wav", channels=2, data=bytes(2004)))


@pytest.mark.parametrize("name", ["tone.wav", "tone.mp4"])
def test_only_the_first_seconds_of_a_sound_are_read(tmp_path, monkeypatch, name):
    file = str(tmp_path / name)
    wavfile.write(file, 16000, stored(tone(16000), np.int16))
    whole = read_sound(file)
    assert len(whole) == 24000
    assert (read_sound(file, 2.0) == whole).all()
    part = read_sound(file, 0.5)
    assert (part == whole[:8000]).all()
    monkeypatch.setattr(media, "LONGEST_SOUND", 1)
    assert len(read_sound(file, 3.0)) == 16000


@pytest.mark.parametrize("form", ["png", "jpeg", "bmp", "gif"])
def test_pictures_have_a_most_number_of_pixels(tmp_path, monkeypatch, form):
    """They are refused before they are decoded."""
    path = str(tmp_path / "a.png")
    Image.new("RGB", (40, 26)).save(path, form)
    monkeypatch.setattr(media, "MOST_PIXELS", 1040)
    assert read_image(path).size == (40, 26)
    monkeypatch.setattr(media, "MOST_PIXELS", 1039)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(BadInput, match=f"{path} .40 x 26 pixels, more than 1039"):
        read_image(path)


def test_a_picture_that_claims_to_be_huge_is_named_in_one_line(tmp_path, recwarn):
    """Pillow would warn of the smaller one and go on."""
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path)
    content = path.read_bytes()
    for side in (10_000, 2**31 - 1):
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        checksum = struct.pack(">I", zlib.crc32(header))
        path.write_bytes(content[:12] + header + checksum + content[33:])
        with naming(path):
            read_image(str(path))
    assert not recwarn.list


def test_only_pictures_are_opened_as_pictures(tmp_path):
    """Pillow would hand an EPS file to another program."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with naming(path):
        read_image(str(path))


def test_pictures_as_they_are_stored(tmp_path):
    path = str(tmp_path / "a.png")
    labels = Image.new("P", (4, 3), 7)
    labels.putpalette(range(256))
    labels.save(path)
    assert np.array(read_image(path, None)).tolist() == [[7] * 4] * 3
    with open(path, "rb") as content:
        assert read_image("row 3", "L", "mask", content).mode == "L"
    with pytest.raises(BadInput, match="^cannot read mask: no such file: nothing.png$"):
        read_image("nothing.png", "L", "mask")


class FakeVideo:
    """What decord might say of a video file."""

    def __init__(self, frames=3, fps=5.0, size=(48, 64)):
        self.frames = frames
        self.fps = fps
        self.picture = np.zeros((*size, 3), np.uint8)

    def __call__(self, path):
        return self

    def __len__(self):
        return self.frames

    def get_avg_fps(self):
        return self.fps

    def __getitem__(self, t):
        return self

    def asnumpy(self):
        return self.picture


@pytest.mark.parametrize("claims", [
    dict(fps=0.0),
    dict(fps=float("nan")),
    dict(fps=float("inf")),
    dict(fps=-1.0),
    dict(fps=1e9),
    dict(fps=1e-9),
    dict(frames=3_000_000),
    dict(size=(2000, 2000)),
])
def test_claims_of_videos_have_limits(tmp_path, monkeypatch, claims):
    import decord
    path = tmp_path / "a.mp4"
    path.write_bytes(b"video")
    monkeypatch.setattr(media, "MOST_PIXELS", 1_000_000)
    monkeypatch.setattr(decord, "VideoReader", FakeVideo())
    assert open_video(str(path))[1] == 5.0
    monkeypatch.setattr(decord, "VideoReader", FakeVideo(**claims))
    with naming(path):
        open_video(str(path))


# ---- videos that are none --------------------------------------------------------------------------
def picture_file(path):
    noise_picture(16, 16).save(path, "gif")


def sound_file(path):
    wavfile.write(path, 16000, np.zeros(1600, np.int16))


def text_file(path):
    path.write_text("hello" * 100)


@pytest.mark.parametrize("write", [picture_file, sound_file, text_file])
@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.mkv"])
def test_what_has_no_video_is_named_without_a_decoders_words(tmp_path, capfd, write, name):
    path = tmp_path / name
    write(path)
    with pytest.raises(BadInput) as caught:
        open_video(str(path))
    assert str(caught.value) == f"cannot read video: {path} (no video stream in it that decord can decode)"
    assert capfd.readouterr() == ("", "")


def test_what_has_no_sound_is_silent_or_named_without_a_decoders_words(tmp_path, capfd):
    picture_file(tmp_path / "a.gif")
    assert read_sound(str(tmp_path / "a.gif")) is None
    text_file(tmp_path / "a.mp4")
    with pytest.raises(BadInput) as caught:
        read_sound(str(tmp_path / "a.mp4"))
    assert str(caught.value).endswith("a.mp4 (no sound in it that decord can decode)")
    assert capfd.readouterr() == ("", "")


def test_stderr_is_back_after_a_decoder(tmp_path, capfd):
    text_file(tmp_path / "a.mp4")
    with pytest.raises(BadInput):
        open_video(str(tmp_path / "a.mp4"))
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_a_folder_of_videos_says_what_is_wrong(tmp_path):
    for name in ("b.mp4", "a.mp4", ".hidden"):
        (tmp_path / name).write_bytes(b"video")
    with pytest.raises(BadInput, match=f"folder: {tmp_path} .it holds a.mp4; name one video, or one folder"):
        open_video(str(tmp_path))


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg"])
def test_a_picture_is_a_video_of_one_frame(tmp_path, name):
    path = str(tmp_path / name)
    noise_picture(40, 30).save(path)
    clip = video_clip(path, "the dog", None)
    assert (len(clip.frames), clip.size, clip.sound) == (1, (30, 40), None)


# ---- clips of files --------------------------------------------------------------------------------
def test_the_sound_of_a_video_file_is_cut_where_it_ends(tmp_path):
    write_avi(tmp_path / "a.avi", (64, 48), [jpeg(noise_picture(64, 48))] * 5, 5)
    wavfile.write(tmp_path / "a.wav", 16000, np.zeros(16000 * 60, np.int16))
    clip = video_clip(str(tmp_path / "a.avi"), "the dog", str(tmp_path / "a.wav"))
    assert len(clip.sound) == 16000 * 1.5
    # A folder does not tell how long its video is.
    (tmp_path / "frames").mkdir()
    noise_picture(64, 48).save(tmp_path / "frames/0.png")
    clip = video_clip(str(tmp_path / "frames"), "the dog", str(tmp_path / "a.wav"))
    assert len(clip.sound) == 16000 * 60


@pytest.mark.parametrize("query", ["", " \n", "\u200b", "x" * (LONGEST_QUERY + 1)])
def test_queries_that_are_empty_or_too_long_are_refused(tmp_path, query):
    noise_picture(8, 8).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="^--query "):
        video_clip(str(tmp_path / "a.png"), query, None)
    for right in ("x" * LONGEST_QUERY, "狗", "?"):
        assert video_clip(str(tmp_path / "a.png"), right, None).query == right
