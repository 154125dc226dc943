"""The algorithm against hand calculations and loops, and the step that makes and judges groups.

Letters: G completions of a group, C tokens of the longest one.
"""
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
from benchmarks.toy import toy_clip
from data import frames_to_ground, keyframes, parse_boxes, parse_moments, prompt_inputs, to_source
from grpo import (
    accumulate_gradients,
    collect,
    draw_request,
    group_advantages,
    kl_divergence,
    policy_loss,
    turns_of,
)
from model import Thinker
from rewards import alignment_term, mismatch_term, region_similarity, total_rewards, vos_rewards
from run.draw import blank_clip
from run.log import Watch
from segment import GROUNDING_TOKENS, ground, thinker_system2, track_groups
from tests.world import settings_of
from trust.options import TOY_POLICY

DIVERGENCES = ["k1", "k2", "k3"]
RATIOS = ["token", "sequence"]
AVERAGES = ["completion", "token", "constant"]


# ---- advantages ------------------------------------------------------------------------------------
def test_advantages_by_hand():
    # Means 3 and 5. The unbiased std of the first group is sqrt(14 / 3).
    rewards = [1, 2, 3, 6] + [5, 5, 5, 5]
    std = math.sqrt(14 / 3) + 1e-4
    expected = [-2 / std, -1 / std, 0, 3 / std, 0, 0, 0, 0]
    advantages = group_advantages(rewards, 4)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)
    unscaled = group_advantages(rewards, 4, scale=False)
    assert unscaled.tolist() == [-2, -1, 0, 3, 0, 0, 0, 0]


def test_equal_rewards_give_no_advantage():
    rewards = [3.3] * 8 + [0.1] * 8
    advantages = group_advantages(rewards, 8)
    assert advantages.abs().max() < 1e-9


@pytest.mark.parametrize("rewards, size", [
    ([1.0, 2.0], 1),
    ([1.0, 2.0, 3.0], 2),
])
def test_advantages_refuse_groups_of_one_and_broken_groups(rewards, size):
    with pytest.raises(ValueError, match="group"):
        group_advantages(rewards, size)


# ---- divergence ------------------------------------------------------------------------------------
def test_divergences_by_hand():
    logp = torch.tensor([-1.0, -2.0])
    reference = torch.tensor([-1.5, -1.0])
    k1 = kl_divergence(logp, reference, "k1")
    assert k1.tolist() == [0.5, -1.0]
    k2 = kl_divergence(logp, reference, "k2")
    assert k2.tolist() == [0.125, 0.5]
    k3 = kl_divergence(logp, reference, "k3")
    assert k3.tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_of_an_unbiased_estimate_is_the_divergence(kind):
    p = torch.tensor([0.7, 0.2, 0.1])
    q = torch.tensor([0.3, 0.3, 0.4])
    true = (p * (p / q).log()).sum()
    estimates = kl_divergence(p.log(), q.log(), kind)
    mean = (p * estimates).sum()
    assert mean == pytest.approx(float(true), rel=1e-5)


def test_divergence_keeps_its_gradient_far_from_the_reference():
    logp = torch.tensor([-30.0], requires_grad=True)
    reference = torch.tensor([-1.0])
    kl_divergence(logp, reference).sum().backward()
    # It is 1 - exp(29).
    assert logp.grad[0] < -1e9


# ---- loss ------------------------------------------------------------------------------------------
def divergence_of(logp, reference, kind):
    """kl_divergence of one token."""
    d = reference - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return d * d / 2
    return math.exp(d) - d - 1


OPTIONS = dict(beta=0.04, clip_low=0.2, clip_high=0.28, longest=9)


