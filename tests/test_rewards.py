"""Rewards against cases worked out by hand, and J against loops.

Letters as in rewards.py: O objects, T frames, H W pixels, G completions, K the best number of keyframes,
U the distinct frames of an answer.
"""
import json
import math
from dataclasses import fields, make_dataclass, replace

import numpy as np
import pytest

import train
from data import KEYFRAMES, TASKS, Clip, frames_to_ground, keyframes, parse_moments
from rewards import (
    KEYFRAME_TERMS,
    NO_ACCURACY,
    TERMS,
    avs_reward,
    box_iou,
    combine,
    image_rewards,
    length_bonus,
    length_term,
    mask_box,
    number_term,
    overlap_term,
    parse_number,
    question_reward,
    region_similarity,
    reward_terms,
    total_rewards,
    vos_rewards,
)
from run.settings import read_settings, setting
from tests.world import answered, block, said, settings_of, single

# The two true boxes of `scene`, corners inside the box.
LEFT = (0, 2, 3, 4)
RIGHT = (8, 6, 9, 7)

FIRST_RELEASE = dict(keyframe=1.0, single=0.0, saliency=1.0, alignment=1.0, consistency=0.0)
LATER_RUN = dict(keyframe=1.0, single=0.0, saliency=0.0, alignment=1.0, consistency=2.0)


# ---- helpers ---------------------------------------------------------------------------------------
def scene():
    """Masks of O=2, T=8, H=10, W=12; at 2 frames per second this is 4 s.

    Object 0 has 12 pixels on the left edge, on frames 2 to 5. Object 1 has 4 pixels, on frames 4 to 7.
    The target's area on each frame is 0 0 12 12 16 16 4 4.
    """
    masks = np.zeros((2, 8, 10, 12), dtype=bool)
    masks[0, 2:6, 2:5, 0:4] = True
    masks[1, 4:8, 6:8, 8:10] = True
    return masks


def rewards(text, boxes=None, tracked=None, masks=None):
    """Terms of a completion on `scene`, or on other masks. tracked: SAM2's masks [T, H, W]."""
    if masks is None:
        masks = scene()
    J = None if tracked is None else region_similarity(tracked, masks.any(0))
    return vos_rewards(text, masks, boxes or {}, J)


def judged(clip, answer, boxes=None, scale=(1, 1)):
    """All terms of a completion on a clip without SAM2's masks."""
    return reward_terms(clip, scale, answered(answer), boxes or {}, None)


def total(terms, settings=None):
    """The total reward of one completion of 9 tokens."""
    return total_rewards([terms], [9], settings or settings_of())[0]


def terms_of(**values):
    """All terms of the task "vos", 0 but for the given ones."""
    return dict.fromkeys(TERMS, 0.0) | values


# ---- rewards on video, by hand ---------------------------------------------------------------------
def test_every_term_by_hand():
    # Frames 2 3 and 3 4.
    text = said(block("00:01.00", "00:01.50"), block("00:01.50", "00:02.00"))
    boxes = {
        # Object 0 alone is in sight: IoU 1.
        2: [LEFT],
        # Half of object 0: 6 / 12. Three boxes for O=2: 1 surplus.
        3: [(0, 2, 1, 4), RIGHT, RIGHT],
        # Object 1: 1. Object 0: 12 / 24. They come in the other order.
        4: [RIGHT, (0, 2, 3, 7)],
        # No keyframe: ignored.
        5: [LEFT] * 9,
    }
    tracked = scene().any(0)
    # Right on frames 0 to 5; on 0 and 1 both are empty.
    tracked[6:] = False
    terms = rewards(text, boxes, tracked)
    assert terms == pytest.approx(dict(
        # Mean of two blocks. In sight, of 2 objects x 2 frames: object 0 on 2 and 3; object 0 on 3 and 4 and
        # object 1 on 4.
        base=0.2 + 0.2 + 0.2 + (2 / 4 + 3 / 4) / 2,
        # Frames 2 3 4.
        number=0.4 * 3,
        length=0.2 * (1 - 2) * 2,
        overlap=-0.5 * (4 - 3),
        # Frames 2 3 4, and 1 would be best.
        single=0.4 * (2 - 1 - 3),
        saliency=(12 + 12 + 16) / 16 / 3,
        # Pairs in sight: one on 2, one on 3, two on 4.
        alignment=(1 + 6 / 12 + 1 + 12 / 24) / 4,
        # 1 surplus box, over O=2, halved, over 3 keyframes.
        mismatch=-1 / 2 / 2 / 3,
        consistency=6 / 8,
    ))
    assert tuple(terms) == TERMS
    for value in terms.values():
        assert type(value) is float

    # number + length + overlap = 1.2 - 0.4 - 0.5
    keyframe = 0.3
    rest = keyframe + 40 / 48 + 0.75 - 1 / 12
    assert combine(terms, FIRST_RELEASE) == pytest.approx(1.225 + rest)
    others = dict(keyframe=0.5, single=0.0, saliency=0.0, alignment=2.0, consistency=3.0)
    rest = 0.5 * keyframe + 2 * 0.75 - 1 / 12 + 3 * 0.75
    assert combine(terms, others) == pytest.approx(1.225 + rest)


