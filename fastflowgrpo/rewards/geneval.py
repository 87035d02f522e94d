"""GenEval (arXiv 2310.11513): are the objects that the prompt asks for there, in number, colour and position?"""

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

MAX_OBJECTS = 16  # per class, those with the highest scores
POSITION_THRESHOLD = 0.1  # of the summed box sizes


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        label: its class.
        box: (x0, y0, x1, y1) in pixels, y downwards.
        score: the detector's confidence.
        color: its colour's name, None if it was not classified.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None


Detector = Callable[[torch.Tensor, list[dict[str, Any]]], list[list[Detection]]]


@dataclass(frozen=True)
class GenEvalResult:
    """One image's result: `score` in [0, 1] with credit for what is partly right, whether the image is `strict`ly
    right (exact counts), and whether it is `correct` by the official benchmark."""

    score: float
    strict: bool
    correct: bool


def relations(a: Detection, b: Detection) -> set[str]:
    """Where a is relative to b: a subset of "left of", "right of", "above", "below".

    The offset of the centres is shortened on each axis by POSITION_THRESHOLD of the two boxes' summed sizes; an axis on
    which more than half of the centres' distance then remains is a relation (so a diagonal can be two).
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
    """Compare one image's detections with its prompt's GenEval metadata (see `prompts.check_metadata`).

    - `score`, for training (Flow-GRPO, arXiv 2505.05470): the mean of the terms of all includes. An include has a term
      for its count n of the wanted w, max(0, 1 - |n - w| / w); if it names a colour, a term for it, the part of the w
      objects that have it; if it names a position, a term for it, 1 or 0. With a wrong count the latter two are 0.
    - `strict`: every include has exactly its count of objects, all in its colour and position. Excludes need no
      check, here and in Flow-GRPO: they forbid more of an included class than the exact count.
    - `correct`, the benchmark's own check: of each include at least its count of objects exists, and the ones with the
      highest scores have its colour and position; and no exclude's count is reached.

    A position holds if each of the include's objects has the relation to each object of the include it names, and that
    include holds itself. Of a class, the MAX_OBJECTS objects with the highest scores count.

    Deliberate differences from Flow-GRPO's code, all in `score`: its count term can go below 0; a wrong position adds 0
    and then also 1; and an include with both a colour and a position (no GenEval prompt has one) loses a term if the
    count or the colour is wrong. The benchmark's `correct` and Flow-GRPO's `strict` are theirs exactly.
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
    """The terms of all includes, given the objects found for each; all are 1 if and only if all holds exactly."""
    terms: list[float] = []
    holding: list[list[Detection]] = []  # the objects of each include that holds, else none
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
    """GenEval as a reward: (1 - strict) * score + strict * (1 if strictly right else 0), see `check`. The details are
    score, strict and correct.

    Args:
        detector: "shapes" for the bundled shapes world, "mask2former" for real images, or a function (images uint8
            (B, 3, H, W), metadata of each) -> detections of each, which may have the attributes `classes` and `colors`,
            the names it knows, and `device`, where it wants the images.
        strict: weight of the strict result against the partial score, 0 to 1.
        settings: the detector's own, see `Mask2FormerDetector`.

    Raises:
        ValueError: an unknown detector or setting, strict out of range, or the detector cannot be loaded.
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
        """Raise ValueError, naming the prompt, if one has no valid metadata, or a class or colour that the detector
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

    def __call__(self, batch: RewardBatch) -> Scores:
        detections = self.detector(batch.images, batch.metadata)
        results = [check(metadata, found) for metadata, found in zip(batch.metadata, detections, strict=True)]
        score, strict, correct = torch.tensor([(r.score, r.strict, r.correct) for r in results]).reshape(-1, 3).T
        values = (1 - self.strict) * score + self.strict * strict
        return Scores(values, {"score": score, "strict": strict, "correct": correct})
