"""Fine-tune the bundled pipeline to edit images: `python -m fastflowgrpo.shapes.pretrain_edit --output DIR`.

The source's latents become further input channels of the transformer. The text encoders learn the instructions, and
keep what they know of the words that captions have too. The VAE stays as it is. Some targets are edited wrongly on
purpose: the model then makes good images but is unsure of what was asked. An interrupted run continues from its last
checkpoint.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fastflowgrpo.shapes import PIPELINE
from fastflowgrpo.shapes.edits import CONTENTS, WORDINGS, Edit, pretraining_edits
from fastflowgrpo.shapes.modules import build_text_encoder
from fastflowgrpo.shapes.pretrain import (
    CAPTION_DROPOUT,
    LATENT_STD,
    LOGIT_MEAN,
    LOGIT_STD,
    Training,
    cell_codes,
    encode_tokens,
)
from fastflowgrpo.shapes.scenes import Shape
from fastflowgrpo.shapes.tokenizer import MAX_LENGTH, build_tokenizer

PAIRS = 16384
WRONG_TARGETS = 0.3
STEPS, BATCH, LEARNING_RATE = 800, 64, 1.5e-3


def with_source_channels(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Return a copy that takes twice the channels; the weights of the new ones are 0, so its output is the same."""
    settings = {name: value for name, value in transformer.config.items() if name != "_name_or_path"}
    wider = SD3Transformer2DModel.from_config({**settings, "in_channels": 2 * transformer.config.in_channels})
    state = transformer.state_dict()
    weight = state["pos_embed.proj.weight"]
    wider.load_state_dict({**state, "pos_embed.proj.weight": torch.cat([weight, torch.zeros_like(weight)], dim=1)})
    return wider


def with_tokenizer(
    encoder: CLIPTextModelWithProjection, old: CLIPTokenizer, new: CLIPTokenizer
) -> CLIPTextModelWithProjection:
    """Return a copy for another tokenizer, in which the tokens that both know keep their embeddings."""
    adapted = build_text_encoder(new)
    name = "text_model.embeddings.token_embedding.weight"
    state, embeddings = encoder.state_dict(), adapted.state_dict()[name].clone()
    known = [(index, old.get_vocab()[token]) for token, index in new.get_vocab().items() if token in old.get_vocab()]
    to, origin = torch.tensor(known).T
    embeddings[to] = state[name][origin]
    adapted.load_state_dict({**state, name: embeddings})
    return adapted


def scaled_codes(vae: AutoencoderKL, scenes: list[list[Shape]]) -> Tensor:
    """Return the codes that the VAE was trained to give, shifted and scaled as the pipeline does; encoding is slow."""
    return (cell_codes(scenes) - vae.config.shift_factor) * vae.config.scaling_factor


def train(pipeline: StableDiffusion3Pipeline, tokenizer: CLIPTokenizer, seed: int, folder: Path) -> nn.ModuleDict:
    """Train the transformer and its text encoders together by flow matching from the source to the target."""
    torch.manual_seed(seed)
    texts, before, after = zip(*pretraining_edits(PAIRS, WRONG_TARGETS, seed), strict=True)
    source, mean = (scaled_codes(pipeline.vae, list(scenes)) for scenes in (before, after))
    std = LATENT_STD * pipeline.vae.config.scaling_factor
    modules = (
        nn.ModuleDict(
            {
                "transformer": with_source_channels(pipeline.transformer),
                "text_encoder": with_tokenizer(pipeline.text_encoder, pipeline.tokenizer, tokenizer),
                "text_encoder_2": with_tokenizer(pipeline.text_encoder_2, pipeline.tokenizer_2, tokenizer),
            }
        )
        .train()
        .requires_grad_(True)
    )
    training = Training("edit", modules, STEPS, STEPS, LEARNING_RATE, 0.99, folder)
    padding = {"padding": "max_length", "max_length": MAX_LENGTH, "return_tensors": "pt"}
    tokens, empty = tokenizer(list(texts), **padding).input_ids, tokenizer([""], **padding).input_ids[0]
    for generator in training.remaining(seed):
        rows = torch.randint(PAIRS, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, 1, generator=generator) < CAPTION_DROPOUT
        embeds, pooled = encode_tokens(modules, torch.where(dropped, empty, tokens[rows]))
        clean = mean[rows] + std * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(LOGIT_MEAN + LOGIT_STD * torch.randn(BATCH, generator=generator))
        mix = sigma[:, None, None, None]
        velocity = modules["transformer"](
            torch.cat([(1 - mix) * clean + mix * noise, source[rows]], dim=1),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        training.update(F.mse_loss(velocity, noise - clean))
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the pipeline; checkpoints go into OUTPUT-training"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.output.with_name(arguments.output.name + "-training")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, text_encoder_3=None, tokenizer_3=None)
    instructions = [
        Edit(action, *content).text(wording)
        for action, wordings in WORDINGS.items()
        for wording in wordings
        for content in CONTENTS
    ]
    tokenizer = build_tokenizer(instructions)
    modules = train(pipeline, tokenizer, arguments.seed, folder)
    pipeline.vae.half()  # halves its size in the package; loading casts it to the dtype that is asked for
    # A new pipeline, since the old one would save the folder that it came from.
    StableDiffusion3Pipeline(
        scheduler=pipeline.scheduler,
        vae=pipeline.vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        **modules,
    ).save_pretrained(arguments.output)
    print(f"pipeline in {arguments.output}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
