"""What images are scored by: one file per reward, the table of their names, and how a configuration becomes rewards.

A reward is a function from a `RewardBatch` to `Scores`. That contract, and everything that calls rewards (threads,
worker processes, the reward server and its client), is in `fastflowgrpo.scoring`.
"""

import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.rewards.clip import Aesthetic, clipscore, hpsv2, pickscore
from fastflowgrpo.rewards.dino import Dino
from fastflowgrpo.rewards.editscore import EditScore
from fastflowgrpo.rewards.geneval import GenEval
from fastflowgrpo.rewards.hpsv3 import HPSv3
from fastflowgrpo.rewards.imagereward import ImageReward
from fastflowgrpo.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from fastflowgrpo.rewards.judges import DeQA, QwenVL, UnifiedReward
from fastflowgrpo.rewards.ocr import OCR
from fastflowgrpo.rewards.shapes_edit import ShapesEdit
from fastflowgrpo.scoring.client import RemoteReward
from fastflowgrpo.scoring.contract import Reward, RewardBatch, Scores
from fastflowgrpo.scoring.weighted import WeightedRewards
from fastflowgrpo.scoring.workers import TIMEOUT, WorkerReward

__all__ = ["REWARDS", "Reward", "RewardBatch", "Scores", "WeightedRewards", "build_rewards"]

REWARDS: dict[str, Callable[..., Reward]] = {
    "geneval": GenEval,
    "shapes_edit": ShapesEdit,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "ocr": OCR,
    "pickscore": pickscore,
    "clipscore": clipscore,
    "hpsv2": hpsv2,
    "hpsv3": HPSv3,
    "imagereward": ImageReward,
    "aesthetic": Aesthetic,
    "deqa": DeQA,
    "qwenvl": QwenVL,
    "unifiedreward": UnifiedReward,
    "dino": Dino,
    "editscore": EditScore,
}
"""For each name a function that makes the reward from its settings."""


def build_rewards(config: Mapping[str, Any] | str) -> WeightedRewards:
    """Make the weighted sum that a configuration describes.

    Args:
        config: for each reward its weight, or `{weight: 1.0, **settings}`. The name is one of REWARDS, or
            `my_module:my_reward` for your own function: it is called with a RewardBatch (and the settings as keywords)
            and returns Scores or a number per image. Your module may lie in the current directory, which is appended
            to sys.path. With the setting `url` the reward is scored by a server (`RemoteReward`), which then is the
            one that must know the name; with the setting `workers` it is scored in that many processes
            (`WorkerReward`). Names separated by commas have weight 1.

    Raises:
        ValueError: names the reward and what is wrong with it.
    """
    if isinstance(config, str):
        config = {name.strip(): 1.0 for name in config.split(",")}
    known = f"known: {', '.join(REWARDS)}, or my_module:my_reward for your own function"
    if not config:
        raise ValueError(f"rewards: name at least one; {known}")
    rewards: dict[str, Callable[[RewardBatch], Any]] = {}
    weights: dict[str, float] = {}
    for name, value in config.items():
        settings = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = settings.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"rewards.{name}: the weight must be a finite number, got {weight!r}")
        if name not in REWARDS and ":" not in name and "url" not in settings:
            raise ValueError(f"rewards: unknown reward {name!r}{did_you_mean(name, REWARDS)}; {known}")
        weights[name] = float(weight)
        try:
            rewards[name] = make_reward(name, settings)
        except (ValueError, ImportError) as error:
            raise ValueError(f"rewards.{name}: {error}") from error
    if not any(weights.values()):
        raise ValueError("rewards: every weight is 0")
    return WeightedRewards(rewards, weights)


def make_reward(name: str, settings: Mapping[str, Any]) -> Callable[[RewardBatch], Any]:
    """Make one reward; its name and settings are as in `build_rewards`, without the weight.

    Raises:
        ValueError: a setting is wrong, or the reward cannot be made.
        ImportError: a package that the reward needs is not installed.
    """
    settings = dict(settings)
    if workers := settings.pop("workers", 0):
        timeout = settings.pop("timeout", TIMEOUT)
        return WorkerReward(name, functools.partial(make_reward, name, settings), workers, timeout)
    if "url" in settings:
        return _with_settings(functools.partial(RemoteReward, name), 0, settings)()
    if name in REWARDS:
        return _with_settings(REWARDS[name], 0, settings)()
    return _with_settings(_import(name), 1, settings)


def _with_settings(function: Callable[..., Any], positional: int, settings: dict[str, Any]) -> Callable[..., Any]:
    """Bind the settings as keywords, after checking that the function takes them beside its positional arguments."""
    if not settings:
        return function
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    accepted = ["weight", *(p.name for p in parameters)]
    for key in settings:
        if key not in accepted and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            hint = did_you_mean(key, accepted)
            raise ValueError(f"unknown setting {key!r}{hint}, known: {', '.join(accepted)}")
    return functools.update_wrapper(functools.partial(function, **settings), function)


def _import(name: str) -> Callable[..., Any]:
    """Import the function that `my_module:my_reward` names."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        hint = did_you_mean(attribute, functions)
        raise ValueError(f"{module_name} has no function {attribute!r}{hint}")
    return function
