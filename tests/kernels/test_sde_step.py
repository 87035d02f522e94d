import math

import pytest
import torch

from fastflowgrpo.kernels import backend
from fastflowgrpo.kernels.backend import choose_backend
from fastflowgrpo.kernels.philox import WORD, philox_normal, philox_words
from fastflowgrpo.kernels.sde_step import gaussian_log_prob, sde_step
from fastflowgrpo.sampling.coefficients import step_coefficients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 4, 5, 5), (2, 16, 16), (1, 1), (3, 7), (2, 3, 1, 5, 9), (0, 4, 2)]
C_X, C_V, STD = 0.8775, -0.1245, 0.4427


def tensors(shape=(3, 4, 5, 5), dtype=torch.float32, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def rows(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def written_out_log_prob(prev_sample, mean, std):
    """Float64 log-prob of each row, from torch's normal distribution."""
    return torch.stack(
        [torch.distributions.Normal(m, s).log_prob(x).mean() for x, m, s in zip(prev_sample, mean, std, strict=True)]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, shape):
    velocity, sample, uncond, noise = tensors(shape, dtype, count=4)
    c_x, c_v, std = torch.rand(3, shape[0]) + 0.1
    prev_sample, log_prob = sde_step(
        velocity, sample, c_x, c_v, std, velocity_uncond=uncond, guidance_scale=4.5, noise=noise
    )
    assert prev_sample.dtype == dtype
    assert log_prob.dtype == torch.float32
    assert log_prob.shape == shape[:1]

    column = (-1, *[1] * (len(shape) - 1))
    x, v, u, n = (tensor.double() for tensor in (sample, velocity, uncond, noise))
    mean = c_x.double().view(column) * x + c_v.double().view(column) * (u + 4.5 * (v - u))
    exact = mean + std.double().view(column) * n
    torch.testing.assert_close(prev_sample, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if shape[0]:
        # the log-prob belongs to the stored sample, so it is exact to float32 in every dtype
        expected = written_out_log_prob(prev_sample.double(), mean, std.double())
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring_what_was_drawn_gives_the_same_log_prob(dtype, log_prob):
    velocity, sample = tensors(dtype=dtype)
    c = step_coefficients(torch.linspace(1, 0, 11)).at(torch.tensor([0, 5, 8]))
    drawn, drawn_log_prob = sde_step(velocity, sample, c.c_x, c.c_v, c.std, log_prob=log_prob)
    scored, scored_log_prob = sde_step(velocity, sample, c.c_x, c.c_v, c.std, prev_sample=drawn, log_prob=log_prob)
    assert scored is drawn
    assert torch.equal(scored_log_prob, drawn_log_prob)


def test_numbers_and_rows_are_the_same():
    velocity, sample, noise = tensors(count=3)
    by_number = sde_step(velocity, sample, C_X, C_V, STD, noise=noise)
    by_row = sde_step(velocity, sample, *(torch.full((3,), value) for value in (C_X, C_V, STD)), noise=noise)
    assert all(map(torch.equal, by_number, by_row))


def test_unnormalised_log_prob_is_the_negative_mean_square():
    velocity, sample, prev_sample = tensors(count=3)
    _, log_prob = sde_step(velocity, sample, C_X, C_V, STD, prev_sample=prev_sample, log_prob="unnormalised")
    expected = -(prev_sample - (C_X * sample + C_V * velocity)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob, expected)


@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
def test_gradient_of_the_log_prob(log_prob):
    velocity, sample, uncond, prev_sample = (tensor.double() for tensor in tensors((2, 3, 4), count=4))
    c_x, c_v, std = rows(0.7, 0.9), rows(-0.1, -0.3), rows(0.5, 0.2)

    def score(v, u=None, g=1.0):
        return sde_step(
            v,
            sample,
            c_x,
            c_v,
            std,
            velocity_uncond=u,
            guidance_scale=g,
            prev_sample=prev_sample,
            log_prob=log_prob,
        )[1]

    velocity.requires_grad_()
    assert torch.autograd.gradcheck(score, (velocity,))
    assert torch.autograd.gradcheck(lambda v: score(v, uncond, 4.5), (velocity,))


def test_a_guidance_scale_per_row_is_that_of_each_row_alone():
    velocity, sample, uncond, prev_sample = tensors(count=4)
    scales = torch.tensor([4.5, 1.0, 2.0])

    def score(rows, scale):
        own = velocity[rows].clone().requires_grad_()
        ends = {"velocity_uncond": uncond[rows], "prev_sample": prev_sample[rows]}
        _, log_prob = sde_step(own, sample[rows], 0.9, -0.1, 0.5, guidance_scale=scale, **ends)
        return log_prob, torch.autograd.grad(log_prob.sum(), own)[0]

    log_prob, gradient = score(slice(None), scales)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close((log_prob[i : i + 1], gradient[i : i + 1]), score(slice(i, i + 1), scale))


def test_log_prob_of_a_drawn_sample_has_the_gradient_of_the_score():
    """If the drawn sample were not a constant, it would follow the velocity and the gradient would be 0."""
    velocity, sample, noise = tensors(count=3)
    velocity.requires_grad_()
    prev_sample, log_prob = sde_step(velocity, sample, C_X, C_V, STD, noise=noise)
    assert not prev_sample.requires_grad
    (gradient,) = torch.autograd.grad(log_prob.sum(), velocity)
    torch.testing.assert_close(gradient, noise * C_V / STD / velocity[0].numel(), rtol=1e-4, atol=1e-6)


def test_only_the_conditional_branch_has_a_gradient():
    velocity, sample, uncond, prev_sample = tensors(count=4)
    velocity.requires_grad_()
    uncond.requires_grad_()
    _, log_prob = sde_step(
        velocity, sample, C_X, C_V, STD, velocity_uncond=uncond, guidance_scale=4.5, prev_sample=prev_sample
    )
    log_prob.sum().backward()
    assert uncond.grad is None
    assert velocity.grad.abs().min() > 0


def test_rows_of_the_ode_among_stochastic_ones():
    velocity, sample, noise = tensors(count=3)
    velocity.requires_grad_()
    c_x, c_v, std = rows(1.0, C_X, 1.0), rows(-0.1, C_V, -0.2), rows(0.0, STD, 0.0)
    for log_prob in ("normalised", "unnormalised"):
        prev_sample, value = sde_step(velocity, sample, c_x, c_v, std, noise=noise, log_prob=log_prob)
        alone = sde_step(velocity[1:2], sample[1:2], C_X, C_V, STD, noise=noise[1:2], log_prob=log_prob)
        assert torch.equal(prev_sample[0], (sample + -0.1 * velocity)[0])
        assert torch.equal(prev_sample[1:2], alone[0])
        assert value[0] == value[2] == 0
        assert value[1] == alone[1]
        (gradient,) = torch.autograd.grad(value.sum(), velocity)
        assert (gradient[[0, 2]] == 0).all()
        assert gradient[1].abs().min() > 0


def test_ode_draws_no_noise():
    velocity, sample = tensors()
    state = torch.get_rng_state()
    prev_sample, log_prob = sde_step(velocity, sample, 1.0, -0.1, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(prev_sample, sample + -0.1 * velocity)
    assert (log_prob == 0).all()


def test_generator_draws_the_noise():
    velocity, sample = tensors()
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
    given = sde_step(velocity, sample, C_X, C_V, STD, noise=noise)
    drawn = sde_step(velocity, sample, C_X, C_V, STD, generator=torch.Generator().manual_seed(7))
    assert all(map(torch.equal, given, drawn))


def test_drawn_samples_have_the_mean_and_std():
    velocity, sample = (tensor.expand(20_000, -1) for tensor in tensors((1, 5)))
    prev_sample, _ = sde_step(velocity, sample, C_X, C_V, STD, generator=torch.Generator().manual_seed(0))
    mean = C_X * sample[0] + C_V * velocity[0]
    assert ((prev_sample.mean(0) - mean).abs() < 5 * STD / 20_000**0.5).all()
    assert ((prev_sample.std(0) / STD - 1).abs() < 5 * 40_000**-0.5).all()


def test_float16_noise_below_its_resolution_is_scored_as_stored():
    """Rounding hides the noise: the log-prob of the unrounded sample would be far from the stored sample's."""
    sample = torch.full((1, 1000), 1000.0, dtype=torch.float16)
    velocity, std = torch.zeros_like(sample), 0.01
    prev_sample, log_prob = sde_step(velocity, sample, 1.0, -0.1, std)
    assert torch.equal(prev_sample, sample)
    assert log_prob.item() == pytest.approx(-math.log(std) - 0.5 * math.log(2 * math.pi))


def test_storage_dtype_of_the_drawn_sample():
    velocity, sample, noise = tensors(count=3)
    wide, _ = sde_step(velocity, sample, C_X, C_V, STD, noise=noise)
    narrow, log_prob = sde_step(velocity, sample, C_X, C_V, STD, noise=noise, dtype=torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(log_prob, sde_step(velocity, sample, C_X, C_V, STD, prev_sample=narrow)[1])


def test_autocast_changes_nothing():
    velocity, sample, noise = tensors(count=3)
    plain = sde_step(velocity, sample, C_X, C_V, STD, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, sde_step(velocity, sample, C_X, C_V, STD, noise=noise)))


def test_memory_format_changes_nothing():
    velocity, sample, noise = tensors(count=3)
    plain = sde_step(velocity, sample, C_X, C_V, STD, noise=noise)
    last = [tensor.to(memory_format=torch.channels_last) for tensor in (velocity, sample, noise)]
    prev_sample, log_prob = sde_step(*last[:2], C_X, C_V, STD, noise=last[2])
    assert torch.equal(prev_sample, plain[0])
    torch.testing.assert_close(log_prob, plain[1], rtol=1e-6, atol=1e-6)


def test_inputs_are_not_mutated():
    arguments = tensors(count=4)
    copies = [tensor.clone() for tensor in arguments]
    velocity, sample, uncond, noise = arguments
    prev_sample, _ = sde_step(velocity, sample, C_X, C_V, STD, velocity_uncond=uncond, guidance_scale=2.0, noise=noise)
    sde_step(velocity, sample, 1.0, -0.1, 0.0)[0].zero_()
    prev_sample.zero_()
    assert all(map(torch.equal, arguments, copies))


def test_gaussian_log_prob_takes_bfloat16():
    prev_sample, mean = tensors(dtype=torch.bfloat16)
    expected = written_out_log_prob(prev_sample.double(), mean.double(), [0.3] * 3)
    log_prob = gaussian_log_prob(prev_sample, mean, 0.3)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_graph_under_compile():
    velocity, sample, noise = tensors(count=3)
    c_x, c_v, std = (torch.full((3,), value) for value in (C_X, C_V, STD))
    compiled = torch.compile(sde_step, fullgraph=True, backend="eager")
    eager = sde_step(velocity, sample, c_x, c_v, std, noise=noise)
    assert all(map(torch.equal, compiled(velocity, sample, c_x, c_v, std, noise=noise), eager))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(3, 4, 5)}, r"velocity has shape \(3, 4, 5\), but the sample has \(3, 4, 5, 5\)"),
        ({"velocity_uncond": torch.zeros(1, 4, 5, 5)}, r"velocity_uncond has shape \(1, 4, 5, 5\), but the sample"),
        ({"noise": torch.zeros(3, 4, 5, 1)}, r"noise has shape \(3, 4, 5, 1\), but the sample"),
        ({"prev_sample": torch.zeros(3, 4, 1, 5)}, r"prev_sample has shape \(3, 4, 1, 5\), but the sample"),
        ({"sample": torch.zeros(3), "velocity": torch.zeros(3)}, r"samples have shape \(3,\): give a batch"),
        ({"velocity": torch.zeros(3, 4, 5, 5, dtype=torch.int64)}, "velocity is torch.int64 .* must be floating point"),
        ({"c_x": torch.zeros(2)}, r"c_x has shape \(2,\): give a number or one value per row, shape \(3,\)"),
        ({"std": torch.ones(3, 1)}, r"std has shape \(3, 1\): give a number or one value per row"),
        ({"guidance_scale": 4.5}, "guidance_scale 4.5 needs velocity_uncond"),
        ({"guidance_scale": torch.ones(3)}, r"guidance_scale tensor\(.*\) needs velocity_uncond"),
        ({"log_prob": "sum"}, "unknown log_prob 'sum': choose one of normalised, unnormalised"),
        (
            {"noise": torch.zeros(3, 4, 5, 5), "generator": torch.Generator()},
            "seed, noise, generator and prev_sample exclude each other",
        ),
        ({"seed": torch.zeros(3, dtype=torch.int32)}, r"seed is torch.int32 of shape \(3,\): give one int64 per row"),
        (
            {"seed": torch.zeros(3, dtype=torch.int64), "offset": torch.zeros(2, dtype=torch.int64)},
            r"offset is torch.int64 of shape \(2,\)",
        ),
        ({"backend": "cuda"}, "unknown backend 'cuda': choose one of auto, reference, triton"),
    ],
)
def test_errors(change, message):
    velocity, sample = tensors()
    arguments = {"velocity": velocity, "sample": sample, "c_x": C_X, "c_v": C_V, "std": STD, **change}
    with pytest.raises(ValueError, match=message):
        sde_step(**arguments)


