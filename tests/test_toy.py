"""The toy world: what is seen and heard in its scenes, its queries against a slow twin, and its samples."""
import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest

from benchmarks import find_benchmark, toy
from benchmarks.samples import load
from benchmarks.toy import (
    CANVAS,
    COLOURS,
    HELD_OUT,
    OVERTONES,
    PITCH,
    RELATIONS,
    TOY_KINDS,
    TOY_SPLITS,
    UNSEEN_PAIRS,
    draw_query,
    inside,
    read_toy,
    relations,
    toy_clip,
    toy_queries,
    toy_scene,
)
from data import SAMPLE_RATE
from trust.errors import BadInput

COUNTS = {"train": 30, "test": 8, "pairs": 12, "long": 8}


@pytest.fixture(scope="module")
def scenes():
    """{(split, index): scene}."""
    drawn = {}
    for split, count in COUNTS.items():
        for index in range(count):
            drawn[split, index] = toy_scene(split, index)
    return drawn


def every_second(scenes):
    return list(scenes.values())[::2]


# ---- clips follow from split and index -------------------------------------------------------------
@pytest.mark.parametrize("split", TOY_SPLITS)
def test_clips_follow_from_split_and_index(split):
    a = toy_clip(split, 3)
    b = toy_clip(split, 3)
    assert a.name == b.name
    assert (a.query, a.kind) == (b.query, b.kind)
    assert len(a.frames) == len(b.frames)
    assert np.array_equal(a.masks, b.masks)
    assert np.array_equal(a.sound, b.sound)
    for t in range(len(a.frames)):
        assert np.array_equal(a.frames[t], b.frames[t])

    other_clips = [toy_clip(split, 4)]
    # These show the same clips and differ in their sound.
    alike = ("heard", "silent", "swapped")
    for other_split in TOY_SPLITS:
        if other_split != split and not (split in alike and other_split in alike):
            other_clips.append(toy_clip(other_split, 3))
    for other in other_clips:
        assert not np.array_equal(a.frames[0], other.frames[0])


def test_the_clips_of_published_figures_stay_what_they_are():
    """Other draws would make other clips, and the README's figures would be of clips that are gone."""
    seen = hashlib.sha256()
    for split in ("train", "test", "pairs", "long"):
        for index in range(4):
            clip = toy_clip(split, index)
            pixels = int(clip.masks.sum())
            facts = (clip.name, clip.kind, clip.query, clip.masks.shape, pixels, len(clip.sound))
            seen.update(repr(facts).encode())
    assert seen.hexdigest()[:16] == "e2dac602e5eb8a0c"


def test_an_unknown_split_is_named():
    with pytest.raises(BadInput, match="unknown toy split: dev .*train, test, pairs, long"):
        toy_clip("dev", 0)


# ---- scenes ----------------------------------------------------------------------------------------
def test_clips_have_the_promised_sizes(scenes):
    for (split, _), scene in scenes.items():
        T = len(scene.pictures)
        O = len(scene.things)
        least, most = (17, 24) if split == "long" else (8, 16)
        assert least <= T <= most
        assert 2 <= O <= 4
        assert scene.masks.shape == (O, T, CANVAS, CANVAS)
        assert scene.pictures.shape == (T, CANVAS, CANVAS, 3)
        assert len({thing.name for thing in scene.things}) == O
    assert CANVAS == 128
    assert {len(scene.things) for scene in scenes.values()} == {2, 3, 4}


def test_masks_are_what_is_to_be_seen(scenes):
    """A pixel has a thing's colour, within noise, where it is in its mask and nowhere else."""
    for scene in every_second(scenes):
        # A pixel belongs to one thing at most.
        assert scene.masks.sum(0).max() <= 1
        for colour in {thing.colour for thing in scene.things}:
            distance = abs(scene.pictures.astype(int) - COLOURS[colour])
            near = (distance <= 20).all(-1)                     # [T, H, W]
            members = [thing.colour == colour for thing in scene.things]
            mask = scene.masks[members].any(0)                  # [T, H, W]
            assert (near != mask).sum((1, 2)).max() <= 3


