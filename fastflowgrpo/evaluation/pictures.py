"""Pictures of evaluations: grids of images, and the curve of a run."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastflowgrpo.evaluation.shown import ShownImages
from fastflowgrpo.prompts import TAGS

MIN_CELL, MAX_CELL = 96, 256  # pixels; smaller images are enlarged in grids, larger ones shrunk
LINE, MAX_LINES = 17, 6  # height of a caption's line in pixels; lines of a caption
GAP, FRAME = 16, 3  # pixels between two blocks of images, and around an image
GREEN, RED = "#2a9d3a", "#d03030"


def image_grid(evaluations: Sequence[ShownImages], titles: Sequence[str] = ()) -> Image.Image:
    """Draw a row for each prompt: its text, its source image if it has one, and a block of images for each evaluation.

    Images that were checked have a green frame if they are correct and a red one if not.

    Args:
        evaluations: images of the same prompts, as many of each.
        titles: one for each evaluation, drawn above its block.
    """
    prompts, (_, n, _, height, width) = evaluations[0].prompts, evaluations[0].images.shape
    (width, height), resampling = _cell_size((width, height))
    sources, text_width, block = evaluations[0].sources, _text_width(prompts), n * (width + 2 * FRAME)
    left, top = text_width + (width + GAP if sources else 0), 24 if titles or sources else 0
    size = (left + len(evaluations) * (block + GAP), top + len(prompts) * (height + 2 * FRAME))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    if sources:
        draw.text((text_width, 4), "source", "black", _font())
    for k, title in enumerate(titles):
        draw.text((left + k * (block + GAP) + FRAME, 4), title, "black", _font())
    for row, prompt in enumerate(prompts):
        y = top + row * (height + 2 * FRAME)
        draw.text((8, y + height // 2 - 8), prompt, "black", _font())
        if sources:
            canvas.paste(_resized(sources[row], (width, height), resampling), (text_width, y + FRAME))
        for k, evaluation in enumerate(evaluations):
            for column in range(n):
                x = left + k * (block + GAP) + column * (width + 2 * FRAME)
                if evaluation.correct is not None:
                    color = GREEN if evaluation.correct[row, column] else RED
                    draw.rectangle((x, y, x + width + 2 * FRAME - 1, y + height + 2 * FRAME - 1), color)
                image = _resized(evaluation.images[row, column], (width, height), resampling)
                canvas.paste(image, (x + FRAME, y + FRAME))
    return canvas


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """An image, enlarged or shrunk like those of a grid, above its caption in as many lines as it needs."""
    picture, font = image.resize(*_cell_size(image.size)), _font()
    per_line = max(1, int(picture.width / font.getlength("n")))
    lines = textwrap.wrap(caption, per_line)[:MAX_LINES]
    canvas = Image.new("RGB", (picture.width, picture.height + LINE * len(lines)), "white")
    canvas.paste(picture)
    ImageDraw.Draw(canvas).text((2, picture.height), "\n".join(lines), "black", font)
    return canvas


def side_by_side(before: Path, after: Path, prompts: Sequence[str]) -> Image.Image:
    """Join two grids of one evaluation each: the prompts, the images before, the images after. Both have the sources.

    Args:
        before, after: files of two grids.
        prompts: the prompts that both show.
    """
    left = _text_width(prompts)
    with Image.open(before) as first, Image.open(after) as last:
        canvas = Image.new("RGB", (first.width + last.width - left, first.height))
        canvas.paste(first)
        canvas.paste(last.crop((left, 0, *last.size)), (first.width, 0))
    return canvas


def draw_curve(
    trained_rows: Sequence[Mapping[str, Any]], evaluation_rows: Sequence[Mapping[str, Any]], path: Path
) -> Path | str:
    """Draw the accuracy of a run over its optimiser steps, or the reward where there are no tags.

    Args:
        trained_rows: rows of metrics.jsonl, one per epoch.
        evaluation_rows: rows of metrics.jsonl, one per evaluation.
        path: the file to write.

    Returns:
        The path, or a sentence that says how to install matplotlib where it is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'not drawn, as matplotlib is missing: pip install "fastflowgrpo[plot]"'

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    key = "geneval/strict" if "geneval/strict" in trained_rows[0] else "reward"
    trained_steps, values = [row["step"] for row in trained_rows], [row[key] for row in trained_rows]
    axes.plot(trained_steps, values, color="0.75", lw=1, label="training batches")
    steps = [row["step"] for row in evaluation_rows]
    for tag in TAGS:
        if tag in evaluation_rows[0]["eval"]:
            axes.plot(steps, [row["eval"][tag] for row in evaluation_rows], lw=1, marker=".", label=tag)
    axes.plot(steps, [row["eval"]["overall"] for row in evaluation_rows], "k", lw=2, marker="o", label="overall")
    axes.set(xlabel="optimiser step", ylabel="strict accuracy" if key != "reward" else "reward")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
    return path


def _cell_size(size: tuple[int, int]) -> tuple[tuple[int, int], Image.Resampling]:
    """The width and height in which an image of this size is drawn, and how it is resized."""
    if min(size) < MIN_CELL:
        scale, resampling = float(-(-MIN_CELL // min(size))), Image.Resampling.NEAREST
    else:
        scale, resampling = min(1.0, MAX_CELL / max(size)), Image.Resampling.LANCZOS
    return (round(size[0] * scale), round(size[1] * scale)), resampling


def _resized(image: Tensor, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """An image (3, H, W) uint8 in another size."""
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, resampling)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def _text_width(prompts: Sequence[str]) -> int:
    """The width in pixels of a grid's column of prompts."""
    font = _font()
    return int(max(font.getlength(prompt) for prompt in prompts)) + 16
