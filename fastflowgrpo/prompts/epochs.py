"""The choice of each epoch's prompts."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts.prompt import Prompt


def epoch_prompts(
    prompts: Sequence[Prompt], count: int, seed: int, epoch: int, mix: Mapping[str, float] | None = None
) -> list[int]:
    """The prompts of one epoch. They depend on the arguments only, so a resumed run needs no sampler state.

    The epochs read one endless stream of passes over the prompts. Each pass has its own random order, so every prompt
    is used once before any is used again, and an epoch repeats a prompt only if it has used all others.

    Args:
        prompts: the whole training set.
        count: prompts per epoch.
        seed: seed of the run.
        epoch: epoch number, from 0.
        mix: weight of each GenEval tag. Each tag then has its own stream. Its number of prompts in an epoch is its
            share of `count` if that is an integer, otherwise the integer below or above, with the share as the mean.
            Tags without a weight, or with weight 0, are not used.

    Returns:
        `count` indices into `prompts`, shuffled.

    Raises:
        ValueError: there are no prompts, a weight is not a number >= 0, or a tag has a weight but no prompt.
    """
    pools, weights = _pools(prompts, mix)
    edges = np.concatenate([[0.0], np.cumsum(weights)])
    edges /= edges[-1]
    # Systematic sampling: each pool gets as many prompts as there are points u, u + 1, ... between its two edges.
    u = np.random.default_rng([seed, 0, 0, 0]).random(epoch + 1)
    counts = np.diff(np.ceil(count * edges - u[:, None]).astype(np.int64), axis=1)
    starts = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
    chosen = [pool[_draw(len(pool), starts[:, i], (seed, 1, i))] for i, pool in enumerate(pools)]
    return np.random.default_rng([seed, 2, 0, epoch]).permutation(np.concatenate(chosen)).tolist()


def _pools(prompts: Sequence[Prompt], mix: Mapping[str, float] | None) -> tuple[list[np.ndarray], list[float]]:
    """Index arrays into the prompts, one for each stream, and their weights."""
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
    """Items starts[-2] to starts[-1] of an endless stream of shuffled passes over range(size).

    starts[e] is where epoch e begins in the stream. A pass that begins within an epoch first takes the items that the
    epoch has used least.
    """
    stream = np.empty(math.ceil(starts[-1] / size) * size, np.int64)
    for index, begin in enumerate(range(0, len(stream), size)):
        order = np.random.default_rng([*seed, index]).permutation(size)
        epoch_begin = starts[np.searchsorted(starts, begin, side="right") - 1]
        drawn = np.bincount(stream[epoch_begin:begin], minlength=size)
        stream[begin : begin + size] = order[np.argsort(drawn[order], kind="stable")]
    return stream[starts[-2] : starts[-1]]
