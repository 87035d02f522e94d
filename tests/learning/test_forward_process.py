"""DiffusionNFT, AWM and DGPO on the bundled world: their closed forms, the old policy, and that better samples gain."""

import math
from dataclasses import replace

import pytest
import torch
from support.pipelines import perturb

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.learning.flow_matching import noise_draw
from fastflowgrpo.learning.snapshot import WeightSnapshot

SIZE, DRAWS = 8, 2
ALGORITHMS = ["nft", "awm"]


def trainer_of(output, algorithm, *, dtype="float32", **update):
    update = {"per_epoch": 1, "batch_size": 64, "ema_decay": 0.0, "noise_draws": DRAWS} | update
    config = Config(
        output_dir=str(output / "run"),
        trackers=[],
        prompts=PromptsConfig(per_epoch=2),
        rollout=RolloutConfig(dynamics="ode", num_steps=5, group_size=SIZE, batch_size=2 * SIZE),
        update=UpdateConfig(algorithm=algorithm, **update),
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
        rewards={"jpeg_compressibility": 1},
    )
    config.policy.dtype = dtype
    return Trainer(config)


def pairs(trainer, batch):
    micro_batches = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
    return tuple(torch.cat(part) for part in zip(*micro_batches, strict=True))


def velocities(trainer, batch, rows, draws, noise_rows=None):
    """v, v_old, v_ref, x_0, x_1 and t of samples, written out, in float64 but for the transformer."""
    clean = batch.trajectory.final[rows].float()
    seeds = batch.trajectory.seeds[rows if noise_rows is None else noise_rows]
    noise, level = noise_draw(seeds, draws, 5, clean.shape)
    t = level.view(-1, 1, 1, 1)
    conditioning = {name: tensor[rows // SIZE] for name, tensor in batch.conditioning.items()}

    def velocity():
        return trainer.policy.velocity((1 - t) * clean + t * noise, level, conditioning).double()

    with torch.no_grad():
        with trainer.learner.old_policy.active():
            old = velocity()
        with trainer.policy.reference():
            reference = velocity()
    return velocity(), old, reference, clean.double(), noise.double(), t.double()


def mean(tensor):
    return tensor.flatten(1).mean(1)


def written_out(algorithm, trainer, batch, rows, draws, beta=1.0, kl_weight=0.0):
    v, old, reference, x0, x1, t = velocities(trainer, batch, rows, draws)
    advantage = batch.advantages[rows].clamp(-5, 5)
    if algorithm == "nft":
        xt, r = (1 - t) * x0 + t * x1, advantage / 10 + 0.5
        errors = []
        for sign in (1, -1):
            prediction = xt - t * (old + sign * beta * (v - old))
            weight = mean((prediction - x0).abs()).clamp(min=1e-5).detach()
            errors.append(mean((prediction - x0) ** 2) / weight)
        loss = 5 / beta * (r * errors[0] + (1 - r) * errors[1])
    else:
        log_p = [
            -(t.flatten() / 0.25) * ((mean((velocity - (x1 - x0)) ** 2) + 1e-10) ** 0.25 - 1e-10**0.25)
            for velocity in (v, old)
        ]
        ratio = (log_p[0] - log_p[1]).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0, 2)) + mean((v - old) ** 2)
    return loss + kl_weight * mean((v - reference) ** 2)


