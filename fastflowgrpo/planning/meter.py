"""Measuring the FLOPs and peak bytes of a function that runs on the meta device."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
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

    The meta device computes shapes in Python, slowly. Blocks of a transformer repeat the same operations, so what an
    operation returns is remembered by the description of its arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = self.weights = 0
        self.known: set[int] = set()
        self.read: set[int] = set()
        self.returned: dict[Hashable, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = list(_tensors((args, kwargs)))
        # Note the arguments first: a result that is a view of them needs no new memory.
        self._note(arguments, new=False)
        if func.overloadpacket is not torch.ops.aten.embedding:
            self._note_weights(arguments)
        result, flops = self._call(func, args, kwargs, arguments)
        self._note(_tensors(result), new=True)
        self.peak = max(self.peak, self.live)
        self.flops += flops
        return result

    def _call(self, func: Any, args: Any, kwargs: Any, tensors: Iterable[Tensor]) -> tuple[Any, int]:
        """Return an operation's result and FLOPs; the tensors are those among its arguments, and known."""
        key = None
        if _returns_new_tensors(func) and all(tensor.is_meta for tensor in tensors):
            key = func, _description(args), _description(kwargs)
            if key in self.returned:
                result, flops = self.returned[key]
                return _like(result), flops
        result, flops = func(*args, **kwargs), 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        if key is not None and all(self._is_plain(tensor) for tensor in _tensors(result)):
            self.returned[key] = _like(result), flops
        return result, flops

    def _is_plain(self, tensor: Tensor) -> bool:
        """Whether `_like` makes the same tensor: it is on the meta device, and has its storage for itself."""
        storage = tensor.untyped_storage()
        size = _like(tensor).untyped_storage().nbytes()
        return tensor.is_meta and storage._cdata not in self.known and storage.nbytes() == size

    def _note(self, tensors: Iterable[Tensor], new: bool) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                size = storage.nbytes() if new else 0
                self.known.add(key)
                self.live += size
                finalize(storage, self._forget, key, size)

    def _note_weights(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter) and id(tensor) not in self.read:
                self.read.add(id(tensor))
                self.weights += tensor.nbytes

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@cache
def _returns_new_tensors(func: Any) -> bool:
    """Whether an operation changes no argument and returns no view; `_unsafe_view` says so too, and does."""
    return not func._schema.is_mutable and not any(value.alias_info for value in func._schema.returns)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in an operation's arguments or result; PyTorch's `tree_leaves` is many times slower."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)
    elif isinstance(tree, dict):
        yield from _tensors([*tree.values()])


def _description(tree: Any) -> Hashable:
    """Return what the shapes and dtypes of an operation's result depend on."""
    if isinstance(tree, Tensor):
        return Tensor, tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, (tuple, list)):
        return tuple(map(_description, tree))
    if isinstance(tree, dict):
        return tuple((name, _description(value)) for name, value in tree.items())
    return type(tree), tree  # 1 and 1.0 are equal, but give different dtypes


def _like(tree: Any) -> Any:
    """Return an operation's result with new tensors on the meta device."""
    if isinstance(tree, Tensor):
        return torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype, device="meta")
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(_like, tree))
    return tree


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    if query.device.type != "meta":
        return _PLAIN_ATTENTION(query, key, value, attn_mask, **settings)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
