"""The GRPO step against the usual recipe, part by part: the same outputs, then seconds and peak memory.

    python speed/step.py                                                              # CPU, a minute or ten
    python speed/step.py --shape 7b --prompt 4096 --completion 512 --device cuda      # one GPU of 140 GB

The recipe is transformers' own model with the same weights (the very same memory): `generate` over G rows,
and a full forward over G (P + C) tokens with full logits, for the policy and again for the reference. SAM2's
own predictor is called once per completion. Weights are random, and so is the video in the prompt. On both
sides towers are frozen, activations are computed again in the backward pass (train.py's default), and all
language-model weights get gradients.

--peer adds a row: one whole step without masks against the same step of TRL's GRPOTrainer, where TRL is
installed.

Letters: P prompt tokens, all of them (model.py's prefix and one more), G completions of C tokens,
V vocabulary, T frames.
"""
import argparse
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"    # SAM2's predictor draws bars of its own
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be downloaded, and TRL counts its users
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from PIL import Image
from sam2 import sam2_video_predictor
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.utils import logging

from benchmarks.toy import toy_scene
from data import Clip, Frames
from grpo import group_advantages, policy_loss
from model import Prompt, Thinker, speed_up_towers
from rewards import mask_box
from run.plan import GPU_LIMITS, pass_operations, token_bytes
from segment import Tracker, track_groups
from trust.options import TOY_SAM2, at_least
from trust.sam2_config import build_sam2, find_config

PARTS = ("rollout", "policy", "reference", "masks", "whole")
# Times faster (and of memory: times less) than the recipe.
TARGETS = {
    "cuda": dict(rollout=6.0, policy=3.5, masks=8.0, whole=5.0),
    "cpu": dict(rollout=3.0, policy=3.0, masks=8.0, whole=3.0),
}
MEMORY_TARGETS = dict(policy=4.0)
# Size of the proof: enough for every path, and eager attention fits.
PROOF_ROWS = 2
PROOF_TOKENS = 64
# How much farther than transformers' two attentions from each other ours may be from one of them, in bf16.
BF16_SLACK = 1.5
# Frames of the tracked video. Frame pairs of the prompt's video: a token spans two frames.
FRAMES = 16
PAIRS = 8


# ---- shapes and weights ----------------------------------------------------------------------------
def config_of(shape: str) -> Qwen2_5OmniThinkerConfig:
    """The Thinker at a size.

    The towers of "small" take about the share of the language model's work that the 7B's do. "3b" is put
    together from its published language model; its towers are taken to be the 7B's, its head untied.
    """
    return Qwen2_5OmniThinkerConfig.from_dict(read_shape(shape))


def read_shape(shape: str) -> dict:
    return json.loads((HERE / f"shapes/{shape}/config.json").read_text())


def build(shape: str, dtype: torch.dtype, device: str):
    """Ours and transformers' with the same random weights, in memory once. Each has its own gradients."""
    config = config_of(shape)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        theirs = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    # Larger weights than usual: attention that is flat would hide mistakes.
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1:
            std = 0.5 if "embed_tokens" in name else 1.5 * weight[0].numel() ** -0.5
            torch.nn.init.normal_(weight, std=std)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    with torch.device("meta"):
        ours = Thinker(config_of(shape))
    home = tower_home(theirs)
    for name in ("visual", "audio_tower"):
        tower = getattr(home, name).requires_grad_(False)
        getattr(ours, name).load_state_dict(tower.state_dict(), assign=True)
    # Two buffers are computed, not stored.
    ours.visual.rotary_pos_emb = home.visual.rotary_pos_emb
    ours.audio_tower.positional_embedding = home.audio_tower.positional_embedding
    if device == "cuda":
        speed_up_towers(ours, dtype)
    ours.model.load_state_dict(language_model(theirs).state_dict(), assign=True)
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict(), assign=True)
    ours.gradient_checkpointing = True
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    # These hooks would make the recipe go back through the frozen towers, too.
    theirs.disable_input_require_grads()
    return ours.train(), theirs


def tower_home(theirs):
    """The module that holds the towers and makes position ids: one level deeper in newer transformers."""
    return theirs if hasattr(theirs, "visual") else theirs.model


def language_model(theirs):
    return theirs.model if hasattr(theirs, "visual") else theirs.model.language_model


def build_tracker(device: str) -> Tracker:
    """The toy's SAM2 on a CPU, the largest published one with random weights on a GPU."""
    if device == "cpu":
        return Tracker.from_pretrained(find_config(TOY_SAM2), TOY_SAM2)
    model = build_sam2("sam2.1_hiera_l").to(device)
    # Every object counts as seen.
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)
    return Tracker(model)


