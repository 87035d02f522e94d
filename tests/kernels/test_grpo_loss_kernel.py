"""The Triton kernels of the loss: compiled on a GPU, in Triton's interpreter without one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

from test_grpo_loss import guard_problem, problem

from fastflowgrpo.kernels import grpo_loss_triton
from fastflowgrpo.kernels.grpo_loss import KL_KINDS, grpo_loss, grpo_step_loss
from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = 2**24 + 5 if torch.cuda.is_available() else 2**13 + 5
ROWS = ("c_x", "c_v", "std", "dt", "old_log_prob", "advantage")
WEIGHTS = [1.0, 2.0, -3.0, 0.5]


def on(device, arguments):
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}


def run(arguments, backend, convert=lambda tensor: tensor, **settings):
    """Loss, statistics and the velocity's gradient of a weighted sum of the losses, times the number of elements."""
    arguments = {
        name: convert(value) if isinstance(value, torch.Tensor) and name not in ROWS else value
        for name, value in arguments.items()
    }
    velocity = arguments.pop("velocity").detach().clone().requires_grad_()
    loss, stats = grpo_step_loss(velocity, **arguments, backend=backend, **{"clip_range": 0.15, **settings})
    weights = torch.tensor(WEIGHTS, device=loss.device)[: len(loss)]
    (gradient,) = torch.autograd.grad((loss * weights).sum() * velocity[0].numel(), velocity)
    return loss.detach(), stats, gradient


def compare(arguments, rtol=2e-5, clip_range=0.15, atol=2e-5, **settings):
    """Triton against the reference in float64; returns Triton's gradient and statistics."""
    settings["clip_range"] = clip_range
    loss, stats, gradient = run(arguments, "triton", **settings)
    exact_loss, exact_stats, exact_gradient = run(arguments, "reference", torch.Tensor.double, **settings)
    assert loss.dtype == torch.float32 and gradient.dtype == arguments["velocity"].dtype
    assert set(stats) == set(exact_stats)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=rtol, atol=2e-5)
    for name, value in stats.items():
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(value.double(), exact_stats[name], rtol=rtol, atol=2e-5)
    eps = torch.finfo(gradient.dtype).eps
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=max(rtol, 2 * eps), atol=atol)
    return gradient, stats


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_against_float64(dynamics, log_prob, kl, guidance, kernel_device):
    arguments = on(kernel_device, problem(dynamics, torch.float32, guidance=guidance, log_prob=log_prob))
    gradient, _ = compare(arguments, kl=kl, kl_weight=0.3)
    assert gradient.abs().amin(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("kl", [*KL_KINDS, "reported", "none"])
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_guard_against_float64(dynamics, log_prob, kl, guidance, kernel_device):
    """With a ratio inside, above and below the clip, at advantages of both signs."""
    arguments = on(kernel_device, guard_problem(dynamics, torch.float32, guidance=guidance, log_prob=log_prob))
    settings = {"kl": kl, "kl_weight": 0.3} if kl in KL_KINDS else {}
    if kl == "none":
        del arguments["velocity_ref"]
    gradient, stats = compare(arguments, **settings)
    assert stats["clipped_above"].tolist() == [0, 0, 1, 0]
    assert stats["clipped_below"].tolist() == [0, 0, 0, 1]
    assert gradient[:2].abs().amin() > 0
    assert ((gradient[2:] != 0) == (kl in KL_KINDS)).all()


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 5), (4, 2, 3, 7, 5), (4, 4096), (4, LARGE)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_of_dtypes_and_shapes(dtype, shape, kl_weight, kernel_device):
    arguments = on(kernel_device, guard_problem(dtype=dtype, shape=shape, guidance=2.0))
    # a wide clip range, since rounding to bfloat16 could move a ratio across a bound; / -dt scales the loss by ten
    compare(arguments, 4e-5, clip_range=0.9, atol=2e-4, kl_weight=kl_weight)


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 5), (4, 2, 3, 7, 5), (4, 4096), (4, LARGE)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_shapes(dtype, shape, kernel_device):
    compare(on(kernel_device, problem(dtype=dtype, shape=shape, guidance=2.0)), kl_weight=0.3)


