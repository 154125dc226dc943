"""The README as tests, in its order: each test quotes the sentence that it proves.

All else is tested in `tests/`, a file a room. `make test` runs both.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

import data
import eval as evaluation
import segment as segment_program
import train
from benchmarks import BENCHMARKS, find_benchmark
from benchmarks.check import main as check_program
from benchmarks.samples import Sample, load
from benchmarks.toy import toy_clip
from data import answer_text, keyframes, parse_boxes, parse_moments, prompt, prompt_inputs
from grpo import collect, group_advantages, kl_divergence, policy_loss
from model import Thinker
from rewards import TERMS, combine, reward_terms, total_rewards, vos_rewards
from run.draw import read_any, training_sources
from run.log import Watch
from run.plan import memory_plan
from segment import ground, to_source, track_groups
from tests.conftest import copy, data_root, minis, systems  # noqa: F401
from tests.world import ROOT, evaluate_here, run_program, segment, settings_of, train_here
from trust.options import TOY_POLICY

README = (ROOT / "README.md").read_text()
SMALL = ("--batch", 2, "--steps", 2, "--save_every", 1, "--updates", 1, "--workers", 0)


def quotes():
    """(test, the sentence it quotes) of every test of this file."""
    tree = ast.parse(Path(__file__).read_text())
    pairs = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            match = re.search(r'"(.*)"', ast.get_docstring(node) or "", re.DOTALL)
            pairs.append((node.name, " ".join(match[1].split()) if match else None))
    return pairs


@pytest.mark.parametrize("name, sentence", quotes())
def test_every_quoted_sentence_stands_in_the_readme(name, sentence):
    """ "`test_all.py` | this page as tests" """
    assert sentence is not None, f"{name} quotes nothing"
    assert sentence in " ".join(README.split())


def answer(*moments):
    """A well-formed completion with moments (start, end, description)."""
    blocks = []
    for start, end, description in moments:
        blocks.append(dict(start_time=start, end_time=end, description=description))
    return f"<think>because</think><answer>{json.dumps(blocks)}</answer>"


def square_masks(T=8, side=20):
    """bool [1, T, side, side]: a square that is visible on all frames."""
    masks = np.zeros((1, T, side, side), bool)
    masks[:, :, 5:10, 5:10] = True
    return masks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, rows of the log) of a small run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        rows = train_here(folder, patch, *SMALL)
    return folder, rows


# ---- two commands ----------------------------------------------------------------------------------
def test_both_systems_and_sam2_work_together_on_a_clip(systems):
    """ "A frozen copy of it draws boxes on those keyframes at high resolution, and SAM2 turns the boxes into
    masks for every frame." """
    clip = toy_clip("test", 2)
    result, = segment(systems.policy, systems.system2, systems.processor, systems.tracker, [clip])
    assert result.keyframes and all(result.keyframes.values())
    assert result.boxes.keys() == result.keyframes.keys()
    assert result.masks.shape == clip.masks.shape[1:]


def test_the_toys_models_are_of_the_real_classes(systems):
    """ "a toy world is made in code, and two tiny models of the real classes live in it" """
    theirs = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(TOY_POLICY)
    assert set(theirs.state_dict()) == set(systems.policy.state_dict())
    assert type(systems.tracker.model).__name__ == "SAM2VideoPredictor"
    assert toy_clip("test", 2).masks.any()


# ---- the step --------------------------------------------------------------------------------------
def test_the_step_makes_groups_of_judged_completions(systems):
    """ "**Roll out** G = 8 completions of each prompt" """
    settings = settings_of()
    assert settings.group == 8
    clips = [toy_clip("train", 3), toy_clip("train", 4)]
    inputs = [prompt_inputs(systems.processor, clip) for clip in clips]
    groups = collect(systems, clips, inputs, [1, 2], settings, Watch())
    assert [len(group.texts) for group in groups] == [8, 8]
    for group in groups:
        assert torch.allclose(group.advantages.sum(), torch.tensor(0.0), atol=1e-3)


