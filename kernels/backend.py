"""Which code runs an operation: the reference in plain torch, or Triton."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

import torch

BACKENDS = ("auto", "reference", "triton")
# Found, not imported: it is imported when it first runs.
HAS_TRITON = find_spec("triton") is not None


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend for tensors on `device`: "reference" or "triton".

    Args:
        backend: "reference" or "triton", or "auto": what the environment variable FASTFLOWGRPO_BACKEND says, and
            without it Triton on a GPU if it is installed and the reference elsewhere.
        device: of the tensors.

    Raises:
        ValueError: for an unknown name, and for "triton" where it cannot run: without Triton, or on tensors that are
            not on a GPU unless TRITON_INTERPRET=1 lets its interpreter run on the CPU.
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
        backend, like: see `choose_backend`; `like` has the device.
        others: what else is computed with.
        constants: arguments by name for which Triton has no gradient.

    Raises:
        ValueError: as `choose_backend`, and for "triton" with what is the reference's: float64, and a constant that
            needs a gradient.
    """
    if choose_backend(backend, like.device) == "reference" or like.numel() == 0:
        return False
    refused = None
    for other in (like, *others):
        if other is not None and getattr(other, "dtype", other) is torch.float64:
            refused = 'computes in float32: use backend="reference" for float64'
    for name, value in constants.items():
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            refused = f'has no gradient of {name}: use backend="reference", or detach it'
    if refused and backend == "triton":
        raise ValueError(f'backend "triton" {refused}')
    return refused is None
