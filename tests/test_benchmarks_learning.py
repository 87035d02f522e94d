"""`python -m benchmarks.learning`: its runs, and their reduction to tables and a picture."""

import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import learning, learning_report
from benchmarks.learning import METHODS, Run
from fastflowgrpo import train
from fastflowgrpo.config import parse, save
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.prompts import TAGS
from fastflowgrpo.runs.files import read_rows

ROOT = Path(__file__).parents[1]
SMALL = (
    "--trackers [] --prompts.per_epoch 2 --update.per_epoch 1 --rollout.group_size 4 --rollout.batch_size 8 "
    "--evaluation.num_steps 2 --evaluation.images_per_prompt 2 --epochs 1"
)


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def rows(*accuracies):
    """Rows of a run: an evaluation at the start and after every second epoch of 10 images."""
    epoch = {"epoch": 0, "step": 0, "images": 10, "trained_pairs": 15}
    found = []
    for accuracy in accuracies:
        found += [epoch, epoch] if found else []
        found.append({"step": 0, "eval": {**dict.fromkeys(("overall", *TAGS), accuracy), "diversity": 0.2}})
    return found


def curve_of(*accuracies):
    """With epochs of 4 s and 1 TFLOP, in which half of the pairs are trained on."""
    seconds, flops = {"sampling": 3.0, "update": 2.0}, {"sampling": 2e11, "update": 1.6e12}
    return learning_report.curve(rows(*accuracies), seconds=seconds, flops=flops, pairs=30)


def of_seeds(*curves):
    """What learning.json holds, of one method."""
    runs = {str(seed): {"versions": {"torch": "2"}, "curve": curve} for seed, curve in enumerate(curves)}
    method = {"settings": "", "runs": runs, **learning_report.reduced(curves)}
    return {"command": "python -m benchmarks.learning", "machine": "a machine", "methods": {"awm": method}}


def finish(run, epochs=None):
    """Make the folder of a run that has trained `epochs` epochs, by default all."""
    config = parse(run.arguments)
    run.folder.mkdir(parents=True)
    save(config, run.folder / "config.yaml")
    trained = [{"epoch": epoch} for epoch in range(config.epochs if epochs is None else epochs)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained))
    (run.folder / "summary.json").write_text("{}")


def test_a_curve_adds_up_what_training_spent():
    curve = curve_of(0.5, 0.7, 0.9)
    assert curve["epochs"] == [0, 2, 4] and curve["images"] == [0, 20, 40] and curve["flops"] == [0, 2e12, 4e12]
    assert curve["seconds"] == [0, 8, 16] and curve["overall"] == curve["counting"] == [0.5, 0.7, 0.9]


def test_a_threshold_is_interpolated_where_it_is_first_reached():
    curve = curve_of(0.5, 0.7, 0.9, 0.75, 0.95)
    assert learning_report.reached(curve, "seconds", 0.8) == pytest.approx(12)
    assert learning_report.reached(curve, "images", 0.9) == 40
    assert learning_report.reached(curve, "flops", 0.6) == pytest.approx(10**12)
    assert learning_report.reached(curve, "seconds", 0.4) == 0
    assert learning_report.reached(curve, "seconds", 0.96) is None


def test_the_tables_have_mean_and_spread_and_say_what_was_not_reached():
    curves = [curve_of(0.5, last) for last in (0.9, 0.7, 1.0)]
    result = of_seeds(*curves)
    costs, last = (line for line in learning_report.tables(result).splitlines() if line.startswith("| awm"))
    # 0.80 after 6.0 and 4.8 s, 0.90 after 8.0 and 6.4 s, 0.95 after 7.2 s; 2 TFLOP in 8 s
    assert costs.startswith("| awm | 3 | 5 ± 1 (2 of 3) | 7 ± 1 (2 of 3) | 7 (1 of 3) | 0.0")
    assert costs.endswith("| 1.4 ± 0.2 (2 of 3) | 1.8 ± 0.3 (2 of 3) | 1.8 (1 of 3) |")
    assert last.startswith("| awm | 8 | 0.500 | 0.867 ± 0.153 |") and last.endswith("| 0.200 ± 0.000 |")
    (low,) = (line for line in learning_report.summary(of_seeds(curves[1])).splitlines() if line.startswith("| awm"))
    assert low == "| awm | 1 " + "| not reached " * 5 + "| 0.700 after 8 s |"


