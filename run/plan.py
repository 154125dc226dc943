"""The plan: memory and time of each phase of a step on each device, from shapes alone; and facts about GPUs.

tests/test_plan.py holds the memory against a step of the real code at the real size. The time is an estimate.

    python train.py --plan --policy speed/shapes/7b --nproc 1,8

Letters: B prompts of a device, G completions of a prompt, C tokens of a completion, P tokens of a prompt,
D width, V vocabulary.
"""
import os
from pathlib import Path

import torch

from data import KEYFRAMES
from model import (
    HEAD_TOKENS,
    PREFILL_TOKENS,
    VISION_PATCHES,
    Thinker,
    add_adapters,
    read_config,
)
from run.settings import frame_range
from segment import GROUNDING_TOKENS
from trust.errors import BadInput
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
# Bytes that SAM2 takes at 1024 x 1024 to track 32 objects of a clip, for the frames of each further clip, and
# for the memory of each further object. Counted by tests/test_plan.py.
TRACKING = 6.2e9
TRACKED_CLIP = 0.46e9
TRACKED_OBJECT = 5e6
# Tokens of a keyframe's prompt and answer, of the answer alone, and patches of the picture.
GROUNDED = 1150
ANSWER = GROUNDING_TOKENS
PICTURE = 3600
# Processes of a node, where torchrun does not say it.
DEVICES_OF_A_NODE = 8


