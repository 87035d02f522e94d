"""Checkpoints: the whole state of a run in a folder that is either complete or not there.

checkpoint-<step>/
    pytorch_lora_weights.safetensors, or transformer/     the averaged weights, for diffusers
    raw/                                                  the raw weights, likewise, if there is an average
    training/weights.safetensors                          the raw weights that training resumes from
    training/optimizer.safetensors, ema.safetensors, rng.json, metrics.jsonl
    manifest.json                                         epoch, settings, size and checksum of every file and its own
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.weights import holds_weights
from fastflowgrpo.runs.files import CHECKPOINTS, METRICS, fsync, read_rows

FORMAT = 2
READABLE = (1, FORMAT)  # 1 had no checksum of the manifest itself
MANIFEST = "manifest.json"
TRAINING = "training"
MANIFEST_KEYS = {"format", "epoch", "step", "run_id", "wall_s", "config", "prompts", "files"}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as `resume.find_checkpoint` returns it."""

    folder: Path
    manifest: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]
    """Settings that differ from the checkpoint's: name -> (its value, the present one)."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.manifest["epoch"]

    @property
    def step(self) -> int:
        """Optimiser updates done."""
        return self.manifest["step"]

    @property
    def training(self) -> Path:
        """The folder of the state that training resumes from."""
        return self.folder / TRAINING

    def check_prompts(self, digests: Mapping[str, str]) -> None:
        """Compare the prompts' digests (by setting, see `resume.prompts_digest`) with the checkpoint's.

        Raises:
            UserError: they differ; names the setting.
        """
        for name, value in digests.items():
            if self.manifest["prompts"][name] != value:
                raise UserError(f"{self.folder} is of a run with other prompts: those of {name} have changed")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to this checkpoint."""
        return read_rows(self.training / METRICS)


def write_checkpoint(
    output_dir: str | Path,
    limit: int | None,
    write: Callable[[Path], None],
    manifest: dict[str, Any],
    step: int,
    best: Callable[[Sequence[int]], int | None] = lambda steps: None,
) -> Path:
    """Write `checkpoints/checkpoint-<step>`, then delete the oldest ones beyond `limit`, but for the best.

    Everything is written under another name, synced to the disk, and renamed.

    Args:
        output_dir: the run directory.
        limit: checkpoints that are kept; None keeps all.
        write: writes the files into the folder that it is given.
        manifest: of the keys in `MANIFEST_KEYS` all but format, step and files.
        step: optimiser updates done.
        best: which of the given steps has the checkpoint that is kept besides; None if none has.

    Raises:
        UserError: the disk is full or cannot be written; the earlier checkpoints are untouched.
    """
    parent = Path(output_dir) / CHECKPOINTS
    folder = parent / f"checkpoint-{step}"
    temporary = parent / f".{folder.name}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_remains(output_dir)
        temporary.mkdir()
        write(temporary)
        _write_manifest(temporary, {"format": FORMAT, "step": step, **manifest})
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
    known = list_checkpoints(output_dir)
    kept = best([checkpoint_step(path) for path in known])
    for old in known[: -limit if limit else 0]:
        if checkpoint_step(old) != kept:
            # Renamed first, so that a folder that is deleted in part is no checkpoint any more.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
    return folder


def remove_remains(output_dir: str | Path) -> None:
    """Delete what a process that was killed had not written, or not deleted, to its end."""
    for remains in Path(output_dir).glob(f"{CHECKPOINTS}/.checkpoint-*"):
        shutil.rmtree(remains)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    folders = Path(output_dir).glob(f"{CHECKPOINTS}/*")
    return sorted((path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The optimiser updates that a checkpoint's name says."""
    return int(folder.name.removeprefix("checkpoint-"))


def last_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run directory after the most steps.

    Raises:
        UserError: there is none.
    """
    folders = [folder for folder in list_checkpoints(run) if holds_weights(folder)]
    if not folders:
        raise UserError(f"run {run} has no checkpoint yet")
    return folders[-1]


def set_aside_later(checkpoint: Checkpoint) -> list[Path]:
    """Rename the checkpoints after this one, which the resumed run will write again, and return their new paths."""
    known = list_checkpoints(checkpoint.folder.parent.parent)
    later = known[[path.name for path in known].index(checkpoint.folder.name) + 1 :]
    renamed = []
    for path in later:
        names = (path.with_name(f"{path.name}.set_aside{number or ''}") for number in itertools.count())
        renamed.append(path.rename(next(name for name in names if not name.exists())))
    return renamed


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and compare every file with it.

    Raises:
        ValueError: a file is missing or damaged, with the words that follow the folder's name.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] not in READABLE:
            raise ValueError(f"is of format {manifest['format']}, and this version reads up to {FORMAT}")
        checksum = manifest.pop("sha256", None)
        if (checksum or manifest["format"] != 1) and checksum != _manifest_checksum(manifest):
            raise KeyError("sha256")
        if missing := MANIFEST_KEYS - manifest.keys():
            raise KeyError(missing)
    except OSError as error:
        raise ValueError(f"is incomplete: {MANIFEST}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"is damaged: {MANIFEST} cannot be read") from error
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"is incomplete: {name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"is damaged: {name} has {size} bytes instead of {expected['bytes']}")
        if _file_checksum(path) != expected:
            raise ValueError(f"is damaged: {name} has another content than was written")
    return manifest


def suggest_good_checkpoint(folder: Path, known: list[Path]) -> str:
    """A sentence about the newest good checkpoint before a damaged one."""
    before = known[: [path.name for path in known].index(folder.name)]
    for other in reversed(before):
        try:
            verified_manifest(other)
        except ValueError:
            continue
        return f"The one before it is good: --resume {other}"
    return "There is no good one before it"


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): _file_checksum(path) for path in files}
    manifest = json.loads(json.dumps({**manifest, "files": listed}))  # as it will be read
    manifest["sha256"] = _manifest_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_checksum(path: Path) -> dict[str, Any]:
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            checksum.update(part)
            size += len(part)
    return {"bytes": size, "sha256": checksum.hexdigest()}
