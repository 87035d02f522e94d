"""``python -m fastflowgrpo.train``: trains a flow-matching image model with Flow-GRPO."""

import errno
import signal
import sys
from collections.abc import Sequence

from fastflowgrpo.config import parse
from fastflowgrpo.console import print_error, print_stop, run_and_exit
from fastflowgrpo.errors import GuardStop, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says.

    Args:
        argv: The command line without the program; by default the process's.

    Returns:
        The exit code: 0, 2 after an error that the user can put right, 3 if `evaluation.guard` has stopped the run,
        130 after Ctrl+C, 143 after SIGTERM.
    """
    try:
        config = parse(argv)
        # Only now, so that --help and a wrong setting do not wait for torch.
        if config.dry_run:
            from fastflowgrpo.planning.estimate import estimate
            from fastflowgrpo.planning.plan import launched_processes

            print(estimate(config, config.num_processes or launched_processes()))
            return 0
        from fastflowgrpo.trainer import Trainer

        Trainer(config).run()
    except UserError as error:
        return print_error(error)
    except GuardStop as stop:
        return print_stop(stop)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("error:", f"{config.output_dir}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
