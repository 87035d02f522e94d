"""The Triton kernel of d loss / d velocity, one elementwise pass for the step's log-prob and for the loss.

    gradient = upstream [a (prev_sample - mean) + k (v - v_ref)]

The forward pass leaves the factors a and k of each row, which include the guidance scale. The kernel reads each of its
tensors once and writes the gradient.
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
    empty_rows,
    load_guided,
    load_row,
    step_mean,
)

# Multiple of the other kernels' warps: with fewer, ptxas for sm_100 spills a register when all tensors are given.
GRADIENT_WARPS = 2


@triton.jit
def velocity_gradient_kernel(
    velocity, uncond, old, reference, sample, prev_sample, gradient,
    velocity_stride, uncond_stride, old_stride, reference_stride, sample_stride, prev_sample_stride, gradient_stride,
    factors, upstream, upstream_stride, c_x, c_v, guidance, size, batch_size, num_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """factors: (2, B), a and k. The mean is computed from `old` if it is given, else from v."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    v = load_guided(velocity, uncond, guidance, row, velocity_stride, uncond_stride, start, size, BLOCK)
    mean_velocity = v
    if old is not None:
        mean_velocity = load_row(old, row, old_stride, start, size, BLOCK)
    mean = step_mean(mean_velocity, sample, c_x, c_v, row, sample_stride, start, size, BLOCK)
    scale = tl.load(upstream + row * upstream_stride)
    distance = load_row(prev_sample, row, prev_sample_stride, start, size, BLOCK) - mean
    result = scale * tl.load(factors + row) * distance
    if reference is not None:
        shift = v - load_row(reference, row, reference_stride, start, size, BLOCK)
        result += scale * tl.load(factors + batch_size + row) * shift
    lanes = tl.arange(0, BLOCK)
    target = gradient + row * gradient_stride + start + lanes
    tl.store(target, result.to(gradient.dtype.element_ty), mask=lanes < size - start)


def _velocity_gradient(
    velocity: Tensor, uncond: Tensor | None, old: Tensor | None, reference: Tensor | None, sample: Tensor | None,
    prev_sample: Tensor, factors: Tensor, c_x: Tensor | None, c_v: Tensor | None, guidance: float, dtype: torch.dtype,
    upstream: Tensor,
) -> Tensor:  # fmt: skip
    tensors, strides, size = dense_rows(velocity, uncond, old, reference, sample, prev_sample)
    gradient = empty_rows(tensors[0], dtype)
    batch_size = velocity.shape[0]
    block, num_blocks, warps = blocks(size)
    launch(
        velocity_gradient_kernel, batch_size * num_blocks, gradient,
        *tensors, gradient, *strides, size, factors, upstream, upstream.stride(0), *coefficients(c_x, c_v), guidance,
        size, batch_size, num_blocks, BLOCK=block, num_warps=GRADIENT_WARPS * warps,
    )  # fmt: skip
    return gradient


def _fake_velocity_gradient(*arguments: Any) -> Tensor:
    return empty_rows(dense_rows(*arguments[:6])[0][0], arguments[-2])


velocity_gradient = Operation("velocity_gradient", _velocity_gradient, _fake_velocity_gradient)
