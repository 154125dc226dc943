"""System 2 as a Python file of the user's. It is their own program: nothing keeps it from anything."""
import importlib.util
import math
import sys
from pathlib import Path

from trust.errors import BadInput
from trust.files import check_file

# Boxes or masks of one picture. Each is tracked by itself.
MOST_BOXES = 256


class NoBoxes(BadInput):
    """The function of a plugged file returned something else. It would do so for any sample."""


def plugged(path: str, mask_prompt: bool = True):
    """System 2 (pictures and descriptions -> boxes or Masks of each) by a function of a Python file:

        def boxes(image: PIL.Image, description: str) -> list of (x1, y1, x2, y2) in pixels of the image
        def masks(image: PIL.Image, description: str) -> list of bool arrays [H, W] of the image's size

    A file that has both is asked for masks. mask_prompt: whether they stay masks, or become boxes.

    Raises FileNotFoundError without the file and BadInput without a function. Calls raise NoBoxes where the
    function returns anything else.
    """
    module = load_file(path)
    masks = getattr(module, "masks", None)
    boxes = getattr(module, "boxes", None)
    if callable(masks):
        def find(picture, description):
            found = check_masks(masks(picture, description), picture.size, path)
            return found if mask_prompt else [tuple(mask) for mask in found]
    elif callable(boxes):
        def find(picture, description):
            found = check_boxes(boxes(picture, description), path)
            return [inside_picture(box, picture.size) for box in found]
    else:
        raise BadInput(f"no function boxes(image, description) or masks(image, description) in: {path}")

    def system2(pictures, descriptions):
        return [find(picture, description) for picture, description in zip(pictures, descriptions)]
    return system2


def load_file(path: str):
    """The module of a Python file. Raises FileNotFoundError or BadInput where there is none."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file of a grounder: {path}")
    check_file(path)
    spec = importlib.util.spec_from_file_location("grounder", path)
    if spec is None:
        raise BadInput(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses in the file look for their module there.
    sys.modules["grounder"] = module
    # The file's own errors pass unchanged, for its author.
    spec.loader.exec_module(module)
    return module


def check_boxes(answer, path) -> list[tuple]:
    """What the function of a file returned, as boxes. NoBoxes where it is something else."""
    wanted = f"a list of at most {MOST_BOXES} (x1, y1, x2, y2)"
    called = f"boxes() of {path}"
    boxes = []
    for box in items_of(answer, called, wanted):
        try:
            # Of text, each letter would be a number.
            if isinstance(box, (str, bytes)):
                raise TypeError("text")
            x1, y1, x2, y2 = map(float, box)
            if not (-math.inf < x1 <= x2 < math.inf and -math.inf < y1 <= y2 < math.inf):
                raise ValueError("no box")
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise refusal(called, answer, wanted) from None
        boxes.append((x1, y1, x2, y2))
    return boxes


def check_masks(answer, size: tuple, path) -> list:
    """What the function of a file returned for a picture of (width, height), as Masks.

    Empty masks are left out: nothing was found. NoBoxes where it is something else. Each array is looked at
    when its turn comes, and only its compressed pixels are kept.
    """
    # numpy and torch take long to import, and options are read before.
    from trust.masks import Mask, bool_array
    wanted = f"a list of at most {MOST_BOXES} bool arrays [{size[1]}, {size[0]}]"
    called = f"masks() of {path}"
    masks = []
    for item in items_of(answer, called, wanted):
        try:
            pixels = bool_array(item, (size[1], size[0]))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise refusal(called, item, wanted) from None
        if pixels.any():
            masks.append(Mask.of(pixels))
    return masks


def items_of(answer, called: str, wanted: str):
    """Yields what a function returned. NoBoxes where it is no list, or too long a one.

    It may be a generator of the file, whose own errors pass unchanged, too.
    """
    try:
        items = iter(answer)
    except TypeError:
        raise refusal(called, answer, wanted) from None
    for count, item in enumerate(items):
        if count == MOST_BOXES:
            raise refusal(called, answer, wanted)
        yield item


def refusal(called: str, value, wanted: str) -> NoBoxes:
    return NoBoxes(f"{called} returned {shown(value)}, not {wanted}")


def shown(value) -> str:
    """What a function returned, on one short line: an array by its type and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of {value.dtype} {list(value.shape)}"
    return " ".join(repr(value)[:80].split())


def inside_picture(box, size: tuple) -> tuple:
    """A box (x1, y1, x2, y2) in pixels, moved inside a picture of (width, height)."""
    limits = (size[0] - 1, size[1] - 1) * 2
    return tuple(min(max(value, 0.0), limit) for value, limit in zip(box, limits))
