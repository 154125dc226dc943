"""Checkpoints: a policy's directory that --policy loads, and beside it what continues the run.

    out/NAME/step-000100/
        *.safetensors, config.json, ...    the policy, as a Thinker alone
        run.json         identity, step (data, seeds and learning rate follow from it), nonfinite_in_a_row
        metrics.jsonl    the log so far
        state/           trained weights in float32, AdamW's state and random states. Every process writes its
                         shards, and any number of processes reads them.
    out/NAME/policy/     the same after the last step, without metrics.jsonl and state

Each folder is written as FOLDER.partial and renamed when it is complete.
"""
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from model import Adapted, Thinker
from run.settings import resumable_names
from segment import reference_folder
from trust.errors import BadInput, one_line
from trust.files import read_json


# ---- before a run ----------------------------------------------------------------------------------
def check_place(out: str, settings) -> None:
    """Raises BadInput where the run would destroy an earlier one, or what it is made of."""
    log = os.path.join(out, "metrics.jsonl")
    if os.path.exists(log) and settings.resume == "never" and not settings.overwrite:
        raise BadInput(f"{log} is the log of an earlier run; give another --name, --resume auto, "
                       f"or --overwrite true")
    needed = dict(
        policy=settings.policy,
        system2=reference_folder(settings.system2),
        sam2_weights=settings.sam2_weights,
    )
    for name, path in needed.items():
        if path and Path(out).resolve() in Path(path).resolve().parents:
            raise BadInput(f"--{name} {path} lies in {out}, where the run would replace it; "
                           f"give another --name")


def only_one(out: str):
    """A file that is locked until it is closed.

    Raises BadInput where another run holds the lock, such as the first run of a job that was started again.
    """
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another process is writing to {out}; give another --name, "
                       f"or wait for it to end") from None
    return lock


def find_checkpoint(out: str, settings) -> tuple[Path | None, dict]:
    """The run's newest checkpoint, or policy/ where all steps are done -> (folder, its run.json).

    Without one: (None, a run.json of step 0). Raises BadInput where it was trained with other settings.
    """
    checkpoints = sorted(Path(out).glob("step-??????/run.json"))
    for policy in Path(out).glob("policy/run.json"):
        if read_json(policy)["step"] >= settings.steps:
            checkpoints.append(policy)
    if settings.overwrite or not checkpoints:
        return None, dict(step=0, nonfinite_in_a_row=0)

    folder = checkpoints[-1].parent
    run = read_json(checkpoints[-1])
    now = dataclasses.asdict(settings)
    resumable = resumable_names(type(settings))
    changed = []
    for name, before in run["settings"].items():
        if name in now and now[name] != before and name not in resumable:
            changed.append(f"--{name} {before} -> {now[name]}")
    if changed:
        raise BadInput(f"{folder} has other settings: {', '.join(changed)}; give another --name, "
                       f"or --overwrite true")
    before = run["settings"]["steps"]
    if before != settings.steps and dist.get_rank() == 0:
        print(f"--steps {before} -> {settings.steps}")
    return folder, run


