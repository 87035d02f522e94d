"""One denoising step of a stochastic flow-matching sampler, and its log-prob.

    v         = velocity_uncond + guidance_scale (velocity - velocity_uncond)
    mean      = c_x sample + c_v v
    x_next    = round(mean + std noise)                                        to the storage dtype
    log_prob  = mean over elements of [-(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2]

Flow-GRPO (arXiv 2505.05470), with the mean over elements of its code in place of the sum; the coefficients come from
`fastflowgrpo.sde`. What is scored is what is stored: the log-prob is that of the rounded sample.

Here are the public functions and the reference in plain torch; the Triton kernels are in `sde_step_triton`.
"""

import math

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
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    prev_sample: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    log_prob: str = "normalised",
    seed: torch.Tensor | None = None,
    offset: int | torch.Tensor = 0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the next sample and scores it, or scores the given one.

    Computed in float32 (float64 if velocity or sample is) whatever the storage dtype. The log-prob is differentiable in
    `velocity`; a drawn sample is a constant, so its log-prob has the gradient that a policy gradient needs.

    Args:
        velocity: (B, ...), the model's output, of the conditional branch if there is guidance.
        sample: (B, ...), the current sample.
        c_x, c_v, std: coefficients of the step, a number or one per row, float32 (B,). In rows with std == 0 (ODE) the
            next sample is the mean and the log-prob 0; a number 0 draws no noise at all.
        velocity_uncond: (B, ...), the unconditional branch; it carries no gradient.
        guidance_scale: classifier-free guidance scale.
        noise: (B, ...), standard normal; drawn in the compute dtype by default.
        generator: draws the noise, on the sample's device; torch's default generator if None.
        prev_sample: (B, ...), the next sample to score instead of drawing one; returned as it is.
        dtype: storage dtype of the drawn sample; that of `sample` by default.
        log_prob: "normalised" as above, or "unnormalised": mean over elements of -(x_next - mean)^2.
        seed: int64 (B,), on the sample's device: the noise of a row is a function of its seed and offset alone, the
            same on every backend (`fastflowgrpo.kernels.philox`), and Triton draws it inside the kernel.
        offset: tells the noises of one seed apart, for example the index of the step; a number or int64 (B,).
        backend: "auto", "reference" or "triton", see `choose_backend`; float64 is computed by the reference.

    Returns:
        prev_sample (B, ...) and log_prob (B,) in the compute dtype.

    Raises:
        ValueError: for shapes that differ, guidance without its branch, more than one of noise, generator, prev_sample
            and seed, or a backend that cannot run it.
    """
    if (noise is not None) + (generator is not None) + (prev_sample is not None) + (seed is not None) > 1:
        raise ValueError("seed, noise, generator and prev_sample exclude each other: give at most one of them")
    check_like(sample, velocity=velocity, velocity_uncond=velocity_uncond, noise=noise, prev_sample=prev_sample)
    batch_size = sample.shape[0]
    if seed is not None:
        check_seeds(seed, offset, batch_size)
    if use_triton(backend, velocity, sample, velocity_uncond, noise, prev_sample, dtype):
        from fastflowgrpo.kernels.sde_step_triton import draw_step, score_step

        check_guidance(velocity_uncond, guidance_scale)
        check_log_prob(log_prob)
        for name, value in (("c_x", c_x), ("c_v", c_v), ("std", std)):
            check_row(value, batch_size, name)
        step = (velocity, sample, c_x, c_v, std, velocity_uncond, float(guidance_scale), log_prob == "normalised")
        if prev_sample is not None:
            return prev_sample, score_step(*step, prev_sample)[0]
        if noise is None and seed is None and (isinstance(std, torch.Tensor) or std != 0):
            noise = torch.randn(sample.shape, generator=generator, dtype=torch.float32, device=sample.device)
        drawn, value = draw_step(*step, noise, seed, None if seed is None else offset, dtype or sample.dtype)
        if torch.is_grad_enabled() and velocity.requires_grad:
            # the graph of a drawn sample is that of scoring it
            value = score_step(*step, drawn)[0]
        return drawn, value
    mean = step_mean(guided_velocity(velocity, velocity_uncond, guidance_scale), sample, c_x, c_v)
    if prev_sample is None:
        drawn = mean.detach()
        if isinstance(std, torch.Tensor) or std != 0:
            if seed is not None:
                noise = philox_normal(seed, offset, mean.shape, mean.dtype)
            elif noise is None:
                noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            drawn = drawn + per_row(std, mean, "std") * noise
        prev_sample = drawn.to(dtype or sample.dtype)
    return prev_sample, gaussian_log_prob(prev_sample, mean, std, log_prob, backend="reference")


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
        log_prob: "normalised", or "unnormalised" for the negative squared distance alone.
        backend: "auto", "reference" or "triton", see `choose_backend`. Triton is differentiable in `mean` alone, once;
            float64, and gradients of `prev_sample` and `std`, are the reference's.

    Returns:
        (B,), float32, or float64 if `mean` or `prev_sample` is.

    Raises:
        ValueError: for shapes that differ, an unknown log-prob, or a backend that cannot run it.
    """
    check_log_prob(log_prob)
    check_like(mean, prev_sample=prev_sample)
    if use_triton(backend, mean, prev_sample, constants={"prev_sample": prev_sample, "std": std}):
        from fastflowgrpo.kernels.sde_step_triton import score_step

        check_row(std, mean.shape[0], "std")
        return score_step(mean, None, None, None, std, None, 1.0, log_prob == "normalised", prev_sample)[0]
    dtype = compute_dtype(mean, prev_sample)
    distance = (prev_sample.to(dtype) - mean.to(dtype)).square().flatten(1).mean(1)
    deviation = per_row(std, distance, "std")
    stochastic = deviation > 0
    if log_prob == "unnormalised":
        value = -distance
    else:
        # 1 in place of 0 keeps the gradient of the rows that are masked out finite
        deviation = torch.where(stochastic, deviation, 1.0)
        value = -distance / (2 * deviation.square()) - deviation.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(stochastic, value, 0.0)


