"""Rewards: what a completion earns, from its text and from the boxes and masks that were made of it.

Pure functions, no models and no files. Formulas: Omni-R1, arXiv 2505.20256, section 3, and its released
training code, without two of that code's mistakes: here a box on the left edge counts, and so does every
surplus box.

    reward_terms     every term of one completion by name; the one place where a task's reward is chosen
    combine          the one sum; a setting of a term's name is its weight
    total_rewards    a group's rewards: format + accuracy (+ length control)

A new term of the task "vos" is a function and a line in `vos_rewards`. A setting of the term's name in
train.py is its weight.

Letters: O objects, T frames, H W pixels, G completions of one prompt. A box is (x1, y1, x2, y2) in pixels,
corners inside the box: its width is x2 - x1 + 1.
"""
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from data import (
    FPS,
    KEYFRAMES,
    Box,
    Clip,
    Moment,
    answer_text,
    blocks,
    is_null,
    keyframes,
    parse_box,
    parse_boxes,
    parse_json,
    parse_moments,
    parse_numbers,
    to_source,
)
from trust.masks import mask_box

Boxes = Mapping[int, list[Box]]    # frame -> System 2's boxes there, in source pixels; a Mask is its box
Terms = dict[str, float]           # a completion's reward terms by name

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TERMS = (
    "base",
    "number", "length", "overlap",
    "single",
    "saliency",
    "alignment", "mismatch",
    "consistency",
)
# The setting `keyframe` weighs these together.
KEYFRAME_TERMS = ("number", "length", "overlap")
# No part of the accuracy reward.
NO_ACCURACY = ("format", "malformed")


def format_reward(text: str) -> float:
    """1.0 if the whole text is `<think>…</think>`, blanks, `<answer>…</answer>`, each tag once; else 0.0."""
    for tag in TAGS:
        # Each tag once: none is nested or repeated.
        if text.count(tag) != 1:
            return 0.0
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    match = re.fullmatch(pattern, text, re.DOTALL)
    return float(match is not None)


# ---- boxes and masks -------------------------------------------------------------------------------
def box_iou(a, b) -> np.ndarray:
    """IoU [A, B] of every box of `a` [A, 4] with every box of `b` [B, 4], corners inclusive."""
    a = np.asarray(a, dtype=float).reshape(-1, 1, 4)
    b = np.asarray(b, dtype=float).reshape(1, -1, 4)
    low = np.maximum(a[..., :2], b[..., :2])      # [A, B, 2]
    high = np.minimum(a[..., 2:], b[..., 2:])     # [A, B, 2]
    sides = np.clip(high - low + 1, 0, None)      # [A, B, 2], 0 where they do not meet
    shared = sides.prod(-1)                       # [A, B]
    areas = box_area(a) + box_area(b)             # [A, 1] + [1, B]
    return shared / (areas - shared)


def box_area(boxes):
    """Areas [...], in pixels, of boxes [..., 4]."""
    sides = boxes[..., 2:] - boxes[..., :2] + 1
    return sides.prod(-1)


def region_similarity(pred, true) -> np.ndarray:
    """J [T] (DAVIS): IoU of the masks of each frame, 1 where both are empty.

    pred, true: [T, H, W], bool or 0 and anything else (0/255). Raises ValueError where their shapes differ.
    """
    pred, true = mask_pair(pred, true)
    return overlap((pred & true).sum((1, 2)), (pred | true).sum((1, 2)))


def overlap(shared, united) -> np.ndarray:
    """IoU of masks by the numbers of pixels, of any shape, in both and in either; 1 where there are none."""
    iou = shared / np.maximum(united, 1)
    return np.where(united > 0, iou, 1.0)


def mask_pair(pred, true) -> tuple[np.ndarray, np.ndarray]:
    """Both as bool [T, H, W]; ValueError where their shapes differ."""
    # 255 becomes True.
    pred = np.asarray(pred, dtype=bool)
    true = np.asarray(true, dtype=bool)
    if pred.ndim != 3 or pred.shape != true.shape:
        raise ValueError(f"pred {pred.shape} and true {true.shape} must be the same [T, H, W]")
    return pred, true


