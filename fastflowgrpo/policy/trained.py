"""Loading a policy with the weights that `Policy.save` wrote."""

from dataclasses import replace
from pathlib import Path

import torch

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.loading import load_policy
from fastflowgrpo.policy.protocol import Policy
from fastflowgrpo.policy.weights import FULL, LORA, holds_weights


def load_trained(model: str, folder: Path, config: PolicyConfig, device: torch.device | str = "cpu") -> Policy:
    """Load a model with the trained weights in a folder; its `reference` is the model without them.

    Args:
        model: as in `load_policy`.
        folder: what `Policy.save` wrote to.
        config: as in `load_policy`; the adapter and its rank are those of the folder instead.
        device: where it runs.

    Raises:
        UserError: the folder has no trained weights, they do not fit the model, or `load_policy` fails.
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
    # Only training's reference is quantised: here it is the model that the trained weights are compared with.
    policy = load_policy(model, replace(config, lora=None, lora_rank=0, quantization=None), device)
    policy.load(folder)
    return policy
