"""The summary of an evaluation: the value of every image, the figures that a run logs, and the images to show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastflowgrpo.distributed import Processes
from fastflowgrpo.evaluation.diversity import diversity
from fastflowgrpo.evaluation.guard import GUARD
from fastflowgrpo.evaluation.sampling import Samples
from fastflowgrpo.evaluation.shown import GalleryImages, ShownImages, gather_gallery, gather_shown
from fastflowgrpo.evaluation.statistics import STRICT, Measures, Statistic, measures
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.gather import gather_scores


@dataclass
class Evaluation:
    """The results of evaluating all prompts once."""

    measures: Measures
    """The value of every image."""
    overall: float
    """Mean of the tags' accuracies, as in GenEval; the mean reward where prompts have no tags."""
    tags: dict[str, float]
    """Strict accuracy of each GenEval tag."""
    scores: dict[str, float]
    """Mean of the total reward and of every named score."""
    diversity: float | None
    """Mean RMS pixel difference between two images of a prompt, as a share of the full range; None with one image."""
    images: int
    missing: int
    """Number of images without a score."""
    guard_standard_error: float | None
    """Standard error of the guard's mean; None without a guard."""
    shown: ShownImages
    gallery: GalleryImages | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        samples: Samples,
        processes: Processes,
        embed_images: Callable[[Tensor], Tensor] | None = None,
        gallery: int = 0,
    ) -> "Evaluation":
        """Bring together what the ranks have sampled. Collective; only the images that are shown leave their rank.

        Args:
            prompts: all prompts of the evaluation.
            samples: the images of this rank's prompts, `Processes.padded_rank_indices`.
            embed_images: as in `diversity`.
            gallery: largest number of images in `gallery`; 0 for none.
        """
        n = samples.images_per_prompt
        scores = gather_scores(processes, samples.scores, len(prompts), n)
        distances = diversity(samples.images.unflatten(0, (-1, n)), samples.latent_distances, embed_images)
        distances = processes.gather_rows(distances, len(prompts))
        pixel_diversity = None
        if "pixels" in distances:
            pixel_diversity = sum(distances["pixels"].tolist()) / len(prompts) / 255
            distances["pixels"] /= 255  # as a share of the full range
        measured = measures(prompts, n, scores, distances)
        means = {name: values.nanmean().item() for name, values in measured["Scores"].items()}
        tags = {tag: values.nanmean().item() for tag, values in measured.get(STRICT, {}).items()}
        return cls(
            measures=measured,
            overall=sum(tags.values()) / len(tags) if tags else means["reward"],
            tags=tags,
            scores=means,
            diversity=pixel_diversity,
            images=len(scores.values),
            missing=int(scores.values.isnan().sum()),
            guard_standard_error=Statistic.of(measured["Scores"][GUARD]).standard_error if GUARD in means else None,
            shown=gather_shown(prompts, samples, measured["Scores"].get("geneval/strict"), processes),
            gallery=gather_gallery(prompts, samples, gallery, processes),
        )

    def row(self) -> dict[str, Any]:
        """The figures as `metrics.jsonl` and `summary.json` hold them."""
        return {
            "overall": self.overall,
            **self.tags,
            "diversity": self.diversity,
            "images": self.images,
            "missing": self.missing,
            "scores": self.scores,
            **({} if self.guard_standard_error is None else {"guard_standard_error": self.guard_standard_error}),
        }