# ---- task "vos": keyframes of a video --------------------------------------------------------------
def vos_rewards(
    text: str,
    masks: np.ndarray,
    boxes: Boxes,
    similarity: np.ndarray | None,
    fps: float = FPS,
) -> Terms:
    """All terms of one completion on one clip, by name (TERMS).

    masks       bool [O, T, H, W]: the true mask of each object. For a null reference, O is 0 or all are
                empty.
    boxes       System 2's boxes on keyframes. Boxes on other frames are ignored.
    similarity  J [T] of the masks that SAM2 tracked from the boxes, united (`region_similarity`). None if
                SAM2 was not run: without a box the prediction is empty then, and with one consistency is 0.
    fps         frames per second at which the clip was shown to the model.

    Raises ValueError, naming the shapes, where they do not fit together.
    """
    masks = check_masks(masks, similarity)
    terms = dict.fromkeys(TERMS, 0.0)
    null = not masks.any()
    if null and is_null(answer_text(text)):
        return terms | dict(base=1.0, consistency=1.0)
    if null:
        # One object that is never visible, so that no mean is over nothing.
        masks = np.zeros((1, *masks.shape[1:]), dtype=bool)
    objects, T = masks.shape[:2]
    moments = parse_moments(text, T, fps)
    if not moments:
        return terms
    terms["base"] = base_term(moments, masks.any((2, 3)))
    frames = list(keyframes(moments))
    # Without a keyframe nothing was looked at, and the empty prediction must earn nothing.
    if not frames:
        return terms
    chosen = {frame: boxes.get(frame, []) for frame in frames}
    terms["number"] = number_term(moments)
    terms["single"] = number_term(moments, 1)
    if null:
        # Keyframes of nothing must not earn more than the answer null.
        terms["number"] = min(terms["number"], 0.0)
        terms["single"] = min(terms["single"], 0.0)
    terms["length"] = length_term(moments)
    terms["overlap"] = overlap_term(moments)
    terms["saliency"] = saliency_term(masks, frames)
    terms["alignment"] = alignment_term(masks, chosen)
    allowed = 0 if null else objects
    terms["mismatch"] = mismatch_term(chosen, allowed, objects)
    terms["consistency"] = consistency_term(masks, similarity, any(chosen.values()))
    return terms


def check_masks(masks, similarity):
    """The masks as bool (no copy where they are), or ValueError where the similarity is not theirs."""
    masks = np.asarray(masks, dtype=bool)
    shape = None if similarity is None else np.shape(similarity)
    if masks.ndim != 4 or 0 in masks.shape[1:] or shape not in (None, masks.shape[1:2]):
        raise ValueError(f"masks {masks.shape} must be [O, T, H, W] with T, H, W > 0, and similarity {shape} "
                         f"must be None or [T]")
    return masks


def base_term(moments: list[Moment], visible: np.ndarray) -> float:
    """Mean over blocks of 0.2, plus 0.2 if parsed, plus, if valid, 0.2 and the share of visible targets.

    That is the share of pairs (object, frame of the block) in which the object is visible. At most 1.6.
    visible: bool [O, T].
    """
    score = 0.0
    for moment in moments:
        score += 0.4 if moment.parsed else 0.2
        if moment.frames:
            inside = visible[:, moment.frames]    # [O, frames]
            score += 0.2 + inside.mean()
    return float(score / len(moments))


def frame_counts(moments: list[Moment]) -> tuple[list[int], int]:
    """(number of frames |F_i| of each valid block, number U of distinct frames in all of them)."""
    sizes = []
    distinct = set()
    for moment in moments:
        if moment.frames:
            sizes.append(len(moment.frames))
            distinct.update(moment.frames)
    return sizes, len(distinct)


def number_term(moments: list[Moment], best: int = KEYFRAMES) -> float:
    """R_K: 0.4 U up to K_0 = `best` distinct frames, beyond them 0.4 (2 K_0 - 1 - U)."""
    _, U = frame_counts(moments)
    if U <= best:
        return 0.4 * U
    return 0.4 * (2 * best - 1 - U)


def length_term(moments: list[Moment]) -> float:
    """R_K: the sum of 0.2 (1 - |F_i|) over valid blocks, never above 0."""
    sizes, _ = frame_counts(moments)
    return 0.2 * (len(sizes) - sum(sizes))


def overlap_term(moments: list[Moment]) -> float:
    """R_K: -0.5 for every time that a frame is named again."""
    sizes, U = frame_counts(moments)
    return -0.5 * (sum(sizes) - U)