def test_what_is_sampled_is_what_is_scored(systems):
    """ "Generation and log-probabilities see the same rows and the same head, so what is sampled is what is
    scored."
    """
    inputs = prompt_inputs(systems.processor, toy_clip("train", 0))
    prompts = systems.policy.embed([inputs])
    greedy, = systems.policy.generate(prompts, 1, 8, eos_ids={-1}, temperature=0.0)
    logits = []
    for c in range(8):
        longer = replace(prompts[0])
        longer.ids = torch.cat([prompts[0].ids, greedy[0][:c]])
        text = prompts[0].positions.max() + 1 + torch.arange(c)
        longer.positions = torch.cat([prompts[0].positions, text.expand(3, -1)], dim=1)
        logits.append(systems.policy.logits(longer)[-1])
    logits = torch.stack(logits).index_fill(1, systems.policy.suppressed, -torch.inf)
    expected = logits.log_softmax(-1).gather(1, greedy[0][:, None])[:, 0]
    scored, _ = systems.policy.logprobs(prompts[0], greedy[0][None])
    assert torch.equal(logits.argmax(-1), greedy[0])
    assert torch.allclose(scored[0], expected, atol=1e-4)


def test_null_is_the_right_answer_where_there_is_no_such_object():
    """ "or `<answer>null</answer>` where no such object exists" """
    nothing = np.zeros((1, 8, 20, 20), bool)
    null = vos_rewards("<think>x</think><answer>null</answer>", nothing, {}, None)
    looked = vos_rewards(answer(("00:01.00", "00:01.00", "a dog")), nothing, {2: [(1, 1, 5, 5)]}, np.ones(8))
    assert combine(null, {}) > combine(looked, {})


def test_keyframes_are_the_first_four_distinct_frames():
    """ "**Read keyframes**: the first 4 distinct frames that the answer names, and the description of each"
    """
    text = answer(("00:02.00", "00:03.50", "later"), ("00:00.50", "00:01.00", "early"))
    frames = keyframes(parse_moments(text, 8, 2.0))
    assert frames == {1: "early", 2: "early", 4: "later", 5: "later"}


def test_equal_requests_are_grounded_once():
    """ "**System 2 grounds** each (frame, description) once, in one ragged batch" """
    calls = []

    def system2(pictures, descriptions):
        calls.append(descriptions)
        return [[(0.0, 0.0, 5.0, 5.0)] for _ in pictures]

    clips = [toy_clip("test", 0), toy_clip("test", 1)]
    chosen = [[{0: "a"}, {0: "a", 2: "b"}], [{0: "a"}, {}]]
    boxes = ground(system2, clips, chosen)
    assert calls == [["a", "b", "a"]]
    for asked, grounded in zip(chosen, boxes):
        assert [list(frames) for frames in grounded] == [list(frames) for frames in asked]


def test_every_frame_is_encoded_once(systems, monkeypatch):
    """ "**SAM2 tracks** all boxes of all completions in one batch; every frame is encoded once" """
    encoded = []
    encode = systems.tracker.encode

    def counting(pictures):
        encoded.append(len(pictures))
        return encode(pictures)

    monkeypatch.setattr(systems.tracker, "encode", counting)
    clip = toy_clip("test", 0)
    shared = {0: [(10.0, 10.0, 40.0, 40.0)]}
    boxes = [shared, {2: [(50.0, 50.0, 90.0, 90.0)]}, dict(shared)]
    masks, = track_groups(systems.tracker, [clip], [boxes])
    assert sum(encoded) == len(clip.frames)
    assert np.array_equal(masks[0], masks[2])


def test_the_rewards_are_those_of_the_readme():
    """ "**Rewards**: format, base, number, length, overlap, single, saliency, alignment, mismatch,
    consistency; then one number" """
    clip = toy_clip("train", 3)
    terms = reward_terms(clip, (1.0, 1.0), "<think>x</think><answer>null</answer>", {}, None)
    assert ("format", *TERMS) == ("format", "base", "number", "length", "overlap", "single", "saliency",
                                  "alignment", "mismatch", "consistency")
    assert set(terms) == {"format", "malformed", *TERMS}


