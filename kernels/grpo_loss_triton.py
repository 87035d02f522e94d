"""Triton kernels of `grpo_step_loss` and `grpo_loss`: one pass forward, and one elementwise pass backward.

    d loss / d velocity = guidance_scale [a (prev_sample - mean) + k (v - v_ref)]
    a = -A ratio c_v / (std^2 D)             normalised log-prob
    a = -A ratio 2 c_v / D                   unnormalised log-prob
    a = -A ratio c_v / (std D (-dt))         GRPO-Guard, with the mean of velocity_old
    k = 2 kl_weight kl_scale / D

a is 0 where the clip holds and at ODE steps. D is the number of elements of a row.

The forward pass reads velocity, sample, prev_sample and, if given, velocity_uncond, velocity_ref and velocity_old, once
each, and writes no tensor of that size. The backward pass (`velocity_gradient_triton`) reads the same and writes the
gradient. If the KL has no weight it skips velocity_ref and, with velocity_old, also velocity and velocity_uncond. Rows
of more than `MAX_BLOCK` elements leave float64 sums per block, and a second launch with one small program per row
computes the loss from them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflowgrpo.kernels.triton_operation import Operation, launch
from fastflowgrpo.kernels.triton_rows import (
    blocks,
    coefficients,
    dense_rows,
    load_guided,
    load_row,
    log_prob_slope,
    row_log_prob,
    row_value,
    step_mean,
    sum_partials,
)
from fastflowgrpo.kernels.velocity_gradient_triton import velocity_gradient

STATISTICS = ("ratio", "log_prob_difference", "clipped_above", "clipped_below", "policy_loss", "kl")


@triton.jit
def clipped_policy(
    row, inside, batch_size, log_ratio, difference, advantage, lower, upper, advantage_clip, statistics
):  # fmt: skip
    """The policy loss and its derivative with respect to the log-ratio; stores the first four of `STATISTICS`."""
    ratio = tl.exp(log_ratio)
    bound = tl.full(ratio.shape, advantage_clip, tl.float32)
    a = advantage.to(tl.float32)
    a = tl.where(a > bound, bound, tl.where(a < -bound, -bound, a))
    low, high = tl.full(ratio.shape, lower, tl.float32), tl.full(ratio.shape, upper, tl.float32)
    above, below = (ratio > high) & (a > 0), (ratio < low) & (a < 0)
    policy = -a * tl.where(above, high, tl.where(below, low, ratio))
    tl.store(statistics + row, ratio, mask=inside)
    tl.store(statistics + batch_size + row, difference, mask=inside)
    tl.store(statistics + 2 * batch_size + row, above.to(tl.float32), mask=inside)
    tl.store(statistics + 3 * batch_size + row, below.to(tl.float32), mask=inside)
    return policy, tl.where(above | below, 0.0, policy)


@triton.jit
def finish_row(
    row, batch_size, distance, divergence, overlap, loss, statistics, factors, c_v, std, dt,
    old_log_prob, advantage, guidance, size, lower, upper, advantage_clip, kl_weight,
    KL: tl.constexpr, GUARD: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and gradient factors of a row from its sums."""
    mean_slope = row_value(c_v, row)
    deviation = row_value(std, row)
    stochastic = deviation > 0
    difference = row_log_prob(distance, size, deviation, NORMALISED) - tl.load(old_log_prob + row)
    log_ratio = difference
    slope = mean_slope * log_prob_slope(size, deviation, NORMALISED)
    if GUARD:
        slope = mean_slope * log_prob_slope(size, deviation, True) * deviation
        log_ratio = (slope * overlap).to(tl.float32)
    policy, derivative = clipped_policy(
        row, row < batch_size, batch_size, log_ratio, difference, tl.load(advantage + row), lower, upper,
        advantage_clip, statistics,
    )  # fmt: skip
    if GUARD:
        step = -row_value(dt, row)
        policy, derivative = policy / step, derivative / step
    gain = tl.full((), guidance, tl.float32)
    tl.store(factors + row, tl.where(stochastic, gain * derivative * slope, 0.0))
    tl.store(statistics + 4 * batch_size + row, policy)
    if KL != "none":
        scale = tl.full((), 1.0, tl.float32)
        if KL != "velocity":
            scale = mean_slope / tl.where(stochastic, deviation, 1.0)
            scale = tl.where(stochastic, 0.5 * scale * scale, 0.0)
        if KL == "flow_grpo":
            scale = -row_value(dt, row) * scale
        kl = scale * (divergence / size).to(tl.float32)
        weight = tl.full((), kl_weight, tl.float32)
        policy += weight * kl
        tl.store(statistics + 5 * batch_size + row, kl)
        tl.store(factors + batch_size + row, gain * (2 * weight * scale / size))
    tl.store(loss + row, policy)


