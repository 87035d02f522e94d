"""The choice between an operation's backends: the reference in plain torch, or Triton."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

import torch

BACKENDS = ("auto", "reference", "triton")
# Looked up without an import: Triton is imported when it first runs.
HAS_TRITON = find_spec("triton") is not None


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend for tensors on `device`: "reference" or "triton".

    Args:
        backend: "reference", "triton", or "auto", which follows the environment variable FASTFLOWGRPO_BACKEND. Without
            that variable it is Triton on a GPU, if Triton is installed, and the reference elsewhere.
        device: device of the tensors.

    Raises:
        ValueError: the name is unknown, or "triton" is asked for and Triton is not installed or the tensors are not on
            a GPU. With TRITON_INTERPRET=1 Triton's interpreter runs on the CPU.
    """
    source = "backend"
    if backend == "auto":
        source, backend = "FASTFLOWGRPO_BACKEND", os.environ.get("FASTFLOWGRPO_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"unknown {source} {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "reference"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(f'{source} "triton" needs Triton, which is not installed: pip install triton')
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'{source} "triton" cannot run on {device.type} tensors: move them to a GPU, or set TRITON_INTERPRET=1 '
                "before the start to run Triton's interpreter on the CPU"
            )
    return backend


def use_triton(
    backend: str,
    like: torch.Tensor,
    *others: torch.Tensor | torch.dtype | None,
    constants: Mapping[str, float | torch.Tensor] = MappingProxyType({}),
) -> bool:
    """Whether Triton computes with these tensors and dtypes.

    Args:
        backend: see `choose_backend`.
        like: tensor on the device that computes.
        others: the other tensors, and the dtypes of results.
        constants: arguments by name for which Triton computes no gradient.

    Raises:
        ValueError: as `choose_backend` does, and if backend is "triton" for what only the reference computes: float64,
            and the gradient of a constant.
    """
    if choose_backend(backend, like.device) == "reference" or like.numel() == 0:
        return False
    unsupported = None
    for other in (like, *others):
        if other is not None and getattr(other, "dtype", other) is torch.float64:
            unsupported = 'computes in float32: use backend="reference" for float64'
    for name, value in constants.items():
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            unsupported = f'has no gradient of {name}: use backend="reference", or detach it'
    if unsupported and backend == "triton":
        raise ValueError(f'backend "triton" {unsupported}')
    return unsupported is None
