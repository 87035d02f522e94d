"""What is put into a process before it trains. Every function is named by a case and called in the process."""

import errno
import fcntl
import importlib
import os
import pty
import resource
import shutil
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import torch

# The function that a phase calls, and which of its calls is well inside the run of `runs.SETTINGS`.
PHASES = {
    "start": ("fastflowgrpo.trainer", "load_policy", 1),
    "encode": ("fastflowgrpo.policy.embeddings", "EmbeddingCache.__call__", 3),
    "rollout": ("fastflowgrpo.sampling.rollout", "sde_step", 9),
    "score": ("benchmarks.faults.rewards", "judge", 5),
    "update": ("fastflowgrpo.learning.policy_gradient", "GRPO.loss", 14),
    "evaluate": ("fastflowgrpo.evaluation.sampling", "sample_ode", 2),
    "save": ("fastflowgrpo.runs.state", "save_training", 2),
    "rotate": ("fastflowgrpo.runs.checkpoints", "shutil.rmtree", 1),
    "exit": ("fastflowgrpo.runs.report", "before_after_table", 1),
}
ON_MAIN = ("save", "rotate", "exit")  # phases that only rank 0 has
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


def at_phase(phase: str, act: Callable[[], object]) -> None:
    """Call `act` once, when a phase is under way."""
    module, path, number = PHASES[phase]
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += name != "rmtree" or str(args[0]).endswith(".old")
        if calls == number:
            calls += 1
            act()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def send(phase: str, signum: int, mark: str) -> None:
    """Send a signal to this process itself; the file `mark` tells that it was sent."""

    def act() -> None:
        Path(mark).touch()
        os.kill(os.getpid(), signum)

    at_phase(phase, act)


def kill_at_touch(number: int, folder: str) -> None:
    """SIGKILL when a file in the folder is touched for the `number`-th time."""
    count = 0

    def touch(event: str, details: tuple) -> None:
        nonlocal count
        if event in TOUCHES and _inside(details[0], folder):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(touch)


def refuse(name: str, code: int, folder: str) -> None:
    """The system refuses to write files of this name; "*" is every file, once the run has written its config."""

    def touch(event: str, details: tuple) -> None:
        writes = event == "os.mkdir" or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and _inside(details[0], folder) and name in str(details[0]):
            raise OSError(code, os.strerror(code), str(details[0]))

    sys.addaudithook(touch)


def slow(name: str, seconds: float, folder: str) -> None:
    """Files of this name take long to open."""

    def touch(event: str, details: tuple) -> None:
        if event == "open" and _inside(details[0], folder) and name in str(details[0]):
            time.sleep(seconds)

    sys.addaudithook(touch)


def remove(phase: str, folder: str) -> None:
    """Remove the run's folder."""
    rmtree = shutil.rmtree
    at_phase(phase, lambda: rmtree(folder))


def jump(phase: str, seconds: float) -> None:
    """The clock jumps."""
    now = time.time

    def act() -> None:
        time.time = lambda: now() + seconds

    at_phase(phase, act)


def out_of_memory(phase: str) -> None:
    """The device has no memory left."""

    def act() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    at_phase(phase, act)


def no_ram(phase: str) -> None:
    """The machine has no memory left for a tensor."""
    at_phase(phase, lambda: torch.empty(2**46, dtype=torch.uint8))


def limit_file(largest: int) -> None:
    """No file may be larger: a disk that is full in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def close_pipe(phase: str, streams: tuple[int, ...]) -> None:
    """The reader of stdout (1) or stderr (2) goes away."""
    reader, writer = os.pipe()
    for stream in streams:
        os.dup2(writer, stream)
    at_phase(phase, lambda: os.close(reader))


def close_terminal(phase: str, mark: str) -> None:
    """The run's terminal is closed: the kernel sends SIGHUP."""
    os.setsid()
    terminal, own_end = pty.openpty()
    fcntl.ioctl(own_end, termios.TIOCSCTTY, 0)
    os.set_blocking(terminal, False)
    for stream in (0, 1, 2):
        os.dup2(own_end, stream)
    os.close(own_end)

    def act() -> None:
        Path(mark).touch()
        os.close(terminal)

    at_phase(phase, act)


def no_flock() -> None:
    """The disk has no locks of the kernel's."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    fcntl.flock = flock


def short_beats(beat: float, limit: float) -> None:
    """The lock's times, so that a case does not take a minute."""
    from fastflowgrpo.runs import lock

    lock.BEAT, lock.LIMIT = beat, limit


def _inside(path: object, folder: str) -> bool:
    return isinstance(path, str | os.PathLike) and str(path).startswith(folder)
