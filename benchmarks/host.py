"""Host time of eager calls of the kernels, also on a machine without a GPU: `python -m benchmarks.host`.

The tensors are on the CPU and no kernel runs: Triton compiles for sm_90 and launches with a driver that does nothing.
The times include the checks, the choice of the backend, the allocations and the arguments of the launches, without and
with torch's dispatcher, and in a third column Triton's own launch up to the call of the driver.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastflowgrpo.kernels import grpo_loss_triton, sde_step_triton, triton_operation, velocity_gradient_triton
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.sde_step import sde_step


def nothing(*arguments: Any, **options: Any) -> None:
    pass


class NoKernel:
    """Stands in for a kernel: `kernel[grid](...)` does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return nothing


# The parts of a driver that Triton needs before a launch, and a launch that does nothing.
NO_DRIVER = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    launcher_cls=lambda source, metadata: nothing,
    utils=SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
        load_binary=lambda *arguments: (None, None, 0, 0, 1024),
    ),
)


def microseconds(function: Callable[[], object], calls: int = 100, rounds: int = 100) -> float:
    """Time of one call in the fastest round; other processes disturb the slower ones."""
    function()
    fastest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / calls * 1e6


def main() -> int:
    if triton_operation.INTERPRETED:
        raise SystemExit("unset TRITON_INTERPRET: this measures compiled launches, not the interpreter")
    os.environ["TRITON_INTERPRET"] = "1"  # lets CPU tensors through
    triton.runtime.driver.set_active(NO_DRIVER)
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
    launched = {name: microseconds(call) for name, call in calls.items()}
    with ExitStack() as stack:
        for module in (grpo_loss_triton, sde_step_triton, velocity_gradient_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(patch.object(module, name, NoKernel()))
        direct = {name: microseconds(call) for name, call in calls.items()}
        stack.enter_context(patch.object(triton_operation, "is_eager", lambda *values: False))
        dispatched = {name: microseconds(call) for name, call in calls.items()}
    print(f"microseconds of host time, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':<24}{'direct':>8}{'dispatcher':>12}{'direct and launch':>19}")
    for name in calls:
        print(f"{name:<24}{direct[name]:>8.1f}{dispatched[name]:>12.1f}{launched[name]:>19.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
