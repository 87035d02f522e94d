"""The table of faults: each case starts runs, and says how they ended or raises AssertionError."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.faults import rewards
from benchmarks.faults.injection import ON_MAIN, PHASES
from benchmarks.faults.runs import Ended, Fault, Run, command, remains, result
from fastflowgrpo.config import parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.runs.checkpoints import list_checkpoints
from fastflowgrpo.runs.files import LOCK
from fastflowgrpo.runs.lock import RunLock
from fastflowgrpo.runs.resume import find_checkpoint

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSTOP)


class Place:
    """The folder of all cases, and the unbroken runs that they are compared with."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw, self.count = folder, random.Random(seed), 0

    def new(self) -> Path:
        """A run's folder that is not there yet."""
        self.count += 1
        return self.folder / f"run{self.count}"

    def unbroken(self, ranks: int) -> Path:
        """The folder of a run that nothing happened to."""
        return self._unbroken[ranks][0]

    def seconds(self, ranks: int) -> float:
        """How long that run took."""
        return self._unbroken[ranks][1]

    @cached_property
    def _unbroken(self) -> dict[int, tuple[Path, float]]:
        found = {}
        for ranks in (1, 2):
            folder, begin = self.new(), time.monotonic()
            ended = Run(folder, ranks=ranks).end()
            assert ended.codes == [0] * ranks, ended.log
            found[ranks] = folder, time.monotonic() - begin
        return found


@dataclass(frozen=True)
class Case:
    """One fault, and what is expected of it."""

    group: str
    name: str
    expected: str
    run: Callable[[Place], str]
    """Returns how it ended; AssertionError if it is not as expected."""


def check(condition: bool, message: str, ended: Ended | None = None) -> None:
    """Raise AssertionError with a message, and with the end of what a run printed."""
    if not condition:
        raise AssertionError(f"{message}{f'; exit {ended.codes}: {ended.log[-1500:]}' if ended else ''}")


def check_clean(ended: Ended, folder: Path) -> None:
    """A run that has ended by itself leaves nothing behind."""
    left = [*ended.left, *remains(folder)]
    check(not left, f"left behind: {left}", ended)


def resume_and_compare(place: Place, folder: Path, ranks: int, settings: dict[str, Any] | None = None) -> None:
    """Run the same command again: it ends well, and equals the unbroken run bit for bit."""
    ended = Run(folder, settings, ranks).end()
    check(ended.codes == [0] * ranks, "the resumed run failed", ended)
    check_clean(ended, folder)
    check(result(folder) == result(place.unbroken(ranks)), "the resumed run differs from the unbroken one", ended)


def signal_cases() -> Iterator[Case]:
    """Every signal in every phase, with one and two ranks."""
    expected = {
        signal.SIGKILL: "killed; resumed: the same bits",
        signal.SIGSTOP: "goes on when continued: exit 0, the same bits",
    }
    for ranks in (1, 2):
        for phase in PHASES:
            for signum in SIGNALS:
                code = 128 + signum
                name = f"{signal.Signals(signum).name} in {phase}, {ranks} rank{'s'[: ranks - 1]}"
                ends = expected.get(signum, f"exit {code}; resumed: the same bits")
                ends = "exit 0, the same bits" if phase == "exit" and signum != signal.SIGKILL else ends
                yield Case("signals", name, ends, _signal_case(ranks, phase, signum))


