"""Grids of images."""

import pytest
import torch

from fastflowgrpo.evaluation.pictures import FRAME, GAP, image_grid
from fastflowgrpo.evaluation.shown import ShownImages


@pytest.mark.parametrize("edits", [False, True])
def test_a_row_of_a_grid_starts_with_the_source_of_an_edit(edits):
    """Two prompts with two images each, of two evaluations: sources are red, results green by prompt and number."""
    images = torch.zeros(2, 2, 3, 96, 96, dtype=torch.uint8)
    images[:, :, 1] = torch.tensor([[10, 20], [30, 40]])[:, :, None, None]
    sources = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    sources[:, 0] = torch.tensor([100, 200])[:, None, None]
    shown = ShownImages(["a", "b"], images, None, [*sources] if edits else [])
    grid = image_grid([shown, shown], ["base", "trained"])
    cell = 96 + 2 * FRAME
    from_right = [GAP + cell // 2 + i * cell for i in range(2)]
    columns = [grid.width - x for x in (*from_right, *(x + 2 * cell + GAP for x in from_right))]  # trained, base
    for row, expected in enumerate([(10, 20), (30, 40)]):
        y = grid.height - (2 - row) * cell + cell // 2
        assert [grid.getpixel((x, y)) for x in reversed(columns)] == 2 * [(0, green, 0) for green in expected]
        left = grid.getpixel((columns[-1] - cell // 2 - GAP - 48, y))
        assert (left == ((100, 200)[row], 0, 0)) == edits
    assert grid.width == columns[-1] - cell // 2 + 2 * (2 * cell + GAP)
