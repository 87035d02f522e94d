"""Group-relative advantages of one or several rewards (GRPO, arXiv 2402.03300; Flow-GRPO, arXiv 2505.05470, eq. 4).

    A = (R - mean of its group) / (std + 1e-4)

This file checks the arguments and chooses the backend. `kernels/group_advantage.py` has the reference and the Triton
kernel, `csrc/group_advantages.cpp` the C++ extension, which computes the advantages of a training.
"""

import functools
import math
import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastflowgrpo.kernels.backend import choose_backend
from fastflowgrpo.kernels.group_advantage import EPSILON, group_advantage_reference, group_advantage_triton

BACKENDS = ("auto", "reference", "native", "triton")
_native: Any
try:
    _native = import_module("fastflowgrpo._native")
except ImportError:
    _native = None


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    std: str = "global",
    *,
    weights: Sequence[float] | None = None,
    mode: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """Advantages (N,) from the rewards of N samples; see the module for the equation.

    Args:
        rewards: (N,), or (N, K) for K rewards; floats. NaN is a missing score: its sample counts in no statistic of any
            reward.
        group_ids: (N,) integers, any values, on the device of `rewards`.
        std: divide by the population standard deviation of all rewards ("global") or of the group's rewards ("group"),
            or by nothing ("none").
        weights: K finite numbers, by default 1 each. A reward of weight 0 is left out, with its missing scores.
        mode: "sum": R is the weighted sum of the rewards. "gdpo": A is computed for each reward and these are summed
            with the weights; with std="group" this is GDPO (arXiv 2601.05242) without its last step, the division by
            the batch's standard deviation.
        backend: "reference" (torch), "native" (C++, CPU only), "triton", or "auto": Triton on CUDA if it is installed,
            native on the CPU, or torch with a warning if the extension is not built. The environment variable
            FASTFLOWGRPO_BACKEND (reference or triton) overrides auto; on the CPU, triton only with TRITON_INTERPRET=1.

    Returns:
        (N,) float64 on the device of `rewards`, without gradient: NaN if a reward is missing, exactly 0 in a group of
        equal rewards. The native backend gives the same bits with any number of threads, Triton in every run.

    Raises:
        ValueError: shapes or devices differ, a dtype, weight or name is wrong, or the backend cannot compute this.
    """
    _check_tensors(rewards, group_ids)
    _check_choices(std, mode, backend)
    columns, weights = _weighted_columns(rewards.detach(), weights)
    # torch.compile needs the registered operator to avoid a graph break; an eager call is faster without it.
    compute = _operator if torch.compiler.is_compiling() else _compute
    return compute(columns, group_ids.long(), weights, std, mode, backend)


def share_without_spread(rewards: Tensor, group_size: int) -> float:
    """The share of groups whose rewards have a standard deviation below 1e-4, the summand in the advantage.

    Args:
        rewards: (N,), group after group; NaN is a missing score. A group without a score counts.
        group_size: samples per group.
    """
    groups = rewards.double().view(-1, group_size)
    std = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    return 1 - (std >= EPSILON).double().mean().item()


def _check_tensors(rewards: Tensor, group_ids: Tensor) -> None:
    if rewards.ndim not in (1, 2) or rewards.shape[:1] != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must be vectors of one length, "
            "or rewards a matrix of that many rows"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype}: give floats")
    if group_ids.is_floating_point():
        raise ValueError(f"group_ids are {group_ids.dtype}: floats merge large ids, give integers")
    if rewards.device != group_ids.device:
        raise ValueError(f"rewards are on {rewards.device}, group_ids on {group_ids.device}")


def _check_choices(std: str, mode: str, backend: str) -> None:
    if std not in ("global", "group", "none"):
        raise ValueError(f'unknown std "{std}": choose global, group or none')
    if mode not in ("sum", "gdpo"):
        raise ValueError(f'unknown mode "{mode}": choose sum or gdpo')
    if backend not in BACKENDS:
        raise ValueError(f'unknown backend "{backend}": choose one of {", ".join(BACKENDS)}')


def _weighted_columns(rewards: Tensor, weights: Sequence[float] | None) -> tuple[Tensor, list[float]]:
    """The rewards (N, K) that have a weight other than 0, and these weights."""
    columns = rewards if rewards.ndim == 2 else rewards[:, None]
    factors = [1.0] * columns.shape[1] if weights is None else [float(weight) for weight in weights]
    if len(factors) != columns.shape[1]:
        raise ValueError(f"{len(factors)} weights for {columns.shape[1]} rewards")
    if not all(math.isfinite(factor) for factor in factors):
        raise ValueError(f"weights must be finite numbers, got {factors}")
    used = [k for k, factor in enumerate(factors) if factor]
    if not used:
        raise ValueError("no reward with a weight other than 0")
    if len(used) == len(factors):
        return columns, factors
    return torch.stack([columns[:, k] for k in used], 1), [factors[k] for k in used]


def _compute(rewards: Tensor, group_ids: Tensor, weights: Sequence[float], std: str, mode: str, backend: str) -> Tensor:
    """Advantages (N,) of rewards (N, K) on the chosen backend."""
    backend = _choose_backend(backend, rewards.device)
    if backend == "native":
        if rewards.dtype != torch.float32:
            rewards = rewards.double()
        arrays = rewards.contiguous().numpy(), group_ids.contiguous().numpy()
        return torch.from_numpy(
            _native.group_advantages(*arrays, weights, std, mode == "gdpo", torch.get_num_threads())
        )
    normalise = group_advantage_triton if backend == "triton" else group_advantage_reference
    rewards = rewards.double()
    if mode == "sum":
        return normalise(_weighted_sum(rewards, weights)[:, None], group_ids, std)[:, 0]
    missing = rewards.isnan().any(1, keepdim=True)
    return _weighted_sum(normalise(rewards.masked_fill(missing, math.nan), group_ids, std), weights)


_operator = torch.library.custom_op("fastflowgrpo::group_advantages", _compute, mutates_args=())


@_operator.register_fake
def _(rewards, group_ids, weights, std, mode, backend):
    return rewards.new_empty(len(group_ids), dtype=torch.float64)


def _weighted_sum(columns: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum (N,), added column by column so that equal rows have equal sums."""
    total = weights[0] * columns[:, 0]
    for k in range(1, len(weights)):
        total = total + weights[k] * columns[:, k]
    return total


def _choose_backend(backend: str, device: torch.device) -> str:
    """The backend to run on a device: "reference", "native" or "triton"."""
    if backend == "auto" and device.type == "cpu":
        override = os.environ.get("FASTFLOWGRPO_BACKEND", "auto")
        # A training on GPUs also has its scores on the CPU: FASTFLOWGRPO_BACKEND=triton must not stop it.
        if override == "auto" or (override == "triton" and os.environ.get("TRITON_INTERPRET") != "1"):
            if _native is None:
                _warn_missing_extension()
                return "reference"
            return "native"
    if backend != "native":
        return choose_backend(backend, device)
    if device.type != "cpu":
        raise ValueError(f"backend 'native' runs on the CPU, the rewards are on {device}")
    if _native is None:
        raise ValueError("backend 'native' needs the C++ extension, which is not built")
    return backend


@functools.cache
def _warn_missing_extension() -> None:
    warnings.warn(
        "fastflowgrpo._native, the C++ extension, is not built: group advantages on the CPU are computed with torch. "
        "To build it, install a C++ compiler and then this package again (pip install -v shows what went wrong).",
        RuntimeWarning,
        stacklevel=2,
    )
