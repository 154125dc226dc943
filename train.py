"""Trains System 1 by GRPO. One process, one GPU, eight, two nodes:

    python train.py                                             # the toy world, CPU or GPU
    python train.py --policy QWEN_DIR --sam2_weights FILE ...
    torchrun --nproc_per_node 8 train.py ...
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...

Settings come from three places, later ones win: the defaults below (as published, for the 7B),
`training.json` in the policy's directory if there is one, and `--name value` on the command line. Writes
out/NAME/: settings.json, metrics.jsonl (a line a step), report.html, step-000100/ ... and policy/
(checkpoints). The same command again continues a run that was cut off, from its newest checkpoint, with any
number of processes.

Read `train` first: it is the table of contents of a run.
"""
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks import trained_names
from run.settings import frame_range, is_counts, is_folder_name, read_settings, setting
from trust.errors import BadInput, fail
from trust.options import TOY_POLICY, TOY_SAM2, is_device
from trust.program import begin_program


# ---- settings --------------------------------------------------------------------------------------
@dataclass
class Settings:
    """Every setting: its default, its meaning, its limits, and whether a continued run may change it."""
    # The run: what is trained, and on what
    name: str = setting(
        "run",
        "of the run; everything is written to out/NAME",
        resumable=True, check=(is_folder_name, "the plain name of a folder"), by_user=True,
    )
    overwrite: bool = setting(
        False,
        "whether an earlier run of that name is replaced",
        resumable=True, by_user=True,
    )
    resume: str = setting(
        "auto",
        "auto: a run of that name that was cut off is continued; never: the name must be new",
        choices=["auto", "never"], resumable=True, by_user=True,
    )
    policy: str = setting(
        TOY_POLICY,
        "directory of a Thinker or Qwen2.5-Omni; its copy is the reference",
        by_user=True,
    )
    system2: str = setting(
        "policy",
        "who grounds: policy (the reference), reference DIR (another Thinker), or FILE.py with boxes() or "
        "masks()",
        words=True, by_user=True,
    )
    mask_prompt: bool = setting(True, "whether SAM2 gets the masks of a FILE.py; false: their boxes")
    sam2: str = setting(
        "",
        "SAM2 config: a yaml file, or a name in the package sam2; empty: by the weights",
        by_user=True,
    )
    sam2_weights: str = setting(TOY_SAM2, "SAM2 weights, a .pt file", by_user=True)
    data: str = setting("toy", f"datasets, by commas: {', '.join(trained_names())}", by_user=True)
    validate: int = setting(
        16,
        "clips kept out of training; at every checkpoint their mean reward, answered greedily, is logged, "
        "and the best checkpoint stays",
        least=0,
    )
    data_root: str = setting(
        ".",
        "holds one folder per dataset; for one elsewhere: --revos_root DIR, ...",
        by_user=True,
    )
    roots: dict = field(default_factory=dict)    # {folder of a dataset: where it is}: --revos_root DIR
    seed: int = setting(0, "of data order, example times and sampling", least=0, by_user=True)
    # What the two systems see
    frames: str = setting(
        "8,24",
        "frames of a clip in training, at least and at most; their number is drawn for each sample",
        check=(frame_range, "one number, or two by a comma, the smaller one first"),
    )
    video_tokens: int = setting(
        0,
        "visual tokens of a video's frame; 0: the policy's own, else 128",
        least=0, most=16_384,
    )
    image_tokens: int = setting(
        0,
        "visual tokens of a picture; 0: the policy's own, else 900",
        least=0, most=16_384,
    )
    # How long and how fast
    steps: int = setting(1000, "steps; each rolls out a batch and updates once", least=1, resumable=True)
    batch: int = setting(8, "prompts rolled out at once, over all processes", least=1, most=65_536)
    accumulate: int = setting(1, "rollouts whose gradients add up to one step", least=1, most=65_536)
    updates: int = setting(1, "passes over a batch; a single update clips no ratio", least=1, most=1000)
    parts: int = setting(1, "of a batch, an optimizer step on each (GSPO: 4)", least=1, most=65_536)
    lr: float = setting(1e-6, "peak learning rate of AdamW", least=0)
    warmup: int = setting(10, "steps of linear warm-up, before a cosine down to 0", least=0)
    weight_decay: float = setting(0.01, "of AdamW", least=0)
    clip_norm: float = setting(5.0, "largest norm of a step's gradient", above=0)
    lora_rank: int = setting(
        0,
        "of low-rank adapters, trained in place of the weights, which then are policy, reference and "
        "System 2 at once (they need a larger --lr); 0: none, all weights are trained",
        least=0, most=4096,
    )
    # Rollout
    group: int = setting(8, "completions of a prompt, G", least=2, most=4096)
    max_new_tokens: int = setting(2048, "longest completion", least=1, most=1_000_000)
    temperature: float = setting(1.0, "of sampling, and of the log-probabilities that are trained", above=0)
    top_p: float = setting(
        1.0,
        "share of probability sampled from (published: 0.95, but then one distribution is sampled and "
        "another trained)",
        above=0, most=1,
    )
    top_k: int = setting(0, "likeliest tokens sampled from; 0: all", least=0)
    # Rewards (paper, section 3). A setting with the name of a reward term is its weight
    keyframe: float = setting(1.0, "a_k, weight of the number, length and overlap of keyframes")
    single: float = setting(0.0, "weight of a number of keyframes that is best at 1 (with --keyframe 0)")
    saliency: float = setting(
        0.0,
        "a_kr, weight of how large the target is on keyframes, as a share of its largest in the clip: a soft "
        "reward for keyframes (first release: 1)",
    )
    alignment: float = setting(1.0, "a_a, weight of System 2's boxes against the true ones")
    consistency: float = setting(2.0, "a_g, weight of SAM2's masks against the true ones (first release: 0)")
    clip_reward: bool = setting(False, "whether the sum of the terms beside base is at least 0")
    length_control: bool = setting(False, "whether right completions of 320 to 750 tokens get +1")
    # Objective
    beta: float = setting(0.04, "weight of the KL divergence from the reference; 0: not computed", least=0)
    kl: str = setting("k3", "estimate of the KL divergence", choices=["k1", "k2", "k3"])
    clip_low: float = setting(0.2, "the ratio is clipped at 1 - clip_low from below", least=0, most=1)
    clip_high: float = setting(0.2, "and at 1 + clip_high from above (clip-higher: 0.28)", least=0)
    ratio: str = setting(
        "token",
        "to the policy that drew the tokens: of each token, or one for each sequence (GSPO)",
        choices=["token", "sequence"],
    )
    average: str = setting(
        "completion",
        "of the loss: per completion as published, per token (DAPO), or by a constant (Dr. GRPO)",
        choices=["completion", "token", "constant"],
    )
    scale_by_std: bool = setting(True, "whether advantages are divided by the group's std (Dr. GRPO: no)")
    skip_equal: bool = setting(False, "whether groups whose rewards are all equal drop out of the loss")
    ground_weight: float = setting(
        0.0,
        "weight in the loss of a second turn on videos: the policy itself answers one of a group's requests "
        "to System 2, in a group of its own; 0, as published: only System 1's part is trained",
        least=0,
    )
    # Machine
    device: str = setting(
        "auto",
        "cpu, cuda, or auto: cuda where there is one",
        resumable=True, check=(is_device, "auto, cpu, or cuda where there is such a GPU"), by_user=True,
    )
    dtype: str = setting(
        "bfloat16",
        "of computation; sharded weights and optimizer are float32. On a GPU, float32 is for models as small "
        "as the toy: its attention there takes tens of GB for a prompt of the 7B",
        choices=["bfloat16", "float32"],
    )
    checkpointing: bool = setting(True, "whether activations are computed again in the backward pass")
    threads: int = setting(
        0,
        "CPU threads of a process; 0: as torch chooses",
        least=0, most=1024, resumable=True,
    )
    workers: int = setting(
        2,
        "worker processes of each training process, which prepare clips ahead of time; 0: none",
        least=0, most=128, resumable=True, by_user=True,
    )
    reference: str = setting(
        "device",
        "where the reference rests while it is not used: whole on each device, sharded over all "
        "processes, or in host memory",
        choices=["device", "shard", "host"], resumable=True, by_user=True,
    )
    hybrid: bool = setting(
        True,
        "whether, on several nodes, each holds all weights, sharded over its own GPUs only",
        resumable=True, by_user=True,
    )
    timeout_minutes: float = setting(
        30.0,
        "longest phase of a step; a process that takes longer says where it is, and ends",
        above=0, resumable=True, by_user=True,
    )
    # Output
    save_every: int = setting(200, "steps between checkpoints", least=1, resumable=True)
    keep: int = setting(
        2,
        "newest checkpoints that are kept, beside the best",
        least=1, resumable=True, by_user=True,
    )
    look_every: int = setting(
        20,
        "steps between looks at the rollouts: out/NAME/rollouts, report.html and curves.png",
        least=1, resumable=True, by_user=True,
    )
    tensorboard: bool = setting(
        False,
        "whether the log is also written for TensorBoard, to out/NAME/tensorboard",
        resumable=True, by_user=True,
    )
    wandb: str = setting(
        "",
        "project of Weights & Biases that the log is also sent to; empty: none",
        resumable=True, by_user=True,
    )
    # Planning
    plan: bool = setting(
        False,
        "whether only to print the memory a step needs; the policy's config.json is enough, and no GPU",
        resumable=True, by_user=True,
    )
    nproc: str = setting(
        "8",
        "numbers of processes to plan for, by commas; nodes have 8 GPUs",
        resumable=True, check=(is_counts, "whole numbers from 1, by commas"), by_user=True,
    )
    prompt_tokens: int = setting(
        4096,
        "tokens of a prompt, to plan with",
        least=1, resumable=True, by_user=True,
    )