# ---- the work --------------------------------------------------------------------------------------
@dataclass
class Work:
    """One prompt, one clip, and who works on them."""
    ours: Thinker
    theirs: Qwen2_5OmniThinkerForConditionalGeneration
    tracker: Tracker
    item: SimpleNamespace   # the prompt as data.Inputs: ids (P,), positions (3, P), patches, grid
    prompt: Prompt          # the same after the towers; rollouts make it anew
    completions: Tensor     # (G, C)
    advantages: Tensor      # (G,)
    reference_logp: Tensor  # (G, C)
    clip: Clip              # T frames
    boxes: list             # G dicts {frame: [boxes]}

    @property
    def group(self) -> int:
        return len(self.completions)

    @property
    def on_gpu(self) -> bool:
        return self.ours.device.type == "cuda"


def sized_fields(ours, theirs, P: int, C: int, G: int) -> dict:
    """The fields of Work that depend on the sizes.

    The prompt is a few words and a video that fills it; completions are random.
    """
    config = ours.config
    random = torch.Generator().manual_seed(0)
    vocabulary = config.text_config.vocab_size
    merge = config.vision_config.spatial_merge_size
    # A frame pair in merged patches, about square.
    high = math.isqrt((P - 8) // PAIRS)
    wide = (P - 8) // PAIRS // high

    def words(*shape):
        return torch.randint(9, min(vocabulary, 100_000), shape, generator=random)

    video = [config.video_token_index] * (PAIRS * high * wide)
    video = torch.tensor([config.vision_start_token_id, *video, config.vision_end_token_id])
    ids = torch.cat([words(3), video, words(P - len(video) - 3)])  # (P,)
    grid = torch.tensor([[PAIRS, merge * high, merge * wide]])
    values = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size ** 2
    patches = torch.randn(int(grid.prod()), values, generator=random)
    present = torch.ones(1, P, dtype=torch.long)
    seconds_per_grid = torch.tensor([1.0])
    positions, _ = tower_home(theirs).get_rope_index(
        ids[None], None, grid, present, False, None, seconds_per_grid
    )
    item = SimpleNamespace(ids=ids, positions=positions[:, 0], patches=patches, grid=grid, mel=None)
    completions = words(G, C).to(ours.device)
    [prompt] = ours.embed([item])
    return dict(
        item=item,
        prompt=prompt,
        completions=completions,
        advantages=torch.randn(G, generator=random).to(ours.device),
        reference_logp=torch.full(completions.shape, -math.log(vocabulary), device=ours.device),
    )


def clip_and_boxes(G: int, size: int) -> tuple[Clip, list]:
    """T toy frames, `size` pixels a side, and for each of G completions two objects, each on its own frame.

    No two boxes are equal: only ours would share them.
    """
    scene = toy_scene("long", 1)
    factor = size / scene.pictures.shape[1]
    frames = []
    for picture in scene.pictures[:FRAMES]:
        frames.append(Image.fromarray(picture).resize((size, size)))
    seen = {}  # object: the frames on which it is seen
    for o, mask in enumerate(scene.masks):
        times = [t for t in range(FRAMES) if mask[t].sum() >= 30]
        if times:
            seen[o] = times
    things = list(seen)
    boxes = []
    for g in range(G):
        own = {}
        for o in range(2):
            thing = things[(g + o) % len(things)]
            times = seen[thing]
            t = times[(3 * g + 5 * o) % len(times)]
            box = np.array(mask_box(scene.masks[thing, t])) * factor + (0, 0, 0.25 * g, 0.25 * o)
            own.setdefault(t, []).append(tuple(np.minimum(box, size - 1).tolist()))
        boxes.append(own)
    return Clip("speed", Frames(frames.__getitem__, range(FRAMES)), "", masks=None), boxes


def loss(w: Work, logp: Tensor) -> Tensor:
    mask = torch.ones_like(logp)
    value, _ = policy_loss(logp, w.advantages, mask, None, w.reference_logp)
    return value


# ---- ours ------------------------------------------------------------------------------------------
def ours_rollout(w: Work, temperature=1.0) -> Tensor:
    """Completions (G, C). Leaves the prompt's features, which the other parts use, in w.prompt."""
    [w.prompt] = w.ours.embed([w.item])
    C = w.completions.shape[1]
    [group] = w.ours.generate([w.prompt], w.group, C, eos_ids={-1}, temperature=temperature)
    return torch.stack(group).to(w.ours.device)


def ours_policy(w: Work) -> Tensor:
    logp, _ = w.ours.logprobs(w.prompt, w.completions)
    loss(w, logp).backward()
    return logp.detach()


@torch.no_grad()
def ours_reference(w: Work) -> Tensor:
    logp, _ = w.ours.logprobs(w.prompt, w.completions)
    return logp


def ours_masks(w: Work) -> list:
    """G masks [T, H, W]."""
    [masks] = track_groups(w.tracker, [w.clip], [w.boxes])
    return list(masks)


# ---- the usual recipe ------------------------------------------------------------------------------
def recipe_inputs(w: Work, ids: Tensor) -> dict:
    """G rows (G, S) with G copies of the video, which the towers see G times."""
    G = len(ids)
    device = w.ours.device
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        pixel_values_videos=w.item.patches.to(device, w.ours.dtype).repeat(G, 1),
        video_grid_thw=w.item.grid.to(device).repeat(G, 1),
        video_second_per_grid=torch.ones(G, device=device),
    )