def test_advantages_by_the_formula():
    """ "**Advantages** within the group: (r - mean) / (std + 1e-4)" """
    rewards = np.array([1.0, 2.0, 4.0, 5.0, 5.0, 5.0])
    expected = []
    for group in (rewards[:3], rewards[3:]):
        expected += [(r - group.mean()) / (group.std(ddof=1) + 1e-4) for r in group]
    assert group_advantages(rewards, 3).tolist() == pytest.approx(expected)


def test_the_prompt_is_computed_once_for_the_group(systems):
    """ "the prompt is computed once for the whole group, forward and backward" """
    prompt_, = systems.policy.embed([prompt_inputs(systems.processor, toy_clip("train", 0))])
    completions = torch.randint(300, 400, (4, 6))
    tokens = []
    layer = systems.policy.model.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: tokens.append(len(output)))
    together, _ = systems.policy.logprobs(prompt_, completions)
    hook.remove()
    assert tokens == [len(prompt_.ids) - 1 + 4 * 6]
    for row, completion in zip(together, completions):
        alone, _ = systems.policy.logprobs(prompt_, completion[None])
        assert torch.allclose(row, alone[0], atol=1e-5)


# ---- the files -------------------------------------------------------------------------------------
def test_the_table_of_files_is_whole():
    """ "What a reader of the method need not open: `benchmarks/`" """
    scripts = {path.name for path in ROOT.glob("*.py")}
    for name in scripts:
        assert f"| `{name}` |" in README
    for folder in ("benchmarks", "run", "toy", "speed", "tests"):
        assert (ROOT / folder).is_dir()


def test_the_algorithm_knows_no_processes():
    """ "Imports go one way" """
    for room in ("data", "model", "rewards", "grpo", "segment"):
        text = (ROOT / f"{room}.py").read_text()
        assert not re.search(r"^(from|import) (run|train|torch\.distributed)\b", text, re.MULTILINE)


# ---- use -------------------------------------------------------------------------------------------
def test_help_names_every_setting():
    """ "every setting, its default and what it means" """
    # The toy's training.json has other defaults.
    text = run_program("train.py", "--policy", "speed/shapes/7b", "--help").stdout
    text = " ".join(text.split()).replace("- ", "-")
    for name, field in train.Settings.__dataclass_fields__.items():
        if name != "roots":
            assert f"--{name} " in text
            default = field.default if field.default != "" else "empty"
            assert f"(default: {default})" in text


def test_segment_writes_masks_animation_and_answer(tmp_path):
    """ "`segment.py` writes `answer.json` first, then `masks/00000.png …` at the video's own size as they are
    made, `overlay.webp` (at most 240 frames and 16 MB) and `sheet.png`" """
    clip = toy_clip("test", 2)
    (tmp_path / "frames").mkdir()
    for t in range(len(clip.frames)):
        clip.frames[t].resize((200, 150)).save(tmp_path / f"frames/{t}.png")
    segment_program.main(["--device", "cpu", "--video", str(tmp_path / "frames"), "--query", clip.query,
                          "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out/masks/00003.png").size == (200, 150)
    assert len(list((tmp_path / "out/masks").iterdir())) == len(clip.frames)
    assert Image.open(tmp_path / "out/overlay.webp").n_frames > 1
    assert Image.open(tmp_path / "out/sheet.png").width > 200
    assert "keyframes" in json.loads((tmp_path / "out/answer.json").read_text())


def test_a_run_logs_a_line_a_step(trained):
    """ "A run writes `out/NAME/metrics.jsonl` (one line a step: every reward term, KL, entropy, lengths, clip
    shares, malformed answers, seconds of each phase and of a completion, tokens a second" """
    folder, rows = trained
    assert [row["step"] for row in rows] == [0, 1]
    others = ("format", "malformed", "reward", "kl", "entropy", "tokens", "clipped_low", "memory_gb")
    for name in (*TERMS, *others):
        assert name in rows[0]
    phases = {"data", "towers", "rollout", "grounding", "reference", "masks", "rewards", "update", "step"}
    assert phases <= rows[0]["seconds"].keys()
    assert rows[0]["speed"]["decode_tokens_per_s"] > 0
    assert (folder / "out/here/curves.png").exists()


def test_the_final_policy_loads_in_transformers(trained):
    """ "the final `policy/`, a Thinker-only directory that transformers loads too" """
    folder, _ = trained
    theirs = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder / "out/here/policy")
    ours = Thinker.from_pretrained(folder / "out/here/policy")
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name])