def saliency_term(masks: np.ndarray, frames: list[int]) -> float:
    """R_K: the target's mean area on keyframes, as a share of its largest in the clip; 0 if never visible."""
    area = masks.sum((0, 2, 3))    # [T] pixels
    largest = max(area.max(), 1)
    return float(area[frames].mean() / largest)


def alignment_term(masks: np.ndarray, boxes: Boxes) -> float:
    """R_A: mean IoU over the visible objects of all keyframes, each frame's boxes assigned to them best."""
    total = 0.0
    pairs = 0
    for frame, predicted in boxes.items():
        true = []
        for mask in masks[:, frame]:
            box = mask_box(mask)
            if box:
                true.append(box)
        iou = box_iou(true, predicted)    # [visible objects, boxes]
        best = linear_sum_assignment(iou, maximize=True)
        total += iou[best].sum()
        pairs += len(true)
    return float(total / max(pairs, 1))


def mismatch_term(boxes: Boxes, allowed: int, objects: int) -> float:
    """R_A: -0.5 for each surplus box, one beyond `allowed` on its frame, divided by objects and keyframes."""
    surplus = 0
    for predicted in boxes.values():
        surplus += max(len(predicted) - allowed, 0)
    return -0.5 * surplus / objects / len(boxes)


def consistency_term(masks: np.ndarray, similarity: np.ndarray | None, any_box: bool) -> float:
    """R_G: J of SAM2's masks, mean over frames; a frame where they and the true ones are empty counts 1."""
    if similarity is None:
        if any_box:
            return 0.0
        # J of the empty prediction.
        similarity = ~masks.any((0, 2, 3))
    return float(similarity.mean())


# ---- task "avs": the first frame and the sound -----------------------------------------------------
def first_frame_reward(answer: str, boxes: Boxes, masks: np.ndarray) -> float:
    """Reward of Ref-AVS: IoU of System 2's first box on frame 0 with the true one.

    If the target is not visible there, 1 for the answer null, else 0; that is our addition.
    masks: bool [O, T, H, W].
    """
    true = mask_box(masks[:, 0].any(0))
    if true is None:
        return float(is_null(answer))
    predicted = boxes.get(0)
    return avs_reward(predicted[0] if predicted else None, true)


def avs_reward(box: Box | None, true_box: Box | None) -> float:
    """IoU of two boxes in the same pixels; 0 where either is missing."""
    if not box or not true_box:
        return 0.0
    return box_iou(box, true_box).item()


# ---- task "image": a box and two points in a picture -----------------------------------------------
def image_rewards(text: str, true_box: Box, true_points) -> Terms:
    """Terms of one completion on one image (Seg-Zero). At most: strict format 1, iou 1.4, box 1, point 1.

    The answer is `{"bbox_2d": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}`, in pixels of the
    resized image, as are true_box and true_points [2, 2]. Other text around it only costs the strict format.
    """
    answer = answer_text(text)
    block = next(iter(blocks(answer)), "{}")
    fields = parse_json(block) or {}
    box = parse_box(fields.get("bbox_2d"))
    point_names = ("points_1", "points_2")
    points = [parse_numbers(fields.get(name), 2) for name in point_names]
    terms = dict(iou=0.0, box=0.0, point=0.0, strict=0.0)
    if box is None:
        return terms
    exact = block == answer and set(fields) == {"bbox_2d", *point_names}
    if exact and all(points):
        terms["strict"] = format_reward(text)
    iou = box_iou(box, true_box).item()
    if iou > 0.5:
        terms["iou"] = 2 * (iou - 0.5) + 0.4
    off = np.abs(np.subtract(box, true_box)).mean()
    terms["box"] = within_one(0.05 * (30 - off))
    if all(points) and all(inside_box(point, box) for point in points):
        off = pair_distance(points, true_points)
        terms["point"] = within_one(0.02 * (150 - off))
    return terms


def within_one(value: float) -> float:
    """The value if it is in [0, 1], else the nearer end."""
    return float(np.clip(value, 0, 1))


def inside_box(point, box: Box) -> bool:
    x, y = point
    x1, y1, x2, y2 = box
    return x1 <= x <= x2 and y1 <= y <= y2


