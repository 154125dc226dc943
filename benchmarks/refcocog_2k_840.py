"""refcocog_2k_840 (Seg-Zero, arXiv 2503.06520): 2000 pictures of RefCOCOg to train on.

    refcocog_2k_840/data/*.parquet    columns id, problem, solution, img_height, img_width, image {"bytes"}

problem holds the words, solution a box and two points of the target:

    <box>(x1,y1),(x2,y2)</box><points>(x,y),(x,y)</points>

All pictures are resized to 840 x 840, and the numbers are pixels of these; img_height and img_width are those
of the original.

It has no metric. `--data refcocog` means it. Reading needs pyarrow.
"""
import io
import os
import re
from functools import lru_cache

import numpy as np
from PIL import Image

from benchmarks.mini import encoded, stills
from benchmarks.samples import Benchmark, Sample, faults_of, files_of, require
from benchmarks.toy import CANVAS
from trust.errors import BadInput, reading
from trust.files import check_file

SIDE = 840    # of the pictures, in pixels
COLUMNS = ["id", "problem", "solution", "img_height", "img_width"]
PAIR = r"\(([0-9]{1,9}),([0-9]{1,9})\),\(([0-9]{1,9}),([0-9]{1,9})\)"


def read_refcocog(root: str, split: str) -> list[Sample]:
    """Samples of all files. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    samples = []
    for path in files_of(f"{root}/data", "parquet"):
        table = open_parquet(path)
        for column in (*COLUMNS, "image"):
            if column not in table.schema_arrow.names:
                raise BadInput(f"no column {column!r} in {path}")
        with reading(path):
            rows = table.read(COLUMNS).to_pylist()
        for i, row in enumerate(rows):
            sample = Sample("image", "refcocog_2k_840", "row", str(len(samples)), "", "", [], [f"{path}#{i}"])
            sample.read_picture = read_cell
            samples.append(sample)
            with faults_of(sample):
                read_row(sample, row, f"row {i}: {path}")
    return samples


def read_row(sample, row, where):
    """Fills in what a row says. Raises BadInput where it is not of its form."""
    sample.video = require(row, "id", where, str)
    sample.names = [sample.video]
    sample.query = require(row, "problem", where, str)
    solution = require(row, "solution", where, str)
    match = re.search(f"<box>{PAIR}</box><points>{PAIR}</points>", solution)
    if not match:
        raise BadInput(f"no box and two points in the solution of {where}")
    numbers = [float(digits) for digits in match.groups()]
    x1, y1, x2, y2 = box = tuple(numbers[:4])
    if max(numbers) > SIDE or x1 > x2 or y1 > y2:
        raise BadInput(f"no box and two points of a picture of {SIDE} x {SIDE} in the solution of {where}")
    sample.truth = dict(box=box, points=[numbers[4:6], numbers[6:]], size=(SIDE, SIDE))


def read_cell(path):
    """RGB picture of FILE.parquet#ROW. Raises BadInput that names it."""
    file, row = path.rsplit("#", 1)
    row = int(row)
    table = open_parquet(file)
    with reading(path):
        # Only the group of the row is read: all pictures would fill the memory.
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row < count:
                break
            row -= count
        else:
            raise ValueError("no such row")
        cell = table.read_row_group(group, ["image"])["image"][row].as_py()
        return Image.open(io.BytesIO(cell["bytes"])).convert("RGB")


@lru_cache(maxsize=8)
def open_parquet(path):
    """The pyarrow ParquetFile at `path`. Raises BadInput that names it, or the library that is missing."""
    library = import_pyarrow()
    check_file(path)
    with reading(path):
        return library.parquet.ParquetFile(path, memory_map=True)


def import_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput("parquet files need pyarrow: pip install pyarrow") from None
    return pyarrow


def mini_refcocog(root: str, videos: int):
    library = import_pyarrow()
    rows = []
    for i, (picture, masks, names) in enumerate(stills("train", videos)):
        ys, xs = (np.array(masks[0].nonzero()) * SIDE / CANVAS + 0.5).astype(int)
        one = len(xs) // 3
        two = 2 * len(xs) // 3
        box = f"<box>({xs.min()},{ys.min()}),({xs.max()},{ys.max()})</box>"
        points = f"<points>({xs[one]},{ys[one]}),({xs[two]},{ys[two]})</points>"
        large = Image.fromarray(picture).resize((SIDE, SIDE))
        rows.append(dict(
            id=f"refcocog_{i}",
            problem=f"the {names[0]}",
            solution=box + points,
            img_height=CANVAS,
            img_width=CANVAS,
            image=dict(bytes=encoded(large, "png"), path=None),
        ))
    os.makedirs(f"{root}/data", exist_ok=True)
    table = library.Table.from_pylist(rows)
    library.parquet.write_table(table, f"{root}/data/train-00000-of-00001.parquet", row_group_size=2)


REFCOCOG_2K_840 = Benchmark(
    read=read_refcocog,
    per_video=False,
    mini=mini_refcocog,
)
