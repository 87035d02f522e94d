"""What commands print: progress bars, errors in one line, and how a process ends."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from tqdm import tqdm


def is_main() -> bool:
    """Whether this is the process that writes and prints: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def progress(name: str, work: int | Iterable[Any]) -> tqdm:
    """A progress bar over a number of steps or an iterable; none where the output is no terminal, and of several
    processes only the first's."""
    count, iterable = (work, None) if isinstance(work, int) else (None, work)
    return tqdm(iterable, desc=name, total=count, leave=False, disable=None if is_main() else True)


def refuse(error: Exception) -> int:
    """Print what the user can put right, in one line, and return the exit code for it."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"process {rank}: "
    print(f"{where}error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def leave(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code that `main` returns, or 1 and a traceback, after what is registered with
    atexit. Python's own end aborts it where a reward's thread is within torch, as in a run that was interrupted."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
