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

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch
from weakref import finalize

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastflowgrpo.architectures import Architecture, load_architecture
from fastflowgrpo.config import POLICY_GRADIENTS, Config, ConfigError
from fastflowgrpo.plan import Plan, batch_plan
from fastflowgrpo.policy import FAMILIES as POLICIES
from fastflowgrpo.policy.lora import keep_float32

CACHED_PROMPTS = 512  # what `EmbeddingCache` keeps
FLOAT32 = 4  # bytes
_PLAIN_ATTENTION = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Inputs:
    """What a transformer's pass takes for a batch, on the meta device."""

    latent_shape: tuple[int, ...]
    """Of a sample, as the VAE decodes it."""
    conditioning: dict[str, Tensor]
    """Of the prompts; a row per sample."""
    others: dict[str, Any]

    def __call__(self, transformer: nn.Module) -> Tensor:
        return transformer(**self.conditioning, **self.others, return_dict=False)[0]


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


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pass, and the most bytes that it had at a time."""

    flops: int
    peak: int


@dataclass(frozen=True)
class Passes:
    """What the passes of a run cost, each for its batch."""

    trained: int
    frozen: dict[str, int]
    latent_shape: tuple[int, ...]
    conditioning: int
    """Bytes of a prompt's embedding."""
    forward: Cost
    reference: Cost
    """A forward pass without the adapter."""
    train: Cost
    """Forward and backward."""
    checkpointed: Cost
    """The same with gradient checkpointing."""
    decode: Cost


def estimate(config: Config, processes: int = 1) -> Estimate:
    """What a run of a validated config costs.

    Raises:
        ConfigError: the batches do not fit the processes, the model cannot be described, or is of another family than
            there are estimates for.
    """
    plan, algorithm = batch_plan(config, processes), config.update.algorithm
    sampled = max(plan.rollout_batch, config.evaluation.batch_size)
    decoded = min(config.policy.decode_batch_size, plan.rollout_batch)
    of_unit = 2 if algorithm == "dpo" else 1  # images: the best and the worst
    micro_batch, trained_images = plan.micro_batch * of_unit, plan.pairs * of_unit
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


def run_passes(config: Config, sampled: int, micro_batch: int, decoded: int) -> Passes:
    """Run a model's passes on the meta device.

    Args:
        sampled: batch of a forward pass in rollout and evaluation.
        micro_batch: batch of a forward and backward pass.
        decoded: images decoded at once.
    """
    dtype = getattr(torch, config.policy.dtype)
    model = load_architecture(config.model, dtype)
    transformer, vae = model.transformer, model.vae
    if model.pipeline not in FAMILIES:
        raise ConfigError(f"there is no estimate for a {model.pipeline}; there are for {', '.join(FAMILIES)}")
    modules = {"transformer": transformer, **model.text_encoders, "vae": vae}
    frozen = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    rank = config.policy.lora_rank
    if rank is None:
        rank = 0 if config.model == "shapes" else 32
    family: Any = POLICIES[model.pipeline]
    if rank:
        _add_adapter(transformer, rank, config.policy.lora_targets or list(family.lora_targets))
    else:
        transformer.requires_grad_(True)
    family.freeze_unread(transformer)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trained:
        # There from the second micro-batch on: no part of the pass.
        parameter.grad = torch.zeros_like(parameter)
    inputs, batch = (FAMILIES[model.pipeline](model, config, count) for count in (sampled, micro_batch))
    latents = torch.empty(decoded, *inputs.latent_shape, dtype=dtype, device="meta")

    def update() -> None:
        velocity = batch(transformer)
        velocity.backward(torch.empty_like(velocity))

    with torch.no_grad():
        forward = reference = measure(lambda: inputs(transformer))
        if rank:
            transformer.disable_adapters()
            reference = measure(lambda: inputs(transformer))
            transformer.enable_adapters()
        decode = measure(lambda: vae.decode(latents, return_dict=False))
    train = measure(update)
    transformer.enable_gradient_checkpointing()
    return Passes(
        trained=sum(parameter.numel() for parameter in trained),
        frozen=frozen,
        latent_shape=inputs.latent_shape,
        conditioning=sum(tensor[0].numel() * tensor.element_size() for tensor in inputs.conditioning.values()),
        forward=forward,
        reference=reference,
        train=train,
        checkpointed=measure(update),
        decode=decode,
    )


def measure(function: Callable[[], object]) -> Cost:
    """What calling a function costs. Attention on the meta device is the fused operation that a GPU runs, not the plain
    products that it would be there."""
    with patch.object(F, "scaled_dot_product_attention", _attention), _Meter() as meter:
        function()
    return Cost(meter.flops, meter.peak)


