"""What sampling, learning and evaluation need of a model."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]
"""Prompt embeddings under the names of the transformer's arguments; every tensor has one row per prompt.

With a source image, it also has what `Policy.encode_source` returns."""


ENCODERS = ("text_encoder", "image_encoder")
"""How the names of a pipeline's components begin that embed texts and source images."""


class Policy(Protocol):
    """A flow-matching model under training. Rollout and update call the same `velocity`."""

    edits_images: bool
    """Whether every prompt has a source image."""
    dtype: torch.dtype
    device: torch.device
    transformer: torch.nn.Module
    """What `velocity` calls; the trainer replaces it by the wrapped one (DDP, FSDP)."""

    def warnings(self, guided: bool) -> list[str]:
        """Return what the user should know before training.

        Args:
            guided: the run samples or evaluates with classifier-free guidance.
        """

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embed prompts, one row each, without gradients; inside `encoding`."""

    def encoding(self) -> AbstractContextManager[None]:
        """Return a context in which the text encoders are where `encode` needs them."""

    def encode_source(self, image: Path | bytes, shape: tuple[int, ...]) -> Conditioning:
        """Encode a source image, without gradients: one row, which is added to the prompt's.

        Args:
            image: as in `read_image`.
            shape: of one latent sample; the image is scaled and cut to the size that it is decoded to.
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
