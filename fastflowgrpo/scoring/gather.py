"""The scores of all processes, put together."""

import torch

from fastflowgrpo.distributed import Processes, mark_collective
from fastflowgrpo.errors import TemporaryError
from fastflowgrpo.scoring.contract import Scores


def gather_scores(processes: Processes, scores: Scores, total: int, images_per_prompt: int) -> Scores:
    """Gather the scores of all ranks, in the order of the prompts. Collective: every rank must call it.

    Args:
        processes: the ranks of the run.
        scores: this rank's scores, of `images_per_prompt` images for each of its padded prompts
            (`Processes.padded_rank_indices(total)`).
        total: number of prompts of all ranks.
        images_per_prompt: images for each prompt.

    Returns:
        The scores of all images, without those of the padding.
    """
    count = len(processes.rank_indices(total)) * images_per_prompt
    details = {name: values[:count] for name, values in scores.details.items()}
    joined = Scores.cat(processes.gather(Scores(scores.values[:count], details, scores.error)))
    rows = (processes.rank_order(total)[:, None] * images_per_prompt + torch.arange(images_per_prompt)).flatten()
    details = {name: values[rows] for name, values in joined.details.items()}
    return Scores(joined.values[rows], details, joined.error)


def check_missing(scores: Scores, max_missing: float, images: str) -> None:
    """Raise an error if too many scores are missing. Collective: every rank has the scores of all.

    Args:
        scores: of all ranks.
        max_missing: share that may be missing, but not all.
        images: what was scored, for the message.

    Raises:
        TemporaryError: more are missing.
    """
    missing, count = int(scores.values.isnan().sum()), len(scores.values)
    if missing == count or missing > max_missing * count:
        raise mark_collective(
            TemporaryError(
                f"{missing} of the {count} {images} have no score; max_missing allows a share of {max_missing:g}, "
                f"but not all; mend the reward, then resume the run; the last error: {scores.error}"
            )
        )
