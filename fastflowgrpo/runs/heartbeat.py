"""Who keeps a run's processes waiting: each writes where it is into a file, and who waits for long reads the others'.

A process that hangs cannot answer, and one that waits in a collective call cannot ask. So a thread of each process
writes `Processes.position` into the folder `.heartbeat` of the run, and watches how long its own process has waited.
No clocks are compared: a file holds durations, and the number of its writing says whether its writer is alive.
"""

import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastflowgrpo.distributed import Processes
from fastflowgrpo.runs.files import HEARTBEAT

LONGEST_INTERVAL = 15.0  # seconds between two writings


class Heartbeat:
    """Writes where this process is, and prints for whom it waits. With one process or no limit it does nothing.

    Args:
        folder: of the run, on a disk that all machines share.
        processes: of the run.
        limit: seconds of waiting until the first message; each later one comes after twice the time.
    """

    def __init__(self, folder: str | Path, processes: Processes, limit: float | None):
        self.folder, self.processes, self.limit = Path(folder) / HEARTBEAT, processes, limit or 0.0
        self.interval = min(self.limit / 4, LONGEST_INTERVAL)
        self.file = self.folder / str(processes.rank)
        self.writings = 0
        self.seen: dict[int, tuple[int, float]] = {}
        """The number of each other process's last writing, and when this one first read it."""
        self.closed = threading.Event()

    def start(self) -> None:
        """Write and watch from now on, until `close`."""
        if self.processes.count > 1 and self.limit:
            with suppress(OSError):
                self.folder.mkdir(exist_ok=True)
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """End it; rank 0 removes the files of all."""
        self.closed.set()
        if self.processes.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        message_at, waits_since = self.limit, None
        while True:
            self._write()
            if self.closed.wait(self.interval):
                return
            position = self.processes.position
            if position.waits_since is None or position.waits_since != waits_since:
                message_at, waits_since, self.seen = self.limit, position.waits_since, {}
            if waits_since is not None:
                others = self._read_others()
                waited = time.monotonic() - waits_since
                if waited >= message_at:
                    message_at *= 2
                    self._say(waited, position.meetings, others)

    def _write(self) -> None:
        """Write where this process is. A disk that is away for a while is not this thread's business."""
        position, self.writings = self.processes.position, self.writings + 1
        state = {
            "phase": position.phase,
            "seconds": time.monotonic() - position.since,
            "meetings": position.meetings,
            "writings": self.writings,
            "process": f"{os.getpid()} on {socket.gethostname()}",
        }
        temporary = self.file.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(state))
            temporary.replace(self.file)

    def _read_others(self) -> dict[int, dict[str, Any] | None]:
        """What the other processes have written last, by rank; None if nothing can be read."""
        found: dict[int, dict[str, Any] | None] = {}
        for rank in set(range(self.processes.count)) - {self.processes.rank}:
            try:
                state = found[rank] = json.loads((self.folder / str(rank)).read_text())
            except (OSError, ValueError):
                found[rank] = None
                continue
            if self.seen.get(rank, (None,))[0] != state["writings"]:
                self.seen[rank] = state["writings"], time.monotonic()
        return found

    def _say(self, waited: float, meetings: int, others: dict[int, dict[str, Any] | None]) -> None:
        """Print which processes have not come; of those that wait, the one of the lowest rank does it."""
        missing = {rank: state for rank, state in others.items() if state is None or state["meetings"] < meetings}
        if any(rank < self.processes.rank for rank in others.keys() - missing.keys()):
            return
        if missing:
            reasons = "; ".join(f"process {rank} {self._describe(rank, state)}" for rank, state in missing.items())
        else:
            reasons = "all of them wait, so the network or a GPU hangs"
        tqdm.write(f"waiting for other processes for {waited:.0f} s: {reasons}")

    def _describe(self, rank: int, state: dict[str, Any] | None) -> str:
        if state is None:
            return f"has written nothing that can be read into {self.folder}"
        where = f'({state["process"]}) has been in the phase "{state["phase"]}" for'
        silent = time.monotonic() - self.seen[rank][1]
        if silent > 2.5 * self.interval:
            return f"{where} {state['seconds'] + silent:.0f} s, and has given no sign of life for {silent:.0f} s"
        return f"{where} {state['seconds'] + silent:.0f} s"
