"""Loading a policy from a model's folder or hub id."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fastflowgrpo.config import BUNDLED_MODELS, PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.families import family_of, pipeline_of
from fastflowgrpo.policy.protocol import Policy
from fastflowgrpo.policy.quantization import quantization_config
from fastflowgrpo.policy.sharded_loading import empty_transformer, weight_files
from fastflowgrpo.shapes import BUNDLED


def with_default_rank(model: str, config: PolicyConfig) -> PolicyConfig:
    """Return `config` with the default of `lora_rank`: 32, or 0 (full training) for the bundled models.

    A `config.lora` keeps the rank at None: the adapter has its own.
    """
    if config.lora_rank is None and config.lora is None:
        return replace(config, lora_rank=0 if model in BUNDLED_MODELS else 32)
    return config


def component_dtypes(config: PolicyConfig) -> dict[str, torch.dtype]:
    """Return the dtype of each component of a pipeline by its name, and of all others as "default"."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
    encoders = dict.fromkeys(names, config.text_encoder_dtype)
    dtypes = {"default": config.dtype, "vae": config.vae_dtype, **encoders}
    return {component: getattr(torch, name or config.dtype) for component, name in dtypes.items()}


def load_policy(
    model: str,
    config: PolicyConfig,
    device: torch.device | str = "cpu",
    shard: Callable[[nn.Module], None] | None = None,
) -> Policy:
    """Load a diffusers pipeline for training.

    Args:
        model: a local folder in diffusers' layout, a hub id, or "shapes" or "shapes_edit" for a bundled model.
        config: dtypes, adapter and embedding settings.
        device: where it runs.
        shard: shards a module over the ranks. In full training the transformers and their reference are sharded by
            it before this rank reads its part of the weights.

    Raises:
        UserError: there is no such pipeline, its family is not supported, it needs a package that is not installed, or
            it cannot be quantised here.
    """
    config = with_default_rank(model, config)
    source = str(BUNDLED.get(model, model))
    files: dict[str, list[Path]] = {}
    try:
        index = DiffusionPipeline.load_config(source)
        name = pipeline_of(source, index, config)
        family = family_of(source, name)
        # A pipeline saved without a component (SD3 without T5) loads only if told so.
        parts = {key: value for key, value in index.items() if isinstance(value, list)}
        given: dict[str, Any] = {key: None for key, value in parts.items() if value[0] is None}
        transformers = [key for key in parts if key.startswith("transformer") and key not in given]
        quantization = quantization_config(config, transformers)
        if shard is not None and config.lora is None and not config.lora_rank:
            for key in transformers:
                given[key] = empty_transformer(source, key, parts[key][1], getattr(torch, config.dtype))
                files[key] = weight_files(source, key)
        pipeline = getattr(diffusers, name).from_pretrained(
            source, dtype=component_dtypes(config), quantization_config=quantization, **given
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f'model "{source}" is neither a diffusers folder nor a hub id that can be read ({reason}); '
            "a gated model needs `hf auth login`"
        ) from error
    except ImportError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        extra = ': pip install "fastflowgrpo[edit]"' if "torchvision" in reason.lower() else ""
        raise UserError(f'model "{source}": {reason}; install it{extra}') from error
    if shard is None or not files:
        policy = family(pipeline.to(device), config)
    else:
        for key, component in pipeline.components.items():
            if isinstance(component, nn.Module) and key not in files:
                component.to(device)
        policy = family(pipeline, config)
        policy.read_shards(files, shard)
    if config.offload:
        policy.offload()
    return policy
