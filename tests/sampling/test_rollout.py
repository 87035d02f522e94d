import pytest
import torch
from support.no_sync import NoSynchronisation

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import gaussian_log_prob, guided_velocity, sde_step, step_mean
from fastflowgrpo.policy import load_policy
from fastflowgrpo.sampling.coefficients import step_coefficients
from fastflowgrpo.sampling.rollout import sample_groups, sample_seeds, sliding_start, window_starts

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
    apart, together = TinyPolicy(), TinyPolicy()
    sample(apart)
    shared = sample(together, same_noise=True)
    assert not torch.equal(apart.seen[0][0], apart.seen[0][1])
    assert torch.equal(together.seen[0][0], together.seen[0][1])
    assert not torch.equal(together.seen[0][0], together.seen[0][2])
    assert not torch.equal(shared.final[0], shared.final[1])


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
def test_sampling_never_waits_for_the_device(guidance):
    policy = TinyPolicy()
    policy.seen = None
    policy.velocity = lambda latents, sigma, conditioning: latents * conditioning["text"][:, 0, None, None, None]
    unconditional = {"text": torch.zeros(1, 1)} if guidance != 1 else None
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), "flow_sde", 0.7)
    with NoSynchronisation():
        sample(policy, coefficients=coefficients, unconditional=unconditional, guidance_scale=guidance)


def test_on_step_is_called_once_per_step():
    calls = []
    sample(TinyPolicy(), on_step=lambda: calls.append(1))
    assert len(calls) == NUM_STEPS


def plain_samples(policy, conditioning, coefficients, starts, window_size, group_size, seeds, shape):
    """The expected samples: each computed alone, step after step, from the initial noise of its group."""
    final = []
    for group, start in enumerate(starts):
        row = {name: tensor[group : group + 1] for name, tensor in conditioning.items()}
        noise_seeds = sample_seeds([seeds[group]], group_size)
        for seed in noise_seeds:
            x = philox_normal(noise_seeds[:1], 0, (1, *shape)).to(policy.dtype)
            for i, sigma in enumerate(coefficients.sigma):
                velocity = policy.velocity(x, sigma.float()[None], row)
                if start <= i < start + window_size:
                    at = coefficients.at(torch.tensor([i]))
                    x, _ = sde_step(velocity, x, at.c_x, at.c_v, at.std, seed=seed[None], offset=i + 1)
                else:
                    x, _ = sde_step(velocity, x, 1.0, float(coefficients.dt[i]), 0.0)
            final.append(x)
    return torch.cat(final)


@pytest.mark.parametrize("starts", [(2, 2), (3, 1), (0, 2)])
def test_a_shared_prefix_is_computed_once_per_group(starts):
    policy = TinyPolicy()
    trajectory = sample(policy, starts=starts, window_size=2, group_size=3, same_noise=True)
    rows = [len(seen) for seen in policy.seen]
    assert rows == [2] * min(starts) + [6] * (NUM_STEPS - min(starts))
    conditioning = {"text": torch.arange(2.0)[:, None]}
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS, SHAPE), "flow_sde", 0.7)
    expected = plain_samples(TinyPolicy(), conditioning, coefficients, starts, 2, 3, (1, 2), SHAPE)
    torch.testing.assert_close(trajectory.final, expected)
    assert len(trajectory.final.flatten(1).unique(dim=0)) == 6
    # nothing is shared if each sample has its own noise, or if a window begins with the first step
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
    assert rows == [2] * 3 * calls + [8] * 3 * calls
    # nothing is shared if another group's window begins with the first step
    both = {name: tensor[[0, 1, 0]] for name, tensor in conditioning.items()}
    apart = sample_groups(policy, both, coefficients, (3, 3, 0), 2, 4, sample_seeds((1, 2, 3), 4), shape, **settings)
    torch.testing.assert_close(shared.final, apart.final[:8], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.latents, apart.latents[:8], rtol=1e-3, atol=1e-4)


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
