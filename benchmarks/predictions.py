"""Predictions on disk, in the layout that the benchmarks share.

    DIR/Annotations/<video>/<expression>/<frame>.png    gray, 0 or 255

The level Annotations may be missing. Or a .json holds all masks as COCO run lengths, null for an empty one:

    {video: {expression: {"prediction_masks": [one of each frame]}}}

`source` below is either a directory or the contents of such a .json. Letters: T frames, H W pixels.
"""
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.media import read_image
from benchmarks.samples import Benchmark, Sample, rle_mask
from data import parse_json
from trust.errors import BadInput, reading
from trust.files import PARTIAL, check_file, check_inside, read_json, writing


# ---- folders ---------------------------------------------------------------------------------------
def prediction_folder(directory: str, sample: Sample) -> str:
    """Where the pictures of a sample's prediction lie. Raises BadInput where that is not in `directory`."""
    top = top_folder(directory)
    folder = os.path.join(top, sample.place)
    check_inside(folder, top)
    return folder


def top_folder(directory):
    annotations = os.path.join(directory, "Annotations")
    return annotations if os.path.isdir(annotations) else directory


def prediction_files(directory, sample, names):
    """The paths of these frames of a sample's prediction. Raises BadInput for one beside its folder."""
    folder = prediction_folder(directory, sample)
    paths = [os.path.join(folder, f"{name}.png") for name in names]
    for path in paths:
        check_inside(path, folder)
    return paths


def scored_names(sample: Sample) -> list:
    """The names of the frames that count."""
    return sample.names if sample.scored is None else sample.scored


def write_prediction(out: str, sample: Sample, masks) -> None:
    """Writes masks, bool [T, H, W], into OUT/Annotations."""
    if len(masks) != len(sample.names):
        raise BadInput(f"{len(masks)} masks for the {len(sample.names)} frames of {sample.name}")
    begin_prediction(out, sample)
    for t, mask in enumerate(masks):
        write_frame(out, sample, t, mask)
    finish_prediction(out, sample)


# A folder appears complete or not at all. So an expression whose folder exists is finished, even after an
# interruption.

def begin_prediction(out: str, sample: Sample) -> None:
    """Makes a sample's unfinished folder in OUT/Annotations. One of an interrupted run is removed."""
    os.makedirs(os.path.join(out, "Annotations"), exist_ok=True)
    partial = prediction_folder(out, sample) + PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)


def write_frame(out: str, sample: Sample, t: int, mask) -> None:
    """Writes the mask of frame t, bool [H, W], into the sample's unfinished folder."""
    file, = prediction_files(out, sample, [sample.names[t]])
    path = os.path.join(prediction_folder(out, sample) + PARTIAL, os.path.basename(file))
    with writing(path):
        Image.fromarray(np.asarray(mask, np.uint8) * 255).save(path)


def finish_prediction(out: str, sample: Sample) -> None:
    """Gives a sample's folder its name."""
    folder = prediction_folder(out, sample)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + PARTIAL, folder)


