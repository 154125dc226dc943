"""Predictions: written, read, packed, and what is wrong with them named."""
import errno
import json
import os
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import find_benchmark
from benchmarks.predictions import (
    is_whole,
    open_predictions,
    read_answers,
    read_prediction,
    unpredicted,
    write_prediction,
    zip_predictions,
)
from benchmarks.revos import score_revos
from eval import score_predictions
from tests.test_metrics import a_sample, blobs, encode, revos_sample
from trust.errors import BadInput

# Of the frames in this file.
SIZE = (9, 11)


# ---- folders ---------------------------------------------------------------------------------------
PLACES = [
    ("OVIS/train/9d5940d2", ""),
    ("0a7a2514aa", ""),
    ("v_1", "mose_v_1_2"),
]


@pytest.mark.parametrize("video, folder", PLACES)
def test_predictions_survive_writing_and_reading(tmp_path, video, folder):
    masks = blobs(0, 3, *SIZE)
    sample = a_sample(masks[None], "12", video, folder=folder)
    assert read_prediction(tmp_path, sample, SIZE) is None
    write_prediction(tmp_path, sample, masks)
    path = tmp_path / "Annotations" / (folder or video) / "12/00005.png"
    with Image.open(path) as image:
        assert image.mode == "L"
        assert (np.array(image) == 255 * masks[1]).all()
    for directory in (tmp_path, tmp_path / "Annotations"):
        assert (read_prediction(directory, sample, SIZE) == masks).all()

    # 0 and 1 mean the same as 0 and 255.
    Image.fromarray(masks[1].astype(np.uint8)).save(path)
    # Another expression of the video changes nothing.
    other = a_sample(masks[None], "13", video, folder=folder)
    write_prediction(tmp_path, other, ~masks)
    assert (read_prediction(tmp_path, sample, SIZE) == masks).all()
    # A prediction that is written again is replaced.
    write_prediction(tmp_path, sample, ~masks)
    assert (read_prediction(tmp_path, sample, SIZE) == ~masks).all()
    with pytest.raises(ValueError, match="2 masks for the 3 frames of bench"):
        write_prediction(tmp_path, sample, masks[:2])


