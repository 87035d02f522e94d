"""Scores of all processes together."""

import torch

from fastflowgrpo.distributed import Processes
from fastflowgrpo.scoring.contract import Scores


def gather_scores(processes: Processes, scores: Scores, total: int, images_per_prompt: int) -> Scores:
    """The scores of all prompts' images, from those of every rank's padded prompts. Collective.

    Args:
        processes: of the run.
        scores: of `images_per_prompt` images of each of `Processes.padded_rank_indices(total)`.
        total: prompts of all ranks.
    """
    count = len(processes.rank_indices(total)) * images_per_prompt
    details = {name: values[:count] for name, values in scores.details.items()}
    joined = Scores.cat(processes.gather(Scores(scores.values[:count], details, scores.error)))
    rows = (processes.rank_order(total)[:, None] * images_per_prompt + torch.arange(images_per_prompt)).flatten()
    details = {name: values[rows] for name, values in joined.details.items()}
    return Scores(joined.values[rows], details, joined.error)
