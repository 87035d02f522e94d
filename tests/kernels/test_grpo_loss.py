import math
from itertools import product

import pytest
import torch

from fastflowgrpo.kernels.grpo_loss import KL_KINDS, grpo_loss, grpo_step_loss
from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step
from fastflowgrpo.sampling.coefficients import step_coefficients

SIGMAS = torch.linspace(1, 0, 11, dtype=torch.float64)
STEPS = torch.tensor([0, 3, 6, 8])


def problem(dynamics="flow_sde", dtype=torch.float64, shape=(4, 3, 5), guidance=None, log_prob="normalised"):
    """Arguments of grpo_step_loss for pairs of several steps.

    With a clip range of 0.15 it holds the third pair's ratio from above and the last one's from below.
    """
    generator = torch.Generator().manual_seed(0)
    velocity, sample, noise, uncond, reference = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)
    )
    c = step_coefficients(SIGMAS, dynamics).at(STEPS)
    guided = {"velocity_uncond": uncond, "guidance_scale": guidance} if guidance is not None else {}
    prev_sample, drawn_log_prob = sde_step(
        velocity, sample, c.c_x, c.c_v, c.std, noise=noise, log_prob=log_prob, **guided
    )
    return {
        "velocity": velocity,
        "sample": sample,
        "prev_sample": prev_sample,
        "c_x": c.c_x,
        "c_v": c.c_v,
        "std": c.std,
        "dt": c.dt,
        "old_log_prob": drawn_log_prob - torch.tensor([0.05, -0.1, 0.2, -0.2]),
        "advantage": torch.tensor([1.0, -2.0, 3.0, -0.5]),
        "velocity_ref": reference,
        "log_prob": log_prob,
        **guided,
    }


def guard_problem(dynamics="flow_sde", dtype=torch.float64, shape=(4, 3, 5), guidance=None, log_prob="normalised"):
    """The arguments for GRPO-Guard: the policy has moved along the noise of the step, and a little across it.

    With a clip range of 0.15 it holds the third pair's ratio from above and the last one's from below.
    """
    arguments = problem(dynamics, torch.float64, shape, guidance, log_prob)
    guided = {name: arguments[name] for name in ("velocity_uncond", "guidance_scale") if name in arguments}
    step = [arguments[name] for name in ("velocity", "sample", "c_x", "c_v", "std")]
    velocity_old = guided_velocity(arguments["velocity"], *guided.values()) if guided else arguments["velocity"]
    arguments["old_log_prob"] = sde_step(*step, prev_sample=arguments["prev_sample"], log_prob=log_prob, **guided)[1]
    column = (-1, *[1] * (len(shape) - 1))
    c_x, c_v, std = (value.double().view(column) for value in step[2:])
    noise = (arguments["prev_sample"] - c_x * arguments["sample"] - c_v * velocity_old) / std
    along = torch.tensor([0.05, -0.1, 0.3, -0.4], dtype=torch.float64) / noise.square().flatten(1).mean(1)
    across = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    across -= noise * ((across * noise).flatten(1).mean(1) / noise.square().flatten(1).mean(1)).view(column)
    moved = (along.view(column) * noise + across) / (c_v * (guidance or 1.0))
    arguments |= {"velocity": arguments["velocity"] + moved, "velocity_old": velocity_old}
    wide = ("c_x", "c_v", "std", "dt", "advantage")
    return {n: v.to(dtype) if torch.is_tensor(v) and n not in wide else v for n, v in arguments.items()}


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.7, 0.95, 1.0, 1.05, 1.4])
def test_clipping(ratio, advantage):
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, stats = grpo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), clip_range=0.1)
    bound = 1.1 if advantage > 0 else 0.9
    held = ratio > bound if advantage > 0 else ratio < bound
    assert loss.item() == pytest.approx(-advantage * (bound if held else ratio))
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert gradient.item() == pytest.approx(0 if held else -advantage * ratio)
    assert stats["ratio"].item() == pytest.approx(ratio)
    assert stats["log_prob_difference"].item() == pytest.approx(math.log(ratio))
    assert stats["policy_loss"].item() == loss.item()
    assert stats["clipped_above"].item() == (held and advantage > 0)
    assert stats["clipped_below"].item() == (held and advantage < 0)


