"""Qwen-Image-Edit, and -Plus, which takes several images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from fastflowgrpo.policy.protocol import EMPTY, Conditioning
from fastflowgrpo.policy.qwen_image import QwenImagePolicy
from fastflowgrpo.policy.source_images import SEVERAL
from fastflowgrpo.prompts.images import read_image

PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}  # of an image for the text encoder, by the published processors


class QwenImageEditPolicy(QwenImagePolicy):
    """The transformer of a `QwenImageEditPipeline`.

    The source's tokens follow those of the sample. The text encoder sees the source too, so that the empty prompt has
    an embedding per source; `policy.max_sequence_length` counts the other tokens. The pipeline scales a source to a
    megapixel in its own aspect ratio. Here it gets the size of the result or `policy.source_height` x
    `policy.source_width`, for the text encoder too.
    """

    edits_images, max_sources, sources_of_any_size = True, 1, True

    def encode(self, prompts: list[str]) -> Conditioning:
        return {}

    @torch.no_grad()
    def encode_edit(self, prompt: str, images: Sequence[Path | bytes], shape: tuple[int, ...]) -> Conditioning:
        height, width = self.seen_size(shape)
        size = self.image_size(self.source_shape(shape))
        pixels = [read_image(image, *size).permute(1, 2, 0).numpy() for image in images]
        seen = [self.pipeline.image_processor.resize(Image.fromarray(image), height, width) for image in pixels]
        length = self.embedding_length(shape, len(images))
        encoded = (self.pipeline.encode_prompt(text, image=seen) for text in (prompt, ""))
        text, empty = (self.padded(embeds, mask, length) for embeds, mask in encoded)
        return {**super().encode_edit(prompt, images, shape), **text, **_as_empty(empty)}

    def example_edit(self, batch_size: int, shape: tuple[int, ...], num_images: int) -> Conditioning:
        text = self.example_embeddings(batch_size, self.embedding_length(shape, num_images))
        return {**super().example_edit(batch_size, shape, num_images), **text, **_as_empty(text)}

    def seen_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return (height, width) in pixels of a source as the text encoder sees it, for a latent sample of a shape."""
        return self.image_size(self.source_shape(shape))

    def embedding_length(self, shape: tuple[int, ...], num_images: int) -> int:
        """Return the tokens of an embedding: those of the images and `policy.max_sequence_length` others."""
        vision = self.pipeline.text_encoder.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        height, width = smart_resize(*self.seen_size(shape), factor=side, **PIXELS)
        return num_images * (height // side) * (width // side) + self.sequence_length


class QwenImageEditPlusPolicy(QwenImageEditPolicy):
    """The transformer of a `QwenImageEditPlusPipeline`, whose text encoder sees the sources in a smaller size."""

    max_sources = SEVERAL

    def seen_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        height, width = super().seen_size(shape)
        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, width / height)
        return height, width


def _as_empty(embedding: Conditioning) -> dict[str, Tensor]:
    return {EMPTY + name: tensor for name, tensor in embedding.items()}
