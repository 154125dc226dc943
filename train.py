"""Trains System 1 by GRPO. One process, one GPU, eight, two nodes:

    python train.py                                             # the toy world, CPU or GPU
    python train.py --policy QWEN_DIR --sam2_weights FILE ...
    torchrun --nproc_per_node 8 train.py ...
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:29500 train.py ...

Settings come from three places, later ones win: the defaults below (as published, for the 7B), `training.json` in the policy's
directory if there is one, and `--name value` on the command line.
Writes out/NAME/: settings.json, metrics.jsonl (a line a step), curves.png, step-000100/ ... and policy/ (checkpoints).
The same command again continues a run that was cut off, from its newest checkpoint, with any number of processes.
"""
import argparse
import dataclasses
import fcntl
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import FOLDERS, BadInput, Parser, Processor, add_roots, epoch_length, epoch_plan, fail, one_line, prompt_inputs, \
    read_clip, read_json, training_sources
from grpo import Stopwatch, Systems, accumulate_gradients, collect, equal_rewards, left_out
from model import HEAD_TOKENS, Thinker, adapters_off, add_adapters, gathered, read_config
from segment import TOY_POLICY, TOY_SAM2, Tracker, build_sam2, find_config

SHOWN = ("reward", "consistency", "kl", "decode_tokens_per_s", "update_tokens_per_s", "memory_gb")  # beside the bar
PATIENCE = 5  # steps in a row with a non-finite gradient before a run gives up


def setting(default, meaning, **more):
    return dataclasses.field(default=default, metadata=dict(help=meaning, **more))


@dataclass
class Settings:
    # What is trained on what
    name: str = setting("run", "of the run; everything is written to out/NAME")
    overwrite: bool = setting(False, "whether an earlier run of that name is replaced")
    resume: str = setting("auto", "auto: a run of that name that was cut off is continued; never: the name must be new",
                          choices=["auto", "never"])
    policy: str = setting(TOY_POLICY, "directory of a Thinker or a full Qwen2.5-Omni; its copy is reference and System 2")
    sam2: str = setting("", "SAM2 config, a yaml file or a name inside the package sam2; empty: told by the weights' name")
    sam2_weights: str = setting(TOY_SAM2, "SAM2 weights, a .pt file")
    data: str = setting("toy", "datasets, by commas: toy, revos, mevis, refavs, refcocog, video_r1")
    validate: int = setting(16, "clips kept out of training; at every checkpoint their mean reward, answered greedily, is "
                            "logged, and the best checkpoint stays")
    data_root: str = setting(".", "folder that holds one folder per dataset; one that lies elsewhere: --revos_root DIR, ...")
    roots: dict = dataclasses.field(default_factory=dict)      # folder of a dataset: where it lies, of those given apart
    seed: int = setting(0, "of data order, example times and sampling")
    # How long and how fast
    steps: int = setting(1000, "optimizer steps; one rollout each")
    batch: int = setting(8, "prompts rolled out at once, over all processes (published: 8, one a GPU)")
    accumulate: int = setting(1, "rollouts of a batch whose gradients add up to one step")
    updates: int = setting(1, "optimizer steps on each batch; from 2 on, the ratio is clipped")
    lr: float = setting(1e-6, "peak learning rate of AdamW")
    warmup: int = setting(10, "steps of linear warm-up, before a cosine down to 0")
    weight_decay: float = setting(0.01, "of AdamW")
    clip_norm: float = setting(5.0, "largest norm of a step's gradient")
    lora_rank: int = setting(0, "of low-rank adapters, trained in place of the weights, which then are policy, reference and "
                             "System 2 at once (they want a larger --lr); 0: none, all weights are trained")
    # Rollout
    group: int = setting(8, "completions of a prompt, G")
    max_new_tokens: int = setting(2048, "longest completion")
    temperature: float = setting(1.0, "of sampling, and of the log-probabilities that are trained")
    top_p: float = setting(1.0, "share of probability sampled from (published: 0.95, but then one distribution is sampled "
                                "and another trained)")
    top_k: int = setting(0, "likeliest tokens sampled from; 0: all")
    # Rewards (method.md, 3)
    keyframe: float = setting(1.0, "a_k, weight of the number, length and overlap of keyframes")
    saliency: float = setting(0.0, "a_kr, weight of how large the target is on keyframes (first release: 1)")
    alignment: float = setting(1.0, "a_a, weight of System 2's boxes against the true ones")
    consistency: float = setting(2.0, "a_g, weight of SAM2's masks against the true ones (first release: 0, masks are not made)")
    clip_reward: bool = setting(False, "whether terms beyond base can only add")
    length_control: bool = setting(False, "whether right completions of 320 to 750 tokens get +1")
    # Objective
    beta: float = setting(0.04, "weight of the KL divergence from the reference; 0: no reference pass")
    kl: str = setting("k3", "its estimate", choices=["k1", "k2", "k3"])
    clip_low: float = setting(0.2, "the ratio counts down to 1 - clip_low")
    clip_high: float = setting(0.2, "and up to 1 + clip_high (clip-higher: 0.28)")
    ratio: str = setting("token", "of each token, or one of each sequence (GSPO)", choices=["token", "sequence"])
    average: str = setting("completion", "per completion as published, per token (DAPO), or by a constant (Dr. GRPO)",
                           choices=["completion", "token", "constant"])
    scale_by_std: bool = setting(True, "whether advantages are divided by the group's std (Dr. GRPO: no)")
    skip_equal: bool = setting(False, "whether groups whose rewards are all equal drop out of the loss")
    # Machine
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    dtype: str = setting("bfloat16", "of computation; sharded weights and optimizer are float32", choices=["bfloat16", "float32"])
    checkpointing: bool = setting(True, "whether activations are computed again in the backward pass")
    threads: int = setting(0, "CPU threads of a process; 0: as torch chooses")
    workers: int = setting(2, "processes, of each process, that read and prepare clips ahead of time; 0: it does so itself")
    reference: str = setting("device", "where the reference rests while it is not asked: whole on each device, sharded over all "
                             "processes, or in host memory", choices=["device", "shard", "host"])
    hybrid: bool = setting(True, "whether, on several nodes, each holds all weights, sharded over its own GPUs only")
    timeout_minutes: float = setting(30.0, "longest phase of a step; a process that takes longer says where it is, and ends")
    # Output
    save_every: int = setting(200, "steps between checkpoints")
    keep: int = setting(2, "newest checkpoints that are kept, beside the best")
    plot_every: int = setting(20, "steps between drawings of curves.png")
    # Planning
    plan: bool = setting(False, "whether only to print the memory a step needs; the policy's config.json is enough, and no GPU")
    nproc: str = setting("8", "numbers of processes to plan for, by commas; nodes have 8 GPUs")
    prompt_tokens: int = setting(4096, "tokens of a prompt, to plan with")