if __name__ == "__main__":
    begin_program()
    # A wrong option is told now: the imports below take seconds.
    read_settings(Settings, __doc__)

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Processor
from grpo import Systems, accumulate_gradients, collect, left_out, remember_policy, turns_of
from model import Thinker, adapters_off, add_adapters
from run.checkpoint import (
    check_place,
    find_checkpoint,
    only_one,
    remove_old,
    restore,
    save,
)
from run.draw import (
    from_shared_memory,
    hold_out,
    sample_loader,
    take_items,
    training_sources,
)
from run.guard import guard
from run.log import Watch, identity, patient_output, print_start, start_log, step_metrics, throughput
from run.plan import check_shares, print_plan
from run.processes import (
    gathered,
    rest_on_host,
    shard,
    start_processes,
    sums_over_processes,
)
from run.rollouts import Album
from run.validation import validate
from segment import Tracker, chosen_device, load_system2

# Figures of a step that are shown beside the progress bar.
SHOWN = ("reward", "consistency", "kl", "seconds_per_completion", "memory_gb")
# Steps in a row with a non-finite gradient after which a run ends.
PATIENCE = 5


# ---- the program -----------------------------------------------------------------------------------
def main(arguments=None):
    settings = read_settings(Settings, __doc__, arguments)
    if settings.plan:
        try:
            return print_plan(settings, [int(count) for count in settings.nproc.split(",")])
        except (OSError, BadInput) as error:
            sys.exit(fail(error))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # After a restart by torchrun --max_restarts, the run goes on, even if it was begun by --overwrite.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        settings = replace(settings, overwrite=False, resume="auto")
    try:
        settings = replace(settings, device=chosen_device(settings.device))
    except BadInput as error:
        sys.exit(fail(error))
    rank, world, device = start_processes(settings.device, settings.timeout_minutes)
    watch = Watch()
    out = os.path.join("out", settings.name)
    try:
        with patient_output(), guard(watch, out, settings.timeout_minutes, rank, world):
            try:
                with only_one(out) if rank == 0 else nullcontext():
                    train(settings, rank, world, device, watch)
            finally:
                # This may wait for other processes, so the guard still watches.
                dist.destroy_process_group()
    # Any other error is a bug and keeps its traceback.
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


