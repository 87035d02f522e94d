"""One denoising step of a stochastic flow-matching sampler, and its log-prob.

    v         = velocity_uncond + guidance_scale (velocity - velocity_uncond)
    mean      = c_x sample + c_v v
    x_next    = round(mean + std noise)                                        to the storage dtype
    log_prob  = mean over elements of [-(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2]     "normalised"
    log_prob  = mean over elements of  -(x_next - mean)^2                                            "unnormalised"

Source: Flow-GRPO (arXiv 2505.05470); like its code, the log-prob is the mean over elements and not the sum. The
coefficients come from `fastflowgrpo.sampling.coefficients`. Everything is computed in float32 (float64 if an input is)
whatever the storage dtype. The log-prob is computed for the rounded sample, because that one is stored.

This file has the public functions and the reference in plain torch; `sde_step_triton` has the Triton kernels.
"""

import math
from typing import Any

import torch

from fastflowgrpo.kernels.backend import use_triton
from fastflowgrpo.kernels.philox import philox_normal

LOG_PROBS = ("normalised", "unnormalised")


def sde_step(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    c_x: float | torch.Tensor,
    c_v: float | torch.Tensor,
    std: float | torch.Tensor,
    *,
    velocity_uncond: torch.Tensor | None = None,
    guidance_scale: float | torch.Tensor = 1.0,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    prev_sample: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    log_prob: str = "normalised",
    seed: torch.Tensor | None = None,
    offset: int | torch.Tensor = 0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the next sample and scores it, or scores a given one; see the module for the equations.

    The log-prob is differentiable in `velocity`. A drawn sample is a constant, as a policy gradient needs it.

    Args:
        velocity: (B, ...), the model's output; with guidance, the output of the conditional branch.
        sample: (B, ...), the current sample.
        c_x, c_v, std: coefficients of the step, a number or one per row, float32 (B,). A row with std == 0 is an ODE
            step: the next sample is the mean and the log-prob is 0. The number 0 draws no noise at all.
        velocity_uncond: (B, ...), the unconditional branch; it carries no gradient.
        guidance_scale: classifier-free guidance scale, a number, or one per row, (B,), which plain torch applies.
        noise: (B, ...), standard normal; by default it is drawn in the compute dtype.
        generator: draws the noise, on the sample's device; by default torch's default generator.
        prev_sample: (B, ...), the next sample to score instead of drawing one; it is returned unchanged.
        dtype: storage dtype of the drawn sample, by default the dtype of `sample`.
        log_prob: "normalised" or "unnormalised".
        seed: int64 (B,), on the sample's device. The noise of a row then depends on its seed and offset only, and is
            the same on every backend (`fastflowgrpo.kernels.philox`). Triton draws it inside the kernel.
        offset: a number or int64 (B,), such as the index of the step: one seed gives other noise at another offset.
        backend: "auto", "reference" or "triton", see `choose_backend`. The reference computes float64.

    Returns:
        prev_sample (B, ...), and log_prob (B,) in float32, or float64 if `velocity` or `sample` is.

    Raises:
        ValueError: shapes differ, guidance lacks its branch, more than one of noise, generator, prev_sample and seed
            is given, or the backend cannot compute this.
    """
    if (noise is not None) + (generator is not None) + (prev_sample is not None) + (seed is not None) > 1:
        raise ValueError("seed, noise, generator and prev_sample exclude each other: give at most one of them")
    check_shapes(sample, velocity=velocity, velocity_uncond=velocity_uncond, noise=noise, prev_sample=prev_sample)
    if seed is not None:
        check_seeds(seed, offset, sample.shape[0])
    if isinstance(guidance_scale, torch.Tensor):
        velocity = guided_velocity(velocity, velocity_uncond, guidance_scale)
        velocity_uncond, guidance_scale = None, 1.0
    if use_triton(backend, velocity, sample, velocity_uncond, noise, prev_sample, dtype):
        check_guidance(velocity_uncond, guidance_scale)
        check_log_prob(log_prob)
        for name, value in (("c_x", c_x), ("c_v", c_v), ("std", std)):
            check_per_row(value, sample.shape[0], name)
        step = (velocity, sample, c_x, c_v, std, velocity_uncond, float(guidance_scale), log_prob == "normalised")
        return _triton_step(step, noise, generator, prev_sample, seed, offset, dtype or sample.dtype)
    mean = step_mean(guided_velocity(velocity, velocity_uncond, guidance_scale), sample, c_x, c_v)
    if prev_sample is None:
        prev_sample = _reference_draw(mean, std, noise, generator, seed, offset).to(dtype or sample.dtype)
    return prev_sample, gaussian_log_prob(prev_sample, mean, std, log_prob, backend="reference")


def _reference_draw(
    mean: torch.Tensor,
    std: float | torch.Tensor,
    noise: torch.Tensor | None,
    generator: torch.Generator | None,
    seed: torch.Tensor | None,
    offset: int | torch.Tensor,
) -> torch.Tensor:
    """The next sample in the dtype of `mean`, without gradient."""
    if not isinstance(std, torch.Tensor) and std == 0:
        return mean.detach()
    if seed is not None:
        noise = philox_normal(seed, offset, mean.shape, mean.dtype)
    elif noise is None:
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean.detach() + per_row(std, mean, "std") * noise


def _triton_step(
    step: tuple[Any, ...],
    noise: torch.Tensor | None,
    generator: torch.Generator | None,
    prev_sample: torch.Tensor | None,
    seed: torch.Tensor | None,
    offset: int | torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws or scores with the kernels; `step` holds the arguments that drawing and scoring share."""
    from fastflowgrpo.kernels.sde_step_triton import draw_step, score_step

    if prev_sample is not None:
        return prev_sample, score_step(*step, prev_sample)[0]
    velocity, sample, _, _, std, *_ = step
    if noise is None and seed is None and (isinstance(std, torch.Tensor) or std != 0):
        noise = torch.randn(sample.shape, generator=generator, dtype=torch.float32, device=sample.device)
    drawn, log_prob = draw_step(*step, noise, seed, None if seed is None else offset, dtype)
    if torch.is_grad_enabled() and velocity.requires_grad:
        # drawing has no gradient: score the sample that was drawn
        log_prob = score_step(*step, drawn)[0]
    return drawn, log_prob


def gaussian_log_prob(
    prev_sample: torch.Tensor,
    mean: torch.Tensor,
    std: float | torch.Tensor,
    log_prob: str = "normalised",
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Log-prob per element of each row of `prev_sample` under N(mean, std^2 I), 0 where std == 0.

    Args:
        prev_sample: (B, ...), any float dtype.
        mean: (B, ...).
        std: a number or (B,).
        log_prob: "normalised" or "unnormalised", see the module.
        backend: "auto", "reference" or "triton", see `choose_backend`. Triton is differentiable once, in `mean` only;
            the reference computes float64 and the gradients of `prev_sample` and `std`.

    Returns:
        (B,), float32, or float64 if `mean` or `prev_sample` is.

    Raises:
        ValueError: shapes differ, the log-prob is unknown, or the backend cannot compute this.
    """
    check_log_prob(log_prob)
    check_shapes(mean, prev_sample=prev_sample)
    if use_triton(backend, mean, prev_sample, constants={"prev_sample": prev_sample, "std": std}):
        from fastflowgrpo.kernels.sde_step_triton import score_step

        check_per_row(std, mean.shape[0], "std")
        return score_step(mean, None, None, None, std, None, 1.0, log_prob == "normalised", prev_sample)[0]
    dtype = compute_dtype(mean, prev_sample)
    squared_distance = (prev_sample.to(dtype) - mean.to(dtype)).square().flatten(1).mean(1)
    deviation = per_row(std, squared_distance, "std")
    stochastic = deviation > 0
    if log_prob == "unnormalised":
        value = -squared_distance
    else:
        # 1 instead of 0 keeps the gradient of the masked rows finite
        deviation = torch.where(stochastic, deviation, 1.0)
        value = -squared_distance / (2 * deviation.square()) - deviation.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(stochastic, value, 0.0)


def guided_velocity(
    velocity: torch.Tensor, velocity_uncond: torch.Tensor | None, guidance_scale: float | torch.Tensor
) -> torch.Tensor:
    """Classifier-free guidance in the compute dtype, by a number or one per row, (B,); only `velocity` (the conditional
    branch) carries gradient."""
    check_guidance(velocity_uncond, guidance_scale)
    velocity = velocity.to(compute_dtype(velocity))
    if velocity_uncond is None:
        return velocity
    uncond = velocity_uncond.detach().to(velocity.dtype)
    if isinstance(guidance_scale, torch.Tensor):
        guidance_scale = per_row(guidance_scale, velocity, "guidance_scale")
    return uncond + guidance_scale * (velocity - uncond)


def step_mean(
    velocity: torch.Tensor, sample: torch.Tensor, c_x: float | torch.Tensor, c_v: float | torch.Tensor
) -> torch.Tensor:
    """Mean of the next sample, c_x sample + c_v velocity, in the compute dtype."""
    dtype = compute_dtype(velocity, sample)
    sample, velocity = sample.to(dtype), velocity.to(dtype)
    return per_row(c_x, sample, "c_x") * sample + per_row(c_v, velocity, "c_v") * velocity


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if one of the tensors has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def per_row(value: float | torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """A number, or one number per row, as a tensor (B, 1, ...) with the dtype and device of `like`."""
    batch_size = like.shape[0]
    check_per_row(value, batch_size, name)
    if not isinstance(value, torch.Tensor):
        value = torch.full((batch_size,), value, dtype=like.dtype, device=like.device)
    return value.to(like.dtype).reshape(batch_size, *[1] * (like.ndim - 1))


def check_shapes(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless `like` is a float tensor (B, ...) and every other tensor, if given, has its shape."""
    if like.ndim < 2:
        raise ValueError(f"samples have shape {tuple(like.shape)}: give a batch, shape (B, ...)")
    shape, floating = like.shape, like.is_floating_point()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the sample has {tuple(shape)}")
        if not (floating and tensor.is_floating_point()):
            raise ValueError(f"{name} is {tensor.dtype} for a sample in {like.dtype}: both must be floating point")


def check_per_row(value: float | torch.Tensor, batch_size: int, name: str) -> None:
    """Raises ValueError unless `value` is a number or one per row."""
    if isinstance(value, torch.Tensor) and value.shape != (batch_size,):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: give a number or one value per row, shape ({batch_size},)"
        )


def check_seeds(seed: torch.Tensor, offset: int | torch.Tensor, batch_size: int) -> None:
    """Raises ValueError unless `seed` is int64 (B,) and `offset` is a number or int64 (B,)."""
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, torch.Tensor) and (value.shape != (batch_size,) or value.dtype != torch.int64):
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}: give one int64 per row, shape ({batch_size},)"
            )


def check_guidance(velocity_uncond: torch.Tensor | None, guidance_scale: float | torch.Tensor) -> None:
    """Raises ValueError for guidance without its unconditional branch."""
    if velocity_uncond is None and (isinstance(guidance_scale, torch.Tensor) or guidance_scale != 1):
        raise ValueError(f"guidance_scale {guidance_scale} needs velocity_uncond, the unconditional branch")


def check_log_prob(log_prob: str) -> None:
    """Raises ValueError unless `log_prob` is one of `LOG_PROBS`."""
    if log_prob not in LOG_PROBS:
        raise ValueError(f"unknown log_prob {log_prob!r}: choose one of {', '.join(LOG_PROBS)}")
