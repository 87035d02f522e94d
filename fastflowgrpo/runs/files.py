"""The files in a run directory, and how they are written."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastflowgrpo.errors import UserError

CONFIG, METRICS, SUMMARY, IMAGES, CHECKPOINTS = "config.yaml", "metrics.jsonl", "summary.json", "images", "checkpoints"
BEFORE_AFTER, CURVE = "before_after.png", "curve.png"
GALLERY, INDEX = "gallery", "index.jsonl"  # the folder, and the file in it
LOG, LOCK = "log.txt", ".lock"  # what the run printed, and which process writes the folder
HEARTBEAT = ".heartbeat"  # where each of several processes is
TRACKER = "fastflowgrpo"  # project name of the trackers, and TensorBoard's folder
# Everything that a run writes into its folder and that --overwrite removes. The config is last: as long as it is there,
# a run that was killed while it removed the others is recognised.
WRITTEN = (METRICS, SUMMARY, IMAGES, GALLERY, CHECKPOINTS, TRACKER, BEFORE_AFTER, CURVE, CONFIG)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file. A last line without its end, of a process that was killed, is left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, one JSON object a line."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; then that file replaces `path`, which is never there in part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside it a file or folder is written: what the system says against it becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        gone = isinstance(error, FileNotFoundError) and not path.parent.exists()
        reason = f"{path.parent} is not there any more" if gone else error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}") from error


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
