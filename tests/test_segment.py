"""segment.py: who grounds, SAM2 against its own video predictor, both systems on clips, the program.

Letters: N objects of a clip, G completions, T frames, H W pixels.
"""
import errno
import io
import json
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sam2 import sam2_video_predictor

import segment as segment_program
from benchmarks import pictures, results
from benchmarks.pictures import animation, overlay
from benchmarks.results import write_results
from benchmarks.toy import toy_clip, toy_scene
from data import Clip, Frames, Processor, grounding_prompt, parse_boxes, spread
from model import Thinker
from rewards import box_iou, mask_box, region_similarity
from segment import (
    Answer,
    FrameFeatures,
    Tracker,
    ground,
    load_system2,
    thinker_system2,
    to_source,
    track_groups,
    track_similarity,
    union_masks,
)
from tests.world import ROOT, jpeg, naming, noise_picture, segment, write_avi
from trust.errors import BadInput
from trust.masks import Mask
from trust.options import TOY_POLICY, TOY_SAM2
from trust.plugged import plugged
from trust.sam2_config import build_sam2, find_config

RED = "red circle"
BLUE = "blue circle"


def blank(width=40, height=30):
    return Image.new("RGB", (width, height))


def refuse(*_):
    raise AssertionError("not wanted")


def watch_prompts(thinker, monkeypatch):
    """A list that gets the number of prompts of every call of generate."""
    asked = []
    generate = thinker.generate

    def watched(prompts, *arguments, **options):
        asked.append(len(prompts))
        return generate(prompts, *arguments, **options)

    monkeypatch.setattr(thinker, "generate", watched)
    return asked


def says(text, processor):
    """Stands for a Thinker that gives one answer to everything."""
    def generate(prompts, n, max_new_tokens, **_):
        ids = processor.encode_text(text)
        group = [ids[:max_new_tokens]] * n
        return [group for _ in prompts]
    return SimpleNamespace(embed=list, generate=generate)


# ---- a file that grounds ---------------------------------------------------------------------------
LEFT_HALF = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Thing:
    part: int

