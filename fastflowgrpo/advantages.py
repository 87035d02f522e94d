"""Group-relative advantages (GRPO, arXiv 2402.03300; Flow-GRPO, arXiv 2505.05470, eq. 4)."""

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards: Tensor, group_ids: Tensor, std: str = "global") -> Tensor:
    """A = (R - mean of its group) / (std + 1e-4).

    Args:
        rewards: (N,) floats; NaN is a missing score, which counts in no statistic.
        group_ids: (N,) int64, any values.
        std: divide by the population standard deviation of all rewards ("global"), of the group's ("group"), or not at
            all ("none").

    Returns:
        (N,) float64 on the device of `rewards`: NaN where the reward is missing, exactly 0 in a group of equal rewards.

    Raises:
        ValueError: for shapes that differ, ids that are no integers, or an unknown `std`.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must be vectors of one length"
        )
    if group_ids.is_floating_point():
        raise ValueError(f"group_ids are {group_ids.dtype}: floats merge large ids, give integers")
    if std not in ("global", "group", "none"):
        raise ValueError(f'unknown std "{std}": choose global, group or none')
    rewards = rewards.double()
    present = ~rewards.isnan()
    groups = group_ids.unique(return_inverse=True)[1]
    num_groups = int(groups.max()) + 1 if len(groups) else 0

    def group_mean(values: Tensor) -> Tensor:
        zeros = torch.zeros(num_groups, dtype=torch.float64, device=rewards.device)
        total = zeros.index_add(0, groups[present], values[present])
        count = zeros.index_add(0, groups[present], torch.ones_like(values[present]))
        return (total / count)[groups]

    # Measured from one of its own rewards, a group of equal rewards is exactly 0: rounding has no part in it.
    centre = torch.zeros(num_groups, dtype=torch.float64, device=rewards.device)
    centre[groups[present]] = rewards[present]
    centred = rewards - centre[groups]
    advantage = centred - group_mean(centred)
    if std == "group":
        return advantage / (group_mean(advantage.square()).sqrt() + EPSILON)
    if std == "global":
        values = rewards[present]
        return advantage / ((values - values.mean()).square().mean().sqrt() + EPSILON)
    return advantage
