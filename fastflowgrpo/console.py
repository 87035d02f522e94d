"""The console side of a command: output, progress bars, one-line errors, signals, and the end of the process."""

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

# Ctrl+C is not one of them: Python itself makes it a KeyboardInterrupt.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int
    """Exit code."""
    message: str = ""
    """What stderr says about it; nothing if this is empty."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the command."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Log:
    """The log file of a command. It gets what was written before it had a name too, and never ends the command."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.early: list[str] = []

    def write(self, text: str) -> None:
        """Append text."""
        if self.path is None:
            self.early.append(text)
            return
        with suppress(OSError):
            # Without a buffer: a signal's handler may write while the main program does.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, text.encode(errors="replace"))
            finally:
                os.close(descriptor)

    def begin(self, path: Path) -> None:
        """Write to this file from now on."""
        self.path = path
        started = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {' '.join(sys.argv)}\n"
        self.write(started + "".join(self.early))
        self.early.clear()


class Output:
    """A stream that outlives its reader: what cannot be written any more is only logged.

    Args:
        stream: stdout or stderr; None if it was closed from the beginning.
        log: gets all text but that of progress bars.
    """

    def __init__(self, stream: TextIO | None, log: Log):
        self.stream, self.log = stream, log
        self.note = ""
        """Of the loss of the stream, for the log once the line is complete."""

    def write(self, text: str) -> int:
        """Write text."""
        self._to_stream(lambda stream: stream.write(text))
        if not text.startswith("\r"):
            self.log.write(text)
        if self.note and text.endswith("\n"):
            self.log.write(self.note)
            self.note = ""
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._to_stream(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def _to_stream(self, use: Callable[[TextIO], object]) -> None:
        if self.stream is None:
            return
        try:
            use(self.stream)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.note = f"the output can be written no more, and goes on here alone: {error}\n"
            self.stream = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def kept_output() -> Iterator[Log]:
    """Inside it a closed pipe or terminal ends nothing, and `log_to` names a file that gets all output."""
    before, log = (sys.stdout, sys.stderr), Log()
    sys.stdout, sys.stderr = (Output(stream, log) for stream in before)
    try:
        yield log
    finally:
        sys.stdout, sys.stderr = before


def log_to(path: Path) -> None:
    """Log the command's output in this file too, with what was printed so far. Outside of `kept_output` nothing."""
    if isinstance(sys.stdout, Output):
        sys.stdout.log.begin(path)


def log_only(text: str) -> None:
    """Write to the command's log what another process shows."""
    if isinstance(sys.stdout, Output):
        sys.stdout.log.write(text)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Inside it SIGTERM and SIGHUP raise Interrupted, so that what has begun is taken back."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for signum in ENDING_SIGNALS:
            if signal.getsignal(signum) == signal.SIG_DFL:  # nohup lets SIGHUP be ignored
                previous[signum] = signal.signal(signum, _interrupt)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def progress(name: str, work: int | Iterable[Any]) -> tqdm:
    """A progress bar over a number of steps or an iterable, shown by rank 0 only and only on a terminal."""
    count, iterable = (work, None) if isinstance(work, int) else (None, work)
    return tqdm(iterable, desc=name, total=count, leave=False, disable=None if _rank() == "0" else True)


def user_error(error: Exception) -> Ending:
    """The ending of a command after an error that the user can fix: one line, and the error's exit code or 2."""
    return Ending(getattr(error, "exit_code", 2), f"error: {' '.join(str(error).split())}")


def guard_stop(stop: Exception) -> Ending:
    """The ending of a run that its guard has stopped: one line of the first process, and the exit code 3."""
    return Ending(3, f"stopped: {stop}" if _rank() == "0" else "")


def interrupted(interrupt: KeyboardInterrupt) -> Ending:
    """The ending of a command after a signal, Ctrl+C unless the exception has another `signum`."""
    return Ending(128 + getattr(interrupt, "signum", signal.SIGINT), "interrupted")


def print_error(error: Exception) -> int:
    """Prints an error that the user can fix as one line on stderr, and returns its exit code, by default 2."""
    return print_ending(user_error(error))


def print_ending(ending: Ending) -> int:
    """Prints a command's last message on stderr, and returns the exit code."""
    if ending.message:
        rank = _rank()
        prefix = "" if rank == "0" else f"process {rank}: "
        print(prefix + ending.message.rstrip(), file=sys.stderr)
    return ending.code


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with its exit code, or with a traceback and code 1."""
    with kept_output(), ending_signals():
        try:
            code = main()
        except KeyboardInterrupt as interrupt:
            code = print_ending(interrupted(interrupt))
        except Exception:
            traceback.print_exc()
            code = 1
        end_process(code)


def end_process(code: int) -> NoReturn:
    """Ends the process with an exit code, after the functions registered with atexit, or at once on a signal.

    Python's normal exit would abort it if a thread of a reward is still inside torch, as after an interrupt.
    """
    for signum in (signal.SIGINT, *ENDING_SIGNALS):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: os._exit(code))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


def _rank() -> str:
    return os.environ.get("RANK", "0")