def boxes(image, description):
    box = [0, 0, image.width // Thing(2).part, image.height - 1.0]
    return [box] * len(description.split())
"""


def grounder(tmp_path, source, name="mine.py"):
    """The path of a file with this source."""
    path = tmp_path / name
    path.write_text(source)
    return str(path)


def test_any_file_can_ground(tmp_path):
    system2 = plugged(grounder(tmp_path, LEFT_HALF, "left half.py"))
    pictures = [blank(), blank(), blank(80, 20)]
    dogs, nothing, cat = system2(pictures, ["two dogs", "", "cat"])
    assert dogs == [(0.0, 0.0, 20.0, 29.0)] * 2
    assert nothing == []
    assert cat == [(0.0, 0.0, 40.0, 19.0)]
    for value in dogs[0]:
        assert type(value) is float


def test_boxes_of_a_file_stay_in_the_picture(tmp_path):
    path = grounder(tmp_path, "def boxes(image, description):\n    return [(-5, 2, 99, 31)]\n")
    boxes, = plugged(path)([blank()], ["dog"])
    assert boxes == [(0.0, 2.0, 39.0, 29.0)]


NO_BOXES = [
    "None",
    "3",
    "'a'",
    "[(1, 2, 3)]",
    "[(5, 2, 1, 4)]",
    "[1, 2, 3, 4]",
    "[(0, 0, 1, float('nan'))]",
    "[(0, 0, 1, 1)] * 1000",
]


@pytest.mark.parametrize("result", NO_BOXES)
def test_what_a_plugged_function_returns_is_checked(tmp_path, result):
    path = grounder(tmp_path, f"def boxes(image, description):\n    return {result}\n")
    message = r"boxes\(\) of .*mine.py returned .*, not a list of at most 256 \(x1, y1, x2, y2\)"
    with pytest.raises(BadInput, match=message):
        plugged(path)([blank()], ["dog"])


def test_what_cannot_be_plugged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of a grounder: .*none.py"):
        plugged(str(tmp_path / "none.py"))
    other = grounder(tmp_path, "def ground(): pass\n")
    wanted = r"no function boxes\(image, description\) or masks\(image, description\) in: .*mine.py"
    with pytest.raises(BadInput, match=wanted):
        plugged(other)
    text = grounder(tmp_path, "", "mine.txt")
    with pytest.raises(BadInput, match="not a Python file: .*mine.txt"):
        plugged(text)


# ---- the names of System 2 -------------------------------------------------------------------------
def by_name(name, systems, dtype=torch.float32, device="cpu"):
    return load_system2(name, systems.policy, systems.processor, dtype, device)


def test_the_policy_grounds(systems, monkeypatch):
    asked = watch_prompts(systems.policy, monkeypatch)
    pictures = [toy_clip("test", 0).frames[0]]
    boxes = by_name("policy", systems)(pictures, [RED])
    # The policy itself is asked, not a copy of it.
    assert asked == [1]
    assert boxes == systems.system2(pictures, [RED])


def test_another_thinker_grounds(systems, monkeypatch):
    asked = watch_prompts(systems.policy, monkeypatch)
    pictures = [toy_clip("test", 0).frames[0]]
    boxes = by_name(f"reference {TOY_POLICY}", systems)(pictures, [RED])
    assert asked == []
    assert boxes == systems.system2(pictures, [RED])


def test_another_thinker_is_loaded_as_the_policy_is(systems, monkeypatch, tmp_path):
    loaded = []

    def from_pretrained(*arguments):
        loaded.append(arguments)

    monkeypatch.setattr(Thinker, "from_pretrained", from_pretrained)
    folder = tmp_path / "some where"
    shutil.copytree(TOY_POLICY, folder)
    by_name(f"reference {folder}", systems, torch.bfloat16, "cuda:1")
    assert loaded == [(str(folder), torch.bfloat16, "cuda:1")]


def test_a_file_grounds(systems, monkeypatch, tmp_path):
    asked = watch_prompts(systems.policy, monkeypatch)
    system2 = by_name(grounder(tmp_path, LEFT_HALF), systems)
    boxes, = system2([blank()], ["dog"])
    assert boxes == [(0.0, 0.0, 20.0, 29.0)]
    assert asked == []


@pytest.mark.parametrize("name", ["somebody", "", "reference", "policy DIR", "Policy"])
def test_other_names_of_system2_are_refused(systems, name):
    with pytest.raises(BadInput) as caught:
        by_name(name, systems)
    assert str(caught.value) == f"--system2 {name}: must be policy, reference DIR, or FILE.py"


def test_a_system2_that_is_missing_is_named(systems, tmp_path):
    missing = tmp_path / "nowhere"
    for name in (f"reference {missing}", f"{missing}.py"):
        with naming(missing, FileNotFoundError):
            by_name(name, systems)


# ---- grounding -------------------------------------------------------------------------------------
def numbered_clip(name, read):
    """Four frames of one colour each. `read` gets (name, t) of those that are read."""
    def picture(t):
        read.append((name, t))
        return Image.new("RGB", (16, 16), f"rgb({t}, {t}, {t})")
    return Clip(name, Frames(picture, range(4)), "it")


def test_equal_requests_are_asked_once():
    calls = []

    def system2(pictures, descriptions):
        calls.append((pictures, descriptions))
        # Any function will do: its answers are not looked into.
        return [f"answer {i}" for i in range(len(pictures))]

    read = []
    clips = [numbered_clip("a", read), numbered_clip("b", read)]
    # A clip has looked for its size.
    read.clear()
    of_a = [{0: RED}, {3: BLUE, 0: RED}, {}, {0: BLUE}]
    of_b = [{0: RED}, {}, {0: RED}]
    boxes_of_a, boxes_of_b = ground(system2, clips, [of_a, of_b])

    (pictures, descriptions), = calls
    assert descriptions == [RED, BLUE, BLUE, RED]
    levels = [picture.getpixel((0, 0)) for picture in pictures]
    assert levels == [(0, 0, 0), (3, 3, 3), (0, 0, 0), (0, 0, 0)]
    # Requests of one frame share the picture, which is read once.
    assert pictures[0] is pictures[2]
    assert pictures[0] is not pictures[3]
    assert read == [("a", 0), ("a", 3), ("b", 0)]
    assert boxes_of_a[0] == {0: "answer 0"}
    assert boxes_of_a[1] == {3: "answer 1", 0: "answer 0"}
    assert boxes_of_a[2:] == [{}, {0: "answer 2"}]
    assert boxes_of_b == [{0: "answer 3"}, {}, {0: "answer 3"}]
    # In the order in which the completion names its frames.
    assert list(boxes_of_a[1]) == [3, 0]


def test_nobody_is_asked_for_nothing():
    clips = [toy_clip("test", 0), toy_clip("test", 1)]
    nothing = [[{}, {}], []]
    assert ground(refuse, clips, nothing) == nothing


def test_shipped_thinker_grounds_visible_things_by_name(systems):
    rng = np.random.default_rng(1)
    clips = []
    chosen = []
    true = []
    for index in range(1000, 1040):
        scene = toy_scene("test", index)
        clip = toy_clip("test", index)
        t = int(rng.integers(len(scene.pictures)))
        masks = scene.masks[:, t]
        for thing, mask in zip(scene.things, masks):
            if mask.sum() >= 30:
                clips.append(clip)
                chosen.append([{t: thing.name}])
                true.append(mask_box(mask))
    grounded = ground(systems.system2, clips, chosen)
    ious = []
    for (frames,), box in zip(grounded, true):
        boxes, = frames.values()
        iou = 0
        if boxes:
            iou = box_iou(boxes, [box])[0, 0]
        ious.append(iou)
    assert np.mean(ious) >= 0.8


def test_a_thinker_answers_each_of_the_equal_questions(systems, monkeypatch):
    generate = systems.policy.generate
    asked = watch_prompts(systems.policy, monkeypatch)
    clips = [toy_clip("test", 0), toy_clip("test", 1)]
    of_first = [{0: RED}, {0: RED, 3: BLUE}, {}]
    of_second = [{0: RED}, {}, {}]
    boxes_of_first, boxes_of_second = ground(systems.system2, clips, [of_first, of_second])
    assert asked == [3]
    assert [list(frames) for frames in boxes_of_first] == [[0], [0, 3], []]
    assert [list(frames) for frames in boxes_of_second] == [[0], [], []]
    one, both, _ = boxes_of_first
    assert one[0] == both[0]

    processor = systems.processor
    alone = processor.image_inputs(grounding_prompt(BLUE), clips[0].frames[3])
    prompts = systems.policy.embed([alone])
    group, = generate(prompts, 1, 128, eos_ids=processor.eos_ids, temperature=0.0)
    assert both[3] == parse_boxes(processor.decode(group[0]))


def test_a_thinker_sees_a_picture_once_whatever_is_asked(systems, monkeypatch):
    patches = []
    embed = systems.policy.embed

    def watched(inputs):
        patches.extend(item.patches for item in inputs)
        return embed(inputs)

    monkeypatch.setattr(systems.policy, "embed", watched)
    first = toy_clip("test", 0).frames[0]
    second = toy_clip("test", 1).frames[0]
    boxes = systems.system2([first, second, first], [RED, RED, BLUE])
    assert patches[0] is patches[2]
    assert patches[0] is not patches[1]
    alone = systems.system2([first], [BLUE])
    assert boxes[2] == alone[0]


def test_boxes_are_mapped_back_with_their_own_scale_and_stay_in_the_picture():
    size = (100, 200)
    box = to_source((10, 20, 30, 40), (2.0, 3.0), size)
    assert box == (20, 60, 60, 99)
    box = to_source((-5, 0, 1e6, 10), (1.0, 1.0), size)
    assert box == (0, 0, 199, 10)


def test_boxes_of_a_thinker_are_mapped_to_source_pixels(systems):
    thinker = says('[{"bbox_2d": [10, 20, 30, 40]}, {"bbox_2d": [100, 0, 128, 128]}]', systems.processor)
    system2 = thinker_system2(thinker, systems.processor)
    # At most 64 tokens of 16 x 16 pixels: the first is shown at half its size, the second as it is.
    pictures = [blank(256, 256), blank(128, 128)]
    halved, whole = system2(pictures, [RED, RED])
    assert halved == [(20, 40, 60, 80), (200, 0, 255, 255)]
    assert whole == [(10, 20, 30, 40), (100, 0, 127, 127)]


# ---- SAM2 against its own predictor ----------------------------------------------------------------
SAM2 = (str(ROOT / "toy/sam2/config.yaml"), TOY_SAM2)

# For each object where it is prompted: (thing of the scene, frame). The thing does not matter here, but how
# often and when.
PROMPTS = [
    [(0, 0)],
    [(0, 3)],
    [(1, 3)],
    [(1, 7)],
    [(0, 2), (0, 5)],
    [(1, 0), (1, 6)],
    [(0, 1), (1, 4), (0, 6)],
]


def toy_prompts(index, split="test", T=8):
    """A held-out scene's frames and objects {frame: (x1, y1, x2, y2) in pixels}, prompted early, late and
    several times. Boxes of empty masks are guesses."""
    scene = toy_scene(split, index)
    pictures = scene.pictures[:T]
    objects = []
    for prompts in PROMPTS:
        boxes = {}
        for thing, t in prompts:
            ys, xs = np.nonzero(scene.masks[thing, t])
            boxes[t] = (30.5, 40, 61, 70.25)
            if len(xs):
                boxes[t] = (xs.min(), ys.min(), xs.max(), ys.max())
        objects.append(boxes)
    pictures = [Image.fromarray(pixels) for pixels in pictures]
    frames = Frames(pictures.__getitem__, range(len(pictures)))
    return frames, objects


def stretched(objects, x=1.0, y=1.0):
    """Objects with scaled boxes, as arrays. Masks stay as they are."""
    scaled = []
    for boxes in objects:
        own = {}
        for t, box in boxes.items():
            own[t] = box if isinstance(box, Mask) else np.array(box) * (x, y, x, y)
        scaled.append(own)
    return scaled


def widened(frames, objects):
    """Frames of 320 x 192 pixels in place of 128 x 128, and the objects on them."""
    pictures = [frames[t].resize((320, 192)) for t in range(len(frames))]
    wide = Frames(pictures.__getitem__, range(len(frames)))
    return wide, stretched(objects, 2.5, 1.5)


def predictor_logits(model, frames, objects, folder, monkeypatch):
    """Slow twin: SAM2's own video predictor, one object after the other -> [N, T, H, W]."""
    for t in range(len(frames)):
        # It insists on the name, not on the format.
        frames[t].save(folder / f"{t:05d}.jpg", format="png")
    # It rounds memories to bf16 and then counts on autocast. Both ways are compared in float32 here.
    in_float32 = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    monkeypatch.setattr(sam2_video_predictor, "torch", in_float32)
    state = model.init_state(str(folder))
    for n, boxes in enumerate(objects):
        for t, box in boxes.items():
            if isinstance(box, Mask):
                model.add_new_mask(state, frame_idx=t, obj_id=n, mask=torch.from_numpy(box.pixels))
            else:
                box = np.array(box, np.float32)
                model.add_new_points_or_box(state, frame_idx=t, obj_id=n, box=box)
    of_frames = []
    for _, _, logits in model.propagate_in_video(state, start_frame_idx=0):
        of_frames.append(logits[:, 0])
    return torch.stack(of_frames, dim=1)


@torch.inference_mode()
def tracker_logits(tracker, clips):
    """What `track_clips` cuts at 0, for each clip (frames, objects) -> [N, T, S, S].

    Toy frames have the size that the toy model sees, so boxes need no scaling.
    """
    owner = []
    boxes = []
    lengths = []
    for c, (frames, objects) in enumerate(clips):
        owner += [c] * len(objects)
        boxes += stretched(objects)
        lengths += [len(frames)] * len(objects)
    videos = [frames for frames, _ in clips]
    features = FrameFeatures(tracker, videos, owner, boxes)
    of_clips = [[] for _ in clips]
    for t, (logits, _) in enumerate(tracker.run(features, boxes, lengths)):
        # Objects whose clip has a frame t, in the order of the clips.
        present = [c for c, T in zip(owner, lengths) if T > t]
        assert len(logits) == len(present)
        for c in sorted(set(present)):
            rows = [n for n, clip in enumerate(present) if clip == c]
            of_clips[c].append(logits[rows])

    size = (tracker.side, tracker.side)
    results = []
    for video, of_frames in zip(videos, of_clips):
        assert len(of_frames) == len(video)
        logits = torch.stack(of_frames, dim=1)
        results.append(F.interpolate(logits, size, mode="bilinear"))
    return results


def assert_same_masks(a, b):
    """Masks [N, T, H, W] agree: for each object an IoU above 0.99 over all frames at once."""
    assert a.shape == b.shape
    for one, other in zip(a, b):
        union = (one | other).sum()
        common = (one & other).sum()
        assert union == 0 or common / union > 0.99


def assert_same_logits(a, b):
    """A wrong time code moves the logits by 1e-3 only, far too little for the masks to show it."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("index, split, T", [
    (0, "test", 8),
    (2, "long", 20),
])
def test_tracker_equals_the_predictor(tracker, tmp_path, monkeypatch, index, split, T):
    frames, objects = toy_prompts(index, split, T)
    slow = predictor_logits(tracker.model, frames, objects, tmp_path, monkeypatch)
    assert slow.shape[:2] == (len(PROMPTS), len(frames))
    found, = tracker_logits(tracker, [(frames, objects)])
    assert_same_logits(found, slow)
    masks = tracker.track(frames, objects)
    assert masks.any()
    assert_same_masks(masks, slow.numpy() > 0)


def resized(mask, height, width):
    """A mask [H, W] in another size, by nearest pixels."""
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return mask[rows][:, columns]


# Sizes of masks: that of the model, two above, two below, one of another shape. A mask of one pixel among
# many is empty once it is resized.
SIZES = [(128, 128), (720, 1280), (300, 300), (32, 32), (7, 20), (90, 400)]


def mask_prompts(index, split="test", T=8):
    """Frames, and objects with masks alone, with masks and boxes, and with empty masks."""
    frames, boxed = toy_prompts(index, split, T)
    scene = toy_scene(split, index)
    masked = []
    mixed = []
    for n, (prompts, boxes) in enumerate(zip(PROMPTS, boxed)):
        masks = {}
        for k, (thing, t) in enumerate(prompts):
            height, width = SIZES[(n + k) % len(SIZES)]
            mask = scene.masks[thing, t].copy()
            if not mask.any():
                mask[40:71, 30:62] = True
            masks[t] = Mask.of(resized(mask, height, width))
        masked.append(masks)
        # Of several frames, each one in turn keeps its box.
        for t in masks:
            if len(masks) > 1:
                mixed.append(masks | {t: boxes[t]})
    nothing = Mask.of(np.zeros((50, 60), bool))
    dot = np.zeros((720, 1280), bool)
    dot[300, 400] = True
    empty = [{0: nothing}, {2: nothing, 4: masked[0][0]}, {3: Mask.of(dot)}, {5: nothing, 1: boxed[0][0]}]
    return frames, masked[::2] + mixed + boxed[:1] + empty


def count_masks(objects):
    return sum(isinstance(prompt, Mask) for prompts in objects for prompt in prompts.values())


@pytest.mark.parametrize("index, split, T, every", [
    (0, "test", 8, 1),
    (1, "long", 20, 3),
])
def test_masks_as_prompts_equal_the_predictor(tracker, tmp_path, monkeypatch, index, split, T, every):
    frames, objects = mask_prompts(index, split, T)
    objects = objects[::every]
    slow = predictor_logits(tracker.model, frames, objects, tmp_path, monkeypatch)
    found, = tracker_logits(tracker, [(frames, objects)])
    assert_same_logits(found, slow)
    assert (found > 0).any()
    assert count_masks(objects) >= 16 / every


def test_an_empty_mask_says_that_the_object_is_not_there(tracker):
    """So does a dot that is nothing once it is resized."""
    frames, objects = mask_prompts(0)
    nothing, later, dot, _ = objects[-4:]
    masks = tracker.track(frames, [nothing, later, dot])
    assert not masks[0, 0].any()
    assert not masks[1, 2].any() and masks[1, 4].any()
    assert not masks[2, 3].any()


def test_masks_of_several_clips_are_tracked_as_each_alone(tracker, monkeypatch):
    monkeypatch.setattr(segment_program, "OBJECTS_AT_ONCE", 3)
    frames, objects = mask_prompts(3, T=4)
    objects = [prompts for prompts in objects if max(prompts) < 4]
    longer, others = mask_prompts(4)
    # A wide picture takes the same masks: they are resized to the square that SAM2 sees.
    wide, _ = widened(frames, [])
    clips = [(frames, objects, None), (longer, others[4:8], None), (wide, objects[:2], None)]
    together = tracker.track_clips(clips)
    for clip, masks in zip(clips, together):
        assert_same_masks(masks, tracker.track(*clip))
    assert together[2].shape[2:] == (192, 320)
    assert together[2].mean() == pytest.approx(together[0][:2].mean(), rel=0.1)


def test_masks_and_boxes_go_together_in_half_precision(tracker):
    """As on a GPU, where SAM2 runs by autocast: both kinds of prompts give tensors that go together."""
    frames, objects = mask_prompts(0)
    objects = objects[::2]
    owner = [0] * len(objects)
    boxes = stretched(objects)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = FrameFeatures(tracker, [frames], owner, boxes)
        steps = list(tracker.run(features, boxes, [len(frames)] * len(objects)))
    exact, = tracker_logits(tracker, [(frames, objects)])
    size = (tracker.side, tracker.side)
    logits = torch.stack([logits for logits, _ in steps], dim=1)
    found = F.interpolate(logits.float(), size, mode="bilinear")
    both = (found > 0) & (exact > 0)
    either = (found > 0) | (exact > 0)
    assert both.sum() / either.sum() > 0.9


def test_objects_do_not_see_each_other(tracker, monkeypatch):
    frames, objects = toy_prompts(2)
    together = tracker.track(frames, objects)
    # Another order, one twice, some missing.
    order = [4, 2, 6, 0, 2]
    others = [objects[n] for n in order]
    assert_same_masks(tracker.track(frames, others), together[order])
    monkeypatch.setattr(segment_program, "OBJECTS_AT_ONCE", 2)
    monkeypatch.setattr(segment_program, "FRAMES_AT_ONCE", 3)
    assert_same_masks(tracker.track(frames, objects), together)


def test_clips_of_several_lengths_and_sizes_are_tracked_together_as_each_alone(tracker):
    nothing, _ = toy_prompts(5)
    frames, objects = toy_prompts(6)
    wide = widened(frames, objects[:2])
    unions = [[0], [1, 2], []]
    clips = [
        (*toy_prompts(3), None),
        (*toy_prompts(4, "long", 12), unions),
        (nothing, [], None),
        (*wide, None),
    ]
    for clip, masks in zip(clips, tracker.track_clips(clips)):
        assert_same_masks(masks, tracker.track(*clip))


def test_lengths_of_other_clips_are_out_of_the_code_of_time(tracker):
    clips = [toy_prompts(5), toy_prompts(6, "long", 12)]
    for clip, together in zip(clips, tracker_logits(tracker, clips)):
        alone, = tracker_logits(tracker, [clip])
        assert_same_logits(together, alone)


def test_masks_have_the_size_of_the_source(tracker):
    frames, objects = toy_prompts(3)
    wide, wide_objects = widened(frames, objects)
    masks = tracker.track(wide, wide_objects)
    T = len(frames)
    assert masks.shape == (len(objects), T, 192, 320)
    assert masks.dtype == bool
    nothing = tracker.track(wide, [])
    assert nothing.shape == (0, T, 192, 320)
    narrow = tracker.track(frames, objects)
    assert masks.mean() == pytest.approx(narrow.mean(), rel=0.1)


def test_gradients_reach_the_prompt_through_memory(tracker):
    side = tracker.side
    pictures = torch.randn(3, 3, side, side, requires_grad=True)
    levels = tracker.encode(pictures)

    def features(objects, times):
        return [level[list(times)] for level in levels]

    # Frame 0 of an object that is prompted on frame 2.
    prompts = {2: np.array([20, 20, 60, 60])}
    _, scores = next(tracker.run(features, [prompts], [3]))
    scores.sum().backward()
    assert pictures.grad[0].any()
    assert pictures.grad[2].any()
    assert not pictures.grad[1].any()


BOX = (1, 1, 9, 9)


@pytest.mark.parametrize("objects", [
    [{0: BOX}, {}],
    [{99: BOX}],
    [{-1: BOX}],
])
def test_prompts_off_the_clip_are_refused(tracker, objects):
    frames, _ = toy_prompts(0)
    with pytest.raises(ValueError, match=rf"object {len(objects) - 1} needs boxes on frames 0 to 7"):
        tracker.track(frames, objects)


# ---- files of SAM2 ---------------------------------------------------------------------------------
def refused(kind, message, config, weights):
    with pytest.raises(kind, match=message) as caught:
        Tracker.from_pretrained(config, weights)
    assert "\n" not in str(caught.value)


def test_wrong_configs_are_named(tmp_path):
    config, weights = SAM2
    message = "no such SAM2 config: sam2.1_hiera_xl .*sam2.1_hiera_l"
    refused(FileNotFoundError, message, "sam2.1_hiera_xl", weights)
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {image_size: 128}")
    refused(BadInput, "not a SAM2 config.*bad.yaml", bad, weights)
    with pytest.raises(BadInput, match="not a SAM 2.1 model, it differs in: add_tpos_enc"):
        Tracker(build_sam2("configs/sam2/sam2_hiera_t.yaml"))


def test_missing_weights_are_named(tmp_path):
    config, _ = SAM2
    message = "no such file of SAM2 weights: .*none.pt"
    refused(FileNotFoundError, message, config, tmp_path / "none.pt")


WRONG_WEIGHTS = dict(
    other={"model": {"image_encoder.weight": torch.zeros(1)}},
    tensor=torch.zeros(3),
    scalar=torch.tensor(1.0),
    numbered={"model": {1: 2}},
    listed={"model": [1]},
    torn=b"PK torn",
)


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_are_named(tmp_path, name):
    config, _ = SAM2
    path = tmp_path / f"{name}.pt"
    content = WRONG_WEIGHTS[name]
    if name == "torn":
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(BadInput, f"not the SAM2 weights of config .*{name}.pt", config, path)


def test_the_config_is_found_by_the_weights():
    assert find_config(TOY_SAM2) == SAM2[0]
    assert find_config("weights/sam2.1_hiera_tiny.pt") == "sam2.1_hiera_t"
    assert find_config("weights/sam2.1_hiera_base_plus.pt") == "sam2.1_hiera_b+"
    assert find_config("weights/sam2.1_hiera_large.pt") == "sam2.1_hiera_l"
    assert find_config("weights/mine.pt") == "mine"


# ---- frame by frame --------------------------------------------------------------------------------
def test_following_gives_the_masks_of_all_clips_in_order_of_time(tracker):
    nothing, _ = toy_prompts(5)
    clips = [
        (*toy_prompts(3), None),
        (nothing, [], [[]]),
        (*toy_prompts(4, "long", 12), [[0], [1, 2], []]),
    ]
    whole = tracker.track_clips(clips)
    order = []
    for c, t, masks in tracker.follow(clips):
        order.append((t, c))
        assert np.array_equal(masks.numpy(), whole[c][:, t])
    assert order == sorted(order)
    assert len(order) == sum(len(frames) for frames, _, _ in clips)
    assert whole[0].any()
    assert whole[1].shape == (1, 8, 128, 128)
    assert not whole[1].any()
    assert tracker.track_clips([]) == []


def test_following_reads_a_few_frames_ahead_and_keeps_none(tracker):
    frames, _ = toy_prompts(4, "long", 12)
    kept = []    # weak references to pictures, in the order of reading

    def read(t):
        picture = frames[t].copy()
        kept.append(weakref.ref(picture))
        return picture

    watched = Frames(read, range(len(frames)))
    request = watched, [{1: (30, 40, 61, 70)}], None
    for _, t, _ in tracker.follow([request]):
        ahead = len(kept) - t
        # The size, the prompted frame, and those that are encoded together.
        assert ahead <= 2 + segment_program.FRAMES_AT_ONCE
        assert not any(picture() for picture in kept)


def test_whoever_follows_is_not_inside_the_modes_of_sam2(tracker):
    frames, objects = toy_prompts(0)
    for _ in tracker.follow([(frames, objects, None)]):
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled(tracker.model.device.type)


# ---- both systems on clips -------------------------------------------------------------------------
def test_a_groups_masks_are_those_of_one_call_per_completion(systems):
    clip = toy_clip("test", 2)
    true = {}
    for t, mask in enumerate(clip.masks[0]):
        box = mask_box(mask)
        if box:
            true[t] = [tuple(map(float, box))]
    a, b, c, *_ = true
    guess = (5.0, 5.0, 40.0, 40.0)
    boxes = [
        {a: true[a]},
        {t: true[t] for t in (a, b, c)},
        {},
        {b: [guess, *true[b]]},
    ]
    together, = track_groups(systems.tracker, [clip], [boxes])
    assert together[0].any()
    assert not together[2].any()
    for completion, masks in zip(boxes, together):
        ((alone,),) = track_groups(systems.tracker, [clip], [[completion]])
        common = (alone & masks).sum()
        assert common >= 0.99 * (alone | masks).sum()


def test_j_of_groups_is_exactly_that_of_their_masks(systems):
    clips = [toy_clip("test", 2), toy_clip("test", 3), toy_clip("test", 5)]
    # Nothing is to be seen in the second; in the third, nobody finds anything.
    clips[1] = replace(clips[1], masks=clips[1].masks[:0])
    box = (5.0, 5.0, 40.0, 40.0)
    seen = [t for t, mask in enumerate(clips[0].masks[0]) if mask.any()]
    true = mask_box(clips[0].masks[0, seen[0]])
    boxes = [
        [{seen[0]: [true]}, {seen[0]: [box, true], seen[2]: [box]}, {}],
        [{1: [box]}, {}, {}],
        [{}, {}],
    ]
    masks = track_groups(systems.tracker, clips, boxes)
    similarity = track_similarity(systems.tracker, clips, boxes)
    for clip, group, of_group in zip(clips, masks, similarity, strict=True):
        assert of_group.dtype == np.float64
        assert of_group.flags.c_contiguous
        for completion, J in zip(group, of_group, strict=True):
            assert np.array_equal(J, region_similarity(completion, clip.masks.any(0)))
    assert len(np.unique(similarity[0])) > 8
    assert (similarity[1][1:] == 1).all()


def test_unions_cover_what_any_of_their_objects_covers():
    logits = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    unions = [[0, 3], [], [4, 1, 2], [3]]
    alone = union_masks(logits, None, (30, 20))
    together = union_masks(logits, unions, (30, 20))
    assert alone.shape == (5, 20, 30)
    assert alone.dtype == together.dtype == torch.bool
    for union, mask in zip(unions, together, strict=True):
        assert torch.equal(mask, alone[union].any(0))
    assert union_masks(logits[:0], [[], []], (30, 20)).shape == (2, 20, 30)


def test_pictures_are_normalised_as_sam2_does_it(tracker):
    """By its own predictor, bit for bit. Only bytes go to the device."""
    pictures = [noise_picture(50, 40, seed) for seed in range(3)]
    seen = []
    watched = SimpleNamespace(side=tracker.side, mean=tracker.mean, std=tracker.std, model=tracker.model)

    def encode(normalised):
        seen.append(normalised)
        return [normalised] * 3

    watched.encode = encode
    FrameFeatures(watched, [pictures], [0, 0], [{0: None, 2: None}, {2: None}])
    normalised, = seen
    for t, picture in zip((0, 2), normalised, strict=True):
        pixels = np.array(pictures[t].resize((tracker.side, tracker.side))) / 255.0
        expected = torch.from_numpy(pixels).permute(2, 0, 1).float()
        expected -= torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        expected /= torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        assert torch.equal(picture, expected)
    assert segment_program.square_picture(pictures[0], 16).dtype == torch.uint8


def moment(time, description):
    moments = [dict(start_time=time, end_time=time, description=description)]
    return f"<think>why</think>\n<answer>{json.dumps(moments)}</answer>"


class AnyTracker:
    """Stands for SAM2: every object is all of the picture on all frames. Keeps what it is asked."""

    def track_clips(self, requests):
        self.requests = requests
        masks = []
        for frames, _, unions in requests:
            width, height = frames[0].size
            whole = np.ones((len(frames), height, width), bool)
            masks.append([whole if union else ~whole for union in unions])
        return masks


def test_keyframes_are_those_of_the_source_where_few_frames_are_shown(systems):
    """Of 11 frames System 1 sees 0, 5 and 10, at 0, 0.5 and 1 s: clips of System 1 have 2 frames a second."""
    clip = toy_clip("test", 2)
    assert len(clip.frames) == 11
    asked = []
    box = (1.0, 2.0, 3.0, 4.0)

    def system2(pictures, descriptions):
        asked.extend(zip(pictures, descriptions))
        return [[box]]

    processor = systems.processor
    tracker = AnyTracker()
    text = moment("00:00.50", RED)
    policy = says(text, processor)
    result, = segment(policy, system2, processor, tracker, [clip], most_frames=3)
    assert result.text == text
    assert result.keyframes == {5: RED}
    assert result.boxes == {5: [box]}
    (picture, description), = asked
    assert description == RED
    assert np.array_equal(picture, clip.frames[5])
    # SAM2 sees all frames.
    (frames, objects, _), = tracker.requests
    assert len(frames) == 11
    assert objects == [{5: box}]
    assert result.masks.shape == clip.masks.shape[1:]
    assert result.masks.all()


def test_in_a_picture_system_1_draws_the_box_itself(systems):
    # Shown at half its size.
    frames = Frames([blank(256, 256)].__getitem__, [0])
    picture = Clip("p", frames, "the dog", task="image")
    processor = systems.processor
    tracker = AnyTracker()
    answer = '<answer>{"bbox_2d": [10, 20, 30, 40], "points_1": [15, 30], "points_2": [20, 35]}</answer>'
    result, = segment(says(answer, processor), refuse, processor, tracker, [picture])
    assert result.boxes == {0: [(20, 40, 60, 80)]}
    assert result.masks.shape == (1, 256, 256)
    assert result.masks.all()

    answer = "<answer>null</answer>"
    result, = segment(says(answer, processor), refuse, processor, tracker, [picture])
    assert result.boxes == {}
    assert not result.masks.any()


def test_clips_are_segmented_together_as_each_alone(systems):
    models = (systems.policy, systems.system2, systems.processor, systems.tracker)
    clips = [toy_clip("test", index) for index in (0, 2)]
    for clip, together in zip(clips, segment(*models, clips)):
        alone, = segment(*models, [clip])
        assert together.text == alone.text
        assert together.keyframes == alone.keyframes
        assert together.boxes == alone.boxes
        assert_same_masks(together.masks[None], alone.masks[None])


# ---- the program -----------------------------------------------------------------------------------
def run_segment(out, *arguments):
    """Runs segment.py -> its answer.json."""
    arguments = ["--device", "cpu", "--out", out, *arguments]
    segment_program.main([str(argument) for argument in arguments])
    text = (out / "answer.json").read_text()
    return json.loads(text)


def written_masks(out):
    """Names of the files of masks."""
    return sorted(path.name for path in (out / "masks").iterdir())


def test_segment_writes_masks_at_the_videos_own_size(tmp_path):
    clip = toy_clip("test", 5)
    video = tmp_path / "frames"
    video.mkdir()
    names = []
    for t in range(len(clip.frames)):
        names.append(f"{t:05d}.png")
        picture = clip.frames[t].resize((200, 150))
        picture.save(video / names[t])
    # Of an earlier, longer clip.
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    (out / "masks/00099.png").touch()
    answer = run_segment(out, "--video", video, "--query", clip.query)
    assert {"reasoning", "answer", "keyframes", "query"} <= set(answer)
    assert answer["query"] == clip.query
    assert written_masks(out) == names
    for name in names:
        assert Image.open(out / "masks" / name).size == (200, 150)
    assert Image.open(out / "overlay.webp").n_frames > 1


@pytest.fixture
def shown(monkeypatch):
    """A list that gets (view, inputs) of every clip that System 1 is shown."""
    prompts = []
    prompt_inputs = segment_program.prompt_inputs

    def watched(processor, clip):
        inputs = prompt_inputs(processor, clip)
        prompts.append((clip, inputs))
        return inputs

    monkeypatch.setattr(segment_program, "prompt_inputs", watched)
    return prompts


def test_a_file_grounds_for_the_program(tmp_path):
    path = grounder(tmp_path, LEFT_HALF)
    answer = run_segment(tmp_path / "out", "--index", 2, "--system2", path)
    assert answer["keyframes"]
    for keyframe in answer["keyframes"]:
        words = keyframe["description"].split()
        # A box a word.
        assert len(keyframe["boxes"]) == len(words)
        assert keyframe["boxes"][0] == [0.0, 0.0, 64.0, 127.0]
        assert keyframe["time"] == keyframe["frame"] / 2
    assert len(written_masks(tmp_path / "out")) == 11


def test_frames_and_tokens_of_a_frame_are_options(tmp_path, shown):
    """The toy's frames are 128 x 128 pixels, a token is 16 x 16, of 2 x 2 patches, and frames go in pairs."""
    run_segment(tmp_path / "own", "--index", 2)
    few = tmp_path / "few"
    run_segment(few, "--index", 2, "--frames", 3, "--video_tokens", 4)
    # SAM2 tracks through all frames all the same.
    assert len(written_masks(few)) == 11
    (own, own_inputs), (few, few_inputs) = shown
    assert len(own.frames) == 11
    assert own_inputs.grid.tolist() == [[6, 6, 6]]
    assert few.frames.indices == [0, 5, 10]
    assert few_inputs.grid.tolist() == [[2, 4, 4]]


def test_tokens_of_a_picture_are_an_option_of_system2(tmp_path, monkeypatch):
    """Pictures of 128 x 128 pixels: as they are, and at half their size."""
    grids = set()
    image_inputs = Processor.image_inputs

    def watched(self, *arguments, **options):
        inputs = image_inputs(self, *arguments, **options)
        grids.update(map(tuple, inputs.grid.tolist()))
        return inputs

    monkeypatch.setattr(Processor, "image_inputs", watched)
    run_segment(tmp_path / "own", "--index", 2)
    assert grids == {(1, 16, 16)}
    grids.clear()
    run_segment(tmp_path / "few", "--index", 2, "--image_tokens", 16)
    assert grids == {(1, 8, 8)}


# ---- what the program writes -----------------------------------------------------------------------
def small_clip(T=6, fps=2.0, width=40, height=30):
    return Clip("small", Frames(lambda t: blank(width, height), range(T)), "it", fps)


ANSWER = Answer("<think>why</think><answer>null</answer>", {}, {})


def full_masks(T=6, width=40, height=30):
    return [np.ones((height, width), bool)] * T


def test_an_answer_and_masks_are_on_disk_as_soon_as_they_are_known(tmp_path, capsys):
    out = tmp_path / "out"

    def masks():
        for t, mask in enumerate(full_masks()):
            assert json.loads((out / "answer.json").read_text())["reasoning"] == "why"
            assert len(written_masks(out)) == t
            yield mask

    assert write_results(str(out), small_clip(), ANSWER, masks()) == 6
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "frames/s" in shown


def test_only_what_an_earlier_clip_has_left_is_removed(tmp_path):
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_text("keep")
    old = ["masks/00099.png", "masks/123456.png", "masks/00007.png.partial"]
    others = ["masks/1.png", "masks/00001.jpg", "masks/00001.png.txt", "masks/a00001.png", "00099.png"]
    for name in old + others:
        (out / name).write_text("earlier")
    # A link is removed or replaced, never written through.
    (out / "masks/00002.png").symlink_to(elsewhere)
    write_results(str(out), small_clip(), ANSWER, full_masks())
    for name in old:
        assert not (out / name).exists()
    for name in others:
        assert (out / name).read_text() == "earlier"
    assert elsewhere.read_text() == "keep"
    assert Image.open(out / "masks/00002.png").getextrema() == (255, 255)


@pytest.mark.parametrize("name", ["answer.json", "masks/00003.png", "overlay.webp", "sheet.png"])
@pytest.mark.parametrize("wrong", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("encoder error -2"),
])
def test_a_full_disk_is_told_with_the_files_name_and_leaves_no_half_file(tmp_path, monkeypatch, name, wrong):
    out = tmp_path / "out"
    opened = results.whole_file

    @contextmanager
    def full(path):
        with opened(path) as unfinished:
            if path.endswith(name):
                with open(unfinished, "wb") as file:
                    file.write(b"half")
                raise wrong
            yield unfinished

    monkeypatch.setattr(results, "whole_file", full)
    with pytest.raises(OSError, match=f"cannot write .*{name} .*({wrong.strerror or wrong})"):
        write_results(str(out), small_clip(), ANSWER, full_masks())
    assert not (out / name).exists()
    assert not list(out.rglob("*.partial"))
    whole = sorted((out / "masks").iterdir())
    assert len(whole) == dict(a=0, m=3, o=6, s=6)[name[0]]
    for path in whole:
        Image.open(path).load()


