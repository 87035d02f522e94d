"""FLUX.1 Kontext, which edits images."""

from typing import Any

import torch
from torch import Tensor

from fastflowgrpo.policy.flux import FluxPolicy
from fastflowgrpo.policy.protocol import Conditioning
from fastflowgrpo.policy.source_images import source_sizes


class FluxKontextPolicy(FluxPolicy):
    """The transformer of a `FluxKontextPipeline`.

    The source's tokens follow those of the sample, with 1 as the first of their coordinates. The pipeline scales a
    source to one of the sizes that Kontext was trained on. Here it gets the size of the result, or
    `policy.source_height` x `policy.source_width`, as in the pipeline with `_auto_resize=False` and a source of that
    size.
    """

    edits_images, max_sources, sources_of_any_size = True, 1, True

    def extra_inputs(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        inputs = super().extra_inputs(latents, sigma, conditioning)
        ((height, width),) = source_sizes(conditioning)
        of_source = self._positions(height // 2, width // 2).clone()
        of_source[:, 0] = 1
        return {**inputs, "img_ids": torch.cat([inputs["img_ids"], of_source])}
