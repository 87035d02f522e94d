"""Statistics of evaluation scores: means, their standard errors, differences, diversity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import Scores


def rms_distances(groups: Tensor) -> Tensor:
    """The RMS difference of two samples of a group, the mean over its pairs: groups (P, n, ...) -> (P,) float32."""
    return torch.stack([torch.pdist(group.flatten(1).float()).mean() for group in groups]) / groups[0, 0].numel() ** 0.5


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


def measures(
    prompts: Sequence[Prompt], images_per_prompt: int, scores: Scores, distances: dict[str, Tensor], total: bool = True
) -> Measures:
    """What an evaluation measures: GenEval accuracies by tag where there are any, every score, and the diversity.

    Args:
        scores: of `images_per_prompt` images of each prompt.
        distances: from `diversity`.
        total: whether the weighted sum of the rewards has a meaning.
    """
    values = {"reward": scores.values} if total else {}
    values = {name: value.view(-1, images_per_prompt) for name, value in {**values, **scores.details}.items()}
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
