"""Which checkpoint a run resumes from, and which settings may differ from those it was saved with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fastflowgrpo.config import MAY_CHANGE, START_SETTINGS, Config, guard_reward, setting_types
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.runs.checkpoints import Checkpoint, list_checkpoints, suggest_good_checkpoint, verified_manifest
from fastflowgrpo.runs.files import CONFIG, LOG, WRITTEN
from fastflowgrpo.runs.guard import best_checkpoint

# Settings of a reward that say where and how fast it is scored, not what: never compared.
REWARD_NOT_COMPARED = {"url", "base_url", "api_key_env", "device", "workers", "timeout", "required", "concurrency"}
_ABSENT = object()


def checkpoint_to_resume(config: Config) -> Checkpoint | None:
    """Find the checkpoint that this start resumes from, and check that `output_dir` may be written.

    Returns:
        The verified checkpoint; None if the run begins anew.

    Raises:
        UserError: the checkpoint is damaged or of a run with other settings, or `output_dir` holds another run.
    """
    checkpoint = find_checkpoint(config)
    if checkpoint is None:
        check_output_dir(config)
        if config.overwrite:  # the other files are removed once everything is loaded; the log is written until then
            (Path(config.output_dir) / LOG).unlink(missing_ok=True)
    return checkpoint


def find_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that `config.resume` names, with its files verified; None if there is none to resume from.

    Raises:
        UserError: it is damaged, or of a run with other settings.
    """
    if config.resume is None:
        return None
    known = list_checkpoints(config.output_dir)
    if config.resume == "latest":
        if not known:
            return None
        folder = known[-1]
    elif config.resume == "best":
        folder = best_checkpoint(config.output_dir)
    else:
        wanted = Path(config.resume).resolve()
        matches = [path for path in known if path.resolve() == wanted]
        if not matches:
            there = f"there are: {', '.join(map(str, known))}" if known else "there is none"
            raise UserError(f"resume: {config.resume} is not a checkpoint in output_dir {config.output_dir}; {there}")
        folder = matches[0]
    try:
        manifest = verified_manifest(folder)
    except ValueError as error:
        raise UserError(f"{folder} {error}. {suggest_good_checkpoint(folder, known)}") from error
    changed = changed_settings(manifest["config"], config)
    refuse_changes(folder, changed)
    if manifest["epoch"] > config.epochs:
        raise UserError(f"epochs: must be at least the {manifest['epoch']} that {folder} has done, got {config.epochs}")
    return Checkpoint(folder, manifest, changed)


def check_output_dir(config: Config) -> None:
    """Check that a run that begins anew may write `output_dir`.

    Raises:
        UserError: it holds a run that may be neither replaced nor resumed.
    """
    folder = Path(config.output_dir)
    if config.overwrite or not any((folder / name).exists() for name in WRITTEN):
        return
    if config.resume is None:
        raise UserError(
            f"output_dir {folder} holds a run already: give another output_dir, --resume latest to go on with it, "
            "or --overwrite true to replace it"
        )
    # A run that was killed before its first checkpoint begins anew, if its settings are the same.
    if not (folder / CONFIG).exists():
        found = ", ".join(name for name in WRITTEN if (folder / name).exists())
        raise UserError(
            f"output_dir {folder} holds {found}, but no {CONFIG}: give another output_dir, or --overwrite true to "
            "remove them"
        )
    try:
        before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder / CONFIG} is damaged: give another output_dir, or --overwrite true to replace the run"
        ) from error
    refuse_changes(folder, changed_settings(before, config))


def changed_settings(before: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from those of a saved config: name -> (before, now).

    A setting that the saved config does not have yet counts as its default.
    """
    old, now = _compared(config_as_json(Config())) | _compared(before), _compared(config_as_json(config))
    if config.update.batch_size == 0:  # goes on with the size that was chosen
        del now["update.batch_size"]
    return {name: (old[name], value) for name, value in now.items() if old[name] != value}


def refuse_changes(source: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that only settings have changed that may change between two starts of a run.

    Args:
        source: the run or checkpoint with the earlier settings.
        changed: from `changed_settings`.

    Raises:
        UserError: another setting has changed.
    """
    wrong = [f"{name} was {old}, is now {new}" for name, (old, new) in changed.items() if name not in MAY_CHANGE]
    if wrong:
        raise UserError(
            f"{source} was made with other settings: {'; '.join(wrong)}. Set them as they were, or give another "
            "output_dir"
        )


def config_as_json(config: Config) -> dict[str, Any]:
    """The config in JSON's types."""
    return json.loads(json.dumps(asdict(config)))


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A checksum of prompts, their metadata and the names of their source images."""
    return hashlib.sha256(json.dumps([_record(prompt) for prompt in prompts]).encode()).hexdigest()


def _record(prompt: Prompt) -> dict[str, Any]:
    """A prompt in JSON's types; a source image by its file's name, so that the folder may move."""
    record = {"text": prompt.text, "metadata": prompt.metadata}
    images = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else i.name for i in prompt.images]
    if not images:
        return record
    return {**record, "image": images[0] if len(images) == 1 else images}


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of the settings that are compared, from a config in JSON's types."""
    values: dict[str, Any] = {}
    for name, hint in setting_types().items():
        value: Any = config
        for key in name.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT and not is_dataclass(hint) and name not in START_SETTINGS:
            values[name] = value
    values["evaluation.guard"] = guard_reward(values.get("evaluation.guard"))
    for group in {"rewards", "evaluation.guard"} & values.keys():
        values[group] = {name: _compared_reward(value) for name, value in values[group].items()}
    return values


def _compared_reward(value: Any) -> dict[str, Any]:
    settings = value if isinstance(value, Mapping) else {"weight": value}
    return {"weight": 1.0} | {key: value for key, value in settings.items() if key not in REWARD_NOT_COMPARED}
