import math
import subprocess
import sys

import pytest
import torch
from support.advantages_model import model

from fastflowgrpo import group_advantages
from fastflowgrpo.learning import advantages as module

NAN = math.nan


@pytest.fixture(params=["reference", "native"])
def backend(request):
    return request.param


@pytest.fixture
def runs(monkeypatch):
    """The backends that ran, in order."""
    names = []
    choose = module._choose_backend

    def record(*arguments):
        names.append(choose(*arguments))
        return names[-1]

    monkeypatch.delenv("FASTFLOWGRPO_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "_choose_backend", record)
    return names


def by_hand(rewards, ids, std):
    return torch.from_numpy(model(rewards.double(), ids, std=std))


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_matches_the_definition_for_any_groups_and_missing_scores(std, backend):
    rewards = torch.tensor([0.1, 0.9, NAN, 0.5, -2.0, 3.0, 3.5, 0.25])
    ids = torch.tensor([7, -3, 7, 7, -3, 2**60, 2**60 + 1, -3])
    torch.testing.assert_close(
        group_advantages(rewards, ids, std, backend=backend),
        by_hand(rewards, ids, std),
        equal_nan=True,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_a_group_of_equal_rewards_is_exactly_zero(value, std, backend):
    rewards = torch.tensor([value] * 7 + [0.0, 1.0])
    advantages = group_advantages(rewards, torch.tensor([0] * 7 + [1, 1]), std, backend=backend)
    assert (advantages[:7] == 0).all()
    assert advantages[7] < 0 < advantages[8]


def test_a_missing_score_is_not_a_zero(backend):
    ids = torch.tensor([0, 0, 0])
    with_missing = group_advantages(torch.tensor([1.0, 2.0, NAN]), ids, backend=backend)
    assert with_missing.isnan().tolist() == [False, False, True]
    torch.testing.assert_close(with_missing[:2], group_advantages(torch.tensor([1.0, 2.0]), ids[:2], backend=backend))
    assert group_advantages(torch.tensor([NAN, NAN]), ids[:2], backend=backend).isnan().all()


@pytest.mark.parametrize("shape", [(0,), (0, 2)])
@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_no_samples(shape, mode, backend):
    ids = torch.empty(0, dtype=torch.long)
    assert group_advantages(torch.empty(shape), ids, mode=mode, backend=backend).shape == (0,)


REWARDS = torch.tensor([[0.0, 10.0], [1.0, 10.0], [NAN, 70.0], [1.0, 40.0], [0.5, -20.0], [0.75, 5.0]])
IDS = torch.tensor([5, 5, 5, 5, 9, 9])
# The sample that lacks one of its rewards counts in no statistic of either reward.
PRESENT = ~REWARDS.isnan().any(1)


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_sum_normalises_the_weighted_sum(std, backend):
    advantages = group_advantages(REWARDS, IDS, std, weights=[2.0, -0.25], backend=backend)
    assert advantages.isnan().tolist() == (~PRESENT).tolist()
    expected = by_hand(2 * REWARDS[PRESENT, 0] - 0.25 * REWARDS[PRESENT, 1], IDS[PRESENT], std)
    torch.testing.assert_close(advantages[PRESENT], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_gdpo_sums_the_normalised_rewards(std, backend):
    advantages = group_advantages(REWARDS, IDS, std, weights=[2.0, -0.25], mode="gdpo", backend=backend)
    assert advantages.isnan().tolist() == (~PRESENT).tolist()
    parts = [by_hand(REWARDS[PRESENT, k], IDS[PRESENT], std) for k in range(2)]
    torch.testing.assert_close(advantages[PRESENT], 2 * parts[0] - 0.25 * parts[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_a_reward_of_weight_zero_is_left_out_with_its_missing_scores(mode, backend):
    advantages = group_advantages(REWARDS, IDS, weights=[0.0, 3.0], mode=mode, backend=backend)
    expected = group_advantages(REWARDS[:, 1], IDS, weights=[3.0], mode=mode, backend=backend)
    assert not advantages.isnan().any()
    torch.testing.assert_close(advantages, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_equal_rows_are_exactly_zero_for_odd_weights(mode, backend):
    rewards = torch.tensor([[0.1, 1 / 3, -7.7]] * 11)
    weights = [0.3, 1.7, 0.9]
    assert (group_advantages(rewards, torch.zeros(11).long(), weights=weights, mode=mode, backend=backend) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_any_strides_and_no_gradient(dtype, backend):
    rewards = torch.randn(3, 2 * 40, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2].T.requires_grad_()
    ids = (torch.arange(80, dtype=torch.int32) % 5)[::2]
    advantages = group_advantages(rewards, ids, weights=[1.0, 1.0, 1.0], backend=backend)
    assert advantages.dtype == torch.float64 and not advantages.requires_grad
    expected = by_hand(rewards.detach().double().sum(1), ids, "global")
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_compiles_without_a_graph_break(mode, backend):
    def function(rewards):
        return 2 * group_advantages(rewards, IDS, weights=[1.0, 0.5], mode=mode, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(REWARDS), function(REWARDS), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_operator_is_registered_right(mode, backend):
    torch.library.opcheck(module._operator, (REWARDS[PRESENT], IDS[PRESENT], [1.0, 0.5], "group", mode, backend))


def test_auto_is_native_on_the_cpu(runs, monkeypatch):
    group_advantages(REWARDS, IDS)
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "reference")
    group_advantages(REWARDS, IDS)
    # As in a training on a GPU, whose scores are on the CPU.
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "triton")
    group_advantages(REWARDS, IDS)
    group_advantages(REWARDS, IDS, backend="reference")
    assert runs == ["native", "reference", "native", "reference"]


def test_a_backend_that_cannot_run_is_an_error(runs, monkeypatch):
    with pytest.raises(ValueError, match="triton"):
        group_advantages(REWARDS, IDS, backend="triton")
    monkeypatch.setattr(module, "_native", None)
    with pytest.raises(ValueError, match="the C\\+\\+ extension, which is not built"):
        group_advantages(REWARDS, IDS, backend="native")
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "tritn")
    with pytest.raises(ValueError, match="tritn"):
        group_advantages(REWARDS, IDS)
    with pytest.raises(ValueError, match="runs on the CPU"):
        group_advantages(REWARDS.to("meta"), IDS.to("meta"), backend="native")
    assert runs == []


def test_without_the_extension_torch_computes_and_one_warning_says_so():
    code = """
import sys, types, warnings
import fastflowgrpo
sys.modules["fastflowgrpo._native"] = None  # as if it were not there: importing it is an ImportError
room = sys.modules["fastflowgrpo.learning"] = types.ModuleType("fastflowgrpo.learning")
room.__path__ = [f"{folder}/learning" for folder in fastflowgrpo.__path__]  # without the objectives, and so diffusers
import torch
from fastflowgrpo import group_advantages
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        print(group_advantages(torch.tensor([1.0, 3.0]), torch.tensor([4, 4]), "none").tolist())
print([(warning.category.__name__, str(warning.message)) for warning in seen])
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:3] == ["[-1.0, 1.0]"] * 3
    assert lines[3].count("RuntimeWarning") == 1 and "_native, the C++ extension, is not built" in lines[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_ids": torch.zeros(2, dtype=torch.long)}, "must be vectors of one length"),
        ({"rewards": torch.zeros(3, 1, 1)}, "must be vectors of one length"),
        ({"rewards": torch.zeros(2, 3)}, "a matrix of that many rows"),
        ({"rewards": torch.zeros(3, dtype=torch.long)}, "rewards are torch.int64: give floats"),
        ({"group_ids": torch.zeros(3)}, "floats merge large ids"),
        ({"group_ids": torch.zeros(3, dtype=torch.long, device="meta")}, "rewards are on cpu, group_ids on meta"),
        ({"std": "batch"}, "unknown std"),
        ({"mode": "product"}, "unknown mode"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"weights": [1.0, 1.0]}, "2 weights for 1 rewards"),
        ({"weights": [NAN]}, "must be finite"),
        ({"weights": [0.0]}, "no reward with a weight other than 0"),
        ({"rewards": torch.zeros(3, 0)}, "no reward with a weight other than 0"),
    ],
)
def test_errors(changes, message):
    arguments = {"rewards": torch.zeros(3), "group_ids": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments | changes)
