"""The console side of a command: progress bars, one-line errors, and the end of the process."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from tqdm import tqdm


def _rank() -> str:
    return os.environ.get("RANK", "0")


def progress(name: str, work: int | Iterable[Any]) -> tqdm:
    """A progress bar over a number of steps or an iterable, shown by rank 0 only and only on a terminal."""
    count, iterable = (work, None) if isinstance(work, int) else (None, work)
    return tqdm(iterable, desc=name, total=count, leave=False, disable=None if _rank() == "0" else True)


def print_error(error: Exception) -> int:
    """Prints an error that the user can fix as one line on stderr, and returns the exit code 2."""
    rank = _rank()
    prefix = "" if rank == "0" else f"process {rank}: "
    print(f"{prefix}error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def print_stop(stop: Exception) -> int:
    """Prints why a guard has stopped the run as one line on stderr, once for all ranks, and returns the exit code 3."""
    if _rank() == "0":
        print("stopped:", stop, file=sys.stderr)
    return 3


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with its exit code, or with a traceback and code 1.

    The functions registered with atexit run first. The process then ends at once: Python's normal exit would abort it
    if a thread of a reward is still inside torch, as after an interrupt.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
