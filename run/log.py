"""The log of a run: how long phases take, a line of numbers for each step, what the run is, and curves.

    out/NAME/settings.json    identity: settings, processes, versions
    out/NAME/metrics.jsonl    a line for each step: step_metrics, and under "speed" throughput
    out/NAME/left_out.txt     samples that are not trained on, and why
    out/NAME/curves.png

Letters: G completions of a group, C tokens of the longest one, P tokens of its prompt but the last.
"""
import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from grpo import Group, Systems, equal_rewards
from run.plan import GPU_LIMITS, pass_operations, token_bytes
from run.processes import sums_over_processes


# ---- phases ----------------------------------------------------------------------------------------
@dataclass
class Watch:
    """Times the phases of each step, and knows whether the run is to stop."""
    step: int = 0
    phase: str = "start"                                      # the running phase, else the last one
    running: bool = False
    seconds: dict = field(default_factory=dict)               # {phase: seconds} of this step
    last: float = field(default_factory=time.perf_counter)    # when a phase began or ended
    stop_requested: bool = False                              # by SIGTERM

    def begin(self, phase: str) -> None:
        """Ends the phase that is running and begins another."""
        self.end()
        self.phase = phase
        self.running = True

    def end(self) -> None:
        """Adds the time since the running phase began to its seconds."""
        # Waits for the GPU a handful of times a step, so that no phase's work counts as the next one's.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.running:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.last
        self.last = now
        self.running = False

    def new_step(self, step: int) -> None:
        """Ends the phase that is running, and forgets the seconds of the step before."""
        self.end()
        self.step = step
        self.seconds = {}


# ---- a step's numbers ------------------------------------------------------------------------------
def step_metrics(
    step: int,
    groups: list[Group],
    sums: dict,
    norm: float,
    skipped: int,
    watch: Watch,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict:
    """A step's line of the log: means over the completions of all processes, and this process's seconds.

    groups   the step's groups of this process
    sums     what accumulate_gradients returns, added up over groups and processes
    norm     the last gradient's
    skipped  how many updates were left out because their gradient was not finite
    """
    means, broken = group_means(groups, device)
    tokens = max(sums["tokens"], 1)
    row = dict(step=step, lr=optimizer.param_groups[0]["lr"], broken=broken, **means, loss=sums["loss"])
    for name in ("kl", "entropy", "clipped_low", "clipped_high"):
        row[name] = sums[name] / tokens
    row["gradient_norm"] = norm if math.isfinite(norm) else None
    row["skipped"] = skipped
    row["seconds"] = watch.seconds | dict(step=sum(watch.seconds.values()))
    row["memory_gb"] = peak_memory(device)
    return rounded(row, 6)


def group_means(groups: list[Group], device: torch.device) -> tuple[dict, int]:
    """({name: mean over completions or groups}, how many groups have a fault), over all processes.

    Groups with a fault are not in the means. A reward term that a completion lacks counts as 0.
    """
    counted = [group for group in groups if not group.fault]
    terms = []
    for group in counted:
        terms += group.terms
    values = {}
    for name in term_names(groups):
        values[name] = sum(t.get(name, 0.0) for t in terms)
    values["reward"] = sum(group.rewards.sum() for group in counted)
    values["tokens"] = sum(group.mask.sum() for group in counted)
    of_groups = dict(equal_groups=sum(equal_rewards(group) for group in counted),
                     reward_std=sum(group.rewards.std() for group in counted))
    counts = dict(completions=len(terms), groups=len(counted), broken=len(groups) - len(counted))

    everywhere = sums_over_processes(values | of_groups | counts, device)
    means = {}
    for name in of_groups:
        means[name] = everywhere[name] / max(everywhere["groups"], 1)
    for name in values:
        means[name] = everywhere[name] / max(everywhere["completions"], 1)
    return means, int(everywhere["broken"])


def term_names(groups: list[Group]) -> list[str]:
    """Names of all reward terms of the step, on every process the same."""
    names = {}
    for group in groups:
        for terms in group.terms:
            names |= terms
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, list(names))
    return list(dict.fromkeys(chain(*everywhere)))


