"""Host time of the kernels' eager calls, on a machine without a GPU too: `python -m benchmarks.host`.

Tensors are on the CPU and kernels are replaced by nothing, so what is timed is the checks, the choice of the backend,
the allocations and the arguments of the launches, by the direct path and through torch's dispatcher. Triton's own
launch comes on top.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fastflowgrpo.kernels import grpo_loss_triton, sde_step_triton, triton_operation, velocity_gradient_triton
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.sde_step import sde_step


class NoKernel:
    """Stands in for a kernel: `kernel[grid](...)` does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run

    def run(self, *arguments: Any, **options: Any) -> None:
        pass


def microseconds(function: Callable[[], object], calls: int = 100, rounds: int = 100) -> float:
    """Of one call, in the fastest of the rounds: the others were disturbed."""
    fastest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / calls * 1e6


def main() -> int:
    for module in (grpo_loss_triton, sde_step_triton, velocity_gradient_triton):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                setattr(module, name, NoKernel())
    os.environ["TRITON_INTERPRET"] = "1"  # lets CPU tensors through
    torch.set_num_threads(1)
    velocity, sample, prev_sample, uncond, reference = torch.randn(5, 24, 16, 64, 64).bfloat16().unbind()
    c_x, c_v, std, dt, old_log_prob, advantage = torch.rand(6, 24).add(0.1).unbind()
    seed, upstream = torch.arange(24), torch.ones(24)
    trained = velocity.clone().requires_grad_()
    guided: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 4.5, "backend": "triton"}

    def step(**given: Any) -> torch.Tensor:
        return sde_step(velocity, sample, c_x, c_v, std, **given, **guided)[1]

    def loss(v: torch.Tensor) -> torch.Tensor:
        step = (v, sample, prev_sample, c_x, c_v, std, dt, old_log_prob, advantage)
        return grpo_step_loss(*step, clip_range=1e-4, velocity_ref=reference, kl_weight=0.04, **guided)[0]

    calls: dict[str, Callable[[], object]] = {
        "draw": lambda: step(seed=seed, offset=3),
        "score": lambda: step(prev_sample=prev_sample),
        "loss": lambda: loss(velocity),
        "loss with a gradient": lambda: loss(trained),
        "loss and backward": lambda: torch.autograd.grad(loss(trained), trained, upstream),
    }
    direct = {name: microseconds(call) for name, call in calls.items()}
    triton_operation.is_eager = lambda *values: False
    print(f"microseconds of host time, torch {torch.__version__}\n{'':<24}{'direct':>8}{'dispatcher':>12}")
    for name, call in calls.items():
        print(f"{name:<24}{direct[name]:>8.1f}{microseconds(call):>12.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
