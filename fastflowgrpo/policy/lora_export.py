"""A saved LoRA in the layouts of other tools, and added to the weights of its model.

Names come from the tools' code: `comfy/lora.py` and `comfy/utils.py` of ComfyUI; `networks/lora_sd3.py` and
`networks/convert_flux_lora.py` of kohya's sd-scripts; `networks/lora_qwen_image.py`, `networks/lora_wan.py`,
`networks/lora_zimage.py` and `networks/lora_flux_2.py` of kohya's musubi-tuner.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from fastflowgrpo.errors import UserError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


class Factors(NamedTuple):
    """The change of a linear layer's weight is `up @ down`, float32."""

    down: Tensor
    """(rank, inputs)"""
    up: Tensor
    """(outputs, rank), scaled by alpha / rank."""


Lora = Mapping[str, Factors]
"""By the name of the layer in the diffusers transformer."""

Layers = dict[str, tuple[str, ...]]
"""Of the original model, and those of diffusers that each consists of."""
FLUX2_LAYERS: Layers = {
    "img_attn.qkv": QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
FLUX2_SINGLE_LAYERS: Layers = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
FLUX2 = {
    "transformer_blocks": ("double_blocks", FLUX2_LAYERS),
    "single_transformer_blocks": ("single_blocks", FLUX2_SINGLE_LAYERS),
}
Z_IMAGE_LAYERS: Layers = {
    layer: (layer,)
    for layer in (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
}
# family -> blocks in diffusers -> (blocks in the original model, its layers)
ORIGINAL: dict[str, dict[str, tuple[str, Layers]]] = {
    "StableDiffusion3Pipeline": {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.attn.qkv": QKV,
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.attn.qkv": ADDED_QKV,
                "context_block.attn.proj": ("attn.to_add_out",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
            },
        )
    },
    "FluxPipeline": {
        "transformer_blocks": (
            "double_blocks",
            {
                "img_attn.qkv": QKV,
                "img_attn.proj": ("attn.to_out.0",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_attn.qkv": ADDED_QKV,
                "txt_attn.proj": ("attn.to_add_out",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
            },
        ),
        "single_transformer_blocks": ("single_blocks", {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",)}),
    },
    "QwenImagePipeline": {
        "transformer_blocks": (
            "transformer_blocks",
            {
                layer: (layer,)
                for layer in (
                    *QKV,
                    *ADDED_QKV,
                    "attn.to_out.0",
                    "attn.to_add_out",
                    "img_mlp.net.0.proj",
                    "img_mlp.net.2",
                    "txt_mlp.net.0.proj",
                    "txt_mlp.net.2",
                )
            },
        )
    },
    "WanPipeline": {
        "blocks": (
            "blocks",
            {
                **{f"self_attn.{part}": (f"attn1.to_{part}",) for part in "qkv"},
                "self_attn.o": ("attn1.to_out.0",),
                **{f"cross_attn.{part}": (f"attn2.to_{part}",) for part in "qkv"},
                "cross_attn.o": ("attn2.to_out.0",),
                **{f"cross_attn.{part}_img": (f"attn2.add_{part}_proj",) for part in "kv"},
                "ffn.0": ("ffn.net.0.proj",),
                "ffn.2": ("ffn.net.2",),
            },
        )
    },
    "ZImagePipeline": {name: (name, Z_IMAGE_LAYERS) for name in ("layers", "noise_refiner", "context_refiner")},
    "Flux2Pipeline": FLUX2,
    "Flux2KleinPipeline": FLUX2,
}
ORIGINAL["FluxKontextPipeline"] = ORIGINAL["FluxPipeline"]
QWEN_IMAGE = ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")
ORIGINAL |= dict.fromkeys(QWEN_IMAGE, ORIGINAL["QwenImagePipeline"])
ORIGINAL["WanImageToVideoPipeline"] = ORIGINAL["WanPipeline"]


def read_lora(file: Path) -> dict[str, Factors]:
    """Read a file that `save_lora` wrote.

    Raises:
        UserError: it holds other weights than the two factors of linear layers in the transformer.
    """
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
        weights = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  no mapping
    settings = {key.removeprefix("transformer."): value for key, value in config.items()}
    lora = {}
    for key in [key for key in weights if key.startswith("transformer.") and key.endswith(DOWN)]:
        name = key.removeprefix("transformer.").removesuffix(DOWN)
        down, up = weights.pop(key), weights.pop(f"transformer.{name}{UP}")
        alphas, rank = settings["alpha_pattern"], down.shape[0]
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), settings["lora_alpha"])
        lora[name] = Factors(down, up * (alpha / (rank**0.5 if settings["use_rslora"] else rank)))
    if weights:
        raise UserError(f"{file}: {next(iter(weights))} is no LoRA of a linear layer, which is all that is exported")
    return lora


def comfyui(family: str, lora: Lora) -> dict[str, Tensor]:
    """Return the tensors of a file for ComfyUI, which scales by 1 where there is no alpha.

    Args:
        family: name of the diffusers pipeline.
        lora: in diffusers' layout.

    Raises:
        UserError: the layout of the family is not known, or a layer has no place in it.
    """
    layers: Lora
    if family in ("WanPipeline", "WanImageToVideoPipeline", "Flux2Pipeline", "Flux2KleinPipeline"):
        layers, prefix = _original_layers("comfyui", family, lora), "diffusion_model."
    elif family in QWEN_IMAGE:
        layers, prefix = lora, "diffusion_model."
    else:  # ComfyUI maps diffusers' names of these to its own
        _check_family("comfyui", family)
        layers, prefix = lora, "transformer."
    return {
        f"{prefix}{name}{suffix}": factor.contiguous()
        for name, factors in layers.items()
        for suffix, factor in zip((DOWN, UP), factors, strict=True)
    }


def kohya(family: str, lora: Lora) -> dict[str, Tensor]:
    """Return the tensors of a file for sd-scripts (SD3, FLUX.1) or musubi-tuner (the others).

    Args, raises: as for `comfyui`.
    """
    tensors = {}
    for name, (down, up) in _original_layers("kohya", family, lora).items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))  # these tools scale by alpha / rank
    return tensors


@torch.no_grad()
def merge(transformer: nn.Module, lora: Lora) -> None:
    """Add a LoRA to the weights of a diffusers transformer, in place: each sum is rounded once, to the weight's dtype.

    Raises:
        UserError: the transformer has no such layer, or one of another shape.
    """
    weights = dict(transformer.named_parameters())
    for name, (down, up) in lora.items():
        weight, shape = weights.get(f"{name}.weight"), (len(up), down.shape[1])
        if weight is None or weight.shape != shape:
            raise UserError(f"the LoRA fits another model: {type(transformer).__name__} has no {name} of shape {shape}")
        weight.copy_(weight.float() + up @ down)


def _original_layers(form: str, family: str, lora: Lora) -> dict[str, Factors]:
    """A LoRA of the original model's layers, some of which are several of diffusers' in one."""
    _check_family(form, family)
    parts: dict[str, dict[str, Factors]] = {}
    consists_of = {}
    for name, factors in lora.items():
        root, index, layer = [*name.split(".", 2), "", ""][:3]
        blocks, layers = ORIGINAL[family].get(root, ("", {}))
        original = next((original for original, own in layers.items() if layer in own), None)
        if original is None:
            raise UserError(
                f"--format {form} has no place for {name}: of a {family} it takes attention and feed-forward layers"
            )
        target = f"{blocks}.{index}.{original}"
        parts.setdefault(target, {})[layer] = factors
        consists_of[target] = layers[original]
    return {target: _stack(parts[target], own) for target, own in consists_of.items()}


def _stack(parts: Mapping[str, Factors], layers: Iterable[str]) -> Factors:
    """One LoRA of layers that lie above each other in one weight; a layer without a LoRA gets rows of zeros."""
    heights = {layer: 4 if layer == "proj_mlp" else 1 for layer in layers}  # in widths of the model
    trained = [layer for layer in heights if layer in parts]
    width = len(parts[trained[0]].up) // heights[trained[0]]
    rows = [parts[layer].up if layer in parts else torch.zeros(height * width, 0) for layer, height in heights.items()]
    return Factors(torch.cat([parts[layer].down for layer in trained]), torch.block_diag(*rows))


def _check_family(form: str, family: str) -> None:
    if family not in ORIGINAL:
        raise UserError(
            f"--format {form} is made for {', '.join(ORIGINAL)}, not for a {family}: try diffusers or merged"
        )