def pair_distance(points, true_points) -> float:
    """Mean distance, in pixels, of two points [2, 2] to two others, paired the better way round."""
    straight = np.subtract(points, true_points)
    crossed = np.subtract(points, true_points[::-1])
    distances = np.linalg.norm([straight, crossed], axis=-1)    # [way round, point]
    return distances.mean(-1).min()


# ---- task "grounding": System 2's answer about one picture -----------------------------------------
def grounding_rewards(answer: str, boxes: list[Box], masks: np.ndarray) -> Terms:
    """Terms of one answer about frame 0 of `masks`, bool [O, T, H, W]. boxes: those in it, in source pixels.

    format           1 if it can be read: boxes, or null
    iou, mismatch    R_A on this frame alone
    null             in place of these where no object is visible: 1 for the answer null, else 0
    """
    null = is_null(answer)
    terms = dict(format=float(null or bool(boxes)))
    if not masks[:, 0].any():
        return terms | dict(null=float(null))
    objects = len(masks)
    terms["iou"] = alignment_term(masks, {0: boxes})
    terms["mismatch"] = mismatch_term({0: boxes}, objects, objects)
    return terms


# ---- task "qa": questions of Video-R1 --------------------------------------------------------------
def question_reward(kind: str, text: str, solution: str) -> float:
    """Accuracy in [0, 1] of one completion on a question of Video-R1's kinds (QUESTIONS).

    It is 0 without an answer. solution: the true answer, within `<answer>` tags or bare. Raises ValueError
    for an unknown kind.
    """
    if kind not in QUESTIONS:
        raise ValueError(f"unknown kind of question: {kind} (one of {', '.join(QUESTIONS)})")
    answer = answer_text(text)
    if not answer:
        return 0.0
    true = answer_text(solution) or solution.strip()
    return QUESTIONS[kind](answer, true)


def same_text(answer: str, true: str) -> float:
    return float(answer == true)


def same_number(answer: str, true: str) -> float:
    """1 if the numbers are equal to two decimals, and both or neither is written with a point or comma."""
    number = parse_number(answer)
    true_number = parse_number(true)
    if number is None or true_number is None:
        return 0.0
    if has_point(answer) != has_point(true):
        return 0.0
    return float(round(number, 2) == round(true_number, 2))


def has_point(text: str) -> bool:
    return "." in text or "," in text


def near_number(answer: str, true: str) -> float:
    """1 - the relative error, at least 0."""
    number = parse_number(answer)
    true_number = parse_number(true)
    if number is None or true_number is None:
        return 0.0
    error = abs(number - true_number) + 1e-9
    return within_one(1 - error / (abs(true_number) + 1e-9))


def parse_number(text: str) -> float | None:
    """A finite number, thousands separated by commas or not; else None."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def word_accuracy(answer: str, true: str) -> float:
    """1 - word error rate, at least 0."""
    words = answer.split()
    true_words = true.split()
    count = max(1, len(true_words))
    # Its words beyond the true ones are errors enough for 0. So a long answer costs no time.
    if len(words) >= 2 * count:
        return 0.0
    # Levenshtein distance, one row at a time.
    distance = list(range(len(true_words) + 1))
    for i, word in enumerate(words, 1):
        diagonal = distance[0]
        distance[0] = i
        for j, other in enumerate(true_words, 1):
            changed = diagonal if word == other else diagonal + 1
            diagonal = distance[j]
            gap = min(diagonal, distance[j - 1]) + 1
            distance[j] = min(gap, changed)
    return max(0.0, 1 - distance[-1] / count)


def rouge(answer: str, true: str, most: int = 1000) -> float:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L over the first `most` words, in lower case, without stemming."""
    words = re.findall(r"[a-z0-9]+", answer.lower())[:most]
    true_words = re.findall(r"[a-z0-9]+", true.lower())[:most]
    scores = []
    for n in (1, 2):
        ours = word_groups(words, n)
        theirs = word_groups(true_words, n)
        shared = (ours & theirs).total()
        scores.append(f_score(shared, ours.total(), theirs.total()))
    # Longest common subsequence, one row at a time.
    longest = [0] * (len(true_words) + 1)
    for word in words:
        diagonal = 0
        for j, other in enumerate(true_words, 1):
            best = max(longest[j], longest[j - 1])
            if word == other:
                best = diagonal + 1
            diagonal = longest[j]
            longest[j] = best
    scores.append(f_score(longest[-1], len(words), len(true_words)))
    return float(np.mean(scores))


