"""Several processes of a run on this machine, without torchrun or accelerate: their start, signals, errors and end.

They are forked where that is safe, so that they begin with everything imported, and find each other as torchrun's do.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from fastflowgrpo.console import Ending, end_process, interrupted, log_only

# Seconds that the others have to end, after a process has failed or the launcher was killed.
GRACE_SECONDS = 30.0
MESSAGE_CHARACTERS = 2**14 - 2**8  # of up to four bytes; the pipe's 64 KiB hold them before anyone reads
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


@dataclass
class _Member:
    """A process of the run, and where it says how it ended."""

    process: BaseProcess
    ending: Connection
    stopped: bool = False
    """Whether the launcher has killed it."""


def launch(work: Callable[[], Ending], count: int) -> Ending:
    """Call a function in `count` processes that form one run, and say how the run ended.

    SIGINT, SIGTERM and SIGHUP are passed on. When a process fails, the others end within GRACE_SECONDS. When this
    process is killed, the others get SIGTERM.

    Args:
        work: returns how a process ended. It must be picklable, for systems where a fork is not safe.
        count: number of processes.

    Returns:
        The ending of the process that failed first, if any did.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    members: list[_Member] = []
    signals: list[int] = []
    with _free_port() as port:
        try:
            for rank in range(count):
                ending, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run_member, args=(rank, count, port, sender, work))
                process.start()
                sender.close()
                members.append(_Member(process, ending))
            with _signals_passed_on(members, signals):
                _wait_for_all(members, signals)
        finally:
            _kill(members)
    return _first_failure(members, signals)


def _run_member(rank: int, count: int, port: int, sender: Connection, work: Callable[[], Ending]) -> None:
    """Be one of the processes: call `work`, tell the launcher how it ended, and end."""
    os.setpgid(0, 0)  # the terminal's signals go to the launcher, which passes them on once
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    try:
        ending = work()
    except KeyboardInterrupt as interrupt:
        ending = interrupted(interrupt)
    except Exception:
        ending = Ending(1, traceback.format_exc())
    if ending.code:
        log_only(f"process {rank} ended with exit code {ending.code}: {ending.message}\n")
    with suppress(OSError):  # the launcher was killed
        sender.send((time.monotonic(), ending.code, ending.message[-MESSAGE_CHARACTERS:]))
    end_process(ending.code)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


@contextmanager
def _free_port() -> Iterator[int]:
    """A port of the loopback device. While it is bound here, nothing gets it that does not ask for it."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextmanager
def _signals_passed_on(members: Sequence[_Member], received: list[int]) -> Iterator[None]:
    """Inside this context the processes get the launcher's signals, which are noted, and stop and go on with it."""

    def pass_on(signum: int, frame: FrameType | None = None) -> None:
        received.append(signum)
        _send(members, signum)

    def stop(signum: int, frame: FrameType | None) -> None:
        _send(members, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _send(members, signal.SIGCONT)

    handlers = dict.fromkeys(PASSED_ON, pass_on) | {signal.SIGTSTP: stop}
    # A script's background job ignores Ctrl+C, and so do its processes.
    previous = {
        signum: signal.signal(signum, handler)
        for signum, handler in handlers.items()
        if signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _send(members: Sequence[_Member], signum: int) -> None:
    for member in members:
        with suppress(ProcessLookupError):
            if member.process.is_alive() and member.process.pid is not None:
                os.kill(member.process.pid, signum)


def _wait_for_all(members: Sequence[_Member], signals: Sequence[int]) -> None:
    """Wait until every process has ended; kill those that stay for long after another one has failed."""
    deadline = None
    while running := [member.process for member in members if member.process.exitcode is None]:
        failed = any(member.process.exitcode for member in members)
        if failed and not signals and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() >= deadline:
            _kill(members)
        wait([process.sentinel for process in running], None if deadline is None else GRACE_SECONDS)


def _kill(members: Sequence[_Member]) -> None:
    for member in members:
        if member.process.is_alive():
            member.stopped = True
            member.process.kill()


def _first_failure(members: Sequence[_Member], signals: Sequence[int]) -> Ending:
    """Return what went wrong first: what comes after it in other processes is of no interest."""
    endings = []
    for rank, member in enumerate(members):
        code = member.process.exitcode
        if member.ending.poll():
            with suppress(EOFError):
                endings.append(member.ending.recv())
                continue
        if code and not member.stopped and not {-code, code - 128} & set(signals):
            reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            remedy = "; if memory ran out, lower num_processes or rollout.batch_size" if code == -signal.SIGKILL else ""
            return Ending(1, f"error: process {rank} {reason}{remedy}")
    failures = [Ending(code, message) for _, code, message in sorted(endings) if code]
    if failures:
        return next((failure for failure in failures if failure.message), failures[0])
    if any(member.process.exitcode for member in members):
        return Ending(128 + signals[0], "interrupted")
    return Ending(0)
