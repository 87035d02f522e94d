"""python -m fastflowgrpo.doctor: what works is said to work, and every part that does not is named in one run."""

import re

import pytest
import torch

from fastflowgrpo import Config, doctor
from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.learning.learner import Learner
from fastflowgrpo.planning import memory

SMALL = {
    "policy.lora_rank": 4,
    "prompts.per_epoch": 4,
    "rollout.group_size": 2,
    "rollout.batch_size": 4,
    "rollout.num_steps": 3,
    "update.batch_size": 4,
}
WINDOW = {"rollout__window_size": 2, "rollout__window_start": "[0,1]"}


def examine(capsys, **settings):
    """Exit code, {part: (status, text)} of the findings, and stderr."""
    named = SMALL | {name.replace("__", "."): value for name, value in settings.items()}
    code = doctor.main([f"--{name}={value}" for name, value in named.items()])
    out, err = capsys.readouterr()
    lines = re.findall(r"(?m)^(ok|note|error|skipped) +(\w+) +(.+)$", out)
    return code, {part: (status, text) for status, part, text in lines}, err


@pytest.mark.parametrize("algorithm", ["grpo", "awm"])
def test_a_run_that_works(algorithm, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "grpo": WINDOW,
        "awm": {"update__algorithm": "awm", "rollout__dynamics": "ode"},
    }[algorithm]
    code, found, err = examine(capsys, rewards="{jpeg_compressibility: 1}", **settings)
    assert code == 0 and "error" not in {status for status, _ in found.values()}, (found, err)
    assert {"packages", "memory", "prompts", "rewards", "step", "epoch", "attention"} <= found.keys()
    assert ("replay" in found) == (algorithm == "grpo")
    assert found["step"][1].startswith("4 images; seconds: encode ")
    assert not list(tmp_path.iterdir())


def test_all_that_does_not_work_is_named_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "shortage", lambda *_: "this run is estimated to need 9 GB")
    missing = tmp_path / "missing.txt"
    code, found, err = examine(capsys, prompts__train=missing, rewards="{nobody.nothing:reward: 1}", **WINDOW)
    assert code == 2 and "3 parts of the run do not work" in err
    assert {part for part, (status, _) in found.items() if status == "error"} == {"prompts", "rewards", "memory"}
    assert "missing.txt" in found["prompts"][1] and "nobody" in found["rewards"][1]
    assert "9 GB" in found["memory"][1]
    assert found["model"][0] == "ok" and found["step"][0] == "skipped"


def test_a_replay_that_differs_and_scores_without_spread(capsys, tmp_path, monkeypatch):
    (tmp_path / "flat_reward.py").write_text("def flat(batch):\n    return [0.5] * len(batch.images)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Learner, "replay", lambda *_: (torch.tensor([0]), torch.tensor([1.0])))
    code, found, _ = examine(capsys, rewards="{'flat_reward:flat': 1}", **WINDOW)
    assert code == 2 and found["scores"][0] == "note" and "nothing to learn from" in found["scores"][1]
    assert found["replay"][0] == "error" and "update.replay_tolerance" in found["replay"][1]
    assert found["step"][0] == "ok"


@pytest.mark.parametrize("policy", [{"dtype": "float32"}, {"dtype": "bfloat16", "compile": True}])
def test_faster_settings_for_a_gpu(policy, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    doctor.Checkup(Config(policy=PolicyConfig(**policy))).packages()
    out = capsys.readouterr().out
    assert "a GPU, compute capability 9.0" in out
    for name in ("dtype", "compile"):
        assert (f"policy.{name} " in out) == (policy["dtype"] == "float32")


def test_a_wrong_setting_is_one_line(capsys):
    assert doctor.main(["--update.batch_sise", "4"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "batch_size" in err