@pytest.mark.parametrize("blocks, base", [
    (["{}"], 0.2),
    (["{}", "{x}"], 0.2),
    # Parsed, but not valid.
    ([block("00:02.00", "00:01.00")], 0.4),
    (["{}", block("00:02.00", "00:01.00")], (0.2 + 0.4) / 2),
])
def test_no_valid_block_earns_base_alone(blocks, base):
    text = said(*blocks)
    terms = rewards(text, {2: [LEFT]}, scene().any(0))
    assert terms == pytest.approx(terms_of(base=base))


@pytest.mark.parametrize("answer", ["", "the dog", "null", "}{", '{"start_time": '])
def test_no_block_earns_nothing(answer):
    text = answered(answer)
    terms = rewards(text, {2: [LEFT]}, scene().any(0))
    assert terms == terms_of()


@pytest.mark.parametrize("frames, number", [
    (1, 0.4),
    (4, 1.6),
    (5, 0.8),
    (7, 0.0),
    (8, -0.4),
])
def test_number_peaks_at_four(frames, number):
    terms = rewards(said(*map(single, range(frames))))
    assert terms["number"] == pytest.approx(number)
    assert terms["length"] == pytest.approx(0)
    assert terms["overlap"] == pytest.approx(0)


@pytest.mark.parametrize("U", range(1, 3 * KEYFRAMES))
def test_one_constant_bounds_the_keyframes_and_places_the_peak_of_their_number(U):
    K = KEYFRAMES
    text = said(*map(single, range(U)))
    moments = parse_moments(text, 3 * K, 2.0)
    if U <= K:
        assert number_term(moments) == 0.4 * U
    else:
        assert number_term(moments) == 0.4 * (2 * K - 1 - U)
    assert list(keyframes(moments)) == list(range(min(U, K)))


@pytest.mark.parametrize("frames, single_term", [
    (1, 0.4),
    (2, -0.4),
    (4, -1.2),
])
def test_one_keyframe_is_best_where_that_is_asked_for(frames, single_term):
    text = said(*map(single, range(frames)))
    terms = rewards(text) | dict(format=1.0)
    assert terms["single"] == pytest.approx(single_term)
    # As it comes, it has no weight.
    without = dict(terms)
    del without["single"]
    assert total(terms) == total(without)
    asked = settings_of("--single", 1, "--keyframe", 0)
    assert total(terms, asked) == pytest.approx(total(without, asked) + single_term)


def test_length_and_overlap_count_frames_of_valid_blocks():
    # 3, 1 and 1 frames; frame 2 stands there twice.
    interval = block("00:00.00", "00:01.00")
    text = said(interval, "{}", single(2), single(7))
    moments = parse_moments(text, 8, 2.0)
    assert length_term(moments) == pytest.approx(0.2 * (1 - 3))
    assert overlap_term(moments) == -0.5


def test_only_the_first_four_frames_are_keyframes():
    # Frames 2 to 7; the keyframes are 2 to 5.
    text = said(block("00:01.00", "00:03.50"))
    terms = rewards(text, {6: [RIGHT] * 5})
    mean_area = (12 + 12 + 16 + 16) / 4
    assert terms["saliency"] == pytest.approx(mean_area / 16)
    assert terms["mismatch"] == 0.0
    assert terms["alignment"] == 0.0
    assert terms["length"] == pytest.approx(0.2 * (1 - 6))


