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
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastflowgrpo.config import MAY_CHANGE, Config, ConfigError, setting_types
from fastflowgrpo.processes import shared_like
from fastflowgrpo.prompts import Prompt

FORMAT = 1
MANIFEST = "manifest.json"
KEYS = {"format", "epoch", "step", "run_id", "wall_s", "config", "prompts", "files"}  # of the manifest
# Settings that are none of the run itself.
OF_A_START = ("output_dir", "overwrite", "resume", "dry_run", "num_processes", "hub_model_id", "hub_private")
# Settings of a reward that say where and how fast it is scored, and not what.
REWARD_MAY_CHANGE = {"url", "base_url", "api_key_env", "device", "workers", "timeout", "required", "concurrency"}


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
        """Raises ConfigError where the prompts are others than the run's: setting -> `digest`."""
        for name, value in digests.items():
            if self.manifest["prompts"][name] != value:
                raise ConfigError(f"{self.folder} is of a run with other prompts: those of {name} have changed")

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
        ConfigError: they cannot be written, as when the disk is full; those before it are as they were.
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
            _sync(path)
        temporary.rename(folder)
        _sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{folder} cannot be written: {reason}") from error
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


def find(config: Config) -> Checkpoint | None:
    """The checkpoint that `config.resume` means, checked in full but for the model; None if there is none to resume.

    Raises:
        ConfigError: it is damaged, or of a run with other settings.
    """
    if config.resume is None:
        return None
    known = saved(config.output_dir)
    if config.resume == "latest":
        if not known:
            return None
        folder = known[-1]
    else:
        meant = Path(config.resume).resolve()
        same = [path for path in known if path.resolve() == meant]
        if not same:
            there = f"there are: {', '.join(map(str, known))}" if known else "there is none"
            raise ConfigError(f"resume: {config.resume} is no checkpoint of output_dir {config.output_dir}; {there}")
        folder = same[0]
    try:
        manifest = _verified(folder)
    except ValueError as error:
        raise ConfigError(f"{folder} {error}. {_offer(folder, known)}") from error
    changed = changed_settings(manifest["config"], config)
    refuse_changes(folder, changed)
    if manifest["epoch"] > config.epochs:
        raise ConfigError(f"epochs: {folder} has {manifest['epoch']} epochs behind it already, got {config.epochs}")
    return Checkpoint(folder, manifest, changed)


def set_later_ones_aside(checkpoint: Checkpoint) -> list[Path]:
    """Rename the checkpoints after this one, which the run that goes on from here will make again: their new paths."""
    known = saved(checkpoint.folder.parent.parent)
    later = known[[path.name for path in known].index(checkpoint.folder.name) + 1 :]
    aside = []
    for path in later:
        names = (path.with_name(f"{path.name}.set_aside{number or ''}") for number in itertools.count())
        aside.append(path.rename(next(name for name in names if not name.exists())))
    return aside


