"""Configurations of published models, from the `config.json` files of their repositories."""

from collections.abc import Mapping
from typing import Any

Component = tuple[str, Mapping[str, Any]]
"""Class of a pipeline's component, and its configuration where it differs from the class's defaults."""
_CLIP_L: Component = (
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
_CLIP_G: Component = (
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
_WAN: Mapping[str, Component] = {
    "vae": ("AutoencoderKLWan", {"base_dim": 96, "z_dim": 16}),
    "text_encoder": ("UMT5EncoderModel", {**_T5_XXL, "vocab_size": 256384}),
}


def _wan_14b(in_channels: int, **image: int) -> Component:
    return "WanTransformer3DModel", {"text_dim": 4096, "in_channels": in_channels, "out_channels": 16, **image}


_WAN_I2V: Mapping[str, Component] = {
    "pipeline": ("WanImageToVideoPipeline", {}),
    "transformer": _wan_14b(36, image_dim=1280, added_kv_proj_dim=5120),
    "image_encoder": (
        "CLIPVisionModel",
        {
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "projection_dim": 1024,
        },
    ),
    **_WAN,
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
_SD35: Mapping[str, Component] = {
    "pipeline": ("StableDiffusion3Pipeline", {}),
    "vae": ("AutoencoderKL", {**_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_G,
    "text_encoder_3": ("T5EncoderModel", _T5_XXL),
}
_SD35_LARGE: Mapping[str, Component] = {
    **_SD35,
    "transformer": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
}
_QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN3_8B = {**_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_Z_IMAGE: Mapping[str, Component] = {
    "pipeline": ("ZImagePipeline", {}),
    "transformer": ("ZImageTransformer2DModel", {"axes_lens": (1536, 512, 512)}),
    "vae": ("AutoencoderKL", {**_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "text_encoder": ("Qwen3Model", _QWEN3_4B),
}

_FLUX_DEV: Mapping[str, Component] = {
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
}
_QWEN_IMAGE: Mapping[str, Component] = {
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
}
_QWEN_IMAGE_EDIT_PLUS = {**_QWEN_IMAGE, "pipeline": ("QwenImageEditPlusPipeline", {})}


def _klein(
    layers: int, single_layers: int, heads: int, encoder: Mapping[str, Any], distilled: bool
) -> dict[str, Component]:
    """FLUX.2 klein, from the `Klein4BParams` and `Klein9BParams` of black-forest-labs' code."""
    transformer = {
        "num_layers": layers,
        "num_single_layers": single_layers,
        "num_attention_heads": heads,
        "joint_attention_dim": 3 * encoder["hidden_size"],
        "guidance_embeds": False,
    }
    return {
        "pipeline": ("Flux2KleinPipeline", {"is_distilled": distilled}),
        "transformer": ("Flux2Transformer2DModel", transformer),
        "vae": ("AutoencoderKLFlux2", {}),
        "text_encoder": ("Qwen3ForCausalLM", encoder),
    }


PUBLISHED: Mapping[str, Mapping[str, Component]] = {
    SD35_MEDIUM: {
        **_SD35,
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
    },
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": _SD35_LARGE,
    "black-forest-labs/FLUX.1-dev": _FLUX_DEV,
    "black-forest-labs/FLUX.1-Kontext-dev": {**_FLUX_DEV, "pipeline": ("FluxKontextPipeline", {})},
    "Qwen/Qwen-Image": _QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit": {**_QWEN_IMAGE, "pipeline": ("QwenImageEditPipeline", {})},
    "Qwen/Qwen-Image-Edit-2509": _QWEN_IMAGE_EDIT_PLUS,
    "Qwen/Qwen-Image-Edit-2511": {
        **_QWEN_IMAGE_EDIT_PLUS,
        "transformer": ("QwenImageTransformer2DModel", {**_QWEN_IMAGE["transformer"][1], "zero_cond_t": True}),
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
        **_WAN,
    },
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"pipeline": ("WanPipeline", {}), "transformer": _wan_14b(16), **_WAN},
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _WAN_I2V,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _WAN_I2V,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {
        "pipeline": ("WanPipeline", {"boundary_ratio": 0.875}),
        "transformer": _wan_14b(16),
        "transformer_2": _wan_14b(16),
        **_WAN,
    },
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {
        "pipeline": ("WanImageToVideoPipeline", {"boundary_ratio": 0.9}),
        "transformer": _wan_14b(36),
        "transformer_2": _wan_14b(36),
        **_WAN,
    },
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
        "pipeline": ("WanPipeline", {"expand_timesteps": True}),
        "transformer": (
            "WanTransformer3DModel",
            {
                "patch_size": (1, 2, 2),
                "num_attention_heads": 24,
                "attention_head_dim": 128,
                "in_channels": 48,
                "out_channels": 48,
                "text_dim": 4096,
                "freq_dim": 256,
                "ffn_dim": 14336,
                "num_layers": 30,
                "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads",
            },
        ),
        "vae": (
            "AutoencoderKLWan",
            {
                "base_dim": 160,
                "decoder_base_dim": 256,
                "z_dim": 48,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "is_residual": True,
                "scale_factor_spatial": 16,
                "latents_mean": (0.0,) * 48,  # the published values have no influence on an estimate
                "latents_std": (1.0,) * 48,
            },
        ),
        "text_encoder": ("UMT5EncoderModel", {**_T5_XXL, "vocab_size": 256384}),
    },
    "Tongyi-MAI/Z-Image": _Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": _Z_IMAGE,
    "black-forest-labs/FLUX.2-dev": {
        "pipeline": ("Flux2Pipeline", {}),
        "transformer": ("Flux2Transformer2DModel", {}),
        "vae": ("AutoencoderKLFlux2", {}),
        "text_encoder": (
            "Mistral3ForConditionalGeneration",
            {
                "text_config": {
                    "model_type": "mistral",
                    "hidden_size": 5120,
                    "intermediate_size": 32768,
                    "num_hidden_layers": 40,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                    "vocab_size": 131072,
                },
                "tie_word_embeddings": False,
            },
        ),
    },
    "black-forest-labs/FLUX.2-klein-4B": _klein(5, 20, 24, _QWEN3_4B, True),
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(5, 20, 24, _QWEN3_4B, False),
    "black-forest-labs/FLUX.2-klein-9B": _klein(8, 24, 32, _QWEN3_8B, True),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(8, 24, 32, _QWEN3_8B, False),
}
