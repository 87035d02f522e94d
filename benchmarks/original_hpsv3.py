"""Compares `hpsv3` with the package of its authors, which needs transformers 4.45 and so an environment of its own:

    python -m venv old && old/bin/pip install torch numpy pillow requests packaging tensorboard transformers==4.45.2
    old/bin/pip install --no-deps hpsv3==1.0.0
    old/bin/python -m benchmarks.original_hpsv3 write FOLDER    # random weights at a small size, images and scores
    python -m benchmarks.original_hpsv3 compare FOLDER          # in the environment of this project

The authors' classes tokenise, preprocess and score. Packages that they import only for training (trl, peft, datasets,
deepspeed and others) are replaced by empty classes.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

SIZES = ((512, 512), (448, 448), (384, 640), (301, 200), (1024, 1024))
PROMPTS = ("a photo of a cat", "Two DOGS, one on the other! {x}", "naïve café\n" * 30, "")
TRAINING_ONLY = (
    *("trl", "peft", "datasets", "pandas", "fire", "omegaconf", "matplotlib", "matplotlib.pyplot"),
    *("matplotlib.patches", "torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Qwen2-VL's, without videos.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Unused(types.ModuleType):
    """A package that is imported and not used: each of its names is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def write(folder: Path) -> None:
    """Save random weights, as published, the folder of the base model, images, and the authors' scores."""
    from PIL import Image

    processor = save_processor(folder)
    for name in TRAINING_ONLY:
        sys.modules[name] = Unused(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    from hpsv3.inference import HPSv3RewardInferencer
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
    from transformers import Qwen2VLConfig

    torch.manual_seed(0)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    token = processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
    model = Qwen2VLRewardModelBT(
        Qwen2VLConfig.from_pretrained(folder), output_dim=2, special_token_ids=[token], rm_head_type="ranknet"
    )
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # large enough that different inputs give different scores
            parameter.data.normal_(0, (0.5 if "attn" in name else 1) * parameter[0].numel() ** -0.5)
    torch.save(model.state_dict(), folder / "HPSv3.pt")

    inferencer = HPSv3RewardInferencer.__new__(HPSv3RewardInferencer)  # its constructor loads the published weights
    inferencer.model, inferencer.processor = model.eval(), processor
    inferencer.device, inferencer.use_special_tokens = "cpu", True
    cases = []
    for size in SIZES:
        images = torch.randint(0, 256, (len(PROMPTS), 3, 4, 4), dtype=torch.uint8).float()
        images = torch.nn.functional.interpolate(images, size, mode="bicubic").clamp(0, 255).byte()
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        with torch.no_grad():
            cases.append((images, inferencer.reward(pictures, list(PROMPTS))))
    torch.save(cases, folder / "cases.pt")


def save_processor(folder: Path) -> Any:
    """Save configuration, tokenizer and processor of a small Qwen2-VL; returns the processor of transformers 4.45."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoProcessor, Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "re", "se", "Ġt"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\ns e\nĠ t\n")
    tokenizer = Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    Qwen2VLConfig(
        **ids,
        vocab_size=len(tokenizer) + 40,  # Qwen2-VL's has more rows than tokens
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
    ).save_pretrained(folder)
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder, padding_side="right")


def compare(folder: Path) -> None:
    """Print the largest difference of the scores of each size of images."""
    from fastflowgrpo.rewards import RewardBatch
    from fastflowgrpo.rewards.hpsv3 import HPSv3

    reward = HPSv3(str(folder), str(folder / "HPSv3.pt"), device="cpu", dtype="float32")
    for images, expected in torch.load(folder / "cases.pt"):
        batch = RewardBatch(images, list(PROMPTS), [{}] * len(PROMPTS), torch.arange(len(PROMPTS)))
        scores = reward(batch)
        mean, sigma = expected[:, 0], expected[:, 1].exp()
        print(
            f"{images.shape[-2]} x {images.shape[-1]}: {mean.min():.3f} to {mean.max():.3f}, differs by "
            f"{(scores.values - mean).abs().max():.1e}, sigma by {(scores.details['sigma'] - sigma).abs().max():.1e}"
        )


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
