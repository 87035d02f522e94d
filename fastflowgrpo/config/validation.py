"""Limits of single settings, and checks that settings fit together."""

import re
from operator import attrgetter
from typing import Any

from fastflowgrpo.config.settings import BUNDLED_MODELS, Config, DemoConfig, EvaluateConfig, guard_reward
from fastflowgrpo.errors import UserError

POLICY_GRADIENTS = ("grpo", "grpo_guard")
FORWARD_PROCESS = ("nft", "awm", "dgpo")

# Lowest allowed value -> the settings that have it. A setting that is null or a tuple is checked value by value.
_MINIMUM = {
    0: (
        "seed",
        "save_every",
        "max_missing",
        "policy.lora_rank",
        "policy.max_sequence_length",
        "policy.distilled_guidance",
        "rollout.guidance_scale",
        "rollout.guidance_scale_2",
        "update.learning_rate",
        "update.weight_decay",
        "update.kl_weight",
        "update.norm_guard_weight",
        "update.old_weight",
        "update.old_decay_slope",
        "update.old_decay_start",
        "update.old_decay_max",
        "update.betas",
        "update.ema_decay",
        "update.batch_size",
        "rollout.window_start",
        "rollout.window_stride",
        "rollout.ahead",
        "evaluation.every",
        "evaluation.guidance_scale",
        "evaluation.guidance_scale_2",
        "evaluation.gallery",
    ),
    1: (
        "epochs",
        "checkpoints_total_limit",
        "num_processes",
        "reward_frames",
        "policy.lora_alpha",
        "policy.decode_batch_size",
        "policy.source_height",
        "policy.source_width",
        "prompts.per_epoch",
        "rollout.candidate_steps",
        "rollout.window_size",
        "rollout.window_epochs",
        "rollout.tail_steps",
        "rollout.height",
        "rollout.width",
        "rollout.num_frames",
        "rollout.batch_size",
        "update.per_epoch",
        "update.noise_draws",
        "update.ema_every",
        "evaluation.num_steps",
        "evaluation.images_per_prompt",
        "evaluation.batch_size",
        "evaluation.guard_patience",
    ),
    2: ("rollout.group_size", "rollout.candidates", "rollout.num_steps"),
}
_ABOVE_ZERO = (
    "hang_warning",
    "memory_gb",
    "update.replay_tolerance",
    "update.dpo_beta",
    "update.nft_beta",
    "update.awm_clip_range",
    "update.dgpo_beta",
    "update.dgpo_clip_range",
    "update.rwr_temperature",
    "rollout.noise_level",
    "advantage.clip",
    "update.kl_share",
    "update.max_grad_norm",
    "update.clip_range",
    "update.divergence_limit",
)
_AT_MOST_ONE = ("max_missing", "update.kl_share")
_BELOW_ONE = ("update.clip_range", "update.old_decay_max", "update.betas", "update.ema_decay")
_EVALUATE_MINIMUM = {
    1: ("num_steps", "images_per_prompt", "batch_size", "height", "width", "num_frames", "reward_frames"),
    0: ("guidance_scale", "guidance_scale_2", "seed"),
}
_DEMO_MINIMUM = {
    1: (
        *("num_images", "num_steps", "max_images", "max_steps", "queue", "port"),
        *("height", "width", "num_frames", "reward_frames"),
    ),
    0: ("guidance_scale", "noise_level"),
}

