"""Rewards: the contract, the ones that come with the package, and their weighted sum."""

import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards.clip import Aesthetic, clipscore, hpsv2, pickscore
from fastflowgrpo.rewards.geneval import GenEval
from fastflowgrpo.rewards.imagereward import ImageReward
from fastflowgrpo.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from fastflowgrpo.rewards.judges import DeQA, QwenVL, UnifiedReward
from fastflowgrpo.rewards.ocr import OCR
from fastflowgrpo.scoring.client import RemoteReward
from fastflowgrpo.scoring.contract import Reward, RewardBatch, Scores, checked_scores
from fastflowgrpo.scoring.workers import TIMEOUT, WorkerReward

__all__ = ["REWARDS", "Reward", "RewardBatch", "Scores", "WeightedRewards", "build_rewards"]

# name -> function from the reward's settings to the reward
REWARDS: dict[str, Callable[..., Reward]] = {
    "geneval": GenEval,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "ocr": OCR,
    "pickscore": pickscore,
    "clipscore": clipscore,
    "hpsv2": hpsv2,
    "imagereward": ImageReward,
    "aesthetic": Aesthetic,
    "deqa": DeQA,
    "qwenvl": QwenVL,
    "unifiedreward": UnifiedReward,
}


@dataclass(frozen=True)
class WeightedRewards:
    """The weighted sum of named rewards, itself a reward.

    Called with a RewardBatch it returns the sum as `values`, NaN where a reward of non-zero weight is NaN, as
    `details` each reward's own values under its name and its details under "name/detail", and as `error` the last one
    that made a value NaN, with its reward's name. What a reward raises, it raises (see `checked_scores`).
    """

    rewards: dict[str, Callable[[RewardBatch], Any]]
    weights: dict[str, float]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Ask each reward that has a `check_prompts` of its own whether it can score these prompts.

        Raises:
            ValueError: it cannot; names the reward and the prompt.
        """
        for name, reward in self.rewards.items():
            check = getattr(reward, "check_prompts", None)
            if check is not None:
                try:
                    check(prompts)
                except ValueError as error:
                    raise ValueError(f"rewards.{name}: {error}") from error

    def __call__(self, batch: RewardBatch) -> Scores:
        return self.weighted({name: checked_scores(name, reward, batch) for name, reward in self.rewards.items()})

    def weighted(self, scores: Mapping[str, Scores]) -> Scores:
        """The sum of the rewards' own scores of the same images."""
        total, error = torch.zeros(len(next(iter(scores.values())).values)), ""
        details: dict[str, torch.Tensor] = {}
        for name, own in scores.items():
            if self.weights[name]:
                total += self.weights[name] * own.values
                if own.values.isnan().any():
                    error = f"reward {name}: {own.error or 'it returned NaN'}"
            details |= {name: own.values, **{f"{name}/{key}": value for key, value in own.details.items()}}
        return Scores(total, details, error)


def build_rewards(config: Mapping[str, Any]) -> WeightedRewards:
    """Make the weighted sum that a configuration describes.

    Args:
        config: for each reward its weight, or `{weight: 1.0, **settings}`. The name is one of REWARDS, or
            `my_module:my_reward` for a function of yours: it is called with a RewardBatch (and the settings as
            keywords) and returns Scores or a number per image. The current directory, appended to sys.path, is searched
            too. With a `url` among the settings, any name is scored there (`RemoteReward`); with `workers`, in so many
            processes (`WorkerReward`).

    Raises:
        ValueError: names the reward and what is wrong with it.
    """
    known = f"known: {', '.join(REWARDS)}, or my_module:my_reward for a function of yours"
    if not config:
        raise ValueError(f"rewards: there is none; {known}")
    rewards: dict[str, Callable[[RewardBatch], Any]] = {}
    weights: dict[str, float] = {}
    for name, value in config.items():
        settings = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = settings.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"rewards.{name}: the weight must be a finite number, got {weight!r}")
        weights[name] = float(weight)
        workers = settings.pop("workers", 0)
        if workers or "url" in settings or name in REWARDS:
            if workers:
                timeout = settings.pop("timeout", TIMEOUT)
                factory: Callable[[], Any] = functools.partial(WorkerReward, name, settings, workers, timeout)
            else:
                make = functools.partial(RemoteReward, name) if "url" in settings else REWARDS[name]
                factory = _with_settings(name, make, 0, settings)
            try:
                rewards[name] = factory()
            except (ValueError, ImportError) as error:
                raise ValueError(f"rewards.{name}: {error}") from error
        elif ":" in name:
            rewards[name] = _with_settings(name, _import(name), 1, settings)
        else:
            raise ValueError(f"rewards: unknown reward {name!r}{did_you_mean(name, REWARDS)}; {known}")
    if not any(weights.values()):
        raise ValueError("rewards: every weight is 0")
    return WeightedRewards(rewards, weights)


def _with_settings(
    name: str, function: Callable[..., Any], positional: int, settings: dict[str, Any]
) -> Callable[..., Any]:
    """The function with the settings as keywords, once it is known to take them after its positional arguments."""
    if not settings:
        return function
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    accepted = ["weight", *(p.name for p in parameters)]
    for key in settings:
        if key not in accepted and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            hint = did_you_mean(key, accepted)
            raise ValueError(f"rewards.{name}: unknown setting {key!r}{hint}, known: {', '.join(accepted)}")
    return functools.update_wrapper(functools.partial(function, **settings), function)


def _import(name: str) -> Callable[..., Any]:
    """The function that `my_module:my_reward` names."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"rewards.{name}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        hint = did_you_mean(attribute, functions)
        raise ValueError(f"rewards.{name}: {module_name} has no function {attribute!r}{hint}")
    return function
