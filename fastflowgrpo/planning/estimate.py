"""What a run costs, estimated without its weights: ``python -m fastflowgrpo.train --config FILE --dry_run``.

The policy's own code runs on the meta device, where tensors have shapes but no contents. Every operation is measured:
its FLOPs, by the formulas of PyTorch's FLOP counter (2 for a multiplication and an addition; the backward pass of fused
attention computes the scores again, which counts), and the bytes of all tensors that are alive at that moment. The
largest of these sums is what a pass needs beyond the weights, if every operation runs by itself. The device's kernels
may need some workspace, and PyTorch's allocator a few per cent more. With policy.compile an update takes less memory,
but a rollout's pass keeps its activations, which is not counted here.

Memory of a process, in bytes:

- weights: trained weights in float32, the transformer's others in policy.dtype or as policy.quantization says, text
  encoders and VAE in dtypes of their own. Full training keeps a frozen copy of the transformer, the reference. What
  policy.offload keeps on the CPU is counted in the passes that use it, and text encoders that policy.embeddings_dir
  frees are counted under encode.
- gradients, optimiser, average: 4, 8 and 4 for each trained parameter; update.optimizer adamw_8bit has a little more
  than 2 in place of the 8.
- trajectory: for each of the process's images (trained steps + 2) latents in policy.dtype and 4 bytes per log-prob;
  grpo_guard and update.trust_region divergence also keep each step's velocity, and rollout.keep_unconditional its
  unconditional one; algorithms without log-probs keep only the last latents. With rollout.offload_trajectory the
  steps of one batch or of two micro-batches are there at a time, and the others on the CPU.
- ahead: the same for the groups of the next epoch that rollout.ahead samples before the update. An update may then
  overlap the decoding of the last of them.
- old policy: 4 for each trained parameter, for nft, awm and dgpo.
- embeddings: those of the process's groups, and the 512, or the 5 GB of them, in the cache.
- passes: the larger of two sums, since the two phases do not overlap: the forward pass of a rollout (or evaluation)
  with the decoding of the previous images; the forward and backward pass of an update. Full training in a lower
  precision adds autocast's copy of the trained weights, and quantisation the dequantised copies of the largest weight.
  The reference computes before the trained pass: what policy.offload moves to the device for it is gone by then.
- encode: with policy.offload, text encoders and VAE while a prompt is encoded. With policy.embeddings_dir this happens
  before training, so that only what exceeds the memory of gradients, optimiser, average and trajectory is counted.

Reward networks on the same device come on top.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from fastflowgrpo.config import Config
from fastflowgrpo.learning import OBJECTIVES
from fastflowgrpo.learning.optimizer import state_bytes
from fastflowgrpo.planning.passes import Passes, run_passes
from fastflowgrpo.planning.plan import Plan, batch_plan
from fastflowgrpo.planning.roofline import Work
from fastflowgrpo.policy import component_dtypes
from fastflowgrpo.policy.embeddings import BATCH, cached_prompts
from fastflowgrpo.policy.protocol import ENCODERS
from fastflowgrpo.policy.quantization import quantised_bytes
from fastflowgrpo.sampling.rollout import sliding_start
from fastflowgrpo.sampling.window import rollout_passes

FLOAT32 = 4  # bytes
DEQUANTISED = 10  # bytes for each element of a weight while it is dequantised: torchao goes through float32


@dataclass(frozen=True)
class Estimate:
    """What a run costs; the module's docstring has every term."""

    model: str
    plan: Plan
    trained: int
    """Trained parameters."""
    frozen: dict[str, int]
    """Frozen parameters of each component."""
    memory: dict[str, int]
    """Bytes that a process always holds, by purpose."""
    passes: dict[str, int]
    """Bytes that a pass of each phase adds: rollout, update, update with gradient checkpointing, and encode if the text
    encoders are not always there."""
    flops: dict[str, int]
    """FLOPs of an epoch on all processes together: candidates (their passes, if there are any), rollout, update,
    reference, decode (candidates too), checkpointing (what gradient checkpointing would add to the update)."""
    work: dict[str, Work]
    """What the process with the most groups does in each phase, those of `flops` and encode, if `gpu` is set."""

    def total_memory(self, checkpointing: bool = False) -> int:
        """Return the peak bytes of a process."""
        update = self.passes["update with gradient checkpointing" if checkpointing else "update"]
        return sum(self.memory.values()) + max(self.passes["rollout"], update, self.passes.get("encode", 0))

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
                *self.plan.summary_lines(),
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


