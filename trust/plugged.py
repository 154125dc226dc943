"""System 2 as a Python file of the user's. It is their own program: nothing keeps it from anything."""
import importlib.util
import math
import sys
from pathlib import Path

from trust.errors import BadInput
from trust.files import check_file

# Boxes of one picture. Each is tracked by itself.
MOST_BOXES = 256


class NoBoxes(BadInput):
    """The function of a plugged file returned something else. It would do so for any sample."""


def plugged(path: str):
    """System 2 (pictures and descriptions -> boxes of each) by the function `boxes` of a Python file:

        def boxes(image: PIL.Image, description: str) -> list of (x1, y1, x2, y2) in pixels of the image

    Raises FileNotFoundError without the file and BadInput without the function. Calls raise NoBoxes where
    the function returns anything else.
    """
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
    function = getattr(module, "boxes", None)
    if not callable(function):
        raise BadInput(f"no function boxes(image, description) in: {path}")

    def find_boxes(pictures, descriptions):
        boxes = []
        for picture, description in zip(pictures, descriptions):
            answer = check_boxes(function(picture, description), path)
            boxes.append([inside_picture(box, picture.size) for box in answer])
        return boxes
    return find_boxes


def check_boxes(answer, path) -> list[tuple]:
    """What the function of a file returned, as boxes. NoBoxes where it is something else."""
    boxes = []
    try:
        for box in answer:
            # Of text, each letter would be a number.
            if isinstance(box, (str, bytes)):
                raise TypeError("text")
            x1, y1, x2, y2 = map(float, box)
            if not (-math.inf < x1 <= x2 < math.inf and -math.inf < y1 <= y2 < math.inf):
                raise ValueError("no box")
            boxes.append((x1, y1, x2, y2))
            if len(boxes) > MOST_BOXES:
                raise ValueError("too many")
    except (TypeError, ValueError, OverflowError, RuntimeError):
        returned = " ".join(repr(answer)[:80].split())
        wanted = f"a list of at most {MOST_BOXES} (x1, y1, x2, y2)"
        raise NoBoxes(f"boxes() of {path} returned {returned}, not {wanted}") from None
    return boxes


def inside_picture(box, size: tuple) -> tuple:
    """A box (x1, y1, x2, y2) in pixels, moved inside a picture of (width, height)."""
    limits = (size[0] - 1, size[1] - 1) * 2
    return tuple(min(max(value, 0.0), limit) for value, limit in zip(box, limits))
