"""Fast online reinforcement learning (Flow-GRPO, arXiv 2505.05470) of flow-matching image models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastflowgrpo.config import Config
    from fastflowgrpo.kernels.grpo_loss import grpo_loss, grpo_step_loss
    from fastflowgrpo.kernels.sde_step import gaussian_log_prob, sde_step
    from fastflowgrpo.learning.advantages import group_advantages
    from fastflowgrpo.policy import load_policy
    from fastflowgrpo.sampling.rollout import Trajectory
    from fastflowgrpo.sampling.scheduler import FlowSDEScheduler
    from fastflowgrpo.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Config",
    "FlowSDEScheduler",
    "Trainer",
    "Trajectory",
    "gaussian_log_prob",
    "group_advantages",
    "grpo_loss",
    "grpo_step_loss",
    "load_policy",
    "rewards",
    "sde_step",
]

_MODULES = {
    "Config": "config",
    "FlowSDEScheduler": "sampling.scheduler",
    "Trainer": "trainer",
    "Trajectory": "sampling.rollout",
    "gaussian_log_prob": "kernels.sde_step",
    "group_advantages": "learning.advantages",
    "grpo_loss": "kernels.grpo_loss",
    "grpo_step_loss": "kernels.grpo_loss",
    "load_policy": "policy",
    "sde_step": "kernels.sde_step",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line answers before torch is loaded."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name == "rewards":
        return import_module(f"{__name__}.rewards")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
