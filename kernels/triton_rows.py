"""Device functions that the Triton kernels share: access to rows, the mean of a step, its log-prob.

A kernel sees a tensor (B, ...) as B rows of D elements, each dense in memory. Program i works on block i % num_blocks
of row i // num_blocks. Elements are computed in float32 with explicit fused multiply-adds, so that compilers do not
contract them in different ways. Sums are float64: the order of summation almost never changes the result once it is
rounded to float32. So a log-prob has the same bits in every kernel, for any block size and batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096


@triton.jit
def row_value(value, row):
    """A coefficient of a row: the number itself, or the row's element of the tensor."""
    if isinstance(value, tl.tensor) and value.dtype.is_ptr():  # in the interpreter a number is not a tensor
        value = tl.load(value + row)
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
def step_mean(v, sample, c_x, c_v, row, stride, start, size, BLOCK: tl.constexpr):
    """Mean of the next sample; if there is no sample, v is the mean itself."""
    mean = v
    if sample is not None:
        x = load_row(sample, row, stride, start, size, BLOCK)
        slope = tl.full(v.shape, row_value(c_v, row), tl.float32)
        mean = tl.fma(slope, v, row_value(c_x, row) * x)
    return mean


@triton.jit
def row_log_prob(total, size, std, NORMALISED: tl.constexpr):
    """Log-prob of a row from the sum of its squared distances to the mean; 0 if std == 0."""
    distance = total / size
    deviation = tl.where(std > 0, std, 1.0).to(tl.float64)
    if NORMALISED:
        value = -distance / (2 * deviation * deviation) - tl.log(deviation) - 0.9189385332046727
    else:
        value = -distance
    return tl.where(std > 0, value, 0.0).to(tl.float32)


@triton.jit
def log_prob_slope(size, std, NORMALISED: tl.constexpr):
    """The factor of (prev_sample - mean) in d log-prob / d mean of a row; 0 if std == 0."""
    scale = tl.full((), 0.5, tl.float32)
    if NORMALISED:
        scale = tl.where(std > 0, std * std, 1.0)
    return tl.where(std > 0, 1 / (scale * size), 0.0)


@triton.jit
def sum_partials(partials, row, num_blocks):
    """The sum over a row's blocks, in a fixed order."""
    lanes = tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float64)
    for begin in range(0, num_blocks, 1024):
        total += tl.load(partials + row * num_blocks + begin + lanes, mask=lanes < num_blocks - begin, other=0)
    return tl.sum(total)


def dense_rows(*tensors: Tensor | None, logical: bool = False) -> tuple[Any, Any, int]:
    """The tensors (B, ...) with dense rows in one memory order, the strides between rows, and the elements of a row.

    Tensors that agree on a dense order (channels last, for example) stay as they are; otherwise they are copied to
    contiguous ones. With `logical` the order is always the contiguous one.
    """
    first: Any = tensors[0]
    size = first.numel() // first.shape[0]
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            break
    else:
        return tensors, (size,) * len(tensors), size
    if logical or not _same_order([tensor for tensor in tensors if tensor is not None]):
        tensors = tuple(tensor if tensor is None else tensor.contiguous() for tensor in tensors)
    return tensors, tuple(0 if tensor is None else tensor.stride(0) for tensor in tensors), size


def _same_order(tensors: Sequence[Tensor]) -> bool:
    shape, strides = tensors[0].shape[1:], tensors[0].stride()[1:]
    if any(tensor.stride()[1:] != strides for tensor in tensors):
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the shape and memory order of `like`, and no gap between rows."""
    if like.is_contiguous():
        return torch.empty_like(like, dtype=dtype)
    size = like.numel() // like.shape[0]
    return torch.empty_strided(like.shape, (size, *like.stride()[1:]), dtype=dtype, device=like.device)


def coefficients(*values: Any) -> list[Any]:
    """Numbers and tensors (B,) as `row_value` reads them: contiguous float32 tensors, and floats.

    Integers become floats because Triton turns an integer 1 into a constant.
    """
    rows = []
    for value in values:
        if isinstance(value, Tensor):
            if value.dtype is not torch.float32 or not value.is_contiguous():
                value = value.float().contiguous()
        elif value is not None:
            value = float(value)
        rows.append(value)
    return rows


def blocks(size: int) -> tuple[int, int, int]:
    """(BLOCK, blocks per row, warps) for rows of `size` elements."""
    block = MAX_BLOCK if size >= MAX_BLOCK else max(128, 1 << (size - 1).bit_length())
    return block, -(-size // block), max(1, block // 512)
