"""Which checkpoint a run resumes from, and which settings may differ from those it was saved with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fastflowgrpo.config import MAY_CHANGE, Config, setting_types
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.runs.checkpoints import Checkpoint, saved, suggest_good_checkpoint, verified_manifest
from fastflowgrpo.runs.files import WRITTEN

# Settings that are none of the run itself.
OF_A_START = ("output_dir", "overwrite", "resume", "dry_run", "num_processes", "hub_model_id", "hub_private")
# Settings of a reward that say where and how fast it is scored, and not what.
REWARD_MAY_CHANGE = {"url", "base_url", "api_key_env", "device", "workers", "timeout", "required", "concurrency"}


def find(config: Config) -> Checkpoint | None:
    """The checkpoint that `config.resume` means, checked in full but for the model; None if there is none to resume.

    Raises:
        UserError: it is damaged, or of a run with other settings.
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
            raise UserError(f"resume: {config.resume} is no checkpoint of output_dir {config.output_dir}; {there}")
        folder = same[0]
    try:
        manifest = verified_manifest(folder)
    except ValueError as error:
        raise UserError(f"{folder} {error}. {suggest_good_checkpoint(folder, known)}") from error
    changed = changed_settings(manifest["config"], config)
    refuse_changes(folder, changed)
    if manifest["epoch"] > config.epochs:
        raise UserError(f"epochs: {folder} has {manifest['epoch']} epochs behind it already, got {config.epochs}")
    return Checkpoint(folder, manifest, changed)


def changed_settings(before: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings whose value differs from that in a saved config: name -> (before, now).

    A setting that the saved one does not have yet counts as its default.
    """
    old, now = _settings(plain(Config())) | _settings(before), _settings(plain(config))
    return {name: (old[name], value) for name, value in now.items() if old[name] != value and name not in OF_A_START}


def refuse_changes(what: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises UserError if a setting that may not change between two starts of a run has changed."""
    wrong = [f"{name} was {old}, is {new}" for name, (old, new) in changed.items() if name not in MAY_CHANGE]
    if wrong:
        raise UserError(
            f"{what} is of a run with other settings: {'; '.join(wrong)}. Set them as they were, or give another "
            "output_dir"
        )


def plain(config: Config) -> dict[str, Any]:
    """The config as JSON has it."""
    return json.loads(json.dumps(asdict(config)))


def digest(prompts: Sequence[Prompt]) -> str:
    """A checksum of prompts and their metadata."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


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


def check_output(config: Config, resumed: Checkpoint | None) -> None:
    """Raises UserError if the output folder holds a run that may be neither replaced nor gone on with."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file")
    if config.overwrite or resumed or not any((folder / name).exists() for name in WRITTEN):
        return
    if config.resume is None:
        raise UserError(
            f"output_dir {folder} holds a run already: give another, --resume latest to go on with it, "
            "or --overwrite true to replace it"
        )
    # A run that was killed before its first checkpoint begins anew, and makes the same again.
    if not (folder / "config.yaml").exists():
        found = ", ".join(name for name in WRITTEN if (folder / name).exists())
        raise UserError(
            f"output_dir {folder} holds {found}, but no config.yaml: give another, or --overwrite true to remove them"
        )
    before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    refuse_changes(folder, changed_settings(before, config))
