"""The memory plan: bytes on each device in each phase of a step, from shapes alone; and facts about GPUs.

    python train.py --plan --policy speed/shapes/7b --nproc 1,8

Letters: B prompts of a device, G completions of a prompt, C tokens of a completion, P tokens of a prompt,
D width, V vocabulary.
"""
import os
from pathlib import Path

import torch

from data import KEYFRAMES
from model import HEAD_TOKENS, Thinker, add_adapters, read_config
from trust.options import reference_folder
from trust.sam2_config import build_sam2, find_config

# ---- GPUs ------------------------------------------------------------------------------------------
# GB of a device.
GPUS = (24, 40, 48, 80, 141)
# The share of a device that the plan may fill. Driver, libraries and gaps of the allocator take the rest.
USABLE = 0.92
# By a part of the name: memory bandwidth (bytes a second) and dense bf16 arithmetic (operations a second).
GPU_LIMITS = {
    "B200": (8.0e12, 2250e12),
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.0e12, 312e12),
    "L40S": (0.86e12, 362e12),
    "4090": (1.0e12, 165e12),
}


def pass_operations(thinker: Thinker, P: int, G: int, C: int, frozen: bool = False) -> float:
    """Useful operations of a forward and backward pass over a prefix of P tokens and G completions of C.

    frozen: the weights get no gradient.
    """
    config = thinker.config.text_config
    layers = count(thinker.model.layers)
    head = count(thinker.lm_head)
    # Pairs of tokens that attend to one another.
    pairs = P * P / 2 + G * C * (P + C / 2)
    each = 4 if frozen else 6
    products = each * (layers * (P + G * C) + head * G * C)
    attention = 12 * config.num_hidden_layers * config.hidden_size * pairs
    return products + attention


def token_bytes(thinker: Thinker) -> int:
    """Bytes of weights that are read to draw a token. Embeddings are looked up, not read."""
    weights = [*thinker.model.layers.parameters(), *thinker.lm_head.parameters()]
    return sum(p.numel() * p.element_size() for p in weights)


def count(module: torch.nn.Module) -> int:
    """How many numbers a module's weights hold."""
    return sum(p.numel() for p in module.parameters())


# ---- the plan --------------------------------------------------------------------------------------
# Bytes that SAM2 takes to track 32 objects at 1024 x 1024; an estimate.
TRACKING = 4e9
# Tokens of a keyframe's prompt and answer.
GROUNDED = 1150