def _signal_case(ranks: int, phase: str, signum: int) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        rank = 0 if phase in ON_MAIN else ranks - 1
        mark = folder.with_suffix(".mark")

        def meanwhile(run: Run) -> None:
            if mark.exists():
                mark.unlink()
                if signum == signal.SIGSTOP:
                    time.sleep(0.5)
                    run.send(signal.SIGCONT)
                elif signum != signal.SIGKILL:  # a scheduler sends it to all ranks
                    for other in set(range(ranks)) - {rank}:
                        run.send_to(other, signum)

        ended = Run(folder, ranks=ranks, faults=[Fault("send", (phase, signum, str(mark)), rank)]).end(meanwhile)
        check("hangs" not in ended.log, "hangs", ended)
        if signum == signal.SIGKILL:
            check(ended.codes[rank] == -signum, "was not killed", ended)
            check(not ended.left, f"left behind: {ended.left}", ended)
        else:
            codes = {0} if signum == signal.SIGSTOP or phase == "exit" else {128 + signum}
            check(set(ended.codes) == codes, f"exit {codes} expected", ended)
            check_clean(ended, folder)
        resume_and_compare(place, folder, ranks)
        return f"exit {ended.codes[rank]}"

    return run


def launcher_cases() -> Iterator[Case]:
    """The command that starts two processes itself, and gets a signal."""
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        how = "killed" if signum == signal.SIGKILL else f"exit {128 + signum}"
        name = f"{signal.Signals(signum).name} to the command that has started 2 processes"
        yield Case("launcher", name, f"{how}, no process is left; resumed: the same bits", _launcher_case(signum))


def _launcher_case(signum: int) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        sent: list[int] = []

        def meanwhile(run: Run) -> None:
            metrics = folder / "metrics.jsonl"
            if not sent and metrics.exists() and metrics.read_text().count("\n") > 3:
                sent.append(signum)
                run.send(signum)

        ended = Run(folder, ranks=2, launcher=True).end(meanwhile)
        check(ended.codes == [-signum if signum == signal.SIGKILL else 128 + signum], "ended otherwise", ended)
        check_clean(ended, folder)
        again = Run(folder, ranks=2, launcher=True).end()
        check(again.codes == [0], "the resumed run failed", again)
        check(result(folder) == result(place.unbroken(2)), "the resumed run differs from the unbroken one", again)
        return f"exit {ended.code}"

    return run


def kill_cases(chains: int = 25, kills: int = 4) -> Iterator[Case]:
    """Kills at random moments, several in a row: half of them where a file is touched, half at any time."""
    for number in range(chains):
        ranks = 2 if number % 5 == 4 else 1
        for kill in range(kills):
            name = f"kill {kill + 1} of {kills} of run {number + 1}, {ranks} rank{'s'[: ranks - 1]}"
            last = kill == kills - 1
            yield Case("random kills", name, "killed; resumed: the same bits", _kill_case(number, ranks, last))


def _kill_case(number: int, ranks: int, last: bool) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.folder / f"killed{number}"
        while True:
            ended, at = _killed(place, folder, ranks)
            check("Traceback" not in ended.log or ranks > 1, "a traceback", ended)
            check(not ended.left, f"left behind: {ended.left}", ended)
            if -signal.SIGKILL in ended.codes:
                break
            shutil.rmtree(folder)  # it was faster: from the beginning
        if last:
            resume_and_compare(place, folder, ranks)
        return f"killed {at}"

    return run


def _killed(place: Place, folder: Path, ranks: int) -> tuple[Ended, str]:
    """Start or resume a run, and kill it at a random moment, which is told."""
    rank = place.draw.randrange(ranks)
    if rank == 0 and place.draw.random() < 0.5:
        touch = place.draw.randrange(120)
        return Run(folder, ranks=ranks, faults=[Fault("kill_at_touch", (touch, str(folder)))]).end(), (
            f"at touch {touch} of a file"
        )
    seconds = place.draw.uniform(0.2, 0.9) * place.seconds(ranks)
    deadline = time.monotonic() + seconds

    def meanwhile(run: Run) -> None:
        if time.monotonic() >= deadline:
            run.send_to(rank, signal.SIGKILL)

    return Run(folder, ranks=ranks).end(meanwhile), f"after {seconds:.2f} s"


