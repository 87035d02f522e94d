"""The losses on the bundled world: their closed forms, and that each moves the parameters the right way."""

import math
from dataclasses import replace

import pytest
import torch
from support.pipelines import perturb

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity, step_mean
from fastflowgrpo.learning import OBJECTIVES
from fastflowgrpo.learning.flow_matching import noise_draw
from fastflowgrpo.rewards import Scores
from fastflowgrpo.sampling.ode import sample_ode

NAN = math.nan
LIKELIHOODS = ["dpo", "sft", "rwr"]
SIZE = 8


def trainer_of(output, algorithm, *, guidance=1.0, dtype="float32", rewards=None, advantage=None, groups=4, **settings):
    rollout = {"dynamics": "flow_sde", "num_steps": 5, "window_size": 2, "window_start": (0, 3), "same_noise": False}
    rollout |= {"window_stride": 0, "window_epochs": 1}
    rollout |= {name: settings.pop(name) for name in list(settings) if name in rollout}
    if rollout["dynamics"] == "ode":
        rollout = {"dynamics": "ode", "num_steps": 5}
    config = Config(
        output_dir=str(output / "run"),
        trackers=[],
        prompts=PromptsConfig(per_epoch=groups),
        rollout=RolloutConfig(group_size=SIZE, batch_size=2 * SIZE, guidance_scale=guidance, **rollout),
        update=UpdateConfig(**{"algorithm": algorithm, "per_epoch": 1, "batch_size": 64, "ema_decay": 0.0} | settings),
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
        rewards=rewards or {"jpeg_compressibility": 1},
    )
    config.policy.dtype = dtype
    if advantage:
        config.advantage = replace(config.advantage, **advantage)
    return Trainer(config)


def micro_batches(trainer, batch):
    return trainer.objective.micro_batches(batch, 0, len(batch.advantages))


def all_stats(trainer, batch):
    with torch.no_grad():
        stats = [trainer.objective.loss(batch, rows, slots)[1] for rows, slots in micro_batches(trainer, batch)]
    return {name: torch.cat([s[name] for s in stats]) for name in stats[0]}


def gradient(trainer, batch):
    trainer.learner.accumulate(batch, micro_batches(trainer, batch))
    flat = torch.cat([p.grad.flatten() for p in trainer.learner.parameters if p.grad is not None])
    trainer.learner.optimizer.zero_grad()
    return flat


def gradient_of(trainer, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.learner.parameters)])


def flow_matching_errors(trainer, batch, rows, noise, level):
    """Written out, with noise and level from anywhere."""
    clean, mix = batch.trajectory.final[rows], level[:, None, None, None]
    conditioning = {name: tensor[rows // SIZE] for name, tensor in batch.conditioning.items()}
    velocity = trainer.policy.velocity((1 - mix) * clean + mix * noise, level, conditioning)
    return ((velocity - (noise - clean)) ** 2).mean(dim=(1, 2, 3))


def draws(batch, rows, slots):
    return noise_draw(batch.trajectory.seeds[rows], slots, 5, batch.trajectory.final[rows].shape)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("grpo", {}),
        ("grpo_guard", {}),
        ("dpo", {"dynamics": "ode"}),
        ("dpo", {"data": "offline"}),
        ("sft", {"dynamics": "ode", "noise_draws": 4}),
        ("rwr", {"dynamics": "flow_cps", "noise_draws": 4, "rwr_temperature": 0.05}),
    ],
)
def test_better_samples_become_likelier_than_worse_ones(tmp_path, algorithm, settings):
    """Log-probs of the steps, or for the baselines the fall of the flow-matching error, from the reference's to the
    policy's, at draws that were not trained on."""
    trainer = trainer_of(tmp_path, algorithm, learning_rate=1e-4, clip_range=0.01, **settings)
    batch, _ = trainer.collect(0)
    for _ in range(4):
        metrics = trainer.learner.update(batch)
    assert metrics["grad_norm"] > 0
    if algorithm in ("grpo", "grpo_guard"):
        rows = torch.cat([rows for rows, _ in micro_batches(trainer, batch)])
        difference = all_stats(trainer, batch)["log_prob_difference"].double()
        better = batch.advantages[rows] > 0
        assert difference[better].mean() > 0 > difference[~better].mean()
        return
    rows = torch.arange(len(batch.advantages)).repeat(8)
    slots = 10 + torch.arange(8).repeat_interleave(len(batch.advantages))
    with torch.no_grad():
        noise, level = draws(batch, rows, slots)
        now = flow_matching_errors(trainer, batch, rows, noise, level)
        with trainer.policy.reference():
            before = flow_matching_errors(trainer, batch, rows, noise, level)
    fall = (before - now).view(8, -1, SIZE).mean(0).double()
    weights = batch.advantages.view(-1, SIZE)
    better = weights > (1 if algorithm == "rwr" else 0)
    worse = weights < (0 if algorithm == "dpo" else 1)
    assert fall[better].mean() > 0
    assert fall[better].mean() > fall[worse].mean()
    if algorithm == "dpo":
        assert fall[worse].mean() < 0