def test_saliency_is_relative_to_the_largest_frame_of_the_clip():
    assert rewards(said(single(2)))["saliency"] == 12 / 16
    terms = rewards(said(block("00:02.00", "00:03.00")))
    mean_area = (16 + 16 + 4) / 3
    assert terms["saliency"] == pytest.approx(mean_area / 16)


def test_assignment_is_best_overall_not_greedy():
    masks = np.zeros((2, 1, 4, 30), dtype=bool)
    masks[0, 0, :, 0:10] = True
    masks[1, 0, :, 5:15] = True
    # IoU with object 0: 7/13 and 1/3; with object 1: 8/12 and 1.
    first = (3, 0, 12, 3)
    second = (5, 0, 14, 3)
    text = said(single(0))
    terms = rewards(text, {0: [first, second]}, masks=masks)
    assert terms["alignment"] == pytest.approx((7 / 13 + 1) / 2)
    # One box serves one object only.
    terms = rewards(text, {0: [second]}, masks=masks)
    assert terms["alignment"] == pytest.approx(1 / 2)


def test_nobody_in_sight_on_the_keyframe():
    text = said(single(0))
    tracked = np.zeros((8, 10, 12), dtype=bool)
    terms = rewards(text, {0: [LEFT]}, tracked)
    expected = terms_of(base=0.6, number=0.4, single=0.4, consistency=2 / 8)
    assert terms == pytest.approx(expected)


def test_consistency_without_sam2():
    text = said(single(2))
    # Without a box the prediction is empty, which is right where the truth is.
    assert rewards(text, {2: []})["consistency"] == 2 / 8
    # With a box it is unknown, and earns nothing.
    assert rewards(text, {2: [LEFT]})["consistency"] == 0.0
    everything = np.ones((8, 10, 12), dtype=bool)
    terms = rewards(text, {2: [LEFT]}, everything)
    # Two frames each of 12, 16, 4 and no pixels of 120.
    expected = (2 * 12 + 2 * 16 + 2 * 4) / 120 / 8
    assert terms["consistency"] == pytest.approx(expected)


@pytest.mark.parametrize("objects", [0, 3])
def test_null_reference(objects):
    masks = np.zeros((objects, 8, 10, 12), dtype=bool)
    terms = rewards(answered(" null "), masks=masks)
    assert terms == terms_of(base=1.0, consistency=1.0)
    # An empty list is not that form.
    assert rewards(said(), masks=masks) == terms_of()
    assert rewards(said("{}"), masks=masks) == terms_of(base=0.2)
    # No keyframe counts where there is nothing to see.
    text = said(single(2))
    terms = rewards(text, {2: []}, masks=masks)
    assert terms == pytest.approx(terms_of(base=0.6, consistency=1.0))
    # Many keyframes of nothing are still too many.
    assert rewards(said(single(2), single(3)), masks=masks)["single"] == pytest.approx(-0.4)
    # Every box is a surplus box.
    tracked = np.zeros((8, 10, 12), dtype=bool)
    tracked[3:, 0, 0] = True
    terms = rewards(text, {2: [LEFT, RIGHT]}, tracked, masks)
    expected = terms_of(base=0.6, mismatch=-2 / 2, consistency=3 / 8)
    assert terms == pytest.approx(expected)


@pytest.mark.parametrize("objects", [0, 3])
def test_four_keyframes_of_nothing_earn_less_than_null(objects):
    masks = np.zeros((objects, 8, 10, 12), dtype=bool)
    four = said(*map(single, [0, 2, 4, 6]))
    searched = rewards(four, masks=masks)
    honest = rewards(answered("null"), masks=masks)
    assert combine(searched, LATER_RUN) < combine(honest, LATER_RUN)


def test_shapes_are_checked_and_named():
    masks = scene()
    cases = [
        # No objects; J of half of the frames; masks in place of their J; no frames.
        (masks[0], None),
        (masks, np.ones(4)),
        (masks, masks[0]),
        (masks[:, :0], None),
    ]
    for bad_masks, similarity in cases:
        with pytest.raises(ValueError) as error:
            vos_rewards(said(), bad_masks, {}, similarity)
        assert str(bad_masks.shape) in str(error.value)


