"""Rewards: pure functions from a completion's text, and what was found with it, to named numbers.

No models and no files. Every function returns its terms by name; `combine` is the only place where they are
weighted and summed. Source of the formulas: Omni-R1, arXiv 2505.20256 (section 3) and its released training
code, without that code's slips: here a box on the left edge counts, and so does every surplus box.

Letters: O objects, T frames, H W pixels, G completions of one prompt. A box is (x1, y1, x2, y2) in pixels with
its corners inside it: width x2 - x1 + 1.
"""
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from data import Moment, answer_text, blocks, is_null, keyframes, parse_box, parse_json, parse_moments, parse_numbers

Box = tuple[float, float, float, float]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TERMS = ("base", "number", "length", "overlap", "saliency", "alignment", "mismatch", "consistency")
WEIGHTS = dict(keyframe=1.0, saliency=1.0, alignment=1.0, consistency=0.0)   # first release; later 1, 0, 1, 2


def format_reward(text: str) -> float:
    """1.0 if the whole text is `<think>…</think>`, blanks, `<answer>…</answer>`, each tag once; else 0.0."""
    once = all(text.count(tag) == 1 for tag in TAGS)   # forbids nested and repeated tags
    return float(once and re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", text, re.DOTALL) is not None)


# ------------------------------------------------------------------------------------------------ boxes


def box_iou(a, b) -> np.ndarray:
    """IoU [A, B] of every box of `a` [A, 4] with every box of `b` [B, 4], corners inclusive."""
    a, b = (np.asarray(boxes, dtype=float).reshape(-1, 4) for boxes in (a, b))
    low = np.maximum(a[:, None, :2], b[None, :, :2])                       # [A, B, 2]
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])                      # [A, B, 2]
    shared = np.clip(high - low + 1, 0, None).prod(-1)                     # [A, B]
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2] + 1).prod(-1) for boxes in (a, b))
    return shared / (area_a[:, None] + area_b[None, :] - shared)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """First and last column and row of a mask [H, W] as a box; None where the mask is empty."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if len(rows) == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


# ------------------------------------------------------------------------- video object segmentation


def vos_rewards(text: str, masks: np.ndarray, boxes: Mapping[int, list[Box]], tracked: np.ndarray | None,
                fps: float = 2.0) -> dict[str, float]:
    """All terms of one completion on one clip, by name (TERMS).

    masks    bool [O, T, H, W]: the true mask of each object; none, or all empty, for a null reference.
    boxes    keyframe -> what System 2 found there, in source pixels; other frames than keyframes are ignored.
    tracked  bool [T, H, W]: union of the masks SAM2 propagated from the boxes. None if SAM2 was not run: an
             empty prediction where there was no box to prompt with, else consistency 0.
    fps      frames per second at which the clip was shown to the model.
    Raises ValueError, naming the shapes, where they do not fit together."""
    masks, tracked = _checked(masks, tracked)
    terms = dict.fromkeys(TERMS, 0.0)
    null = not masks.any()
    if null and is_null(answer_text(text)):
        return terms | dict(base=1.0, consistency=1.0)
    if null:
        masks = np.zeros((1, *masks.shape[1:]), dtype=bool)   # one object that is never there: every mean exists
    moments = parse_moments(text, masks.shape[1], fps)
    if not moments:
        return terms
    terms["base"] = _base(moments, masks.any((2, 3)))
    frames = list(keyframes(moments))
    if not frames:                     # nothing was looked at: an empty prediction must not pay either
        return terms
    found = {frame: boxes.get(frame, []) for frame in frames}
    keyframe_terms = _keyframe_terms(moments)
    if null:                           # to look in vain must not pay more than to say that there is nothing
        keyframe_terms["number"] = min(keyframe_terms["number"], 0.0)
    return terms | keyframe_terms | dict(
        saliency=_saliency(masks, frames),
        alignment=_alignment(masks, found),
        mismatch=_mismatch(found, allowed=0 if null else len(masks), objects=len(masks)),
        consistency=_consistency(masks.any(0), tracked, anything=any(found.values())))


def _checked(masks, tracked) -> tuple[np.ndarray, np.ndarray | None]:
    """Both as bool arrays (no copy where they are), or ValueError."""
    masks = np.asarray(masks, dtype=bool)
    tracked = tracked if tracked is None else np.asarray(tracked, dtype=bool)
    fits = masks.ndim == 4 and 0 not in masks.shape[1:] and (tracked is None or tracked.shape == masks.shape[1:])
    if not fits:
        raise ValueError(f"masks {masks.shape} must be [O, T, H, W] with T, H, W > 0, and tracked "
                         f"{None if tracked is None else tracked.shape} must be None or the same [T, H, W]")
    return masks, tracked


def _base(moments: list[Moment], visible: np.ndarray) -> float:
    """Mean over blocks: 0.2 for being one, 0.2 if parsed, 0.2 if valid, plus the share of it in sight (<= 1.6).

    visible  bool [O, T]."""
    score = 0.0
    for moment in moments:
        score += 0.2 + 0.2 * moment.parsed
        if moment.frames:
            score += 0.2 + visible[:, moment.frames].mean()
    return float(score / len(moments))


def _keyframe_terms(moments: list[Moment]) -> dict[str, float]:
    """R_K without saliency: how many frames are named, how long the intervals are, how often they overlap."""
    sizes = [len(moment.frames) for moment in moments if moment.frames]
    distinct = len({frame for moment in moments for frame in moment.frames})
    return dict(number=0.4 * (distinct if distinct <= 4 else 7 - distinct),   # best at 4 keyframes
                length=0.2 * (len(sizes) - sum(sizes)),                       # sum of 0.2 (1 - |F_i|), never above 0
                overlap=-0.5 * (sum(sizes) - distinct))


def _saliency(masks: np.ndarray, frames: list[int]) -> float:
    """Mean over keyframes of the target's area, as a share of its largest area in the clip; 0 for a null reference."""
    area = masks.sum((0, 2, 3))                                               # [T] pixels
    return float(area[frames].mean() / max(area.max(), 1))


