"""Runs in processes of their own: started with a fault, watched as a launcher does, and compared."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults import injection
from fastflowgrpo.console import run_and_exit
from fastflowgrpo.runs.checkpoints import list_checkpoints
from fastflowgrpo.runs.files import METRICS, read_rows
from fastflowgrpo.train import main

# Forked from a process that has imported everything and computed nothing: a run takes a second, not ten.
FORK = multiprocessing.get_context("forkserver")
PRELOADED = ["diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "matplotlib.pyplot", "peft"]
FORK.set_forkserver_preload(["benchmarks.faults.runs", "benchmarks.faults.rewards", "fastflowgrpo.trainer", *PRELOADED])
PROMPTS = ["a red circle", "a blue square", "two green triangles", "a yellow circle", "a red square", "a blue circle"]
TIMEOUT = 600.0  # seconds after which a run counts as hanging; on an idle machine it takes two
GRACE = 10.0  # seconds from a launcher's SIGTERM to its SIGKILL

SETTINGS: dict[str, Any] = {
    "prompts.per_epoch": 2,
    "update.per_epoch": 1,
    "trackers": "[]",
    "rewards": '{"benchmarks.faults.rewards:judge": 1}',
    "policy.lora_rank": 4,
    "epochs": 8,
    "rollout.group_size": 4,
    "rollout.batch_size": 4,
    "rollout.num_steps": 4,
    "rollout.window_size": 2,
    "rollout.window_start": "[0,2]",
    "update.batch_size": 4,
    "update.ema_every": 1,
    "evaluation.every": 3,
    "evaluation.num_steps": 2,
    "evaluation.images_per_prompt": 1,
    "evaluation.batch_size": 16,
    "save_every": 2,
    "checkpoints_total_limit": 2,
    "resume": "latest",
}


@dataclass(frozen=True)
class Fault:
    """A function of `injection` and its arguments, for one rank."""

    name: str
    arguments: tuple = ()
    rank: int = 0

    def inject(self) -> None:
        """Put it into this process."""
        getattr(injection, self.name)(*self.arguments)


@dataclass
class Ended:
    """How a run ended."""

    codes: list[int]
    """Exit code of each rank; a negative one is the signal that killed it."""
    log: str
    """What it printed."""
    left: list[str] = field(default_factory=list)
    """What it left behind: processes, shared memory."""

    @property
    def code(self) -> int:
        """The first exit code that is not 0, of the ranks that no launcher has killed."""
        return next((code for code in self.codes if code not in (0, -signal.SIGKILL, 143)), max(self.codes, key=abs))


def command(output: Path, settings: dict[str, Any]) -> list[str]:
    """The command line of a run; the prompts lie beside its folder."""
    prompts = output.with_name("prompts.txt")
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS))
    settings = {"output_dir": output, "prompts.train": prompts, "prompts.eval": prompts, **SETTINGS, **settings}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


class Run:
    """A run of one or more ranks.

    Args:
        output: its folder; the output goes to FOLDER.out.
        settings: beside `SETTINGS`.
        ranks: processes that train together.
        faults: put into them.
        launcher: whether the command itself starts the ranks.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any] | None = None,
        ranks: int = 1,
        faults: Sequence[Fault] = (),
        launcher: bool = False,
    ):
        self.log = output.with_name(f"{output.name}.out")
        started = {"num_processes": ranks} if launcher else {}
        arguments, ranks = command(output, {**(settings or {}), **started}), 1 if launcher else ranks
        self.memory = set(_shared_memory())
        port = _free_port() if ranks > 1 else 0
        self.processes = [
            FORK.Process(target=_train, args=(arguments, str(self.log), rank, ranks, port, tuple(faults), launcher))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def send(self, signum: int) -> None:
        """Send a signal to all ranks, as a scheduler does."""
        for rank in range(len(self.processes)):
            self.send_to(rank, signum)

    def send_to(self, rank: int, signum: int) -> None:
        """Send a signal to a rank that is still there."""
        process = self.processes[rank]
        if process.is_alive() and process.pid:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signum)

    def end(self, meanwhile: Callable[["Run"], None] = lambda run: None) -> Ended:
        """Wait until it has ended. Once a rank has failed, the others are ended, as a launcher does.

        Args:
            meanwhile: called again and again.
        """
        begin = time.monotonic()
        failed_at, children = None, set()
        while any(process.is_alive() for process in self.processes):
            meanwhile(self)
            for process in self.processes:
                children |= set(_descendants(process.pid))
            now = time.monotonic()
            if failed_at is None and any(process.exitcode for process in self.processes):
                failed_at = now
                self.send(signal.SIGTERM)
            if now - (failed_at or now) > GRACE or now - begin > TIMEOUT:
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        codes = [process.exitcode or 0 for process in self.processes]
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        if time.monotonic() - begin > TIMEOUT:
            log += "\nhangs"
        return Ended(codes, log, _left(children) + sorted(set(_shared_memory()) - self.memory))


def result(output: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What equal runs have in common: the rows without times, and the bits of all tensors of the last checkpoint."""
    last = list_checkpoints(output)[-1]
    timed = {"wall_s", "seconds", "images_per_s"}
    rows = [{key: row[key] for key in row.keys() - timed} for row in read_rows(output / METRICS)]
    return rows, {
        f"{path.relative_to(last)}: {name}": tensor.numpy().tobytes()
        for path in last.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def remains(output: Path) -> list[str]:
    """The hidden files in a run's folder: what it has not finished or given back."""
    return [str(path.relative_to(output)) for path in output.rglob(".*")]


def _train(
    arguments: list[str], log: str, rank: int, ranks: int, port: int, faults: tuple[Fault, ...], launcher: bool
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which this may run, has it ignored, and so would a run
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    for fault in faults:
        if fault.rank == rank:
            fault.inject()
    run_and_exit(lambda: main(arguments, may_launch=launcher))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _descendants(pid: int | None) -> list[int]:
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [other for child in found for other in _descendants(child)]


def _left(pids: set[int]) -> list[str]:
    """Processes that are still there some time after their run has ended."""
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"process {pid}" for pid in alive]


def _shared_memory() -> list[str]:
    folder = Path("/dev/shm")
    return [f"shared memory {path.name}" for path in folder.glob("psm_*")] if folder.is_dir() else []
