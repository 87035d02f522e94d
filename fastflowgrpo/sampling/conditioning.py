"""Rows of a conditioning for a batch of samples."""

from torch import Tensor

from fastflowgrpo.policy import Conditioning


def repeat_rows(conditioning: Conditioning, rows: Tensor | slice) -> Conditioning:
    """The given rows, int64 (B,) or a slice, of every tensor of a conditioning."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def expand_row(unconditional: Conditioning | None, conditioning: Conditioning) -> Conditioning | None:
    """The empty prompt's conditioning, of one row, expanded to the rows of a conditioning without a copy.

    What it lacks, such as the source image of an edit, is that of the conditioning. None stays None.
    """
    if unconditional is None:
        return None
    batch_size = len(next(iter(conditioning.values())))
    return conditioning | {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in unconditional.items()}
