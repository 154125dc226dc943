"""check names what is broken and goes on, whatever a reader does; show draws its sheet."""
import os
import struct

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from benchmarks import check, find_benchmark, open_split
from benchmarks.check import INK, WHITE, draw_sheet, wrapped
from benchmarks.samples import Benchmark, Sample, load
from data import Clip, Frames
from tests.world import jpeg, noise_picture, write_avi


# ---- a benchmark of one's own ----------------------------------------------------------------------
def write_frames(folder, T=4, size=(32, 24)):
    """Paths of T pictures."""
    folder.mkdir()
    paths = []
    for t in range(T):
        paths.append(str(folder / f"{t}.png"))
        noise_picture(*size, t).save(paths[-1])
    return paths


def sample_of(pictures, expression="0", masks=None, **fields):
    """A sample of 2 seconds; masks: bool [1, T, 24, 32]."""
    if masks is None:
        masks = np.ones((1, len(pictures), 24, 32), bool)

    def read_masks(indices=None):
        if isinstance(masks, Exception):
            raise masks
        return masks if indices is None else masks[:, indices]

    names = [str(t) for t in range(len(pictures))]
    return Sample("vos", "own", "video", expression, "the dog", "", names, pictures, read_masks, **fields)


def checked(samples, monkeypatch, capsys):
    """(lines of check, how many are broken) of samples that a reader gives, or of the error it raises."""
    def read(benchmark, split, root):
        if isinstance(samples, Exception):
            raise samples
        return samples

    monkeypatch.setattr(check, "open_split", read)
    broken = check.check(Benchmark(read=None, name="own"), "train", "")
    return capsys.readouterr().out.splitlines(), broken


# ---- check -----------------------------------------------------------------------------------------
def test_a_whole_sample_passes(tmp_path, monkeypatch, capsys):
    lines, broken = checked([sample_of(write_frames(tmp_path / "a"))], monkeypatch, capsys)
    assert lines == ["own/train: 1 videos, 1 expressions (1 with masks), 4 frames, 0 sounds, 0 broken"]
    assert broken == 0


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ZeroDivisionError("a\nb"), RecursionError()])
def test_any_error_of_a_reader_breaks_one_sample(error, tmp_path, monkeypatch, capsys):
    """An error that nobody expected is named with its kind, and the other samples are checked."""
    pictures = write_frames(tmp_path / "a")
    samples = [sample_of(pictures, "0", error, ids=("0",)), sample_of(pictures, "1", ids=("1",))]
    lines, broken = checked(samples, monkeypatch, capsys)
    assert broken == 1
    assert len(lines) == 2
    assert lines[0].startswith(f"broken: own/video/0: {type(error).__name__}:")
    assert lines[1].endswith(" 1 broken")


@pytest.mark.parametrize("error", [KeyError("x"), OSError("no such file: x"), UnicodeError("x")])
def test_any_error_of_a_split_is_one_line(error, monkeypatch, capsys):
    lines, broken = checked(error, monkeypatch, capsys)
    assert broken == 1
    line, = lines
    assert line.startswith("broken: own/train: ")
    assert "x" in line


def test_a_split_without_samples_is_broken(minis, monkeypatch, capsys):
    benchmark = find_benchmark("revos")
    empty = Benchmark(read=lambda root, split: [], name="revos", splits=benchmark.splits)
    assert check.check(empty, "train", "there") == 1
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("broken: revos/train: no samples")


def test_masks_that_are_empty_on_all_frames_are_broken(tmp_path, monkeypatch, capsys):
    pictures = write_frames(tmp_path / "a")
    empty = np.zeros((1, 4, 24, 32), bool)
    late = empty.copy()
    late[0, 3, 5, 5] = True
    samples = [sample_of(pictures, "0", empty, ids=("0",)), sample_of(pictures, "1", late, ids=("1",)),
               sample_of(pictures, "2", empty, ids=("2",), null=True)]
    lines, broken = checked(samples, monkeypatch, capsys)
    assert broken == 1
    assert lines[0].startswith("broken: own/video/0: the masks of 0 are empty")