def test_hidden_parts_are_in_no_mask(scenes):
    hidden = 0
    outside = 0
    for scene in every_second(scenes):
        for thing, mask in zip(scene.things, scene.masks):
            whole = []
            for (x, y), radius in zip(thing.centre, thing.radius):
                whole.append(inside(thing.shape, x, y, radius))
            whole = np.stack(whole)                             # [T, H, W]
            assert not (mask & ~whole).any()
            assert not mask[~thing.alive].any()
            hidden += (whole & ~mask)[thing.alive].any()
            outside += (~thing.alive).any()
    # The cases occur.
    assert hidden > 5
    assert outside > 5


def loudness(wave, pitch):
    """Amplitude [T] of a pitch in every half-second."""
    parts = wave.reshape(-1, SAMPLE_RATE // 2)
    time = np.arange(len(wave)).reshape(parts.shape) / SAMPLE_RATE
    turned = parts * np.exp(-2j * np.pi * pitch * time)
    return 2 * abs(turned.mean(1))


def test_sound_is_that_of_the_sounding_thing_while_seen(scenes):
    silent = 0
    for scene in every_second(scenes):
        T = len(scene.pictures)
        wave = scene.sound
        assert len(wave) == T * SAMPLE_RATE // 2
        assert wave.dtype == np.float32
        assert abs(wave).max() < 1
        level = wave.reshape(T, -1).std(1)
        if scene.sounding is None:
            silent += 1
            assert level.max() < 0.005
            continue
        thing = scene.things[scene.sounding]
        seen = scene.masks[scene.sounding].any((1, 2))          # [T]
        assert (level[seen] > 0.1).all()
        assert (level[~seen] < 0.005).all()
        for multiple in range(1, 6):
            pitch = multiple * PITCH[thing.colour]
            if pitch < SAMPLE_RATE / 2 - 100:
                expected = 0.2 * OVERTONES[thing.shape].get(multiple, 0) * seen
                assert abs(loudness(wave, pitch) - expected).max() < 0.01
    assert 3 < silent < len(scenes) / 4


def test_unseen_pairs_are_kept_for_their_split(scenes):
    unseen = {f"{colour} {shape}" for colour, shape in UNSEEN_PAIRS}
    for (split, index), scene in scenes.items():
        where = [i for i, thing in enumerate(scene.things) if thing.name in unseen]
        assert where == ([0] if split == "pairs" else [])
        if split == "pairs":
            clip = toy_clip(split, index)
            if clip.kind == "null":
                assert not clip.masks.any()
            else:
                assert np.array_equal(clip.masks[0], scene.masks[0])
        # No null query names one: a policy must not learn that there is no such thing.
        for kind, query, _ in toy_queries(scene):
            assert kind != "null" or query.removeprefix("the ") not in unseen


# ---- queries ---------------------------------------------------------------------------------------
def longest_step(thing, frames):
    """The farthest it moves between two neighbouring frames on which it is seen; walls shorten some steps."""
    together = frames[:-1][np.diff(frames) == 1]
    steps = thing.centre[together + 1] - thing.centre[together]
    return max(np.linalg.norm(steps, axis=1), default=0)


def score_of(query, thing, frames):
    """What a superlative asks for the highest of, from the frames on which a thing is seen; else None."""
    growth = thing.radius[frames[-1]] - thing.radius[frames[0]]
    if query == "the object that enters last":
        return frames[0]
    if query == "the object that leaves first":
        return -frames[-1]
    if query == "the object that stays longest":
        return len(frames)
    if query == "the object that moves fastest":
        return longest_step(thing, frames) // 0.01
    if query == "the object that grows":
        return growth >= 1
    if query == "the object that shrinks":
        return growth <= -1
    return None


def right_answers(scene, query):
    """Indices of the things a query means, worked out from what is seen."""
    seen = scene.masks.any((2, 3))    # [O, T]
    frames = [np.flatnonzero(row) for row in seen]
    shown = np.flatnonzero(seen.any(1)).tolist()
    if query == "the object that makes the sound":
        return [i for i in shown if i == scene.sounding]

    scores = {}
    for i in shown:
        scores[i] = score_of(query, scene.things[i], frames[i])
    if shown and scores[shown[0]] is not None:
        best = max(scores.values())
        return [i for i in shown if scores[i] == best]

    words = set(query.split()) - {"the", "object"}
    right = []
    for i in shown:
        thing = scene.things[i]
        if words <= {thing.colour, thing.shape}:
            right.append(i)
    return right


def test_queries_have_the_one_answer_given(scenes):
    asked = set()
    for scene in scenes.values():
        for kind, query, target in toy_queries(scene):
            right = [] if target is None else [target]
            assert right_answers(scene, query) == right, query
            assert (kind == "null") == (target is None)
            asked.add(query if kind == "reasoning" else kind)
    assert asked == {
        "referring",
        "sound",
        "null",
        "the object that enters last",
        "the object that leaves first",
        "the object that stays longest",
        "the object that moves fastest",
        "the object that grows",
        "the object that shrinks",
    }


def test_clips_ask_one_query_of_their_scene(scenes):
    kinds = set()
    for (split, index), scene in list(scenes.items())[:40]:
        clip = toy_clip(split, index)
        kinds.add(clip.kind)
        targets = {}
        for kind, query, target in toy_queries(scene):
            if kind == clip.kind:
                targets[query] = target
        target = targets[clip.query]
        if target is None:
            assert np.array_equal(clip.masks, 0 * scene.masks[:1])
        else:
            assert np.array_equal(clip.masks, scene.masks[[target]])
        assert clip.masks.any() == (clip.kind != "null")
        assert clip.masks.dtype == bool
        assert np.array_equal(clip.frames[1], scene.pictures[1])
        assert np.array_equal(clip.sound, scene.sound)
        assert (clip.size, clip.fps) == ((128, 128), 2.0)
    assert kinds == set(TOY_KINDS)


def test_training_asks_more_to_reason_and_more_that_is_not_there(scenes):
    """The same scenes, asked as in training and as in the test."""
    count = {"train": Counter(), "test": Counter()}
    for n, scene in enumerate(scenes.values()):
        for split in count:
            for index in range(10 * n, 10 * n + 10):
                kind, _, _ = draw_query(scene, split, index)
                count[split][kind] += 1
    for kind in ("reasoning", "null"):
        assert count["train"][kind] > 1.3 * count["test"][kind], kind


def test_relations_are_what_reasoning_queries_ask_for(scenes):
    """Superlatives hold of the one right answer. Growing and shrinking hold of any thing that does."""
    found = set()
    for scene in scenes.values():
        held = relations(scene)
        targets = {query: target for kind, query, target in toy_queries(scene) if kind == "reasoning"}
        for relation in RELATIONS:
            query = f"the object that {relation}"
            ours = [i for i, own in enumerate(held) if relation in own and scene.masks[i].any()]
            if relation in ("grows", "shrinks"):
                assert query not in targets or ours == [targets[query]]
            else:
                assert ours == ([targets[query]] if query in targets else [])
            found |= {relation} if ours else set()
        for thing, mask, own in zip(scene.things, scene.masks, held):
            if mask.any():
                radius = thing.radius[mask.any((1, 2))]
                assert ("grows" in own) == (radius[-1] - radius[0] >= 1)
                assert ("shrinks" in own) == (radius[0] - radius[-1] >= 1)
    assert found == set(RELATIONS)


# ---- splits of the studies -------------------------------------------------------------------------
def test_a_crowd_has_five_things_on_clips_of_usual_length():
    for index in range(6):
        scene = toy_scene("crowd", index)
        assert len({thing.name for thing in scene.things}) == 5
        assert 8 <= len(scene.pictures) <= 16


@pytest.mark.parametrize("split,kind", [("reasoning", "reasoning"), ("absent", "null"), ("heard", "sound")])
def test_a_split_of_one_kind_asks_it_wherever_it_can(split, kind):
    asked = 0
    for index in range(12):
        scene = toy_scene(split, index)
        can = kind in {entry[0] for entry in toy_queries(scene)}
        assert (draw_query(scene, split, index)[0] == kind) == can
        asked += can
    assert asked >= 11
    assert asked == 12 or split == "reasoning"


def test_without_sound_and_with_another_only_the_sound_differs():
    for index in range(4):
        heard, silent, swapped = [toy_clip(split, index) for split in ("heard", "silent", "swapped")]
        assert heard.query == silent.query == swapped.query == "the object that makes the sound"
        assert heard.masks.any()
        assert np.array_equal(heard.masks, silent.masks)
        assert np.array_equal(heard.masks, swapped.masks)
        assert np.array_equal(heard.frames[2], swapped.frames[2])
        assert silent.sound is None
        assert swapped.sound.shape == heard.sound.shape
        scene = toy_scene("heard", index)
        target = scene.things[scene.sounding]
        # What is heard is the target's tone in one of them only: that of its colour and overtones.
        assert spectrum_has(heard.sound, target)
        assert not spectrum_has(swapped.sound, target)


def spectrum_has(sound, thing):
    """Whether the loudest tones are those of a thing: its pitch, with the multiples of its shape."""
    spectrum = abs(np.fft.rfft(sound))
    frequencies = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)
    heights = {}
    for multiple in (1, 2, 3):
        near = abs(frequencies - multiple * PITCH[thing.colour]) < 15
        heights[multiple] = spectrum[near].max()
    loud = {multiple for multiple, height in heights.items() if height > 0.2 * spectrum.max()}
    return loud == set(OVERTONES[thing.shape]) & {1, 2, 3}


