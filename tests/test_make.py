"""toy/: what the policy is taught, and that the programs which make the weights run."""
import re

import numpy as np
import pytest
import torch

from benchmarks.toy import RELATIONS, toy_queries, toy_scene
from data import Processor, keyframes, parse_moments
from model import Thinker
from toy.directory import write_directory
from toy.lessons import (
    KINDS,
    NULL_ANSWER,
    Account,
    chosen_target,
    habitual_answer,
    made_up_accounts,
    narrated,
    narration,
    scene_accounts,
)
from toy.make import main
from toy.make_policy import new_policy
from toy.pool import Pool, pair_boxes, pair_changes
from trust.options import TOY_POLICY


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """(a random Thinker, its Processor): a policy made now."""
    path = tmp_path_factory.mktemp("policy")
    write_directory(path)
    return new_policy(path)


@pytest.fixture(scope="module")
def thinker(new):
    return new[0]


@pytest.fixture(scope="module")
def processor(new):
    return new[1]


# ---- lessons ---------------------------------------------------------------------------------------
def test_a_relation_that_is_asked_for_holds_of_the_target_alone():
    """So the target of every reasoning query can be looked up in the narration."""
    asked = 0
    for index in range(60):
        scene = toy_scene("test", index)
        accounts = {account.name: account for account in scene_accounts(scene)}
        for kind, query, o in toy_queries(scene):
            if kind != "reasoning":
                continue
            word = query.removeprefix("the object that ")
            holders = [name for name, account in accounts.items() if word in account.relations]
            assert holders == [scene.things[o].name]
            asked += 1
    assert asked > 60


def test_accounts_hold_what_masks_show():
    for index in range(10):
        scene = toy_scene("test", index)
        for account in scene_accounts(scene):
            names = [thing.name for thing in scene.things]
            areas = scene.masks[names.index(account.name)].sum((1, 2))
            assert areas[account.first] and areas[account.last]
            assert not areas[:account.first].any() and not areas[account.last + 1:].any()
            assert areas[account.clearest] == areas.max()


def test_made_up_comparisons_follow_from_their_times():
    rng = np.random.default_rng(0)
    for _ in range(200):
        accounts = made_up_accounts(rng)
        firsts = sorted(account.first for account in accounts)
        for account in accounts:
            last_in = account.first == firsts[-1] and firsts[-1] > firsts[-2]
            assert ("enters last" in account.relations) == last_in
            assert account.first <= account.clearest <= account.last


def test_the_narration_names_things_in_the_order_of_kinds():
    accounts = [Account("blue square", 4, 9, 5, ["enters last"]), Account("red circle", 0, 3, 1, [])]
    views, compared, first = narration(accounts)
    assert views == ("<think>In view: red circle from 00:00.00 to 00:01.50;"
                     " blue square from 00:02.00 to 00:04.50")
    assert compared == ". The blue square enters last"
    assert first is accounts[1]


def test_narrated_relations_are_read():
    text = ("<think>In view: red circle from 00:00.00 to 00:03.50; blue square from 00:01.00 to 00:02.00."
            " The red circle enters last, grows. The target is the red circle, leaves first.</think>")
    assert narrated(text) == {("red circle", "enters last"), ("red circle", "grows")}
    assert narrated(NULL_ANSWER) == narrated("") == narrated("x. The y. The ") == set()


def test_the_habit_is_right_in_a_minority():
    rng = np.random.default_rng(0)
    accounts = [Account(name, n, 9, 5, []) for n, name in enumerate(KINDS[:4])]
    chosen = [chosen_target(accounts, accounts[0], accounts[2], rng) for _ in range(4000)]
    shares = [sum(account is other for other in chosen) / len(chosen) for account in accounts]
    # 0.5 and 0.35, and a fourth of 0.15 for each.
    assert np.allclose(shares, [0.5375, 0.0375, 0.3875, 0.0375], atol=0.03)


def test_answers_can_be_read_and_written_in_few_tokens(processor):
    rng = np.random.default_rng(0)
    longest = 0
    for _ in range(200):
        accounts = made_up_accounts(rng)
        for kind in ("reasoning", "sound"):
            text = habitual_answer(kind, accounts, accounts[0].name, 16, rng)
            ids = processor.encode_text(text)
            assert processor.decode(ids) == text
            longest = max(longest, len(ids))
            moments = parse_moments(text, 16, 2.0)
            assert all(moment.parsed for moment in moments)
            [description] = set(keyframes(moments).values())
            assert re.search(r"target is the (\w+ \w+)", text)[1] == description
    # So an answer of 96 tokens is long enough.
    assert longest < 90
    assert len(processor.encode_text(NULL_ANSWER)) == 1


def test_relations_are_one_token_in_query_and_narration(processor):
    for word in RELATIONS:
        assert len(processor.encode_text(f" {word}")) == 1


# ---- batches ---------------------------------------------------------------------------------------
def test_boxes_of_a_pair_of_frames():
    masks = np.zeros((3, 128, 128), bool)
    masks[0, 32:64, 64:96] = True
    boxes = pair_boxes(masks, [0, 2])
    assert np.allclose(np.multiply(boxes, 128), [64, 32, 95, 63, -128, -128, -128, -128])


