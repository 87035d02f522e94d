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

from fastflowgrpo.planning.published_models import PUBLISHED as MODELS
from fastflowgrpo.planning.published_models import SD35_MEDIUM
from fastflowgrpo.shapes import PIPELINE

Configs = Mapping[str, Mapping[str, Any]]

PUBLISHED: Configs = {
    "scheduler": {"shift": 3.0},
    **{name: config for name, (_, config) in MODELS[SD35_MEDIUM].items()},
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
