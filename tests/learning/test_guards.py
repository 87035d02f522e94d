"""The guards in the loss, their formulas written out in float64, and what the metrics say of collapse."""

import math
from dataclasses import replace

import pytest
import torch
from support.pipelines import perturb

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.kernels.grpo_loss import grpo_loss
from fastflowgrpo.learning.advantages import share_without_spread

SIZE = 8


def trainer_of(output, algorithm="grpo", *, guidance=1.0, dtype="float32", **update):
    if algorithm == "grpo":
        rollout = RolloutConfig(guidance_scale=guidance, window_size=2, window_start=(0, 2))
    else:
        rollout = RolloutConfig(dynamics="ode")
    config = Config(
        output_dir=str(output / "run"),
        trackers=[],
        policy=PolicyConfig(lora_rank=4, dtype=dtype),
        prompts=PromptsConfig(per_epoch=2),
        rollout=replace(rollout, group_size=SIZE, num_steps=4, batch_size=2 * SIZE),
        update=UpdateConfig(**{"algorithm": algorithm, "per_epoch": 1, "batch_size": 64, "ema_decay": 0.0} | update),
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
        rewards={"jpeg_compressibility": 1},
    )
    return Trainer(config)


def pairs(trainer, batch):
    (rows, slots), *rest = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
    assert not rest
    return rows, slots


def gradient_of(trainer, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.learner.parameters, retain_graph=True)])


def velocity_of(trainer, batch, rows, slots):
    """The guided velocity at the start of the pairs' steps, float64 but for the transformer."""
    sample = batch.trajectory.latents[rows, slots]
    sigma = trainer.coefficients.at(batch.trajectory.steps[rows, slots]).sigma
    conditioning = {name: tensor[rows // SIZE] for name, tensor in batch.conditioning.items()}
    velocity = trainer.policy.velocity(sample, sigma, conditioning).double()
    if batch.unconditional is not None:
        empty = {name: tensor.expand(len(rows), *tensor.shape[1:]) for name, tensor in batch.unconditional.items()}
        with torch.no_grad():
            unconditional = trainer.policy.velocity(sample, sigma, empty).double()
        velocity = unconditional + trainer.config.rollout.guidance_scale * (velocity - unconditional)
    return velocity


def mean(tensor):
    return tensor.flatten(1).mean(1)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_pair_that_has_diverged_in_the_direction_of_its_advantage_is_left_out(tmp_path, guidance):
    trainer = trainer_of(tmp_path, guidance=guidance, trust_region="divergence", kl_weight=0.1)
    batch, _ = trainer.collect(0)
    rows, slots = pairs(trainer, batch)
    old = velocity_of(trainer, batch, rows, slots).detach()
    perturb(trainer.learner.parameters, 0.03, seed=0)
    step, trajectory = trainer.coefficients.at(batch.trajectory.steps[rows, slots]), batch.trajectory
    c_x, c_v, std = (value.double() for value in (step.c_x, step.c_v, step.std))
    sample, next_sample = (trajectory.latents[rows, slots + k].double() for k in (0, 1))
    velocity = velocity_of(trainer, batch, rows, slots)
    shape = (-1, 1, 1, 1)
    mu, mu_old = (c_x.view(shape) * sample + c_v.view(shape) * v for v in (velocity, old))
    divergence = mean((mu - mu_old) ** 2) / (2 * std**2)
    log_ratio = (mean((next_sample - mu_old) ** 2) - mean((next_sample - mu) ** 2)) / (2 * std**2)
    advantages = batch.advantages[rows]
    limit = float(divergence.detach().sort().values[15:17].mean())  # half of the 32 pairs are beyond it
    left_out = (divergence >= limit) & (advantages * log_ratio > 0)
    assert left_out.any() and (~left_out & (divergence >= limit)).any()
    trainer.config.update.divergence_limit = limit
    loss, statistics = trainer.objective.loss(batch, rows, slots)
    torch.testing.assert_close(statistics["divergence"].double(), divergence.detach(), rtol=1e-3, atol=1e-6)
    assert torch.equal(statistics["clipped_above"] == 1, left_out & (advantages > 0))
    assert torch.equal(statistics["clipped_below"] == 1, left_out & (advantages < 0))

    with torch.no_grad(), trainer.policy.reference():
        reference = velocity_of(trainer, batch, rows, slots)
    kl = mean((velocity - reference) ** 2)
    expected = torch.where(left_out, 0, -advantages * log_ratio.exp()) + 0.1 * kl
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for chosen in (left_out, ~left_out):
        ours, theirs = gradient_of(trainer, loss[chosen].sum()), gradient_of(trainer, expected[chosen].sum())
        assert (ours - theirs).norm() < 1e-3 * theirs.norm() > 0

    trainer.config.update.kl_weight = 0.0
    loss = trainer.objective.loss(batch, rows, slots)[0]
    assert gradient_of(trainer, loss[left_out].sum()).norm() == 0
    assert gradient_of(trainer, loss[~left_out].sum()).norm() > 0


def test_nothing_has_diverged_before_the_first_update(tmp_path):
    trainer = trainer_of(tmp_path, guidance=4.5, dtype="bfloat16", trust_region="divergence", batch_size=2 * SIZE)
    batch, _ = trainer.collect(0)
    trainer.check_replay(batch)
    metrics = trainer.learner.update(batch)
    assert metrics["divergence"] == metrics["clipped_above"] == metrics["clipped_below"] == 0
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1
    assert metrics["grad_norm"] > 0
    perturb(trainer.learner.parameters, 0.1)
    assert trainer.learner.update(batch)["divergence"] > 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_infinite_clip_range_clips_nothing(backend):
    log_prob = torch.tensor([3.0, -3.0, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -2.0])
    loss, statistics = grpo_loss(log_prob, torch.zeros(3), advantage, clip_range=math.inf, backend=backend)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), -advantage * log_prob.detach().exp())
    torch.testing.assert_close(log_prob.grad, -advantage * log_prob.detach().exp())
    assert not statistics["clipped_above"].any() and not statistics["clipped_below"].any()


