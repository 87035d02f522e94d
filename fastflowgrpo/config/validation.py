"""Limits of single settings, and which settings fit together."""

from operator import attrgetter
from typing import Any

from fastflowgrpo.config.settings import Config
from fastflowgrpo.errors import UserError

_AT_LEAST = {
    0: (
        "seed",
        "save_every",
        "max_missing",
        "policy.lora_rank",
        "policy.max_sequence_length",
        "policy.distilled_guidance",
        "rollout.guidance_scale",
        "update.learning_rate",
        "update.weight_decay",
        "update.kl_weight",
        "update.old_weight",
        "update.old_decay_slope",
        "update.old_decay_start",
        "update.old_decay_max",
        "update.betas",
        "update.ema_decay",
        "rollout.window_start",
        "rollout.window_stride",
        "evaluation.every",
        "evaluation.guidance_scale",
    ),
    1: (
        "epochs",
        "checkpoints_total_limit",
        "num_processes",
        "reward_frames",
        "policy.lora_alpha",
        "policy.decode_batch_size",
        "prompts.per_epoch",
        "rollout.window_size",
        "rollout.window_epochs",
        "rollout.height",
        "rollout.width",
        "rollout.num_frames",
        "rollout.batch_size",
        "update.per_epoch",
        "update.noise_draws",
        "update.batch_size",
        "update.ema_every",
        "evaluation.num_steps",
        "evaluation.images_per_prompt",
        "evaluation.batch_size",
    ),
    2: ("rollout.group_size", "rollout.num_steps"),
}
_ABOVE_ZERO = (
    "update.replay_tolerance",
    "update.dpo_beta",
    "update.nft_beta",
    "update.awm_clip_range",
    "update.rwr_temperature",
    "rollout.noise_level",
    "advantage.clip",
    "update.max_grad_norm",
    "update.clip_range",
)
_AT_MOST_ONE = ("max_missing",)
_BELOW_ONE = ("update.clip_range", "update.old_decay_max", "update.betas", "update.ema_decay")
POLICY_GRADIENTS = ("grpo", "grpo_guard")
FORWARD_PROCESS = ("nft", "awm")
# What only some choices read: (setting, the choices that do) -> settings that must stay at their defaults elsewhere.
_READ_BY: dict[tuple[str, tuple[Any, ...]], tuple[str, ...]] = {
    ("update.algorithm", POLICY_GRADIENTS): (
        "rollout.log_prob",
        "update.clip_range",
        "update.replay_tolerance",
        "update.kl",
    ),
    ("update.algorithm", (*POLICY_GRADIENTS, *FORWARD_PROCESS)): (
        "advantage.mode",
        "advantage.std",
        "advantage.clip",
        "update.kl_weight",
    ),
    ("update.algorithm", ("dpo", "sft", "rwr")): ("update.data",),
    ("update.algorithm", ("dpo", "sft", "rwr", *FORWARD_PROCESS)): ("update.noise_draws",),
    ("update.algorithm", FORWARD_PROCESS): (
        "update.old_decay_slope",
        "update.old_decay_start",
        "update.old_decay_max",
    ),
    ("update.algorithm", ("nft",)): ("update.nft_beta",),
    ("update.algorithm", ("awm",)): ("update.awm_clip_range", "update.old_weight"),
    ("update.algorithm", ("dpo",)): ("update.dpo_beta",),
    ("update.algorithm", ("rwr",)): ("update.rwr_temperature",),
    ("rollout.dynamics", ("flow_sde", "flow_cps", "dance_sde")): (
        "rollout.noise_level",
        "rollout.window_size",
        "rollout.window_start",
        "rollout.window_stride",
        "rollout.same_noise",
    ),
}
# What may be another from one start of a run to the next: it changes nothing that is computed but its rounding, or is
# what a run that stopped asks for.
MAY_CHANGE = (
    "epochs",
    "save_every",
    "checkpoints_total_limit",
    "trackers",
    "max_missing",
    "policy.decode_batch_size",
    "policy.embeddings_dir",
    "policy.gradient_checkpointing",
    "policy.attention",
    "policy.compile",
    "rollout.batch_size",
    "update.batch_size",
    "update.learning_rate",
    "update.replay_tolerance",
    "evaluation.every",
    "evaluation.batch_size",
)


