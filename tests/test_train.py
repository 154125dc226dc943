"""train.py: what is drawn, what a run writes, settings and their limits, how programs end on bad input."""
import argparse
import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

import eval as evaluation
import segment
import train
from benchmarks import check
from benchmarks.toy import toy_clip
from data import Clip, Frames, prompt_inputs
from grpo import collect, policy_loss
from rewards import TERMS
from run import validation
from run.draw import (
    Source,
    epoch_length,
    from_shared_memory,
    read_clip,
    sample_loader,
    training_sources,
)
from run.log import Watch, grounding_means
from run.processes import start_processes
from run.settings import frame_range, read_settings, resumable_names, setting
from tests.world import ROOT, jpeg, run_program, settings_of, toy_systems, train_here, write_avi
from trust.errors import BadInput
from trust.options import MOST_FRAMES, TOY_POLICY, Parser


def read_rows(folder, name="run"):
    """The log of a run in a folder."""
    lines = (folder / f"out/{name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_weights(folder):
    return load_file(Path(folder) / "model.safetensors")


# ---- what is drawn ---------------------------------------------------------------------------------
def test_learning_rate_warms_up_then_falls_along_a_cosine():
    settings = settings_of("--steps", 10, "--warmup", 2)
    factors = [train.schedule(step, settings) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert 0 < factors[9] < 0.05
    assert factors[2:] == sorted(factors[2:], reverse=True)


def numbers(task, count, start=0):
    """A source whose items are numbers and whose clips are named after them."""
    pictures = [Image.new("RGB", (8, 8))]
    frames = Frames(pictures.__getitem__, [0])
    truth = dict(type="free-form", options=[], solution="")

    def read(item, rng):
        query = str(rng.integers(9))
        return Clip(str(item), frames, query, task=task, truth=truth)
    return Source(task, range(start, start + count), read)


def no_inputs(*_):
    return SimpleNamespace()


BLIND = SimpleNamespace(video_inputs=no_inputs, image_inputs=no_inputs)


def drawn(sources, steps, settings, world=1, start=0):
    """Names, tasks, queries and seeds of each step's clips, over all processes."""
    settings = replace(settings, steps=steps)
    size = settings.batch * settings.accumulate
    found = [[] for _ in range(steps)]
    for rank in range(world):
        loader = sample_loader(sources, BLIND, settings, start, rank, world)
        first = start * size // world
        for i, (clip, _, seed) in enumerate(loader, first):
            step = i * world // size
            found[step].append((clip.name, clip.task, clip.query, seed))
    return [sorted(step) for step in found]


def names_of(steps):
    names = []
    for step in steps:
        names += [name for name, _, _, _ in step]
    return names


def tasks_of(steps):
    """The task of each step, which has only one."""
    tasks = []
    for step in steps:
        task, = {task for _, task, _, _ in step}
        tasks.append(task)
    return tasks


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("objects", [None, 2])
def test_pictures_and_masks_come_through_shared_memory(workers, objects):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(3, 8, 6, 3), dtype=np.uint8)
    masks = None
    if objects:
        # A view that is not one block of memory.
        masks = (rng.random((objects, 6, 8, 6)) > 0.5)[:, ::-2]

    def read(item, rng):
        return Clip("clip", Frames(lambda t: Image.fromarray(pixels[t]), range(3)), "red", masks=masks)

    settings = settings_of("--batch", 1, "--workers", workers, "--steps", 2)
    loader = sample_loader((Source("vos", [0], read),), BLIND, settings, 0, 0, 1)
    for clip, _, _ in map(from_shared_memory, loader):
        assert clip.frames.read.tensor.is_shared() == (workers > 0)
        for t in range(3):
            assert np.array_equal(np.asarray(clip.frames[t]), pixels[t])
        assert np.array_equal(clip.frames.pick([2])[0], pixels[2])
        assert clip.size == (8, 6)
        if masks is None:
            assert clip.masks is None
        else:
            assert isinstance(clip.masks, np.ndarray)
            assert np.array_equal(clip.masks, masks)


def test_full_shared_memory_ends_in_one_line(monkeypatch):
    def share_memory(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share_memory)
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(8, 6, 3), dtype=np.uint8)

    def read(item, rng):
        return Clip("clip", Frames(lambda t: Image.fromarray(pixels), [0]), "red")

    settings = settings_of("--batch", 1, "--workers", 1, "--steps", 1)
    loader = sample_loader((Source("vos", [0], read),), BLIND, settings, 0, 0, 1)
    with pytest.raises(BadInput, match=r"no room in shared memory, /dev/shm .*unable to allocate"):
        next(map(from_shared_memory, loader))


def test_frames_of_several_sizes_are_a_broken_clip():
    def read(item, rng):
        return Clip("gray", Frames(lambda t: Image.new("L", (6 + t, 8)), item), "red")

    source = Source("vos", [[0, 1], [1]], read)
    assert read_clip(source, [0, 1], None).fault == "frames of several sizes: gray"
    assert read_clip(source, [1], None).frames[0].mode == "RGB"