def test_clip_keeps_the_rest_from_taking_away():
    weights = dict(keyframe=1.0, saliency=1.0, alignment=1.0, consistency=2.0)
    terms = terms_of(base=1.0, number=-3.0, mismatch=-0.5, consistency=1.0)
    assert combine(terms, weights) == pytest.approx(1 - 3 - 0.5 + 2)
    assert combine(terms, weights, clip=True) == 1.0
    terms["number"] = 0.0
    assert combine(terms, weights, clip=True) == pytest.approx(2.5)


# ---- known flaws of the released code --------------------------------------------------------------
def test_a_true_box_on_the_left_edge_counts():
    terms = rewards(said(single(2)), {2: [LEFT]})
    assert terms["alignment"] == 1.0
    assert mask_box(scene()[0, 2]) == LEFT


def test_every_surplus_box_counts_and_none_hides_a_later_frame():
    text = said(single(2), single(4))
    boxes = {
        2: [LEFT] * 7,
        4: [LEFT, RIGHT, RIGHT],
    }
    terms = rewards(text, boxes)
    surplus = 5 + 1
    # Over O=2, halved, over 2 keyframes.
    assert terms["mismatch"] == pytest.approx(-surplus / 2 / 2 / 2)
    assert terms["alignment"] == 1.0


# ---- boxes and masks -------------------------------------------------------------------------------
def test_box_iou_is_inclusive():
    square = (0, 0, 9, 9)
    pixel = (5, 5, 5, 5)
    upper_half = (0, 0, 9, 4)
    at_corner = (9, 9, 10, 10)
    far = (20, 20, 30, 30)
    expected = [
        [1, 50 / 100, 1 / 103, 0],
        [1 / 100, 0, 0, 0],
    ]
    iou = box_iou([square, pixel], [square, upper_half, at_corner, far])
    assert iou == pytest.approx(np.array(expected))
    assert box_iou([], [square]).shape == (0, 1)
    assert box_iou([square], []).shape == (1, 0)


def test_mask_box_is_first_and_last_row_and_column():
    mask = np.zeros((5, 7), dtype=bool)
    assert mask_box(mask) is None
    mask[1, 2] = True
    mask[4, 6] = True
    assert mask_box(mask) == (2, 1, 6, 4)


def slow_j(pred, true):
    """J of two masks [H, W], pixel by pixel."""
    shared = 0
    union = 0
    for ours, theirs in zip(pred.flat, true.flat):
        shared += bool(ours and theirs)
        union += bool(ours or theirs)
    return shared / union if union else 1.0


@pytest.mark.parametrize("height, width", [
    (17, 23),
    (40, 250),
    (1, 9),
])
def test_j_against_loops(height, width):
    rng = np.random.default_rng(0)
    true = np.zeros((12, height, width), dtype=bool)
    for mask in true:
        y = rng.integers(0, height)
        x = rng.integers(0, width)
        bottom = y + rng.integers(1, height + 1)
        right = x + rng.integers(1, width + 1)
        mask[y:bottom, x:right] = True
    noise = rng.random(true.shape) < 0.02
    pred = np.roll(true, (1, 2), (1, 2)) ^ noise
    # Frames where one or both are empty, then where one or both are full.
    true[[0, 2]] = False
    pred[[1, 2]] = False
    true[[3, 5]] = True
    pred[[4, 5]] = True
    # The whole frame against nothing.
    pred[6] = True
    true[6] = False
    expected = np.array(list(map(slow_j, pred, true)))
    J = region_similarity(pred, true)
    assert J == pytest.approx(expected)
    # Any number but 0 is inside.
    same = region_similarity(pred * np.uint8(255), true * 2)
    assert np.array_equal(same, J)


def test_j_edge_cases():
    empty = np.zeros((1, 20, 20), bool)
    full = np.ones((1, 20, 20), bool)
    square = np.zeros((1, 20, 20), bool)
    square[0, 5:10, 5:10] = True
    cases = [
        (empty, empty, 1),
        (full, full, 1),
        (full, empty, 0),
        (square, empty, 0),
        (empty, square, 0),
        (square, full, 25 / 400),
        (square, square, 1),
    ]
    for pred, true, expected in cases:
        assert region_similarity(pred, true)[0] == expected


