"""How fast each method learns in the bundled world: `python -m benchmarks.learning [--SETTING VALUE ...]`.

Each method trains once with each seed, in a run of its own: `python -m fastflowgrpo.train` with a config file, one run
at a time, the first seed of all methods before the second. Runs that have finished are kept. After Ctrl+C the same
command goes on. Settings of `fastflowgrpo.train` that are added apply to every run.

Then one process with one thread trains an epoch of each method in turn, some times over. The seconds of a run are those
of its epochs by the medians, since the hours that the runs take are not equally fast on a shared machine.

At the end, learning.json, learning.md and learning.svg in the output folder hold the curves, the tables and the
picture of all runs that have finished. --report writes these without training. --publish also writes them into
benchmarks/results/, README.md and docs/.
"""

import argparse
import json
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from benchmarks import learning_report
from fastflowgrpo.config import parse
from fastflowgrpo.console import print_error
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.runs.files import CONFIG, METRICS, SUMMARY, read_rows
from fastflowgrpo.runs.resume import changed_settings
from fastflowgrpo.trainer import Trainer

# A run is evaluated 8 to 10 times.
METHODS = {
    "paper": "--config configs/shapes_paper.yaml --evaluation.every 5",
    "paper_lean": "--config configs/shapes_paper_lean.yaml --evaluation.every 6",
    "grpo": "--evaluation.every 12",
    "lean": "--config configs/shapes_lean.yaml --evaluation.every 12",
    "guard": "--config configs/shapes_guard.yaml --evaluation.every 12",
    "dpo": "--config configs/shapes_dpo.yaml --evaluation.every 20",
    "nft": "--config configs/shapes_nft.yaml --evaluation.every 6",
    "awm": "--config configs/shapes_awm.yaml --evaluation.every 6",
    "dgpo": "--config configs/shapes_dgpo.yaml --evaluation.every 6",
}
COMMAND = [sys.executable, "-m", "fastflowgrpo.train"]
SECONDS = "seconds.json"
ROUNDS = 5  # measured epochs of each method


@dataclass(frozen=True)
class Run:
    """A method with a seed."""

    method: str
    seed: int
    output: Path
    """Folder of all runs."""
    settings: Sequence[str] = ()
    """Settings that are added to the method's."""

    @property
    def folder(self) -> Path:
        return self.output / self.method / f"seed-{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The command line of `fastflowgrpo.train`."""
        run = [f"--seed={self.seed}", f"--output_dir={self.folder}", "--resume=latest", "--checkpoints_total_limit=1"]
        return [*shlex.split(METHODS[self.method]), *run, *self.settings]

    def finished(self) -> bool:
        """Whether the run has trained all epochs.

        Raises:
            UserError: its folder has a run with other settings. It may only have fewer epochs.
        """
        if not (self.folder / CONFIG).is_file():
            return False
        config = parse(self.arguments)
        changed = changed_settings(yaml.safe_load((self.folder / CONFIG).read_text()), config)
        changed.pop("epochs", None)
        if changed:
            found = "; ".join(f"{name} was {old}, is now {new}" for name, (old, new) in changed.items())
            raise UserError(
                f"{self.folder} has a run with other settings: {found}. Remove it, or give another --output"
            )
        if not (self.folder / SUMMARY).is_file():
            return False
        return sum("epoch" in row for row in read_rows(self.folder / METRICS)) == config.epochs


