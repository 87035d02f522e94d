"""``python -m fastflowgrpo.evaluate``: compares trained weights with their base model (docs/evaluation.md)."""

from collections.abc import Sequence
from pathlib import Path

from fastflowgrpo.config import EvaluateConfig, parse_evaluation
from fastflowgrpo.console import interrupted, print_ending, print_error, run_and_exit
from fastflowgrpo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says.

    Args:
        argv: the command line without the program; None reads `sys.argv`.

    Returns:
        The exit code: 0, 2 after an error that the user can correct, 130 after Ctrl+C, 143 after SIGTERM.
    """
    try:
        config = parse_evaluation(argv)
        # Imported here, so that --help and a wrong setting do not wait for torch.
        from fastflowgrpo.evaluation.comparison import evaluate

        evaluate(config, trained_weights(config))
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt as interrupt:
        return print_ending(interrupted(interrupt))
    return 0


def trained_weights(config: EvaluateConfig) -> Path | None:
    """The folder of the trained weights to evaluate; None to evaluate the model alone.

    Raises:
        UserError: weights is "trained" but neither a checkpoint nor a run is given, or the run has no checkpoint.
    """
    from fastflowgrpo.runs.checkpoints import last_checkpoint
    from fastflowgrpo.runs.guard import best_checkpoint

    if config.weights == "base":
        return None
    if config.checkpoint == "best" and config.run is not None:
        return best_checkpoint(config.run)
    if config.checkpoint is not None:
        return Path(config.checkpoint)
    if config.run is not None:
        return last_checkpoint(config.run)
    if config.weights == "trained":
        raise UserError("weights: trained needs a checkpoint or a run")
    return None


if __name__ == "__main__":
    run_and_exit(main)
