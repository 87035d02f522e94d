"""Frozen weights that are on the GPU only while they are used: `policy.offload`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class OffloadedModule:
    """Keeps a frozen module's weights and buffers in the CPU's memory, pinned if there is a GPU.

    Args:
        module: changed in place: its tensors are moved to the CPU.
        device: where it is used.
    """

    def __init__(self, module: nn.Module, device: torch.device | str):
        self.device = device
        self.tensors = [part for tensor in (*module.parameters(), *module.buffers()) for part in _parts(tensor)]
        self.on_host: list[Tensor] = [_host_copy(tensor.data) for tensor in self.tensors]
        self._set(self.on_host)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside it the module is on its device. Use it there on the stream that is current at its start."""
        self._set([copy_to(tensor, self.device) for tensor in self.on_host])
        try:
            yield
        finally:
            # The weights are frozen: nothing is copied back, and the host does not wait for the device.
            self._set(self.on_host)

    def _set(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value


def copy_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Start to copy a tensor from the CPU to a device."""
    return tensor.to(device, non_blocking=True)


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return a quantised weight's values and scales, or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.cpu()
    return copy.pin_memory() if torch.cuda.is_available() else copy