def machine() -> str:
    """The device that trains, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, 1 core"


def train(arguments: Sequence[str]) -> int:
    """Run `fastflowgrpo.train` in a process of its own, which gets the signals that arrive here.

    Returns:
        Its exit code, 128 + N after the signal N.
    """
    received = 0

    def forward(signum: int, _: Any) -> None:
        nonlocal received
        received = signum
        process.send_signal(signum)

    with subprocess.Popen([*COMMAND, *arguments]) as process:
        previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
    if received:  # even if the run had come to its end
        return 128 + received
    return code if code >= 0 else 128 - code


def train_all(runs: Sequence[Run]) -> int:
    """Train the runs that have not finished, and return the first exit code that is not 0.

    Raises:
        UserError: a folder has a run with other settings.
    """
    unfinished = [run for run in runs if not run.finished()]
    for number, run in enumerate(unfinished, 1):
        print(f"\n{run.method}, seed {run.seed}: run {number} of {len(unfinished)}", flush=True)
        if code := train(run.arguments):
            print(f"stopped at {run.method}, seed {run.seed}; the same command goes on", file=sys.stderr)
            return code
    return 0


def measure(runs: Sequence[Run]) -> None:
    """Write the seconds of an epoch of each method into the output folder, unless they are there.

    Methods that are there are measured again together with a new one.
    """
    file, one_each = runs[0].output / SECONDS, {run.method: run for run in runs}
    known = json.loads(file.read_text())["seconds"] if file.is_file() else {}
    if known.keys() >= one_each.keys():
        return
    one_each = {method: Run(method, 0, runs[0].output, runs[0].settings) for method in known} | one_each
    print(f"\nseconds of an epoch: {ROUNDS} of each method in turn", flush=True)
    seconds: dict[str, dict[str, list[float]]] = {method: {"sampling": [], "update": []} for method in one_each}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        trainers = {}
        for method, run in one_each.items():
            trainers[method] = Trainer(replace(parse(run.arguments), output_dir=f"{folder}/{method}", trackers=[]))
        for epoch in range(ROUNDS + 1):  # the first warms up
            for method, trainer in trainers.items():
                begin = time.perf_counter()
                batch, _ = trainer.collect(epoch)
                sampled = time.perf_counter()
                trained = trainer.learner.update(batch)["trained_pairs"]
                updated = time.perf_counter()
                if epoch:
                    seconds[method]["sampling"].append(round(sampled - begin, 3))
                    of_all_pairs = (updated - sampled) * trainer.plan.pairs / max(1, trained)
                    seconds[method]["update"].append(round(of_all_pairs, 3))
        for trainer in trainers.values():
            trainer.accelerator.end_training()
    torch.set_num_threads(threads)
    file.write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")


def result(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """What learning.json holds: the curve of every run that has finished, and their reduction over the seeds.

    Args:
        runs: all runs.
        command: the benchmark's command line.

    Raises:
        UserError: none has finished, or the seconds of a method's epoch have not been measured.
    """
    methods: dict[str, Any] = {}
    file = runs[0].output / SECONDS
    measured = json.loads(file.read_text()) if file.is_file() else {"seconds": {}}
    for run in runs:
        if not run.finished():
            print(f"{run.folder} has not finished, and is left out", file=sys.stderr)
            continue
        if run.method not in methods:
            if run.method not in measured["seconds"]:
                raise UserError(f"{file} has no seconds of {run.method}: start the command once without --report")
            seconds = {part: statistics.median(values) for part, values in measured["seconds"][run.method].items()}
            found = estimate(parse(run.arguments))
            sampling = sum(found.flops.get(phase, 0) for phase in ("candidates", "rollout", "decode"))
            flops = {"sampling": sampling, "update": found.total_flops - sampling}
            methods[run.method] = {
                "settings": shlex.join([*shlex.split(METHODS[run.method]), *run.settings]),
                "epoch": {"seconds": seconds, "flops": flops, "pairs": found.plan.pairs},
                "runs": {},
            }
        method = methods[run.method]
        method["runs"][str(run.seed)] = {
            "versions": json.loads((run.folder / SUMMARY).read_text())["versions"],
            "curve": learning_report.curve(read_rows(run.folder / METRICS), **method["epoch"]),
        }
    if not methods:
        raise UserError(f"output: no run in {runs[0].output} has finished")
    for method in methods.values():
        method |= learning_report.reduced([run["curve"] for run in method["runs"].values()])
    return {"command": command, "machine": measured["machine"], "methods": methods}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="do not train")
    parser.add_argument("--publish", action="store_true", help="update benchmarks/results/, README.md and docs/ too")
    options, settings = parser.parse_known_args(argv)
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--report", "--publish")]
    runs = [Run(method, seed, options.output, settings) for seed in options.seeds for method in options.methods]
    try:
        if find_spec("matplotlib") is None:
            raise UserError('the picture needs matplotlib: pip install "fastflowgrpo[bench]"')
        if not options.report:
            if code := train_all(runs):
                return code
            measure(runs)
        found = result(runs, shlex.join([*parser.prog.split(), *given]))
        print(learning_report.write(found, options.output))
        if options.publish:
            learning_report.publish(found, Path(__file__).parents[1])
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
