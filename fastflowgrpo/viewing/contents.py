"""What the pages show of a run, as JSON: settings, metrics, gallery, warnings, and what is wrong with its files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastflowgrpo.config import PRIVATE_REWARD_SETTINGS, START_SETTINGS
from fastflowgrpo.errors import UserError
from fastflowgrpo.runs.files import CONFIG, GALLERY, INDEX, LOG, METRICS, SUMMARY

NAME = r"[\w-]+"  # of a folder of the gallery, and of a file without its suffix


class RunFolder:
    """The folder of a run, which may still be running.

    Args:
        path: of the folder.
        name: of the run, for people.

    Raises:
        UserError: it is not the folder of a run.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        if not (path / CONFIG).is_file():
            raise UserError(f"run {path} is not the directory of a run: there is no {path / CONFIG}")

    def version(self) -> str:
        """A text that changes whenever `contents` may change."""
        files = [self.path / name for name in (CONFIG, METRICS, SUMMARY, LOG)] + [self.path / GALLERY / INDEX]
        stats = [path.stat() if path.is_file() else None for path in files]
        return "-".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" if stat else "0" for stat in stats)

    def contents(self) -> dict[str, Any]:
        """All that the pages show, in JSON's types; files that are damaged are said in `problems`."""
        problems: list[str] = []
        settings = self._settings(problems)
        entries = self._lines(f"{GALLERY}/{INDEX}", {"folder": str, "kind": str, "step": int}, problems)
        entries = list({entry["folder"]: entry for entry in entries}.values())  # the last one of a folder is valid
        problems += [
            f"{GALLERY}/{entry['folder']} is missing"
            for entry in entries
            if not (self.path / GALLERY / entry["folder"]).is_dir()
        ]
        rewards = settings.get("rewards", {})
        return {
            "name": self.name,
            "tasks": [name for name, value in rewards.items() if value and value != {"weight": 0}],
            "settings": _flat(settings),
            "rows": self._lines(METRICS, {"step": int}, problems),
            "evaluations": [entry for entry in entries if entry["kind"] == "evaluation" and "images" in entry],
            "rollouts": [entry for entry in entries if entry["kind"] == "rollout" and "groups" in entry],
            "warnings": self._warnings(),
            "problems": problems,
            "finished": (self.path / SUMMARY).is_file(),
        }

    def image(self, folder: str, file: str) -> Path | None:
        """The path of an image of the gallery; None if there is none of this name in it."""
        gallery = (self.path / GALLERY).resolve()
        path = (gallery / folder / file).resolve()  # a link may lead out of the gallery
        named = re.fullmatch(NAME, folder, re.ASCII) and re.fullmatch(rf"{NAME}\.webp", file, re.ASCII)
        return path if named and path.is_relative_to(gallery) and path.is_file() else None

    def _settings(self, problems: list[str]) -> dict[str, Any]:
        try:
            settings = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            settings = None
        if not isinstance(settings, dict):
            problems.append(f"{CONFIG} cannot be read")
            return {}
        settings = {name: value for name, value in settings.items() if name not in START_SETTINGS}
        for settings_of, key in ((settings, "rewards"), (settings.get("evaluation"), "guard")):
            if isinstance(settings_of, dict) and isinstance(rewards := settings_of.get(key), dict):
                settings_of[key] = {name: _public(value) for name, value in rewards.items()}
        return settings

    def _lines(self, name: str, keys: Mapping[str, type], problems: list[str]) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines that have these keys; the others are counted as a problem."""
        try:
            lines = (self.path / name).read_bytes().splitlines()
        except OSError:
            return []
        objects, bad = [], []
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                if not all(isinstance(value[key], kind) for key, kind in keys.items()):
                    raise TypeError
                objects.append(value)
            except (ValueError, TypeError, KeyError):
                bad.append(number)
        if bad:
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            problems.append(f"{name}: line {bad[0]}{others} cannot be read and is left out")
        return objects

    def _warnings(self) -> list[str]:
        try:
            text = (self.path / LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return re.findall(r"(?im)^.*\bwarning:.*$", text)


def named_runs(paths: list[Path]) -> list[RunFolder]:
    """The runs in these folders, each named by its folder, or by the path as given where two folders have one name."""
    names = [path.resolve().name for path in paths]
    return [
        RunFolder(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def _public(reward: Any) -> Any:
    if not isinstance(reward, dict):
        return reward
    return {key: value for key, value in reward.items() if key not in PRIVATE_REWARD_SETTINGS}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> value as text."""
    values: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value and prefix + name != "prompts.mix":
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = json.dumps(value, ensure_ascii=False, default=str)
    return values
