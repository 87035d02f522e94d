"""Rewards from CLIP embeddings: CLIPScore, PickScore, HPSv2 and the LAION aesthetic predictor."""

import functools
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fastflowgrpo.rewards.models import (
    LinearHead,
    choose_device,
    choose_dtype,
    model_file,
    pretrained,
    pretrained_model,
    read_weights,
)
from fastflowgrpo.scoring.contract import Reward, RewardBatch, Scores

CLIP_L = "openai/clip-vit-large-patch14"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"  # TRL's copy of the published file
MAX_CACHED_TEXTS = 4096  # embeddings that are kept; at a width of 1024 they take 16 MB


@dataclass(frozen=True)
class Preprocess:
    """CLIP's image preprocessing, on the device of the images: resize with antialiasing, crop the centre, normalise.

    Attributes:
        size: length of the shorter edge after resizing, or (height, width).
        crop: (height, width) of the centre crop, at most the size of the resized image; None for no crop.
        mean, std: of each channel, for pixels in [0, 1].
        mode: "bicubic" or "bilinear".
    """

    size: int | tuple[int, int] = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    mode: str = "bicubic"

    @classmethod
    def of(cls, processor: Any) -> "Preprocess":
        """Take the settings of a CLIP image processor of transformers; ValueError if it does anything else."""
        config = processor.to_dict()
        modes = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
        size, crop = dict(config["size"]), None
        side = size.get("shortest_edge")
        if config["do_center_crop"]:
            crop = config["crop_size"]["height"], config["crop_size"]["width"]
        fits = crop is None or all(c <= (side or size[key]) for c, key in zip(crop, ("height", "width"), strict=True))
        if not (config["do_resize"] and config["do_normalize"] and config["resample"] in modes and fits):
            raise ValueError("its image processor does not resize, crop and normalise as CLIP's does")
        return cls(
            side or (size["height"], size["width"]),
            crop,
            tuple(config["image_mean"]),
            tuple(config["image_std"]),
            modes[config["resample"]],
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess images uint8 (B, 3, H, W) to float32 (B, 3, h, w)."""
        height, width = images.shape[-2:]
        short = min(height, width)
        if isinstance(self.size, int):
            size = (int(self.size * height / short), int(self.size * width / short))
        else:
            size = self.size
        pixels = images.float()
        for step in ((height, size[1]), size):  # like PIL: first the width, rounded to bytes, then the height
            if pixels.shape[-2:] != step:
                pixels = F.interpolate(pixels, step, mode=self.mode, antialias=True).round().clamp(0, 255)
        if self.crop is not None:
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std


class CLIP:
    """A CLIP model of transformers. Objects with the same model, device and dtype share one copy of the network.

    Args:
        model: hub id or local folder, with the model, the tokenizer and the image processor's configuration.
        device: by default the GPU if there is one.
        dtype: of the networks; embeddings are float32.
        batch_size: images or prompts per forward pass.

    Raises:
        ValueError: the model cannot be loaded, or a setting is wrong.
    """

    def __init__(self, model: str, device: str | None = None, dtype: str = "float32", batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.batch_size = choose_device(device), batch_size
        self.network, self.tokenizer, self.preprocess = _load(model, self.device, choose_dtype(dtype))
        self.scale = self.network.logit_scale.float().exp().item()
        self.texts: OrderedDict[str, torch.Tensor] = OrderedDict()  # the last used are at the end

    @torch.inference_mode()
    def embed_images(self, images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed images: uint8 (B, 3, H, W), or B images (3, H, W) of any sizes. Returns unit vectors float32 (B, D)."""
        vision, project = self.network.vision_model, self.network.visual_projection
        embeddings = []
        for part in _parts(images, self.batch_size):
            batches = [part] if isinstance(part, torch.Tensor) else [image[None] for image in part]
            pixels = torch.cat([self.preprocess(batch.to(self.device)) for batch in batches])
            embeddings.append(project(vision(pixel_values=pixels.to(project.weight.dtype)).pooler_output))
        return F.normalize(torch.cat(embeddings).float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts as unit vectors float32 (B, D). A text longer than the model's context (77 tokens) is truncated.

        Each distinct text is computed once; the embeddings of the last MAX_CACHED_TEXTS stay on the device.
        """
        encoder, project = self.network.text_model, self.network.text_projection
        length = self.network.config.text_config.max_position_embeddings
        distinct = dict.fromkeys(texts)
        for part in _parts([text for text in distinct if text not in self.texts], self.batch_size):
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
            embeddings = F.normalize(project(encoder(**tokens.to(self.device)).pooler_output).float(), dim=-1)
            for text, embedding in zip(part, embeddings, strict=True):
                self.texts[text] = embedding.clone()  # a view would keep the whole part alive
        for text in distinct:
            self.texts.move_to_end(text)
        rows = torch.stack([self.texts[text] for text in texts])
        while len(self.texts) > MAX_CACHED_TEXTS:
            self.texts.popitem(last=False)
        return rows


def _parts(items: Any, size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@functools.cache
def _load(model: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Preprocess]:
    """Load a CLIP model, its tokenizer and its image preprocessing."""
    from transformers import CLIPModel, CLIPProcessor

    processor = pretrained(CLIPProcessor, model)
    try:
        preprocess = Preprocess.of(processor.image_processor)
    except ValueError as error:
        raise ValueError(f"{model!r}: {error}") from None
    return pretrained_model(CLIPModel, model, device, dtype), processor.tokenizer, preprocess


@dataclass(frozen=True)
class Similarity:
    """A reward: `factor` times the cosine of the embeddings of text and image."""

    clip: CLIP
    factor: float
    pointwise = True

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def __call__(self, batch: RewardBatch) -> Scores:
        cosine = (self.clip.embed_texts(batch.prompts) * self.clip.embed_images(batch.images)).sum(-1)
        return Scores(self.factor * cosine.cpu())


def clipscore(model: str = CLIP_L, device: str | None = None, dtype: str = "float32", batch_size: int = 32) -> Reward:
    """Make Flow-GRPO's CLIPScore (arXiv 2505.05470): scale * cos(text, image) / 30. The scale is
    CLIP ViT-L/14's logit scale, 100. The score is about 0.5 to 1.2 for photographs and their captions. Settings: see
    `CLIP`.

    Flow-GRPO's code resizes images bilinearly; this reward resizes bicubically, as the model was trained.
    """
    clip = CLIP(model, device, dtype, batch_size)
    return Similarity(clip, clip.scale / 30)


def pickscore(
    model: str = "yuvalkirstain/PickScore_v1", device: str | None = None, dtype: str = "float32", batch_size: int = 32
) -> Reward:
    """Make PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained on people's choices between images.

    The score is scale * cos(text, image), divided by 26 as in Flow-GRPO: about 0.6 to 1. Settings: see `CLIP`.
    """
    clip = CLIP(model, device, dtype, batch_size)
    return Similarity(clip, clip.scale / 26)


def hpsv2(
    model: str = "adams-story/HPSv2-hf", device: str | None = None, dtype: str = "float32", batch_size: int = 32
) -> Reward:
    """Make Human Preference Score v2 (arXiv 2306.09341): a CLIP ViT-H/14 trained on people's rankings of images.

    The score is cos(text, image), about 0.2 to 0.35. The default weights are v2.0, which is published in the format of
    transformers. Settings: see `CLIP`.
    """
    return Similarity(CLIP(model, device, dtype, batch_size), 1.0)


class Aesthetic:
    """LAION's improved aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor).

    A linear head on the unit embedding of CLIP ViT-L/14 predicts ratings from 1 to 10. It does not use the prompt.

    Args:
        weights: of the head: the published file sac+logos+ava1-l14-linearMSE.pth, or hub_owner/repository/file.
        model, device, dtype, batch_size: see `CLIP`.

    Raises:
        ValueError: weights cannot be loaded, or the head is for embeddings of another width.
    """

    pointwise = True

    def __init__(
        self,
        model: str = CLIP_L,
        weights: str = AESTHETIC,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        self.clip = CLIP(model, device, dtype, batch_size)
        self.device = self.clip.device
        path = Path(weights) if os.path.isfile(weights) else model_file(*_hub_file(weights))
        self.head = LinearHead(read_weights(path)).to(self.device)
        width, expected = self.clip.network.config.projection_dim, self.head.layers["0"].in_features
        if width != expected:
            raise ValueError(f"{weights!r} is for embeddings of width {expected}, those of {model!r} have {width}")

    def __call__(self, batch: RewardBatch) -> Scores:
        return Scores(self.head(self.clip.embed_images(batch.images)).cpu())


def _hub_file(weights: str) -> tuple[str, str]:
    """Split hub_owner/repository/file into the repository and the file."""
    parts = weights.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"weights {weights!r}: no such file, and no hub_owner/repository/file")
    return f"{parts[0]}/{parts[1]}", parts[2]
