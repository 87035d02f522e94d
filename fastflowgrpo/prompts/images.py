"""Source images of prompts: reading them, and pairs of an image and a text in a folder."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fastflowgrpo.errors import UserError, did_you_mean
from fastflowgrpo.prompts.prompt import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Source = TypeVar("Source", bound=Path | bytes)


def read_image(image: Path | bytes, height: int, width: int) -> torch.Tensor:
    """Read a source image, scaled to cover a size and cut to it around its centre.

    Args:
        image: a file, or a file's contents.
        height, width: in pixels.

    Returns:
        uint8 (3, height, width) on the CPU.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            pixels = np.array(ImageOps.fit(opened.convert("RGB"), (width, height), Image.Resampling.LANCZOS))
    except (OSError, SyntaxError) as error:  # Pillow raises the second for some broken files
        raise UserError(f"source image {'' if isinstance(image, bytes) else image}: cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def source_images(prompts: Sequence[Prompt], height: int, width: int) -> list[torch.Tensor]:
    """Read the source images of prompts, each as `read_image` does.

    Returns:
        One for each prompt; empty for prompts of text-to-image.
    """
    return [read_image(prompt.image, height, width) for prompt in prompts if prompt.image is not None]


def image_key(image: Path | bytes) -> str:
    """Return what tells an image from others without reading a file: its path, size and time of change."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    status = image.stat()
    return f"{image.resolve()} {status.st_size} {status.st_mtime_ns}"


def check_image(image: Source) -> Source:
    """Return an image file, or a file's contents, of which only the header is read.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    if isinstance(image, Path) and not image.is_file():
        raise ValueError(f"no such file {image}{did_you_mean(image.name, (p.name for p in image.parent.glob('*')))}")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image):
            return image
    except (UnidentifiedImageError, OSError):
        name = f"a cell of {len(image)} bytes" if isinstance(image, bytes) else image
        raise ValueError(f"{name} is not an image that Pillow can read") from None


def load_pairs(folder: Path) -> list[Prompt]:
    """Read a folder of pairs: each image NAME.png (or jpg, jpeg, webp) has its instruction in NAME.txt.

    Raises:
        ValueError: an image has no text or a text no image, a text is empty, an image cannot be read, or there is none.
    """
    images: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        if path.stem in images:
            raise ValueError(f"{folder}: {images[path.stem].name} and {path.name} would share {path.stem}.txt")
        images[path.stem] = path
    texts = {path.stem: path for path in folder.glob("*.txt")}
    if alone := sorted(images.keys() ^ texts.keys()):
        known, lacks = (images, "txt") if alone[0] in images else (texts, "png")
        raise ValueError(f"{known[alone[0]]}: there is no {alone[0]}.{lacks} beside it")
    if not images:
        raise ValueError(f"{folder}: there is no pair NAME.png and NAME.txt in it")
    prompts = []
    for stem, path in images.items():
        try:
            text = texts[stem].read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{texts[stem]}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if not text:
            raise ValueError(f"{texts[stem]}: there is no prompt in it")
        prompts.append(Prompt(text, image=check_image(path)))
    return prompts
