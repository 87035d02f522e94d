"""Rows of a conditioning for a batch of samples."""

from torch import Tensor

from fastflowgrpo.policy import Conditioning
from fastflowgrpo.policy.protocol import EMPTY


def repeat_rows(conditioning: Conditioning, rows: Tensor | slice) -> Conditioning:
    """The given rows, int64 (B,) or a slice, of every tensor of a conditioning."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def expand_row(unconditional: Conditioning | None, conditioning: Conditioning) -> Conditioning | None:
    """The empty prompt's conditioning, of one row, expanded to the rows of a conditioning without a copy.

    What it lacks, such as the source images of an edit, is that of the conditioning, and in the first place what that
    has of the empty prompt. None stays None.
    """
    if unconditional is None:
        return None
    batch_size = len(next(iter(conditioning.values())))
    empty = {name.removeprefix(EMPTY): tensor for name, tensor in conditioning.items() if name.startswith(EMPTY)}
    expanded = {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in unconditional.items()}
    return conditioning | empty | expanded
