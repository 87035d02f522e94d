"""A second set of values for the trained weights: the old policy, without a second model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastflowgrpo.distributed import local_shard


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
        parameters, values = (list(map(local_shard, tensors)) for tensors in (self.parameters, self.values))
        current = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, values)
        torch._foreach_copy_(values, current)
