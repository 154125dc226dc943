"""The GRPO step against the usual recipe, part by part: first that both give the same, then seconds and peak memory.

    python bench/step.py                                                              # CPU, a minute or ten
    python bench/step.py --shape 7b --prompt 4096 --completion 512 --device cuda      # one GPU of 140 GB

The recipe is transformers' own model with the same weights (the very same memory): `generate` over G rows, a full forward
over G (P + C) tokens for the policy and again for the reference, with full logits; SAM2's own predictor, called once per
completion. Weights are random, and so is the video in the prompt. Both sides have frozen towers and compute activations again
in the backward pass, as train.py does by default; both keep gradients of all language-model weights.

--peer adds a row: one whole step without masks against the same step of TRL's GRPOTrainer, where TRL is installed.

Letters: P prompt tokens, all of them (model.py's prefix and one more), G completions of C tokens, V vocabulary, T frames.
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
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"  # SAM2's predictor draws bars of its own
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be downloaded, and TRL counts its users
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from PIL import Image
from sam2 import sam2_video_predictor
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.utils import logging

from data import Clip, Frames, at_least, toy_scene
from grpo import group_advantages, policy_loss
from model import Prompt, Thinker
from rewards import mask_box
from segment import TOY_SAM2, Tracker, build_sam2, find_config, track_groups

PARTS = ("rollout", "policy", "reference", "masks", "whole")
# Times faster (and of memory: times less) than the recipe.
TARGETS = {"cuda": dict(rollout=6.0, policy=3.5, masks=8.0, whole=5.0),
           "cpu": dict(rollout=3.0, policy=3.0, masks=8.0, whole=3.0)}
MEMORY_TARGETS = dict(policy=4.0)
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second of the device's memory, by its name
PEAK_FLOPS = 989e12  # bf16 without sparsity, both of them
PROOF_ROWS, PROOF_TOKENS = 2, 64  # size of the proof: enough for every path, and eager attention fits
FRAMES, PAIRS = 16, 8  # of the tracked video; of the prompt's video, whose tokens each span two frames

# ---- shapes and weights ------------------------------------------------------------------------------------------

def config_of(shape: str) -> Qwen2_5OmniThinkerConfig:
    """The Thinker at a size. The towers of "small" take about the share of the language model's work that the 7B's do. "3b" is
    put together from its published language model; its towers are taken to be those of the 7B, its head untied."""
    return Qwen2_5OmniThinkerConfig.from_dict(read_shape(shape))


def read_shape(shape: str) -> dict:
    return json.loads((HERE / f"shapes/{shape}/config.json").read_text())


def build(shape: str, dtype: torch.dtype, device: str) -> tuple[Thinker, Qwen2_5OmniThinkerForConditionalGeneration]:
    """Ours and transformers' with the same random weights, which lie in memory once; gradients are each one's own."""
    config = config_of(shape)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        theirs = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    for name, weight in theirs.named_parameters():  # larger than usual: attention that is flat would hide mistakes
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5 if "embed_tokens" in name else 1.5 * weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    with torch.device("meta"):
        ours = Thinker(config)
    home, language = parts_of(theirs)
    ours.visual, ours.audio_tower = home.visual.requires_grad_(False), home.audio_tower.requires_grad_(False)
    ours.model.load_state_dict(language.state_dict(), assign=True)
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict(), assign=True)
    ours.gradient_checkpointing = True
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    theirs.disable_input_require_grads()  # its hooks would make the recipe go back through the frozen towers, too
    return ours.train(), theirs


def parts_of(theirs):
    """(what holds the towers and position ids, the language model): newer transformers keep them one level deeper."""
    return (theirs, theirs.model) if hasattr(theirs, "visual") else (theirs.model, theirs.model.language_model)


def build_tracker(device: str) -> Tracker:
    """The toy's SAM2 on a CPU, the largest published one with random weights on a GPU."""
    if device == "cpu":
        return Tracker.from_pretrained(find_config(TOY_SAM2), TOY_SAM2)
    model = build_sam2("sam2.1_hiera_l").to(device)
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)  # every object counts as seen
    return Tracker(model)


# ---- the work ----------------------------------------------------------------------------------------------------

