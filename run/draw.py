"""Step 1 of training: the clips of an epoch, and the order in which they are drawn.

    training_sources -> Sources -> epoch_plan -> TrainingItems -> sample_loader -> from_shared_memory
    -> take_items -> (clip, inputs, seed)

Everything follows from the run's seed and a clip's number in the run, whatever the number of processes.
"""
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import active_children
from multiprocessing.connection import wait

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import dataset_root, find_benchmark, open_split, trained_entries
from benchmarks.samples import Benchmark, Sample, load
from data import Clip, Frames, Processor, prompt_inputs
from trust.errors import BadInput, one_line
from trust.options import MOST_FRAMES
from trust.workers import begin_reading, no_room, prepare_to_fork, share

# Samples with more objects are left out: without some of them a right answer would count as wrong.
MOST_OBJECTS = 3


# ---- sources ---------------------------------------------------------------------------------------
@dataclass(eq=False)
class Source:
    """A training set of one task. An epoch visits each item once."""
    task: str
    items: Sequence     # an item is a list of Samples: all of one video, or a single one
    read: Callable      # (item, rng) -> Clip of one of them, drawn at random


def training_sources(
    names: str,
    data_root: str,
    roots: dict,
    seed: int,
    frames: tuple[int, int] = (MOST_FRAMES, MOST_FRAMES),
) -> tuple[tuple, list[str]]:
    """(a Source for each dataset, a line for each sample left out).

    names   datasets, by commas
    roots   {folder: where it lies}, of those that are not in data_root
    frames  (least, most) frames of a clip, whose number is drawn each time
    Raises BadInput or FileNotFoundError naming what is unknown, missing or malformed.
    """
    sources = []
    dropped = []
    for entry in trained_entries(names):
        benchmark = find_benchmark(entry.name)
        root = dataset_root(benchmark, data_root, roots)
        samples, left_out = training_samples(benchmark, root, seed)
        if not samples:
            raise BadInput(f"no sample of {benchmark.name} can be trained on")
        items = {}
        for sample in samples:
            key = sample.video if benchmark.per_video else sample.name
            items.setdefault(key, []).append(sample)
        sources.append(Source(samples[0].task, list(items.values()), partial(read_any, frames=frames)))
        dropped += left_out
    return tuple(sources), dropped


def training_samples(benchmark: Benchmark, root: str, seed: int) -> tuple[list[Sample], list[str]]:
    """(samples that can be trained on, a line for each one left out)."""
    samples = []
    dropped = []
    for sample in open_split(benchmark, "train", root):
        fault = sample.fault
        if sample.objects > MOST_OBJECTS and not fault:
            fault = f"{sample.objects} objects, more than {MOST_OBJECTS}"
        if fault:
            dropped.append(f"{sample.name}: {fault}")
        else:
            samples.append(sample)
    if benchmark.choose is not None:
        samples = benchmark.choose(samples, seed)
    return samples, dropped


def read_any(samples: list[Sample], rng, frames: tuple[int, int]) -> Clip:
    """The Clip of a random sample. It has at most a random number of frames from the range (least, most)."""
    sample = samples[rng.integers(len(samples))]
    least, most = frames
    if least < most:
        most = rng.integers(least, most + 1)
    return load(sample, most_frames=most, whole_sound=True)


def read_clip(source: Source, item, rng) -> Clip:
    """The Clip of an item with its pictures read.

    A broken one becomes a blank clip of the same task, with the reason as its `fault`. It takes part in the
    step, as all processes must, and counts for nothing.
    """
    try:
        clip = source.read(item, rng)
        pictures = [clip.frames[t].convert("RGB") for t in range(len(clip.frames))]
        if len({picture.size for picture in pictures}) > 1:
            raise BadInput(f"frames of several sizes: {clip.name}")
    except (OSError, BadInput) as error:
        return blank_clip(source.task, str(error))
    return replace(clip, frames=Frames(pictures.__getitem__, range(len(pictures))))


@dataclass
class Pixels:
    """Pictures of one size in one tensor, uint8 (T, H, W, 3)."""
    tensor: torch.Tensor

    def __call__(self, t: int) -> Image.Image:
        return Image.fromarray(self.tensor[t].numpy())


def to_shared_memory(item: tuple) -> tuple | str:
    """An item of TrainingItems as its worker sends it: pictures and masks in tensors.

    Tensors reach the training process through shared memory. Anything else is copied through a pipe, a third
    of a second for 24 frames of 1280 x 720. Where there is no room for them, the result is why.
    """
    clip, inputs, seed = item
    pictures = [np.asarray(clip.frames[t]) for t in range(len(clip.frames))]
    frames = Frames(Pixels(torch.from_numpy(np.stack(pictures))), range(len(pictures)))
    masks = None if clip.masks is None else torch.from_numpy(np.ascontiguousarray(clip.masks))
    problem = share([frames.read.tensor, masks, *vars(inputs).values()])
    if problem:
        return problem
    return replace(clip, frames=frames, masks=masks), inputs, seed


def from_shared_memory(item: tuple | str) -> tuple:
    """The item with masks as numpy arrays again; nothing is copied. BadInput where the worker had no room."""
    if isinstance(item, str):
        raise no_room(item)
    clip, inputs, seed = item
    if clip.masks is not None:
        clip = replace(clip, masks=clip.masks.numpy())
    return clip, inputs, seed