def test_an_epoch_draws_every_clip_once_whatever_the_number_of_processes():
    settings = settings_of("--batch", 4, "--seed", 5, "--workers", 0)
    sources = (numbers("vos", 24),)
    steps = drawn(sources, 12, settings)
    assert steps == drawn(sources, 12, replace(settings, workers=3))
    continued = drawn(sources, 12, settings, start=5)
    assert steps[5:] == continued[5:]
    first = names_of(steps[:6])
    second = names_of(steps[6:])
    everything = sorted(str(i) for i in range(24))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    seeds = set()
    for step in steps:
        seeds |= {seed for _, _, _, seed in step}
    assert len(seeds) == 48

    assert steps == drawn(sources, 12, settings, world=2)
    pairs = []
    for a, b in zip(steps[:6:2], steps[1:6:2]):
        pairs.append(sorted(a + b))
    assert pairs == drawn(sources, 3, replace(settings, batch=2, accumulate=4))
    assert pairs == drawn(sources, 3, replace(settings, batch=8))


def test_a_step_is_of_one_task_and_an_epoch_of_several_leaves_nothing_out():
    settings = settings_of("--batch", 4, "--workers", 0)
    sources = (
        numbers("vos", 7),
        numbers("avs", 3, 100),
        numbers("vos", 4, 200),
        numbers("qa", 9, 300),
    )
    assert epoch_length(sources, 4) == 3 + 1 + 3
    steps = drawn(sources, 14, settings)
    assert tasks_of(steps[:7]) != tasks_of(steps[7:])
    names = names_of(steps[:7])
    everything = set()
    for source in sources:
        everything |= {str(i) for i in source.items}
    assert set(names) == everything
    # 5 of the 23 fill up.
    assert len(names) == 28
    assert steps[:7] == drawn(sources, 7, settings)


def test_the_number_of_frames_is_drawn_for_each_clip():
    settings = settings_of("--frames", "3,6", "--batch", 4, "--workers", 0)
    frames = frame_range(settings.frames)
    sources, _ = training_sources("toy", ".", {}, settings.seed, frames)

    def lengths(settings):
        loader = sample_loader(sources, BLIND, settings, 0, 0, 1)
        return [len(clip.frames) for clip, _, _ in loader]

    counts = lengths(replace(settings, steps=8))
    assert set(counts) == {3, 4, 5, 6}
    assert counts == lengths(replace(settings, steps=8, workers=2))


@pytest.mark.parametrize("text, expected", [
    ("8,24", (8, 24)),
    ("24", (24, 24)),
    ("5,5", (5, 5)),
])
def test_frames_are_one_number_or_two(text, expected):
    assert frame_range(text) == expected
    assert settings_of("--frames", text).frames == text
    assert frame_range(train.Settings.frames) == (8, MOST_FRAMES)


# ---- runs on real data -----------------------------------------------------------------------------
def test_training_mixes_tasks_a_step_of_each(data_root, tmp_path, monkeypatch):
    rows = train_here(
        tmp_path, monkeypatch, "--data", "revos,mevis,refavs,video_r1", "--data_root", data_root,
        "--batch", 4, "--steps", 6)
    # 4 videos, 8 expressions of Ref-AVS, 10 questions.
    steps = {"base": 1, "first_box": 2, "accuracy": 3}
    counts = dict.fromkeys(steps, 0)
    for row in rows:
        assert row["broken"] == 0
        assert "format" in row
        terms = [term for term in steps if term in row]
        assert len(terms) == 1
        counts[terms[0]] += 1
    assert counts == steps
    assert (tmp_path / "out/here/policy/model.safetensors").exists()


def test_a_dataset_may_lie_elsewhere_and_what_is_left_out_is_listed(copy, tmp_path, monkeypatch, capsys):
    root = copy("revos").rename(tmp_path / "elsewhere")
    meta = root / "meta_expressions_train_.json"
    content = json.loads(meta.read_text())
    video = next(iter(content["videos"].values()))
    for expression in video["expressions"].values():
        expression["anno_id"] = []
    meta.write_text(json.dumps(content))
    rows = train_here(
        tmp_path, monkeypatch, "--data", "revos", "--revos_root", root, "--batch", 1, "--steps", 1)
    left = (tmp_path / "out/here/left_out.txt").read_text().splitlines()
    assert rows[0]["broken"] == 0
    assert len(left) > 3
    assert all("names no object" in line for line in left)
    assert f"{len(left)} samples are left out" in capsys.readouterr().out


