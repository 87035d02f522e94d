"""What the Triton kernels share: rows in memory, the mean of a step, its log-prob, and how operations are registered.

A kernel sees a tensor (B, ...) as B rows of D elements, each dense in memory; program i works on block i % num_blocks
of row i // num_blocks. Elements are computed in float32, with explicit fused multiply-adds, so that no compiler
contracts them in its own way, and summed in float64: rounded to float32, the order of such a sum all but never shows,
so a log-prob has the same bits in every kernel, for any block size and batch.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096
INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False


@triton.jit
def row_value(value, row, stride):
    """A coefficient of a row: the number itself, or an element of the tensor."""
    value = tl.to_tensor(value)
    if value.dtype.is_ptr():
        value = tl.load(value + row * stride)
    return value


@triton.jit
def load_row(tensor, row, stride, start, size, BLOCK: tl.constexpr):
    """float32 elements start, ..., start + BLOCK - 1 of a row; 0 past its end."""
    lanes = tl.arange(0, BLOCK)
    return tl.load(tensor + row * stride + start + lanes, mask=lanes < size - start, other=0).to(tl.float32)


@triton.jit
def load_guided(velocity, uncond, guidance, row, stride, uncond_stride, start, size, BLOCK: tl.constexpr):
    """The velocity after classifier-free guidance."""
    v = load_row(velocity, row, stride, start, size, BLOCK)
    if uncond is not None:
        u = load_row(uncond, row, uncond_stride, start, size, BLOCK)
        v = tl.fma(tl.full(v.shape, guidance, tl.float32), v - u, u)
    return v


@triton.jit
def step_mean(v, x, c_x, c_v):
    return tl.fma(tl.full(v.shape, c_v, tl.float32), v, c_x * x)


@triton.jit
def row_log_prob(total, size, std, NORMALISED: tl.constexpr):
    """Log-prob of a row from the sum of its squared distances to the mean, 0 where std == 0."""
    distance = total / size
    deviation = tl.where(std > 0, std, 1.0).to(tl.float64)
    if NORMALISED:
        value = -distance / (2 * deviation * deviation) - tl.log(deviation) - 0.9189385332046727
    else:
        value = -distance
    return tl.where(std > 0, value, 0.0).to(tl.float32)


@triton.jit
def sum_partials(partials, row, num_blocks):
    """A row's sum over its blocks, in a fixed order."""
    lanes = tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float64)
    for begin in range(0, num_blocks, 1024):
        total += tl.load(partials + row * num_blocks + begin + lanes, mask=lanes < num_blocks - begin, other=0)
    return tl.sum(total)


def shared_layout(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same tensors, (B, ...) each, with rows that are dense and in one order: as they are if they agree (channels
    last, say), made contiguous if not."""
    given = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.is_contiguous() for tensor in given):
        return tensors
    layout = given[0].stride()[1:]
    if all(tensor.stride()[1:] == layout for tensor in given) and _dense(given[0].shape[1:], layout):
        return tensors
    return contiguous(*tensors)


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same tensors, contiguous."""
    return tuple(tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of `like`'s shape, with the order of its rows and no gap between them."""
    return torch.empty_strided(like.shape, (row_size(like), *like.stride()[1:]), dtype=dtype, device=like.device)


def row_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def per_row(*values: float | Tensor) -> tuple[Any, ...]:
    """(stride, *values): float32 coefficients whose tensors have one stride, for `row_value`."""
    found = {(value.stride(0), value.dtype) for value in values if isinstance(value, Tensor)}
    if len(found) > 1 or any(dtype != torch.float32 for _, dtype in found):
        values = tuple(value.float().contiguous() if isinstance(value, Tensor) else value for value in values)
        return 1, *values
    return next(iter(found))[0] if found else 0, *values


def blocks(size: int) -> tuple[int, int, int]:
    """(BLOCK, number of blocks of a row, warps) for rows of `size` elements."""
    block = min(MAX_BLOCK, max(128, 1 << (size - 1).bit_length()))
    return block, -(-size // block), max(1, block // 512)


def wrap_triton(kernel: Any) -> Any:
    """The kernel itself in eager code, one that a tracer sees otherwise."""
    return kernel if INTERPRETED or _eager() else torch.library.wrap_triton(kernel)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are computed with here and now, so that an operation may pass the dispatcher by."""
    return _eager() and all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def _eager() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def detached(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(tensor.detach() if tensor is not None and tensor.requires_grad else tensor for tensor in tensors)


def on_device(tensor: Tensor) -> Any:
    """Kernels are launched on the current device: makes it the tensor's."""
    if tensor.is_cuda and _eager() and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def as_rows(value: float | Tensor, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number as a tensor (B,): operations that a compiler sees take tensors only, since it makes floats float64."""
    if isinstance(value, Tensor):
        return value
    return torch.full((like.shape[0],), value, dtype=dtype, device=like.device)


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The function as the operation `fastflowgrpo::name`; opaque to tracers where the interpreter runs its kernels."""
    make: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    operation = make(f"fastflowgrpo::{name}", function, mutates_args=())
    operation.register_fake(fake)
    return operation
