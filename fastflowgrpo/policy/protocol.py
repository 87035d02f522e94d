"""What sampling, learning and evaluation need of a model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]
"""Prompt embeddings under the names of the transformer's arguments; every tensor has one row per prompt.

Of an edit, SOURCE is the latents of the source images, (B, N, C, H, W), or (B, 1, C, F, H, W) of a video that begins
with its image. If the text encoder sees the images, the tensors of the empty prompt with the same images are there too,
under names that begin with EMPTY."""
SOURCE, EMPTY = "source", "empty."

ENCODERS = ("text_encoder", "image_encoder")
"""How the names of a pipeline's components begin that embed texts and source images."""


class Policy(Protocol):
    """A flow-matching model under training. Rollout and update call the same `velocity`."""

    edits_images: bool
    """Whether every prompt has a source image."""
    max_sources: int
    """The most source images of a prompt; 0 for a model that makes images from text alone."""
    boundary: float | None
    """The least noise level of the first of two transformers; None for a model with one."""
    dtype: torch.dtype
    device: torch.device
    transformer: torch.nn.Module
    """What `velocity` calls; the trainer replaces it by the wrapped one (DDP, FSDP)."""

    @property
    def uses_lora(self) -> bool:
        """Whether a LoRA is trained, and not the whole transformer."""

    def warnings(self, guided: bool) -> list[str]:
        """Return what the user should know before training.

        Args:
            guided: the run samples or evaluates with classifier-free guidance.
        """

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embed prompts without source images, one row each, without gradients; inside `encoding`.

        A model whose text encoder sees the images embeds none of them: it returns no tensors.
        """

    def example_conditioning(self, batch_size: int) -> Conditioning:
        """Return tensors of the shapes, dtypes and device that `encode` gives for prompts, with arbitrary contents."""

    def example_edit(self, batch_size: int, shape: tuple[int, ...], num_images: int) -> Conditioning:
        """Return tensors like those of `encode_edit`, as `example_conditioning` does."""

    def encoding(self) -> AbstractContextManager[None]:
        """Return a context in which the text encoders are where `encode` needs them."""

    def encode_edit(self, prompt: str, images: Sequence[Path | bytes], shape: tuple[int, ...]) -> Conditioning:
        """Embed a prompt and encode its source images: one row, without gradients; inside `encoding`.

        Args:
            prompt: the instruction.
            images: as in `read_image`.
            shape: of one latent sample; the images are scaled and cut to the size that it is decoded to.
        """

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        """Return the shape of one latent sample.

        Args:
            height, width: in pixels; None for the model's default.
            num_frames: of a video; None for the model's default, and for images.

        Raises:
            UserError: the model cannot make this size.
        """

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """Return the noise schedule of the model's own pipeline: (num_steps + 1,), float32 on the CPU, ending with 0.

        Args:
            num_steps: sampling steps.
            shape: of one latent sample.
        """

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict v = x_1 - x_0 with the shape of `latents`, in the policy's dtype.

        Args:
            latents: (B, ...).
            sigma: (B,), float32.
            conditioning: one row per sample.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents to images, uint8 (B, 3, H, W), or videos, uint8 (B, F, 3, H, W), without gradients."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters, all float32."""

    def train_only_at(self, sigmas: Tensor) -> None:
        """Freeze the trained weights that are not used at any of the noise levels, (N,) on the CPU."""

    def reference(self) -> AbstractContextManager[None]:
        """Return a context in which `velocity` is that of the model as it was loaded."""

    def save(self, folder: Path) -> None:
        """Write the trained weights so that the family's diffusers pipeline loads them."""

    def load(self, folder: Path) -> None:
        """Replace the trained weights with those that `save` of the same model wrote.

        Raises:
            UserError: the folder does not hold such weights.
        """

    def encoder_key(self) -> str:
        """Return a hash of everything that `encode` depends on besides the prompt."""

    def drop_encoders(self) -> None:
        """Free the memory of the text encoders; `encode` cannot be called any more."""
