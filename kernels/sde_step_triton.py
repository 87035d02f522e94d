"""Triton kernels of `sde_step` and `gaussian_log_prob`: one pass draws and scores a step, or scores a given one.

Drawing reads velocity, sample and, if given, velocity_uncond and noise, once each, and writes the next sample. Scoring
reads prev_sample instead of noise and writes only the log-probs. The gradient (`velocity_gradient_triton`) reads the
same as scoring and writes one tensor. Rows of at most `MAX_BLOCK` elements need one launch. Longer rows leave a float64
sum per block, and a second launch with one small program per row adds these up in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflowgrpo.kernels.philox_triton import philox_normal
from fastflowgrpo.kernels.triton_operation import Operation, launch
from fastflowgrpo.kernels.triton_rows import (
    blocks,
    coefficients,
    dense_rows,
    empty_rows,
    load_guided,
    load_row,
    log_prob_slope,
    row_log_prob,
    row_value,
    step_mean,
    sum_partials,
)
from fastflowgrpo.kernels.velocity_gradient_triton import velocity_gradient


@triton.jit(do_not_specialize=["offset"])
def step_kernel(
    velocity, uncond, sample, noise, prev_sample,
    velocity_stride, uncond_stride, sample_stride, noise_stride, prev_sample_stride,
    seed, offset, sums, factor, c_x, c_v, std, guidance, size, num_blocks,
    DRAW: tl.constexpr, NORMALISED: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums: the log-prob of each row if ONE_BLOCK, else the float64 sum of squared distances of each block."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    v = load_guided(velocity, uncond, guidance, row, velocity_stride, uncond_stride, start, size, BLOCK)
    mean = step_mean(v, sample, c_x, c_v, row, sample_stride, start, size, BLOCK)
    deviation = row_value(std, row)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < size - start
    if DRAW:
        drawn = mean
        if seed is not None:
            n = philox_normal(tl.load(seed + row), row_value(offset, row), start, BLOCK)
            drawn = tl.fma(tl.full(n.shape, deviation, tl.float32), n, mean)
        elif noise is not None:
            n = load_row(noise, row, noise_stride, start, size, BLOCK)
            drawn = tl.fma(tl.full(n.shape, deviation, tl.float32), n, mean)
        stored = drawn.to(prev_sample.dtype.element_ty)
        tl.store(prev_sample + row * prev_sample_stride + start + lanes, stored, mask=inside)
        distance = stored.to(tl.float32) - mean
    else:
        distance = load_row(prev_sample, row, prev_sample_stride, start, size, BLOCK) - mean
    total = tl.sum(tl.where(inside, distance * distance, 0.0).to(tl.float64))
    if factor is not None:
        slope = log_prob_slope(size, deviation, NORMALISED)
        if sample is not None:
            slope *= row_value(c_v, row)
        if uncond is not None:
            slope *= tl.full((), guidance, tl.float32)
        tl.store(factor + row, slope, mask=start == 0)
    if ONE_BLOCK:
        tl.store(sums + row, row_log_prob(total, size, deviation, NORMALISED))
    else:
        tl.store(sums + program, total)


@triton.jit
def log_prob_kernel(sums, log_prob, std, size, num_blocks, NORMALISED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = sum_partials(sums, row, num_blocks)
    deviation = row_value(std, row)
    tl.store(log_prob + row, row_log_prob(total, size, deviation, NORMALISED))


def _step(
    tensors: Any, strides: Any, size: int, coefficient: Any, guidance: float, normalised: bool,
    seed: Tensor | None, offset: Tensor | None, factor: Tensor | None, draws: bool,
) -> Tensor:  # fmt: skip
    velocity = tensors[0]
    batch_size, device = velocity.shape[0], velocity.device
    block, num_blocks, warps = blocks(size)
    log_prob = torch.empty(batch_size, dtype=torch.float32, device=device)
    sums = log_prob
    if num_blocks > 1:
        sums = torch.empty(batch_size * num_blocks, dtype=torch.float64, device=device)
    launch(
        step_kernel, batch_size * num_blocks, velocity,
        *tensors, *strides, seed, offset, sums, factor, *coefficient, guidance, size, num_blocks,
        DRAW=draws, NORMALISED=normalised, ONE_BLOCK=num_blocks == 1, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if num_blocks > 1:
        launch(
            log_prob_kernel, batch_size, velocity,
            sums, log_prob, coefficient[2], size, num_blocks, NORMALISED=normalised, num_warps=4,
        )  # fmt: skip
    return log_prob


def _draw(
    velocity: Tensor, sample: Tensor, c_x: Tensor, c_v: Tensor, std: Tensor, uncond: Tensor | None,
    guidance: float, normalised: bool, noise: Tensor | None, seed: Tensor | None, offset: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # the noise of a seed depends on an element's logical index, not on its place in memory
    tensors, strides, size = dense_rows(velocity, uncond, sample, noise, logical=seed is not None)
    prev_sample = empty_rows(tensors[2], dtype)
    if seed is not None:
        seed, offset = seed.contiguous(), offset.contiguous() if isinstance(offset, Tensor) else offset
    tensors, strides = (*tensors, prev_sample), (*strides, size)
    rows = coefficients(c_x, c_v, std)
    return prev_sample, _step(tensors, strides, size, rows, guidance, normalised, seed, offset, None, True)


def _score(
    velocity: Tensor, sample: Tensor | None, c_x: Tensor | None, c_v: Tensor | None, std: Tensor,
    uncond: Tensor | None, guidance: float, normalised: bool, prev_sample: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The log-prob (B,), and the factor (B,) of its gradient."""
    tensors, strides, size = dense_rows(velocity, uncond, sample, None, prev_sample)
    factor = torch.empty(velocity.shape[0], dtype=torch.float32, device=velocity.device)
    rows = coefficients(c_x, c_v, std)
    return _step(tensors, strides, size, rows, guidance, normalised, None, None, factor, False), factor


def _fake_draw(velocity: Tensor, sample: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, uncond, _, _, noise, seed, _, dtype = rest
    tensors, _, _ = dense_rows(velocity, uncond, sample, noise, logical=seed is not None)
    return empty_rows(tensors[2], dtype), _fake_score(velocity)[0]


def _fake_score(velocity: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    log_prob = velocity.new_empty(velocity.shape[0], dtype=torch.float32)
    return log_prob, torch.empty_like(log_prob)


def _keep_score(inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    velocity, sample, c_x, c_v, _, uncond, guidance, _, prev_sample = inputs
    return velocity, uncond, None, None, sample, prev_sample, output[1], c_x, c_v, guidance, velocity.dtype


draw_step = Operation("draw_step", _draw, _fake_draw)
score_step = Operation("score_step", _score, _fake_score, _keep_score, velocity_gradient)