# What may be another when a run is continued; by any other setting it would be another run.
FREE = {"name", "overwrite", "resume", "steps", "device", "threads", "workers", "reference", "hybrid", "timeout_minutes",
        "save_every", "keep", "plot_every", "plan", "nproc", "prompt_tokens"}


def no_less_than(least):
    return lambda value: least <= value < math.inf, f"at least {least} and finite"


LIMITS = {  # setting -> (test, what it must be); nan passes none
    **dict.fromkeys(("steps", "batch", "accumulate", "updates", "max_new_tokens", "save_every", "keep", "plot_every",
                     "prompt_tokens"), no_less_than(1)),
    **dict.fromkeys(("seed", "lr", "warmup", "weight_decay", "top_k", "beta", "clip_high", "lora_rank", "threads",
                     "workers", "validate"), no_less_than(0)),
    **dict.fromkeys(("keyframe", "saliency", "alignment", "consistency"), (math.isfinite, "finite")),
    **dict.fromkeys(("temperature", "clip_norm", "timeout_minutes"), (lambda value: 0 < value < math.inf, "above 0 and finite")),
    "group": no_less_than(2),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "clip_low": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "nproc": (lambda value: all(n.isdecimal() and int(n) for n in value.split(",")), "whole numbers from 1, by commas"),
    "name": (lambda value: value not in ("", ".", "..") and os.path.basename(value) == value and value.isprintable(),
             "the plain name of a folder"),
    "device": (lambda value: value == "cpu" or value == "cuda" and torch.cuda.is_available(),
               "cpu, or cuda where there is such a GPU"),
}


def read_settings(arguments=None):
    """Settings from defaults, the policy directory's training.json, and the command line. Exits with code 2 and one line for
    an unknown name, a wrong type, or a value out of its limits."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_roots(parser)
    for f in dataclasses.fields(Settings):
        if f.name in ("data_root", "roots"):
            continue
        kind = dict(type=_boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", choices=f.metadata.get("choices"), metavar=f.type.__name__.upper(),
                            default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {f.default})", **kind)
    given = vars(parser.parse_args(arguments))
    advice = os.path.join(given.get("policy", Settings.policy), "training.json")
    if os.path.isfile(advice):
        try:
            advised = read_json(advice)
        except BadInput as error:
            sys.exit(fail(error))
        parser.place = f"{advice}: "
        given = vars(parser.parse_args([f"--{name}={value}" for name, value in advised.items()])) | given
    roots = {folder: given.pop(f"{folder}_root") for folder in FOLDERS if f"{folder}_root" in given}
    settings = Settings(**given, roots=roots)
    for name, (test, wanted) in LIMITS.items():
        value = getattr(settings, name)
        if not test(value):
            sys.exit(fail(f"--{name} {value}: must be {wanted}"))
    return settings


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false expected, not {text}")
    return text.lower() == "true"


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------
def start_processes(device, minutes=30.0):
    """Joins torchrun's processes, or starts a group of one -> (rank, number of processes, this process's device). Who waits for
    another gives up after twice `minutes`: `guard` knows more, and comes first."""
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=2 * minutes))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def shard(thinker, dtype, device, hybrid=True):
    """Shards the language model's weights over all processes (FSDP2): float32 at rest, `dtype` in computation. The frozen
    towers stay whole on every process, outside, so that a clip without sound cannot make the others wait. hybrid: on several
    nodes each holds all shards, so that only gradients pass between nodes."""
    towers = {p for tower in (thinker.visual, thinker.audio_tower) for p in tower.parameters()}
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shape = (world // local, local) if hybrid and 1 < local < world else (world,)   # (nodes, processes of a node), or flat
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("nodes", "local")[-len(shape):])     # untold: of GPUs, if any
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = dict(mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for layer in thinker.model.layers:
        fully_shard(layer, **options)
    fully_shard(thinker, ignored_params=towers, **options)
    for method in ("generate", "logprobs"):
        register_fsdp_forward_method(thinker, method)


def rest_on_host(thinker, device):
    """Moves a language model's weights to host memory -> the context in which they are on the device."""
    weights = list(dict.fromkeys([*thinker.model.parameters(), *thinker.lm_head.parameters()]))           # tied ones once
    flat = torch.empty(sum(p.numel() for p in weights), dtype=thinker.dtype, pin_memory=device.type == "cuda")
    copies = [part.view_as(p).copy_(p) for p, part in zip(weights, flat.split([p.numel() for p in weights]))]

    def move(places):
        for p, place in zip(weights, places):
            p.data = place

    @contextmanager
    def bring(_):
        move(copy.to(device, non_blocking=True) for copy in copies)
        try:
            yield
        finally:
            move(copies)
    move(copies)
    return bring


