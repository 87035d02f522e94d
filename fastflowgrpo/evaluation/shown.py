"""Which prompts and images of an evaluation its picture and its gallery show."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastflowgrpo.distributed import Processes
from fastflowgrpo.evaluation.sampling import Samples
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.images import source_images

MAX_PROMPTS, MAX_IMAGES = 12, 4  # in a picture: prompts, and images of each


@dataclass
class ShownImages:
    """The images of an evaluation that its picture shows."""

    prompts: list[str]
    images: Tensor
    """(prompts, n, 3, H, W) uint8 on the CPU."""
    correct: Tensor | None
    """(prompts, n) bool, whether each passes GenEval's strict check; None where it was not checked."""
    sources: list[Tensor] = field(default_factory=list)
    """Of each prompt, (3, H, W) uint8 on the CPU; empty for text-to-image."""


@dataclass
class GalleryImages:
    """The images of an evaluation that the run's gallery keeps: the first n of some prompts."""

    indices: list[int]
    """Of the prompts, among those of the evaluation."""
    images: Tensor
    """(prompts, n, 3, H, W) uint8 on the CPU."""


def shown_prompts(prompts: Sequence[Prompt], limit: int = MAX_PROMPTS) -> list[int]:
    """Indices of about `limit` different prompts, evenly spaced, with the same number (at least one) from every tag."""
    by_tag: dict[str | None, list[int]] = defaultdict(list)
    for i in {prompt.text: i for i, prompt in enumerate(prompts)}.values():
        by_tag[prompts[i].metadata.get("tag")].append(i)
    share = max(1, limit // len(by_tag))
    chosen = []
    for indices in by_tag.values():
        count = min(share, len(indices))
        chosen += [indices[i * len(indices) // count] for i in range(count)]
    return chosen


def gather_shown(
    prompts: Sequence[Prompt], samples: Samples, strict: Tensor | None, processes: Processes
) -> ShownImages:
    """Collect the images to show from all ranks. Collective; the other images stay on their rank.

    Args:
        prompts: all P prompts of the evaluation.
        samples: the images of this rank's padded prompts.
        strict: (P, images_per_prompt), GenEval's strict score of every image, if there is one.
    """
    shown = shown_prompts(prompts)
    return ShownImages(
        prompts=[prompts[i].text for i in shown],
        images=_gather_images(shown, MAX_IMAGES, len(prompts), samples, processes),
        correct=None if strict is None else strict[shown, :MAX_IMAGES] == 1,
        sources=source_images([prompts[i] for i in shown], *samples.images.shape[-2:]),
    )


def gather_gallery(
    prompts: Sequence[Prompt], samples: Samples, limit: int, processes: Processes
) -> GalleryImages | None:
    """Collect up to `limit` images from all ranks, two or more of each prompt if there are as many. Collective.

    Args:
        prompts, samples: as in `gather_shown`.
        limit: 0 collects nothing.
    """
    if not limit:
        return None
    distinct = len({prompt.text for prompt in prompts})
    images = min(samples.images_per_prompt, limit, max(2, -(-limit // distinct)))
    indices = shown_prompts(prompts, limit // images)[: limit // images]
    return GalleryImages(indices, _gather_images(indices, images, len(prompts), samples, processes))


def _gather_images(indices: list[int], n: int, total: int, samples: Samples, processes: Processes) -> Tensor:
    """The first n images of the prompts with these indices, of `total` prompts. Collective."""
    groups = samples.images.split(samples.images_per_prompt)
    local = dict(zip(processes.rank_indices(total), groups, strict=False))
    # Cloned, because a view is sent with the whole tensor behind it.
    parts = processes.gather({i: local[i][:n].clone() for i in indices if i in local})
    images = {i: group for part in parts for i, group in part.items()}
    return torch.stack([images[i] for i in indices])
