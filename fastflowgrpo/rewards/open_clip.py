"""CLIP weights in open_clip's layout, under the names of transformers' CLIPModel."""

import re
from collections.abc import Mapping

import torch

# From open_clip's names to those of transformers; the attention's input projection is split besides.
NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def to_transformers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a CLIPModel from those of an open_clip model with a vision transformer.

    Args:
        state: open_clip's state dict.
    """
    weights = {}
    for name, value in state.items():
        if name == "attn_mask":  # a buffer of older versions
            continue
        if name in PROJECTIONS:
            weights[PROJECTIONS[name]] = value.T.contiguous()
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            prefix, _, kind = name.partition("in_proj_")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                weights[f"{prefix}{letter}_proj.{kind}"] = part.contiguous()
        else:
            weights[name] = value
    return weights