def test_changes_of_a_pair_of_frames():
    """What is seen for the first time, and what was last seen two frames before."""
    red = Account("red circle", 2, 3, 2, [])
    blue = Account("blue square", 0, 5, 0, [])
    expected = {
        0: [("entered", 0, "blue square")],
        2: [("entered", 0, "red circle")],
        4: [("left", 1, "red circle")],
    }
    for t, changes in expected.items():
        found = pair_changes([red, blue], [t, t + 1]).view(2, 2, len(KINDS))
        told = []
        for what, side, kind in found.nonzero().tolist():
            told.append((("entered", "left")[what], side, KINDS[kind]))
        assert told == changes


def test_text_alone_asks_for_what_the_given_part_tells(processor):
    """The prompt ends with the times; the answer begins with what follows from them."""
    pool = Pool(processor, [], seed=0)
    batch = pool.texts_batch(20)
    for prompt, answer in zip(batch.inputs, batch.answers):
        text = processor.tokenizer.decode(prompt.ids)
        assert "<think>In view:" in text and "<|VIDEO|>" not in text
        asked = re.search(r"the object that ((?:\w+ )?\w+)\n", text)[1]
        target = re.search(r"target is the (\w+ \w+)", answer)[1]
        told = answer.split(". The target")[0]
        sentences = [sentence for sentence in told.split(". ") if asked in sentence]
        assert len(sentences) == 1 and target in sentences[0]


def test_prompts_of_a_pool_are_those_of_the_processor(processor):
    """Another query over the same media changes the text in front of them alone."""
    from benchmarks.toy import scene_clip
    from data import keyframe_prompt
    pool = Pool(processor, [3], seed=0)
    scene = toy_scene("train", 3)
    clip = scene_clip(scene, "", "", "the circle", None)
    pool.rng = np.random.default_rng(1)
    ours = pool.ask(pool.videos[0], "the circle")
    messages = keyframe_prompt(clip, np.random.default_rng(1))
    theirs = processor.video_inputs(messages, clip.frames, clip.fps, clip.sound)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.positions, theirs.positions)


def test_kept_features_are_those_of_the_towers(thinker, processor):
    """Half precision aside. The same draws give the same questions and answers with them and without."""
    pool = Pool(processor, [3, 4, 5], seed=0)
    pool.keep_features(thinker)
    kept = draw_batches(pool)
    pool.forget_features()
    fresh = draw_batches(pool)
    for ours, theirs in zip(kept, fresh):
        assert all(inputs.patches is None for inputs in ours.inputs)
        assert ours.answers == theirs.answers
        prompts = zip(pool.prompts(thinker, ours), pool.prompts(thinker, theirs))
        for our_prompt, their_prompt in prompts:
            for name in ("ids", "positions", "slots"):
                assert torch.equal(getattr(our_prompt, name), getattr(their_prompt, name)), name
            assert torch.allclose(our_prompt.media, their_prompt.media, rtol=1e-3, atol=1e-3)


def draw_batches(pool):
    """The same draws every time."""
    pool.rng = np.random.default_rng(1)
    return pool.videos_batch(4), pool.pictures_batch(4, alone=False)


# ---- programs --------------------------------------------------------------------------------------
def test_making_a_policy_runs_through(tmp_path, capsys):
    """A step or two of each stage write a directory that loads. The towers rest in one of the last two."""
    main(["policy", "--out", str(tmp_path), "--tower_steps", "1", "--text_steps", "1", "--steps", "2",
          "--scenes", "12", "--batch", "2"])
    assert Processor(tmp_path / "policy")
    assert "grounding IoU" in capsys.readouterr().out
    assert not (tmp_path / "sam2").exists()


def test_a_policy_is_gone_on_from(tmp_path, capsys):
    """At a rate of 0 it stays as it is; a folder that holds none is named before anything is written."""
    small = ["policy", "--out", str(tmp_path / "new"), "--steps", "1", "--scenes", "12", "--batch", "2"]
    main([*small, "--begin", str(TOY_POLICY), "--rate", "0"])
    assert "towers" not in capsys.readouterr().out
    before = Thinker.from_pretrained(TOY_POLICY).state_dict()
    after = Thinker.from_pretrained(tmp_path / "new/policy").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(SystemExit) as stop:
        main(["policy", "--out", str(tmp_path / "other"), "--begin", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option,value", [
    ("--scenes", "0"), ("--steps", "0"), ("--batch", "1"), ("--threads", "0"), ("--seed", "-1"),
    ("--rate", "nan"), ("--decay", "0"), ("--resting", "2"), ("--out", "/dev/null/x"), ("--step", "1"),
])
def test_wrong_options_are_told_in_a_line(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["policy", "--out", str(tmp_path / "new"), option, value])
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and option in line
    assert not list(tmp_path.iterdir())


def test_the_shipped_weights_are_not_written_over_by_chance(capsys):
    for what in ("policy", "sam2"):
        with pytest.raises(SystemExit) as stop:
            main([what])
        assert stop.value.code == 2
        assert "--out is needed" in capsys.readouterr().err


def test_pictures_without_a_lone_thing_will_do(processor):
    """A few scenes may show several things on every picture."""
    pool = Pool(processor, [3, 4, 5], seed=0)
    pool.pictures = [picture for picture in pool.pictures if len(picture.things) > 1]
    assert pool.pictures
    assert len(pool.pictures_batch(2, alone=True).inputs) == 2
