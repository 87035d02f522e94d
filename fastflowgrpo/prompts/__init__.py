"""Prompts: reading them from files, and choosing those of an epoch."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastflowgrpo.config import did_you_mean

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BUILT_IN = "shapes, geneval, ocr or general"  # prompts that a run has without a file, see sources.py
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and what rewards know of it: its GenEval metadata, {} for plain text."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(source: str) -> list[Prompt]:
    """Read a prompt file.

    Args:
        source: a UTF-8 file; .txt with one prompt a line, or .jsonl with one GenEval metadata object a line
            (`check_metadata`, and its text under "prompt"). Blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no prompt in it, or a line that is wrong (named, with the field).
    """
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{source}: expected a .txt file (one prompt a line), a GenEval .jsonl file, or {BUILT_IN}")
    if not path.is_file():
        hint = did_you_mean(path.name, (sibling.name for sibling in path.parent.glob("*")))
        raise FileNotFoundError(f"{source}: no such file{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{source}: there is no prompt in it")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in lines]
    return [_geneval_prompt(line, f"{source}, line {number}") for number, line in lines]


def _geneval_prompt(line: str, where: str) -> Prompt:
    try:
        metadata = json.loads(line)
        check_metadata(metadata)
        return Prompt(_field(metadata, "prompt", "", "the prompt's text", _is_text), metadata)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_metadata(metadata: Any) -> None:
    """Check GenEval metadata (arXiv 2310.11513):
    `{tag, include: [{class, count, color?, position?: [relation, index]}], exclude?: [{class, count}]}`.

    A position's index is that of the earlier include which the relation is to. Other top-level keys are free, for
    rewards of your own; within a clause an unknown key is an error, since its wish would be ignored.

    Raises:
        ValueError: names the field, what it must be and what it is.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"expected a JSON object, got {metadata!r}")
    _field(metadata, "tag", "", f"one of {', '.join(TAGS)}", lambda tag: tag in TAGS)
    includes = _field(
        metadata, "include", "", "a non-empty list", lambda clauses: isinstance(clauses, list) and clauses
    )
    for i, clause in enumerate(includes):
        where = f"include[{i}]"
        _check_clause(clause, where, ("class", "count", "color", "position"))
        if "color" in clause:
            _field(clause, "color", where, "a colour's name", _is_text)
        if "position" in clause:
            expected = f"[relation, index], the relation one of {', '.join(RELATIONS)}, the index of an earlier include"
            _field(clause, "position", where, expected, functools.partial(_is_position, i))
    if "exclude" in metadata:
        for i, clause in enumerate(
            _field(metadata, "exclude", "", "a list", lambda clauses: isinstance(clauses, list))
        ):
            _check_clause(clause, f"exclude[{i}]", ("class", "count"))


def _check_clause(clause: Any, where: str, keys: tuple[str, ...]) -> None:
    if not isinstance(clause, dict):
        raise ValueError(f"{where}: expected an object, got {clause!r}")
    for key in clause:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, keys)}, known: {', '.join(keys)}")
    _field(clause, "class", where, "an object's name", _is_text)
    _field(clause, "count", where, "an integer of at least 1", lambda count: _is_int(count) and count >= 1)


def _field(parent: dict[str, Any], key: str, where: str, expected: str, valid: Callable[[Any], Any]) -> Any:
    name = f"{where}.{key}" if where else key
    if key not in parent:
        raise ValueError(f"{name}: missing, expected {expected}")
    if not valid(parent[key]):
        raise ValueError(f"{name}: expected {expected}, got {parent[key]!r}")
    return parent[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_position(include: int, value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and value[0] in RELATIONS
        and _is_int(value[1])
        and 0 <= value[1] < include
    )


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
