"""A reward that is evaluated and never trained on: it warns of a run that is hacked, or stops it. The best is kept."""

import json
import os
import shutil
import signal

import pytest

from fastflowgrpo import Trainer
from fastflowgrpo.config import EvaluateConfig, parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluate import trained_weights
from fastflowgrpo.prompts import TAGS
from fastflowgrpo.push import main as push
from fastflowgrpo.runs import checkpoints, guard, hub
from fastflowgrpo.runs.files import read_rows
from fastflowgrpo.shapes import scenes
from fastflowgrpo.train import main


def painted(batch):
    """A reward with a loophole: how much of the image is painted in any colour, whatever the prompt says."""
    return 1 - batch.images.float().amin(1).mean((1, 2)) / 255


def row(step, value, error=0.0, reward=0.5):
    return {
        "step": step,
        "eval": {"overall": 0.1, "scores": {"reward": reward, "guard": value}, "guard_standard_error": error},
    }


def test_a_fall_is_below_the_best_by_more_than_its_standard_error_in_evaluations_in_a_row():
    rows = [row(0, 0.5), {"step": 2, "epoch": 0}, row(2, 0.6), row(4, 0.5, 0.05), row(6, None), row(8, 0.55, 0.01)]
    assert [guard.guard_fall(rows[:end], 1) != "" for end in range(len(rows) + 1)] == [False] * 4 + [True, False, True]
    assert guard.guard_fall(rows, 3) == ""
    assert "2 evaluations in a row, from 0.600 at step 2 to 0.550 at step 8" in guard.guard_fall(rows, 2)
    for harmless in (row(10, 0.55, 0.06), row(10, 0.6), row(10, 0.7)):
        assert guard.guard_fall([*rows, harmless], 1) == ""
    assert guard.guard_fall([row(0, 0.5), row(2, 0.4, None)], 1)
    assert guard.guard_fall([{"step": 0, "eval": {"overall": 1.0, "scores": {"reward": 1.0}}}], 1) == ""


def test_the_best_is_the_first_of_the_highest_by_the_guard_or_by_the_overall_score():
    rows = [row(0, 0.9), row(2, 0.5), row(4, 0.6), row(6, 0.6), row(8, None)]
    assert [guard.is_best_by_guard(rows[:end]) for end in range(6)] == [False, False, True, True, False, False]
    assert guard.best_step(rows, [2, 4, 6, 8]) == 4
    assert guard.best_step(rows, [2, 6]) == 6
    assert guard.best_step(rows, [1, 8]) is None
    without = [{"step": step, "eval": {"overall": overall, "scores": {}}} for step, overall in ((2, 0.3), (4, 0.2))]
    assert guard.best_step(without, [2, 4]) == 2
    assert not guard.is_best_by_guard(without)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "eval.jsonl"
    chosen = [p for tag in TAGS for p in [p for p in scenes.eval_prompts() if p.metadata["tag"] == tag][:4]]
    path.write_text("\n".join(json.dumps({**prompt.metadata, "prompt": prompt.text}) for prompt in chosen))
    return path


def command(prompts, output, **settings):
    settings = {
        "output_dir": output,
        "prompts.eval": prompts,
        "prompts.per_epoch": 4,
        "trackers": "[]",
        "rewards": '{"test_guard:painted": 1}',
        "epochs": 12,
        "rollout.group_size": 12,
        "rollout.batch_size": 48,
        "rollout.num_steps": 5,
        "rollout.window_start": "[0,1]",
        "update.learning_rate": 2e-3,
        "update.ema_decay": 0,
        "evaluation.every": 1,
        "evaluation.num_steps": 5,
        "evaluation.images_per_prompt": 1,
        "evaluation.guard": "geneval",
        "save_every": 0,
        "checkpoints_total_limit": 1,
        **settings,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def rows_of(run):
    rows = read_rows(run / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if key not in ("wall_s", "seconds", "images_per_s")} for row in rows
    ]


