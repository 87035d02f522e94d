"""Reading the weights that `Policy.save` wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import Policy, load_policy

LORA = "pytorch_lora_weights.safetensors"
FULL = "transformer"


def holds_weights(folder: Path) -> bool:
    """Whether a folder has trained weights of ours."""
    return (folder / LORA).is_file() or (folder / FULL / "config.json").is_file()


def load_trained(model: str, folder: Path, config: PolicyConfig, device: torch.device | str = "cpu") -> Policy:
    """`load_policy` with the trained weights in a folder. Inside its `reference` it is the model alone.

    Args:
        config: its adapter, rank and the like, is the folder's instead.

    Raises:
        UserError: there are no such weights, or they are of another model; or see `load_policy`.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder}: there is no such folder")
    if not holds_weights(folder):
        raise UserError(f"checkpoint {folder}: has neither {LORA} nor {FULL}/config.json, which train writes")
    if (folder / LORA).is_file():
        try:
            return load_policy(model, replace(config, lora=str(folder), lora_rank=None), device)
        except UserError as error:
            raise UserError(str(error).replace("policy.lora: ", "checkpoint ", 1)) from error
    policy = load_policy(model, replace(config, lora=None, lora_rank=0), device)
    module: Any = policy.transformer
    try:
        module.load_state_dict(type(module).from_pretrained(folder / FULL, dtype=torch.float32).state_dict())
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {folder} does not fit the model: {reason}") from error
    return policy
