"""Triton kernels of `grpo_step_loss`: one pass forward, one elementwise pass backward.

    d loss / d velocity = guidance_scale [a (prev_sample - mean) + k (v - v_ref)]
    a = -A ratio c_v / (std^2 D), 0 where the clip holds and at ODE steps; 2 c_v / D in place of c_v / (std^2 D) for the
        unnormalised log-prob
    k = 2 kl_weight kl_scale / D

Forward reads velocity, sample, prev_sample and, where given, velocity_uncond and velocity_ref, once each, and writes no
tensor of that size; backward reads the same, without velocity_ref if the KL has no weight, and writes the gradient.
Rows of more than `MAX_BLOCK` elements leave float64 sums per block, which a launch of one small program per row makes
into the loss. The gradient's kernel is that of `sde_step_triton`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflowgrpo.kernels.sde_step_triton import velocity_gradient
from fastflowgrpo.kernels.triton_rows import (
    as_rows,
    blocks,
    detached,
    is_eager,
    load_guided,
    load_row,
    on_device,
    per_row,
    register,
    row_log_prob,
    row_size,
    row_stride,
    row_value,
    shared_layout,
    step_mean,
    sum_partials,
    wrap_triton,
)

# Times those of the other kernels: with fewer, ptxas for sm_100 keeps to 40 registers and spills.
LOSS_WARPS = 2
STATISTICS = ("ratio", "log_prob_difference", "policy_loss", "clipped_above", "clipped_below", "kl")


@triton.jit
def finish_row(
    row, batch_size, distance, divergence, loss, table, c_v, std, dt, old_log_prob, advantage, size, lower, upper,
    advantage_clip, kl_weight, coefficient_stride, pair_stride, KL: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and gradient factors of a row from its sums."""
    slope = row_value(c_v, row, coefficient_stride)
    deviation = row_value(std, row, coefficient_stride)
    stochastic = deviation > 0
    log_prob = row_log_prob(distance, size, deviation, NORMALISED)
    difference = log_prob - tl.load(old_log_prob + row * pair_stride)
    ratio = tl.exp(difference)
    a = tl.load(advantage + row * pair_stride)
    bound = tl.full((), advantage_clip, tl.float32)
    a = tl.where(a > bound, bound, tl.where(a < -bound, -bound, a))
    low, high = tl.full((), lower, tl.float32), tl.full((), upper, tl.float32)
    above, below = (ratio > high) & (a > 0), (ratio < low) & (a < 0)
    policy = -a * tl.where(above, high, tl.where(below, low, ratio))
    square = tl.full((), 0.5, tl.float32)
    if NORMALISED:
        square = tl.where(stochastic, deviation * deviation, 1.0)
    moves = stochastic & ~(above | below)
    policy_factor = tl.where(moves, -a * ratio * slope / (square * size), 0.0)
    total = policy
    if KL != "none":
        scale = tl.full((), 1.0, tl.float32)
        if KL != "velocity":
            scale = slope / tl.where(stochastic, deviation, 1.0)
            scale = tl.where(stochastic, 0.5 * scale * scale, 0.0)
        if KL == "flow_grpo":
            scale = -row_value(dt, row, coefficient_stride) * scale
        kl = scale * (divergence / size).to(tl.float32)
        weight = tl.full((), kl_weight, tl.float32)
        total += weight * kl
        tl.store(table + 5 * batch_size + row, kl)
        tl.store(table + 7 * batch_size + row, 2 * weight * scale / size)
    tl.store(loss + row, total)
    tl.store(table + row, ratio)
    tl.store(table + batch_size + row, difference)
    tl.store(table + 2 * batch_size + row, policy)
    tl.store(table + 3 * batch_size + row, above.to(tl.float32))
    tl.store(table + 4 * batch_size + row, below.to(tl.float32))
    tl.store(table + 6 * batch_size + row, policy_factor)


