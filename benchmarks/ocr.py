"""Accuracy and speed of the `ocr` reward: `python -m benchmarks.ocr`.

Texts are rendered at 512 x 512 in several fonts, sizes, colours and ways (KINDS). They are read one by one with
RapidOCR's default settings, and with those of the reward. Both use one thread, so that images/s are per core. They
alternate, and the speeds are medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks import report
from fastflowgrpo.rewards.ocr import OCR, quoted_text, text_score

SIDE = 512
WORDS = """
open coffee market river garden music library hotel summer winter street bridge school museum bakery flower station
travel future dream light ocean forest mountain cinema theatre journal recipe kitchen ticket platform sale welcome
danger private exit north south special fresh organic vintage royal golden silver happy birthday thank you quality
science history physics space rocket jazz club pizza pasta juice bread honey lemon apple 24 100 2025 50% No.7 10:30
"""
KINDS = ("plain", "tiny", "large", "rotated", "faint", "blurred", "clutter", "lines", "sentence", "among others")
MATPLOTLIB_FONTS = """
DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-BoldItalic DejaVuSansMono STIXGeneral
STIXGeneralBol STIXGeneralItalic cmb10 cmss10 cmtt10
"""

Random = np.random.Generator
Font = Callable[[int], Any]  # from a size in pixels


@dataclass(frozen=True)
class Rendered:
    """An image uint8 (3, SIDE, SIDE), its prompt, and its kind (one of KINDS)."""

    pixels: torch.Tensor
    prompt: str
    kind: str


def pillow_font(size: int) -> Any:
    return ImageFont.load_default(size)


def all_fonts() -> list[Font]:
    """Pillow's font and those of matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    paths = [str(folder / f"{name}.ttf") for name in MATPLOTLIB_FONTS.split()]
    return [pillow_font, *(lambda size, path=path: ImageFont.truetype(path, size) for path in paths)]


def rendered(count: int, fonts: Sequence[Font], seed: int = 0) -> Iterator[Rendered]:
    """Render `count` images of each of KINDS, alternating."""
    for i in range(count):
        for k, kind in enumerate(KINDS):
            yield _render(kind, np.random.default_rng((seed, i, k)), fonts)