@torch.no_grad()
def recipe_rollout(w: Work, temperature=1.0) -> Tensor:
    """Completions (G, C).

    The rows are copied here. num_return_sequences would copy each patch of a video instead of the video
    (transformers 5.17), and costs the same.
    """
    P = len(w.item.ids)
    config = dict(
        max_new_tokens=w.completions.shape[1],
        pad_token_id=0,
        suppress_tokens=w.ours.suppressed.tolist(),
        do_sample=bool(temperature),
    )
    if temperature:
        config |= dict(temperature=temperature, top_k=0, top_p=1.0)
    w.theirs.eval()
    w.theirs.generation_config = GenerationConfig(**config)
    ids = w.item.ids.to(w.ours.device).repeat(w.group, 1)  # (G, P)
    return w.theirs.generate(**recipe_inputs(w, ids))[:, P:]


def recipe_logprobs(w: Work) -> Tensor:
    """(G, C) from the logits of all G (P + C) tokens. The softmax goes row by row, as in trainers."""
    prompts = w.item.ids.to(w.ours.device).expand(w.group, -1)
    ids = torch.cat([prompts, w.completions], dim=1)  # (G, P + C)
    inputs = recipe_inputs(w, ids) | dict(use_cache=False)
    logits = w.theirs(**inputs).logits[:, :-1]  # (G, P + C - 1, V)
    # Ours leaves these ids out of every softmax.
    logits = logits.index_fill_(-1, w.ours.suppressed, -torch.inf)
    logp = []
    for row, target in zip(logits, ids[:, 1:]):
        row = row.float().log_softmax(-1)
        logp.append(row.gather(-1, target[:, None])[:, 0])
    return torch.stack(logp)[:, -w.completions.shape[1]:]


def recipe_policy(w: Work) -> Tensor:
    # In evaluation mode it would keep its activations. Nothing in it drops out.
    w.theirs.train()
    logp = recipe_logprobs(w)
    loss(w, logp).backward()
    return logp.detach()


@torch.no_grad()
def recipe_reference(w: Work) -> Tensor:
    w.theirs.eval()
    return recipe_logprobs(w)


@torch.inference_mode()
def recipe_masks(w: Work) -> list:
    """For each completion: its frames written to a folder and encoded, its objects tracked one by one."""
    with predictor_precision(w.ours.device.type):
        return [predictor_masks(w, boxes) for boxes in w.boxes]


def predictor_masks(w, boxes):
    """Masks [T, H, W] of one completion: the union of its objects."""
    model = w.tracker.model
    with tempfile.TemporaryDirectory() as folder:
        for t in range(len(w.clip.frames)):
            # It insists on the name, not on the format. Lossless for both sides.
            w.clip.frames[t].save(f"{folder}/{t:05d}.jpg", format="png", compress_level=1)
        state = model.init_state(folder)
        number = 0
        for t, frame_boxes in boxes.items():
            for box in frame_boxes:
                box = np.array(box, np.float32)
                model.add_new_points_or_box(state, frame_idx=t, obj_id=number, box=box)
                number += 1
        masks = []
        for _, _, logits in model.propagate_in_video(state, start_frame_idx=0):
            masks.append((logits[:, 0] > 0).any(0).cpu().numpy())
    return np.stack(masks)


@contextmanager
def predictor_precision(kind: str):
    """bf16 autocast on a GPU, as published. float32 on a CPU: faster there, and what ours computes in."""
    if kind == "cuda":
        with torch.autocast(kind, torch.bfloat16):
            yield
    else:
        with single_precision_predictor():
            yield


def single_precision_predictor():
    """Inside, SAM2's predictor, which rounds memories to torch.bfloat16, gets float32 under that name."""
    renamed = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    return mock.patch.object(sam2_video_predictor, "torch", renamed)


# ---- both ------------------------------------------------------------------------------------------
def whole(side: dict, w: Work) -> None:
    """A step's parts in order, each on what the ones before made. System 2's grounding is not among them."""
    w = replace(w)
    w.completions = side["rollout"](w)
    side["masks"](w)
    w.reference_logp = side["reference"](w)
    side["policy"](w)


