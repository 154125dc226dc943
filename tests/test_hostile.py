"""Hostile text: whatever a completion says, its reward is finite, bounded and quick, and hacks do not pay.

Letters: O objects, T frames, H W pixels.
"""
import functools
import json
import math
import re
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train
from data import (
    KEYFRAMES,
    Clip,
    Frames,
    answer_text,
    blocks,
    frames_to_ground,
    is_null,
    keyframe_prompt,
    keyframes,
    parse_box,
    parse_boxes,
    parse_json,
    parse_moments,
    parse_numbers,
    parse_time,
    plain,
)
from grpo import group_advantages
from rewards import format_reward, parse_number, region_similarity, reward_terms, total_rewards
from segment import to_source
from tests.world import answered, block, said, single

# A box around another object, and one as large as the image of 20 x 20.
WRONG = (0, 0, 5, 5)
WHOLE = (0, 0, 19, 19)

# Weights of the later run, of the first release, and of the toy.
LATER = train.Settings()
EARLIER = replace(LATER, saliency=1.0, consistency=0.0)
WEAK = replace(LATER, keyframe=0.2)
# The optional parts of a reward.
CLIPPED = replace(LATER, clip_reward=True, length_control=True)

TRUE_BOX = (100, 100, 199, 199)
TRUE_POINTS = [(120, 150), (180, 150)]

# Characters of the longest texts.
HUGE = 100_000


def pointed(box, first, second):
    """An answer of the task "image"."""
    return json.dumps(dict(bbox_2d=box, points_1=first, points_2=second))


# At the first the target is absent, at the second it is in sight.
ABSENT = single(0)
PRESENT = single(6)
EACH_FRAME = [single(frame) for frame in range(16)]


# ---- clips and their rewards -----------------------------------------------------------------------
def two_objects():
    """Masks of O=2, T=8, H=10, W=12; both objects are in sight on frames 4 and 5."""
    masks = np.zeros((2, 8, 10, 12), dtype=bool)
    masks[0, 2:6, 2:5, 0:4] = True
    masks[1, 4:8, 6:8, 8:10] = True
    return masks


def hostile_clips():
    """One clip of each task, kind of question and number of objects, by name.

    Of the first: 16 frames of 20 x 20 and one target of 6 x 6, in sight on frames 4 to 11, half of its clip.
    """
    masks = np.zeros((1, 16, 20, 20), dtype=bool)
    masks[0, 4:12, 7:13, 7:13] = True
    nothing = np.zeros_like(masks)
    videos = [
        ("vos", "vos", masks),
        ("vos_two", "vos", two_objects()),
        ("vos_null", "vos", nothing),
        ("avs", "avs", masks[:, 4:]),
        ("avs_null", "avs", nothing),
        ("grounding", "grounding", masks[:, 4:5]),
        ("grounding_null", "grounding", nothing[:, :1]),
    ]
    solutions = {
        "multiple choice": "B",
        "numerical": "1,000.5",
        "regression": "10",
        "OCR": "the cat sat",
        "free-form": "The cat sat on a mat.",
    }
    clips = {}
    for name, task, target in videos:
        frames = Frames(None, range(target.shape[1]))
        clips[name] = Clip(name, frames, "it", masks=target, task=task)
    for kind, solution in solutions.items():
        truth = dict(type=kind, solution=solution)
        clips[kind] = Clip(kind, None, "it", masks=masks, task="qa", truth=truth)
    truth = dict(box=TRUE_BOX, points=TRUE_POINTS)
    clips["image"] = Clip("image", None, "it", masks=masks, task="image", truth=truth)
    return clips


CLIPS = hostile_clips()


def judged(name, text, boxes):
    """Reward terms of a completion on a clip.

    System 2 finds the same boxes on every frame, and SAM2 keeps them where they are.
    """
    clip = CLIPS[name]
    grounded = dict.fromkeys(frames_to_ground(clip, text), boxes)
    tracked = np.zeros(clip.masks.shape[1:], dtype=bool)
    if grounded:
        for box in set(boxes):
            x1, y1, x2, y2 = map(round, box)
            tracked[:, y1:y2 + 1, x1:x2 + 1] = True
    scale = (1, 1) if clip.task == "image" else (1.5, 0.5)
    J = region_similarity(tracked, clip.masks.any(0))
    return reward_terms(clip, scale, text, grounded, J)