def _alignment(masks: np.ndarray, found: dict[int, list[Box]]) -> float:
    """R_A: mean IoU over the (object, keyframe) pairs in sight, under each frame's best one-to-one assignment."""
    total, pairs = 0.0, 0
    for frame, boxes in found.items():
        true = [box for box in map(mask_box, masks[:, frame]) if box]
        iou = box_iou(true, boxes)                                            # [visible objects, boxes]
        total += iou[linear_sum_assignment(iou, maximize=True)].sum()
        pairs += len(true)
    return float(total / max(pairs, 1))


def _mismatch(found: dict[int, list[Box]], allowed: int, objects: int) -> float:
    """Minus half the surplus boxes per object and keyframe: those beyond `allowed` on a frame are surplus."""
    surplus = sum(max(len(boxes) - allowed, 0) for boxes in found.values())
    return -0.5 * surplus / objects / len(found)


def _consistency(true: np.ndarray, tracked: np.ndarray | None, anything: bool) -> float:
    """R_G: mean over frames of the IoU of two masks [T, H, W]; a frame where both are empty counts 1."""
    if tracked is None:
        if anything:
            return 0.0
        tracked = np.zeros_like(true)
    union = (true | tracked).sum((1, 2))                                      # [T]
    shared = (true & tracked).sum((1, 2))
    return float(np.where(union > 0, shared / np.maximum(union, 1), 1.0).mean())


def combine(terms: Mapping[str, float], weights: Mapping[str, float] = WEIGHTS, clip: bool = False) -> float:
    """The accuracy reward: base plus the weighted other terms; with `clip`, these can add but not take away."""
    rest = (weights["keyframe"] * (terms["number"] + terms["length"] + terms["overlap"])
            + weights["saliency"] * terms["saliency"]
            + weights["alignment"] * terms["alignment"] + terms["mismatch"]
            + weights["consistency"] * terms["consistency"])
    return terms["base"] + (max(rest, 0.0) if clip else rest)


# --------------------------------------------------------------------- sound, images


def avs_reward(box: Box | None, true_box: Box | None) -> float:
    """IoU of the box found on frame 0 with the true one, in the same pixels; 0 where either is missing."""
    return float(box_iou(box, true_box)[0, 0]) if box and true_box else 0.0


def image_rewards(text: str, true_box: Box, true_points) -> dict[str, float]:
    """Terms of one completion on one image, to be summed as they are: at most 1 + 1.4 + 1 + 1.

    The answer is `{"bbox_2d": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}`; true_points is
    [2, 2]. All in pixels of the resized image. Other text around the object costs the format term only."""
    answer = answer_text(text)
    block = next(iter(blocks(answer)), "{}")
    fields = parse_json(block) or {}
    box = parse_box(fields.get("bbox_2d"))
    points = [parse_numbers(fields.get(key), 2) for key in ("points_1", "points_2")]
    terms = dict.fromkeys(("format", "iou", "box", "point"), 0.0)
    if box is None:
        return terms
    exact = block == answer and set(fields) == {"bbox_2d", "points_1", "points_2"} and all(points)
    terms["format"] = format_reward(text) if exact else 0.0
    iou = float(box_iou(box, true_box)[0, 0])
    terms["iou"] = 2 * (iou - 0.5) + 0.4 if iou > 0.5 else 0.0
    off = np.abs(np.subtract(box, true_box)).mean()
    terms["box"] = float(np.clip(0.05 * (30 - off), 0, 1))
    if all(points) and all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in points):
        terms["point"] = float(np.clip(0.02 * (150 - _pair_distance(points, true_points)), 0, 1))
    return terms