# ---- reading ---------------------------------------------------------------------------------------
def open_predictions(path: str) -> str | dict:
    """The source at a path: the directory itself, or the contents of a .json.

    Raises FileNotFoundError or BadInput where it is neither.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such directory or .json of predictions: {path}")
    if os.path.isdir(path):
        return path
    videos = read_json(path)
    for video, entries in videos.items():
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            form = '{video: {expression: {"prediction_masks": [...]}}}'
            raise BadInput(f"not {form}: {video} in {path}")
    return videos


def read_prediction(source: str | dict, sample: Sample, size: tuple) -> np.ndarray | None:
    """bool [T, H, W] of the frames that count; None where a sample has no prediction.

    size: (H, W) of the frames. Raises BadInput naming a mask that is missing, broken or of another size.
    """
    if isinstance(source, dict):
        return read_runs(source, sample, size)
    if not os.path.isdir(prediction_folder(source, sample)):
        return None
    files = prediction_files(source, sample, scored_names(sample))
    return np.stack([read_mask(file, size) for file in files])


def read_mask(path, size):
    """bool [H, W] of a picture: 1 and 255 are the same."""
    mask = np.asarray(read_image(path, "L", "predicted mask")) > 0
    rows, columns = mask.shape
    H, W = size
    if (rows, columns) != (H, W):
        raise BadInput(f"predicted mask of wrong size: {path} is {rows} x {columns}, its frame {H} x {W}")
    return mask


def read_runs(videos, sample, size):
    """As read_prediction, from the contents of a .json."""
    entry = videos.get(sample.video, {}).get(sample.expression)
    if entry is None:
        return None
    runs = entry.get("prediction_masks")
    if not isinstance(runs, list) or len(runs) != len(sample.names):
        count = len(sample.names)
        raise BadInput(f"prediction_masks of {sample.name} are not a list of {count}, one per frame")
    where = f"the prediction of {sample.name}"
    masks = []
    for name in scored_names(sample):
        if name not in sample.names:
            raise BadInput(f"{sample.name}: a mask of {name}, which is no frame of the video")
        rle = runs[sample.names.index(name)]
        mask = np.zeros(size, bool) if rle is None else rle_mask(rle, where, tuple(size))
        masks.append(mask)
    return np.stack(masks)


def is_whole(source: str | dict, sample: Sample) -> bool:
    """Whether all frames of a sample have a prediction; none is read."""
    if sample.broken:
        return False
    if isinstance(source, dict):
        return sample.expression in source.get(sample.video, {})
    files = prediction_files(source, sample, sample.names)
    return all(map(os.path.isfile, files))


# ---- packing ---------------------------------------------------------------------------------------
def zip_predictions(benchmark: Benchmark, samples: list[Sample], directory: str, out: str) -> str:
    """Writes OUT/NAME.zip of the predictions as the benchmark's server takes them. Returns its path."""
    top = top_folder(directory)
    if not os.path.isdir(top):
        raise FileNotFoundError(f"no folder of predictions to pack: {top}")
    files = []
    for sample in samples:
        if not sample.broken:
            files += prediction_files(directory, sample, sample.names)
    path = os.path.join(out, f"{benchmark.name}.zip")
    # Stored as they are: the pictures are compressed already.
    with writing(path), zipfile.ZipFile(path + PARTIAL, "w") as archive:
        for file in sorted(filter(os.path.isfile, files)):
            inner = os.path.relpath(file, top)
            archive.write(file, os.path.join(benchmark.archive, inner))
    os.replace(path + PARTIAL, path)
    return path


# ---- a folder that an evaluation fills -------------------------------------------------------------
# OUT/Annotations, OUT/answers-RANK.jsonl with System 1's words, and OUT/run.json, which says whose they are.

def unpredicted(out: str, samples: list[Sample]) -> list[Sample]:
    """The samples without a prediction in OUT: broken ones have none."""
    return [
        sample for sample in samples
        if sample.broken or not os.path.isdir(prediction_folder(out, sample))
    ]


def check_claim(out: str, claim: dict) -> None:
    """Raises BadInput where OUT/run.json makes another claim: OUT holds predictions of something else."""
    check_origin(out)
    path = f"{out}/run.json"
    earlier = read_json(path) if os.path.exists(path) else claim
    for key, value in claim.items():
        if earlier.get(key) != value:
            raise BadInput(f"{out} holds predictions with {key} {earlier.get(key)}, not {value}: "
                           f"give another --out, or --overwrite true")


def fingerprint(directory: str) -> str:
    """A text that changes with the weights in a directory: their names, sizes and times."""
    facts = []
    for file in sorted(Path(directory).glob("*.safetensors")):
        status = file.stat()
        facts.append((file.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def check_origin(out: str) -> None:
    """Raises BadInput where OUT/Annotations is not of an evaluation: it may be somebody's truth."""
    path = f"{out}/run.json"
    if not os.path.exists(f"{out}/Annotations"):
        return
    if not os.path.exists(path) or "policy_weights" not in read_json(path):
        raise BadInput(f"{out}/Annotations is not of an evaluation, as {path} does not say whose it is: "
                       f"give another --out")


def clear(out: str) -> None:
    """Removes the predictions, answers and claim of an evaluation. Raises BadInput where they are not of
    one."""
    check_origin(out)
    check_inside(f"{out}/Annotations", out)
    shutil.rmtree(f"{out}/Annotations", ignore_errors=True)
    for path in [*Path(out).glob("answers-[0-9]*.jsonl"), *Path(out).glob("run.json")]:
        if path.is_file():
            path.unlink()


def read_answers(directory: str) -> dict:
    """{name of a sample: its answer} of a directory of predictions; {} where there are none."""
    answers = {}
    for path in sorted(Path(directory).glob("answers-*.jsonl")):
        check_file(path)
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
        for answer in map(parse_json, lines):
            # A full disk may have left half a line.
            if is_answer(answer):
                answers[answer["name"]] = answer
    return answers


def is_answer(value) -> bool:
    """Whether a JSON value has what an evaluation reads of an answer."""
    if not isinstance(value, dict) or not {"name", "text", "keyframes"} <= value.keys():
        return False
    texts = isinstance(value["name"], str) and isinstance(value["text"], str)
    keyframes = value["keyframes"]
    return texts and isinstance(keyframes, (list, dict)) and all(str(t).isdecimal() for t in keyframes)