def earned(name, text, boxes=(WRONG,), settings=LATER):
    """Total reward of a completion of 400 tokens; its group is the same completion twice."""
    terms = judged(name, text, boxes)
    return total_rewards([terms, terms], [400, 400], settings)[0]


@functools.cache
def judged_honest(name):
    return judged(name, said(PRESENT), [WRONG])


# ---- bent answers ----------------------------------------------------------------------------------
VALUES = [
    "NaN", "-Infinity", "Infinity", "1e400", "-1", "0.5", "9" * 5000, "0." + "9" * 5000, "-0:01.00",
    "99:99.99", "1e9:00.00", "00:01.00", "00:07.99", '"00:02.00"', '"00:01.00"', "٣:٠١.٠٠", "１２", "٣", "1_0",
    "true", "null", '""', "1e6", "-20", "1e7",
]
JUNK = VALUES + [
    "{", "}", "[", "]", '"', "\\", ",", ":", " ", "\n", "\x00", "\u200b", "\u202e", "\ufeff", "\u3000", "é🐕",
    "İ", "\\ud83d", "\\u0000", "<answer>", "</answer>", "<think>", "</think>", "<answer></answer>", "<", "}{",
    "{}", '{"a":', "[{", "a ", "the cat ", '{"start_time": NaN}', '"bbox_2d": [1, 2, 3, 4]', '"bbox_2d":',
    '{"bbox_2d": [-5, -5, 1e5, 1e5]}', PRESENT,
]
OTHER_DIGITS = [
    str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"),
    str.maketrans("0123456789", "０１２３４５６７８９"),
    str.maketrans("0123456789", "²" * 10),
]


