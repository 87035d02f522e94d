"""Which code runs an operation: the reference in plain torch, or Triton."""

import os
from importlib.util import find_spec

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


def use_triton(backend: str, like: torch.Tensor, *others: torch.Tensor | torch.dtype | None) -> bool:
    """Whether Triton computes with these tensors and dtypes.

    Raises:
        ValueError: as `choose_backend`, and for "triton" with float64, which is the reference's.
    """
    if choose_backend(backend, like.device) == "reference" or like.numel() == 0:
        return False
    if torch.float64 in [getattr(other, "dtype", other) for other in (like, *others)]:
        if backend == "triton":
            raise ValueError('backend "triton" computes in float32: use backend="reference" for float64')
        return False
    return True
