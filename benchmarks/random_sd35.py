"""Stable Diffusion 3.5 Medium with random weights, for benchmarks: `python -m benchmarks.random_sd35 FOLDER`.

Transformer, VAE, scheduler and both CLIP text encoders have the published configuration, so that a pass costs what it
costs with the trained weights. T5-XXL is left out, as the pipeline allows: `policy.max_sequence_length=256` appends as
many zero tokens as it would give, which the transformer works through like any others. The tokenizers are those of the
bundled model, padded to CLIP's 77 tokens.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from fastflowgrpo.shapes import PIPELINE

Configs = Mapping[str, Mapping[str, Any]]

# The config.json of each part of stabilityai/stable-diffusion-3.5-medium, less what is the classes' default.
PUBLISHED: Configs = {
    "transformer": {
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
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "scheduler": {"shift": 3.0},
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "text_encoder_2": {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "vocab_size": 49408,
    },
}


def random_sd35(device: torch.device | str, dtype: torch.dtype, configs: Configs = PUBLISHED) -> Any:
    """A StableDiffusion3Pipeline without T5, its weights drawn on `device` with each module's own initialisation.

    Args:
        device: where the weights are drawn, in float32, and stay.
        dtype: of the finished weights.
        configs: of each part, as `PUBLISHED`.
    """
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer", model_max_length=77)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device(device):
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**configs["transformer"]).to(dtype),
            vae=AutoencoderKL(**configs["vae"]).to(dtype),
            scheduler=FlowMatchEulerDiscreteScheduler(**configs["scheduler"]),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder"], **tokens)).to(dtype),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"], **tokens)).to(dtype),
            text_encoder_3=None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=None,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pipeline is written in diffusers' layout, 7 GB")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random_sd35(device, torch.bfloat16).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