def test_toy_four_asks_other_queries_of_the_training_clips():
    samples = find_benchmark("toy_four").read("", "train")
    whole = read_toy("", "train")
    assert len(samples) == len(whole)
    asked = set()
    changed = 0
    for ours, theirs in zip(samples[:60], whole):
        assert np.array_equal(load(ours).frames[0], load(theirs).frames[0])
        assert ours.query not in HELD_OUT
        assert np.array_equal(ours.read_masks(), load(ours).masks)
        asked.add(ours.kind)
        changed += theirs.query in HELD_OUT
    assert asked == set(TOY_KINDS)
    assert changed > 3
    assert set(HELD_OUT) < {f"the object that {relation}" for relation in RELATIONS}


# ---- the benchmark ---------------------------------------------------------------------------------
def test_samples_are_the_clips_and_are_made_late(monkeypatch):
    drawn = []

    def counted(split, index):
        drawn.append((split, index))
        return toy_scene(split, index)

    monkeypatch.setattr(toy, "toy_scene", counted)
    toy.recent_clip.cache_clear()
    samples = read_toy("", "long")
    assert len(samples) == 1000
    sample = samples[3]
    assert (sample.video, sample.name, sample.task) == ("long/3", "toy/long/3/0", "vos")
    assert pickle.loads(pickle.dumps(sample)).video == "long/3"
    assert drawn == []

    clip = toy_clip("long", 3)
    drawn.clear()
    assert (sample.query, sample.kind) == (clip.query, clip.kind)
    assert sample.names == [f"{t:05d}" for t in range(len(clip.frames))]
    assert np.array_equal(sample.read_masks(), clip.masks)
    some = sample.read_masks([5, 2])
    assert np.array_equal(some, clip.masks[:, [5, 2]])
    made = load(sample)
    assert (made.name, made.query) == ("long/3", clip.query)
    assert len(made.frames) == len(clip.frames)
    assert np.array_equal(made.sound, clip.sound)
    few = load(sample, most_frames=4)
    assert np.array_equal(few.masks, clip.sampled(4)[0].masks)
    # Once for all of this.
    assert drawn == [("long", 3)]


def test_record_of_the_toy():
    benchmark = find_benchmark("toy")
    assert benchmark.read is read_toy
    assert benchmark.splits == TOY_SPLITS
    assert (benchmark.tested, benchmark.usual, benchmark.mini) == ("test", 200, None)
    assert len(read_toy("", "train")) == 100_000
