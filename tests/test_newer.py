"""The newer benchmarks: MeViSv2, Long-RVOS, OmniAVS with its references, and how Ref-AVS is asked.

Metrics are held against loops written here. Miniatures go through check, show, evaluation of the toy policy,
and the scores of their own truth, of nothing, and of all but the truth.
Letters: O objects, T frames, H W pixels.
"""
import json
import re
import sys
import zipfile
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import approx
from scipy.io import wavfile

import eval as evaluation
import segment as segment_program
from benchmarks import check, find_benchmark, find_entry, open_split
from benchmarks.longrvos import longrvos_subsets, score_longrvos
from benchmarks.media import read_sound
from benchmarks.metrics import meteor
from benchmarks.mevisv2 import mean_mevisv2, score_mevisv2
from benchmarks.mini import sound_file
from benchmarks.omniavs import KINDS, omniavs_subsets, score_omniavs
from benchmarks.predictions import unpredicted, write_prediction
from benchmarks.references import in_windows, read_reference, show_references, with_places
from benchmarks.reports import score_table
from benchmarks.samples import load
from benchmarks.toy import toy_clip
from data import MEDIA, Processor, prompt, prompt_inputs
from eval import score_predictions
from model import Thinker
from run import draw
from tests.test_benchmarks import assert_fault, assert_malformed, delete, drop, put_at, run_check, save, write
from tests.test_data import noise_clip, pair  # noqa: F401
from tests.test_metrics import a_sample, blobs, columns_of, slow_means
from tests.world import evaluate_here, noise_picture, seen_scene, train_here
from trust.errors import BadInput
from trust.options import TOY_POLICY

NEW = ("mevisv2", "omniavs", "longrvos")


def read(name, split, root):
    return open_split(find_benchmark(name), split, str(root))


def evaluated_samples(name, root):
    return read(name, find_entry(name).tested, root)


# ---- MeViSv2 ---------------------------------------------------------------------------------------
def slow_final(samples, preds):
    """J, F, N-acc, T-acc and Final of all expressions, by loops."""
    J = []
    F = []
    silent = []
    spoken = []
    for sample, pred in zip(samples, preds):
        j, f = slow_means(pred, sample.read_masks().any(0))
        J.append(j)
        F.append(f)
        pixels = 0
        for place in np.ndindex(pred.shape):
            pixels += int(pred[place])
        if sample.null:
            silent.append(pixels == 0)
        else:
            spoken.append(pixels > 0)
    N = 100 * silent.count(True) / len(silent)
    T = 100 * spoken.count(True) / len(spoken)
    jf = (np.mean(J) + np.mean(F)) / 2
    return [np.mean(J), np.mean(F), N, T, (jf + N + T) / 3]


@pytest.mark.parametrize("seed", range(3))
def test_mevisv2_against_loops(seed):
    true = blobs(seed, 6, 2, 3, 12, 16)
    pred = blobs(seed + 20, 6, 3, 12, 16)
    # One expression without a target is answered by nothing, one by something; so are two with one.
    true[:2] = False
    pred[[0, 2]] = False
    samples = [a_sample(masks, str(i), null=i < 2) for i, masks in enumerate(true)]
    rows = []
    for sample, masks in zip(samples, pred):
        rows.append(score_mevisv2(sample, sample.read_masks(), masks))
    means = mean_mevisv2(rows)
    assert columns_of(means, "J F N-acc T-acc Final") == approx(slow_final(samples, pred))
    assert columns_of(means, "N-acc T-acc") == [50.0, 75.0]


def test_mevisv2_final_is_the_mean_of_three_columns():
    """A published row: J&F 53.09, N-acc 41.38, T-acc 92.53, Final 62.33."""
    rows = []
    for i in range(10_000):
        rows.append(dict(J=53.0, F=53.18, null=True, right=i < 4138))
        rows.append(dict(J=53.0, F=53.18, null=False, right=i < 9253))
    means = mean_mevisv2(rows)
    assert columns_of(means, "J&F N-acc T-acc") == approx([53.09, 41.38, 92.53])
    assert round(means["Final"], 2) == 62.33
    # Without one of the three there is none.
    assert "Final" not in mean_mevisv2(rows[::2])
    assert "T-acc" not in mean_mevisv2(rows[::2])


def test_mevisv2_a_missing_prediction_is_no_answer():
    empty = np.zeros((1, 2, 4, 4), bool)
    for null in (True, False):
        values = score_mevisv2(a_sample(empty, null=null), empty, None)
        assert not values["right"]
        assert values["J"] == values["F"] == 0


def test_mevisv2_knows_what_names_nothing(minis):
    samples = read("mevisv2", "valid_u", minis("mevisv2"))
    nulls = [sample for sample in samples if sample.null]
    assert nulls and len(nulls) < len(samples)
    for sample in samples:
        assert sample.null == (sample.kind == "no target") == (not sample.read_masks().any())
        assert not sample.fault
    assert {sample.kind for sample in samples} == {"single", "multi", "no target"}
    # They are trained on.
    kept, dropped = draw.training_samples(find_benchmark("mevisv2"), str(minis("mevisv2")), 0)
    assert any(sample.null for sample in kept)
    assert not dropped
    # Nothing is known of those for the server.
    hidden = read("mevisv2", "valid", minis("mevisv2"))
    assert not any(sample.null or sample.read_masks for sample in hidden)