def validate(config: Config) -> None:
    """Checks that the values of a config are in range and fit together.

    Raises:
        UserError: Naming the first setting that does not, with the limit or the arithmetic that fails.
    """

    def values(name: str) -> tuple[float, ...]:
        value = attrgetter(name)(config)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    # Written as "not (a >= b)" so that NaN fails too.
    for limit, names in _AT_LEAST.items():
        for name in names:
            for value in values(name):
                if not value >= limit:
                    raise UserError(f"{name}: must be at least {limit}, got {value}")
    for name in _ABOVE_ZERO:
        for value in values(name):
            if not value > 0:
                raise UserError(f"{name}: must be above 0, got {value}")
    for name in _AT_MOST_ONE:
        for value in values(name):
            if not value <= 1:
                raise UserError(f"{name}: must be at most 1, got {value}")
    for name in _BELOW_ONE:
        for value in values(name):
            if not value < 1:
                raise UserError(f"{name}: must be below 1, got {value}")

    policy, prompts, rollout, update = config.policy, config.prompts, config.rollout, config.update
    advantage = config.advantage
    if policy.lora is not None and policy.lora_rank == 0:
        raise UserError("policy.lora_rank: is 0, which trains the whole transformer; leave it out to go on from a LoRA")
    if policy.lora_rank != 0 and policy.lora_targets == []:
        raise UserError("policy.lora_targets: is empty; set policy.lora_rank to 0 to train the whole transformer")
    if rollout.dynamics == "flow_cps" and rollout.noise_level > 1:
        raise UserError(f"rollout.noise_level: must be at most 1 for flow_cps, got {rollout.noise_level}")
    if rollout.batch_size % rollout.group_size:
        division = _division(rollout.batch_size, rollout.group_size)
        raise UserError(f"rollout.batch_size: must be a multiple of rollout.group_size, but {division}")
    if prompts.per_epoch % update.per_epoch:
        division = _division(prompts.per_epoch, update.per_epoch)
        raise UserError(f"prompts.per_epoch: must be a multiple of update.per_epoch, but {division}")
    if update.algorithm in POLICY_GRADIENTS and rollout.dynamics == "ode":
        raise UserError(
            f"rollout.dynamics: update.algorithm {update.algorithm} learns from log-probs, and ode has none; "
            "choose flow_sde, flow_cps or dance_sde, or update.algorithm dpo, sft or rwr"
        )
    _check_unread(config)
    if advantage.mode == "gdpo" and len(config.rewards) < 2:
        raise UserError("advantage.mode: gdpo normalises each of several rewards, and there is one")
    if rollout.window_epochs != 1 and not rollout.window_stride:
        raise UserError("rollout.window_epochs: the window does not move unless rollout.window_stride is above 0")
    if rollout.window_size is None and rollout.window_stride:
        raise UserError("rollout.window_stride: all steps but the last are the window; set rollout.window_size")
    if rollout.window_size is not None and rollout.dynamics != "ode":
        low, high = rollout.window_start
        if low >= high:
            raise UserError(f"rollout.window_start: low must be below high, got [{low}, {high})")
        needed, trained = high - 1 + rollout.window_size, rollout.num_steps - 1
        if needed > trained:
            raise UserError(
                f"rollout.window_start: a window of {rollout.window_size} steps from step {high - 1} on needs {needed} "
                f"steps, but rollout.num_steps = {rollout.num_steps} has {trained}: the last is never trained"
            )


def _check_unread(config: Config) -> None:
    """Raises UserError for a setting that was changed though nothing reads it beside the others."""
    default = Config()
    for (chooser, readers), names in _READ_BY.items():
        choice = attrgetter(chooser)(config)
        if choice not in readers:
            values = {name: (attrgetter(name)(config), attrgetter(name)(default)) for name in names}
            unread = [f"{name} (default {was})" for name, (value, was) in values.items() if value not in (None, was)]
            if unread:
                raise UserError(f"{chooser}: {choice} does not use {', '.join(unread)}: leave at the default")


def _division(dividend: int, divisor: int) -> str:
    return f"{dividend} = {dividend // divisor} x {divisor} + {dividend % divisor}"
