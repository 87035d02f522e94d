"""Checkpoints: the whole state of a run in a folder that is complete or not there, and is known again by its manifest.

checkpoint-<step>/
    pytorch_lora_weights.safetensors, or transformer/     the averaged weights, for diffusers
    training/weights.safetensors                          the raw weights that are trained
    training/optimizer.safetensors, ema.safetensors, rng.json, metrics.jsonl
    manifest.json                                         epoch, settings, and size and checksum of every file
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.weights import holds_weights
from fastflowgrpo.runs.files import fsync

FORMAT = 1
MANIFEST = "manifest.json"
KEYS = {"format", "epoch", "step", "run_id", "wall_s", "config", "prompts", "files"}  # of the manifest


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as `find` returns it."""

    folder: Path
    manifest: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]
    """Settings that are others than the checkpoint's: name -> (its value, the present one)."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.manifest["epoch"]

    @property
    def step(self) -> int:
        """Optimiser updates done."""
        return self.manifest["step"]

    def check_prompts(self, digests: Mapping[str, str]) -> None:
        """Raises UserError where the prompts are others than the run's: setting -> `digest`."""
        for name, value in digests.items():
            if self.manifest["prompts"][name] != value:
                raise UserError(f"{self.folder} is of a run with other prompts: those of {name} have changed")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to here."""
        lines = (self.folder / "training" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def save(
    output_dir: str | Path, limit: int | None, write: Callable[[Path], None], manifest: dict[str, Any], step: int
) -> Path:
    """Make `checkpoints/checkpoint-<step>`, then delete the oldest beyond `limit`.

    Everything is written under another name, synced to the disk, and renamed.

    Args:
        write: writes the files into the folder that it is given.

    Raises:
        UserError: they cannot be written, as when the disk is full; those before it are as they were.
    """
    parent = Path(output_dir) / "checkpoints"
    folder = parent / f"checkpoint-{step}"
    temporary = parent / f".{folder.name}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for remains in parent.glob(".checkpoint-*"):  # of a process that was killed
            shutil.rmtree(remains)
        temporary.mkdir()
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        listed = {str(path.relative_to(temporary)): _description(path) for path in files}
        text = json.dumps({"format": FORMAT, "step": step, **manifest, "files": listed}, indent=1)
        (temporary / MANIFEST).write_text(text + "\n")
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        temporary.rename(folder)
        fsync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{folder} cannot be written: {reason}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in saved(output_dir)[: -limit if limit else 0]:
        # Renamed first, so that one which is deleted in part is no checkpoint any more.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
    return folder


def saved(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoints/*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def set_later_ones_aside(checkpoint: Checkpoint) -> list[Path]:
    """Rename the checkpoints after this one, which the run that goes on from here will make again: their new paths."""
    known = saved(checkpoint.folder.parent.parent)
    later = known[[path.name for path in known].index(checkpoint.folder.name) + 1 :]
    aside = []
    for path in later:
        names = (path.with_name(f"{path.name}.set_aside{number or ''}") for number in itertools.count())
        aside.append(path.rename(next(name for name in names if not name.exists())))
    return aside


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as it says.

    Raises:
        ValueError: with what is wrong.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"is of format {manifest['format']}, and this version reads {FORMAT}")
        if missing := KEYS - manifest.keys():
            raise KeyError(missing)
    except OSError as error:
        raise ValueError(f"is incomplete: {MANIFEST}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"is damaged: {MANIFEST} cannot be read") from error
    for name, description in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"is incomplete: {name} is missing")
        size = path.stat().st_size
        if size != description["bytes"]:
            raise ValueError(f"is damaged: {name} has {size} bytes instead of {description['bytes']}")
        if _description(path) != description:
            raise ValueError(f"is damaged: {name} has another content than was written")
    return manifest


def suggest_good_checkpoint(folder: Path, known: list[Path]) -> str:
    """The newest good checkpoint before one that is not."""
    before = known[: [path.name for path in known].index(folder.name)]
    for other in reversed(before):
        try:
            verified_manifest(other)
        except ValueError:
            continue
        return f"The one before it is good: --resume {other}"
    return "There is no good one before it"


def _description(path: Path) -> dict[str, Any]:
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            checksum.update(part)
            size += len(part)
    return {"bytes": size, "sha256": checksum.hexdigest()}


def last_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run's directory after the most steps; UserError if there is none."""
    found = [folder for folder in saved(run) if holds_weights(folder)]
    if not found:
        raise UserError(f"run {run} has no checkpoint yet")
    return found[-1]