@dataclass
class Work:
    """One prompt, one clip, and who works on them."""
    ours: Thinker
    theirs: Qwen2_5OmniThinkerForConditionalGeneration
    tracker: Tracker
    item: SimpleNamespace  # the prompt as data.py would hand it over: ids (P,), positions (3, P), patches, grid
    prompt: Prompt  # the same after the towers; rollouts make it anew
    completions: Tensor  # (G, C)
    advantages: Tensor  # (G,)
    reference_logp: Tensor  # (G, C)
    clip: Clip  # T frames
    boxes: list  # G dicts {frame: [boxes]}

    @property
    def group(self):
        return len(self.completions)


def rows_of(ours, theirs, P: int, C: int, G: int) -> dict:
    """The fields of Work that depend on the sizes: a prompt of a few words and a video that fills it, and random rows."""
    config, random = ours.config, torch.Generator().manual_seed(0)
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    high = math.isqrt((P - 8) // PAIRS)  # in merged patches, about square
    wide = (P - 8) // PAIRS // high
    video = [config.video_token_index] * (PAIRS * high * wide)
    text = lambda *shape: torch.randint(9, min(config.text_config.vocab_size, 100_000), shape, generator=random)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    ids = torch.cat([text(3), torch.tensor([start, *video, end]), text(P - len(video) - 5)])  # (P,)
    grid = torch.tensor([[PAIRS, merge * high, merge * wide]])
    patches = torch.randn(int(grid.prod()), 3 * config.vision_config.temporal_patch_size * patch ** 2, generator=random)
    positions = parts_of(theirs)[0].get_rope_index(ids[None], None, grid, torch.ones(1, P, dtype=torch.long), False, None,
                                                   torch.tensor([1.0]))[0][:, 0]
    item = SimpleNamespace(ids=ids, positions=positions, patches=patches, grid=grid, mel=None)
    completions = text(G, C).to(ours.device)
    return dict(item=item, prompt=ours.embed([item])[0], completions=completions,
                advantages=torch.randn(G, generator=random).to(ours.device),
                reference_logp=torch.full(completions.shape, -math.log(config.text_config.vocab_size), device=ours.device))


def clip_and_boxes(G: int, size: int) -> tuple[Clip, list]:
    """T toy frames, `size` pixels a side, and for each of G completions two objects, each prompted on a frame of its own.
    No two boxes are equal: sharing them would be ours alone."""
    scene = toy_scene("long", 1)
    factor = size / scene.pictures.shape[1]
    frames = [Image.fromarray(picture).resize((size, size)) for picture in scene.pictures[:FRAMES]]
    seen = [[t for t in range(FRAMES) if mask[t].sum() >= 30] for mask in scene.masks]
    things = [o for o, times in enumerate(seen) if times]
    boxes = [{} for _ in range(G)]
    for g, o in np.ndindex(G, 2):
        thing = things[(g + o) % len(things)]
        t = seen[thing][(3 * g + 5 * o) % len(seen[thing])]
        box = np.array(mask_box(scene.masks[thing, t])) * factor + (0, 0, 0.25 * g, 0.25 * o)
        boxes[g].setdefault(t, []).append(tuple(np.minimum(box, size - 1).tolist()))
    return Clip("bench", Frames(lambda t: frames[t], range(FRAMES)), "", masks=None), boxes


# ---- ours --------------------------------------------------------------------------------------------------------

def ours_rollout(w: Work, temperature=1.0) -> Tensor:
    """(G, C), and the prompt's features, which the other parts use."""
    w.prompt, = w.ours.embed([w.item])
    rows, = w.ours.generate([w.prompt], w.group, w.completions.shape[1], eos_ids={-1}, temperature=temperature)
    return torch.stack(rows).to(w.ours.device)


def ours_policy(w: Work) -> Tensor:
    logp, _ = w.ours.logprobs(w.prompt, w.completions)
    loss(w, logp).backward()
    return logp.detach()


@torch.no_grad()
def ours_reference(w: Work) -> Tensor:
    return w.ours.logprobs(w.prompt, w.completions)[0]


def ours_masks(w: Work) -> list:
    return list(track_groups(w.tracker, [w.clip], [w.boxes])[0])


# ---- the usual recipe --------------------------------------------------------------------------------------------

def recipe_inputs(w: Work, ids: Tensor) -> dict:
    """G rows (G, S) with G copies of the video, which the towers see G times."""
    G, device = len(ids), w.ours.device
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True,
                pixel_values_videos=w.item.patches.to(device, w.ours.dtype).repeat(G, 1),
                video_grid_thw=w.item.grid.to(device).repeat(G, 1), video_second_per_grid=torch.ones(G, device=device))


