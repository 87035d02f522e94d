"""The export: the pages, the data and the images as files."""

import json
from pathlib import Path

from support.gallery_runs import HOSTILE, make_run

from fastflowgrpo.view import main


def data_of(site):
    text = (site / "data.js").read_text()
    assert text.startswith("window.fastflowgrpo = ") and text.isascii()
    return json.loads(text.removeprefix("window.fastflowgrpo = ").removesuffix(";\n"))


def test_an_export_has_everything_and_nothing_else(tmp_path, capsys):
    run, site = make_run(tmp_path / "run", prompts=HOSTILE), tmp_path / "site"
    (run / "gallery/step-000004/1-0.webp").unlink()
    assert main([str(run), "--export", str(site)]) == 0
    assert capsys.readouterr().out == f"{site / 'index.html'}: 0.1 MB\n"
    data = data_of(site)
    assert not data["live"] and [image["text"] for image in data["runs"][0]["evaluations"][0]["images"]] == HOSTILE
    images = {path.relative_to(run / "gallery") for path in run.glob("gallery/*/*.webp")}
    assert {path.relative_to(site / "runs/0") for path in site.rglob("*.webp")} == images and len(images) == 16
    html = (site / "index.html").read_text()
    assert "http" not in html.replace("http-equiv", "") and 'src="data.js"' in html


def test_an_export_is_replaced_and_other_folders_are_not_touched(tmp_path, capsys):
    run, site = make_run(tmp_path / "run"), tmp_path / "site"
    for _ in range(2):
        assert main([str(run), str(run), "--export", str(site)]) == 0
        assert main([str(run), "--export", str(site)]) == 0
        assert not (site / "runs/1").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    assert main([str(run), "--export", str(other)]) == 2
    assert "is there already and is no export" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_an_index_cannot_lead_the_export_out_of_its_folder(tmp_path):
    run, site = make_run(tmp_path / "run", steps=(0,)), tmp_path / "deep/site"
    index = run / "gallery/index.jsonl"
    index.write_text(index.read_text().replace("step-000000", "../gallery/step-000000"))
    assert main([str(run), "--export", str(site)]) == 0
    assert not list(tmp_path.rglob("deep/**/*.webp"))


def test_the_sources_of_edits_are_exported_and_nothing_beside_them(tmp_path):
    run, site = make_run(tmp_path / "run", steps=(0, 4), edits=True), tmp_path / "site"
    index = run / "gallery/index.jsonl"
    index.write_text(index.read_text().replace('"2-source.webp"', '"../../config.yaml"'))
    assert main([str(run), "--export", str(site)]) == 0
    images = {path.relative_to(run / "gallery") for path in run.glob("gallery/*/*.webp")}
    exported = {path.relative_to(site / "runs/0") for path in site.glob("runs/**/*.*")}
    assert images - exported == {Path(folder, "2-source.webp") for folder in ("step-000000", "step-000004")}
    assert exported <= images and Path("epoch-000000/0-source.webp") in exported
