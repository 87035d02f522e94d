"""``python -m fastflowgrpo.train``: trains a flow-matching image model with Flow-GRPO."""

import errno
import os
from collections.abc import Sequence
from functools import partial

from fastflowgrpo.config import Config, parse
from fastflowgrpo.console import Ending, guard_stop, interrupted, print_ending, print_error, run_and_exit, user_error
from fastflowgrpo.errors import GuardStop, UserError


def main(argv: Sequence[str] | None = None, may_launch: bool = False) -> int:
    """Trains as the command line says.

    Args:
        argv: The command line without the program; by default the process's.
        may_launch: Whether to start processes on a machine without a GPU, as the command does.

    Returns:
        The exit code, as the table in docs/runs.md has it.
    """
    try:
        config = parse(argv)
        # Only now, so that --help and a wrong setting do not wait for torch.
        if config.dry_run:
            _dry_run(config)
            return 0
        count = _processes_to_start(config) if may_launch else 1
        if count == 1:
            return print_ending(train(config))
        from fastflowgrpo.runs.launcher import launch

        return print_ending(launch(partial(train, config), count))
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt as interrupt:
        return print_ending(interrupted(interrupt))


def train(config: Config) -> Ending:
    """Trains in this process.

    Raises:
        Exception: one that the user cannot put right.
        KeyboardInterrupt: a signal has ended the run.
    """
    from fastflowgrpo.distributed import FailedElsewhere
    from fastflowgrpo.planning.memory import is_out_of_memory, out_of_memory
    from fastflowgrpo.planning.plan import launched_processes
    from fastflowgrpo.trainer import Trainer

    try:
        Trainer(config).run()
    except UserError as error:
        return user_error(error)
    except GuardStop as stop:
        return guard_stop(stop)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return Ending(2, f"error: {error.filename or config.output_dir}: {error.strerror}")
    except FailedElsewhere:
        return Ending(1)  # the process that has failed says why
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return user_error(out_of_memory(config, launched_processes() or 1, error))
    return Ending(0)


def _processes_to_start(config: Config) -> int:
    """The number of processes; also sets how many threads each has, unless the environment says it.

    Everything is imported here, while the load of the machine is measured.
    """
    # A thread that waits for others leaves its core to other processes. OpenMP reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from fastflowgrpo.planning.machine import OtherLoad, core_count, free_memory

    load = OtherLoad()
    import torch

    import fastflowgrpo.trainer  # noqa: F401
    from fastflowgrpo.planning.plan import batch_plan, launched_processes
    from fastflowgrpo.planning.processes import process_count, usable_cores

    launched = launched_processes()
    if launched is not None or torch.accelerator.is_available():
        if config.num_processes not in (None, launched or 1):
            raise UserError(
                f"num_processes: is {config.num_processes}, but with GPUs or a launcher the launcher's number counts: "
                "leave it out"
            )
        return 1
    cores, others = core_count(), min(load.cores(), core_count())
    if round(others):
        print(f"other processes take {others:.1f} of {cores} cores")
    usable = usable_cores(cores, others)
    set_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(set_threads) if set_threads.isdecimal() else 0
    count = config.num_processes or process_count(config, usable // max(1, threads), free_memory())
    batch_plan(config, count)
    if not threads:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, usable // count)))
        if count > 1:
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # accelerate sets another number otherwise
    return count


def _dry_run(config: Config) -> None:
    """Prints what a run would do and cost."""
    from fastflowgrpo.planning.estimate import estimate
    from fastflowgrpo.planning.fit import fitting
    from fastflowgrpo.planning.micro_batch import available_memory, with_largest_micro_batch
    from fastflowgrpo.planning.plan import launched_processes
    from fastflowgrpo.planning.roofline import roofline_table

    processes = config.num_processes or launched_processes() or 1
    if config.fit is not None:
        config, chosen = fitting(config, processes, float(config.fit.removesuffix("GB")) * 1e9)
        settings = " ".join(f"--{name} {str(value).lower()}" for name, value in chosen.items())
        print(f"fits     {config.fit} with {settings or 'the settings as they are'}")
    elif not config.update.batch_size:
        memory = available_memory(config)
        config = with_largest_micro_batch(config, processes, memory)
        print(f"chosen   update.batch_size {config.update.batch_size}, by {memory / 1e9:.3g} GB of memory a process")
    found = estimate(config, processes)
    print(found)
    if config.gpu is not None:
        print(roofline_table(found.work, found.plan.images, config.gpu))


if __name__ == "__main__":
    run_and_exit(partial(main, may_launch=True))
