"""The settings of the commands: what they are (`settings`), which values fit (`validation`), how they are read
(`parsing`)."""

from fastflowgrpo.config.parsing import parse, parse_evaluation, parse_settings, read_run, save, setting_types
from fastflowgrpo.config.settings import (
    TOKEN,
    AdvantageConfig,
    Config,
    EvaluateConfig,
    EvaluationConfig,
    PolicyConfig,
    PromptsConfig,
    RolloutConfig,
    ServerConfig,
    UpdateConfig,
)
from fastflowgrpo.config.validation import MAY_CHANGE, POLICY_GRADIENTS, validate

__all__ = [
    "MAY_CHANGE",
    "POLICY_GRADIENTS",
    "TOKEN",
    "AdvantageConfig",
    "Config",
    "EvaluateConfig",
    "EvaluationConfig",
    "PolicyConfig",
    "PromptsConfig",
    "RolloutConfig",
    "ServerConfig",
    "UpdateConfig",
    "parse",
    "parse_evaluation",
    "parse_settings",
    "read_run",
    "save",
    "setting_types",
    "validate",
]
