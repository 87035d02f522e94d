"""The settings of the commands: definitions and help (`settings`), limits (`validation`), reading and writing
(`parsing`). Code that acts on a setting belongs elsewhere. Nothing here imports torch.
"""

from fastflowgrpo.config.parsing import (
    parse,
    parse_demo,
    parse_evaluation,
    parse_settings,
    read_run,
    save,
    setting_types,
)
from fastflowgrpo.config.settings import (
    BUNDLED_MODELS,
    TOKEN,
    AdvantageConfig,
    Config,
    DemoConfig,
    Dynamics,
    EvaluateConfig,
    EvaluationConfig,
    PolicyConfig,
    PromptsConfig,
    RolloutConfig,
    ServerConfig,
    UpdateConfig,
    guard_reward,
)
from fastflowgrpo.config.validation import (
    MAY_CHANGE,
    POLICY_GRADIENTS,
    PRIVATE_REWARD_SETTINGS,
    START_SETTINGS,
    validate,
)

__all__ = [
    "BUNDLED_MODELS",
    "MAY_CHANGE",
    "POLICY_GRADIENTS",
    "PRIVATE_REWARD_SETTINGS",
    "START_SETTINGS",
    "TOKEN",
    "AdvantageConfig",
    "Config",
    "DemoConfig",
    "Dynamics",
    "EvaluateConfig",
    "EvaluationConfig",
    "PolicyConfig",
    "PromptsConfig",
    "RolloutConfig",
    "ServerConfig",
    "UpdateConfig",
    "guard_reward",
    "parse",
    "parse_demo",
    "parse_evaluation",
    "parse_settings",
    "read_run",
    "save",
    "setting_types",
    "validate",
]
