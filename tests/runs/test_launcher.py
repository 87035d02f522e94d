"""Processes that the command starts by itself: their errors, signals and ends."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from support import launched
from support.forks import FORK

from fastflowgrpo.planning import machine, processes
from fastflowgrpo.runs import checkpoints, launcher
from fastflowgrpo.train import main

pytestmark = pytest.mark.xdist_group("resume")

TIMEOUT = 120  # seconds


def start(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def end(process):
    process.join(TIMEOUT)
    return process.exitcode


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launch(folder, work, grace=30.0):
    return start(launched.launch, work, str(folder), grace)


def pids(folder):
    """Those of both processes, once they are at work."""
    files = [folder / "rank0", folder / "rank1"]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_the_processes_find_each_other(tmp_path):
    assert end(launch(tmp_path, "meet")) == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 3 0", "2 3 1"]
    assert (tmp_path / "log").read_text() == ""


def test_the_first_error_is_printed_once(tmp_path):
    assert end(launch(tmp_path, "fail_first")) == 2
    assert (tmp_path / "log").read_text() == "error: rollout.height 50 is not a positive multiple of 16\n"


def test_a_bug_keeps_its_traceback(tmp_path):
    assert end(launch(tmp_path, "raise_bug")) == 1
    assert (tmp_path / "log").read_text().endswith("x" * 100 + "\n")


def test_a_killed_process_ends_the_run(tmp_path):
    assert end(launch(tmp_path, "lose_one", grace=0.2)) == 1
    assert (tmp_path / "log").read_text() == (
        "error: process 1 was ended by SIGKILL; if memory ran out, lower num_processes or rollout.batch_size\n"
    )
    assert not psutil.pid_exists(int((tmp_path / "rank0").read_text()))


def test_a_process_that_keeps_the_other_one_waiting_is_named(tmp_path):
    assert end(launch(tmp_path, "wait_for_one")) == 0
    named = (
        r'waiting for other processes for \d s: process 1 \(\d+ on .+\) has been in the phase "rollout, batch 2" for'
    )
    assert re.search(named, (tmp_path / "log").read_text())
    assert not (tmp_path / ".heartbeat").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once(tmp_path, signum):
    process = launch(tmp_path, "count_signals")
    pids(tmp_path)
    os.kill(process.pid, signum)
    assert end(process) == 128 + signum
    assert [(tmp_path / f"signals{rank}").read_text() for rank in (0, 1)] == [str(int(signum))] * 2
    assert (tmp_path / "log").read_text() == "interrupted\n"


def test_a_signal_at_the_end_of_the_work_leaves_it_a_success(tmp_path):
    (tmp_path / "finished").touch()
    process = launch(tmp_path, "count_signals")
    pids(tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 0


def test_the_processes_stop_and_go_on_with_the_launcher_and_end_when_it_is_killed(tmp_path):
    process = launch(tmp_path, "sleep")
    members = [psutil.Process(pid) for pid in pids(tmp_path)]
    both = [*members, psutil.Process(process.pid)]
    os.kill(process.pid, signal.SIGTSTP)
    until(lambda: all(member.status() == psutil.STATUS_STOPPED for member in both))
    os.kill(process.pid, signal.SIGCONT)
    until(lambda: not any(member.status() == psutil.STATUS_STOPPED for member in both))
    process.kill()
    assert end(process) == -signal.SIGKILL
    until(lambda: not any(member.is_running() for member in members))


def rows(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_command_trains_in_processes_and_one_process_goes_on(tiny_sd3_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs")
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (
        f"--model {tiny_sd3_folder} --prompts.train {tmp_path}/prompts.txt --output_dir {run} --resume latest "
        "--policy.max_sequence_length 8 --policy.lora_rank 4 --prompts.per_epoch 4 --rollout.group_size 4 "
        "--rollout.batch_size 4 --rollout.num_steps 4 --rollout.window_size 2 --rollout.window_start [0,2] "
        "--evaluation.num_steps 2 --evaluation.images_per_prompt 1 --trackers []"
    ).split()
    arguments += ["--rewards", '{"jpeg_compressibility": 1}', "--num_processes", "2"]
    process = start(launched.command, [*arguments, "--epochs", "1000"], str(log))
    until(lambda: len(rows(run)) > 3 or not process.is_alive())
    os.kill(process.pid, signal.SIGINT)
    assert end(process) == 130, log.read_text()
    printed = log.read_text()
    assert printed.count(", 2 processes\n") == len(re.findall(r"epoch +1/1000 ", printed)) == 1
    assert printed.count("SIGINT: saving, then ending\n") == printed.count("--resume latest\ninterrupted\n") == 1
    assert "Traceback" not in printed
    last = json.loads((checkpoints.list_checkpoints(run)[-1] / "manifest.json").read_text())["epoch"]
    assert [row["epoch"] for row in rows(run) if "epoch" in row] == list(range(last))
    assert main([*arguments, "--epochs", str(last + 1)]) == 0
    assert f"epoch {last + 1}/{last + 1}" in capsys.readouterr().out
    assert end(start(launched.command, [*arguments, "--epochs", str(last)], str(log))) == 2
    assert log.read_text().splitlines()[-1].startswith(f"error: epochs: must be at least the {last + 1} that ")
    assert log.read_text().count("error: ") == 1


@pytest.fixture
def chosen(monkeypatch):
    """The command's number of processes on a machine, and each one's threads by the environment."""

    def choose(*arguments, cores=4, others=0.0, memory=2**40, **environment):
        monkeypatch.setattr(processes, "estimate", lambda config, count: SimpleNamespace(total_memory=lambda _: 2**30))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(machine, "core_count", lambda: cores)
        monkeypatch.setattr(machine, "free_memory", lambda: memory)
        monkeypatch.setattr(machine.OtherLoad, "cores", lambda load: others)
        for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
        monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.append(number))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        threads, counts = [cores], []

        def ends(work, count):
            counts.append(count)
            return launcher.Ending(0)

        monkeypatch.setattr(launcher, "launch", ends)
        monkeypatch.setattr("fastflowgrpo.train.train", lambda config: ends(None, 1))
        code = main(arguments, may_launch=True)
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
        return counts[0] if counts else code, threads[-1], os.environ.get("OMP_NUM_THREADS")

    return choose


@pytest.mark.parametrize(
    ("arguments", "machine_has", "expected"),
    [
        ((), {}, (4, 1, "1")),
        ((), {"cores": 1}, (1, 1, None)),
        ((), {"cores": 64}, (12, 5, "5")),  # as many as an update has groups
        ((), {"memory": 2**30}, (1, 4, None)),
        ((), {"others": 1.4}, (3, 1, "1")),
        ((), {"others": 4.0}, (3, 1, "1")),
        (("--num_processes", "1"), {}, (1, 4, None)),
        (("--num_processes", "1"), {"others": 1.0}, (1, 3, None)),
        (("--num_processes", "3"), {"others": 4.0}, (3, 1, "1")),
        ((), {"OMP_NUM_THREADS": "2"}, (2, 4, "2")),  # PyTorch reads the environment itself
        ((), {"OMP_NUM_THREADS": "8"}, (1, 4, "8")),
        ((), {"WORLD_SIZE": "2"}, (1, 4, None)),  # torchrun has started this one
        (("--num_processes", "2"), {"WORLD_SIZE": "2"}, (1, 4, None)),
    ],
)
def test_processes_and_threads(chosen, capsys, arguments, machine_has, expected):
    assert chosen(*arguments, **machine_has) == expected
    cores, others = machine_has.get("cores", 4), machine_has.get("others", 0)
    said = f"other processes take {others:.1f} of {cores} cores\n" if others else ""
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--num_processes", "13"), {}, "fewer than the 13 processes"),
        (("--num_processes", "4"), {"WORLD_SIZE": "2"}, "num_processes: is 4, but"),
    ],
)
def test_a_wrong_number_starts_nothing(chosen, capsys, arguments, environment, message):
    assert chosen(*arguments, **environment)[0] == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
