"""The tiny pipeline of each family: what it is asked for in the tests, and the images of its own call."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage,
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from support.edit_prompts import write_prompts
from support.pipelines import (
    EulerOnUniPCsSigmas,
    perturb,
    tiny_flux2_klein_pipeline,
    tiny_flux2_pipeline,
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_edit_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_experts_pipeline,
    tiny_wan_image_to_video_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy import FAMILIES
from fastflowgrpo.policy.guidance import GuidanceScale
from fastflowgrpo.policy.latents import pack
from fastflowgrpo.policy.packed import PackedPolicy
from fastflowgrpo.policy.weights import LORA_2
from fastflowgrpo.prompts import Prompt

TEXTS = ["a cat", "two dogs on a hill", "snow"]
IMAGE, VIDEO = {"height": 16, "width": 24}, {"height": 16, "width": 32, "num_frames": 5}


@dataclass(frozen=True)
class Family:
    """A tiny pipeline, and what it is asked for."""

    build: Callable[[], DiffusionPipeline]
    size: dict[str, int] = field(default_factory=lambda: IMAGE)
    """Height, width and number of frames, as in `RolloutConfig`."""
    sources: int = 0
    """Source images of a prompt."""
    length: int | None = 12
    """Text tokens; None for the default."""

    def save(self, folder: Path, texts: Sequence[str] = TEXTS) -> None:
        """Save the pipeline in a folder, with prompts and their source images beside its files."""
        pipe = self.build()
        if self.sources and "num_frames" not in self.size:
            perturb(pipe.transformer.parameters(), scale=0.2)  # to see what the sources change
        pipe.save_pretrained(folder)
        write_prompts(folder, texts, self.size["height"], self.size["width"], self.sources)

    def prompts(self, folder: Path) -> Path:
        """The file of prompts that `save` wrote."""
        return folder / ("prompts.jsonl" if self.sources else "prompts.txt")


_image_to_video = tiny_wan_image_to_video_pipeline
GENERATING = {
    "sd35": Family(partial(tiny_sd3_pipeline, qk_norm="rms_norm", dual_attention_layers=(0,))),
    "sd35_large": Family(partial(tiny_sd3_pipeline, qk_norm="rms_norm")),
    "flux": Family(tiny_flux_pipeline),
    "qwen": Family(tiny_qwen_image_pipeline),
    "wan": Family(tiny_wan_pipeline, VIDEO),
    "wan22": Family(partial(tiny_wan_pipeline, high_compression=True), VIDEO),
    "experts": Family(tiny_wan_experts_pipeline, VIDEO),
    "i2v": Family(partial(_image_to_video, "wan21"), VIDEO, sources=1, length=None),
    "i2v_experts": Family(partial(_image_to_video, "experts"), VIDEO, sources=1),
    "i2v_wan22": Family(partial(_image_to_video, "wan22_5b"), VIDEO, sources=1),
    "zimage": Family(tiny_z_image_pipeline),
    "klein": Family(tiny_flux2_klein_pipeline),
    "flux2": Family(tiny_flux2_pipeline),
}
"""Families that make images and videos."""
EDITING = {
    "kontext": Family(tiny_flux_kontext_pipeline, sources=1, length=40),
    "edit": Family(tiny_qwen_image_edit_pipeline, {"height": 32, "width": 64}, sources=1, length=40),
    "plus": Family(
        partial(tiny_qwen_image_edit_plus_pipeline, zero_cond_t=True),
        {"height": 32, "width": 64},
        sources=2,
        length=40,
    ),
    # FLUX.2's pipelines take no smaller images
    "klein_edit": Family(tiny_flux2_klein_pipeline, {"height": 64, "width": 64}, sources=2, length=40),
    "flux2_edit": Family(tiny_flux2_pipeline, {"height": 64, "width": 96}, sources=1, length=40),
}
"""Families that edit images."""


def pipeline_images(
    pipe: DiffusionPipeline,
    family: Family,
    noise: Tensor,
    prompts: Sequence[Prompt],
    num_steps: int,
    guidance: GuidanceScale,
    source_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Images of the unmodified pipeline's call, or videos, (B, ..., H, W, 3) from 0 to 255.

    Args:
        noise: (B, ...), as of the policy.
        prompts: one for each.
        source_size: height and width of the source images; None for those of the result.
    """
    first, *second = guidance if isinstance(guidance, tuple) else (guidance,)
    pipe.set_progress_bar_config(disable=True)
    kind = FAMILIES[type(pipe).__name__]
    arguments = kind.guidance_arguments(PolicyConfig(), first)
    if second:
        arguments["guidance_scale_2"] = second[0]
    arguments |= {"num_inference_steps": num_steps, "output_type": "np", **family.size}
    if kind.makes_videos:
        pipe.scheduler = EulerOnUniPCsSigmas(shift=3.0)
    if family.length is not None:
        arguments["max_sequence_length"] = family.length
    if type(pipe).__name__ == "FluxKontextPipeline":
        arguments |= {"max_area": family.size["height"] * family.size["width"], "_auto_resize": False}
    made, at_once = [], 1 if family.sources else len(noise)  # images are given for one prompt at a time
    with _without_differences(math.prod(source_size or (family.size["height"], family.size["width"]))):
        for i in range(0, len(noise), at_once):
            texts, latents = [prompt.text for prompt in prompts[i : i + at_once]], noise[i : i + at_once]
            if "negative_prompt" in arguments:
                arguments["negative_prompt"] = [""] * len(texts)
            if family.sources:
                images = [Image.open(image) for image in prompts[i].images]
                arguments["image"] = images if len(images) > 1 else images[0]
            latents = pack(latents) if issubclass(kind, PackedPolicy) else latents
            output = pipe(prompt=texts, latents=latents, **arguments)
            made.append(output.frames if kind.makes_videos else output.images)
    return 255 * np.concatenate(made)


def load_loras(pipe: DiffusionPipeline, folder: Path) -> None:
    """Load what a run saved into a pipeline, as the model card says."""
    pipe.load_lora_weights(folder)
    if (folder / LORA_2).is_file():
        pipe.load_lora_weights(folder, weight_name=LORA_2, load_into_transformer_2=True)


class TorchWithoutNorms:
    """torch, where every norm is 1."""

    def __getattr__(self, name: str) -> Any:
        return (lambda tensor, **_: torch.ones(())) if name == "norm" else getattr(torch, name)


@contextmanager
def _without_differences(area: int) -> Iterator[None]:
    """The pipelines without what the policies leave out: Qwen's rescaling of a guided prediction, and its size of a
    source, a megapixel. And without ftfy, which Wan's image to video asks to correct texts: these are correct."""
    editing = pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
    resize = pipeline_qwenimage_edit.calculate_dimensions
    changes = (
        *((module, "torch", TorchWithoutNorms()) for module in (pipeline_qwenimage, *editing)),
        (pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: resize(area, ratio)),
        (pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", area),
        (pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text)),
    )
    with ExitStack() as stack:
        for place, name, value in changes:
            stack.enter_context(patch.object(place, name, value, create=True))
        yield


def assert_same_images(images: Tensor, expected: np.ndarray) -> None:
    """Assert that images (B, ..., 3, H, W) are a pipeline's, (B, ..., H, W, 3), up to a rounding step of uint8."""
    assert images.dtype == torch.uint8
    images = images.movedim(-3, -1).numpy().astype(int)
    assert images.shape == expected.shape
    assert images.std() > 5
    assert np.abs(images - np.rint(expected)).max() <= 1
