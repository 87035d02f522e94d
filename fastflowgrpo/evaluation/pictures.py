"""Grids of evaluation images."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastflowgrpo.evaluation.summary import Evaluation

MIN_CELL, MAX_CELL = 96, 256  # pixels; smaller images are enlarged in grids, larger ones shrunk


def image_grid(evaluations: list[Evaluation], titles: list[str] | None = None) -> Image.Image:
    """The same prompts a row each; a block of images per evaluation, framed green or red where correctness is known,
    under its title."""
    prompts, (_, n, _, height, width) = evaluations[0].prompts, evaluations[0].shown.shape
    if min(height, width) < MIN_CELL:
        scale, resampling = float(-(-MIN_CELL // min(height, width))), Image.Resampling.NEAREST
    else:
        scale, resampling = min(1.0, MAX_CELL / max(height, width)), Image.Resampling.LANCZOS
    height, width = round(height * scale), round(width * scale)
    gap, frame = 16, 3
    left, top, block = _text_width(prompts), 24 if titles else 0, n * (width + 2 * frame)
    size = (left + len(evaluations) * (block + gap), top + len(prompts) * (height + 2 * frame))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for k, title in enumerate(titles or []):
        draw.text((left + k * (block + gap) + frame, 4), title, "black", _font())
    for row, prompt in enumerate(prompts):
        y = top + row * (height + 2 * frame)
        draw.text((8, y + height // 2 - 8), prompt, "black", _font())
        for k, evaluation in enumerate(evaluations):
            for column in range(n):
                x = left + k * (block + gap) + column * (width + 2 * frame)
                if evaluation.correct is not None:
                    color = "#2a9d3a" if evaluation.correct[row, column] else "#d03030"
                    draw.rectangle((x, y, x + width + 2 * frame - 1, y + height + 2 * frame - 1), color)
                pixels = evaluation.shown[row, column].permute(1, 2, 0).numpy()
                image = Image.fromarray(pixels).resize((width, height), resampling)
                canvas.paste(image, (x + frame, y + frame))
    return canvas


def side_by_side(before: Path, after: Path, prompts: list[str]) -> Image.Image:
    """Two grids of the same prompts as one: the prompts, the images before, the images after."""
    left = _text_width(prompts)
    with Image.open(before) as first, Image.open(after) as last:
        canvas = Image.new("RGB", (first.width + last.width - left, first.height))
        canvas.paste(first)
        canvas.paste(last.crop((left, 0, *last.size)), (first.width, 0))
    return canvas


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def _text_width(prompts: list[str]) -> int:
    """Width in pixels of a grid's column of prompts."""
    font = _font()
    return int(max(font.getlength(prompt) for prompt in prompts)) + 16