def gradient_of(trainer, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.learner.parameters)])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_the_formula(tmp_path, algorithm, kl_weight):
    settings = {"nft_beta": 0.3} if algorithm == "nft" else {}
    trainer = trainer_of(tmp_path, algorithm, kl_weight=kl_weight, **settings)
    perturb(trainer.learner.parameters, 0.01, seed=0)
    trainer.learner.old_policy.follow(0.0)
    perturb(trainer.learner.parameters, 0.01, seed=1)
    batch, _ = trainer.collect(0)
    batch.advantages[0] = 7.0  # beyond the clip
    rows, draws = pairs(trainer, batch)
    expected = written_out(algorithm, trainer, batch, rows, draws, 0.3, kl_weight)
    theirs = gradient_of(trainer, expected.mean())  # first: the loss changes the weights and changes them back
    loss, statistics = trainer.objective.loss(batch, rows, draws)
    ours = gradient_of(trainer, loss.mean())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert ("kl" in statistics) == (kl_weight > 0)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_dgpo_is_its_formula(tmp_path, kl_weight):
    """A pair is a group at one noise and level; a sample without a score only has the KL."""
    trainer = trainer_of(tmp_path, "dgpo", kl_weight=kl_weight, dgpo_beta=40.0, dgpo_clip_range=0.003)
    perturb(trainer.learner.parameters, 0.01, seed=0)
    trainer.learner.old_policy.follow(0.0)
    perturb(trainer.learner.parameters, 0.005, seed=1)
    batch, _ = trainer.collect(0)
    batch.advantages[:3] = torch.tensor([math.nan, 0.0, 7.0])  # 7 is beyond the clip
    groups, draws = pairs(trainer, batch)
    assert groups.tolist() == [2, SIZE] * DRAWS, "the first sample with an advantage stands for its group"
    first, draw = (groups // SIZE * SIZE).repeat_interleave(SIZE), draws.repeat_interleave(SIZE)
    rows = first + torch.arange(SIZE).repeat(len(groups))
    v, old, reference, x0, x1, _ = velocities(trainer, batch, rows, draw, first)
    e, e_old, e_ref = (mean((velocity - (x1 - x0)) ** 2) for velocity in (v, old, reference))
    a = batch.advantages[rows].nan_to_num().clamp(-5, 5)
    preference = (-40 * a * (e - e_ref)).view(-1, SIZE).mean(1)
    q = (e_old - e).exp()
    moved = ((a > 0) & (q > 1.003)) | ((a < 0) & (q < 0.997))
    assert 0 < moved.sum() < (a != 0).sum(), "some samples are left out, and some are not"
    w = torch.sigmoid(-preference).detach().repeat_interleave(SIZE)
    kl = kl_weight * mean((v - reference) ** 2)
    expected = (torch.where(moved, 0, w * a * e) + kl).view(-1, SIZE).mean(1)
    unclipped = -torch.log(torch.sigmoid(preference)) / 40 + kl.view(-1, SIZE).mean(1)
    theirs, without_clip = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x.mean(), trainer.learner.parameters, retain_graph=True)])
        for x in (expected, unclipped)
    )
    loss, statistics = trainer.objective.loss(batch, groups, draws)
    ours = gradient_of(trainer, loss.mean())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() > 0
    clipped = statistics["clipped_above"] + statistics["clipped_below"]
    torch.testing.assert_close(clipped, moved.view(-1, SIZE).float().mean(1))
    trainer.config.update.dgpo_clip_range = 1e6
    ours = gradient_of(trainer, trainer.objective.loss(batch, groups, draws)[0].mean())
    assert (ours - without_clip).norm() < 1e-4 * without_clip.norm() > 0


