"""Compares `hpsv2` with the package of its authors: ``python -m benchmarks.original_rewards``.

The authors' class, with random weights at a small size, is saved as the published file is; the reward loads it. Both
score the same images and prompts, with the real vocabulary. It needs packages that this project does not install:

    pip install hpsv2 open_clip_torch
"""

import gzip
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.rewards.clip import hpsv2

SIZES = ((512, 512), (224, 224), (384, 640), (301, 200), (64, 64))
PROMPTS = ("a photo of a cat", "Two DOGS, one on the other!", "naïve café " * 30, "")
VISION = {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}


def main() -> None:
    """Print the largest difference of the scores of each size of images."""
    sys.modules["hpsv2.src.open_clip.tokenizer"] = open_clip.tokenizer  # of which it is a copy, without the vocabulary
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    torch.manual_seed(0)
    original = CLIP(64, VISION, TEXT).eval()
    preprocess = image_transform(224, is_train=False, resize_longest_max=True)
    tokenize = open_clip.get_tokenizer("ViT-H-14")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights = Path(folder, "HPS.pt")
        torch.save({"epoch": 1, "state_dict": original.state_dict()}, weights)
        save_architecture(Path(folder))
        reward = hpsv2(folder, str(weights), device="cpu")
        for size in SIZES:
            images = torch.randint(0, 256, (len(PROMPTS), 3, *size), dtype=torch.uint8)
            pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
            expected = (
                original.encode_image(pixels, normalize=True)
                * original.encode_text(tokenize(list(PROMPTS)), normalize=True)
            ).sum(-1)
            batch = RewardBatch(images, list(PROMPTS), [{}] * len(PROMPTS), torch.arange(len(PROMPTS)))
            difference = (reward(batch).values - expected).abs().max()
            print(f"{size[0]} x {size[1]}: {expected.min():.3f} to {expected.max():.3f}, differs by {difference:.1e}")


def save_architecture(folder: Path) -> None:
    """Save what the reward takes from a folder in the format of transformers: config, tokenizer, processor."""
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    CLIPConfig(
        text_config={**shared, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2},
        vision_config={**shared, "hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 2}
        | {"patch_size": 14},
        projection_dim=64,
    ).save_pretrained(folder)
    file = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    vocabulary = open_clip.tokenizer.SimpleTokenizer().encoder
    # Of two bytes or a word's end each: 2 x 256 characters, the merges in their order, two special tokens.
    merges = [tuple(line.split()) for line in lines[1 : len(vocabulary) - 2 * 256 - 2 + 1]]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in vocabulary.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    CLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
