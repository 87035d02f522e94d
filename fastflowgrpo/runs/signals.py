"""SIGTERM, SIGHUP and Ctrl+C: a run ends where its state is whole, on all of its processes alike."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from fastflowgrpo.console import ENDING_SIGNALS, Interrupted
from fastflowgrpo.distributed import FailedElsewhere, Processes, mark_collective

# A launcher passes on a Ctrl+C that the terminal has sent to every process already. A second signal within this time
# counts as the first.
REPEAT_SECONDS = 1.0

Result = TypeVar("Result")


class Signals:
    """Inside this context SIGTERM, SIGHUP and Ctrl+C end what `interruptible` runs; all else finishes first.

    A second Ctrl+C ends the process at once.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.signum = 0
        self.received_at = 0.0
        self.may_interrupt = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (*ENDING_SIGNALS, signal.SIGINT):
                # A script's background job ignores Ctrl+C, nohup's SIGHUP, and so does the run.
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self.previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        self.previous = {}

    def interruptible(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that a signal may end at any point, and return its result. Collective.

        The function must leave the run's state as it is. If the model is sharded, ranks need each other within it, and
        a signal ends it only before or after.

        Raises:
            Interrupted: a process of the run was told to end; every process raises it.
            FailedElsewhere: the function failed in another process, which raises its error.
        """
        if self.processes.sharded:
            self._agree(None)
            result = work(*arguments)
            self._agree(None)
            return result
        error = None
        try:
            try:
                self.may_interrupt = True
                if self.signum:
                    raise Interrupted(self.signum)
                result = work(*arguments)
            finally:
                self.may_interrupt = False
        except Interrupted:
            pass
        except Exception as raised:
            error = raised
        self._agree(error)
        return result

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process the error or signal that any of them has met."""
        met = self.processes.gather((self.signum, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise mark_collective(error)
        for rank, (_, text) in enumerate(met):
            if text:
                raise mark_collective(FailedElsewhere(f"process {rank} failed: {text}"))
        if signum := max(signum for signum, _ in met):
            raise mark_collective(Interrupted(signum))

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self.received_at = signum, time.monotonic()
            if self.processes.is_main:
                # Not print: the signal may have interrupted a print, which must not be called within itself.
                with suppress(OSError):  # the terminal may be closed
                    os.write(2, f"\n{signal.Signals(signum).name}: saving, then ending\n".encode())
            if self.may_interrupt:
                raise Interrupted(signum)
        elif signum == signal.SIGINT and time.monotonic() - self.received_at > REPEAT_SECONDS:
            os._exit(128 + signum)
