"""Prompts from a column of a table: a .csv or .parquet file, or a dataset of the Hugging Face hub."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts.images import check_image
from fastflowgrpo.prompts.prompt import Prompt

FILE = re.compile(r"(.+\.(?:csv|parquet))(?::(.+))?")
DATASET = re.compile(r"hf:([^:]+):([^:]+)(?::([^:]+))?")
# The hub's copy of a public dataset, whatever its own format: CONFIGURATION/SPLIT/0000.parquet, ...
REVISION = "refs/convert/parquet"


class Column(NamedTuple):
    """A column of a table."""

    name: str
    cells: list[Any]


def is_table(source: str) -> bool:
    """Whether `load_table` is the one to read a source of prompts."""
    return source.startswith("hf:") or FILE.fullmatch(source) is not None


def load_table(source: str) -> list[Prompt]:
    """Reads the prompts in a column.

    Args:
        source: FILE.csv:COLUMN or FILE.parquet:COLUMN, or hf:OWNER/NAME:COLUMN[:SPLIT]. The split of a dataset is
            train by default, and CONFIGURATION/SPLIT if it has several configurations. COLUMN may be TEXT+IMAGE, with
            the source images of edits in a second column: paths relative to the table's folder, or in parquet also
            bytes or Images of the library datasets.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such dataset, split or column, a cell has no text or no image, or pyarrow is missing;
            the message names row and column. The first row below the header is row 1.
    """
    if source.startswith("hf:"):
        match = DATASET.fullmatch(source)
        if match is None:
            raise ValueError(f"{source}: expected hf:OWNER/NAME:COLUMN, or hf:OWNER/NAME:COLUMN:SPLIT")
        name, column, split = match.groups("train")
        return [prompt for file in _download(name, split) for prompt in _prompts(file, column, f"{name} {file.name}")]
    match = FILE.fullmatch(source)
    assert match is not None  # is_table
    name, column = match.groups()
    path = Path(name)
    if not path.is_file():
        hint = did_you_mean(path.name, (sibling.name for sibling in path.parent.glob("*")))
        raise FileNotFoundError(f"{name}: no such file{hint}")
    return _prompts(path, column, name)


def _prompts(path: Path, column: str | None, where: str) -> list[Prompt]:
    texts, *images = (_csv if path.suffix == ".csv" else _parquet)(path, column, where)
    for row, cell in enumerate(texts.cells, start=1):
        if not isinstance(cell, str) or not cell.strip():
            raise ValueError(f"{where}, row {row}, column {texts.name}: expected the text of a prompt, got {cell!r}")
    if not texts.cells:
        raise ValueError(f"{where}: there is no prompt in it")
    if not images:
        return [Prompt(cell.strip()) for cell in texts.cells]
    return [
        Prompt(cell.strip(), image=_image(image, path.parent, f"{where}, row {row}, column {images[0].name}"))
        for row, (cell, image) in enumerate(zip(texts.cells, images[0].cells, strict=True), start=1)
    ]


def _image(cell: Any, folder: Path, where: str) -> Path | bytes:
    """The source image of a cell: a path relative to the folder, bytes, or an Image of the library datasets, which is a
    struct of both."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if not isinstance(cell, str | bytes) or not cell:
        raise ValueError(f"{where}: expected the path or the bytes of an image, got {cell!r}")
    try:
        return check_image(cell if isinstance(cell, bytes) else folder / cell)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _csv(path: Path, column: str | None, where: str) -> list[Column]:
    row = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [Column(name, []) for name in _known(column, reader.fieldnames or (), where)]
            for row, record in enumerate(reader, start=1):
                if None in record:  # DictReader's key for what is beyond the header
                    raise ValueError(f"{where}, row {row}: more cells than the header has; quote text with commas")
                for name, cells in columns:
                    cells.append(record[name])
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{where}, row {row + 1}: {error}") from None
    return columns


def _parquet(path: Path, column: str | None, where: str) -> list[Column]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f'{where}: {error}; install it with: pip install "fastflowgrpo[datasets]"') from error
    try:
        table = parquet.ParquetFile(path)
        names = _known(column, table.schema_arrow.names, where)
        data = table.read(names)
        return [Column(name, data[name].to_pylist()) for name in names]
    except ArrowException as error:
        raise ValueError(f"{where}: {error}") from None


def _known(column: str | None, columns: Sequence[str], where: str) -> list[str]:
    """The names of the column of the prompts and, if there is one, of the column of their images."""
    if column is None:
        raise ValueError(
            f"{where}: name the column of the prompts, as in {where}:COLUMN; columns: {', '.join(columns)}"
        )
    names = [column] if column in columns else column.rsplit("+", 1)
    for name in names:
        if name not in columns:
            raise ValueError(
                f"{where}: has no column {name!r}{did_you_mean(name, columns)}, columns: {', '.join(columns)}"
            )
    return names


def _download(name: str, split: str) -> list[Path]:
    """The parquet files of a split, in order, from the hub or its cache on this machine."""
    pattern = f"{split}/*.parquet" if "/" in split else f"*/{split}/*.parquet"
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=REVISION, allow_patterns=pattern)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"hf:{name}: no dataset of which the hub has a parquet version that can be read ({reason}); "
            "a gated one needs `hf auth login`, a private one has none: download it and give its file"
        ) from error
    files = sorted(Path(folder).glob(pattern))
    configurations = sorted({file.parent.parent.name for file in files})
    if not files:
        raise ValueError(f"hf:{name}: no split {split}; https://huggingface.co/datasets/{name} shows those it has")
    if len(configurations) > 1:
        raise ValueError(
            f"hf:{name}: several configurations have a split {split}, name one, as in "
            f"hf:{name}:COLUMN:{configurations[0]}/{split}; configurations: {', '.join(configurations)}"
        )
    return files