def test_philox_gives_the_integers_of_random123():
    """The known answers for Philox4x32-10 that come with Random123."""
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    for (counter, key), expected in (
        (((0,) * 4, (0,) * 2), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (((WORD,) * 4, (WORD,) * 2), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = philox_words([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
        assert tuple(map(int, words)) == expected


def test_noise_of_a_seed_depends_on_nothing_else():
    seed, offset = torch.tensor([5, -3, 2**40]), torch.tensor([0, 2**33, 7])
    noise = philox_normal(seed, offset, (3, 5, 7))
    assert torch.equal(philox_normal(seed[1:], offset[1:], (2, 5, 7)), noise[1:])
    assert torch.equal(philox_normal(seed.flip(0), offset.flip(0), (3, 35)).view(3, 5, 7), noise.flip(0))
    assert torch.equal(philox_normal(seed, offset, (3, 10)), noise.flatten(1)[:, :10])
    wide = philox_normal(seed, offset, (3, 5, 7), torch.float64)
    torch.testing.assert_close(noise.double(), wide, rtol=1e-5, atol=1e-6)


def test_noise_of_seeds_is_standard_normal():
    seed = torch.tensor([0, 1, 2, 2**32, 0])
    offset = torch.tensor([0, 0, 0, 0, 1])
    size = 100_000
    noise = philox_normal(seed, offset, (5, size), torch.float64)
    bound = 5 / size**0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (noise.pow(power).mean(1) - moment).abs().max() < bound * spread**0.5
    levels = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.5, 1.5, 2.5], dtype=torch.float64)
    found = (noise[..., None] < levels).double().mean(1)
    assert (found - torch.special.ndtr(levels)).abs().max() < bound / 2
    # uncorrelated within a row and between rows, also for seeds that differ in one bit and for other offsets
    for lag in range(1, 9):
        assert (noise[:, lag:] * noise[:, :-lag]).mean(1).abs().max() < bound
    between = noise @ noise.T / size - torch.eye(5)
    assert between.fill_diagonal_(0).abs().max() < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds_draw_the_noise(dtype):
    velocity, sample = tensors(dtype=dtype)
    seed = torch.tensor([3, 1, 4])
    given = sde_step(velocity, sample, C_X, C_V, STD, noise=philox_normal(seed, 6, sample.shape))
    drawn = sde_step(velocity, sample, C_X, C_V, STD, seed=seed, offset=6)
    assert all(map(torch.equal, given, drawn))
    part = sde_step(velocity[1:], sample[1:], C_X, C_V, STD, seed=seed[1:], offset=6)
    assert torch.equal(part[0], drawn[0][1:])


def test_choice_of_backend(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    assert choose_backend("auto", cpu) == "reference"
    assert choose_backend("auto", gpu) == "triton"
    assert choose_backend("triton", gpu) == "triton"
    assert choose_backend("reference", gpu) == "reference"
    with pytest.raises(ValueError, match='backend "triton" cannot run on cpu tensors'):
        choose_backend("triton", cpu)
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "reference")
    assert choose_backend("auto", gpu) == "reference"
    assert choose_backend("triton", gpu) == "triton"
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "triton")
    with pytest.raises(ValueError, match='FASTFLOWGRPO_BACKEND "triton" cannot run on cpu tensors'):
        choose_backend("auto", cpu)
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown FASTFLOWGRPO_BACKEND 'fast': choose one of auto"):
        choose_backend("auto", cpu)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        choose_backend("cuda", gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", cpu) == "triton"
    monkeypatch.delenv("FASTFLOWGRPO_BACKEND")
    assert choose_backend("auto", cpu) == "reference"
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert choose_backend("auto", gpu) == "reference"
    with pytest.raises(ValueError, match='backend "triton" needs Triton, which is not installed'):
        choose_backend("triton", gpu)
