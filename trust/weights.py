"""Weights from files: what they must be before a model computes with them."""
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trust.errors import BadInput, one_line, reading
from trust.files import check_file, check_name, read_json

# What safetensors calls the numbers that a model can compute with. Others are quantized, and mean nothing
# without their scales.
FLOATS = ("F64", "F32", "F16", "BF16")


def check_weight(tensor, name: str, file) -> None:
    """Raises BadInput unless a weight holds floating-point numbers, all of them finite.

    Smallest and largest are found in one pass without a copy, and both are NaN if one number is. That takes a
    third of the time of copying the weight: 2 s of a CPU core for the 7B in bf16, next to nothing on a GPU.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise BadInput(f"{file} holds no floating-point numbers in {name}, but {kind}")
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise BadInput(f"{file} holds NaN or infinity in {name}")


# ---- a policy's ------------------------------------------------------------------------------------
def check_stored(part, name: str, shape, file) -> None:
    """Raises BadInput unless a stored weight has this shape and floating-point numbers. Nothing is read.

    part: a slice of safetensors. shape: what the model has under the name; None where it has nothing.
    """
    if shape is None:
        raise BadInput(f"{file} holds a weight that a Thinker does not have: {name}")
    found = list(part.get_shape())
    if found != list(shape):
        raise BadInput(f"{file} does not fit its config.json (size mismatch for {name}: {found} is stored, "
                       f"{list(shape)} is expected)")
    if part.get_dtype() not in FLOATS:
        raise BadInput(f"{file} holds no floating-point numbers in {name}, but {part.get_dtype()}; "
                       f"quantized weights cannot be used")


def weight_files(path):
    """The files that should hold a directory's weights. Raises FileNotFoundError where it has none."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        listing = read_json(index)
        with reading(index):
            names = {check_name(name, str(index)) for name in listing["weight_map"].values()}
            return [path / name for name in sorted(names)]
    if single.is_file():
        return [single]
    raise FileNotFoundError(f"{path} holds no weights; "
                            f"expected {single.name}, or {index.name} and its shards")


def read_shards(path, shapes, dtype, device):
    """The Thinker's weights, {name: tensor} of one file after the other, without the prefix "thinker.".

    shapes: of the Thinker's weights by their names. The full model's other parts (talker, token2wav) are left
    out. Raises FileNotFoundError or BadInput, naming the file.
    """
    for file in weight_files(path):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, though model.safetensors.index.json names it: "
                                    f"incomplete download?")
        check_file(file)
        weights = {}
        try:
            with safe_open(file, framework="pt") as shard:
                for stored in shard.keys():
                    if not stored.startswith(("talker.", "token2wav.")):
                        name = stored.removeprefix("thinker.")
                        check_stored(shard.get_slice(stored), name, shapes.get(name), file)
                        # The file is mapped into memory. A copy does not keep the mapping alive.
                        weights[name] = shard.get_tensor(stored).to(device, dtype, copy=True)
                        check_weight(weights[name], name, file)
        except SafetensorError as error:
            message = f"not a safetensors file: {file} ({one_line(error)}); incomplete download?"
            raise BadInput(message) from None
        # Such as a full memory.
        except RuntimeError as error:
            raise BadInput(f"cannot load {file} onto {device} ({one_line(error)})") from None
        yield weights


# ---- SAM2's ----------------------------------------------------------------------------------------
def check_unpacked(file) -> None:
    """Raises BadInput where a .pt file is compressed: torch's are not, and a small one could fill memory."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise BadInput(f"{file} is compressed, which torch.save never does")


def load_weights(model, file, config) -> None:
    """Reads a .pt file with {"model": state_dict} into a SAM2 of a config.

    Raises FileNotFoundError or BadInput, naming the file.
    """
    if not Path(file).exists():
        raise FileNotFoundError(f"no such file of SAM2 weights: {file}")
    check_file(file)
    try:
        check_unpacked(file)
        saved = dict(torch.load(file, map_location="cpu", weights_only=True))
        model.load_state_dict(saved["model"])
        for name, tensor in saved["model"].items():
            check_weight(tensor, name, file)
    except BadInput:
        raise
    # torch raises many kinds of errors over malformed files.
    except Exception as error:
        raise BadInput(f"not the SAM2 weights of config {config}: {file} ({one_line(error)})") from None