def test_ctrl_c_keeps_the_masks_and_says_how_many(tmp_path, monkeypatch, capsys):
    def stopping(*_):
        for t, mask in enumerate(full_masks(11, 128, 128)):
            if t == 4:
                raise KeyboardInterrupt
            yield 0, t, mask

    monkeypatch.setattr(segment_program, "follow_answers", stopping)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run_segment(out, "--index", 2)
    assert stop.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped: 4 of 11 masks are in {out}/masks"
    assert len(written_masks(out)) == 4
    assert not (out / "overlay.webp").exists()


def durations(path):
    """Milliseconds of each picture of an animation."""
    image = Image.open(path)
    times = []
    for n in range(image.n_frames):
        image.seek(n)
        # Pictures are read on demand.
        image.load()
        times.append(image.info["duration"])
    return times


def test_an_animation_has_a_bounded_number_of_frames_and_lasts_as_long_as_the_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "MOST_PICTURES", 8)
    read = []

    def picture(t):
        read.append(t)
        # Equal pictures would be joined.
        return noise_picture(64, 48, t)

    clip = Clip("c", Frames(picture, range(50)), "it", 12.5)
    read.clear()
    answer = Answer("", {17: "a", 31: "b"}, {17: [BOX], 31: [BOX]})
    write_results(str(tmp_path), clip, answer, full_masks(50, 64, 48))
    assert len(read) == 8
    # Keyframes are among them.
    assert {0, 17, 31, 49} <= set(read)
    times = durations(tmp_path / "overlay.webp")
    assert len(times) == 8
    assert sum(times) == 4000
    assert times[-1] == 80


