"""Memory: whether a run will have enough, and which settings help where it has not."""

import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.planning.micro_batch import available_memory
from fastflowgrpo.policy.loading import component_dtypes
from fastflowgrpo.policy.protocol import ENCODERS

PHASES = ("rollout", "update", "evaluate")
# An estimate takes a second. These runs do without: on the CPU with so many bytes free, or of the bundled model, whose
# largest batch takes less than so many bytes an image.
PLENTY = 8e9
BUNDLED_BYTES_PER_IMAGE = 3e6


def warn_if_short(config: Config, processes: int, device: torch.device) -> None:
    """Print `shortage` before anything is loaded, unless so much is free that no estimate is needed."""
    if device.type == "cpu" and available_memory(config) > _plenty(config):
        return
    try:
        short = shortage(config, processes)
    except UserError:  # the loader says what is wrong with the model
        return
    if short:
        print(f"warning: {short}", file=sys.stderr)


def shortage(config: Config, processes: int) -> str:
    """What a run will need and what is free, with the settings that help; "" if there is enough.

    Args:
        config: validated.
        processes: that train together.

    Raises:
        UserError: the model cannot be described (see `estimate`).
    """
    free = available_memory(config)
    needed = estimate(config, processes).total_memory(config.policy.gradient_checkpointing)
    if needed <= free:
        return ""
    phase = max(PHASES, key=lambda phase: _peak(config, phase, processes))
    return (
        f"this run is estimated to need {_gigabytes(needed)}, and {_gigabytes(free)} may be filled; "
        f"what helps most: {helpful_settings(config, processes, phase)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def out_of_memory(config: Config, processes: int, error: BaseException) -> UserError:
    """The answer to an error of which `is_out_of_memory` is true: what helps, by how much.

    Args:
        config: of the run.
        processes: that train together.
        error: with the attribute `phase` if it was raised in one, as `Report.phase` sets it.
    """
    phase = getattr(error, "phase", "start")
    traceback.clear_frames(error.__traceback__)  # they hold the tensors
    # Decoding and scoring overlap the rollout; the text encoders run before it.
    kind = phase if phase in PHASES else "rollout"
    reason = str(error).partition(". GPU")[0].rstrip(".") or type(error).__name__
    return UserError(
        f"out of memory in the phase {phase} ({reason}); what helps most: {helpful_settings(config, processes, kind)}; "
        "a run may be resumed with them"
    )


def helpful_settings(config: Config, processes: int, phase: str, count: int = 3) -> str:
    """The settings that lower the peak of a phase most and leave the training as it is, with how much they save."""
    try:
        before = _peak(config, phase, processes)
        saved = {name: before - _peak(other, phase, processes) for name, other in _smaller(config)}
        if config.policy.embeddings_dir is None and not config.policy.offload:
            saved["policy.embeddings_dir FOLDER"] = _text_encoders(config, processes)
    except Exception:  # a model that cannot be described; the name of a setting is better than nothing
        return ", ".join(name for name, _ in _smaller(config))
    best = sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])[:count]
    return ", ".join(f"{name} (-{_gigabytes(saved[name])})" for name in best) or "a smaller model, or more processes"


def _plenty(config: Config) -> float:
    largest = max(config.rollout.batch_size, config.update.batch_size, config.evaluation.batch_size)
    return min(PLENTY, largest * BUNDLED_BYTES_PER_IMAGE) if config.model == Config().model else PLENTY


def _peak(config: Config, phase: str, processes: int) -> int:
    """The estimated bytes of a process in a phase."""
    # The dry run counts the larger batch of rollout and evaluation.
    if phase == "rollout":
        config = with_setting(config, "evaluation.batch_size", 1)
    if phase == "evaluate":
        config = with_setting(config, "rollout.batch_size", config.rollout.group_size)
    cost = estimate(config, processes)
    update = "update with gradient checkpointing" if config.policy.gradient_checkpointing else "update"
    return sum(cost.memory.values()) + cost.passes[update if phase == "update" else "rollout"]


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Configs that need less memory and train the same: (the setting with its new value, the config)."""
    size = config.rollout.group_size
    values: dict[str, Any] = {
        "update.batch_size": config.update.batch_size // 2,
        "rollout.batch_size": config.rollout.batch_size // size // 2 * size,
        "evaluation.batch_size": config.evaluation.batch_size // 2,
        "policy.decode_batch_size": config.policy.decode_batch_size // 2,
        "policy.gradient_checkpointing": not config.policy.gradient_checkpointing,
        "policy.offload": not config.policy.offload,
    }
    for name, value in values.items():
        if value:
            yield f"{name} {str(value).lower()}", with_setting(config, name, value)


def _text_encoders(config: Config, processes: int) -> int:
    frozen = estimate(config, processes).frozen
    count = sum(count for name, count in frozen.items() if name.startswith(ENCODERS))
    return count * component_dtypes(config.policy)["text_encoder"].itemsize


def with_setting(config: Config, name: str, value: Any) -> Config:
    group, _, field = name.partition(".")
    return replace(config, **{group: replace(getattr(config, group), **{field: value})})


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2g} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
