"""What the families share: which weights are trained and in which dtype, the reference, and how weights are saved."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.lora import add_lora, load_lora, save_lora

# Compiled blocks are specialised for the adapter on and off, for batch shapes and for blocks that are built otherwise:
# more than the 8 variants that torch allows by itself.
RECOMPILE_LIMIT = 64


class DiffusersPolicy(ABC):
    """The transformer of a diffusers pipeline, under LoRA or in full; the rest of the pipeline is frozen.

    A family adds `encode`, `latent_shape` and `predict`, `sigmas` where its pipeline does not leave the schedule to the
    scheduler alone, and `decode_part` for another VAE than FLUX's and SD3's.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    """Linear layers that carry the adapter by default, matched from the end of the module name."""
    default_sequence_length: int = 512
    """Text tokens, where `policy.max_sequence_length` is not set."""
    masked: ClassVar[bool] = False
    """Whether attention gets a mask, which some backends do not take."""

    def __init__(self, pipeline: DiffusionPipeline, config: PolicyConfig):
        self.pipeline, self.config = pipeline, config
        self.dtype, self.device = getattr(torch, config.dtype), pipeline.device
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        if isinstance(pipeline.vae, AutoencoderKL):
            pipeline.vae.to(memory_format=torch.channels_last)  # what 2D convolutions are fastest in, on CPUs and GPUs
        length = config.max_sequence_length
        self.sequence_length = self.default_sequence_length if length is None else length
        self.module = pipeline.transformer
        if config.attention is not None:
            self._set_attention(config.attention)
        if config.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        self._reference_module: ModelMixin | None = None
        if config.lora is not None:
            load_lora(pipeline, config.lora, config.lora_rank)
        elif config.lora_rank:
            add_lora(self.module, config.lora_targets or self.lora_targets, config.lora_rank, config.lora_alpha)
        else:
            self._reference_module = deepcopy(self.module)
            self.module.requires_grad_(True)
            cast_training_params(self.module)
        self.freeze_unread(self.module)
        if config.compile:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
            for module in (self.module, self._reference_module):
                if module is not None:
                    # SD3's transformer does not name its repeated blocks
                    module._repeated_blocks = module._repeated_blocks or module._no_split_modules
                    module.compile_repeated_blocks(fullgraph=True)
        self.transformer = self.module

    @staticmethod  # noqa: B027  that of a family may have nothing to freeze
    def freeze_unread(transformer: Any) -> None:
        """Freeze those of the trained weights that nothing depends on: DDP would wait for their gradients."""

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """The schedule of the pipeline's own scheduler; `shape`, of a latent sample, has no part in it."""
        scheduler = deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.cpu()

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """`velocity`, as the family's pipeline calls its transformer."""

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        with_graph = torch.is_grad_enabled()
        # Weights trained in full are float32; autocast gives them the compute dtype, in rollout and update alike.
        autocast = self._reference_module is not None and self.dtype != torch.float32
        # The compiler fuses, and so rounds, a pass without gradients otherwise: compiled, both phases run the same.
        with (
            torch.set_grad_enabled(with_graph or self.config.compile),
            torch.autocast(self.device.type, self.dtype, enabled=autocast),
        ):
            velocity = self.predict(latents, sigma, conditioning)
        return (velocity if with_graph else velocity.detach()).to(self.dtype)

    def decode_part(self, latents: Tensor) -> Tensor:
        """Images about [-1, 1], (B, 3, H, W), or videos, (B, F, 3, H, W); here those of an `AutoencoderKL`."""
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = (self.decode_part(part).float() for part in latents.split(self.config.decode_batch_size))
        return torch.cat([(part * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8) for part in parts])

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._reference_module is None:
            self.module.disable_adapters()
            try:
                yield
            finally:
                self.module.enable_adapters()
        else:
            trained, self.transformer = self.transformer, self._reference_module
            try:
                yield
            finally:
                self.transformer = trained

    def save(self, folder: Path) -> None:
        if self._reference_module is None:
            save_lora(self.pipeline, folder)
        else:
            self.module.save_pretrained(folder / "transformer")

    def encoder_key(self) -> str:
        """A hash of what an embedding depends on besides its prompt: model, encoders' weights, length and dtype."""
        weights = {
            # a sum of the bits: exact on every device, and quick
            f"{name}.{key}": int(tensor.flatten().view(torch.uint8).sum(dtype=torch.int64))
            for name, encoder in self._encoders().items()
            for key, tensor in encoder.state_dict().items()
        }
        source = [type(self).__name__, self.pipeline.name_or_path, str(self.dtype), self.sequence_length, weights]
        return hashlib.sha256(json.dumps(source).encode()).hexdigest()

    def drop_encoders(self) -> None:
        """Free the memory of the text encoders; `encode` cannot be called any more."""
        self.pipeline.register_modules(**dict.fromkeys(self._encoders()))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encoders(self) -> dict[str, nn.Module]:
        return {
            name: component
            for name, component in self.pipeline.components.items()
            if name.startswith("text_encoder") and component is not None
        }

    def _set_attention(self, name: str) -> None:
        processors: list[Any] = list(self.module.attn_processors.values())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise UserError(
                f"policy.attention: {type(self.module).__name__} does not use diffusers' attention dispatcher, so it "
                f"has no choice of backends; leave {name} out"
            )
        try:
            self.module.set_attention_backend(name)
            # What is installed may still lack this device, dtype, mask or a backward pass: find out now.
            query = torch.zeros(1, 16, 1, self.module.config.attention_head_dim, dtype=self.dtype, device=self.device)
            mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=self.device) if self.masked else None
            query.requires_grad_()
            output = dispatch_attention_fn(query, query, query, attn_mask=mask, backend=AttentionBackendName(name))
            output.sum().backward()
        except Exception as error:
            raise UserError(f"policy.attention: {name} does not work here: {error}") from error