def test_what_cannot_be_read_is_named_and_counts_for_nothing(copy, tmp_path, monkeypatch, capsys):
    root = copy("revos")
    broken = next((root / "JPEGImages/OVIS/train").glob("train-*"))
    (broken / "img_0000003.jpg").write_bytes(b"no picture")
    options = ["--data", "revos", "--data_root", root.parent]
    options += ["--batch", 2, "--steps", 1, "--lr", 0.1]
    row, = train_here(tmp_path, monkeypatch, *options)
    assert row["broken"] == 1
    assert "img_0000003.jpg" in capsys.readouterr().err

    small = ["--name", "two", "--group", 2, "--max_new_tokens", 64, "--threads", 1]
    done = run_program("train.py", *options, *small, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    # One process has nothing to learn from.
    assert "img_0000003.jpg" in done.stderr
    two, = read_rows(tmp_path, "two")
    for name in ("broken", "reward", "kl"):
        assert row[name] == pytest.approx(two[name], rel=1e-3)


# ---- a run -----------------------------------------------------------------------------------------
def test_two_processes_update_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = "--steps 1 --batch 2 --group 4 --threads 1 --updates 2 --average token".split()
    train.main([*common, "--name", "one", "--device", "cpu"])
    done = run_program("train.py", *common, "--name", "two", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one_row, = read_rows(tmp_path, "one")
    two_row, = read_rows(tmp_path, "two")
    for key in ("reward", "loss", "kl", "entropy", "gradient_norm", "length", "tokens"):
        assert one_row[key] == pytest.approx(two_row[key], rel=1e-3, abs=1e-5), key

    start = read_weights(TOY_POLICY)
    one = read_weights(tmp_path / "out/one/policy")
    two = read_weights(tmp_path / "out/two/policy")
    learned = 0.0
    for name in start:
        change = one[name] - start[name].float()
        learned = max(learned, change.abs().max())
        assert torch.allclose(one[name], two[name], atol=1e-4)
    assert learned > 1e-4
    assert one.keys() == two.keys() == start.keys()
    assert (tmp_path / "out/two/curves.png").stat().st_size > 1000
    # The first process looked at its own prompts.
    assert (tmp_path / "out/two/report.html").stat().st_size > 10_000
    assert (tmp_path / "out/two/rollouts/step-000001.jsonl").exists()


def test_without_a_learning_rate_nothing_is_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/run/step-000007").mkdir(parents=True)
    (tmp_path / "out/run/metrics.jsonl").write_text("old\n")
    options = "--steps 1 --batch 2 --group 2 --lr 0 --threads 1 --overwrite true --device cpu"
    train.main(options.split())
    assert not (tmp_path / "out/run/step-000007").exists()
    after = read_weights(tmp_path / "out/run/policy")
    for name, weight in read_weights(TOY_POLICY).items():
        assert torch.equal(after[name], weight.float())
    row, = read_rows(tmp_path)
    others = {"format", "malformed", "reward", "equal_groups", "kl", "entropy", "clipped_low", "clipped_high"}
    assert {*TERMS, *others, "seconds", "memory_gb"} <= row.keys()


def test_a_run_stops_after_some_steps_in_a_row_without_a_finite_gradient(tmp_path, monkeypatch):
    # Of the first step; all others are NaN.
    norms = [math.nan, 1.0, math.nan]

    def clip_grad_norm(*_):
        return torch.tensor(norms.pop(0) if norms else math.nan)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm)
    monkeypatch.setattr(train, "PATIENCE", 2)
    monkeypatch.chdir(tmp_path)
    options = "--device cpu --steps 9 --batch 1 --group 2 --max_new_tokens 2 --updates 3"
    options += " --beta 0 --consistency 0"
    with pytest.raises(SystemExit, match="step 1: ") as stop:
        train.main(options.split())
    assert "\n" not in stop.value.code
    assert [row["skipped"] for row in read_rows(tmp_path)] == [2, 3]


# ---- another System 2, fewer frames ----------------------------------------------------------------
DETECTOR = """
def boxes(image, description):
    with open("asked.txt", "a") as file:
        print(*image.size, description, file=file)
    return []
"""


@pytest.fixture(scope="module")
def detected(tmp_path_factory):
    """(folder, row, numbers of frames) of a step with 3 frames a clip and a detector that finds nothing."""
    folder = tmp_path_factory.mktemp("detected")
    (folder / "detector.py").write_text(DETECTOR)
    lengths = []

    def collect_counted(systems, clips, *rest):
        lengths.extend(len(clip.frames) for clip in clips)
        return collect(systems, clips, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "collect", collect_counted)
        options = "--steps 1 --batch 4 --updates 1 --workers 0 --frames 3 --system2 detector.py --seed 1"
        row, = train_here(folder, patch, *options.split())
    return folder, row, lengths


def test_a_file_grounds_in_training(detected):
    folder, row, _ = detected
    asked = (folder / "asked.txt").read_text().splitlines()
    width, height = toy_clip("train", 0).frames[0].size
    for line in asked:
        assert line.startswith(f"{width} {height} ")
        assert line.split(" ", 2)[2].strip()
    # It found nothing, and nothing too much.
    assert row["alignment"] == row["mismatch"] == 0
    run = json.loads((folder / "out/here/settings.json").read_text())
    assert run["settings"]["system2"] == "detector.py"


def test_training_shows_as_many_frames_as_it_is_told(detected):
    _, _, lengths = detected
    assert lengths == [3] * 4


# ---- steps, by themselves --------------------------------------------------------------------------
@pytest.fixture
def cpu():
    """The device of a process group of one."""
    _, _, device = start_processes("cpu")
    yield device
    dist.destroy_process_group()


def test_a_term_that_only_some_completions_have_is_in_the_log(systems, cpu):
    settings = settings_of("--group", 2, "--max_new_tokens", 8, "--updates", 1, "--lr", 0)
    clips = [toy_clip("train", 3), toy_clip("train", 4)]
    inputs = [prompt_inputs(systems.processor, clip) for clip in clips]
    watch = Watch()
    groups = collect(systems, clips, inputs, [1, 2], settings, watch)
    # One of four completions has it.
    groups[1].terms[0]["calm"] = 2.0
    optimizer = train.start_optimizer(systems.policy, settings)
    row = train.update(0, systems, optimizer, groups, settings, watch)
    assert row["calm"] == 0.5
    all_terms = groups[0].terms + groups[1].terms
    for name in ("base", "format"):
        values = [terms[name] for terms in all_terms]
        assert row[name] == pytest.approx(np.mean(values), abs=1e-6)


def groups_with_two_turns(systems, settings):
    """Groups of two toy clips."""
    clips = [toy_clip("train", 3), toy_clip("train", 4)]
    inputs = [prompt_inputs(systems.processor, clip) for clip in clips]
    return collect(systems, clips, inputs, [1, 2], settings, Watch())


def mean_loss(systems, groups, settings, longest):
    """The loss of one turn by its definition, with as many completions in each group."""
    losses = []
    for group in groups:
        logp, _ = systems.policy.logprobs(group.prompt, group.completions)
        loss, _ = policy_loss(
            logp, group.advantages, group.mask, None, group.reference_logp, average=settings.average,
            longest=longest)
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("average", ["completion", "constant"])
def test_two_turns_learn_by_the_weighted_sum_of_their_losses(systems, cpu, monkeypatch, average):
    settings = settings_of("--group", 4, "--updates", 1, "--ground_weight", 0.3, "--average", average,
                           "--max_new_tokens", 32, "--consistency", 0)
    groups = groups_with_two_turns(systems, settings)
    seconds = [group.second for group in groups]
    # Unlike rewards, so that all of it is seen.
    for second in seconds:
        second.advantages = torch.tensor([1.0, -2.0, 0.5, 0.5])
    policy = systems.policy
    policy.zero_grad()
    first = mean_loss(systems, groups, settings, longest=32)
    second = mean_loss(systems, seconds, settings, longest=128)
    (first + 0.3 * second).backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    found = {}

    def keep(policy, settings):
        found.update((name, p.grad.clone()) for name, p in policy.named_parameters() if p.grad is not None)
        return math.inf

    # An infinite norm: nothing is learned.
    monkeypatch.setattr(train, "clip_gradients", keep)
    optimizer = train.start_optimizer(policy, settings)
    train.update(0, systems, optimizer, groups, settings, watch_of("rollout"))
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * largest), name


