"""Settings: a dataclass whose fields hold everything about a setting, and how it is read.

    group: int = setting(8, "completions of a prompt, G", least=2)

Values come from three places, later ones win: the defaults, `training.json` in the policy's directory, and
`--name value` on the command line. train.py holds the dataclass.
"""
import argparse
import dataclasses
import math
import os
import sys

from benchmarks import add_roots, roots_given
from trust.errors import BadInput, fail
from trust.files import read_json
from trust.options import JoinWords, Parser, true_or_false


def setting(
    default,
    meaning: str,
    *,
    least=None,
    above=None,
    most=None,
    choices=None,
    resumable=False,
    check=None,
    words=False,
):
    """A field of the dataclass of settings.

    least, above, most  limits of a number; `most` goes with one of the others. A float is always finite.
    choices     the values that a string can have
    resumable   whether a run that is continued may have another value
    check       (test, what the value must be), in place of limits; a test fails by False or by ValueError
    words       whether it is given as several words, which become one string
    """
    metadata = dict(meaning=meaning, least=least, above=above, most=most, choices=choices,
                    resumable=resumable, check=check, words=words)
    return dataclasses.field(default=default, metadata=metadata)


def resumable_names(kind: type) -> set[str]:
    """Names of the settings that a continued run may change. With any other one changed it is another run."""
    return {field.name for field in dataclasses.fields(kind) if field.metadata.get("resumable")}


# ---- checks of settings: setting(..., check=(test, what it must be)) --------------------------------
def is_folder_name(text: str) -> bool:
    """The plain name of a folder."""
    return text not in ("", ".", "..") and os.path.basename(text) == text and text.isprintable()


def is_counts(text: str) -> bool:
    """Whole numbers from 1 on, by commas."""
    return all(part.isdecimal() and int(part) for part in text.split(","))


def frame_range(text: str) -> tuple[int, int]:
    """(least, most) frames of a clip: "8,24" -> (8, 24), "24" -> (24, 24). Raises ValueError for others."""
    numbers = [int(number) for number in text.split(",")]
    least = numbers[0]
    most = numbers[-1]
    if len(numbers) > 2 or not 1 <= least <= most:
        raise ValueError(f"no range of frames: {text}")
    return least, most


# ---- reading ---------------------------------------------------------------------------------------
def read_settings(kind: type, description: str, arguments: list[str] | None = None):
    """An instance of the dataclass `kind` from the three places. arguments: in place of the command line.

    Exits with code 2 and one line for an unknown name, a wrong type, or a value out of its limits.
    """
    parser = build_parser(kind, description)
    options = parser.parse_args(arguments)
    advice = os.path.join(getattr(options, "policy", kind.policy), "training.json")
    if os.path.isfile(advice):
        try:
            advised = read_json(advice)
        except BadInput as error:
            sys.exit(fail(error))
        parser.place = f"{advice}: "
        advised = parser.parse_args([f"--{name}={value}" for name, value in advised.items()])
        # The command line once more, because it wins over the file.
        options = parser.parse_args(arguments, advised)

    roots = roots_given(options)
    for folder in roots:
        delattr(options, f"{folder}_root")
    settings = kind(**vars(options), roots=roots)
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        wanted = broken_limit(field, value)
        if wanted:
            sys.exit(fail(f"--{field.name} {value}: must be {wanted}"))
    return settings


def build_parser(kind: type, description: str) -> Parser:
    """A parser with an option for each field. An option that is not given leaves no attribute."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    # These options are the fields data_root and roots.
    add_roots(parser)
    for field in dataclasses.fields(kind):
        if field.name in ("data_root", "roots"):
            continue
        options = dict(type=field.type, choices=field.metadata["choices"])
        if field.type is bool:
            options = dict(type=true_or_false, nargs="?", const=True)
        elif field.metadata["words"]:
            options = dict(nargs="+", action=JoinWords)
        parser.add_argument(f"--{field.name}", metavar=field.type.__name__.upper(), default=argparse.SUPPRESS,
                            help=f"{field.metadata['meaning']} (default: {field.default})", **options)
    return parser


def broken_limit(field: dataclasses.Field, value) -> str:
    """What a setting's value must be, if it is not; else "". NaN is within no limits."""
    limits = field.metadata
    least = limits.get("least")
    above = limits.get("above")
    most = limits.get("most")
    check = limits.get("check")
    passes = True
    wanted = "finite"
    if check is not None:
        test, wanted = check
        try:
            passes = test(value)
        except ValueError:
            passes = False
    elif most is not None and least is not None:
        passes = least <= value <= most
        wanted = f"from {least} to {most}"
    elif most is not None:
        passes = above < value <= most
        wanted = f"above {above} and at most {most}"
    elif least is not None:
        passes = least <= value < math.inf
        wanted = f"at least {least} and finite"
    elif above is not None:
        passes = above < value < math.inf
        wanted = f"above {above} and finite"
    elif field.type is float:
        passes = math.isfinite(value)
    return "" if passes else wanted