@pytest.mark.parametrize("algorithm", LIKELIHOODS)
def test_the_baselines_are_what_their_formulas_say(tmp_path, algorithm):
    """The loss, and its gradient, written out, at weights that are not the reference's."""
    trainer = trainer_of(tmp_path, algorithm, noise_draws=3)
    perturb(trainer.learner.parameters, 0.01, seed=0)
    batch, _ = trainer.collect(0)
    rewards = torch.tensor(
        [[1.0, 5, 2, 3, 0, 2, 2, 1], [1, 1, 1, 1, 1, 1, 1, 1], [NAN, 1, 2, 2, NAN, 0, 0.5, 1], [0, 0, 0, 0, 0, 0, 0, 9]]
    )
    batch.advantages = trainer.objective.advantages(Scores(rewards.flatten()), {})
    best, worst = torch.tensor([1, 18, 31]), torch.tensor([4, 21, 24])
    terms = []
    for slot in range(3):
        if algorithm == "rwr":
            scored = torch.arange(32)[~rewards.flatten().isnan()]
            weights = torch.cat([len(group) * group.softmax(0) for group in (r[~r.isnan()] for r in rewards)])
            errors = flow_matching_errors(trainer, batch, scored, *draws(batch, scored, slot + 0 * scored))
            terms.append(weights * errors)
            continue
        noise, level = draws(batch, best, slot + 0 * best)
        errors = flow_matching_errors(trainer, batch, best, noise, level)
        if algorithm == "dpo":
            of_worst = flow_matching_errors(trainer, batch, worst, noise, level)
            with torch.no_grad(), trainer.policy.reference():
                reference = flow_matching_errors(trainer, batch, best, noise, level)
                reference_of_worst = flow_matching_errors(trainer, batch, worst, noise, level)
            difference = (errors - reference) - (of_worst - reference_of_worst)
            errors = -torch.log(torch.sigmoid(-100 / 2 * difference))
        terms.append(errors)
    expected = torch.cat(terms)
    stats = all_stats(trainer, batch)
    torch.testing.assert_close(stats["loss"], expected.detach().float(), rtol=2e-4, atol=1e-5)
    found, expected = gradient(trainer, batch), gradient_of(trainer, expected.mean())
    assert (found - expected).norm() < 1e-3 * expected.norm() > 0


def test_dpo_starts_at_log_2_and_leaves_it_by_beta_over_4(tmp_path):
    trainer = trainer_of(tmp_path, "dpo", dpo_beta=40.0)
    batch, _ = trainer.collect(0)
    stats = all_stats(trainer, batch)
    assert (stats["loss"] == torch.tensor(2.0).log()).all()
    assert (stats["dpo_fall_best"] == 0).all()
    assert (stats["dpo_accuracy"] == 0).all()
    best, worst = (torch.nonzero(batch.advantages == sign)[:, 0] for sign in (1, -1))
    noise, level = draws(batch, best, 0 * best)
    errors = [flow_matching_errors(trainer, batch, rows, noise, level) for rows in (best, worst)]
    expected = gradient_of(trainer, 40 / 4 * (errors[0] - errors[1]).mean())
    found = gradient(trainer, batch)
    assert (found - expected).norm() < 1e-3 * expected.norm() > 0