def test_j_names_shapes_that_differ():
    narrow = np.zeros((1, 20, 20), bool)
    wide = np.zeros((1, 20, 21), bool)
    with pytest.raises(ValueError, match=r"\(1, 20, 20\).*\(1, 20, 21\)"):
        region_similarity(narrow, wide)


# ---- task "avs" ------------------------------------------------------------------------------------
def test_avs_reward():
    square = (0, 0, 9, 9)
    upper_half = (0, 0, 9, 4)
    assert avs_reward(upper_half, square) == 0.5
    assert avs_reward(None, square) == 0.0
    assert avs_reward(square, None) == 0.0
    assert avs_reward((), square) == 0.0


def test_the_first_frame_earns_the_iou_of_its_first_box():
    masks = np.zeros((1, 3, 20, 20), bool)
    masks[0, 0, 5:10, 5:15] = True
    clip = Clip("", None, "", masks=masks, task="avs")
    part = (5, 5, 14, 7)
    elsewhere = (0, 0, 1, 1)
    terms = judged(clip, "a dog", {0: [part, elsewhere]})
    assert terms == dict(first_box=30 / 50, format=1.0, malformed=0.0)
    text = answered("a dog")
    assert frames_to_ground(clip, text) == {0: "a dog"}
    # An answer without its end asks for nothing.
    assert frames_to_ground(clip, text.removesuffix("</answer>")) == {}
    # "null" is right where nothing is to be seen, and only there.
    assert judged(clip, "null")["first_box"] == 0
    nothing = replace(clip, masks=np.zeros_like(masks))
    assert judged(nothing, "null")["first_box"] == 1
    assert judged(nothing, "a dog", {0: [part]})["first_box"] == 0


# ---- task "image" ----------------------------------------------------------------------------------
TRUE_BOX = (100, 100, 199, 199)
TRUE_POINTS = [(120, 150), (180, 150)]
EVERYTHING = (0, 0, 999, 999)


def pointed(box=TRUE_BOX, first=(120, 150), second=(180, 150), **more):
    """An answer: the right one, but for what is given."""
    fields = dict(bbox_2d=box, points_1=first, points_2=second)
    return json.dumps(fields | more)


PICTURE_ANSWERS = [
    (
        pointed(),
        1, 1.4, 1, 1,
    ),
    # IoU 80/100: 2 * 0.3 + 0.4. Corners off by 0, 0, 0, 20: 5 on average, 0.05 * 25 is over 1.
    (
        pointed((100, 100, 199, 179)),
        1, 1.0, 1, 1,
    ),
    # IoU 60 / 180: none. Corners off by (40 + 0 + 80 + 0) / 4 = 30: none.
    (
        pointed((140, 100, 279, 199), (150, 150)),
        1, 0, 0, 1,
    ),
    # Corners off by 20 each: 0.05 * 10 = 0.5; IoU 100 * 100 / 140 ** 2 = 0.5102: 0.4204.
    # Both points are 80 off, which would earn 1, but below the box: none.
    (
        pointed((80, 80, 219, 219), (120, 230), (180, 230)),
        1, 2 * (1 / 1.96 - 0.5) + 0.4, 0.5, 0,
    ),
    # Points off by 100 and 140.
    (
        pointed(EVERYTHING, (120, 250), (180, 290)),
        1, 0, 0, 0.02 * (150 - 120),
    ),
    # The same, swapped.
    (
        pointed(EVERYTHING, (180, 290), (120, 250)),
        1, 0, 0, 0.02 * (150 - 120),
    ),
    (
        pointed(second=(180, math.nan)),
        0, 1.4, 1, 0,
    ),
    (
        pointed(second=(180,)),
        0, 1.4, 1, 0,
    ),
    (
        pointed(more=1),
        0, 1.4, 1, 1,
    ),
    (
        "see " + pointed(),
        0, 1.4, 1, 1,
    ),
    # No box: swapped corners, no answer, no object, a corner that is no number.
    (
        pointed((199, 199, 100, 100)),
        0, 0, 0, 0,
    ),
    (
        "",
        0, 0, 0, 0,
    ),
    (
        "[1]",
        0, 0, 0, 0,
    ),
    (
        pointed((100, 100, True, 199)),
        0, 0, 0, 0,
    ),
]


