"""What the families share: which weights are trained and in which dtype, the reference, and how weights are saved."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.lora import add_lora, load_lora, load_lora_weights, save_lora, without_lora
from fastflowgrpo.policy.offload import OffloadedModule
from fastflowgrpo.policy.protocol import ENCODERS, SOURCE, Conditioning
from fastflowgrpo.policy.quantization import prepare_quantised, quantise_reference
from fastflowgrpo.policy.sharded_loading import read_shards
from fastflowgrpo.prompts.images import read_image

# Blocks are compiled separately with and without the adapter, for each batch shape and for each kind of block: more
# variants than the 8 that torch allows by default.
RECOMPILE_LIMIT = 64


class DiffusersPolicy(ABC):
    """Trains the transformer of a diffusers pipeline, with a LoRA or in full; the rest of the pipeline is frozen.

    The methods of `Policy` that stand here without a docstring are described there. A family adds `encode`,
    `latent_shape`, `predict` and `example_conditioning`. It overrides `sigmas` if its pipeline passes sigmas or a shift
    to its scheduler, `decode_batch` and, if it takes source images, `encode_batch` for a VAE other than FLUX's and
    SD3's, and what else differs.

    Args:
        pipeline: on the device where it runs, its components in the dtypes of `component_dtypes`; its transformer is
            changed in place.
        config: adapter and embedding settings. Without a `lora` and with a `lora_rank` of 0 or None the whole
            transformer is trained.

    Raises:
        UserError: the pipeline does not support a setting.
    """

    lora_targets: tuple[str, ...]
    """Linear layers that carry the adapter by default, matched from the end of the module name."""
    has_attention_mask: ClassVar[bool] = False
    """Whether attention gets a mask, which some backends do not take."""
    makes_videos: ClassVar[bool] = False
    sources_of_any_size: ClassVar[bool] = False
    """Whether source images may have another size than the result."""
    edits_images: bool = False
    max_sources: int = 0
    boundary: float | None = None

    def __init__(self, pipeline: DiffusionPipeline, config: PolicyConfig):
        self.pipeline, self.config = pipeline, config
        if (config.source_height or config.source_width) and not self.sources_of_any_size:
            raise UserError(
                "policy.source_height, policy.source_width: this model takes no source images, or only those of the "
                "size of the result: leave both out"
            )
        self.dtype, self.device = getattr(torch, config.dtype), pipeline.vae.device
        self.transformers = {
            name: component
            for name, component in pipeline.components.items()
            if name.startswith("transformer") and component is not None
        }
        self.module = self.trained_module()
        absent = [name for name, component in pipeline.components.items() if component is None]
        length = config.max_sequence_length
        self.sequence_length = self.default_sequence_length(absent) if length is None else length
        self._reference_module: nn.Module | None = None
        self._offloaded: dict[nn.Module, OffloadedModule] = {}
        self._freeze()
        if config.attention is None:
            # Torch prefers cuDNN's attention on Hopper, whose backward pass gives NaN for some lengths (pytorch issue
            # 196678, and tiny FLUX models here). Flash attention is next.
            torch.backends.cuda.enable_cudnn_sdp(False)
        else:
            self.set_attention(config.attention)
        if config.gradient_checkpointing:
            self.enable_gradient_checkpointing()
        self._make_trainable()
        if config.quantization is not None and self.uses_lora:
            prepare_quantised(self.module)
        if config.compile:
            self._compile()
        self.transformer = self.module

    @classmethod
    def default_sequence_length(cls, absent: Collection[str]) -> int:
        """Return the text tokens of an embedding where `policy.max_sequence_length` is not set.

        Args:
            absent: components that the pipeline was saved without.
        """
        return 512

    @classmethod
    def guidance_arguments(cls, config: PolicyConfig, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments with which the pipeline's call applies classifier-free guidance as `sampling` does."""
        return {"guidance_scale": guidance_scale}

    @property
    def is_few_step(self) -> bool:
        """Whether the model was distilled to few steps; here by its name, if its configuration does not say it."""
        return bool(
            re.search("turbo|schnell|lightning|distilled", Path(self.pipeline.name_or_path).name, re.IGNORECASE)
        )

    @property
    def pipeline_guides(self) -> bool:
        """Whether the pipeline's call has classifier-free guidance for this model."""
        return True

    @property
    def attention_head_dim(self) -> int:
        """The width of an attention head."""
        return self.pipeline.transformer.config.attention_head_dim

    @property
    def uses_lora(self) -> bool:
        return self._reference_module is None

    def warnings(self, guided: bool) -> list[str]:
        name, found = self.pipeline.name_or_path, []
        if self.is_few_step:
            found.append(
                f"{name} was distilled to few steps. The samplers take its velocity for that of a flow, which it is "
                "not, and training may undo the distillation: train the model that it was distilled from, if you can"
            )
        if guided and not self.pipeline_guides:
            found.append(
                f"the pipeline of {name} does not apply classifier-free guidance and draws other images than this run: "
                "set rollout.guidance_scale and evaluation.guidance_scale to 1"
            )
        return found

    def trained_module(self) -> Any:
        """Return the module that is trained, which has all of `self.transformers`."""
        return self.pipeline.transformer

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the transformers' blocks for the backward pass."""
        for transformer in self.transformers.values():
            transformer.enable_gradient_checkpointing()

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning: ...

    @abstractmethod
    def example_conditioning(self, batch_size: int) -> Conditioning: ...

    @abstractmethod
    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]: ...

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Compute `velocity` by calling `self.transformer` as the family's pipeline does."""

    def freeze_unused_weights(self) -> None:  # noqa: B027  most families have none
        """Freeze trained weights that the output does not depend on: DDP would wait for their gradients."""

    def train_only_at(self, sigmas: Tensor) -> None:  # noqa: B027  most families use all weights at all noise levels
        pass

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        scheduler = deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.cpu()

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with_graph = torch.is_grad_enabled()
        # Weights trained in full are float32; autocast gives them the compute dtype, in rollout and update alike.
        autocast = not self.uses_lora and self.dtype != torch.float32
        # The compiler fuses a pass without gradients differently, which rounds differently. Compiled, the rollout
        # therefore runs with gradients too, as the update does, but saves nothing for a backward pass.
        unsaved = self.config.compile and not with_graph
        with (
            saved_tensors_hooks(_drop, _no_backward) if unsaved else nullcontext(),
            torch.set_grad_enabled(with_graph or self.config.compile),
            torch.autocast(self.device.type, self.dtype, enabled=autocast),
        ):
            velocity = self.predict(latents, sigma, conditioning)
        return (velocity if with_graph else velocity.detach()).to(self.dtype)

    def decode_batch(self, latents: Tensor) -> Tensor:
        """Decode latents to images, (B, 3, H, W), or videos, (B, F, 3, H, W), with values of about [-1, 1].

        Args:
            latents: in the VAE's dtype.
        """
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    def encode_batch(self, pixels: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) with values of [-1, 1], in the VAE's dtype: the inverse of `decode_batch`."""
        vae = self.pipeline.vae
        return (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_sources(self, images: Sequence[Path | bytes], shape: tuple[int, ...]) -> Tensor:
        """Encode the source images of an edit to latents, (1, N, C, H, W); arguments as in `encode_edit`."""
        height, width = self.image_size(self.source_shape(shape))
        pixels = [read_image(image, height, width)[None].to(self.device, self.pipeline.vae.dtype) for image in images]
        return torch.stack([self.encode_batch(image / 127.5 - 1) for image in pixels], 1).to(self.dtype).contiguous()

    def encode_edit(self, prompt: str, images: Sequence[Path | bytes], shape: tuple[int, ...]) -> Conditioning:
        return {**self.encode([prompt]), SOURCE: self.encode_sources(images, shape)}

    def example_edit(self, batch_size: int, shape: tuple[int, ...], num_images: int) -> Conditioning:
        """Return tensors like those of `encode_edit`, as `example_conditioning` does."""
        size = batch_size, num_images, *self.source_shape(shape)
        source = torch.empty(size, dtype=self.dtype, device=self.device)
        return {**self.example_conditioning(batch_size), SOURCE: source}

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a source image's latents for a latent sample of a shape.

        Raises:
            UserError: the model cannot take this size.
        """
        height, width = self.config.source_height, self.config.source_width
        if height is None and width is None:
            return shape
        of_result = self.image_size(shape)
        try:
            return self.latent_shape(height or of_result[0], width or of_result[1])
        except UserError as error:
            raise UserError(str(error).replace("rollout.", "policy.source_", 1)) from error

    def image_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return (height, width) in pixels of the image that a latent sample of a shape is decoded to."""
        factor = self.pipeline.vae_scale_factor
        return shape[-2] * factor, shape[-1] * factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        batches = latents.split(self.config.decode_batch_size)
        decoded = (self.decode_batch(batch.to(self.pipeline.vae.dtype)).float() for batch in batches)
        with self._on_device(self.pipeline.vae):
            return torch.cat([(images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8) for images in decoded])

    def read_shards(self, files: Mapping[str, Sequence[Path]], shard: Callable[[nn.Module], None]) -> None:
        """Shard the transformers and the reference of full training, which are on the meta device, and read this rank's
        part of their weights from the files of each transformer."""
        assert self._reference_module is not None
        for module in (self.module, self._reference_module):
            shard(module)
        is_one = self.module is self.pipeline.transformer
        by_prefix = {"" if is_one else f"{name}.": of_one for name, of_one in files.items()}
        read_shards(by_prefix, self.module, self._reference_module, self.device)

    def offload(self) -> None:
        """Keep the text encoders, the VAE and the reference of full training on the CPU while they are not used.

        A sharded reference stays where it is.
        """
        for module in (*self.text_encoders().values(), self.pipeline.vae, self._reference_module):
            if module is not None and not isinstance(module, FSDPModule):
                self._offloaded[module] = OffloadedModule(module, self.device)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        # The VAE too: a pipeline encodes on the device of its first component, which may be the VAE.
        with self._on_device(*self.text_encoders().values(), self.pipeline.vae):
            yield

    @contextmanager
    def _on_device(self, *modules: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in modules:
                if module in self._offloaded:
                    stack.enter_context(self._offloaded[module].on_device())
            yield

    def set_attention(self, name: str) -> None:
        """Use a backend of diffusers for the transformer's attention, and try it forward and backward.

        Raises:
            UserError: it does not work with this device, dtype or model, or is not installed.
        """
        try:
            # An installed backend may still not support this device, dtype, mask or a backward pass: try it now.
            self._attention_sample(name).sum().backward()
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            raise UserError(f"policy.attention: {name} does not work here: {reason}") from error

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._reference_module is None:
            with without_lora(self.module):
                yield
        else:
            trained, self.transformer = self.transformer, self._reference_module
            try:
                with self._on_device(self._reference_module):
                    yield
            finally:
                self.transformer = trained

    def save(self, folder: Path) -> None:
        for name, transformer in self.transformers.items():
            if self.uses_lora:
                save_lora(self.pipeline, folder, name)
            else:
                transformer.save_pretrained(folder / name)

    def load(self, folder: Path) -> None:
        try:
            for name, transformer in self.transformers.items():
                if self.uses_lora:
                    load_lora_weights(self.pipeline, folder, name)
                else:
                    trained = type(transformer).from_pretrained(folder / name, dtype=torch.float32)
                    transformer.load_state_dict(trained.state_dict())
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {folder} does not fit the model: {reason}") from error

    def encoder_key(self) -> str:
        """Return a hash of the model, the encoders' weights, the sequence length and the dtypes."""
        weights = {
            # a sum of the bits: exact on every device, and quick
            f"{name}.{key}": int(tensor.flatten().view(torch.uint8).sum(dtype=torch.int64))
            for name, encoder in self.text_encoders().items()
            for key, tensor in encoder.state_dict().items()
        }
        dtypes = [self.config.dtype, self.config.text_encoder_dtype or self.config.dtype]
        source = [type(self).__name__, self.pipeline.name_or_path, dtypes, self.sequence_length, weights]
        if self.config.source_height or self.config.source_width:
            source += [self.config.source_height, self.config.source_width]
        return hashlib.sha256(json.dumps(source).encode()).hexdigest()

    def drop_encoders(self) -> None:
        for encoder in self.text_encoders().values():
            self._offloaded.pop(encoder, None)
        self.pipeline.register_modules(**dict.fromkeys(self.text_encoders()))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def text_encoders(self) -> dict[str, Any]:
        """Return the pipeline's encoders of texts and, for embeddings, of images by the names of its components."""
        return {
            name: component
            for name, component in self.pipeline.components.items()
            if name.startswith(ENCODERS) and component is not None
        }

    def _freeze(self) -> None:
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        if isinstance(self.pipeline.vae, AutoencoderKL | AutoencoderKLFlux2):
            # the fastest memory format for 2D convolutions, on CPUs and GPUs
            self.pipeline.vae.to(memory_format=torch.channels_last)

    def _make_trainable(self) -> None:
        config = self.config
        if config.lora is not None:
            for name in self.transformers:
                load_lora(self.pipeline, config.lora, config.lora_rank, name)
        elif config.lora_rank:
            targets = config.lora_targets or self.lora_targets
            for transformer in self.transformers.values():
                add_lora(transformer, targets, config.lora_rank, config.lora_alpha)
        else:
            self._reference_module = deepcopy(self.module)
            if config.quantization is not None:
                quantise_reference(self._reference_module, config.quantization)
            self.module.requires_grad_(True)
            cast_training_params(self.module)
        self.freeze_unused_weights()

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        modules = [module for module in (self.module, self._reference_module) if module is not None]
        for transformer in (part for module in modules for part in module.modules() if isinstance(part, ModelMixin)):
            # SD3's transformer does not name its repeated blocks
            transformer._repeated_blocks = transformer._repeated_blocks or transformer._no_split_modules
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def _attention_sample(self, name: str) -> Tensor:
        """Choose the attention backend and return its output for an input that requires a gradient."""
        for transformer in self.transformers.values():
            transformer.set_attention_backend(name)
        query = torch.zeros(1, 16, 1, self.attention_head_dim, dtype=self.dtype, device=self.device)
        mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=self.device) if self.has_attention_mask else None
        query.requires_grad_()
        return dispatch_attention_fn(query, query, query, attn_mask=mask, backend=AttentionBackendName(name))


def _drop(tensor: Tensor) -> None:
    """Save nothing in the place of a tensor."""


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("the graph of a rollout's pass has no backward pass")
