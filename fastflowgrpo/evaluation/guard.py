"""`evaluation.guard`: a reward that is evaluated beside those of the run, and never trained on."""

from collections.abc import Sequence
from typing import Any

from fastflowgrpo.config import guard_reward
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import WeightedRewards, build_rewards

GUARD = "guard"  # its name among the scores of an evaluation


def with_guard(
    rewards: WeightedRewards, guard: dict[str, Any] | str | None, prompts: Sequence[Prompt]
) -> WeightedRewards:
    """The rewards that evaluations score with: those of the run, and the guard with weight 0.

    Args:
        rewards: of the run.
        guard: the setting.
        prompts: of the evaluation.

    Raises:
        UserError: the guard cannot be made, or cannot score a prompt.
    """
    for name, settings in guard_reward(guard).items():
        try:
            built = build_rewards({name: settings})
            built.check_prompts(prompts)
        except ValueError as error:
            raise UserError(f"evaluation.guard: {error}") from error
        return WeightedRewards({**rewards.rewards, GUARD: built.rewards[name]}, {**rewards.weights, GUARD: 0.0})
    return rewards