def train(settings, rank, world, device, watch):
    """One run, from its newest checkpoint to its last step."""
    out = os.path.join("out", settings.name)
    checkpoint, earlier = find_start(out, settings, rank, world)
    if checkpoint and checkpoint.name == "policy":
        return
    sources, dropped = training_sources(
        settings.data, settings.data_root, settings.roots, settings.seed, frame_range(settings.frames))
    sources, validation_items = hold_out(sources, settings.validate, settings.seed)
    systems = load_systems(settings, device)
    optimizer = start_optimizer(systems.policy, settings)
    if checkpoint:
        alike = earlier["processes"] == world and earlier["settings"].get("device") == settings.device
        restore(checkpoint, systems.policy, optimizer, rank, alike)
    run = identity(settings, world)
    log = start_log(out, settings, run, dropped, checkpoint) if rank == 0 else None
    start = earlier["step"]
    album = Album(out, settings, run, start, rank)
    if rank == 0:
        print_start(sources, settings, checkpoint, start, world)
    run |= dict(step=start, nonfinite_in_a_row=earlier["nonfinite_in_a_row"], validation=None)

    loader = sample_loader(sources, systems.processor, settings, start, rank, world)
    samples = take_items(map(from_shared_memory, iter(loader)))
    bar = tqdm(range(start, settings.steps), settings.name, settings.steps, initial=start, disable=rank != 0,
               mininterval=1.0)
    for step in bar:
        watch.new_step(step)
        set_learning_rate(optimizer, step, settings)
        groups = collect_batch(systems, samples, settings, watch)               # steps 1 to 7
        row = update(step, systems, optimizer, groups, settings, watch)         # step 8
        due = checkpoint_due(step, settings)
        if due and validation_items:
            row["validation"] = validate(systems, validation_items, settings, watch, album)
        write_row(log, row, bar, album)
        run |= dict(step=step + 1, validation=row.get("validation"))
        count_nonfinite(run, row, bar, out)
        stop = stop_requested(step, settings, watch, device)
        if due or stop:
            path = save_step(systems, optimizer, run, settings, watch, log)
        album.look(step, groups, systems, watch)
        if stop:
            bar.close()
            if rank == 0:
                print(f"told to end: {step + 1} steps are done and saved in {path}; "
                      f"the same command continues there")
            return
    save(systems, os.path.join(out, "policy"), run, rank)
    if rank == 0:
        print(f"trained policy: {out}/policy   report: {out}/report.html   log: {out}/metrics.jsonl")


