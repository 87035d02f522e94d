"""Sampling and scoring the images of an evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.console import progress
from fastflowgrpo.evaluation.statistics import cosine_distances, rms_distances
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy import Policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import Scores
from fastflowgrpo.sampling.conditioning import repeat_rows
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.scoring.pipeline import Scoring


@dataclass
class Samples:
    """The images of P prompts, `images_per_prompt` of each, in order."""

    images_per_prompt: int
    images: Tensor
    """(P * images_per_prompt, 3, H, W) uint8 on the CPU."""
    scores: Scores
    """Of each image."""
    latent_distances: Tensor
    """(P,) float32 on the CPU: RMS difference of two images' latents, NaN with one copy."""


@torch.no_grad()
def sample_and_score(
    policy: Policy,
    embed: EmbeddingCache,
    scoring: Scoring,
    prompts: Sequence[tuple[int, Prompt]],
    shape: tuple[int, ...],
    *,
    num_steps: int,
    images_per_prompt: int,
    batch_size: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> Samples:
    """Draw images with the ODE and the policy's weights as they are, and score them behind the drawing.

    Args:
        prompts: (index, prompt) pairs. An image's initial noise is a function of seed, index and copy, whatever else
            is drawn beside it: images of two models are compared, not their luck.
        shape: of one latent sample.
        images_per_prompt: images of each prompt.
        batch_size: images at once; all images of a prompt stay together, even if they are more.
        seed: of the noise, at least 0.
    """
    images, distances = [], []
    prompts_at_once = max(1, batch_size // images_per_prompt)
    unconditional = embed([""]) if guidance_scale != 1 else None
    for begin in progress("evaluation", range(0, len(prompts), prompts_at_once)):
        indices, chosen = zip(*prompts[begin : begin + prompts_at_once], strict=True)
        conditioning = embed([prompt.text for prompt in chosen])
        rows = torch.arange(len(chosen), device=policy.device).repeat_interleave(images_per_prompt)
        seeds = sample_seeds([index + (seed << 32) for index in indices], images_per_prompt).to(policy.device)
        latents = sample_ode(
            policy,
            repeat_rows(conditioning, rows),
            num_steps,
            philox_normal(seeds, 0, (len(seeds), *shape)),
            unconditional=unconditional,
            guidance_scale=guidance_scale,
        )
        images.append(scoring.submit(latents, chosen, images_per_prompt))
        distances.append(rms_distances(latents.unflatten(0, (-1, images_per_prompt))))
    scores = scoring.finish()
    return Samples(images_per_prompt, torch.cat(images), scores, torch.cat(distances).cpu())


def diversity(samples: Samples, embed_images: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """How different the images of a prompt are, (P,) each; {} of one image.

    Args:
        embed_images: from uint8 images (B, 3, H, W) to unit embeddings (B, D), whose cosine distance is a diversity.
    """
    if samples.images_per_prompt == 1:
        return {}
    groups = (-1, samples.images_per_prompt)
    found = {"pixels": rms_distances(samples.images.unflatten(0, groups)) / 255, "latents": samples.latent_distances}
    if embed_images is not None:
        found["CLIP"] = cosine_distances(embed_images(samples.images).cpu().unflatten(0, groups))
    return found