def sums_over_processes(values, device):
    """{name: number} added up over all processes."""
    numbers = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return dict(zip(values, numbers.tolist()))


@dataclass
class Watch(Stopwatch):
    """A Stopwatch that lasts a run and tells which phase is running, and whether the process was told to end (SIGTERM)."""
    step: int = 0
    phase: str = "start"
    told: bool = False

    def begin(self, step):
        self.step, self.phase, self.seconds, self.last = step, "data", {}, time.perf_counter()

    def lap(self, phase):
        super().lap(phase)
        self.phase = NEXT[phase]


NEXT = dict(data="towers", towers="rollout", rollout="grounding", grounding="reference", reference="masks", masks="rewards",
            rewards="data", update="saving")


@contextmanager
def guard(watch, out, minutes, rank, world):
    """Ends this process with a line when a phase lasts longer than `minutes`: somebody hangs, and the others wait for him without
    a word. Where each process is, it writes to OUT/phases/RANK, for the line of whoever is first: often the one that hangs."""
    over, folder = threading.Event(), Path(out, "phases")

    def look():
        while not over.wait(min(10.0, 6 * minutes)):
            with suppress(OSError):                            # a full disk is not what this is about
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(rank)).write_text(f"{watch.phase} of step {watch.step}")
            if time.perf_counter() - watch.last > 60 * minutes:
                with suppress(OSError):
                    others = [f"rank {r} {(folder / str(r)).read_text()}" for r in range(world) if r != rank]
                print(f"error: rank {rank} (of {world}) has been in {watch.phase} of step {watch.step} for {minutes:g} minutes; "
                      f"the others: {', '.join(others) or 'none'}", file=sys.stderr, flush=True)
                os._exit(1)                                    # the main thread may be waiting where no exception reaches it
    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


# ---------------------------------------------------------------------------------------------------------------------
# The memory plan: bytes on each device, told by shapes alone
# ---------------------------------------------------------------------------------------------------------------------
GPUS = (24, 40, 48, 80, 141)       # GB of a device
USABLE = 0.92                  # of it: the rest goes to the driver, the libraries and what the allocator cannot fill
TRACKING = 4e9                 # bytes that SAM2 takes to track 32 objects at 1024 x 1024; an estimate
GROUNDED = 1150                # tokens of a keyframe's prompt and answer


