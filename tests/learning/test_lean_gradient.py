"""Settings that compute the policy gradient with fewer passes: the same gradient, or one whose mean is the same."""

import math
from dataclasses import replace

import pytest
import torch
from support.pipelines import perturb

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig

SIZE = 8


def trainer_of(output, *, groups=2, batch_size=64, guidance=4.5, rank=4, rollout=None, **update):
    settings = {"num_steps": 4, "window_size": None, "batch_size": 32, "guidance_scale": guidance} | (rollout or {})
    rollout = RolloutConfig(group_size=SIZE, **settings)
    config = Config(
        output_dir=str(output / "run"),
        trackers=[],
        policy=PolicyConfig(lora_rank=rank),
        prompts=PromptsConfig(per_epoch=groups),
        rollout=rollout,
        update=UpdateConfig(**{"per_epoch": 1, "batch_size": batch_size, "ema_decay": 0.0} | update),
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
        rewards={"jpeg_compressibility": 1},
    )
    trainer = Trainer(config)
    perturb(trainer.learner.parameters, 0.02, seed=0)
    return trainer


def gradient(trainer, batch):
    statistics = trainer.learner.accumulate(batch, trainer.objective.micro_batches(batch, 0, len(batch.advantages)))
    flat = torch.cat([p.grad.flatten() for p in trainer.learner.parameters if p.grad is not None])
    trainer.learner.optimizer.zero_grad()
    return flat, {name: torch.cat([s[name] for s in statistics if s]) for name in statistics[-1]}


def count_passes(trainer):
    passes = {True: 0, False: 0}

    def count(module, arguments, output):
        passes[torch.is_grad_enabled()] += len(output[0])

    trainer.policy.module.register_forward_hook(count)
    return passes


def test_kept_unconditional_velocities_give_the_same_gradient(tmp_path):
    """Of the first update, and with a forward pass less for each pair; the second update computes them again."""
    plain, kept = (trainer_of(tmp_path / str(keep), rollout={"keep_unconditional": keep}) for keep in (False, True))
    batch, kept_batch = plain.collect(0)[0], kept.collect(0)[0]
    assert kept_batch.trajectory.unconditional.shape == kept_batch.trajectory.latents[:, 1:].shape
    assert batch.trajectory.unconditional.shape[1] == 0
    passes, kept_passes = count_passes(plain), count_passes(kept)
    (expected, _), (found, statistics) = gradient(plain, batch), gradient(kept, kept_batch)
    assert (statistics["ratio"] == 1).all()
    assert torch.equal(found, expected) and expected.norm() > 0
    pairs = len(statistics["ratio"])
    assert (passes[True], passes[False]) == (kept_passes[True], pairs) == (pairs, pairs) and kept_passes[False] == 0

    perturb(kept.learner.parameters, 0.02, seed=1)
    gradient(kept, replace(kept_batch, has_rollout_weights=False))
    assert kept_passes[False] == pairs


@pytest.mark.parametrize("algorithm", ["grpo", "grpo_guard"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_equal_samples_share_the_passes_of_their_first_step(tmp_path, algorithm, guidance):
    """Rollout and update pass one of each group through the model. The gradient is that of the single samples."""
    window = {"num_steps": 7, "window_size": 2, "window_start": (0, 4), "tail_steps": 1, "solver": "dpm_solver"}
    settings = {"same_noise": True, "keep_unconditional": guidance != 1} | window
    trainer = trainer_of(tmp_path, groups=4, guidance=guidance, rollout=settings, batch_size=32, algorithm=algorithm)
    batch, _ = trainer.collect(0)
    steps = batch.trajectory.steps[:, 0]
    assert len(steps.unique()) > 1
    batch.advantages[:] = torch.linspace(-1, 1, len(steps))  # none is left out
    passes = count_passes(trainer)
    shared, statistics = gradient(trainer, batch)
    assert passes == {True: len(steps) // SIZE + len(steps), False: 0}
    assert (statistics["ratio"] == 1).all()  # a micro-batch is a batch of the rollout

    # the samples' own passes, in micro-batches that cut groups
    trainer.config.update.batch_size = 12
    cut, _ = gradient(trainer, batch)
    trainer.config.rollout.same_noise = False
    single, _ = gradient(trainer, batch)
    for found in (shared, cut):
        assert (found - single).norm() < 1e-5 * single.norm()
    assert passes[True] == len(steps) // SIZE + len(steps) + 5 + len(steps) + 2 * len(steps)


def test_only_the_first_update_of_an_epoch_has_the_rollouts_weights(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, per_epoch=2)
    batch, seen = trainer.collect(0)[0], []
    accumulate = trainer.learner.accumulate
    monkeypatch.setattr(
        trainer.learner,
        "accumulate",
        lambda batch, pairs: seen.append(batch.has_rollout_weights) or accumulate(batch, pairs),
    )
    trainer.learner.update(batch)
    assert seen == [True, False]


@pytest.mark.parametrize("kl", ["flow_grpo", "velocity"])
def test_the_mean_gradient_of_a_share_of_the_kl_is_that_of_the_whole(tmp_path, kl):
    """Over many draws of the share, each as large as its rounding up allows."""
    settings = {"kl": kl, "kl_weight": 1.0, "batch_size": 20}
    trainer = trainer_of(tmp_path, **settings)
    batch, _ = trainer.collect(0)
    batch.advantages[:] = 1e-9  # the KL alone
    full, expected = gradient(trainer, batch)
    trainer.config.update.kl_share = 0.25
    passes = count_passes(trainer)
    micro_batches = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
    chosen = sum(math.ceil(0.25 * len(rows)) for rows, _ in micro_batches)
    total, kls, draws = torch.zeros_like(full), [], 8
    for draw in range(draws):
        batch.trajectory.seeds += 1000 + draw
        found, statistics = gradient(trainer, batch)
        total += found / draws
        kls.append(float(statistics["kl"].mean()))
        assert int((statistics["kl"] > 0).sum()) == chosen
    one = (found - full).norm() / full.norm()
    assert (total - full).norm() / full.norm() < 2 * one / draws**0.5 < one
    assert sum(kls) / draws == pytest.approx(float(expected["kl"].mean()), rel=0.2)
    assert passes[False] == draws * (len(statistics["kl"]) + 2 * chosen)


def test_the_pairs_with_a_kl_are_a_function_of_seeds_and_steps(tmp_path):
    trainer = trainer_of(tmp_path, kl_weight=0.1)
    seeds = torch.arange(7)
    assert trainer.objective.kl_pairs(seeds, torch.zeros_like(seeds)).tolist() == list(range(7))
    trainer.config.update.kl_share = 0.5
    chosen = trainer.objective.kl_pairs(seeds, torch.zeros_like(seeds))
    assert len(set(chosen.tolist())) == 4
    assert not torch.equal(chosen, trainer.objective.kl_pairs(seeds, torch.ones_like(seeds)))
