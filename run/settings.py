"""Settings: a dataclass whose fields hold everything about a setting, and how it is read.

    group: int = setting(8, "completions of a prompt, G", least=2)

Values come from three places, later ones win: the defaults, `training.json` in the policy's directory, and
`--name value` on the command line. train.py holds the dataclass. Nothing slow is imported here.
"""
import argparse
import dataclasses
import math
import os
import sys

from benchmarks import add_roots, check_root, dataset_root, roots_given, trained_entries
from trust.errors import BadInput, fail
from trust.files import LONGEST_NAME, check_policy_folder, read_json
from trust.options import JoinWords, Parser, check_models, true_or_false

# No whole number is larger, unless a setting says so. Counts beyond it overflow somewhere.
MOST = 1_000_000_000


def setting(
    default,
    meaning: str,
    *,
    least=None,
    above=None,
    most=None,
    choices=None,
    resumable=False,
    by_user=False,
    check=None,
    words=False,
):
    """A field of the dataclass of settings.

    least, above, most  limits of a number; `most` goes with one of the others. A float is always finite, a
                        whole number at most MOST.
    choices     the values that a string can have
    resumable   whether a run that is continued may have another value
    by_user     whether only the user sets it, and no policy's training.json: what is read, written and used
    check       (test, what the value must be), in place of limits; a test fails by False or by ValueError
    words       whether it is given as several words, which become one string
    """
    metadata = dict(meaning=meaning, least=least, above=above, most=most, choices=choices,
                    resumable=resumable, by_user=by_user, check=check, words=words)
    return dataclasses.field(default=default, metadata=metadata)


def resumable_names(kind: type) -> set[str]:
    """Names of the settings that a continued run may change. With any other one changed it is another run."""
    return {field.name for field in dataclasses.fields(kind) if field.metadata.get("resumable")}


def changed_settings(settings) -> str:
    """The settings that differ from their defaults, as options."""
    changed = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.default is not dataclasses.MISSING and value != field.default:
            changed.append(f"--{field.name} {value}")
    return " ".join(changed) or "as published"


# ---- checks of settings: setting(..., check=(test, what it must be)) --------------------------------
def is_folder_name(text: str) -> bool:
    """The plain name of a folder, which a file system takes."""
    plain = text not in ("", ".", "..") and os.path.basename(text) == text and text.isprintable()
    return plain and len(text.encode()) <= LONGEST_NAME


def is_counts(text: str) -> bool:
    """Whole numbers from 1 on, by commas."""
    return all(part.isdecimal() and 0 < int(part) <= MOST for part in text.split(","))


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

    Exits with code 2 and one line for an unknown name, a wrong type, a value out of its limits, or a file or
    folder that is missing.
    """
    try:
        # The policy comes first, because its advice stands in the help texts.
        advice, advised = read_advice(kind, named_policy(kind, arguments))
        parser = build_parser(kind, description, advice, advised)
        parser.place = f"{advice}: "
        options = parser.parse_args([f"--{name}={value}" for name, value in advised.items()])
        parser.place = ""
        options = parser.parse_args(arguments, options)
        roots = roots_given(options)
        for folder in roots:
            delattr(options, f"{folder}_root")
        settings = kind(**vars(options), roots=roots)
        check_settings(settings)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return settings


def named_policy(kind: type, arguments: list[str] | None) -> str:
    """The policy of a command line whose other options are not read yet."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--policy", default=kind.policy)
    try:
        options, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        # The whole parser says what is wrong.
        return kind.policy
    return options.policy


def read_advice(kind: type, policy: str) -> tuple[str, dict]:
    """(path, contents) of a policy's training.json; contents {} without one.

    Raises BadInput where it sets what only the user sets: a policy may come from anywhere.
    """
    path = os.path.join(policy, "training.json")
    if not os.path.exists(path):
        return path, {}
    advised = read_json(path)
    # `roots` has no option.
    own = {"roots"}
    for field in dataclasses.fields(kind):
        if field.metadata.get("by_user"):
            own.add(field.name)
    for name in advised:
        if name in own or name.endswith("_root"):
            raise BadInput(f"{path}: {name} is set by users alone, and not by a policy")
    return path, advised


def build_parser(kind: type, description: str, advice: str = "", advised: dict | None = None) -> Parser:
    """A parser with an option for each field. An option that is not given leaves no attribute.

    advised: values of the file `advice` that stand in for defaults.
    """
    parser = Parser(description=description)
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
        default = field.default if field.default != "" else "empty"
        if advised and field.name in advised:
            default = f"{advised[field.name]} by {advice}, else {field.default}"
        parser.add_argument(f"--{field.name}", metavar=field.type.__name__.upper(), default=argparse.SUPPRESS,
                            help=f"{field.metadata['meaning']} (default: {default})", **options)
    return parser


# ---- checks of all settings ------------------------------------------------------------------------
def check_settings(settings) -> None:
    """Raises BadInput or FileNotFoundError for a value out of its limits, or a missing file or folder."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        wanted = broken_limit(field, value)
        if wanted:
            raise BadInput(f"--{field.name} {value}: must be {wanted}")
    entries = trained_entries(settings.data)
    # To plan, a config.json is enough.
    if settings.plan:
        check_policy_folder(settings.policy)
        return
    for entry in entries:
        check_root(entry, dataset_root(entry, settings.data_root, settings.roots))
    check_models(settings)


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
    elif least is not None and (most is not None or field.type is int):
        most = most or MOST
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
