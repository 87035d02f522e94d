"""The Triton kernels of the step: compiled on a GPU, in Triton's interpreter without one."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

from test_sde_step import C_V, C_X, STD, tensors, written_out_log_prob

from fastflowgrpo.kernels import sde_step_triton, triton_rows
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import gaussian_log_prob, sde_step
from fastflowgrpo.kernels.velocity_gradient_triton import velocity_gradient
from fastflowgrpo.sampling.coefficients import step_coefficients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = 2**24 + 5 if torch.cuda.is_available() else 2**13 + 5
SHAPES = [(3, 4, 5, 5), (1, 1), (3, 7), (2, 3, 1, 5, 9), (2, 4096), (2, LARGE), (0, 4, 2)]
SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63)]


def draw(*arguments, **settings):
    return sde_step(*arguments, backend="triton", **settings)


def coefficients(batch_size, device):
    return torch.rand(3, batch_size, generator=torch.Generator().manual_seed(3)).add(0.1).to(device)


def test_numbers_reach_the_kernels_as_floats():
    """Triton would compile an integer 1 as a constant, which lacks the methods of a tensor."""
    rows = triton_rows.coefficients(1, 0.5, None, torch.ones(4, dtype=torch.float64)[::2])
    assert [type(row) for row in rows] == [float, float, type(None), torch.Tensor]
    assert rows[:2] == [1, 0.5] and rows[3].dtype == torch.float32 and rows[3].is_contiguous()


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("source", ["noise", "seed", "prev_sample"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, shape, source, guidance, kernel_device):
    velocity, sample, uncond, noise = (t.to(kernel_device) for t in tensors(shape, dtype, count=4))
    c = coefficients(shape[0], kernel_device)
    seed = torch.arange(shape[0], device=kernel_device)
    given = {"noise": noise} if source == "noise" else {"seed": seed} if source == "seed" else {"prev_sample": noise}
    guided = {"velocity_uncond": uncond, "guidance_scale": guidance} if guidance else {}
    prev_sample, log_prob = draw(velocity, sample, *c, **given, **guided)
    assert (prev_sample.dtype, log_prob.dtype, log_prob.shape) == (dtype, torch.float32, shape[:1])

    wide = {name: t.double() if isinstance(t, torch.Tensor) and name != "seed" else t for name, t in given.items()}
    wide |= {"velocity_uncond": uncond.double(), "guidance_scale": guidance} if guidance else {}
    exact, _ = sde_step(velocity.double(), sample.double(), *c, backend="reference", **wide)
    # the interpreter truncates to bfloat16, a GPU rounds; test_noise_is_the_references covers noise near radius 0
    atol = 4e-4 if source == "seed" else 4e-6
    torch.testing.assert_close(prev_sample, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=atol)
    if shape[0]:
        column = (-1, *[1] * (len(shape) - 1))
        v = uncond.double() + guidance * (velocity.double() - uncond.double()) if guidance else velocity.double()
        mean = c[0].double().view(column) * sample.double() + c[1].double().view(column) * v
        expected = written_out_log_prob(prev_sample.double(), mean, c[2].double())
        torch.testing.assert_close(log_prob.double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde", "ode"])
def test_every_step_of_every_dynamics(dynamics, log_prob, kernel_device):
    velocity, sample, noise = (t.to(kernel_device) for t in tensors((10, 3, 9), count=3))
    c = step_coefficients(torch.linspace(1, 0, 11), dynamics).at(torch.arange(10), kernel_device)
    arguments = (velocity, sample, c.c_x, c.c_v, c.std)
    found = draw(*arguments, noise=noise, log_prob=log_prob)
    exact = sde_step(velocity.double(), sample.double(), *arguments[2:], noise=noise.double(), log_prob=log_prob)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    # the scored sample is rounded, which matters near the data, where std is small
    scored = sde_step(*(t.double() for t in arguments[:2]), *arguments[2:], prev_sample=found[0], log_prob=log_prob)
    torch.testing.assert_close(found[1].double(), scored[1], rtol=1e-5, atol=1e-5)
    assert ((found[1] == 0) == (c.std == 0)).all()


@pytest.mark.parametrize("size", [60, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_has_the_same_bits_however_it_is_computed(dtype, size, kernel_device, monkeypatch):
    velocity, sample, uncond = (t.to(kernel_device) for t in tensors((4, size), dtype, count=3))
    c_x, c_v, std = coefficients(4, kernel_device)
    seed = torch.tensor(SEEDS[:4], device=kernel_device)
    guided = {"velocity_uncond": uncond, "guidance_scale": 2.0}
    prev_sample, log_prob = draw(velocity, sample, c_x, c_v, std, seed=seed, **guided)
    assert torch.equal(draw(velocity, sample, c_x, c_v, std, prev_sample=prev_sample, **guided)[1], log_prob)
    assert torch.equal(draw(velocity, sample, c_x, c_v, std, seed=seed, **guided)[1], log_prob)
    half = slice(2, 4)
    part = {"velocity_uncond": uncond[half], "guidance_scale": 2.0, "seed": seed[half]}
    alone = draw(velocity[half], sample[half], c_x[half], c_v[half], std[half], **part)
    assert torch.equal(alone[0], prev_sample[half])
    assert torch.equal(alone[1], log_prob[half])
    monkeypatch.setattr(triton_rows, "MAX_BLOCK", 1024)
    cut = draw(velocity, sample, c_x, c_v, std, seed=seed, **guided)
    assert torch.equal(cut[0], prev_sample)
    assert torch.equal(cut[1], log_prob)


@pytest.mark.parametrize("offset", [0, 1, 7, 2**32 + 3])
def test_noise_is_the_references(offset, kernel_device):
    seed = torch.tensor(SEEDS, device=kernel_device)
    zero = torch.zeros(len(SEEDS), 3, 1367, device=kernel_device)
    noise, _ = draw(zero, zero, 1.0, -0.1, 1.0, seed=seed, offset=offset)
    expected = philox_normal(seed, offset, zero.shape, torch.float64)
    # log u has the absolute error of a float32 u, and near u = 1 the root magnifies it
    assert ((noise - expected).abs() < 4e-6 + (4e-7 / expected.abs()).clamp(max=4e-4)).all()
    by_row = torch.full_like(seed, offset)
    assert torch.equal(draw(zero, zero, 1.0, -0.1, 1.0, seed=seed, offset=by_row)[0], noise)


def test_numbers_and_rows_of_any_stride_are_the_same(kernel_device):
    velocity, sample, noise = (t.to(kernel_device) for t in tensors(count=3))
    by_number = draw(velocity, sample, C_X, C_V, STD, noise=noise)
    rows = torch.tensor([[C_X, C_V, STD]] * 3, device=kernel_device)
    c_x, c_v, std = rows.unbind(1)
    for values in ((c_x, c_v, std), (c_x, c_v.contiguous(), std), (c_x, C_V, std.double()), (C_X, c_v, STD)):
        assert all(map(torch.equal, draw(velocity, sample, *values, noise=noise), by_number))


def layouts(tensor):
    """The same values in the memory layouts that a pipeline may use."""
    latents = torch.stack([torch.zeros_like(tensor), tensor], 1)
    padded = torch.cat([tensor, torch.zeros_like(tensor)], -1)
    return {
        "channels last": tensor.to(memory_format=torch.channels_last),
        "slot of a trajectory": latents[:, 1],
        "cropped": padded[..., : tensor.shape[-1]],
        "transposed": tensor.transpose(1, 3).contiguous().transpose(1, 3),
        "channels last slot": latents.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)[:, 1],
    }


@pytest.mark.parametrize(
    "layout", ["channels last", "slot of a trajectory", "cropped", "transposed", "channels last slot"]
)
@pytest.mark.parametrize("source", ["noise", "seed", "prev_sample"])
def test_layout_changes_nothing(source, layout, kernel_device):
    velocity, sample, uncond, noise = (t.to(kernel_device) for t in tensors((2, 4, 6, 8), count=4))
    seed = torch.arange(2, device=kernel_device)

    def run(velocity, sample, uncond, noise):
        given = {"seed": seed} if source == "seed" else {source: noise}
        return draw(velocity, sample, C_X, C_V, STD, velocity_uncond=uncond, guidance_scale=2.0, **given)

    plain = run(velocity, sample, uncond, noise)
    laid_out = [layouts(t)[layout] for t in (velocity, sample, uncond, noise)]
    for mixture in (laid_out, [velocity, *laid_out[1:]], [*laid_out[:3], noise], [laid_out[0], sample, uncond, noise]):
        assert all(map(torch.equal, run(*mixture), plain))


def test_one_row_for_the_whole_batch(kernel_device):
    velocity, sample = (t.to(kernel_device) for t in tensors((3, 40)))
    expanded = velocity[:1].expand(3, 40)
    given = {"seed": torch.arange(3, device=kernel_device)}
    assert all(
        map(
            torch.equal,
            draw(expanded, sample, C_X, C_V, STD, **given),
            draw(expanded.clone(), sample, C_X, C_V, STD, **given),
        )
    )


def test_addresses_beyond_32_bits(kernel_device):
    """Rows 2^30 elements apart: the third needs an address beyond 32 bits. The memory between them is never touched."""
    values, sample = (t.to(kernel_device) for t in tensors((3, 50), torch.bfloat16))
    storage = torch.empty_like(values[:0]).new_empty(0)
    storage.untyped_storage().resize_((2**31 + 64) * 2)
    velocity = storage.as_strided((3, 50), (2**30, 1))
    velocity.copy_(values)
    assert all(map(torch.equal, *(draw(v, sample, C_X, C_V, STD, prev_sample=sample) for v in (velocity, values))))


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("size", [30, 4100])
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_log_prob(dtype, log_prob, size, guidance, kernel_device):
    velocity, sample, uncond, prev_sample = (t.to(kernel_device) for t in tensors((3, size), dtype, count=4))
    c_x, c_v, std = coefficients(3, kernel_device)
    std[1] = 0
    weights = torch.tensor([1.0, 2.0, -3.0], device=kernel_device)

    def gradient(backend, convert):
        v = convert(velocity).clone().requires_grad_()
        guided = {"velocity_uncond": convert(uncond).requires_grad_(), "guidance_scale": guidance} if guidance else {}
        given = {"prev_sample": convert(prev_sample), "log_prob": log_prob, **guided}
        _, value = sde_step(v, convert(sample), c_x, c_v, std, backend=backend, **given)
        (value * weights * size).sum().backward()
        assert not guided or guided["velocity_uncond"].grad is None
        return v.grad

    found, exact = gradient("triton", lambda t: t.detach()), gradient("reference", lambda t: t.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
    assert (found[1] == 0).all()
    assert found[[0, 2]].abs().amin() > 0


@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_log_prob(dtype, shape, log_prob, kernel_device):
    """Against float64, with its gradient; one row of an ODE step, and a number for all rows."""
    mean, prev_sample = (t.to(kernel_device) for t in tensors(shape, dtype))
    std = coefficients(shape[0], kernel_device)[2]
    std[1:2] = 0
    weights = torch.arange(1.0, shape[0] + 1, device=kernel_device) * math.prod(shape[1:])

    def run(backend, convert, std):
        m = convert(mean).detach().clone().requires_grad_()
        value = gaussian_log_prob(convert(prev_sample), m, std, log_prob, backend=backend)
        return value, torch.autograd.grad((value * weights).sum(), m)[0]

    for deviation in (std, 0.3):
        value, gradient = run("triton", lambda t: t, deviation)
        exact_value, exact_gradient = run("reference", torch.Tensor.double, deviation)
        assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(value.double(), exact_value, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
        assert ((gradient != 0) == (exact_gradient != 0)).all()
    assert gradient.numel() == 0 or gradient.abs().max() > 0


def test_gaussian_log_prob_of_what_needs_another_gradient(kernel_device, monkeypatch):
    """Triton has the gradient of the mean only; with backend="auto" the reference computes the others."""
    mean, prev_sample = (t.to(kernel_device) for t in tensors())
    std = coefficients(3, kernel_device)[2]
    monkeypatch.setenv("FASTFLOWGRPO_BACKEND", "triton")
    for name, tensor in (("prev_sample", prev_sample), ("std", std)):
        tensor.requires_grad_()
        found, exact = (
            torch.autograd.grad(gaussian_log_prob(prev_sample, mean, std, backend=backend).sum(), tensor)[0]
            for backend in ("auto", "reference")
        )
        assert torch.equal(found, exact) and found.abs().min() > 0
        with pytest.raises(ValueError, match=f'backend "triton" has no gradient of {name}'):
            gaussian_log_prob(prev_sample, mean, std, backend="triton")
        with torch.no_grad():
            gaussian_log_prob(prev_sample, mean, std, backend="triton")
        tensor.requires_grad_(False)


def test_gaussian_log_prob_is_that_of_the_step(kernel_device):
    velocity, sample, prev_sample = (t.to(kernel_device) for t in tensors((2, 4100), count=3))
    mean = torch.addcmul(C_X * sample, velocity, torch.tensor(C_V, device=kernel_device))
    expected = draw(velocity, sample, C_X, C_V, STD, prev_sample=prev_sample)[1]
    found = gaussian_log_prob(prev_sample, mean, STD, backend="triton")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    laid_out = gaussian_log_prob(prev_sample.view(2, 41, 100).mT, mean.view(2, 41, 100).mT, STD, backend="triton")
    assert torch.equal(laid_out, found)
    compiled = torch.compile(gaussian_log_prob, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prev_sample, mean, STD, backend="triton"), found)


def test_drawn_sample_is_a_constant(kernel_device):
    velocity, sample, noise = (t.to(kernel_device) for t in tensors(count=3))
    velocity.requires_grad_()
    prev_sample, log_prob = draw(velocity, sample, C_X, C_V, STD, noise=noise)
    assert not prev_sample.requires_grad
    (gradient,) = torch.autograd.grad(log_prob.sum(), velocity)
    torch.testing.assert_close(gradient, noise * C_V / STD / velocity[0].numel(), rtol=1e-4, atol=1e-6)


def test_second_derivative_is_refused(kernel_device):
    velocity, sample, prev_sample = (t.to(kernel_device) for t in tensors(count=3))
    velocity.requires_grad_()
    _, log_prob = draw(velocity, sample, C_X, C_V, STD, prev_sample=prev_sample)
    (gradient,) = torch.autograd.grad(log_prob.sum(), velocity, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative: use backend="reference"'):
        torch.autograd.grad(gradient.sum(), velocity)


def test_without_noise_and_with_a_generator(kernel_device):
    velocity, sample = (t.to(kernel_device) for t in tensors())
    prev_sample, log_prob = draw(velocity, sample, 1.0, -0.1, 0.0)
    torch.testing.assert_close(prev_sample, sample - 0.1 * velocity)
    assert (log_prob == 0).all()
    generators = [torch.Generator(kernel_device).manual_seed(7) for _ in range(2)]
    drawn = [
        sde_step(velocity, sample, C_X, C_V, STD, generator=generator, backend=backend)[0]
        for generator, backend in zip(generators, ("triton", "reference"), strict=True)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-5)


def test_storage_dtype_and_inputs(kernel_device):
    arguments = [t.to(kernel_device) for t in tensors(count=4)]
    copies = [t.clone() for t in arguments]
    velocity, sample, uncond, noise = arguments
    narrow, log_prob = draw(velocity, sample, C_X, C_V, STD, velocity_uncond=uncond, noise=noise, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    scored = draw(velocity, sample, C_X, C_V, STD, velocity_uncond=uncond, prev_sample=narrow)
    assert torch.equal(scored[1], log_prob)
    narrow.zero_()
    assert all(map(torch.equal, arguments, copies))


def test_same_errors_as_the_reference(kernel_device):
    velocity, sample = (t.to(kernel_device) for t in tensors())
    for settings, message in (
        ({"guidance_scale": 4.5}, "guidance_scale 4.5 needs velocity_uncond"),
        ({"log_prob": "sum"}, "unknown log_prob 'sum'"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed is torch.int64 of shape \(2,\): give one int64 per row"),
        ({"seed": torch.zeros(3)}, r"seed is torch.float32 of shape \(3,\): give one int64 per row"),
        ({"seed": torch.zeros(3, dtype=torch.int64), "noise": sample}, "exclude each other"),
    ):
        for backend in ("triton", "reference"):
            with pytest.raises(ValueError, match=message):
                sde_step(velocity, sample, C_X, C_V, STD, backend=backend, **settings)
    with pytest.raises(ValueError, match=r"std has shape \(2,\): give a number or one value per row"):
        draw(velocity, sample, C_X, C_V, torch.ones(2, device=kernel_device))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
@pytest.mark.parametrize("size", [40, 4200])
def test_operations_are_well_registered(size, kernel_device):
    velocity, sample, uncond, reference, prev_sample, noise = (t.to(kernel_device) for t in tensors((2, size), count=6))
    c_x, c_v, std = coefficients(2, kernel_device)
    seed = torch.arange(2, device=kernel_device)
    step = (c_x, c_v, std, uncond, 2.0)
    check = torch.library.opcheck
    draw_op, score_op = sde_step_triton.draw_step.registered, sde_step_triton.score_step.registered
    check(draw_op, (velocity, sample, *step, True, None, seed, seed, torch.bfloat16))
    check(draw_op, (velocity, sample, *step, False, prev_sample, None, None, torch.float32))
    factors = torch.stack([c_x, c_v])
    for old in (None, noise):
        constants = (sample, prev_sample, factors, c_x, c_v, 2.0, torch.float32, std)
        check(velocity_gradient.registered, (velocity, uncond, old, reference, *constants))
    check(score_op, (velocity.requires_grad_(), sample, *step, True, prev_sample))
    check(score_op, (velocity, None, None, None, std, None, 1.0, False, prev_sample))


def test_one_graph_under_compile(kernel_device):
    velocity, sample, uncond = (t.to(kernel_device) for t in tensors(count=3))
    c, seed = coefficients(3, kernel_device), torch.arange(3, device=kernel_device)
    settings = {"velocity_uncond": uncond, "guidance_scale": 4.5, "seed": seed, "offset": 2}
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    eager = draw(velocity, sample, *c, **settings)
    assert all(map(torch.equal, compiled(velocity, sample, *c, **settings), eager))


if torch.cuda.is_available():

    def test_a_cuda_graph_captures_it():
        velocity, sample = (t.cuda() for t in tensors((2, 3, 4100)))
        seed = torch.arange(2, device="cuda")
        expected = draw(velocity, sample, C_X, C_V, STD, seed=seed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = draw(velocity, sample, C_X, C_V, STD, seed=seed)
        graph.replay()
        assert all(map(torch.equal, captured, expected))
