"""How a request becomes a batch of images: every value is checked, and no image is decoded beyond the limits."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException, UploadFile
from PIL import Image

from fastflowgrpo.config import ServerConfig
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch
from fastflowgrpo.scoring.server.messages import ScoreRequest
from fastflowgrpo.scoring.wire import MEDIA_TYPES

PILLOW_FORMATS = {MEDIA_TYPES["png"]: "PNG", MEDIA_TYPES["jpeg"]: "JPEG"}


def check_prompts(name: str, reward: Any, prompts: Sequence[Prompt]) -> None:
    """Ask a reward whether it can score these prompts.

    Raises:
        HTTPException: it cannot; names the reward and the prompt.
    """
    check = getattr(reward, "check_prompts", None)
    if check is not None:
        try:
            check(prompts)
        except ValueError as error:
            raise HTTPException(422, f"reward {name}: {error}") from error


def read_batch(
    name: str,
    reward: Any,
    request: ScoreRequest,
    files: list[UploadFile],
    source_files: list[UploadFile] | None,
    config: ServerConfig,
) -> RewardBatch:
    """Read the batch of a request for a reward: images uint8 (B, 3, H, W) or videos (B, F, 3, H, W), their sources if
    there are files of them, and groups numbered from 0.

    Raises:
        HTTPException: the request is too large, holds something else than images, its parts do not fit together, or the
            reward takes no videos, or only videos, or cannot score its prompts.
    """
    count, frames = len(request.prompts), request.frames or 1
    if (request.frames is not None) != getattr(reward, "videos", False):
        takes, sent = ("images", "videos: leave out") if request.frames else ("videos", "images: set")
        raise HTTPException(422, f"reward {name} takes {takes}, but gets {sent} videos in the run's settings of it")
    if count * frames > config.max_images:
        raise HTTPException(413, f"{count * frames} images, at most {config.max_images} are taken at once")
    metadata = request.metadata if request.metadata is not None else [{}] * count
    groups = request.group_ids if request.group_ids is not None else list(range(count))
    sizes = {"images": len(files), "metadata": len(metadata), "group_ids": len(groups)}
    for part, number in {**sizes, "sources": len(source_files or ()) or count}.items():
        if number != (count * frames if part == "images" else count):
            videos = f" of {frames} frames each" if request.frames else ""
            raise HTTPException(422, f"{count} prompts{videos}, but {number} {part}")
    check_prompts(name, reward, [Prompt(*pair) for pair in zip(request.prompts, metadata, strict=True)])
    images: list[np.ndarray] = []
    named = [(f"image {i}", file) for i, file in enumerate(files)]
    named += [(f"source {i}", file) for i, file in enumerate(source_files or ())]
    for title, file in named:
        pixels = _read_image(title, file, request.size, config.max_pixels // len(named))
        if pixels.shape != (images or [pixels])[0].shape:
            raise HTTPException(422, f"{title}: another size than image 0")
        images.append(pixels)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    pictures = torch.from_numpy(np.stack(images[: len(files)]))
    return RewardBatch(
        pictures if request.frames is None else pictures.unflatten(0, (count, frames)),
        request.prompts,
        metadata,
        torch.tensor([numbers[group] for group in groups]),
        [torch.from_numpy(pixels.copy()) for pixels in images[len(files) :]] or None,
    )


def _read_image(name: str, file: UploadFile, size: tuple[int, int] | None, max_pixels: int) -> np.ndarray:
    """Read an image as uint8 (3, H, W); `size` is the height and width of raw images."""

    def check_size(height: int, width: int) -> None:
        if height * width > max_pixels:
            raise HTTPException(413, f"{name}: {height} x {width} pixels, at most {max_pixels} each for so many images")

    data = file.file.read()
    if file.content_type == MEDIA_TYPES["raw"]:
        if size is None:
            raise HTTPException(422, f"{name}: raw, but the request has no size")
        check_size(*size)
        if len(data) != 3 * size[0] * size[1]:
            raise HTTPException(422, f"{name}: {len(data)} bytes, but a size of 3 x {size[0]} x {size[1]}")
        return np.frombuffer(data, np.uint8).reshape(3, *size)
    if file.content_type not in PILLOW_FORMATS:
        known = ", ".join(MEDIA_TYPES.values())
        raise HTTPException(415, f"{name}: content type {file.content_type}, known: {known}")
    try:
        # Opening reads only the header, so that the size is checked before a pixel is decoded.
        with Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[file.content_type]]) as image:
            check_size(image.height, image.width)
            if image.mode != "RGB":
                raise HTTPException(422, f"{name}: mode {image.mode}, not 8-bit RGB")
            return np.asarray(image).transpose(2, 0, 1)
    except HTTPException:
        raise
    except Exception as error:  # a broken file can make Pillow raise anything
        raise HTTPException(422, f"{name}: cannot be read: {error}") from error
