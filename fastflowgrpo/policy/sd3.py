"""Stable Diffusion 3 and 3.5."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from fastflowgrpo.config import ConfigError, PolicyConfig


class SD3Policy:
    """The transformer of a `StableDiffusion3Pipeline`, under LoRA or in full; the rest of the pipeline is frozen."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, config: PolicyConfig):
        self.pipeline, self.config = pipeline, config
        self.dtype, self.device = pipeline.transformer.dtype, pipeline.device
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        pipeline.vae.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPUs and GPUs
        with_t5 = pipeline.text_encoder_3 is not None
        self.sequence_length = config.max_sequence_length
        if self.sequence_length is None:
            self.sequence_length = 256 if with_t5 else 0
        self.module = pipeline.transformer
        self._reference_module = None
        if config.lora_rank:
            self._add_adapter()
        else:
            self._reference_module = deepcopy(self.module)
            self.module.requires_grad_(True)
        cast_training_params(self.module, dtype=torch.float32)
        self.transformer = self.module

    def _add_adapter(self) -> None:
        config = self.config
        linears = [name for name, module in self.module.named_modules() if isinstance(module, nn.Linear)]
        for target in config.lora_targets:
            if not any(name == target or name.endswith("." + target) for name in linears):
                known = ", ".join(sorted({name.split(".", 2)[-1] for name in linears}))
                raise ConfigError(f"policy.lora_targets: no linear layer is called {target}; there are: {known}")
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=config.lora_targets,
        )
        self.module.add_adapter(adapter)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        multiple = factor * self.pipeline.patch_size
        for name, size in (("height", height), ("width", width)):
            if size is not None and (size <= 0 or size % multiple):
                raise ConfigError(
                    f"rollout.{name} {size} is not a positive multiple of {multiple}, as this model needs"
                )
        default = self.pipeline.default_sample_size
        return (
            self.module.config.in_channels,
            default if height is None else height // factor,
            default if width is None else width // factor,
        )

    def sigmas(self, num_steps: int) -> Tensor:
        scheduler = deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.cpu()

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        # Weights trained in full are float32; autocast gives them the compute dtype, in rollout and update alike.
        full = self._reference_module is not None and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=full):
            velocity = self.transformer(
                hidden_states=latents,
                timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
                return_dict=False,
                **conditioning,
            )[0]
        return velocity.to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        images = []
        for part in latents.split(self.config.decode_batch_size):
            decoded = vae.decode(part / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
            images.append((decoded.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(images)

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
            metadata = self.module.peft_config["default"].to_dict()  # carries lora_alpha
            metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order changes by process
            self.pipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(self.module),
                transformer_lora_adapter_metadata=metadata,
            )
        else:
            self.module.save_pretrained(folder / "transformer")