def test_mevisv2_is_packed_for_its_server(minis, tmp_path, capsys):
    root = minis("mevisv2")
    samples = read("mevisv2", "valid", root)
    for sample in samples[:-1]:
        write_prediction(tmp_path, sample, np.zeros((len(sample.names), 128, 128), bool))
    arguments = ["--bench", "mevisv2", "--split", "valid", "--data_root", root.parent, "--zip"]
    evaluate_here(tmp_path / "out", *arguments, "--predictions", tmp_path)
    assert f"no prediction: 1 of {len(samples)}" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "out/mevisv2.zip") as archive:
        names = archive.namelist()
    first = samples[0]
    # Videos are at the top.
    assert f"{first.video}/{first.expression}/{first.names[0]}.png" in names
    assert len(names) == sum(len(sample.names) for sample in samples[:-1])


def test_a_fault_of_mevisv2_is_named(copy, capsys):
    root = copy("mevisv2")
    keys = "videos", "000000000000", "expressions", "0", "anno_id"
    put_at(*keys, value=[[1]])(root / "valid_u/meta_expressions.json")
    assert_fault("mevisv2", "valid_u", root, "an id in 'anno_id' is a list", capsys)


# ---- Long-RVOS -------------------------------------------------------------------------------------
def slow_times(true, pred):
    """(tIoU, vIoU) in per cent of masks [T, H, W], frame by frame."""
    both = either = 0
    shared = 0.0
    for t, p in zip(true, pred):
        there = {tuple(place) for place in np.argwhere(t)}
        found = {tuple(place) for place in np.argwhere(p)}
        if there or found:
            either += 1
        if there and found:
            both += 1
            shared += len(there & found) / len(there | found)
    if either == 0:
        return 100.0, 100.0
    return 100 * both / either, 100 * shared / either


@pytest.mark.parametrize("seed", range(4))
def test_longrvos_against_loops(seed):
    true = blobs(seed, 3, 1, 6, 12, 16)
    pred = blobs(seed + 20, 3, 6, 12, 16)
    true[0, :, 2:] = False
    pred[0, :2] = False
    pred[1, 1:4] = False
    rows = []
    expected = []
    for i, kind in enumerate(("static", "dynamic", "dynamic")):
        masks = true[i]
        values = score_longrvos(a_sample(masks), masks, pred[i])
        slow = [*slow_means(pred[i], masks.any(0)), *slow_times(masks[0], pred[i])]
        assert columns_of(values, "J F tIoU vIoU") == approx(slow)
        expected.append(slow)
        rows.append(values | dict(kind=kind))
    subsets = longrvos_subsets(rows)
    assert columns_of(subsets["overall"], "J F tIoU vIoU") == approx(np.mean(expected, 0).tolist())
    assert columns_of(subsets["dynamic"], "J F tIoU vIoU") == approx(np.mean(expected[1:], 0).tolist())
    assert subsets["static"]["expressions"] == 1


def test_longrvos_edge_cases():
    empty = np.zeros((1, 2, 4, 4), bool)
    full = ~empty
    nothing = score_longrvos(a_sample(empty), empty, empty[0])
    assert columns_of(nothing, "J F tIoU vIoU") == [100.0] * 4
    wrong = score_longrvos(a_sample(empty), empty, full[0])
    assert columns_of(wrong, "tIoU vIoU") == [0.0, 0.0]
    # In view on one frame, predicted on two.
    once = empty.copy()
    once[0, 1, 2, 2] = True
    values = score_longrvos(a_sample(once), once, full[0])
    assert columns_of(values, "tIoU vIoU") == approx([50.0, 100 / 16 / 2])


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_longrvos_an_absent_file_is_an_absent_object(split, minis):
    samples = read("longrvos", split, minis("longrvos"))
    assert {sample.kind for sample in samples} == {"static", "dynamic", "hybrid"}
    absent = 0
    for sample in samples:
        scene = seen_scene("train" if split == "train" else "test", int(sample.video.rpartition("_")[2]))
        masks = sample.read_masks()
        assert np.array_equal(masks[0], scene.masks[int(sample.ids[0])])
        assert np.array_equal(sample.read_masks([3, 1]), masks[:, [3, 1]])
        absent += (~masks.any((0, 2, 3))).sum()
        clip = load(sample)
        assert np.array_equal(clip.masks, masks)
    assert absent > 0


def first_masks(root, split="valid"):
    """The folder of masks of the first expression's object."""
    sample = read("longrvos", split, root)[0]
    return root / split / "Annotations" / sample.video / sample.ids[0]


@pytest.mark.parametrize("damage, message", [
    (lambda folder: folder.rename(folder.parent / "x"), "no such folder of masks: .*Annotations"),
    (lambda folder: save("L", (9, 9))(next(folder.glob("*.png"))), "mask of 9 x 9, frame of 128 x 128"),
    (lambda folder: write(b"no picture")(next(folder.glob("*.png"))), "cannot read mask: .*png"),
    (lambda folder: list(map(delete, folder.glob("*.png"))), "the masks of . are empty on all frames"),
])
def test_check_names_a_fault_of_longrvos(damage, message, copy, capsys):
    root = copy("longrvos")
    damage(first_masks(root))
    assert_fault("longrvos", "valid", root, message, capsys)


