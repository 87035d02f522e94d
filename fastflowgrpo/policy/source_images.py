"""Source images of prompts: which a model takes, and as tokens of its transformer."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.protocol import EMPTY, SOURCE, Conditioning, Policy
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.sources import run_prompts
from fastflowgrpo.prompts.tables import is_table

SEVERAL = 10
"""The most images of a prompt for models that take several: FLUX.2's authors name it, the pipelines have no limit."""


def text_embeddings(conditioning: Conditioning) -> Conditioning:
    """Return what a transformer takes under the names of the conditioning: all but source images and empty prompts."""
    return {name: tensor for name, tensor in conditioning.items() if name != SOURCE and not name.startswith(EMPTY)}


def source_sizes(conditioning: Conditioning) -> list[tuple[int, int]]:
    """Return the (height, width) of the latents of each source image of a row."""
    if SOURCE not in conditioning:
        return []
    _, count, *_, height, width = conditioning[SOURCE].shape
    return [(height, width)] * count


def with_source_tokens(tokens: Tensor, conditioning: Conditioning, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Append the tokens of the source images to those of the samples.

    Args:
        tokens: (B, T, D), of the samples.
        conditioning: of the samples.
        pack: from latents (B, C, H, W) to tokens (B, T, D).
    """
    if SOURCE not in conditioning:
        return tokens
    return torch.cat([tokens, *(pack(source) for source in conditioning[SOURCE].unbind(1))], 1)


def sources_per_prompt(family: Policy | type[Policy], config: Config) -> int:
    """Return how many source images the prompts of a run have.

    Raises:
        UserError: the model takes several, or none, and the file of prompts, which would say how many, cannot be read.
    """
    train = Path(config.prompts.train)
    has_images_in_table = is_table(config.prompts.train) and "+" in config.prompts.train  # TEXT+IMAGE
    if family.max_sources > 1 and (train.suffix == ".jsonl" or train.is_dir() or has_images_in_table):
        return len(run_prompts(config)[0][0].images)
    return int(family.edits_images)


def check_source_images(policy: Policy, prompts: Iterable[Prompt]) -> None:
    """Check that all prompts have equally many source images, and as many as the policy takes.

    Raises:
        UserError: one does not; names it.
    """
    first: Prompt | None = None
    for prompt in prompts:
        count, first = len(prompt.images), first or prompt
        if policy.edits_images and not count:
            raise UserError(
                f"the model edits images, but the prompt {prompt.text!r} has none: give prompts as a .jsonl with the "
                'key "image", as a table with two columns, FILE:TEXT+IMAGE, or as a folder of NAME.png and NAME.txt'
            )
        if count and not policy.max_sources:
            raise UserError(
                f"the prompt {prompt.text!r} has a source image, but the model makes images from text alone: take an "
                "editing model (docs/editing.md), for Wan 2.2 TI2V-5B set policy.image_to_video, or leave out `image`"
            )
        if count > policy.max_sources:
            raise UserError(
                f"the prompt {prompt.text!r} has {count} source images, but the model takes {policy.max_sources}: "
                'name fewer under "image", or take a model that takes more (docs/editing.md)'
            )
        if count != len(first.images):
            raise UserError(
                f"the prompt {prompt.text!r} has {count} source images, but {first.text!r} has {len(first.images)}: "
                "prompts are sampled together and need equally many, make a run of each kind"
            )
