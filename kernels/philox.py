"""Standard normal noise as a function of (seed, offset, index): Philox4x32-10 and the Box-Muller transform.

Element i of a row takes number i % 4 of the Philox block with key = seed and counter = (i // 4, offset), 64 bits each.
The four words of a block are two pairs. A pair (a, b) gives two normals,

    r cos(theta), r sin(theta)    with r = sqrt(-2 log((a + 1/2) / 2^32)), theta = 2 pi b / 2^32

The noise of a row therefore depends neither on the other rows nor on how a kernel is cut into blocks. Source of Philox:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The integers equal those of Random123 and of
`tl.philox`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox_normal(
    seed: Tensor, offset: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise, one row per seed.

    Args:
        seed: (B,) int64.
        offset: a number or int64 (B,); one seed gives independent noise at different offsets.
        shape: shape (B, ...) of the noise.
        dtype: float32 or float64; both are computed from the same integers.

    Returns:
        Noise of `shape` and `dtype` on the device of `seed`.
    """
    size = math.prod(shape[1:])
    index = torch.arange(-(-size // 4), device=seed.device)
    key = seed[:, None]
    if not isinstance(offset, Tensor):
        offset = torch.full((1,), offset, device=seed.device)  # filled there: a copied number would make the host wait
    stream = offset.to(seed.device, non_blocking=True)[:, None]
    a, b, c, d = philox_words((index, index >> 32, stream, stream >> 32), (key, key >> 32))
    normals = torch.stack([*box_muller(a, b, dtype), *box_muller(c, d, dtype)], dim=-1)
    return normals.flatten(1)[:, :size].reshape(*shape)


def philox_words(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four 32-bit words from a counter of four words and a key of two.

    Args:
        counter, key: int64 tensors that broadcast; only their lower 32 bits are used.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & WORD for word in counter))
    k0, k1 = key
    for _ in range(10):
        # an int64 product wraps modulo 2^64, so its upper and lower words are both correct
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (second >> 32 ^ c1 ^ k0) & WORD,
            second & WORD,
            (first >> 32 ^ c3 ^ k1) & WORD,
            first & WORD,
        )
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return [c0, c1, c2, c3]


def box_muller(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two 32-bit words."""
    radius = (-2 * ((a.to(dtype) + 0.5) / 2**32).log()).sqrt()
    # angles above pi become negative, so that float32 holds them more exactly
    angle = torch.where(b < 2**31, b, b - 2**32).to(dtype) * (math.pi / 2**31)
    return radius * angle.cos(), radius * angle.sin()
