"""The summary of an evaluation that a run logs: accuracy by tag, mean scores, diversity, images to show."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastflowgrpo.distributed import Processes
from fastflowgrpo.evaluation.statistics import rms_distances
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import Scores

SHOWN = 12  # prompts of an evaluation in pictures, or as many as there are


@dataclass
class Evaluation:
    """Scores of the evaluation prompts, and their images."""

    overall: float
    """Mean of the tags' accuracies, as GenEval counts; the mean reward where prompts have no tags."""
    tags: dict[str, float]
    """Strict accuracy of each GenEval tag."""
    scores: dict[str, float]
    """Mean of the total reward and of every named score."""
    diversity: float | None
    """Mean RMS pixel difference between two images of a prompt, as a share of the full range; None with one image."""
    images: int
    missing: int
    """Images without a score."""
    prompts: list[str]
    """The prompts of `shown`."""
    shown: Tensor
    """(prompts, n, 3, H, W) uint8: images of some prompts, spread over the tags."""
    correct: Tensor | None
    """(prompts, n) bool, if the prompts have tags."""

    @classmethod
    def of(
        cls,
        prompts: list[Prompt],
        images: Tensor,
        scores: Scores,
        images_per_prompt: int,
        processes: Processes | None = None,
    ) -> "Evaluation":
        """Summarise the images of all prompts. Collective; only the images that are shown leave their rank.

        Args:
            images: (P * images_per_prompt, 3, H, W), of this rank's prompts, first those of `Processes.rank_indices`.
            scores: of all prompts.
        """
        values = {"reward": scores.values, **scores.details}
        means = {name: value.nanmean().item() for name, value in values.items()}
        shown = spread_over_tags(prompts, SHOWN)
        own = processes.rank_indices(len(prompts)) if processes else range(len(prompts))
        groups = dict(zip(own, images.split(images_per_prompt), strict=False))
        distances = (
            {i: rms_distances(group[None]).item() for i, group in groups.items()} if images_per_prompt > 1 else {}
        )
        pictures = {i: groups[i][:4] for i in shown if i in groups}
        if processes:
            parts = processes.gather((distances, pictures))
            distances, pictures = ({i: kind[i] for kind in kinds for i in kind} for kinds in zip(*parts, strict=True))
        tag_of = [prompt.metadata.get("tag") for prompt in prompts]
        strict = values.get("geneval/strict")
        tags: dict[str, float] = {}
        if strict is not None:
            strict = strict.view(-1, images_per_prompt)
            for tag in TAGS:
                rows = [i for i, other in enumerate(tag_of) if other == tag]
                if rows:
                    tags[tag] = strict[rows].nanmean().item()
        return cls(
            overall=sum(tags.values()) / len(tags) if tags else means["reward"],
            tags=tags,
            scores=means,
            diversity=sum(distances.values()) / len(prompts) / 255 if images_per_prompt > 1 else None,
            images=len(scores.values),
            missing=int(scores.values.isnan().sum()),
            prompts=[prompts[i].text for i in shown],
            shown=torch.stack([pictures[i] for i in shown]),
            correct=None if strict is None else strict[shown, :4] == 1,
        )

    def row(self) -> dict[str, Any]:
        """What `metrics.jsonl` and `summary.json` hold of it."""
        return {
            "overall": self.overall,
            **self.tags,
            "diversity": self.diversity,
            "images": self.images,
            "missing": self.missing,
            "scores": self.scores,
        }


def spread_over_tags(prompts: list[Prompt], count: int) -> list[int]:
    """Indices of up to `count` different prompts, the same number from every tag, evenly spaced."""
    by_tag: dict[str | None, list[int]] = defaultdict(list)
    for i in {prompt.text: i for i, prompt in enumerate(prompts)}.values():
        by_tag[prompts[i].metadata.get("tag")].append(i)
    share = max(1, count // len(by_tag))
    chosen = []
    for rows in by_tag.values():
        number = min(share, len(rows))
        chosen += [rows[i * len(rows) // number] for i in range(number)]
    return chosen
