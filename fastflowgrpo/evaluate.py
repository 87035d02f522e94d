"""``python -m fastflowgrpo.evaluate``: compares trained weights with their base model (docs/evaluation.md)."""

import sys
from collections.abc import Sequence

from fastflowgrpo.config import parse_evaluation
from fastflowgrpo.console import print_error, run_and_exit
from fastflowgrpo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates as the command line says.

    Args:
        argv: The command line without the program; by default the process's.

    Returns:
        The exit code: 0, 2 after an error that the user can put right, 130 when interrupted.
    """
    try:
        config = parse_evaluation(argv)
        # Only now, so that --help and a wrong setting do not wait for torch.
        from fastflowgrpo.evaluation.comparison import evaluate

        evaluate(config)
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_and_exit(main)
