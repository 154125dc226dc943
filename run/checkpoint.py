"""Checkpoints: a policy's directory that --policy loads, and beside it what continues the run.

    out/NAME/step-000100/
        *.safetensors, config.json, ...    the policy, as a Thinker alone
        run.json         identity, step (data, seeds and learning rate follow from it), nonfinite_in_a_row
        metrics.jsonl    the log so far
        state/           trained weights in float32, AdamW's state and random states. Every process writes its
                         shards, and any number of processes reads them.
        checksums.json   {file: its SHA-256}. A run continues only from files that are what was written.
    out/NAME/policy/     the same after the last step, without metrics.jsonl and state

Each folder is written as FOLDER.partial and renamed when it is complete. One that turns out damaged is
renamed to FOLDER.damaged, and the run continues from the one before.
"""
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from model import Adapted, Thinker
from run.log import Log, warned
from run.processes import gather
from run.settings import resumable_names
from trust.errors import BadInput, one_line
from trust.files import check_file, check_name, read_json
from trust.options import reference_folder


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
    """A file that is locked until it is closed, or until this process ends.

    Raises BadInput where another process holds the lock, such as that of a job that was started twice.
    """
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "w")
    try:
        # Not flock: the worker processes would inherit that, and could hold it when this process is dead.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"another process is writing to {out}; give another --name, "
                       f"or wait for it to end") from None
    return lock


def find_checkpoint(out: str, settings) -> tuple[Path | None, dict]:
    """The run's newest whole checkpoint, or policy/ where all steps are done -> (folder, its run.json).

    Without one: (None, a run.json of step 0). All processes have to call it together, and get the same.
    Raises BadInput where it was trained with other settings, or where all checkpoints are damaged.
    """
    rank = dist.get_rank()
    candidates = gather(read_runs(out, settings) if rank == 0 else None)[0]
    if not candidates:
        return None, dict(step=0, nonfinite_in_a_row=0)
    problems = {}
    for folder, run, problem in candidates:
        if not problem:
            check_same_run(folder, run, settings)
            # The first of what any process has found.
            problem = next(filter(None, gather(find_damage(folder, rank, dist.get_world_size()))), "")
        if not problem:
            if rank == 0:
                put_aside(problems, folder)
            return folder, run
        problems[folder] = problem
    raise BadInput(f"{'; '.join(problems.values())}; no whole checkpoint is left to continue from: "
                   f"give another --name, or --overwrite true")


def read_runs(out: str, settings) -> list[tuple[Path, dict, str]]:
    """(checkpoint, its run.json, what is wrong with that), the newest first."""
    if settings.overwrite:
        return []
    runs = []
    folders = sorted(Path(out).glob("step-??????"), reverse=True)
    if Path(out, "policy", "run.json").exists():
        folders.insert(0, Path(out, "policy"))
    for folder in folders:
        try:
            run = read_run(folder)
            # A policy of fewer steps has no state to continue from.
            if folder.name != "policy" or run["step"] >= settings.steps:
                runs.append((folder, run, ""))
        # A folder has its name only when it is complete, so what is missing was there.
        except (OSError, BadInput) as error:
            runs.append((folder, {}, f"{folder} is damaged ({error})"))
    return runs


def read_run(folder: Path) -> dict:
    """A checkpoint's run.json. Raises BadInput, naming it, where it is none."""
    run = read_json(folder / "run.json")
    for name, kind in dict(settings=dict, step=int, processes=int, nonfinite_in_a_row=int).items():
        if not isinstance(run.get(name), kind):
            raise BadInput(f"{folder}/run.json is damaged: its {name!r} is missing or of a wrong type")
    if folder.name not in ("policy", f"step-{run['step']:06d}"):
        raise BadInput(f"{folder}/run.json is damaged: it is of step {run['step']}")
    return run