@torch.no_grad()
def recipe_rollout(w: Work, temperature=1.0) -> Tensor:
    """(G, C). The rows are copied here: num_return_sequences would copy each patch of a video instead of the video
    (transformers 5.17), and costs the same."""
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    C, P = w.completions.shape[1], len(w.item.ids)
    w.theirs.eval()
    how |= dict(max_new_tokens=C, pad_token_id=0, suppress_tokens=w.ours.suppressed.tolist())
    w.theirs.generation_config = GenerationConfig(**how)
    return w.theirs.generate(**recipe_inputs(w, w.item.ids.to(w.ours.device).repeat(w.group, 1)))[:, P:]


def recipe_logprobs(w: Work) -> Tensor:
    """(G, C) from the logits of all G (P + C) tokens; the softmax goes row by row, as the trainers do to save memory."""
    ids = torch.cat([w.item.ids.to(w.ours.device).expand(w.group, -1), w.completions], dim=1)  # (G, P + C)
    logits = w.theirs(**recipe_inputs(w, ids) | dict(use_cache=False)).logits[:, :-1]  # (G, P + C - 1, V)
    logits = logits.index_fill_(-1, w.ours.suppressed, -torch.inf)  # ours leaves these ids out of every softmax
    rows = [row.float().log_softmax(-1).gather(-1, target[:, None])[:, 0] for row, target in zip(logits, ids[:, 1:])]
    return torch.stack(rows)[:, -w.completions.shape[1]:]


def recipe_policy(w: Work) -> Tensor:
    w.theirs.train()  # else it would not compute activations again; nothing in it drops out
    logp = recipe_logprobs(w)
    loss(w, logp).backward()
    return logp.detach()


@torch.no_grad()
def recipe_reference(w: Work) -> Tensor:
    w.theirs.eval()
    return recipe_logprobs(w)


@torch.inference_mode()
def recipe_masks(w: Work) -> list:
    """For each completion: its frames written to a folder, encoded, and its objects tracked one after the other."""
    model, found = w.tracker.model, []
    with predictor_precision(w.ours.device.type):
        for boxes in w.boxes:
            with tempfile.TemporaryDirectory() as folder:
                for t in range(len(w.clip.frames)):  # it insists on the name, not on the format; lossless for both
                    w.clip.frames[t].save(f"{folder}/{t:05d}.jpg", format="png", compress_level=1)
                state = model.init_state(folder)
                for n, (t, box) in enumerate((t, box) for t, many in boxes.items() for box in many):
                    model.add_new_points_or_box(state, frame_idx=t, obj_id=n, box=np.array(box, np.float32))
                masks = [(logits[:, 0] > 0).any(0).cpu().numpy()
                         for _, _, logits in model.propagate_in_video(state, start_frame_idx=0)]
            found.append(np.stack(masks))  # [T, H, W]
    return found


@contextmanager
def predictor_precision(kind: str):
    """bf16 autocast on a GPU, as published. On a CPU float32, which is faster there and what ours computes in: the predictor
    rounds memories to bf16 by name, so the name has to mean float32."""
    single = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    with torch.autocast(kind, torch.bfloat16) if kind == "cuda" else mock.patch.object(sam2_video_predictor, "torch", single):
        yield


# ---- both --------------------------------------------------------------------------------------------------------

def loss(w: Work, logp: Tensor) -> Tensor:
    return policy_loss(logp, w.advantages, torch.ones_like(logp), None, w.reference_logp)[0]