def _render(kind: str, random: Random, fonts: Sequence[Font]) -> Rendered:
    paper, ink = _colors(random, *((12, 24) if kind == "faint" else (80, 255)))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    font = fonts[int(random.integers(len(fonts)))]
    words = _words(random, 1, 4)
    text = " ".join(words)
    middle = SIDE // 2
    if kind in ("plain", "tiny", "large", "faint", "blurred"):
        low, high = {"tiny": (9, 14), "large": (90, 180), "blurred": (20, 40)}.get(kind, (24, 60))
        text = words[0] if kind == "large" else text
        _write(image, random, text, font, random.integers(low, high), ink)
        if kind == "blurred":
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(1.5, 3)))
    elif kind == "rotated":
        angle = random.choice((-1, 1)) * random.uniform(8, 40)
        _write(image, random, text, font, random.integers(30, 60), ink, angle)
    elif kind == "clutter":
        image = _clutter(random, paper, ink)
        _write(image, random, text, font, random.integers(18, 50), ink)
    elif kind in ("lines", "sentence"):
        words = _words(random, 2, 4) if kind == "lines" else _words(random, 12, 18)
        text = " ".join(words)
        size = int(random.integers(36, 70) if kind == "lines" else random.integers(14, 24))
        rows = words if kind == "lines" else [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
        for row, line in enumerate(rows):
            y = middle + round(1.5 * size * (row - (len(rows) - 1) / 2))
            _write(image, random, line, font, size, ink, place=(middle, y))
    else:
        quarter = SIDE // 4
        places = random.permutation([quarter, 2 * quarter, 3 * quarter]).tolist()
        _write(image, random, text, font, random.integers(20, 50), ink, place=(middle, places[0]))
        for y in places[1:]:
            other, font = " ".join(_words(random, 1, 3)), fonts[int(random.integers(len(fonts)))]
            _write(image, random, other, font, random.integers(12, 40), ink, place=(middle, y))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return Rendered(pixels, f'A picture with the text "{text}"', kind)


def _colors(random: Random, least: float, most: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose colours for background and text whose luminance differs by `least` to `most`."""
    while True:
        paper, ink = random.integers(0, 256, (2, 3))
        if least < abs((paper - ink) @ (0.3, 0.6, 0.1)) < most:
            return tuple(paper.tolist()), tuple(ink.tolist())


def _words(random: Random, least: int, most: int) -> list[str]:
    chosen = random.choice(WORDS.split(), random.integers(least, most + 1), replace=False).tolist()
    change = (str.upper, str.title, str.lower)[random.integers(3)]
    return [change(word) for word in chosen]


def _write(
    image: Image.Image,
    random: Random,
    text: str,
    font: Font,
    size: Any,
    ink: tuple[int, ...],
    angle: float = 0.0,
    place: tuple[int, int] | None = None,
) -> None:
    """Write around a place, or anywhere, in a smaller size if there is no room."""
    while True:
        left, top, right, bottom = (round(edge) for edge in font(int(size)).getbbox(text))
        mask = Image.new("L", (right - left + 8, bottom - top + 8))
        ImageDraw.Draw(mask).text((4 - left, 4 - top), text, fill=255, font=font(int(size)))
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        if max(mask.size) <= SIDE:
            break
        size *= 0.95
    x, y = place or tuple(random.integers(side - side // 2, SIDE - side // 2 + 1) for side in mask.size)
    image.paste(ink, (int(x) - mask.width // 2, int(y) - mask.height // 2), mask)


def _clutter(random: Random, paper: tuple[int, ...], ink: tuple[int, ...]) -> Image.Image:
    """Blurred shapes and noise in colours that are nearer to the background than to the text."""
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, width, height = random.integers(0, SIDE, 4).tolist()
        share = random.uniform(-0.5, 0.6)
        color = tuple(int(min(255, max(0, p + share * (i - p)))) for p, i in zip(paper, ink, strict=True))
        box = (x, y, x + width // 2, y + height // 2)
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)(box, fill=color)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), np.float32)
    return Image.fromarray((pixels + random.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8))


def default_reader() -> Callable[[np.ndarray], str]:
    """Make RapidOCR with its default settings and one thread."""
    from rapidocr import RapidOCR

    engine: Any = RapidOCR(params={"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1})
    return lambda pixels: "".join(engine(pixels).txts or ())


def measure(images: list[Rendered], readers: dict[str, Callable[[np.ndarray], str]]) -> dict[str, dict[str, Any]]:
    """Measure each reader's scores by kind, and its images/s: the median over rounds of one image of each kind."""
    arrays = [image.pixels.flip(0).permute(1, 2, 0).numpy() for image in images]
    scores: dict[str, list[float]] = {name: [] for name in readers}
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for read in readers.values():
        read(arrays[0])  # loads its models
    for begin in range(0, len(images), len(KINDS)):
        rows = range(begin, begin + len(KINDS))
        for name, read in readers.items():
            start = time.perf_counter()
            texts = [read(arrays[i]) for i in rows]
            speeds[name].append(len(rows) / (time.perf_counter() - start))
            scores[name] += [
                text_score(quoted_text(images[i].prompt), text) for i, text in zip(rows, texts, strict=True)
            ]
    return {
        name: {
            "images_per_s": statistics.median(speeds[name]),
            "mean": statistics.mean(values),
            "exact": statistics.mean(value == 1 for value in values),
            "kinds": {kind: statistics.mean(values[k :: len(KINDS)]) for k, kind in enumerate(KINDS)},
        }
        for name, values in scores.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="images of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of how they are drawn")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    images = list(rendered(arguments.count, all_fonts(), arguments.seed))
    result = {
        "images": len(images),
        "side": SIDE,
        "versions": {name: version(name) for name in ("rapidocr", "onnxruntime", "torch")},
        "readers": measure(images, {"RapidOCR's defaults": default_reader(), "ocr": OCR().read}),
    }
    print(report.ocr_table(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
