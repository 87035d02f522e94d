"""The settings with which a run fits into a GPU's memory: `--dry_run --fit 24GB`.

The smallest change comes first. Smaller batches cost the least, so each lever below is tried with them before the next
one is added. What the last lever has made superfluous is left out again.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning import OBJECTIVES
from fastflowgrpo.planning.estimate import Estimate, estimate, uses_reference
from fastflowgrpo.planning.memory import with_setting
from fastflowgrpo.planning.passes import BatchCost, Passes, run_passes
from fastflowgrpo.policy import with_default_rank

HALVINGS = 3  # of a batch size before the next lever; the last lever has no limit
LEVERS: tuple[tuple[str, Any], ...] = (
    ("policy.offload", True),  # some seconds an epoch
    ("rollout.offload_trajectory", True),  # copies that are hidden behind the update
    ("policy.embeddings_dir", "runs/embeddings"),  # a folder on the disk
    ("policy.gradient_checkpointing", True),  # a third more FLOPs in the update
    ("update.optimizer", "adamw_8bit"),  # slightly other steps, in full training
    # another model under a LoRA, another reference in full training, which has no nf4
    ("policy.quantization", "int8"),
    ("policy.quantization", "nf4"),
)
BATCH_SIZES = ("update.batch_size", "rollout.batch_size", "evaluation.batch_size", "policy.decode_batch_size")

Settings = dict[str, Any]


def fitting(config: Config, processes: int, memory: float) -> tuple[Config, Settings]:
    """Choose settings whose estimate fits into a memory.

    Args:
        config: validated; settings that save memory already stay.
        processes: that train together.
        memory: bytes that a process may fill.

    Returns:
        The config with them, and those that were changed.

    Raises:
        UserError: nothing makes it fit, or there is no estimate (see `estimate`).
    """
    start = config
    if not config.update.batch_size:
        start = with_setting(config, "update.batch_size", config.rollout.batch_size)
    run = _Interpolated(start, processes)

    def excess(candidate: Config) -> float:
        return _excess(estimate(candidate, processes, run), candidate, memory)

    changes: Settings = {}
    levers = list(_levers(start))
    for number in range(len(levers) + 1):
        if number:
            name, value = levers[number - 1]
            changes[name] = value
        is_last = number == len(levers)
        found = _smaller_batches(_changed(start, changes), excess, None if is_last else HALVINGS)
        if not excess(found):
            break
    else:
        raise UserError(f"fit: {_total(found, processes, run) / 1e9:.3g} GB are needed with all that saves memory")
    for name in reversed(list(changes)[:-1]):
        without = with_setting(found, name, attrgetter(name)(start))
        if not excess(without):
            found = without
    names = [*BATCH_SIZES, *changes]
    chosen = {name: attrgetter(name)(found) for name in names if attrgetter(name)(found) != attrgetter(name)(config)}
    return found, chosen


def _total(config: Config, processes: int, run: Callable[..., Passes]) -> int:
    """Return the estimated peak of a run in bytes."""
    return estimate(config, processes, run).total_memory(config.policy.gradient_checkpointing)


def _excess(cost: Estimate, config: Config, memory: float) -> float:
    """Return by how many bytes the phases exceed the memory, together."""
    skipped = "update" if config.policy.gradient_checkpointing else "update with gradient checkpointing"
    held = sum(cost.memory.values())
    return sum(max(0, held + peak - memory) for phase, peak in cost.passes.items() if phase != skipped)


def _levers(config: Config) -> Iterator[tuple[str, Any]]:
    policy, default = with_default_rank(config.model, config.policy), Config()
    trains_lora = policy.lora is not None or bool(policy.lora_rank)
    for name, value in LEVERS:
        applies = {
            "policy.quantization": trains_lora or (value == "int8" and uses_reference(config)),
            "update.optimizer": not trains_lora,
            "rollout.offload_trajectory": OBJECTIVES[config.update.algorithm].uses_log_probs,
        }
        if attrgetter(name)(config) == attrgetter(name)(default) and applies.get(name, True):
            yield name, value


def _smaller_batches(config: Config, excess: Callable[[Config], float], halvings: int | None) -> Config:
    """Halve the batch size that lowers the excess most, until there is none or nothing lowers it."""
    start, left = config, excess(config)
    while left:
        halved = [other for other in _halved(config) if halvings is None or _is_within(other, start, 2**halvings)]
        if not halved:
            break
        best = min(halved, key=excess)
        if not excess(best) < left:
            break
        config, left = best, excess(best)
    return config


def _halved(config: Config) -> Iterator[Config]:
    """Yield the config with one kind of batch halved: of the update, of sampling, of decoding."""
    size, smallest = config.rollout.group_size, OBJECTIVES[config.update.algorithm].samples_per_pair(config)
    if config.update.batch_size > smallest:
        yield with_setting(config, "update.batch_size", max(smallest, config.update.batch_size // 2))
    sampled = max(config.rollout.batch_size, config.evaluation.batch_size) // 2
    if sampled >= size:
        rollout = min(config.rollout.batch_size, sampled // size * size)
        other = with_setting(config, "rollout.batch_size", rollout)
        yield with_setting(other, "evaluation.batch_size", min(config.evaluation.batch_size, rollout))
    if config.policy.decode_batch_size > 1:
        yield with_setting(config, "policy.decode_batch_size", config.policy.decode_batch_size // 2)


def _is_within(config: Config, start: Config, factor: int) -> bool:
    return all(factor * attrgetter(name)(config) >= attrgetter(name)(start) for name in BATCH_SIZES)


def _changed(config: Config, settings: Settings) -> Config:
    for name, value in settings.items():
        config = with_setting(config, name, value)
    return config


class _Interpolated:
    """`run_passes` at the largest and the smallest batches, and between them on the line through both.

    A peak is a maximum of sums that grow evenly with the batch, so it is at most on that line.
    """

    def __init__(self, config: Config, processes: int):
        self.ends: list[Passes] = []
        policy = replace(config.policy, embeddings_dir="runs")  # the encoders are measured too
        config = replace(config, policy=policy)

        def keep(*arguments: Any) -> Passes:
            self.ends.append(run_passes(*arguments))
            return self.ends[-1]

        estimate(config, processes, keep)
        with torch.random.fork_rng(devices=[]):
            self.ends.append(run_passes(config, 1, OBJECTIVES[config.update.algorithm].samples_per_pair(config), 1))

    def __call__(self, config: Config, sampled: int, micro_batch: int, decoded: int) -> Passes:
        large, small = self.ends
        sizes = {"forward": sampled, "reference": micro_batch, "train": micro_batch, "checkpointed": micro_batch}
        sizes["decode"] = decoded
        costs: dict[str, Any] = {
            name: _between(getattr(small, name), getattr(large, name), size) for name, size in sizes.items()
        }
        return replace(large, **costs)


def _between(small: BatchCost, large: BatchCost, size: int) -> BatchCost:
    growth = (large.peak - small.peak) / max(1, large.batch_size - small.batch_size)
    peak = small.peak + round(growth * (size - small.batch_size))
    return BatchCost(large.flops_per_sample * size, peak, large.weights, size)