def throughput(groups: list[Group], seconds: dict, systems: Systems, settings, device: torch.device) -> dict:
    """What this process's device did in a step.

    Tokens a second that were drawn (prefill included) and that went through the update, and on a GPU of
    GPU_LIMITS what share of its limits that is.
    """
    drawn = 0
    steps = 0
    tokens = 0
    operations = 0.0
    for group in groups:
        P = len(group.prompt.ids) - 1
        G, C = group.mask.shape
        drawn += int(group.mask.sum())
        steps = max(steps, C)
        tokens += P + G * C
        operations += pass_operations(systems.reference, P, G, C, frozen=settings.lora_rank > 0)
    row = {}
    row["decode_tokens_per_s"] = drawn / seconds["rollout"]
    row["update_tokens_per_s"] = tokens * settings.updates / seconds["update"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, (bandwidth, arithmetic) in GPU_LIMITS.items():
        if part in name:
            read = token_bytes(systems.reference) * steps * settings.accumulate
            row["decode_bandwidth"] = read / seconds["rollout"] / bandwidth
            row["update_mfu"] = operations * settings.updates / seconds["update"] / arithmetic
    return rounded(row, 4)


def rounded(row: dict, decimals: int) -> dict:
    """The row with its floats rounded."""
    row = dict(row)
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = round(value, decimals)
    return row


def peak_memory(device: torch.device) -> float:
    """GB: of the allocator on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ---- the files -------------------------------------------------------------------------------------
def identity(settings, world: int) -> dict:
    """What a run is: its settings and what it runs on."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return dict(
        settings=dataclasses.asdict(settings),
        processes=world,
        revision=git.stdout.strip(),
        torch=torch.__version__,
        transformers=version("transformers"),
        sam2=version("sam2"),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def start_log(out: str, settings, run: dict, dropped: list[str], checkpoint: Path | None):
    """Prints and saves what the run is and what is left out of the data. Returns metrics.jsonl, open.

    The log goes on from the checkpoint's copy, so that no step is missing and none is there twice. A run that
    is overwritten loses its checkpoints.
    """
    os.makedirs(out, exist_ok=True)
    # Checkpoints that were cut off while they were written or removed.
    useless = list(Path(out).glob("*.partial"))
    if settings.overwrite:
        useless += [*Path(out).glob("policy"), *Path(out).glob("step-*")]
    for folder in useless:
        shutil.rmtree(folder)
    with open(os.path.join(out, "settings.json"), "w") as file:
        json.dump(run, file, indent=1)
    for name, value in run["settings"].items():
        print(f"{name}: {value}")
    if dropped:
        with open(os.path.join(out, "left_out.txt"), "w") as file:
            file.writelines(f"{line}\n" for line in dropped)
        print(f"{len(dropped)} samples are left out of the training data, the first: {dropped[0]} "
              f"(all: {out}/left_out.txt)")
    log = os.path.join(out, "metrics.jsonl")
    if checkpoint is None:
        return open(log, "w")
    shutil.copy(checkpoint / "metrics.jsonl", f"{log}.new")
    os.replace(f"{log}.new", log)
    return open(log, "a")


def plot(out: str) -> None:
    """Writes curves.png: rewards, KL, entropy and tokens over the steps, with their running means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with open(os.path.join(out, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    figure, axes = pyplot.subplots(2, 4, figsize=(14, 6), constrained_layout=True)
    names = ("reward", "consistency", "base", "alignment", "number", "kl", "entropy", "tokens")
    for axis, name in zip(axes.flat, names):
        # Not every task has every term.
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        window = max(1, len(values) // 8)
        axis.plot(steps, values, alpha=0.3)
        if values:
            axis.plot(steps[window - 1:], np.convolve(values, np.ones(window) / window, "valid"))
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.savefig(os.path.join(out, "curves.png"), dpi=80)
    pyplot.close(figure)
