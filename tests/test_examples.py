"""The examples run as they are, and do what they say."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder; what it printed."""

    def run_example(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])  # as for a script
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_the_sampler(run):
    printed = run("sampler.py")
    assert "noise level 0: same images: True" in printed
    assert "latents (11, 4, 8, 3, 3) timesteps (10,)" in printed
    assert printed.count("log-prob of each image") == 10
    with Image.open("sampler.png") as image:
        assert image.size == (240, 240)


def test_the_notebook_is_the_sampler_and_runs(run, tmp_path, monkeypatch, capsys):
    run("sampler.py")
    notebook = json.loads((EXAMPLES / "sampler.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = ["".join(o.get("text", "")) for cell in notebook["cells"] for o in cell.get("outputs", [])]
    names = {}
    for cell in cells:
        exec(cell, names)
    printed = capsys.readouterr().out
    assert printed.count("log-prob of each image") == 10
    assert sum(text.count("log-prob of each image") for text in outputs) == 10
    assert "same images: True" in printed and any("same images: True" in text for text in outputs)


def test_a_reward_of_your_own(run):
    printed = run("custom_reward.py")
    first, last = map(float, re.search(r"first epoch (\S+), of the last (\S+)", printed).groups())
    assert last > first
    row = json.loads(Path("runs/custom_reward/metrics.jsonl").read_text().splitlines()[1])
    assert row["custom_reward:redness"] + 0.5 * row["custom_reward:novelty"] == pytest.approx(row["reward"], abs=1e-6)


def test_a_loop_of_your_own_raises_its_reward(run):
    rewards = [float(reward) for reward in re.findall(r"reward (\S+)", run("own_loop.py"))]
    assert rewards[-1] > rewards[0] + 0.5


def test_a_lora_in_plain_diffusers(run):
    assert "saved load_lora.png" in run("load_lora.py")
    with Image.open("load_lora.png") as images:
        before, after = images.crop((0, 0, 384, 192)), images.crop((0, 192, 384, 384))
    assert before.tobytes() != after.tobytes()
