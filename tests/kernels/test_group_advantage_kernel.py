"""The Triton kernel against the definition in float64: compiled on a GPU, in Triton's interpreter without one."""

import pytest
import torch
from support.advantages_model import model

from fastflowgrpo import group_advantages
from fastflowgrpo.kernels import group_advantage

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 256  # rows that the kernel takes at a time


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills the memory that the kernel must write to with 7."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, 7.0))


def fused(rewards, ids, std="global", **options):
    return group_advantages(rewards.to(DEVICE), ids.to(DEVICE), std, backend="triton", **options).cpu()


def expected(*arguments):
    return torch.from_numpy(model(*arguments))


def sample(sizes, columns, missing=0.1):
    """Groups of these sizes in random order; their ids have both signs and are too large for a float."""
    generator = torch.Generator().manual_seed(len(sizes))
    ids = torch.cat([torch.full((size,), (-1) ** k * (2**60 + k)) for k, size in enumerate(sizes)])
    ids = ids[torch.randperm(len(ids), generator=generator)]
    rewards = torch.randn(len(ids), columns, generator=generator)
    rewards[torch.rand(rewards.shape, generator=generator) < missing] = torch.nan
    return rewards, ids


@pytest.mark.parametrize("std", ["global", "group", "none"])
@pytest.mark.parametrize("mode", ["sum", "gdpo"])
@pytest.mark.parametrize(
    "sizes", [[1], [24] * 6, [1, 2, 3, 5, 30], [BLOCK], [BLOCK - 1, BLOCK + 1], [2 * BLOCK, 3], [2 * BLOCK + 77, 11]]
)
def test_equals_the_definition(sizes, mode, std):
    weights = [1.0, -0.5, 2.0]
    rewards, ids = sample(sizes, 3)
    torch.testing.assert_close(
        fused(rewards, ids, std, weights=weights, mode=mode),
        expected(rewards, ids, weights, std, mode == "gdpo"),
        equal_nan=True,
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_and_strides(dtype):
    rewards, ids = sample([7, 20, 1], 4)
    rewards = rewards.to(dtype).T.contiguous().T[:, ::2]
    torch.testing.assert_close(
        fused(rewards, ids, "group", mode="gdpo"),
        expected(rewards.double(), ids, [1.0, 1.0], "group", True),
        equal_nan=True,
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("std", ["global", "group", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_a_group_of_equal_rewards_is_exactly_zero(value, std):
    rewards = torch.tensor([value] * (BLOCK + 7) + [0.0, 1.0], dtype=torch.float64)
    ids = torch.tensor([3] * (BLOCK + 7) + [-1, -1])
    advantages = fused(rewards, ids, std)
    assert (advantages[: BLOCK + 7] == 0).all()
    assert advantages[-2] < 0 < advantages[-1]


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_missing_blocks_and_groups(std):
    # A group whose first and last blocks hold no reward, and one without any.
    rewards = torch.full((3 * BLOCK + 4,), torch.nan)
    rewards[BLOCK : 2 * BLOCK : 3] = torch.linspace(-1, 1, len(range(BLOCK, 2 * BLOCK, 3)))
    ids = torch.tensor([1] * 3 * BLOCK + [2] * 4)
    advantages = fused(rewards, ids, std)
    torch.testing.assert_close(advantages, expected(rewards, ids, [1.0], std), equal_nan=True, rtol=1e-11, atol=1e-11)
    assert advantages.isnan().sum() == rewards.isnan().sum()


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_no_samples(shape):
    assert fused(torch.empty(shape), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_a_large_mean_costs_no_more_than_its_rounding():
    rewards, ids = sample([3 * BLOCK, 40], 1, missing=0)
    offset = fused(rewards.double() + 1e8, ids, "group")
    torch.testing.assert_close(offset, expected(rewards, ids, [1.0], "group"), rtol=0, atol=1e-6)


def test_same_inputs_same_bits():
    rewards, ids = sample([600, 24, 24], 2)
    first, second = (fused(rewards, ids, mode="gdpo") for _ in range(2))
    torch.testing.assert_close(first, second, equal_nan=True, rtol=0, atol=0)


def test_compiles_without_a_graph_break():
    rewards, ids = (tensor.to(DEVICE) for tensor in sample([5, 9], 2))

    def function(rewards):
        return group_advantages(rewards, ids, backend="triton") + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards), function(rewards), equal_nan=True, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_the_host_does_not_wait_and_a_graph_captures_it(mode):
    rewards, ids = (tensor.to(DEVICE) for tensor in sample([24] * 8, 2))
    first = group_advantages(rewards, ids, mode=mode, backend="triton")  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = group_advantages(rewards, ids, mode=mode, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_advantages(rewards, ids, mode=mode, backend="triton")
    graph.replay()
    torch.testing.assert_close(eager, first, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(captured, first, equal_nan=True, rtol=0, atol=0)


def test_the_kernel_ran_and_not_the_reference(monkeypatch):
    calls = []
    launch = group_advantage.group_advantage_triton
    monkeypatch.setattr(
        "fastflowgrpo.learning.advantages.group_advantage_triton", lambda *a: calls.append(1) or launch(*a)
    )
    fused(*sample([4, 4], 1))
    assert calls == [1]