def loss_by_loops(logp, A, mask, old, reference, kl, ratio, average):
    """The slow twin with OPTIONS: one token at a time."""
    total = 0.0
    n = len(A)
    for i in range(n):
        tokens = np.flatnonzero(mask[i])
        log_ratios = logp[i] - old[i]
        if ratio == "sequence":
            log_ratios[:] = np.mean(log_ratios[tokens])
        weights = {
            "completion": 1 / len(tokens) / n,
            "token": 1 / mask.sum(),
            "constant": 1 / n / 9,
        }
        for t in tokens:
            r = math.exp(log_ratios[t])
            clipped = min(max(r, 1 - 0.2), 1 + 0.28)
            gain = min(r * A[i], clipped * A[i])
            divergence = divergence_of(logp[i, t], reference[i, t], kl)
            total -= weights[average] * (gain - 0.04 * divergence)
    return total


def random_group(seed=0, G=5, C=7):
    """logp, advantages, mask, old_logp and reference_logp as numpy arrays."""
    rng = np.random.default_rng(seed)
    old, moved, other = rng.normal(-1, 0.5, (3, G, C))
    lengths = rng.integers(1, C + 1, (G, 1))
    mask = (np.arange(C) < lengths).astype(float)
    advantages = rng.normal(size=G)
    return old + 0.3 * moved, advantages, mask, old, other


def random_tensors():
    return [torch.tensor(array) for array in random_group()]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kl", DIVERGENCES)
def test_loss_against_loops(ratio, average, kl):
    kinds = dict(kl=kl, ratio=ratio, average=average)
    loss, _ = policy_loss(*random_tensors(), **kinds, **OPTIONS)
    expected = loss_by_loops(*random_group(), **kinds)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("setting, value", [
    ("kl", "k4"),
    ("ratio", "letter"),
    ("average", "median"),
])
def test_unknown_variants_of_the_loss_are_named(setting, value):
    with pytest.raises(ValueError, match=f"unknown .*: {value}"):
        policy_loss(*random_tensors(), longest=9, **{setting: value})


def test_padding_of_any_value_is_out_of_the_loss():
    logp, A, mask, old, reference = random_tensors()
    expected, expected_sums = policy_loss(logp, A, mask, old, reference)

    wild_logp = torch.where(mask > 0, logp, -200.0)
    wild_logp.requires_grad_()
    wild_old = torch.where(mask > 0, old, -1.0)
    wild_reference = torch.where(mask > 0, reference, -5.0)
    loss, sums = policy_loss(wild_logp, A, mask, wild_old, wild_reference)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item())
    assert wild_logp.grad.isfinite().all()
    assert not wild_logp.grad[mask == 0].any()
    expected_kl = expected_sums["kl"].item()
    assert sums["kl"].item() == pytest.approx(expected_kl)


@pytest.mark.parametrize("average", AVERAGES)
def test_groups_with_totals_add_up_to_the_batch(average):
    tensors = random_tensors()
    mask = tensors[2]
    options = dict(average=average, longest=9)
    whole, _ = policy_loss(*tensors, **options)
    totals = (5, int(mask.sum()))
    total = 0.0
    for first, end in ((0, 2), (2, 5)):
        part = [tensor[first:end] for tensor in tensors]
        loss, _ = policy_loss(*part, totals=totals, **options)
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-9)


def test_first_update_has_ratio_one_and_the_policy_gradient():
    logp, A, mask, _, _ = random_tensors()
    logp.requires_grad_()
    loss, sums = policy_loss(logp, A, mask, beta=0.0)
    loss.backward()
    lengths = mask.sum(1, keepdim=True)
    expected = -A[:, None] * mask / lengths / len(A)
    assert torch.allclose(logp.grad, expected)
    mean = A.mean().item()
    assert loss.item() == pytest.approx(-mean)
    assert sums["clipped_low"] == 0
    assert sums["clipped_high"] == 0


def test_clipping_stops_gradients_beyond_the_bounds_only_when_they_would_go_on():
    # Ratios, as old_logp is 0.
    ratios = torch.tensor([[1.5], [1.5], [0.5], [0.5]])
    logp = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mask = torch.ones(4, 1)
    old = torch.zeros(4, 1)
    bounds = dict(clip_low=0.2, clip_high=0.2)
    loss, sums = policy_loss(logp, advantages, mask, old, beta=0.0, **bounds)
    loss.backward()
    moved = logp.grad[:, 0] != 0
    assert moved.tolist() == [False, True, True, False]
    assert sums["clipped_low"] == 1
    assert sums["clipped_high"] == 1