ENTRY = ("videos", "toy_0", "expressions", "0")


@pytest.mark.parametrize("damage, message", [
    (put_at(*ENTRY, "type", value="funny"), "type 'funny' is none of static, dynamic, hybrid"),
    (put_at(*ENTRY, "type", value=3), "'type' is a int"),
    (drop(*ENTRY, "obj_id"), "no 'obj_id'"),
    (put_at(*ENTRY, "obj_id", value="../0"), "leads out of its folder"),
    (put_at(*ENTRY, "obj_id", value=[0]), "'obj_id' is a list"),
    (put_at(*ENTRY, "exp", value=""), "the query is empty"),
])
def test_an_odd_expression_of_longrvos_is_named(damage, message, copy, capsys):
    root = copy("longrvos")
    damage(root / "valid/meta_expressions.json")
    assert_fault("longrvos", "valid", root, message, capsys)
    assert sum(bool(sample.broken) for sample in read("longrvos", "valid", root)) == 1


def test_a_malformed_file_of_longrvos_is_named(copy, capsys):
    root = copy("longrvos")
    (root / "test/meta_expressions.json").write_text("[")
    assert_malformed("longrvos", "test", root, "test/meta_expressions.json", "meta_expressions.json", capsys)


# ---- OmniAVS: the metric ---------------------------------------------------------------------------
def slow_rate(true, pred):
    """(J, F) of an expression by the official rule."""
    if true.sum() == 0:
        value = 100.0 if pred.sum() == 0 else 0.0
        return value, value
    return slow_means(pred, true)


@pytest.mark.parametrize("seed", range(3))
def test_omniavs_against_loops(seed):
    kinds = ["text", "text", "text", "speech", "text_image"]
    true = blobs(seed, 5, 2, 3, 12, 16)
    pred = blobs(seed + 20, 5, 3, 12, 16)
    true[:2] = False
    pred[0] = False
    rows = []
    for i, kind in enumerate(kinds):
        values = score_omniavs(a_sample(true[i]), true[i], pred[i])
        J, F = slow_rate(true[i].any(0), pred[i])
        # What the official script takes for two objects: the first one twice.
        first = np.logical_or(true[i][0], true[i][0])
        official = np.mean(slow_rate(first, pred[i]))
        assert columns_of(values, "J F official") == approx([J, F, official])
        rows.append(dict(kind=kind, J=J, F=F, official=official, explanation=""))
    subsets = omniavs_subsets(rows)
    means = []
    for part in (rows[:3], rows[3:4], rows[4:]):
        j = np.mean([row["J"] for row in part])
        f = np.mean([row["F"] for row in part])
        means.append((j + f) / 2)
    assert subsets["text"]["J&F"] == approx(means[0])
    assert subsets["overall"]["J&F"] == approx(np.mean(means))
    assert subsets["overall"]["expressions"] == 5
    assert list(subsets) == ["overall", "text", "speech", "text_image"]


def test_omniavs_union_and_the_first_object_differ():
    true = np.zeros((2, 2, 20, 20), bool)
    true[0, :, :10] = True
    true[1, :, 10:15] = True
    union = score_omniavs(a_sample(true), true, true.any(0))
    first = score_omniavs(a_sample(true), true, true[0])
    assert columns_of(union, "J F") == [100.0, 100.0]
    assert union["official"] < 100
    assert first["official"] == 100
    assert first["J"] == approx(100 * 10 / 15)


def test_omniavs_without_a_target_all_or_nothing_counts():
    empty = np.zeros((1, 3, 8, 8), bool)
    pred = empty[0].copy()
    assert columns_of(score_omniavs(a_sample(empty), empty, pred), "J F official") == [100.0] * 3
    # A single pixel on one frame.
    pred[1, 2, 3] = True
    assert columns_of(score_omniavs(a_sample(empty), empty, pred), "J F official") == [0.0] * 3
    assert columns_of(score_omniavs(a_sample(empty), empty, None), "J F official") == [0.0] * 3


@pytest.fixture
def nltk(monkeypatch):
    """A stand-in for nltk: the share of the reference's words that the text has."""
    def single_meteor_score(reference, words):
        return sum(word in words for word in reference) / len(reference)

    module = ModuleType("nltk.translate.meteor_score")
    module.single_meteor_score = single_meteor_score
    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.translate", ModuleType("nltk.translate"))
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", module)
    return module


def explained(kind, explanation, text=None):
    row = dict(kind=kind, J=0.0, F=0.0, official=0.0, explanation=explanation)
    return row if text is None else row | dict(text=text)


def test_omniavs_compares_explanations_with_what_system_1_thinks(nltk):
    thought = "<think>the red dog</think><answer>null</answer>"
    rows = [
        explained("text", "red dog", thought),
        explained("text", "red cat", thought),
        # Nothing is to be explained.
        explained("text", "", thought),
        # No answer.
        explained("speech", "red dog"),
        explained("speech", "a red dog barks", thought),
        explained("text_image", "", thought),
    ]
    subsets = omniavs_subsets(rows)
    assert subsets["text"]["METEOR"] == approx(75)
    assert subsets["speech"]["METEOR"] == approx(25)
    assert subsets["overall"]["METEOR"] == approx(50)
    assert "METEOR" not in subsets["text_image"]
    # Of others' masks nothing is known.
    assert "METEOR" not in omniavs_subsets(rows[3:4])["overall"]
    assert "METEOR" not in omniavs_subsets(rows[:3])["overall"]


