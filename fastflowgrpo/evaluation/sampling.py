"""Sampling and scoring the images of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.console import progress
from fastflowgrpo.evaluation.diversity import rms_distances
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy import Policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.guidance import GuidanceScale
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.sampling.conditioning import repeat_rows
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.scoring.contract import Scores
from fastflowgrpo.scoring.pipeline import Scoring


@dataclass
class Samples:
    """The images of P prompts, `images_per_prompt` of each, in the order of the prompts."""

    images_per_prompt: int
    images: Tensor
    """(P * images_per_prompt, 3, H, W) uint8 on the CPU."""
    scores: Scores
    """One score per image."""
    latent_distances: Tensor
    """(P,) float32 on the CPU: RMS difference between the latents of two images, NaN with one image per prompt."""


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
    guidance_scale: GuidanceScale = 1.0,
    seed: int = 0,
) -> Samples:
    """Sample images with the ODE and the policy's present weights. Scoring runs in the background meanwhile.

    The initial noise of an image depends only on the seed, the prompt's index and the image's number within the
    prompt, not on the batch or the rank. Two models therefore start from the same noise and can be compared.

    Args:
        prompts: (index, prompt) pairs.
        shape: shape of one latent sample.
        num_steps: steps of the ODE.
        images_per_prompt: images of each prompt.
        batch_size: images sampled at once. The images of a prompt stay together, even if they are more.
        guidance_scale: classifier-free guidance, as in `sample_ode`; 1 runs the conditional branch alone.
        seed: seed of the noise, at least 0.
    """
    images, distances = [], []
    prompts_at_once = max(1, batch_size // images_per_prompt)
    unconditional = embed([""]) if guidance_scale != 1 else None
    for begin in progress("evaluation", range(0, len(prompts), prompts_at_once)):
        indices, batch = zip(*prompts[begin : begin + prompts_at_once], strict=True)
        conditioning = embed(batch)
        rows = torch.arange(len(batch), device=policy.device).repeat_interleave(images_per_prompt)
        seeds = sample_seeds([index + (seed << 32) for index in indices], images_per_prompt).to(policy.device)
        latents = sample_ode(
            policy,
            repeat_rows(conditioning, rows),
            num_steps,
            philox_normal(seeds, 0, (len(seeds), *shape)),
            unconditional=unconditional,
            guidance_scale=guidance_scale,
        )
        images.append(scoring.submit(latents, batch, images_per_prompt))
        distances.append(rms_distances(latents.unflatten(0, (-1, images_per_prompt))))
    scores = scoring.finish()
    return Samples(images_per_prompt, torch.cat(images), scores, torch.cat(distances).cpu())
