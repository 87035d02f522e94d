"""What test_launcher.py has the processes of a run do, and the process that launches them."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from fastflowgrpo.console import Ending, print_ending
from fastflowgrpo.distributed import Processes, make_accelerator
from fastflowgrpo.runs import launcher
from fastflowgrpo.runs.heartbeat import Heartbeat
from fastflowgrpo.train import main


def rank() -> int:
    return int(os.environ["RANK"])


def meet(folder: Path) -> Ending:
    """The processes find each other, and write what they know."""
    dist.init_process_group("gloo")
    total = torch.tensor([rank() + 1.0])
    dist.all_reduce(total)
    (folder / f"rank{rank()}").write_text(f"{dist.get_world_size()} {total.item():g} {os.environ['LOCAL_RANK']}")
    return Ending(0)


def fail_first(folder: Path) -> Ending:
    """Rank 1 fails, and the other one because of it."""
    if rank() == 1:
        return Ending(2, "error: rollout.height 50 is not a positive multiple of 16")
    time.sleep(0.2)
    raise ConnectionError("closed by peer")


def raise_bug(folder: Path) -> Ending:
    raise ValueError("a bug " + "x" * 100_000)


def lose_one(folder: Path) -> Ending:
    """Rank 1 is killed; rank 0 hangs."""
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "rank0").write_text(str(os.getpid()))
    time.sleep(600)
    return Ending(0)


def wait_for_one(folder: Path) -> Ending:
    """Rank 1 comes to the meeting only after it was missed."""
    processes = Processes(make_accelerator([], str(folder)))
    heartbeat = Heartbeat(folder, processes, limit=0.2)
    heartbeat.start()
    processes.note("rollout, batch 2")
    while rank() == 1 and "rollout" not in (folder / "log").read_text():
        time.sleep(0.02)
    processes.wait()
    heartbeat.close()
    return Ending(0)


def count_signals(folder: Path) -> Ending:
    """Ends 0.3 s after the first signal, or after a second of being left alone, if that finishes the work."""
    received: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: received.append(signum))
    (folder / f"rank{rank()}").write_text(str(os.getpid()))
    while not received:
        time.sleep(0.01)
    time.sleep(0.3)
    (folder / f"signals{rank()}").write_text(" ".join(map(str, received)))
    return Ending(0) if (folder / "finished").exists() else Ending(128 + received[0], "interrupted")


def sleep(folder: Path) -> Ending:
    (folder / f"rank{rank()}").write_text(str(os.getpid()))
    time.sleep(600)
    return Ending(0)


def launch(work: str, folder: str, grace: float) -> None:
    """`launcher.launch` of a function of this module in two processes; what it prints is in FOLDER/log."""
    _output_to(Path(folder, "log"))
    launcher.GRACE_SECONDS = grace
    sys.exit(print_ending(launcher.launch(partial(globals()[work], Path(folder)), 2)))


def command(arguments: list[str], log: str) -> None:
    """The command; what it prints is in the file `log`."""
    _output_to(Path(log))
    sys.exit(main(arguments, may_launch=True))


def _output_to(log: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