class _Meter(TorchDispatchMode):
    """Adds up the FLOPs of every operation, and the bytes of the tensors that were made inside it while they live.

    `FlopCounterMode` has the same formulas, but is many times slower, and what it notes of modules keeps tensors alive
    that gradient checkpointing lets go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A view of what was there before is no new memory.
        self._note((args, kwargs), new=False)
        result = func(*args, **kwargs)
        self._note(result, new=True)
        self.peak = max(self.peak, self.live)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _note(self, tree: Any, new: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if new else 0
                if key not in self.known:
                    self.known.add(key)
                    self.live += size
                    finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    if query.device.type != "meta":
        return _PLAIN_ATTENTION(query, key, value, attn_mask, **settings)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


def _add_adapter(transformer: Any, rank: int, targets: list[str]) -> None:
    try:
        with torch.device("meta"):
            transformer.add_adapter(LoraConfig(r=rank, target_modules=targets))
    except ValueError as error:
        raise ConfigError(f"policy.lora_targets: {error}") from error
    keep_float32(transformer)


def _sd3(model: Architecture, config: Config, batch: int) -> Inputs:
    c = model.transformer.config
    height, width = _latent_size(model, config, c.sample_size)
    clip = model.text_encoders["text_encoder"].config.max_position_embeddings
    tokens = clip + _tokens(config, 256 if "text_encoder_3" in model.text_encoders else 0)
    new = _allocator(model, batch)
    return Inputs(
        (c.in_channels, height, width),
        {
            "encoder_hidden_states": new(tokens, c.joint_attention_dim),
            "pooled_projections": new(c.pooled_projection_dim),
        },
        {"hidden_states": new(c.in_channels, height, width), "timestep": _timestep(batch)},
    )


def _flux(model: Architecture, config: Config, batch: int) -> Inputs:
    c = model.transformer.config
    height, width = _latent_size(model, config, 128)
    tokens, patches = _tokens(config, 512), height * width // 4
    new = _allocator(model, batch)
    return Inputs(
        (c.in_channels // 4, height, width),
        {
            "encoder_hidden_states": new(tokens, c.joint_attention_dim),
            "pooled_projections": new(c.pooled_projection_dim),
        },
        {
            "hidden_states": new(patches, c.in_channels),
            "timestep": _timestep(batch),
            "guidance": _timestep(batch) if c.guidance_embeds else None,
            "img_ids": torch.empty(patches, 3, device="meta"),
            "txt_ids": torch.empty(tokens, 3, device="meta"),
        },
    )


def _wan(model: Architecture, config: Config, batch: int) -> Inputs:
    c, vae = model.transformer.config, model.vae.config
    rollout, factor = config.rollout, vae.scale_factor_spatial
    height, width = (rollout.height or 480) // factor, (rollout.width or 832) // factor
    frames = ((rollout.num_frames or 81) - 1) // vae.scale_factor_temporal + 1
    new = _allocator(model, batch)
    shape = (c.in_channels, frames, height, width)
    return Inputs(
        shape,
        {"encoder_hidden_states": new(_tokens(config, 512), c.text_dim)},
        {"hidden_states": new(*shape), "timestep": _timestep(batch)},
    )


def _qwen_image(model: Architecture, config: Config, batch: int) -> Inputs:
    c, vae = model.transformer.config, model.vae.config
    rollout, factor = config.rollout, 2 ** len(vae.temperal_downsample)
    height, width = (rollout.height or 1024) // factor, (rollout.width or 1024) // factor
    tokens, new = _tokens(config, 512), _allocator(model, batch)
    return Inputs(
        (c.in_channels // 4, 1, height, width),
        {
            "encoder_hidden_states": new(tokens, c.joint_attention_dim),
            "encoder_hidden_states_mask": new(tokens).bool(),
        },
        {
            "hidden_states": new(height * width // 4, c.in_channels),
            "timestep": _timestep(batch),
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        },
    )


FAMILIES: dict[str, Callable[[Architecture, Config, int], Inputs]] = {
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "QwenImagePipeline": _qwen_image,
    "WanPipeline": _wan,
}


def _latent_size(model: Architecture, config: Config, default: int) -> tuple[int, int]:
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    height, width = config.rollout.height, config.rollout.width
    return (default if height is None else height // factor, default if width is None else width // factor)


def _tokens(config: Config, default: int) -> int:
    return default if config.policy.max_sequence_length is None else config.policy.max_sequence_length


def _allocator(model: Architecture, batch: int) -> Callable[..., Tensor]:
    dtype = model.vae.dtype
    return lambda *shape: torch.empty(batch, *shape, dtype=dtype, device="meta")


def _timestep(batch: int) -> Tensor:
    return torch.empty(batch, device="meta")


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
