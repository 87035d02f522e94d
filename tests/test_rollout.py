import pytest
import torch
from no_sync import NoSynchronisation

from fastflowgrpo.kernels.sde_step import gaussian_log_prob, step_mean
from fastflowgrpo.rollout import sample_groups, sample_seeds, window_starts
from fastflowgrpo.sde import step_coefficients

SHAPE = (2, 3, 3)
NUM_STEPS = 6


class TinyPolicy:
    """A velocity field that depends on everything it is given."""

    device = torch.device("cpu")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.seen: list[torch.Tensor] = []

    def sigmas(self, num_steps):
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
        coefficients or step_coefficients(policy.sigmas(NUM_STEPS), dynamics, 0.7),
        starts,
        window_size,
        group_size,
        seeds,
        SHAPE,
        **kwargs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps", "dance_sde"])
def test_the_recorded_steps_are_those_that_were_taken(dtype, dynamics):
    policy = TinyPolicy(dtype)
    trajectory = sample(policy, dynamics=dynamics)
    assert trajectory.latents.shape == (4, 4, *SHAPE)
    assert trajectory.latents.dtype == trajectory.final.dtype == dtype
    assert trajectory.log_probs.dtype == torch.float32
    assert trajectory.steps.tolist() == [[0, 1, 2], [0, 1, 2], [2, 3, 4], [2, 3, 4]]
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS), dynamics, 0.7)
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


def test_outside_the_window_the_steps_are_the_odes():
    policy = TinyPolicy()
    trajectory = sample(policy, starts=(2, 2), window_size=1)
    states = [*policy.seen, trajectory.final]
    sigmas = policy.sigmas(NUM_STEPS)
    for step in range(NUM_STEPS):
        sigma = sigmas[step].expand(4)
        velocity = policy.velocity(states[step], sigma, {"text": torch.tensor([[0.0], [0.0], [1.0], [1.0]])})
        euler = states[step] + (sigmas[step + 1] - sigmas[step]) * velocity
        if step == 2:
            assert (states[step + 1] - euler).abs().max() > 0.05
        else:
            torch.testing.assert_close(states[step + 1], euler, rtol=1e-5, atol=1e-6)


def test_a_group_is_the_same_whatever_it_is_batched_with():
    both = sample(TinyPolicy(), seeds=(1, 2), starts=(0, 2))
    # alone, the second group would get the first's text
    alone = sample_groups(
        TinyPolicy(),
        {"text": torch.ones(1, 1)},
        step_coefficients(TinyPolicy().sigmas(NUM_STEPS), "flow_sde", 0.7),
        [2],
        3,
        2,
        [2],
        SHAPE,
    )
    assert torch.equal(both.latents[2:], alone.latents)
    assert torch.equal(both.final[2:], alone.final)
    assert torch.equal(both.log_probs[2:], alone.log_probs)


def test_initial_noise_is_shared_in_a_group_only_if_asked():
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


def test_every_sample_has_a_seed_of_its_own():
    seeds = sample_seeds(range(50), 24)
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == 50 * 24
    assert torch.equal(sample_seeds([7], 24), seeds[7 * 24 : 8 * 24])
    assert torch.equal(sample_seeds([7], 3), seeds[7 * 24 : 7 * 24 + 3])


def test_every_step_has_noise_of_its_own():
    policy = TinyPolicy()
    policy.velocity = lambda latents, sigma, conditioning: torch.zeros_like(latents)
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS), "dance_sde", 0.7)
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
    coefficients = step_coefficients(policy.sigmas(NUM_STEPS), "flow_sde", 0.7)
    with NoSynchronisation():
        sample(policy, coefficients=coefficients, unconditional=unconditional, guidance_scale=guidance)


def test_on_step_is_called_once_per_step():
    calls = []
    sample(TinyPolicy(), on_step=lambda: calls.append(1))
    assert len(calls) == NUM_STEPS