# (setting, its values) -> settings that only these values use. With another value they must keep their default.
_USED_ONLY_WITH: dict[tuple[str, tuple[Any, ...]], tuple[str, ...]] = {
    ("update.algorithm", (*POLICY_GRADIENTS, *FORWARD_PROCESS)): (
        "advantage.mode",
        "advantage.std",
        "advantage.clip",
        "update.kl_weight",
        "update.norm_guard_weight",
    ),
    ("update.algorithm", POLICY_GRADIENTS): (
        "rollout.log_prob",
        "update.clip_range",
        "update.replay_tolerance",
        "update.kl",
        "update.kl_share",
        "rollout.keep_unconditional",
        "rollout.offload_trajectory",
        "rollout.ahead",
    ),
    ("update.algorithm", ("grpo",)): ("update.trust_region",),
    ("update.trust_region", ("clip",)): ("update.clip_range",),
    ("update.trust_region", ("divergence",)): ("update.divergence_limit",),
    ("update.algorithm", ("dpo", "sft", "rwr")): ("update.data",),
    ("update.algorithm", ("dpo", "sft", "rwr", *FORWARD_PROCESS)): ("update.noise_draws", "update.noise_levels"),
    ("update.algorithm", FORWARD_PROCESS): (
        "update.old_decay_slope",
        "update.old_decay_start",
        "update.old_decay_max",
    ),
    ("update.algorithm", ("nft",)): ("update.nft_beta",),
    ("update.algorithm", ("awm",)): ("update.awm_clip_range", "update.old_weight"),
    ("update.algorithm", ("dgpo",)): ("update.dgpo_beta", "update.dgpo_clip_range"),
    ("update.algorithm", ("dpo",)): ("update.dpo_beta",),
    ("update.algorithm", ("rwr",)): ("update.rwr_temperature",),
    ("rollout.dynamics", ("flow_sde", "flow_cps", "dance_sde")): (
        "rollout.noise_level",
        "rollout.window_size",
        "rollout.window_start",
        "rollout.window_stride",
        "rollout.tail_steps",
        "rollout.same_noise",
    ),
}

# Settings that say how a start of a run goes, not what is trained: never compared and never shown.
START_SETTINGS = (
    "output_dir",
    "overwrite",
    "resume",
    "dry_run",
    "num_processes",
    "hang_warning",
    "memory_gb",
    "fit",
    "gpu",
    "hub_model_id",
    "hub_private",
)
# Settings of a reward that what is published must not show: addresses and accounts.
PRIVATE_REWARD_SETTINGS = ("url", "base_url", "api_key_env", "device")
# Settings that may differ when a run is resumed: they change results by rounding only, or a user may well want to
# change them after a stop.
MAY_CHANGE = (
    "epochs",
    "save_every",
    "checkpoints_total_limit",
    "trackers",
    "max_missing",
    "policy.decode_batch_size",
    "policy.embeddings_dir",
    "policy.offload",
    "policy.gradient_checkpointing",
    "policy.attention",
    "policy.compile",
    "rollout.batch_size",
    "rollout.offload_trajectory",
    "update.batch_size",
    "update.halve_batch_size",
    "update.learning_rate",
    "update.replay_tolerance",
    "evaluation.every",
    "evaluation.batch_size",
    "evaluation.guard_patience",
    "evaluation.guard_action",
    "evaluation.gallery",
)


def validate(config: Config) -> None:
    """Checks that the settings of a training run are in range and fit together.

    Raises:
        UserError: names the first setting that does not, with the limit or the arithmetic that fails.
    """
    _check_minimum(config, _MINIMUM)
    # Every comparison is written as "not (a > b)", so that NaN fails too.
    for name in _ABOVE_ZERO:
        for value in _numbers(config, name):
            if not value > 0:
                raise UserError(f"{name}: must be above 0, got {value}")
    for name in _AT_MOST_ONE:
        for value in _numbers(config, name):
            if not value <= 1:
                raise UserError(f"{name}: must be at most 1, got {value}")
    for name in _BELOW_ONE:
        for value in _numbers(config, name):
            if not value < 1:
                raise UserError(f"{name}: must be below 1, got {value}")
    _check_fit(config)
    _check_lora(config)
    _check_sampling_and_updates(config)
    _check_unused(config)
    if config.advantage.mode == "gdpo" and len(config.rewards) < 2:
        raise UserError("advantage.mode: gdpo normalises each of several rewards, and there is one")
    _check_window(config)
    _check_candidates(config)
    _check_guard(config)


def validate_evaluation(config: EvaluateConfig) -> None:
    """Checks that the settings of an evaluation are in range.

    Raises:
        UserError: names the first setting that is not.
    """
    _check_minimum(config, _EVALUATE_MINIMUM)
    _check_second_scale("", config.guidance)


