"""Flow-GRPO in a loop of your own, on the public operations alone: no Trainer, no pipeline, no settings.

The policy is a small network that moves noise to points of a plane; the reward prefers points near (1, 1).
"""

import torch
from torch import nn

from fastflowgrpo import group_advantages, grpo_step_loss, sde_step
from fastflowgrpo.sampling.coefficients import step_coefficients

GROUPS, GROUP_SIZE, NUM_STEPS, EPOCHS = 16, 16, 8, 60
SIZE = GROUPS * GROUP_SIZE

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
schedule = step_coefficients(torch.linspace(1, 0, NUM_STEPS + 1), "flow_sde", noise_level=0.7)
group_ids = torch.arange(GROUPS).repeat_interleave(GROUP_SIZE)


def velocity(sample, sigma):
    return network(torch.cat([sample, sigma[:, None]], 1))


for epoch in range(EPOCHS):
    # Rollout: stochastic steps, each with the log-prob of the sample that it drew.
    sample, trajectory = torch.randn(SIZE, 2), []
    seeds = torch.randint(2**62, (SIZE,))
    with torch.no_grad():
        for i in range(NUM_STEPS - 1):
            step = schedule.at(torch.full((SIZE,), i))
            drawn, log_prob = sde_step(
                velocity(sample, step.sigma), sample, step.c_x, step.c_v, step.std, seed=seeds, offset=i
            )
            trajectory.append((step, sample, drawn, log_prob))
            sample = drawn
        last = schedule.at(torch.full((SIZE,), NUM_STEPS - 1))  # by the ODE: it is not trained
        points = sample + last.dt[:, None] * velocity(sample, last.sigma)

    rewards = -(points - 1).norm(dim=1)
    advantages = group_advantages(rewards, group_ids).float()

    # Update: the loss is a function of the velocity.
    for step, sample, drawn, log_prob in trajectory:
        new_velocity = velocity(sample, step.sigma)
        coefficients = (step.c_x, step.c_v, step.std, step.dt)
        loss, stats = grpo_step_loss(new_velocity, sample, drawn, *coefficients, log_prob, advantages, clip_range=0.2)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    if epoch % 10 == 0 or epoch == EPOCHS - 1:
        print(f"epoch {epoch:2}  reward {rewards.mean():+.3f}  largest ratio {stats['ratio'].max():.3f}")
