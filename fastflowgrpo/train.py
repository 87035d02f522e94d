"""``python -m fastflowgrpo.train``: trains a flow-matching image model with Flow-GRPO."""

import errno
import signal
import sys
from collections.abc import Sequence

from fastflowgrpo.config import Config, parse
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
            _dry_run(config)
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


def _dry_run(config: Config) -> None:
    """Prints what a run would do and cost."""
    from fastflowgrpo.planning.estimate import estimate
    from fastflowgrpo.planning.micro_batch import available_memory, with_largest_micro_batch
    from fastflowgrpo.planning.plan import launched_processes

    processes = config.num_processes or launched_processes()
    if not config.update.batch_size:
        memory = available_memory(config)
        config = with_largest_micro_batch(config, processes, memory)
        print(f"chosen   update.batch_size {config.update.batch_size}, by {memory / 1e9:.3g} GB of memory a process")
    print(estimate(config, processes))


if __name__ == "__main__":
    run_and_exit(main)
