"""A second set of values for the trained weights: the old policy, without a second model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightSnapshot:
    """Values of the trained parameters that follow them slowly, as a moving average does.

    Args:
        parameters: the trained ones, sharded or not; the snapshot begins as a copy of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside it the parameters have the snapshot's values. No graph of before may be used afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move towards the parameters: value <- decay value + (1 - decay) parameter."""
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            current = parameter.clone()
            parameter.copy_(value)
            value.copy_(current)
