"""Choosing the prompts of an epoch."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts.prompt import Prompt


def epoch_prompts(
    prompts: Sequence[Prompt], count: int, seed: int, epoch: int, mix: Mapping[str, float] | None = None
) -> list[int]:
    """The prompts of one epoch: a pure function of its arguments, so that resuming a run needs no sampler state.

    All epochs together read an endless stream of passes over the prompts, each pass in its own random order, so
    that every prompt is used before one is used again, and within an epoch none repeats while others are left.

    Args:
        prompts: the whole training set.
        count: prompts per epoch.
        seed: seed of the run.
        epoch: epoch number, from 0.
        mix: weight of each GenEval tag. Each tag then has a stream of its own and gets its exact share of every
            epoch where that is an integer, else one of the two integers next to it, right on average. Tags that
            are not named, or have weight 0, are not used.

    Returns:
        `count` indices into `prompts`, shuffled.

    Raises:
        ValueError: no prompts, a weight that is no number >= 0, or a weighted tag that no prompt has.
    """
    pools, weights = _pools(prompts, mix)
    edges = np.concatenate([[0.0], np.cumsum(weights)])
    edges /= edges[-1]
    # Systematic sampling: of the points u, u + 1, ..., u + count - 1 each pool gets those between its two edges.
    u = np.random.default_rng([seed, 0, 0, 0]).random(epoch + 1)
    counts = np.diff(np.ceil(count * edges - u[:, None]).astype(np.int64), axis=1)
    starts = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
    chosen = [pool[_draw(len(pool), starts[:, i], (seed, 1, i))] for i, pool in enumerate(pools)]
    return np.random.default_rng([seed, 2, 0, epoch]).permutation(np.concatenate(chosen)).tolist()


def _pools(prompts: Sequence[Prompt], mix: Mapping[str, float] | None) -> tuple[list[np.ndarray], list[float]]:
    """The index arrays of the prompts that are drawn from, and their weights."""
    if not prompts:
        raise ValueError("there are no prompts to draw from")
    if mix is None:
        return [np.arange(len(prompts))], [1.0]
    tags = [prompt.metadata.get("tag", "") for prompt in prompts]
    known = sorted(set(tags) - {""})
    for tag, weight in mix.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"mix: the weight of {tag} must be a number of at least 0, got {weight!r}")
        if weight > 0 and tag not in known:
            raise ValueError(
                f"mix: no prompt has the tag {tag!r}{did_you_mean(tag, known)}, tags: {', '.join(known) or 'none'}"
            )
    used = sorted(tag for tag, weight in mix.items() if weight > 0)
    if not used:
        raise ValueError("mix: every weight is 0")
    return [np.flatnonzero(np.array(tags) == tag) for tag in used], [mix[tag] for tag in used]


def _draw(size: int, starts: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Items starts[-2] to starts[-1] of the endless stream of shuffled range(size); starts[e] is where epoch e begins.

    A pass that begins within an epoch takes first what this epoch has drawn least.
    """
    stream = np.empty(math.ceil(starts[-1] / size) * size, np.int64)
    for index, begin in enumerate(range(0, len(stream), size)):
        order = np.random.default_rng([*seed, index]).permutation(size)
        epoch_begin = starts[np.searchsorted(starts, begin, side="right") - 1]
        drawn = np.bincount(stream[epoch_begin:begin], minlength=size)
        stream[begin : begin + size] = order[np.argsort(drawn[order], kind="stable")]
    return stream[starts[-2] : starts[-1]]