def estimate(config: Config, processes: int = 1, run: Callable[..., Passes] | None = None) -> Estimate:
    """Estimate what a run costs.

    Args:
        config: validated.
        processes: that train together.
        run: in place of `run_passes`.

    Raises:
        UserError: there are more processes than groups in an update, the model cannot be described, its family is not
            supported, or a policy setting does not fit it.
    """
    plan = batch_plan(config, processes)
    sampled = max(plan.rollout_batch_size, plan.candidate_batch_size, config.evaluation.batch_size)
    micro_batch = plan.micro_batch_size * OBJECTIVES[config.update.algorithm].samples_per_pair(config)
    decoded = max(plan.rollout_batch_size, plan.candidate_batch_size, plan.candidates)
    decoded = min(config.policy.decode_batch_size, decoded)
    with torch.random.fork_rng(devices=[]):  # a run's random numbers do not depend on whether it was estimated
        passes = (run or run_passes)(config, sampled, micro_batch, decoded)
    flops = _flops(config, plan, passes)
    memory = _memory(config, plan, passes)
    return Estimate(
        model=config.model,
        plan=plan,
        trained=passes.trained,
        frozen=passes.frozen,
        memory=memory,
        passes=_pass_memory(config, passes, memory),
        flops=flops,
        work=_work(config, plan, passes, flops),
    )


def _memory(config: Config, plan: Plan, passes: Passes) -> dict[str, int]:
    """Return `Estimate.memory`."""
    size, latent = getattr(torch, config.policy.dtype).itemsize, prod(passes.latent_shape)
    objective, groups = OBJECTIVES[config.update.algorithm], plan.groups_per_process[1]
    offloads = config.rollout.offload_trajectory
    pairs, steps = plan.pairs_per_image, 0  # bytes of an image's latents and velocities in its window
    if objective.uses_log_probs:
        steps += (pairs + 1) * latent * size
    if config.rollout.keep_unconditional:
        steps += pairs * latent * size
    if objective.keeps_velocities(config):
        steps += pairs * latent * (FLOAT32 if _branches(config) == 2 else size)
    kept = latent * size + objective.uses_log_probs * pairs * FLOAT32
    images = groups * plan.group_size
    # offloaded, those of one batch of the rollout, before they are copied, or of two micro-batches
    on_device = min(images, max(plan.rollout_batch_size, 2 * plan.micro_batch_size)) if offloads else images
    memory = {
        "weights": passes.trained * FLOAT32 + _held_bytes(config, passes),
        "gradients": passes.trained * FLOAT32,
        "optimiser": state_bytes(passes.trained_sizes, config.update.optimizer),
        "average": passes.trained * FLOAT32 if config.update.ema_decay else 0,
        "trajectory": images * kept + on_device * steps,
        "embeddings": (cached_prompts(passes.conditioning) + groups) * passes.conditioning,
    }
    if plan.ahead:
        memory["ahead"] = plan.ahead * plan.group_size * (kept + (0 if offloads else steps))
    if objective.uses_old_policy:
        memory["old policy"] = passes.trained * FLOAT32
    return memory


