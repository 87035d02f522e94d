"""Reading settings from the command line and YAML files, and writing them back.

This module does not import torch, so that ``--help`` and the message for a wrong setting appear at once.
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from fastflowgrpo.config.settings import Config, DemoConfig, EvaluateConfig
from fastflowgrpo.config.validation import validate, validate_demo, validate_evaluation
from fastflowgrpo.errors import UserError, did_you_mean

Settings = TypeVar("Settings")


def parse(argv: Sequence[str] | None = None, command: str = "train") -> Config:
    """Reads the settings of a training run: the defaults, then ``--config`` files and options in the order given.

    Args:
        argv: the command line without the program's name, by default that of this process.
        command: whose name `--help` shows.

    Returns:
        The complete, validated config.

    Raises:
        UserError: a name, a value or a file is wrong, or the values do not fit together (see `validate`).
        SystemExit: with code 0, after ``--help`` or ``--print_config``.
    """
    config = parse_settings(Config, command, argv)
    validate(config)
    return config


def parse_evaluation(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """Reads the settings of an evaluation like `parse`. With ``--run``, the run's settings are the defaults."""
    config = parse_settings(EvaluateConfig, "evaluate", argv)
    if config.run is not None:
        config = parse_settings(EvaluateConfig, "evaluate", argv, _run_defaults(config.run))
    validate_evaluation(config)
    return config


def parse_demo(argv: Sequence[str] | None = None) -> DemoConfig:
    """Reads the settings of a demo like `parse`. With ``--run``, the run's settings are the defaults."""
    config = parse_settings(DemoConfig, "demo", argv)
    if config.run is not None:
        known = setting_types(DemoConfig)
        defaults = {name: value for name, value in _run_defaults(config.run).items() if name in known}
        defaults["noise_level"] = read_run(config.run).rollout.noise_level
        config = parse_settings(DemoConfig, "demo", argv, defaults)
    validate_demo(config)
    return config


def read_run(run: str | Path) -> Config:
    """The settings of the run in a directory.

    Raises:
        UserError: there is no run in it, or its config.yaml has a wrong or unknown setting.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"run {run} is not the directory of a run: there is no {path}")
    return parse(["--config", str(path)])


def _run_defaults(run: str) -> dict[str, Any]:
    """Defaults for an evaluation or a demo from the settings of a run, by dotted name."""
    config = read_run(run)
    evaluation, rollout, guidance = config.evaluation, config.rollout, config.evaluation_guidance
    scales = guidance if isinstance(guidance, tuple) else (guidance, None)
    return {
        "model": config.model,
        "rewards": config.rewards,
        "num_steps": evaluation.num_steps,
        **dict(zip(("guidance_scale", "guidance_scale_2"), scales, strict=True)),
        "images_per_prompt": evaluation.images_per_prompt,
        "height": rollout.height,
        "width": rollout.width,
        "num_frames": rollout.num_frames,
        "reward_frames": config.reward_frames,
        "batch_size": evaluation.batch_size,
        **{f"policy.{name}": value for name, value in vars(config.policy).items()},
    }


def parse_settings(
    cls: type[Settings], command: str, argv: Sequence[str] | None, defaults: dict[str, Any] | None = None
) -> Settings:
    """Reads a dataclass of settings: its own defaults, then `defaults` by dotted name, then the command line.

    Raises:
        UserError: a name, a value or a file is wrong.
        SystemExit: with code 0, after ``--help`` or ``--print_config``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    types = setting_types(cls)
    groups = [name for name, hint in types.items() if _is_group(hint)]
    options = {"config", "print_config", "help"} | (types.keys() - set(groups))
    # an entry of a dict setting may have any name: --rewards.my_reward
    free_prefixes = tuple(f"{name}." for name, hint in types.items() if "dict[" in str(hint))
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").removesuffix("+")
        if argument.startswith("--") and not name.startswith(free_prefixes):
            if name in groups:
                raise UserError(f"{name}: is a group of settings; set one of them, as in --{name}.NAME VALUE")
            _check_name(name, options)
    parser = _parser(cls, command)  # type: ignore[arg-type] # mypy takes the class of a dataclass for unhashable
    if defaults:
        parser = deepcopy(parser)
        parser.set_defaults(defaults)
    return _to_dataclass(cls, parser.parse_args(_complete_flags(argv, types)).as_dict())


def _complete_flags(argv: list[str], types: dict[str, Any]) -> list[str]:
    """The command line with "=true" added to flags without a value, such as --dry_run."""
    flags = {f"--{name}" for name, hint in types.items() if hint is bool}
    return [
        f"{argument}=true" if argument in flags and next_argument.startswith("--") else argument
        for argument, next_argument in zip_longest(argv, argv[1:], fillvalue="--")
    ]


def save(config: Config, path: str | Path) -> None:
    """Writes the complete config as YAML; ``--config`` reads it back to an equal config."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def setting_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The dotted name of every setting and every group of settings, with its type (a dataclass for a group)."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        types[prefix + name] = hint
        if _is_group(hint):
            types |= setting_types(hint, f"{prefix}{name}.")
    return types


class _Parser(ArgumentParser):
    types: Mapping[str, Any] = MappingProxyType({})
    """Type of each setting by its dotted name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        match = re.search(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if match and match[1] in self.types:
            raise UserError(_value_message(match[1], self.types[match[1]], match[2])) from ex
        raise UserError(message) from ex


class _ConfigFile(ActionConfigFile):
    """The action of ``--config``: errors inside a file name the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            _check_names(_read_yaml(values), parser.types)
            super().__call__(parser, cfg, values, option_string)
        except UserError as error:
            raise UserError(f"{values}: {error}") from None


@cache  # it reads the source of the settings for their help
def _parser(cls: type, command: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=f"python -m fastflowgrpo.{command}",
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
    )
    parser.add_argument("--config", action=_ConfigFile, metavar="FILE", help="YAML file of settings.")
    parser.add_class_arguments(cls)
    parser.types = setting_types(cls)
    return parser


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(error.strerror) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"is not YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"expected settings (name: value), got {settings!r}")
    return settings


def _check_names(settings: dict[str, Any], types: dict[str, Any], prefix: str = "") -> None:
    """Raises UserError for an unknown name in nested settings."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        _check_name(name, types)
        if _is_group(types[name]):
            if not isinstance(value, dict):
                raise UserError(f"{name}: is a group of settings, got {value!r}")
            _check_names(value, types, f"{name}.")


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint)


def _check_name(name: str, names: Collection[str]) -> None:
    if name not in names:
        raise UserError(f"unknown setting {name}" + (did_you_mean(name, names) or "; --help explains them all"))


def _value_message(name: str, hint: Any, value: str) -> str:
    """The message for a value that does not have the type of its setting."""
    literals = [option for option in (hint, *get_args(hint)) if get_origin(option) is Literal]
    choices = get_args(literals[0]) if literals else ()
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif isinstance(hint, type) and not get_args(hint):
        expected = hint.__name__
    else:
        expected = str(hint).replace("typing.", "").replace("None", "null")
    return f"{name}: expected {expected}, got {value or 'nothing'}" + did_you_mean(value, choices)


def _to_dataclass(cls: type, settings: dict[str, Any], prefix: str = "") -> Any:
    """Nested settings as an instance of the dataclass."""
    values = {}
    for name, hint in get_type_hints(cls).items():
        value = settings[name]
        if _is_group(hint):
            value = _to_dataclass(hint, value, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(hint):  # jsonargparse accepts null for any type
            raise UserError(_value_message(prefix + name, hint, "null"))
        values[name] = value
    return cls(**values)
