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
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from grpo import Group, Systems, equal_rewards, turns_of
from run.draw import epoch_length
from run.plan import GPU_LIMITS, pass_operations, print_plan, token_bytes
from run.processes import gather, sums_over_processes
from run.settings import changed_settings
from trust.errors import BadInput, one_line


# ---- phases ----------------------------------------------------------------------------------------
# Phases between two steps. The line of the next step tells them, beside its own.
AFTER = ("validation", "saving", "look")


@dataclass
class Watch:
    """Times the phases of each step, and knows whether the run is to stop."""
    step: int = 0
    phase: str = "start"                                      # the running phase, else the last one
    running: bool = False
    seconds: dict = field(default_factory=dict)               # {phase: seconds} of this step
    after: dict = field(default_factory=dict)                 # of what came after the step before
    last: float = field(default_factory=time.perf_counter)    # when a phase began or ended
    stop_requested: bool = False                              # by SIGTERM or Ctrl-C

    def begin(self, phase: str) -> None:
        """Ends the phase that is running and begins another."""
        self.end()
        self.phase = phase
        self.running = True

    def end(self) -> None:
        """Adds the time since the running phase began to its seconds."""
        # Waits for the GPU a handful of times a step, so that no phase's work counts as the next one's.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.running:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.last
        self.last = now
        self.running = False

    def new_step(self, step: int) -> None:
        """Ends the phase that is running. Of the step before, only what came after it is remembered."""
        self.end()
        self.step = step
        self.after = {phase: self.seconds[phase] for phase in AFTER if phase in self.seconds}
        self.seconds = {}


