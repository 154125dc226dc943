"""Small files, and names that become paths. SECURITY.md says who is trusted.

Whoever made a dataset or a policy may have made it badly, or for harm. So a file is read only if it is one,
and a name from a dataset stays below its folder.
"""
import json
import os
import stat
from contextlib import contextmanager

from trust.errors import BadInput, reading

# Bytes of a part of a name: file systems take 255, and we add endings.
LONGEST_NAME = 200
# The names of unfinished files and folders end with this.
PARTIAL = ".partial"


# ---- files -----------------------------------------------------------------------------------------
def check_file(path) -> None:
    """Raises FileNotFoundError where there is no file, BadInput where it is no ordinary one.

    Opening a named pipe, or a device, could wait for ever. Links are followed: datasets are often linked
    together.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot use {path} ({error})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise BadInput(f"{path} is {kind}")


def read_json(path, kind: type = dict, encoding="utf-8-sig"):
    """The object (or, with kind=list, the list) in a JSON file. A byte order mark at its start is skipped.

    Raises FileNotFoundError or BadInput, naming the file; BadInput also for a key that an object has twice,
    of which one would be lost without a word, and for NaN and Infinity, which JSON does not have.
    """
    check_file(path)
    with reading(path), open(path, encoding=encoding) as file:
        value = json.load(file, object_pairs_hook=distinct, parse_constant=no_number)
        if not isinstance(value, kind):
            raise ValueError(f"a {kind.__name__} expected, not a {type(value).__name__}")
    return value


def distinct(pairs: list) -> dict:
    """The object of (key, value) pairs. Raises ValueError for a key that comes twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return record


def no_number(text: str):
    raise ValueError(f"{text} is no number of JSON")


@contextmanager
def writing(path):
    """Makes an OSError inside name the file at `path`, where it names none: a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(f"cannot write {path} ({error.strerror or error})") from None
        raise


# ---- names that become paths -----------------------------------------------------------------------
def check_name(name, where: str, slashes: bool = False) -> str:
    """A name from a dataset, unchanged. Raises BadInput where it could lead out of its folder.

    It may not end as unfinished files do, either: these are removed.

    where    the name's place, for the message
    slashes  whether the name may have several parts, such as "a/b"
    """
    problem = ""
    if not isinstance(name, str):
        problem = "is no text"
    elif not name.isprintable() or "\\" in name:
        problem = "has a character that names of files do not have"
    else:
        for part in name.split("/") if slashes else [name]:
            if part in ("", ".", "..") or "/" in part:
                problem = "leads out of its folder"
            elif len(part.encode("utf-8", "replace")) > LONGEST_NAME:
                problem = f"is longer than {LONGEST_NAME} bytes"
            elif part.endswith(PARTIAL):
                problem = f"ends with {PARTIAL}, as unfinished files do"
    if problem:
        raise BadInput(f"the name {str(name)[:80]!r} {problem}: {where}")
    return name


def check_inside(path: str, folder: str) -> None:
    """Raises BadInput where a path to be written or removed is not below `folder`."""
    whole = os.path.abspath(path)
    top = os.path.abspath(folder)
    if os.path.commonpath([whole, top]) != top or whole == top:
        raise BadInput(f"{path} is not inside {folder}")


# ---- a policy's folder -----------------------------------------------------------------------------
POLICY_EXPECTED = ("expected a directory of Qwen2.5-Omni or of its Thinker alone; get the weights with: "
                   "hf download Qwen/Qwen2.5-Omni-7B --local-dir DIR")


def check_policy_folder(path) -> None:
    """Raises FileNotFoundError where `path` is no directory with a config.json."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path} is no directory; {POLICY_EXPECTED}")
    config = os.path.join(path, "config.json")
    if not os.path.lexists(config):
        raise FileNotFoundError(f"no such file: {config}; {POLICY_EXPECTED}")
    check_file(config)
