"""Exploring many seeds cheaply, to train on the extreme ones (Sol-RL, arXiv 2604.06916).

Of each prompt `rollout.candidates` seeds are sampled by the ODE with few steps and scored. The seeds of the best and of
the worst, as many of each, are then sampled with all steps: they start from the same initial noise.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastflowgrpo.config import RolloutConfig
from fastflowgrpo.console import progress
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.sampling.conditioning import repeat_rows
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.scoring.contract import Scores
from fastflowgrpo.scoring.pipeline import Scoring


def explore(
    policy: Policy,
    scoring: Scoring,
    rollout: RolloutConfig,
    prompts: Sequence[Prompt],
    group_seeds: Sequence[int],
    shape: tuple[int, ...],
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    phase: Callable[[str], AbstractContextManager[None]],
) -> tuple[Scores, Tensor]:
    """Sample candidates, score the groups of each batch while the next one is sampled, and choose the extreme ones.

    The candidates of a group are scored together. A pass has at most `rollout.batch_size` of them.

    Args:
        policy: computes the velocities, with its present weights.
        scoring: decodes and scores.
        rollout: number of candidates, their steps and solver, guidance, and the group size to keep.
        prompts, group_seeds: one per group.
        shape: shape of one latent sample.
        conditioning: one row per group.
        unconditional: the empty prompt's, one row, with guidance.
        phase: measures the time of "rollout", "decode" and "score".

    Returns:
        One score per candidate, group after group, and the seeds of the kept ones, (groups, group_size) int64.
    """
    count = rollout.candidates or 0
    seeds, group = sample_seeds(group_seeds, count), torch.arange(len(prompts)).repeat_interleave(count)
    groups_at_once = max(1, rollout.batch_size // count)
    passes = -(-len(prompts) // groups_at_once) * -(-groups_at_once * count // rollout.batch_size)
    with progress("candidates", rollout.candidate_steps * passes) as steps:

        def sample(rows: Tensor) -> Tensor:
            return sample_ode(
                policy,
                repeat_rows(conditioning, group[rows].to(policy.device, non_blocking=True)),
                rollout.candidate_steps,
                philox_normal(seeds[rows].to(policy.device, non_blocking=True), 0, (len(rows), *shape)),
                unconditional=unconditional,
                guidance_scale=rollout.guidance,
                solver=rollout.candidate_solver,
                on_step=steps.update,
            )

        for begin in range(0, len(prompts), groups_at_once):
            batch = prompts[begin : begin + groups_at_once]
            rows = torch.arange(begin * count, (begin + len(batch)) * count)
            with phase("rollout"):
                latents = torch.cat([sample(part) for part in rows.split(rollout.batch_size)])
            with phase("decode"):
                scoring.submit(latents, batch, count)
        with phase("score"):
            scores = scoring.finish(steps.set_postfix_str)
    kept = extremes(scores.values.view(-1, count), rollout.group_size)
    return scores, seeds.view(-1, count).gather(1, kept)


def extremes(scores: Tensor, kept: int) -> Tensor:
    """The candidates of each group with the kept / 2 best and the kept / 2 worst scores.

    Of equal scores the later candidate counts as the better one. A candidate without a score is kept only if fewer than
    `kept` have one; then the first ones fill up.

    Args:
        scores: (groups, candidates), NaN where a score is missing.
        kept: even, at most the number of candidates.

    Returns:
        (groups, kept) int64, their numbers in rising order.
    """
    worst_first = scores.sort(dim=1, stable=True).indices  # NaN comes last
    scored = (~scores.isnan()).sum(1, keepdim=True).clamp(min=kept)
    places = torch.arange(kept).expand(len(scores), -1)
    places = torch.where(places < kept // 2, places, scored - kept + places)
    return worst_first.gather(1, places).sort(1).values


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation within each group, (groups,) float64; equal scores share their mean rank.

    Args:
        first, second: (groups, samples) scores. A sample that lacks one of both is left out.

    Returns:
        NaN for a group in which all scores of one kind are equal.
    """
    valid = ~(first.isnan() | second.isnan())
    first, second = (_centred_ranks(scores, valid) for scores in (first, second))
    return (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1)).sqrt()


def _centred_ranks(scores: Tensor, valid: Tensor) -> Tensor:
    """Ranks minus their mean, (groups, samples) float64; 0 where not valid."""
    one, other = scores[:, :, None], scores[:, None, :]
    ranks = (((other < one) + 0.5 * (other == one)).double() * valid[:, None, :]).sum(2)
    return (ranks - (ranks * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)) * valid


def exploration_metrics(candidates: Tensor, rewards: Tensor) -> dict[str, float]:
    """What an epoch's exploration found.

    Args:
        candidates: (groups, candidates) scores of all candidates.
        rewards: (groups, group_size) scores of the kept ones, sampled with all steps.
    """
    cheap = candidates.gather(1, extremes(candidates, rewards.shape[1]))
    return {
        "candidates/reward": candidates.nanmean().item(),
        "candidates/missing": int(candidates.isnan().sum()),
        "candidates/rank_correlation": rank_correlation(cheap, rewards).nanmean().item(),
    }
