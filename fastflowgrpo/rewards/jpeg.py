"""JPEG size as a reward (DDPO, arXiv 2305.13301): needs no model, and shows quickly whether training works."""

import io

import torch
from PIL import Image

from fastflowgrpo.rewards.contract import Reward, RewardBatch, Scores


def kilobytes(images: torch.Tensor) -> torch.Tensor:
    """Size of each image of uint8 (B, 3, H, W) as JPEG of quality 95: float32 (B,), in kB of 1000 bytes."""
    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def jpeg_compressibility() -> Reward:
    """Prefers images that compress well: -size / 500, the size in kB at JPEG quality 95."""
    return lambda batch: _score(batch, sign=-1)


def jpeg_incompressibility() -> Reward:
    """Prefers images that compress badly: size / 500, exactly the negative of `jpeg_compressibility` (Flow-GRPO's own
    code leaves out the / 500 here)."""
    return lambda batch: _score(batch, sign=1)


def _score(batch: RewardBatch, sign: int) -> Scores:
    size = kilobytes(batch.images)
    return Scores(sign * size / 500, {"kilobytes": size})