@pytest.mark.parametrize("shape", [(4, 30), (4, 4100)])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("reference", ["weighted", "reported", "none"])
def test_missing_parts(reference, guided, shape, kernel_device):
    arguments = on(kernel_device, problem(dtype=torch.bfloat16, shape=shape, guidance=2.0 if guided else None))
    if reference == "none":
        del arguments["velocity_ref"]
    compare(arguments, kl_weight=0.3 if reference == "weighted" else 0.0)


@pytest.mark.parametrize("advantage", [2.0, -2.0, 9.0, -9.0, 0.0])
@pytest.mark.parametrize("ratio", [0.7, 0.95, 1.0, 1.05, 1.4])
def test_clipping(ratio, advantage, kernel_device):
    arguments = on(kernel_device, problem(dtype=torch.float32))
    del arguments["velocity_ref"]
    _, stats, _ = run(arguments, "reference")
    new_log_prob = stats["log_prob_difference"] + arguments["old_log_prob"]
    arguments["old_log_prob"] = new_log_prob - math.log(ratio)
    arguments["advantage"] = torch.full((4,), advantage, device=kernel_device)
    gradient, stats = compare(arguments, clip_range=0.1)
    held = (ratio > 1.1 and advantage > 0) or (ratio < 0.9 and advantage < 0)
    assert ((gradient == 0) == (held or advantage == 0)).all()
    assert (stats["clipped_above"] == (held and advantage > 0)).all()
    assert (stats["clipped_below"] == (held and advantage < 0)).all()
    clipped = max(-5.0, min(5.0, advantage))
    bounded = min(max(ratio, 0.9), 1.1)
    expected = torch.full((4,), max(-clipped * ratio, -clipped * bounded), device=kernel_device)
    torch.testing.assert_close(stats["policy_loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [15, 4100])
@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_is_one_before_the_first_update(dtype, guidance, size, kernel_device):
    arguments = on(kernel_device, problem(dtype=dtype, shape=(4, size), guidance=guidance))
    guided = {name: arguments[name] for name in ("velocity_uncond", "guidance_scale") if name in arguments}
    arguments["prev_sample"], arguments["old_log_prob"] = sde_step(
        *(arguments[name] for name in ("velocity", "sample", "c_x", "c_v", "std")),
        seed=torch.arange(4, device=kernel_device),
        backend="triton",
        **guided,
    )
    velocity_old = guided_velocity(arguments["velocity"], *guided.values()) if guided else arguments["velocity"]
    for old in (None, velocity_old):
        _, stats, gradient = run(arguments, "triton", clip_range=1e-5, kl_weight=0.3, velocity_old=old)
        assert (stats["ratio"] == 1).all()
        assert (stats["clipped_above"] + stats["clipped_below"] == 0).all()
        assert (gradient != 0).any(1).all()


@pytest.mark.parametrize("kl", KL_KINDS)
def test_ode_pairs_have_no_policy_gradient(kl, kernel_device):
    arguments = on(kernel_device, problem(dtype=torch.float32))
    arguments["std"][1] = 0
    arguments["old_log_prob"][1] = 0
    for old in (None, arguments["velocity_ref"] + 0.1):
        gradient, _ = compare(arguments, kl=kl, kl_weight=0.3, velocity_old=old, clip_range=0.9)
        assert ((gradient[1] != 0) == (kl == "velocity")).all()


def test_only_the_policys_velocity_carries_gradient(kernel_device):
    arguments = on(kernel_device, guard_problem(dtype=torch.float32, guidance=2.0))
    constants = (
        "velocity_ref",
        "velocity_old",
        "velocity_uncond",
        "sample",
        "prev_sample",
        "old_log_prob",
        "advantage",
    )
    for name in ("velocity", *constants):
        arguments[name] = arguments[name].requires_grad_()
    loss, _ = grpo_step_loss(**arguments, clip_range=0.5, kl_weight=0.3, backend="triton")
    loss.sum().backward()
    assert arguments["velocity"].grad.abs().min() > 0
    assert [name for name in constants if arguments[name].grad is not None] == []


def test_numbers_and_rows_of_any_stride_are_the_same(kernel_device):
    arguments = on(kernel_device, problem(dtype=torch.float32))
    numbers = {"c_x": 0.9, "c_v": -0.1, "std": 0.4, "dt": -0.1}
    table = torch.tensor([list(numbers.values())] * 4, device=kernel_device)
    variants = [
        numbers,
        dict(zip(numbers, table.unbind(1), strict=True)),
        {**dict(zip(numbers, table.unbind(1), strict=True)), "dt": -0.1, "c_v": table[:, 1].double()},
    ]
    results = [run(arguments | variant, "triton", kl_weight=0.3) for variant in variants]
    for loss, stats, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][2])
        assert all(torch.equal(stats[name], value) for name, value in results[0][1].items())


