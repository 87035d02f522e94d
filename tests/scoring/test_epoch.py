"""Groups that are sampled an epoch ahead."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from support.tiny_run import command

from fastflowgrpo import Trainer
from fastflowgrpo.config import parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.runs.training_state import ahead_state, load_ahead, save_training
from fastflowgrpo.scoring.epoch import Drawn

SIZE = 4


def trainer_of(folder, output, **settings):
    settings = {
        "prompts.per_epoch": 4,
        "update.per_epoch": 1,
        "update.batch_size": 4,
        "rollout.batch_size": 4,
    } | settings
    return Trainer(parse(command(folder, output, **settings)))


def statistics(trainer, batch):
    micro_batches = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
    rows = torch.cat([rows for rows, _ in micro_batches])
    parts = [trainer.objective.loss(batch, *pairs)[1] for pairs in micro_batches]
    return rows, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_groups_ahead_are_those_of_their_epoch_with_the_weights_before_the_update(tiny_sd3_folder, tmp_path):
    """The first two groups of four, in batches of one group. All else is as without the setting."""
    plain = trainer_of(tiny_sd3_folder, tmp_path / "plain")
    ahead = trainer_of(tiny_sd3_folder, tmp_path / "ahead", **{"rollout.ahead": 2, "epochs": 2})
    first, expected = ahead.collect(0)[0], plain.collect(0)[0]
    assert torch.equal(first.trajectory.final, expected.trajectory.final)
    assert torch.equal(first.advantages, expected.advantages)
    assert first.stale == 0
    before = plain.collect(1)[0].trajectory
    metrics = ahead.learner.update(first)
    assert plain.learner.update(expected).items() <= metrics.items()
    assert metrics["stale_pairs"] == metrics["stale_clipped"] == 0
    batch, fresh = ahead.collect(1)[0], plain.collect(1)[0]
    assert batch.stale == 2 * SIZE
    assert not ahead.epoch_sampler.ahead.parts, "no epoch follows the last one"
    for field in fields(before):
        old, found, new = (
            getattr(trajectory, field.name) for trajectory in (before, batch.trajectory, fresh.trajectory)
        )
        assert torch.equal(found[: 2 * SIZE], old[: 2 * SIZE])
        assert torch.equal(found[2 * SIZE :], new[2 * SIZE :])
    assert not torch.equal(before.final, fresh.trajectory.final)
    plain.scoring.submit(batch.trajectory.final, plain.epoch_prompts(1), SIZE)
    scores = plain.scoring.finish()
    assert torch.equal(batch.advantages, plain.objective.advantages(scores, plain.rewards.weights))


def test_the_ratio_of_stale_pairs_is_to_the_weights_that_sampled_them(tiny_sd3_folder, tmp_path):
    trainer = trainer_of(tiny_sd3_folder, tmp_path / "run", **{"rollout.ahead": 2, "update.clip_range": 1e-4})
    trainer.learner.update(trainer.collect(0)[0])
    batch, _ = trainer.collect(1)
    rows, found = statistics(trainer, batch)
    stale = rows < 2 * SIZE
    assert torch.equal(found["stale_pairs"].bool(), stale) and stale.any() and not stale.all()
    assert (found["ratio"][~stale] == 1).all()
    assert (found["ratio"][stale] != 1).all()
    stopped = found["clipped_above"] + found["clipped_below"]
    assert torch.equal(found["stale_clipped"], stopped * stale) and found["stale_clipped"].any()

    trainer.check_replay(batch)  # leaves them out
    with pytest.raises(UserError, match="replayed log-probs differ"):
        trainer.check_replay(replace(batch, stale=0))
    trainer.check_replay(replace(batch, stale=4 * SIZE))  # nothing to replay


def test_kept_unconditional_velocities_are_not_used_for_stale_pairs(tiny_sd3_folder, tmp_path):
    gradients, passes = [], []
    for keep in (False, True):
        settings = {"rollout.ahead": 2, "rollout.guidance_scale": 3, "rollout.keep_unconditional": keep}
        trainer = trainer_of(tiny_sd3_folder, tmp_path / str(keep), **settings, **{"update.kl_weight": 0})
        trainer.learner.update(trainer.collect(0)[0])
        batch, _ = trainer.collect(1)
        batch.advantages[:] = torch.linspace(-1, 1, 4 * SIZE)  # none is left out
        without_graph = []

        def count(module, inputs, output, seen=without_graph):
            seen.append(0 if torch.is_grad_enabled() else len(output[0]))

        hook = trainer.policy.module.register_forward_hook(count)
        trainer.learner.accumulate(batch, trainer.objective.micro_batches(batch, 0, 4 * SIZE))
        hook.remove()
        passes.append(sum(without_graph))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.learner.parameters]))
    assert torch.equal(*gradients) and gradients[0].norm() > 0
    assert passes == [4 * SIZE * 2, 2 * SIZE * 2]  # of 2 steps each


def test_an_evaluation_leaves_the_scores_of_groups_ahead(tiny_sd3_folder, tmp_path):
    evaluated, plain = (trainer_of(tiny_sd3_folder, tmp_path / name, **{"rollout.ahead": 4}) for name in "ab")
    for trainer in (evaluated, plain):
        trainer.collect(0)
    evaluated.evaluate()
    assert torch.equal(evaluated.collect(1)[0].advantages, plain.collect(1)[0].advantages)


def test_any_number_of_processes_takes_its_groups_from_a_checkpoint(tiny_sd3_folder, tmp_path):
    trainer = trainer_of(tiny_sd3_folder, tmp_path / "run", **{"rollout.ahead": 4})
    trainer.collect(0)
    ahead = trainer.epoch_sampler.ahead
    state = {"ahead": ahead_state(ahead, SIZE, trainer.processes)}
    save_training(tmp_path / "training", state, None, [], [])
    whole = type(ahead.parts[0]).cat(ahead.parts)
    for rank in range(2):
        of_rank = SimpleNamespace(rank_indices=lambda total, rank=rank: list(range(rank, total, 2)))
        of_rank.accelerator = trainer.accelerator
        loaded = load_ahead(SimpleNamespace(training=tmp_path / "training"), of_rank)
        assert not loaded.is_scored
        for field in fields(whole):
            expected = getattr(whole, field.name).unflatten(0, (-1, SIZE))[rank::2].flatten(0, 1)
            assert torch.equal(getattr(loaded.parts[0], field.name), expected)
    assert load_ahead(SimpleNamespace(training=tmp_path), of_rank) == Drawn()
