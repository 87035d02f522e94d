"""What models are made of, without their weights: known ones from here, others from the config.json of their parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from fastflowgrpo.errors import UserError
from fastflowgrpo.shapes import PIPELINE

Part = tuple[str, Mapping[str, Any]]
"""Class and configuration of a part, the latter less what is the class's default."""
_CLIP_L: Part = (
    "CLIPTextModelWithProjection",
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
)
_CLIP_G: Part = (
    "CLIPTextModelWithProjection",
    {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "vocab_size": 49408,
    },
)
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
PUBLISHED: Mapping[str, Mapping[str, Part]] = {
    SD35_MEDIUM: {
        "pipeline": ("StableDiffusion3Pipeline", {}),
        "transformer": (
            "SD3Transformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        "vae": ("AutoencoderKL", {**_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": ("T5EncoderModel", _T5_XXL),
    },
    "black-forest-labs/FLUX.1-dev": {
        "pipeline": ("FluxPipeline", {}),
        "transformer": (
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": (16, 56, 56),
            },
        ),
        "vae": ("AutoencoderKL", {**_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("CLIPTextModel", {k: v for k, v in _CLIP_L[1].items() if k != "projection_dim"}),
        "text_encoder_2": ("T5EncoderModel", _T5_XXL),
    },
    "Qwen/Qwen-Image": {
        "pipeline": ("QwenImagePipeline", {}),
        "transformer": (
            "QwenImageTransformer2DModel",
            {
                "patch_size": 2,
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 3584,
                "axes_dims_rope": (16, 56, 56),
            },
        ),
        "vae": ("AutoencoderKLQwenImage", {"base_dim": 96, "z_dim": 16}),
        "text_encoder": (
            "Qwen2_5_VLForConditionalGeneration",
            {
                "text_config": {
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "vocab_size": 152064,
                },
                "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
                "tie_word_embeddings": False,
            },
        ),
    },
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {
        "pipeline": ("WanPipeline", {}),
        "transformer": (
            "WanTransformer3DModel",
            {
                "patch_size": (1, 2, 2),
                "num_attention_heads": 12,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,
                "freq_dim": 256,
                "ffn_dim": 8960,
                "num_layers": 30,
                "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads",
            },
        ),
        "vae": ("AutoencoderKLWan", {"base_dim": 96, "z_dim": 16}),
        "text_encoder": ("UMT5EncoderModel", {**_T5_XXL, "vocab_size": 256384}),
    },
}


@dataclass(frozen=True)
class Architecture:
    """The modules of a pipeline, each with its `config`, on the meta device: shapes without weights."""

    pipeline: str
    """Class of the pipeline."""
    transformer: Any
    vae: Any
    text_encoders: dict[str, Any]


def load_architecture(model: str, dtype: torch.dtype) -> Architecture:
    """The modules of a model without weights.

    Args:
        model: a local folder in diffusers' layout, a hub id (for one that is not in `PUBLISHED` its configurations are
            fetched, a few kB), or "shapes".
        dtype: of the parameters.

    Raises:
        UserError: there is no such model, or it can neither be found here nor fetched.
    """
    if model in PUBLISHED:
        pipeline = PUBLISHED[model]["pipeline"][0]
        modules = {name: _published(*part) for name, part in PUBLISHED[model].items() if name != "pipeline"}
    else:
        source = str(PIPELINE) if model == "shapes" else model
        try:
            index = DiffusionPipeline.load_config(source)
            pipeline = index["_class_name"]
            modules = {
                name: _of_repository(source, name, *index[name])
                for name in index
                if name in ("transformer", "vae") or name.startswith("text_encoder")
                if index[name][0] is not None
            }
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f'model "{model}" is neither a diffusers folder nor a hub id that can be read ({reason}); '
                f"known without a network: {', '.join(PUBLISHED)}"
            ) from error
    for module in modules.values():
        # Buffers that come from numpy are on the CPU. diffusers' own `to` would warn.
        nn.Module.to(module, "meta", dtype)
        module.requires_grad_(False).eval()
    if not {"transformer", "vae"} <= modules.keys():
        raise UserError(f'model "{model}" is a {pipeline}; docs/models.md lists what is supported')
    transformer, vae = modules.pop("transformer"), modules.pop("vae")
    return Architecture(pipeline, transformer, vae, modules)


def _published(name: str, config: Mapping[str, Any]) -> nn.Module:
    cls = getattr(diffusers, name, None) or getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**config)) if hasattr(cls, "config_class") else cls(**config)


def _of_repository(source: str, name: str, library: str, class_name: str) -> nn.Module:
    cls = getattr(diffusers if library == "diffusers" else transformers, class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(cls.load_config(source, subfolder=name))
        return cls(cls.config_class.from_pretrained(source, subfolder=name))
