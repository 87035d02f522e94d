"""Editing tasks of the shapes world: recolour an object, add one, or remove one, and leave the rest as it is."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.shapes.scenes import COLORS, GRID, SHAPES, Shape, render

WORDINGS = {
    "recolor": tuple(f"{verb} the {{shape}} {{color}}" for verb in ("make", "turn", "paint", "color")),
    "add": tuple(f"{verb} a {{color}} {{shape}}" for verb in ("add", "draw", "insert", "put")),
    "remove": tuple(f"{verb} the {{color}} {{shape}}" for verb in ("remove", "erase", "delete", "drop")),
}
"""The wordings of each action; the first one is that of the evaluation."""
CONTENTS = tuple(itertools.product(SHAPES, COLORS))
HELD_OUT = CONTENTS[:: len(COLORS) + 1]  # each shape once, each colour once
SOURCES = 4  # source images of a training instruction
MAX_OBJECTS = 4  # of a source image
# Of the sources; training and evaluation never draw the same stream.
TRAIN_SEED, EVAL_SEED = 1, 2


@dataclass(frozen=True)
class Edit:
    """What is to be done to a scene.

    Attributes:
        action: "recolor", "add" or "remove".
        shape: of the object; recolor takes the only object of this shape.
        color: of the object after recolor or add, and before remove.
    """

    action: str
    shape: str
    color: str

    def text(self, wording: str) -> str:
        """Return the instruction in a wording of WORDINGS."""
        return wording.format(shape=self.shape, color=self.color)

    def __call__(self, scene: list[Shape], rng: np.random.Generator) -> list[Shape]:
        """Return the edited scene; an added object gets a random empty cell."""
        if self.action == "recolor":
            return [replace(s, color=self.color) if s.shape == self.shape else s for s in scene]
        if self.action == "remove":
            return [s for s in scene if (s.shape, s.color) != (self.shape, self.color)]
        return [*scene, _placed(rng, [(self.shape, self.color)], scene)[0]]


def sample_source(edit: Edit, rng: np.random.Generator) -> list[Shape]:
    """Draw a scene of 2 to MAX_OBJECTS objects, 3 at most for "add", in which the instruction has one meaning."""
    target, others = [(edit.shape, edit.color)], list(CONTENTS)
    if edit.action == "recolor":
        target = [(edit.shape, str(rng.choice([color for color in COLORS if color != edit.color])))]
        others = [content for content in CONTENTS if content[0] != edit.shape]
    elif edit.action == "remove":
        others = [content for content in CONTENTS if content != target[0]]
    else:
        target = []
    count = rng.integers(2, MAX_OBJECTS + (edit.action != "add")) - len(target)
    return _placed(rng, [*target, *(others[rng.integers(len(others))] for _ in range(count))], [])


def wrong_edit(edit: Edit, scene: list[Shape], rng: np.random.Generator) -> Edit:
    """Draw another edit by the same action, which changes the scene."""
    while True:
        other = Edit(edit.action, *CONTENTS[rng.integers(len(CONTENTS))])
        if other != edit and other(scene, rng) != scene:
            return other


def train_prompts() -> list[Prompt]:
    """Return the prompts for online RL: contents that are not held out, in every wording, on SOURCES images each."""
    edits = [
        (Edit(action, *content), wording)
        for action, wordings in WORDINGS.items()
        for content in CONTENTS
        if content not in HELD_OUT
        for wording in wordings
        for _ in range(SOURCES)
    ]
    return _prompts(edits, TRAIN_SEED)


def eval_prompts(per_action: int = 36) -> list[Prompt]:
    """Return held-out instructions, `per_action` of each action, each on an image of its own."""
    edits = [
        (Edit(action, *content), wordings[0])
        for action, wordings in WORDINGS.items()
        for content in itertools.islice(itertools.cycle(HELD_OUT), per_action)
    ]
    return _prompts(edits, EVAL_SEED)


def pretraining_edits(count: int, wrong: float, seed: int) -> Iterator[tuple[str, list[Shape], list[Shape]]]:
    """Yield instructions with their scenes before and after; all contents, but no sentence of `eval_prompts`.

    Args:
        count: how many.
        wrong: share of the instructions whose scene is edited by another edit of the same action.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    known = [
        (Edit(action, *content), wording)
        for action, wordings in WORDINGS.items()
        for content in CONTENTS
        for wording in wordings[content in HELD_OUT :]
    ]
    for _ in range(count):
        edit, wording = known[rng.integers(len(known))]
        scene = sample_source(edit, rng)
        done = wrong_edit(edit, scene, rng) if rng.random() < wrong else edit
        yield edit.text(wording), scene, done(scene, rng)


def _prompts(edits: list[tuple[Edit, str]], seed: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    images = render([sample_source(edit, rng) for edit, _ in edits])
    prompts = []
    for (edit, wording), pixels in zip(edits, images, strict=True):
        file, text = io.BytesIO(), edit.text(wording)
        Image.fromarray(pixels).save(file, "png")
        metadata = {"tag": edit.action, "class": edit.shape, "color": edit.color, "prompt": text}
        prompts.append(Prompt(text, metadata, file.getvalue()))
    return prompts


def _placed(rng: np.random.Generator, contents: list[tuple[str, str]], scene: list[Shape]) -> list[Shape]:
    """Put objects into random cells that a scene leaves empty, with offsets of up to a pixel."""
    taken = {(s.column, s.row) for s in scene}
    cells = [cell for cell in itertools.product(range(GRID), repeat=2) if cell not in taken]
    chosen = rng.permutation(len(cells))[: len(contents)]
    placed = []
    for (shape, color), i in zip(contents, chosen, strict=True):
        column, row = cells[i]
        placed.append(Shape(shape, color, column, row, dx=rng.uniform(-1, 1), dy=rng.uniform(-1, 1)))
    return placed