def watch_of(phase):
    """A Watch that knows how long a phase took."""
    watch = Watch()
    watch.seconds[phase] = 1.0
    return watch


def test_updates_make_rewarded_answers_of_the_second_turn_likelier(cpu):
    systems = toy_systems()
    # Hot, so that the answers differ.
    settings = settings_of("--group", 4, "--updates", 3, "--ground_weight", 2, "--beta", 0,
                           "--temperature", 1.5, "--max_new_tokens", 32, "--consistency", 0)
    groups = groups_with_two_turns(systems, settings)
    seconds = [group.second for group in groups]
    for second in seconds:
        second.advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])

    def gains():
        sums = []
        for second in seconds:
            with torch.no_grad():
                logp, _ = systems.policy.logprobs(second.prompt, second.completions, 1.5)
            means = (logp * second.mask).sum(1) / second.mask.sum(1)
            sums.append(float((means * second.advantages).sum()))
        return sums

    before = gains()
    optimizer = train.start_optimizer(systems.policy, replace(settings, lr=1e-4))
    row = train.update(0, systems, optimizer, groups, settings, watch_of("rollout"))
    for earlier, later in zip(before, gains()):
        assert later > earlier + 0.01
    for second in seconds:
        assert second.old_logp is not None
    # It is the second turn whose ratios have moved.
    assert row["grounding"]["loss"] < -0.001


def updated_weights(update, settings):
    """The weights after update(systems, optimizer, groups), and the groups."""
    systems = toy_systems()
    groups = groups_with_two_turns(systems, settings)
    for group in groups:
        # Unlike rewards, so that there is something to learn.
        group.advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    optimizer = train.start_optimizer(systems.policy, settings)
    update(systems, optimizer, groups)
    return {name: p.detach().clone() for name, p in systems.policy.named_parameters()}, groups


