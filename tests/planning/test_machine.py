"""What a machine has, read from files as Linux has them."""

import os
import time
from types import SimpleNamespace

import psutil
import pytest

from fastflowgrpo.planning import machine


def tree(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    return root


def siblings(*cores):
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": ",".join(map(str, core))
        for core in cores
        for cpu in core
    }


V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/"}
V2 = {"proc/self/cgroup": "0::/job/step"}
TWO_THREADS_PER_CORE = siblings((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("cpus", "files", "cores"),
    [
        (range(8), TWO_THREADS_PER_CORE, 4),
        ({0, 4}, TWO_THREADS_PER_CORE, 1),
        ({0, 1, 5}, TWO_THREADS_PER_CORE, 2),
        (range(8), {}, 4),  # no topology: psutil's count
        ({0, 3}, {}, 2),  # which does not know of the affinity
        (range(8), TWO_THREADS_PER_CORE | V2 | {"sys/fs/cgroup/job/step/cpu.max": "max 100000"}, 4),
        (range(8), TWO_THREADS_PER_CORE | V2 | {"sys/fs/cgroup/job/step/cpu.max": "250000 100000"}, 2),
        (range(8), TWO_THREADS_PER_CORE | V2 | {"sys/fs/cgroup/job/cpu.max": "300000 100000"}, 3),
        (range(8), TWO_THREADS_PER_CORE | V2 | {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # as in a container
        (
            range(8),
            TWO_THREADS_PER_CORE
            | V1
            | {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            2,
        ),
        (range(8), TWO_THREADS_PER_CORE | V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, 4),
    ],
)
def test_physical_cores_within_affinity_and_quota(tmp_path, monkeypatch, cpus, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cpus))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    assert machine.core_count(tree(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000),
        (V2 | {"sys/fs/cgroup/job/step/memory.max": "max"}, 1000),
        (V2 | {"sys/fs/cgroup/job/memory.max": "900", "sys/fs/cgroup/job/memory.current": "800"}, 100),
        (
            V2
            | {
                "sys/fs/cgroup/job/memory.max": "900",
                "sys/fs/cgroup/job/memory.current": "800",
                "sys/fs/cgroup/job/memory.stat": "anon 500\ninactive_file 250",
            },
            350,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "700",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "300",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 20",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            },
            420,
        ),
    ],
)
def test_free_memory_within_the_control_group(tmp_path, monkeypatch, files, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert machine.free_memory(tree(tmp_path, files)) == free


def test_the_load_by_other_processes_leaves_out_this_one_and_forbidden_cpus(monkeypatch):
    class Times(SimpleNamespace):
        def _asdict(self):
            return vars(self)

    clock = {"seconds": 10.0, "user": 50.0, "own": 7.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["seconds"])
    monkeypatch.setattr(os, "times", lambda: (clock["own"], 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(
        psutil,
        "cpu_times",
        lambda percpu: [Times(user=clock["user"], idle=3 * clock["seconds"], guest=clock["user"])] * 4,
    )
    load = machine.OtherLoad()
    clock.update(seconds=20.0, user=58.0, own=12.0)  # two CPUs worked 8 of 10 seconds each, 5 of them for this process
    assert load.cores() == pytest.approx(1.1)
    clock.update(own=40.0)
    assert load.cores() == 0