def test_meteor_is_left_out_without_nltk_or_its_data(nltk, monkeypatch):
    assert meteor("a b", "b") == 0.5

    def no_data(reference, words):
        raise LookupError("wordnet")

    nltk.single_meteor_score = no_data
    assert meteor("a b", "b") is None
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", None)
    assert meteor("a b", "b") is None
    rows = [explained("text", "red", "<think>red</think>"), explained("speech", "red", "<think>red</think>")]
    assert "METEOR" not in omniavs_subsets(rows)["overall"]


# ---- OmniAVS: the reader ---------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["train", "test"])
def test_omniavs_reads_back_to_the_toy_masks(split, minis):
    samples = read("omniavs", split, minis("omniavs"))
    assert {sample.kind for sample in samples} == set(KINDS)
    for sample in samples:
        scene = seen_scene(split, int(sample.video.rpartition("_")[2]))
        masks = sample.read_masks()
        if sample.null:
            assert sample.ids == () and not masks.any()
        else:
            numbers = [int(key) - 1 for key in sample.ids]
            assert np.array_equal(masks, scene.masks[numbers])
        clip = load(sample, whole_sound=True)
        assert clip.sound is not None
        assert len(clip.frames) == len(sample.names) == masks.shape[1]
        assert sample.fps == approx(2.0)
        assert ("speech" in sample.kind) == ("<speech>" in sample.query)
        if "speech" in sample.kind:
            assert sample.truth["words"] not in sample.query
        else:
            assert sample.query == sample.truth["words"]
    several = [sample for sample in samples if sample.objects > 1]
    assert len(several) == (2 if split == "train" else 0)
    assert sum(bool(sample.truth["explanation"]) for sample in samples) == 4


def change_line(number, **fields):
    """A damage of a file of JSON lines."""
    def damage(path):
        lines = path.read_text().splitlines()
        record = json.loads(lines[number]) | fields
        lines[number] = json.dumps({key: value for key, value in record.items() if value != "LEAVE OUT"})
        path.write_text("\n".join(lines) + "\n")
    return damage


LINES = "meta_expressions_test.jsonl"
# The lines of a clip are of the types in their order.
ODD_LINES = [
    (change_line(0, video_name="nowhere"), "no 'nowhere' in .*video_dict.json"),
    (change_line(0, video_name="../test_0"), "leads out of its folder"),
    (change_line(0, expr=None), "'expr' is a NoneType"),
    (change_line(0, expr=""), "the query is empty"),
    (change_line(0, expr_type="smell"), "expr_type 'smell' is none of text, speech"),
    (change_line(0, exp_id=1.5), "'exp_id' is a float"),
    (change_line(0, exp_id="a/b"), "the name 'text_a/b' leads out of its folder"),
    (change_line(0, exp_id=8), "another expression of the video has the same id"),
    (change_line(0, obj_id="1"), "'obj_id' is a str"),
    (change_line(0, obj_id=[99]), "no '99' in .*video_dict.json"),
    (change_line(0, obj_id=[None]), "an id in 'obj_id' is a NoneType"),
    (change_line(0, expl=["why"]), "'expl' is a list"),
    (change_line(1, referring_speech=None), "'referring_speech' is a NoneType .*line 2"),
    (change_line(1, referring_speech="../x.wav"), "leads out of its folder"),
    (change_line(1, referring_speech="x.wav"), "no such file: .*referring_speeches/x.wav"),
    (change_line(2, expr="the object that sounds"), "<audio> stands 0 times in the query"),
    (change_line(2, expr="<audio> or <audio>"), "<audio> stands 2 times in the query"),
    (change_line(4, referring_image="LEAVE OUT"), "no 'referring_image'"),
    (change_line(4, referring_image="x.jpg"), "no such file: .*referring_images/x.jpg"),
]


@pytest.mark.parametrize("damage, message", ODD_LINES)
def test_an_odd_line_of_omniavs_is_named(damage, message, copy, capsys):
    root = copy("omniavs")
    before = len(read("omniavs", "test", root))
    damage(root / LINES)
    assert_fault("omniavs", "test", root, message, capsys)
    samples = read("omniavs", "test", root)
    assert len(samples) == before
    code, broken, _ = run_check("omniavs", "test", root, capsys)
    twice = "same id" in message
    assert len(broken) == 1 + twice
    assert sum(bool(sample.broken) for sample in samples) <= 1 + twice


VIDEO = "video_dict.json"