OURS = dict(rollout=ours_rollout, policy=ours_policy, reference=ours_reference, masks=ours_masks)
OURS["whole"] = partial(whole, OURS)
RECIPE = dict(rollout=recipe_rollout, policy=recipe_policy, reference=recipe_reference, masks=recipe_masks)
RECIPE["whole"] = partial(whole, RECIPE)
SIDES = dict(ours=OURS, recipe=RECIPE)


def forget_gradients(w: Work) -> None:
    w.ours.zero_grad()
    w.theirs.zero_grad()


# ---- the proof -------------------------------------------------------------------------------------
def prove(w: Work) -> dict:
    """By how much ours and the recipe differ. Ends the program where it is more than rounding."""
    small = replace(
        w,
        completions=w.completions[:PROOF_ROWS, :PROOF_TOKENS],
        reference_logp=w.reference_logp[:PROOF_ROWS, :PROOF_TOKENS],
        advantages=w.advantages[:PROOF_ROWS],
    )
    exact = w.ours.dtype == torch.float32
    greedy = ours_rollout(small, temperature=0.0)
    expected = recipe_rollout(small, temperature=0.0)
    ours = logp_and_gradients(small, OURS)
    recipe = logp_and_gradients(small, RECIPE)
    limits = dict(logprobs=1e-4, gradients=1e-4)
    if not exact:
        # No two kernels agree in bf16: transformers' own two set the limit.
        w.theirs.set_attn_implementation("eager")
        eager = logp_and_gradients(small, RECIPE)
        for name, distance in distances(eager, recipe, exact).items():
            limits[name] = BF16_SLACK * distance
        w.theirs.set_attn_implementation("sdpa")
    errors = distances(ours, recipe, exact)
    differing = differing_tokens(small, greedy, expected, exact)
    iou = prove_masks(w)

    failed = []
    for name, error in errors.items():
        # Written so that NaN fails.
        if not error <= limits[name]:
            failed.append(f"{name} differ by {error:.1e} of their scale, more than {limits[name]:.1e}")
    if differing > 0:
        failed.append(f"{differing} greedy tokens differ")
    if not iou >= 0.99:
        failed.append(f"masks' IoU is {iou:.3f}, not 0.99")
    if failed:
        sys.exit("ours and the recipe do not give the same, so nothing is timed: " + "; ".join(failed))
    return dict(equal=True, errors=errors, limits=limits, iou=iou)


def differing_tokens(w: Work, greedy: Tensor, expected: Tensor, exact: bool) -> int:
    """How many tokens differ between two greedy rollouts (G, C).

    In bf16 a token that is as likely as the likeliest, up to rounding, is as good. After the first difference
    rows go different ways, so only the first counts.
    """
    if exact:
        return int((greedy != expected).sum())
    at_greedy = recipe_reference(replace(w, completions=greedy))
    at_expected = recipe_reference(replace(w, completions=expected))
    agree = (greedy == expected).long().cumprod(1).bool()
    first = (~agree).long().cumsum(1) == 1
    worse = (at_expected - at_greedy).abs()[first] > 0.1
    return int(worse.sum())


def logp_and_gradients(w: Work, side: dict) -> tuple[Tensor, dict]:
    """Log-probabilities (G, C) and the gradients of language model and head.

    On the CPU: three sets of the 7B's would not fit a smaller GPU.
    """
    forget_gradients(w)
    logp = side["policy"](w).cpu()
    if side is OURS:
        modules = (w.ours.model, w.ours.lm_head)
    else:
        modules = (language_model(w.theirs), w.theirs.lm_head)
    gradients = {}
    for module in modules:
        for name, p in module.named_parameters():
            gradients[name] = p.grad.cpu()
    forget_gradients(w)
    return logp, gradients


def distances(a, b, exact: bool) -> dict[str, float]:
    """Of log-probabilities and of gradients, relative to the scale of b's, tensor by tensor.

    The largest anywhere. In bf16 that is an accident: there it is the root mean square.
    """
    logp_a, gradients_a = a
    logp_b, gradients_b = b
    assert gradients_a.keys() == gradients_b.keys()
    each = []
    for name in gradients_b:
        each.append(relative_distance(gradients_a[name], gradients_b[name], exact))
    gradients = max(each) if exact else statistics.mean(each)
    return dict(logprobs=relative_distance(logp_a, logp_b, exact), gradients=gradients)


def relative_distance(x, y, exact):
    x = x.float()
    y = y.float()
    if exact:
        return float((x - y).abs().max() / y.abs().max())
    return float((x - y).norm() / y.norm())