def whole(side: dict, w: Work) -> None:
    """A step's parts in order, on what each one made; the grounding by System 2 is not among them."""
    w = replace(w)
    w.completions = side["rollout"](w)
    side["masks"](w)
    w.reference_logp = side["reference"](w)
    side["policy"](w)


OURS = dict(rollout=ours_rollout, policy=ours_policy, reference=ours_reference, masks=ours_masks)
RECIPE = dict(rollout=recipe_rollout, policy=recipe_policy, reference=recipe_reference, masks=recipe_masks)
OURS["whole"], RECIPE["whole"] = (lambda w, side=side: whole(side, w) for side in (OURS, RECIPE))
SIDES = dict(ours=OURS, recipe=RECIPE)


def forget_gradients(w: Work) -> None:
    w.ours.zero_grad()
    w.theirs.zero_grad()


# ---- the proof ---------------------------------------------------------------------------------------------------

def prove(w: Work) -> dict:
    """What ours and the recipe differ by. Ends the program where it is more than rounding."""
    cut = lambda x: x[:PROOF_ROWS, :PROOF_TOKENS]
    small = replace(w, completions=cut(w.completions), reference_logp=cut(w.reference_logp), advantages=w.advantages[:PROOF_ROWS])
    exact = w.ours.dtype == torch.float32
    greedy, wanted = ours_rollout(small, temperature=0.0), recipe_rollout(small, temperature=0.0)
    ours, recipe = (logp_and_gradients(small, side) for side in (OURS, RECIPE))
    limits = dict(logprobs=1e-4, gradients=1e-4)
    if not exact:  # no two kernels agree in bf16: transformers' own two set the limit
        w.theirs.set_attn_implementation("eager")
        eager = logp_and_gradients(small, RECIPE)
        limits = {name: BF16_SLACK * x for name, x in zip(limits, distances(eager, recipe, exact))}
        w.theirs.set_attn_implementation("sdpa")
    errors = dict(zip(limits, distances(ours, recipe, exact)))
    if exact:
        differing = int((greedy != wanted).sum())
    else:  # a token that is as likely as the likeliest, up to rounding, is as good
        at_ours, at_wanted = (recipe_reference(replace(small, completions=x)) for x in (greedy, wanted))
        agree = (greedy == wanted).long().cumprod(1).bool()  # after the first difference they go different ways
        first = (~agree).long().cumsum(1) == 1
        differing = int(((at_wanted - at_ours).abs()[first] > 0.1).sum())
    iou = prove_masks(w)
    failed = [f"{name} differ by {errors[name]:.1e} of their scale, more than {limits[name]:.1e}" for name in errors
              if not errors[name] <= limits[name]]
    failed += [f"{differing} greedy tokens differ"] * (differing > 0) + [f"masks' IoU is {iou:.3f}, not 0.99"] * (not iou >= 0.99)
    if failed:
        sys.exit("ours and the recipe do not give the same, so nothing is timed: " + "; ".join(failed))
    return dict(equal=True, errors=errors, limits=limits, iou=iou)


BF16_SLACK = 1.5  # how much farther than transformers' two kernels from each other ours may be from one of them


def logp_and_gradients(w: Work, side: dict) -> tuple[Tensor, dict]:
    """Log-probabilities (G, C) and the gradients of the language model and head, on the CPU: three sets of the 7B's would not
    fit a smaller GPU."""
    forget_gradients(w)
    logp = side["policy"](w).cpu()
    model, head = (w.ours.model, w.ours.lm_head) if side is OURS else (parts_of(w.theirs)[1], w.theirs.lm_head)
    gradients = {name: p.grad.cpu() for module in (model, head) for name, p in module.named_parameters()}
    forget_gradients(w)
    return logp, gradients


def distances(a, b, exact: bool) -> tuple[float, float]:
    """Of log-probabilities and of gradients, relative to the scale of b's: the largest anywhere, tensor by tensor, or in bf16,
    where that is an accident, the root mean square."""
    def distance(x, y):
        x, y = x.float(), y.float()
        return float((x - y).abs().max() / y.abs().max() if exact else (x - y).norm() / y.norm())

    assert a[1].keys() == b[1].keys()
    each = [distance(a[1][name], b[1][name]) for name in b[1]]
    return distance(a[0], b[0]), max(each) if exact else statistics.mean(each)