def test_an_animation_has_a_bounded_number_of_bytes(monkeypatch):
    frames = {t: noise_picture(96, 96, t) for t in range(16)}
    whole = animation(frames, 16, 4)
    monkeypatch.setattr(pictures, "LARGEST_FILE", len(whole) // 3)
    fewer = animation(frames, 16, 4)
    assert len(fewer) <= len(whole) // 3
    times = durations(io.BytesIO(fewer))
    assert len(times) == 4
    assert sum(times) == 4000


@pytest.mark.parametrize("size, shown", [
    ((40, 30), (400, 300)),
    ((500, 400), (500, 400)),
    ((1920, 1080), (640, 360)),
    ((5000, 2), (640, 1)),
])
def test_pictures_of_an_animation_have_a_bounded_size(size, shown):
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[:, :width // 2] = True
    drawn = overlay(blank(*size), mask, [(1, 0, 1, 0), (0, 0, width - 1, height - 1)])
    assert drawn.size == shown


# Segments T frames of 720p, for each T. Somebody else has answered. Prints the peak after each, in GB.
LONG = """
import resource, sys
import torch
from PIL import Image
torch.set_num_threads(1)
from benchmarks import results
from data import Clip, Frames
from segment import Answer, Tracker, follow_answers
from trust.options import TOY_SAM2

out, results.MOST_PICTURES, *lengths = sys.argv[1], *map(int, sys.argv[2:])
tracker = Tracker.from_pretrained(None, TOY_SAM2)

def picture(t):
    return Image.new("RGB", (1280, 720), (t % 256, 90, 90))

for T in lengths:
    clip = Clip("long", Frames(picture, range(T)), "it", 24.0)
    answer = Answer("", {5: "it"}, {5: [(400.0, 200.0, 700.0, 500.0)]})
    masks = follow_answers(tracker, [clip], [answer])
    results.write_results(out, clip, answer, (mask for _, _, mask in masks))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def peaks(out, most_pictures, *lengths) -> list[float]:
    """GB that a process takes for clips of these lengths, one after the other."""
    command = [sys.executable, "-c", LONG, out, most_pictures, *lengths]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(written_masks(out)) == lengths[-1]
    return [float(line) for line in done.stdout.splitlines()]


def test_memory_does_not_grow_with_the_video(tmp_path):
    """A mask of 720p has 0.9 MB, its frame 2.8 MB."""
    short, long = peaks(tmp_path, 8, 12, 48)
    assert long - short < 0.04


@pytest.mark.slow
def test_ten_minutes_of_720p_fit_into_2_gb(tmp_path):
    peak, = peaks(tmp_path, results.MOST_PICTURES, 14_400)
    assert peak < 2
    assert (tmp_path / "overlay.webp").stat().st_size <= pictures.LARGEST_FILE
    assert sum(durations(tmp_path / "overlay.webp")) == pytest.approx(600_000, abs=1000)


def test_a_sheet_shows_the_keyframes_and_then_evenly_spaced_frames():
    pictures = {t: Image.new("RGB", (80, 60), (t, 0, 0)) for t in range(30)}
    sheet = results.sheet(pictures, {7: [], 29: []}, 2.0)
    assert sheet.size == (4 * 88 - 8, 4 * 68 - 8)
    places = [(40 + 88 * x, 20 + 68 * y) for y in range(4) for x in range(4)]
    reds = [sheet.getpixel(place) for place in places]
    assert reds[:2] == [(7, 0, 0), (29, 0, 0)] and reds[2:4] == [(255, 255, 255)] * 2
    assert [red for red, _, _ in reds[4:]] == spread(30, 12)


def test_a_folder_of_videos_is_done_one_by_one(tmp_path, capsys):
    frame = jpeg(Image.new("RGB", (64, 48)))
    (tmp_path / "in").mkdir()
    for name in ("b.avi", "a.avi"):
        write_avi(tmp_path / "in" / name, (64, 48), [frame] * 3, 2)
    (tmp_path / "in/broken.mp4").write_bytes(b"no video")
    (tmp_path / "in/notes.txt").write_text("no video")
    folder = str(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        segment_program.main(["--video", str(tmp_path / "in"), "--query", "the red circle", "--out", folder])
    assert stop.value.code == 2
    for name in ("a.avi", "b.avi"):
        assert (tmp_path / "out" / name / "sheet.png").exists()
        assert len(written_masks(tmp_path / "out" / name)) == 3
    out, err = capsys.readouterr()
    assert out.index("a.avi/answer.json") < out.index("b.avi/answer.json") and "<think>" in out
    assert "no masks: " in err and "broken.mp4" in err
    assert "error: 1 of 3 videos have no masks" in err


def test_a_folder_of_frames_is_one_video(tmp_path):
    for name in ("0.png", "extra.mp4", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"")
    assert results.listed_videos(str(tmp_path), "out") == [(str(tmp_path), "out")]
    assert results.listed_videos(None, "out") == [(None, "out")]