def validate_demo(config: DemoConfig) -> None:
    """Checks that the settings of a demo are in range.

    Raises:
        UserError: names the first setting that is not.
    """
    _check_minimum(config, _DEMO_MINIMUM)
    for name, limit in (("num_images", config.max_images), ("num_steps", config.max_steps), ("port", 65535)):
        for value in _numbers(config, name):
            if not value <= limit:
                raise UserError(f"{name}: must be at most {limit}, got {value}")


def _numbers(config: Any, name: str) -> tuple[float, ...]:
    """The values of a setting: several for a tuple, none for null."""
    value = attrgetter(name)(config)
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _check_minimum(config: Any, limits: dict[int, tuple[str, ...]]) -> None:
    for limit, names in limits.items():
        for name in names:
            for value in _numbers(config, name):
                if not value >= limit:
                    raise UserError(f"{name}: must be at least {limit}, got {value}")


def _check_fit(config: Config) -> None:
    if config.fit is None:
        return
    if not re.fullmatch(r"\d+(\.\d+)?GB", config.fit):
        raise UserError(f"fit: must be a size such as 24GB, got {config.fit}")
    if not config.dry_run:
        raise UserError("fit: only --dry_run reads it: start the run with the settings that it prints")


def _check_lora(config: Config) -> None:
    policy = config.policy
    if policy.lora is not None and policy.lora_rank == 0:
        raise UserError(
            "policy.lora_rank: is 0, which trains the whole transformer; leave it out to continue from policy.lora"
        )
    is_full = policy.lora_rank == 0 or (policy.lora_rank is None and config.model in BUNDLED_MODELS)
    if policy.quantization == "nf4" and policy.lora is None and is_full:
        raise UserError(
            "policy.quantization: full training quantises its reference to int8 or float8, not to nf4: choose one of "
            "them, or set policy.lora_rank above 0"
        )
    if policy.quantization is not None and policy.compile:
        raise UserError("policy.quantization: quantised layers are not compiled: set policy.compile to false")
    if policy.lora_rank != 0 and policy.lora_targets == []:
        raise UserError("policy.lora_targets: is empty; set policy.lora_rank to 0 to train the whole transformer")


def _check_sampling_and_updates(config: Config) -> None:
    prompts, rollout, update = config.prompts, config.rollout, config.update
    if rollout.dynamics == "flow_cps" and rollout.noise_level > 1:
        raise UserError(f"rollout.noise_level: must be at most 1 for flow_cps, got {rollout.noise_level}")
    if rollout.batch_size % rollout.group_size:
        division = _division(rollout.batch_size, rollout.group_size)
        raise UserError(f"rollout.batch_size: must be a multiple of rollout.group_size, but {division}")
    if prompts.per_epoch % update.per_epoch:
        division = _division(prompts.per_epoch, update.per_epoch)
        raise UserError(f"prompts.per_epoch: must be a multiple of update.per_epoch, but {division}")
    if rollout.ahead > prompts.per_epoch:
        raise UserError(f"rollout.ahead: must be at most prompts.per_epoch {prompts.per_epoch}, got {rollout.ahead}")
    if update.algorithm in POLICY_GRADIENTS and rollout.dynamics == "ode":
        raise UserError(
            f"rollout.dynamics: update.algorithm {update.algorithm} learns from log-probs, and ode has none; "
            "choose flow_sde, flow_cps or dance_sde, or update.algorithm nft, awm, dpo, sft or rwr"
        )
    if update.kl_share != 1 and not (update.kl_weight or update.norm_guard_weight):
        raise UserError("update.kl_share: there is no KL unless update.kl_weight is above 0")
    if rollout.keep_unconditional and rollout.guidance_scale == 1:
        raise UserError("rollout.keep_unconditional: without guidance (rollout.guidance_scale 1) there is none to keep")
    _check_second_scale("rollout.", rollout.guidance)
    _check_second_scale("evaluation.", config.evaluation_guidance)


