"""Output that outlives its reader, the log file, and what ends a command."""

import io
import os
import signal
import subprocess
import sys
import threading

import pytest

from fastflowgrpo.console import Interrupted, ending_signals, interrupted, kept_output, log_to, print_ending

COMMAND = """
import sys
from pathlib import Path
from fastflowgrpo.console import log_to, run_and_exit

def main():
    print("before")
    log_to(Path(sys.argv[1]))
    print("after", flush=True)
    sys.stdin.readline()
    print("nobody reads this", flush=True)
    print("nor this", file=sys.stderr, flush=True)
    if sys.argv[2] == "raise":
        raise KeyError("lost")
    return 0

run_and_exit(main)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 1)])
def test_a_command_whose_pipes_are_closed_goes_on_and_logs(tmp_path, how, code):
    log = tmp_path / "log.txt"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(log), how], text=True, **pipes)
    assert [process.stdout.readline(), process.stdout.readline()] == ["before\n", "after\n"]
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait() == code
    started, *lines = log.read_text().splitlines()
    assert started.startswith("--- ") and started.endswith(f" process {process.pid}: -c {log} {how}")
    assert lines[:3] == ["before", "after", "nobody reads this"]
    assert "nor this" in lines
    gone = "the output can be written no more, and goes on here alone: [Errno 32] Broken pipe"
    assert lines.count(gone) == 2  # once for each stream
    assert ("KeyError: 'lost'" in lines) == ("Traceback (most recent call last):" in lines) == (how == "raise")


def test_the_log_has_all_but_progress_bars_and_its_loss_ends_nothing(tmp_path, monkeypatch):
    streams = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", None)  # closed from the beginning
    with kept_output():
        print("early", file=sys.stderr)
        log_to(tmp_path / "log.txt")
        sys.stdout.write("\rrollout: 10 %")
        log_to(tmp_path / "none" / "log.txt")
        print("shown only")
        assert not sys.stderr.isatty()
    assert (sys.stdout, sys.stderr) == (streams[0], None)
    assert streams[0].getvalue() == "\rrollout: 10 %shown only\n"
    assert (tmp_path / "log.txt").read_text().splitlines()[1:] == ["early"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_a_command_and_gives_its_exit_code(signum, capsys):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as raised, ending_signals():
        signal.raise_signal(signum)
    assert print_ending(interrupted(raised.value)) == 128 + signum
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signum) == before


def test_a_signal_that_is_ignored_stays_ignored_and_threads_do_not_mind():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    entered = []

    def enter():
        with ending_signals():
            entered.append(os.getpid())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


@pytest.mark.parametrize("code", [0, 3])
def test_a_signal_at_the_very_end_does_not_change_the_exit_code(code):
    script = f"""
import atexit, signal
from fastflowgrpo.console import run_and_exit
atexit.register(lambda: print("not reached"))
atexit.register(signal.raise_signal, signal.SIGTERM)
run_and_exit(lambda: {code})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")
