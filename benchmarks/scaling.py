"""Weak scaling of what ranks exchange in an epoch: `python -m benchmarks.scaling --processes 2 4 8 16`.

Everything but the model runs, with the library's own code and the message sizes of a real run, over gloo on this
machine: every rank gathers scores and statistics of its groups, computes the advantages of all groups, and averages a
gradient of the size of a LoRA with DDP. Each rank has the same number of groups, whatever the number of ranks is. The
model takes no time here: what remains must stay small against what it takes.

Ranks that share a core run one after the other, so on fewer cores than ranks the wall time grows with the ranks even
where a rank's own work does not. `cpu_ms` is the processor time of rank 0, which tells how its work grows.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn

from benchmarks.learning import machine
from fastflowgrpo.console import Ending
from fastflowgrpo.distributed import Processes, make_accelerator
from fastflowgrpo.learning.advantages import group_advantages
from fastflowgrpo.results import versions
from fastflowgrpo.rewards import Scores
from fastflowgrpo.runs.launcher import launch
from fastflowgrpo.scoring.gather import gather_scores

LORA_SD35_MEDIUM = 18_776_064  # trained parameters of a LoRA of rank 32, by `--dry_run`
Times = dict[str, dict[str, float]]


class Gradient(nn.Module):
    """Stands in for a LoRA: its gradient has the size of all its parameters, in tensors of `width` elements."""

    def __init__(self, parameters: int, width: int = 2**16):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(-(-parameters // width)))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value * weight.sum() for weight in self.weights]).sum()


def epoch_phases(processes: Processes, groups_per_rank: int, group_size: int, module: nn.Module) -> dict[str, Callable]:
    """The exchanges of an epoch by name, in the order of `Trainer`; all ranks call them together."""
    total, images = groups_per_rank * processes.count, groups_per_rank * group_size
    pairs = images * 3 // 2  # of one of two updates, with a window of 3 steps
    scores = Scores(torch.rand(images), {"reward": torch.rand(images)})
    ids = torch.arange(total).repeat_interleave(group_size)
    names = ("ratio", "clipped_above", "clipped_below", "loss", "kl", "log_prob_difference")
    pair_statistics = {name: torch.rand(2 * pairs) for name in names}

    def update() -> None:
        processes.gather((pairs, 1))
        with processes.backward_pass(module, last=True):
            processes.backward(module(torch.ones(())))
        processes.clip_gradient(module.parameters(), 1.0)
        module.zero_grad()

    return {
        "scores": lambda: gather_scores(processes, scores, total, group_size),
        "advantages": lambda: group_advantages(torch.rand(len(ids)), ids, std="global"),
        "gradient": update,
        "statistics": lambda: processes.gather(pair_statistics),
    }


def measure(arguments: argparse.Namespace, output: Path) -> Ending:
    """Be one rank: run epochs, and let rank 0 write the median milliseconds of each phase."""
    processes = Processes(make_accelerator([], str(output.parent)))
    gradient = Gradient(arguments.parameters)
    module, _ = processes.prepare(gradient, torch.optim.SGD(gradient.parameters(), lr=0.0))
    phases = epoch_phases(processes, arguments.groups, arguments.group_size, module)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in phases}
    for _ in range(arguments.epochs + 1):
        for name, phase in phases.items():
            processes.wait()
            begin = time.perf_counter(), time.process_time()
            phase()
            taken[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    if processes.is_main:
        times: Times = {}
        for name, values in taken.items():
            wall, cpu = zip(*values[1:], strict=True)  # the first warms up
            times[name] = {"wall_ms": 1e3 * statistics.median(wall), "cpu_ms": 1e3 * statistics.median(cpu)}
        output.write_text(json.dumps(times))
    processes.accelerator.end_training()
    return Ending(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--groups", type=int, default=6, help="groups of each rank")
    parser.add_argument("--group_size", type=int, default=24, help="images of a group")
    parser.add_argument("--parameters", type=int, default=LORA_SD35_MEDIUM, help="trained parameters, float32")
    parser.add_argument("--epochs", type=int, default=5, help="measured epochs")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    measured: dict[int, Times] = {}
    for count in arguments.processes:
        folder = mkdtemp()  # TemporaryDirectory would be removed at the end of the first forked process
        try:
            output = Path(folder) / "times.json"
            if (ending := launch(partial(measure, arguments, output), count)).code:
                raise SystemExit(ending.message)
            measured[count] = json.loads(output.read_text())
        finally:
            shutil.rmtree(folder)
        parts = "  ".join(f"{name} {ms['wall_ms']:.1f} ({ms['cpu_ms']:.1f})" for name, ms in measured[count].items())
        print(f"{count:3} processes, ms and processor ms of rank 0: {parts}", flush=True)
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("groups", "group_size", "parameters", "epochs")}
        where: dict[str, Any] = {"machine": machine(), "cores": len(os.sched_getaffinity(0)), "versions": versions()}
        result = {**where, **settings, "processes": measured}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
