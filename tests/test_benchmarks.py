"""The benchmarks: what their readers share, check, show and mini, then a section for each one.

All run on miniatures: toy clips in the layouts of the real benchmarks. The last section adds a benchmark.
Letters: O objects, T frames, H W pixels.
"""
import csv
import importlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from scipy.io import wavfile

import benchmarks
import eval as evaluation
from benchmarks import BENCHMARKS, Entry, check, find_benchmark, find_entry, open_split, refcocog_2k_840
from benchmarks.mini import stills, write_mini
from benchmarks.predictions import unpredicted, write_prediction, zip_predictions
from benchmarks.reasonseg import lisa_mask
from benchmarks.refcoco import coco_mask
from benchmarks.samples import load, near_corners, polygon_mask, rle_mask
from benchmarks.toy import CANVAS, TOY_SPLITS, toy_clip, toy_queries
from benchmarks.video_r1 import video_file
from data import SAMPLE_RATE
from eval import score_predictions
from run import draw
from tests.world import ROOT, evaluate_here, seen_scene, train_here
from trust.errors import BadInput

NAMES = [benchmark.name for benchmark in BENCHMARKS]


def read(name, split, root):
    """The samples of a split."""
    return open_split(find_benchmark(name), split, root)


def splits_of(name):
    return find_benchmark(name).splits


# ---- masks in files --------------------------------------------------------------------------------
def test_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(0)
    densities = (0, 1e-3, 0.1, 0.5, 1)
    sizes = ((1, 1), (7, 300), (480, 31))
    for density, size in itertools.product(densities, sizes):
        mask = rng.random(size) < density
        rle = coco.encode(np.asfortranarray(mask, np.uint8))
        rle["counts"] = rle["counts"].decode()
        assert np.array_equal(rle_mask(rle, "file"), mask)
    plain = rle_mask(dict(size=[2, 3], counts=[1, 2, 3]), "file")
    assert plain.astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]


NO_RUN_LENGTHS = [
    None,
    3,
    {},
    dict(size=[2, 2]),
    dict(counts="4"),
    dict(size=[2], counts="4"),
    dict(size=["2", 2], counts="4"),
]
for counts in ("", "3", "5", "T", "4é", "1O4", [], [-1, 5], ["4"], [[4]], None):
    NO_RUN_LENGTHS.append(dict(size=[2, 2], counts=counts))


@pytest.mark.parametrize("rle", NO_RUN_LENGTHS)
def test_malformed_run_lengths_are_refused(rle):
    with pytest.raises(ValueError):
        rle_mask(rle, "mask_dict.json")


def test_polygons_are_drawn_as_opencv_draws_them():
    """The picture is OpenCV's, of polylines and fillPoly."""
    corners = [(1, 1), (14, 3), (9, 5), (15, 10), (6, 7), (2, 11), (4, 5)]
    picture = [
        "................",
        ".####...........",
        "..#########.....",
        "..#############.",
        "...##########...",
        "....#######.....",
        "....#######.....",
        "...##########...",
        "...###..######..",
        "...##......####.",
        "..##..........##",
        "..#.............",
    ]
    mask = polygon_mask(corners, 12, 16)
    for row, expected in zip(mask, picture, strict=True):
        assert "".join(np.where(row, "#", ".")) == expected


# ---- the list --------------------------------------------------------------------------------------
def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match="unknown dataset: coco .*revos"):
        read("coco", "val", ".")
    with pytest.raises(ValueError, match="unknown split of revos: test .known: train, valid"):
        read("revos", "test", ".")


def test_every_benchmark_has_a_name_of_its_own():
    assert len(set(NAMES)) == len(NAMES)
    for benchmark in BENCHMARKS:
        assert find_benchmark(benchmark.name).name == benchmark.name
        for split in filter(None, benchmark.tested.split(",")):
            assert split in benchmark.splits


