"""Reading the weights that `Policy.save` wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastflowgrpo.checkpoint import saved
from fastflowgrpo.config import ConfigError, PolicyConfig
from fastflowgrpo.policy import Policy, load_policy

LORA = "pytorch_lora_weights.safetensors"
FULL = "transformer"


def last_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run's directory after the most steps; ConfigError if there is none."""
    found = [folder for folder in saved(run) if holds_weights(folder)]
    if not found:
        raise ConfigError(f"run {run} has no checkpoint yet")
    return found[-1]


def holds_weights(folder: Path) -> bool:
    """Whether a folder has trained weights of ours."""
    return (folder / LORA).is_file() or (folder / FULL / "config.json").is_file()


def load_trained(model: str, folder: Path, config: PolicyConfig, device: torch.device | str = "cpu") -> Policy:
    """`load_policy` with the trained weights in a folder. Inside its `reference` it is the model alone.

    Args:
        config: its adapter, rank and the like, is the folder's instead.

    Raises:
        ConfigError: there are no such weights, or they are of another model; or see `load_policy`.
    """
    if not folder.is_dir():
        raise ConfigError(f"checkpoint {folder}: there is no such folder")
    if not holds_weights(folder):
        raise ConfigError(f"checkpoint {folder}: has neither {LORA} nor {FULL}/config.json, which train writes")
    if (folder / LORA).is_file():
        try:
            return load_policy(model, replace(config, lora=str(folder), lora_rank=None), device)
        except ConfigError as error:
            raise ConfigError(str(error).replace("policy.lora: ", "checkpoint ", 1)) from error
    policy = load_policy(model, replace(config, lora=None, lora_rank=0), device)
    module: Any = policy.transformer
    try:
        module.load_state_dict(type(module).from_pretrained(folder / FULL, dtype=torch.float32).state_dict())
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"checkpoint {folder} does not fit the model: {reason}") from error
    return policy
