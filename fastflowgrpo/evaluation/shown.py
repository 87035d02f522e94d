"""Which prompts and images of an evaluation its pictures show."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.distributed import Processes
from fastflowgrpo.evaluation.sampling import Samples
from fastflowgrpo.prompts import Prompt

MAX_PROMPTS, MAX_IMAGES = 12, 4  # in a picture: prompts, and images of each


@dataclass
class ShownImages:
    """The images of an evaluation that its picture shows."""

    prompts: list[str]
    images: Tensor
    """(prompts, n, 3, H, W) uint8 on the CPU."""
    correct: Tensor | None
    """(prompts, n) bool, whether each passes GenEval's strict check; None where it was not checked."""


def shown_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of up to MAX_PROMPTS different prompts, evenly spaced, with the same number from every tag."""
    by_tag: dict[str | None, list[int]] = defaultdict(list)
    for i in {prompt.text: i for i, prompt in enumerate(prompts)}.values():
        by_tag[prompts[i].metadata.get("tag")].append(i)
    share = max(1, MAX_PROMPTS // len(by_tag))
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
    groups = samples.images.split(samples.images_per_prompt)
    local = dict(zip(processes.rank_indices(len(prompts)), groups, strict=False))
    # Cloned, because a view is sent with the whole tensor behind it.
    parts = processes.gather({i: local[i][:MAX_IMAGES].clone() for i in shown if i in local})
    images = {i: group for part in parts for i, group in part.items()}
    return ShownImages(
        prompts=[prompts[i].text for i in shown],
        images=torch.stack([images[i] for i in shown]),
        correct=None if strict is None else strict[shown, :MAX_IMAGES] == 1,
    )