def prove_masks(w: Work) -> float:
    """The lowest IoU of a completion's masks, both in float32: in bf16, masks of random weights are noise."""
    with ExitStack() as stack:
        if w.ours.device.type == "cuda":
            stack.enter_context(mock.patch("torch.autocast", lambda *_, **__: nullcontext()))
            single = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
            stack.enter_context(mock.patch.object(sam2_video_predictor, "torch", single))
        few = replace(w, boxes=w.boxes[:PROOF_ROWS]) if w.ours.device.type == "cuda" else w
        pairs = list(zip(ours_masks(few), recipe_masks(few)))
    if not any(b.any() for _, b in pairs):
        sys.exit("SAM2 finds nothing at all, so masks cannot be compared")
    return float(min((a & b).sum() / max((a | b).sum(), 1) if (a | b).any() else 1.0 for a, b in pairs))


# ---- measuring ---------------------------------------------------------------------------------------------------

def seconds(w: Work, call) -> float:
    """One call, from a clean start to when the device is done."""
    forget_gradients(w)
    wait = torch.cuda.synchronize if w.ours.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call(w)
    wait()
    return time.perf_counter() - start


def alternate(w: Work, part: str, repeats: int, sides: dict = SIDES) -> dict:
    """{side: median seconds}; None where it does not fit. A warm-up each, then in turns, so that whatever else slows the machine
    meets both."""
    times = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            if times[name] is not None:
                try:
                    times[name].append(seconds(w, side[part]))
                except torch.OutOfMemoryError:
                    times[name] = None
                    release(w)
    return {name: statistics.median(t[1:]) if t else None for name, t in times.items()}


def release(w: Work) -> None:
    forget_gradients(w)
    torch.cuda.empty_cache()


