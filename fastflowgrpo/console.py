"""The console side of a command: progress bars, one-line errors, and the end of the process."""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int
    """Exit code."""
    message: str = ""
    """What stderr says about it; nothing if this is empty."""


def _rank() -> str:
    return os.environ.get("RANK", "0")


def progress(name: str, work: int | Iterable[Any]) -> tqdm:
    """A progress bar over a number of steps or an iterable, shown by rank 0 only and only on a terminal."""
    count, iterable = (work, None) if isinstance(work, int) else (None, work)
    return tqdm(iterable, desc=name, total=count, leave=False, disable=None if _rank() == "0" else True)


def user_error(error: Exception) -> Ending:
    """The ending of a command after an error that the user can fix: one line, and the exit code 2."""
    return Ending(2, f"error: {' '.join(str(error).split())}")


def interrupted(interrupt: KeyboardInterrupt) -> Ending:
    """The ending of a command after a signal, Ctrl+C unless the exception has another `signum`."""
    return Ending(128 + getattr(interrupt, "signum", signal.SIGINT), "interrupted")


def print_error(error: Exception) -> int:
    """Prints an error that the user can fix as one line on stderr, and returns the exit code 2."""
    return print_ending(user_error(error))


def print_ending(ending: Ending) -> int:
    """Prints a command's last message on stderr, and returns the exit code."""
    if ending.message:
        rank = _rank()
        prefix = "" if rank == "0" else f"process {rank}: "
        print(prefix + ending.message.rstrip(), file=sys.stderr)
    return ending.code


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with its exit code, or with a traceback and code 1."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    end_process(code)


def end_process(code: int) -> NoReturn:
    """Ends the process, after the functions registered with atexit.

    It ends at once: Python's normal exit would abort it if a thread of a reward is still inside torch, as after an
    interrupt.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