def find_start(out, settings, rank, world):
    """(newest checkpoint or None, its run.json). Raises BadInput before an earlier run would be lost."""
    check_shares(settings, world)
    check_place(out, settings)
    checkpoint, earlier = find_checkpoint(out, settings)
    # No process writes before all have looked.
    dist.barrier()
    if checkpoint and checkpoint.name == "policy" and rank == 0:
        print(f"{out} is finished: {earlier['step']} steps. To go on, a larger --steps; to begin anew, "
              f"--overwrite true")
    return checkpoint, earlier


# ---- models and optimizer --------------------------------------------------------------------------
def load_systems(settings, device) -> Systems:
    """All models of a run. Policy and reference share the towers; with adapters they share all weights."""
    dtype = getattr(torch, settings.dtype)
    processor = Processor(settings.policy, settings.video_tokens, settings.image_tokens)
    if settings.lora_rank:
        policy = Thinker.from_pretrained(settings.policy, dtype, device)
        add_adapters(policy, settings.lora_rank, settings.seed)
        reference = policy
        reference_awake = partial(adapters_off, policy)
    else:
        policy = Thinker.from_pretrained(settings.policy, torch.float32, device)
        # Before a second model is on the device.
        shard(policy, dtype, device, settings.hybrid)
        reference = Thinker.from_pretrained(settings.policy, dtype, device).requires_grad_(False)
        policy.visual = reference.visual
        policy.audio_tower = reference.audio_tower
        reference_awake = rest_reference(reference, settings, dtype, device)
    policy.gradient_checkpointing = settings.checkpointing
    tracker = Tracker.from_pretrained(settings.sam2, settings.sam2_weights, device)
    system2 = load_system2(settings.system2, reference, processor, dtype, device, settings.mask_prompt)
    return Systems(policy, reference, system2, processor, tracker, partial(gathered, policy), reference_awake)


def rest_reference(reference, settings, dtype, device):
    """Moves the reference to where it rests -> awake. Inside `with awake():` it is whole on the device."""
    if settings.reference == "host":
        return rest_on_host(reference, device)
    if settings.reference == "shard":
        shard(reference, dtype, device, settings.hybrid)
        return partial(gathered, reference)
    return nullcontext