def peak_memory(w: Work, call) -> float | None:
    """Bytes at the peak of one call beyond those in use before it (weights, prompt); None where it does not fit."""
    forget_gradients(w)
    if w.ours.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            call(w)
            return torch.cuda.max_memory_allocated() - before
        except torch.OutOfMemoryError:
            return None
        finally:
            release(w)
    # A fork starts with all that is loaded and nothing else, and its peak is its own.
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=resident_growth, args=(w, call, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:  # the system has killed it
        return None
    finally:
        child.join()


def resident_growth(w: Work, call, result) -> None:
    torch.set_num_threads(1)  # the threads of a fork's parent do not exist in it
    before = resident("VmRSS")
    call(w)
    result.send(resident("VmHWM") - before)


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024


def figures(times: dict, peaks: dict) -> dict:
    """A line of the table: times and peaks {side: seconds}, {side: bytes}, of ours and another."""
    gb = {f"{name}_gb": None if x is None else x / 1e9 for name, x in peaks.items()}
    ratios = dict(ratio=ratio(*times.values()), memory_ratio=ratio(*peaks.values()))
    return {f"{name}_s": t for name, t in times.items()} | ratios | gb


def physics(w: Work, rollout: float | None, policy: float | None) -> dict:
    """On a GPU: ours' decoding against the time to read the weights, and the useful work of the policy pass against the peak."""
    name = torch.cuda.get_device_name()
    bandwidth = next((b for key, b in BANDWIDTH.items() if key in name), None)
    if None in (bandwidth, rollout, policy):
        return {}
    (G, C), P, config = w.completions.shape, len(w.item.ids), w.ours.config.text_config
    first = statistics.median(seconds(replace(w, completions=w.completions[:, :1]), ours_rollout) for _ in range(3))
    steps = (C - 1) / (rollout - first)  # a second; without towers and prefill
    layers = sum(p.numel() for p in w.ours.model.layers.parameters())
    head = w.ours.lm_head.weight.numel()  # embeddings are looked up, not read
    pairs = P ** 2 / 2 + G * C * (P + C / 2)  # of tokens that attend to one another
    work = 6 * (layers * (P + G * C) + head * G * C) + 12 * config.num_hidden_layers * config.hidden_size * pairs
    read = (layers + head) * w.ours.lm_head.weight.element_size() * steps  # bytes a second
    return dict(decode_tokens_per_s=steps * G, bandwidth_share=read / bandwidth,
                policy_mfu=work / policy / PEAK_FLOPS)


def scaling(w: Work, P: int, C: int, G: int, repeats: int) -> dict:
    """Seconds of the policy pass over P and over G, into scaling.png: {"P": [[size, ours, recipe]], "G": ...}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves, work = {}, lambda P, G: (P + G * C, G * (P + C))  # tokens: ours, the recipe
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, letter, sizes in ((axes[0], "P", [(P * k // 4, G) for k in (1, 2, 4, 6, 8)]),
                                (axes[1], "G", [(P, max(1, G * k // 4)) for k in (1, 2, 4, 6, 8)])):
        xs = [size[letter == "G"] for size in sizes]
        times = [alternate(replace(w, **rows_of(w.ours, w.theirs, p, C, g)), "policy", repeats) for p, g in sizes]
        curves[letter] = [[x, t["ours"], t["recipe"]] for x, t in zip(xs, times)]
        for i, (side, colour, label) in enumerate((("ours", "C0", "P + G C"), ("recipe", "C3", "G (P + C)"))):
            ys = [t[side] for t in times]
            axis.plot(xs, [math.nan if y is None else y for y in ys], "o-", color=colour, label=side)
            k, y = next(((k, ys[k]) for k in (2, 1, 0) if ys[k] is not None), (0, math.nan))  # the line goes through this one
            axis.plot(xs, [y * work(*size)[i] / work(*sizes[k])[i] for size in sizes], ":", color=colour, label=f"as {label}")
        axis.set(xlabel=f"{letter} ({f'G = {G}' if letter == 'P' else f'P = {P}'}, C = {C})", ylabel="s", ylim=0)
    axes[0].set_title("policy pass, forward and backward", loc="left")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(HERE / "scaling.png", dpi=110)
    return curves


# ---- a peer: TRL -------------------------------------------------------------------------------------------------

PEER = """The peer's row: ours against TRL's GRPOTrainer.training_step, in the recipe's columns: image to patches, rollout, reward,
reference, loss and backward pass; neither optimizer nor masks. TRL does not know the Thinker: there it is Qwen2.5-VL with
the same weights, q, k and v of the tower in one matrix. Towers are frozen and layers computed again, on both sides. TRL prepares
the image 2 G times, keeps the reference as a second copy, and leaves placeholders in the softmax (ours takes them out)."""


def measure_peer(w: Work, shape: str, repeats: int) -> dict | None:
    """Figures of a step on one image and some words; None where TRL is not installed. Ends the program where the two sides see
    prompts or completions of different lengths or, in float32, other log-probabilities."""
    if importlib.util.find_spec("trl") is None:
        return None
    config, (G, C), P = w.ours.config, w.completions.shape, len(w.item.ids)
    high, side = math.isqrt(P - 8), config.vision_config.patch_size * config.vision_config.spatial_merge_size
    wide = (P - 8) // high  # in merged patches, each of `side` pixels
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side * high, side * wide, 3), np.uint8))
    words = " ".join(f"w{9 + i % 50}" for i in range(P - high * wide - 2))  # beside the image and its two brackets
    reward = lambda completion_ids, **_: [float(ids[0] % 7) for ids in completion_ids]
    processor = peer_processor(config)
    trainer = peer_trainer(w, shape, processor, reward)
    seen = {}  # of ours' last step

    def ours_step(w: Work) -> None:
        text = "<|vision_start|><|image_pad|><|vision_end|>" + words
        w, made = replace(w), processor(text=[text], images=[picture], return_tensors="pt")
        ids, grid = made["input_ids"], made["image_grid_thw"]
        positions = parts_of(w.theirs)[0].get_rope_index(ids, grid, None, torch.ones_like(ids), False, None, None)[0][:, 0]
        w.item = SimpleNamespace(ids=ids[0], positions=positions, patches=made["pixel_values"], grid=grid, mel=None)
        w.completions = ours_rollout(w)
        processor.batch_decode(w.completions)  # as TRL does
        w.advantages = group_advantages(reward(w.completions.tolist()), G).to(w.ours.device)
        w.reference_logp = ours_reference(w)
        ours_policy(w)
        seen.update(vars(w))

    def peer_step(w: Work) -> None:
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, [dict(prompt=[dict(role="user", content=words)], image=picture)] * G, None)

    sides = dict(ours=dict(step=ours_step), peer=dict(step=peer_step))
    peaks = {name: peak_memory(w, side["step"]) for name, side in sides.items()}
    times = alternate(w, "step", repeats, sides)
    if None in times.values():  # out of memory: nothing to compare
        return dict(trl=version("trl"), logprobs=None, step=figures(times, peaks))
    theirs, = trainer._buffered_inputs
    tokens = [(len(seen["prompt"].ids), *seen["completions"].shape)]
    tokens += [(int(row.sum()), *theirs["completion_mask"].shape) for row in theirs["prompt_mask"]]
    with mock.patch.object(Thinker, "suppressed", w.ours.suppressed[:0]), torch.no_grad():
        logp, wanted = w.ours.logprobs(seen["prompt"], theirs["completion_ids"])[0], theirs["ref_per_token_logps"]
    error = float((logp - wanted).abs().max() / wanted.abs().max())
    same = {*tokens} == {(P, G, C)} and theirs["completion_mask"].all() and (error <= 1e-4 or w.ours.dtype != torch.float32)
    if not same:
        sys.exit(f"TRL's work is not ours: prompt tokens, rows, tokens are {tokens}, log-probabilities differ by {error:.1e}")
    return dict(trl=version("trl"), logprobs=error, step=figures(times, peaks))


def peer_processor(config):
    """A processor of Qwen2.5-VL for a shape's ids: one word for each; the chat template is nothing but the content."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen2_5_VLProcessor
    special = {config.pad_token_id: "<|endoftext|>", 1: "<|im_end|>"}
    special |= {config.image_token_index: "<|image_pad|>", config.video_token_index: "<|video_pad|>"}
    special |= {config.vision_start_token_id: "<|vision_start|>", config.vision_end_token_id: "<|vision_end|>"}
    words = {special.get(i, f"w{i}"): i for i in range(config.text_config.vocab_size)}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w9"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token=special[config.pad_token_id], eos_token=special[1],
                                        extra_special_tokens=list(special.values()), padding_side="left")
    tower, any_size = config.vision_config, dict(shortest_edge=1, longest_edge=2 ** 30)
    vision = dict(patch_size=tower.patch_size, merge_size=tower.spatial_merge_size, temporal_patch_size=tower.temporal_patch_size)
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=any_size, **vision), tokenizer, Qwen2VLVideoProcessor(size=any_size, **vision),
        chat_template="<|vision_start|><|image_pad|><|vision_end|>{{ messages[0].content[1].text }}")