def byte_cases() -> Iterator[Case]:
    """Every kind of file of a checkpoint: flipped, cut, emptied, removed."""
    damages: dict[str, Callable[[Path, random.Random], object]] = {
        "a byte flipped": _flip,
        "cut in half": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "one byte too long": lambda path, _: path.write_bytes(path.read_bytes() + b" "),
        "empty": lambda path, _: path.write_bytes(b""),
        "removed": lambda path, _: path.unlink(),
    }
    files = (
        "manifest.json",
        "pytorch_lora_weights.safetensors",
        "raw/pytorch_lora_weights.safetensors",
        *(f"training/{name}.safetensors" for name in ("weights", "optimizer", "ema")),
        "training/rng.json",
        "training/metrics.jsonl",
    )
    for file in files:
        for name, damage in damages.items():
            if (file, name) == ("manifest.json", "one byte too long"):
                continue  # white space at the end of JSON harms nothing
            yield Case(
                "checkpoint", f"{file} {name}", "one line that names the file and the good one", _bytes(file, damage)
            )


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    # A white space of JSON may become another one.
    places = [i for i in range(len(content)) if not chr(content[i]).isspace()] if path.suffix == ".json" else None
    content[draw.choice(places) if places else draw.randrange(len(content))] ^= 1 << draw.randrange(5)
    path.write_bytes(content)


def _bytes(file: str, damage: Callable[[Path, random.Random], object]) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        shutil.copytree(place.unbroken(1), folder)
        before, last = list_checkpoints(folder)
        damage(last / file, place.draw)
        try:
            find_checkpoint(parse(command(folder, {})))
        except UserError as error:
            message = str(error)
            check(str(last) in message and file in message, f"does not name {file}: {message}")
            check(message.endswith(f"The one before it is good: --resume {before}"), message)
            return message.replace(str(last), last.name).partition(". ")[0]
        raise AssertionError("the damage was not noticed")

    return run


def disk_cases() -> Iterator[Case]:
    """Disks that are full, read-only, slow or removed, at each file."""
    files = (
        "config.yaml", "metrics.jsonl", "images/step", "manifest.json", "rng.json", "training/metrics.jsonl",
        "checkpoint-4.tmp", "summary.json", "README.md", ".lock",
    )  # fmt: skip
    for code in (errno.ENOSPC, errno.EROFS, errno.EIO):
        for file in files:
            name = f"{errno.errorcode[code]} at {file}"
            yield Case("disk", name, "exit 2, one line; resumed: the same bits", _disk(file, code))
    yield Case("disk", "ENOSPC at log.txt", "exit 0, the same bits", _harmless("refuse", ("log.txt", errno.ENOSPC)))
    yield Case("disk", "full within the weights", "exit 2, one line; resumed: the same bits", _disk("", 0))
    for file in ("metrics.jsonl", "log.txt", "manifest.json", ".lock"):
        yield Case("disk", f"slow at {file}", "exit 0, the same bits", _harmless("slow", (file, 0.2)))
    for ranks in (1, 2):
        for phase in ("rollout", "update", "evaluate"):
            ends = "exit 2, one line, its state saved; resumed: the same bits"
            yield Case("disk", f"folder removed in {phase}, {ranks} rank{'s'[: ranks - 1]}", ends, _gone(phase, ranks))


def check_one_line(ended: Ended, code: int) -> str:
    """A run ended with this code and one line. What a reward raises is printed once, with its traceback."""
    tracebacks = ended.log.count("Traceback") - ended.log.count("(printed once)")
    check(set(ended.codes) == {code} and not tracebacks, f"exit {code} without a traceback", ended)
    lines = [line for line in ended.log.splitlines() if line.startswith("error: ")]
    check(len(lines) == 1, "one line expected", ended)
    return f"exit {code}"


def _disk(file: str, code: int) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        fault = Fault("refuse", (file, code, str(folder))) if file else Fault("limit_file", (60_000,))
        ended = Run(folder, faults=[fault]).end()
        how = check_one_line(ended, 2)
        check_clean(ended, folder)
        resume_and_compare(place, folder, 1)
        return how

    return run