def start_optimizer(policy, settings):
    """AdamW with a state like that of its first step, so that a state to save or load always exists."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    # Without temporary tensors as large as the weights. It counts steps on the device.
    fused = trained[0].is_cuda
    optimizer = torch.optim.AdamW(trained, settings.lr, weight_decay=settings.weight_decay, fused=fused)
    for p in trained:
        first = torch.zeros_like(p)
        second = torch.zeros_like(p)
        step = torch.zeros((), device=p.device if fused else "cpu")
        optimizer.state[p] = dict(step=step, exp_avg=first, exp_avg_sq=second)
    return optimizer


def set_learning_rate(optimizer, step, settings):
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * schedule(step, settings)


def schedule(step, settings) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


# ---- one step --------------------------------------------------------------------------------------
def collect_batch(systems, samples, settings, watch) -> list:
    """Steps 1 to 7, `accumulate` times -> the Groups of this process."""
    groups = []
    for _ in range(settings.accumulate):
        watch.begin("data")
        clips = []
        inputs = []
        seeds = []
        # 1. Draw clips.
        for _ in range(settings.batch // dist.get_world_size()):
            clip, prompt, seed = next(samples)
            if clip.fault:
                tqdm.write(f"step {watch.step}, left out: {clip.fault}", file=sys.stderr)
            clips.append(clip)
            inputs.append(prompt)
            seeds.append(seed)
        groups += collect(systems, clips, inputs, seeds, settings, watch)
    return groups


def update(step, systems, optimizer, groups, settings, watch) -> dict:
    """Step 8: `updates` passes over the `parts` of a batch -> the step's line of the log."""
    watch.begin("update")
    device = systems.policy.device
    # The n-th parts of all processes hold the same prompts as the n-th part of one would.
    size = len(groups) // settings.parts
    parts = [groups[first:first + size] for first in range(0, len(groups), size)]
    if settings.parts > 1:
        # Before the first part moves the policy.
        remember_policy(systems, groups, settings)
    skipped = 0
    for part in parts * settings.updates:
        sums = [add_gradients(systems, turn, settings, device) for turn in turns_of(part)]
        norm = clip_gradients(systems.policy, settings)
        # The norm is the same on every process.
        if math.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
    sums = [sums_over_processes(of_turn, device) for of_turn in sums]
    watch.end()
    row = step_metrics(step, groups, sums, norm, skipped, watch, optimizer, device)
    return row | dict(speed=throughput(groups, watch.seconds, systems, settings, device))


def add_gradients(systems, groups, settings, device) -> dict:
    """Adds the gradients of one turn's groups. Returns sums for the log."""
    totals = batch_totals(groups, settings, device)
    sums = {}
    for group in groups:
        part = accumulate_gradients(systems, group, settings, totals, scale=dist.get_world_size())
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def batch_totals(groups, settings, device) -> tuple[float, float]:
    """(completions, tokens) that count in the loss, over all processes; at least 1 each."""
    completions = 0
    tokens = 0
    for group in groups:
        if not left_out(group, settings):
            completions += group.size[0]
            tokens += group.size[1]
    totals = sums_over_processes(dict(completions=completions, tokens=tokens), device)
    return max(totals["completions"], 1.0), max(totals["tokens"], 1.0)


def clip_gradients(policy, settings) -> float:
    """Clips the norm of the gradient of all processes -> the norm before."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    if settings.lora_rank:
        # Adapters are whole on every process. FSDP has averaged the gradients of sharded weights already.
        for p in trained:
            dist.all_reduce(p.grad.div_(dist.get_world_size()))
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ---- between the steps -----------------------------------------------------------------------------
def checkpoint_due(step, settings) -> bool:
    """Whether the step is one of every `save_every`, or the last, from which a larger --steps continues."""
    return (step + 1) % settings.save_every == 0 or step + 1 == settings.steps


def write_row(log, row, bar, album):
    """Writes a line of the log on the first process, and shows some of it beside the bar."""
    if log is not None:
        log.write(row)
    album.write(row)
    figures = row | row["speed"]
    bar.set_postfix({name: f"{figures[name]:.3g}" for name in SHOWN if name in figures})


def count_nonfinite(run, row, bar, out):
    """Counts steps in a row with a non-finite gradient. After PATIENCE of them the run ends."""
    run["nonfinite_in_a_row"] = run["nonfinite_in_a_row"] + 1 if row["skipped"] else 0
    if run["nonfinite_in_a_row"] == PATIENCE:
        bar.close()
        problem = (f"error: step {row['step']}: the {PATIENCE}th step in a row with a non-finite gradient; "
                   f"see {out}/metrics.jsonl")
        sys.exit(1 if dist.get_rank() else problem)


def stop_requested(step, settings, watch, device) -> bool:
    """Whether any process got SIGTERM or Ctrl-C, and steps are left."""
    requests = sums_over_processes(dict(stop=watch.stop_requested), device)["stop"]
    return requests > 0 and step + 1 < settings.steps


def save_step(systems, optimizer, run, settings, watch, log) -> str:
    """Saves a checkpoint that continues the run, and removes old ones. Returns its folder."""
    watch.begin("saving")
    rank = dist.get_rank()
    out = os.path.join("out", settings.name)
    path = os.path.join(out, f"step-{run['step']:06d}")
    save(systems, path, run, rank, optimizer, log)
    if rank == 0:
        remove_old(out, settings.keep)
    return path


if __name__ == "__main__":
    main()
