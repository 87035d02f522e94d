"""Rows of a conditioning for a batch of samples."""

from torch import Tensor

from fastflowgrpo.policy import Conditioning


def repeat_rows(conditioning: Conditioning, rows: Tensor | slice) -> Conditioning:
    """The given rows, int64 (B,) or a slice, of every tensor of a conditioning."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def expand_row(conditioning: Conditioning | None, batch_size: int) -> Conditioning | None:
    """A conditioning of one row expanded to a batch, without a copy; None stays None."""
    if conditioning is None:
        return None
    return {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in conditioning.items()}
