"""ImageReward (arXiv 2304.05977): BLIP encodes the prompt with attention to the image, and a linear head scores it."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from fastflowgrpo.rewards.clip import Preprocess
from fastflowgrpo.rewards.models import (
    LinearHead,
    below,
    choose_device,
    choose_dtype,
    load_strictly,
    model_file,
    pretrained,
    read_weights,
)
from fastflowgrpo.scoring.contract import RewardBatch, Scores

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # the head's output over the training set
MAX_TOKENS = 35
HEAD_WIDTH = 64  # width of an attention head of the vision transformer

# From the published names of the vision transformer's weights to those of BlipVisionModel.
VISION_NAMES = (
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageReward:
    """ImageReward v1.0: its published weights, loaded into the BLIP modules of transformers.

    The score is standardised over the training set, so about -2 to 2; higher is better. A prompt is truncated to
    MAX_TOKENS tokens.

    Args:
        model: hub id or local folder with ImageReward.pt and med_config.json.
        tokenizer: hub id or local folder of BERT's tokenizer.
        device: by default the GPU if there is one.
        dtype: of the networks; the head computes in float32.
        batch_size: images per forward pass.

    Raises:
        ValueError: weights cannot be loaded, or a setting is wrong.
    """

    pointwise = True

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoTokenizer

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device, self.dtype, self.batch_size = choose_device(device), choose_dtype(dtype), batch_size
        state = read_weights(model_file(model, "ImageReward.pt"))
        config_file = model_file(model, "med_config.json")
        try:
            text_config = json.loads(config_file.read_text(encoding="utf-8"))
            self.vision = _vision(below(state, "blip.visual_encoder."))
            self.text = _text(below(state, "blip.text_encoder."), text_config, self.vision.config.hidden_size)
            self.head = LinearHead(below(state, "mlp.")).to(self.device)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{model!r} does not hold ImageReward's weights: {error}") from error
        for network in (self.vision, self.text):
            network.to(self.device, self.dtype)
        self.tokenizer = pretrained(AutoTokenizer, tokenizer)
        side = self.vision.config.image_size
        self.preprocess = Preprocess(side, (side, side))

    @torch.inference_mode()
    def __call__(self, batch: RewardBatch) -> Scores:
        scores = []
        for start in range(0, len(batch.prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = self.preprocess(batch.images[part].to(self.device)).to(self.dtype)
            tokens = self.tokenizer(
                batch.prompts[part], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self.device)
            features = self.text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            ).last_hidden_state[:, 0]
            scores.append((self.head(features.float()) - MEAN) / STD)
        return Scores(torch.cat(scores).cpu())


def _vision(state: dict[str, torch.Tensor]) -> Any:
    """Make the vision transformer; its sizes follow from its weights."""
    from transformers import BlipVisionConfig, BlipVisionModel

    patch, positions, width = state["patch_embed.proj.weight"].shape[-1], *state["pos_embed"].shape[1:]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    for pattern, name in VISION_NAMES:
        state = {re.sub(pattern, name, key): weight for key, weight in state.items()}
    load_strictly(model, state)
    return model


def _text(state: dict[str, torch.Tensor], published: Mapping[str, Any], vision_width: int) -> Any:
    """Make the text encoder with cross-attention to the image; `published` is the published BERT configuration."""
    from transformers import BlipTextConfig, BlipTextModel

    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
    )
    config = BlipTextConfig(**{name: published[name] for name in names}, encoder_hidden_size=vision_width)
    model = BlipTextModel(config, add_pooling_layer=False)
    load_strictly(model, {name: weight for name, weight in state.items() if name != "embeddings.position_ids"})
    return model