def test_the_same_command_continues_and_overwrite_begins_anew(trained, tmp_path, monkeypatch, capsys):
    """ "The same command continues a run that was cut off; `--overwrite true` begins it anew." """
    folder, rows = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/here/policy")
    shutil.rmtree(tmp_path / "out/here/step-000002")
    again = train_here(tmp_path, monkeypatch, *SMALL)
    assert "continues at step 1" in capsys.readouterr().out
    assert [row["reward"] for row in again] == [row["reward"] for row in rows]
    train_here(tmp_path, monkeypatch, *SMALL, "--overwrite", "true", "--lr", 0)
    assert "continues" not in capsys.readouterr().out


def test_settings_come_from_three_places(tmp_path):
    """ "A policy's directory may bring a `training.json` with settings that suit it, as the toy policy does:
    how it is trained, never what is read, written or used (`by_user` in `train.py`). The command line wins
    over both." """
    policy = shutil.copytree(TOY_POLICY, tmp_path / "policy")
    (policy / "training.json").write_text(json.dumps(dict(group=5, lr=0.5)))
    settings = settings_of("--policy", policy, "--lr", 0.25)
    assert (settings.group, settings.lr, settings.batch) == (5, 0.25, 8)
    assert settings_of().steps == 90


# ---- to change X, edit Y ---------------------------------------------------------------------------
def test_a_setting_of_a_terms_name_is_its_weight():
    """ "A setting of the term's name in `train.py` is its weight; without one it counts once." """
    terms = dict(base=1.0, calm=0.5)
    assert combine(terms, {}) == 1.5
    assert combine(terms, dict(calm=3.0)) == 2.5


