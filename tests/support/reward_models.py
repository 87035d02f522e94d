"""Tiny random networks of the rewards' architectures, saved as the hub has the real ones, and images to score."""

import json
import math
from pathlib import Path

import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Qwen2Tokenizer,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SMALL = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_folder(folder: Path, **processing) -> str:
    """A CLIP for images of 56 px with PickScore's scale of 100; `processing` configures the image processor."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    start, end = len(tokens) - 2, len(tokens) - 1
    config = CLIPConfig(
        text_config={
            **SMALL,
            "hidden_size": 32,
            "vocab_size": len(tokens),
            "max_position_embeddings": 77,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**SMALL, "hidden_size": 32, "image_size": 56, "patch_size": 14},
        projection_dim=24,
    )
    model = seeded(CLIPModel(config), gain=0.6)
    model.logit_scale.data.fill_(math.log(100))
    processing = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}} | processing
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=CLIPImageProcessorPil(**processing), tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def seeded(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """The module with seeded weights, large enough that different inputs give different outputs."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        deviation = gain * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(float("norm" in name and "weight" in name), deviation, generator=generator)
    return module.eval()


def linear_head(width: int) -> dict[str, torch.Tensor]:
    """The weights of an aesthetic or ImageReward head, under their published names."""
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = nn.ModuleDict({str(i): nn.Linear(*size) for i, size in sizes.items()})
    return {f"layers.{name}": weight for name, weight in seeded(layers).state_dict().items()}


def bert_tokenizer_folder(folder: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "red", "cat", "dog"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"##{letter}" for letter in words[5:31])])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def dinov2_folder(folder: Path) -> str:
    """A DINOv2 for images of 56 px, with the settings of the published image processor at a smaller size."""
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70))
    seeded(model).save_pretrained(folder)
    processing = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    write_json(folder / "preprocessor_config.json", processing)
    return str(folder)


def qwen2_vl_folder(folder: Path) -> str:
    """The configuration, as the hub has it, and the tokenizer of a Qwen2-VL."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "re", "Ġt"])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[("r", "e"), ("Ġ", "t")])
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "qwen2_vl",
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "vocab_size": len(tokenizer) + 20,  # the published one has more rows than tokens too
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
    }
    write_json(folder / "config.json", config)
    return str(folder)


def sample_images(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Six images uint8 (6, 3, height, width): two of noise, two smooth, one black, one grey."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    coarse = torch.randint(0, 256, (2, 3, 5, 5), generator=generator).float()
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").round().clamp(0, 255).byte()
    plain = torch.tensor([0, 128], dtype=torch.uint8)[:, None, None, None].expand(2, 3, height, width)
    return torch.cat([noise, smooth, plain])


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def mask2former_folder(folder: Path, classes: int = 80) -> str:
    """A Mask2Former that finds objects of several classes, sizes and scores on any image."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=40,
        num_labels=classes,
    )
    model = seeded(Mask2FormerForUniversalSegmentation(config))
    decoder = model.model.transformer_module.decoder
    for weight, factor in {
        model.model.transformer_module.queries_features.weight: 10,
        model.class_predictor.weight: 12,
        decoder.mask_predictor.mask_embedder.layers[2].layers[0].weight: 60,
    }.items():
        weight.data *= factor
    project = model.model.pixel_level_module.decoder.mask_projection
    features: list[torch.Tensor] = []
    handle = project.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad():
        model(pixel_values=(sample_images(64, 64) - 115) / 58)
    handle.remove()
    project.bias.data -= features[0].mean((0, 2, 3))  # around 0, so that masks are parts of the image
    model.save_pretrained(folder)
    return str(folder)
