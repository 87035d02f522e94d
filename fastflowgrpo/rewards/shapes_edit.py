"""An exact check of edits in the bundled world: was the instruction followed, and did all else stay as it was?"""

from collections.abc import Sequence

import torch

from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards.geneval import Detection
from fastflowgrpo.rewards.shapes_detector import detect_shapes
from fastflowgrpo.scoring.contract import RewardBatch, Scores
from fastflowgrpo.shapes.edits import WORDINGS
from fastflowgrpo.shapes.scenes import CELL, COLORS, GRID, SHAPES

Cells = dict[tuple[int, int], list[tuple[str, str]]]
"""The shapes and colours of the objects in each cell (column, row) that has any."""
KNOWN = {"tag": tuple(WORDINGS), "class": SHAPES, "color": tuple(COLORS)}


def cells(detections: Sequence[Detection]) -> Cells:
    """Return what was detected in each cell of the grid, by the centres of the boxes."""
    found: Cells = {}
    for detection in detections:
        x0, y0, x1, y1 = detection.box
        cell = int((x0 + x1) / 2 // CELL), int((y0 + y1) / 2 // CELL)
        found.setdefault(cell, []).append((detection.label, str(detection.color)))
    return {cell: sorted(objects) for cell, objects in found.items()}


def check_edit(metadata: dict[str, str], source: Cells, result: Cells) -> tuple[float, float]:
    """Compare a result with its source.

    Args:
        metadata: {"tag": "recolor", "add" or "remove", "class": a shape, "color": a colour}, as in `shapes.edits.Edit`.
        source, result: the objects of both images.

    Returns:
        Whether the object was recoloured, added or removed, 1 or 0; and the share that is unchanged of the other cells
        that have an object in the source or the result.
    """
    action, wanted = metadata["tag"], (metadata["class"], metadata["color"])
    grid = [(column, row) for column in range(GRID) for row in range(GRID)]
    if action == "add":
        # The object may be in any empty cell. Where several cells have it, all but one are changes.
        targets = [cell for cell in grid if cell not in source and result.get(cell) == [wanted]][:1]
        done = bool(targets)
    else:
        targets = [
            cell
            for cell, objects in source.items()
            if any(shape == wanted[0] and (action == "recolor" or color == wanted[1]) for shape, color in objects)
        ]
        done = bool(targets) and all(
            result.get(cell) == ([wanted] if action == "recolor" else None) for cell in targets
        )
    others = (source.keys() | result.keys()) - set(targets)
    same = sum(source.get(cell) == result.get(cell) for cell in others)
    return float(done), same / len(others) if others else 1.0


class ShapesEdit:
    """The edit times what was kept, by `check_edit`: 1 for exactly the edit that was asked for, 0 without it.

    The details are `done`, `kept`, and `strict`, which is 1 if both are 1.

    Raises:
        UserError: when called with images that have no sources.
    """

    pointwise = True

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a ValueError that names the prompt if one has not the metadata of an edit."""
        for prompt in prompts:
            for key, names in KNOWN.items():
                if prompt.metadata.get(key) not in names:
                    raise ValueError(
                        f"prompt {prompt.text!r}: {key} is {prompt.metadata.get(key)!r}, expected one of "
                        f"{', '.join(names)}: use prompts.train shapes_edit"
                    )

    def detect(self, batch: RewardBatch) -> list[list[Detection]]:
        """The detections of each image."""
        return detect_shapes(batch.images)

    def __call__(self, batch: RewardBatch) -> Scores:
        if batch.sources is None:
            raise UserError("there are no source images: it scores edits only")
        results, sources = (
            [cells(found) for found in detect_shapes(images)] for images in (batch.images, torch.stack(batch.sources))
        )
        pairs = [check_edit(*each) for each in zip(batch.metadata, sources, results, strict=True)]
        done, kept = torch.tensor(pairs).reshape(-1, 2).T
        score = done * kept
        return Scores(score, {"done": done, "kept": kept, "strict": (score == 1).float()})
