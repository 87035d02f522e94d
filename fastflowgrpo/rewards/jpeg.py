"""JPEG size as a reward (DDPO, arXiv 2305.13301): needs no model, and shows quickly whether training works."""

import io
from dataclasses import dataclass

import torch
from PIL import Image

from fastflowgrpo.scoring.contract import Reward, RewardBatch, Scores


def kilobytes(images: torch.Tensor) -> torch.Tensor:
    """Size of each image of uint8 (B, 3, H, W) as JPEG of quality 95: float32 (B,), in kB of 1000 bytes."""
    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


@dataclass(frozen=True)
class JPEGSize:
    """The reward factor * size in kB."""

    factor: float
    pointwise = True

    def __call__(self, batch: RewardBatch) -> Scores:
        size = kilobytes(batch.images)
        return Scores(self.factor * size, {"kilobytes": size})


def jpeg_compressibility() -> Reward:
    """Prefers images that compress well: -size / 500, the size in kB at JPEG quality 95."""
    return JPEGSize(-1 / 500)


def jpeg_incompressibility() -> Reward:
    """Prefers images that compress badly: size / 500, exactly the negative of `jpeg_compressibility` (Flow-GRPO's own
    code leaves out the / 500 here)."""
    return JPEGSize(1 / 500)