def prove_masks(w: Work) -> float:
    """The lowest IoU of a completion's masks, both in float32: in bf16, masks of random weights are noise."""
    if w.on_gpu:
        w = replace(w, boxes=w.boxes[:PROOF_ROWS])
    with in_single_precision(w.ours.device.type):
        ours = ours_masks(w)
        recipe = recipe_masks(w)
    if not any(b.any() for b in recipe):
        sys.exit("SAM2 finds nothing at all, so masks cannot be compared")
    lowest = 1.0
    for a, b in zip(ours, recipe):
        union = (a | b).sum()
        if union > 0:
            lowest = min(lowest, (a & b).sum() / union)
    return float(lowest)


@contextmanager
def in_single_precision(kind: str):
    """Inside, the tracker and SAM2's predictor compute in float32 on a GPU too, convolutions included."""
    with ExitStack() as stack:
        if kind == "cuda":
            stack.enter_context(mock.patch("torch.autocast", no_autocast))
            stack.enter_context(single_precision_predictor())
            # TF32 rounds to 10 bits, in ways that depend on the batch: ours holds several objects.
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        yield


def no_autocast(*_, **__):
    return nullcontext()


# ---- measuring -------------------------------------------------------------------------------------
def seconds(w: Work, call) -> float:
    """One call, from a clean start to when the device is done."""
    forget_gradients(w)
    wait(w)
    start = time.perf_counter()
    call(w)
    wait(w)
    return time.perf_counter() - start


def wait(w: Work) -> None:
    if w.on_gpu:
        torch.cuda.synchronize()


def alternate(w: Work, part: str, repeats: int, sides: dict) -> dict:
    """{side: median seconds}; None where it does not fit.

    A warm-up each, then in turns, so that whatever else slows the machine meets both.
    """
    times = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            if times[name] is None:
                continue
            try:
                times[name].append(seconds(w, side[part]))
            except torch.OutOfMemoryError:
                times[name] = None
                release(w)
    medians = {}
    for name, values in times.items():
        medians[name] = statistics.median(values[1:]) if values else None
    return medians


def release(w: Work) -> None:
    forget_gradients(w)
    torch.cuda.empty_cache()


