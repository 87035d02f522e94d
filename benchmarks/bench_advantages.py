"""Group advantages on the CPU: the C++ extension, plain torch, and the loop over prompts that other code bases use.

    python -m pytest benchmarks/bench_advantages.py --benchmark-group-by=param:rows

Groups have 24 images at 1152 samples, the size of one epoch, and 20 above. The loop over 1 000 000 takes minutes.
"""

from functools import partial

import numpy as np
import pytest
import torch

from fastflowgrpo import group_advantages

SIZES = {1152: 24, 100_000: 20, 1_000_000: 20}


def prompt_loop(rewards: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """One mask over all samples per prompt. Integer ids and a single standard deviation speed it up."""
    advantages = np.empty_like(rewards)
    divisor = rewards.std() + 1e-4
    for group in np.unique(group_ids):
        rows = group_ids == group
        advantages[rows] = (rewards[rows] - rewards[rows].mean()) / divisor
    return advantages


def sample(rows: int, shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(rows, generator=generator, dtype=torch.float64)
    group_ids = torch.arange(rows) // SIZES[rows]
    return rewards, group_ids[torch.randperm(rows, generator=generator)] if shuffled else group_ids


def torch_loop(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(prompt_loop(rewards.numpy(), group_ids.numpy()))


METHODS = {
    "native": partial(group_advantages, backend="native"),
    "reference": partial(group_advantages, backend="reference"),
    "loop": torch_loop,
}


@pytest.mark.parametrize("order", ["grouped", "shuffled"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", SIZES)
def test_group_advantages(benchmark, rows, method, order):
    rewards, group_ids = sample(rows, order == "shuffled")
    # One round of the loop takes long enough, except at the smallest size.
    rounds = 1 if method == "loop" and rows > 10_000 else 30
    advantages = benchmark.pedantic(METHODS[method], (rewards, group_ids), rounds=rounds, warmup_rounds=rounds > 1)
    expected = group_advantages(rewards, group_ids, backend="reference")
    torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
    benchmark.extra_info |= {
        "groups": rows // SIZES[rows],
        "threads": torch.get_num_threads() if method == "native" else 1,
        "ns_per_sample": benchmark.stats.stats.median / rows * 1e9,
    }