def word_groups(words: list[str], n: int) -> Counter:
    """Every n words in a row, and how often they occur."""
    starts = range(len(words) - n + 1)
    return Counter(tuple(words[i:i + n]) for i in starts)


def f_score(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0


QUESTIONS = {
    "multiple choice": same_text,
    "numerical": same_number,
    "regression": near_number,
    "OCR": word_accuracy,
    "free-form": rouge,
}


# ---- a completion's terms, and the sum -------------------------------------------------------------
def reward_terms(
    clip: Clip,
    scale: tuple[float, float],
    text: str,
    boxes: Boxes,
    similarity: np.ndarray | None,
) -> Terms:
    """Every reward term of one completion by name, and whether it could not be used at all (`malformed`).

    scale       source pixels per pixel of the picture that System 1's own boxes are in, (x, y).
    similarity  J [T] of SAM2's masks; None if it was not run.

    Raises ValueError for an unknown task.
    """
    answer = answer_text(text)
    truth = clip.truth
    if clip.task == "vos":
        terms = vos_rewards(text, clip.masks, boxes, similarity, clip.fps)
        readable = is_null(answer) or bool(boxes)
    elif clip.task == "avs":
        terms = dict(first_box=first_frame_reward(answer, boxes, clip.masks))
        readable = bool(answer)
    elif clip.task == "image":
        box = np.divide(truth["box"], [*scale, *scale])
        points = np.divide(truth["points"], scale)
        terms = image_rewards(text, box, points)
        readable = terms["strict"] > 0
    elif clip.task == "qa":
        accuracy = question_reward(truth["type"], text, truth["solution"])
        terms = dict(accuracy=accuracy)
        readable = bool(answer)
    elif clip.task == "grounding":
        own = [to_source(box, scale, clip.size) for box in parse_boxes(text)]
        terms = grounding_rewards(text, own, clip.masks)
        readable = terms["format"]
    else:
        raise ValueError(f"unknown task: {clip.task}")
    # System 2 does not reason, and its answer has another form.
    terms.setdefault("format", format_reward(text))
    terms["malformed"] = float(not readable)
    return terms


def combine(terms: Terms, weights: Mapping[str, float], clip: bool = False) -> float:
    """The accuracy reward: base plus all other terms, each times its weight (1 where `weights` names none).

    weights: by term; "keyframe" (the paper's a_k) weighs number, length and overlap together, "saliency" is
    a_kr, "alignment" a_a, "consistency" a_g. clip: the sum of the terms beside base is at least 0.
    """
    keyframe = 0.0
    for name in KEYFRAME_TERMS:
        keyframe += terms.get(name, 0.0)
    rest = weights.get("keyframe", 1.0) * keyframe
    for name, value in terms.items():
        if name not in ("base", *KEYFRAME_TERMS, *NO_ACCURACY):
            rest += weights.get(name, 1.0) * value
    if clip:
        rest = max(rest, 0.0)
    return terms.get("base", 0.0) + rest


def total_rewards(terms: list[Terms], lengths: list[int], settings) -> np.ndarray:
    """Rewards (G,) of a group: format + accuracy (+ length control).

    terms: G dicts of reward_terms; lengths: G numbers of tokens; settings: weights by the names of terms,
    `keyframe`, `clip_reward` and `length_control`.
    """
    formats = []
    accuracy = []
    for completion in terms:
        formats.append(completion["format"])
        accuracy.append(combine(completion, vars(settings), settings.clip_reward))
    rewards = np.array(formats) + np.array(accuracy)
    if settings.length_control:
        rewards += length_bonus(accuracy, lengths)
    return rewards


def length_bonus(accuracy, lengths) -> np.ndarray:
    """Bonus (G,): 1 for each right completion of 320 to 750 tokens, if more than one of the group is right.

    accuracy: (G,) accuracy rewards; above 0.1 counts as right. lengths: (G,) tokens.
    """
    right = np.asarray(accuracy) > 0.1
    lengths = np.asarray(lengths)
    if right.sum() <= 1:
        return np.zeros(len(right))
    moderate = (320 <= lengths) & (lengths <= 750)
    return (right & moderate).astype(float)
