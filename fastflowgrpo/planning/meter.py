"""Measuring the FLOPs and peak bytes of a function that runs on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_PLAIN_ATTENTION = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Cost:
    """The cost of a pass."""

    flops: int
    peak: int
    """The most bytes that were alive at a time."""
    weights: int
    """Bytes of the parameters that were read, each once, without embedding tables, of which a few rows are read."""


def measure(function: Callable[[], object]) -> Cost:
    """Call a function and return what it costs; tensors that existed before do not count.

    Attention on the meta device is measured as the fused operation of a GPU, and not as plain matrix products.
    """
    with patch.object(F, "scaled_dot_product_attention", _attention), _Meter() as meter:
        function()
    return Cost(meter.flops, meter.peak, meter.weights)


class _Meter(TorchDispatchMode):
    """Adds up the FLOPs of all operations, and the bytes of the tensors that were created inside it and are alive.

    `FlopCounterMode` has the same formulas, but it is many times slower, and its records of modules keep tensors alive
    that gradient checkpointing frees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = self.weights = 0
        self.known: set[int] = set()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Note the arguments first: a result that is a view of them needs no new memory.
        self._note((args, kwargs), new=False)
        if func.overloadpacket is not torch.ops.aten.embedding:
            self._note_weights((args, kwargs))
        result = func(*args, **kwargs)
        self._note(result, new=True)
        self.peak = max(self.peak, self.live)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _note(self, tree: Any, new: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if new else 0
                if key not in self.known:
                    self.known.add(key)
                    self.live += size
                    finalize(storage, self._forget, key, size)

    def _note_weights(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, nn.Parameter) and id(tensor) not in self.read:
                self.read.add(id(tensor))
                self.weights += tensor.nbytes

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    if query.device.type != "meta":
        return _PLAIN_ATTENTION(query, key, value, attn_mask, **settings)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