def memory_plan(settings, world):
    """{phase: {what: bytes}} on each of `world` devices. The most that can be: every completion is as long as allowed."""
    with torch.device("meta"):
        thinker = Thinker(read_config(Path(settings.policy)))
        if settings.lora_rank:
            add_adapters(thinker, settings.lora_rank, 0)
    config, wide = thinker.config.text_config, 2 if settings.dtype == "bfloat16" else 4
    D, L, V, inner = config.hidden_size, config.num_hidden_layers, config.vocab_size, config.intermediate_size
    trained = sum(p.numel() for p in thinker.parameters() if p.requires_grad)
    towers = sum(p.numel() for tower in (thinker.visual, thinker.audio_tower) for p in tower.parameters())
    weights = sum(p.numel() for p in thinker.parameters()) - towers
    sam2 = build_sam2(settings.sam2 or find_config(settings.sam2_weights))

    shards = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", 8))) if settings.hybrid else world
    B, G, C, P = -(-settings.batch // world), settings.group, settings.max_new_tokens, settings.prompt_tokens
    rows = P + G * C                                           # tokens of the update, a group at a time
    token = 2 * L * config.num_key_value_heads * (D // config.num_attention_heads) * wide      # of a cache
    layer = rows * (11 * D + 5.5 * inner) * wide               # forward and backward of one; the forward leaves about half of it
    kept = L * rows * D * wide if settings.checkpointing else (L - 1) * layer / 2
    activations = {"kept of all layers": kept, "a layer, or logits": max(layer, 12 * min(HEAD_TOKENS, G * C) * V)}
    rest = {"towers": towers * wide, "SAM2": 4 * sum(p.numel() for p in sam2.parameters())}
    if settings.lora_rank:
        rest |= {"frozen weights": (weights - trained) * wide, "adapters, gradients, AdamW": 16 * trained}
        whole, asked, head, begin = {}, {}, {}, rest
    else:
        reference = {"device": weights * wide, "shard": weights * wide / shards, "host": 0}[settings.reference]
        rest |= {"weights, gradients, AdamW": 16 * trained / shards, "reference": reference}
        whole = {"whole weights": weights * wide}
        asked = {"whole reference": weights * wide} if settings.reference != "device" else {}
        begin = {"policy, before it is sharded": 4 * (weights + towers)}
        head = {"gradients of embeddings and head": 2 * V * D * (wide + 4)}
    return {"loading": begin,
            "rollout": rest | whole | {"cache": B * (P + G * C) * token, "logits": 12 * B * G * V},
            "grounding": rest | asked | {"cache of keyframes": B * G * 4 * GROUNDED * token},
            "masks": rest | {"tracking": TRACKING * (sam2.image_size / 1024) ** 2},
            "update": rest | whole | head | activations}


def print_plan(settings, worlds):
    """GB on each device in each phase, a line for each number of processes; of the last one also the parts."""
    for world in worlds:
        plan = memory_plan(settings, world)
        totals = {phase: sum(parts.values()) / 1e9 for phase, parts in plan.items()}
        fits = [f"{size} GB" for size in GPUS if max(totals.values()) <= USABLE * size]
        print(f"{world:3} x", *(f"{phase} {total:.1f}" for phase, total in totals.items()),
              f"   fits {' '.join(fits) or f'no device of up to {GPUS[-1]} GB'}")
    parts = {k: v / 1e9 for phase in plan.values() for k, v in phase.items()}
    print("  with:", ", ".join(f"{k} {v:.1f}" for k, v in parts.items() if v > 0.05))
    if settings.reference == "host" and not settings.lora_rank:
        print(f"  and in host memory, for each device, the reference {parts['whole reference']:.1f}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------
def main(arguments=None):
    settings = read_settings(arguments)
    if settings.plan:
        try:
            return print_plan(settings, [int(n) for n in settings.nproc.split(",")])
        except (OSError, BadInput) as error:
            sys.exit(fail(error))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):   # torchrun's --max_restarts: on with the run just begun
        settings = dataclasses.replace(settings, overwrite=False, resume="auto")
    rank, world, device = start_processes(settings.device, settings.timeout_minutes)
    watch, out = Watch(), os.path.join("out", settings.name)
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(watch, "told", True))
    try:
        with guard(watch, out, settings.timeout_minutes, rank, world):
            try:
                with only_one(out) if rank == 0 else nullcontext():
                    train(settings, rank, world, device, watch)
            finally:
                dist.destroy_process_group()                   # may wait for others, too
    except (OSError, BadInput) as error:                       # anything else is a bug and keeps its traceback
        sys.exit(fail(error))
    finally:
        signal.signal(signal.SIGTERM, before)


def train(settings, rank, world, device, watch):
    if settings.batch % world:
        raise BadInput(f"--batch {settings.batch} cannot be shared by {world} processes; take a multiple")
    out = os.path.join("out", settings.name)
    check_place(out, settings)
    checkpoint, earlier = find_checkpoint(out, settings)
    dist.barrier()                                             # nobody writes before all have looked
    start, unfit = earlier["step"], earlier["unfit"]           # unfit: steps in a row with a non-finite gradient
    if checkpoint and checkpoint.name == "policy":
        if rank == 0:
            print(f"{out} is finished: {start} steps. To go on, a larger --steps; to begin anew, --overwrite true")
        return
    sources, dropped = training_sources(settings.data, settings.data_root, settings.roots, settings.seed)
    sources, held = hold_out(sources, settings.validate, settings.seed)
    systems = load_systems(settings, device)
    policy = systems.policy
    optimizer = start_optimizer(policy, settings)
    if checkpoint:
        alike = earlier["processes"] == world and earlier["settings"]["device"] == settings.device
        restore(checkpoint, policy, optimizer, rank, alike)
    run = identity(settings, world)
    log = start_log(out, settings, run, dropped, checkpoint) if rank == 0 else None
    if rank == 0:
        if checkpoint:
            print(f"continues at step {start} from {checkpoint}")
        print(f"an epoch: {epoch_length(sources, settings.batch * settings.accumulate)} steps")
        print_plan(settings, [world])
    bar = tqdm(range(start, settings.steps), settings.name, settings.steps, initial=start, disable=rank != 0, mininterval=1.0)
    samples = iter(sample_loader(sources, systems.processor, settings, start, rank, world))
    for step in bar:
        watch.begin(step)
        for p in optimizer.param_groups:
            p["lr"] = settings.lr * schedule(step, settings)
        groups = []
        for part in range(settings.accumulate):
            clips, inputs, seeds = zip(*(next(samples) for _ in range(settings.batch // world)))      # 1
            for clip in clips:
                if clip.fault:
                    tqdm.write(f"step {step}, left out: {clip.fault}", file=sys.stderr)
            watch.lap("data")
            groups += collect(systems, clips, inputs, seeds, settings, watch)                         # 2 to 7
        watch.phase = "update"
        sums, norm, skipped = update(systems, optimizer, groups, settings, world, device)             # 8
        watch.lap("update")
        row = metrics(step, groups, sums, norm, skipped, watch, optimizer, device)
        row["speed"] = physics(groups, watch.seconds, systems, settings, device)
        due = (step + 1) % settings.save_every == 0 or step + 1 == settings.steps     # the last: a larger --steps goes on there
        if due and held:
            row["validation"] = validate(systems, held, settings, watch, rank, world, device)
        if rank == 0:
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix({k: f"{v:.3g}" for k, v in (row | row["speed"]).items() if k in SHOWN})
            if (step + 1) % settings.plot_every == 0 or step + 1 == settings.steps:
                plot(out)
        unfit = unfit + 1 if skipped else 0
        if unfit == PATIENCE:                                  # the same on every process
            bar.close()
            problem = f"error: step {step}: the {PATIENCE}th step in a row with a non-finite gradient; see {out}/metrics.jsonl"
            sys.exit(1 if rank else problem)
        told = sums_over_processes(dict(told=watch.told), device)["told"] > 0 and step + 1 < settings.steps
        if told or due:
            path = os.path.join(out, f"step-{step + 1:06d}")
            now = dict(step=step + 1, unfit=unfit, validation=row.get("validation"))
            save(systems, path, run | now, rank, world, optimizer)
            if rank == 0:
                remove_old(out, settings.keep)
        if told:
            bar.close()
            if rank == 0:
                print(f"told to end (SIGTERM): {step + 1} steps are done and saved in {path}; the same command continues there")
            return
    save(systems, os.path.join(out, "policy"), run | dict(step=settings.steps, unfit=unfit), rank, world)
    if rank == 0:
        print(f"trained policy: {out}/policy   curves: {out}/curves.png   log: {out}/metrics.jsonl")


def load_systems(settings, device):
    """Policy, reference, processor and tracker. The reference shares the policy's frozen towers, with adapters all of it."""
    dtype = getattr(torch, settings.dtype)
    processor = Processor(settings.policy)
    if settings.lora_rank:
        policy = reference = Thinker.from_pretrained(settings.policy, dtype, device)
        add_adapters(policy, settings.lora_rank, settings.seed)
        bring = adapters_off
    else:
        policy = Thinker.from_pretrained(settings.policy, torch.float32, device)
        shard(policy, dtype, device, settings.hybrid)          # before there is a second model on the device
        reference = Thinker.from_pretrained(settings.policy, dtype, device).requires_grad_(False)
        policy.visual, policy.audio_tower = reference.visual, reference.audio_tower
        bring = rest_on_host(reference, device) if settings.reference == "host" else gathered
        if settings.reference == "shard":
            shard(reference, dtype, device, settings.hybrid)
    policy.gradient_checkpointing = settings.checkpointing
    tracker = Tracker.from_pretrained(settings.sam2 or find_config(settings.sam2_weights), settings.sam2_weights, device)
    return Systems(policy, reference, processor, tracker, bring)


def start_optimizer(policy, settings):
    """AdamW with its state laid out as it would do itself in its first step, so that there always is one to save and to load."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, weight_decay=settings.weight_decay)
    for p in trained:
        optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


@dataclass
class Samples:
    """Step 1: samples[i] is the i-th of the whole run, over all processes: a clip, its prompt's Inputs, and a seed. They follow
    from the run's seed and i alone. A clip that cannot be read has a fault, and counts for nothing."""
    sources: tuple
    processor: Processor
    settings: Settings

    def __getitem__(self, i):
        size, seed = self.settings.batch * self.settings.accumulate, self.settings.seed
        step, place = divmod(i, size)
        epoch, step = divmod(step, epoch_length(self.sources, size))
        source, item = epoch_plan(self.sources, size, seed, epoch)[step][place]
        seed = int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> 2)
        clip = read_clip(source, item, np.random.default_rng([seed, 1]))
        return clip, prompt_inputs(self.processor, clip, np.random.default_rng(seed)), seed


def hold_out(sources, count, seed):
    """Takes `count` random items out of the sources -> (sources without them, [(source, item)])."""
    if count == 0:
        return sources, []
    places = [(s, i) for s, source in enumerate(sources) for i in range(len(source.items))]
    if count >= len(places):
        raise BadInput(f"--validate {count} leaves none of {len(places)} clips to train on; take fewer, or 0")
    held = {places[k] for k in np.random.default_rng([seed, 2]).permutation(len(places))[:count]}
    left = tuple(dataclasses.replace(source, items=[item for i, item in enumerate(source.items) if (s, i) not in held])
                 for s, source in enumerate(sources))
    return tuple(source for source in left if source.items), [(sources[s], sources[s].items[i]) for s, i in sorted(held)]


def validate(systems, held, settings, watch, rank, world, device):
    """Mean reward, over all processes, of greedy answers to clips that are not trained on. None where no clip can be read."""
    greedy, total, count = dataclasses.replace(settings, group=2, temperature=0.0, beta=0.0), 0.0, 0
    for k in range(rank, -(-len(held) // world) * world, world):           # equally many on every process, as they work together
        clip = read_clip(*held[k % len(held)], np.random.default_rng([settings.seed, k]))
        inputs = prompt_inputs(systems.processor, clip, np.random.default_rng([settings.seed, k]))
        group, = collect(systems, [clip], [inputs], [0], greedy, watch)    # both completions are the same
        if k < len(held) and not clip.fault:
            total, count = total + float(group.rewards.mean()), count + 1
    watch.phase = "saving"
    sums = sums_over_processes(dict(total=total, count=count), device)
    return round(sums["total"] / sums["count"], 6) if sums["count"] else None


def sample_loader(sources, processor, settings, start, rank, world):
    """This process's samples from step `start` on, one after the other; its workers are about a step ahead."""
    size = settings.batch * settings.accumulate
    places = range(start * size + rank, settings.steps * size, world)
    ahead = max(2, -(-size // world // settings.workers)) if settings.workers else None     # samples that each worker holds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"             # its threads do not outlive a fork, and warn of that
    gc.collect()
    return DataLoader(Samples(sources, processor, settings), sampler=places, batch_size=None, collate_fn=lambda sample: sample,
                      num_workers=settings.workers, prefetch_factor=ahead, worker_init_fn=begin_worker)


def begin_worker(_):
    gc.freeze()                                                # a fork that tidied up after its parent would wait for threads
    torch.set_num_threads(1)                                   # that it does not have
    os.setpgrp()                                               # torchrun tells groups to end, but the step still wants clips
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))      # 0 is no failure to the loader


def schedule(step, settings):
    """Factor on the learning rate: linear warm-up, then a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def update(systems, optimizer, groups, settings, world, device):
    """Step 8: `updates` optimizer steps on a batch. Returns the log's sums over all processes, the last gradient's norm, and
    how many updates were skipped because theirs was not finite."""
    policy = systems.policy
    counted = [g for g in groups if not left_out(g, settings)]
    completions, tokens = (sum(g.size[k] for g in counted) for k in (0, 1))
    total = sums_over_processes(dict(completions=completions, tokens=tokens), device)
    totals = max(total["completions"], 1.0), max(total["tokens"], 1.0)
    skipped = 0
    for number in range(settings.updates):
        sums = {}
        for group in groups:
            part = accumulate_gradients(systems, group, settings, totals, world, number == 0, settings.updates > 1)
            sums = {k: sums.get(k, 0.0) + v for k, v in part.items()}
        trained = [p for p in policy.parameters() if p.requires_grad]
        for p in trained if settings.lora_rank else ():        # whole on every process; FSDP has averaged its shards already
            dist.all_reduce(p.grad.div_(world))
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):                                # the same on every process
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    return sums_over_processes(sums, device), norm, skipped


def metrics(step, groups, sums, norm, skipped, watch, optimizer, device):
    """One line of the log: means over all completions of all processes, seconds of this process's phases. Which reward terms
    there are depends on the step's task."""
    counted = [g for g in groups if not g.fault]
    values = {name: sum(t[name] for g in counted for t in g.terms) for name in groups[0].terms[0]}
    values |= dict(reward=sum(g.rewards.sum() for g in counted), completions=sum(len(g.terms) for g in counted),
                   groups=len(counted), broken=len(groups) - len(counted), equal=sum(equal_rewards(g) for g in counted),
                   tokens=sum(g.mask.sum() for g in counted), spread=sum(g.rewards.std() for g in counted))
    values = sums_over_processes(values, device)
    n, number, tokens = max(values.pop("completions"), 1), max(values.pop("groups"), 1), max(sums["tokens"], 1)
    row = dict(step=step, lr=optimizer.param_groups[0]["lr"], broken=int(values.pop("broken")),
               equal_groups=values.pop("equal") / number, reward_std=values.pop("spread") / number,
               **{k: v / n for k, v in values.items()},
               loss=sums["loss"], kl=sums["kl"] / tokens, entropy=sums["entropy"] / tokens,
               clipped_low=sums["clipped_low"] / tokens, clipped_high=sums["clipped_high"] / tokens,
               gradient_norm=norm if math.isfinite(norm) else None, skipped=skipped,
               seconds=watch.seconds | dict(step=sum(watch.seconds.values())), memory_gb=peak_memory(device))
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


# Memory bandwidth (bytes a second) and dense bf16 arithmetic (operations a second), by a part of the GPU's name.
GPU_LIMITS = {"B200": (8.0e12, 2250e12), "H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12),
             "L40S": (0.86e12, 362e12), "4090": (1.0e12, 165e12)}


def physics(groups, seconds, systems, settings, device):
    """What this process's devices did in a step: tokens a second that were drawn (prefill included) and that went through the
    update, and on GPUs of GPU_LIMITS, what part of the device's limit that is."""
    reference, passes = systems.reference, 4 if settings.lora_rank else 6       # operations a weight; frozen: no gradients
    config = reference.config.text_config
    layers, head = (sum(p.numel() for p in part.parameters()) for part in (reference.model.layers, reference.lm_head))
    drawn, steps, tokens, work = 0, 0, 0, 0.0
    for group in groups:
        P, (G, C) = len(group.prompt.ids) - 1, group.mask.shape
        drawn, steps, tokens = drawn + int(group.mask.sum()), max(steps, C), tokens + P + G * C
        pairs = P * P / 2 + G * C * (P + C / 2)                # of tokens that attend to one another
        work += passes * (layers * (P + G * C) + head * G * C) + 12 * config.num_hidden_layers * config.hidden_size * pairs
    row = dict(decode_tokens_per_s=drawn / seconds["rollout"], update_tokens_per_s=tokens * settings.updates / seconds["update"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for bandwidth, operations in (limit for part, limit in GPU_LIMITS.items() if part in name):
        read = (layers + head) * reference.lm_head.weight.element_size() * steps * settings.accumulate
        row |= dict(decode_bandwidth=read / seconds["rollout"] / bandwidth,
                    update_mfu=work * settings.updates / seconds["update"] / operations)
    return {k: round(v, 4) for k, v in row.items()}


def peak_memory(device):
    """GB: of the allocator on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------
def check_place(out, settings):
    """Raises BadInput where the run would destroy an earlier one, or, replacing it, its own policy."""
    log = os.path.join(out, "metrics.jsonl")
    if os.path.exists(log) and settings.resume == "never" and not settings.overwrite:
        raise BadInput(f"{log} is the log of an earlier run; give another --name, --resume auto, or --overwrite true")
    if Path(out).resolve() in Path(settings.policy).resolve().parents:
        raise BadInput(f"--policy {settings.policy} lies in {out}, where the run would replace it; give another --name")


def only_one(out):
    """A file that is locked until it is closed. Raises BadInput where another run has done so: a job that was requeued, perhaps,
    while the first is still saving."""
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another process is writing to {out}; give another --name, or wait for it to end") from None
    return lock


def identity(settings, world):
    """What a run is: its settings and what it runs on."""
    revision = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"],
                              capture_output=True, text=True)
    return dict(settings=dataclasses.asdict(settings), processes=world, revision=revision.stdout.strip(),
                torch=torch.__version__, transformers=version("transformers"), sam2=version("sam2"),
                started=time.strftime("%Y-%m-%d %H:%M:%S"))


def start_log(out, settings, run, dropped, checkpoint):
    """Prints and saves the run's identity, and what is left out of the data; opens metrics.jsonl, which goes on from the
    checkpoint's, so without gaps or doubled steps. What is overwritten loses its checkpoints."""
    os.makedirs(out, exist_ok=True)
    old = [*Path(out).glob("policy"), *Path(out).glob("step-*")] if settings.overwrite else []
    for folder in old + list(Path(out).glob("*.partial")):     # partial: cut off while it was written or removed
        shutil.rmtree(folder)
    with open(os.path.join(out, "settings.json"), "w") as file:
        json.dump(run, file, indent=1)
    print("\n".join(f"{k}: {v}" for k, v in run["settings"].items()))
    if dropped:
        with open(os.path.join(out, "left_out.txt"), "w") as file:
            file.writelines(f"{line}\n" for line in dropped)
        print(f"{len(dropped)} samples are left out of the training data, the first: {dropped[0]} (all: {out}/left_out.txt)")
    log = os.path.join(out, "metrics.jsonl")
    if checkpoint is None:
        return open(log, "w")
    shutil.copy(checkpoint / "metrics.jsonl", f"{log}.new")
    os.replace(f"{log}.new", log)
    return open(log, "a")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a policy's directory that --policy loads, and what continues the run, in the same folder:
#     run.json        identity, step (where it goes on: data, seeds and learning rate follow from that), unfit
#     metrics.jsonl   the log so far
#     state/          trained weights in float32, AdamW's state and random states: every process writes its shards, and any
#                     number of processes reads them
# Each is written as NAME.partial and renamed when all is there: what has its name is complete.
# ---------------------------------------------------------------------------------------------------------------------
def find_checkpoint(out, settings):
    """The run's newest checkpoint, policy/ where all steps are done -> (folder, its run.json), or (None, one of step 0). Raises
    BadInput where it was trained with other settings."""
    done = [path for path in Path(out).glob("policy/run.json") if read_json(path)["step"] >= settings.steps]
    found = sorted(Path(out).glob("step-??????/run.json")) + done
    if settings.overwrite or not found:
        return None, dict(step=0, unfit=0)
    folder, earlier = found[-1].parent, read_json(found[-1])
    now = dataclasses.asdict(settings)
    changed = {name: f"--{name} {old} -> {now[name]}" for name, old in earlier["settings"].items() if old != now.get(name, old)}
    if changed.keys() - FREE:
        raise BadInput(f"{folder} has other settings: {', '.join(changed[name] for name in changed if name not in FREE)}; "
                       f"give another --name, or --overwrite true")
    if "steps" in changed and dist.get_rank() == 0:
        print(changed["steps"])
    return folder, earlier


def training_state(policy, optimizer, rank):
    """All that training changes, in this process's shards; loading writes into these very tensors. Nothing here draws from the
    global random states, but they are kept all the same."""
    weights = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    random = {f"cpu-{rank}": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random[f"cuda-{rank}"] = torch.cuda.get_rng_state()
    return dict(policy={name: p.detach() for name, p in weights.items()}, random=random,
                optimizer={name: optimizer.state[p] for name, p in weights.items()})


def restore(checkpoint, policy, optimizer, rank, alike):
    """Brings policy and optimizer to where they were. alike: whether processes and device are those that saved it; of others no
    random states are known."""
    state = training_state(policy, optimizer, rank)
    random = state["random"] if alike else state.pop("random")
    try:
        dcp.load(state, checkpoint_id=checkpoint / "state")
    except (dcp.api.CheckpointException, AssertionError):      # the latter: nothing there at all
        raise BadInput(f"{checkpoint}/state is damaged or incomplete; once {checkpoint} is removed, the same command continues "
                       f"from the checkpoint before") from None
    torch.set_rng_state(random[f"cpu-{rank}"])
    if f"cuda-{rank}" in random:
        torch.cuda.set_rng_state(random[f"cuda-{rank}"])


def save(systems, path, run, rank, world, optimizer=None):
    """A Thinker-only directory with everything needed to load it, in the reference's dtype, with an optimizer also what continues
    the run. Weights are gathered from all processes one by one; only rank 0 keeps them, in host memory. Where anything cannot be
    written, all processes end and nothing of it stays."""
    weights, partial, problem = {}, f"{path}.partial", None
    for name, whole in systems.policy.whole_weights():
        if rank == 0:
            weights[name] = whole.to("cpu", systems.reference.dtype, copy=True)
    try:
        if rank == 0:
            systems.policy.save_pretrained(partial, weights)
            systems.processor.save(partial)
            Path(partial, "run.json").write_text(json.dumps(run, indent=1))
            if optimizer is not None:
                shutil.copy(os.path.join(os.path.dirname(path), "metrics.jsonl"), partial)
            for file in filter(Path.is_file, Path(partial).iterdir()):         # a power cut could leave names without content
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        problem = error
    if optimizer is not None:
        try:
            dcp.save(training_state(systems.policy, optimizer, rank), checkpoint_id=os.path.join(partial, "state"))
        except dcp.api.CheckpointException as error:           # on every process, whichever had it
            problem = problem or next(iter(error.failures.values()))[0]
    problems = [None] * world
    dist.all_gather_object(problems, problem and one_line(problem))         # waits for all
    if any(problems):
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(os.path.dirname(path)).free / 1e9             # torch does not say that a disk is full
            tqdm.write(f"error: cannot save {path}, where {free:.2f} GB are free: {next(filter(None, problems))}; earlier "
                       f"checkpoints stay, and the same command continues from the newest", file=sys.stderr)
        sys.exit(1)
    if rank == 0:
        shutil.rmtree(path, ignore_errors=True)                # the policy of fewer steps
        os.rename(partial, path)
    dist.barrier()


def remove_old(out, keep):
    """Leaves the newest `keep` checkpoints, and the best by validation."""
    checkpoints = [path.parent for path in sorted(Path(out).glob("step-??????/run.json"))]
    scores = {path: read_json(path / "run.json")["validation"] for path in checkpoints}
    best = max((path for path in checkpoints if scores[path] is not None), key=scores.get, default=None)
    for old in checkpoints[:-keep]:
        if old == best:
            continue
        shutil.rmtree(old.rename(f"{old}.partial"))            # never half of one under its name


def plot(out):
    """curves.png: reward, its main terms, KL, entropy and completions' tokens over the steps, with a running mean."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with open(os.path.join(out, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    figure, axes = pyplot.subplots(2, 4, figsize=(14, 6), constrained_layout=True)
    names = ("reward", "consistency", "base", "alignment", "number", "kl", "entropy", "tokens")
    for axis, name in zip(axes.flat, names):
        having = [row for row in rows if name in row]          # not every task has every term
        steps, values = ([row[k] for row in having] for k in ("step", name))
        window = max(1, len(values) // 8)
        axis.plot(steps, values, alpha=0.3)
        if values:
            axis.plot(steps[window - 1:], np.convolve(values, np.ones(window) / window, "valid"))
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.savefig(os.path.join(out, "curves.png"), dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
