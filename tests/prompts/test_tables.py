"""Prompts from a column of a CSV or parquet file, and of a dataset in the hub's cache."""

import sys
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from PIL import Image
from pyarrow import parquet

from fastflowgrpo.prompts import Prompt, load_prompts


def write_parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Two splits and two configurations of a dataset, as the hub's client caches them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "datasets--owner--name", "a" * 40
    (folder / "refs/refs/convert").mkdir(parents=True)
    (folder / "refs/refs/convert/parquet").write_text(commit)
    snapshot = folder / "snapshots" / commit
    write_parquet(snapshot / "default/train/0001.parquet", caption=["third"])
    write_parquet(snapshot / "default/train/0000.parquet", caption=["first", " second\n"])
    write_parquet(snapshot / "default/test/0000.parquet", caption=["held out"])
    write_parquet(snapshot / "other/test/0000.parquet", caption=["other", None])


def test_a_column_of_a_csv_file(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes('\ufeffid,the:prompt\r\n1," a cat, ""sitting""\n"\r\n2,caf\u00e9\r\n'.encode())
    assert load_prompts(f"{path}:the:prompt") == [Prompt('a cat, "sitting"'), Prompt("caf\u00e9")]


def test_a_column_of_a_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "prompts.parquet", id=[1, 2], prompt=["a cat ", "a dog"])
    assert load_prompts(f"{path}:prompt") == [Prompt("a cat"), Prompt("a dog")]


def test_a_second_column_has_the_images(tmp_path):
    """Paths relative to the table, or what the library datasets writes for its feature Image."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 3), "red").save(tmp_path / "in/a.png")
    (tmp_path / "edits.csv").write_text("id,edit,file\n1,make it red ,in/a.png\n2,add a dog,in/a.png\n")
    file = tmp_path / "in/a.png"
    expected = [Prompt("make it red", image=file), Prompt("add a dog", image=file)]
    assert load_prompts(f"{tmp_path}/edits.csv:edit+file") == expected
    images = [{"bytes": file.read_bytes(), "path": "a.png"}, {"bytes": None, "path": "in/a.png"}]
    path = write_parquet(tmp_path / "edits.parquet", edit=["make it red", "add a dog"], image=images)
    assert load_prompts(f"{path}:edit+image") == [Prompt("make it red", image=file.read_bytes()), expected[1]]
    path = write_parquet(tmp_path / "bytes.parquet", edit=["make it red"], image=[file.read_bytes()])
    assert load_prompts(f"{path}:edit+image") == [Prompt("make it red", image=file.read_bytes())]
    path = write_parquet(tmp_path / "plus.parquet", **{"edit+image": ["a cat"]})
    assert load_prompts(f"{path}:edit+image") == [Prompt("a cat")]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": None, "path": "in.png"}, r"no such file .*in\.png \(did you mean 'on\.png'\?\)$"),
        ({"bytes": b"no image", "path": ""}, r"a cell of 8 bytes is not an image that Pillow can read$"),
        ({"bytes": None, "path": None}, r"expected the path or the bytes of an image, got None$"),
        ("text.txt", r".*text\.txt is not an image that Pillow can read$"),
        (7, r"expected the path or the bytes of an image, got 7$"),
    ],
)
def test_errors_of_images(tmp_path, cell, message):
    (tmp_path / "text.txt").write_text("no image")
    Image.new("RGB", (4, 3)).save(tmp_path / "on.png")
    path = write_parquet(tmp_path / "edits.parquet", edit=["make it red"], image=[cell])
    with pytest.raises(ValueError, match=rf"edits\.parquet, row 1, column image: {message}"):
        load_prompts(f"{path}:edit+image")
    with pytest.raises(ValueError, match=r"has no column 'imag' \(did you mean 'image'\?\), columns: edit, image$"):
        load_prompts(f"{path}:edit+imag")


def test_a_dataset_of_the_hub(dataset):
    assert [prompt.text for prompt in load_prompts("hf:owner/name:caption")] == ["first", "second", "third"]
    assert load_prompts("hf:owner/name:caption:default/test") == [Prompt("held out")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/name:caption:test", r"several configurations have a split test, .*configurations: default, other$"),
        ("owner/name:caption:tset", r"no split tset; https://huggingface\.co/datasets/owner/name shows"),
        ("owner/name:captions", r"name 0000\.parquet: has no column 'captions' \(did you mean 'caption'\?\)"),
        ("owner/name:caption:other/test", r"0000\.parquet, row 2, column caption: expected the text .*, got None$"),
        ("owner/name", r"expected hf:OWNER/NAME:COLUMN, or"),
        ("owner/none:caption", r"hf:owner/none: no dataset of which the hub has a parquet version"),
        ("a/b/c:caption", r"hf:a/b/c: no dataset .*\(Repo id must be"),
    ],
)
def test_errors_of_datasets(dataset, source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(f"hf:{source}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,text\n1,a cat\n", r"has no column 'prompt', columns: id, text$"),
        (b"prompt,id\na cat,1\n  ,2\n", r"csv, row 2, column prompt: expected the text of a prompt, got '  '$"),
        (b"id,prompt\n1,a cat\n2\n", r"csv, row 2, column prompt: .*, got None$"),
        (b"id,prompt\n1,a cat, sitting\n", r"csv, row 1: more cells than the header has; quote text with commas$"),
        (b"prompt\na cat\n" + b"x" * 200_000, r"csv, row 2: field larger than field limit"),
        (b"prompt\n", r"csv: there is no prompt in it"),
        (b"", r"csv: has no column 'prompt'"),
        (b"prompt\ncaf\xe9\n", r"csv: not UTF-8 text \(.* at byte 10\)"),
    ],
)
def test_errors_of_csv_files(tmp_path, content, message):
    path = tmp_path / "prompts.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(f"{path}:prompt")


def test_errors_of_files(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "prompts.parquet", id=[1, 2], prompt=["a cat", ""])
    with pytest.raises(ValueError, match=r"parquet: name the column .*parquet:COLUMN; columns: id, prompt$"):
        load_prompts(str(path))
    with pytest.raises(ValueError, match=r"parquet, row 1, column id: expected the text of a prompt, got 1$"):
        load_prompts(f"{path}:id")
    with pytest.raises(ValueError, match=r"parquet, row 2, column prompt: .*, got ''$"):
        load_prompts(f"{path}:prompt")
    with pytest.raises(FileNotFoundError, match=r"promts\.parquet: no such file \(did you mean 'prompts\.parquet'\?\)"):
        load_prompts(f"{tmp_path}/promts.parquet:prompt")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"text\.parquet: .*[Pp]arquet magic bytes"):
        load_prompts(f"{tmp_path}/text.parquet:prompt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'pip install "fastflowgrpo\[datasets\]"$'):
        load_prompts(f"{path}:prompt")