def changed_settings(before: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings whose value differs from that in a saved config: name -> (before, now).

    A setting that the saved one does not have yet counts as its default.
    """
    old, now = _settings(plain(Config())) | _settings(before), _settings(plain(config))
    return {name: (old[name], value) for name, value in now.items() if old[name] != value and name not in OF_A_START}


def refuse_changes(what: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ConfigError if a setting that may not change between two starts of a run has changed."""
    wrong = [f"{name} was {old}, is {new}" for name, (old, new) in changed.items() if name not in MAY_CHANGE]
    if wrong:
        raise ConfigError(
            f"{what} is of a run with other settings: {'; '.join(wrong)}. Set them as they were, or give another "
            "output_dir"
        )


def plain(config: Config) -> dict[str, Any]:
    """The config as JSON has it."""
    return json.loads(json.dumps(asdict(config)))


def digest(prompts: Sequence[Prompt]) -> str:
    """A checksum of prompts and their metadata."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


def training_state(
    parameters: Mapping[str, Tensor], optimizer: AcceleratedOptimizer | None, ema: EMAModel | None
) -> dict[str, dict[str, Tensor]]:
    """The tensors that training goes on from, "weights", "optimizer" and "ema", each by its name.

    Args:
        parameters: the trained parameters by name, in the optimiser's order.
        optimizer: None for one that cannot be gone on with.
    """
    state = {"weights": dict(parameters)}
    if optimizer is not None:
        states = optimizer.state_dict()["state"]
        state["optimizer"] = {
            f"{name}/{key}": tensor
            for index, name in enumerate(parameters)
            for key, tensor in states.get(index, {}).items()  # none before the parameter's first gradient
        }
    if ema is not None:
        state["ema"] = dict(zip(parameters, ema.shadow_params, strict=True))
    return state


def save_training(
    folder: Path,
    state: Mapping[str, Mapping[str, Tensor]],
    averages: int | None,
    rngs: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write what training goes on from, into a new folder.

    Args:
        state: `training_state`, of whole tensors.
        averages: steps of the average, if there is one.
        rngs: `rng_state` of each process.
        rows: of metrics.jsonl.
    """
    folder.mkdir()
    for name, tensors in state.items():
        metadata = {"optimization_step": str(averages)} if name == "ema" else None
        save_file(_detached(tensors), folder / f"{name}.safetensors", metadata=metadata)
    (folder / "rng.json").write_text(json.dumps(rngs))
    (folder / "metrics.jsonl").write_text(lines(rows))


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as metrics.jsonl has them."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def load_training(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    optimizer: AcceleratedOptimizer,
    ema: EMAModel | None,
) -> None:
    """Set weights, optimiser and average to those of a checkpoint; arguments as for `training_state`.

    Raises:
        ConfigError: other parameters are trained, or the checkpoint is without an optimiser.
    """
    folder = checkpoint.folder / "training"
    if not (folder / "weights.safetensors").is_file():
        raise ConfigError(
            f"{checkpoint.folder} is not seen by every process: output_dir must be on a disk that all machines share"
        )
    if not (folder / "optimizer.safetensors").is_file():
        raise ConfigError(f"{checkpoint.folder} was saved under DeepSpeed, without the optimiser: it has no sequel")
    weights = load_file(folder / "weights.safetensors")
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if theirs != ours:
        name = next(name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name))
        raise ConfigError(
            f"{checkpoint.folder} is of another model: it trains {name} of shape {theirs.get(name)}, "
            f"this one of shape {ours.get(name)}"
        )
    states: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(parameters)}
    for path, tensor in load_file(folder / "optimizer.safetensors").items():
        name, _, key = path.rpartition("/")
        own = parameters[name]
        states.setdefault(index[name], {})[key] = shared_like(tensor, own) if tensor.shape == own.shape else tensor
    # The groups are the present ones, for the learning rate may be another one.
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shared_like(weights[name], parameter))
        if ema is not None:
            with safe_open(folder / "ema.safetensors", "pt") as file:
                ema.optimization_step = int(file.metadata()["optimization_step"])
                for name, average in zip(parameters, ema.shadow_params, strict=True):
                    average.copy_(shared_like(file.get_tensor(name), average))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global random numbers, as JSON has it."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - a reward of the user's may draw from it
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
    }


def load_rng(checkpoint: Checkpoint, process: int, device: torch.device) -> None:
    """Set the random numbers to those of a checkpoint. A process that the run did not have keeps its own."""
    states = json.loads((checkpoint.folder / "training" / "rng.json").read_text())
    if process >= len(states):
        return
    state = states[process]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another path to write; then that file takes the place of `path`, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value, of the plain form of a config; of rewards, what decides their scores."""
    values: dict[str, Any] = {}
    for name, hint in setting_types().items():
        value: Any = saved
        for key in name.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT and not is_dataclass(hint):
            values[name] = value
    if "rewards" in values:
        values["rewards"] = {name: _reward(value) for name, value in values["rewards"].items()}
    return values


_ABSENT = object()


def _reward(value: Any) -> dict[str, Any]:
    settings = value if isinstance(value, Mapping) else {"weight": value}
    return {"weight": 1.0} | {key: value for key, value in settings.items() if key not in REWARD_MAY_CHANGE}


def _verified(folder: Path) -> dict[str, Any]:
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


def _offer(folder: Path, known: list[Path]) -> str:
    """The newest good checkpoint before one that is not."""
    before = known[: [path.name for path in known].index(folder.name)]
    for other in reversed(before):
        try:
            _verified(other)
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
