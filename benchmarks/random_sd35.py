"""Stable Diffusion 3.5 Medium with random weights, for benchmarks: `python -m benchmarks.random_sd35 FOLDER`.

Transformer, VAE, scheduler and both CLIP text encoders have the published configuration, so that a pass costs as much
as with the trained weights. T5-XXL is left out, which the pipeline allows: `policy.max_sequence_length=256` appends as
many zero tokens as T5 would give, and the transformer processes them like any others. The tokenizers are those of the
bundled model, padded to CLIP's 77 tokens.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from fastflowgrpo.planning import published_models
from fastflowgrpo.shapes import PIPELINE

Configs = Mapping[str, Mapping[str, Any]]

PUBLISHED: Configs = {
    "scheduler": {"shift": 3.0},
    **{name: config for name, (_, config) in published_models.PUBLISHED[published_models.SD35_MEDIUM].items()},
}


def random_sd35(device: torch.device | str, dtype: torch.dtype, configs: Configs = PUBLISHED) -> Any:
    """Return a StableDiffusion3Pipeline without T5, with each module's own random initialisation.

    Args:
        device: where the weights are drawn in float32, and stay.
        dtype: to which the weights are then converted.
        configs: of each component, as in `PUBLISHED`.
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
    parser.add_argument("folder", type=Path, help="the pipeline is written here in diffusers' layout, 7 GB")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random_sd35(device, torch.bfloat16).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