def copies(piece, times):
    """At most HUGE characters of them."""
    return piece * min(times, HUGE // (len(piece) + 1) + 1)


# A bend of a text: `at` and `to` are places in it, `junk` is one of JUNK, `times` a number of copies.
def insert(text, at, to, junk, times):
    return text[:at] + copies(junk, times) + text[at:]


def overwrite(text, at, to, junk, times):
    return text[:at] + junk + text[to:]


def replace_value(text, at, to, junk, times):
    """Of a number, a time or a string after `at`."""
    head = text[:at]
    tail = text[at:]
    match = re.search(r'[0-9:.]+|"[^"]*"', tail)
    if match is None:
        return text
    return head + tail[:match.start()] + junk + tail[match.end():]


def repeat(text, at, to, junk, times):
    return text[:at] + copies(text[at:to], times) + text[to:]


def repeat_object(text, at, to, junk, times):
    match = re.search(r"\{[^{}]*\}", text)
    if match is None:
        return text
    start = match.start()
    more = copies(match[0] + ",", times)
    return text[:start] + more + text[start:]


def nest(text, at, to, junk, times):
    return text[:at] + text + text[at:]


def truncate(text, at, to, junk, times):
    return text[:to]


def append(text, at, to, junk, times):
    return text + copies(junk, times)


def swap_times(text, at, to, junk, times):
    return text.replace("start_t", "\0").replace("end_t", "start_t").replace("\0", "end_t")


def change_digits(text, at, to, junk, times):
    digits = OTHER_DIGITS[times % 3]
    return text[:at] + text[at:to].translate(digits) + text[to:]


BENDS = [
    append, change_digits, insert, nest, overwrite,
    repeat, repeat_object, replace_value, swap_times, truncate,
]
# What the toy's policy is taught to write.
TOY_ANSWER = (
    "<think>The target is the red circle, in view from 00:00.50 to 00:07.50, clearest at 00:07.50.</think>"
    '<answer>[{"start_time": "TIME", "end_time": "TIME", "description": "red circle"}]</answer>'
)
NEAR = answered(pointed([110, 100, 199, 190], [130, 150], [170, 150]))
HONEST = [
    TOY_ANSWER.replace("TIME", "00:00.00"),
    TOY_ANSWER.replace("TIME", "00:00.00"),
    TOY_ANSWER.replace("TIME", "00:07.50"),
    TOY_ANSWER.replace("TIME", "00:07.50"),
    said(PRESENT),
    said(ABSENT, PRESENT),
    said(*EACH_FRAME[4:8]),
    said(block("00:02.00", "00:03.50")),
    '[{"bbox_2d": [3, 4, 9, 12]}]',
    answered('[{"bbox_2d": [0, 0, 5, 5]}]'),
    answered("null"),
    answered("a cat on the left"),
    answered("B"),
    answered("1,000.5"),
    answered("The cat sat on the mat."),
    NEAR,
    NEAR,
    NEAR,
]
# Often few copies, at times very many.
TIMES = (1, 2, 3, 5) * 80 + (50, 300) * 10 + (2_000, HUGE)
PLACE = st.integers(0, 99)
ONE_BEND = st.tuples(
    st.sampled_from(BENDS),
    PLACE,
    PLACE,
    st.sampled_from(JUNK),
    st.sampled_from(TIMES),
)


def bent(text, bends):
    """A text after a few bends, their places in hundredths of it, cut to 2 HUGE characters after each."""
    for bend, one, other, junk, times in bends:
        at = min(one, other) * len(text) // 99
        to = max(one, other) * len(text) // 99
        text = bend(text, at, to, junk, times)[:2 * HUGE]
    return text


def read_all(text):
    """What every parser makes of a text: (moments, keyframes, boxes, all the rest)."""
    answer = answer_text(text)
    moments = parse_moments(text, 16, 2.0)
    for moment in moments:
        # A tokenizer will encode it.
        plain(moment.description).encode()
    value = parse_json(answer)
    rest = [
        answer,
        is_null(answer),
        blocks(answer),
        parse_time(answer),
        parse_box(value),
        parse_numbers(value, 2),
        parse_number(answer),
        format_reward(text),
    ]
    return moments, keyframes(moments), parse_boxes(text), rest


def limits(name, moments):
    """The documented (least, most) of each reward term of a completion with so many moments."""
    O, T = CLIPS[name].masks.shape[:2]
    all_frames = 0.4 * (2 * KEYFRAMES - 1 - T)
    best = 0 if name == "vos_null" else 0.4 * KEYFRAMES
    best_single = 0 if name == "vos_null" else 0.4
    bounds = dict(
        base=(0, 1.6),
        number=(all_frames, best),
        single=(0.4 * (1 - T), best_single),
        length=(-0.2 * (T - 1) * moments, 0),
        overlap=(-0.5 * T * moments, 0),
        mismatch=(-0.5 * 16 / O, 0),
        iou=(0, 1.4),
    )
    for share in ("saliency", "alignment", "consistency", "first_box", "strict", "box", "point", "accuracy",
                  "null"):
        bounds[share] = (0, 1)
    return bounds | dict(format=(0, 1), malformed=(0, 1))


def check_terms(name, text, boxes, moments):
    """The terms of a completion on a clip, within their limits and the same when asked again."""
    terms = judged(name, text, boxes)
    bounds = limits(name, moments)
    for term, value in terms.items():
        least, most = bounds[term]
        # NaN fails every comparison.
        assert least - 1e-9 <= value <= most + 1e-9, (name, term)
    assert terms["format"] in (0, 1)
    assert terms["malformed"] in (0, 1)
    assert terms == judged(name, text, boxes)
    return terms


def check_text(text):
    """Reads and rewards a text twice, without an exception and within bounds.

    Returns whether the text still names keyframes.
    """
    read = read_all(text)
    assert read == read_all(text)
    moments, chosen, boxes, _ = read
    assert len(boxes) <= 16
    assert len(chosen) <= KEYFRAMES
    for frame in chosen:
        assert 0 <= frame < 16
    totals = []
    for name, clip in CLIPS.items():
        # The boxes of a hostile System 2.
        found = [to_source(box, (1.5, 0.5), clip.size) for box in boxes]
        terms = check_terms(name, text, found, len(moments))
        group = [terms, judged_honest(name)]
        for settings in (LATER, CLIPPED):
            totals += total_rewards(group, [400, 9], settings).tolist()
    assert np.isfinite(totals).all()
    assert group_advantages(totals, 2).isfinite().all()
    return bool(chosen)


@pytest.mark.parametrize("cases", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_text_never_raises_and_stays_within_bounds(cases):
    useful = []

    @hypothesis_settings(max_examples=cases, derandomize=True, database=None, deadline=None,
                         suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(HONEST), st.lists(ONE_BEND, min_size=1, max_size=4))
    def check(honest, bends):
        useful.append(check_text(bent(honest, bends)))

    check()
    assert len(useful) >= cases
    # Not all are garbage, and not all are left whole.
    assert 0.1 < np.mean(useful) < 0.9


# ---- time ------------------------------------------------------------------------------------------
# Each is repeated; of "head@piece@tail" only the piece.
REPEATED = [
    "{", "}", "{}", '{"a":', "[", "{[@[@}", '{"a": @[@}', '{"a": "@\\\\@"}', '{"a": @9@}', '{"a": 0.@9@}',
    '{"description": "@ @"}', '{"description": "@\\ud83d@"}', '{"a": [@1, @1]}', '{@"a": 1, @"a": 1}', "9",
    "0.@9@", "@ @1", "٣", "1_", "a ", "a", "İ", "\u3000", "<", "<answer>", "</answe", "<think>",
    "@<answer>@</answer>", "</think>@ @<answer>", "</think>@ @x<answer>", '"bbox_2d"@ @', '"bbox_2d":',
    '"bbox_2d": [', '"bbox_2d": [@"bbox_2d": @', '"bbox_2d" : @ @[1', '"bbox_2d": [1, 2, 3, 4]', "the cat ",
    PRESENT + ",",
]
FORMS = ["<think></think><answer>{}</answer>", "<think></think><answer>{}", "{}</answer>"]


def seconds(piece, form, length):
    """Processor time of reading and rewarding a text with about so many characters of a piece."""
    head, middle, tail = piece.split("@") if "@" in piece else ("", piece, "")
    text = form.replace("{}", head + middle * (length // len(middle)) + tail)
    began = time.process_time()
    read_all(text)
    for name in ("vos", "image", "OCR", "free-form"):
        judged(name, text, [])
    return time.process_time() - began


@pytest.mark.parametrize("piece", REPEATED)
@pytest.mark.parametrize("form", FORMS)
def test_time_is_linear_in_the_length_of_a_text(piece, form):
    short = math.inf
    long = math.inf
    # The best of several: the machine may be busy.
    for _ in range(20):
        short = min(short, seconds(piece, form, HUGE))
        long = min(long, seconds(piece, form, 4 * HUGE))
        # 4 where linear, 16 where quadratic.
        if long < 12 * max(short, 0.001):
            return
    pytest.fail(f"{short:.3f} s for {HUGE} characters, {long:.3f} s for four times as many")


# ---- hacks -----------------------------------------------------------------------------------------
# Another object of the picture.
OTHER = pointed([600, 600, 699, 699], [620, 650], [680, 650])

# Clip -> (answer, boxes of System 2): in the agreed form, but of another object than the one that is meant.
HONEST_WRONG = {
    "vos": (f"[{PRESENT}]", [WRONG]),
    "avs": ("a dog on the left", [(2, 2, 8, 8)]),
    "image": (OTHER, []),
    "regression": ("9", []),
    "multiple choice": ("A", []),
    "OCR": ("the cat ran", []),
    "free-form": ("The dog sat on the bed.", []),
}


def honest_totals(name, settings=LATER):
    """Totals of the honest wrong answer.

    Of masks there are two: at its moment the target is in sight as well, or it is not.
    """
    answer, boxes = HONEST_WRONG[name]
    totals = [earned(name, answered(answer), boxes, settings)]
    if name == "vos":
        totals.append(earned(name, said(ABSENT), boxes, settings))
    return totals


class Hack(NamedTuple):
    text: str
    total: float               # with the weights of the later run
    boxes: tuple = (WRONG,)    # of System 2, where it is asked


HACKS = {
    "vos": {
        "empty answer": Hack(answered(""), 1),
        "empty list": Hack(said(), 1),
        "null where there is something": Hack(answered("null"), 1),
        "prose": Hack(answered("a dog on the left, from 00:03.00 to 00:03.00"), 1),
        "empty objects": Hack(said(*["{}"] * 100), 1.2),
        "answer in the answer": Hack(answered(f"<answer>[{ABSENT}]</answer>"), 0.6 + 0.4),
        "object in an object": Hack(said('{"a": ' + PRESENT + "}"), 1.2),
        "object repeated": Hack(said(ABSENT, ABSENT), 1 + 0.6 + 0.4 - 0.5),
        "object repeated fifty times": Hack(said(*[ABSENT] * 50), 1 + 0.6 + 0.4 - 0.5 * 49),
        "same frame by other hundredths": Hack(
            said(ABSENT, ABSENT.replace('.00"', '.01"')),
            1 + 0.6 + 0.4 - 0.5,
        ),
        "object and empty ones": Hack(
            said(ABSENT, "{}", "{}", "{}"),
            1 + (0.6 + 3 * 0.2) / 4 + 0.4,
        ),
        "all frames": Hack(said(*EACH_FRAME), 1 + 0.6 + 0.5 - 0.4 * 9),
        "all frames in one interval": Hack(
            said(block("00:00.00", "00:08.00")),
            1 + 0.6 + 0.5 - 0.4 * 9 - 0.2 * 15,
        ),
        "all frames four times": Hack(
            said(*[block("00:00.00", "00:08.00")] * 4),
            1 + 0.6 + 0.5 - 0.4 * 9 - 0.8 * 15 - 0.5 * 48,
        ),
        "interval past the end": Hack(said(block("00:00.00", "99:00.00")), 1.4),
        "swapped times": Hack(said(block("00:03.00", "00:00.00")), 1.4),
        "negative times": Hack(said(block("-0:03.00", "00:03.00")), 1.2),
        "no times": Hack(said(block("", "")), 1.2),
        "blank description": Hack(said(block("00:03.00", "00:03.00", " \n")), 1.2),
        "invisible description": Hack(said(block("00:03.00", "00:03.00", "\u200b\u2060")), 1.2),
        "every box there is room for": Hack(said(ABSENT), 1 + 0.6 + 0.4 - 0.5 * 15, (WRONG,) * 16),
        # One surplus box. J of WHOLE: 36 pixels of 400 on the 8 frames in sight, of 16.
        "another box as large as the image": Hack(
            said(ABSENT),
            1 + 0.6 + 0.4 - 0.5 + 2 * 8 * 36 / 400 / 16,
            (WRONG, WHOLE),
        ),
    },
    "avs": {
        "empty answer": Hack(answered(""), 1),
        "null where there is something": Hack(answered("null"), 1),
        "the whole image after another box": Hack(answered("anything"), 1, (WRONG, WHOLE)),
    },
    "image": {
        "empty answer": Hack(answered(""), 1),
        "null": Hack(answered("null"), 1),
        "object repeated": Hack(answered(OTHER + OTHER), 1),
        "list of objects": Hack(answered(f"[{OTHER}, {OTHER}]"), 1),
        "further keys": Hack(answered(OTHER.replace("}", ', "bbox": [100, 100, 199, 199]}')), 1),
        "no points": Hack(answered('{"bbox_2d": [0, 0, 839, 839]}'), 1),
        "true points in no box": Hack(answered(pointed([839, 839, 0, 0], *TRUE_POINTS)), 1),
        "true points, other names": Hack(
            answered(pointed(WHOLE, *TRUE_POINTS).replace("points_2", "point_2")),
            1,
        ),
        "box without an end": Hack(answered(pointed([-math.inf, 0, math.inf, 839], *TRUE_POINTS)), 1),
        "numbers as text": Hack(answered(pointed(["0", "0", "839", "839"], *TRUE_POINTS)), 1),
    },
    "regression": {
        "empty answer": Hack(answered(""), 1),
        "every number": Hack(answered(" ".join(map(str, range(100)))), 1),
        "infinity": Hack(answered("Infinity"), 1),
        "not a number": Hack(answered("nan"), 1),
    },
    "OCR": {
        "empty answer": Hack(answered(""), 1),
        "text repeated": Hack(answered("the cat ran " * 100), 1),
    },
    "free-form": {
        "empty answer": Hack(answered(""), 1),
        "word repeated": Hack(answered("the " * 100), 1 + (2 / 106 + 0 + 2 / 106) / 3),
        "answer repeated": Hack(
            answered("The dog sat on the bed. " * 50),
            1 + (6 / 306 + 2 / 304 + 6 / 306) / 3,
        ),
    },
}
PAIRS = []
for clip_name, hacks_of_clip in HACKS.items():
    for hack_name in hacks_of_clip:
        PAIRS.append((clip_name, hack_name))

every_weight = pytest.mark.parametrize(
    "settings", [LATER, EARLIER, WEAK], ids=["later", "earlier", "toy"])


@every_weight
@pytest.mark.parametrize("name, hack", PAIRS)
def test_hacks_score_below_an_honest_wrong_answer(name, hack, settings):
    text, total, boxes = HACKS[name][hack]
    hacked = earned(name, text, boxes, settings)
    assert hacked < min(honest_totals(name, settings))
    if settings == LATER:
        assert hacked == pytest.approx(total, abs=1e-4)


@every_weight
@pytest.mark.parametrize("description, total", [("a dog on the left", 1.2123), ("...", 1.2)])
def test_copied_examples_score_below_an_honest_wrong_answer(description, total, settings):
    """The examples of 100 training prompts, each taken for the answer, with other words or word for word.

    Their times are drawn: means are compared, as half of ours have the target in sight.
    """
    totals = []
    for seed in range(100):
        chat = keyframe_prompt(CLIPS["vos"], np.random.default_rng(seed))
        prompt = chat[1]["content"][0]["text"]
        example = prompt[prompt.rindex("<think>"):].strip()
        text = example.replace('"..."', json.dumps(description))
        totals.append(earned("vos", text, [WRONG], settings))
    assert np.mean(totals) < np.mean(honest_totals("vos", settings))
    if settings == LATER:
        assert np.mean(totals) == pytest.approx(total, abs=1e-4)


def bent_forms(answer):
    """What else is made of an answer -> (text, whether anything but the format is paid)."""
    honest = answered(answer)
    return {
        "no completion": ("", False),
        "no end": (honest.removesuffix("</answer>"), False),
        "empty answer before the answer": (
            honest.replace("<answer>", "<answer></answer><answer>"),
            False,
        ),
        "text after the answer": (honest + " This is right.", True),
        "answer after the answer": (honest + honest, True),
        "text before the thought": ("Sure. " + honest, True),
        "text between thought and answer": (honest.replace("\n", "so"), True),
        "no thought": (honest[honest.index("<answer>"):], True),
        "thought in the thought": (honest.replace("why", "<think>why</think>"), True),
        "answer in the thought": (f"<think><answer>{answer}</answer></think>", True),
        "end repeated": (honest + "</answer>", True),
    }


@pytest.mark.parametrize("name", HONEST_WRONG)
@pytest.mark.parametrize("form", bent_forms(""))
def test_bent_forms_score_below_an_honest_wrong_answer(name, form):
    answer, boxes = HONEST_WRONG[name]
    text, understood = bent_forms(answer)[form]
    # In a picture the form of the answer counts beside that of the text.
    lost = 2 if name == "image" else 1
    expected = honest_totals(name)[0] - lost if understood else 0
    assert earned(name, text, boxes) == pytest.approx(expected)


# ---- hacks that the formulas pay -------------------------------------------------------------------
class Paid(NamedTuple):
    name: str                # of the clip
    honest: tuple            # (text, boxes of System 2) of an honest wrong answer
    honest_total: float
    hacked: tuple            # (text, boxes of System 2)
    total: float
    settings: train.Settings = LATER


PAID = {
    # R_A is an IoU and R_G a J: a box as large as the image shares the target's 36 pixels of 400 with it, on
    # half of the frames.
    "box as large as the image": Paid(
        "vos",
        (said(PRESENT), [WRONG]), 3,
        (said(PRESENT), [WHOLE]), 3 + 0.09 + 2 * 0.09 / 2,
    ),
    "such a box for the sound": Paid(
        "avs",
        (answered("a dog"), [WRONG]), 1,
        (answered("all"), [WHOLE]), 1.09,
    ),
    # R_G counts 1 where prediction and truth are empty: without any box half of the frames are right.
    "nothing that can be found": Paid(
        "vos",
        (said(PRESENT), [WRONG]), 3,
        (said(PRESENT), []), 3 + 2 * 8 / 16,
    ),
    # With the optional clip no term takes away: all frames earn base, for the half that shows the target.
    "all frames, clipped": Paid(
        "vos",
        (said(ABSENT), [WRONG]), 2,
        (said(*EACH_FRAME), [WRONG]), 2.1,
        settings=replace(LATER, clip_reward=True),
    ),
    # R_K asks for four frames: four moments earn more than one, and so does an interval of two to four.
    "four moments": Paid(
        "vos",
        (said(ABSENT), [WRONG]), 2,
        (said(*EACH_FRAME[:4]), [WRONG]), 2 + 0.4 * 3,
    ),
    "interval of four": Paid(
        "vos",
        (said(ABSENT), [WRONG]), 2,
        (said(block("00:00.00", "00:01.50")), [WRONG]), 2 + 0.4 * 3 - 0.2 * 3,
    ),
    # Format asks for tags, not for words between them.
    "no word of thought": Paid(
        "vos",
        (said(ABSENT), [WRONG]), 2,
        (said(ABSENT).replace("why", ""), [WRONG]), 2,
    ),
    # The terms of a picture end at 0, far from the target: nothing tells one wrong box from another.
    "box as large as the picture": Paid(
        "image",
        (answered(OTHER), []), 2,
        (answered(pointed([0, 0, 839, 839], [420, 420], [440, 420])), []), 2,
    ),
    # The points only need to lie within the box. In one of the whole picture they may be anywhere, here off
    # by 100.
    "points anywhere": Paid(
        "image",
        (answered(OTHER), []), 2,
        (answered(pointed([0, 0, 839, 839], [120, 250], [180, 250])), []), 3,
    ),
    # An empty answer earns 0, as a wrong one does without partial credit. Both have the format.
    "empty answer, wrong box": Paid(
        "avs",
        (answered("a dog"), [WRONG]), 1,
        (answered(""), []), 1,
    ),
    "empty choice": Paid(
        "multiple choice",
        (answered("A"), []), 1,
        (answered(""), []), 1,
    ),
    "all choices": Paid(
        "multiple choice",
        (answered("A"), []), 1,
        (answered("A B C D"), []), 1,
    ),
    "empty number": Paid(
        "numerical",
        (answered("7"), []), 1,
        (answered(""), []), 1,
    ),
}


@pytest.mark.parametrize("hack", PAID)
def test_hacks_that_the_formulas_pay(hack):
    """Not below the honest wrong answer, and known. A change of any of these totals changes the method."""
    case = PAID[hack]
    assert earned(case.name, *case.honest, case.settings) == pytest.approx(case.honest_total)
    assert earned(case.name, *case.hacked, case.settings) == pytest.approx(case.total)
    assert case.total >= case.honest_total
