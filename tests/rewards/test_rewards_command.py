"""``python -m fastflowgrpo.rewards``."""

import json
import subprocess
import sys

import pytest
from support.reward_models import sample_images, to_pil

from fastflowgrpo.rewards.__main__ import main
from fastflowgrpo.rewards.jpeg import kilobytes


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """Two images of one size around one of another."""
    images = [sample_images(20, 30)[0], sample_images(48, 48)[5], sample_images(20, 30)[2]]
    paths = [str(tmp_path / name) for name in ("a.png", "long name.png", "c.png")]
    for path, image in zip(paths, images, strict=True):
        to_pil(image[None])[0].save(path)
    return paths


def table(text: str) -> list[list[str]]:
    return [[cell for cell in line.split("  ") if cell] for line in text.splitlines()]


def test_a_row_for_each_image(paths, capsys):
    assert main([*paths, "--prompt", "a cat", "--rewards", "jpeg_compressibility, jpeg_incompressibility"]) == 0
    header, *rows = table(capsys.readouterr().out)
    names = ["jpeg_compressibility", "jpeg_incompressibility"]
    assert [cell.strip() for cell in header] == [
        "image",
        names[0],
        f"{names[0]}/kilobytes",
        names[1],
        f"{names[1]}/kilobytes",
        "reward",
    ]
    sizes = [kilobytes(sample_images(20, 30)[i : i + 1]).item() for i in (0, 2)]
    sizes.insert(1, kilobytes(sample_images(48, 48)[5:]).item())
    for row, path, size in zip(rows, paths, sizes, strict=True):
        assert row[0].strip() == path
        values = [-size / 500, size, size / 500, size, 0]
        assert [float(cell) for cell in row[1:]] == pytest.approx(values, abs=6e-5)


def test_settings_metadata_and_missing_scores(paths, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seen.py").write_text(
        "def tag(batch, power):\n"
        "    assert batch.prompts == ['two cats'] * len(batch.images) and batch.group_ids.sum() == 0\n"
        "    score = batch.metadata[0]['include'][0]['count'] ** power + len(batch.images)\n"
        "    return [score if image.shape[-1] == 30 else float('nan') for image in batch.images]\n"
    )
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    rewards = {"seen:tag": {"weight": 0.5, "power": 3}}
    options = ["--prompt", "two cats", "--rewards", json.dumps(rewards), "--metadata", json.dumps(metadata)]
    assert main([*paths, *options]) == 0
    rows = [[cell.strip() for cell in row[1:]] for row in table(capsys.readouterr().out)]
    assert rows == [["seen:tag", "reward"], ["10.0000", "5.0000"], ["nan", "nan"], ["10.0000", "5.0000"]]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rewards", "ocr"], "the following arguments are required: --prompt"),
        (["--prompt", "a"], "the following arguments are required: --rewards"),
        (["--prompt", "a", "--rewards", "jpeg"], "rewards: unknown reward 'jpeg'; known: geneval, "),
        (["--prompt", "a", "--rewards", "pickscor"], "unknown reward 'pickscor' (did you mean 'pickscore'?)"),
        (["--prompt", "a", "--rewards", "{1"], "--rewards: not JSON (Expecting property name"),
        (["--prompt", "a", "--rewards", "geneval", "--metadata", "[]"], "--metadata: expected a JSON object, got []"),
        (["--prompt", "a", "--rewards", "geneval"], "rewards.geneval: prompt 'a' has no GenEval metadata"),
        (["--prompt", "a", "--rewards", "pickscore"], "rewards.pickscore: cannot load 'yuvalkirstain/PickScore_v1'"),
        (["--prompt", "a", "--rewards", "jpeg_compressibility", "--size", "3"], "unrecognized arguments: --size"),
    ],
)
def test_errors_are_one_line(paths, capsys, options, message):
    assert main([*paths, *options]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("error: ") and message in line and output.out == ""


def test_an_error_of_several_lines_is_one(paths, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("raise ValueError('first\\nsecond')")
    assert main([*paths, "--prompt", "a", "--rewards", "broken_reward:score"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ValueError: first second")


def test_files_that_are_no_images(paths, tmp_path, capsys):
    (tmp_path / "text.png").write_text("text")
    for path, message in ((str(tmp_path / "text.png"), "cannot identify image file"), ("gone.png", "No such file")):
        assert main([paths[0], path, "--prompt", "a", "--rewards", "jpeg_compressibility"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line and path in line


def test_as_a_command(paths):
    command = [sys.executable, "-m", "fastflowgrpo.rewards", paths[0], "--prompt", "a", "--rewards"]
    done = subprocess.run([*command, "jpeg_compressibility"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout.split()[-1]) == pytest.approx(-kilobytes(sample_images(20, 30)[:1]).item() / 500, abs=6e-5)