@pytest.mark.parametrize("answer, strict, iou, box, point", PICTURE_ANSWERS)
def test_image_rewards(answer, strict, iou, box, point):
    text = f"<think>a</think><answer>{answer}</answer>"
    terms = image_rewards(text, TRUE_BOX, TRUE_POINTS)
    expected = dict(strict=strict, iou=iou, box=box, point=point)
    assert terms == pytest.approx(expected)
    unthought = image_rewards(f"<answer>{answer}</answer>", TRUE_BOX, TRUE_POINTS)
    assert unthought == pytest.approx(terms | dict(strict=0))


def test_image_iou_term_starts_above_one_half():
    half = answered('{"bbox_2d": [100, 100, 199, 149]}')
    terms = image_rewards(half, TRUE_BOX, TRUE_POINTS)
    assert terms["iou"] == 0.0


def test_a_picture_is_judged_in_pixels_of_the_resized_picture():
    masks = np.zeros((1, 3, 20, 20), bool)
    truth = dict(box=TRUE_BOX, points=TRUE_POINTS)
    clip = Clip("", None, "", masks=masks, task="image", truth=truth)
    # Everything at half the size.
    answer = pointed((50, 50, 99.5, 99.5), (60, 75), (90, 75))
    terms = judged(clip, answer, scale=(2, 2))
    assert terms["iou"] == pytest.approx(1.4, abs=0.05)
    for name in ("box", "point", "strict", "format"):
        assert terms[name] == 1
    # The form of the answer and that of the whole text are paid apart.
    assert total(terms) == pytest.approx(terms["iou"] + 4)


# ---- task "grounding" ------------------------------------------------------------------------------
def named(*boxes):
    """System 2's answer with these boxes."""
    return json.dumps([dict(bbox_2d=list(box)) for box in boxes])


def grounded(answer, frame, scale=(1.0, 1.0), settings=None):
    """(terms, total reward) of System 2's answer about a frame of `scene`."""
    clip = Clip("", None, "", masks=scene()[:, [frame]], task="grounding")
    terms = reward_terms(clip, scale, answer, {}, None)
    assert terms.pop("malformed") == 1 - terms["format"]
    return terms, total(terms, settings)


# (answer, frame, terms). Frame 4 shows both objects, frame 2 the left one, frame 0 none.
GROUNDED = [
    # Two objects, in the other order: 1 and 12 / 24.
    (named(RIGHT, (0, 2, 3, 7)), 4, dict(format=1, iou=0.75, mismatch=0)),
    (named(LEFT), 4, dict(format=1, iou=0.5, mismatch=0)),
    (named(LEFT), 2, dict(format=1, iou=1, mismatch=0)),
    # As many boxes as objects are allowed. A third one is surplus: half of it, over two objects.
    (named(LEFT, RIGHT), 2, dict(format=1, iou=1, mismatch=0)),
    (named(LEFT, RIGHT, RIGHT), 2, dict(format=1, iou=1, mismatch=-0.25)),
    ("null", 2, dict(format=1, iou=0, mismatch=0)),
    (" null ", 0, dict(format=1, null=1)),
    (named(LEFT), 0, dict(format=1, null=0)),
    # Neither boxes nor null: words, a swapped box, an empty list, a reasoned null.
    ("the dog", 2, dict(format=0, iou=0, mismatch=0)),
    (named((3, 4, 0, 2)), 2, dict(format=0, iou=0, mismatch=0)),
    (named(), 0, dict(format=0, null=0)),
    (answered("null"), 0, dict(format=0, null=0)),
    # One box can be read.
    (named((3, 4, 0, 2), LEFT), 2, dict(format=1, iou=1, mismatch=0)),
]


@pytest.mark.parametrize("answer, frame, expected", GROUNDED)
def test_an_answer_of_system_2_by_hand(answer, frame, expected):
    terms, reward = grounded(answer, frame)
    assert terms == pytest.approx(expected)
    assert reward == pytest.approx(sum(expected.values()))
    # The weights of System 1's terms mean nothing here.
    other = settings_of("--alignment", 0, "--consistency", 0, "--keyframe", 3)
    assert grounded(answer, frame, settings=other)[1] == reward


