"""Boards of others that a run writes to beside metrics.jsonl: TensorBoard and Weights & Biases.

The names of figures are those of the report: reward/..., loss/..., perf/..., time/...
"""
import importlib
import os
from pathlib import Path

import numpy as np

from report.training import grouped
from trust.errors import BadInput, one_line


def start_boards(settings, out: str, run: dict, start: int, first: bool) -> list:
    """The boards that the settings ask for. Only the first process has any.

    start: the step that the run begins or goes on with. Raises BadInput, on every process, where a board's
    package is not installed, and on the first where Weights & Biases cannot begin.
    """
    boards = []
    if settings.tensorboard:
        writer = package("torch.utils.tensorboard", "--tensorboard true").SummaryWriter
        if first:
            # What an interrupted run wrote of later steps is hidden.
            boards.append(TensorBoard(writer(os.path.join(out, "tensorboard"), purge_step=start)))
    if settings.wandb:
        wandb = package("wandb", f"--wandb {settings.wandb}")
        if first:
            boards.append(Wandb(wandb, settings, out, run, start))
    return boards


def package(name: str, option: str):
    """A package that not everybody has. BadInput names the option that needs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"{option}: the package {name.rpartition('.')[2]} is not installed here") from None


class TensorBoard:
    """Files of events in out/NAME/tensorboard."""

    def __init__(self, writer):
        self.writer = writer

    def write(self, row: dict) -> None:
        for name, value in grouped(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def show(self, name: str, picture, step: int) -> None:
        self.writer.add_image(name, np.array(picture), step, dataformats="HWC")
        self.writer.flush()


class Wandb:
    """A run of a project of Weights & Biases. A run that goes on is the same one there."""

    def __init__(self, wandb, settings, out: str, run: dict, start: int):
        self.wandb = wandb
        # Remembers its name there, for the run to go on under it.
        file = Path(out, "wandb.txt")
        earlier = file.read_text().strip() if start and file.exists() else None
        try:
            self.board = wandb.init(project=settings.wandb, name=settings.name, id=earlier, dir=out,
                                    resume="allow", config=run)
        # Its errors are of its own kinds: nobody is logged in, or the network is down.
        except Exception as error:
            raise BadInput(f"--wandb {settings.wandb}: {one_line(error)}") from None
        file.write_text(self.board.id)

    def write(self, row: dict) -> None:
        self.board.log(grouped(row), step=row["step"])

    def show(self, name: str, picture, step: int) -> None:
        self.board.log({name: self.wandb.Image(picture)}, step=step)
