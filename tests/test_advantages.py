import math

import numpy as np
import pytest
import torch

from fastflowgrpo import group_advantages

NAN = math.nan


def by_hand(rewards, ids, std):
    """The definition, group after group in numpy."""
    rewards, ids = rewards.double().numpy(), ids.numpy()
    out = np.full(len(rewards), NAN)
    for group in set(ids.tolist()):
        rows = np.flatnonzero((ids == group) & ~np.isnan(rewards))
        scale = {"global": np.nanstd(rewards), "group": np.std(rewards[rows]), "none": None}[std]
        out[rows] = (rewards[rows] - rewards[rows].mean()) / (1 if scale is None else scale + 1e-4)
    return torch.tensor(out)


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_matches_the_definition_for_any_groups_and_missing_scores(std):
    rewards = torch.tensor([0.1, 0.9, NAN, 0.5, -2.0, 3.0, 3.5, 0.25])
    ids = torch.tensor([7, -3, 7, 7, -3, 2**60, 2**60 + 1, -3])
    torch.testing.assert_close(
        group_advantages(rewards, ids, std), by_hand(rewards, ids, std), equal_nan=True, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_a_group_of_equal_rewards_is_exactly_zero(value, std):
    rewards = torch.tensor([value] * 7 + [0.0, 1.0])
    advantages = group_advantages(rewards, torch.tensor([0] * 7 + [1, 1]), std)
    assert (advantages[:7] == 0).all()
    assert advantages[7] < 0 < advantages[8]


def test_a_missing_score_is_not_a_zero():
    ids = torch.tensor([0, 0, 0])
    with_missing = group_advantages(torch.tensor([1.0, 2.0, NAN]), ids)
    assert with_missing.isnan().tolist() == [False, False, True]
    torch.testing.assert_close(with_missing[:2], group_advantages(torch.tensor([1.0, 2.0]), ids[:2]))
    assert group_advantages(torch.tensor([NAN, NAN]), ids[:2]).isnan().all()


def test_no_samples():
    assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "ids", "std", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.long), "global", "must be vectors of one length"),
        (torch.zeros(3), torch.zeros(3), "global", "floats merge large ids"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "batch", "unknown std"),
    ],
)
def test_errors(rewards, ids, std, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, ids, std)
