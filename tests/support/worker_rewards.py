"""Rewards that the worker processes of the tests import, good and bad."""

import os
import time
from pathlib import Path

import torch

from fastflowgrpo.rewards import RewardBatch, Scores


def brightness(batch: RewardBatch, scale: float = 1.0) -> Scores:
    values = scale * batch.images.float().mean((1, 2, 3))
    values[[prompt == "unscorable" for prompt in batch.prompts]] = torch.nan
    error = "the prompt is unscorable" if values.isnan().any() else ""
    return Scores(values, {"height": torch.full_like(values, batch.images.shape[2])}, error)


def meet(batch: RewardBatch, marks: str) -> torch.Tensor:
    """Waits until another process scores too."""
    Path(marks, str(os.getpid())).touch()
    while len(os.listdir(marks)) < 2:
        time.sleep(0.01)
    return torch.ones(len(batch.prompts))


def second_first(batch: RewardBatch, marks: str) -> Scores:
    """The images of "first" are scored after all those of "second"."""
    if "second" in batch.prompts:
        Path(marks, "second").touch()
    while not Path(marks, "second").exists():
        time.sleep(0.01)
    if "first" in batch.prompts:
        time.sleep(0.5)
    return brightness(batch)


def group_size(batch: RewardBatch) -> list[int]:
    return [int((batch.group_ids == group).sum()) for group in batch.group_ids]


def bad(batch: RewardBatch, marks: str, times: int = 100) -> torch.Tensor:
    """Does what the prompts say, the first `times` times."""
    for what in batch.prompts:
        done = Path(marks, what)
        count = int(done.read_text()) if done.exists() else 0
        if what == "fine" or count >= times:
            continue
        done.write_text(str(count + 1))
        if what == "die":
            os._exit(1)
        elif what == "hang":
            time.sleep(1000)
        elif what == "raise":
            raise KeyError("lost")
        elif what == "shorten":
            return torch.zeros(0)
    return torch.ones(len(batch.prompts))


def unlike_source(batch: RewardBatch) -> torch.Tensor:
    """The mean difference between each image and its source."""
    assert batch.sources is not None
    return (batch.images.float() - torch.stack(batch.sources).float()).abs().mean((1, 2, 3))
