"""GenEval's exact detector for images of the shapes world: it compares regions of one colour with drawn shapes."""

from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from fastflowgrpo.rewards.geneval import Detection
from fastflowgrpo.shapes.scenes import BACKGROUND, COLORS, SHAPES, Shape, render

MASK = 12  # side of the grid on which component masks are compared
MIN_AREA = 25  # pixels; the smallest drawn shape has 50
MAX_COLOR_DISTANCE = 110.0  # of a pixel to its nearest palette colour, in RGB units


def _labels(images: np.ndarray) -> np.ndarray:
    """Return the index of each pixel's nearest palette colour, 0 for the background or none: (N, H, W) int."""
    palette = np.array([BACKGROUND, *COLORS.values()], np.float32)
    pixels = images.astype(np.float32)
    distance = (pixels**2).sum(-1, keepdims=True) - 2 * pixels @ palette.T + (palette**2).sum(-1)
    nearest = distance.argmin(-1)
    nearest[distance.min(-1) > MAX_COLOR_DISTANCE**2] = 0
    return nearest


def _components(labels: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, tuple[int, int, int, int]]], np.ndarray]:
    """Find connected regions of one colour: the component image, [(image, colour, (y0, y1, x0, x1))], and areas."""
    within_image = np.zeros((3, 3, 3), int)
    within_image[1] = ndimage.generate_binary_structure(2, 1)
    components = np.zeros_like(labels)
    found: list[tuple[int, int, tuple[int, int, int, int]]] = []
    for color in range(1, len(COLORS) + 1):
        regions, count = ndimage.label(labels == color, structure=within_image)
        components[regions > 0] = regions[regions > 0] + len(found)
        found += [
            (image.start, color, (ys.start, ys.stop, xs.start, xs.stop))
            for image, ys, xs in ndimage.find_objects(regions, max_label=count)
        ]
    areas = np.bincount(components.ravel(), minlength=len(found) + 1)[1:]
    return components, found, areas


def _masks(components: np.ndarray, ids: np.ndarray, images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return each component's mask, with its box resampled to MASK x MASK: (n, MASK, MASK) bool."""
    step = (np.arange(MASK) + 0.5) / MASK
    y0, y1, x0, x1 = boxes.T[:, :, None]
    ys = (y0 + (y1 - y0) * step).astype(int)
    xs = (x0 + (x1 - x0) * step).astype(int)
    return components[images[:, None, None], ys[:, :, None], xs[:, None, :]] == ids[:, None, None]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Return masks of rendered shapes at several offsets: ((K, MASK * MASK) float, (K,) shape index)."""
    drawn = [
        (k, Shape(name, "red", 1, 1, dx, dy))
        for k, name in enumerate(SHAPES)
        for dx in (-0.5, 0.0, 0.5)
        for dy in (-0.5, 0.0, 0.5)
    ]
    components, found, _ = _components(_labels(render([[shape] for _, shape in drawn])))
    boxes = np.array([box for _, _, box in found])
    images = np.array([image for image, _, _ in found])
    masks = _masks(components, np.arange(1, len(found) + 1), images, boxes)
    return masks.reshape(len(found), -1).astype(np.float32), np.array([drawn[i][0] for i in images])


def detect_shapes(images: torch.Tensor, metadata: list[dict[str, Any]] | None = None) -> list[list[Detection]]:
    """Find the coloured shapes of each image.

    Args:
        images: uint8 (B, 3, H, W).
        metadata: not used; other detectors choose thresholds by it.

    Returns:
        The detections of each image; the score is the overlap (0 to 1) of the region's mask with the shape's.
    """
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    components, found, areas = _components(_labels(pixels))
    detections: list[list[Detection]] = [[] for _ in range(len(pixels))]
    kept = np.flatnonzero(areas >= MIN_AREA)
    if not len(kept):
        return detections
    boxes = np.array([found[k][2] for k in kept])
    owners = np.array([found[k][0] for k in kept])
    masks = _masks(components, kept + 1, owners, boxes).reshape(len(kept), -1).astype(np.float32)
    templates, classes = _templates()
    both = masks @ templates.T
    overlap = both / (masks.sum(1, keepdims=True) + templates.sum(1) - both)
    best = overlap.argmax(1)
    names = list(COLORS)
    for row, k in enumerate(kept):
        image, color, (y0, y1, x0, x1) = found[k]
        detections[image].append(
            Detection(
                label=SHAPES[classes[best[row]]],
                box=(float(x0), float(y0), float(x1), float(y1)),
                score=float(overlap[row, best[row]]),
                color=names[color - 1],
            )
        )
    return detections


class ShapesDetector:
    """`detect_shapes` as a detector of the GenEval reward, with the names that it can find."""

    classes, colors = SHAPES, tuple(COLORS)

    def __call__(self, images: torch.Tensor, metadata: list[dict[str, Any]]) -> list[list[Detection]]:
        return detect_shapes(images, metadata)