def test_boxes_of_an_answer_are_those_of_the_resized_picture():
    # 12 x 10 pixels at a third and a half; beyond the picture is cut off.
    terms, _ = grounded(named((0, 1, 1, 2)), 2, scale=(3.0, 2.0))
    assert terms["iou"] == 1.0
    far, _ = grounded(named((8, 6, 900, 900)), 6)
    # 4 x 4 pixels hold the 2 x 2.
    assert far["iou"] == 4 / 16


def test_more_boxes_never_pay():
    _, honest = grounded(named((0, 2, 3, 6)), 2)
    guesses = [(x, y, x + 3, y + 2) for x in range(4) for y in range(4)]
    _, many = grounded(named(*guesses), 2)
    assert many < honest


# ---- task "qa" -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, answer, true, expected", [
    ("multiple choice", "B", "B", 1),
    ("multiple choice", "B.", "B", 0),
    ("numerical", "1,000.5", "1000.50", 1),
    ("numerical", "3", "3.0", 0),
    ("numerical", "2.004", "2.00", 1),
    ("numerical", "nan", "nan", 0),
    ("numerical", "inf", "inf", 0),
    ("numerical", "three", "3", 0),
    ("regression", "9", "10", 0.9),
    ("regression", "-5", "10", 0),
    ("regression", "inf", "10", 0),
    ("OCR", "the cat sat", "the cat sits", 2 / 3),
    ("OCR", "a b c d", "x", 0),
    ("OCR", "cat", "the cat sat", 1 / 3),
    (
        "free-form", "a cat sat on a mat", "The cat sat on the mat.",
        (2 / 3 + 2 / 5 + 2 / 3) / 3,
    ),
    ("free-form", "", "word", 0),
    (
        "free-form", "mat the on", "on the mat",
        (1 + 0 + 1 / 3) / 3,
    ),
    (
        "free-form", "on on on", "on the mat",
        (1 / 3 + 0 + 1 / 3) / 3,
    ),
])
def test_questions_by_hand(kind, answer, true, expected):
    text = f"<think>x</think><answer>{answer}</answer>"
    huge = f"<answer>{answer * 100_000}</answer>"
    for solution in (true, f"<answer>{true}</answer>"):
        reward = question_reward(kind, text, solution)
        assert reward == pytest.approx(expected, abs=1e-6)
        assert 0 <= question_reward(kind, huge, solution) <= 1
        # No answer tags.
        assert question_reward(kind, answer, solution) == 0


@pytest.mark.parametrize("text, number", [
    ("1,000.5", 1000.5),
    (" -3 ", -3),
    ("1e3", 1000),
    ("three", None),
    ("", None),
    ("nan", None),
    ("-inf", None),
    ("1e400", None),
])
def test_parse_number(text, number):
    assert parse_number(text) == number


def test_an_unknown_kind_of_question_is_named():
    with pytest.raises(ValueError, match="unknown kind of question: riddle .*multiple choice"):
        question_reward("riddle", answered("B"), "B")


# ---- a completion's terms, and the sum -------------------------------------------------------------
TERMS_OF_TASKS = {
    "vos": TERMS,
    "avs": ("first_box",),
    "image": ("iou", "box", "point", "strict"),
    "qa": ("accuracy",),
    # The first frame of `scene` shows no target.
    "grounding": ("null",),
}


def clip_of(task):
    """`scene` for any task; what is right is TRUE_BOX, or the text "a dog"."""
    truth = dict(box=TRUE_BOX, points=TRUE_POINTS, type="OCR", solution="a dog")
    return Clip("", range(8), "", masks=scene(), task=task, truth=truth)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_terms_beside_the_format(task):
    terms = judged(clip_of(task), "a dog")
    assert set(terms) == {*TERMS_OF_TASKS[task], *NO_ACCURACY}
    for value in terms.values():
        assert type(value) is float


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task: song"):
        judged(clip_of("song"), "la")


