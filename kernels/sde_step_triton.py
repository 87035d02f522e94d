"""Triton kernels of `sde_step`: one pass draws and scores a step, or scores a given one.

Drawing reads velocity, sample and, where given, velocity_uncond and noise, once each, and writes the next sample;
scoring reads prev_sample in place of noise and writes nothing; the gradient reads what the scoring reads, and writes
one tensor. A row of at most `MAX_BLOCK` elements is one launch; longer ones leave a float64 sum per block, which a
launch of one small program per row adds up in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflowgrpo.kernels.triton_rows import (
    as_rows,
    blocks,
    contiguous,
    detached,
    empty_rows,
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


@triton.jit
def box_muller(a, b):
    """Two standard normals from two words of 32 bits, as `philox.box_muller`.

    Triton's sine and cosine keep an argument reduction in local memory; the angle is a fraction of a turn here, so its
    upper bits are the quadrant and a polynomial (Cephes) does for the rest.
    """
    uniform = tl.fma(a.to(tl.float32), tl.full(a.shape, 2.0**-32, tl.float32), 2.0**-33)
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    turned = b + 0x20000000
    quadrant = turned >> 30
    t = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.4629180792671596e-09
    z = t * t
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * t + t
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x, y = tl.where(((quadrant + 1) & 2) != 0, -x, x), tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def philox_normal(seed, offset, start, BLOCK: tl.constexpr):
    """Noise of elements start, ..., start + BLOCK - 1 of the row with this seed; start is a multiple of 4."""
    index = start // 4 + tl.arange(0, BLOCK // 4)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    offset = tl.full(index.shape, offset, tl.int64)
    a, b, c, d = tl.philox(seed, low, high, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit(do_not_specialize=["offset"])
def step_kernel(
    velocity,
    uncond,
    sample,
    noise,
    seed,
    offset,
    prev_sample,
    sums,
    c_x,
    c_v,
    std,
    guidance,
    size,
    num_blocks,
    velocity_stride,
    uncond_stride,
    sample_stride,
    noise_stride,
    prev_sample_stride,
    coefficient_stride,
    seed_stride,
    offset_stride,
    DRAW: tl.constexpr,
    NORMALISED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums: log-prob of each row if ONE_BLOCK, else float64 sums of squared distances of each block."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    v = load_guided(velocity, uncond, guidance, row, velocity_stride, uncond_stride, start, size, BLOCK)
    x = load_row(sample, row, sample_stride, start, size, BLOCK)
    deviation = row_value(std, row, coefficient_stride)
    mean = step_mean(v, x, row_value(c_x, row, coefficient_stride), row_value(c_v, row, coefficient_stride))
    lanes = tl.arange(0, BLOCK)
    inside = lanes < size - start
    if DRAW:
        drawn = mean
        if seed is not None:
            key = tl.load(seed + row * seed_stride)
            n = philox_normal(key, row_value(offset, row, offset_stride), start, BLOCK)
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
    if ONE_BLOCK:
        tl.store(sums + row, row_log_prob(total, size, deviation, NORMALISED))
    else:
        tl.store(sums + program, total)


@triton.jit
def log_prob_kernel(sums, log_prob, std, size, num_blocks, coefficient_stride, NORMALISED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = sum_partials(sums, row, num_blocks)
    deviation = row_value(std, row, coefficient_stride)
    tl.store(log_prob + row, row_log_prob(total, size, deviation, NORMALISED))


@triton.jit
def velocity_gradient_kernel(
    velocity,
    uncond,
    reference,
    sample,
    prev_sample,
    gradient,
    policy_factor,
    kl_factor,
    upstream,
    c_x,
    c_v,
    guidance,
    size,
    num_blocks,
    velocity_stride,
    uncond_stride,
    reference_stride,
    sample_stride,
    prev_sample_stride,
    gradient_stride,
    coefficient_stride,
    upstream_stride,
    BLOCK: tl.constexpr,
):
    """upstream guidance [policy_factor (prev_sample - mean) + kl_factor (v - v_ref)], without v_ref the first term."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    v = load_guided(velocity, uncond, guidance, row, velocity_stride, uncond_stride, start, size, BLOCK)
    x = load_row(sample, row, sample_stride, start, size, BLOCK)
    mean = step_mean(v, x, row_value(c_x, row, coefficient_stride), row_value(c_v, row, coefficient_stride))
    factor = tl.load(upstream + row * upstream_stride)
    if uncond is not None:
        factor *= tl.full((), guidance, tl.float32)
    distance = load_row(prev_sample, row, prev_sample_stride, start, size, BLOCK) - mean
    result = factor * tl.load(policy_factor + row) * distance
    if reference is not None:
        v_ref = load_row(reference, row, reference_stride, start, size, BLOCK)
        result += factor * tl.load(kl_factor + row) * (v - v_ref)
    lanes = tl.arange(0, BLOCK)
    target = gradient + row * gradient_stride + start + lanes
    tl.store(target, result.to(gradient.dtype.element_ty), mask=lanes < size - start)


