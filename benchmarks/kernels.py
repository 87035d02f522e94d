"""Shared parts of the kernel benchmarks: the sizes, the measurement, and the copy rate of the device.

    python -m pytest benchmarks/bench_sde_step.py benchmarks/bench_grpo_loss.py --benchmark-json results.json

They need a GPU with 24 GB for the largest size. The device time is a median over CUDA events, with a flush of the L2
cache before each call; pytest-benchmark's own wall time includes the host. `extra_info` has the device time in ms, the
GB/s for the bytes that the operation must move, this rate as a share of a copy's rate in the same process, and the peak
MB above the inputs. `python -m benchmarks.report FOLDER` makes tables of these.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

SHAPES = {
    "SD3.5-M 512 px": (24, 16, 64, 64),
    "SD3.5-M 1024 px": (24, 16, 128, 128),
    "FLUX packed 1024 px": (24, 4096, 64),
    "Wan 2.1 81 frames 480p": (4, 16, 21, 60, 104),
    "bandwidth": (64, 16, 512, 512),
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes of this benchmark only; the reset keeps it from compiling for any shape."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def take(benchmark: Any, function: Callable[[], Any], moved: int) -> None:
    """Measures a function on the GPU that must move `moved` bytes."""
    for _ in range(3):
        function()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    peak = torch.cuda.max_memory_allocated() - before
    milliseconds = device_ms(function)
    rate = moved / milliseconds / 1e6

    def timed() -> None:
        function()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=50, warmup_rounds=5)
    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        device_ms=milliseconds,
        gb_per_s=rate,
        share_of_copy=rate / copy_rate(),
        peak_mb=peak / 2**20,
    )


def device_ms(function: Callable[[], Any], rounds: int = 50) -> float:
    """Median time on the device. The flush before each call takes as long as the host needs to queue the call, so the
    time includes no waiting for the host."""
    flush = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[rounds // 2]


@cache
def copy_rate() -> float:
    """GB/s that a large copy on the device reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_ms(lambda: target.copy_(source)) / 1e6