@pytest.mark.parametrize(("clip", "expected"), [(5.0, [-5.0, 5.0]), (2.0, [-2.0, 2.0]), (math.inf, [-9.0, 7.0])])
def test_advantages_are_clipped(clip, expected):
    loss, _ = grpo_loss(torch.zeros(2), torch.zeros(2), torch.tensor([9.0, -7.0]), clip_range=0.1, advantage_clip=clip)
    assert loss.tolist() == expected


def test_statistics_are_detached():
    log_prob = torch.zeros(3, requires_grad=True)
    _, stats = grpo_loss(log_prob, torch.zeros(3), torch.ones(3), clip_range=0.1)
    arguments = problem()
    arguments["velocity"].requires_grad_()
    _, step_stats = grpo_step_loss(**arguments, clip_range=0.1)
    assert set(step_stats) == {*stats, "kl"}
    assert not any(value.requires_grad for value in (*stats.values(), *step_stats.values()))


def test_only_the_policys_velocity_carries_gradient():
    arguments = guard_problem(guidance=2.0)
    constants = ("velocity_ref", "velocity_old", "velocity_uncond", "old_log_prob", "advantage")
    for name in ("velocity", *constants):
        arguments[name].requires_grad_()
    grpo_step_loss(**arguments, clip_range=0.5, kl_weight=0.3)[0].sum().backward()
    assert arguments["velocity"].grad is not None
    assert [name for name in constants if arguments[name].grad is not None] == []


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_guard_is_the_papers_formula(dynamics, log_prob, guidance):
    """ratio = exp((log_prob - old_log_prob + b) std), whichever log-prob is used, and the loss is divided by -dt."""
    arguments = guard_problem(dynamics, guidance=guidance, log_prob=log_prob)
    loss, stats = grpo_step_loss(**arguments, clip_range=0.15, kl_weight=0.3)
    c_x, c_v, std, dt = (arguments[name].double().view(-1, 1, 1) for name in ("c_x", "c_v", "std", "dt"))
    velocity, uncond = arguments["velocity"], arguments.get("velocity_uncond")
    v = velocity if guidance is None else uncond + guidance * (velocity - uncond)
    mean, mean_old = (c_x * arguments["sample"] + c_v * u for u in (v, arguments["velocity_old"]))
    new, old = (torch.distributions.Normal(m, std).log_prob(arguments["prev_sample"]) for m in (mean, mean_old))
    b = ((mean - mean_old) ** 2 / (2 * std**2)).mean(dim=(1, 2))
    ratio = (((new - old).mean(dim=(1, 2)) + b) * std.flatten()).exp()
    torch.testing.assert_close(stats["ratio"], ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(stats["ratio"].log(), torch.tensor([0.05, -0.1, 0.3, -0.4]).double(), rtol=1e-6, atol=0)
    assert stats["clipped_above"].tolist() == [0, 0, 1, 0]
    assert stats["clipped_below"].tolist() == [0, 0, 0, 1]
    held = torch.tensor([ratio[0], ratio[1], 1.15, 0.85])
    expected = -arguments["advantage"] * held / -dt.flatten()
    torch.testing.assert_close(stats["policy_loss"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, stats["policy_loss"] + 0.3 * stats["kl"], rtol=1e-12, atol=0)
    plain, plain_stats = grpo_step_loss(**{**arguments, "velocity_old": None}, clip_range=0.15, kl_weight=0.3)
    for name in ("log_prob_difference", "kl"):
        assert torch.equal(stats[name], plain_stats[name])
    assert (loss != plain).all()


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
def test_gradcheck_of_guard(log_prob, kl_weight, guidance):
    arguments = guard_problem(guidance=guidance, log_prob=log_prob)
    velocity = arguments.pop("velocity").requires_grad_()
    loss = lambda v: grpo_step_loss(v, **arguments, clip_range=0.15, kl_weight=kl_weight)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (velocity,))


def test_a_guidance_scale_per_pair_is_that_of_each_pair_alone():
    arguments = problem(guidance=2.0)
    scales = torch.tensor([2.0, 4.5, 1.0, 2.0], dtype=torch.float64)

    def loss(pairs, scale):
        own = {name: value[pairs] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        own["velocity"] = own["velocity"].clone().requires_grad_()
        loss, _ = grpo_step_loss(**own | {"guidance_scale": scale}, clip_range=math.inf, kl_weight=0.1)
        return loss, torch.autograd.grad(loss.sum(), own["velocity"])[0]

    losses, gradients = loss(slice(None), scales)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close((losses[i : i + 1], gradients[i : i + 1]), loss(slice(i, i + 1), scale))


@pytest.mark.parametrize("guidance", [None, 4.5])
def test_gradient_of_guard_by_hand(guidance):
    """d loss / d v = -A ratio g c_v (x_next - mean_old) / (std D (-dt)), with the mean of the draw."""
    arguments = guard_problem(guidance=guidance)
    velocity = arguments["velocity"].requires_grad_()
    loss, stats = grpo_step_loss(**arguments, clip_range=0.15)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    c_x, c_v, std, dt = (arguments[name].double().view(-1, 1, 1) for name in ("c_x", "c_v", "std", "dt"))
    mean_old = c_x * arguments["sample"] + c_v * arguments["velocity_old"]
    moves = 1 - stats["clipped_above"] - stats["clipped_below"]
    factor = (-arguments["advantage"] * stats["ratio"] * moves).view(-1, 1, 1) * (guidance or 1.0) * c_v / std / -dt
    expected = factor * (arguments["prev_sample"] - mean_old) / velocity[0].numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient[:2].abs().min() > 0


def test_half_precision_log_probs_are_compared_in_float32():
    log_prob, old_log_prob = torch.tensor([-1.0, -3.0]).bfloat16(), torch.tensor([-1.001, -3.002])
    loss, stats = grpo_loss(log_prob, old_log_prob, torch.ones(2), clip_range=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(stats["ratio"], torch.tensor([0.001, 0.002]).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_ratio_is_one_before_the_first_update(dynamics, guidance, dtype):
    arguments = problem(dynamics, dtype, guidance=guidance)
    guided = {name: arguments[name] for name in ("velocity_uncond", "guidance_scale") if name in arguments}
    velocity_old = guided_velocity(arguments["velocity"], *guided.values()) if guided else arguments["velocity"]
    arguments["old_log_prob"] = sde_step(
        *(arguments[name] for name in ("velocity", "sample", "c_x", "c_v", "std")),
        prev_sample=arguments["prev_sample"],
        **guided,
    )[1]
    for old in (None, velocity_old):
        _, stats = grpo_step_loss(**arguments, clip_range=1e-5, velocity_old=old)
        assert (stats["ratio"] == 1).all()
        assert stats["ratio"].dtype == torch.float32
        assert (stats["clipped_above"] + stats["clipped_below"] == 0).all()


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
def test_gradcheck(log_prob, kl, guidance):
    arguments = problem(guidance=guidance, log_prob=log_prob)
    velocity = arguments.pop("velocity").requires_grad_()
    loss = lambda v: grpo_step_loss(v, **arguments, clip_range=0.15, kl=kl, kl_weight=0.3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (velocity,))


@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("log_prob", ["normalised", "unnormalised"])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_gradient_by_hand(dynamics, log_prob, kl, guidance):
    """d loss / d v = g [a (x_next - mean) + k (v - v_ref)], with one a and one k per pair."""
    arguments = problem(dynamics, guidance=guidance, log_prob=log_prob)
    velocity = arguments["velocity"].requires_grad_()
    kl_weight, clip_range = 0.3, 0.15
    loss, stats = grpo_step_loss(**arguments, clip_range=clip_range, kl=kl, kl_weight=kl_weight)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)

    g = guidance or 1.0
    uncond = arguments.get("velocity_uncond", torch.zeros_like(velocity))
    for b in range(len(velocity)):
        c_x, c_v, std, dt = (arguments[name][b].double() for name in ("c_x", "c_v", "std", "dt"))
        v = uncond[b] + g * (velocity[b].detach() - uncond[b])
        distance = arguments["prev_sample"][b] - (c_x * arguments["sample"][b] + c_v * v)
        size = v.numel()
        held = stats["clipped_above"][b] + stats["clipped_below"][b]
        slope = 1 / std**2 if log_prob == "normalised" else 2
        a = -arguments["advantage"][b] * stats["ratio"][b] * (1 - held) * c_v * slope / size
        scale = {"velocity": 1, "exact": c_v**2 / (2 * std**2), "flow_grpo": -dt * c_v**2 / (2 * std**2)}[kl]
        k = kl_weight * 2 * scale / size
        expected = g * (a * distance + k * (v - arguments["velocity_ref"][b]))
        torch.testing.assert_close(gradient[b], expected, rtol=1e-9, atol=1e-12)
    assert stats["clipped_above"].tolist() == [0, 0, 1, 0]
    assert stats["clipped_below"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_kl_kinds_have_one_definition_for_all_dynamics(dynamics):
    arguments = problem(dynamics)
    c_x, c_v, std, dt = (arguments[name].double().view(-1, 1, 1) for name in ("c_x", "c_v", "std", "dt"))
    mean = c_x * arguments["sample"] + c_v * arguments["velocity"]
    mean_ref = c_x * arguments["sample"] + c_v * arguments["velocity_ref"]
    normal, normal_ref = torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, std)
    diffusion = std / (-dt).sqrt()
    expected = {
        "exact": torch.distributions.kl_divergence(normal, normal_ref).mean(dim=(1, 2)),
        "flow_grpo": ((mean - mean_ref) ** 2 / (2 * diffusion**2)).mean(dim=(1, 2)),
        "velocity": (arguments["velocity"] - arguments["velocity_ref"]).square().mean(dim=(1, 2)),
    }
    unweighted, _ = grpo_step_loss(**arguments, clip_range=0.1)
    for kl in KL_KINDS:
        loss, stats = grpo_step_loss(**arguments, clip_range=0.1, kl=kl, kl_weight=0.3)
        torch.testing.assert_close(stats["kl"], expected[kl], rtol=1e-9, atol=0)
        torch.testing.assert_close(loss, unweighted + 0.3 * expected[kl], rtol=1e-9, atol=0)


@pytest.mark.parametrize("kl", KL_KINDS)
def test_kl_compares_guided_velocities(kl):
    arguments = problem(guidance=4.5)
    velocity, uncond = arguments["velocity"], arguments["velocity_uncond"]
    arguments["velocity_ref"] = uncond + 4.5 * (velocity - uncond)
    _, stats = grpo_step_loss(**arguments, clip_range=0.1, kl=kl, kl_weight=0.3)
    assert (stats["kl"] == 0).all()


@pytest.mark.parametrize("kl", KL_KINDS)
def test_each_term_alone_moves_the_velocity(kl):
    arguments = problem()
    velocity = arguments["velocity"].requires_grad_()
    policy, _ = grpo_step_loss(**{**arguments, "velocity_ref": None}, clip_range=0.5)
    divergence, _ = grpo_step_loss(**{**arguments, "advantage": torch.zeros(4)}, clip_range=0.5, kl=kl, kl_weight=0.3)
    for loss in (policy, divergence):
        (gradient,) = torch.autograd.grad(loss.sum(), velocity)
        assert gradient.abs().amin(dim=(1, 2)).min() > 0


def test_kl_without_weight_is_reported_only():
    arguments = problem()
    velocity = arguments["velocity"].requires_grad_()
    with_ref, stats = grpo_step_loss(**arguments, clip_range=0.1)
    without, no_stats = grpo_step_loss(**{**arguments, "velocity_ref": None}, clip_range=0.1)
    assert torch.equal(with_ref, without)
    assert (stats["kl"] > 0).all()
    assert "kl" not in no_stats
    assert torch.equal(*(torch.autograd.grad(loss.sum(), velocity)[0] for loss in (with_ref, without)))


def test_ode_pairs_have_no_policy_gradient():
    arguments = problem()
    c = step_coefficients(SIGMAS, "ode").at(STEPS)
    arguments |= {"c_x": c.c_x, "c_v": c.c_v, "std": c.std, "dt": c.dt, "old_log_prob": torch.zeros(4)}
    velocity = arguments["velocity"].requires_grad_()
    for kl, old in product(KL_KINDS, (None, arguments["velocity_ref"])):
        loss, stats = grpo_step_loss(**arguments, clip_range=0.1, kl=kl, kl_weight=0.3, velocity_old=old)
        (gradient,) = torch.autograd.grad(loss.sum(), velocity)
        assert (stats["ratio"] == 1).all()
        assert ((gradient != 0) == (kl == "velocity")).all()
        assert ((stats["kl"] > 0) == (kl == "velocity")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 1), (4, 2, 3, 7, 5)])
def test_half_precision_is_computed_in_float32(shape, dtype):
    arguments = problem(dtype=dtype, shape=shape, guidance=2.0)
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    results, gradients = [], []
    for variant in (arguments, wide, exact):
        variant["velocity"].requires_grad_()
        loss, _ = grpo_step_loss(**variant, clip_range=0.5, kl_weight=0.3)
        results.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), variant["velocity"])[0])
    assert results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1])
    assert gradients[0].dtype == dtype
    assert torch.equal(gradients[0], gradients[1].to(dtype))
    torch.testing.assert_close(results[1].double(), results[2], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradients[1].double(), gradients[2], rtol=2e-4, atol=2e-5)