def _check_second_scale(group: str, guidance: float | tuple[float, float]) -> None:
    if isinstance(guidance, tuple) and guidance[0] == 1:
        raise UserError(
            f"{group}guidance_scale_2: the model's pipeline does not guide if {group}guidance_scale is 1: set it too"
        )


def _check_unused(config: Config) -> None:
    """Raises UserError for a setting that was changed although the chosen algorithm or sampler does not use it."""
    default = Config()
    unused: dict[str, list[str]] = {}
    for (chooser, users), names in _USED_ONLY_WITH.items():
        if attrgetter(chooser)(config) in users:
            continue
        for name in names:
            value, default_value = attrgetter(name)(config), attrgetter(name)(default)
            if value not in (None, default_value):
                unused.setdefault(chooser, []).append(f"{name} (default {default_value})")
    for chooser, names_and_defaults in unused.items():
        choice = attrgetter(chooser)(config)
        raise UserError(f"{chooser}: {choice} does not use {', '.join(names_and_defaults)}: leave at the default")


def _check_window(config: Config) -> None:
    rollout = config.rollout
    if rollout.window_epochs != 1 and not rollout.window_stride:
        raise UserError("rollout.window_epochs: the window does not move unless rollout.window_stride is above 0")
    if rollout.window_size is None and rollout.window_stride:
        raise UserError("rollout.window_stride: all steps but the last are the window; set rollout.window_size")
    if rollout.dynamics == "ode":
        return
    if rollout.window_size is None:
        for name, is_set in (("tail_steps", rollout.tail_steps is not None), ("solver", rollout.solver != "euler")):
            if is_set:
                raise UserError(f"rollout.{name}: one step is left after the window; set rollout.window_size")
        return
    low, high = rollout.window_start
    if low >= high:
        raise UserError(f"rollout.window_start: low must be below high, got [{low}, {high})")
    needed, trained = high - 1 + rollout.window_size, rollout.num_steps - 1
    if needed > trained:
        raise UserError(
            f"rollout.window_start: a window of {rollout.window_size} steps from step {high - 1} on needs {needed} "
            f"steps, but rollout.num_steps = {rollout.num_steps} has {trained}: the last is never trained"
        )


def _check_candidates(config: Config) -> None:
    rollout, default = config.rollout, Config().rollout
    if rollout.candidates is None:
        for name in ("candidate_steps", "candidate_solver"):
            if getattr(rollout, name) != getattr(default, name):
                raise UserError(f"rollout.{name}: nothing is explored unless rollout.candidates is set")
        return
    if not rollout.candidates > rollout.group_size:
        raise UserError(
            f"rollout.candidates: {rollout.candidates} candidates leave no choice of rollout.group_size "
            f"{rollout.group_size}: set more of them, or null"
        )
    if rollout.group_size % 2:
        raise UserError(
            "rollout.group_size: must be even with rollout.candidates, for as many best candidates as worst ones, "
            f"got {rollout.group_size}"
        )
    if rollout.same_noise:
        raise UserError("rollout.candidates: candidates differ by their initial noise; set rollout.same_noise to false")
    if rollout.ahead:
        raise UserError("rollout.ahead: candidates wait for their scores before their groups are sampled; set it to 0")


def _check_guard(config: Config) -> None:
    guard = guard_reward(config.evaluation.guard)
    if len(guard) > 1:
        raise UserError(f"evaluation.guard: must be one reward, got {', '.join(guard)}")
    for name, settings in guard.items():
        trained = config.rewards.get(name, 0)
        weight = trained.get("weight", 1) if isinstance(trained, dict) else trained
        if weight and _reward_settings(trained) == _reward_settings(settings):
            raise UserError(f"evaluation.guard: {name} is trained on; choose another reward, or set its weight to 0")


def _reward_settings(value: Any) -> dict[str, Any]:
    return {key: setting for key, setting in value.items() if key != "weight"} if isinstance(value, dict) else {}


def _division(dividend: int, divisor: int) -> str:
    return f"{dividend} = {dividend // divisor} x {divisor} + {dividend % divisor}"