def test_the_number_of_keyframes_is_one_constant(tmp_path):
    """ "`data.py`: `KEYFRAMES`. The prompt, the reading, the reward and the memory plan follow." """
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in ("benchmarks", "run", "trust"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    text = (tmp_path / "data.py").read_text()
    changed = re.sub(r"^KEYFRAMES = 4 ", "KEYFRAMES = 8 ", text, flags=re.MULTILINE)
    assert changed != text
    (tmp_path / "data.py").write_text(changed)
    program = f"""
from data import KEYFRAME_TASK, Moment, Processor, keyframes
from rewards import number_term
moments = [Moment(0, 9, "a", True, list(range(20)))]
assert "Then choose 1 to 8 short moments" in "".join(KEYFRAME_TASK)
assert len(keyframes(moments)) == 8
best = max(range(1, 20), key=lambda n: number_term([Moment(0, 9, "a", True, list(range(n)))]))
assert best == 8
Processor({TOY_POLICY!r})
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The toy's tokenizer no longer knows the prompt, and says so.
    assert "made for other sentences" in result.stderr


def test_an_unknown_kl_estimate_is_refused():
    """ "`grpo.py`: `kl_divergence`; its name into the choices of `kl` in `train.py`" """
    logp = torch.zeros(2, 3)
    for kind in train.Settings.__dataclass_fields__["kl"].metadata["choices"]:
        assert torch.equal(kl_divergence(logp, logp, kind), logp)
    with pytest.raises(ValueError, match="k9"):
        kl_divergence(logp, logp, "k9")


def test_every_benchmark_is_one_file_and_one_entry():
    """ "one file in `benchmarks/` and its entry in `benchmarks/__init__.py`" """
    shared = {
        "__init__", "samples", "metrics", "predictions", "references", "results", "mini", "media", "pictures",
        "check", "questions", "quiz", "replies", "reports"}
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared
    # RefCOCO's file holds three.
    assert {entry.record.partition(".")[0] for entry in BENCHMARKS} == files
    assert len({entry.name for entry in BENCHMARKS}) == len(BENCHMARKS)


def test_the_towers_are_frozen_in_one_place():
    """ "`model.py`: `Thinker.__init__` freezes the towers." """
    thinker = Thinker.from_pretrained(TOY_POLICY)
    trained = {name.split(".")[0] for name, p in thinker.named_parameters() if p.requires_grad}
    assert trained == {"model", "lm_head"}


DETECTOR = """
def boxes(image, description):
    return [(0, 0, image.width - 1, image.height // 2)]
"""


def test_system2_is_a_file_with_one_function(tmp_path, monkeypatch):
    """ "nothing: `--system2 FILE.py` in train.py, eval.py and segment.py" """
    (tmp_path / "detector.py").write_text(DETECTOR)
    detector = str(tmp_path / "detector.py")
    row = train_here(tmp_path, monkeypatch, *SMALL, "--steps", 1, "--system2", detector)[0]
    assert row["malformed"] < 1
    results = evaluate_here(tmp_path / "eval", "--limit", 2, "--system2", detector)
    assert len(results["expressions"]) == 2
    out = str(tmp_path / "s")
    segment_program.main(["--device", "cpu", "--index", "2", "--system2", detector, "--out", out])
    frames = json.loads((tmp_path / "s/answer.json").read_text())["keyframes"]
    assert all(frame["boxes"] == [[0, 0, 127, 64]] for frame in frames)


def test_an_answer_of_the_second_turn_earns_its_form_and_its_boxes():
    """ "An answer earns 1 if it can be read (boxes, or `null`), and R_A on that frame, which is the matched
    IoU less surplus boxes; where the target is not on the frame, 1 for `null` and 0 for a box." """
    masks = square_masks(T=1)
    frame = Image.new("RGB", (20, 20))
    shown = data.Clip("", data.Frames(lambda t: frame, [0]), "a dog", masks=masks, task="grounding")
    hidden = replace(shown, masks=~masks & masks)
    box = '{"bbox_2d": [5, 5, 9, 9]}'
    for clip, text, expected in (
            (shown, box, 2), (shown, f"[{box}, {box}]", 1.5), (shown, "null", 1), (shown, "a dog", 0),
            (hidden, "null", 2), (hidden, box, 1), (hidden, "a dog", 0)):
        terms = reward_terms(clip, (1.0, 1.0), text, {}, None)
        assert total_rewards([terms], [9], settings_of()) == [expected]


def test_a_sample_with_a_sound_gives_a_clip_with_a_sound(minis):
    """ "its reader gives the sample a `sound`" """
    sample = find_benchmark("refavs").read(str(minis("refavs")), "train")[0]
    assert isinstance(sample, Sample)
    silent = load(replace(sample, sound=None))
    assert load(sample).sound is not None and silent.sound is None


def test_every_task_has_a_prompt_and_a_reward():
    """ "`data.py`: its prompt, beside the reading of its answer, in `TASKS`; `rewards.py`: its branch of
    `reward_terms`" """
    truth = dict(box=(0, 0, 1, 1), points=[[0, 0], [1, 1]], type="free-form", options=[], solution="red")
    for task in data.TASKS:
        clip = replace(toy_clip("test", 0), task=task, truth=truth)
        assert prompt(clip)[1]["content"][0]["text"].startswith(("Task: ", "Question: "))
        assert "format" in reward_terms(clip, (1.0, 1.0), "<answer>red</answer>", {}, None)
    with pytest.raises(ValueError, match="unknown task: dance"):
        reward_terms(replace(clip, task="dance"), (1.0, 1.0), "", {}, None)


def test_frames_of_a_clip_are_drawn_in_training():
    """ "`--frames 8,24` (drawn for each clip in training; evaluation takes one number, 24)" """
    assert train.Settings.frames == "8,24"
    sources, _ = training_sources("toy", ".", {}, 0, (3, 6))
    counts = set()
    for i in range(40):
        clip = sources[0].read(sources[0].items[0], np.random.default_rng(i))
        counts.add(len(clip.frames))
    assert counts == {3, 4, 5, 6}
    whole = read_any(sources[0].items[0], np.random.default_rng(0), (24, 24))
    assert len(whole.frames) == len(toy_clip("train", 0).frames)


def test_the_variants_of_the_objective_are_settings():
    """ "DAPO: `--average token --clip_high 0.28 --skip_equal true`." """
    commands = re.findall(r"(?:DAPO|Dr\. GRPO|GSPO|No reference in the loss): `(--[^`]*)`", README)
    assert len(commands) == 4
    for command in commands:
        settings_of(*command.split())


# ---- real data -------------------------------------------------------------------------------------
def test_miniatures_are_made_checked_and_shown(tmp_path, capsys):
    """ "a miniature in the very layout, from toy clips" """
    root = str(tmp_path / "mini")
    check_program(["mini", "--bench", "revos", "--out", root, "--videos", "2"])
    with pytest.raises(SystemExit) as end:
        check_program(["check", "--bench", "revos", "--data_root", root])
    assert end.value.code == 0 and ", 0 broken" in capsys.readouterr().out
    check_program(["show", "--bench", "revos", "--data_root", root, "--out", str(tmp_path / "show")])
    assert (tmp_path / "show/sample.png").exists() and (tmp_path / "show/prompt.txt").exists()


def test_a_training_step_is_of_one_task(data_root, tmp_path, monkeypatch):
    """ "A training step is of one task, so that all processes do the same." """
    rows = train_here(tmp_path, monkeypatch, "--data", "revos,refavs", "--data_root", data_root, "--batch", 4,
                      "--steps", 3)
    for row in rows:
        assert ("base" in row) != ("first_box" in row)


def test_what_is_broken_is_named_and_counts_for_nothing(copy, tmp_path, monkeypatch, capsys):
    """ "A sample that turns out broken in training is named, counted as `broken` in the log, and counts for
    nothing in the loss." """
    root = copy("mevis")
    for picture in (root / "train").rglob("*.jpg"):
        picture.write_bytes(b"broken")
    row, = train_here(tmp_path, monkeypatch, "--data", "mevis", "--mevis_root", root, "--batch", 2,
                      "--steps", 1)
    assert row["broken"] == 2 and row["loss"] == 0
    assert "left out: mevis/" in capsys.readouterr().err


def test_an_evaluation_goes_on_and_is_not_mixed_up(tmp_path, capsys):
    """ "`OUT/run.json` says whose they are, and predictions of another policy, split or setting are refused
    without `--overwrite true`." """
    first = evaluate_here(tmp_path, "--limit", 3)
    folders = sorted((tmp_path / "Annotations").glob("*/*/*"))
    shutil.rmtree(folders[0])
    assert evaluate_here(tmp_path, "--limit", 3)["summary"] == first["summary"]
    with pytest.raises(SystemExit):
        evaluate_here(tmp_path, "--limit", 3, "--split", "pairs")
    assert "give another --out, or --overwrite true" in capsys.readouterr().err
    evaluate_here(tmp_path, "--limit", 3, "--split", "pairs", "--overwrite", "true")


def test_missing_predictions_score_the_worst(tmp_path, capsys):
    """ "Missing predictions score the worst and are counted." """
    evaluate_here(tmp_path / "a", "--limit", 2)
    shutil.rmtree(next((tmp_path / "a/Annotations").glob("*/*/*")))
    results = evaluate_here(tmp_path / "b", "--limit", 2, "--predictions", tmp_path / "a")
    assert results["missing"] == 1
    assert min(row["J"] for row in results["expressions"]) == 0
    assert "no prediction" in capsys.readouterr().out


def test_two_evaluations_are_compared_sample_by_sample(tmp_path, capsys):
    """ "`--against OTHER/results.json` adds the paired difference to another evaluation." """
    evaluate_here(tmp_path / "a", "--limit", 3)
    again = evaluate_here(tmp_path / "b", "--limit", 3, "--against", tmp_path / "a/results.json")
    assert again["against"]["difference"] == 0
    assert "+0.0 +- 0.0 (95 % interval of the paired difference)" in capsys.readouterr().out


# ---- scale -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, options, world", [
    ("3b", (), 8), ("7b", (), 8), ("7b", ("--reference", "host"), 8), ("3b", ("--lora_rank", 64), 8),
    ("7b", ("--lora_rank", 64), 8)])
def test_the_table_of_memory_is_what_the_plan_says(shape, options, world):
    """ "prints GB on each device in each phase of a step, from the shapes alone" """
    label = " ".join(map(str, options))
    name = f"{shape.upper()}, " + (f"`{label}`" if options else "all weights")
    row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    needed = int(re.search(r"(\d+) GB \|$", row)[1])
    settings = settings_of("--policy", ROOT / f"speed/shapes/{shape}", "--sam2_weights",
                           "sam2.1_hiera_large.pt", "--plan", *options)
    plan = memory_plan(settings, world)
    peak = max(sum(parts.values()) for parts in plan.values()) / 1e9
    assert round(peak) == needed


def test_adapters_are_merged_in_what_is_saved(tmp_path, monkeypatch):
    """ "The one copy of the weights is then policy, reference (adapters off) and System 2, and what is saved
    is merged." """
    rows = train_here(tmp_path, monkeypatch, *SMALL, "--lora_rank", 4, "--lr", 0.01)
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0
    saved = Thinker.from_pretrained(tmp_path / "out/here/policy")
    start = Thinker.from_pretrained(TOY_POLICY)
    assert saved.state_dict().keys() == start.state_dict().keys()
    changed = [name for name, p in saved.state_dict().items() if not torch.equal(p, start.state_dict()[name])]
    assert changed and all("_proj.weight" in name for name in changed)


def test_a_run_that_was_cut_off_ends_with_the_very_weights(trained, tmp_path, monkeypatch):
    """ "With as many as before it ends with the very weights and log of a run that was never cut off: bit for
    bit on a CPU" """
    folder, _ = trained
    stop = train.stop_requested
    monkeypatch.setattr(train, "stop_requested", lambda step, *rest: step == 0)
    train_here(tmp_path, monkeypatch, *SMALL)
    assert not (tmp_path / "out/here/policy").exists()
    monkeypatch.setattr(train, "stop_requested", stop)
    train_here(tmp_path, monkeypatch, *SMALL)
    for name in ("policy/model.safetensors", "step-000002/model.safetensors"):
        assert (tmp_path / "out/here" / name).read_bytes() == (folder / "out/here" / name).read_bytes()


def test_other_settings_than_the_runs_own_are_refused(trained, monkeypatch, capsys):
    """ "Other settings than the run's own are refused, but for `--steps` and those of machine and output."
    """
    folder, _ = trained
    with pytest.raises(SystemExit):
        train_here(folder, monkeypatch, *SMALL, "--beta", 0.5, "--steps", 3)
    assert "has other settings: --beta" in capsys.readouterr().err


def test_a_checkpoint_is_a_policys_directory(trained):
    """ "is a policy's directory (for `--policy`) with `run.json`, `metrics.jsonl` (the log so far) and
    `state/`"
    """
    folder, _ = trained
    checkpoint = folder / "out/here/step-000001"
    assert {"run.json", "metrics.jsonl", "state"} <= {path.name for path in checkpoint.iterdir()}
    assert len((checkpoint / "metrics.jsonl").read_text().splitlines()) == 1
    Thinker.from_pretrained(checkpoint)
    data.Processor(checkpoint)


# ---- results ---------------------------------------------------------------------------------------
def test_the_cold_start_answers_with_the_first_frame(systems):
    """ "the cold start writes in its reasoning when the target is in view and then answers with the first
    frame all the same" """
    clips = [toy_clip("test", index) for index in range(24)]
    inputs = [prompt_inputs(systems.processor, clip) for clip in clips]
    drawn = systems.policy.generate(systems.policy.embed(inputs), 1, 96, eos_ids=systems.processor.eos_ids,
                                    temperature=0.0)
    first = 0
    answered = 0
    for clip, (ids,) in zip(clips, drawn):
        text = systems.processor.decode(ids)
        if clip.kind != "null" and "no such object" not in text:
            assert "in view from" in text or "In view:" in text
            answered += 1
            first += 0 in data.frames_to_ground(clip, text)
    assert answered > 15
    assert first / answered > 0.9


def test_without_a_learning_rate_nothing_changes(tmp_path, monkeypatch):
    """ "With `--lr 0` the weights stay what they are" """
    train_here(tmp_path, monkeypatch, *SMALL, "--steps", 1, "--lr", 0)
    saved = Thinker.from_pretrained(tmp_path / "out/here/policy").state_dict()
    for name, weight in Thinker.from_pretrained(TOY_POLICY).state_dict().items():
        assert torch.equal(saved[name], weight)


# ---- questions -------------------------------------------------------------------------------------
def test_the_first_loss_is_near_zero_and_nothing_is_clipped():
    """ "Advantages of a group sum to 0 and the ratio starts at exactly 1." """
    torch.manual_seed(0)
    logp = -torch.rand(6, 5)
    advantages = group_advantages(torch.randn(6), 6)
    loss, sums = policy_loss(logp, advantages, torch.ones(6, 5), beta=0.0)
    assert abs(loss.item()) < 1e-6
    assert sums["clipped_low"] == sums["clipped_high"] == 0


def test_the_forms_of_answers():
    """ "System 2 answers with `{"bbox_2d": [x1, y1, x2, y2]}` per object, in pixels of the resized picture it
    was given" """
    text = '<answer>[{"start_time": "00:01.00", "end_time": "00:01.50", "description": "a dog"}]</answer>'
    moment, = parse_moments(text, 8, 2.0)
    assert moment.frames == [2, 3] and moment.description == "a dog"
    assert parse_boxes('[{"bbox_2d": [1, 2, 3, 4]}]') == [(1.0, 2.0, 3.0, 4.0)]
    assert data.is_null(answer_text("<answer> null </answer>"))


def test_checkpoints_load_with_and_without_the_prefix(tmp_path, systems):
    """ "A directory of a full Qwen2.5-Omni (weights under `thinker.`) or of a Thinker alone, single-file or
    sharded safetensors." """
    systems.policy.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Thinker.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], p) for name, p in systems.policy.state_dict().items())


