"""The C++ extension alone, without torch: .ci/sanitize runs this file on a build with sanitizers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advantages_model import model

from fastflowgrpo import _native

EPS = np.finfo(np.float64).eps
CHUNK = 1 << 14  # rows that one thread takes at a time


def call(rewards, ids, weights=None, std="global", gdpo=False, threads=1):
    weights = [1.0] * rewards.shape[1] if weights is None else weights
    return _native.group_advantages(rewards, ids, weights, std, gdpo, threads)


def sample(rows, columns, groups, seed=0, missing=0.05):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(rows, columns))
    rewards[rng.random(rewards.shape) < missing] = np.nan
    return rewards, rng.integers(0, groups, rows) * (2**61 // groups) - 2**60


@st.composite
def batches(draw):
    rows, columns = draw(st.integers(0, 60)), draw(st.integers(1, 3))
    reward = st.floats(-8, 8, width=32) | st.sampled_from([0.0, 1.0, np.nan])
    ids = st.sampled_from([0, 1, -1, 2**32, 2**33, 2**62, 2**62 + 1, -(2**63), 2**63 - 1])
    rewards = np.array(draw(st.lists(reward, min_size=rows * columns, max_size=rows * columns)))
    return (
        rewards.reshape(rows, columns).astype(draw(st.sampled_from([np.float32, np.float64]))),
        np.array(draw(st.lists(ids, min_size=rows, max_size=rows)), dtype=np.int64),
        draw(st.lists(st.floats(-3, 3), min_size=columns, max_size=columns)),
    )


@given(batches(), st.sampled_from(["global", "group", "none"]), st.booleans())
@settings(deadline=None, max_examples=300)
def test_equals_the_model(batch, std, gdpo):
    rewards, ids, weights = batch
    before = rewards.copy(), ids.copy()
    advantages = call(rewards, ids, weights, std, gdpo)
    assert advantages.dtype == np.float64
    # The rounding error of a mean of values up to 72, divided by at least 1e-4.
    atol = 64 * EPS * 72 / 1e-4
    np.testing.assert_allclose(advantages, model(rewards, ids, weights, std, gdpo), rtol=1e-9, atol=atol)
    np.testing.assert_array_equal(rewards, before[0])
    np.testing.assert_array_equal(ids, before[1])


@pytest.mark.parametrize("groups", [1, 100, 40_000])
@pytest.mark.parametrize("std, gdpo", [("global", False), ("group", True)])
def test_the_number_of_threads_changes_no_bit(groups, std, gdpo):
    rewards, ids = sample(4 * CHUNK + 17, 2, groups)
    one, two, five = (call(rewards, ids, [1.0, 0.3], std, gdpo, threads).tobytes() for threads in (1, 2, 5))
    assert one == two == five


@pytest.mark.parametrize("std", ["global", "group", "none"])
@pytest.mark.parametrize("rows", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_groups_that_span_chunks(rows, std):
    rewards, ids = sample(rows, 2, 5)
    expected = model(rewards, ids, [1.0, -2.0], std, True)
    np.testing.assert_allclose(call(rewards, ids, [1.0, -2.0], std, True, 3), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("step", [1, 2**20, 2**32, 2**47])
def test_more_groups_than_any_table_starts_with(step):
    ids = np.arange(-40_000, 40_000, dtype=np.int64) * step
    rewards = np.arange(160_000.0)[:, None]
    advantages = call(rewards, np.repeat(ids, 2), std="none", threads=2)
    np.testing.assert_array_equal(advantages, np.tile([-0.5, 0.5], 80_000))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, 1e200])
@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_equal_rewards_are_exactly_zero_also_across_chunks(value, std):
    rewards = np.full((3 * CHUNK, 1), value)
    assert (call(rewards, np.arange(len(rewards)) % 7, std=std, threads=2) == 0).all()


def test_a_large_mean_costs_no_more_than_its_rounding():
    offsets = np.random.default_rng(0).normal(size=3 * CHUNK)
    ids = np.arange(len(offsets)) % 3
    expected = model(offsets[:, None], ids, [1.0], "group", False)
    # A sum of squares would be 1e16 with a rounding error of 2, and would lose the variance 1.
    np.testing.assert_allclose(call(offsets[:, None] + 1e8, ids, std="group"), expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"rewards": np.zeros(3)}, ValueError, r"rewards \(3,\) and group_ids \(3,\) must be \(N, K\) and \(N,\)"),
        ({"rewards": np.zeros((4, 2))}, ValueError, r"rewards \(4, 2\) and group_ids \(3,\)"),
        ({"group_ids": np.zeros((3, 1), np.int64)}, ValueError, r"group_ids \(3, 1\)"),
        ({"weights": [1.0]}, ValueError, r"rewards \(3, 2\) need one weight per column, got 1"),
        ({"rewards": np.zeros((3, 0)), "weights": []}, ValueError, "one weight per column"),
        ({"rewards": np.zeros((3, 2), np.float16)}, TypeError, "must be float32 or float64, got float16"),
        ({"rewards": np.zeros((3, 2), ">f8")}, TypeError, "must be float32 or float64, got >f8"),
        ({"rewards": [[0.0, 0.0]] * 3}, TypeError, "incompatible function arguments"),
        ({"group_ids": np.zeros(3, np.int32)}, TypeError, "group_ids must be int64, got int32"),
        ({"group_ids": np.zeros(3)}, TypeError, "group_ids must be int64, got float64"),
        ({"group_ids": np.zeros(6, np.int64)[::2]}, ValueError, "group_ids must be C-contiguous and aligned"),
        ({"rewards": np.zeros((2, 3)).T}, ValueError, "rewards must be C-contiguous and aligned"),
        ({"rewards": np.zeros(49, np.uint8)[1:].view("f8").reshape(3, 2)}, ValueError, "rewards must be C-contiguous"),
        ({"std": "batch"}, ValueError, 'unknown std "batch"'),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"threads": -1}, ValueError, "threads must be at least 1, got -1"),
    ],
)
def test_errors(changes, error, message):
    arguments = {
        "rewards": np.zeros((3, 2)),
        "group_ids": np.zeros(3, np.int64),
        "weights": [1.0, 1.0],
        "std": "global",
        "gdpo": False,
        "threads": 1,
    }
    with pytest.raises(error, match=message):
        _native.group_advantages(**arguments | changes)
