"""The files in a run directory, and how they are written."""

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastflowgrpo import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
TRACKER = "fastflowgrpo"  # project name of the trackers, and TensorBoard's folder
# What a run writes into its folder, and all that --overwrite removes.
WRITTEN = (
    "metrics.jsonl",
    "summary.json",
    "images",
    "checkpoints",
    TRACKER,
    "before_after.png",
    "curve.png",
    "config.yaml",  # last: by it a run that was killed in between is known
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide about the numbers."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "fastflowgrpo": __version__, **packages}


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as metrics.jsonl has them."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another path to write; then that file takes the place of `path`, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
