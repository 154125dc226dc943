"""eval.py: predictions that go on, what is written beside them, scores, comparisons."""
import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import segment as segment_program
from benchmarks import find_benchmark, open_split, predictions, reports
from benchmarks.metrics import paired_difference
from benchmarks.predictions import prediction_folder, read_prediction, write_prediction
from benchmarks.samples import Sample
from benchmarks.toy import CANVAS, toy_clip
from eval import visible_share
from tests.world import evaluate_here, run_program, segment
from trust.options import TOY_POLICY

# An answer in the right format.
WELL_FORMED = "<think>why</think><answer>null</answer>"
SIZE = (CANVAS, CANVAS)


def samples_of(name, split, root):
    return open_split(find_benchmark(name), split, str(root))


def read_answers(out, rank=0):
    """The lines that a process wrote, in their order."""
    text = (out / f"answers-{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def names_of(rows):
    """Of samples, of rows of results or of answers."""
    names = []
    for row in rows:
        if isinstance(row, Sample):
            names.append(row.name)
        else:
            names.append(row["name"])
    return names


def train_again(policy):
    """Changes the time of a policy's weights, as training would."""
    weights = policy / "model.safetensors"
    later = weights.stat().st_mtime_ns + 1
    os.utime(weights, ns=(0, later))


def empty_masks(sample):
    return np.zeros((len(sample.names), *SIZE), bool)


# ---- shared runs -----------------------------------------------------------------------------------
@dataclass
class Whole:
    """An evaluation that was not cut off."""
    arguments: list
    out: Path
    results: dict
    samples: list


@pytest.fixture(scope="module")
def revos(minis, tmp_path_factory):
    """Of 5 samples of ReVOS, two at a time."""
    root = minis("revos")
    arguments = ["--bench", "revos", "--data_root", root.parent, "--limit", 5]
    out = tmp_path_factory.mktemp("revos") / "out"
    results = evaluate_here(out, *arguments, "--batch", 2)
    samples = samples_of("revos", "valid", root)
    return Whole(arguments, out, results, samples[:5])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Of the toy's first 3 clips."""
    arguments = ["--limit", 3, "--max_new_tokens", 64]
    out = tmp_path_factory.mktemp("toy") / "out"
    results = evaluate_here(out, *arguments)
    samples = samples_of("toy", "test", ".")
    return Whole(arguments, out, results, samples[:3])


@pytest.fixture(params=["revos", "toy"])
def whole(request, tmp_path):
    """Of either; its folder is a copy of one's own."""
    shared = request.getfixturevalue(request.param)
    out = shutil.copytree(shared.out, tmp_path / "a")
    return replace(shared, out=out)


# ---- predicting ------------------------------------------------------------------------------------
def test_an_evaluation_goes_on_where_it_was_cut_off(whole, capsys):
    names = names_of(whole.samples)
    assert whole.results["missing"] == 0
    assert names_of(whole.results["expressions"]) == names
    assert names_of(read_answers(whole.out)) == names

    shutil.rmtree(prediction_folder(whole.out, whole.samples[2]))
    lines = (whole.out / "answers-0.jsonl").read_text().splitlines()
    # The process was killed while it wrote the third line.
    (whole.out / "answers-0.jsonl").write_text("\n".join([*lines[:2], *lines[3:], lines[2][:9]]))
    again = evaluate_here(whole.out, *whole.arguments)
    count = len(names)
    assert f"{count - 1} of {count} expressions were already there" in capsys.readouterr().out
    assert again["summary"] == whole.results["summary"]
    assert sorted(predictions.read_answers(str(whole.out))) == sorted(names)


def test_what_others_predicted_is_scored(whole, tmp_path):
    others = [*whole.arguments, "--predictions", whole.out]
    scored = evaluate_here(tmp_path / "b", *others)
    assert scored["summary"] == whole.results["summary"]
    assert scored["policy"] is None
    assert scored["predictions"] == str(whole.out)
    assert not (tmp_path / "b/Annotations").exists()
    shutil.rmtree(prediction_folder(whole.out, whole.samples[2]))
    assert evaluate_here(tmp_path / "b", *others)["missing"] == 1


def refusal(capsys, out, *arguments):
    """What eval.py says when it refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        evaluate_here(out, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_predictions_of_another_run_are_not_taken_for_ones_own(data_root, tmp_path, capsys):
    out = tmp_path / "out"
    policy = shutil.copytree(TOY_POLICY, tmp_path / "policy")
    common = ["--bench", "revos", "--data_root", data_root]
    own = [*common, "--limit", 2, "--policy", policy]
    error = refusal(capsys, out, *common, "--policy", "nowhere")
    assert "nowhere" in error
    error = refusal(capsys, out, *own, "--system2", "reference", "nobody")
    assert "nobody" in error
    # Those left no claim.
    evaluate_here(out, *own)
    assert "already there" not in capsys.readouterr().out
    evaluate_here(out, *own, "--limit", 3)
    assert "2 of 3 expressions were already there" in capsys.readouterr().out

    elsewhere = shutil.copytree(data_root / "revos", tmp_path / "revos")
    for arguments, named in (
            (["--bench", "mevis"], "bench revos, not mevis"),
            (["--policy", TOY_POLICY], f"policy {policy}, not "),
            (["--split", "train"], "split valid, not train"),
            (["--max_new_tokens", 7], "max_new_tokens 48, not 7"),
            (["--frames", 7], "frames 24, not 7"),
            (["--video_tokens", 9], "video_tokens 0, not 9"),
            (["--image_tokens", 9], "image_tokens 0, not 9"),
            (["--system2", "reference", policy], f"system2 policy, not reference {policy}"),
            (["--sam2_weights", policy / "config.json"], "holds predictions with sam2_weights "),
            (["--revos_root", elsewhere], f"data {data_root / 'revos'}, not {elsewhere}")):
        error = refusal(capsys, out, *own, *arguments)
        assert named in error
        assert f"{out} holds predictions with" in error
    train_again(policy)
    error = refusal(capsys, out, *own)
    assert "policy_weights" in error


def test_a_reference_that_was_trained_again_is_another_one(tmp_path, capsys):
    reference = shutil.copytree(TOY_POLICY, tmp_path / "reference")
    options = ["--limit", 1, "--max_new_tokens", 2, "--system2", "reference", reference]
    evaluate_here(tmp_path / "out", *options)
    train_again(reference)
    error = refusal(capsys, tmp_path / "out", *options)
    assert "system2_weights" in error


@pytest.mark.parametrize("more", [(), ("--overwrite", "true")])
@pytest.mark.parametrize("claim", [None, '{"a": 1}'])
def test_annotations_of_others_are_left_alone(tmp_path, capsys, more, claim):
    theirs = tmp_path / "Annotations/video/0/00000.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("truth")
    if claim:
        (tmp_path / "run.json").write_text(claim)
    error = refusal(capsys, tmp_path, "--limit", 1, *more)
    assert f"{tmp_path}/Annotations is not of an evaluation" in error
    assert theirs.read_text() == "truth"


def test_overwrite_replaces_predictions_answers_and_claim(toy, tmp_path, capsys):
    out = shutil.copytree(toy.out, tmp_path / "out")
    (out / "answers-1.jsonl").write_text("{}\n")
    other = [*toy.arguments, "--split", "pairs", "--limit", 1]
    error = refusal(capsys, out, *other)
    assert "give another --out, or --overwrite true" in error
    error = refusal(capsys, out, *other, "--overwrite", "false")
    assert "holds predictions" in error
    assert len(read_answers(out)) == 3

    replaced = evaluate_here(out, *other, "--overwrite", "true")
    assert "already there" not in capsys.readouterr().out
    assert names_of(replaced["expressions"]) == ["toy/pairs/0/0"]
    assert names_of(read_answers(out)) == ["toy/pairs/0/0"]
    assert not (out / "answers-1.jsonl").exists()
    assert os.listdir(out / "Annotations") == ["pairs"]
    claim = json.loads((out / "run.json").read_text())
    assert claim["split"] == "pairs"
    # Also what is its own: nothing is left of the first answers.
    evaluate_here(out, *other, "--overwrite")
    assert "already there" not in capsys.readouterr().out
    assert len(read_answers(out)) == 1


def test_system1_sees_as_many_frames_as_it_is_told(tmp_path, monkeypatch):
    prompt_inputs = segment_program.prompt_inputs
    counts = []

    def counted(processor, clip):
        counts.append(len(clip.frames))
        return prompt_inputs(processor, clip)

    monkeypatch.setattr(segment_program, "prompt_inputs", counted)
    results = evaluate_here(tmp_path, "--limit", 3, "--frames", 5)
    assert counts == [5] * 3
    # The masks are of all frames.
    assert results["missing"] == len(results["broken"]) == 0


def test_a_video_that_cannot_be_read_is_named_and_has_no_prediction(copy, tmp_path, capsys):
    root = copy("mevis")
    video = next((root / "valid_u/JPEGImages").iterdir())
    next(video.iterdir()).write_bytes(b"")
    results = evaluate_here(tmp_path / "out", "--bench", "mevis", "--data_root", root.parent)
    here = []
    for row in results["expressions"]:
        if f"/{video.name}/" in row["name"]:
            here.append(row["name"])
            assert row["problem"]
            assert row["J"] == 0
    broken = len(results["broken"]) + results["missing"]
    assert broken == len(here) > 0
    assert f"no prediction for {here[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("bench", ["refcoco", "reasonseg"])
def test_pictures_are_asked_for_a_box(bench, minis, tmp_path):
    root = minis(bench).parent
    results = evaluate_here(tmp_path, "--bench", bench, "--data_root", root, "--limit", 2)
    assert len(results["expressions"]) == 2
    assert results["missing"] == 0
    assert read_answers(tmp_path)[0]["keyframes"] == {}
    for row in results["expressions"]:
        # There are no keyframes to look at.
        assert row["visible"] is None


# ---- what is written beside ------------------------------------------------------------------------
@pytest.mark.parametrize("bench", ["mevis", "refytvos"])
def test_exports_count_what_is_missing_and_pack_what_is_hidden(bench, minis, tmp_path, capsys):
    root = minis(bench)
    hidden = samples_of(bench, "valid", root)
    public = samples_of(bench, "valid_u", root) if bench == "mevis" else []
    theirs = tmp_path / "theirs"
    for sample in public + hidden[1:]:
        write_prediction(theirs, sample, empty_masks(sample))
    folder = prediction_folder(theirs, hidden[1])
    Path(folder, f"{hidden[1].names[3]}.png").unlink()

    split = "valid_u,valid" if public else "valid"
    common = ["--bench", bench, "--split", split, "--data_root", root.parent]
    common += ["--predictions", theirs, "--zip"]
    results = evaluate_here(tmp_path / "out", *common)
    printed = capsys.readouterr().out
    assert f"no prediction: 2 of {len(hidden)}" in printed
    assert results["hidden"] == dict(expressions=len(hidden), missing=2)
    assert len(results.get("expressions", [])) == len(public)
    assert "partial" not in printed
    frames = sum(len(sample.names) for sample in hidden[1:])
    with zipfile.ZipFile(tmp_path / f"out/{bench}.zip") as archive:
        assert len(archive.namelist()) == frames - 1
    assert not list(theirs.rglob("*.zip"))

    limit = len(public) + 2
    evaluate_here(tmp_path / "out", *common, "--limit", limit)
    count = len(public + hidden)
    assert f"(partial: --limit {limit}, of {count} expressions)" in capsys.readouterr().out


def test_the_toy_is_packed_like_any_other(toy, tmp_path, capsys):
    evaluate_here(tmp_path, *toy.arguments, "--predictions", toy.out, "--zip")
    assert "(partial: --limit 3, of 1000 expressions)" in capsys.readouterr().out
    frames = sum(len(sample.names) for sample in toy.samples)
    with zipfile.ZipFile(tmp_path / "toy.zip") as archive:
        assert len(archive.namelist()) == frames


def test_predicting_refdavis_writes_the_official_folders(minis, tmp_path):
    root = minis("refdavis")
    evaluate_here(tmp_path, "--bench", "refdavis", "--data_root", root.parent, "--limit", 4)
    samples = samples_of("refdavis", "valid", root)
    for k, sample in enumerate(samples[:4]):
        folder = tmp_path / f"anno_{k}" / sample.video
        labels = []
        for name in sample.names:
            picture = Image.open(folder / f"{name}.png")
            labels.append(np.array(picture))
        predicted = read_prediction(tmp_path, sample, SIZE)
        assert np.array_equal(np.array(labels), predicted)


def test_processes_share_an_evaluation(data_root, tmp_path):
    common = ["--bench", "refavs", "--split", "test_s,test_n", "--data_root", data_root]
    out = tmp_path / "two"
    options = ["--max_new_tokens", 48, "--out", out, "--zip"]
    done = run_program("eval.py", *common, *options, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((out / "results.json").read_text())
    one = evaluate_here(tmp_path / "one", *common)
    assert two["summary"] == one["summary"]
    assert two["subsets"]["null"]["expressions"] > 0
    assert (out / "refavs.zip").exists()
    # Both have answered, and each sample once.
    names = names_of(two["expressions"])
    assert names_of(read_answers(out, rank=0)) == names[0::2]
    assert names_of(read_answers(out, rank=1)) == names[1::2]


# ---- scores ----------------------------------------------------------------------------------------
def mean_iou(pred, true):
    """Mean over frames of masks [T, H, W]; two empty masks are the same."""
    ious = []
    for p, t in zip(pred, true):
        union = (p | t).sum()
        intersection = (p & t).sum()
        ious.append(intersection / union if union else 1.0)
    return np.mean(ious)


def test_evaluation_scores_as_the_metrics_say(toy, systems):
    report = toy.results
    models = systems.policy, systems.system2, systems.processor, systems.tracker
    clips = [toy_clip("test", i) for i in range(3)]
    results = segment(*models, clips, max_new_tokens=64)
    for clip, result, row in zip(clips, results, report["expressions"]):
        true = clip.masks.any(0)
        assert row["name"] == f"toy/{clip.name}/0"
        assert row["kind"] == clip.kind
        assert row["query"] == clip.query
        assert row["text"] == result.text
        assert row["J"] == pytest.approx(100 * mean_iou(result.masks, true))
        assert row["keyframes"] == list(result.keyframes)
        if true.any() and result.keyframes:
            seen = [true[t].any() for t in result.keyframes]
            assert row["visible"] == pytest.approx(np.mean(seen))
        else:
            assert row["visible"] is None
    mean = np.mean([row["J"] for row in report["expressions"]])
    assert report["summary"]["overall J"] == pytest.approx(mean)


def answer_line(sample, frames, text):
    """A line of answers-0.jsonl with these keyframes."""
    keyframes = {str(t): "a thing" for t in frames}
    answer = dict(name=sample.name, query=sample.query, text=text)
    return json.dumps(answer | dict(keyframes=keyframes, boxes={}))


def write_answers(out, samples):
    """Empty predictions with answers -> what is known by a sample's name: (visible, format)."""
    choices = [0, 5], [3], [], [1, 2, 7]
    lines = []
    shares = {}
    forms = {}
    for k, sample in enumerate(samples):
        write_prediction(out, sample, empty_masks(sample))
        frames = choices[k % 4]
        well = k % 3 > 0
        forms[sample.name] = float(well)
        text = WELL_FORMED if well else "none"
        lines.append(answer_line(sample, frames, text))
        seen = sample.read_masks().any((0, 2, 3))
        if seen.any() and frames:
            shares[sample.name] = float(np.mean(seen[frames]))
    # A later line counts, and half a line is none.
    lines.insert(0, answer_line(samples[0], [7], WELL_FORMED))
    lines.append(lines[1][:50])
    (out / "answers-0.jsonl").write_text("\n".join(lines))
    return shares, forms


def percent(rows, known):
    """Mean of what is known of the rows."""
    values = [known[name] for name in names_of(rows) if name in known]
    return 100 * np.mean(values) if values else None


def test_visible_and_format_stand_beside_the_columns_of_a_benchmark(minis, tmp_path, capsys):
    root = minis("revos")
    theirs = tmp_path / "theirs"
    samples = samples_of("revos", "valid", root)
    shares, forms = write_answers(theirs, samples)
    options = ["--bench", "revos", "--data_root", root.parent, "--predictions", theirs]
    results = evaluate_here(tmp_path / "out", *options)
    rows = results["expressions"]
    for row in rows:
        assert row["visible"] == shares.get(row["name"])
        assert row["format"] == forms[row["name"]]

    summary = results["summary"]
    assert 0 < summary["overall visible"] < 100
    assert 0 < summary["overall format"] < 100
    for kind in ("overall", "referring", "reasoning", "hallucination"):
        part = [row for row in rows if kind in ("overall", row["kind"])]
        assert summary.get(f"{kind} visible") == pytest.approx(percent(part, shares))
        assert summary[f"{kind} format"] == pytest.approx(percent(part, forms))
    # Nothing is to be seen of what there is not.
    assert "hallucination visible" not in summary
    printed = capsys.readouterr().out
    header, overall = re.findall("^ +J .*|^overall .*", printed, re.MULTILINE)
    assert header.split()[-3:] == ["visible", "format", "expressions"]
    cells = [f"{percent(rows, known):.2f}" for known in (shares, forms)]
    assert overall.split()[-3:-1] == cells


def test_predictions_without_answers_have_neither_column(revos, tmp_path, capsys):
    shutil.copytree(revos.out / "Annotations", tmp_path / "theirs")
    options = ["--predictions", tmp_path / "theirs"]
    results = evaluate_here(tmp_path / "out", *revos.arguments, *options)
    assert results["missing"] == 0
    assert not {"visible", "format"} & results["expressions"][0].keys()
    assert "visible" not in capsys.readouterr().out


def test_keyframes_that_do_not_count_are_not_looked_at():
    true = np.zeros((1, 2, 4, 4), bool)
    true[:, 1] = True
    sample = Sample("vos", "bench", "video", "0", "a dog", "", ["a", "b", "c"], [])
    sample.scored = ["b", "c"]
    # Frame "b" is without the target, frame "c" shows it, frame "a" does not count.
    assert visible_share(sample, true, [0, 1, 2]) == 0.5
    assert visible_share(sample, true, [0, 2]) == 1.0
    assert visible_share(sample, true, [0]) is None
    nothing = np.zeros_like(true)
    assert visible_share(sample, nothing, [1, 2]) is None


# ---- comparisons -----------------------------------------------------------------------------------
def test_paired_difference_by_hand():
    values = dict(a=50.0, b=70.0, c=90.0)
    others = dict(c=40.0, b=40.0, a=40.0)
    mean, half = paired_difference(values, others)
    # The differences are 10, 30 and 50.
    assert mean == pytest.approx(30)
    assert half == pytest.approx(1.96 * 20 / math.sqrt(3))
    # One difference has no interval.
    mean, half = paired_difference(dict(a=50.0), others)
    assert mean == pytest.approx(10)
    assert half is None


def write_other(path, values, column):
    """results.json of another evaluation."""
    rows = [{"name": name, column: value} for name, value in values.items()]
    path.write_text(json.dumps(dict(expressions=rows)))


# What a benchmark is compared by: a mean over frames, or the IoU of a picture.
@pytest.mark.parametrize("bench, split, column", [
    ("revos", "valid", "J&F"),
    ("refavs", "test_n,test_s", "J&F"),
    ("refcoco", "val", "IoU"),
    ("toy", "test", "J&F"),
])
def test_evaluations_are_compared_sample_by_sample(bench, split, column, minis, tmp_path, capsys):
    folder = find_benchmark(bench).folder
    root = minis(bench) if folder else tmp_path
    samples = []
    for part in split.split(","):
        samples += samples_of(bench, part, root)
    # The sixth has no prediction.
    for sample in samples[:5]:
        write_prediction(tmp_path / "theirs", sample, empty_masks(sample))
    arguments = ["--bench", bench, "--split", split, "--data_root", root.parent]
    arguments += ["--limit", 6, "--predictions", tmp_path / "theirs"]
    first = evaluate_here(tmp_path / "a", *arguments)
    values = {row["name"]: row[column] for row in first["expressions"]}
    assert list(values) == names_of(samples[:6])

    others = {}
    for k, (name, value) in enumerate(values.items()):
        others[name] = value - k
    # In another order.
    write_other(tmp_path / "other.json", dict(reversed(others.items())), column)
    capsys.readouterr()
    again = evaluate_here(tmp_path / "b", *arguments, "--against", tmp_path / "other.json")
    # The differences are 0 ... 5.
    half = 1.96 * math.sqrt(3.5 / 6)
    against = again["against"]
    assert against["file"] == str(tmp_path / "other.json")
    assert against["difference"] == pytest.approx(2.5)
    assert against["half_interval"] == pytest.approx(half)
    printed = capsys.readouterr().out
    line = f"{column} against {against['file']}: +2.5 +- {half:.1f} (95 % interval"
    assert line in printed


def test_only_evaluations_of_the_same_samples_are_compared(revos, tmp_path, capsys):
    values = dict.fromkeys(names_of(revos.samples), 50.0)
    fewer = dict.fromkeys(names_of(revos.samples[1:]), 50.0)
    more = values | {"revos/x/0": 50.0}
    for changed in (fewer, more, {}):
        write_other(tmp_path / "other.json", changed, "J&F")
        options = ["--predictions", revos.out, "--against", tmp_path / "other.json"]
        error = refusal(capsys, tmp_path / "b", *revos.arguments, *options)
        assert "not an evaluation of the same samples" in error
    # Nothing is predicted or written before.
    assert not (tmp_path / "b").exists()


def test_what_is_hidden_is_not_compared(minis, tmp_path):
    root = minis("mevis")
    public = samples_of("mevis", "valid_u", root)
    for sample in public + samples_of("mevis", "valid", root):
        write_prediction(tmp_path / "theirs", sample, empty_masks(sample))
    write_other(tmp_path / "other.json", {sample.name: 0.0 for sample in public}, "J&F")
    results = evaluate_here(
        tmp_path / "out", "--bench", "mevis", "--split", "valid_u,valid", "--data_root", root.parent,
        "--predictions", tmp_path / "theirs", "--against", tmp_path / "other.json")
    mean = results["summary"]["overall J&F"]
    assert results["against"]["difference"] == pytest.approx(mean)


def test_results_are_written_before_they_are_compared(tmp_path, monkeypatch, capsys):
    write_other(tmp_path / "other.json", {"toy/test/0/0": 50.0}, "J&F")
    monkeypatch.chdir(tmp_path)
    arguments = "--clips 1 --max_new_tokens 2 --device cpu --out . --against other.json".split()
    evaluation.main(arguments)
    # No NaN.
    path = tmp_path / "results.json"
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["against"]["half_interval"] is None
    assert "+-" not in capsys.readouterr().out

    path.unlink()
    monkeypatch.setattr(reports, "paired_difference", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.main(arguments)
    written = json.loads(path.read_text())
    assert len(written["expressions"]) == 1