@pytest.fixture(scope="module")
def hacked(prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("hacked") / "run"
    assert main(command(prompts, run)) == 3
    return run


def names(run):
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_a_run_that_hacks_its_reward_is_stopped_and_its_best_checkpoint_kept(hacked):
    rows = rows_of(hacked)
    evaluations = [row["eval"]["scores"] for row in rows if "eval" in row]
    assert evaluations[-1]["reward"] > 1.1 * evaluations[0]["reward"]
    assert evaluations[-1]["guard"] < 0.8 * evaluations[0]["guard"]
    last = rows[-1]["step"]
    assert last < 24 and guard.guard_fall(rows, 2) and not guard.guard_fall(rows[:-2], 2)
    assert not any(name.startswith("guard") for row in rows if "epoch" in row for name in row)  # nor was it asked
    best = guard.best_checkpoint(hacked)
    assert best.name != f"checkpoint-{last}" and names(hacked) == {best.name, f"checkpoint-{last}"}
    assert (best / "README.md").is_file() and (hacked / "summary.json").is_file()


def test_a_stopped_run_says_why_and_stops_again_when_it_is_resumed(hacked, prompts, capsys):
    rows = rows_of(hacked)
    assert main(command(prompts, hacked, resume="latest")) == 3
    assert rows_of(hacked) == rows
    stopped = capsys.readouterr().err.splitlines()[-1]
    assert stopped.startswith("stopped: evaluation.guard: has fallen in 2 evaluations in a row, from 0.")
    assert f"; the best checkpoint is {guard.best_checkpoint(hacked)}; to go on from it: --resume best" in stopped


def test_a_resumed_run_stops_where_the_unbroken_one_does(hacked, prompts, tmp_path, monkeypatch):
    run, calls = tmp_path / "run", []
    evaluate = Trainer.evaluate

    def interrupted(self):
        calls.append(None)
        if len(calls) == 3:  # after an epoch whose best checkpoint is saved, and a fall
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", interrupted)
        assert main(command(prompts, run, resume="latest")) == 143
    assert main(command(prompts, run, resume="latest")) == 3
    assert rows_of(run) == rows_of(hacked)
    assert names(run) == names(hacked)


def test_a_run_that_is_only_warned_goes_on_and_best_goes_back(hacked, prompts, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(hacked, run)
    epochs = sum("epoch" in row for row in rows_of(hacked)) + 1
    warned = command(prompts, run, resume="latest", epochs=epochs, **{"evaluation.guard_action": "warn"})
    assert main(warned) == 0
    assert "warning: evaluation.guard: has fallen in 2 evaluations in a row" in capsys.readouterr().err
    assert len(rows_of(run)) == len(rows_of(hacked)) + 2
    best = guard.best_checkpoint(run)
    assert best == run / "checkpoints" / guard.best_checkpoint(hacked).name
    epochs = json.loads((best / "manifest.json").read_text())["epoch"] + 1
    still = command(prompts, run, resume="best", epochs=epochs, **{"update.learning_rate": 0})
    assert main([*still, "--evaluation.guard_action", "warn"]) == 0
    assert f"goes on from {best}: epoch {epochs - 1} of {epochs}" in capsys.readouterr().out
    assert any(name.endswith(".set_aside") for name in names(run))
    *_, before, _, after = rows_of(run)
    assert after["eval"] == before["eval"]  # the same weights


def test_the_commands_take_the_best_checkpoint(hacked, tmp_path, monkeypatch):
    best = guard.best_checkpoint(hacked)
    assert trained_weights(EvaluateConfig(run=str(hacked), checkpoint="best")) == best
    pushed = []
    monkeypatch.setattr(hub, "check_push", lambda repository: None)
    monkeypatch.setattr(hub, "push", lambda run, checkpoint, *rest: pushed.append(checkpoint))
    assert push([str(hacked), "me/model", "--checkpoint", "best"]) == 0
    assert pushed == [best]
    with pytest.raises(UserError, match="has no checkpoint that was evaluated"):
        guard.best_checkpoint(tmp_path)


def test_a_damaged_best_checkpoint_is_not_resumed(hacked, prompts, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(hacked, run)
    best = guard.best_checkpoint(run)
    (best / checkpoints.MANIFEST).unlink()
    assert main(command(prompts, run, resume="best")) == 2
    assert f"{best} is incomplete: manifest.json" in capsys.readouterr().err


def test_a_guard_may_be_a_reward_of_weight_0_or_one_with_other_settings():
    for rewards, guarded in (
        ('{"jpeg_compressibility": 1, "geneval": 0}', "geneval"),
        ('{"geneval": {"strict": 1.0}}', '{"geneval": {"strict": 0.5}}'),
    ):
        parse(["--rewards", rewards, "--evaluation.guard", guarded])


def test_a_guard_that_cannot_be_made_is_named(prompts, tmp_path, capsys):
    for guarded, message in (("genevl", "unknown reward 'genevl' (did you mean 'geneval'?)"), ("ocr", "ocr: ")):
        assert main(command(prompts, tmp_path / "run", **{"evaluation.guard": guarded})) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: evaluation.guard: ") and message in error
