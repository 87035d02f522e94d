"""A model's diffusers pipeline on the meta device, where tensors have shapes but no contents."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.published_models import PUBLISHED
from fastflowgrpo.policy import component_dtypes, family_of, pipeline_of
from fastflowgrpo.policy.protocol import ENCODERS
from fastflowgrpo.shapes import BUNDLED


def meta_pipeline(model: str, config: PolicyConfig) -> DiffusionPipeline:
    """Build a model's pipeline without weights and tokenizers, and with a scheduler of default settings.

    Args:
        model: a local folder in diffusers' layout, a hub id, or one of BUNDLED. The configurations of a hub id that is
            not in `PUBLISHED` are fetched, a few kB.
        config: the components' dtypes, and how the model is loaded.

    Raises:
        UserError: there is no such model, it can neither be found here nor fetched, or its family is not supported.
    """
    if model in PUBLISHED:
        name, settings = PUBLISHED[model]["pipeline"]
        index = {"_class_name": name, **settings}
        modules = {key: _from_published(*part) for key, part in PUBLISHED[model].items() if key != "pipeline"}
    else:
        source = str(BUNDLED.get(model, model))
        try:
            index = DiffusionPipeline.load_config(source)
            family_of(model, index["_class_name"])
            settings = {
                key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)
            }
            modules = {
                key: _from_repository(source, key, *index[key])
                for key in index
                if key == "vae" or key.startswith(("transformer", *ENCODERS))
                if index[key][0] is not None
            }
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f'model "{model}" is neither a diffusers folder nor a hub id that can be read ({reason}); '
                f"known without a network: {', '.join(PUBLISHED)}"
            ) from error
    dtypes = component_dtypes(config)
    for key, module in modules.items():
        # Buffers made by numpy are on the CPU. diffusers' own `to` would warn.
        nn.Module.to(module, "meta", dtypes.get(key, dtypes["default"]))
    pipeline: Any = getattr(diffusers, pipeline_of(model, index, config))
    required = [key for key, value in inspect.signature(pipeline).parameters.items() if value.default is value.empty]
    components = {**dict.fromkeys(required), **modules, "scheduler": FlowMatchEulerDiscreteScheduler()}
    return pipeline(**components, **settings)


def _from_published(name: str, config: Mapping[str, Any]) -> nn.Module:
    cls = getattr(diffusers, name, None) or getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**config)) if hasattr(cls, "config_class") else cls(**config)


def _from_repository(source: str, component: str, library: str, class_name: str) -> nn.Module:
    cls = getattr(diffusers if library == "diffusers" else transformers, class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(cls.load_config(source, subfolder=component))
        return cls(cls.config_class.from_pretrained(source, subfolder=component))
