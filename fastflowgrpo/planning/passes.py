"""The passes of a run on the meta device: what each takes in, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.architectures import Architecture, load_architecture
from fastflowgrpo.planning.meter import Cost, measure
from fastflowgrpo.policy import FAMILIES as POLICIES
from fastflowgrpo.policy.lora import keep_float32


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
        raise UserError(f"there is no estimate for a {model.pipeline}; there are for {', '.join(FAMILIES)}")
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


def _add_adapter(transformer: Any, rank: int, targets: list[str]) -> None:
    try:
        with torch.device("meta"):
            transformer.add_adapter(LoraConfig(r=rank, target_modules=targets))
    except ValueError as error:
        raise UserError(f"policy.lora_targets: {error}") from error
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
