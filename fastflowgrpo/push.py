"""``python -m fastflowgrpo.push RUN OWNER/NAME``: uploads the weights of a run to the Hugging Face Hub."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fastflowgrpo.console import interrupted, print_ending, print_error, run_and_exit
from fastflowgrpo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Upload the weights that the command line names.

    Args:
        argv: the command line without the program; None reads `sys.argv`.

    Returns:
        The exit code: 0, 2 after an error that the user can correct, 130 after Ctrl+C, 143 after SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastflowgrpo.push", description="Upload the weights, card and pictures of a run's checkpoint."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub; created if it does not exist")
    parser.add_argument("--checkpoint", help='folder of the checkpoint, or "best"; by default the last')
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    arguments = parser.parse_args(argv)
    try:
        # Imported here, so that --help and a wrong argument do not wait for torch.
        from fastflowgrpo.runs.checkpoints import last_checkpoint
        from fastflowgrpo.runs.guard import best_checkpoint
        from fastflowgrpo.runs.hub import check_push, push
        from fastflowgrpo.runs.lock import RunLock

        check_push(arguments.repository)
        if arguments.checkpoint == "best":
            checkpoint = best_checkpoint(arguments.run)
        else:
            checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else last_checkpoint(arguments.run)
        lock = RunLock(arguments.run)
        lock.acquire()
        with closing(lock):
            print(push(arguments.run, checkpoint, arguments.repository, arguments.private or None))
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt as interrupt:
        return print_ending(interrupted(interrupt))
    return 0


if __name__ == "__main__":
    run_and_exit(main)