def guided_velocity(
    velocity: torch.Tensor, velocity_uncond: torch.Tensor | None, guidance_scale: float
) -> torch.Tensor:
    """Classifier-free guidance in the compute dtype; only `velocity` (the conditional branch) carries gradient."""
    check_guidance(velocity_uncond, guidance_scale)
    velocity = velocity.to(compute_dtype(velocity))
    if velocity_uncond is None:
        return velocity
    uncond = velocity_uncond.detach().to(velocity.dtype)
    return uncond + guidance_scale * (velocity - uncond)


def step_mean(
    velocity: torch.Tensor, sample: torch.Tensor, c_x: float | torch.Tensor, c_v: float | torch.Tensor
) -> torch.Tensor:
    """Mean of the next sample, c_x sample + c_v velocity, in the compute dtype."""
    dtype = compute_dtype(velocity, sample)
    sample, velocity = sample.to(dtype), velocity.to(dtype)
    return per_row(c_x, sample, "c_x") * sample + per_row(c_v, velocity, "c_v") * velocity


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def per_row(value: float | torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """A number, or one per row, as a tensor of `like`'s dtype and device that broadcasts over its rows: (B, 1, ...)."""
    batch_size = like.shape[0]
    check_row(value, batch_size, name)
    if not isinstance(value, torch.Tensor):
        value = torch.full((batch_size,), value, dtype=like.dtype, device=like.device)
    return value.to(like.dtype).reshape(batch_size, *[1] * (like.ndim - 1))


def check_like(like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless `like` is (B, ...) of floats, and so are the tensors that are not None."""
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


def check_row(value: float | torch.Tensor, batch_size: int, name: str) -> None:
    """Raises ValueError unless `value` is a number or one per row."""
    if isinstance(value, torch.Tensor) and value.shape != (batch_size,):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: give a number or one value per row, shape ({batch_size},)"
        )


def check_seeds(seed: torch.Tensor, offset: int | torch.Tensor, batch_size: int) -> None:
    """Raises ValueError unless `seed` is int64 (B,), and `offset` a number or that too."""
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, torch.Tensor) and (value.shape != (batch_size,) or value.dtype != torch.int64):
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}: give one int64 per row, shape ({batch_size},)"
            )


def check_guidance(velocity_uncond: torch.Tensor | None, guidance_scale: float) -> None:
    """Raises ValueError for guidance without its unconditional branch."""
    if velocity_uncond is None and guidance_scale != 1:
        raise ValueError(f"guidance_scale {guidance_scale} needs velocity_uncond, the unconditional branch")


def check_log_prob(log_prob: str) -> None:
    """Raises ValueError unless `log_prob` is one of `LOG_PROBS`."""
    if log_prob not in LOG_PROBS:
        raise ValueError(f"unknown log_prob {log_prob!r}: choose one of {', '.join(LOG_PROBS)}")
