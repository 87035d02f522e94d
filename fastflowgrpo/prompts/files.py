"""Prompt files of lines, and the check of GenEval metadata."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts.images import check_image, load_pairs
from fastflowgrpo.prompts.prompt import RELATIONS, TAGS, Prompt
from fastflowgrpo.prompts.tables import is_table, load_table

BUILT_IN = "shapes, shapes_edit, geneval, ocr or general"  # prompts that need no file, see sources.py


def load_prompts(source: str) -> list[Prompt]:
    """Reads a prompt file.

    Args:
        source: a UTF-8 file: .txt with one prompt a line, or .jsonl with one GenEval metadata object a line (see
            `check_metadata`) whose text is under "prompt". A line with the source image of an edit under "image", a
            path relative to the file or a list of paths, need not have GenEval's keys. Blank lines are skipped. Or a
            folder, as in `load_pairs`, or a column of a table, as in `load_table`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, has no prompt, or has a wrong line; the message names line and field.
    """
    if is_table(source):
        return load_table(source)
    path = Path(source)
    if path.is_dir():
        return load_pairs(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{source}: expected a .txt file (one prompt a line), a GenEval .jsonl file, FILE.csv:COLUMN, "
            "FILE.parquet:COLUMN, hf:OWNER/NAME:COLUMN, a folder of NAME.png and NAME.txt, "
            f"or {BUILT_IN}"
        )
    if not path.is_file():
        hint = did_you_mean(path.name, (sibling.name for sibling in path.parent.glob("*")))
        raise FileNotFoundError(f"{source}: no such file{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{source}: there is no prompt in it")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in lines]
    return [_json_prompt(line, path.parent, f"{source}, line {number}") for number, line in lines]


def _json_prompt(line: str, folder: Path, where: str) -> Prompt:
    """The prompt of a line; the paths of its images are relative to the folder."""
    try:
        metadata, images = json.loads(line), []
        if isinstance(metadata, dict) and "image" in metadata:
            images = _images(metadata, folder)
        else:
            check_metadata(metadata)
        text = _field(metadata, "prompt", "", "the prompt's text", _is_text)
        return Prompt(text, metadata, images[0] if images else None, tuple(images[1:]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _images(metadata: dict[str, Any], folder: Path) -> list[Path]:
    """The files under "image"."""
    found = _field(metadata, "image", "", "the path of an image, or a list of paths", _is_text_or_list)
    names, images = found if isinstance(found, list) else [found], []
    for i, name in enumerate(names):
        where = f"image[{i}]" if isinstance(found, list) else "image"
        if not _is_text(name):
            raise ValueError(f"{where}: expected the path of an image, got {name!r}")
        try:
            images.append(check_image(folder / name))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return images


def check_metadata(metadata: Any) -> None:
    """Checks GenEval metadata (arXiv 2310.11513):
    `{tag, include: [{class, count, color?, position?: [relation, index]}], exclude?: [{class, count}]}`.

    A position's index points to an earlier entry of `include`, to which the object has this relation. Other top-level
    keys are allowed, for your own rewards. Inside a clause an unknown key is an error, since no reward would check it.

    Raises:
        ValueError: names the wrong field, its expected value and its value.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"expected a JSON object, got {metadata!r}")
    _field(metadata, "tag", "", f"one of {', '.join(TAGS)}", lambda tag: tag in TAGS)
    includes = _field(
        metadata, "include", "", "a non-empty list", lambda clauses: isinstance(clauses, list) and clauses
    )
    for i, clause in enumerate(includes):
        where = f"include[{i}]"
        _check_clause(clause, where, ("class", "count", "color", "position"))
        if "color" in clause:
            _field(clause, "color", where, "a colour's name", _is_text)
        if "position" in clause:
            expected = f"[relation, index], the relation one of {', '.join(RELATIONS)}, the index of an earlier include"
            _field(clause, "position", where, expected, functools.partial(_is_position, i))
    if "exclude" in metadata:
        for i, clause in enumerate(
            _field(metadata, "exclude", "", "a list", lambda clauses: isinstance(clauses, list))
        ):
            _check_clause(clause, f"exclude[{i}]", ("class", "count"))


def _check_clause(clause: Any, where: str, keys: tuple[str, ...]) -> None:
    if not isinstance(clause, dict):
        raise ValueError(f"{where}: expected an object, got {clause!r}")
    for key in clause:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, keys)}, known: {', '.join(keys)}")
    _field(clause, "class", where, "an object's name", _is_text)
    _field(clause, "count", where, "an integer of at least 1", lambda count: _is_int(count) and count >= 1)


def _field(parent: dict[str, Any], key: str, where: str, expected: str, valid: Callable[[Any], Any]) -> Any:
    name = f"{where}.{key}" if where else key
    if key not in parent:
        raise ValueError(f"{name}: missing, expected {expected}")
    if not valid(parent[key]):
        raise ValueError(f"{name}: expected {expected}, got {parent[key]!r}")
    return parent[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_text_or_list(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_position(include: int, value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and value[0] in RELATIONS
        and _is_int(value[1])
        and 0 <= value[1] < include
    )
