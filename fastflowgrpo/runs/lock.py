"""The lock on a run's folder: one process at a time writes it.

The owner is written into the file `.lock` of the folder, and is alive as long as its process is. A process on another
machine, or in another container, cannot be looked up. So an owner also touches the file every BEAT seconds, and a
starter that cannot look it up waits until the file changes (the owner is alive) or LIMIT seconds have passed. No clocks
are compared. The kernel's lock on the file (flock) guards each reading and writing; NFS has it too. Where a disk has no
such lock, or does not share it between machines, the owner finds at its next `confirm` that it has been replaced.
"""

import atexit
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastflowgrpo.errors import TemporaryError, UserError
from fastflowgrpo.runs.files import LOCK, writing

BEAT = 5.0  # seconds between two touches of the file
LIMIT = 60.0  # seconds without a touch after which an owner elsewhere counts as dead
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """The lock of this process on a folder; a process may take its own lock again.

    Args:
        folder: of the run; made if it is not there.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / LOCK
        self.owner: dict[str, Any] = {**_this_process(), "id": uuid4().hex}
        self.made_folder = False
        self.stop_beating = threading.Event()

    def acquire(self) -> None:
        """Take the lock, from a dead owner too, and keep it until `close` or the end of the process.

        Raises:
            TemporaryError: a living process has it.
            UserError: the folder cannot be written.
        """
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise UserError(f"output_dir {self.path.parent} is a file")
        with writing(self.path):
            self.made_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._wait_for_beats(self._take())
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        atexit.register(self.close)

    def confirm(self) -> None:
        """Check that this process still has the lock.

        Raises:
            UserError: another process has it, because this one was stopped or its machine out of reach for a while, or
                the folder was removed.
        """
        folder = self.path.parent
        with writing(self.path):
            if not self.path.exists():
                raise UserError(f"output_dir {folder} was removed or moved while the run wrote to it")
            owner = _read(self.path)
        if owner != self.owner:
            raise UserError(f"output_dir {folder} was taken over by {_name(owner)}: this run must not write to it")

    def regain(self) -> bool:
        """Whether this process has the lock; takes it again where it was removed with the folder."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _guarded(self.path):
                owner = _read(self.path)
                if owner is None:
                    self._write()
        return owner in (None, self.owner)

    def close(self) -> None:
        """Give the lock back if this process still has it; leaves no folder behind that only the lock has made."""
        self.stop_beating.set()
        atexit.unregister(self.close)
        if self.owner["pid"] != os.getpid():  # a fork of the owner
            return
        with suppress(OSError), _guarded(self.path, create=False):
            if _read(self.path) == self.owner:
                self.path.unlink()
        if self.made_folder:
            with suppress(OSError):
                self.path.parent.rmdir()

    def _take(self) -> dict[str, Any] | None:
        """Write this process into the file unless its owner may be alive; then return that owner."""
        with _guarded(self.path):
            owner = _read(self.path)
            if owner and _is_alive(owner):
                return owner
            self._write()
        return None

    def _write(self) -> None:
        self.path.write_text(json.dumps(self.owner))

    def _wait_for_beats(self, owner: dict[str, Any] | None) -> None:
        """Take the lock from an owner elsewhere that has stopped beating; refuse where it beats or is alive here."""
        seen, deadline = None, time.monotonic() + LIMIT
        while owner:
            beat = self.path.stat().st_mtime_ns
            if _is_here(owner) or seen not in (None, beat):
                raise TemporaryError(
                    f"output_dir {self.path.parent} is in use by {_name(owner)}: give another output_dir, or wait "
                    "until that run has ended"
                )
            if seen is None:
                print(f"{self.path}: waiting up to {LIMIT:.0f} s to see whether {_name(owner)} is alive")
            seen = beat
            if time.monotonic() >= deadline:
                with _guarded(self.path):
                    if _read(self.path) == owner and self.path.stat().st_mtime_ns == seen:
                        return self._write()
            time.sleep(BEAT / 5)
            owner = self._take()
        return None

    def _beat(self) -> None:
        while not self.stop_beating.wait(BEAT):
            # A disk that is away for a while is not this thread's business: what writes to it says so.
            with suppress(OSError):
                os.utime(self.path)


@contextmanager
def _guarded(path: Path, create: bool = True) -> Iterator[None]:
    """Inside it no other process reads or writes the file at `path` through this function."""
    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
            # The last owner may have removed the file meanwhile.
            try:
                current = os.path.samestat(os.fstat(descriptor), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:
                yield
                return
        finally:
            os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    """The owner in the file; None if it has none yet, or not a whole one: its writer died."""
    try:
        owner = json.loads(path.read_text())
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= {"host", "pid", "start", "place", "id"} else None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "start": _start(pid), "place": _place()}


def _place() -> str | None:
    """What processes have in common that see each other's numbers: the machine's boot and the namespace of pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None if it is not there any more, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_here(owner: dict[str, Any]) -> bool:
    return owner["place"] is not None and owner["place"] == _place()


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether an owner may be alive and is not this process."""
    if not _is_here(owner):
        return True
    return owner["pid"] != os.getpid() and _start(owner["pid"]) == owner["start"]


def _name(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner['pid']} on {owner['host']}"
