"""Sampling and scoring the images of an evaluation, and what their scores say: means, their errors, diversity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy import Policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.reporting import progress, rms_distances
from fastflowgrpo.rewards import Scores
from fastflowgrpo.rewards.scoring import Scoring
from fastflowgrpo.rollout import repeat_rows, sample_ode, sample_seeds


@dataclass
class Samples:
    """The images of P prompts, `copies` of each, in order."""

    copies: int
    images: Tensor
    """(P * copies, 3, H, W) uint8 on the CPU."""
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
    copies: int,
    batch_size: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> Samples:
    """Draw images with the ODE and the policy's weights as they are, and score them behind the drawing.

    Args:
        prompts: (index, prompt) pairs. An image's initial noise is a function of seed, index and copy, whatever else
            is drawn beside it: images of two models are compared, not their luck.
        shape: of one latent sample.
        copies: images of each prompt.
        batch_size: images at once; all copies of a prompt stay together, even if they are more.
        seed: of the noise, at least 0.
    """
    images, distances = [], []
    prompts_at_once = max(1, batch_size // copies)
    unconditional = embed([""]) if guidance_scale != 1 else None
    for begin in progress("evaluation", range(0, len(prompts), prompts_at_once)):
        indices, chosen = zip(*prompts[begin : begin + prompts_at_once], strict=True)
        conditioning = embed([prompt.text for prompt in chosen])
        rows = torch.arange(len(chosen), device=policy.device).repeat_interleave(copies)
        seeds = sample_seeds([index + (seed << 32) for index in indices], copies).to(policy.device)
        latents = sample_ode(
            policy,
            repeat_rows(conditioning, rows),
            num_steps,
            philox_normal(seeds, 0, (len(seeds), *shape)),
            unconditional=unconditional,
            guidance_scale=guidance_scale,
        )
        images.append(scoring.submit(latents, chosen, copies))
        distances.append(rms_distances(latents.unflatten(0, (-1, copies))))
    scores = scoring.finish()
    return Samples(copies, torch.cat(images), scores, torch.cat(distances).cpu())


@dataclass(frozen=True)
class Statistic:
    """A mean over the images that have a value, and how sure it is."""

    mean: float
    """NaN if no image has a value."""
    standard_error: float
    """Of the mean; NaN with a single prompt."""
    scored: int
    """Images (for a diversity: prompts) with a value."""
    missing: int
    """Images without one; they take no part in the mean."""

    @classmethod
    def of(cls, values: Tensor) -> "Statistic":
        """The statistic of values (P, n), NaN where missing; a row per prompt.

        Images of a prompt are no independent draws, so that the error is that of a mean over clusters
        (a ratio estimate, Cochran, Sampling Techniques, chapter 6):
        sqrt(P / (P - 1) * sum_p (sum_i (x_pi - mean))^2) / N. With as many values in every row it is the standard
        deviation of the prompts' means over sqrt(P).
        """
        scored = ~values.isnan()
        values, count = values.double().nan_to_num(), int(scored.sum())
        if not count:
            return cls(math.nan, math.nan, 0, values.numel())
        mean = float(values.sum()) / count
        deviations = torch.where(scored, values - mean, 0.0).sum(1)
        prompts = int(scored.any(1).sum())
        scale = prompts / (prompts - 1) if prompts > 1 else math.nan
        error = math.sqrt(scale * float(deviations.square().sum())) / count
        return cls(mean, error, count, values.numel() - count)

    @classmethod
    def average(cls, parts: Sequence["Statistic"]) -> "Statistic":
        """The mean of the means of independent parts, as GenEval's overall accuracy is that of its tags."""
        return cls(
            sum(part.mean for part in parts) / len(parts),
            math.sqrt(sum(part.standard_error**2 for part in parts)) / len(parts),
            sum(part.scored for part in parts),
            sum(part.missing for part in parts),
        )


Measures = dict[str, dict[str, Tensor]]
"""Section -> row -> values (P, n), NaN where missing. Of two evaluations of the same prompts they can be subtracted."""

GENEVAL = {"geneval/strict": "GenEval, strict", "geneval/correct": "GenEval, official check"}


def diversity(samples: Samples, embed_images: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """How different the images of a prompt are, (P,) each; {} of one image.

    Args:
        embed_images: from uint8 images (B, 3, H, W) to unit embeddings (B, D), whose cosine distance is a diversity.
    """
    if samples.copies == 1:
        return {}
    groups = (-1, samples.copies)
    found = {"pixels": rms_distances(samples.images.unflatten(0, groups)) / 255, "latents": samples.latent_distances}
    if embed_images is not None:
        found["CLIP"] = cosine_distances(embed_images(samples.images).cpu().unflatten(0, groups))
    return found


def measures(
    prompts: Sequence[Prompt], copies: int, scores: Scores, distances: dict[str, Tensor], total: bool = True
) -> Measures:
    """What an evaluation measures: GenEval accuracies by tag where there are any, every score, and the diversity.

    Args:
        scores: of `copies` images of each prompt.
        distances: from `diversity`.
        total: whether the weighted sum of the rewards has a meaning.
    """
    values = {"reward": scores.values} if total else {}
    values = {name: value.view(-1, copies) for name, value in {**values, **scores.details}.items()}
    sections: Measures = {}
    for name, title in GENEVAL.items():
        if name in values:
            rows = {tag: [i for i, p in enumerate(prompts) if p.metadata.get("tag") == tag] for tag in TAGS}
            sections[title] = {tag: values[name][of_tag] for tag, of_tag in rows.items() if of_tag}
    sections["Scores"] = values
    if distances:
        sections["Diversity"] = {name: value[:, None] for name, value in distances.items()}
    return sections


def statistics(sections: Measures) -> dict[str, dict[str, Statistic]]:
    """The statistic of every row, and first the overall accuracy of GenEval's sections."""
    found = {title: {name: Statistic.of(values) for name, values in rows.items()} for title, rows in sections.items()}
    return {
        title: {"overall": Statistic.average(list(rows.values())), **rows} if title in GENEVAL.values() else rows
        for title, rows in found.items()
    }


def difference(a: Measures, b: Measures) -> Measures:
    """b - a, image by image, where both have a value. (P, n) each, as a and b."""
    return {title: {name: b[title][name] - values for name, values in rows.items()} for title, rows in a.items()}


def cosine_distances(groups: Tensor) -> Tensor:
    """1 - cosine of two unit embeddings of a group, the mean over its pairs: groups (P, n, D) -> (P,)."""
    n = groups.shape[1]
    return 1 - (groups.sum(1).square().sum(-1) - n) / (n * (n - 1))
