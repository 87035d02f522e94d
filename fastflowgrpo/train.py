"""``python -m fastflowgrpo.train``: trains a flow-matching image model with Flow-GRPO."""

import atexit
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from fastflowgrpo.config import ConfigError, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says.

    Args:
        argv: The command line without the program; by default the process's.

    Returns:
        The exit code: 0, 2 after an error that the user can put right, 130 after Ctrl+C, 143 after SIGTERM.
    """
    try:
        config = parse(argv)
        # Only now, so that --help and a wrong setting do not wait for torch.
        if config.dry_run:
            from fastflowgrpo.estimate import estimate
            from fastflowgrpo.plan import launched_processes

            print(estimate(config, config.num_processes or launched_processes()))
            return 0
        from fastflowgrpo.trainer import Trainer

        Trainer(config).run()
    except ConfigError as error:
        return refuse(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("error:", f"{config.output_dir}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    return 0


def refuse(error: ConfigError) -> int:
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


if __name__ == "__main__":
    leave(main)