def test_departures_in_the_rewards():
    """ "a box on the left edge counts, each keyframe is mapped back with its own scale, every surplus box
    counts"
    """
    masks = np.zeros((1, 8, 20, 20), bool)
    masks[:, :, 5:10, 0:4] = True
    text = answer(("00:00.00", "00:00.00", "a dog"))
    right = (0.0, 5.0, 3.0, 9.0)
    terms = vos_rewards(text, masks, {0: [right]}, None)
    assert terms["alignment"] == 1 and terms["mismatch"] == 0
    assert vos_rewards(text, masks, {0: [right] * 3}, None)["mismatch"] == -1
    assert to_source((10, 20, 30, 40), (2.0, 3.0), (100, 200)) == (20, 60, 60, 99)


def test_looking_in_vain_earns_no_number_term():
    """ "keyframes named for nothing earn no number term: they would pay more than `null`" """
    nothing = np.zeros((1, 8, 20, 20), bool)
    text = answer(("00:00.00", "00:01.50", "a dog"))
    assert vos_rewards(text, nothing, {}, None)["number"] == 0
    assert vos_rewards(text, square_masks(), {}, None)["number"] == pytest.approx(1.6)


def test_sampling_is_neutral():
    """ "Neutral sampling by default (the published top-p of 0.95 samples one distribution and trains
    another)." """
    assert (train.Settings.temperature, train.Settings.top_p, train.Settings.top_k) == (1.0, 1.0, 0)


def test_the_query_stands_before_the_media():
    """ "The query stands before the media" """
    clip = toy_clip("test", 0)
    content = prompt(clip)[1]["content"]
    assert content[0]["type"] == "text" and clip.query in content[0]["text"]
    assert content[1]["type"] == "video"


def test_results_hold_a_row_for_each_sample(tmp_path):
    """ "in per cent of 60 clips" """
    results = evaluate_here(tmp_path, "--limit", 2)
    assert results["bench"] == "toy" and evaluation.ANSWER_COLUMNS == ("visible", "format")
    for row in results["expressions"]:
        assert row["J&F"] == pytest.approx((row["J"] + row["F"]) / 2)
    null = next(row for row in results["expressions"] if row["kind"] == "null")
    assert null["J"] == 100
