"""FLUX.1 Kontext, which edits images."""

import torch
from torch import Tensor

from fastflowgrpo.policy.flux import FluxPolicy
from fastflowgrpo.policy.latents import pack, unpack
from fastflowgrpo.policy.protocol import Conditioning


class FluxKontextPolicy(FluxPolicy):
    """The transformer of a `FluxKontextPipeline`.

    The source's tokens follow those of the sample, with 1 as the first of their coordinates; the velocities of the
    source's tokens are dropped. The pipeline scales a source to one of the sizes that Kontext was trained on. Here it
    gets the size of the result, as in the pipeline with `_auto_resize=False` and a source of that size.
    """

    edits_images = True

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        tokens, source = pack(latents), pack(conditioning["source"])
        text = {name: tensor for name, tensor in conditioning.items() if name != "source"}
        inputs = self.extra_inputs(latents, sigma, text)
        source_ids = inputs["img_ids"] + inputs["img_ids"].new_tensor([1, 0, 0])
        inputs["img_ids"] = torch.cat([inputs["img_ids"], source_ids])
        velocity = self.transformer(
            hidden_states=torch.cat([tokens, source], 1),
            timestep=(sigma * 1000).to(latents.dtype) / 1000,
            return_dict=False,
            **text,
            **inputs,
        )[0]
        return unpack(velocity[:, : tokens.shape[1]], *latents.shape[-2:])
