"""The weighted sum of several rewards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores


@dataclass(frozen=True)
class WeightedRewards:
    """The weighted sum of named rewards, which is itself a reward.

    It returns these `Scores`: `values` is the sum, NaN where a reward with a non-zero weight returned NaN; `details`
    holds each reward's values under its name and its details under "name/detail"; `error` names the last reward that
    made a value NaN, and why. Exceptions in a reward are passed on as in `checked_scores`.

    Attributes:
        rewards: the rewards by name.
        weights: their weights, under the same names.
    """

    rewards: dict[str, Callable[[RewardBatch], Any]]
    weights: dict[str, float]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Ask each reward that has the method `check_prompts` whether it can score these prompts.

        Raises:
            ValueError: a reward cannot; names the reward and the prompt.
        """
        for name, reward in self.rewards.items():
            check = getattr(reward, "check_prompts", None)
            if check is not None:
                try:
                    check(prompts)
                except ValueError as error:
                    raise ValueError(f"rewards.{name}: {error}") from error

    def __call__(self, batch: RewardBatch) -> Scores:
        return self.weighted({name: checked_scores(name, reward, batch) for name, reward in self.rewards.items()})

    def weighted(self, scores: Mapping[str, Scores]) -> Scores:
        """Add up the scores that the rewards gave to the same images."""
        total, error = torch.zeros(len(next(iter(scores.values())).values)), ""
        details: dict[str, torch.Tensor] = {}
        for name, own in scores.items():
            if self.weights[name]:
                total += self.weights[name] * own.values
                if own.values.isnan().any():
                    error = f"reward {name}: {own.error or 'it returned NaN'}"
            details |= {name: own.values, **{f"{name}/{key}": value for key, value in own.details.items()}}
        return Scores(total, details, error)
