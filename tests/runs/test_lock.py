"""The lock on a run's folder: who has it, who is refused, and when it changes hands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastflowgrpo.errors import TemporaryError, UserError
from fastflowgrpo.runs import lock
from fastflowgrpo.runs.lock import RunLock

STARTER = """
import sys
from fastflowgrpo.errors import TemporaryError
from fastflowgrpo.runs.lock import RunLock
lock = RunLock(sys.argv[1])
sys.stdin.readline()
try:
    lock.acquire()
    print("mine", flush=True)
except TemporaryError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other():
    """Another process that lives until the test's end."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def owned_by(folder: Path, pid: int, **changes) -> dict:
    """Write the lock of a process into a folder."""
    owner = {**RunLock(folder).owner, "pid": pid, "start": lock._start(pid), **changes}
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(json.dumps(owner))
    return owner


@pytest.mark.parametrize("before", [None, "dead", "{"], ids=["nothing", "a dead owner", "half a file"])
def test_of_ten_starters_one_gets_the_lock_and_the_others_name_it(tmp_path, before):
    folder = tmp_path / "run"
    if before == "dead":
        owned_by(folder, os.getpid(), start="1")
    elif before:
        folder.mkdir()
        (folder / ".lock").write_text(before)
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(10)
    ]
    for starter in starters:
        starter.stdin.write("\n")
        starter.stdin.flush()
    answers = [starter.stdout.readline().strip() for starter in starters]
    (winner,) = [starter for starter, answer in zip(starters, answers, strict=True) if answer == "mine"]
    refused = [answer for answer in answers if answer != "mine"]
    assert len(refused) == 9
    assert all(answer.startswith(f"output_dir {folder} is in use by process {winner.pid} on ") for answer in refused)
    for starter in starters:
        starter.communicate()
    assert not folder.exists() if before is None else list(folder.iterdir()) == []


def test_the_owner_keeps_the_lock_until_it_closes(tmp_path, other):
    folder = tmp_path / "run"
    mine = RunLock(folder)
    mine.acquire()
    mine.confirm()
    RunLock(folder).acquire()  # a process may take its own lock again
    with pytest.raises(UserError, match="was taken over by process"):
        mine.confirm()
    owner = owned_by(folder, other.pid)
    mine.close()
    assert json.loads((folder / ".lock").read_text()) == owner
    with pytest.raises(TemporaryError, match=rf"is in use by process {other.pid} on .*: give another output_dir"):
        RunLock(folder).acquire()
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(TemporaryError):
        RunLock(folder).acquire()
    other.kill()
    until(lambda: lock._start(other.pid) is None)  # a zombie: nobody has waited for it
    again = RunLock(folder)
    again.acquire()
    again.close()
    assert list(folder.iterdir()) == []


def test_a_process_with_the_number_of_the_owner_is_another_one(tmp_path, other):
    owned_by(tmp_path, other.pid, start="1")
    RunLock(tmp_path).acquire()


def test_an_owner_elsewhere_is_watched(tmp_path, other, monkeypatch, capsys):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "LIMIT", 0.4)
    owned_by(tmp_path, other.pid, place="another machine")
    # It beats as every owner does.
    alive = RunLock(tmp_path)
    alive.acquire()
    owned_by(tmp_path, other.pid, place="another machine")
    with pytest.raises(TemporaryError, match=f"is in use by process {other.pid}"):
        RunLock(tmp_path).acquire()
    alive.stop_beating.set()
    time.sleep(0.1)
    begin = time.monotonic()
    mine = RunLock(tmp_path)
    mine.acquire()
    assert time.monotonic() - begin >= 0.4
    mine.confirm()
    assert "waiting up to 0 s to see whether process" in capsys.readouterr().out


def test_where_the_kernel_has_no_file_locks_the_lock_still_works(tmp_path, other, monkeypatch):
    def flock(*_):
        raise OSError(lock.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    owned_by(tmp_path, other.pid)
    with pytest.raises(TemporaryError):
        RunLock(tmp_path).acquire()
    (tmp_path / ".lock").unlink()
    RunLock(tmp_path).acquire()


def test_a_folder_that_was_removed_is_noticed_and_can_be_regained(tmp_path, other):
    folder = tmp_path / "run"
    mine = RunLock(folder)
    mine.acquire()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"output_dir {folder} was removed or moved"):
        mine.confirm()
    assert mine.regain()
    mine.confirm()
    owned_by(folder, other.pid)
    assert not mine.regain()


def test_a_folder_that_is_none_or_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_dir {tmp_path}/file is a file"):
        RunLock(tmp_path / "file").acquire()
    with pytest.raises(UserError, match=f"{tmp_path}/file/run/.lock cannot be written: Not a directory"):
        RunLock(tmp_path / "file/run").acquire()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