def test_publishing_replaces_what_stands_between_the_markers(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    pages = {"README.md": learning_report.summary, "docs/learning.md": learning_report.tables}
    for page in pages:
        (tmp_path / page).write_text(f"before\n{learning_report.BEGIN}\n{learning_report.END}\nafter\n")
    for last in (0.9, 0.8):
        result = of_seeds(curve_of(0.5, last))
        learning_report.publish(result, tmp_path)
        assert json.loads((tmp_path / "benchmarks/results/learning.json").read_text()) == result
        for page, markdown in pages.items():
            lines = (tmp_path / page).read_text().splitlines()
            assert "\n".join(lines[3:-3]) == markdown(result).rstrip() and (lines[0], lines[-1]) == ("before", "after")
        assert "</svg>" in (tmp_path / "docs/learning.svg").read_text()


def test_the_picture_has_a_line_for_each_seed_and_their_mean(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    result = of_seeds(curve_of(0.5, 0.7, 0.8), curve_of(0.5, 0.9, 0.9))
    learning_report.draw(result, tmp_path / "learning.svg")
    for axes, spent in zip(drawn[0].axes, ([8, 16], [0.02, 0.04], [2, 4]), strict=True):
        found = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        assert found == [(spent, [0.7, 0.8]), (spent, [0.9, 0.9]), (spent, pytest.approx([0.8, 0.85]))]


def test_every_method_is_a_run_of_the_bundled_model():
    for settings in METHODS.values():
        config = parse(shlex.split(settings))
        assert config.model == "shapes" and config.prompts.train == "shapes"
        assert config.evaluation.images_per_prompt == 6 and config.evaluation.every > 0
        assert config.prompts.per_epoch * config.rollout.group_size == 576 and config.policy.lora_rank is None


def test_the_first_seed_of_all_methods_comes_first_and_finished_runs_are_kept(tmp_path, monkeypatch):
    runs = [Run(method, seed, tmp_path) for seed in (0, 1) for method in ("awm", "grpo")]
    started = []
    monkeypatch.setattr(learning, "train", lambda arguments: started.append(parse(arguments)) or 0)
    finish(runs[0])
    finish(runs[3], epochs=20)
    assert learning.train_all(runs) == 0
    assert [(config.update.algorithm, config.seed) for config in started] == [("grpo", 0), ("awm", 1), ("grpo", 1)]
    assert all(config.resume == "latest" for config in started)
    assert [Path(config.output_dir) for config in started] == [run.folder for run in runs[1:]]


def test_a_run_that_fails_or_is_stopped_ends_the_benchmark(tmp_path, monkeypatch, capsys):
    codes = [0, 130]
    monkeypatch.setattr(learning, "train", lambda arguments: codes.pop(0))
    assert learning.train_all([Run(method, 0, tmp_path) for method in ("awm", "nft", "grpo")]) == 130
    assert not codes and "stopped at nft, seed 0" in capsys.readouterr().err


def test_runs_with_other_settings_are_refused(tmp_path):
    finish(Run("awm", 0, tmp_path))
    assert Run("awm", 0, tmp_path).finished()
    assert not Run("awm", 0, tmp_path, ["--epochs", "80"]).finished(), "epochs may be added"
    with pytest.raises(UserError, match=r"update.learning_rate was 0.00045, is now 0.001. Remove it"):
        Run("awm", 0, tmp_path, ["--update.learning_rate", "1e-3"]).finished()


def test_a_new_method_is_measured_in_turn_with_those_that_are_known(tmp_path, monkeypatch):
    collected = []

    class Trained:
        def __init__(self, config):
            self.plan, self.learner, self.accelerator = SimpleNamespace(pairs=4), self, self
            self.algorithm = config.update.algorithm

        def collect(self, epoch):
            collected.append((epoch, self.algorithm))
            return None, None

        def update(self, batch):
            return {"trained_pairs": 2}

        def end_training(self):
            pass

    clock = itertools.count()
    monkeypatch.setattr(learning, "Trainer", Trained)
    monkeypatch.setattr(learning.time, "perf_counter", lambda: next(clock))
    for methods in (["awm"], ["awm", "nft"], ["nft"], ["grpo"]):
        learning.measure([Run(method, 0, tmp_path) for method in methods])
    rounds = range(learning.ROUNDS + 1)
    turns = (["awm"], ["awm", "nft"], ["awm", "nft", "grpo"])
    assert collected == [(epoch, method) for methods in turns for epoch in rounds for method in methods]
    seconds = json.loads((tmp_path / "seconds.json").read_text())["seconds"]
    each = {"sampling": [1] * learning.ROUNDS, "update": [2] * learning.ROUNDS}  # half of the pairs, in one second
    assert seconds == dict.fromkeys(("awm", "nft", "grpo"), each)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [["sleep", "60"], ["true"]], ids=["under way", "at its end"])
def test_a_signal_ends_the_run_and_the_benchmark(monkeypatch, signum, command):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(learning, "COMMAND", command)
    install, processes = signal.signal, []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            processes.append(self)

    def install_and_send(number, handler):
        previous = install(number, handler)
        if number == signal.SIGTERM and handler not in before:
            if command == ["true"]:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            os.kill(os.getpid(), signum)
        return previous

    monkeypatch.setattr(learning.subprocess, "Popen", Recorded)
    monkeypatch.setattr(learning.signal, "signal", install_and_send)
    assert learning.train([]) == 128 + signum
    assert processes[0].returncode == (0 if command == ["true"] else -signum)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_command_trains_and_reports(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(learning, "train", train.main)
    command = ["--output", str(tmp_path), "--methods", "awm", "--seeds", "3", *SMALL.split()]
    assert learning.main([*command, "--report"]) == 2
    assert "no run in" in capsys.readouterr().err
    assert learning.main(command) == 0
    assert (tmp_path / "learning.md").read_text() in capsys.readouterr().out
    result = json.loads((tmp_path / "learning.json").read_text())
    assert result["command"] == shlex.join(["python", "-m", "benchmarks.learning", *command])
    method = result["methods"]["awm"]
    curve = method["runs"]["3"]["curve"]
    assert curve["epochs"] == [0, 1] and curve["images"] == [0, 8] and all(len(v) == 2 for v in curve.values())
    (row,) = (row for row in read_rows(tmp_path / "awm/seed-3/metrics.jsonl") if "epoch" in row)
    config = parse([*shlex.split(METHODS["awm"]), *SMALL.split()])
    whole = estimate(config)
    assert method["epoch"]["pairs"] == whole.plan.pairs == 24
    share = row["trained_pairs"] / 24
    sampling = whole.flops["rollout"] + whole.flops["decode"]
    assert curve["flops"][1] == pytest.approx(sampling + (whole.total_flops - sampling) * share)
    measured = json.loads((tmp_path / "seconds.json").read_text())
    assert measured["machine"] == result["machine"]
    sampling, update = (measured["seconds"]["awm"][part] for part in ("sampling", "update"))
    assert len(sampling) == len(update) == learning.ROUNDS and min(sampling) > 0
    seconds = statistics.median(sampling) + statistics.median(update) * share
    assert curve["seconds"] == [0, pytest.approx(seconds, abs=1e-4)]
    monkeypatch.delattr(learning, "train")
    monkeypatch.delattr(learning, "Trainer")
    assert learning.main(command) == 0, "nothing is left to train or to measure"
    (tmp_path / "seconds.json").unlink()
    assert learning.main([*command, "--report"]) == 2
    assert "seconds.json has no seconds of awm: start the command once without --report" in capsys.readouterr().err