@pytest.mark.parametrize("task, answer, boxes, malformed", [
    ("vos", "null", {}, 0),
    ("vos", "[]", {}, 1),
    # A frame that was asked for, on which System 2 saw nothing.
    ("vos", f"[{single(2)}]", {2: []}, 0),
    ("avs", "a dog", {}, 0),
    ("avs", "", {}, 1),
    ("image", pointed(), {}, 0),
    ("image", "see " + pointed(), {}, 1),
    ("qa", "a cat", {}, 0),
    ("qa", "", {}, 1),
    ("grounding", '{"bbox_2d": [1, 2, 3, 4]}', {}, 0),
    ("grounding", "a cat", {}, 1),
])
def test_what_cannot_be_used_is_malformed(task, answer, boxes, malformed):
    terms = judged(clip_of(task), answer, boxes)
    assert terms["malformed"] == malformed


def sharpness_term(value):
    """A term that somebody adds."""
    return value / 2


@pytest.mark.parametrize("task", TERMS_OF_TASKS)
def test_a_new_term_is_one_function_and_one_setting(task):
    known = dict.fromkeys(TERMS_OF_TASKS[task], 0.25)
    known |= dict(format=1.0, malformed=0.0)
    more = known | dict(sharpness=sharpness_term(3.0))
    before = total(known)
    # Without a setting it counts once.
    assert total(more) == pytest.approx(before + 1.5)

    meaning = "weight of how sharp the target is"
    field = ("sharpness", float, setting(2.0, meaning))
    wider = make_dataclass("Wider", [field], bases=(train.Settings,))
    default = read_settings(wider, "", [])
    assert total(more, default) == pytest.approx(before + 2 * 1.5)
    given = read_settings(wider, "", ["--sharpness", "-4"])
    assert total(more, given) == pytest.approx(before - 4 * 1.5)
    # The clip of the terms beside base holds for it, too.
    clipped = replace(given, clip_reward=True)
    base = known.get("base", 0.0)
    assert total(more, clipped) == pytest.approx(known["format"] + base)


def test_no_setting_weighs_a_term_by_accident():
    names = {field.name for field in fields(train.Settings)}
    terms = set(NO_ACCURACY)
    for task in TERMS_OF_TASKS:
        terms.update(TERMS_OF_TASKS[task])
    assert names & terms == {"single", "saliency", "alignment", "consistency"}


def test_a_missing_term_counts_nothing():
    assert combine({}, LATER_RUN) == 0.0
    assert combine(dict(number=1.0), LATER_RUN) == 1.0
    some = dict(base=1.0, consistency=0.5)
    assert combine(some, LATER_RUN) == 2.0
    assert total(dict(format=1.0)) == 1.0


def test_format_and_malformed_are_no_accuracy():
    terms = dict(base=1.0, format=1.0, malformed=1.0)
    assert combine(terms, LATER_RUN) == 1.0
    # The total counts the format once.
    assert total(terms) == 2.0


def test_a_term_without_a_weight_counts_once():
    terms = dict(
        base=1.0,
        number=0.5,
        length=-0.25,
        overlap=-1.0,
        saliency=0.5,
    )
    assert combine(terms, {}) == sum(terms.values())


def test_one_weight_holds_for_all_terms_of_the_keyframes():
    for name in KEYFRAME_TERMS:
        terms = {name: 2.0}
        weights = dict(keyframe=0.25)
        assert combine(terms, weights) == 0.5
        # A weight of its own name means nothing.
        weights[name] = 100.0
        assert combine(terms, weights) == 0.5


# ---- length control --------------------------------------------------------------------------------
def test_length_bonus():
    accuracy = [0.1, 0.2, 3.0, 3.0, 3.0]
    lengths = [400, 320, 750, 319, 751]
    bonus = length_bonus(accuracy, lengths)
    assert bonus.tolist() == [0, 1, 1, 0, 0]
    # A right answer alone earns none.
    bonus = length_bonus([0.0, 3.0], [400, 400])
    assert bonus.tolist() == [0, 0]


def test_length_control_pays_only_where_it_is_asked_for():
    terms = [terms_of(base=1.0, format=1.0, malformed=0.0)] * 3
    lengths = [10, 400, 900]
    plain = settings_of()
    rewards = total_rewards(terms, lengths, plain)
    assert rewards.tolist() == [2, 2, 2]
    asked = replace(plain, length_control=True)
    rewards = total_rewards(terms, lengths, asked)
    assert rewards.tolist() == [2, 3, 2]
