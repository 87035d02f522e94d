"""SIGTERM and Ctrl+C: a run ends where its state is whole, on all its processes alike."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from fastflowgrpo.distributed import FailedElsewhere, Processes, mark_collective

# Launchers pass a Ctrl+C on that the terminal has sent to every process already: what follows sooner is the same one.
AGAIN = 1.0  # seconds
Result = TypeVar("Result")


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Inside it SIGTERM and Ctrl+C end what `interruptible` runs, and let everything else finish first. A second Ctrl+C
    ends the process at once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.signum = 0
        self.since = 0.0
        self.open = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(signum) != signal.SIG_IGN:  # as for a job in the background of a script
                    self.previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        self.previous = {}

    def interruptible(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """What `work` returns. It must leave the run's state as it is: a signal ends it anywhere, unless the processes
        need each other within it, as for sharded weights; then it is ended before or after.

        Raises:
            Interrupted: a process of the run was told to end; then all of them raise it here.
            FailedElsewhere: in another process `work` has raised what it raises there.
        """
        if self.processes.sharded:
            self._agree(None)
            result = work(*arguments)
            self._agree(None)
            return result
        error = None
        try:
            try:
                self.open = True
                if self.signum:
                    raise Interrupted(self.signum)
                result = work(*arguments)
            finally:
                self.open = False
        except Interrupted:
            pass
        except Exception as found:
            error = found
        self._agree(error)
        return result

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process what any of them has met."""
        met = self.processes.gather((self.signum, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise mark_collective(error)
        for process, (_, text) in enumerate(met):
            if text:
                raise mark_collective(FailedElsewhere(f"process {process} failed: {text}"))
        if signum := max(signum for signum, _ in met):
            raise mark_collective(Interrupted(signum))

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()
            # print could be what was interrupted, and may not be called within itself.
            os.write(2, f"\n{signal.Signals(signum).name}: saving, then ending\n".encode())
            if self.open:
                raise Interrupted(signum)
        elif signum == signal.SIGINT and time.monotonic() - self.since > AGAIN:
            os._exit(128 + signum)
