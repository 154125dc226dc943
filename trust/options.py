"""Options of the programs. Nothing heavy is imported here, so that a typo is told at once."""
import argparse
import glob
import sys
from collections.abc import Callable
from pathlib import Path

from trust.errors import fail

# ---- defaults that several programs share ---------------------------------------------------------
ROOT = Path(__file__).parent.parent
TOY_POLICY = str(ROOT / "toy/policy")
TOY_SAM2 = str(ROOT / "toy/sam2/model.pt")

MOST_FRAMES = 24    # most frames of a clip that System 1 sees


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""
    place = ""    # where the arguments come from; the message begins with it

    def error(self, message):
        sys.exit(fail(f"{self.place}{message}"))


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)
    return whole_number


def true_or_false(text: str) -> bool:
    """An argparse type."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false expected, not {text}")
    return text.lower() == "true"


def is_device(text: str) -> bool:
    """auto, cpu, or cuda where the system has a GPU. torch would know best, but takes seconds to import."""
    return text in ("auto", "cpu") or text == "cuda" and has_gpu()


def device_name(text: str) -> str:
    """An argparse type: a name that is_device."""
    if is_device(text):
        return text
    raise argparse.ArgumentTypeError(f"must be auto, cpu, or cuda where there is such a GPU, not {text}")


def has_gpu() -> bool:
    """Whether the system has a device of NVIDIA, also within WSL, or of AMD."""
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd"))


class JoinWords(argparse.Action):
    """An argparse action for nargs="+": the words become one string, as in --system2 reference DIR."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, " ".join(values))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `load_models` and `segment`, which eval.py shares."""
    add = parser.add_argument
    add("--policy", default=TOY_POLICY, help="directory of a Thinker, or of a full Qwen2.5-Omni")
    add("--system2", nargs="+", action=JoinWords, default="policy", metavar="WHO",
        help="who grounds: policy, reference DIR (another Thinker), or FILE.py with a function boxes")
    add("--sam2", help="config, a yaml file or a name inside the package sam2; default: by the weights")
    add("--sam2_weights", default=TOY_SAM2)
    add("--frames", type=at_least(1), default=MOST_FRAMES, help="most frames of a clip that System 1 sees")
    add("--video_tokens", type=at_least(0), default=0, help="visual tokens of a frame; 0: the policy's own")
    add("--image_tokens", type=at_least(0), default=0, help="visual tokens of a picture; 0: the policy's own")
    add("--max_new_tokens", type=at_least(1), default=1024)
    add("--device", type=device_name, default="auto",
        help="cpu, cuda, or auto: cuda where there is one")
