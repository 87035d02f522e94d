"""What is free, what is short, and which settings help."""

from dataclasses import replace

import pytest
import torch

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning import memory
from fastflowgrpo.planning.estimate import Estimate
from fastflowgrpo.planning.plan import batch_plan

CPU = torch.device("cpu")


@pytest.fixture
def costs(monkeypatch):
    """The dry run's estimate with sizes that can be checked by hand: 1 MB an image, 2 MB a pair, half with
    checkpointing, and text encoders of 8 MB."""

    def estimate(config, processes):
        assert processes == 2
        sampled = max(config.rollout.batch_size, config.evaluation.batch_size)
        update = 2_000_000 * config.update.batch_size
        passes = {
            "rollout": 1_000_000 * sampled + 1_000_000 * config.policy.decode_batch_size,
            "update": update,
            "update with gradient checkpointing": update // 2,
        }
        frozen, held = {"transformer": 9, "text_encoder": 2_000_000}, {"weights": 50_000_000}
        return Estimate("some/model", batch_plan(config, processes), 9, frozen, held, passes, {}, {})

    monkeypatch.setattr(memory, "estimate", estimate)


def config_of(**settings) -> Config:
    config = Config(model="some/model")
    for name, value in settings.items():
        setattr(getattr(config, name.partition("_")[0]), name.partition("_")[2], value)
    return config


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("update", "update.batch_size 144 (-0.29 GB), policy.gradient_checkpointing true (-0.29 GB), "),
        ("rollout", "rollout.batch_size 144 (-0.14 GB), policy.decode_batch_size 16 (-16 MB), "),
        ("evaluate", "evaluation.batch_size 144 (-0.14 GB), policy.decode_batch_size 16 (-16 MB), "),
    ],
)
def test_the_settings_that_save_most_in_a_phase_come_first(costs, phase, expected):
    assert memory.helpful_settings(config_of(), 2, phase) == f"{expected}policy.embeddings_dir FOLDER (-8 MB)"


def test_what_is_small_or_set_already_is_not_offered(costs):
    config = config_of(
        update_batch_size=1, policy_gradient_checkpointing=True, policy_embeddings_dir="there", rollout_batch_size=24
    )
    assert memory.helpful_settings(config, 2, "update") == "a smaller model, or more processes"
    assert memory.helpful_settings(config, 2, "rollout") == "policy.decode_batch_size 16 (-16 MB)"


def test_out_of_memory_is_told_with_its_phase_and_the_remedy(costs):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")
    error.phase = "update"
    answer = memory.out_of_memory(config_of(), 2, error)
    assert isinstance(answer, UserError)
    assert str(answer).startswith(
        "out of memory in the phase update (CUDA out of memory. Tried to allocate 2.00 GiB); what helps most: "
        "update.batch_size 144 (-0.29 GB), "
    )
    allocator = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    assert memory.is_out_of_memory(error) and memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError(allocator))
    assert not memory.is_out_of_memory(RuntimeError("another one"))


def test_a_model_that_cannot_be_described_still_gets_names(monkeypatch):
    def estimate(config, processes):
        raise UserError("is unknown")

    monkeypatch.setattr(memory, "estimate", estimate)
    assert memory.helpful_settings(config_of(), 1, "update").startswith("update.batch_size 144, rollout.batch_size 144")


@pytest.mark.parametrize(("free", "warned"), [(0.62e9, True), (0.63e9, False), (9e9, False)])
def test_a_run_that_needs_more_than_is_free_is_warned(costs, monkeypatch, capsys, free, warned):
    monkeypatch.setattr(memory, "available_memory", lambda config: free)
    memory.warn_if_short(config_of(), 2, CPU)
    printed = capsys.readouterr().err
    assert bool(printed) == warned
    if warned:
        assert printed.startswith("warning: this run is estimated to need 0.63 GB, and 0.62 GB may be filled; what ")
        assert "update.batch_size 144 (-0.29 GB)" in printed


def test_the_bundled_model_is_not_estimated_where_memory_is_plenty(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda config: 1e9)
    monkeypatch.setattr(memory, "estimate", lambda *_: pytest.fail("was estimated"))
    memory.warn_if_short(Config(), 1, CPU)


def test_a_shortage_while_prompts_are_encoded_is_told_with_its_size(costs, monkeypatch):
    estimated = memory.estimate

    def with_encode(config, processes):
        found = estimated(config, processes)
        return replace(found, passes={**found.passes, "encode": 5_000_000_000})

    monkeypatch.setattr(memory, "estimate", with_encode)
    monkeypatch.setattr(memory, "available_memory", lambda config: 2e9)
    assert memory.shortage(config_of(), 2).startswith("this run is estimated to need 5 GB, and 2 GB may be filled; ")
