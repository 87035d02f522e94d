"""GenEval (arXiv 2310.11513): are the objects of the prompt in the image, in the right number, colour and position?"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt, check_metadata
from fastflowgrpo.scoring.contract import RewardBatch, Scores

MAX_OBJECTS = 16  # objects per class that count: those with the highest scores
POSITION_THRESHOLD = 0.1  # part of the summed box sizes that an offset must exceed


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        label: its class.
        box: (x0, y0, x1, y1) in pixels, y downwards.
        score: the detector's confidence.
        color: the name of its colour, None if it was not classified.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None


Detector = Callable[[torch.Tensor, list[dict[str, Any]]], list[list[Detection]]]


@dataclass(frozen=True)
class GenEvalResult:
    """The result of one image.

    Attributes:
        score: from 0 to 1, with credit for what is partly right.
        strict: whether everything is right, with exact counts.
        correct: whether the image is correct by the official benchmark.
    """

    score: float
    strict: bool
    correct: bool


def relations(a: Detection, b: Detection) -> set[str]:
    """Where a is relative to b: a subset of "left of", "right of", "above" and "below".

    On each axis, the offset of the two centres is reduced by POSITION_THRESHOLD times the summed sizes of the boxes.
    The relation on this axis holds if the rest is more than half the distance of the centres. On a diagonal, two hold.
    """
    ax0, ay0, ax1, ay1 = a.box
    bx0, by0, bx1, by1 = b.box
    offset = ((ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2)
    sizes = (abs(ax1 - ax0) + abs(bx1 - bx0), abs(ay1 - ay0) + abs(by1 - by0))
    x, y = (math.copysign(max(abs(o) - POSITION_THRESHOLD * size, 0), o) for o, size in zip(offset, sizes, strict=True))
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    half = 0.5 * math.hypot(*offset)
    holds = {"left of": x < -half, "right of": x > half, "above": y < -half, "below": y > half}
    return {relation for relation, true in holds.items() if true}


def check(metadata: dict[str, Any], detections: Sequence[Detection]) -> GenEvalResult:
    """Compare the detections of one image with its prompt's GenEval metadata (see `prompts.check_metadata`).

    - `score`, for training (Flow-GRPO, arXiv 2505.05470): the mean of the terms of all includes. Each include has a
      term for its count: max(0, 1 - |n - w| / w), where n objects were found and w are wanted. If the include has a
      colour, it has a second term: the part of the w objects with this colour. If it has a position, it has another
      term, 1 or 0. The terms for colour and position are 0 if the count is wrong.
    - `strict`: for every include, exactly the wanted number of objects was found, all with its colour and position.
      Excludes are not checked, as in Flow-GRPO: they forbid more objects of an included class than the exact count.
    - `correct`, the benchmark's own check: for every include at least the wanted number of objects was found, and those
      with the highest scores have its colour and position; and no exclude's count is reached.

    A position holds if each object of the include has the relation to each object of the include that it names, and if
    that other include holds. Of each class, only the MAX_OBJECTS objects with the highest scores count.

    `score` deliberately differs from Flow-GRPO's code: there the count term can go below 0; a wrong position adds 0 and
    then also 1; and an include with both a colour and a position (no GenEval prompt has one) loses a term if the count
    or the colour is wrong. `correct` and `strict` are exactly those of the benchmark and of Flow-GRPO.
    """
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        objects.setdefault(detection.label, []).append(detection)
    includes = metadata["include"]
    found = [objects.get(include["class"], [])[:MAX_OBJECTS] for include in includes]
    best = [candidates[: include["count"]] for include, candidates in zip(includes, found, strict=True)]
    excluded = any(
        len(objects.get(exclude["class"], [])[:MAX_OBJECTS]) >= exclude["count"]
        for exclude in metadata.get("exclude", [])
    )
    terms = _terms(includes, found)
    return GenEvalResult(
        score=sum(terms) / len(terms),
        strict=all(term == 1 for term in terms),
        correct=all(term == 1 for term in _terms(includes, best)) and not excluded,
    )


def _terms(includes: list[dict[str, Any]], found: list[list[Detection]]) -> list[float]:
    """Compute the terms of all includes from the objects found for each; a term is 1 only if it holds exactly."""
    terms: list[float] = []
    holding: list[list[Detection]] = []  # the objects of each include, none if the include does not hold
    for include, objects in zip(includes, found, strict=True):
        count = include["count"]
        exact = len(objects) == count
        own = [max(0.0, 1 - abs(len(objects) - count) / count)]
        if "color" in include:
            own.append(sum(o.color == include["color"] for o in objects) / count if exact else 0.0)
        if "position" in include:
            relation, index = include["position"]
            targets = holding[index]
            placed = all(relation in relations(o, target) for o in objects for target in targets)
            own.append(float(all(term == 1 for term in own) and bool(targets) and placed))
        holding.append(objects if all(term == 1 for term in own) else [])
        terms += own
    return terms


DETECTORS = {
    "shapes": "fastflowgrpo.rewards.shapes_detector:ShapesDetector",
    "mask2former": "fastflowgrpo.rewards.mask2former:Mask2FormerDetector",
}


class GenEval:
    """GenEval as a reward: (1 - strict) * `score` + strict * `strict`, with the results of `check`. The details are
    `score`, `strict` and `correct`.

    Args:
        detector: "shapes" for the bundled shapes world, "mask2former" for real images, or your own function: it is
            called with images uint8 (B, 3, H, W) and the metadata of each, and returns the detections of each. It may
            have the attributes `classes` and `colors` (the names it knows), and `device` (where it wants the images).
        strict: weight of the strict result against the partial score, 0 to 1.
        settings: for the detector, see `Mask2FormerDetector`.

    Raises:
        ValueError: the detector or a setting is unknown, strict is out of range, or the detector cannot be loaded.
    """

    pointwise = True

    def __init__(self, detector: str | Detector = "shapes", strict: float = 0.0, **settings: Any) -> None:
        if isinstance(strict, bool) or not isinstance(strict, int | float) or not 0 <= strict <= 1:
            raise ValueError(f"strict must be a number from 0 to 1, got {strict!r}")
        self.strict = strict
        load: Callable[..., Detector]
        if isinstance(detector, str) and detector in DETECTORS:
            module, _, name = DETECTORS[detector].partition(":")
            load = getattr(importlib.import_module(module), name)
        elif callable(detector):
            load = functools.partial(lambda given: given, detector)
        else:
            known = ", ".join(DETECTORS)
            raise ValueError(f"unknown detector {detector!r}{did_you_mean(str(detector), DETECTORS)}, known: {known}")
        accepted = ["weight", "detector", "strict", *inspect.signature(load).parameters]
        for key in settings:
            if key not in accepted:
                hint = did_you_mean(key, accepted)
                raise ValueError(f"unknown setting {key!r}{hint}, known: {', '.join(accepted)}")
        self.detector = load(**settings)
        self.device = getattr(self.detector, "device", None)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a ValueError that names the prompt if one has no valid metadata, or a class or colour that the detector
        does not know."""
        known = {
            "class": getattr(self.detector, "classes", None),
            "color": getattr(self.detector, "colors", None),
        }
        for prompt in prompts:
            if not prompt.metadata:
                raise ValueError(f"prompt {prompt.text!r} has no GenEval metadata: read prompts from a GenEval .jsonl")
            try:
                check_metadata(prompt.metadata)
            except ValueError as error:
                raise ValueError(f"prompt {prompt.text!r}: {error}") from None
            for clause in prompt.metadata["include"]:
                for key, names in known.items():
                    if names is not None and key in clause and clause[key] not in names:
                        names = ", ".join(names)
                        raise ValueError(f"prompt {prompt.text!r}: the detector knows {names}, not {clause[key]!r}")

    def detect(self, batch: RewardBatch) -> list[list[Detection]]:
        """The detections of each image."""
        return self.detector(batch.images, batch.metadata)

    def __call__(self, batch: RewardBatch) -> Scores:
        detections = self.detect(batch)
        results = [check(metadata, found) for metadata, found in zip(batch.metadata, detections, strict=True)]
        score, strict, correct = torch.tensor([(r.score, r.strict, r.correct) for r in results]).reshape(-1, 3).T
        values = (1 - self.strict) * score + self.strict * strict
        return Scores(values, {"score": score, "strict": strict, "correct": correct})