def _pass_memory(config: Config, passes: Passes, memory: dict[str, int]) -> dict[str, int]:
    """Return `Estimate.passes`."""
    policy, size = config.policy, getattr(torch, config.policy.dtype).itemsize
    dequantised = 0
    if policy.quantization is not None:
        dequantised = DEQUANTISED * max(rows * columns for rows, columns in passes.linears)
    weights = _frozen_bytes(config, passes)
    encoders = sum(count for name, count in weights.items() if name.startswith(ENCODERS))
    vae = weights["vae"] if policy.offload else 0
    reference = dequantised
    if passes.uses_lora:
        extra = dequantised
    else:
        extra = 0 if size == FLOAT32 else passes.trained * size  # autocast's copy
        reference += weights["transformer"] if policy.offload else 0
    in_rollout = config.update.data == "offline"
    # The reference computes before the trained pass keeps its activations.
    before = passes.reference.peak + reference if uses_reference(config) else 0
    decoding = passes.decode.peak + vae
    beside = decoding if config.rollout.ahead else 0
    found = {
        "rollout": passes.forward.peak + max(extra, in_rollout * reference) + decoding,
        "update": max(passes.train.peak + extra, before) + beside,
        "update with gradient checkpointing": max(passes.checkpointed.peak + extra, before) + beside,
    }
    if passes.encode is not None and policy.embeddings_dir is not None:
        encode = encoders + vae + BATCH * passes.encode.peak
        found["encode"] = max(0, encode - sum(memory.values()) + memory["weights"])
    elif passes.encode is not None and policy.offload:
        found["encode"] = encoders + vae + passes.encode.peak
    return found


def _held_bytes(config: Config, passes: Passes) -> int:
    """Return the bytes of the frozen weights that are always on the device."""
    weights, policy = _frozen_bytes(config, passes), config.policy
    if policy.offload or policy.embeddings_dir is not None:
        weights = {name: count for name, count in weights.items() if not name.startswith(ENCODERS)}
    if policy.offload:
        del weights["vae"]
        if not passes.uses_lora:
            del weights["transformer"]
    return sum(weights.values())


def _frozen_bytes(config: Config, passes: Passes) -> dict[str, int]:
    """Return the bytes of each component's frozen weights."""
    dtypes, kind = component_dtypes(config.policy), config.policy.quantization
    found = {name: count * dtypes.get(name, dtypes["default"]).itemsize for name, count in passes.frozen.items()}
    if kind is not None:
        for rows, columns in passes.linears:
            found["transformer"] += quantised_bytes(kind, rows, columns) - rows * columns * dtypes["default"].itemsize
    return found


def uses_reference(config: Config) -> bool:
    """Return whether an update computes the reference's velocity."""
    update = config.update
    return bool(OBJECTIVES[update.algorithm].uses_reference or update.kl_weight or update.norm_guard_weight)


