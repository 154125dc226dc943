"""Errors over what the user gave: one line that names the file or the value."""
import sys
from contextlib import contextmanager


class BadInput(ValueError):
    """What the user gave cannot be used. The message names it, and programs print it as one line and end."""


@contextmanager
def reading(path):
    """Turns any error inside into a BadInput that names the file at `path`. A BadInput passes unchanged.

    For libraries that raise many kinds of errors over malformed files.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"cannot use {path} ({one_line(error)})") from error


def one_line(error, most=160) -> str:
    """Kind and message of an error, at most `most` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def fail(error) -> int:
    """Prints an error as one line on stderr. Returns the exit code for bad input."""
    print("error:", *str(error).splitlines(), file=sys.stderr)
    return 2
