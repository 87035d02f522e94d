"""Rewards from CLIP embeddings: CLIPScore, PickScore, HPSv2 and the LAION aesthetic predictor."""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fastflowgrpo.rewards.models import (
    LinearHead,
    choose_device,
    choose_dtype,
    load_strictly,
    pretrained,
    pretrained_model,
    read_weights,
    weights_file,
)
from fastflowgrpo.rewards.open_clip import to_transformers
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


@dataclass(frozen=True)
class PadToSquare:
    """HPSv2's image preprocessing, on the device of the images: the longer edge to `size`, then black to a square.

    Attributes:
        size: edge of the square.
        mean, std: of each channel, for pixels in [0, 1].
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess images uint8 (B, 3, H, W) to float32 (B, 3, size, size)."""
        pixels = images / 255
        scale = self.size / max(pixels.shape[-2:])
        if scale != 1:
            height, width = (round(edge * scale) for edge in pixels.shape[-2:])
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        down, right = (self.size - edge for edge in pixels.shape[-2:])
        pixels = F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


class CLIP:
    """A CLIP model of transformers. Objects with the same model, device and dtype share one copy of the network.

    Args:
        model: hub id or local folder, with the model, the tokenizer and the image processor's configuration.
        device: by default the GPU if there is one.
        dtype: of the networks; embeddings are float32.
        batch_size: images or prompts per forward pass.
        weights: hub_owner/repository/file of weights in open_clip's layout, or a local one, instead of the model's.

    Raises:
        ValueError: the model cannot be loaded, or a setting is wrong.
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        weights: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.batch_size = choose_device(device), batch_size
        self.network, self.tokenizer, preprocess = _load(model, weights, self.device, choose_dtype(dtype))
        self.preprocess: Preprocess | PadToSquare = preprocess
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
def _load(model: str, weights: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Preprocess]:
    """Load a CLIP model, its tokenizer and its image preprocessing."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    processor = pretrained(CLIPProcessor, model)
    try:
        preprocess = Preprocess.of(processor.image_processor)
    except ValueError as error:
        raise ValueError(f"{model!r}: {error}") from None
    if weights is None:
        return pretrained_model(CLIPModel, model, device, dtype), processor.tokenizer, preprocess
    network = CLIPModel(pretrained(CLIPConfig, model))
    state: Any = read_weights(weights_file(weights))  # what was trained with open_clip has more than the weights
    try:
        load_strictly(network, to_transformers(state.get("state_dict", state)))
    except ValueError as error:
        raise ValueError(f"{weights!r} does not fit {model!r}: {error}") from error
    return network.to(device, dtype), processor.tokenizer, preprocess


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
    model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    weights: str | None = "xswu/HPSv2/HPS_v2.1_compressed.pt",
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = 32,
) -> Reward:
    """Make Human Preference Score v2.1 (arXiv 2306.09341): a CLIP ViT-H/14 trained on people's rankings of images.

    The score is cos(text, image), about 0.2 to 0.35. v2.0 is `model: adams-story/HPSv2-hf, weights: null`.

    Args:
        model: hub id or local folder with the architecture, the tokenizer and the processor's means, in the format of
            transformers; without `weights` the network too.
        weights: the published file, in open_clip's layout: a local one, or hub_owner/repository/file.
        device, dtype, batch_size: see `CLIP`.

    Raises:
        ValueError: weights cannot be loaded, or are those of another model.
    """
    clip = CLIP(model, device, dtype, batch_size, weights)
    size = clip.network.config.vision_config.image_size
    clip.preprocess = PadToSquare(size, clip.preprocess.mean, clip.preprocess.std)
    return Similarity(clip, 1.0)


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
        self.head = LinearHead(read_weights(weights_file(weights))).to(self.device)
        width, expected = self.clip.network.config.projection_dim, self.head.layers["0"].in_features
        if width != expected:
            raise ValueError(f"{weights!r} is for embeddings of width {expected}, those of {model!r} have {width}")

    def __call__(self, batch: RewardBatch) -> Scores:
        return Scores(self.head(self.clip.embed_images(batch.images)).cpu())