def peak_memory(w: Work, call) -> float | None:
    """Bytes at the peak of one call beyond those in use before it; None where it does not fit."""
    forget_gradients(w)
    if not w.on_gpu:
        return forked_peak(w, call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call(w)
        return torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return None
    finally:
        release(w)


def forked_peak(w: Work, call) -> float | None:
    """A fork starts with all that is loaded and nothing else, and its peak is its own."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=resident_growth, args=(w, call, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:  # the system has killed it
        return None
    finally:
        child.join()


def resident_growth(w: Work, call, result) -> None:
    # The threads of a fork's parent do not exist in it.
    torch.set_num_threads(1)
    before = resident("VmRSS")
    call(w)
    result.send(resident("VmHWM") - before)


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def figures(times: dict, peaks: dict) -> dict:
    """A line of the table, from {side: seconds} and {side: bytes} of ours and another."""
    row = {f"{name}_s": value for name, value in times.items()}
    row["ratio"] = ratio(*times.values())
    row["memory_ratio"] = ratio(*peaks.values())
    for name, value in peaks.items():
        row[f"{name}_gb"] = None if value is None else value / 1e9
    return row


def ratio(ours: float | None, other: float | None) -> float | None:
    if ours is None or other is None:
        return None
    return other / max(ours, 1e-9)


def device_limits() -> tuple[float, float] | None:
    """Bytes and bf16 operations a second of this GPU; None where they are not known."""
    for part, limits in GPU_LIMITS.items():
        if part in torch.cuda.get_device_name():
            return limits
    return None


def physics(w: Work, rollout: float | None, policy: float | None) -> dict:
    """On a GPU: decoding against the time to read the weights, the policy pass against peak arithmetic.

    rollout, policy: ours' seconds; None where it did not fit.
    """
    limits = device_limits()
    if not limits or rollout is None or policy is None:
        return {}
    bandwidth, operations = limits
    G, C = w.completions.shape
    P = len(w.item.ids)
    one_token = replace(w, completions=w.completions[:, :1])
    first = statistics.median(seconds(one_token, ours_rollout) for _ in range(3))
    # Decode steps a second, without towers and prefill.
    steps = (C - 1) / (rollout - first)
    return dict(
        decode_tokens_per_s=steps * G,
        bandwidth_share=token_bytes(w.ours) * steps / bandwidth,
        policy_mfu=pass_operations(w.ours, P, G, C) / policy / operations,
    )


# ---- over P and over G -----------------------------------------------------------------------------
def ours_tokens(P, G, C):
    return P + G * C


def recipe_tokens(P, G, C):
    return G * (P + C)


def scaling(w: Work, P: int, C: int, G: int, repeats: int) -> dict:
    """Draws seconds of the policy pass over P and over G into scaling.png.

    Returns {"P": [[size, ours, recipe]], "G": ...}.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    quarters = (1, 2, 4, 6, 8)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))

    sizes = [(P * k // 4, G, C) for k in quarters]
    times = policy_times(w, sizes, repeats)
    prompts = [size[0] for size in sizes]
    draw_curves(left, prompts, sizes, times)
    left.set(xlabel=f"P (G = {G}, C = {C})", ylabel="s", ylim=0)
    left.set_title("policy pass, forward and backward", loc="left")
    left.legend()
    curves = dict(P=curve(prompts, times))

    sizes = [(P, max(1, G * k // 4), C) for k in quarters]
    times = policy_times(w, sizes, repeats)
    groups = [size[1] for size in sizes]
    draw_curves(right, groups, sizes, times)
    right.set(xlabel=f"G (P = {P}, C = {C})", ylabel="s", ylim=0)
    curves["G"] = curve(groups, times)

    figure.tight_layout()
    figure.savefig(HERE / "scaling.png", dpi=110)
    return curves


def policy_times(w, sizes, repeats):
    """{side: seconds} for each size (P, G, C)."""
    times = []
    for P, G, C in sizes:
        resized = replace(w, **sized_fields(w.ours, w.theirs, P, C, G))
        times.append(alternate(resized, "policy", repeats, SIDES))
    return times


def curve(xs, times):
    return [[x, t["ours"], t["recipe"]] for x, t in zip(xs, times)]


def draw_curves(axis, xs, sizes, times):
    """What was measured, and dotted how it would grow with the tokens of each side."""
    for side, colour, label, tokens in (
        ("ours", "C0", "P + G C", ours_tokens),
        ("recipe", "C3", "G (P + C)", recipe_tokens),
    ):
        ys = [math.nan if t[side] is None else t[side] for t in times]
        axis.plot(xs, ys, "o-", color=colour, label=side)
        # The dotted line goes through the third point, or the last before it that was measured.
        known = [k for k in (2, 1, 0) if not math.isnan(ys[k])]
        k = known[0] if known else 0
        expected = [ys[k] * tokens(*size) / tokens(*sizes[k]) for size in sizes]
        axis.plot(xs, expected, ":", color=colour, label=f"as {label}")


# ---- a peer: TRL -----------------------------------------------------------------------------------
PEER = (
    "The peer's row: ours against TRL's GRPOTrainer.training_step, in the recipe's columns: "
    "image to patches, rollout, reward,\n"
    "reference, loss and backward pass; neither optimizer nor masks. "
    "TRL does not know the Thinker: there it is Qwen2.5-VL with\n"
    "the same weights, q, k and v of the tower in one matrix. "
    "Towers are frozen and layers computed again, on both sides. TRL prepares\n"
    "the image 2 G times, keeps the reference as a second copy, "
    "and leaves placeholders in the softmax (ours takes them out)."
)
BRACKETED_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class Peer:
    """The same step for both: one image and some words, P tokens in all."""

    def __init__(self, w: Work, shape: str):
        config = w.ours.config
        P = len(w.item.ids)
        # The image in merged patches, each of `side` pixels.
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        high = math.isqrt(P - 8)
        wide = (P - 8) // high
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (side * high, side * wide, 3), np.uint8)
        self.picture = Image.fromarray(pixels)
        # Beside the image and its two brackets.
        self.words = " ".join(f"w{9 + i % 50}" for i in range(P - high * wide - 2))
        self.processor = peer_processor(config)
        self.trainer = peer_trainer(w, shape, self.processor)
        self.ours = None  # ours' Work after its last step

    def ours_step(self, w: Work) -> None:
        w = replace(w)
        text = BRACKETED_IMAGE + self.words
        made = self.processor(text=[text], images=[self.picture], return_tensors="pt")
        ids = made["input_ids"]
        grid = made["image_grid_thw"]
        present = torch.ones_like(ids)
        positions, _ = tower_home(w.theirs).get_rope_index(ids, grid, None, present, False, None, None)
        patches = made["pixel_values"]
        positions = positions[:, 0]
        w.item = SimpleNamespace(ids=ids[0], positions=positions, patches=patches, grid=grid, mel=None)
        w.completions = ours_rollout(w)
        self.processor.batch_decode(w.completions)  # as TRL does
        rewards = peer_reward(w.completions.tolist())
        w.advantages = group_advantages(rewards, w.group).to(w.ours.device)
        w.reference_logp = ours_reference(w)
        ours_policy(w)
        self.ours = w

    def trl_step(self, w: Work) -> None:
        self.trainer.model.zero_grad()
        message = dict(role="user", content=self.words)
        rows = [dict(prompt=[message], image=self.picture)] * w.group
        self.trainer.training_step(self.trainer.model, rows, None)


def measure_peer(w: Work, shape: str, repeats: int) -> dict | None:
    """Figures of a step on one image and some words; None where TRL is not installed.

    Ends the program where the two sides see prompts or completions of different lengths or, in float32, other
    log-probabilities.
    """
    if importlib.util.find_spec("trl") is None:
        return None
    peer = Peer(w, shape)
    sides = dict(ours=dict(step=peer.ours_step), peer=dict(step=peer.trl_step))
    peaks = {name: peak_memory(w, side["step"]) for name, side in sides.items()}
    times = alternate(w, "step", repeats, sides)
    # Out of memory: nothing to compare.
    error = None if None in times.values() else compare_peer(w, peer)
    return dict(trl=version("trl"), logprobs=error, step=figures(times, peaks))


def compare_peer(w: Work, peer: Peer) -> float:
    """By how much log-probabilities differ after a step of each, relative to their scale."""
    [theirs] = peer.trainer._buffered_inputs
    # (prompt tokens, completions, their tokens), of ours and of each of TRL's rows.
    tokens = [(len(peer.ours.prompt.ids), *peer.ours.completions.shape)]
    for row in theirs["prompt_mask"]:
        tokens.append((int(row.sum()), *theirs["completion_mask"].shape))
    # TRL suppresses nothing in the softmax.
    no_ids = w.ours.suppressed[:0]
    with mock.patch.object(Thinker, "suppressed", no_ids), torch.no_grad():
        logp, _ = w.ours.logprobs(peer.ours.prompt, theirs["completion_ids"])
    expected = theirs["ref_per_token_logps"]
    error = float((logp - expected).abs().max() / expected.abs().max())
    lengths = (len(w.item.ids), *w.completions.shape)
    same = set(tokens) == {lengths} and theirs["completion_mask"].all()
    if not same or (w.ours.dtype == torch.float32 and not error <= 1e-4):
        sys.exit(f"TRL's work is not ours: prompt tokens, rows, tokens are {tokens}, "
                 f"log-probabilities differ by {error:.1e}")
    return error


def peer_reward(completion_ids, **_) -> list[float]:
    return [float(ids[0] % 7) for ids in completion_ids]


def peer_processor(config):
    """A processor of Qwen2.5-VL for a shape's ids, a word for each. The chat template is just the content."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )
    special = {
        config.pad_token_id: "<|endoftext|>",
        1: "<|im_end|>",
        config.image_token_index: "<|image_pad|>",
        config.video_token_index: "<|video_pad|>",
        config.vision_start_token_id: "<|vision_start|>",
        config.vision_end_token_id: "<|vision_end|>",
    }
    words = {special.get(i, f"w{i}"): i for i in range(config.text_config.vocab_size)}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w9"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        pad_token=special[config.pad_token_id],
        eos_token=special[1],
        extra_special_tokens=list(special.values()),
        padding_side="left",
    )
    tower = config.vision_config
    vision = dict(
        size=dict(shortest_edge=1, longest_edge=2 ** 30),  # any
        patch_size=tower.patch_size,
        merge_size=tower.spatial_merge_size,
        temporal_patch_size=tower.temporal_patch_size,
    )
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**vision),
        tokenizer,
        Qwen2VLVideoProcessor(**vision),
        chat_template=BRACKETED_IMAGE + "{{ messages[0].content[1].text }}",
    )


def peer_model(w: Work, shape: str):
    """A Qwen2.5-VL with ours' weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    config = w.ours.config
    sizes = read_shape(shape)
    text = dict(bos_token_id=None, eos_token_id=1, pad_token_id=config.pad_token_id)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
            text_config=sizes["text_config"] | text,
            vision_config=sizes["vision_config"],
            image_token_id=config.image_token_index,
            video_token_id=config.video_token_index,
            vision_start_token_id=sizes["vision_start_token_id"],
            vision_end_token_id=sizes["vision_end_token_id"],
            tie_word_embeddings=sizes["tie_word_embeddings"],
        ))
    tower = w.ours.visual.state_dict()
    for name in list(tower):
        if ".attn.q." in name:
            parts = [tower.pop(name.replace(".q.", f".{x}.")) for x in "qkv"]
            tower[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    model.model.visual.load_state_dict(tower, assign=True)
    model.model.language_model.load_state_dict(w.ours.model.state_dict(), assign=True)
    model.lm_head.load_state_dict(w.ours.lm_head.state_dict(), assign=True)
    return model


def peer_trainer(w: Work, shape: str, processor):
    """TRL's trainer of a Qwen2.5-VL with ours' weights, ready for a training_step on G rows."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    G, C = w.completions.shape
    # TRL reads the model twice: as policy and as reference.
    with tempfile.TemporaryDirectory() as folder:
        peer_model(w, shape).save_pretrained(folder)
        settings = GRPOConfig(
            folder,
            beta=0.04,
            loss_type="grpo",
            num_generations=G,
            per_device_train_batch_size=G,
            max_completion_length=C,
            bf16=False,
            use_cpu=not w.on_gpu,
            model_init_kwargs=dict(dtype=w.ours.dtype),
            report_to="none",
            # 1 would end a completion.
            generation_kwargs=dict(suppress_tokens=[1, *w.ours.suppressed.tolist()]),
        )
        never_read = Dataset.from_dict(dict(prompt=["never read"]))
        trainer = GRPOTrainer(folder, peer_reward, settings, never_read, processing_class=processor)
    trainer.model.model.visual.requires_grad_(False)
    # As in build: no way back through the frozen towers.
    trainer.model.enable_input_require_grads = do_nothing
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def do_nothing():
    pass


# ---- the program -----------------------------------------------------------------------------------
def table(parts: dict, kind: str) -> str:
    """One line a part."""
    head = ("part", "ours s", "recipe s", "ratio", "target", "ours GB", "recipe GB", "ratio", "target")
    lines = [table_line(head)]
    for name, row in parts.items():
        cells = [name]
        cells += [number(row[key], ".3f", "out of memory") for key in row if key.endswith("_s")]
        cells += [number(row["ratio"], ".2f"), number(TARGETS[kind].get(name), "g")]
        cells += [number(row[key], ".3f", "out of memory") for key in row if key.endswith("_gb")]
        cells += [number(row["memory_ratio"], ".2f"), number(MEMORY_TARGETS.get(name), "g")]
        lines.append(table_line(cells))
    return "\n".join(lines)


def table_line(cells) -> str:
    padded = [f"{cells[0]:>17}"]
    for cell in cells[1:]:
        padded.append(f"{cell:>13}")
    return "| " + " | ".join(padded) + " |"


def number(value: float | None, form: str, missing="") -> str:
    return missing if value is None else format(value, form)


def read_options(arguments):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--shape", choices=["tiny", "small", "3b", "7b"], default="small")
    add("--prompt", type=at_least(16), default=1024, help="tokens of the prompt, nearly all of a video (P)")
    add("--completion", type=at_least(2), default=128, help="tokens of each completion (C)")
    add("--group", type=at_least(2), default=8, help="completions of the prompt (G)")
    add("--device", choices=["cpu", "cuda"], default=default_device)
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--repeats", type=at_least(1), default=3,
        help="timed runs of each part and side, after one that is not")
    add("--threads", type=at_least(1), help="of the CPU; default: as torch decides")
    add("--peer", action="store_true", help="also a step of TRL's GRPOTrainer, where TRL is installed")
    add("--scaling", action="store_true",
        help="also the policy pass over P and over G, into speed/scaling.png")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = read_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    on_cpu = options.device == "cpu"
    dtype = getattr(torch, options.dtype or ("float32" if on_cpu else "bfloat16"))
    P, C, G = options.prompt, options.completion, options.group
    ours, theirs = build(options.shape, dtype, options.device)
    clip, boxes = clip_and_boxes(G, 128 if on_cpu else 640)
    sized = sized_fields(ours, theirs, P, C, G)
    w = Work(ours, theirs, build_tracker(options.device), clip=clip, boxes=boxes, **sized)
    # Memory before anything else: a fork of a process that has computed inherits what that left behind.
    peaks = {}
    for part in PARTS:
        peaks[part] = {name: peak_memory(w, side[part]) for name, side in SIDES.items()}
    peer = measure_peer(w, options.shape, options.repeats) if options.peer else None
    # TRL's trainer refers to itself, and would keep its two models.
    gc.collect()
    proof = prove(w)
    print("the same outputs:", json.dumps(proof))
    times = {part: alternate(w, part, options.repeats, SIDES) for part in PARTS}
    parts = {part: figures(times[part], peaks[part]) for part in PARTS}
    shown = dict(parts)
    if peer:
        shown[f"peer (trl {peer['trl']})"] = peer["step"]
    print(table(shown, options.device))
    if options.peer:
        print(PEER if peer else f"| {'peer (trl)':>17} | not installed |")
    report(w, options, dict(proof=proof, parts=parts), times, peer)


def report(w: Work, options, measured: dict, times: dict, peer: dict | None) -> None:
    """Prints everything as one line of JSON."""
    result = dict(
        shape=options.shape,
        prompt=options.prompt,
        completion=options.completion,
        group=options.group,
        dtype=str(w.ours.dtype).removeprefix("torch."),
        device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        **measured,
        physics={},
        versions={name: version(name) for name in ("torch", "transformers", "sam2")},
    )
    if w.on_gpu:
        result["device"] = torch.cuda.get_device_name()
        result["physics"] = physics(w, times["rollout"]["ours"], times["policy"]["ours"])
    if options.peer:
        result["peer"] = peer or "not installed"
    if options.scaling:
        result["scaling"] = scaling(w, options.prompt, options.completion, options.group, options.repeats)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
