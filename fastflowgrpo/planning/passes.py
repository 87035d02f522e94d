"""The passes of a run on the meta device: the policy's own code runs, and each pass is measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPVisionConfig

from fastflowgrpo.config import Config
from fastflowgrpo.planning.meta_pipeline import meta_pipeline
from fastflowgrpo.planning.meter import Cost, measure
from fastflowgrpo.policy import Conditioning, Policy, family_of, with_default_rank
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.guidance import check_guidance
from fastflowgrpo.policy.protocol import ENCODERS
from fastflowgrpo.policy.quantization import linear_layers
from fastflowgrpo.policy.source_images import sources_per_prompt


@dataclass(frozen=True)
class BatchCost(Cost):
    """The cost of a pass for a whole batch."""

    batch_size: int

    @property
    def flops_per_sample(self) -> int:
        return self.flops // self.batch_size


@dataclass(frozen=True)
class Passes:
    """The parameters of a model and what its passes cost, each for its batch."""

    trained_sizes: tuple[int, ...]
    """Values of each trained parameter."""
    frozen: dict[str, int]
    """Frozen parameters of each component; the reference's, for a transformer that is trained in full."""
    linears: tuple[tuple[int, int], ...]
    """Rows and columns of the frozen weights that `policy.quantization` changes."""
    uses_lora: bool
    latent_shape: tuple[int, ...]
    """Of one sample."""
    conditioning: int
    """Bytes of a prompt's embedding."""
    forward: BatchCost
    reference: BatchCost
    """A forward pass of the reference in an update."""
    train: BatchCost
    """Forward and backward."""
    checkpointed: BatchCost
    """Forward and backward with gradient checkpointing."""
    decode: BatchCost
    encode: BatchCost | None
    """All text encoders for one prompt of the embedding's length, if a setting needs it."""

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(self.trained_sizes)


def run_passes(config: Config, sampled: int, micro_batch: int, decoded: int) -> Passes:
    """Run a model's passes on the meta device.

    Args:
        config: of the run.
        sampled: batch of a forward pass in rollout and evaluation.
        micro_batch: batch of a forward and backward pass.
        decoded: images decoded at once.

    Raises:
        UserError: the model cannot be described, its family is not supported, or a policy setting does not fit it.
    """
    policy, frozen, linears = _meta_policy(config)
    trained = policy.trainable_parameters()
    for parameter in trained:
        # Gradients exist from the second micro-batch on: they are not part of the pass.
        parameter.grad = torch.zeros_like(parameter)
    inputs, training_inputs = example_inputs(policy, config, sampled), example_inputs(policy, config, micro_batch)
    latents, _, conditioning = inputs

    def update() -> None:
        velocity = policy.predict(*training_inputs)
        velocity.backward(torch.empty_like(velocity))

    with torch.no_grad():
        forward = _measure_batch(lambda: policy.predict(*inputs), sampled)
        with policy.reference():
            reference = _measure_batch(lambda: policy.predict(*training_inputs), micro_batch)
        decoded_latents = latents.new_empty(decoded, *latents.shape[1:], dtype=policy.pipeline.vae.dtype)
        decode = _measure_batch(lambda: policy.decode_batch(decoded_latents), decoded)
        needs_encode = config.gpu is not None or config.policy.offload or config.policy.embeddings_dir is not None
        encode = _measure_batch(lambda: _encode(policy), 1) if needs_encode else None
    train = _measure_batch(update, micro_batch)
    policy.enable_gradient_checkpointing()
    return Passes(
        trained_sizes=tuple(parameter.numel() for parameter in trained),
        frozen=frozen,
        linears=linears,
        uses_lora=policy.uses_lora,
        latent_shape=tuple(latents.shape[1:]),
        conditioning=sum(tensor[0].numel() * tensor.element_size() for tensor in conditioning.values()),
        forward=forward,
        reference=reference,
        train=train,
        checkpointed=_measure_batch(update, micro_batch),
        decode=decode,
        encode=encode,
    )


def _measure_batch(function: Callable[[], object], batch_size: int) -> BatchCost:
    cost = measure(function)
    return BatchCost(cost.flops, cost.peak, cost.weights, batch_size)


def _meta_policy(config: Config) -> tuple[DiffusersPolicy, dict[str, int], tuple[tuple[int, int], ...]]:
    """Return the policy of a run on the meta device, the frozen parameters of each component, and `Passes.linears`."""
    settings = with_default_rank(config.model, config.policy)
    # The passes are measured with and without checkpointing; neither kernels nor a compiler run on the meta device.
    settings = replace(settings, gradient_checkpointing=False, attention=None, compile=False, quantization=None)
    pipeline = meta_pipeline(config.model, settings)
    components = {name: component for name, component in pipeline.components.items() if component is not None}
    transformers = nn.ModuleList(component for name, component in components.items() if name.startswith("transformer"))
    encoders = {name: component for name, component in components.items() if name.startswith(ENCODERS)}
    modules = {"transformer": transformers, **encoders, "vae": pipeline.vae}
    frozen = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    linears = tuple(
        (layer.out_features, layer.in_features)
        for transformer in transformers
        for layer in linear_layers(transformer).values()
    )
    policy = family_of(config.model, type(pipeline).__name__)(pipeline, settings)
    check_guidance(policy, config.rollout.guidance, config.evaluation_guidance)
    if not policy.uses_lora:
        # The meta device has no autocast, which computes in this dtype: give the weights themselves the dtype.
        nn.Module.to(policy.module, policy.dtype)
    return policy, frozen, linears


def _encode(policy: DiffusersPolicy) -> None:
    """Call each encoder for one prompt, of `policy.sequence_length` tokens or, for CLIP, of its fixed size."""
    for encoder in policy.text_encoders().values():
        size, dtype = [1, policy.sequence_length], torch.int64
        if isinstance(encoder.config, CLIPTextConfig):
            size = [1, encoder.config.max_position_embeddings]
        elif isinstance(encoder.config, CLIPVisionConfig):
            size, dtype = [1, 3, encoder.config.image_size, encoder.config.image_size], encoder.dtype
        encoder(torch.zeros(size, dtype=dtype, device=policy.device), output_hidden_states=True)


def example_inputs(policy: Policy, config: Config, batch_size: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Return latents, sigma and conditioning of a batch, as `velocity` takes them, with arbitrary contents."""
    rollout = config.rollout
    shape = policy.latent_shape(rollout.height, rollout.width, rollout.num_frames)
    latents = torch.empty(batch_size, *shape, dtype=policy.dtype, device=policy.device)
    num_images = sources_per_prompt(policy, config)
    if num_images:
        conditioning = policy.example_edit(batch_size, shape, num_images)
    else:
        conditioning = policy.example_conditioning(batch_size)
    return latents, torch.empty(batch_size, device=policy.device), conditioning