def peer_trainer(w: Work, shape: str, processor, reward):
    """TRL's trainer of a Qwen2.5-VL with ours' weights, ready for a training_step on G rows."""
    from datasets import Dataset
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer
    (G, C), config, sizes = w.completions.shape, w.ours.config, read_shape(shape)
    same = {f"{x}_token_id": getattr(config, f"{x}_token_index") for x in ("image", "video")}
    same |= {x: sizes[x] for x in ("vision_config", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")}
    text = sizes["text_config"] | dict(bos_token_id=None, eos_token_id=1, pad_token_id=config.pad_token_id)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, **same))
    tower = w.ours.visual.state_dict()
    for name in [name for name in tower if ".attn.q." in name]:
        tower[name.replace(".q.", ".qkv.")] = torch.cat([tower.pop(name.replace(".q.", f".{x}.")) for x in "qkv"])
    for part, weights in ((model.model.visual, tower), (model.model.language_model, w.ours.model.state_dict()),
                          (model.lm_head, w.ours.lm_head.state_dict())):
        part.load_state_dict(weights, assign=True)
    with tempfile.TemporaryDirectory() as folder:  # TRL reads it twice: the policy and the reference
        model.save_pretrained(folder)
        trainer = GRPOTrainer(folder, reward, GRPOConfig(
            folder, beta=0.04, loss_type="grpo", num_generations=G, per_device_train_batch_size=G, max_completion_length=C,
            bf16=False, use_cpu=w.ours.device.type == "cpu", model_init_kwargs=dict(dtype=w.ours.dtype), report_to="none",
            generation_kwargs=dict(suppress_tokens=[1, *w.ours.suppressed.tolist()])),  # 1 would end a completion
            Dataset.from_dict(dict(prompt=["never read"])), processing_class=processor)
    trainer.model.model.visual.requires_grad_(False)
    trainer.model.enable_input_require_grads = lambda: None  # see build
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1
    return trainer


