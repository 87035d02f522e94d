"""`philox.philox_normal` for Triton kernels: the integers are equal, and the normals agree to rounding."""

import triton
import triton.language as tl


@triton.jit
def box_muller(a, b):
    """Two standard normals from two 32-bit words, as `philox.box_muller`.

    Triton's own sine and cosine reduce their argument in local memory. Here the angle is a fraction of a turn: its
    upper bits are the quadrant, and a polynomial (Cephes) computes the rest.
    """
    uniform = tl.fma(a.to(tl.float32), tl.full(a.shape, 2.0**-32, tl.float32), 2.0**-33)
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    turned = b + 0x20000000
    quadrant = turned >> 30
    t = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.4629180792671596e-09
    z = t * t
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * t + t
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x, y = tl.where(((quadrant + 1) & 2) != 0, -x, x), tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def philox_normal(seed, offset, start, BLOCK: tl.constexpr):
    """Noise of elements start, ..., start + BLOCK - 1 of the row with this seed; start is a multiple of 4."""
    index = start // 4 + tl.arange(0, BLOCK // 4)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    offset = tl.full(index.shape, offset, tl.int64)
    a, b, c, d = tl.philox(seed, low, high, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))