@pytest.mark.parametrize("file, damage, message", [
    (VIDEO, drop("test_0", "file_name"), "no 'file_name' in .*video_dict.json: test_0"),
    (VIDEO, put_at("test_0", "file_name", 0, value=3), "a file_name is no text"),
    (VIDEO, put_at("test_0", "file_name", 0, value="../x.jpg"), "leads out of its folder"),
    (VIDEO, put_at("test_0", "duration", value=0), "duration 0 of [0-9]+ frames in"),
    (VIDEO, put_at("test_0", "duration", value=10**400), "duration 10+ of [0-9]+ frames in"),
    (VIDEO, put_at("test_0", "duration", value=1e-9), "duration 1e-09 of [0-9]+ frames in"),
    (VIDEO, put_at("test_0", "mask_dict", value=[]), "'mask_dict' is a list"),
    (VIDEO, put_at("test_0", "mask_dict", "1", value=[None]), "1 masks of object 1 for [0-9]+ frames"),
    ("audios/test_0.mp3", delete, "no such file: .*test_0.mp3"),
    ("audios/test_0.mp3", write(b"noise"), "cannot read sound: .*test_0.mp3"),
    ("images/test_0/00000.jpg", write(b"noise"), "cannot read image: .*00000.jpg"),
    ("referrings/referring_speeches/test_0_1.wav", write(b"noise"), "cannot read sound: .*test_0_1.wav"),
    ("referrings/referring_sounds/test_0_2.wav", write(sound_file(np.zeros(0))), "no sound in: .*_2.wav"),
    ("referrings/referring_images/test_0_4.jpg", write(b"noise"), "cannot read image: .*test_0_4.jpg"),
])
def test_check_names_a_fault_of_omniavs(file, damage, message, copy, capsys):
    root = copy("omniavs")
    damage(root / file)
    assert_fault("omniavs", "test", root, message, capsys)
    # A reference is of one expression.
    if file.startswith("referrings"):
        assert len(run_check("omniavs", "test", root, capsys)[1]) == 1


@pytest.mark.parametrize("file, content, message", [
    (LINES, "{}\nno json\n", "line 2"),
    (LINES, "[1]\n", "line 1 .*a dict expected"),
    (LINES, '{"a": 1, "a": 2}\n', "line 1 .*the key 'a' comes twice"),
    (LINES, '{"a": NaN}\n', "line 1 .*NaN is no number"),
    (VIDEO, "{", "video_dict.json"),
])
def test_a_malformed_file_of_omniavs_is_named(file, content, message, copy, capsys):
    root = copy("omniavs")
    (root / file).write_text(content)
    assert_malformed("omniavs", "test", root, file, message, capsys)


def test_a_missing_reference_breaks_one_sample_in_training_and_in_evaluation(copy, tmp_path, capsys):
    root = copy("omniavs")
    delete(root / "referrings/referring_sounds/test_0_3.wav")
    delete(root / "referrings/referring_sounds/train_0_3.wav")
    results = evaluate_here(tmp_path / "out", "--bench", "omniavs", "--data_root", root.parent, "--limit", 5)
    assert results["missing"] == 1
    assert "no prediction for omniavs/test_0/speech_sound_3: " in capsys.readouterr().err
    samples, _ = draw.training_samples(find_benchmark("omniavs"), str(root), 0)
    sample = next(sample for sample in samples if sample.place == "train_0/speech_sound_3")
    source = draw.Source("vos", [[sample]], lambda item, rng: draw.read_any(item, rng, (4, 4)))
    clip = draw.read_clip(source, [sample], np.random.default_rng(0))
    assert re.match("omniavs/train_0/speech_sound_3: .*train_0_3.wav", clip.fault)
    # Its masks are scored all the same.
    assert sample.read_masks().any()


# A frame of MPEG-1 layer 3, 128 kbit/s, 44.1 kHz, mono, with nothing in it: 1152 samples.
SILENT_MP3 = b"\xff\xfb\x90\xc4" + bytes(413)