@pytest.mark.parametrize(("algorithm", "guidance"), [("grpo", 1.0), ("grpo", 4.5), ("nft", 1.0), ("awm", 1.0)])
def test_the_norm_guard_is_its_formula(tmp_path, algorithm, guidance):
    """The difference that its weight makes to the loss and the gradient, at velocities of which some have grown."""
    trainer = trainer_of(tmp_path, algorithm, guidance=guidance)
    perturb(trainer.learner.parameters, 0.1, seed=4)
    batch, _ = trainer.collect(0)
    rows, slots = pairs(trainer, batch)

    def found(weight):
        trainer.config.update.norm_guard_weight = weight
        loss, statistics = trainer.objective.loss(batch, rows, slots)
        return loss.detach(), gradient_of(trainer, loss.mean()), statistics

    def velocity():
        if algorithm == "grpo":
            return velocity_of(trainer, batch, rows, slots)
        return trainer.objective.add_noise(batch, rows, slots).velocity(trainer.policy).double()

    with torch.no_grad(), trainer.policy.reference():
        reference = velocity()
    ratio = velocity().flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    expected = 0.7 * (ratio - 1).clamp(min=0) ** 2
    assert (ratio > 1).any() and (ratio < 1).any()
    expected_gradient = gradient_of(trainer, expected.mean())
    (plain, plain_gradient, plain_statistics), (loss, gradient, statistics) = found(0.0), found(0.7)
    torch.testing.assert_close((loss - plain).double(), expected.detach(), rtol=1e-3, atol=1e-5)
    assert (gradient - plain_gradient - expected_gradient).norm() < 1e-3 * gradient.norm()
    assert expected_gradient.norm() > 0
    torch.testing.assert_close(statistics["norm_ratio"].double(), ratio.detach(), rtol=1e-4, atol=0)
    assert "norm_ratio" not in plain_statistics and "kl" in statistics


def test_the_norm_guard_shares_the_references_pass_with_the_kl(tmp_path):
    """So kl_share scales both: the mean of the pairs that have a reference."""
    trainer = trainer_of(tmp_path, kl_weight=0.1)
    perturb(trainer.learner.parameters, 0.1, seed=4)
    batch, _ = trainer.collect(0)
    rows, slots = pairs(trainer, batch)
    passes = []
    trainer.policy.module.register_forward_hook(lambda module, inputs, output: passes.append(len(output[0])))

    def losses(**update):
        for name, value in update.items():
            setattr(trainer.config.update, name, value)
        passes.clear()
        loss, statistics = trainer.objective.loss(batch, rows, slots)
        return loss.detach(), statistics, list(passes)

    plain, full, both = losses(norm_guard_weight=0.0), losses(norm_guard_weight=1.0), losses(kl_weight=0.0)
    assert plain[2] == full[2] == both[2] == [len(rows)] * 2
    torch.testing.assert_close(plain[1]["norm_ratio"], full[1]["norm_ratio"])
    shared = losses(kl_share=0.25)
    count = math.ceil(0.25 * len(rows))
    assert shared[2] == [count, len(rows)]
    chosen = trainer.objective.kl_pairs(batch.trajectory.seeds[rows], slots)
    expected = torch.zeros_like(plain[0])
    expected[chosen] = (len(rows) / count) * (both[0] - losses(norm_guard_weight=0.0)[0])[chosen]
    assert expected.max() > 1e-3
    torch.testing.assert_close(shared[0] - losses(norm_guard_weight=0.0)[0], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(shared[1]["norm_ratio"].mean(), full[1]["norm_ratio"][chosen].mean())


def test_metrics_of_collapse(tmp_path):
    trainer = trainer_of(tmp_path)
    batch, metrics = trainer.collect(0)
    rms = batch.trajectory.final.double().square().mean((1, 2, 3)).sqrt()
    assert metrics["latent_rms"] == pytest.approx(float(rms.mean()), rel=1e-5)
    assert metrics["groups_without_spread"] == 0
    advantages = torch.zeros(2 * SIZE).double()
    advantages[:4] = torch.tensor([1.0, -1.0, 2.0, math.nan])
    metrics = trainer.learner.update(replace(batch, advantages=advantages))
    assert (metrics["trained_pairs"], metrics["effective_pairs"]) == (6, 6 / 32)
    trainer.config.update.clip_range = 1e-9
    metrics = trainer.learner.update(replace(batch, advantages=advantages))
    clipped = metrics["clipped_above"] + metrics["clipped_below"]
    assert clipped > 0 and metrics["effective_pairs"] == pytest.approx(6 / 32 * (1 - clipped))
    assert trainer.learner.update(replace(batch, advantages=0 * advantages.nan_to_num()))["effective_pairs"] == 0


def test_groups_without_spread():
    nan = math.nan
    rewards = torch.tensor([1.0, 1, 1, 1, 1.0004, 1, 1, 1, nan, 2, 3, nan, nan, nan, nan, nan, nan, 1, nan, nan])
    assert share_without_spread(rewards, 4) == pytest.approx(3 / 5)