# ---- a step's numbers ------------------------------------------------------------------------------
def step_metrics(
    step: int,
    groups: list[Group],
    sums: list[dict],
    norm: float,
    skipped: int,
    watch: Watch,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict:
    """A step's line of the log: means over the completions of all processes, and this process's seconds.

    groups   the step's groups of this process
    sums     for each turn what accumulate_gradients returns, added up over the groups of the last update
             and over processes
    norm     the last gradient's
    skipped  how many updates were left out because their gradient was not finite
    """
    means, broken = group_means(groups, device)
    row = dict(step=step, lr=optimizer.param_groups[0]["lr"], broken=broken, **means, **token_means(sums[0]))
    for second, its_sums in zip(turns_of(groups)[1:], sums[1:]):
        row["grounding"] = rounded(grounding_means(second, device) | token_means(its_sums), 6)
    row["gradient_norm"] = norm if math.isfinite(norm) else None
    row["skipped"] = skipped
    row["seconds"] = watch.after | watch.seconds | dict(step=sum(watch.seconds.values()))
    row["memory_gb"] = peak_memory(device)
    return rounded(row, 6)


def token_means(sums: dict) -> dict:
    """The loss of a turn, and means over its tokens."""
    row = dict(loss=sums["loss"])
    for name in ("kl", "entropy", "clipped_low", "clipped_high"):
        row[name] = sums[name] / max(sums["tokens"], 1)
    return row


def grounding_means(groups: list[Group], device: torch.device) -> dict:
    """What the answers of the second turn earned, over all processes. Groups with a fault do not count.

    iou and mismatch are means over answers about pictures that show the target, null is the share of null
    among the others, the rest are means over all answers. None is the mean of nothing.
    """
    # How many answers have each term is counted beside its sum.
    names = ("reward", "tokens", "format", "iou", "mismatch", "null")
    values = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    for group in groups:
        if group.fault:
            continue
        for terms, reward, tokens in zip(group.terms, group.rewards, group.mask.sum(1)):
            terms = terms | dict(reward=reward, tokens=tokens)
            for name in terms.keys() & set(names):
                values[name] += terms[name]
                counts[name] += 1
    totals = sums_over_processes(values, device)
    numbers = sums_over_processes(counts, device)
    return {name: totals[name] / numbers[name] if numbers[name] else None for name in names}


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
    return list(dict.fromkeys(chain(*gather(list(names)))))


def throughput(groups: list[Group], seconds: dict, systems: Systems, settings, device: torch.device) -> dict:
    """How fast a step was: seconds of the whole step for each completion of all processes, and what this
    process's device did.

    That is tokens a second that were drawn (prefill included) and that went through the update, and on a GPU
    of GPU_LIMITS what share of its limits that is.
    """
    drawn = 0
    steps = 0
    tokens = 0
    operations = 0.0
    for turn in turns_of(groups):
        for group in turn:
            P = len(group.prompt.ids) - 1
            G, C = group.mask.shape
            drawn += int(group.mask.sum())
            tokens += P + G * C
            operations += pass_operations(systems.reference, P, G, C, frozen=settings.lora_rank > 0)
        # Of the longest completion.
        steps += max(group.mask.shape[1] for group in turn)
    row = {}
    completions = settings.batch * settings.accumulate * settings.group
    row["seconds_per_completion"] = sum(seconds.values()) / completions
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
    return dict(
        settings=dataclasses.asdict(settings),
        processes=world,
        revision=revision(),
        torch=torch.__version__,
        transformers=version("transformers"),
        sam2=version("sam2"),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def revision() -> str:
    """Git's name of the code's state; "" where git is missing, or this is no repository of it."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


@contextmanager
def warned(what: str):
    """Turns an error inside into a line. For what is only to be looked at: it does not end a run."""
    try:
        yield
    except Exception as error:
        tqdm.write(f"warning: {what} failed, and the run goes on ({one_line(error)})", file=sys.stderr)


class Patient:
    """A stream that loses what cannot be written, such as on a full disk or into a closed pipe."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def patient_output():
    """Inside, no print ends a run."""
    with redirect_stdout(Patient(sys.stdout)), redirect_stderr(Patient(sys.stderr)):
        yield


class Log:
    """metrics.jsonl, open. What cannot be written now, such as on a full disk, waits for the next line."""

    def __init__(self, path: str, mode: str):
        self.path = path
        # Unbuffered, so that what is waiting is known to the byte.
        self.file = open(path, mode, buffering=0)
        self.waiting = b""

    def write(self, row: dict) -> None:
        """Adds a line. One that has to wait is no error yet."""
        self.waiting += json.dumps(row).encode() + b"\n"
        with warned(f"writing {self.path} (its lines are kept until it works)"):
            self.flush()

    def flush(self) -> None:
        """Writes all that waits. Raises OSError where that cannot be."""
        while self.waiting:
            written = self.file.write(self.waiting)
            self.waiting = self.waiting[written:]


def print_start(sources, settings, checkpoint: Path | None, start: int, world: int):
    """What the first process says before the first step."""
    if checkpoint:
        print(f"continues at step {start} from {checkpoint}")
    print(f"an epoch: {epoch_length(sources, settings.batch * settings.accumulate)} steps")
    print_plan(settings, [world])


def start_log(out: str, settings, run: dict, dropped: list[str], checkpoint: Path | None) -> Log:
    """Prints and saves what the run is and what is left out of the data.

    The log goes on from the checkpoint's copy, so that no step is missing and none is there twice. A run that
    is overwritten loses its checkpoints. Raises BadInput where the log cannot be written.
    """
    os.makedirs(out, exist_ok=True)
    # Checkpoints that were cut off while they were written or removed.
    useless = list(Path(out).glob("*.partial"))
    if settings.overwrite:
        useless += [*Path(out).glob("policy"), *Path(out).glob("policy.damaged"), *Path(out).glob("step-*")]
    for folder in useless:
        shutil.rmtree(folder)
    with warned(f"writing {out}/settings.json"):
        Path(out, "settings.json").write_text(json.dumps(run, indent=1))
    print(f"settings: {changed_settings(settings)} (all: {out}/settings.json)")
    if dropped:
        print(f"{len(dropped)} samples are left out of the training data, the first: {dropped[0]} "
              f"(all: {out}/left_out.txt)")
        with warned(f"writing {out}/left_out.txt"):
            Path(out, "left_out.txt").write_text("".join(f"{line}\n" for line in dropped))
    log = os.path.join(out, "metrics.jsonl")
    if checkpoint is None:
        return Log(log, "wb")
    try:
        shutil.copy(checkpoint / "metrics.jsonl", f"{log}.new")
        os.replace(f"{log}.new", log)
    except OSError as error:
        # An error of a full disk names no file.
        raise BadInput(f"cannot write {log} ({one_line(error)})") from None
    return Log(log, "ab")


# ---- curves ----------------------------------------------------------------------------------------
def plot(out: str) -> None:
    """Writes curves.png: rewards, KL, entropy and tokens over the steps. An error is a warning."""
    with warned(f"drawing {out}/curves.png"):
        draw_curves(read_rows(os.path.join(out, "metrics.jsonl")), os.path.join(out, "curves.png"))


def read_rows(log: str) -> list[dict]:
    """The lines of a log. Damaged ones are left out."""
    rows = []
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    rows.append(row)
    return rows


def draw_curves(rows: list[dict], path: str) -> None:
    """Draws some columns with their running means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
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
    try:
        figure.savefig(path, dpi=80)
    finally:
        pyplot.close(figure)
