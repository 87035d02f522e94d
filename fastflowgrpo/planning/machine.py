"""The machine that a run starts on: its cores, what other processes take of them, and its free memory."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

MEASURED_SECONDS = 0.2  # at least, since the system counts a CPU's time in hundredths of a second


def core_count(root: Path = Path("/")) -> int:
    """Return the physical cores that this process may use, by its affinity and by the quotas of its control groups.

    Args:
        root: folder that holds /proc and /sys.
    """
    cpus = _cpus()
    siblings = {_read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    cores = min(psutil.cpu_count(logical=False) or len(cpus), len(cpus)) if "" in siblings else len(siblings)
    return max(1, int(min([cores, *_cpu_quotas(root)])))


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that new processes may use, by the machine's free memory and the limits of the control groups.

    Args:
        root: folder that holds /proc and /sys.
    """
    return int(min([psutil.virtual_memory().available, *_memory_left(root)]))


class OtherLoad:
    """Measures the load by other processes, from its making until `cores` is called."""

    def __init__(self) -> None:
        self.begun = self._times()

    def cores(self) -> float:
        """Return how many cores the other processes have used on average, of the CPUs that this process may use."""
        time.sleep(max(0, self.begun[0] + MEASURED_SECONDS - time.monotonic()))
        seconds, busy, own = (now - before for now, before in zip(self._times(), self.begun, strict=True))
        return max(0.0, (busy - own) / seconds)

    @staticmethod
    def _times() -> tuple[float, float, float]:
        """Return seconds: the clock, the time that the CPUs have worked, and this process's share of it."""
        allowed = _cpus()
        cpus = [times for cpu, times in enumerate(psutil.cpu_times(percpu=True)) if cpu in allowed]
        idle = ("idle", "iowait", "guest", "guest_nice")  # user and nice have the guests' times too
        busy = sum(value for times in cpus for name, value in times._asdict().items() if name not in idle)
        return time.monotonic(), busy, sum(os.times()[:4])


def _cpus() -> set[int]:
    """Return the logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _control_groups(root, "cpu"):
        quota = _read(group / "cpu.max").split() or [
            _read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")
        ]
        if quota[0].isdecimal():
            yield int(quota[0]) / int(quota[1])


def _memory_left(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group with a limit leaves; cached files give way to processes."""
    for group in _control_groups(root, "memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if _read(group / limit).isdecimal():
                statistics = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                yield int(_read(group / limit)) - int(_read(group / used)) + int(statistics.get(cached, 0))


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from the innermost to the root, of versions 1 and 2."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(",") and controllers:
            continue
        mount = mounts / controller if controllers else mounts
        group = mount / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(mount))


def _read(path: Path) -> str:
    """Return a file's text without blanks around it; "" if there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
