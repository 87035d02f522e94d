from types import SimpleNamespace

import pytest

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning import processes
from fastflowgrpo.planning.plan import batch_plan


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16, 64])
def test_usable_cores(cores):
    assert processes.usable_cores(cores, 0) == cores
    for tenths in range(10 * cores + 1):
        usable, free = processes.usable_cores(cores, tenths / 10), cores - tenths / 10
        assert usable >= free - 0.5
        assert usable / (usable + cores) >= 0.4  # beside a thread of others on each core
        assert usable <= max(free + 0.5, 2 / 3 * cores + 1)


def bytes_of_a_process(count, groups):
    return processes.PROCESS_BYTES + 100 + 1000 * -(-groups // count)


@pytest.mark.parametrize("groups", [1, 2, 5, 12])
@pytest.mark.parametrize("at_most", [1, 2, 3, 8, 64])
def test_the_largest_count_that_groups_and_memory_allow(monkeypatch, groups, at_most):
    config = Config()
    config.prompts.per_epoch, config.update.per_epoch = 2 * groups, 2
    asked = []

    def estimate(config, count):
        asked.append(count)
        own = bytes_of_a_process(count, groups) - processes.PROCESS_BYTES
        return SimpleNamespace(total_memory=lambda checkpointing: own // 2 if checkpointing else own)

    monkeypatch.setattr(processes, "estimate", estimate)
    for share in (0, 0.3, 0.6, 1, 1.5, 2, 3.2, 7, 11.9, 12, 70):
        memory = int(share * bytes_of_a_process(1, groups))
        fitting = [n for n in range(2, min(at_most, groups) + 1) if n * bytes_of_a_process(n, groups) <= memory]
        asked.clear()
        assert processes.process_count(config, at_most, memory) == max(fitting, default=1)
        assert len(asked) <= 4
    batch_plan(config, processes.process_count(config, at_most, 2**60))


def test_processes_share_the_groups_ahead_evenly(monkeypatch):
    config = Config()
    config.rollout.ahead = 9
    assert processes.process_count(config, 8, 2**60) == 3
    with pytest.raises(UserError, match=r"rollout\.ahead: 9 groups must be a multiple of the 4 processes"):
        batch_plan(config, 4)


def test_gradient_checkpointing_makes_room(monkeypatch):
    config, gib = Config(), 2**30
    of = lambda checkpointing: gib if checkpointing else 8 * gib  # noqa: E731
    monkeypatch.setattr(processes, "estimate", lambda config, count: SimpleNamespace(total_memory=of))
    assert processes.process_count(config, 4, 6 * gib) == 1
    config.policy.gradient_checkpointing = True
    assert processes.process_count(config, 4, 6 * gib) == 4


def test_the_bundled_model_fits_and_an_unknown_one_is_left_to_the_run(monkeypatch):
    assert processes.process_count(Config(), 4, 4 * 2**30) == 4
    assert processes.process_count(Config(), 4, 2**30) == 1

    def unknown(config, count):
        raise UserError("no such model")

    monkeypatch.setattr(processes, "estimate", unknown)
    assert processes.process_count(Config(), 4, 2**40) == 1