def _flops(config: Config, plan: Plan, passes: Passes) -> dict[str, int]:
    """Return `Estimate.flops`."""
    objective, branches = OBJECTIVES[config.update.algorithm], _branches(config)
    trained_images = plan.pairs * objective.samples_per_pair(config)
    distinct = _distinct_images(config, plan, trained_images)
    forward, train = passes.forward.flops_per_sample, passes.train.flops_per_sample
    reference = passes.reference.flops_per_sample if uses_reference(config) else 0
    trained_branches = branches if objective.uses_log_probs else 1  # the other losses have no guidance
    unconditional = distinct * (trained_branches - 1) * forward
    if config.rollout.keep_unconditional:  # the first update of an epoch has them, but for stale samples
        kept = max(0, plan.groups // plan.updates - config.rollout.ahead)
        unconditional -= unconditional * kept // plan.groups
    candidates = plan.groups * plan.candidates
    flops = {"candidates": candidates * config.rollout.candidate_steps * branches * forward} if candidates else {}
    flops |= {
        "rollout": _sampled_images(config, plan) * branches * forward,
        "update": distinct * train + unconditional,
        "reference": _images_with_reference(config, plan, trained_images) * trained_branches * reference,
        "decode": (plan.images + candidates) * passes.decode.flops_per_sample,
        "checkpointing": distinct * (passes.checkpointed.flops_per_sample - train),
    }
    if objective.uses_old_policy:
        flops["old policy"] = trained_images * forward
    return flops


def _work(config: Config, plan: Plan, passes: Passes, flops: dict[str, int]) -> dict[str, Work]:
    """Return `Estimate.work`: no embedding is cached in memory, and each phase has the fewest passes possible."""
    rollout, policy, groups, branches = config.rollout, config.policy, plan.groups_per_process[1], _branches(config)
    work: dict[str, Work] = {}
    if config.gpu is None or passes.encode is None:
        return work
    if policy.embeddings_dir is None:
        prompts, dtype = groups + branches - 1, policy.text_encoder_dtype or policy.dtype
        work["encode"] = Work(prompts * passes.encode.flops, prompts, passes.encode.weights, dtype)
    candidate_batches = -(-groups * plan.candidates // rollout.batch_size)
    decoded_batches = -(-groups * (plan.group_size + plan.candidates) // policy.decode_batch_size)
    steps = _sampled_images(config, plan) // plan.images  # those of equal images, which are sampled once, are left out
    micro_batches = plan.updates * plan.micro_batches
    sampling, updating = groups / plan.groups, 1 / (plan.processes * plan.utilization)  # shares of all FLOPs
    phases = {
        "candidates": (sampling, candidate_batches * rollout.candidate_steps * branches, passes.forward),
        "rollout": (sampling, plan.rollout_batches * steps * branches, passes.forward),
        "decode": (sampling, decoded_batches, passes.decode),
        "update": (updating, micro_batches, passes.train),
        "reference": (updating, micro_batches, passes.reference),
        "old policy": (updating, micro_batches, passes.forward),
    }
    if policy.gradient_checkpointing:
        flops = flops | {"update": flops["update"] + flops["checkpointing"]}
    for phase, (share, number, cost) in phases.items():
        if flops.get(phase):
            dtype = policy.vae_dtype if phase == "decode" else policy.dtype
            work[phase] = Work(flops[phase] * share, number, cost.weights, dtype)
    return work


def _sampled_images(config: Config, plan: Plan) -> int:
    """Return the images that pass through the model in an epoch's rollout, in the mean over the starts of windows."""
    rollout = config.rollout
    if rollout.dynamics == "ode":
        return plan.images * rollout.num_steps
    low, high = rollout.window_start if rollout.window_size else (0, 1)
    starts: Sequence[int] = range(low, high)
    if rollout.window_stride:
        epochs = range(config.epochs)
        starts = [sliding_start(low, high, rollout.window_stride, rollout.window_epochs, epoch) for epoch in epochs]
    window_size = rollout.window_size or rollout.num_steps - 1
    rest = window_size, rollout.num_steps, plan.group_size, rollout.same_noise, rollout.tail_steps
    return plan.groups * sum(rollout_passes(start, *rest) for start in starts) // len(starts)


def _distinct_images(config: Config, plan: Plan, trained_images: int) -> int:
    """Return the trained images that an update passes through the model: a group's equal ones once per micro-batch."""
    if not config.rollout.same_noise or not OBJECTIVES[config.update.algorithm].uses_log_probs:
        return trained_images
    groups, size = plan.update_groups_per_process[1], plan.group_size
    cut_groups = sum(begin % size > 0 for begin in range(0, groups * size, plan.micro_batch_size))
    distinct = groups + cut_groups + groups * size * (plan.pairs_per_image - 1)
    return trained_images * distinct // (groups * size * plan.pairs_per_image)


def _images_with_reference(config: Config, plan: Plan, trained_images: int) -> int:
    """Return the trained images whose reference runs: `update.kl_share` of each micro-batch, rounded up."""
    pairs = plan.update_groups_per_process[1] * plan.trained_per_group * plan.pairs_per_image
    full, rest = divmod(pairs, plan.micro_batch_size)
    share = config.update.kl_share
    chosen = full * math.ceil(share * plan.micro_batch_size) + math.ceil(share * rest)
    return trained_images * chosen // pairs


def _branches(config: Config) -> int:
    """Return the forward passes of a guided velocity: conditional and unconditional, or the conditional one alone."""
    return 1 if config.rollout.guidance_scale == 1 else 2


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _table(values: dict[str, int], unit: str) -> list[str]:
    return [f"  {name:<36}{_with_prefix(value, unit)}" for name, value in values.items()]


def _with_prefix(value: int, unit: str) -> str:
    """Return a value with four digits and a decimal prefix."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:8.4g} {prefix}{unit}"
    return f"{value:8} {unit}"
