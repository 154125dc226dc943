"""How programs end: by Ctrl-C, and with the process that started them. Nothing slow is imported here.

A process that outlives its parent holds on to files, connections and memory, and the next start of the same
command meets it.
"""
import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

# Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130


def begin_program() -> None:
    """For a program's first line: Ctrl-C ends it without a traceback, and it does not outlive torchrun."""
    signal.signal(signal.SIGINT, leave)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def leave(*_) -> None:
    """A handler of Ctrl-C, also while libraries are imported, which might catch an exception."""
    end(INTERRUPTED, "interrupted")


def end(code: int, line: str) -> None:
    """Prints a line and ends this process at once, from any of its threads."""
    say(line)
    os._exit(code)


def say(line: str) -> None:
    """Prints a line below a progress bar. A full disk is no error."""
    with suppress(OSError):
        print(f"\n{line}", file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Prints a text on stdout. A full disk or a reader that has gone is no error: files are what counts."""
    with suppress(OSError):
        print(text, flush=True)


def end_with_parent(parent: int) -> None:
    """Ends this process when its parent, of this process id, does, however that dies."""
    # Linux does it at once. The number is that of PR_SET_PDEATHSIG.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    # For other systems, and for a parent that was dead before.
    def look():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