def test_an_interrupted_expression_is_not_finished(tmp_path, monkeypatch):
    masks = blobs(0, 3, *SIZE)
    sample = a_sample(masks[None])
    saved = []

    def interrupted(image, path):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        open(path, "w").close()

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_prediction(tmp_path, sample, masks)
    assert read_prediction(tmp_path, sample, SIZE) is None
    path = zip_predictions(find_benchmark("revos"), [sample], tmp_path, tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == []

    write_prediction(tmp_path, sample, masks)
    assert (read_prediction(tmp_path, sample, SIZE) == masks).all()
    folders = list((tmp_path / "Annotations/v").iterdir())
    assert [folder.name for folder in folders] == ["0"]


def broken_pictures(good):
    """The bytes of a picture: cut short, or with a byte of its header or its contents set to 0."""
    for length in (0, 40, 200):
        yield good[:length]
    for place in (11, 35, 36, 60):
        yield good[:place] + b"\0" + good[place + 1:]


def test_broken_predictions_are_named(tmp_path):
    masks = np.random.default_rng(0).random((3, 40, 50)) < 0.5
    sample = a_sample(masks[None])
    write_prediction(tmp_path, sample, masks)
    path = tmp_path / "Annotations/v/0/00005.png"
    message = "cannot read predicted mask: .*" + re.escape(str(path))
    for content in broken_pictures(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prediction(tmp_path, sample, (40, 50))
    path.unlink()
    with pytest.raises(ValueError, match=message):
        read_prediction(tmp_path, sample, (40, 50))
    # A directory of that name.
    path.mkdir()
    with pytest.raises(ValueError, match=message):
        read_prediction(tmp_path, sample, (40, 50))


OUTSIDE = [dict(video=".."), dict(video="../../x"), dict(expression="../../x"), dict(folder="..")]


@pytest.mark.parametrize("fields", OUTSIDE)
def test_nothing_is_written_removed_or_packed_outside(tmp_path, fields):
    out = tmp_path / "deep/deeper/out"
    (out / "Annotations").mkdir(parents=True)
    others = [tmp_path / "deep/x.partial", tmp_path / "deep/x", tmp_path / "deep/deeper/0.partial"]
    for other in others:
        other.mkdir()
    masks = blobs(0, 3, *SIZE)
    sample = a_sample(masks[None], **fields)
    if fields == dict(video=".."):
        sample.expression = ".."
    uses = [
        lambda: write_prediction(out, sample, masks),
        lambda: zip_predictions(find_benchmark("mevis"), [sample], out, out),
        lambda: read_prediction(out, sample, SIZE),
        lambda: unpredicted(out, [sample]),
    ]
    for use in uses:
        with pytest.raises(BadInput, match="is not inside"):
            use()
    assert all(other.is_dir() for other in others)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", ["../x", "/x", ".."])
def test_no_frame_is_written_outside(tmp_path, name):
    masks = blobs(0, 1, *SIZE)
    sample = a_sample(masks[None])
    sample.names = [name]
    if name == "..":
        sample.names = ["../../../../x"]
    with pytest.raises(BadInput, match="is not inside"):
        write_prediction(tmp_path, sample, masks)
    assert not list(tmp_path.rglob("*.png"))


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(image, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    masks = blobs(0, 1, *SIZE)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="cannot write .*00000.png .No space left on device"):
        write_prediction(tmp_path, a_sample(masks[None]), masks)


def test_broken_samples_have_no_prediction(tmp_path):
    masks = blobs(0, 1, *SIZE)
    sample = a_sample(masks[None])
    write_prediction(tmp_path, sample, masks)
    assert unpredicted(tmp_path, [sample]) == []
    assert is_whole(tmp_path, sample)
    sample.broken = "the query is empty"
    assert unpredicted(tmp_path, [sample]) == [sample]
    assert not is_whole(tmp_path, sample)


def test_a_huge_or_endless_prediction_is_not_read(tmp_path):
    masks = blobs(0, 1, *SIZE)
    sample = a_sample(masks[None])
    write_prediction(tmp_path, sample, masks)
    path = tmp_path / "Annotations/v/0/00000.png"
    Image.new("1", (30_000, 30_000)).save(path)
    with pytest.raises(BadInput, match="00000.png"):
        read_prediction(tmp_path, sample, SIZE)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match="is no ordinary file"):
        read_prediction(tmp_path, sample, SIZE)


ANSWERS = [
    '{"name": "a", "text": "", "keyframes": {"3": "x"}}',
    '{"name": "b", "text": "", "keyframes": [3]}',
    '{"name": "c", "text": 5, "keyframes": [3]}',
    '{"name": "d", "text": "", "keyframes": ["x"]}',
    '{"name": "e", "text": "", "keyframes": 7}',
    '{"name": ["f"], "text": "", "keyframes": []}',
    '{"name": "g", "te',
    "5",
]


def test_answers_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "answers-0.jsonl"
    path.write_text("\n".join(ANSWERS))
    assert list(read_answers(tmp_path)) == ["a", "b"]
    path.write_bytes(b"\xff")
    with pytest.raises(BadInput, match="answers-0.jsonl"):
        read_answers(tmp_path)


# ---- archives --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, top", [("mevis", "b/0/"), ("refytvos", "Annotations/b/0/")])
def test_archives_are_as_their_servers_take_them(tmp_path, name, top):
    benchmark = find_benchmark(name)
    masks = blobs(0, 2, *SIZE)
    samples = [a_sample(masks[None], video=video) for video in "bca"]
    for sample in samples:
        write_prediction(tmp_path / "theirs", sample, masks)
    out = tmp_path / "out"
    out.mkdir()
    for directory in ("theirs", "theirs/Annotations"):
        # The videos b and a.
        path = zip_predictions(benchmark, samples[::2], tmp_path / directory, out)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            with archive.open(top + "00000.png") as file:
                assert (np.array(Image.open(file)) == 255 * masks[0]).all()
        assert top + "00005.png" in names
        assert len(names) == 4
        assert names == sorted(names)
    assert list(tmp_path.rglob("*.zip")) == [out / f"{name}.zip"]
    with pytest.raises(FileNotFoundError, match="no folder of predictions to pack"):
        zip_predictions(benchmark, samples, tmp_path / "elsewhere", tmp_path)


# ---- one .json -------------------------------------------------------------------------------------
def write_runs(path, masks_of) -> None:
    """Writes a .json of the video "v". masks_of: {expression: its prediction_masks}"""
    entries = {}
    for expression, masks in masks_of.items():
        entries[expression] = dict(exp="the left one", prediction_masks=masks)
    path.write_text(json.dumps({"v": entries}))


@pytest.fixture
def one_json(tmp_path):
    """(samples of ReVOS, their true masks, path of a .json, its masks).

    The third sample has no prediction.
    """
    true = blobs(0, 3, 2, 3, *SIZE)
    pred = blobs(1, 2, 3, *SIZE)
    kinds = ("referring", "reasoning", "reasoning")
    samples = []
    for i, kind in enumerate(kinds):
        samples.append(revos_sample(true[i], expression=str(i), kind=kind))
    masks_of = {}
    for sample, masks in zip(samples, pred):
        write_prediction(tmp_path, sample, masks)
        masks_of[sample.expression] = [encode(mask) for mask in masks]
    path = tmp_path / "found.json"
    write_runs(path, masks_of)
    return samples, true, path, masks_of


def test_predictions_in_one_json(one_json, tmp_path):
    samples, _, path, _ = one_json
    revos = find_benchmark("revos")
    results = score_predictions(revos, samples, path)
    assert results == score_predictions(revos, samples, tmp_path)
    assert results["missing"] == 1


NO_MASKS = [
    ([3] * 3, "the prediction of bench/v/1"),
    ([[]] * 3, "the prediction of bench/v/1"),
    (5, "bench/v/1 are not a list"),
    ([dict(size=[9, 11], counts=[[1], 2])] * 3, "counts that do not fill a mask of size [9, 11]"),
    ([dict(size=[11, 9], counts=[99])] * 3, "mask of 9 x 11, frame of 11 x 9: the prediction of bench/v/1"),
    ([dict(size=[10**6, 10**6], counts=[10**12])] * 3, "mask of 1000000 x 1000000, frame of 11 x 9"),
]


def test_broken_masks_in_one_json_are_named(one_json):
    samples, _, path, masks_of = one_json
    revos = find_benchmark("revos")
    too_few = masks_of["1"][:2]
    cases = [(too_few, "prediction_masks of bench/v/1 are not a list of 3"), *NO_MASKS]
    for masks, message in cases:
        masks_of["1"] = masks
        write_runs(path, masks_of)
        broken = score_predictions(revos, samples, path)["broken"]
        assert len(broken) == 1
        assert message in broken[0]


def test_null_in_one_json_is_an_empty_mask(one_json):
    samples, true, path, masks_of = one_json
    masks_of["1"] = [None] * 3
    write_runs(path, masks_of)
    results = score_predictions(find_benchmark("revos"), samples, path)
    nothing = np.zeros((3, *SIZE), bool)
    expected = score_revos(samples[1], true[1], nothing)
    assert not results["broken"]
    assert results["expressions"][1]["J"] == expected["J"]


NO_PREDICTIONS = [
    (None, FileNotFoundError, "no such directory or .json of predictions"),
    ('{"v": {', ValueError, "cannot use"),
    ("[1]", ValueError, "cannot use"),
    ('{"v": []}', ValueError, ": v in "),
    ('{"v": {"0": [1]}}', ValueError, ": v in "),
    ('{"v": 3}', ValueError, ": v in "),
]


@pytest.mark.parametrize("content, error, message", NO_PREDICTIONS)
def test_what_is_no_set_of_predictions_is_named(tmp_path, content, error, message):
    path = tmp_path / "found.json"
    if content:
        path.write_text(content)
    with pytest.raises(error, match=f"{message}.*found.json"):
        open_predictions(path)