# ---- the step --------------------------------------------------------------------------------------
def collected(systems, clips, seeds, settings):
    """Groups of the clips; a clip's seed also draws the example times of its prompt."""
    inputs = []
    for clip, seed in zip(clips, seeds):
        rng = np.random.default_rng(seed)
        inputs.append(prompt_inputs(systems.processor, clip, rng))
    return collect(systems, clips, inputs, seeds, settings, Watch())


def test_collect_follows_the_paper_and_depends_on_nothing_but_clip_and_seed(systems):
    settings = settings_of("--group", 4)
    clips = [toy_clip("train", 3), toy_clip("train", 4)]
    groups = collected(systems, clips, [11, 12], settings)
    alone, = collected(systems, clips[1:], [12], settings)
    assert alone.texts == groups[1].texts
    assert np.allclose(alone.rewards, groups[1].rewards)
    for group in groups:
        assert len(group.texts) == len(group.terms) == 4
        assert group.mask.shape == group.completions.shape
        assert group.advantages.sum().abs() < 1e-4
        lengths = group.mask.sum(1).tolist()
        rewards = total_rewards(group.terms, lengths, settings)
        assert np.allclose(group.rewards, rewards)
        logp, _ = systems.policy.logprobs(group.prompt, group.completions)
        assert torch.isfinite(logp).all()


def test_models_are_asked_only_where_all_their_weights_are(systems, monkeypatch):
    inside = set()
    asked = set()

    def door(name):
        @contextmanager
        def context():
            inside.add(name)
            yield
            inside.remove(name)
        return context

    def watched(call, name):
        def checked(*arguments, **options):
            assert inside == {name}
            asked.add(call)
            return call(*arguments, **options)
        return checked

    # Policy and reference are one Thinker here: the policy writes, the reference judges and grounds.
    thinker = systems.policy
    generate = thinker.generate
    logprobs = thinker.logprobs
    monkeypatch.setattr(thinker, "generate", watched(generate, "policy"))
    monkeypatch.setattr(thinker, "logprobs", watched(logprobs, "reference"))

    def nothing_found(pictures, descriptions):
        return [[] for _ in pictures]

    guarded = replace(
        systems,
        system2=watched(nothing_found, "reference"),
        policy_whole=door("policy"),
        reference_awake=door("reference"))
    settings = settings_of("--group", 2)
    clip = toy_clip("train", 3)
    group, = collected(guarded, [clip], [11], settings)
    assert asked == {generate, logprobs, nothing_found}
    assert not inside
    # Nothing that System 2 does not find has a mask.
    for terms in group.terms:
        assert terms["alignment"] == 0


def test_what_has_no_weight_is_not_computed(systems, monkeypatch):
    def refuse(*_):
        raise AssertionError("not wanted")

    monkeypatch.setattr(grpo, "track_similarity", refuse)
    monkeypatch.setattr(systems.reference, "logprobs", refuse)
    settings = settings_of("--group", 2, "--beta", 0, "--consistency", 0)
    clip = toy_clip("train", 3)
    group, = collected(systems, [clip], [11], settings)
    assert group.reference_logp is None


