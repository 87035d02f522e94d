"""The shapes world: prompts with GenEval metadata, scenes that fulfil them, and their images.

A scene puts up to nine coloured shapes on a 3 x 3 grid of 16-pixel cells. Prompts come in GenEval's six tags.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflowgrpo.prompts import RELATIONS, TAGS, Prompt
from fastflowgrpo.prompts.geneval import meaning

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COLORS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 214), "yellow": (240, 196, 25)}
BACKGROUND = (240, 240, 240)
NUMBERS = {2: "two", 3: "three", 4: "four"}
WORDINGS = ("a photo of", "a picture of", "a drawing of", "an image of")
EVAL_WORDING = "a photo of"
GRID, CELL = 3, 16
SIZE = GRID * CELL
RADIUS = 5.8


def _prompts_of(tag: str) -> list[tuple[str, dict[str, Any]]]:
    """Return all contents, (description, metadata), of one tag."""
    pairs = list(itertools.permutations(SHAPES, 2))

    def one(shape: str, **more: Any) -> dict[str, Any]:
        return {"class": shape, "count": 1, **more}

    if tag == "single_object":
        return [(f"a {shape}", {"include": [one(shape)]}) for shape in SHAPES]
    if tag == "two_object":
        return [(f"a {a} and a {b}", {"include": [one(a), one(b)]}) for a, b in pairs]
    if tag == "counting":
        return [
            (
                f"{word} {PLURALS[shape]}",
                {"include": [{"class": shape, "count": n}], "exclude": [{"class": shape, "count": n + 1}]},
            )
            for shape in SHAPES
            for n, word in NUMBERS.items()
        ]
    if tag == "colors":
        return [(f"a {color} {shape}", {"include": [one(shape, color=color)]}) for shape in SHAPES for color in COLORS]
    if tag == "position":
        return [
            (f"a {a} {relation} a {b}", {"include": [one(b), one(a, position=[relation, 0])]})
            for a, b in pairs
            for relation in RELATIONS
        ]
    return [
        (f"a {ca} {a} and a {cb} {b}", {"include": [one(a, color=ca), one(b, color=cb)]})
        for a, b in pairs
        for ca, cb in itertools.permutations(COLORS, 2)
    ]


def _split(tag: str) -> tuple[list[tuple[str, dict[str, Any]]], list[tuple[str, dict[str, Any]]]]:
    """Return the (training, held-out) contents of one tag.

    Every fifth content is held out, which spreads them over shapes, numbers and so on. Training also leaves out the
    contents with the same meaning. All four single objects are held out: the paper's prompt mix does not train on that
    tag.
    """
    contents = _prompts_of(tag)
    if tag == "single_object":
        return [], contents
    held_out = contents[::5]
    meanings = [meaning(metadata) for _, metadata in held_out]
    return [content for content in contents if meaning(content[1]) not in meanings], held_out


def _prompt(wording: str, tag: str, content: tuple[str, dict[str, Any]]) -> Prompt:
    text = f"{wording} {content[0]}"
    return Prompt(text, {"tag": tag, **content[1], "prompt": text})


def train_prompts() -> list[Prompt]:
    """Return the prompts for online RL: the contents that are not held out, in every wording."""
    return [_prompt(w, tag, content) for tag in TAGS for content in _split(tag)[0] for w in WORDINGS]


def eval_prompts(per_tag: int = 36) -> list[Prompt]:
    """Return held-out prompts, `per_tag` of each tag; contents repeat where a tag has fewer.

    No prompt of `train_prompts` has the same meaning, and `caption_prompts` does not contain these sentences.
    """
    return [
        _prompt(EVAL_WORDING, tag, content)
        for tag in TAGS
        for content in itertools.islice(itertools.cycle(_split(tag)[1]), per_tag)
    ]


def caption_prompts() -> dict[str, list[Prompt]]:
    """Return the captions for pretraining by tag: every content in every wording, except the held-out sentences."""
    held_out = {prompt.text for prompt in eval_prompts(per_tag=1000)}
    captions = {tag: [_prompt(w, tag, c) for c in _prompts_of(tag) for w in WORDINGS] for tag in TAGS}
    return {tag: [p for p in prompts if p.text not in held_out] for tag, prompts in captions.items()}


@dataclass(frozen=True)
class Shape:
    """One object: `column` and `row` of its cell, and the offset of its centre from the cell's centre, in pixels."""

    shape: str
    color: str
    column: int
    row: int
    dx: float = 0.0
    dy: float = 0.0


def _opposite(a: tuple[int, int], relation: str, b: tuple[int, int]) -> bool:
    """Return whether cells a and b have this relation and lie at opposite sides of the grid, so that it is clear."""
    axis, side = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return a[axis] - b[axis] == side * (GRID - 1)


def sample_scene(metadata: dict[str, Any], rng: np.random.Generator) -> list[Shape]:
    """Draw a scene that fulfils a prompt's metadata: cells, unspecified colours and offsets of up to a pixel."""
    wanted = [include for include in metadata["include"] for _ in range(include["count"])]
    while True:
        cells = [(int(c) % GRID, int(c) // GRID) for c in rng.permutation(GRID * GRID)[: len(wanted)]]
        relations = [(i, *include["position"]) for i, include in enumerate(wanted) if "position" in include]
        if all(_opposite(cells[i], relation, cells[j]) for i, relation, j in relations):
            break
    return [
        Shape(
            include["class"],
            include.get("color") or str(rng.choice(list(COLORS))),
            *cell,
            dx=rng.uniform(-1, 1),
            dy=rng.uniform(-1, 1),
        )
        for include, cell in zip(wanted, cells, strict=True)
    ]


def render(scenes: list[list[Shape]], supersampling: int = 4) -> np.ndarray:
    """Render scenes, anti-aliased.

    Args:
        scenes: N scenes.
        supersampling: samples per pixel along each axis.

    Returns:
        uint8 array (N, 48, 48, 3).
    """
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    images[:] = BACKGROUND
    placed = [(i, shape) for i, scene in enumerate(scenes) for shape in scene]
    if not placed:
        return images
    axis = (np.arange(CELL * supersampling) + 0.5) / supersampling - CELL / 2
    x0, y0 = np.meshgrid(axis, axis)
    dx, dy = (np.array([getattr(shape, name) for _, shape in placed])[:, None, None] for name in ("dx", "dy"))
    x, y = (x0 - dx) / RADIUS, (y0 - dy) / RADIUS
    inside = {
        "circle": lambda x, y: x * x + y * y <= 1,
        "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.9,
        "triangle": lambda x, y: (y <= 0.85) & (2 * abs(x) <= y + 1),
        "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1),
    }
    coverage = np.empty((len(placed), CELL, CELL, 1))
    for name in SHAPES:
        rows = [k for k, (_, shape) in enumerate(placed) if shape.shape == name]
        mask = inside[name](x[rows], y[rows]).reshape(-1, CELL, supersampling, CELL, supersampling)
        coverage[rows] = mask.mean(axis=(2, 4))[..., None]
    colors = np.array([COLORS[shape.color] for _, shape in placed])[:, None, None, :]
    cells = np.rint(BACKGROUND + coverage * (colors - np.array(BACKGROUND))).astype(np.uint8)
    for (i, shape), cell in zip(placed, cells, strict=True):
        images[i, shape.row * CELL : (shape.row + 1) * CELL, shape.column * CELL : (shape.column + 1) * CELL] = cell
    return images