@triton.jit
def loss_kernel(
    velocity,
    uncond,
    reference,
    sample,
    prev_sample,
    sums,
    loss,
    table,
    c_x,
    c_v,
    std,
    dt,
    old_log_prob,
    advantage,
    guidance,
    size,
    batch_size,
    num_blocks,
    lower,
    upper,
    advantage_clip,
    kl_weight,
    velocity_stride,
    uncond_stride,
    reference_stride,
    sample_stride,
    prev_sample_stride,
    coefficient_stride,
    pair_stride,
    KL: tl.constexpr,
    NORMALISED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums: float64 sums of each block, of squared distances to the mean, then of squared distances to v_ref."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    v = load_guided(velocity, uncond, guidance, row, velocity_stride, uncond_stride, start, size, BLOCK)
    x = load_row(sample, row, sample_stride, start, size, BLOCK)
    mean = step_mean(v, x, row_value(c_x, row, coefficient_stride), row_value(c_v, row, coefficient_stride))
    apart = load_row(prev_sample, row, prev_sample_stride, start, size, BLOCK) - mean
    # past the end of a row all that is loaded is 0, and so is the distance
    distance = tl.sum((apart * apart).to(tl.float64))
    divergence = distance * 0
    if KL != "none":
        apart = v - load_row(reference, row, reference_stride, start, size, BLOCK)
        divergence = tl.sum((apart * apart).to(tl.float64))
    if ONE_BLOCK:
        finish_row(
            row, batch_size, distance, divergence, loss, table, c_v, std, dt, old_log_prob, advantage, size, lower,
            upper, advantage_clip, kl_weight, coefficient_stride, pair_stride, KL, NORMALISED,
        )  # fmt: skip
    else:
        tl.store(sums + program, distance)
        if KL != "none":
            tl.store(sums + batch_size.to(tl.int64) * num_blocks + program, divergence)


@triton.jit
def finish_kernel(
    sums, loss, table, c_v, std, dt, old_log_prob, advantage, size, batch_size, num_blocks, lower, upper,
    advantage_clip, kl_weight, coefficient_stride, pair_stride, KL: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    distance = sum_partials(sums, row, num_blocks)
    divergence = distance * 0
    if KL != "none":
        divergence = sum_partials(sums, row + batch_size, num_blocks)
    finish_row(
        row, batch_size, distance, divergence, loss, table, c_v, std, dt, old_log_prob, advantage, size, lower, upper,
        advantage_clip, kl_weight, coefficient_stride, pair_stride, KL, NORMALISED,
    )  # fmt: skip


def step_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    dt: float | Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    reference: Tensor | None,
    uncond: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics, arguments as `grpo_step_loss` has them after its checks; differentiable in `velocity`."""
    needs_gradient = torch.is_grad_enabled() and velocity.requires_grad
    eager = is_eager(velocity, sample, prev_sample, reference, uncond, old_log_prob, advantage)
    constants: tuple[Any, ...] = (sample, prev_sample, c_x, c_v, std, dt, old_log_prob, advantage, reference, uncond)
    run = _step_loss
    if needs_gradient or not eager:
        coefficients = (as_rows(value, sample) for value in (c_x, c_v, std, dt))
        constants = detached(sample, prev_sample, *coefficients, old_log_prob, advantage, reference, uncond)
        run = _StepLoss.apply if eager else step_loss_op
    loss, table = run(velocity, *constants, *settings)
    # without a reference there is no KL
    return loss, dict(zip(STATISTICS if reference is not None else STATISTICS[:-1], table.unbind(), strict=False))


def _step_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    dt: float | Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    reference: Tensor | None,
    uncond: Tensor | None,
    guidance: float,
    lower: float,
    upper: float,
    advantage_clip: float,
    kl: str,
    kl_weight: float,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """The loss (B,) and the table (8, B): `STATISTICS`, then the factors a and k of the gradient."""
    velocity, uncond, reference, sample, prev_sample = shared_layout(velocity, uncond, reference, sample, prev_sample)
    batch_size, size = sample.shape[0], row_size(sample)
    block, num_blocks, warps = blocks(size)
    stride, c_x, c_v, std, dt = per_row(c_x, c_v, std, dt)
    pair_stride, old_log_prob, advantage = per_row(old_log_prob, advantage)
    table = torch.empty(8, batch_size, dtype=torch.float32, device=sample.device)
    loss = torch.empty(batch_size, dtype=torch.float32, device=sample.device)
    sums = loss
    if num_blocks > 1:
        sums = torch.empty(2 * batch_size * num_blocks, dtype=torch.float64, device=sample.device)
    kind = "none" if reference is None else kl
    with on_device(sample):
        wrap_triton(loss_kernel)[(batch_size * num_blocks,)](
            velocity,
            uncond,
            reference,
            sample,
            prev_sample,
            sums,
            loss,
            table,
            c_x,
            c_v,
            std,
            dt,
            old_log_prob,
            advantage,
            guidance,
            size,
            batch_size,
            num_blocks,
            lower,
            upper,
            advantage_clip,
            kl_weight,
            row_stride(velocity),
            row_stride(uncond),
            row_stride(reference),
            row_stride(sample),
            row_stride(prev_sample),
            stride,
            pair_stride,
            KL=kind,
            NORMALISED=normalised,
            ONE_BLOCK=num_blocks == 1,
            BLOCK=block,
            num_warps=LOSS_WARPS * warps,
        )
        if num_blocks > 1:
            wrap_triton(finish_kernel)[(batch_size,)](
                sums,
                loss,
                table,
                c_v,
                std,
                dt,
                old_log_prob,
                advantage,
                size,
                batch_size,
                num_blocks,
                lower,
                upper,
                advantage_clip,
                kl_weight,
                stride,
                pair_stride,
                KL=kind,
                NORMALISED=normalised,
                num_warps=4,
            )
    return loss, table


def _step_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    velocity, sample, prev_sample, c_x, c_v, _, _, _, _, reference, uncond, guidance, *_, kl_weight, _ = inputs
    table = output[1]
    ctx.mark_non_differentiable(table)
    ctx.save_for_backward(
        velocity, sample, prev_sample, c_x, c_v, reference if kl_weight else None, uncond, table[6], table[7]
    )
    ctx.guidance = guidance


def _step_loss_backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    velocity, sample, prev_sample, c_x, c_v, reference, uncond, policy_factor, kl_factor = ctx.saved_tensors
    gradient = velocity_gradient(
        velocity,
        uncond,
        reference,
        sample,
        prev_sample,
        policy_factor,
        kl_factor,
        upstream,
        c_x,
        c_v,
        ctx.guidance,
    )
    return gradient, *[None] * 17


class _StepLoss(torch.autograd.Function):
    """The gradient of `step_loss_op` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _step_loss(*inputs)
        _step_loss_context(ctx, inputs, output)
        return output

    backward = staticmethod(_step_loss_backward)


def _step_loss_operation(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    c_x: Tensor,
    c_v: Tensor,
    std: Tensor,
    dt: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    reference: Tensor | None,
    uncond: Tensor | None,
    guidance: float,
    lower: float,
    upper: float,
    advantage_clip: float,
    kl: str,
    kl_weight: float,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    return _step_loss(
        velocity, sample, prev_sample, c_x, c_v, std, dt, old_log_prob, advantage, reference, uncond, guidance, lower,
        upper, advantage_clip, kl, kl_weight, normalised,
    )  # fmt: skip


def _fake_step_loss(velocity: Tensor, sample: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = sample.new_empty(sample.shape[0], dtype=torch.float32)
    return rows, sample.new_empty(8, sample.shape[0], dtype=torch.float32)


step_loss_op = register("step_loss", _step_loss_operation, _fake_step_loss)
torch.library.register_autograd("fastflowgrpo::step_loss", _step_loss_backward, setup_context=_step_loss_context)