def memory_plan(settings, world: int) -> dict[str, dict[str, float]]:
    """{phase: {what: bytes}} on each of `world` devices, when every completion is as long as allowed."""
    thinker = without_memory(settings.policy, settings.lora_rank)
    system2 = thinker
    number_size = number_bytes(settings)
    sam2 = build_sam2(settings.sam2 or find_config(settings.sam2_weights))
    resting = resting_weights(settings, world, thinker, sam2)
    folder = reference_folder(settings.system2)
    if folder:
        system2 = without_memory(folder)
        resting["System 2"] = count(system2) * number_size

    B = -(-settings.batch // world)
    requests = B * settings.group * KEYFRAMES
    whole = {}
    awake = {}
    if not settings.lora_rank:
        whole["whole weights"] = language_weights(thinker) * number_size
        if settings.reference != "device":
            awake["whole reference"] = whole["whole weights"]

    drawn = largest(*[drawing(thinker, B, settings.group, *turn, number_size) for turn in turns(settings)])
    features = system2.config.text_config.hidden_size * number_size
    tokens = requests * GROUNDED
    asked = tokens * (cache_bytes(system2, number_size) + features)
    asked += batch_bytes(system2, min(PREFILL_TOKENS, tokens), number_size)
    # The vision tower rotates queries and keys in float32.
    seen = 34 * min(VISION_PATCHES, requests * PICTURE) * system2.config.vision_config.hidden_size
    referred = max(batch_bytes(thinker, P + settings.group * C, number_size) for P, C in turns(settings))
    tracking = TRACKING + (B - 1) * TRACKED_CLIP + max(0, requests - 32) * TRACKED_OBJECT
    return dict(
        loading=loading(settings, world, thinker, resting),
        rollout=resting | whole | drawn,
        grounding=resting | awake | {"pictures, keyframes, or reference": max(asked, seen, referred)},
        masks=resting | {"tracking": tracking * (sam2.image_size / 1024) ** 2},
        update=update(settings, world, thinker, resting | whole),
    )


def turns(settings) -> list[tuple[int, int]]:
    """(tokens of a prompt, of a completion) of each turn of the policy."""
    first = settings.prompt_tokens, settings.max_new_tokens
    return [first, (GROUNDED - ANSWER, ANSWER)] if settings.ground_weight else [first]


def drawing(thinker: Thinker, B: int, G: int, P: int, C: int, number_size: int) -> dict[str, float]:
    """{what: bytes} while G completions of each of B prompts are drawn."""
    rows = B * G
    # When half of the rows have ended, the others are copied.
    staying = rows * C * cache_bytes(thinker, number_size) / 2
    read = batch_bytes(thinker, min(max(PREFILL_TOKENS, P), B * P), number_size)
    return {
        "cache": (B * P + rows * C) * cache_bytes(thinker, number_size),
        "reading prompts, or rows that stay": max(read, staying),
        # Three copies in float32.
        "logits of a token": 12 * rows * thinker.config.text_config.vocab_size,
    }


def largest(*moments: dict[str, float]) -> dict[str, float]:
    """The moment at which most memory is used."""
    return max(moments, key=lambda parts: sum(parts.values()))


def shards_of(settings, world: int) -> int:
    """How many devices share the weights."""
    return min(world, devices_of_a_node()) if settings.hybrid else world


def devices_of_a_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", DEVICES_OF_A_NODE))


def resting_weights(settings, world: int, thinker: Thinker, sam2: torch.nn.Module) -> dict[str, float]:
    """{what: bytes} of what stays on a device in all phases."""
    number_size = number_bytes(settings)
    weights = language_weights(thinker)
    trained = sum(p.numel() for p in thinker.parameters() if p.requires_grad)
    resting = {"towers": (count(thinker) - weights) * number_size, "SAM2": 4 * count(sam2)}
    if settings.lora_rank:
        resting["frozen weights"] = (weights - trained) * number_size
        resting["adapters, AdamW"] = 12 * trained
        return resting
    shards = shards_of(settings, world)
    # Weights and AdamW's two moments in float32.
    resting["weights, AdamW"] = 12 * trained / shards
    resting["reference"] = 0
    if settings.reference == "device":
        resting["reference"] = weights * number_size
    elif settings.reference == "shard":
        resting["reference"] = weights * number_size / shards
    return resting


def loading(settings, world: int, thinker: Thinker, resting: dict) -> dict[str, float]:
    """{what: bytes} while the models are loaded."""
    if settings.lora_rank:
        return resting
    weights = language_weights(thinker)
    # The policy is loaded in float32 and sharded. Then comes the reference, whose towers replace its own.
    policy = {"policy, before it is sharded": 4 * count(thinker)}
    both = {
        "policy, sharded": 4 * weights / shards_of(settings, world),
        "its towers": 4 * (count(thinker) - weights),
        "reference, whole": count(thinker) * number_bytes(settings),
    }
    return largest(policy, both, resting)


def update(settings, world: int, thinker: Thinker, resting: dict) -> dict[str, float]:
    """{what: bytes} of the update, one group at a time, in the largest of its moments."""
    config = thinker.config.text_config
    number_size = number_bytes(settings)
    trained = sum(p.numel() for p in thinker.parameters() if p.requires_grad)
    passes = [activations(settings, thinker, *turn) for turn in turns(settings)]
    if settings.lora_rank:
        return resting | largest(*passes) | {"gradients": 4 * trained}
    gradients = {"gradients": 4 * trained / shards_of(settings, world)}
    matrix = config.vocab_size * config.hidden_size
    # The first layer's backward pass. Gradients of earlier groups rest meanwhile.
    if settings.batch * settings.accumulate > world:
        passes[0] |= gradients
    early = resting | largest(passes[0], *[later | gradients for later in passes[1:]])
    # The head's gradient waits for that of the embeddings.
    early["gradient of the head"] = matrix * number_size
    # The end of it. All layers are sharded again; embeddings and head are whole, as are their gradients, in
    # the dtype of computation and in float32.
    end = resting | gradients
    end["whole weights"] = 2 * matrix * number_size
    end["gradients of embeddings and head"] = 2 * matrix * (number_size + 4)
    return largest(early, end)


def activations(settings, thinker: Thinker, P: int, C: int) -> dict[str, float]:
    """{what: bytes} of the update's forward and backward pass, one group at a time."""
    config = thinker.config.text_config
    number_size = number_bytes(settings)
    completions = settings.group * C
    rows = P + completions
    # Forward and backward of one layer, and what its forward leaves where nothing is computed again.
    layer = rows * (11 * config.hidden_size + 5.5 * config.intermediate_size) * number_size
    left = rows * (13 * config.hidden_size + 4 * config.intermediate_size) * number_size
    kept = (config.num_hidden_layers - 1) * left
    if settings.checkpointing:
        kept = config.num_hidden_layers * rows * config.hidden_size * number_size
    logits = 12 * min(HEAD_TOKENS, completions) * config.vocab_size
    return {"kept of all layers": kept, "a layer, or logits": max(layer, logits)}


def batch_bytes(thinker: Thinker, tokens: int, number_size: int) -> float:
    """Bytes of the activations of so many tokens in a layer, without gradient."""
    config = thinker.config.text_config
    return tokens * (5 * config.hidden_size + 3 * config.intermediate_size) * number_size


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


def check_shares(settings, world: int) -> None:
    """Raises BadInput where a batch cannot be shared by processes, or their share by parts."""
    if settings.batch % world:
        raise BadInput(f"--batch {settings.batch} cannot be shared by {world} processes")
    own = settings.batch // world * settings.accumulate
    if own % settings.parts:
        raise BadInput(f"--parts {settings.parts}: the {own} prompts of a process cannot be shared by them")


def print_plan(settings, worlds: list[int]) -> None:
    """Prints GB on each device in each phase of a step, a line for each number of processes, and parts of the
    last. With --plan also estimates of its time."""
    parts = {}
    for world in worlds:
        try:
            check_shares(settings, world)
        except BadInput as problem:
            print(f"{world:3} x no: {problem}")
            continue
        plan = memory_plan(settings, world)
        totals = {phase: sum(parts.values()) / 1e9 for phase, parts in plan.items()}
        fits = [f"{size} GB" for size in GPUS if max(totals.values()) <= USABLE * size]
        phases = " ".join(f"{phase} {total:.1f}" for phase, total in totals.items())
        if not fits:
            fits = [f"no device of up to {GPUS[-1]} GB"]
        print(f"{world:3} x {phases}    fits {' '.join(fits)}")
        parts = largest_parts(plan)
        planned = world
    if not parts:
        return
    shown = [f"{what} {size / 1e9:.1f}" for what, size in parts.items() if size / 1e9 > 0.05]
    print("  with:", ", ".join(shown))
    if settings.reference == "host" and not settings.lora_rank:
        pinned = pinned_bytes(parts["whole reference"]) / 1e9
        processes = min(planned, devices_of_a_node())
        print(f"  and in each node's host memory the references of its {processes} processes: {processes} x "
              f"{pinned:.1f} = {processes * pinned:.1f} GB, pinned")
    # Not at the start of every run.
    if settings.plan and settings.dtype == "float32":
        scores = scores_bytes(settings) / 1e9
        print(f"  and in float32 on a GPU several times attention's scores, {scores:.1f}")
    elif settings.plan:
        print_times(settings, planned)


def largest_parts(plan: dict) -> dict[str, float]:
    """{what: bytes} of all phases; of what is in several, the most."""
    parts = {}
    for phase in plan.values():
        for what, size in phase.items():
            parts[what] = max(size, parts.get(what, 0))
    return parts


def scores_bytes(settings) -> int:
    """Bytes of the scores of a group's rows over prompt and completion, in float32, in one layer."""
    heads = without_memory(settings.policy).config.text_config.num_attention_heads
    rows = settings.group * settings.max_new_tokens
    return 4 * heads * rows * (settings.prompt_tokens + settings.max_new_tokens)


def pinned_bytes(size: float) -> int:
    """Bytes of host memory that a pinned tensor takes: torch rounds them up to a power of two."""
    return 1 << (int(size) - 1).bit_length()


# ---- time ------------------------------------------------------------------------------------------
# GPUs that an estimate is printed for.
TIMED = ("H100", "H200", "A100")
# Shares of a GPU's limits. NONE IS MEASURED. They follow from the kernels that a traced step launches and the
# rates that others publish for such kernels on an H100 or H200.
# Of the bandwidth, while tokens are drawn: small kernels take as long as reading the weights.
DRAWING = 0.45
# Of the arithmetic, in a forward pass.
READING = 0.5
# Of the arithmetic, in an update. What checkpointing computes again does not count.
UPDATING = 0.4
# Of the arithmetic, in SAM2's attention to its memory, whose heads are wide.
FOLLOWING = 0.28
# Operations for an object on a frame at 1024 x 1024 when its memory is full, by the largest SAM2.
OBJECT_ON_A_FRAME = 0.6e12
# Seconds for the reward of a completion, on one CPU thread.
REWARD = 0.03
# The published run: 775 steps of 8 prompts, on 8 GPUs.
PUBLISHED_PROMPTS = 6200


def time_plan(settings, world: int, gpu: str, thinker: Thinker, side: int = 1024) -> dict[str, float]:
    """{phase: seconds} of a step in bf16 on `world` GPUs of a kind of GPU_LIMITS: an estimate.

    Every completion is as long as allowed, every keyframe has one box, and System 2 is as large as the
    policy. Clips are there in time. Communication takes none. side: pixels of SAM2's pictures.
    """
    bandwidth, arithmetic = GPU_LIMITS[gpu]
    number_size = number_bytes(settings)
    weights = (count(thinker.model.layers) + count(thinker.lm_head)) * number_size
    B = -(-settings.batch // world)
    G = settings.group
    requests = B * G * KEYFRAMES
    asked = GROUNDED - ANSWER

    def read(prompts, tokens, patches):
        """Seconds for the tower and the layers over some prompts."""
        tower = 2 * count(thinker.visual) * patches
        layers = pass_operations(thinker, tokens, 0, 0) / 3
        return prompts * (tower + layers) / READING / arithmetic

    def draw(prompts, n, tokens, steps):
        """Seconds for all tokens of n rows of each prompt. On average half of a row is in the cache."""
        cached = prompts * (tokens + n * steps / 2)
        size = weights + cached * cache_bytes(thinker, number_size)
        return steps * size / DRAWING / bandwidth

    rollout = 0.0
    operations = 0.0
    for P, C in turns(settings):
        # A visual token is four patches.
        rollout += read(B, P, 4 * P) + draw(B, G, P, C)
        operations += B * pass_operations(thinker, P, G, C)
    updating = settings.updates * operations / UPDATING
    if settings.parts > 1:
        # Before the first part, the log-probabilities that the ratios of all parts refer to.
        updating += operations / 3 / READING
    tracked = requests * frame_range(settings.frames)[1] * OBJECT_ON_A_FRAME * (side / 1024) ** 2
    times = dict(
        rollout=rollout,
        grounding=read(requests, asked, PICTURE) + draw(requests, 1, asked, ANSWER),
        reference=operations / 3 / READING / arithmetic if settings.beta else 0.0,
        masks=tracked / FOLLOWING / arithmetic if settings.consistency else 0.0,
        rewards=B * G * REWARD,
        update=updating / arithmetic,
    )
    return {phase: settings.accumulate * seconds for phase, seconds in times.items()}


def print_times(settings, world: int) -> None:
    """Prints estimates: seconds of a step in each phase and of a completion, hours of the published run."""
    thinker = without_memory(settings.policy)
    side = build_sam2(settings.sam2 or find_config(settings.sam2_weights)).image_size
    prompts = settings.batch * settings.accumulate
    print(f"  seconds of a step on {world}, an estimate (no share of a GPU's limits is measured, System 2 is "
          f"taken to be as large as the policy):")
    for gpu in TIMED:
        times = time_plan(settings, world, gpu, thinker, side)
        phases = " ".join(f"{phase} {seconds:.1f}" for phase, seconds in times.items())
        step = sum(times.values())
        hours = step * PUBLISHED_PROMPTS / prompts / 3600
        print(f"  {gpu}: {phases}, in all {step:.1f}; a completion {step / prompts / settings.group:.2f}; "
              f"a run of {PUBLISHED_PROMPTS} prompts, as published, {hours:.1f} hours")