def test_micro_batches_of_dgpo_hold_whole_groups(tmp_path):
    trainer = trainer_of(tmp_path, "dgpo")
    perturb(trainer.learner.parameters, 0.01, seed=0)
    batch, _ = trainer.collect(0)
    found = []
    for size, lengths in ((1, [1, 1, 1, 1]), (20, [2, 2]), (64, [4])):
        trainer.config.update.batch_size = size
        micro_batches = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
        assert [len(rows) for rows, _ in micro_batches] == lengths
        assert trainer.objective.batch_size == SIZE * max(1, size // SIZE)
        trainer.learner.accumulate(batch, micro_batches)
        found.append(torch.cat([parameter.grad.flatten() for parameter in trainer.learner.parameters]))
        trainer.learner.optimizer.zero_grad()
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-4 * found[0].norm()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_of_nft_at_the_old_policy_does_not_depend_on_beta(tmp_path, beta):
    """It is A grad [mean((x_t - t v - x_0)^2) / sg(mean|x_t - t v - x_0|)]."""
    trainer = trainer_of(tmp_path, "nft", nft_beta=beta)
    batch, _ = trainer.collect(0)
    rows, draws = pairs(trainer, batch)
    ours = gradient_of(trainer, trainer.objective.loss(batch, rows, draws)[0].mean())
    v, _, _, x0, x1, t = velocities(trainer, batch, rows, draws)
    error = t * (x1 - x0 - v)
    identity = batch.advantages[rows] * mean(error**2) / mean(error.abs()).detach()
    expected = gradient_of(trainer, identity.mean())
    assert (ours - expected).norm() < 1e-4 * expected.norm() > 0


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dgpo"])
def test_samples_without_an_advantage_are_not_trained(tmp_path, algorithm):
    trainer = trainer_of(tmp_path, algorithm)
    batch, _ = trainer.collect(0)
    advantages = torch.zeros_like(batch.advantages)
    advantages[1] = math.nan
    assert trainer.learner.update(replace(batch, advantages=advantages)) == {"trained_pairs": 0, "effective_pairs": 0}
    assert trainer.objective.micro_batches(replace(batch, advantages=advantages), 0, len(advantages)) == []
    # Nor has one a gradient: at the old policy the two halves of nft cancel.
    rows, draws = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    loss = trainer.objective.loss(replace(batch, advantages=torch.zeros_like(advantages)), rows, draws)[0]
    assert gradient_of(trainer, loss.sum()).norm() < 1e-5


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dgpo"])
def test_better_samples_gain(tmp_path, algorithm):
    """Their flow-matching errors, at draws that were not trained on, fall more than those of worse ones."""
    trainer = trainer_of(tmp_path, algorithm, noise_draws=8)
    batch, _ = trainer.collect(0)
    rows = torch.arange(len(batch.advantages))

    def errors():
        with torch.no_grad():
            of_draws = []
            for draw in range(20, 28):
                v, _, _, x0, x1, _ = velocities(trainer, batch, rows, torch.full_like(rows, draw))
                of_draws.append(mean((v - (x1 - x0)) ** 2))
        return torch.stack(of_draws).mean(0)

    before = errors()
    for _ in range(4):
        trainer.learner.update(batch)
    fall = before - errors()
    assert fall[batch.advantages > 0].mean() > fall[batch.advantages < 0].mean()


def test_the_old_policy_samples_and_follows_as_the_schedule_says(tmp_path):
    trainer = trainer_of(tmp_path, "nft", per_epoch=2, old_decay_slope=0.1, old_decay_start=3, old_decay_max=0.25)
    learner = trainer.learner
    old = [value.clone() for value in learner.old_policy.values]
    first = trainer.collect(0)[0]
    decays = []
    for _ in range(4):
        learner.update(first)
        decays.append(min(0.1 * max(learner.step - 3, 0), 0.25))
        expected = [
            decays[-1] * a + (1 - decays[-1]) * p.detach() for a, p in zip(old, learner.parameters, strict=True)
        ]
        for value, other in zip(learner.old_policy.values, expected, strict=True):
            torch.testing.assert_close(value, other)
        old = [value.clone() for value in learner.old_policy.values]
    assert decays == pytest.approx([0.0, 0.1, 0.25, 0.25])
    trained = [parameter.detach().clone() for parameter in learner.parameters]
    sampled = trainer.collect(0)[0].trajectory.final
    with learner.old_policy.active():
        assert all(torch.equal(p, value) for p, value in zip(learner.parameters, old, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(learner.parameters, trained, strict=True))
    learner.old_policy.follow(0.0)
    assert not torch.equal(sampled, first.trajectory.final)
    assert not torch.equal(sampled, trainer.collect(0)[0].trajectory.final)


def test_levels_of_the_rollout_are_spread_over_its_steps(tmp_path):
    """As many draws as steps but the last: each of these levels once; fewer draws: one of each part."""
    sigmas = trainer_of(tmp_path, "nft", noise_draws=4, noise_levels="rollout").coefficients.sigma[:-1].float()
    for draws in (4, 2):
        trainer = trainer_of(tmp_path / str(draws), "nft", noise_draws=draws, noise_levels="rollout")
        batch, _ = trainer.collect(0)
        rows = torch.arange(len(batch.advantages))
        levels = [trainer.objective.add_noise(batch, rows, torch.full_like(rows, draw)).level for draw in range(draws)]
        for part, level in zip(sigmas.chunk(draws), levels, strict=True):
            assert set(level.tolist()) == set(part.tolist())
    assert trainer.learner.update(batch)["trained_pairs"] > 0


def test_stratified_levels_are_those_of_the_uniform_ones_each_in_its_part(tmp_path):
    levels = {}
    for name in ("uniform", "stratified"):
        trainer = trainer_of(tmp_path / name, "awm", noise_draws=3, noise_levels=name)
        batch, _ = trainer.collect(0)
        rows = torch.arange(len(batch.advantages))
        draws = (torch.full_like(rows, draw) for draw in range(3))
        levels[name] = torch.stack([trainer.objective.add_noise(batch, rows, draw).level for draw in draws])
    torch.testing.assert_close(levels["stratified"], (torch.arange(3)[:, None] + levels["uniform"]) / 3)
    assert len(levels["uniform"].unique()) == levels["uniform"].numel()


def test_a_snapshot_gives_the_weights_back_after_an_error():
    parameter = torch.nn.Parameter(torch.ones(3))
    snapshot = WeightSnapshot([parameter])
    with torch.no_grad():
        parameter.mul_(2)

    def fail():
        with snapshot.active():
            assert parameter.tolist() == [1, 1, 1]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert parameter.tolist() == [2, 2, 2]
    assert snapshot.values[0].tolist() == [1, 1, 1]