def _harmless(name: str, arguments: tuple) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        ended = Run(folder, faults=[Fault(name, (*arguments, str(folder)))]).end()
        check(ended.codes == [0], "exit 0", ended)
        check(result(folder) == result(place.unbroken(1)), "differs from the unbroken run", ended)
        return "exit 0"

    return run


def _gone(phase: str, ranks: int) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        ended = Run(folder, ranks=ranks, faults=[Fault("remove", (phase, str(folder)))]).end()
        check(ended.codes[0] == 2 and "Traceback" not in ended.log, "exit 2 without a traceback", ended)
        check("removed or moved" in ended.log or "not there any more" in ended.log, "one line", ended)
        resume_and_compare(place, folder, ranks)
        return "exit 2"

    return run


def reward_cases() -> Iterator[Case]:
    """Rewards that misbehave in a thread, in worker processes and behind a server."""
    missing, stops = "exit 0, the images without a score are left out", "exit 75, one line"
    for how in ("raises", "NaN", "wrong length", "text", "out of memory"):
        yield Case("rewards", f"thread: {how} once", missing, _reward(how, once=True))
        yield Case("rewards", f"thread: {how} always", stops, _reward(how, once=False))
    yield Case("rewards", "thread: leaks memory", "exit 0", _reward("leaks", once=False, code=0))
    yield Case("rewards", "thread: sys.exit", "ends with its exit code, state saved", _reward("sys.exit", True, code=7))
    for how, code in (("exits", 7), ("segfault", -signal.SIGSEGV)):
        ends = "the process is gone; resumed: exit 0"
        yield Case("rewards", f"thread: {how}", ends, _reward(how, once=True, code=code, resumed=True))
    yield Case("rewards", "thread: hangs, then SIGTERM", "exit 143", _hanging_thread)
    for how in ("raises", "NaN", "wrong length", "hangs", "exits", "segfault", "is killed"):
        replaced = how in ("hangs", "exits", "segfault", "is killed")
        ends = "exit 0, the process is replaced" if replaced else missing
        yield Case("rewards", f"worker: {how} once", ends, _reward(how, once=True, workers=1))
        yield Case("rewards", f"worker: {how} always", stops, _reward(how, once=False, workers=1))
    yield Case("rewards", "worker: the run is killed", "no process, no shared memory is left", _killed_with_workers)
    for how in ("cut", "half an answer", "error 500", "busy", "NaN", "wrong length", "text", "hangs"):
        ends = missing if how == "NaN" else "exit 0, asked again"
        yield Case("rewards", f"server: {how} once", ends, _server(how, 1, 0))
    for how in ("wrong token", "unknown path"):
        yield Case("rewards", f"server: {how}", "exit 2, one line", _server(how, 10**6, 2))
    for how in ("NaN", "text"):
        yield Case("rewards", f"server: {how} always", stops, _server(how, 10**6, 75))


def _reward(
    how: str, once: bool, workers: int = 0, code: int | None = None, resumed: bool = False
) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        settings: dict[str, Any] = {"how": how, "once": str(folder.with_suffix(".once")) if once else ""}
        settings |= {"workers": workers, "timeout": 1} if workers else {}
        named = {"rewards": json.dumps({"benchmarks.faults.rewards:faulty": settings}), "max_missing": 0.5}
        ended = Run(folder, named).end()
        expected = code if code is not None else 0 if once else 75
        check(ended.codes == [expected], f"exit {expected}", ended)
        if expected == 75:
            check_one_line(ended, 75)
        check(not ended.left, f"left behind: {ended.left}", ended)
        if resumed:
            again = Run(folder, named).end()
            check(again.codes == [0], "the resumed run failed", again)
        return f"exit {ended.code}"

    return run


def _hanging_thread(place: Place) -> str:
    folder = place.new()
    once = folder.with_suffix(".once")
    named = {"rewards": json.dumps({"benchmarks.faults.rewards:faulty": {"how": "hangs", "once": str(once)}})}
    sent: list[int] = []

    def meanwhile(run: Run) -> None:
        if not sent and once.exists():
            sent.append(signal.SIGTERM)
            run.send(signal.SIGTERM)

    ended = Run(folder, named).end(meanwhile)
    check(ended.codes == [143], "exit 143", ended)
    check_clean(ended, folder)
    return "exit 143"