def test_parts_of_a_batch_are_updates_of_their_own(cpu):
    """Their ratios are to the policy that drew the batch, not to the one that the part before has left."""
    settings = settings_of("--group", 4, "--parts", 2, "--updates", 1, "--lr", 1e-3, "--max_new_tokens", 32,
                           "--consistency", 0, "--ground_weight", 1)

    def by_hand(systems, optimizer, groups):
        policy = systems.policy
        for second in (False, True):
            for group in groups:
                turn = group.second if second else group
                with torch.no_grad():
                    turn.old_logp, _ = policy.logprobs(turn.prompt, turn.completions)
        for group in groups:
            losses = []
            for turn in (group, group.second):
                logp, _ = policy.logprobs(turn.prompt, turn.completions)
                loss, _ = policy_loss(logp, turn.advantages, turn.mask, turn.old_logp, turn.reference_logp)
                losses.append(loss)
            sum(losses).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    def ours(systems, optimizer, groups):
        train.update(0, systems, optimizer, groups, settings, watch_of("rollout"))

    expected, _ = updated_weights(by_hand, settings)
    found, groups = updated_weights(ours, settings)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=2e-5), name


def test_parts_that_do_not_share_the_prompts_are_refused(tmp_path, monkeypatch):
    problem = "--parts 3: the 4 prompts of a process cannot be shared by them"
    with pytest.raises(BadInput, match=problem):
        train.find_start(tmp_path / "run", settings_of("--parts", 3, "--batch", 8), 0, 2)


def answers_of(*terms, fault=""):
    """A group of the second turn."""
    mask = torch.ones(len(terms), 3)
    mask[0, 1:] = 0
    rewards = np.array([sum(each.values()) for each in terms])
    return SimpleNamespace(terms=list(terms), rewards=rewards, mask=mask, fault=fault)


def test_the_log_of_the_second_turn_counts_each_term_where_it_belongs(cpu):
    shown = answers_of(dict(format=1.0, iou=0.5, mismatch=0.0), dict(format=0.0, iou=0.0, mismatch=-0.5))
    hidden = answers_of(dict(format=1.0, null=1.0), dict(format=1.0, null=0.0))
    broken = answers_of(dict(format=1.0, null=1.0), dict(format=1.0, null=1.0), fault="broken")
    means = grounding_means([shown, hidden, broken], cpu)
    assert means == pytest.approx(dict(
        reward=(1.5 - 0.5 + 2 + 1) / 4, tokens=2, format=3 / 4, iou=0.25, mismatch=-0.25, null=0.5))
    alone = grounding_means([shown], cpu)
    assert alone["null"] is None
    assert alone["iou"] == 0.25
    assert set(grounding_means([broken], cpu).values()) == {None}


def clips_of(numbers):
    """Items to validate with: toy clips by their numbers; None cannot be read."""
    def read(number, rng):
        if number is None:
            raise BadInput("no such clip")
        return toy_clip("train", number)
    source = Source("vos", numbers, read)
    return [(source, number) for number in numbers]


# An album that keeps nothing.
NO_ALBUM = SimpleNamespace(keep=lambda *answer: None)


def test_validation_judges_one_greedy_answer_of_each_clip(systems, cpu, monkeypatch):
    settings = settings_of("--seed", 5)
    judged = []

    def judge(systems, clips, inputs, texts, *rest):
        judged.append([len(group) for group in texts])
        return own_judge(systems, clips, inputs, texts, *rest)

    own_judge = validation.judge
    monkeypatch.setattr(validation, "judge", judge)
    items = clips_of([3, None, 4])
    mean = validation.validate(systems, items, settings, Watch(), NO_ALBUM)
    assert judged == [[1]] * 3

    # The slow twin: greedy groups of two, whose completions are the same.
    greedy = replace(settings, group=2, temperature=0.0, beta=0.0)
    expected = []
    for k, number in ((0, 3), (2, 4)):
        clip = toy_clip("train", number)
        rng = np.random.default_rng([settings.seed, k])
        inputs = prompt_inputs(systems.processor, clip, rng)
        group, = collect(systems, [clip], [inputs], [0], greedy, Watch())
        assert group.texts[0] == group.texts[1]
        expected.append(group.rewards.mean())
    assert expected[0] != expected[1]
    assert mean == pytest.approx(np.mean(expected), abs=1e-6)


def test_validation_of_nothing_that_can_be_read_is_unknown(systems, cpu):
    unreadable = clips_of([None, None])
    assert validation.validate(systems, unreadable, settings_of(), Watch(), NO_ALBUM) is None


