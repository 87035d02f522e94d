"""rollout.candidates: which seeds are kept, that they are sampled again, and what is reported."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import EvaluationConfig, PromptsConfig, RolloutConfig, UpdateConfig, validate
from fastflowgrpo.errors import TemporaryError
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.rewards import Scores
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.scoring.exploration import exploration_metrics, extremes, rank_correlation
from fastflowgrpo.trainer import group_seed

NAN = math.nan
SIZE, CANDIDATES, GROUPS = 4, 12, 3


def trainer_of(output, algorithm="awm", *, batch_size=24, guidance=1.0, max_missing=0.1, **rollout):
    rollout = {"candidates": CANDIDATES, "candidate_steps": 2, "num_steps": 5} | rollout
    if algorithm == "grpo":
        rollout |= {"window_size": 2, "window_start": (0, 3)}
    else:
        rollout |= {"dynamics": "ode"}
    config = Config(
        output_dir=str(output / "run"),
        trackers=[],
        overwrite=True,
        prompts=PromptsConfig(per_epoch=GROUPS),
        rollout=RolloutConfig(group_size=SIZE, batch_size=batch_size, guidance_scale=guidance, **rollout),
        update=UpdateConfig(algorithm=algorithm, per_epoch=1, batch_size=64),
        evaluation=EvaluationConfig(num_steps=2, images_per_prompt=1),
        rewards={"jpeg_compressibility": 1},
        max_missing=max_missing,
    )
    validate(config)
    return Trainer(config)


def candidates_of(trainer, steps, solver):
    """Seeds, initial noise and scores of the candidates, (groups, candidates) each, without the pipeline."""
    prompts = trainer.epoch_prompts(0)
    seeds = sample_seeds([group_seed(trainer.config.seed, 0, i) for i in range(len(prompts))], CANDIDATES)
    noise = philox_normal(seeds, 0, (len(seeds), *trainer.shape))
    guidance = trainer.config.rollout.guidance_scale
    latents = sample_ode(
        trainer.policy,
        trainer.embed([prompt.text for prompt in prompts for _ in range(CANDIDATES)]),
        steps,
        noise,
        unconditional=trainer.embed([""]) if guidance != 1 else None,
        guidance_scale=guidance,
        solver=solver,
    )
    trainer.scoring.submit(latents, prompts, CANDIDATES)
    return tuple(t.unflatten(0, (-1, CANDIDATES)) for t in (seeds, noise, trainer.scoring.finish().values))


@pytest.mark.parametrize(
    ("algorithm", "solver", "guidance"),
    [("awm", "euler", 1.0), ("dpo", "dpm_solver", 2.0), ("grpo", "dpm_solver", 2.0)],
)
def test_the_extreme_candidates_are_sampled_again_from_their_noise(tmp_path, monkeypatch, algorithm, solver, guidance):
    trainer = trainer_of(tmp_path, algorithm, guidance=guidance, candidate_solver=solver, candidate_steps=4)
    seen, velocity = [], trainer.policy.velocity
    monkeypatch.setattr(
        trainer.policy, "velocity", lambda latents, *rest: (seen.append(latents), velocity(latents, *rest))[1]
    )
    batch, metrics = trainer.collect(0)
    monkeypatch.undo()
    seeds, noise, scores = candidates_of(trainer, 4, solver)
    order = scores.argsort()
    kept = torch.cat([order[:, : SIZE // 2], order[:, -SIZE // 2 :]], 1).sort().values
    rows = (torch.arange(GROUPS)[:, None], kept)
    assert torch.equal(batch.trajectory.seeds.view(-1, SIZE), seeds[rows])
    # two groups of candidates, one group of candidates, then all groups at once
    passes, branches = [len(latents) for latents in seen], 1 if guidance == 1 else 2
    assert passes == [2 * CANDIDATES] * 4 * branches + [CANDIDATES] * 4 * branches + [GROUPS * SIZE] * 5 * branches
    assert torch.equal(seen[8 * branches].unflatten(0, (GROUPS, SIZE)), noise[rows])
    assert metrics["candidates/reward"] == pytest.approx(float(scores.mean()))
    assert metrics["candidates/missing"] == 0 and metrics["images"] == GROUPS * SIZE
    assert trainer.learner.update(batch)["trained_pairs"] > 0


def test_a_group_with_more_candidates_than_a_batch_is_sampled_in_parts_and_scored_whole(tmp_path, monkeypatch):
    whole, _ = trainer_of(tmp_path).collect(0)
    trainer, scored, passes = trainer_of(tmp_path, batch_size=8), [], []
    (thread,) = trainer.scoring.threads.values()
    score = thread.reward
    thread.reward = lambda batch: (scored.append(len(batch.prompts)), score(batch))[1]
    trainer.policy.module.register_forward_hook(lambda module, inputs, output: passes.append(len(output[0])))
    parts, _ = trainer.collect(0)
    assert scored == [CANDIDATES] * GROUPS + [8, 4]
    assert passes == [8, 8, 4, 4] * GROUPS + [8] * 5 + [4] * 5
    assert torch.equal(parts.trajectory.seeds, whole.trajectory.seeds)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([5, 1, 4, 2, 6, 3], [0, 1, 3, 4]),
        ([NAN, 1, 4, 2, 6, 3], [1, 3, 2, 4]),
        ([7, 7, 7, 7, 7, 7], [0, 1, 4, 5]),
        ([0, 1, 1, 0, 0, 1], [0, 3, 2, 5]),
        ([NAN, 1, NAN, 2, NAN, 3], [1, 3, 5, 0]),
        ([NAN, 1, 4, 2, 6, NAN], [1, 2, 3, 4]),
        ([NAN] * 6, [0, 1, 2, 3]),
    ],
)
def test_the_best_and_the_worst_are_kept_and_those_without_a_score_only_to_fill_up(scores, kept):
    both = torch.tensor([scores, [0, 1, 2, 3, 4, 5]], dtype=torch.float32)
    assert extremes(both, 4).tolist() == [sorted(kept), [0, 1, 4, 5]]


def test_the_rank_correlation_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(6, (40, 9), generator=generator).float()  # with ties
    second = (first + 2 * torch.randn(40, 9, generator=generator)).round(decimals=1)
    expected = [spearmanr(*rows).statistic for rows in zip(first, second, strict=True)]
    torch.testing.assert_close(rank_correlation(first, second), torch.tensor(expected), rtol=1e-12, atol=1e-12)
    first[:, 3], second[:, 5] = NAN, NAN
    valid = [0, 1, 2, 4, 6, 7, 8]
    expected = [spearmanr(*rows).statistic for rows in zip(first[:, valid], second[:, valid], strict=True)]
    torch.testing.assert_close(rank_correlation(first, second), torch.tensor(expected), rtol=1e-12, atol=1e-12)
    flat = torch.ones(1, 9)
    assert rank_correlation(flat / 3, second[:1]).isnan().all() and rank_correlation(NAN * flat, flat).isnan().all()


def test_the_metrics_are_of_all_candidates_and_of_the_groups_with_spread():
    candidates = torch.tensor([[0.0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [0, 1, NAN, 3, 4, 5]])
    rewards = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, NAN]])  # correlations 1, none and -1
    assert exploration_metrics(candidates, rewards) == {
        "candidates/reward": pytest.approx(34 / 17),
        "candidates/missing": 1,
        "candidates/rank_correlation": pytest.approx(0),
    }


def test_missing_scores_of_candidates_are_not_kept_and_too_many_stop_the_run(tmp_path):
    trainer = trainer_of(tmp_path, max_missing=0.5)
    (thread,) = trainer.scoring.threads.values()
    lost = [0, 3, 7]

    def reward(batch):
        values = torch.arange(len(batch.prompts)).float() % CANDIDATES
        if len(values) == CANDIDATES * len(batch.group_ids.unique()):
            values[torch.isin(values, torch.tensor(lost))] = NAN
        return Scores(values)

    thread.reward = reward
    batch, metrics = trainer.collect(0)
    seeds = sample_seeds([group_seed(0, 0, i) for i in range(GROUPS)], CANDIDATES).view(GROUPS, -1)
    assert torch.equal(batch.trajectory.seeds.view(GROUPS, SIZE), seeds[:, [1, 2, 10, 11]])
    assert (metrics["candidates/missing"], metrics["missing"]) == (3 * GROUPS, 0)
    lost += [1, 2, 4, 5]
    with pytest.raises(TemporaryError, match=r"^21 of the 36 candidates of epoch 0 have no score; max_missing allows"):
        trainer.collect(0)