@pytest.fixture(scope="module")
def apart(systems):
    """A policy that has moved away from the reference: its systems, settings, a clip and the group on it."""
    policy = Thinker.from_pretrained(TOY_POLICY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.model.layers.parameters():
            if p.ndim > 1:
                noise = torch.randn(p.shape, generator=generator)
                p.add_(0.05 * p.std() * noise)
    systems = replace(systems, policy=policy)
    settings = settings_of("--group", 6)
    clip = toy_clip("train", 3)
    group, = collected(systems, [clip], [11], settings)
    return systems, settings, clip, group


def test_every_completion_is_judged_by_its_own_keyframes_boxes_and_masks(apart):
    systems, settings, clip, group = apart
    distinct = set()
    for text, terms in zip(group.texts, group.terms):
        frames = keyframes(parse_moments(text, len(clip.frames), clip.fps))
        distinct.add(tuple(frames.items()))
        boxes, = ground(systems.system2, [clip], [[frames]])
        masks, = track_groups(systems.tracker, [clip], [boxes])
        J = region_similarity(masks[0], clip.masks.any(0))
        expected = vos_rewards(text, clip.masks, boxes[0], J, clip.fps)
        # Masks are equal to a few pixels.
        consistency = expected.pop("consistency")
        assert terms["consistency"] == pytest.approx(consistency, abs=0.02)
        others = {name: terms[name] for name in expected}
        assert others == pytest.approx(expected)
    assert len(distinct) > 2


def share_gradients(systems, group, settings):
    """accumulate_gradients where the group is the whole batch. Returns its sums."""
    totals = (6, int(group.mask.sum()))
    return accumulate_gradients(systems, group, settings, totals, 1.0)


def largest_gradient(policy):
    """The largest absolute value in the policy's gradients, which are then forgotten."""
    largest = 0.0
    for p in policy.parameters():
        if p.grad is not None:
            here = p.grad.abs().max()
            largest = max(largest, float(here))
    policy.zero_grad()
    return largest


def test_divergence_is_from_the_reference(apart):
    systems, settings, _, group = apart
    sums = share_gradients(systems, group, settings)
    assert largest_gradient(systems.policy) > 1e-4
    with torch.no_grad():
        logp, _ = systems.policy.logprobs(group.prompt, group.completions)
        reference, _ = systems.reference.logprobs(group.prompt, group.completions)
    d = reference - logp
    k3 = torch.exp(d) - d - 1
    expected = (k3 * group.mask).sum().item()
    assert sums["kl"].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    assert torch.allclose(group.old_logp, logp, atol=1e-5)


def test_groups_of_equal_rewards_teach_nothing_where_they_are_skipped(apart):
    systems, settings, _, group = apart
    equal = replace(group, rewards=np.ones(6))
    equal.advantages = torch.ones(6)
    skipping = replace(settings, skip_equal=True)
    share_gradients(systems, equal, skipping)
    assert largest_gradient(systems.policy) == 0
    # They still teach to stay near the reference where they are not skipped.
    share_gradients(systems, equal, settings)
    assert largest_gradient(systems.policy) > 0


def test_a_group_of_a_broken_clip_counts_for_nothing(apart):
    systems, settings, _, group = apart
    broken = replace(group, fault="cannot be read")
    sums = share_gradients(systems, broken, settings)
    assert largest_gradient(systems.policy) == 0
    assert {value.item() for value in sums.values()} == {0.0}


# ---- the second turn -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def twice(apart):
    """The same systems, settings and clip with a second turn, and the group."""
    systems, settings, clip, _ = apart
    settings = replace(settings, ground_weight=0.5, max_new_tokens=48)
    group, = collected(systems, [clip], [11], settings)
    return systems, settings, clip, group


def test_the_second_turn_leaves_the_first_as_it_is(apart, twice):
    _, settings, _, group = apart
    assert settings.ground_weight == 0
    assert group.second is None
    assert turns_of([group]) == [[group]]
    both = twice[-1]
    assert turns_of([both]) == [[both], [both.second]]
    assert both.texts == group.texts
    assert np.array_equal(both.rewards, group.rewards)
    assert torch.equal(both.advantages, group.advantages)
    assert (both.weight, both.longest) == (1.0, 48)
    assert (both.second.weight, both.second.longest) == (0.5, GROUNDING_TOKENS)


def test_the_second_turn_answers_one_request_of_the_first(twice):
    systems, settings, clip, group = twice
    requests = [frames_to_ground(clip, text) for text in group.texts]
    asked = draw_request(group, requests)
    shown = next(t for t in range(len(clip.frames)) if clip.frames[t] == asked.frames[0])
    assert (shown, asked.query) in {pair for frames in requests for pair in frames.items()}
    second = group.second
    # It must not keep the whole clip in memory.
    assert second.clip is None
    # What it is shown is what System 2 is shown.
    seen = []
    onlooker = SimpleNamespace(embed=seen.extend, generate=lambda *_, **__: [])
    thinker_system2(onlooker, systems.processor)([clip.frames[shown]], [asked.query])
    prompt, = systems.reference.embed(seen)
    for name in ("ids", "positions", "slots", "media"):
        assert torch.equal(getattr(prompt, name), getattr(second.prompt, name)), name

    # The policy wrote it, and the reference has scored it.
    assert second.completions.shape[0] == settings.group
    with torch.no_grad():
        reference, _ = systems.reference.logprobs(second.prompt, second.completions)
        policy, _ = systems.policy.logprobs(second.prompt, second.completions)
    assert torch.allclose(second.reference_logp, reference, atol=1e-5)
    assert not torch.allclose(policy, reference, atol=1e-2)

    # Its answers are judged by this frame alone.
    masks = clip.masks[:, [shown]]
    scale = seen[0].scale
    for text, terms, reward in zip(second.texts, second.terms, second.rewards):
        boxes = {0: [to_source(box, scale, clip.size) for box in parse_boxes(text)]}
        if masks.any():
            expected = alignment_term(masks, boxes) + mismatch_term(boxes, len(masks), len(masks))
        else:
            expected = float(text == "null")
        assert reward == pytest.approx(terms["format"] + expected)
        assert terms["format"] == (text == "null" or bool(boxes[0]))
    assert torch.equal(second.advantages, group_advantages(second.rewards, settings.group))


def test_requests_are_drawn_evenly_and_each_distinct_one_once(apart):
    _, _, clip, group = apart
    # The first one stands there three times.
    chosen = [{0: "a"}, {0: "a", 2: "b"}, {}, {2: "c", 0: "a"}]
    counts = {}
    for seed in range(300):
        asked = draw_request(replace(group, seed=seed), chosen)
        counts[asked.query] = counts.get(asked.query, 0) + 1
        t = 0 if asked.query == "a" else 2
        assert asked.frames[0] == clip.frames[t]
        assert np.array_equal(asked.masks, clip.masks[:, t:t + 1])
        assert draw_request(replace(group, seed=seed), chosen[::-1]).query == asked.query
    assert set(counts) == {"a", "b", "c"}
    assert min(counts.values()) > 70
    nothing = draw_request(group, [{}, {}])
    assert nothing.query == clip.query
    assert nothing.frames[0] == clip.frames[0]


def test_a_broken_clip_has_a_second_turn_that_counts_for_nothing(twice):
    systems, settings, _, _ = twice
    groups = collected(systems, [blank_clip("vos", "cannot be read"), toy_clip("train", 4)], [3, 4], settings)
    _, (broken, whole) = turns_of(groups)
    assert broken.fault == "cannot be read"
    assert broken.completions.shape[0] == settings.group
    # Even if it had something to teach.
    broken.advantages = torch.linspace(-1, 1, settings.group)
    sums = share_gradients(systems, broken, settings)
    assert largest_gradient(systems.policy) == 0
    assert {value.item() for value in sums.values()} == {0.0}
    whole.advantages = broken.advantages
    share_gradients(systems, whole, settings)
    assert largest_gradient(systems.policy) > 0


@pytest.mark.parametrize("task", ["avs", "qa"])
def test_tasks_without_masks_have_one_turn(twice, task):
    systems, settings, clip, _ = twice
    other = replace(clip, task=task, truth=dict(type="free-form", options=[], solution=""))
    group, = collected(systems, [other], [11], replace(settings, group=2, max_new_tokens=4))
    assert turns_of([group]) == [[group]]


def test_the_weight_of_a_turn_is_that_of_its_gradient(twice):
    systems, settings, _, group = twice
    second = group.second
    second.advantages = torch.linspace(-1, 1, settings.group)
    found = []
    for weight in (0.5, 1.0, 0.0):
        share_gradients(systems, replace(second, weight=weight), settings)
        found.append(largest_gradient(systems.policy))
    assert found[0] == pytest.approx(found[1] / 2, rel=1e-5)
    assert found[1] > 0
    assert found[2] == 0