# ---- the program -------------------------------------------------------------------------------------------------

def table(parts: dict, kind: str) -> str:
    """One line a part."""
    show = lambda x, digits: "out of memory" if x is None else f"{x:.{digits}f}"
    lines = [("part", "ours s", "recipe s", "ratio", "target", "ours GB", "recipe GB", "ratio", "target")]
    for name, p in parts.items():
        times, sizes = (["" if t.get(name) is None else f"{t[name]:g}"] for t in (TARGETS[kind], MEMORY_TARGETS))
        pair = lambda unit: (show(x, 3) for key, x in p.items() if key.endswith(unit))  # of ours and the other
        lines.append([name, *pair("_s"), ratio_text(p["ratio"]), *times, *pair("_gb"), ratio_text(p["memory_ratio"]), *sizes])
    return "\n".join("| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(line, (17, *[13] * 8))) + " |" for line in lines)


def ratio_text(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def ratio(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else other / max(ours, 1e-9)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "small", "3b", "7b"], default="small")
    parser.add_argument("--prompt", type=at_least(16), default=1024, help="tokens of the prompt, nearly all of a video (P)")
    parser.add_argument("--completion", type=at_least(2), default=128, help="tokens of each completion (C)")
    parser.add_argument("--group", type=at_least(2), default=8, help="completions of the prompt (G)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="timed runs of each part and side, after one that is not")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: as torch decides")
    parser.add_argument("--peer", action="store_true", help="also a step of TRL's GRPOTrainer, where TRL is installed")
    parser.add_argument("--scaling", action="store_true", help="also the policy pass over P and over G, into bench/scaling.png")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    logging.set_verbosity_error()
    dtype = getattr(torch, a.dtype or ("float32" if a.device == "cpu" else "bfloat16"))
    ours, theirs = build(a.shape, dtype, a.device)
    clip, boxes = clip_and_boxes(a.group, 128 if a.device == "cpu" else 640)
    rows = rows_of(ours, theirs, a.prompt, a.completion, a.group)
    w = Work(ours, theirs, build_tracker(a.device), clip=clip, boxes=boxes, **rows)
    # Before anything else, for a fork of a process that has computed inherits what that left behind.
    peaks = {part: {name: peak_memory(w, side[part]) for name, side in SIDES.items()} for part in PARTS}
    peer = measure_peer(w, a.shape, a.repeats) if a.peer else None
    gc.collect()  # TRL's trainer refers to itself, and would keep its two models
    proof = prove(w)
    print("the same outputs:", json.dumps(proof))
    times = {part: alternate(w, part, a.repeats) for part in PARTS}
    parts = {part: figures(t, peaks[part]) for part, t in times.items()}
    print(table(parts | ({f"peer (trl {peer['trl']})": peer["step"]} if peer else {}), a.device))
    if a.peer:
        print(PEER if peer else f"| {'peer (trl)':>17} | not installed |")
    gpu = torch.cuda.get_device_name() if a.device == "cuda" else None
    result = dict(shape=a.shape, prompt=a.prompt, completion=a.completion, group=a.group, dtype=str(dtype).removeprefix("torch."),
                  device=gpu or platform.processor() or platform.machine(), threads=torch.get_num_threads(), proof=proof,
                  parts=parts,
                  physics=physics(w, times["rollout"]["ours"], times["policy"]["ours"]) if gpu else {},
                  versions={name: version(name) for name in ("torch", "transformers", "sam2")})
    if a.peer:
        result["peer"] = peer or "not installed"
    if a.scaling:
        result["scaling"] = scaling(w, a.prompt, a.completion, a.group, a.repeats)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