def test_sounds_are_decoded_by_their_content(tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(SILENT_MP3 * 50)
    sound = read_sound(str(path))
    assert len(sound) == approx(50 * 1152 / 44100 * 16000, abs=160)
    assert not sound.any()
    wave = np.sin(np.arange(8000) / 5).astype(np.float32) / 2
    path.write_bytes(sound_file(wave))
    assert read_sound(str(path)) == approx(wave, abs=1e-3)


# ---- OmniAVS: the prompt ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def toy():
    return SimpleNamespace(processor=Processor(TOY_POLICY), thinker=Thinker.from_pretrained(TOY_POLICY))


def shown_sample(root, kind):
    """The first sample of a type."""
    samples = read("omniavs", "test", root)
    return next(sample for sample in samples if sample.kind == kind)


def media_of(ids, processor):
    """The media of a prompt in their order: "image", "audio", or "video", which may have a sound."""
    opening = {processor.marks["vision_bos"]: "vision", processor.marks["audio_bos"]: "audio"}
    kinds = []
    inside = False
    for token in ids.tolist():
        if token in (processor.marks["vision_eos"], processor.marks["audio_eos"]):
            inside = False
        elif token in opening and not inside:
            kinds.append(opening[token])
            inside = True
        elif token == processor.video:
            kinds[-1] = "video"
        elif token == processor.image:
            kinds[-1] = "image"
    return kinds


ORDERS = {
    "text": ["video"],
    "speech": ["audio", "video"],
    "text_sound": ["audio", "video"],
    "speech_sound": ["audio", "audio", "video"],
    "text_image": ["image", "video"],
    "speech_image": ["audio", "image", "video"],
    # In the text, the picture stands before the sound.
    "text_sound_image": ["image", "audio", "video"],
    "speech_sound_image": ["audio", "audio", "image", "video"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_references_stand_at_their_places(kind, minis, toy):
    sample = shown_sample(minis("omniavs"), kind)
    clip, _ = load(sample).sampled()
    inputs = prompt_inputs(toy.processor, clip)
    assert media_of(inputs.ids, toy.processor) == ORDERS[kind]
    # The text around them is the prompt's, and no word of a spoken query is in it.
    text = toy.processor.decode(inputs.ids)
    parts = re.split("<(?:speech|audio|image)>", prompt(clip)[1]["content"][0]["text"])
    start = 0
    for part in parts:
        start = text.index(part, start) + len(part)
    if "speech" in kind:
        assert sample.truth["words"] not in text
    # The towers give as many features as there are places, or this raises.
    given, = toy.thinker.embed([inputs])
    assert len(given.media) == len(given.slots)
    assert inputs.positions.shape == (3, len(inputs.ids))
    assert inputs.positions.max() < toy.thinker.config.text_config.max_position_embeddings


def test_a_query_without_references_is_shown_as_before(minis, toy):
    sample = shown_sample(minis("omniavs"), "text")
    clip, _ = load(sample).sampled()
    assert "show" not in clip.truth
    inputs = prompt_inputs(toy.processor, clip)
    expected = toy.processor.video_inputs(prompt(clip), clip.frames, clip.fps, clip.sound)
    assert torch.equal(inputs.ids, expected.ids)


def test_each_reference_is_seen_and_heard_as_if_alone(minis, toy):
    sample = shown_sample(minis("omniavs"), "speech_sound_image")
    clip, _ = load(sample).sampled()
    inputs = prompt_inputs(toy.processor, clip)
    heard, = toy.thinker.hear([inputs])
    seen, = toy.thinker.see([inputs])
    video = toy.processor.video_inputs(prompt(clip), clip.frames, clip.fps, clip.sound)
    start = 0
    for _, kind, path in sample.truth["references"]:
        medium = read_reference(kind, path)
        if kind == "audio":
            mel = toy.processor.spectrogram(in_windows(toy.processor, medium))
            alone, = toy.thinker.hear([SimpleNamespace(mel=mel)])
            assert torch.allclose(heard[start:start + len(alone)], alone, atol=1e-5)
            start += len(alone)
        else:
            picture = toy.processor.image_inputs(prompt(replace(clip, task="image")), medium)
            alone, = toy.thinker.see([picture])
            assert torch.allclose(seen[:len(alone)], alone, atol=1e-5)
            first = len(alone)
    own, = toy.thinker.hear([video])
    assert torch.allclose(heard[start:], own, atol=1e-5)
    own, = toy.thinker.see([video])
    assert torch.allclose(seen[first:], own, atol=1e-5)


@pytest.mark.parametrize("seconds", [None, 3.3])
def test_a_prompt_with_references_equals_transformers(pair, seconds, tmp_path):
    """Two sounds and a picture in the text; the video has a sound of its own, or none."""
    clip = noise_clip(3 * pair.side, 2 * pair.side, 6, seconds, query="<speech> like <image> or like <audio>")
    picture = noise_picture(4 * pair.side, 3 * pair.side, 9)
    picture.save(tmp_path / "a.png")
    references = [("<image>", "image", str(tmp_path / "a.png"))]
    sounds = []
    for i, mark in enumerate(("<speech>", "<audio>")):
        wave = np.random.default_rng(i).standard_normal(30_000 + 20_000 * i).astype(np.float32) / 9
        wavfile.write(tmp_path / f"{i}.wav", 16000, wave)
        references.append((mark, "audio", str(tmp_path / f"{i}.wav")))
        sounds.append(in_windows(pair.ours, read_reference("audio", references[-1][2])))
    inputs = show_references(references, pair.ours, clip, prompt(clip))

    messages, order = with_places(prompt(clip), references)
    assert order == ["<speech>", "<image>", "<audio>"]
    text = pair.ours.render(messages)
    frames = [torch.from_numpy(np.array(clip.frames[t])).permute(2, 0, 1) for t in range(6)]
    theirs = pair.reference.processor(
        text=[text], return_tensors="pt", images=[picture], videos=[torch.stack(frames)], audio=sounds,
        videos_kwargs=dict(size=pair.reference.frame_size))
    if seconds is None:
        assert inputs.ids.tolist() == theirs["input_ids"][0].tolist()
        assert torch.equal(inputs.positions, pair.reference.positions(theirs, False))
    pixels = torch.cat([theirs["pixel_values"], theirs["pixel_values_videos"]]).float()
    torch.testing.assert_close(inputs.patches, pixels, rtol=0, atol=1e-5)
    grid = torch.cat([theirs["image_grid_thw"], theirs["video_grid_thw"]])
    assert torch.equal(inputs.grid, grid)
    heard = []
    for mel, there in zip(theirs["input_features"], theirs["feature_attention_mask"]):
        heard.append(mel[:, there.bool()].float())
    heard = torch.cat(heard, dim=1)
    torch.testing.assert_close(inputs.mel[:, :heard.shape[1]], heard, rtol=0, atol=1e-4)
    own = pair.ours.spectrogram(clip.sound)
    if seconds is not None:
        assert torch.equal(inputs.mel[:, heard.shape[1]:], own)
        # What comes last is the video as it is without references.
        alone = pair.ours.video_inputs(prompt(clip), clip.frames, clip.fps, clip.sound)
        video = alone.ids.tolist().index(pair.ours.marks["vision_bos"]) - len(alone.ids)
        assert torch.equal(inputs.ids[video:], alone.ids[video:])
        steps = torch.diff(alone.positions[:, video:])
        assert torch.equal(torch.diff(inputs.positions[:, video:]), steps)


@pytest.mark.parametrize("folder", ["referring_speeches", "referring_sounds", "referring_images"])
def test_each_reference_changes_what_the_policy_says(folder, copy, toy):
    root = copy("omniavs")
    sample = shown_sample(root, "speech_sound_image")
    before, = toy.thinker.embed([prompt_inputs(toy.processor, load(sample))])
    path, = [path for _, _, path in sample.truth["references"] if folder in path]
    if folder == "referring_images":
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    else:
        # Another sound of the same length.
        noise = np.random.default_rng(0).standard_normal(len(read_reference("audio", path)))
        with open(path, "wb") as file:
            file.write(sound_file(noise.clip(-3, 3) / 4))
    after, = toy.thinker.embed([prompt_inputs(toy.processor, load(sample))])
    assert torch.equal(before.ids, after.ids)
    changed = abs(toy.thinker.logits(before) - toy.thinker.logits(after))[-1]
    assert changed.max() > 1e-3


def test_sounds_are_padded_to_windows_of_the_tower(toy):
    frames = 2 * toy.processor.config.audio_config.n_window
    window = frames * toy.processor.features.hop_length
    longest = toy.processor.features.n_samples
    for count, windows in ((1, 1), (window, 1), (window + 1, 2), (longest + 5, longest // window)):
        sound = in_windows(toy.processor, np.ones(count, np.float32))
        assert len(sound) == windows * window
        assert toy.processor.spectrogram(sound).shape[1] == windows * frames


def test_omniavs_is_shown_with_its_references(minis, tmp_path):
    root = minis("omniavs")
    arguments = ["--data_root", root.parent, "--split", "test", "--index", 7, "--out", tmp_path]
    check.main(["show", "--bench", "omniavs", *map(str, arguments)])
    text = (tmp_path / "prompt.txt").read_text()
    assert "what is said here: <speech>, where the sound is <audio>, where the picture is <image>" in text
    assert re.search("<image>: .*referring_images/test_0_7.jpg", text)


def test_omniavs_is_trained_on(minis, tmp_path, monkeypatch):
    data = ["--data", "omniavs,mevisv2,longrvos", "--data_root", minis("omniavs").parent]
    for name in NEW:
        minis(name)
    small = ["--steps", 3, "--batch", 1, "--updates", 1, "--workers", 0, "--frames", 4]
    rows = train_here(tmp_path, monkeypatch, *data, *small)
    assert len(rows) == 3
    assert [row["broken"] for row in rows] == [0] * 3


# ---- Ref-AVS ---------------------------------------------------------------------------------------
def test_refavs_is_asked_by_frames_or_by_the_first(minis, tmp_path, monkeypatch):
    root = minis("refavs")
    prompt_inputs = segment_program.prompt_inputs
    asked = []

    def noted(processor, clip):
        asked.append((clip.task, len(clip.frames), clip.sound is not None))
        return prompt_inputs(processor, clip)

    monkeypatch.setattr(segment_program, "prompt_inputs", noted)
    common = ["--bench", "refavs", "--split", "test_s", "--data_root", root.parent, "--limit", 2]
    evaluate_here(tmp_path / "default", *common)
    # All ten frames, with sound.
    assert asked == [("vos", 10, True)] * 2
    evaluate_here(tmp_path / "few", *common, "--ask", "frames", "--frames", 4)
    assert asked[2:] == [("vos", 4, True)] * 2
    evaluate_here(tmp_path / "first", *common, "--ask", "first")
    assert [task for task, _, _ in asked[4:]] == ["avs", "avs"]
    # SAM2 follows all frames.
    sample = read("refavs", "test_s", root)[0]
    assert unpredicted(tmp_path / "few", [sample]) == []
    assert len(list((tmp_path / "few/Annotations" / sample.place).iterdir())) == 10
    # It is trained on by the first frame.
    assert sample.task == "avs"


def test_show_asks_refavs_as_it_is_told(minis, tmp_path):
    root = str(minis("refavs").parent)
    arguments = ["show", "--bench", "refavs", "--data_root", root, "--out", str(tmp_path)]
    # As it is trained on, and as it is evaluated.
    for ask, words in (([], "the first frame of the video"), (["--ask", "frames"], "2 frames per second")):
        check.main([*arguments, *ask])
        assert words in (tmp_path / "prompt.txt").read_text()


def test_predictions_asked_otherwise_are_not_continued(minis, tmp_path, capsys):
    common = ["--bench", "refavs", "--split", "test_s", "--data_root", minis("refavs").parent, "--limit", 1]
    evaluate_here(tmp_path, *common)
    evaluate_here(tmp_path, *common, "--ask", "frames")
    with pytest.raises(SystemExit):
        evaluate_here(tmp_path, *common, "--ask", "first")
    assert f"{tmp_path} holds predictions with task vos, not avs" in capsys.readouterr().err


@pytest.mark.parametrize("bench, ask, message", [
    ("revos", "first", "--ask first means nothing to --bench revos (it is asked in one way only)"),
    ("refavs", "twice", "--ask twice means nothing to --bench refavs (known: frames, first)"),
])
def test_an_ask_that_means_nothing_is_told_in_one_line(bench, ask, message, minis, tmp_path, capsys):
    root = minis(bench).parent
    arguments = ["--bench", bench, "--ask", ask, "--data_root", root, "--out", tmp_path]
    with pytest.raises(SystemExit) as stop:
        evaluation.main(list(map(str, arguments)))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {message}"]


# ---- each of them, from its miniature to its table -------------------------------------------------
def scores(name, samples, masks_of, out):
    """The summary of predictions masks_of(true [T, H, W])."""
    for sample in samples:
        write_prediction(out, sample, masks_of(sample.read_masks().any(0)))
    results = score_predictions(find_benchmark(name), samples, str(out))
    assert not results["missing"] and not results["broken"]
    assert "overall" in score_table(find_benchmark(name), results)
    return results["summary"]


@pytest.mark.parametrize("name", NEW)
def test_the_truth_scores_100(name, minis, tmp_path):
    samples = evaluated_samples(name, minis(name))
    summary = scores(name, samples, lambda true: true, tmp_path)
    assert len(summary) >= 12
    for column, value in summary.items():
        assert value == approx(100), column


def overall(summary, names):
    return [summary[f"overall {name}"] for name in names.split()]


def share_empty(samples):
    """Mean over samples, in per cent, of the share of frames without a target."""
    shares = [1 - sample.read_masks().any((0, 2, 3)).mean() for sample in samples]
    return 100 * np.mean(shares)


def test_nothing_at_all_scores_where_nothing_is(minis, tmp_path):
    samples = evaluated_samples("mevisv2", minis("mevisv2"))
    summary = scores("mevisv2", samples, np.zeros_like, tmp_path / "mevisv2")
    empty = share_empty(samples)
    assert overall(summary, "J F N-acc T-acc") == approx([empty, empty, 100, 0])
    assert summary["overall Final"] == approx((empty + 100) / 3)

    samples = evaluated_samples("longrvos", minis("longrvos"))
    summary = scores("longrvos", samples, np.zeros_like, tmp_path / "longrvos")
    empty = share_empty(samples)
    assert overall(summary, "J F tIoU vIoU") == approx([empty, empty, 0, 0])

    samples = evaluated_samples("omniavs", minis("omniavs"))
    summary = scores("omniavs", samples, np.zeros_like, tmp_path / "omniavs")
    means = []
    for kind in KINDS:
        means.append(share_empty([sample for sample in samples if sample.kind == kind]))
        assert summary[f"{kind} J&F"] == approx(means[-1])
    assert summary["overall J&F"] == summary["overall official"] == approx(np.mean(means))


def test_all_but_the_truth_has_its_boundary_alone(minis, tmp_path):
    """A mask and its complement share no pixel and all of their boundary. A full mask has none."""
    samples = evaluated_samples("mevisv2", minis("mevisv2"))
    summary = scores("mevisv2", samples, np.invert, tmp_path / "mevisv2")
    assert overall(summary, "J F N-acc T-acc") == [0, 100, 0, 100]
    assert summary["overall Final"] == approx(50)

    samples = evaluated_samples("longrvos", minis("longrvos"))
    summary = scores("longrvos", samples, np.invert, tmp_path / "longrvos")
    there = 100 - share_empty(samples)
    assert overall(summary, "J F tIoU vIoU") == approx([0, 100, there, 0])

    samples = evaluated_samples("omniavs", minis("omniavs"))
    summary = scores("omniavs", samples, np.invert, tmp_path / "omniavs")
    # Without a target all is wrong.
    text = [sample for sample in samples if sample.kind == "text"]
    F = 100 * np.mean([not sample.null for sample in text])
    assert [summary["text J"], summary["text F"]] == [0, F]
    assert [summary["speech J"], summary["speech F"]] == [0, 100]
    assert summary["overall F"] == approx((7 * 100 + F) / 8)


def test_refavs_finds_nothing_where_nothing_is_or_everything(minis, tmp_path):
    samples = read("refavs", "test_n", minis("refavs"))
    for masks_of, S in ((np.zeros_like, 0.0), (np.ones_like, 1.0)):
        for sample in samples:
            write_prediction(tmp_path, sample, masks_of(sample.read_masks().any(0)))
        summary = score_predictions(find_benchmark("refavs"), samples, str(tmp_path))["summary"]
        assert summary["null S"] == S


@pytest.mark.parametrize("name", NEW)
def test_the_toy_policy_is_evaluated(name, minis, tmp_path, capsys):
    arguments = ["--bench", name, "--data_root", minis(name).parent, "--limit", 3]
    results = evaluate_here(tmp_path, *arguments)
    table = capsys.readouterr().out
    assert results["missing"] == 0 and not results["broken"]
    for column in find_benchmark(name).columns:
        assert column in table.splitlines()[0].split()
    assert len(results["expressions"]) == 3


def test_a_clip_says_nothing_of_references_by_itself():
    assert toy_clip("test", 0).truth == {}
    assert len(MEDIA.findall("<|audio_bos|><|AUDIO|><|audio_eos|>")) == 1
    with pytest.raises(BadInput, match="cannot read"):
        read_reference("audio", "nowhere.wav")