def memory_plan(settings, world: int) -> dict[str, dict[str, float]]:
    """{phase: {what: bytes}} on each of `world` devices, when every completion is as long as allowed."""
    thinker = without_memory(settings.policy, settings.lora_rank)
    system2 = thinker
    V = thinker.config.text_config.vocab_size
    D = thinker.config.text_config.hidden_size
    number_size = number_bytes(settings)
    sam2 = build_sam2(settings.sam2 or find_config(settings.sam2_weights))
    resting = resting_weights(settings, world, thinker, sam2)
    folder = reference_folder(settings.system2)
    if folder:
        system2 = without_memory(folder)
        resting["System 2"] = count(system2) * number_size

    rollout = dict(resting)
    grounding = dict(resting)
    update = dict(resting)
    loading = resting
    if not settings.lora_rank:
        whole = language_weights(thinker) * number_size
        loading = {"policy, before it is sharded": 4 * count(thinker)}
        rollout["whole weights"] = whole
        update["whole weights"] = whole
        # Both are whole matrices, in the dtype of computation and in float32, until they are sharded.
        update["gradients of embeddings and head"] = 2 * V * D * (number_size + 4)
        if settings.reference != "device":
            grounding["whole reference"] = whole

    B = -(-settings.batch // world)
    G = settings.group
    tokens = settings.prompt_tokens + G * settings.max_new_tokens
    rollout["cache"] = B * tokens * cache_bytes(thinker, number_size)
    # Three copies of the logits in float32.
    rollout["logits"] = 12 * B * G * V
    grounding["cache of keyframes"] = B * G * KEYFRAMES * GROUNDED * cache_bytes(system2, number_size)
    masks = resting | {"tracking": TRACKING * (sam2.image_size / 1024) ** 2}
    update |= activations(settings, thinker)
    return dict(loading=loading, rollout=rollout, grounding=grounding, masks=masks, update=update)


def resting_weights(settings, world: int, thinker: Thinker, sam2: torch.nn.Module) -> dict[str, float]:
    """{what: bytes} of what stays on a device in all phases."""
    number_size = number_bytes(settings)
    weights = language_weights(thinker)
    trained = sum(p.numel() for p in thinker.parameters() if p.requires_grad)
    resting = {"towers": (count(thinker) - weights) * number_size, "SAM2": 4 * count(sam2)}
    if settings.lora_rank:
        resting["frozen weights"] = (weights - trained) * number_size
        resting["adapters, gradients, AdamW"] = 16 * trained
        return resting
    shards = world
    if settings.hybrid:
        shards = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", 8)))
    # Weights, gradients and AdamW's two moments in float32.
    resting["weights, gradients, AdamW"] = 16 * trained / shards
    resting["reference"] = 0
    if settings.reference == "device":
        resting["reference"] = weights * number_size
    elif settings.reference == "shard":
        resting["reference"] = weights * number_size / shards
    return resting


def activations(settings, thinker: Thinker) -> dict[str, float]:
    """{what: bytes} of the update's forward and backward pass, one group at a time."""
    config = thinker.config.text_config
    number_size = number_bytes(settings)
    completions = settings.group * settings.max_new_tokens
    rows = settings.prompt_tokens + completions
    # Forward and backward of one layer; the forward leaves about half of it.
    layer = rows * (11 * config.hidden_size + 5.5 * config.intermediate_size) * number_size
    kept = (config.num_hidden_layers - 1) * layer / 2
    if settings.checkpointing:
        kept = config.num_hidden_layers * rows * config.hidden_size * number_size
    logits = 12 * min(HEAD_TOKENS, completions) * config.vocab_size
    return {"kept of all layers": kept, "a layer, or logits": max(layer, logits)}


def cache_bytes(thinker: Thinker, number_size: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = thinker.config.text_config
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * number_size


def without_memory(path: str, lora_rank: int = 0) -> Thinker:
    """The Thinker of a directory, of which config.json is enough: shapes without numbers."""
    with torch.device("meta"):
        thinker = Thinker(read_config(Path(path)))
        if lora_rank:
            add_adapters(thinker, lora_rank, 0)
    return thinker


def language_weights(thinker: Thinker) -> int:
    """How many numbers all weights but the towers' hold."""
    return count(thinker) - count(thinker.visual) - count(thinker.audio_tower)


def number_bytes(settings) -> int:
    """Bytes of a number in the dtype of computation."""
    return 2 if settings.dtype == "bfloat16" else 4


def print_plan(settings, worlds: list[int]) -> None:
    """Prints GB on each device in each phase, a line for each number of processes, and parts of the last."""
    for world in worlds:
        plan = memory_plan(settings, world)
        totals = {phase: sum(parts.values()) / 1e9 for phase, parts in plan.items()}
        fits = [f"{size} GB" for size in GPUS if max(totals.values()) <= USABLE * size]
        phases = " ".join(f"{phase} {total:.1f}" for phase, total in totals.items())
        if not fits:
            fits = [f"no device of up to {GPUS[-1]} GB"]
        print(f"{world:3} x {phases}    fits {' '.join(fits)}")
    parts = {}
    for phase in plan.values():
        parts |= phase
    shown = [f"{what} {size / 1e9:.1f}" for what, size in parts.items() if size / 1e9 > 0.05]
    print("  with:", ", ".join(shown))
    if settings.reference == "host" and not settings.lora_rank:
        print(f"  and in host memory, for each device, the reference {parts['whole reference'] / 1e9:.1f}")
