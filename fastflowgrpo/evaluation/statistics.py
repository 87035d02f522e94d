"""Statistics of an evaluation: the values of all images, their means with standard errors, and differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.scoring.contract import Scores

Measures = dict[str, dict[str, Tensor]]
"""Section -> row -> values (P, n), NaN where missing; for a diversity (P, 1)."""
STRICT, OFFICIAL = "GenEval, strict", "GenEval, official check"
GENEVAL_SECTIONS = {"geneval/strict": STRICT, "geneval/correct": OFFICIAL}


@dataclass(frozen=True)
class Statistic:
    """A mean over the images that have a value, with its standard error."""

    mean: float
    """NaN if no image has a value."""
    standard_error: float
    """Standard error of the mean; NaN with a single prompt."""
    scored: int
    """Number of images (for a diversity: prompts) with a value."""
    missing: int
    """Number of images without one; they take no part in the mean."""

    @classmethod
    def of(cls, values: Tensor) -> "Statistic":
        """The statistic of values (P, n), NaN where missing; one row per prompt.

        The images of a prompt are not independent, so the error is the one of a mean over clusters
        (a ratio estimate, Cochran, Sampling Techniques, chapter 6):
        sqrt(P / (P - 1) * sum_p (sum_i (x_pi - mean))^2) / N. With equally many values in every row it is the standard
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
        """The mean of the means of independent parts. GenEval's overall accuracy is this mean over its tags."""
        return cls(
            sum(part.mean for part in parts) / len(parts),
            math.sqrt(sum(part.standard_error**2 for part in parts)) / len(parts),
            sum(part.scored for part in parts),
            sum(part.missing for part in parts),
        )


SectionStatistics = dict[str, dict[str, Statistic]]
"""Section -> row -> statistic."""


def measures(
    prompts: Sequence[Prompt], images_per_prompt: int, scores: Scores, diversities: Mapping[str, Tensor]
) -> Measures:
    """The values of an evaluation by section: GenEval accuracies by tag if there are any, all scores, the diversity.

    Args:
        scores: scores of `images_per_prompt` images of each of P prompts.
        diversities: tensors (P,) by name; {} with one image per prompt.
    """
    values = {"reward": scores.values, **scores.details}
    values = {name: value.view(-1, images_per_prompt) for name, value in values.items()}
    sections: Measures = {}
    for name, title in GENEVAL_SECTIONS.items():
        if name in values:
            rows = {tag: [i for i, p in enumerate(prompts) if p.metadata.get("tag") == tag] for tag in TAGS}
            sections[title] = {tag: values[name][indices] for tag, indices in rows.items() if indices}
    sections["Scores"] = values
    if diversities:
        sections["Diversity"] = {name: value[:, None] for name, value in diversities.items()}
    return sections


def statistics(sections: Measures) -> SectionStatistics:
    """The statistic of every row. GenEval's sections begin with the overall accuracy, the mean over the tags."""
    result = {title: {name: Statistic.of(values) for name, values in rows.items()} for title, rows in sections.items()}
    return {
        title: {"overall": Statistic.average(list(rows.values())), **rows} if title in (STRICT, OFFICIAL) else rows
        for title, rows in result.items()
    }


def difference(a: Measures, b: Measures) -> Measures:
    """b - a image by image, for two evaluations of the same prompts; NaN where either has no value."""
    return {title: {name: b[title][name] - values for name, values in rows.items()} for title, rows in a.items()}
