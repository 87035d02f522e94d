"""GenEval's detector for real images: Mask2Former finds the objects, CLIP classifies their colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fastflowgrpo.prompts.geneval import CLASSES, COLORS
from fastflowgrpo.rewards.clip import CLIP, CLIP_L
from fastflowgrpo.rewards.geneval import MAX_OBJECTS, Detection
from fastflowgrpo.rewards.models import choose_dtype, pretrained_model

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # least score; the second for prompts with the tag `counting`
MAX_INSTANCES = 100  # per image, over all classes
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
BACKGROUND = 0x99  # the grey around an object whose colour is classified
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Instance:
    """One object: its class, the detector's score, its mask bool (H, W), and its box as in `Detection`."""

    label: str
    score: float
    mask: torch.Tensor
    box: tuple[int, int, int, int]


class Mask2FormerDetector:
    """Mask2Former (arXiv 2112.01527) and CLIP, used as in GenEval (arXiv 2310.11513).

    Objects: images are resized to a shorter side of 800 pixels. The score of a query is the probability of its class
    times the mean probability of its mask. Objects with a score above THRESHOLD (COUNTING_THRESHOLD for prompts with
    the tag `counting`) are kept, at most the MAX_OBJECTS best of each class.

    Colours are classified only for classes whose colour the prompt asks for. The object is put on grey and cropped to
    its box. Its CLIP embedding is compared with the mean embedding of TEMPLATES for each of COLORS.

    GenEval's own code does the same on image files, with mmdetection instead of transformers. Flow-GRPO's server runs
    that code on RGB arrays, which mmdetection takes for BGR.

    Args:
        model: hub id or local folder of a Mask2Former for COCO instances.
        clip: hub id or local folder of the CLIP for colours.
        device: by default the GPU if there is one.
        dtype: of the networks.
        batch_size: images per forward pass.
        size: images are resized to this shorter side, or to this longer side if it would become longer; in pixels.

    Raises:
        ValueError: a model cannot be loaded, or a setting is wrong.
    """

    classes = CLASSES
    colors = COLORS

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = CLIP_L,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 8,
        size: Sequence[int] = (800, 1333),
    ) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(size) != 2 or not 32 <= size[0] <= size[1]:
            raise ValueError(f"size must be the shorter and the longer side, at least 32, got {size}")
        self.batch_size, self.size = batch_size, size
        self.clip = CLIP(clip, device, dtype)
        self.device, self.dtype = self.clip.device, choose_dtype(dtype)
        self.network = pretrained_model(Mask2FormerForUniversalSegmentation, model, self.device, self.dtype)
        if self.network.config.num_labels != len(CLASSES):
            found = self.network.config.num_labels
            raise ValueError(f"{model!r} has {found} classes, not the {len(CLASSES)} of COCO instances")
        self._color_embeddings: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, metadata: list[dict[str, Any]]) -> list[list[Detection]]:
        """Find the objects on images uint8 (B, 3, H, W); `metadata` is the GenEval metadata of each image's prompt."""
        detections: list[list[Detection]] = []
        for start in range(0, len(images), self.batch_size):
            batch, wanted = images[start : start + self.batch_size].to(self.device), metadata[start:][: self.batch_size]
            thresholds = [COUNTING_THRESHOLD if data["tag"] == "counting" else THRESHOLD for data in wanted]
            found = self._segment(batch, thresholds)
            colored = [{include["class"] for include in data["include"] if "color" in include} for data in wanted]
            crops = [
                (o.label, _cut_out(image, o))
                for image, objects, labels in zip(batch, found, colored, strict=True)
                for o in objects
                if o.label in labels
            ]
            colors = iter(self._classify(crops))
            detections += [
                [Detection(o.label, o.box, o.score, next(colors) if o.label in labels else None) for o in objects]
                for objects, labels in zip(found, colored, strict=True)
            ]
        return detections

    def _segment(self, images: torch.Tensor, thresholds: list[float]) -> list[list[Instance]]:
        """Find the objects on each image, sorted by score."""
        height, width = images.shape[-2:]
        scale = min(self.size[0] / min(height, width), self.size[1] / max(height, width))
        resized = int(height * scale + 0.5), int(width * scale + 0.5)
        padded = [32 * math.ceil(side / 32) for side in resized]
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, STD))
        # Without antialiasing, as the network was trained and evaluated.
        pixels = (F.interpolate(images.float(), resized, mode="bilinear") - mean) / std
        pixels = F.pad(pixels, (0, padded[1] - resized[1], 0, padded[0] - resized[0]))
        output = self.network(pixel_values=pixels.to(self.dtype))
        found: list[list[Instance]] = []
        for logits, masks, threshold in zip(
            output.class_queries_logits, output.masks_queries_logits, thresholds, strict=True
        ):
            probabilities = logits.float().softmax(-1)[:, :-1].flatten()  # the last class is "no object"
            scores, indices = probabilities.topk(min(MAX_INSTANCES, len(probabilities)))
            likely = scores > threshold  # the mask can only lower the score
            scores, queries, labels = scores[likely], indices[likely] // len(CLASSES), indices[likely] % len(CLASSES)
            if len(scores) == 0:
                found.append([])
                continue
            fine = F.interpolate(masks[None, queries].float(), padded, mode="bilinear")[..., : resized[0], : resized[1]]
            fine = F.interpolate(fine, (height, width), mode="bilinear")[0]
            inside = fine > 0
            scores = scores * (fine.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
            found.append(_best(scores.tolist(), labels.tolist(), inside, threshold))
        return found

    def _classify(self, crops: list[tuple[str, torch.Tensor]]) -> list[str]:
        """Classify the colours of objects: (label, uint8 image (3, h, w)) each."""
        if not crops:
            return []
        for label in {label for label, _ in crops} - self._color_embeddings.keys():
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            embeddings = self.clip.embed_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._color_embeddings[label] = F.normalize(embeddings.mean(1), dim=-1)
        classifiers = torch.stack([self._color_embeddings[label] for label, _ in crops])
        embeddings = self.clip.embed_images([crop for _, crop in crops])
        return [COLORS[i] for i in (classifiers @ embeddings[:, :, None]).squeeze(-1).argmax(-1).tolist()]


def _best(scores: list[float], labels: list[int], masks: torch.Tensor, threshold: float) -> list[Instance]:
    """Keep the objects above the threshold, sorted by score, at most MAX_OBJECTS of each class."""
    columns, rows = masks.any(1).int(), masks.any(2).int()
    last_column, last_row = (line.shape[1] - line.flip(1).argmax(1) for line in (columns, rows))
    boxes = torch.stack([columns.argmax(1), rows.argmax(1), last_column, last_row], 1).tolist()
    kept: list[Instance] = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        label = CLASSES[labels[i]]
        if scores[i] > threshold and sum(o.label == label for o in kept) < MAX_OBJECTS:
            kept.append(Instance(label, scores[i], masks[i], tuple(boxes[i])))
    return kept


def _cut_out(image: torch.Tensor, o: Instance) -> torch.Tensor:
    """Put the object on grey and crop the image to its box."""
    x0, y0, x1, y1 = o.box
    return image.where(o.mask, BACKGROUND)[:, y0:y1, x0:x1]
