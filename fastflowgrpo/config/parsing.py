"""Reading settings from the command line and YAML files, and writing them back.

Nothing here imports torch, so that ``--help`` and a wrong setting answer at once.
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from fastflowgrpo.config.settings import Config, EvaluateConfig
from fastflowgrpo.config.validation import validate
from fastflowgrpo.errors import UserError, did_you_mean

Settings = TypeVar("Settings")


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads the settings of a run: the defaults, then ``--config`` files and dotted overrides in the order given.

    Args:
        argv: The command line without the program; by default the process's.

    Returns:
        The complete, validated config.

    Raises:
        UserError: A name, value or file is wrong, or the values do not fit together (see `validate`).
        SystemExit: With code 0, after ``--help`` or ``--print_config``.
    """
    config = parse_settings(Config, "train", argv)
    validate(config)
    return config


def parse_evaluation(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """Reads the settings of an evaluation, like `parse`; what is not given is the run's, if `--run` names one."""
    config = parse_settings(EvaluateConfig, "evaluate", argv)
    if config.run is not None:
        config = parse_settings(EvaluateConfig, "evaluate", argv, _defaults_of_run(config.run))
    for name in ("num_steps", "images_per_prompt", "batch_size", "height", "width", "num_frames", "reward_frames"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}")
    for name in ("guidance_scale", "seed"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name}: must be at least 0, got {getattr(config, name)}")
    return config


def read_run(run: str | Path) -> Config:
    """The settings of the run that a directory holds.

    Raises:
        UserError: It holds none, or its config.yaml has a setting that is wrong or unknown.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"run {run} is not the directory of a run: there is no {path}")
    return parse(["--config", str(path)])


def _defaults_of_run(run: str) -> dict[str, Any]:
    """The settings of an evaluation that are those of a run, by dotted name."""
    config = read_run(run)
    evaluation, rollout = config.evaluation, config.rollout
    return {
        "model": config.model,
        "rewards": config.rewards,
        "num_steps": evaluation.num_steps,
        "guidance_scale": rollout.guidance_scale if evaluation.guidance_scale is None else evaluation.guidance_scale,
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
    """Reads a dataclass of settings: its defaults, other `defaults` by dotted name, then the command line's."""
    argv = sys.argv[1:] if argv is None else list(argv)
    types = setting_types(cls)
    groups = [name for name, hint in types.items() if _is_group(hint)]
    options = {"config", "print_config", "help"} | (types.keys() - set(groups))
    open_groups = tuple(f"{name}." for name, hint in types.items() if "dict[" in str(hint))  # rewards.my_reward
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").removesuffix("+")
        if argument.startswith("--") and not name.startswith(open_groups):
            if name in groups:
                raise UserError(f"{name}: is a group of settings; set one of them, as in --{name}.NAME VALUE")
            _check_name(name, options)
    parser = _parser(cls, command)
    parser.set_defaults(defaults or {})
    return _build(cls, parser.parse_args(_bare_switches(argv, types)).as_dict())


def _bare_switches(argv: list[str], types: dict[str, Any]) -> list[str]:
    """A switch without a value, such as --dry_run, is true."""
    switches = {f"--{name}" for name, hint in types.items() if hint is bool}
    return [
        f"{argument}=true" if argument in switches and following.startswith("--") else argument
        for argument, following in zip_longest(argv, argv[1:], fillvalue="--")
    ]


def save(config: Config, path: str | Path) -> None:
    """Writes the complete config as YAML, which ``--config`` reads back to an equal one."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def setting_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The dotted name of every setting and group of settings, with its type (a dataclass for a group)."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        types[prefix + name] = hint
        if _is_group(hint):
            types |= setting_types(hint, f"{prefix}{name}.")
    return types


class _Parser(ArgumentParser):
    types: Mapping[str, Any] = MappingProxyType({})  # of the settings, by dotted name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        match = re.search(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if match and match[1] in self.types:
            raise UserError(_wrong_value(match[1], self.types[match[1]], match[2])) from ex
        raise UserError(message) from ex


class _ConfigFile(ActionConfigFile):
    """``--config``: an error inside a file names the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            _check_tree(_read(values), parser.types)
            super().__call__(parser, cfg, values, option_string)
        except UserError as error:
            raise UserError(f"{values}: {error}") from None


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


def _read(path: str) -> dict[str, Any]:
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


def _check_tree(settings: dict[str, Any], types: dict[str, Any], prefix: str = "") -> None:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        _check_name(name, types)
        if _is_group(types[name]):
            if not isinstance(value, dict):
                raise UserError(f"{name}: is a group of settings, got {value!r}")
            _check_tree(value, types, f"{name}.")


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint)


def _check_name(name: str, names: Collection[str]) -> None:
    if name not in names:
        raise UserError(f"unknown setting {name}" + (did_you_mean(name, names) or "; --help explains them all"))


def _wrong_value(name: str, hint: Any, value: str) -> str:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif isinstance(hint, type) and not get_args(hint):
        expected = hint.__name__
    else:
        expected = str(hint).replace("typing.", "").replace("None", "null")
    return f"{name}: expected {expected}, got {value or 'nothing'}" + did_you_mean(value, choices)


def _build(cls: type, settings: dict[str, Any], prefix: str = "") -> Any:
    values = {}
    for name, hint in get_type_hints(cls).items():
        value = settings[name]
        if _is_group(hint):
            value = _build(hint, value, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(hint):  # jsonargparse takes null for any type
            raise UserError(_wrong_value(prefix + name, hint, "null"))
        values[name] = value
    return cls(**values)