@pytest.mark.parametrize(
    "channels_last", [("velocity",), ("velocity", "sample", "prev_sample", "velocity_ref", "velocity_old")]
)
def test_layout_changes_nothing(channels_last, kernel_device):
    arguments = on(kernel_device, guard_problem(dtype=torch.bfloat16, shape=(4, 3, 5, 6)))
    changed = {name: arguments[name].to(memory_format=torch.channels_last) for name in channels_last}
    plain, laid_out = (run(a, "triton", kl_weight=0.3) for a in (arguments, arguments | changed))
    torch.testing.assert_close(laid_out[0], plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(laid_out[2], plain[2], rtol=1e-2, atol=1e-6)


def test_same_inputs_same_bits_and_no_mutation(kernel_device):
    arguments = on(kernel_device, guard_problem(dtype=torch.bfloat16, shape=(4, 5000), guidance=2.0))
    copies = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    first, second = (run(arguments, "triton", kl_weight=0.3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert all(torch.equal(arguments[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("make", [problem, guard_problem])
def test_second_derivative_is_refused(make, kernel_device):
    arguments = on(kernel_device, make(dtype=torch.float32))
    velocity = arguments["velocity"].requires_grad_()
    loss, _ = grpo_step_loss(**arguments, clip_range=0.5, backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), velocity, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative: use backend="reference"'):
        torch.autograd.grad(gradient.sum(), velocity)


def test_empty_batch(kernel_device):
    empty, none = torch.zeros(0, 3, 5, device=kernel_device), torch.zeros(0, device=kernel_device)
    settings = {"clip_range": 0.1, "velocity_ref": empty, "kl_weight": 0.1, "backend": "triton"}
    loss, _ = grpo_step_loss(empty, empty, empty, none, none, none, none, none, none, **settings)
    assert loss.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 4.5}, "guidance_scale 4.5 needs velocity_uncond"),
        ({"log_prob": "sum"}, "unknown log_prob 'sum'"),
        ({"clip_range": 1.0}, "clip_range 1.0 is out of range"),
        ({"advantage": torch.zeros(3)}, r"advantage has shape \(3,\), but log_prob has \(4,\)"),
        ({"dt": torch.zeros(2)}, r"dt has shape \(2,\): give a number or one value per row, shape \(4,\)"),
        ({"sample": torch.zeros(4, 3, 5, dtype=torch.float64)}, 'backend "triton" computes in float32'),
    ],
)
def test_errors(change, message, kernel_device):
    arguments = on(kernel_device, {**problem(dtype=torch.float32), "clip_range": 0.1, **change})
    with pytest.raises(ValueError, match=message):
        grpo_step_loss(**arguments, backend="triton")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
@pytest.mark.parametrize("size", [15, 4100])
def test_operation_is_well_registered(size, kernel_device):
    a = on(kernel_device, problem(dtype=torch.float32, shape=(4, size), guidance=2.0))
    a["velocity"].requires_grad_()
    tensors = [a[name] for name in ("velocity", "sample", "prev_sample", *ROWS, "velocity_ref")]
    settings = (a["velocity_uncond"], 2.0, 0.85, 1.15, 5.0, "flow_grpo")
    operation = grpo_loss_triton.step_loss_operation.registered
    for old, kl_weight in ((None, 0.3), (a["sample"], 0.3), (a["sample"], 0.0)):
        torch.library.opcheck(operation, (*tensors, old, *settings, kl_weight, True))


@pytest.mark.parametrize("make", [problem, guard_problem])
def test_one_graph_under_compile(make, kernel_device):
    arguments = on(kernel_device, make(dtype=torch.float32, guidance=2.0))
    velocity = arguments.pop("velocity").requires_grad_()

    def loss(velocity):
        return grpo_step_loss(velocity, **arguments, clip_range=0.15, kl_weight=0.3, backend="triton")[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, eager = compiled(velocity), loss(velocity)
    assert torch.equal(found, eager)
    gradients = [torch.autograd.grad(value.sum(), velocity)[0] for value in (found, eager)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 256, 1000])
def test_loss_of_log_probs_against_float64(size, dtype, kernel_device):
    """Ratios below, inside and above the clip; advantages of both signs, of 0 and beyond their own clip."""
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.randn(size, generator=generator).to(kernel_device, dtype)
    old_log_prob = log_prob.float() + 0.3 * torch.randn(size, generator=generator).to(kernel_device)
    advantage = torch.tensor([2.0, -2.0, 0.0, 9.0, -9.0]).repeat(size)[:size].to(kernel_device)
    weights = torch.linspace(-1, 2, size, device=kernel_device)

    def run(backend, convert):
        x = convert(log_prob).detach().clone().requires_grad_()
        loss, stats = grpo_loss(x, old_log_prob, advantage, clip_range=0.1, backend=backend)
        return loss, stats, torch.autograd.grad((loss * weights).sum(), x)[0]

    loss, stats, gradient = run("triton", lambda t: t)
    exact_loss, exact_stats, exact_gradient = run("reference", torch.Tensor.double)
    assert (loss.dtype, gradient.dtype, set(stats)) == (torch.float32, dtype, set(exact_stats))
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)
    for name, value in stats.items():
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(value.double(), exact_stats[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if size == 1000:
        assert (gradient != 0).any() and (stats["clipped_above"] > 0).any() and (stats["clipped_below"] > 0).any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in tracing
def test_loss_of_log_probs_is_an_operation(kernel_device):
    log_prob, old_log_prob, advantage = 0.05 * torch.randn(3, 7, device=kernel_device)
    log_prob.requires_grad_()
    bounds = (0.9, 1.1, 5.0)
    torch.library.opcheck(
        grpo_loss_triton.policy_loss_operation.registered, (log_prob, old_log_prob, advantage, *bounds)
    )

    def loss(log_prob):
        return grpo_loss(log_prob, old_log_prob, advantage, clip_range=0.1, backend="triton")[0]

    results = [f(log_prob) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(value.sum(), log_prob, retain_graph=True)[0] for value in results]
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    (gradient,) = torch.autograd.grad(results[0].sum(), log_prob, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative: use backend="reference"'):
        torch.autograd.grad(gradient.sum(), log_prob)
    spread = torch.stack([log_prob, log_prob], 1)[:, 0]
    assert torch.equal(loss(spread), results[0])


def test_choice_for_log_probs(kernel_device):
    none, pair = torch.zeros(0, device=kernel_device), torch.zeros(2, device=kernel_device)
    assert grpo_loss(none, none, none, clip_range=0.1, backend="triton")[0].shape == (0,)
    with pytest.raises(ValueError, match='backend "triton" computes in float32'):
        grpo_loss(pair.double(), pair, pair, clip_range=0.1, backend="triton")
    with pytest.raises(ValueError, match=r"clip_range 1\.0 is out of range"):
        grpo_loss(pair, pair, pair, clip_range=1.0, backend="triton")


def test_a_compiler_sees_the_kernels():
    """Forward and backward are one graph each, and torch knows that the kernels write only to their outputs."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "trace_kernels.py"
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "graph",
        "step_kernel writes prev_sample sums",
        "log_prob_kernel writes log_prob",
        "loss_kernel writes sums",
        "finish_kernel writes factors loss statistics",
        "graph",
        "velocity_gradient_kernel writes gradient",
    ]
