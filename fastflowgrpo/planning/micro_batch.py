"""The largest micro-batch that fits in memory: what `update.batch_size: 0` chooses."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastflowgrpo.config import Config
from fastflowgrpo.distributed import Processes
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning import OBJECTIVES
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.planning.machine import free_memory

SHARE = 0.9  # of the free memory: the estimate leaves out workspaces and what the allocator loses


def with_largest_micro_batch(config: Config, processes: int, memory: float) -> Config:
    """The config with the largest `update.batch_size` whose estimate fits, but not more than makes equal micro-batches.

    Args:
        config: validated.
        processes: that train together.
        memory: bytes that a process may fill.

    Raises:
        UserError: not even a micro-batch of one pair fits, or there is no estimate (see `estimate`).
    """
    checkpointing = config.policy.gradient_checkpointing
    update = "update with gradient checkpointing" if checkpointing else "update"
    samples_per_pair = OBJECTIVES[config.update.algorithm].samples_per_pair(config)

    def with_pairs(pairs: int) -> Config:
        return replace(config, update=replace(config.update, batch_size=pairs * samples_per_pair))

    smallest = estimate(with_pairs(1), processes)
    all_pairs = smallest.plan.micro_batches
    largest = estimate(with_pairs(all_pairs), processes)
    if smallest.total_memory(checkpointing) > memory:
        raise UserError(
            f"update.batch_size: one pair at a time already needs {smallest.total_memory(checkpointing) / 1e9:.3g} GB "
            f"of {memory / 1e9:.3g} GB: set policy.gradient_checkpointing to true, or lower rollout.batch_size and "
            "evaluation.batch_size"
        )
    # The peak is a maximum of sums that grow evenly with the batch, so between two sizes it is at most on their chord.
    growth = (largest.passes[update] - smallest.passes[update]) / max(1, all_pairs - 1)
    free = memory - sum(smallest.memory.values()) - smallest.passes[update]
    fitting = min(all_pairs, 1 + int(free / growth)) if growth else all_pairs
    micro_batches = math.ceil(all_pairs / fitting)
    return with_pairs(math.ceil(all_pairs / micro_batches))


def with_micro_batch(config: Config, processes: Processes, begun: Mapping[str, Any] | None) -> Config:
    """The config with a size of the micro-batches: the one that a run has begun with, or the largest that fits.

    Args:
        config: validated, with `update.batch_size` 0.
        processes: of the run. Collective.
        begun: the config of the run that is resumed.
    """
    if begun:
        return replace(config, update=replace(config.update, batch_size=begun["update"]["batch_size"]))
    return with_largest_micro_batch(config, processes.count, min(processes.gather(available_memory(config))))


def available_memory(config: Config) -> float:
    """Bytes that this process may fill: `memory_gb`, or 90 % of what is free on its device."""
    if config.memory_gb is not None:
        return config.memory_gb * 1e9
    if torch.cuda.is_available():
        return SHARE * torch.cuda.mem_get_info()[0]
    return SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
