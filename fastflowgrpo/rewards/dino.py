"""How like its source a result is, for the sake of what an edit must not change: the DINO score of arXiv 2208.12242."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from fastflowgrpo.errors import UserError
from fastflowgrpo.rewards.clip import Preprocess
from fastflowgrpo.rewards.models import choose_device, choose_dtype, pretrained, pretrained_model
from fastflowgrpo.scoring.contract import RewardBatch, Scores


class Dino:
    """The cosine of the [CLS] features of result and source, by DINOv2 (arXiv 2304.07193): 1 for the same image.

    It asks for no edit: an unchanged image has the highest score. Use it beside a reward for the edit.

    Images are resized whole to the size that the model's processor crops to: its crop of the centre would hide changes
    at the edges.

    Args:
        model: hub id or local folder of a DINOv2, with its image processor.
        device: by default the GPU if there is one.
        dtype: of the network; features are float32.
        batch_size: images per forward pass.

    Raises:
        ValueError: the model cannot be loaded, or a setting is wrong.
        UserError: when called with images that have no sources.
    """

    pointwise = True

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoImageProcessor, Dinov2Model

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.batch_size = choose_device(device), batch_size
        cropped = Preprocess.of(pretrained(AutoImageProcessor, model))
        self.preprocess = replace(cropped, size=cropped.crop or cropped.size, crop=None)
        self.network = pretrained_model(Dinov2Model, model, self.device, choose_dtype(dtype))

    @torch.inference_mode()
    def __call__(self, batch: RewardBatch) -> Scores:
        if batch.sources is None:
            raise UserError("there are no source images: it compares edits with their sources")
        results, sources = self._features(batch.images), self._features(torch.stack(batch.sources))
        return Scores((results * sources).sum(-1).cpu())

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute unit features float32 (B, D) of images uint8 (B, 3, H, W)."""
        parts = []
        for part in images.split(self.batch_size):
            pixels = self.preprocess(part.to(self.device)).to(self.network.dtype)
            parts.append(self.network(pixel_values=pixels).last_hidden_state[:, 0].float())
        return F.normalize(torch.cat(parts), dim=-1)