# ---- settings --------------------------------------------------------------------------------------
def out_of_limits():
    """{setting: values that it cannot have} of every setting with limits."""
    values = dict(
        group=[1],
        top_p=[0.0, 1.1, math.nan],
        clip_low=[-0.1, 1.1, math.nan],
        name=["", ".", "..", "a/b", "/a", "a/"],
        device=["tpu", "cuda:1"],
        nproc=["0", "", "1,", "8;"],
        frames=["0", "", "24,8", "0,8", "8,", "1,2,3", "many", "-1"])
    if not torch.cuda.is_available():
        values["device"].append("cuda")
    for name in ("steps", "batch", "accumulate", "updates", "parts", "max_new_tokens", "save_every", "keep",
                 "look_every", "prompt_tokens"):
        values[name] = [0]
    for name in ("seed", "warmup", "top_k", "lora_rank", "threads", "workers", "validate", "video_tokens",
                 "image_tokens"):
        values[name] = [-1]
    for name in ("batch", "accumulate", "updates", "parts", "group", "max_new_tokens", "steps", "seed",
                 "lora_rank", "threads", "workers", "video_tokens", "image_tokens"):
        values[name].append(10**10)
    values["name"].append("x" * 300)
    values["nproc"].append("9" * 20)
    for name in ("lr", "weight_decay", "beta", "clip_high", "ground_weight"):
        values[name] = [-0.1, math.inf, math.nan]
    for name in ("keyframe", "single", "saliency", "alignment", "consistency"):
        values[name] = [-math.inf, math.nan]
    for name in ("temperature", "clip_norm", "timeout_minutes"):
        values[name] = [0.0, math.inf, math.nan]
    return values


OUT_OF_LIMITS = out_of_limits()

# A continued run may change where it runs and what it writes.
RESUMABLE = {
    "name", "overwrite", "resume", "steps", "device", "threads", "workers", "reference", "hybrid",
    "timeout_minutes", "save_every", "keep", "look_every", "tensorboard", "wandb",
    "plan", "nproc", "prompt_tokens"}


def test_every_number_has_limits_and_each_is_tested():
    limited = set()
    for field in dataclasses.fields(train.Settings):
        # A float without limits is finite.
        if field.type is float:
            limited.add(field.name)
        for limit in ("least", "above", "most", "check"):
            if field.metadata.get(limit) is not None:
                limited.add(field.name)
        assert field.type is not int or field.name in limited
    assert limited == OUT_OF_LIMITS.keys()


def test_what_a_continued_run_may_change():
    assert resumable_names(train.Settings) == RESUMABLE