# ---- check -----------------------------------------------------------------------------------------
def run_check(name, split, root, capsys):
    """(exit code, lines of broken samples, summary)"""
    arguments = ["check", "--bench", name, "--split", split]
    folder = find_benchmark(name).folder
    if folder:
        arguments += [f"--{folder}_root", str(root)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        check.main(arguments)
    lines = capsys.readouterr().out.strip().splitlines()
    broken = [line for line in lines if line.startswith("broken: ")]
    return stop.value.code, broken, lines[-1]


def shortened(monkeypatch, name):
    """Of a benchmark that makes its samples, only 10 are usually evaluated."""
    if find_benchmark(name).usual:
        file, _, record = find_entry(name).record.partition(".")
        module = importlib.import_module(f"benchmarks.{file}")
        monkeypatch.setattr(module, record, replace(getattr(module, record), usual=10))


@pytest.mark.parametrize("name", NAMES)
def test_whole_miniatures_pass_the_check(name, minis, monkeypatch, capsys):
    if name == "refcocog_2k_840":
        pytest.importorskip("pyarrow")
    shortened(monkeypatch, name)
    benchmark = find_benchmark(name)
    root = minis(name) if benchmark.mini else ""
    for split in benchmark.splits:
        samples = read(name, split, root)[:benchmark.usual]
        code, broken, summary = run_check(name, split, root, capsys)
        assert code == 0
        assert broken == []
        assert f"{len(samples)} expressions" in summary
        assert "0 frames" not in summary.split(", ")


def assert_fault(name, split, root, message, capsys):
    """check names a broken sample: its first line is like `message`, and each names a sample."""
    code, broken, summary = run_check(name, split, root, capsys)
    assert code == 1
    assert re.search(message, broken[0])
    assert broken[0].startswith(f"broken: {name}/")
    assert summary.endswith(f"{len(broken)} broken")
    assert not summary.startswith("broken")
    samples = read(name, split, root)
    for line in broken:
        assert any(sample.name in line for sample in samples)


def assert_malformed(name, split, root, file, message, capsys):
    """A small file is named in one line, by the reader and by check."""
    path = str(root / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read(name, split, root)
    assert path in str(error.value)
    assert "\n" not in str(error.value)
    code, broken, _ = run_check(name, split, root, capsys)
    assert code == 1
    # And nothing that a pickle prints.
    assert len(broken) == 1
    assert path in broken[0]


def test_check_of_a_dataset_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(["check", "--bench", "revos", "--data_root", str(tmp_path)])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert str(tmp_path / "revos") in line


def test_data_py_hands_over_to_check(minis):
    root = minis("reasonseg").parent
    arguments = ["check", "--bench", "reasonseg", "--data_root", str(root)]
    command = [sys.executable, str(ROOT / "data.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    places = [line.split(":")[0] for line in lines]
    assert places == ["reasonseg/train", "reasonseg/val", "reasonseg/test"]


# ---- show and mini ---------------------------------------------------------------------------------
SHOWN = [("revos", 0), ("refavs", 1), ("reasonseg", 0), ("video_r1", 0), ("toy", 2)]


@pytest.mark.parametrize("name, index", SHOWN)
def test_show_writes_a_sheet_and_the_prompt(name, index, minis, tmp_path):
    benchmark = find_benchmark(name)
    root = minis(name) if benchmark.mini else tmp_path
    out = tmp_path / "shown"
    arguments = ["--data_root", root.parent, "--index", index, "--out", out]
    check.main(["show", "--bench", name, *map(str, arguments)])
    sample = read(name, benchmark.splits[0], root)[index]
    prompt = (out / "prompt.txt").read_text()
    sheet = np.array(Image.open(out / "sample.png"))
    assert sample.name in prompt
    assert sample.query in prompt
    assert sheet.shape[1] % 240 == 0
    if sample.task == "vos":
        assert_target_is_outlined(sheet, load(sample).sampled()[0])


def assert_target_is_outlined(sheet, clip):
    """sheet: [H, W, 3], at most six frames in a row. Where the target is in sight there is a white line."""
    H, W = clip.size
    side = sheet.shape[1] // min(len(clip.frames), 6)
    height = round(side * H / W)
    seen = clip.masks.any((0, 2, 3))
    assert seen.any()
    for t in np.flatnonzero(seen):
        top = height * (t // 6)
        left = side * (t % 6)
        cell = sheet[top:top + height, left:left + side]
        assert (cell == 255).all(-1).any()


def test_show_of_a_sample_that_is_not_there(minis, capsys):
    root = minis("revos").parent
    with pytest.raises(SystemExit) as stop:
        check.main(["show", "--bench", "revos", "--data_root", str(root), "--index", "999"])
    assert stop.value.code == 2
    assert "--index 999" in capsys.readouterr().err


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def test_a_miniature_replaces_nothing(tmp_path, capsys):
    arguments = ["mini", "--bench", "reasonseg", "--out", str(tmp_path)]
    # An empty folder is no harm.
    (tmp_path / "reasonseg").mkdir()
    check.main([*arguments, "--videos", "1"])
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        check.main([*arguments, "--videos", "2"])
    error, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert str(tmp_path / "reasonseg") in error
    assert before == contents(tmp_path)


# ---- damages of a file -----------------------------------------------------------------------------
def edit(path, change):
    """Changes the JSON value in a file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def put_at(*keys, value):
    """A damage of a JSON file: another value under these keys."""
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return lambda path: edit(path, change)


def drop(*keys):
    """A damage of a JSON file: what these keys lead to is left out."""
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return lambda path: edit(path, change)


def rename(*keys, old, new):
    """A change of a JSON value: the key `old` below these keys becomes `new`."""
    def change(record):
        for key in keys:
            record = record[key]
        record[new] = record.pop(old)

    return change


def cut(length):
    """A damage: only the first bytes are left."""
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def write(content):
    """A damage: the file holds these bytes."""
    return lambda path: path.write_bytes(content)


def swap(old, new):
    """A damage: another text in place of the first of this."""
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def save(mode, size):
    """A damage: a black picture."""
    return lambda path: Image.new(mode, size).save(path)


def delete(path):
    path.unlink()


def folder_for_file(path):
    path.unlink()
    path.mkdir()


# ---- reading videos --------------------------------------------------------------------------------
def toy_masks(sample, split):
    """bool [O, T, H, W] of a miniature's sample, from the toy world.

    The last number of its video is that of the scene, its query names the things.
    """
    number = re.findall(r"[0-9a-f]+", sample.video)[-1]
    scene = seen_scene("train" if split == "train" else "test", int(number, 16))
    if " and the " in sample.query:
        return scene.masks[[0, 1]]
    things = []
    if sample.dataset == "refdavis":
        things = [o for o, thing in enumerate(scene.things) if thing.name in sample.query]
    for _, query, o in toy_queries(scene):
        if query == sample.query and o is not None:
            things.append(o)
    if not things:
        return np.zeros_like(scene.masks[:1])
    return scene.masks[things[:1]]


VIDEOS = [
    ("revos", "train"),
    ("revos", "valid"),
    ("mevis", "train"),
    ("mevis", "valid_u"),
    ("refdavis", "valid"),
    ("reasonvos", "test"),
]


@pytest.mark.parametrize("name, split", VIDEOS)
def test_videos_read_back_to_the_toy_masks(name, split, minis):
    samples = read(name, split, minis(name))
    assert len({sample.video for sample in samples}) == 2
    for sample in samples:
        clip = load(sample)
        true = toy_masks(sample, split)
        assert clip.masks.dtype == bool
        assert np.array_equal(clip.masks, true)
        assert len(clip.frames) == len(sample.names) == true.shape[1]
        assert clip.frames[0].size == (CANVAS, CANVAS)
        assert clip.name == sample.name
        assert clip.query == sample.query
        assert clip.kind == sample.kind
        assert clip.fps == 2.0
        assert clip.task == "vos"


@pytest.mark.parametrize("name, video", [("mevis", "000000000003"), ("refytvos", "0000000001")])
def test_videos_without_masks_are_read(name, video, minis):
    samples = read(name, "valid", minis(name))
    # Those of test are left out of refytvos.
    assert len({sample.video for sample in samples}) == 2
    sample = next(sample for sample in samples if sample.video == video)
    clip = load(sample)
    assert clip.masks is None
    assert clip.size == (CANVAS, CANVAS)


def test_loading_some_frames_reads_their_masks_only(minis):
    samples = read("mevis", "train", minis("mevis"))
    samples = [sample for sample in samples if sample.objects == 2]
    sample = max(samples, key=lambda sample: len(sample.names))
    clip = load(sample, most_frames=5)
    whole = load(sample)
    view, indices = whole.sampled(5)
    assert np.array_equal(clip.masks, view.masks)
    assert np.array_equal(clip.frames[2], whole.frames[indices[2]])


# ---- the toy world ---------------------------------------------------------------------------------
@pytest.mark.parametrize("split", TOY_SPLITS)
def test_the_toy_world_is_read_like_any_other(split):
    samples = read("toy", split, "")
    assert len(samples) == (100_000 if split == "train" else 1000)
    sample = samples[3]
    clip = load(sample)
    expected = toy_clip(split, 3)
    assert sample.name == f"toy/{split}/3/0"
    assert clip.name == expected.name
    assert clip.query == sample.query == expected.query
    assert clip.kind == sample.kind == expected.kind
    assert np.array_equal(clip.masks, expected.masks)
    assert np.array_equal(clip.sound, expected.sound)
    T = len(expected.frames)
    assert list(sample.names) == [f"{t:05d}" for t in range(T)]
    assert np.array_equal(sample.read_masks(), expected.masks)
    two = sample.read_masks([0, 2])
    assert np.array_equal(two, expected.masks[:, [0, 2]])
    for t in range(T):
        assert np.array_equal(clip.frames[t], expected.frames[t])
    few = load(sample, most_frames=3)
    assert np.array_equal(few.masks, expected.sampled(3)[0].masks)


# ---- ReVOS -----------------------------------------------------------------------------------------
FIRST = "OVIS/train/valid-0"
META = "meta_expressions_valid_.json"


def test_revos_in_both_layouts(copy):
    root = copy("revos")
    table = json.loads((root / "mask_dict.json").read_text())
    # Some masks are empty.
    assert any(None in rles for rles in table.values())
    masks = [sample.read_masks() for sample in read("revos", "valid", root)]
    # Each video may lie in either.
    (root / "JPEGImages/OVIS").rename(root / "OVIS")
    samples = read("revos", "valid", root)
    for before, sample in zip(masks, samples, strict=True):
        assert np.array_equal(before, sample.read_masks())
    names = {sample.video: sample.names[:2] for sample in samples}
    assert names == {
        FIRST: ["img_0000001", "img_0000002"],
        "UVO/all/-valid-1": ["00120", "00125"],
    }
    assert {sample.kind for sample in samples} == {"referring", "reasoning", "hallucination"}
    assert {sample.objects for sample in samples} == {0, 1, 2}


def test_revos_foreground_is_all_that_its_expressions_mean(minis):
    samples = read("revos", "valid", minis("revos"))
    first = samples[0]
    union = np.zeros_like(first.read_masks()[0])
    for sample in samples:
        if sample.video == first.video:
            union |= sample.read_masks().any(0)
    assert np.array_equal(first.extra["foreground"]()[0], union)


REVOS_MALFORMED = [
    ("mask_dict.json", cut(500), "JSONDecodeError"),
    (META, write(b'{"videos": "\xff"}'), "UnicodeDecodeError"),
    (META, delete, "no such file"),
    (META, write(b"[]"), "a dict expected"),
    (META, write(b'{"videos": []}'), "'videos' is a list in"),
    (META, drop("videos", FIRST, "frames"), f"no 'frames' in .*: {FIRST}"),
]


@pytest.mark.parametrize("file, damage, message", REVOS_MALFORMED)
def test_a_malformed_file_of_revos_is_named(file, damage, message, copy, capsys):
    root = copy("revos")
    damage(root / file)
    assert_malformed("revos", "valid", root, file, message, capsys)


def mask_at(change):
    """A damage of mask_dict.json: change(masks, t) of the first annotation that `valid` uses.

    t is the first frame on which it has a mask.
    """
    def damage(path):
        meta = json.loads((path.parent / META).read_text())
        keys = []
        for entry in meta["videos"][FIRST]["expressions"].values():
            keys += entry["anno_id"]
        key = str(keys[0])
        table = json.loads(path.read_text())
        t = next(t for t, rle in enumerate(table[key]) if rle)
        change(table[key], t)
        path.write_text(json.dumps(table))

    return damage


def small_mask(masks, t):
    masks[t] = dict(size=[4, 4], counts=[6, 10])


def small_size(masks, t):
    masks[t]["size"] = [4, 4]


FRAME = f"JPEGImages/{FIRST}/img_0000003.jpg"
NO_FRAMES = put_at("videos", FIRST, "frames", value=[])
NO_OBJECT = put_at("videos", FIRST, "expressions", "0", "anno_id", value=[])
UNKNOWN_OBJECT = put_at("videos", FIRST, "expressions", "0", "anno_id", value=[77])
FRAME_FEWER = drop("videos", FIRST, "frames", -1)
RESIZED = "mask of 4 x 4, frame of 128 x 128: annotation .*, frame img_.*is resized"
REVOS_FAULTS = [
    (FRAME, delete, f"{FIRST}/0: cannot read image: .*{FRAME}"),
    (FRAME, folder_for_file, f"{FIRST}/0: cannot read image: .*{FRAME} is a folder"),
    (FRAME, cut(900), f"cannot read .*{FRAME}"),
    (FRAME, save("RGB", (64, 64)), "frames of several sizes: .*img_0000003.jpg"),
    (META, NO_FRAMES, f"{FIRST}/0: .* masks of annotation .* for 0 frames: .*mask_dict.json"),
    (META, drop("videos", FIRST, "expressions", "2", "exp"), f"{FIRST}/2: no 'exp' in .*: {FIRST}/2"),
    (META, put_at("videos", FIRST, "expressions", "2", "type_id", value=7), f"{FIRST}/2: type_id 7 .*"),
    (META, FRAME_FEWER, f"{FIRST}/0: .* masks of annotation .* frames: .*mask_dict.json"),
    (META, NO_OBJECT, f"{FIRST}/0: names no object: .*valid_.json"),
    (META, UNKNOWN_OBJECT, f"{FIRST}/0: no '77' in .*mask_dict.json"),
    ("mask_dict.json", mask_at(small_mask), f"{FIRST}/0: {RESIZED}"),
    ("mask_dict.json", mask_at(small_size), f"{FIRST}/0: counts that do not fill .*4, 4"),
]


@pytest.mark.parametrize("file, damage, message", REVOS_FAULTS)
def test_check_names_a_fault_of_revos(file, damage, message, copy, capsys):
    root = copy("revos")
    damage(root / file)
    assert_fault("revos", "valid", root, message, capsys)


def test_a_missing_frame_of_revos_is_met_when_it_is_read(copy):
    root = copy("revos")
    (root / FRAME).unlink()
    sample = read("revos", "valid", root)[0]
    clip = load(sample)
    with pytest.raises(ValueError, match=f"{sample.name}: cannot read image: .*{FRAME}"):
        clip.frames[2]


def frame_more(path):
    edit(path, lambda value: value["videos"][FIRST]["frames"].append("x"))


WRONG_LENGTHS = [
    (frame_more, "masks of annotation .* frames: .*mask_dict.json"),
    (NO_FRAMES, "masks of annotation .* for 0 frames: .*mask_dict.json"),
]


@pytest.mark.parametrize("damage, message", WRONG_LENGTHS)
def test_loading_revos_names_sample_and_file(damage, message, copy):
    root = copy("revos")
    damage(root / META)
    sample = read("revos", "valid", root)[0]
    with pytest.raises(ValueError, match=f"{sample.name}: .*{message}"):
        load(sample)


def test_revos_masks_of_another_size_are_resized(copy):
    def right_half(masks, t):
        masks[t] = dict(size=[4, 4], counts=[8, 8])

    root = copy("revos")
    mask_at(right_half)(root / "mask_dict.json")
    sample = read("revos", "valid", root)[0]
    expected = np.zeros((CANVAS, CANVAS), bool)
    expected[:, 64:] = True
    masks = load(sample).masks[0]
    places = []
    for name, mask in zip(sample.names, masks):
        if np.array_equal(mask, expected):
            places.append(name)
    assert len(sample.mended) == 1
    assert places[0] in min(sample.mended)


def test_training_on_revos_leaves_out_by_name(copy, monkeypatch):
    root = copy("revos")
    train_meta = root / "meta_expressions_train_.json"
    keys = "videos", "OVIS/train/train-0", "expressions", "0"
    put_at(*keys, "obj_id", value=[])(train_meta)
    put_at(*keys, "anno_id", value=[])(train_meta)
    monkeypatch.setattr(draw, "MOST_OBJECTS", 1)
    kept, dropped = draw.training_samples(find_benchmark("revos"), root, 0)
    assert {sample.objects for sample in kept} == {0, 1}
    assert len(dropped) == 3
    assert sum("2 objects, more than 1" in line for line in dropped) == 2
    message = "revos/OVIS/train/train-0/0: names no object: .*_train_.json"
    assert any(re.match(message, line) for line in dropped)


# ---- MeViS -----------------------------------------------------------------------------------------
def small_masks(path):
    """All masks of a mask_dict.json have 4 x 4 pixels."""
    table = json.loads(path.read_text())
    for masks in table.values():
        masks[:] = [dict(size=[4, 4], counts=[6, 10])] * len(masks)
    path.write_text(json.dumps(table))


def test_check_names_a_fault_of_mevis(copy, capsys):
    root = copy("mevis")
    small_masks(root / "valid_u/mask_dict.json")
    assert_fault("mevis", "valid_u", root, "mask of 4 x 4, frame of 128 x 128", capsys)


# ---- Ref-AVS ---------------------------------------------------------------------------------------
REFAVS_KINDS = {
    "train": {"null", "seen"},
    "val": {"seen"},
    "test_s": {"seen"},
    "test_u": {"unseen"},
    "test_n": {"null"},
}


def test_refavs_rows(minis):
    with open(minis("refavs") / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"TODO", *splits_of("refavs")}
    # Some uids repeat.
    assert len({row["uid"] for row in rows}) < len(rows)
    assert set(splits_of("refavs")) == set(REFAVS_KINDS)


@pytest.mark.parametrize("split", REFAVS_KINDS)
def test_refavs_reads_back_to_the_toy_masks(split, minis):
    root = minis("refavs")
    with open(root / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    samples = read("refavs", split, root)
    for sample in samples:
        row = rows[int(sample.expression)]
        clip = load(sample)
        assert row["split"] == split
        assert row["exp"] == sample.query
        assert clip.task == "avs"
        s, i = re.findall(r"toy-(\d+)-(\d+)", sample.video)[0]
        scene = seen_scene("long", 10 * int(s) + int(i))
        true = scene.masks[int(row["fid"]), :10]
        folder = row["vid"]
        if sample.kind == "null":
            true = np.zeros_like(true)
            folder = ("null_c-", "null_m-")[int(i) % 2] + folder
        assert np.array_equal(clip.masks, true[None])
        assert sample.video == folder
        assert len(clip.sound) == 10 * SAMPLE_RATE
        assert len(clip.frames) == 10
    assert {sample.kind for sample in samples} == REFAVS_KINDS[split]


def spoil_byte(place):
    """A damage: a byte that no text has."""
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[:place] + b"\xff" + content[place:])

    return damage


def open_quote(path):
    path.write_text(path.read_text() + '"' + "no end," * 30000)


HEAD = b"vid,uid,split,fid,exp\n"
REFAVS_MALFORMED = [
    (swap("fid", "object"), "no column 'fid'"),
    (swap("fid,exp", "exp,exp"), "no column 'fid'"),
    (swap("vid,", "exp,"), "2 column 'exp'"),
    (write(HEAD + b"a\n"), "row 0 has no split"),
    (spoil_byte(3), "UnicodeDecodeError"),
    (spoil_byte(-3), "UnicodeDecodeError"),
    (open_quote, "field larger"),
]


@pytest.mark.parametrize("damage, message", REFAVS_MALFORMED)
def test_a_malformed_file_of_refavs_is_named(damage, message, copy, capsys):
    root = copy("refavs")
    damage(root / "metadata.csv")
    assert_malformed("refavs", "val", root, "metadata.csv", message, capsys)


def silence(seconds):
    """A damage: a wav file without a sound."""
    samples = np.zeros(seconds * SAMPLE_RATE, np.int16)
    return lambda path: wavfile.write(path, SAMPLE_RATE, samples)


REFAVS_ROWS = [
    (b"a,a_b_1,val,0\n", "row 0 of .*csv does not fit"),
    (b"a,a_b_1,val,0,a dog,barking\n", "row 0 of .*csv does not fit"),
    (b"a,a_b,val,0,a dog\n", "uid of row 0"),
    (b'a,a_b_1,val,0,"a dog\nb,b_c_1,val,0,a ""cat""\n', "row 0 of .*csv has several lines"),
]


@pytest.mark.parametrize("row, message", REFAVS_ROWS)
def test_an_odd_row_of_refavs_is_named(row, message, copy, capsys):
    root = copy("refavs")
    write(HEAD + row)(root / "metadata.csv")
    assert_fault("refavs", "val", root, message, capsys)


# The first video of `val`.
WAV = "media/toy-1-0_0_10000/audio.wav"
LABELS = "gt_mask/toy-1-0_0_10000/fid_1"
REFAVS_FAULTS = [
    (WAV, delete, "cannot read sound: .*audio.wav"),
    (WAV, silence(3), "sound of 3.0 s, video of 10.0 s: .*audio.wav"),
    (f"{LABELS}/00004.png", delete, "cannot read mask: .*fid_1/00004.png"),
    (f"{LABELS}/00004.png", cut(60), "cannot read mask: .*fid_1/00004.png"),
    (f"{LABELS}/00004.png", save("L", (8, 8)), "mask of shape .8, 8., .*fid_1/00004.png"),
    (LABELS, shutil.rmtree, "no such folder of masks: .*fid_1"),
]


@pytest.mark.parametrize("file, damage, message", REFAVS_FAULTS)
def test_check_names_a_fault_of_refavs(file, damage, message, copy, capsys):
    root = copy("refavs")
    damage(root / file)
    assert_fault("refavs", "val", root, message, capsys)


def test_masks_of_another_size_than_the_frames_are_named(copy):
    root = copy("refavs")
    sample = read("refavs", "val", root)[0]
    for path in (root / LABELS).iterdir():
        Image.new("L", (64, 32)).save(path)
    message = f"{sample.name}: masks of 64 x 32, frames of 128 x 128: .*frames/0.jpg"
    with pytest.raises(ValueError, match=message):
        load(sample)


def test_training_on_refavs_leaves_out_by_name(copy):
    refavs = find_benchmark("refavs")
    root = copy("refavs")
    samples, before = draw.training_samples(refavs, root, 0)
    assert before == []
    last = samples[-1]
    folder = root / "gt_mask" / last.video / f"fid_{last.ids[0]}"
    shutil.rmtree(folder)
    kept, dropped = draw.training_samples(refavs, root, 0)
    assert dropped == [f"{last.name}: no such folder of masks: {folder}"]
    assert len(kept) == len(samples) - 1


def test_refavs_draws_by_the_seed(tmp_path):
    rows = [("vid", "uid", "split", "fid", "exp")]
    for i in range(1700):
        rows.append(("v", f"v_dog_{i}", "train", 0, "a dog"))
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "gt_mask/v/fid_0").mkdir(parents=True)
    draws = []
    for seed in (0, 0, 1):
        samples, _ = draw.training_samples(find_benchmark("refavs"), tmp_path, seed)
        draws.append([sample.expression for sample in samples])
        assert len(set(draws[-1])) == 1600
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_sound_that_ends_early_is_broken_in_training_and_heard_in_evaluation(copy):
    root = copy("refavs")
    (source,), _ = draw.training_sources("refavs", None, dict(refavs=root), 0)
    item = source.items[0]
    sample = item[0]
    path = Path(sample.sound)
    silence(3)(path)
    clip = draw.read_clip(source, item, np.random.default_rng(0))
    assert "sound of 3.0 s, video of 10.0 s" in clip.fault
    assert str(path) in clip.fault
    assert len(load(sample).sound) == 3 * SAMPLE_RATE
    silence(10)(path)
    assert not draw.read_clip(source, item, np.random.default_rng(0)).fault


# ---- pictures: RefCOCO, RefCOCO+, RefCOCOg, ReasonSeg ----------------------------------------------
PICTURES = ["refcoco", "refcoco+", "refcocog", "reasonseg"]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_read_back_to_the_toy_masks(name, minis):
    for split in splits_of(name):
        pictures = list(stills(split, 2))
        for sample in read(name, split, minis(name)):
            clip = load(sample)
            assert clip.masks.shape[:2] == (1, 1)
            assert len(clip.frames) == 1
            candidates = []
            for _, masks, things in pictures:
                candidates += [mask for mask, thing in zip(masks, things) if thing in sample.query]
            assert any(np.array_equal(clip.masks[0, 0], mask) for mask in candidates)


@pytest.mark.parametrize("name", PICTURES)
def test_splits_of_pictures_share_no_name(name, minis):
    """Splits given together share an --out."""
    names = []
    for split in splits_of(name):
        names += [sample.name for sample in read(name, split, minis(name))]
    assert len(set(names)) == len(names)


# ---- RefCOCO ---------------------------------------------------------------------------------------
class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return print, ("run",)


def write_pickle(value):
    return write(pickle.dumps(value))


REFS = "refcoco/refs(unc).p"
INSTANCES = "refcoco/instances.json"
LISTED = dict(split="val", ref_id=1, ann_id=1)
REFCOCO_MALFORMED = [
    (REFS, write_pickle([Evil()]), "holds builtins.print, not plain"),
    (REFS, cut(99), "cannot use"),
    (REFS, write_pickle(5), "a list expected"),
    (REFS, write_pickle([5]), "no 'split' in"),
    (INSTANCES, put_at("annotations", value=[dict(id=1), dict(id=1, area=2)]), "the id 1 comes twice"),
]


@pytest.mark.parametrize("file, damage, message", REFCOCO_MALFORMED)
def test_a_malformed_file_of_refcoco_is_named(file, damage, message, copy, capsys):
    root = copy("refcoco")
    damage(root / file)
    assert_malformed("refcoco", "val", root, file, message, capsys)


def put_polygons(root, polygons):
    """Every annotation has these."""
    path = root / INSTANCES
    value = json.loads(path.read_text())
    for annotation in value["annotations"]:
        annotation["segmentation"] = polygons
    path.write_text(json.dumps(value))


REFCOCO_FAULTS = [
    (REFS, write_pickle([LISTED]), "no 'sentences' in reference 0 of .*unc"),
    (REFS, write_pickle([LISTED | dict(sentences=[])]), "no 'image_id' in reference 0"),
    (REFS, write_pickle([LISTED | dict(sentences=[5], image_id=1)]), "no 'sent_id' in reference 0"),
    (REFS, write_pickle([LISTED | dict(sentences=[5], ann_id=[1])]), "'ann_id' is a list in reference 0"),
    (REFS, write_pickle([LISTED | dict(sentences=[5], image_id=[1])]), "'image_id' is a list in reference 0"),
    (INSTANCES, put_at("annotations", value=[]), "no [0-9]+ in the annotations"),
    (INSTANCES, put_at("images", value=[5, dict(id=[2])]), "no [0-9]+ in the images"),
]


def test_polygons_of_a_picture_of_another_size_are_named(copy, capsys):
    root = copy("refcoco")
    path = root / INSTANCES
    value = json.loads(path.read_text())
    for image in value["images"]:
        image["height"] = 64
    path.write_text(json.dumps(value))
    code, broken, _ = run_check("refcoco", "val", root, capsys)
    assert code == 1
    assert all("not 64 x 128 pixels" in line for line in broken)
    with pytest.raises(BadInput, match="its polygons are of another size"):
        read("refcoco", "val", root)[0].read_masks()


@pytest.mark.parametrize("file, damage, message", REFCOCO_FAULTS)
def test_check_names_a_fault_of_refcoco(file, damage, message, copy, capsys):
    root = copy("refcoco")
    damage(root / file)
    assert_fault("refcoco", "val", root, message, capsys)


def test_coco_polygons_that_overlap_stay_true(copy):
    root = copy("refcoco")
    first = [10, 10, 30, 10, 30, 30, 10, 30]
    second = [20, 20, 40, 20, 40, 40, 20, 40]
    put_polygons(root, [first, second])
    masks = read("refcoco", "val", root)[0].read_masks()
    expected = np.zeros_like(masks)
    expected[..., 10:30, 10:30] = True
    expected[..., 20:40, 20:40] = True
    assert masks.dtype == bool
    assert np.array_equal(masks, expected)


# ---- ReasonSeg -------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_reasonseg_knows_what_is_to_be_ignored(split, minis):
    """In the miniature it is the second thing."""
    pictures = list(stills(split, 2))
    for sample in read("reasonseg", split, minis("reasonseg")):
        _, masks, _ = pictures[int(Path(sample.video).name)]
        expected = np.zeros_like(masks[0])
        if len(masks) > 1:
            expected = masks[1]
        assert np.array_equal(sample.extra["ignore"]()[0, 0], expected)


def test_only_training_asks_each_phrasing(minis):
    """The second phrasing has an accent; one of its files is in cp1252."""
    for split in splits_of("reasonseg"):
        samples = read("reasonseg", split, minis("reasonseg"))
        accents = any("voilà" in sample.query for sample in samples)
        assert accents == (split == "train")


REASONSEG_FAULTS = [
    ("val/0.jpg", write(b""), "0/0: cannot read image: .*val/0.jpg"),
    ("val/0.json", write(b'{"text": ["a"]'), "0/0: .*JSONDecodeError"),
    ("val/0.json", drop("shapes"), "0/0: no 'shapes' in .*val/0.json"),
    ("val/0.json", put_at("text", value=[]), "0/0: the query is empty"),
    ("val/0.json", put_at("text", value=[None]), "0/0: the query is a NoneType"),
]
for points in ([[1, 2], 3], [[1, 2], [3, None]], []):
    fault = put_at("shapes", 0, "points", value=points)
    REASONSEG_FAULTS.append(("val/0.json", fault, "0/0: .*val/0.json: shape 0"))


@pytest.mark.parametrize("file, damage, message", REASONSEG_FAULTS)
def test_check_names_a_fault_of_reasonseg(file, damage, message, copy, capsys):
    root = copy("reasonseg")
    damage(root / file)
    assert_fault("reasonseg", "val", root, message, capsys)


# ---- refcocog_2k_840 -------------------------------------------------------------------------------
# Pixels of the pictures for one of the toy world.
SCALE = 840 / CANVAS


@pytest.fixture
def parquet(tmp_path):
    """(its root, its one file)"""
    pytest.importorskip("pyarrow")
    root = tmp_path / "refcocog_2k_840"
    write_mini(find_benchmark("refcocog_2k_840"), str(root), videos=3)
    file, = (root / "data").iterdir()
    return root, file


def test_parquet(parquet):
    root, _ = parquet
    samples = read("refcocog_2k_840", "train", root)
    for i, (picture, masks, names) in enumerate(stills("train", 3)):
        sample = samples[i]
        clip = load(sample)
        assert (clip.task, clip.query) == ("image", f"the {names[0]}")
        assert sample.names == [f"refcocog_{i}"]
        ys, xs = masks[0].nonzero()
        box = np.array(clip.truth["box"]) / SCALE
        true = (xs.min(), ys.min(), xs.max(), ys.max())
        assert np.abs(box - true).max() < 0.1
        for x, y in clip.truth["points"]:
            assert masks[0][round(y / SCALE), round(x / SCALE)]
        assert clip.size == clip.truth["size"] == (840, 840)
        small = clip.frames[0].resize((CANVAS, CANVAS))
        assert np.abs(np.asarray(small, float) - picture).mean() < 6
    assert len(samples) == 3


def test_parquet_asks_for_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").touch()
    refcocog_2k_840.open_parquet.cache_clear()
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read("refcocog_2k_840", "train", tmp_path)


def read_changed(parquet, column, values):
    """The samples, once a column of the file holds other values."""
    import pyarrow
    import pyarrow.parquet as library
    root, file = parquet
    table = library.read_table(file)
    place = table.schema.names.index(column)
    library.write_table(table.set_column(place, column, pyarrow.array(values)), file)
    refcocog_2k_840.open_parquet.cache_clear()
    return read("refcocog_2k_840", "train", root)


@pytest.mark.parametrize("column", ["id", "problem", "solution"])
@pytest.mark.parametrize("values", [[3, 4, 5], [None, "a", "b"]])
def test_a_cell_of_another_type_is_named(column, values, parquet):
    sample, *_ = read_changed(parquet, column, values)
    with pytest.raises(BadInput, match=f"'{column}' is a .* in row 0: {parquet[1]}"):
        load(sample)


SOLUTIONS = [
    "<box>(1,2),(3,4)</box>",
    f"<box>(1,2),(3,{10 ** 400})</box><points>(1,2),(3,4)</points>",
    "<box>(1,2),(3,841)</box><points>(1,2),(3,4)</points>",
    "<box>(9,2),(3,4)</box><points>(1,2),(3,4)</points>",
]


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_a_solution_beside_its_picture_is_named(solution, parquet):
    good = "<box>(1,2),(3,4)</box><points>(1,2),(3,4)</points>"
    samples = read_changed(parquet, "solution", [good, solution, good])
    faults = [bool(sample.fault) for sample in samples]
    assert faults == [False, True, False]
    assert f"in the solution of row 1: {parquet[1]}" in samples[1].fault


NO_PICTURES = [
    [5, 6, 7],
    [dict(bytes=None), dict(bytes=b""), dict(bytes=b"")],
    [[1], [], []],
]


@pytest.mark.parametrize("values", NO_PICTURES)
def test_a_broken_picture_of_parquet_is_named(values, parquet):
    samples = read_changed(parquet, "image", values)
    with pytest.raises(BadInput, match=f"cannot use {parquet[1]}#0"):
        load(samples[0])


def test_a_broken_parquet_is_named(parquet):
    import pyarrow.parquet as library
    root, file = parquet
    content = file.read_bytes()
    metadata = library.ParquetFile(io.BytesIO(content)).metadata
    start = metadata.row_group(0).column(0).data_page_offset
    file.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20:])
    refcocog_2k_840.open_parquet.cache_clear()
    with pytest.raises(BadInput, match=f"cannot use {file}"):
        read("refcocog_2k_840", "train", root)


# ---- Ref-DAVIS -------------------------------------------------------------------------------------
def test_refdavis_annotators_and_void(minis):
    sample = read("refdavis", "valid", minis("refdavis"))[5]
    labels = sample.extra["annotation"]()
    assert sample.extra["annotator"] == 1
    assert sample.kind == "full video"
    assert sample.ids == ("2",)
    assert labels.dtype == np.uint8
    assert {0, 1, 2, 255} <= set(np.unique(labels))
    assert np.array_equal(labels == 2, sample.read_masks()[0])


DAVIS = "meta_expressions/valid/meta_expressions.json"
NO_NUMBERS = [
    ("obj_id", "one", "is no number in .*toy-3/0"),
    ("obj_id", "\u00b2", "is no number in .*toy-3/0"),
    ("obj_id", "9" * 5000, "is no number in .*toy-3/0"),
    ("obj_id", [1], "'obj_id' is a list"),
    ("obj_id", "0", "obj_id 0 is no number of an object"),
    ("obj_id", 300, "obj_id 300 is no number of an object"),
    ("obj_id", "9", "the masks of 9 are empty on all frames"),
]


@pytest.mark.parametrize("key, value, message", NO_NUMBERS)
def test_an_odd_number_of_refdavis_is_named(key, value, message, copy, capsys):
    root = copy("refdavis")
    put_at("videos", "toy-3", "expressions", "0", key, value=value)(root / DAVIS)
    assert_fault("refdavis", "valid", root, message, capsys)


def test_an_odd_id_of_refdavis_leaves_the_others_their_scores(copy, tmp_path):
    root = copy("refdavis")
    edit(root / DAVIS, rename("videos", "toy-3", "expressions", old="0", new="\u00b2"))
    samples = read("refdavis", "valid", root)
    for sample in samples:
        if not sample.fault:
            write_prediction(tmp_path, sample, sample.read_masks()[0])
    results = score_predictions(find_benchmark("refdavis"), samples, tmp_path)
    assert len(results["broken"]) == 1
    assert "toy-3/\u00b2: " in results["broken"][0]
    assert results["summary"]["annotator 1 J"] == 100


def test_check_names_a_fault_of_refdavis(copy, capsys):
    root = copy("refdavis")
    save("RGB", (128, 128))(root / "valid/Annotations/toy-3/00000.png")
    assert_fault("refdavis", "valid", root, "mask of shape .128, 128, 3.*00000.png", capsys)


# ---- Ref-YouTube-VOS -------------------------------------------------------------------------------
def test_a_malformed_file_of_refytvos_is_named(copy, capsys):
    root = copy("refytvos")
    file = "meta_expressions/test/meta_expressions.json"
    delete(root / file)
    assert_malformed("refytvos", "valid", root, file, "no such file", capsys)


# ---- ReasonVOS -------------------------------------------------------------------------------------
def test_check_names_a_fault_of_reasonvos(copy, capsys):
    root = copy("reasonvos")
    shutil.rmtree(root / "Annotations/mevis_toy_0_0")
    assert_fault("reasonvos", "test", root, "cannot read mask: .*_0_0/00000.png", capsys)


# ---- Video-R1 --------------------------------------------------------------------------------------
def test_questions(minis):
    samples = read("video_r1", "train", minis("video_r1"))
    types = [sample.truth["type"] for sample in samples[:5]]
    assert types == ["multiple choice", "numerical", "OCR", "free-form", "regression"]
    truth = samples[0].truth
    assert truth["solution"] == "B"
    assert len(truth["options"]) == 2

    scene = seen_scene("train", 0)
    video = load(samples[0])
    assert len(video.frames) == len(scene.pictures)
    assert video.task == "qa"
    assert video.truth is truth
    length = len(video.sound)
    assert length >= 0.9 * len(scene.sound)
    assert np.abs(video.sound - scene.sound[:length]).max() < 1e-3
    picture = load(samples[5])
    assert len(picture.frames) == 1
    assert picture.sound is None


NO_QUESTIONS = [
    (drop(3, "path"), "no 'path' in"),
    (put_at(3, value=5), "no 'problem' in"),
    (put_at(3, "path", value="../../etc/passwd"), "'../../etc/passwd' leads out of its folder"),
    (put_at(3, "path", value="/etc/passwd"), "'/etc/passwd' leads out of its folder"),
    (put_at(3, "path", value=""), "'.' leads out of its folder"),
    (put_at(3, "data_type", value="audio"), "data_type 'audio' is neither"),
    (put_at(3, "problem_type", value="essay"), "problem_type 'essay' is unknown"),
    (put_at(3, "problem_type", value=["OCR"]), "'problem_type' is a list"),
    (put_at(3, "options", value="A. pink"), "'options' is a str"),
    (put_at(3, "options", value=["A. pink", 5]), "an option in .* is a int"),
    (put_at(3, "options", value=["A. pink", " "]), "an option in .* is empty"),
    (put_at(3, "options", value=["A" * 5000] * 2), "the question with its options in .* has 10"),
    (put_at(3, "solution", value=7), "the solution in .* is a int"),
    (put_at(3, "solution", value=" "), "the solution in .* is empty"),
    (put_at(3, "solution", value="<answer> </answer>"), "the answer in the solution in .* is empty"),
    (put_at(3, "solution", value="<answer>B"), "the answer in the solution in .* is empty"),
    (put_at(0, "solution", value="<answer>Z</answer>"), "the solution 'Z' is none of the options"),
    (put_at(0, "options", value=[]), "is none of the options"),
    (put_at(1, "solution", value="<answer>1e999</answer>"), "the solution '1e999' is no number"),
    (drop(3, "solution"), "no 'solution' in"),
]


@pytest.mark.parametrize("damage, message", NO_QUESTIONS)
def test_an_odd_question_is_named_and_left_out(damage, message, copy, capsys):
    root = copy("video_r1")
    damage(root / "Video-R1-260k.json")
    assert_fault("video_r1", "train", root, message, capsys)
    kept, dropped = draw.training_samples(find_benchmark("video_r1"), root, 0)
    assert len(kept) == 9
    assert len(dropped) == 1
    assert re.search(message, dropped[0])
    assert re.search("Video-R1-260k.json: item [013]", dropped[0])


def short_sound(path):
    """A video whose sound lasts one second."""
    scene = seen_scene("train", 0)
    path.write_bytes(video_file(scene.pictures, scene.sound[:SAMPLE_RATE]))


VIDEO_R1_FAULTS = [
    (delete, "no such video file .*STAR/toy0.avi"),
    (short_sound, "sound of .* video of .*toy0.avi"),
]


@pytest.mark.parametrize("damage, message", VIDEO_R1_FAULTS)
def test_check_names_a_fault_of_video_r1(damage, message, copy, capsys):
    root = copy("video_r1")
    damage(root / "STAR/toy0.avi")
    assert_fault("video_r1", "train", root, message, capsys)


# ---- faults that every benchmark knows -------------------------------------------------------------
# Of each layout: a split, a JSON file, and the keys of the video's or the expression's record in it.
R1 = "Video-R1-260k.json"
MEVIS = "meta_expressions.json"
VALID = "meta_expressions/valid/meta_expressions.json"
EXPRESSIONS = [
    ("revos", "valid", META, ("videos", FIRST, "expressions", "0"), "exp"),
    ("mevis", "valid_u", f"valid_u/{MEVIS}", ("videos", "000000000000", "expressions", "0"), "exp"),
    ("mevis", "valid", f"valid/{MEVIS}", ("videos", "000000000002", "expressions", "0"), "exp"),
    ("refdavis", "valid", DAVIS, ("videos", "toy-3", "expressions", "0"), "exp"),
    ("refytvos", "valid", VALID, ("videos", "0000000000", "expressions", "0"), "exp"),
    ("reasonvos", "test", "meta_expressions.json", ("videos", "toy_0", "expressions", 0), "exp_text"),
    ("reasonseg", "val", "val/0.json", ("text",), 0),
    ("video_r1", "train", R1, (0,), "problem"),
]
each_layout = pytest.mark.parametrize("name, split, file, keys, words", EXPRESSIONS)
NO_TEXTS = [
    ("", "is empty"),
    (" \n\u200b", "is empty"),
    ("a" * 100_000, "has 1000[0-9]+ characters"),
    (5, "is a int"),
    (None, "is a NoneType"),
    (["a"], "is a list"),
]


def assert_one_broken(name, split, root, message, capsys):
    """One sample is broken: check names it, loading it says so, and no other one suffers."""
    assert_fault(name, split, root, message, capsys)
    samples = read(name, split, root)
    broken = [sample for sample in samples if sample.broken]
    assert len(broken) == 1
    with pytest.raises(BadInput, match=message):
        load(broken[0])
    for sample in samples:
        if sample is not broken[0]:
            load(sample)


@each_layout
@pytest.mark.parametrize("text, message", NO_TEXTS)
def test_a_query_that_nobody_can_read_breaks_one_sample(
        name, split, file, keys, words, text, message, copy, capsys):
    root = copy(name)
    put_at(*keys, words, value=text)(root / file)
    assert_one_broken(name, split, root, message, capsys)


BAD_NAMES = ["..", "../../x", "/x", "a/../../b", "a\\b", "x\n", "x\0", "", "x" * 300, "x.partial"]


@pytest.mark.parametrize("bad", BAD_NAMES)
@pytest.mark.parametrize("name, split, file, keys, words", EXPRESSIONS[:5])
def test_names_that_leave_their_folder_break_their_samples(
        name, split, file, keys, words, bad, copy, tmp_path, capsys):
    """Ids of expressions, of videos, names of frames."""
    places = [
        (keys[:3], keys[3]),
        (keys[:1], keys[1]),
    ]
    for place, old in places:
        root = copy(name)
        count = len(read(name, split, root))
        edit(root / file, rename(*place, old=old, new=bad))
        assert_nothing_outside(name, split, root, count, tmp_path, capsys)
        shutil.rmtree(root)
    root = copy(name)
    put_at(*keys[:2], "frames", 1, value=bad)(root / file)
    assert_nothing_outside(name, split, root, count, tmp_path, capsys)


def assert_nothing_outside(name, split, root, count, tmp_path, capsys):
    """The samples of a bad name are broken, and nothing is written or packed for them."""
    code, broken, _ = run_check(name, split, root, capsys)
    samples = read(name, split, root)
    bad = [sample for sample in samples if sample.broken]
    assert code == 1
    assert len(samples) == count
    assert 0 < len(broken) == len(bad) < count
    out = tmp_path / "deep/out"
    for sample in bad:
        assert sample.name.isprintable()
        with pytest.raises(BadInput):
            load(sample)
    assert unpredicted(out, bad) == bad
    (out / "Annotations").mkdir(parents=True)
    path = zip_predictions(find_benchmark(name), bad, out, out)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == []
    shutil.rmtree(out)


@pytest.mark.parametrize("source", ["..", "../../x", "/x", "a/b"])
def test_a_source_of_reasonvos_that_leaves_its_folder_is_named(source, copy, capsys):
    root = copy("reasonvos")
    put_at("videos", "toy_0", "source", value=source)(root / "meta_expressions.json")
    # Within a longer name, dots lead nowhere.
    message = "cannot read mask" if source == ".." else "leads out of its folder"
    assert_fault("reasonvos", "test", root, message, capsys)


@pytest.mark.parametrize("file_name", ["../../x.jpg", "/x.jpg", "a/b.jpg", "x\0.jpg"])
def test_a_file_name_of_refcoco_that_leaves_its_folder_is_named(file_name, copy, capsys):
    root = copy("refcoco")
    put_at("images", 2, "file_name", value=file_name)(root / INSTANCES)
    assert_fault("refcoco", "val", root, "leads out of its folder|do not have", capsys)
    samples = read("refcoco", "val", root)
    assert any(sample.broken for sample in samples)
    assert not all(sample.broken for sample in samples)


@pytest.mark.parametrize("uid", ["../../x_dog_1", "/x_dog_1", "a/b_dog_1"])
@pytest.mark.parametrize("fid", ["0", "/../../0"])
def test_a_uid_or_fid_of_refavs_that_leaves_its_folder_is_named(uid, fid, copy, capsys):
    root = copy("refavs")
    path = root / "metadata.csv"
    uid = uid if fid == "0" else "v_dog_1"
    path.write_text(path.read_text() + f"v,{uid},val,{fid},a dog\n")
    assert_one_broken("refavs", "val", root, "leads out of its folder", capsys)


# ---- places of predictions
def same_id(root):
    """Two expressions of ReasonVOS with one object and one id."""
    def change(value):
        entries = value["videos"]["toy_0"]["expressions"]
        entries[1] = dict(entries[0])

    edit(root / "meta_expressions.json", change)
    return 2


def same_folder(root):
    """A video of ReVOS whose name is the folder of another one's prediction."""
    def change(value):
        value["videos"][FIRST + "/0"] = value["videos"][FIRST]

    edit(root / META, change)
    (root / "JPEGImages" / FIRST / "0").symlink_to(root / "JPEGImages" / FIRST)
    return 1


def same_sentence(root):
    refs = pickle.loads((root / REFS).read_bytes())
    ref = next(ref for ref in refs if ref["split"] == "val")
    ref["sentences"][1]["sent_id"] = ref["sentences"][0]["sent_id"]
    write_pickle(refs)(root / REFS)
    return 2


def same_frame(root):
    def change(value):
        video = value["videos"][FIRST]
        video["frames"][1] = video["frames"][0]

    edit(root / META, change)
    return None


SHARED = [
    ("reasonvos", "test", same_id, "another expression of the video has the same id"),
    ("revos", "valid", same_folder, "another video has the name of its prediction's folder"),
    ("refcoco", "val", same_sentence, "another expression of the video has the same id"),
    ("revos", "valid", same_frame, "two frames have the same name"),
]


@pytest.mark.parametrize("name, split, damage, message", SHARED)
def test_samples_that_would_share_a_prediction_are_broken(name, split, damage, message, copy, capsys):
    root = copy(name)
    count = damage(root)
    assert_fault(name, split, root, message, capsys)
    samples = read(name, split, root)
    broken = [sample for sample in samples if sample.broken]
    assert len(broken) == (count or sum(sample.video == FIRST for sample in samples))
    assert all(re.search(message, sample.broken) for sample in broken)


# ---- masks
def black(path):
    size = Image.open(path).size
    Image.new("L", size).save(path)


def in_alpha(path):
    """The mask stands in the alpha channel of a black picture."""
    mask = Image.open(path).convert("L")
    picture = Image.new("LA", mask.size)
    picture.putalpha(mask)
    picture.save(path)


def black_palette(path):
    mask = np.array(Image.open(path).convert("L")) > 0
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette([0, 0, 0] * 256)
    picture.save(path)


def each(pattern, damage):
    """A damage of all files of a pattern below the root."""
    def change(root):
        for path in root.glob(pattern):
            damage(path)

    return change


def all_null(root):
    def change(table):
        for masks in table.values():
            masks[:] = [None] * len(masks)

    edit(root / "mask_dict.json", change)


def no_target(root):
    """No shape of a picture is the target."""
    def change(record):
        for shape in record["shapes"]:
            shape["label"] = shape["label"].replace("target", "ignored")

    edit(root / "val/0.json", change)


def beside(root):
    """The polygons lie beside the picture."""
    put_polygons(root, [[-20, -20, -10, -20, -10, -10]])


EMPTY = [
    ("revos", "valid", all_null),
    ("reasonseg", "val", no_target),
    ("refcoco", "val", beside),
]
for damage in (black, in_alpha, black_palette):
    EMPTY.append(("refavs", "val", each("gt_mask/toy-1-0*/fid_1/*.png", damage)))
    EMPTY.append(("reasonvos", "test", each("Annotations/mevis_toy_0_0/*.png", damage)))


@pytest.mark.parametrize("name, split, damage", EMPTY)
def test_a_target_that_is_on_no_frame_is_named_and_not_trained_on(name, split, damage, copy, capsys):
    root = copy(name)
    damage(root)
    assert_fault(name, split, root, "empty on all frames", capsys)
    samples = read(name, split, root)
    sample = next(sample for sample in samples if not sample.null and not sample.read_masks().any())
    source = draw.Source("vos", [[sample]], partial(draw.read_any, frames=(4, 4)))
    clip = draw.read_clip(source, [sample], np.random.default_rng(0))
    assert "empty on all frames" in clip.fault
    # Its official score is what it is.
    assert evaluation.score_sample(find_benchmark(name), sample, str(root))["problem"] == "missing"


def test_queries_that_name_nothing_may_have_empty_masks(copy, capsys):
    root = copy("revos")
    null = [sample for sample in read("revos", "valid", root) if sample.kind == "hallucination"]
    assert null
    for sample in null + read("refavs", "test_n", copy("refavs")):
        assert not load(sample).masks.any()
        assert not sample.fault


def test_a_target_may_be_out_of_sight_on_the_sampled_frames(minis):
    samples = read("revos", "train", minis("revos"))
    empty = 0
    for sample in samples:
        if not sample.null:
            for most in (1, 2, 3):
                empty += not load(sample, most_frames=most).masks.any()
    assert empty > 0


def test_an_annotation_twice_is_one_object_and_a_fault(copy, capsys):
    root = copy("revos")
    path = root / META
    before = read("revos", "valid", root)[0]
    ids = json.loads(path.read_text())["videos"][FIRST]["expressions"]["0"]["anno_id"]
    put_at("videos", FIRST, "expressions", "0", "anno_id", value=ids * 2)(path)
    assert_fault("revos", "valid", root, "names an object twice", capsys)
    sample = read("revos", "valid", root)[0]
    assert sample.objects == before.objects
    assert np.array_equal(sample.read_masks(), before.read_masks())


def test_an_odd_id_of_revos_breaks_one_sample(copy, tmp_path):
    """The foreground of its video is that of the other expressions."""
    for bad in ([77], [[1]], [None], 5):
        root = copy("revos")
        put_at("videos", FIRST, "expressions", "0", "anno_id", value=bad)(root / META)
        samples = read("revos", "valid", root)
        results = score_predictions(find_benchmark("revos"), samples, tmp_path)
        assert len(results["broken"]) == 1
        shutil.rmtree(root)


# ---- numbers that take all time or memory
HUGE = [1e9, -1e9, float("inf"), float("-inf"), float("nan"), 10 ** 400, 1e18, "9", None]


@pytest.mark.parametrize("number", HUGE)
def test_a_corner_far_beside_the_picture_is_named(number, copy):
    polygon = [10, 10, 30, 10, number, 30]
    root = copy("refcoco")
    sample = read("refcoco", "val", root)[0]
    began = time.process_time()
    with pytest.raises(BadInput, match="corner"):
        coco_mask(sample, [polygon], "instances.json")
    shape = dict(label="target", points=[[10, 10], [30, number], [9, 9]])
    picture = sample.pictures[0]
    with pytest.raises(BadInput, match="val/0.json: shape 0"):
        lisa_mask(picture, "val/0.json", [shape], 1)
    assert time.process_time() - began < 1


def test_corners_a_little_outside_are_drawn():
    corners, = near_corners([[(-5, -5), (200, 10), (30.5, 127)]], 128, 128, "here")
    assert corners.shape == (3, 2)


def test_an_endless_outline_is_refused():
    there_and_back = [(0, 0), (128, 128)] * 10_000
    with pytest.raises(BadInput, match="outlines of 2560000 pixels, more than"):
        near_corners([there_and_back], 128, 128, "here")


SIZES = [
    dict(size=[10 ** 6, 10 ** 6], counts=[10 ** 12]),
    dict(size=[10 ** 6, 10 ** 6], counts="1"),
    dict(size=[-2, -2], counts=[4]),
    dict(size=[0, 4], counts=[0]),
    dict(size=[2 ** 70, 1], counts=[2 ** 70]),
    dict(size=[2, 2], counts=[2 ** 62] * 4 + [4]),
    dict(size=[2, 2], counts=[0] * 10 ** 6 + [4]),
    dict(size=[2, 2], counts="0" * 10 ** 6),
    dict(size=[2, 2], counts="o" * 20 + "4"),
    dict(size=[2, 2], counts="\ud83d4"),
    dict(size=[2, 2], counts=[[1], 2]),
    dict(size=[2, 2], counts=[True, 3]),
]


@pytest.mark.parametrize("rle", SIZES)
def test_run_lengths_of_odd_sizes_name_their_place(rle):
    for frame in (None, (2, 2)):
        with pytest.raises(BadInput, match="mask_dict.json"):
            rle_mask(rle, "mask_dict.json", frame)


def test_masks_that_memory_does_not_hold_are_refused(minis, monkeypatch):
    monkeypatch.setattr("benchmarks.samples.MOST_MASKED", 100_000)
    for name, split in (("revos", "valid"), ("refavs", "val"), ("refdavis", "valid")):
        sample = read(name, split, minis(name))[0]
        with pytest.raises(BadInput, match=f"{sample.name}: .*masks of [0-9]+ pixels together"):
            sample.read_masks()


def fifo(path):
    path.unlink()
    os.mkfifo(path)


PIPES = [
    ("refavs", "val", "metadata.csv"),
    ("refavs", "val", f"{LABELS}/00004.png"),
    ("refcoco", "val", REFS),
]


@pytest.mark.parametrize("name, split, file", PIPES)
def test_a_named_pipe_is_not_waited_for(name, split, file, copy, capsys):
    root = copy(name)
    fifo(root / file)
    code, broken, _ = run_check(name, split, root, capsys)
    assert code == 1
    assert "is no ordinary file" in broken[0]


@pytest.mark.parametrize("name, split, file", [
    ("revos", "valid", META),
    ("refavs", "val", "metadata.csv"),
    ("reasonseg", "val", "val/0.json"),
    ("video_r1", "train", R1),
])
def test_a_byte_order_mark_is_skipped(name, split, file, copy):
    root = copy(name)
    before = [sample.query for sample in read(name, split, root)]
    path = root / file
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    samples = read(name, split, root)
    assert [sample.query for sample in samples] == before
    assert not any(sample.fault for sample in samples)


# ---- adding a benchmark ----------------------------------------------------------------------------
def code_of_readme():
    """The file that benchmarks/README.md shows."""
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


@pytest.fixture
def dots(tmp_path, monkeypatch):
    """The README's benchmark: its file in the package, its record in the list. No other code is touched."""
    code = code_of_readme()
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 60
    (tmp_path / "package").mkdir()
    (tmp_path / "package/dots.py").write_text(code, encoding="utf-8")
    package = [*benchmarks.__path__, str(tmp_path / "package")]
    monkeypatch.setattr(benchmarks, "__path__", package)
    module = importlib.import_module("benchmarks.dots")
    entry = Entry("dots", "dots.DOTS", "dots", ("train", "test"), "test")
    monkeypatch.setattr(benchmarks, "BENCHMARKS", (*BENCHMARKS, entry))
    yield find_benchmark("dots")
    del sys.modules["benchmarks.dots"]
    del benchmarks.dots


@pytest.fixture
def dots_root(dots, tmp_path):
    """A data root with a miniature of it."""
    check.main(["mini", "--bench", "dots", "--out", str(tmp_path / "data")])
    return tmp_path / "data"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_new_benchmark_is_checked(split, dots_root, capsys):
    code, broken, summary = run_check("dots", split, dots_root / "dots", capsys)
    assert code == 0
    assert broken == []
    assert "4 videos, 4 expressions (4 with masks)" in summary
    drop(f"{split}-2", "query")(dots_root / f"dots/{split}.json")
    assert_malformed("dots", split, dots_root / "dots", f"{split}.json", f"no 'query' in .*{split}-2", capsys)


def test_a_new_benchmark_is_shown(dots_root, tmp_path):
    out = tmp_path / "shown"
    check.main(["show", "--bench", "dots", "--data_root", str(dots_root), "--out", str(out)])
    sample = read("dots", "train", dots_root / "dots")[0]
    assert sample.query in (out / "prompt.txt").read_text()
    sheet = np.array(Image.open(out / "sample.png"))
    assert_target_is_outlined(sheet, load(sample))


def test_a_new_benchmark_rates_the_truth_and_nothing_at_all(dots, dots_root, tmp_path):
    samples = read("dots", "test", dots_root / "dots")
    empty = score_predictions(dots, samples, tmp_path)
    assert empty["summary"] == {"overall hit": 0}
    for sample in samples:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    best = score_predictions(dots, samples, tmp_path)
    assert best["summary"]["overall hit"] > 95


def test_a_new_benchmark_is_trained_on_and_evaluated(dots_root, tmp_path, monkeypatch, capsys):
    data = ["--data_root", dots_root]
    small = ["--steps", 2, "--batch", 1, "--updates", 1, "--workers", 0]
    rows = train_here(tmp_path, monkeypatch, "--data", "dots", *data, *small)
    assert len(rows) == 2
    out = tmp_path / "test"
    policy = tmp_path / "out/here/policy"
    capsys.readouterr()
    results = evaluate_here(out, "--bench", "dots", *data, "--policy", policy)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["hit", "visible", "format", "expressions"]
    hit = results["summary"]["overall hit"]
    assert 0 <= hit <= 100
    overall = next(line for line in table if line.startswith("overall"))
    assert overall.split()[1] == f"{hit:.2f}"
    # A benchmark's own value is compared.
    again = evaluate_here(
        tmp_path / "again", "--bench", "dots", *data, "--predictions", out, "--against", out / "results.json")
    assert again["against"]["difference"] == 0
