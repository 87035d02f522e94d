"""Files of prompts, with source images of random pixels."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def write_prompts(folder: Path, texts: Sequence[str], height: int, width: int, count: int) -> Path:
    """Write prompts.jsonl with `count` source images of a size for each text, or prompts.txt without images."""
    if not count:
        path = folder / "prompts.txt"
        path.write_text("\n".join(texts))
        return path
    generator, lines = torch.Generator().manual_seed(0), []
    for i, text in enumerate(texts):
        names = [f"{i}_{j}.png" for j in range(count)]
        for name in names:
            pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / name)
        lines.append(json.dumps({"prompt": text, "image": names if count > 1 else names[0]}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path