def _pair_distance(points, true_points) -> float:
    """Mean distance of two points to two others, paired the better way round."""
    points, true_points = np.asarray(points, dtype=float), np.asarray(true_points, dtype=float)   # [2, 2] each
    return min(np.linalg.norm(points - other, axis=1).mean() for other in (true_points, true_points[::-1]))


# --------------------------------------------------------------------- questions, length control


def question_reward(kind: str, text: str, solution: str) -> float:
    """Accuracy in [0, 1] of one completion on a question of Video-R1's kinds (QUESTIONS); 0 without an answer.

    solution  the true answer, within `<answer>` tags or bare. Raises ValueError for an unknown kind."""
    if kind not in QUESTIONS:
        raise ValueError(f"unknown kind of question: {kind} (one of {', '.join(QUESTIONS)})")
    answer, true = answer_text(text), answer_text(solution) or solution.strip()
    return QUESTIONS[kind](answer, true) if answer else 0.0


def _same(answer: str, true: str) -> float:
    return float(answer == true)


def _same_number(answer: str, true: str) -> float:
    """Both whole numbers or both not, and equal to two decimals."""
    numbers = parse_number(answer), parse_number(true)
    alike = any(c in answer for c in ".,") == any(c in true for c in ".,")
    return float(alike and None not in numbers and round(numbers[0], 2) == round(numbers[1], 2))


def _near_number(answer: str, true: str) -> float:
    """1 - the relative error, at least 0."""
    number, goal = parse_number(answer), parse_number(true)
    if number is None or goal is None:
        return 0.0
    return float(np.clip(1 - (abs(number - goal) + 1e-9) / (abs(goal) + 1e-9), 0, 1))


def parse_number(text: str) -> float | None:
    """A finite number, thousands separated by commas or not; else None."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None          # neither infinite nor NaN


def _read_words(answer: str, true: str) -> float:
    """1 - word error rate, at least 0."""
    words, goal = answer.split(), true.split()
    if len(words) >= 2 * max(1, len(goal)):                        # at least as many insertions as there are true words
        return float(words == goal)
    distance = list(range(len(goal) + 1))                          # Levenshtein, one row at a time
    for i, word in enumerate(words, 1):
        diagonal, distance[0] = distance[0], i
        for j, other in enumerate(goal, 1):
            diagonal, distance[j] = distance[j], min(distance[j] + 1, distance[j - 1] + 1, diagonal + (word != other))
    return max(0.0, 1 - distance[-1] / max(1, len(goal)))


def _rouge(answer: str, true: str, most: int = 1000) -> float:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L over lower-case words without stemming; the answer's first `most` words count."""
    words, goal = (re.findall(r"[a-z0-9]+", text.lower())[:most] for text in (answer, true))
    scores = []
    for n in (1, 2):
        ours, theirs = (Counter(zip(*(part[k:] for k in range(n)))) for part in (words, goal))
        scores.append(_f_score((ours & theirs).total(), ours.total(), theirs.total()))
    longest = [0] * (len(goal) + 1)                                # common subsequence, one row at a time
    for word in words:
        diagonal = 0
        for j, other in enumerate(goal, 1):
            diagonal, longest[j] = longest[j], diagonal + 1 if word == other else max(longest[j], longest[j - 1])
    scores.append(_f_score(longest[-1], len(words), len(goal)))
    return float(np.mean(scores))


def _f_score(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0


QUESTIONS = {"multiple choice": _same, "numerical": _same_number, "regression": _near_number, "OCR": _read_words,
             "free-form": _rouge}


def length_bonus(accuracy, lengths) -> np.ndarray:
    """Bonus [G] of one group: 1 for each right completion of 320 to 750 tokens, if more than one is right.

    accuracy  [G] accuracy rewards; above 0.1 counts as right.
    lengths   [G] tokens of each completion."""
    right, lengths = np.asarray(accuracy) > 0.1, np.asarray(lengths)
    if right.sum() <= 1:
        return np.zeros(len(right))
    return (right & (320 <= lengths) & (lengths <= 750)).astype(float)
