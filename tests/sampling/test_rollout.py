from dataclasses import fields
from functools import partial

import pytest
import torch
from support.no_sync import NoSynchronisation

from fastflowgrpo.config import PolicyConfig, RolloutConfig
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import gaussian_log_prob, guided_velocity, sde_step, step_mean
from fastflowgrpo.policy import load_policy
from fastflowgrpo.sampling.coefficients import step_coefficients
from fastflowgrpo.sampling.groups import GroupSampler
from fastflowgrpo.sampling.rollout import sample_groups, sample_seeds, sliding_start, window_starts
from fastflowgrpo.sampling.window import rollout_passes, tail_schedule

SHAPE = (2, 3, 3)
NUM_STEPS = 6


class TinyPolicy:
    """A velocity field that depends on everything it is given."""

    device = torch.device("cpu")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.seen: list[torch.Tensor] = []

    def sigmas(self, num_steps, shape):
        return torch.linspace(1, 0, num_steps + 1)

    def velocity(self, latents, sigma, conditioning):
        assert latents.dtype == self.dtype
        self.seen.append(latents.clone())
        shift = conditioning["text"][:, 0] + sigma
        return (torch.sin(3 * latents.float() + shift[:, None, None, None])).to(self.dtype)


def sample(
    policy,
    *,
    seeds=(1, 2),
    starts=(0, 2),
    window_size=3,
    group_size=2,
    dynamics="flow_sde",
    coefficients=None,
    **kwargs,
):
    return sample_groups(
        policy,
        {"text": torch.arange(len(seeds), dtype=torch.float32)[:, None]},
        coefficients or step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), dynamics, 0.7),
        starts,
        window_size,
        group_size,
        sample_seeds(seeds, group_size),
        SHAPE,
        **kwargs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_recorded_steps_are_the_steps_that_were_taken(dtype, dynamics):
    policy = TinyPolicy(dtype)
    trajectory = sample(policy, dynamics=dynamics)
    assert trajectory.latents.shape == (4, 4, *SHAPE)
    assert trajectory.latents.dtype == trajectory.final.dtype == dtype
    assert trajectory.log_probs.dtype == torch.float32
    assert trajectory.steps.tolist() == [[0, 1, 2], [0, 1, 2], [2, 3, 4], [2, 3, 4]]
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), dynamics, 0.7)
    for row in range(4):
        for slot, step in enumerate(trajectory.steps[row].tolist()):
            now, then = trajectory.latents[row, slot], trajectory.latents[row, slot + 1]
            assert torch.equal(now, policy.seen[step][row])
            assert torch.equal(then, policy.seen[step + 1][row])
            at = coefficients.at(torch.tensor([step]))
            velocity = policy.velocity(now[None], at.sigma, {"text": torch.tensor([[row // 2]])})
            mean = step_mean(velocity, now[None], at.c_x, at.c_v)
            expected = gaussian_log_prob(then[None], mean, at.std)
            torch.testing.assert_close(trajectory.log_probs[row, slot, None], expected)


def test_steps_outside_the_window_are_ode_steps():
    policy = TinyPolicy()
    trajectory = sample(policy, starts=(2, 2), window_size=1)
    states = [*policy.seen, trajectory.final]
    sigmas = policy.sigmas(NUM_STEPS, SHAPE)
    for step in range(NUM_STEPS):
        sigma = sigmas[step].expand(4)
        velocity = policy.velocity(states[step], sigma, {"text": torch.tensor([[0.0], [0.0], [1.0], [1.0]])})
        euler = states[step] + (sigmas[step + 1] - sigmas[step]) * velocity
        if step == 2:
            assert (states[step + 1] - euler).abs().max() > 0.05
        else:
            torch.testing.assert_close(states[step + 1], euler, rtol=1e-5, atol=1e-6)


def test_a_group_does_not_depend_on_its_batch():
    both = sample(TinyPolicy(), seeds=(1, 2), starts=(0, 2))
    # sample() would give the second group the text of the first
    alone = sample_groups(
        TinyPolicy(),
        {"text": torch.ones(1, 1)},
        step_coefficients(TinyPolicy().sigmas(NUM_STEPS, SHAPE), "flow_sde", 0.7),
        [2],
        3,
        2,
        sample_seeds([2], 2),
        SHAPE,
    )
    assert torch.equal(both.latents[2:], alone.latents)
    assert torch.equal(both.final[2:], alone.final)
    assert torch.equal(both.log_probs[2:], alone.log_probs)


def test_initial_noise_is_shared_in_a_group_only_with_same_noise():
    apart = sample(TinyPolicy(), starts=(0, 0))
    together = sample(TinyPolicy(), starts=(0, 0), same_noise=True)
    assert not torch.equal(apart.latents[0, 0], apart.latents[1, 0])
    assert torch.equal(together.latents[0, 0], together.latents[1, 0])
    assert not torch.equal(together.latents[0, 0], together.latents[2, 0])
    assert not torch.equal(together.final[0], together.final[1])


def test_window_starts_are_drawn_once_per_group():
    starts = window_starts(0, 4, list(range(200)))
    assert set(starts) == {0, 1, 2, 3}
    assert starts == window_starts(0, 4, list(range(200)))
    assert window_starts(3, 4, [5, 6]) == [3, 3]


def test_every_sample_has_its_own_seed():
    seeds = sample_seeds(range(50), 24)
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 50 * 24
    assert torch.equal(sample_seeds([7], 24), seeds[7 * 24 : 8 * 24])
    assert torch.equal(sample_seeds([7], 3), seeds[7 * 24 : 7 * 24 + 3])


def test_every_step_has_its_own_noise():
    policy = TinyPolicy()
    policy.velocity = lambda latents, sigma, conditioning: torch.zeros_like(latents)
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), "dance_sde", 0.7)
    trajectory = sample(policy, starts=(0, 0), coefficients=coefficients, group_size=50)
    at = coefficients.at(trajectory.steps)
    c_x, std = (value[..., None, None, None] for value in (at.c_x, at.std))
    noise = (trajectory.latents[:, 1:] - c_x * trajectory.latents[:, :-1]) / std
    drawn = torch.cat([trajectory.latents[:, :1], noise], 1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(drawn @ drawn.T / drawn.shape[1], torch.eye(4), atol=0.1, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("settings", [{}, {"same_noise": True, "tail_steps": 2, "solver": "dpm_solver"}])
def test_sampling_never_waits_for_the_device(guidance, settings):
    policy = TinyPolicy()
    policy.seen = None
    policy.velocity = lambda latents, sigma, conditioning: latents * conditioning["text"][:, 0, None, None, None]
    unconditional = {"text": torch.zeros(1, 1)} if guidance != 1 else None
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), "flow_sde", 0.7)
    with NoSynchronisation():
        sample(policy, coefficients=coefficients, unconditional=unconditional, guidance_scale=guidance, **settings)


@pytest.mark.parametrize("settings", [{}, {"same_noise": True}, {"tail_steps": 1}])
def test_on_step_is_called_once_per_step(settings):
    calls = []
    sample(TinyPolicy(), on_step=lambda: calls.append(1), **settings)
    assert len(calls) == NUM_STEPS


def plain_samples(
    policy, conditioning, coefficients, starts, window_size, group_size, seeds, shape, unconditional=None, guidance=1.0
):
    """The expected samples: each computed alone, step after step, from the initial noise of its group."""
    final = []
    for group, start in enumerate(starts):
        row = {name: tensor[group : group + 1] for name, tensor in conditioning.items()}
        noise_seeds = sample_seeds([seeds[group]], group_size)
        for seed in noise_seeds:
            x = philox_normal(noise_seeds[:1], 0, (1, *shape)).to(policy.dtype)
            for i, sigma in enumerate(coefficients.sigma):
                velocity = policy.velocity(x, sigma.float()[None], row)
                uncond = None if unconditional is None else policy.velocity(x, sigma.float()[None], unconditional)
                guided = {"velocity_uncond": uncond, "guidance_scale": guidance}
                if start <= i < start + window_size:
                    at = coefficients.at(torch.tensor([i]))
                    x, _ = sde_step(velocity, x, at.c_x, at.c_v, at.std, seed=seed[None], offset=i + 1, **guided)
                else:
                    x, _ = sde_step(velocity, x, 1.0, float(coefficients.dt[i]), 0.0, **guided)
            final.append(x)
    return torch.cat(final)


@pytest.mark.parametrize(
    ("starts", "prefix", "tail"),
    [((2, 2), [2, 2], [6, 6]), ((3, 1), [2, 1, 1], [6, 3, 3]), ((0, 2), [1, 1], [6, 6, 3, 3])],
)
def test_equal_samples_are_computed_once_per_group(starts, prefix, tail):
    """Those before each group's own window, and those of its first step."""
    policy = TinyPolicy()
    trajectory = sample(policy, starts=starts, window_size=2, group_size=3, same_noise=True)
    rows = [len(seen) for seen in policy.seen]
    assert rows == [*prefix, 2, 6, *tail]
    assert sum(rows) == sum(rollout_passes(start, 2, NUM_STEPS, 3, True, None) for start in starts)
    conditioning = {"text": torch.arange(2.0)[:, None]}
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), "flow_sde", 0.7)
    expected = plain_samples(TinyPolicy(), conditioning, coefficients, starts, 2, 3, (1, 2), SHAPE)
    assert torch.equal(trajectory.final, expected)
    assert len(trajectory.final.flatten(1).unique(dim=0)) == 6
    # nothing is shared if each sample has its own noise
    apart = TinyPolicy()
    sample(apart, starts=(2, 2), window_size=2, group_size=3)
    assert [len(seen) for seen in apart.seen] == [6] * NUM_STEPS


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_shared_prefix_changes_transformer_samples_only_by_rounding(guidance):
    policy = load_policy("shapes", PolicyConfig())
    conditioning, shape = policy.encode(["a photo of a red circle", "a photo of two squares"]), (8, 3, 3)
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, policy.latent_shape(None, None)), "flow_sde", 0.7)
    unconditional = policy.encode([""]) if guidance != 1 else None
    rows = []
    policy.module.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["hidden_states"])), with_kwargs=True)
    settings = {"unconditional": unconditional, "guidance_scale": guidance, "same_noise": True}
    shared = sample_groups(policy, conditioning, coefficients, (3, 3), 2, 4, sample_seeds((1, 2), 4), shape, **settings)
    calls = 1 if guidance == 1 else 2
    assert rows == [2] * 4 * calls + [8] * 2 * calls
    expected = plain_samples(policy, conditioning, coefficients, (3, 3), 2, 4, (1, 2), shape, unconditional, guidance)
    torch.testing.assert_close(shared.final, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shorter_tail_leaves_prefix_and_window_as_they_are(dtype, guidance):
    """Bit for bit, for groups with windows anywhere; the tail has at most so many passes and ends clean."""
    starts, window_size = (3, 0, 1), 2
    settings = {"starts": starts, "window_size": window_size, "seeds": (1, 2, 3), "keep_velocities": True}
    settings |= {"guidance_scale": guidance, "unconditional": {"text": torch.ones(1, 1)} if guidance != 1 else None}
    full = sample(TinyPolicy(dtype), **settings)
    policy = TinyPolicy(dtype)
    for solver, tail_steps in (("euler", 2), ("dpm_solver", 2), ("dpm_solver", None)):
        policy.seen.clear()
        shorter = sample(policy, tail_steps=tail_steps, solver=solver, **settings)
        for name in ("latents", "velocities", "log_probs", "steps", "seeds"):
            assert torch.equal(getattr(shorter, name), getattr(full, name))
        assert not torch.equal(shorter.final, full.final)
        passes = sum(rollout_passes(start, window_size, NUM_STEPS, 2, False, tail_steps) for start in starts)
        assert sum(len(seen) for seen in policy.seen) == passes * (1 if guidance == 1 else 2)
    # a tail that is not shorter is the same, and a group's does not depend on the others of its batch
    assert torch.equal(sample(TinyPolicy(dtype), tail_steps=4, **settings).final, full.final)
    alone = sample(TinyPolicy(dtype), tail_steps=2, **settings | {"starts": (3,), "seeds": (1,)})
    assert torch.equal(alone.final, sample(TinyPolicy(dtype), tail_steps=2, **settings).final[:2])


@pytest.mark.parametrize("settings", [{"same_noise": True}, {"tail_steps": 2}])
def test_ranks_run_equally_many_passes_whatever_their_groups_windows(settings):
    for starts in ((0, 0), (3, 1), (4, 4)):
        policy, calls = TinyPolicy(), iter(range(NUM_STEPS))
        expected = sample(TinyPolicy(), starts=starts, window_size=1, **settings)
        on_step = partial(next, calls)
        found = sample(policy, starts=starts, window_size=1, possible_starts=range(5), on_step=on_step, **settings)
        assert torch.equal(found.final, expected.final)
        assert len(policy.seen) == 4 + 1 + (2 if "tail_steps" in settings else 5)
        assert next(calls, None) is None


def test_the_steps_of_a_tail_divide_its_range_and_end_with_zero():
    sigmas = torch.tensor([0.9, 0.8, 0.6, 0.3, 0.0], dtype=torch.float64)
    assert tail_schedule(sigmas, 2).tolist() == [0.9, 0.6, 0.0]
    assert tail_schedule(sigmas, 1).tolist() == [0.9, 0.0]
    assert tail_schedule(sigmas, 3).tolist() == pytest.approx([0.9, 0.8 - 0.2 / 3, 0.6 - 0.6 / 3, 0.0])
    for tail_steps in (None, 4, 9):
        assert torch.equal(tail_schedule(sigmas, tail_steps), sigmas)


@pytest.mark.parametrize(
    ("dynamics", "starts", "drawn"),
    [("flow_sde", (1, 4), [0, 2, 5]), ("flow_cps", (1, 2), [0, 2, 3]), ("ode", (0, 0), [0])],
)
def test_noise_is_drawn_only_in_stochastic_steps(monkeypatch, dynamics, starts, drawn):
    offsets = []

    def counted(seed, offset, *rest):
        offsets.append(offset)
        return philox_normal(seed, offset, *rest)

    monkeypatch.setattr("fastflowgrpo.sampling.rollout.philox_normal", counted)
    monkeypatch.setattr("fastflowgrpo.kernels.sde_step.philox_normal", counted)
    sample(TinyPolicy(), starts=starts, window_size=1, dynamics=dynamics)
    assert offsets == drawn


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_velocities_are_exact(dtype, guidance):
    policy = TinyPolicy(dtype)
    unconditional = {"text": torch.full((1, 1), 5.0)} if guidance != 1 else None
    settings = {"unconditional": unconditional, "guidance_scale": guidance}
    plain = sample(policy, **settings)
    trajectory = sample(policy, keep_velocities=True, **settings)
    assert torch.equal(plain.final, trajectory.final)
    assert plain.velocities.numel() == 0
    sigma = policy.sigmas(NUM_STEPS, SHAPE)[trajectory.steps].flatten()
    latents = trajectory.latents[:, :-1].flatten(0, 1)
    text = torch.arange(2.0).repeat_interleave(6)[:, None]
    velocity = policy.velocity(latents, sigma, {"text": text})
    uncond = policy.velocity(latents, sigma, {"text": text * 0 + 5}) if guidance != 1 else None
    expected = guided_velocity(velocity, uncond, guidance)
    assert torch.equal(trajectory.velocities.flatten(0, 1).float(), expected)


def test_images_are_the_same_if_steps_are_not_kept():
    kept, not_kept = sample(TinyPolicy()), sample(TinyPolicy(), keep_steps=False, keep_velocities=True)
    assert torch.equal(kept.final, not_kept.final)
    assert torch.equal(kept.seeds, sample_seeds((1, 2), 2))
    for name in ("latents", "velocities", "log_probs", "steps"):
        assert getattr(not_kept, name).shape[:2] == (4, 0)


def test_a_sliding_window_goes_from_noise_to_data_and_stays():
    assert [sliding_start(1, 6, 2, 3, epoch) for epoch in range(12)] == [1, 1, 1, 3, 3, 3, 5, 5, 5, 5, 5, 5]
    assert sliding_start(0, 1, 1, 1, 10**6) == 0
    assert [sliding_start(0, 4, 1, 1, epoch) for epoch in range(6)] == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("same_noise", [False, True])
def test_fewer_groups_are_filled_up_and_their_trajectories_are_the_same(same_noise):
    settings = RolloutConfig(group_size=2, num_steps=NUM_STEPS, window_size=3, same_noise=same_noise)
    found, batches = [], []
    for fill_up_to in (0, 3):
        policy = TinyPolicy()
        coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), "flow_sde", 0.7)
        needs = {"keep_steps": True, "keep_velocities": True, "equal_passes": False, "fill_up_to": fill_up_to}
        sampler = GroupSampler(settings, policy, coefficients, SHAPE, **needs)
        groups = {"text": torch.arange(2.0)[:, None]}
        found.append(sampler.sample([0, 2], sample_seeds([1, 2], 2), groups, None, lambda: None))
        batches.append(max(map(len, policy.seen)))
    assert batches == [4, 6]
    for field in fields(found[0]):
        assert torch.equal(*(getattr(trajectory, field.name) for trajectory in found)), field.name