@pytest.mark.parametrize(
    ("dynamics", "dtype", "guidance"),
    [
        ("flow_sde", "float32", 4.5),
        ("flow_sde", "bfloat16", 4.5),
        ("flow_cps", "bfloat16", 1.0),
        ("dance_sde", "float16", 4.5),
    ],
)
def test_the_ratio_of_guard_is_exactly_one_before_the_first_update(tmp_path, guidance, dtype, dynamics):
    settings = {"guidance": guidance, "dtype": dtype, "dynamics": dynamics}
    trainer = trainer_of(tmp_path, "grpo_guard", groups=2, batch_size=16, **settings)
    batch, _ = trainer.collect(0)
    stats = all_stats(trainer, batch)
    assert len(stats["ratio"]) == 2 * int((batch.advantages != 0).sum()) > 0
    assert (stats["ratio"] == 1).all()
    assert (stats["log_prob_difference"] == 0).all()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_ratio_of_guard_is_the_papers(tmp_path, guidance):
    """(d log_prob + mean of (mean - mean_old)^2 / (2 std^2)) std, the old mean from a replay with the old weights."""
    trainer = trainer_of(tmp_path, "grpo_guard", groups=2, guidance=guidance)
    batch, _ = trainer.collect(0)
    rows, slots = micro_batches(trainer, batch)[0]
    sample = batch.trajectory.latents[rows, slots]
    at = trainer.coefficients.at(batch.trajectory.steps[rows, slots])
    conditioning = {name: tensor[rows // SIZE] for name, tensor in batch.conditioning.items()}

    @torch.no_grad()
    def mean():
        uncond = None
        if guidance != 1:
            empty = {name: t.expand(len(rows), *t.shape[1:]) for name, t in trainer.embed([""]).items()}
            uncond = trainer.policy.velocity(sample, at.sigma, empty)
        velocity = guided_velocity(trainer.policy.velocity(sample, at.sigma, conditioning), uncond, guidance)
        return step_mean(velocity.double(), sample, at.c_x, at.c_v)

    old = mean()
    perturb(trainer.learner.parameters, 0.01, seed=0)
    stats = trainer.objective.loss(batch, rows, slots)[1]
    b = ((mean() - old) ** 2).flatten(1).mean(1) / (2 * at.std.double() ** 2)
    expected = (stats["log_prob_difference"].double() + b) * at.std
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(stats["ratio"].double().log(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo_guard", *LIKELIHOODS])
def test_micro_batches_add_up_to_one_batch(tmp_path, algorithm):
    trainer = trainer_of(tmp_path, algorithm, groups=2)
    perturb(trainer.learner.parameters, 0.01, seed=0)
    batch, _ = trainer.collect(0)
    whole = gradient(trainer, batch)
    count = sum(len(rows) for rows, _ in micro_batches(trainer, batch))
    for size in (1, 5):
        trainer.config.update.batch_size = size
        pairs = micro_batches(trainer, batch)
        assert sum(len(rows) for rows, _ in pairs) == count
        assert len(pairs) == -(-count // (max(1, size // 2) if algorithm == "dpo" else size))
        torch.testing.assert_close(gradient(trainer, batch), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(("algorithm", "most", "halvings"), [("grpo", 16, 2), ("dpo", 4, 4)])
def test_where_memory_is_short_micro_batches_are_halved_and_the_update_is_the_same(
    tmp_path, monkeypatch, capsys, algorithm, most, halvings
):
    """With the bits of the smaller size from the beginning; without a shortage, with those of the run without it."""
    smaller, halving, roomy, plain = (
        trainer_of(tmp_path / str(i), algorithm, batch_size=size, halve_batch_size=halve)
        for i, (size, halve) in enumerate([(most, False), (64, True), (64, True), (64, False)])
    )
    batch, _ = plain.collect(0)
    loss, passes = halving.objective.loss, []

    def short(batch, rows, slots):
        passes.append(len(rows))
        result = loss(batch, rows, slots)
        if len(rows) * halving.objective.samples_per_pair(halving.config) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(halving.objective, "loss", short)
    changed = []
    for trainer in (smaller, halving, roomy, plain):
        trainer.learner.update(batch)
        changed.append(torch.cat([parameter.detach().flatten() for parameter in trainer.learner.parameters]))
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[2], changed[3])
    assert halving.objective.batch_size == most and roomy.objective.batch_size == 64
    assert max(passes[halvings:]) * halving.objective.samples_per_pair(halving.config) == most
    assert capsys.readouterr().out.count("out of memory: update.batch_size is ") == halvings
    monkeypatch.setattr(plain.objective, "loss", short)
    with pytest.raises(torch.OutOfMemoryError):
        plain.learner.update(batch)


def test_weights_of_the_baselines():
    rewards = torch.tensor([3.0, 1, 3, NAN, 2, 2, 2, 2, NAN, NAN, NAN, NAN, NAN, 7, NAN, NAN])
    nothing = [0.0, 0, 0, 0, NAN, NAN, NAN, NAN, NAN, 0, NAN, NAN]

    def weights(algorithm, temperature=1.0):
        rollout, update = RolloutConfig(group_size=4), UpdateConfig(algorithm=algorithm, rwr_temperature=temperature)
        objective = OBJECTIVES[algorithm](Config(rollout=rollout, update=update), None, None, 1)
        return objective.advantages(Scores(rewards), {})

    for algorithm, first in (("sft", [1, 0, 0, NAN]), ("dpo", [1, -1, 0, NAN])):
        expected = torch.tensor([*first, *nothing]).double()
        torch.testing.assert_close(weights(algorithm), expected, equal_nan=True)
    e = math.exp(2 / 0.5)
    rwr = weights("rwr", 0.5)
    torch.testing.assert_close(rwr[:3], 3 * torch.tensor([e, 1, e]).double() / (2 * e + 1))
    assert rwr[4:8].tolist() == [1, 1, 1, 1]
    assert rwr[13] == 1
    assert rwr.isnan().tolist() == rewards.isnan().tolist()


def test_noise_and_level_of_a_draw():
    """Standard normal and uniform, of seed and slot alone, and other than the rollout's noise."""
    seeds, shape = torch.arange(4000), (4000, 2, 2, 2)
    zero, one = torch.zeros_like(seeds), torch.ones_like(seeds)
    rollout = [philox_normal(seeds, step, shape) for step in range(11)]
    (noise, level), (other_noise, other_level) = (noise_draw(seeds, slots, 10, shape) for slots in (zero, one))
    some = noise_draw(seeds[5:9], one[5:9], 10, (4, 2, 2, 2))
    assert torch.equal(some[0], other_noise[5:9])
    assert torch.equal(some[1], other_level[5:9])
    quantiles = torch.linspace(0, 1, 11)
    for values in (level, other_level, torch.special.ndtr(noise).flatten()):
        assert values.min() >= 0
        assert values.max() <= 1
        torch.testing.assert_close(values.quantile(quantiles), quantiles, atol=0.03, rtol=0)
    columns = torch.stack([level, other_level, *(x[:, 0, 0, 0] for x in (noise, other_noise, *rollout))])
    torch.testing.assert_close(torch.corrcoef(columns), torch.eye(len(columns)), atol=0.08, rtol=0)


def test_offline_images_are_the_references(tmp_path):
    online = trainer_of(tmp_path / "online", "sft")
    offline = trainer_of(tmp_path / "offline", "sft", data="offline")
    before = online.collect(0)[0].trajectory.final
    perturb(online.learner.parameters, 0.01, seed=0)
    perturb(offline.learner.parameters, 0.01, seed=0)
    assert torch.equal(offline.collect(0)[0].trajectory.final, before)
    assert (online.collect(0)[0].trajectory.final - before).abs().max() > 0.1
    assert not torch.equal(offline.collect(1)[0].trajectory.final, before)


def test_baselines_keep_no_steps_and_ode_samples_are_the_odes(tmp_path):
    trainer = trainer_of(tmp_path, "dpo", dynamics="ode", guidance=2.0)
    batch, _ = trainer.collect(0)
    trajectory = batch.trajectory
    assert trajectory.latents.numel() == trajectory.velocities.numel() == trajectory.log_probs.numel() == 0
    noise = philox_normal(trajectory.seeds, 0, trajectory.final.shape)
    rows = torch.arange(4).repeat_interleave(SIZE)
    conditioning = {name: tensor[rows] for name, tensor in batch.conditioning.items()}
    expected = sample_ode(trainer.policy, conditioning, 5, noise, unconditional=batch.unconditional, guidance_scale=2.0)
    torch.testing.assert_close(trajectory.final, expected, rtol=1e-3, atol=1e-4)


def test_a_window_slides_over_the_epochs(tmp_path):
    trainer = trainer_of(tmp_path, "grpo", window_stride=1, window_epochs=2)
    starts = [trainer.sampler.starts(epoch, [7, 8]) for epoch in range(8)]
    assert starts == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2], [2, 2], [2, 2]]
    batch, _ = trainer.collect(3)
    assert batch.trajectory.steps.tolist() == [[1, 2]] * (4 * SIZE)


@pytest.mark.parametrize("mode", ["sum", "gdpo"])
def test_several_rewards_are_normalised_together_or_apart(tmp_path, mode):
    weights = {"jpeg_compressibility": 1.0, "jpeg_incompressibility": 0.2, "geneval": 0}
    trainer = trainer_of(tmp_path, "grpo", rewards=weights, advantage={"mode": mode, "std": "group"})
    scores = torch.rand(3, 4 * SIZE, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100], [1]])
    scores[0, 3] = scores[1, 17] = NAN  # missing
    scores[2, 5] = NAN  # of no weight
    for (name, thread), values in zip(trainer.scoring.threads.items(), scores, strict=True):
        parts = iter(values.split(2 * SIZE))
        thread.reward = lambda batch, parts=parts: Scores(next(parts))
        assert name in weights
    batch, metrics = trainer.collect(0)
    groups = scores.double().masked_fill(scores[:2].isnan().any(0), NAN).view(3, 4, SIZE)

    def normalised(x):
        centred = x - x.nanmean(-1, keepdim=True)
        return centred / (centred.square().nanmean(-1, keepdim=True).sqrt() + 1e-4)

    apart = normalised(groups[0]) + 0.2 * normalised(groups[1])
    together = normalised(groups[0] + 0.2 * groups[1])
    expected = (apart if mode == "gdpo" else together).flatten()
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert batch.advantages.isnan().nonzero()[:, 0].tolist() == [3, 17]
    assert (apart - together).abs().nan_to_num().max() > 0.1
    assert metrics["missing"] == 2