def blank_clip(task: str, fault: str) -> Clip:
    """One black picture, with the `truth` that each task reads."""
    pictures = [Image.new("RGB", (56, 56))]
    frames = Frames(pictures.__getitem__, [0])
    masks = np.zeros((1, 1, 56, 56), bool)
    truth = dict(box=(0, 0, 1, 1), points=[[0, 0], [1, 1]], type="free-form", options=[], solution="")
    return Clip("blank", frames, "", masks=masks, task=task, truth=truth, fault=fault)


def hold_out(sources: tuple, count: int, seed: int) -> tuple[tuple, list]:
    """Takes `count` random items out of the sources -> (sources without them, [(source, item)]).

    Raises BadInput where nothing is left.
    """
    if count == 0:
        return sources, []
    items = []
    for source in sources:
        items += [(source, item) for item in source.items]
    if count >= len(items):
        raise BadInput(f"--validate {count} leaves none of {len(items)} clips to train on; take fewer, or 0")
    order = np.random.default_rng([seed, 2]).permutation(len(items))
    taken = set(order[:count].tolist())
    remaining = {source: [] for source in sources}
    validation_items = []
    for k, (source, item) in enumerate(items):
        if k in taken:
            validation_items.append((source, item))
        else:
            remaining[source].append(item)
    left = tuple(replace(source, items=kept) for source, kept in remaining.items() if kept)
    return left, validation_items


# ---- epochs ----------------------------------------------------------------------------------------
def epoch_length(sources: tuple, size: int) -> int:
    """Steps of `size` items in an epoch."""
    counts = {}
    for source in sources:
        counts[source.task] = counts.get(source.task, 0) + len(source.items)
    return sum(-(-count // size) for count in counts.values())


@lru_cache(maxsize=2)
def epoch_plan(sources: tuple, size: int, seed: int, epoch: int) -> list[list]:
    """The steps of an epoch, each a list of `size` (source, item); the same on every process.

    All items of a step have one task, so that all processes do the same. Every item comes once, and a task's
    first items fill up its last step.
    """
    by_task = {}
    for source in sources:
        by_task.setdefault(source.task, []).extend((source, item) for item in source.items)
    rng = np.random.default_rng([seed, epoch])
    queues = {}
    turns = []
    for task, entries in by_task.items():
        order = rng.permutation(len(entries))
        steps = -(-len(entries) // size)
        # The last step is filled up from the start.
        queues[task] = iter(np.resize(order, (steps, size)))
        turns += [task] * steps

    plan = []
    for task in rng.permutation(turns):
        plan.append([by_task[task][i] for i in next(queues[task])])
    return plan


@dataclass
class TrainingItems:
    """Clip number i of the whole run, over all processes: items[i] is (clip, its prompt's Inputs, a seed)."""
    sources: tuple
    processor: Processor
    settings: object

    def __getitem__(self, i):
        size = self.settings.batch * self.settings.accumulate
        run_seed = self.settings.seed
        step, place = divmod(i, size)
        epoch, step = divmod(step, epoch_length(self.sources, size))
        source, item = epoch_plan(self.sources, size, run_seed, epoch)[step][place]
        seed = int(np.random.SeedSequence([run_seed, i]).generate_state(1, np.uint64)[0] >> 2)
        clip = read_clip(source, item, np.random.default_rng([seed, 1]))
        inputs = prompt_inputs(self.processor, clip, np.random.default_rng(seed))
        return clip, inputs, seed


# ---- reading ahead ---------------------------------------------------------------------------------
def sample_loader(
    sources: tuple,
    processor: Processor,
    settings,
    start: int,
    rank: int,
    world: int,
) -> DataLoader:
    """Loads this process's items in order, from step `start` on. Its workers are about a step ahead."""
    size = settings.batch * settings.accumulate
    places = range(start * size + rank, settings.steps * size, world)
    ahead = None
    context = None
    if settings.workers:
        # Items that each worker prepares ahead.
        ahead = max(2, -(-size // world // settings.workers))
        # Python 3.14 would start workers in another way, with a copy of all samples in each.
        context = "fork"
    prepare_to_fork()
    return DataLoader(TrainingItems(sources, processor, settings), sampler=places, batch_size=None,
                      collate_fn=to_shared_memory, num_workers=settings.workers, prefetch_factor=ahead,
                      worker_init_fn=begin_worker, multiprocessing_context=context)


def begin_worker(_) -> None:
    """Makes a forked process fit to read clips."""
    begin_reading()
    # torchrun's SIGTERM and Ctrl-C go to a whole process group, but the running step still needs clips.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its signals are not the parent's.
    signal.set_wakeup_fd(-1)
    # The loader takes exit code 0 as no failure.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def take_items(items: Iterator) -> Iterator:
    """The items of a loader's iterator. Exits with one line where one of its workers has died.

    A death raises a RuntimeError at any time, or an OSError or EOFError at an item that the worker has sent
    but that is not opened yet.
    """
    workers = [worker.sentinel for worker in active_children()]
    if workers:
        exit_at_deaths()
    try:
        yield from items
    except Exception as error:
        # The pipe that shows a worker's end may close a moment after the pipe that failed.
        if workers and wait(workers, timeout=3):
            exit_after_death(error)
        raise


def exit_at_deaths() -> None:
    """Makes the loader's handler of SIGCHLD exit. By itself it raises an error wherever the program is."""
    check_workers = signal.getsignal(signal.SIGCHLD)

    def handle(number, frame):
        try:
            check_workers(number, frame)
        except RuntimeError as error:
            exit_after_death(error)

    if callable(check_workers):
        signal.signal(signal.SIGCHLD, handle)


def exit_after_death(error: Exception) -> None:
    sys.exit(f"error: a worker that reads clips has died ({one_line(error)}); "
             f"the same command continues from the newest checkpoint")