def _killed_with_workers(place: Place) -> str:
    folder = place.new()
    settings = json.dumps({"benchmarks.faults.rewards:judge": {"workers": 2}})
    fault = Fault("send", ("rollout", signal.SIGKILL, str(folder.with_suffix(".mark"))))
    ended = Run(folder, {"rewards": settings}, faults=[fault]).end()
    check(ended.codes == [-signal.SIGKILL], "was not killed", ended)
    check(not ended.left, f"left behind: {ended.left}", ended)
    return f"exit {ended.code}"


def _server(how: str, count: int, code: int) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        with rewards.server(how, count=count) as url:
            settings = {"url": url, "timeout": 2, "encoding": "png"}
            ended = Run(folder, {"rewards": json.dumps({"brightness": settings}), "max_missing": 0.5}).end()
        check(ended.codes == [code], f"exit {code}", ended)
        if code:
            check_one_line(ended, code)
        check_clean(ended, folder)
        return f"exit {code}"

    return run


def other_cases() -> Iterator[Case]:
    """Clocks, closed pipes and terminals, memory."""
    for seconds in (86400.0, -86400.0, -1e9):
        for phase in ("rollout", "save"):
            name = f"the clock jumps by {seconds:+g} s in {phase}"
            yield Case("clock", name, "exit 0, the same bits", _clock(phase, seconds))
    for phase in ("start", "rollout", "save", "exit"):
        for streams, what in (((1,), "stdout"), ((2,), "stderr"), ((1, 2), "stdout and stderr")):
            yield Case("output", f"{what}: no reader since {phase}", "exit 0, the same bits", _pipe(phase, streams))
        ends = "exit 0" if phase == "exit" else "exit 129"
        yield Case("output", f"terminal closed in {phase}", f"{ends}; resumed: the same bits", _terminal(phase))
    for phase in ("rollout", "evaluate", "update"):
        ends = "exit 2, one line with the settings that help; resumed: the same bits"
        yield Case("memory", f"GPU out of memory in {phase}", ends, _memory("out_of_memory", (phase,)))
        yield Case("memory", f"RAM out of memory in {phase}", ends, _memory("no_ram", (phase,)))


def _clock(phase: str, seconds: float) -> Callable[[Place], str]:
    return _same("jump", (phase, seconds))


def _pipe(phase: str, streams: tuple[int, ...]) -> Callable[[Place], str]:
    return _same("close_pipe", (phase, streams))


def _same(name: str, arguments: tuple) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        ended = Run(folder, faults=[Fault(name, arguments)]).end()
        check(ended.codes == [0], "exit 0", ended)
        check_clean(ended, folder)
        check(result(folder) == result(place.unbroken(1)), "differs from the unbroken run", ended)
        check("before" in (folder / "log.txt").read_text(), "log.txt is not whole", ended)
        return "exit 0"

    return run


def _terminal(phase: str) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        ended = Run(folder, faults=[Fault("close_terminal", (phase, str(folder.with_suffix(".mark"))))]).end()
        check(ended.codes == [0 if phase == "exit" else 129], "exit 129", ended)
        check_clean(ended, folder)
        resume_and_compare(place, folder, 1)
        return f"exit {ended.code}"

    return run


def _memory(name: str, arguments: tuple) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        ended = Run(folder, faults=[Fault(name, arguments)]).end()
        how = check_one_line(ended, 2)
        check("what helps most: " in ended.log and f"in the phase {arguments[0]}" in ended.log, "no remedy", ended)
        check_clean(ended, folder)
        resume_and_compare(place, folder, 1)
        return how

    return run