# ---- state -----------------------------------------------------------------------------------------
def training_state(policy: Thinker, optimizer: torch.optim.Optimizer, rank: int) -> dict:
    """All that training changes, in this process's shards. Loading writes into these very tensors.

    Nothing here draws from the global random states, but they are kept all the same.
    """
    weights = {}
    moments = {}
    for name, p in policy.named_parameters():
        if p.requires_grad:
            weights[name] = p.detach()
            moments[name] = optimizer.state[p]
    random = {f"cpu-{rank}": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random[f"cuda-{rank}"] = torch.cuda.get_rng_state()
    return dict(policy=weights, random=random, optimizer=moments)


def restore(
    checkpoint: Path,
    policy: Thinker,
    optimizer: torch.optim.Optimizer,
    rank: int,
    alike: bool,
) -> None:
    """Brings policy and optimizer to their state at a checkpoint.

    alike: whether processes and device are those that saved it. Only then are random states restored.
    Raises BadInput where the checkpoint cannot be read.
    """
    state = training_state(policy, optimizer, rank)
    random = state["random"]
    if not alike:
        del state["random"]
    try:
        dcp.load(state, checkpoint_id=checkpoint / "state")
    # An AssertionError means that there is no state at all.
    except (dcp.api.CheckpointException, AssertionError):
        raise BadInput(f"{checkpoint}/state is damaged or incomplete; once {checkpoint} is removed, the same "
                       f"command continues from the checkpoint before") from None
    torch.set_rng_state(random[f"cpu-{rank}"])
    if f"cuda-{rank}" in random:
        torch.cuda.set_rng_state(random[f"cuda-{rank}"])


def whole_weights(thinker: Thinker) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of a plain checkpoint: shards are gathered, adapters are merged.

    All processes must iterate together.
    """
    adapted = {name: module for name, module in thinker.named_modules() if isinstance(module, Adapted)}
    for name, tensor in thinker.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if owner not in adapted or kind == "bias":
            yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        elif kind == "weight":
            yield name, adapted[owner].merged()


# ---- saving ----------------------------------------------------------------------------------------
def save(
    systems,
    path: str,
    run: dict,
    rank: int,
    world: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Writes the policy's directory in the reference's dtype; with an optimizer also what continues the run.

    Where anything cannot be written, all processes exit with code 1 and nothing of it stays.
    """
    partial = f"{path}.partial"
    weights = {}
    for name, whole in whole_weights(systems.policy):
        # One weight at a time is whole on the devices, and only rank 0 keeps them, in host memory.
        if rank == 0:
            weights[name] = whole.to("cpu", systems.reference.dtype, copy=True)
    problem = None
    try:
        if rank == 0:
            write_policy(systems, partial, weights, run, log=optimizer is not None)
    except (OSError, SafetensorError) as error:
        problem = error
    if optimizer is not None:
        state = training_state(systems.policy, optimizer, rank)
        try:
            dcp.save(state, checkpoint_id=os.path.join(partial, "state"))
        # Raised on every process, whichever has the problem.
        except dcp.api.CheckpointException as error:
            problem = problem or next(iter(error.failures.values()))[0]
    exit_together(path, problem, rank, world)
    if rank == 0:
        # policy/ may be there already, from a run of fewer steps.
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
    dist.barrier()


def write_policy(systems, partial: str, weights: dict, run: dict, log: bool) -> None:
    """Writes all of a checkpoint but its state. log: whether metrics.jsonl is part of it."""
    systems.policy.save_pretrained(partial, weights)
    systems.processor.save(partial)
    Path(partial, "run.json").write_text(json.dumps(run, indent=1))
    if log:
        shutil.copy(os.path.join(os.path.dirname(partial), "metrics.jsonl"), partial)
    # Otherwise, after a power cut, files could be there without content.
    for file in Path(partial).iterdir():
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


def exit_together(path: str, problem: Exception | None, rank: int, world: int) -> None:
    """Waits for all processes. If one has a problem, rank 0 prints it, and all exit with code 1."""
    problems = [None] * world
    dist.all_gather_object(problems, problem and one_line(problem))
    problems = [line for line in problems if line]
    if not problems:
        return
    if rank == 0:
        shutil.rmtree(f"{path}.partial", ignore_errors=True)
        # torch's errors do not say that a disk is full, so the line does.
        free = shutil.disk_usage(os.path.dirname(path)).free / 1e9
        tqdm.write(f"error: cannot save {path}, where {free:.2f} GB are free: {problems[0]}; earlier "
                   f"checkpoints stay, and the same command continues from the newest", file=sys.stderr)
    sys.exit(1)


def remove_old(out: str, keep: int) -> None:
    """Leaves the newest `keep` checkpoints, and the best by validation."""
    checkpoints = [path.parent for path in sorted(Path(out).glob("step-??????/run.json"))]
    best = None
    highest = None
    for checkpoint in checkpoints:
        score = read_json(checkpoint / "run.json")["validation"]
        if score is not None and (highest is None or score > highest):
            best = checkpoint
            highest = score
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            # Renamed first, so that its name never stands for half a checkpoint.
            shutil.rmtree(checkpoint.rename(f"{checkpoint}.partial"))
