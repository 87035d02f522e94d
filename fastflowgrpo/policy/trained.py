"""Reading the weights that `Policy.save` wrote."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from fastflowgrpo.config import ConfigError, PolicyConfig
from fastflowgrpo.policy import Policy

LORA = "pytorch_lora_weights.safetensors"
FULL = "transformer"
PREFIX = "transformer."  # of the names in a LoRA file


def last_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run's directory after the most steps; ConfigError if there is none."""
    found = {}
    for folder in Path(run, "checkpoints").glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if step and holds_weights(folder):
            found[int(step[1])] = folder
    if not found:
        raise ConfigError(f"run {run} has no checkpoint yet")
    return found[max(found)]


def holds_weights(folder: Path) -> bool:
    """Whether a folder has trained weights of ours."""
    return (folder / LORA).is_file() or (folder / FULL / "config.json").is_file()


def fitted_config(folder: Path, config: PolicyConfig) -> PolicyConfig:
    """The config with the adapter (or none) that the weights in a folder are for.

    Raises:
        ConfigError: there are no such weights, or a LoRA of a kind that is not trained here.
    """
    if not folder.is_dir():
        raise ConfigError(f"checkpoint {folder}: there is no such folder")
    if not holds_weights(folder):
        raise ConfigError(f"checkpoint {folder}: has neither {LORA} nor {FULL}/config.json, which train writes")
    if not (folder / LORA).is_file():
        return replace(config, lora_rank=0)
    try:
        with safe_open(folder / LORA, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"checkpoint {folder / LORA}: cannot be read: {error}") from error
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in shapes})
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight")}
    foreign = [name for name in shapes if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name)]
    if foreign or len(ranks) != 1 or any(metadata.get(PREFIX + kind) for kind in ("use_dora", "use_rslora")):
        what = f"of {foreign[0]}" if foreign else "of several ranks or another variant"
        raise ConfigError(f"checkpoint {folder / LORA}: a LoRA {what}, which train does not write")
    (rank,) = ranks
    return replace(config, lora_rank=rank, lora_alpha=metadata.get(f"{PREFIX}lora_alpha", rank), lora_targets=targets)


def load_trained(policy: Policy, folder: Path) -> None:
    """Put the weights in a folder into a policy that was made with their `fitted_config`.

    Raises:
        ConfigError: they are of another model.
    """
    module = policy.transformer
    try:
        if (folder / LORA).is_file():
            with safe_open(folder / LORA, "pt") as file:
                state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            missed = set_peft_model_state_dict(module, state).unexpected_keys
            if missed:
                raise ValueError(f"there is no {missed[0]}")
        else:
            family: Any = type(module)
            module.load_state_dict(family.from_pretrained(folder / FULL, dtype=torch.float32).state_dict())
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"checkpoint {folder} does not fit the model: {reason}") from error