@triton.jit
def loss_kernel(
    velocity, uncond, old, reference, sample, prev_sample,
    velocity_stride, uncond_stride, old_stride, reference_stride, sample_stride, prev_sample_stride,
    sums, num_blocks, c_x,
    batch_size, loss, statistics, factors, c_v, std, dt, old_log_prob, advantage,
    guidance, size, lower, upper, advantage_clip, kl_weight,
    KL: tl.constexpr, GUARD: tl.constexpr, NORMALISED: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums: (3, B, num_blocks) float64, of (x - mean)^2, of (v - v_ref)^2, and of (v - v_old) (x - mean_old)."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    v = load_guided(velocity, uncond, guidance, row, velocity_stride, uncond_stride, start, size, BLOCK)
    mean = step_mean(v, sample, c_x, c_v, row, sample_stride, start, size, BLOCK)
    # past the end of a row, loads give 0 and add nothing to the sums
    offset = load_row(prev_sample, row, prev_sample_stride, start, size, BLOCK) - mean
    distance = tl.sum((offset * offset).to(tl.float64))
    divergence = distance * 0
    if KL != "none":
        shift = v - load_row(reference, row, reference_stride, start, size, BLOCK)
        divergence = tl.sum((shift * shift).to(tl.float64))
    overlap = distance * 0
    if GUARD:
        shift = v - load_row(old, row, old_stride, start, size, BLOCK)
        slope = tl.full(v.shape, row_value(c_v, row), tl.float32)
        overlap = tl.sum((shift * tl.fma(slope, shift, offset)).to(tl.float64))
    if ONE_BLOCK:
        finish_row(
            row, batch_size, distance, divergence, overlap, loss, statistics, factors, c_v, std, dt,
            old_log_prob, advantage, guidance, size, lower, upper, advantage_clip, kl_weight, KL, GUARD, NORMALISED,
        )  # fmt: skip
    else:
        plane = tl.full((), batch_size, tl.int64) * num_blocks  # for one row Triton makes batch_size a constant
        tl.store(sums + program, distance)
        if KL != "none":
            tl.store(sums + plane + program, divergence)
        if GUARD:
            tl.store(sums + 2 * plane + program, overlap)


@triton.jit
def finish_kernel(
    sums, num_blocks,
    batch_size, loss, statistics, factors, c_v, std, dt, old_log_prob, advantage,
    guidance, size, lower, upper, advantage_clip, kl_weight,
    KL: tl.constexpr, GUARD: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    distance = sum_partials(sums, row, num_blocks)
    divergence = distance * 0
    if KL != "none":
        divergence = sum_partials(sums, row + batch_size, num_blocks)
    overlap = distance * 0
    if GUARD:
        overlap = sum_partials(sums, row + 2 * batch_size, num_blocks)
    finish_row(
        row, batch_size, distance, divergence, overlap, loss, statistics, factors, c_v, std, dt,
        old_log_prob, advantage, guidance, size, lower, upper, advantage_clip, kl_weight, KL, GUARD, NORMALISED,
    )  # fmt: skip


@triton.jit
def policy_kernel(
    log_prob, old_log_prob, advantage, loss, table, batch_size, lower, upper, advantage_clip, BLOCK: tl.constexpr
):  # fmt: skip
    """table: (5, B), the first four of `STATISTICS` and the derivative of the loss with respect to the log-ratio."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < batch_size
    difference = tl.load(log_prob + row, mask=inside, other=0).to(tl.float32)
    difference -= tl.load(old_log_prob + row, mask=inside, other=0).to(tl.float32)
    policy, derivative = clipped_policy(
        row, inside, batch_size, difference, difference, tl.load(advantage + row, mask=inside, other=0), lower, upper,
        advantage_clip, table,
    )  # fmt: skip
    tl.store(loss + row, policy, mask=inside)
    tl.store(table + 4 * batch_size + row, derivative, mask=inside)


def step_loss(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics from the arguments of `_step_loss`; differentiable in `velocity`."""
    loss, statistics, _ = step_loss_operation(*arguments)
    return loss, dict(zip(STATISTICS, statistics.unbind(), strict=False))


def policy_loss(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics from the arguments of `_policy_loss`; differentiable in `log_prob`."""
    loss, table = policy_loss_operation(*arguments)
    return loss, dict(zip(STATISTICS, (*table.unbind()[:4], loss.detach()), strict=False))


def _step_loss(
    velocity: Tensor, sample: Tensor, prev_sample: Tensor, c_x: Tensor, c_v: Tensor, std: Tensor, dt: Tensor,
    old_log_prob: Tensor, advantage: Tensor, reference: Tensor | None, old: Tensor | None, uncond: Tensor | None,
    guidance: float, lower: float, upper: float, advantage_clip: float, kl: str, kl_weight: float, normalised: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (B,), `STATISTICS` (5 or 6, B), and the factors a and k (2, B) of the gradient."""
    tensors, strides, size = dense_rows(velocity, uncond, old, reference, sample, prev_sample)
    batch_size = velocity.shape[0]
    block, num_blocks, warps = blocks(size)
    outputs = _step_loss_outputs(velocity, reference)
    c_x, *values = coefficients(c_x, c_v, std, dt, old_log_prob, advantage)
    rest = (batch_size, *outputs, *values, guidance, size, lower, upper, advantage_clip, kl_weight)
    variant = {"KL": "none" if reference is None else kl, "GUARD": old is not None, "NORMALISED": normalised}
    sums = outputs[0]
    if num_blocks > 1:
        sums = torch.empty(3 * batch_size * num_blocks, dtype=torch.float64, device=velocity.device)
    launch(
        loss_kernel, batch_size * num_blocks, velocity, *tensors, *strides, sums, num_blocks, c_x, *rest,
        **variant, ONE_BLOCK=num_blocks == 1, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if num_blocks > 1:
        launch(finish_kernel, batch_size, velocity, sums, num_blocks, *rest, **variant, num_warps=4)
    return outputs


def _step_loss_outputs(velocity: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(STATISTICS) if reference is not None else len(STATISTICS) - 1  # without a reference there is no KL
    batch_size, device = velocity.shape[0], velocity.device
    loss = torch.empty(batch_size, dtype=torch.float32, device=device)
    statistics = torch.empty(rows, batch_size, dtype=torch.float32, device=device)
    return loss, statistics, torch.empty(2, batch_size, dtype=torch.float32, device=device)


def _fake_step_loss(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _step_loss_outputs(velocity, rest[8])


def _keep_step_loss(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Any, ...]:
    velocity, sample, prev_sample, c_x, c_v, _, _, _, _, reference, old, uncond, guidance, *_, kl_weight, _ = inputs
    tensors = (velocity, uncond, old, reference)
    if kl_weight == 0:
        tensors = (velocity, uncond, None, None) if old is None else (old, None, None, None)
    return *tensors, sample, prev_sample, output[2], c_x, c_v, guidance, velocity.dtype


def _policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, lower: float, upper: float, advantage_clip: float
) -> tuple[Tensor, Tensor]:
    """The loss (B,), and the table (5, B) of `policy_kernel`."""
    batch_size = log_prob.numel()
    outputs = _fake_policy_loss(log_prob)
    launch(
        policy_kernel, -(-batch_size // 256), log_prob,
        log_prob.contiguous(), old_log_prob.contiguous(), advantage.contiguous(), *outputs, batch_size,
        lower, upper, advantage_clip, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return outputs


def _fake_policy_loss(log_prob: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape, device = log_prob.shape, log_prob.device
    table = torch.empty((5, *shape), dtype=torch.float32, device=device)
    return torch.empty(shape, dtype=torch.float32, device=device), table


def _keep_policy_loss(inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    return output[1], inputs[0].dtype


def _policy_loss_gradient(table: Tensor, dtype: torch.dtype, upstream: Tensor) -> Tensor:
    return (upstream * table[4]).to(dtype)


step_loss_operation = Operation("step_loss", _step_loss, _fake_step_loss, _keep_step_loss, velocity_gradient)
policy_loss_operation = Operation(
    "policy_loss", _policy_loss, _fake_policy_loss, _keep_policy_loss, _policy_loss_gradient
)
