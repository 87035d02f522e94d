"""What the pages are given of a run, and of one with damaged files."""

import json

import pytest
from support.gallery_runs import make_run

from fastflowgrpo.errors import UserError
from fastflowgrpo.viewing.contents import RunFolder, named_runs


def test_the_contents_of_a_run(tmp_path):
    run = RunFolder(make_run(tmp_path / "run"), "run").contents()
    assert [entry["step"] for entry in run["evaluations"]] == [0, 4, 8]
    assert [entry["epoch"] for entry in run["rollouts"]] == [0, 1]
    assert len(run["rows"]) == 5 and run["tasks"] == ["geneval"] and not run["problems"] and not run["finished"]
    assert run["settings"]["update.clip_range"] == "0.01"


def test_nothing_private_is_shown(tmp_path):
    text = json.dumps(RunFolder(make_run(tmp_path / "run"), "run").contents())
    assert "geneval" in text and "secret" not in text and "/home/someone" not in text


def test_damaged_files_are_said_and_the_rest_is_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    index, metrics = folder / "gallery/index.jsonl", folder / "metrics.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:-1], "[1]\n", lines[-1][:60]]))
    metrics.write_bytes(metrics.read_bytes() + b'{"step": \xff')
    (folder / "gallery/step-000004").rename(folder / "elsewhere")
    (folder / "config.yaml").write_text("a: [")
    run = RunFolder(folder, "run").contents()
    assert run["problems"] == [
        "config.yaml cannot be read",
        "gallery/index.jsonl: line 5 and 1 more cannot be read and is left out",
        "gallery/step-000004 is missing",
        "metrics.jsonl: line 6 cannot be read and is left out",
    ]
    assert len(run["evaluations"]) + len(run["rollouts"]) == 4 and len(run["rows"]) == 5


def test_warnings_come_from_the_log(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "log.txt").write_text("epoch 1\nwarning: the guard has fallen\nepoch 2\n")
    assert RunFolder(folder, "run").contents()["warnings"] == ["warning: the guard has fallen"]


def test_a_folder_that_is_written_again_counts_once(tmp_path):
    folder = make_run(tmp_path / "run", steps=(0,))
    index = folder / "gallery/index.jsonl"
    index.write_text(2 * index.read_text())
    assert len(RunFolder(folder, "run").contents()["evaluations"]) == 1


def test_the_version_changes_with_the_files(tmp_path):
    run = RunFolder(make_run(tmp_path / "run"), "run")
    before = run.version()
    assert run.version() == before
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert run.version() != before


def test_only_images_of_the_gallery_are_found(tmp_path):
    run = RunFolder(make_run(tmp_path / "run"), "run")
    image = run.path / "gallery/step-000000/0-0.webp"
    assert run.image("step-000000", "0-0.webp") == image.resolve()
    (tmp_path / "secret.webp").write_bytes(image.read_bytes())
    (run.path / "gallery/step-000000/link.webp").symlink_to(tmp_path / "secret.webp")
    for folder, file in (
        ("step-000000", "link.webp"),
        ("..", "secret.webp"),
        ("step-000000/../step-000000", "0-0.webp"),
        ("step-000000", "../step-000000/0-0.webp"),
        ("step-000000", "9-9.webp"),
        (".", "index.jsonl"),
    ):
        assert run.image(folder, file) is None


def test_runs_of_one_name_are_told_apart_and_no_run_is_an_error(tmp_path):
    folders = [make_run(tmp_path / name) for name in ("x/run", "y/run", "other")]
    assert [run.name for run in named_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]
    with pytest.raises(UserError, match=r"^run .* is not the directory of a run: there is no .*config.yaml$"):
        named_runs([tmp_path / "nothing"])