def check_same_run(folder: Path, run: dict, settings) -> None:
    """Raises BadInput where a checkpoint has settings that a continued run may not change."""
    now = dataclasses.asdict(settings)
    resumable = resumable_names(type(settings))
    # An earlier version may have lacked a setting. It did what the default does.
    earlier = dataclasses.asdict(type(settings)()) | run["settings"]
    changed = []
    for name, value in now.items():
        if earlier[name] != value and name not in resumable:
            changed.append(f"--{name} {earlier[name]} -> {value}")
    if changed:
        raise BadInput(f"{folder} has other settings: {', '.join(changed)}; give another --name, "
                       f"or --overwrite true")
    before = run["settings"].get("steps")
    if before != settings.steps and dist.get_rank() == 0:
        print(f"--steps {before} -> {settings.steps}")


def put_aside(problems: dict, whole: Path) -> None:
    """Names the damaged checkpoints, and renames them, so that they count as none of the newest."""
    for folder, problem in problems.items():
        aside = Path(f"{folder}.damaged")
        print(f"{problem}; falls back to {whole}, and keeps the damaged one as {aside}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


# ---- checksums -------------------------------------------------------------------------------------
def checksum(file: Path) -> str:
    """SHA-256 of a file: about 1 GB a second."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def own_checksums(partial: str, rank: int) -> dict[str, str]:
    """{file: checksum} of the files that this process has written of a checkpoint."""
    folder = Path(partial)
    files = list(folder.glob(f"state/__{rank}_*"))
    if rank == 0:
        files += [file for file in folder.iterdir() if file.is_file()]
        files += folder.glob("state/.metadata")
    # The weights' files at once: Python does not hold its lock over a checksum.
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(checksum, files))
    return {str(file.relative_to(folder)): digest for file, digest in zip(files, sums)}


def find_damage(folder: Path, rank: int, world: int) -> str:
    """What is wrong with a checkpoint, in this process's share of the files; "" for nothing."""
    try:
        sums = read_json(folder / "checksums.json")
        there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        for name in sorted(there - sums.keys() - {"checksums.json"}):
            return f"{folder} is damaged: {name} is none of its files"
        for name in sorted(sums)[rank::world]:
            file = folder / check_name(name, f"{folder}/checksums.json", slashes=True)
            check_file(file)
            if checksum(file) != sums[name]:
                return f"{file} is damaged: it is not what was saved"
    except (OSError, BadInput) as error:
        return f"{folder} is damaged ({error})"
    return ""


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
    # SAM2 may have started CUDA in a run on the CPU.
    if policy.device.type == "cuda":
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
        dcp.load(state, storage_reader=StateReader(checkpoint / "state"))
    # An AssertionError means that there is no state at all.
    except (dcp.api.CheckpointException, AssertionError):
        raise BadInput(f"{checkpoint}/state is damaged or incomplete; once {checkpoint} is removed, the same "
                       f"command continues from the checkpoint before") from None
    torch.set_rng_state(random[f"cpu-{rank}"])
    if f"cuda-{rank}" in random:
        torch.cuda.set_rng_state(random[f"cuda-{rank}"])


class StateReader(dcp.FileSystemReader):
    """Reads a state whose index is a pickle, and makes nothing of it but an index of tensors."""

    def read_metadata(self, *arguments, **options):
        path = self._get_metadata_path(options.get("rank"))
        with open(path, "rb") as file:
            metadata = IndexUnpickler(file).load()
        for place in metadata.storage_data.values():
            check_name(place.relative_path, str(path))
        return super().read_metadata(*arguments, **options)


class IndexUnpickler(pickle.Unpickler):
    """Knows only what an index of tensors is made of. Any other pickle could run code.

    An index of other things is refused too: torch would unpickle them.
    """
    MODULES = {
        "torch.distributed.checkpoint.metadata": (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float32", "uint8"),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),
    }

    def find_class(self, module, name):
        if name in self.MODULES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's index")


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
    optimizer: torch.optim.Optimizer | None = None,
    log: Log | None = None,
) -> None:
    """Writes the policy's directory in the reference's dtype; with an optimizer also what continues the run.

    log: rank 0's, which becomes part of the checkpoint. Where anything cannot be written, all processes exit
    with code 1 and nothing of it stays.
    """
    partial = f"{path}.partial"
    weights = {}
    for name, whole in whole_weights(systems.policy):
        # One weight at a time is whole on the devices, and only rank 0 keeps them, in host memory.
        if rank == 0:
            weights[name] = whole.to(systems.reference.dtype).to("cpu", copy=True)
    problem = None
    try:
        if rank == 0:
            write_policy(systems, partial, weights, run, log)
    except (OSError, SafetensorError) as error:
        problem = error
    if optimizer is not None:
        state = training_state(systems.policy, optimizer, rank)
        try:
            dcp.save(state, checkpoint_id=os.path.join(partial, "state"))
        # Raised on every process, whichever has the problem.
        except dcp.api.CheckpointException as error:
            problem = problem or next(iter(error.failures.values()))[0]
    exit_together(path, problem, rank)
    complete(path, rank)


def complete(path: str, rank: int) -> None:
    """Adds the checksums to a checkpoint that is written, and gives it its name."""
    partial = f"{path}.partial"
    problem = None
    sums = {}
    try:
        sums = own_checksums(partial, rank)
    except OSError as error:
        problem = error
    exit_together(path, problem, rank)
    everywhere = gather(sums)
    try:
        if rank == 0:
            merged = {}
            for sums in everywhere:
                merged |= sums
            write_safely(Path(partial, "checksums.json"), json.dumps(merged, indent=1))
            # policy/ may be there already, from a run of fewer steps.
            shutil.rmtree(path, ignore_errors=True)
            os.rename(partial, path)
    except OSError as error:
        problem = error
    exit_together(path, problem, rank)


def write_safely(file: Path, text: str) -> None:
    """Writes a file that is on the disk afterwards, even after a power cut."""
    with open(file, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def write_policy(systems, partial: str, weights: dict, run: dict, log: Log | None) -> None:
    """Writes all of a checkpoint but its state and checksums."""
    systems.policy.save_pretrained(partial, weights)
    systems.processor.save(partial)
    Path(partial, "run.json").write_text(json.dumps(run, indent=1))
    if log:
        # No checkpoint without all lines up to its step.
        log.flush()
        shutil.copy(log.path, partial)
    # Otherwise, after a power cut, files could be there without content.
    for file in Path(partial).iterdir():
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


def exit_together(path: str, problem: Exception | None, rank: int) -> None:
    """Waits for all processes. If one has a problem, rank 0 prints it, and all exit with code 1."""
    problems = [line for line in gather(problem and one_line(problem)) if line]
    if not problems:
        return
    if rank == 0:
        shutil.rmtree(f"{path}.partial", ignore_errors=True)
        # torch's errors do not say that a disk is full, so the line does.
        free = shutil.disk_usage(os.path.dirname(path)).free / 1e9
        tqdm.write(f"error: cannot save {path}, where {free:.2f} GB are free: {problems[0]}; earlier "
                   f"checkpoints stay, and the same command continues from the newest", file=sys.stderr)
    # The others would take rank 0 for hanging, and rank 0 them for dead.
    dist.barrier()
    sys.exit(1)


def remove_old(out: str, keep: int) -> None:
    """Leaves the newest `keep` checkpoints, and the best by validation."""
    checkpoints = [path.parent for path in sorted(Path(out).glob("step-??????/run.json"))]
    best = None
    highest = None
    for checkpoint in checkpoints:
        with warned(f"reading {checkpoint}/run.json"):
            score = read_json(checkpoint / "run.json")["validation"]
            if score is not None and (highest is None or score > highest):
                best = checkpoint
                highest = score
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            with warned(f"removing {checkpoint}"):
                # Renamed first, so that its name never stands for half a checkpoint.
                shutil.rmtree(checkpoint.rename(f"{checkpoint}.partial"))