def test_lines_of_check_are_lines_whatever_a_name_holds(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a\nb\udcff"
    sample = sample_of([str(folder / "0.png")])
    lines, broken = checked([sample], monkeypatch, capsys)
    assert (len(lines), broken) == (2, 1)
    assert "a b?" in lines[0]


def write_tone(path, seconds):
    wavfile.write(path, 16000, np.zeros(int(16000 * seconds), np.int16))
    return str(path)


@pytest.mark.parametrize("seconds, word", [(2.0, ""), (2.9, ""), (1.6, ""), (3.5, "cut"), (1.2, "broken")])
def test_lengths_of_sounds(seconds, word, tmp_path, monkeypatch, capsys):
    """One that ends before its video is broken. One that goes on is cut, which is told and counted."""
    sound = write_tone(tmp_path / "a.wav", seconds)
    sample = sample_of(write_frames(tmp_path / "a"), sound=sound)
    lines, broken = checked([sample, sample], monkeypatch, capsys)
    start = f"{word}: own/video/0: sound of {seconds} s, video of 2.0 s: "
    told = [line for line in lines[:-1] if line.startswith(start)]
    assert len(lines) == 1 + len(told)
    assert len(told) == {"": 0, "cut": 1, "broken": 2}[word]
    assert (" 1 sounds (1 cut), " in lines[-1]) == (word == "cut")
    assert broken == (2 if word == "broken" else 0)


@pytest.mark.parametrize("seconds, heard", [(2.0, 2.0), (2.4, 2.4), (1.5, 1.5), (2.6, 2.5), (60, 2.5)])
def test_a_sound_is_cut_where_its_video_ends(seconds, heard, tmp_path):
    sound = write_tone(tmp_path / "a.wav", seconds)
    sample = sample_of(write_frames(tmp_path / "a"), sound=sound)
    assert len(load(sample).sound) == 16000 * heard


@pytest.mark.parametrize("kind", ["picture", "video", "sound"])
def test_a_file_that_is_none_is_named_and_nothing_waits(kind, tmp_path, monkeypatch, capsys):
    pictures = write_frames(tmp_path / "a")
    fields = {}
    if kind == "picture":
        path = pictures[2]
        os.remove(path)
    else:
        path = str(tmp_path / ("a.mp4" if kind == "video" else "a.wav"))
    os.mkfifo(path)
    if kind == "sound":
        fields["sound"] = path
    sample = sample_of(pictures, **fields)
    if kind == "video":
        sample.pictures = [path]
        sample.names = []
    lines, broken = checked([sample], monkeypatch, capsys)
    assert broken == 1
    assert path in lines[0]
    assert "no ordinary file" in lines[0]


def test_a_video_file_of_an_absurd_rate_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.avi"
    write_avi(path, (64, 48), [jpeg(noise_picture(64, 48))] * 3, 5)
    content = path.read_bytes()
    place = content.index(b"vidsMJPG") + 8 + 4 * 4
    path.write_bytes(content[:place] + struct.pack("<I", 10 ** 9) + content[place + 4:])
    sample = sample_of([str(path)])
    sample.names = []
    lines, broken = checked([sample], monkeypatch, capsys)
    assert broken == 1
    assert str(path) in lines[0]


# ---- show ------------------------------------------------------------------------------------------
def grey_clip(T, masks, **fields):
    """A grey clip of 128 x 128 pixels."""
    frames = Frames(lambda t: Image.new("RGB", (128, 128), (100, 100, 100)), range(T))
    return Clip("own/video/0", frames, "the dog", masks=masks, kind="referring", **fields)


def square_masks(T):
    """An object from pixel 32 to 95, both ways, on the second frame."""
    masks = np.zeros((1, T, 128, 128), bool)
    masks[0, 1, 32:96, 32:96] = True
    return masks


def test_the_target_has_an_outline_and_keeps_its_colour():
    sheet = np.array(draw_sheet(grey_clip(2, square_masks(2)), sample_of([])))
    first = sheet[:220, :240]
    second = sheet[:220, 240:480]
    assert (first == 100).all()
    # From the left border to the middle: background, dark edge, white line, the target.
    row = second[120, :120].tolist()
    colours = [tuple(pixel) for pixel in row]
    kinds = list(dict.fromkeys(colours))
    assert kinds[:3] == [(100, 100, 100), INK, WHITE]
    assert 57 <= colours.index(WHITE) <= 61
    assert (second[90:150, 90:150] == 100).all()


def test_six_frames_in_a_row_and_a_caption_below():
    for T, size in ((1, (720, 720)), (2, (480, 240)), (6, (1440, 240)), (7, (1440, 480))):
        sheet = draw_sheet(grey_clip(T, None), sample_of([]))
        width, height = size
        assert sheet.width == width
        assert 30 < sheet.height - height < 120
        caption = np.array(sheet)[height:]
        assert (caption == 255).mean() > 0.7
        assert caption.min() < 60


def test_a_box_is_drawn_where_it_is():
    clip = grey_clip(1, None, truth=dict(box=(32, 32, 95, 95)))
    sheet = np.array(draw_sheet(clip, sample_of([])))
    scale = 720 / 128
    left = int(32 * scale)
    assert (sheet[360, left - 5] == 100).all()
    assert tuple(sheet[360, left + 3]) == WHITE
    assert (sheet[360, 360] == 100).all()


@pytest.mark.parametrize("text", ["", "the dog", "the dog " * 900, "狗" * 5000, "x" * 5000, "\udcff\n\n a"])
@pytest.mark.parametrize("width", [240, 1440])
def test_captions_are_wrapped(text, width):
    font = check.letters(20)
    lines = wrapped(text, font, width)
    assert len(lines) <= 8
    assert "".join(lines).replace(" ", "")[:5] in text.replace(" ", "").replace("\udcff\n\n", "?") or not text
    for line in lines:
        assert font.getlength(line) <= width


def test_a_narrow_or_tall_clip_has_a_sheet():
    for size in ((1, 500), (500, 1)):
        frames = Frames(lambda t: Image.new("RGB", size), range(2))
        sheet = draw_sheet(Clip("", frames, "the dog"), sample_of([]))
        assert sheet.width == 480
        assert sheet.height < 2000


def test_show_says_where_it_writes(minis, tmp_path, capsys):
    root = minis("revos").parent
    out = tmp_path / "shown"
    check.main(["show", "--bench", "revos", "--data_root", str(root), "--out", str(out)])
    assert capsys.readouterr().out == f"written: {out}/sample.png, prompt.txt\n"
    sample = open_split(find_benchmark("revos"), "train", root / "revos")[0]
    assert sample.query in (out / "prompt.txt").read_text(encoding="utf-8")
