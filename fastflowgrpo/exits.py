"""How commands end."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


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