def test_empty_batch():
    empty, none = torch.zeros(0, 3, 5), torch.zeros(0)
    loss, _ = grpo_step_loss(
        empty, empty, empty, none, none, none, none, none, none, clip_range=0.1, velocity_ref=empty, kl_weight=0.1
    )
    assert loss.shape == (0,)


def test_inputs_are_not_mutated():
    arguments = problem(guidance=2.0)
    copies = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    arguments["velocity"].requires_grad_()
    grpo_step_loss(**arguments, clip_range=0.1, kl_weight=0.3)[0].sum().backward()
    for name, copy in copies.items():
        assert torch.equal(arguments[name], copy)


def test_one_graph_under_compile():
    arguments = problem(dtype=torch.float32, guidance=2.0)
    compiled = torch.compile(grpo_step_loss, fullgraph=True, backend="eager")
    eager, _ = grpo_step_loss(**arguments, clip_range=0.1, kl_weight=0.3)
    assert torch.equal(compiled(**arguments, clip_range=0.1, kl_weight=0.3)[0], eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_range": 0.0}, "clip_range 0.0 is out of range: it must lie between 0 and 1"),
        ({"clip_range": 1.0}, "clip_range 1.0 is out of range"),
        ({"advantage_clip": 0.0}, "advantage_clip 0.0 is out of range: it must be positive"),
        ({"kl": "k3"}, "unknown kl 'k3': choose one of flow_grpo, exact, velocity"),
        ({"kl_weight": -0.1}, "kl_weight -0.1 is out of range"),
        ({"kl_weight": 0.1, "velocity_ref": None}, "kl_weight 0.1 needs velocity_ref"),
        ({"advantage": torch.zeros(4, 1)}, r"advantage has shape \(4, 1\), but log_prob has \(4,\)"),
        ({"old_log_prob": torch.zeros(3)}, r"old_log_prob has shape \(3,\), but log_prob has \(4,\)"),
        ({"velocity_ref": torch.zeros(1, 3, 5)}, r"velocity_ref has shape \(1, 3, 5\), but the sample has"),
        ({"velocity_old": torch.zeros(1, 3, 5)}, r"velocity_old has shape \(1, 3, 5\), but the sample has"),
        ({"dt": torch.zeros(2)}, r"dt has shape \(2,\): give a number or one value per row, shape \(4,\)"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_step_loss(**{**problem(), "clip_range": 0.1, **change})
