"""Trains the toy's SAM2 from nothing: what a box means on stills, then to find a thing again.

Letters: B stretches, T frames, O objects of a stretch, N objects of a batch, H W pixels, K kinds of things.
"""
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sam2
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from benchmarks.metrics import boundary_accuracy
from benchmarks.toy import toy_scene
from rewards import region_similarity
from segment import MEAN, STD, Tracker
from toy.lessons import KINDS
from toy.optimizers import ramp
from trust.masks import mask_box
from trust.sam2_config import build_sam2

SIDE = 128      # pixels of the square picture
WIDTH = 96      # of the features
MEMORY = 32     # width of the memory
CELLS = 8       # places a side of the top features, of 16 x 16 pixels
# (steps, frames, clips a step): what a box means on stills, then to find an object again on another frame.
STAGES = ((450, 1, 16), (900, 2, 10))


def small_config():
    """SAM 2.1 tiny, made much smaller: the same parts, one mask per object instead of a choice of three."""
    config = OmegaConf.load(Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml")
    attention = {"embedding_dim": WIDTH, "feat_sizes": [SIDE // 16] * 2}
    trunk = {
        "embed_dim": 24,
        "stages": [1, 1, 2, 1],
        "global_att_blocks": [3],
        "window_spec": [8, 4, 8, 4],
    }
    neck = {
        "d_model": WIDTH,
        "backbone_channel_list": [192, 96, 48, 24],
        "position_encoding": {"num_pos_feats": WIDTH},
    }
    memory_layer = {
        "d_model": WIDTH,
        "dim_feedforward": 3 * WIDTH,
        "self_attention": attention,
        "cross_attention": {**attention, "kv_in_dim": MEMORY},
    }
    memory_encoder = {
        "in_dim": WIDTH,
        "out_dim": MEMORY,
        "position_encoding": {"num_pos_feats": MEMORY},
        "mask_downsampler": {"embed_dim": WIDTH},
        "fuser": {"num_layers": 1, "layer": {"dim": WIDTH}},
    }
    model = {
        "image_size": SIDE,
        "num_maskmem": 4,
        "multimask_output_in_sam": False,
        "sam_mask_decoder_extra_args": {"dynamic_multimask_via_stability": False},
        "image_encoder": {"trunk": trunk, "neck": neck},
        "memory_attention": {"d_model": WIDTH, "num_layers": 2, "layer": memory_layer},
        "memory_encoder": memory_encoder,
    }
    return OmegaConf.merge(config, {"model": model})


@dataclass
class Stretch:
    """Evenly spaced frames of one scene, maybe backwards or mirrored, and up to three objects in them."""
    pictures: np.ndarray      # uint8 [T, H, W, 3]
    masks: np.ndarray         # bool [O, T, H, W]
    boxes: list               # O dicts {frame: box}: on one frame, now and then two, up to 3 pixels off
    kinds: list               # O indices into KINDS
    cells: np.ndarray         # bool [O, T, 8, 8]: the object covers a good part of that place
    shown: np.ndarray         # float [T, K, 8, 8]: the same for every kind in the scene


def draw_stretch(rng, scenes, frames) -> Stretch:
    """A stretch of `frames` frames from one of the scenes."""
    # Until some object is worth a prompt.
    while True:
        scene = scenes[rng.integers(len(scenes))]
        times = draw_times(rng, len(scene.pictures), frames)
        if times.max() >= len(scene.pictures):
            continue
        mirror = slice(None, None, rng.choice([1, -1]))
        masks = scene.masks[:, times][..., mirror]    # [all objects, T, H, W]
        clear = masks.sum((2, 3)) >= 40               # pixels
        chosen = rng.permutation(np.flatnonzero(clear.any(1)))[:3]
        if len(chosen):
            break
    prompted = []    # frames of each object
    for o in chosen:
        order = rng.permutation(np.flatnonzero(clear[o]))
        prompted.append(order[:rng.choice([1, 2], p=[0.8, 0.2])])
    boxes = []
    for o, own_frames in zip(chosen, prompted):
        own = {}
        for t in own_frames:
            own[int(t)] = np.add(mask_box(masks[o, t]), rng.normal(0, 1.2, 4).clip(-3, 3))
        boxes.append(own)
    kinds = [KINDS.index(thing.name) for thing in scene.things]
    side = SIDE // CELLS
    places = masks.reshape(*masks.shape[:2], CELLS, side, CELLS, side)
    cells = places.sum((3, 5)) >= 24                  # [all objects, T, 8, 8]
    shown = np.zeros((frames, len(KINDS), CELLS, CELLS), np.float32)
    for kind, cell in zip(kinds, cells):
        shown[:, kind] = np.maximum(shown[:, kind], cell)
    pictures = scene.pictures[times][:, :, mirror]
    return Stretch(pictures, masks[chosen], boxes, [kinds[o] for o in chosen], cells[chosen], shown)


def draw_times(rng, T, frames):
    """Evenly spaced frames, forwards or backwards. Some may lie beyond T."""
    most = max((T - 1) // max(frames - 1, 1), 1)
    apart = rng.integers(1, most + 1)
    start = rng.integers(max(T - apart * (frames - 1), 1))
    times = np.arange(start, start + apart * frames, apart)
    return times[::rng.choice([1, -1])]


class WatchedTracker(Tracker):
    """A tracker that keeps what its prompts leave behind."""

    def __init__(self, model):
        super().__init__(model)
        self.tracked = []

    def prompt(self, features, boxes):
        tracked = super().prompt(features, boxes)
        self.tracked.append(tracked)
        return tracked


def concatenated(arrays):
    return torch.tensor(np.concatenate(arrays))


def tracking_losses(tracker, heads, stretches):
    """Loss and (IoU on prompted frames, IoU on the others) of B stretches of equal length.

    Beside the masks and scores, three linear readings are supervised and thrown away afterwards: which kinds
    the top features show, and which kind a prompted frame's memory and pointer hold. Without them the memory
    was not used within half an hour.
    """
    T = len(stretches[0].pictures)
    pictures = concatenated([s.pictures for s in stretches]).permute(0, 3, 1, 2) / 255    # [B T, 3, H, W]
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    levels = tracker.encode((pictures - mean) / std)
    owner = []    # the stretch of each object
    boxes = []
    for b, stretch in enumerate(stretches):
        owner += [b] * len(stretch.boxes)
        boxes += stretch.boxes
    prompts = []    # (object, frame) of each
    for n, own in enumerate(boxes):
        prompts += [(n, t) for t in own]

    def features(objects, times):
        places = [owner[n] * T + t for n, t in zip(objects, times)]
        return [level[places] for level in levels]

    tracker.tracked = []
    logits, scores = zip(*tracker.run(features, boxes, [T] * len(boxes)))
    logits = F.interpolate(torch.stack(logits, 1), (SIDE, SIDE), mode="bilinear")
    logits = logits.clamp(-20, 20)                                                        # [N, T, H, W]
    true = concatenated([s.masks for s in stretches]).float()
    loss = mask_loss(logits, torch.stack(scores, 1), true)
    shown = concatenated([s.shown for s in stretches])                                    # [B T, K, 8, 8]
    shown_logits = heads["shown"](levels[-1].permute(0, 2, 3, 1))
    loss = loss + 5 * F.binary_cross_entropy_with_logits(shown_logits, shown.permute(0, 2, 3, 1))
    map_loss, pointer_loss = memory_losses(tracker.tracked, heads, stretches, prompts)
    loss = loss + map_loss + pointer_loss

    both = ((logits > 0) & (true > 0)).sum((2, 3))
    union = ((logits > 0) | (true > 0)).sum((2, 3))
    iou = torch.where(union > 0, both / union.clamp(min=1), 1.0)                          # [N, T]
    prompted = torch.zeros_like(iou, dtype=torch.bool)
    for n, t in prompts:
        prompted[n, t] = True
    return loss, (iou[prompted].mean().item(), iou[~prompted].mean().item())


def mask_loss(logits, scores, true):
    """Loss of masks, logits and true [N, T, H, W], and of scores [N, T]: is the object seen?"""
    there = true.flatten(2).any(-1).float()    # [N, T]
    soft = logits.sigmoid()
    shared = 2 * (soft * true).sum((2, 3)) + 1
    dice = 1 - shared / (soft.sum((2, 3)) + true.sum((2, 3)) + 1)
    loss = 5 * F.binary_cross_entropy_with_logits(logits, true)
    loss = loss + (dice * there).mean()
    return loss + F.binary_cross_entropy_with_logits(scores, there)


def memory_losses(tracked, heads, stretches, prompts):
    """Losses of reading from prompted frames' memory, and from their pointers, which kind of thing they hold.

    tracked: what the prompts left behind, batch by batch. prompts: (object, frame) of each, in that order.
    """
    kinds = []
    for stretch in stretches:
        kinds += stretch.kinds
    kinds = torch.tensor(kinds)                                     # [N]
    cells = concatenated([s.cells for s in stretches])              # [N, T, 8, 8]
    # Of each prompt and place: the object's kind where it is, else K.
    held = []
    for n, t in prompts:
        held.append(torch.where(cells[n, t].flatten(), kinds[n], len(KINDS)))
    held = torch.stack(held)                                        # [prompts, 64]
    weights = torch.tensor([1.0] * len(KINDS) + [0.1])
    maps = torch.cat([part.map for part in tracked])                # [prompts, 64, M]
    pointers = torch.cat([part.pointer for part in tracked]).flatten(1)
    objects = [n for n, _ in prompts]
    logits = heads["held"](maps).flatten(0, 1)
    map_loss = 0.3 * F.cross_entropy(logits, held.flatten(), weight=weights)
    pointer_loss = 0.2 * F.cross_entropy(heads["pointer"](pointers), kinds[objects])
    return map_loss, pointer_loss


def tracking_quality(tracker, split="test", clips=20) -> tuple[float, float]:
    """Mean J and F of every thing of held-out clips, tracked from its true box on one frame."""
    rng = np.random.default_rng(0)
    J = []
    boundary = []
    for index in range(clips):
        scene = toy_scene(split, index)
        areas = scene.masks.sum((2, 3))    # [O, T]
        objects = np.flatnonzero(areas.max(1) >= 60)
        boxes = []
        for o in objects:
            t = int(rng.choice(np.flatnonzero(areas[o] >= 60)))
            boxes.append({t: np.array(mask_box(scene.masks[o, t]))})
        pictures = [Image.fromarray(picture) for picture in scene.pictures]
        masks = tracker.track(pictures, boxes)
        for o, mask in zip(objects, masks):
            J.append(region_similarity(mask, scene.masks[o]).mean())
            boundary.append(boundary_accuracy(mask, scene.masks[o]).mean())
    return float(np.mean(J)), float(np.mean(boundary))


def make_sam2(path, stages, scenes, seed):
    """Writes config.yaml and model.pt (half precision) to a folder."""
    torch.manual_seed(seed)
    os.makedirs(path, exist_ok=True)
    config = os.path.join(path, "config.yaml")
    OmegaConf.save(small_config(), config)
    model = build_sam2(config)
    rng = np.random.default_rng(seed)
    start = time.time()
    with torch.no_grad():
        # "Not seen" would hide the mask from the loss.
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    heads = nn.ModuleDict(dict(
        shown=nn.Linear(WIDTH, len(KINDS)),
        held=nn.Linear(MEMORY, len(KINDS) + 1),
        pointer=nn.Linear(WIDTH, len(KINDS)),
    ))
    tracker = WatchedTracker(model)
    pool = [toy_scene("train", index) for index in range(scenes)]
    weights = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, 1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for stage, (steps, frames, clips) in enumerate(stages):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * ramp(step, steps, 50, 0.4)
            stretches = [draw_stretch(rng, pool, frames) for _ in range(clips)]
            loss, iou = tracking_losses(tracker, heads, stretches)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"stage {stage} step {step} loss {loss.item():.3f} IoU {iou[0]:.3f} {iou[1]:.3f} "
                      f"{time.time() - start:.0f} s", flush=True)
        state = {name: tensor.half() for name, tensor in model.state_dict().items()}
        torch.save({"model": state}, os.path.join(path, "model.pt"))
        J, boundary = tracking_quality(Tracker(model))
        print(f"stage {stage}: J {J:.3f} F {boundary:.3f}", flush=True)
