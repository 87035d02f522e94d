"""Loading a policy from a model's folder or hub id."""

from dataclasses import replace

import diffusers
import torch
from diffusers import DiffusionPipeline

from fastflowgrpo.config import BUNDLED_MODELS, PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.families import family_of
from fastflowgrpo.policy.protocol import Policy
from fastflowgrpo.policy.quantization import quantization_config
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


def load_policy(model: str, config: PolicyConfig, device: torch.device | str = "cpu") -> Policy:
    """Load a diffusers pipeline for training.

    Args:
        model: a local folder in diffusers' layout, a hub id, or "shapes" or "shapes_edit" for a bundled model.
        config: dtypes, adapter and embedding settings.
        device: where it runs.

    Raises:
        UserError: there is no such pipeline, its family is not supported, or it cannot be quantised here.
    """
    config = with_default_rank(model, config)
    source = str(BUNDLED.get(model, model))
    try:
        index = DiffusionPipeline.load_config(source)
        name = index["_class_name"]
        family = family_of(source, name)
        # A pipeline saved without a component (SD3 without T5) loads only if told so.
        absent = [key for key, value in index.items() if isinstance(value, list) and value[0] is None]
        transformers = [key for key in index if key.startswith("transformer") and key not in absent]
        quantization = quantization_config(config, transformers)
        pipeline = getattr(diffusers, name).from_pretrained(
            source, dtype=component_dtypes(config), quantization_config=quantization, **dict.fromkeys(absent)
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f'model "{source}" is neither a diffusers folder nor a hub id that can be read ({reason}); '
            "a gated model needs `hf auth login`"
        ) from error
    policy = family(pipeline.to(device), config)
    if config.offload:
        policy.offload()
    return policy
