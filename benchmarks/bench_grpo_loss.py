"""The GRPO step loss on a GPU (forward, backward, both, and both for GRPO-Guard) in eager torch, with torch.compile and
with the Triton kernels; see `benchmarks.kernels`."""

import pytest
import torch
from torch._functorch import config as functorch_config

from benchmarks.kernels import SHAPES, compiled, take
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss

if not torch.cuda.is_available():
    pytest.skip("these benchmarks need a GPU", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default")  # warnings of the compiler are not failures


@pytest.mark.parametrize("variant", ["eager", "compile", "triton"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both", "guard"])
@pytest.mark.parametrize("size", SHAPES)
def test_loss(benchmark, size, direction, variant):
    shape = SHAPES[size]
    velocity, sample, prev_sample, uncond, reference = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(5)
    )
    c_x, c_v, std, dt, old_log_prob, advantage = torch.rand(6, shape[0], device="cuda").add(0.1)
    # float32, as the rollout keeps velocities with guidance
    old = torch.randn(shape, device="cuda") if direction == "guard" else None
    upstream = torch.ones(shape[0], device="cuda")
    velocity.requires_grad_()
    loss_function = compiled(grpo_step_loss) if variant == "compile" else grpo_step_loss

    def forward():
        return loss_function(
            velocity,
            sample,
            prev_sample,
            c_x,
            c_v,
            std,
            -dt,
            old_log_prob,
            advantage,
            clip_range=0.5,
            velocity_ref=reference,
            velocity_old=old,
            velocity_uncond=uncond,
            guidance_scale=4.5,
            kl_weight=0.04,
            backend="triton" if variant == "triton" else "reference",
        )[0]

    def backward(loss, retain_graph=False):
        return torch.autograd.grad(loss, velocity, upstream, retain_graph=retain_graph)

    # a compiled backward pass may overwrite its inputs, which must not happen if it runs again
    functorch_config.donated_buffer = direction != "backward"
    once = forward()
    run = {
        "forward": forward,
        "backward": lambda: backward(once, retain_graph=True),
        "both": lambda: backward(forward()),
        "guard": lambda: backward(forward()),
    }[direction]
    # Forward reads five tensors; backward reads five and writes the gradient. GRPO-Guard's extra tensor is float32 and
    # read in both.
    passes = {"forward": 5, "backward": 6, "both": 11, "guard": 15}[direction]
    take(benchmark, run, passes * sample.numel() * sample.element_size())
