"""Processes that read media ahead of time: what the readers of training and of questions share."""
import gc
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import parent_process

import torch
from torch.utils.data import get_worker_info

from trust.errors import BadInput, one_line
from trust.program import end_with_parent


def prepare_to_fork() -> None:
    """For the process that will fork workers."""
    # A tokenizer that has used threads warns when its process forks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A tensor in shared memory holds a file descriptor, and so do all that wait here.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems know limits that cannot be set.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.collect()


def begin_reading() -> None:
    """Makes a forked process fit to read media."""
    # The parent's objects are never freed here: to free some of them waits for threads that a fork lacks.
    gc.freeze()
    torch.set_num_threads(1)
    end_with_parent(parent_process().pid)
    # Python's thread that sends tensors tells its errors here.
    sys.excepthook = tell_unless_parent_left


def tell_unless_parent_left(kind: type, error: BaseException, trace) -> None:
    """A parent that is killed while it takes a tensor needs no stack trace of its worker."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def share(values: Iterable) -> str:
    """Moves the tensors among some values to shared memory, if this is a worker. Returns why it cannot.

    Left to the thread that sends them, they would get lost, and the parent would wait for ever.
    """
    if get_worker_info() is None:
        return ""
    try:
        for value in values:
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    except RuntimeError as error:
        return one_line(error)
    return ""


def no_room(why: str) -> BadInput:
    """The error of a parent whose worker had no room."""
    return BadInput(f"no room in shared memory, /dev/shm ({why}); with Docker: --ipc=host, or --shm-size")
