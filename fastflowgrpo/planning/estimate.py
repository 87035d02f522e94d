"""What a run costs, found without its weights: ``python -m fastflowgrpo.train --config FILE --dry_run``.

The model's own modules run on the meta device, where tensors have shapes and no contents, and every operation is looked
at: its FLOPs, by the formulas of PyTorch's FLOP counter (2 for a multiplication and an addition; a backward pass of
fused attention computes the scores again, which counts), and the bytes of the tensors that are alive with it. The most
of these is what a pass needs beyond the weights when every operation runs by itself. The device's kernels may want some
workspace more, and PyTorch's allocator some per cent. With policy.compile an update takes less, but a rollout's pass
keeps its activations, which is not counted here.

Memory of a process, in bytes:

- weights: those that are trained in float32, all others (of text encoders and VAE too) in policy.dtype; a model that is
  trained in full has a frozen copy of itself beside it, the reference
- gradients, optimiser, average: 4, 8 and 4 for each trained number
- trajectory: (trained steps + 2) latents of each of its images in policy.dtype, and 4 per log-prob; of grpo_guard each
  step's velocity too; of dpo, sft and rwr the last latents alone
- embeddings: of its groups' prompts, and of the 512 that are remembered
- passes: the larger of two sums, for phases that do not meet: a rollout's (or evaluation's) forward pass with the
  decoding of the images before; an update's forward and backward pass. Full training in a lower precision adds
  autocast's copy of the weights.

Rewards that are networks and run on the same device come on top.
"""

from dataclasses import dataclass
from math import prod

import torch

from fastflowgrpo.config import POLICY_GRADIENTS, Config
from fastflowgrpo.planning.passes import run_passes
from fastflowgrpo.planning.plan import Plan, batch_plan

CACHED_PROMPTS = 512  # what `EmbeddingCache` keeps
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Estimate:
    """What a run costs with a plan; see the module's docstring."""

    model: str
    plan: Plan
    trained: int
    """Trained parameters."""
    frozen: dict[str, int]
    """Frozen parameters of each part."""
    memory: dict[str, int]
    """Bytes of a process that stay, by what they are for."""
    passes: dict[str, int]
    """Bytes that the passes of a phase take beside them: rollout, update, update with gradient checkpointing."""
    flops: dict[str, int]
    """FLOPs of an epoch, all processes together: rollout, update, reference, decode, checkpointing (what gradient
    checkpointing would add to the update)."""

    def total_memory(self, checkpointing: bool = False) -> int:
        """Bytes of a process at their most."""
        update = self.passes["update with gradient checkpointing" if checkpointing else "update"]
        return sum(self.memory.values()) + max(self.passes["rollout"], update)

    @property
    def total_flops(self) -> int:
        """FLOPs of an epoch without gradient checkpointing."""
        return sum(count for phase, count in self.flops.items() if phase != "checkpointing")

    def __str__(self) -> str:
        processes = "1 process" if self.plan.processes == 1 else f"{self.plan.processes} processes"
        frozen = ", ".join(f"{name} {_millions(count)}" for name, count in self.frozen.items())
        flops = {phase: count for phase, count in self.flops.items() if phase != "checkpointing"}
        return "\n".join(
            [
                f"{self.model} on {processes}",
                *self.plan.lines(),
                f"trained  {_millions(self.trained)} parameters",
                f"frozen   {frozen}",
                "memory of a process, estimated:",
                *_table({**self.memory, **self.passes}, "B"),
                *_table({"at most": self.total_memory()}, "B"),
                *_table({"at most, with gradient checkpointing": self.total_memory(checkpointing=True)}, "B"),
                "FLOPs of an epoch:",
                *_table({**flops, "all": self.total_flops}, "FLOP"),
                *_table({"more with gradient checkpointing": self.flops["checkpointing"]}, "FLOP"),
            ]
        )


def estimate(config: Config, processes: int = 1) -> Estimate:
    """What a run of a validated config costs.

    Raises:
        UserError: the batches do not fit the processes, the model cannot be described, or is of another family than
            there are estimates for.
    """
    plan, algorithm = batch_plan(config, processes), config.update.algorithm
    sampled = max(plan.rollout_batch, config.evaluation.batch_size)
    decoded = min(config.policy.decode_batch_size, plan.rollout_batch)
    images_per_pair = 2 if algorithm == "dpo" else 1  # images: the best and the worst
    micro_batch, trained_images = plan.micro_batch * images_per_pair, plan.pairs * images_per_pair
    passes = run_passes(config, sampled, micro_batch, decoded)
    trained, frozen, latent = passes.trained, passes.frozen, prod(passes.latent_shape)
    size = getattr(torch, config.policy.dtype).itemsize
    of_process = plan.groups_each[1] * plan.group_size
    autocast = trained * size if trained == frozen["transformer"] and size < FLOAT32 else 0
    branches = 1 if config.rollout.guidance_scale == 1 else 2
    forward, train = passes.forward.flops // sampled, passes.train.flops // micro_batch
    reference = passes.reference.flops // sampled if config.update.kl_weight or algorithm == "dpo" else 0
    of_step = branches if algorithm in POLICY_GRADIENTS else 1  # the baselines' loss is the conditional branch's
    kept = latent * size
    if algorithm in POLICY_GRADIENTS:
        kept += plan.slots * (latent * size + FLOAT32) + latent * size
    if algorithm == "grpo_guard":
        kept += plan.slots * latent * (FLOAT32 if branches == 2 else size)
    return Estimate(
        model=config.model,
        plan=plan,
        trained=trained,
        frozen=frozen,
        memory={
            "weights": trained * FLOAT32 + sum(frozen.values()) * size,
            "gradients": trained * FLOAT32,
            "optimiser": 2 * trained * FLOAT32,
            "average": trained * FLOAT32 if config.update.ema_decay else 0,
            "trajectory": of_process * kept,
            "embeddings": (CACHED_PROMPTS + plan.groups_each[1]) * passes.conditioning,
        },
        passes={
            "rollout": passes.forward.peak + passes.decode.peak + autocast,
            "update": passes.train.peak + autocast,
            "update with gradient checkpointing": passes.checkpointed.peak + autocast,
        },
        flops={
            "rollout": plan.images * config.rollout.num_steps * branches * forward,
            "update": trained_images * (train + (of_step - 1) * forward),
            "reference": trained_images * of_step * reference,
            "decode": plan.images * (passes.decode.flops // decoded),
            "checkpointing": trained_images * (passes.checkpointed.flops // micro_batch - train),
        },
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _table(values: dict[str, int], unit: str) -> list[str]:
    return [f"  {name:<36}{_with_prefix(value, unit)}" for name, value in values.items()]


def _with_prefix(value: int, unit: str) -> str:
    """Four digits with a decimal prefix."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:8.4g} {prefix}{unit}"
    return f"{value:8} {unit}"