def lock_cases() -> Iterator[Case]:
    """Several starters, and owners that are alive, dead, elsewhere or unreadable."""
    yield Case("lock", "ten starters at once", "one exit 0, nine exit 75", _ten(None))
    yield Case("lock", "ten starters at a dead owner's lock", "one exit 0, nine exit 75", _ten("dead"))
    yield Case("lock", "ten starters at a damaged lock", "one exit 0, nine exit 75", _ten("damaged"))
    yield Case("lock", "an owner whose number another process has now", "exit 0", _owner("recycled", 0))
    yield Case("lock", "an owner that is a zombie", "exit 0", _owner("zombie", 0))
    yield Case("lock", "an owner that is stopped", "exit 75, one line", _owner("stopped", 75))
    yield Case("lock", "an owner elsewhere that beats", "exit 75, one line", _owner("beats", 75))
    yield Case("lock", "an owner elsewhere that is silent", "exit 0", _owner("silent", 0))
    yield Case("lock", "a disk without flock", "exit 0, the same bits", _same("no_flock", ()))
    yield Case("lock", "taken over while the owner was stopped", "exit 2, one line; the other goes on", _taken_over)


def _ten(before: str | None) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        if before:
            folder.mkdir()
            (folder / LOCK).write_text(_dead_lock(folder) if before == "dead" else "{")
        runs = [Run(folder, ranks=1) for _ in range(10)]
        ended = [run.end() for run in runs]
        codes = sorted(code for end in ended for code in end.codes)
        check(codes.count(0) == 1 and set(codes) == {0, 75}, f"codes {codes}", ended[0])
        check(result(folder) == result(place.unbroken(1)), "the run noticed the others", ended[0])
        check(not remains(folder), f"left behind: {remains(folder)}", ended[0])
        return f"exit {codes}"

    return run


def _dead_lock(folder: Path) -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    owner = {**RunLock(folder).owner, "pid": process.pid}
    process.wait()
    return json.dumps(owner)


def _owner(how: str, code: int) -> Callable[[Place], str]:
    def run(place: Place) -> str:
        folder = place.new()
        folder.mkdir()
        lock, process = folder / LOCK, subprocess.Popen([sys.executable, "-c", "" if how == "zombie" else "input()"],
                                                        stdin=subprocess.PIPE)  # fmt: skip
        start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        owner = {**RunLock(folder).owner, "pid": process.pid, "start": "1" if how == "recycled" else start}
        if how in ("beats", "silent"):
            owner["place"] = "another machine"
        if how == "stopped":
            process.send_signal(signal.SIGSTOP)
        if how == "zombie":
            time.sleep(0.5)
        lock.write_text(json.dumps(owner))
        meanwhile = (lambda run: lock.touch() if lock.exists() else None) if how == "beats" else (lambda run: None)
        try:
            ended = Run(folder, faults=[Fault("short_beats", (0.2, 2.0))]).end(meanwhile)
        finally:
            process.kill()
            process.communicate()
        check(ended.codes == [code], f"exit {code}", ended)
        if code:
            check_one_line(ended, code)
            check(json.loads(lock.read_text()) == owner, "the owner's lock was changed", ended)
        return f"exit {code}"

    return run


def _taken_over(place: Place) -> str:
    folder = place.new()
    mark = folder.with_suffix(".mark")
    other = json.dumps({**RunLock(folder).owner, "place": "another machine"})

    def meanwhile(run: Run) -> None:
        if mark.exists():
            mark.unlink()
            (folder / LOCK).write_text(other)
            run.send(signal.SIGCONT)

    ended = Run(folder, faults=[Fault("send", ("update", signal.SIGSTOP, str(mark)))]).end(meanwhile)
    how = check_one_line(ended, 2)
    check("taken over" in ended.log and (folder / LOCK).read_text() == other, "the other's lock was changed", ended)
    return how


def all_cases() -> list[Case]:
    """Every case, in the order of the table."""
    groups = (signal_cases, launcher_cases, kill_cases, byte_cases, disk_cases, reward_cases, other_cases, lock_cases)
    return [case for group in groups for case in group()]
