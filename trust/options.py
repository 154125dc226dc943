"""Options that several programs share. Nothing slow is imported here, so that a typo is told at once."""
import argparse
import glob
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from trust.errors import BadInput, fail
from trust.files import check_file, check_policy_folder

# ---- defaults that several programs share ---------------------------------------------------------
ROOT = Path(__file__).parent.parent
TOY_POLICY = str(ROOT / "toy/policy")
TOY_SAM2 = str(ROOT / "toy/sam2/model.pt")

MOST_FRAMES = 24    # most frames of a clip that System 1 sees
LARGEST_SEED = 1_000_000_000


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option, if it has one and its help does not speak of it."""

    def _get_help_string(self, action):
        known = action.default in (None, "", argparse.SUPPRESS) or "default: " in action.help
        if known or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it. No option is abbreviated."""
    place = ""    # where the arguments come from; the message begins with it

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

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


def check_given(option: str, path: str, folder: bool = False) -> None:
    """Raises FileNotFoundError or BadInput where the file that an option names is missing, or is no file.

    folder: whether a folder will do.
    """
    if folder and os.path.isdir(path):
        return
    try:
        check_file(path)
    except FileNotFoundError:
        kind = "file or folder" if folder else "file"
        raise FileNotFoundError(f"--{option}: no such {kind}: {path}") from None
    except BadInput as error:
        raise BadInput(f"--{option}: {error}") from None


def check_out(folder: str) -> None:
    """Raises BadInput where the folder of --out cannot be made or written to."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not folder or not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise BadInput(f"--out {folder!r}: no folder that can be written to")


# ---- options of the two systems --------------------------------------------------------------------
def add_model_options(parser: Parser) -> None:
    """The options of segment.load_models and segment.segment."""
    add = parser.add_argument
    add("--policy", default=TOY_POLICY, metavar="DIR", help="a Thinker, or a full Qwen2.5-Omni")
    add("--system2", nargs="+", action=JoinWords, default="policy", metavar="WHO",
        help="who grounds: policy, reference DIR (another Thinker), or FILE.py with boxes() or masks()")
    add("--mask_prompt", type=true_or_false, nargs="?", const=True, default=True,
        help="whether SAM2 gets the masks of a FILE.py; false: their boxes")
    add("--sam2", default="", metavar="CONFIG",
        help="a yaml file, or a name inside the package sam2; empty: the one that belongs to the weights")
    add("--sam2_weights", default=TOY_SAM2, metavar="FILE", help="weights of SAM2, a .pt file")
    add("--frames", type=at_least(1), default=MOST_FRAMES, help="most frames of a clip that System 1 sees")
    add("--video_tokens", type=at_least(0), default=0, help="visual tokens of a frame; 0: the policy's own")
    add("--image_tokens", type=at_least(0), default=0, help="visual tokens of a picture; 0: the policy's own")
    add("--max_new_tokens", type=at_least(1), default=1024, help="longest answer of System 1")
    add("--device", type=device_name, default="auto", help="cpu, cuda, or auto: cuda where there is one")


def check_models(options) -> None:
    """Raises FileNotFoundError or BadInput where a file is missing that the two systems are made of."""
    check_policy_folder(options.policy)
    check_system2(options.system2)
    if options.sam2:
        sam2_config_file(options.sam2)
    check_given("sam2_weights", options.sam2_weights)


def reference_folder(system2: str) -> str:
    """DIR of a System 2 by the name "reference DIR"; "" of any other."""
    return system2.removeprefix("reference ") if system2.startswith("reference ") else ""


def check_system2(name: str) -> None:
    folder = reference_folder(name)
    if folder:
        check_policy_folder(folder)
    elif name.endswith(".py"):
        check_given("system2", name)
    elif name != "policy":
        raise BadInput(f"--system2 {name}: must be policy, reference DIR, or FILE.py")


def sam2_config_file(config: str) -> Path:
    """A SAM2 config by its path, or by its name inside the package sam2.

    Raises FileNotFoundError where there is none.
    """
    # The package is found, but not imported.
    package = Path(importlib.util.find_spec("sam2").submodule_search_locations[0])
    published = package / "configs/sam2.1"
    for path in (Path(config), package / config, published / f"{config}.yaml"):
        if path.exists():
            return path
    known = ", ".join(sorted(path.stem for path in published.glob("*.yaml")))
    raise FileNotFoundError(f"no such SAM2 config: {config} (a yaml file, or one of: {known})")