def test_limits_and_resumable_stand_in_the_field_of_a_setting(capsys):
    @dataclass
    class More(train.Settings):
        turns: int = setting(3, "of the wheel", least=2, resumable=True)
        share: float = setting(0.5, "of the cake", above=0, most=1)
        who: str = setting("all", "who eats", check=(str.isalpha, "letters"))

    settings = read_settings(More, "", ["--turns", "2", "--who", "me"])
    assert settings.turns == 2
    assert settings.share == 0.5
    assert settings.who == "me"
    assert resumable_names(More) == RESUMABLE | {"turns"}
    for arguments, wanted in (
            (["--turns", "1"], "--turns 1: must be from 2 to 1000000000"),
            (["--share", "1.5"], "--share 1.5: must be above 0 and at most 1"),
            (["--who", "4"], "--who 4: must be letters")):
        with pytest.raises(SystemExit) as stop:
            read_settings(More, "", arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {wanted}\n"


def test_advice_yields_to_the_command_line(tmp_path):
    advice = '{"lr": 1, "steps": "7", "skip_equal": true, "group": 1}'
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training.json").write_text(advice)
    settings = settings_of("--policy", tmp_path, "--group", 2)
    assert settings.lr == 1.0
    assert settings.steps == 7
    assert settings.skip_equal is True
    assert settings.group == 2


# Settings that only the user has: what is read, written and used.
BY_USER = {
    "name", "overwrite", "resume", "policy", "system2", "sam2", "sam2_weights", "data", "data_root", "roots",
    "seed", "device", "workers", "reference", "hybrid", "timeout_minutes", "keep", "look_every",
    "tensorboard", "wandb", "plan",
    "nproc", "prompt_tokens"}


@pytest.mark.parametrize("name", sorted(BY_USER | {"revos_root"}))
def test_a_policy_sets_nothing_that_is_read_or_written(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training.json").write_text(json.dumps({"lr": 1, name: "1"}))
    with pytest.raises(SystemExit) as stop:
        settings_of("--policy", tmp_path)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line == f"error: {tmp_path}/training.json: {name} is set by users alone, and not by a policy\n"


def test_a_policy_may_set_the_rest():
    rest = {
        "mask_prompt",
        "validate", "frames", "video_tokens", "image_tokens", "steps", "batch", "accumulate", "updates",
        "parts", "lr", "warmup", "weight_decay", "clip_norm", "lora_rank", "group", "max_new_tokens",
        "temperature", "top_p", "top_k", "keyframe", "single", "saliency", "alignment", "consistency",
        "clip_reward", "length_control", "beta", "kl", "clip_low", "clip_high", "ratio", "average",
        "scale_by_std",
        "skip_equal", "ground_weight", "dtype", "checkpointing", "threads", "save_every"}
    names = {field.name for field in dataclasses.fields(train.Settings)}
    assert names - BY_USER == rest


@pytest.mark.parametrize("words, value", [
    (["policy"], "policy"),
    (["reference", "a/b"], "reference a/b"),
    (["a.py"], "a.py"),
])
def test_who_grounds_is_one_setting_of_some_words(words, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/config.json").touch()
    (tmp_path / "a.py").touch()
    assert settings_of("--system2", *words, "--lr", 0).system2 == value


# ---- what is wrong, in one line --------------------------------------------------------------------
def bad_settings():
    """(arguments, what the error names) of every value out of its limits."""
    cases = []
    for name, values in OUT_OF_LIMITS.items():
        for value in values:
            cases.append((["train.py", f"--{name}={value}"], f"--{name} {value}: must be "))
    return cases


def bad_policies():
    cases = []
    for name in ("listed", "torn", "unknown", "typed", "chosen"):
        cases.append((["train.py", "--policy", name], f"{name}/training.json"))
    cases.append((["train.py", "--policy", "limited"], "--group 1: must be "))
    for program in ("train.py", "eval.py", "segment.py"):
        cases.append(([program, "--policy", "out"], "expected a directory of Qwen2.5-Omni"))
    return cases


def bad_options():
    """Options whose own name is in the error."""
    cases = []
    for line in (
            "eval.py --clips 0", "eval.py --limit 0", "eval.py --batch -1", "eval.py --max_new_tokens many",
            "eval.py --device tpu", "eval.py --frames 0", "eval.py --video_tokens -1",
            "eval.py --image_tokens -1", "eval.py --overwrite maybe", "segment.py --index -1",
            "segment.py --max_new_tokens 0", "segment.py --device tpu", "segment.py --frames 0"):
        arguments = line.split()
        cases.append((arguments, arguments[1]))
    return cases


def bad_comparisons():
    cases = []
    for name in ("listed/training.json", "torn/training.json", "other.json", "worded.json", "scoreless.json",
                 "endless.json", "nowhere.json"):
        line = f"eval.py --clips 2 --against {name}"
        cases.append((line.split(), name))
    return cases


TRAINABLE = "(known: toy, revos, mevis, refavs, ref"
BAD_ARGUMENTS = [
    *bad_settings(),
    *bad_policies(),
    *bad_options(),
    *bad_comparisons(),
    (["train.py", "--learning_rate", "1"], "--learning_rate"),
    (["train.py", "--lr", "fast"], "fast"),
    (["train.py", "--policy", "nowhere"], "nowhere"),
    (["train.py", "--sam2_weights", "nowhere.pt"], "nowhere"),
    (["train.py", "--system2", "nowhere.py"], "--system2: no such file: nowhere.py"),
    (["train.py", "--system2", "reference", "nowhere"], "nowhere"),
    (["train.py", "--system2", "somebody"], "--system2 somebody: must be "),
    (["train.py", "--data", "coco"], "coco"),
    (["train.py", "--kl", "k4"], "k4"),
    (["train.py", "--ratio", "letter"], "letter"),
    (["train.py", "--average", "median"], "median"),
    (["train.py", "--name", "earlier", "--resume", "never"], "out/earlier/metrics.jsonl"),
    (["train.py", "--name", "own", "--policy", "out/own/step-000100"], "out/own"),
    (["train.py", "--data", "revos", "--data_root", "nowhere"], "nowhere"),
    (["train.py", "--data", "refdavis"], f"--data refdavis: refdavis is nothing to train on {TRAINABLE}"),
    (["train.py", "--data", "toy,"], "--data toy,: an empty name is nothing to train on"),
    (["eval.py", "--bench", "coco"], "coco"),
    (["eval.py", "--split", "sun"], "sun"),
    (["eval.py", "--system2", "somebody"], "somebody"),
    (["eval.py", "--predictions", "nowhere"], "nowhere"),
    (["eval.py", "--policy", "nowhere"], "nowhere"),
    (["eval.py", "--bench", "revos", "--data_root", "nowhere"], "nowhere"),
    (["eval.py", "--out", "here", "--against", "here/results.json"], "here/results.json"),
    (["eval.py", "--out", "other.json"], "other.json"),
    (["segment.py", "--sound", "a.wav"], "--sound"),
    (["segment.py", "--video", "a.avi"], "--query"),
    (["segment.py", "--video", "a.avi", "--query", "a", "--sound", "a.avi"], "no sound in: a.avi"),
    (["segment.py", "--video", "two\nlines.mp4", "--query", "a"], "two lines.mp4"),
    (["segment.py", "--video", "nowhere.mp4", "--query", "a"], "nowhere.mp4"),
]
PROGRAMS = {"train.py": train, "eval.py": evaluation, "segment.py": segment}


@pytest.fixture(scope="module")
def broken_world(tmp_path_factory):
    """A folder of what can be wrong."""
    path = tmp_path_factory.mktemp("broken")
    (path / "out/earlier").mkdir(parents=True)
    (path / "out/earlier/metrics.jsonl").touch()
    advised = dict(
        listed="[1]",
        torn='{"lr": ',
        unknown='{"learning_rate": 1}',
        typed='{"steps": 4.5}',
        chosen='{"kl": "k4"}',
        limited='{"group": 1}')
    for name, advice in advised.items():
        (path / name).mkdir()
        (path / name / "config.json").write_text("{}")
        (path / name / "training.json").write_text(advice)
    # Results of other samples than the first two, and of these without scores.
    first = {"name": "toy/test/0/0", "J&F": 50.0}
    second = {"name": "toy/test/1/0"}
    rows = dict(
        other=[first],
        worded=[first, second | {"J&F": "high"}],
        scoreless=[first, second],
        endless=[first, second | {"J&F": math.nan}])
    for name, expressions in rows.items():
        content = json.dumps(dict(expressions=expressions))
        (path / f"{name}.json").write_text(content)
    picture = jpeg(Image.new("RGB", (48, 32)))
    write_avi(path / "a.avi", (48, 32), [picture] * 3, 5)
    return path


@pytest.mark.parametrize("arguments, named", BAD_ARGUMENTS)
def test_programs_name_what_is_wrong_in_one_line(arguments, named, broken_world, monkeypatch, capsys):
    monkeypatch.chdir(broken_world)
    program = PROGRAMS[arguments[0]]
    with pytest.raises(SystemExit) as stop:
        program.main(arguments[1:])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert named in line
    assert line.startswith("error: ")


@pytest.mark.parametrize("line", [
    "train.py --lrr 1", "train.py --lr fast", "train.py --group 1", "train.py --kl k4",
    "train.py --data coco", "train.py --data toy,toy", "train.py --data revos", "train.py --policy nowhere",
    "train.py --system2 who", "train.py --system2 nowhere.py", "train.py --sam2 nowhere",
    "train.py --sam2_weights nowhere.pt",
    "train.py --plan --policy nowhere", "eval.py --bench coco", "eval.py --split sun",
    "eval.py --split test,test", "eval.py --bench revos", "eval.py --revos_root .",
    "eval.py --policy nowhere", "eval.py --against nowhere", "eval.py --predictions nowhere",
    "segment.py --video nowhere --query a",
    "segment.py --video . --query a --sound .", "segment.py --frames 0", "data.py chek --bench toy",
    "data.py check --bench coco", "data.py check --bench toy --split sun", "data.py show --bench revos",
    "eval.py --out /dev/null/x", "segment.py --out /dev/null",
    "data.py mini --bench revos --out /dev/null",
    "train.py --threads 10000000000", "train.py --help", "eval.py --help", "segment.py --help",
    "data.py --help"])
def test_a_wrong_option_is_told_before_anything_slow_is_imported(line, tmp_path):
    program, *arguments = line.split()
    command = [sys.executable, "-X", "importtime", ROOT / program, *arguments]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    imported = []
    lines = []
    for printed in told.stderr.splitlines():
        if printed.startswith("import time:"):
            imported.append(printed.rpartition("|")[2].strip())
        else:
            lines.append(printed)
    assert "argparse" in imported
    assert not {"torch", "numpy", "transformers", "scipy", "sam2", "PIL"} & set(imported)
    if "--help" in line:
        assert told.returncode == 0
    else:
        assert told.returncode == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


@pytest.mark.parametrize("program", [train, evaluation, segment, check])
def test_every_option_has_a_help_text_with_its_default(program, monkeypatch):
    parsers = []

    def keep(parser, *_):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", keep)
    with pytest.raises(SystemExit):
        program.main([])
    for action in parsers[0]._actions:
        option = "".join(action.option_strings)
        # Such as --revos_root, of which the help of --data_root speaks.
        if action.help == argparse.SUPPRESS or not option or option == "-h--help":
            continue
        text = parsers[0]._get_formatter()._get_help_string(action)
        assert len(action.help) > 8, option
        without = action.required or action.default in (None, "")
        assert without or "default: " in text, option


def test_the_help_shows_the_advice_of_the_policy(capsys):
    for policy, steps in ((TOY_POLICY, "90 by"), ("nowhere", "1000")):
        with pytest.raises(SystemExit):
            read_settings(train.Settings, "", ["--policy", policy, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"rolls out a batch and updates once (default: {steps}" in text


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_mistake_of_ours_keeps_its_traceback(name, tmp_path, monkeypatch):
    def mistaken(*_):
        raise ValueError("bug")

    monkeypatch.chdir(tmp_path)
    # eval.py loads its models by segment.py.
    for program in (segment, train):
        monkeypatch.setattr(program, "Processor", mistaken)
    with pytest.raises(ValueError, match="bug"):
        PROGRAMS[name].main(["--device", "cpu"])
