"""Why an evaluated sample failed, decided from the truth.

Letters: O objects, T scored frames, H W pixels.
"""
import numpy as np

from benchmarks.predictions import scored_names
from data import answer_text, is_null
from rewards import box_iou, mask_box, region_similarity

FAILED = 50     # a sample with a lower value, in per cent, has failed
MEETS = 0.1     # IoU from which on a box or a mask is of the target
FITS = 0.5      # ... and fits it
MOST_BOXES = 64   # of a frame that are looked at

CAUSES = {
    "unreadable": "the prediction is missing or cannot be read",
    "null missed": "there is nothing to be found, and something was",
    "null invented": "there is a target, and the answer is null",
    "malformed": "the answer names no keyframe that can be read",
    "not visible": "the target is on none of the keyframes",
    "no box": "System 2 found nothing on the keyframes",
    "wrong object": f"nothing meets the target (IoU {MEETS})",
    "box off": f"it meets the target, but fits it nowhere (IoU {FITS})",
    "lost in tracking": "it fits the target on some frame, and the masks lose it",
}


def scored_frames(sample) -> list[int]:
    """The numbers of a sample's scored frames in its video."""
    places = {name: t for t, name in enumerate(sample.names)}
    return [places[name] for name in scored_names(sample)]


def cause_of(value: float, sample, true, pred, answer: dict | None) -> str:
    """A name in CAUSES, or "" where the sample did not fail.

    value   of the sample, in per cent
    true    bool [O, T, H, W], pred bool [T, H, W], on scored frames; None where they cannot be read
    answer  {"text", "keyframes", "boxes"} by frame of the video; None where it is not known
    """
    if value >= FAILED:
        return ""
    if true is None or pred is None:
        return "unreadable"
    if not true.any():
        return "null missed" if pred.any() else ""
    if answer is not None:
        cause = cause_of_answer(scored_frames(sample), true, answer)
        if cause:
            return cause
    elif not pred.any():
        return "null invented"
    return cause_of_masks(true, pred)


def cause_of_answer(times, true, answer) -> str:
    """What is wrong with keyframes and boxes; "" where that does not decide it."""
    if is_null(answer_text(answer["text"])):
        return "null invented"
    boxes = read_boxes(answer)
    chosen = sorted({*map(int, answer["keyframes"]), *boxes})
    if not chosen:
        return "malformed"
    scored = [t for t in chosen if t in times]
    if not scored:
        return ""
    visible = [t for t in scored if true[:, times.index(t)].any()]
    if not visible:
        return "not visible"
    if not any(boxes.values()):
        return "no box"
    best = max(box_fit(true[:, times.index(t)], boxes.get(t, [])) for t in visible)
    if best < MEETS:
        return "wrong object"
    return "box off" if best < FITS else "lost in tracking"


def cause_of_masks(true, pred) -> str:
    """The same from the masks alone."""
    union = true.any(0)
    seen = union.any((1, 2))
    best = region_similarity(pred, union)[seen].max()
    if best < MEETS:
        return "wrong object"
    return "box off" if best < FITS else "lost in tracking"


def box_fit(masks, boxes) -> float:
    """Mean over the visible objects, bool [O, H, W], of the best IoU of a box with theirs."""
    targets = [mask_box(mask) for mask in masks]
    targets = [box for box in targets if box]
    if not boxes:
        return 0.0
    return float(np.mean(box_iou(targets, boxes).max(1)))


def read_boxes(answer: dict) -> dict:
    """{frame: [box]} of an answer's line. What is no box is left out: the line may be of anybody."""
    read = {}
    listed = answer.get("boxes")
    if not isinstance(listed, dict):
        return read
    for t, boxes in listed.items():
        if str(t).isdecimal() and isinstance(boxes, list):
            read[int(t)] = [tuple(map(float, box)) for box in boxes[:MOST_BOXES] if is_box(box)]
    return read


def is_box(value) -> bool:
    """Whether a JSON value is four numbers, the smaller corner first."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    if not all(type(number) in (int, float) and np.isfinite(number) for number in value):
        return False
    return value[0] <= value[2] and value[1] <= value[3]