def draw(
    noise: Tensor | None,
    seed: Tensor | None,
    offset: int | Tensor,
    dtype: torch.dtype,
    velocity: Tensor,
    sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    uncond: Tensor | None,
    guidance: float,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """The next sample and its log-prob, arguments as `sde_step` has them after its checks."""
    # the graph of a drawn sample is that of scoring it
    needs_gradient = torch.is_grad_enabled() and velocity.requires_grad
    if is_eager(velocity, sample, uncond, noise, seed):
        prev_sample, log_prob = _draw(
            velocity, sample, c_x, c_v, std, uncond, guidance, noise, seed, offset, dtype, normalised
        )
    else:
        prev_sample, log_prob = draw_op(
            *detached(velocity, sample),
            *(as_rows(value, sample) for value in (c_x, c_v, std)),
            *detached(uncond),
            guidance,
            noise,
            seed,
            None if seed is None else as_rows(offset, sample, torch.int64),
            dtype,
            normalised,
        )
    if needs_gradient:
        log_prob = score(prev_sample, velocity, sample, c_x, c_v, std, uncond, guidance, normalised)
    return prev_sample, log_prob


def score(
    prev_sample: Tensor,
    velocity: Tensor,
    sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    uncond: Tensor | None,
    guidance: float,
    normalised: bool,
) -> Tensor:
    """Log-prob of a step, differentiable in `velocity`, arguments as `sde_step` has them after its checks."""
    needs_gradient = torch.is_grad_enabled() and velocity.requires_grad
    eager = is_eager(prev_sample, velocity, sample, uncond)
    if eager and not needs_gradient:
        return _score(velocity, sample, prev_sample, c_x, c_v, std, uncond, guidance, normalised)
    rows = (as_rows(value, sample) for value in (c_x, c_v, std))
    constants = detached(sample, prev_sample)
    run = _Score.apply if eager else score_op
    return run(velocity, *constants, *rows, *detached(uncond), guidance, normalised)


def velocity_gradient(*arguments: Any) -> Tensor:
    """d loss / d velocity in one pass, see `velocity_gradient_kernel`; it has no derivative of its own."""
    velocity, uncond, reference, sample, prev_sample = arguments[:5]
    if is_eager(velocity, uncond, reference, sample, prev_sample) and not torch.is_grad_enabled():
        return _velocity_gradient(*arguments)
    return velocity_gradient_op(*arguments)


def _draw(
    velocity: Tensor,
    sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: int | Tensor | None,
    dtype: torch.dtype,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    velocity, sample, uncond, noise = _draw_layout(velocity, sample, uncond, noise, seed)
    prev_sample = empty_rows(sample, dtype)
    log_prob = _launch_step(
        velocity, sample, prev_sample, c_x, c_v, std, uncond, guidance, noise, seed, offset, True, normalised
    )
    return prev_sample, log_prob


def _score(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    uncond: Tensor | None,
    guidance: float,
    normalised: bool,
) -> Tensor:
    velocity, sample, prev_sample, uncond = shared_layout(velocity, sample, prev_sample, uncond)
    return _launch_step(
        velocity, sample, prev_sample, c_x, c_v, std, uncond, guidance, None, None, None, False, normalised
    )


def _launch_step(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: int | Tensor | None,
    draws: bool,
    normalised: bool,
) -> Tensor:
    batch_size, size = sample.shape[0], row_size(sample)
    block, num_blocks, warps = blocks(size)
    stride, c_x, c_v, std = per_row(c_x, c_v, std)
    log_prob = torch.empty(batch_size, dtype=torch.float32, device=sample.device)
    sums = log_prob
    if num_blocks > 1:
        sums = torch.empty(batch_size * num_blocks, dtype=torch.float64, device=sample.device)
    with on_device(sample):
        wrap_triton(step_kernel)[(batch_size * num_blocks,)](
            velocity,
            uncond,
            sample,
            noise,
            seed,
            offset,
            prev_sample,
            sums,
            c_x,
            c_v,
            std,
            guidance,
            size,
            num_blocks,
            row_stride(velocity),
            row_stride(uncond),
            row_stride(sample),
            row_stride(noise),
            row_stride(prev_sample),
            stride,
            row_stride(seed),
            offset.stride(0) if isinstance(offset, Tensor) else 0,
            DRAW=draws,
            NORMALISED=normalised,
            ONE_BLOCK=num_blocks == 1,
            BLOCK=block,
            num_warps=warps,
        )
        if num_blocks > 1:
            wrap_triton(log_prob_kernel)[(batch_size,)](
                sums, log_prob, std, size, num_blocks, stride, NORMALISED=normalised, num_warps=4
            )
    return log_prob


def _velocity_gradient(
    velocity: Tensor,
    uncond: Tensor | None,
    reference: Tensor | None,
    sample: Tensor,
    prev_sample: Tensor,
    policy_factor: Tensor,
    kl_factor: Tensor,
    upstream: Tensor,
    c_x: Tensor,
    c_v: Tensor,
    guidance: float,
) -> Tensor:
    velocity, uncond, reference, sample, prev_sample = shared_layout(velocity, uncond, reference, sample, prev_sample)
    gradient = empty_rows(velocity, velocity.dtype)
    batch_size, size = sample.shape[0], row_size(sample)
    block, num_blocks, warps = blocks(size)
    stride, c_x, c_v = per_row(c_x, c_v)
    with on_device(sample):
        wrap_triton(velocity_gradient_kernel)[(batch_size * num_blocks,)](
            velocity,
            uncond,
            reference,
            sample,
            prev_sample,
            gradient,
            policy_factor,
            kl_factor,
            upstream,
            c_x,
            c_v,
            guidance,
            size,
            num_blocks,
            row_stride(velocity),
            row_stride(uncond),
            row_stride(reference),
            row_stride(sample),
            row_stride(prev_sample),
            row_stride(gradient),
            stride,
            upstream.stride(0),
            BLOCK=block,
            num_warps=warps,
        )
    return gradient


def _draw_layout(
    velocity: Tensor, sample: Tensor, uncond: Tensor | None, noise: Tensor | None, seed: Tensor | None
) -> tuple[Any, ...]:
    # the noise of a seed goes by the index of an element, not by its place in memory
    return (shared_layout if seed is None else contiguous)(velocity, sample, uncond, noise)


def _score_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.guidance, ctx.normalised = inputs
    ctx.save_for_backward(*tensors)


def _score_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    velocity, sample, prev_sample, c_x, c_v, std, uncond = ctx.saved_tensors
    slope = std.square().reciprocal() if ctx.normalised else 2.0
    factor = torch.where(std > 0, c_v * slope / row_size(sample), 0.0)
    gradient = velocity_gradient(
        velocity, uncond, None, sample, prev_sample, factor, factor, upstream, c_x, c_v, ctx.guidance
    )
    return gradient, *[None] * 8


class _Score(torch.autograd.Function):
    """The gradient of `score_op` without the dispatcher."""

    # setup_context of its own would bind the signature anew in every call, for 100 microseconds
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _score(*inputs)
        _score_context(ctx, inputs, output)
        return output

    backward = staticmethod(_score_backward)


def _draw_operation(
    velocity: Tensor,
    sample: Tensor,
    c_x: Tensor,
    c_v: Tensor,
    std: Tensor,
    uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    return _draw(velocity, sample, c_x, c_v, std, uncond, guidance, noise, seed, offset, dtype, normalised)


def _score_operation(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    c_x: Tensor,
    c_v: Tensor,
    std: Tensor,
    uncond: Tensor | None,
    guidance: float,
    normalised: bool,
) -> Tensor:
    return _score(velocity, sample, prev_sample, c_x, c_v, std, uncond, guidance, normalised)


def _fake_draw(
    velocity: Tensor, sample: Tensor, c_x: Any, c_v: Any, std: Any, uncond: Any, guidance: Any, noise: Any, seed: Any,
    offset: Any, dtype: torch.dtype, normalised: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, sample, _, _ = _draw_layout(velocity, sample, uncond, noise, seed)
    return empty_rows(sample, dtype), _fake_score(sample)


def _fake_score(tensor: Tensor, *_: Any) -> Tensor:
    return tensor.new_empty(tensor.shape[0], dtype=torch.float32)


def _fake_velocity_gradient(
    velocity: Tensor, uncond: Any, reference: Any, sample: Tensor, prev_sample: Tensor, *_: Any
) -> Tensor:
    velocity = shared_layout(velocity, uncond, reference, sample, prev_sample)[0]
    return empty_rows(velocity, velocity.dtype)


def _no_second_derivative(ctx: Any, *upstream: Any) -> None:
    raise RuntimeError('Triton\'s step and loss have no second derivative: use backend="reference"')


draw_op = register("draw_step", _draw_operation, _fake_draw)
score_op = register("score_step", _score_operation, _fake_score)
torch.library.register_autograd("fastflowgrpo::score_step", _score_backward, setup_context=_score_context)
velocity_gradient_op = register("velocity_gradient", _velocity_gradient, _fake_velocity_gradient)
torch.library.register_autograd("fastflowgrpo::velocity_gradient", _no_second_derivative)
