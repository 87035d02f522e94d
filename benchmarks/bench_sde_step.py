"""The SDE step on a GPU in eager torch, with torch.compile and with the Triton kernel; see `benchmarks.kernels`."""

from typing import Any

import pytest
import torch

from benchmarks.kernels import SHAPES, compiled, take
from fastflowgrpo.kernels.sde_step import sde_step

if not torch.cuda.is_available():
    pytest.skip("these benchmarks need a GPU", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default")  # warnings of the compiler are not failures


@pytest.mark.parametrize("variant", ["eager", "compile", "triton"])
@pytest.mark.parametrize("work", ["draw", "score"])
@pytest.mark.parametrize("size", SHAPES)
def test_step(benchmark, size, work, variant):
    shape = SHAPES[size]
    velocity, sample, uncond = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    c_x, c_v, std = torch.rand(3, shape[0], device="cuda").add(0.1)
    # the noise as each uses it: torch's own generator, or seeds for the kernel
    given: dict[str, Any] = {}
    if work == "draw" and variant == "triton":
        given = {"seed": torch.arange(shape[0], device="cuda")}
    elif work == "score":
        given = {"prev_sample": torch.randn_like(sample)}
    step = compiled(sde_step) if variant == "compile" else sde_step

    @torch.no_grad()
    def run():
        backend = "triton" if variant == "triton" else "reference"
        return step(
            velocity, sample, c_x, c_v, std, velocity_uncond=uncond, guidance_scale=4.5, backend=backend, **given
        )

    # velocity, velocity_uncond and sample are read; the next sample is written or read
    take(benchmark, run, 4 * sample.numel() * sample.element_size())
