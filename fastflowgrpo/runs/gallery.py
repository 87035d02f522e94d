"""The gallery of a run: the images that `python -m fastflowgrpo.view` shows.

gallery/
    index.jsonl                     a line for each folder below, with all about its images
    step-<step>/<prompt>-<n>.webp   image n of an evaluation's prompt; prompts and noise are those of every evaluation
    epoch-<epoch>/<group>.webp      a whole group of a rollout, the image with the highest advantage first
    .../<number>-source.webp        the source image of a prompt or group in the same folder, of an editing model

The size is bounded: images of an evaluation are at most MAX_SIDE pixels wide and high, those of a group MAX_TILE. Of a
long run only every n-th evaluation and every n-th epoch are kept.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.config import Config
from fastflowgrpo.evaluation.summary import Evaluation
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.images import source_images
from fastflowgrpo.results import finite
from fastflowgrpo.rewards import RewardBatch, Scores, WeightedRewards
from fastflowgrpo.runs.files import GALLERY, INDEX, atomic_write, fsync, json_lines, read_rows, writing
from fastflowgrpo.runs.tracked_images import track_images
from fastflowgrpo.sampling.rollout import sample_seeds

GROUPS = 3  # groups of an epoch that are kept, the first ones; the order of an epoch's prompts is random
MAX_EVALUATIONS, MAX_EPOCHS = 200, 100
MAX_SIDE, MAX_TILE = 512, 192  # pixels
LOSSLESS_SIDE = 128  # images up to this size are kept without loss
STRICT = "geneval/strict"


class Gallery:
    """Writes the gallery of a run; only the main process may use it.

    Args:
        config: of the run; with `evaluation.gallery` 0 nothing is written.
        prompts: of the evaluation.
        rewards: those that have `detect` are asked what they see on the images of an evaluation.
        accelerator: whose trackers get some of the images.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt], rewards: WeightedRewards, accelerator: Accelerator):
        self.config, self.prompts, self.accelerator = config, prompts, accelerator
        self.folder = Path(config.output_dir) / GALLERY
        self.detectors = {name: reward.detect for name, reward in rewards.rewards.items() if hasattr(reward, "detect")}

    def keeps_epoch(self, epoch: int) -> bool:
        """Whether groups of the epoch are kept."""
        config = self.config
        return bool(config.evaluation.gallery) and _is_kept(epoch, config.epochs, MAX_EPOCHS)

    def evaluation(self, evaluation: Evaluation, epoch: int, step: int) -> None:
        """Keep images of an evaluation, which has `gallery` images, and log some of them to the trackers.

        Args:
            epoch: epochs done.
            step: optimiser updates done.
        """
        every, epochs, shown = self.config.evaluation.every, self.config.epochs, evaluation.gallery
        number, count = (epoch // every, epochs // every + 1) if every else (0, 1)
        if shown is None or not (epoch == epochs or _is_kept(number, count, MAX_EVALUATIONS)):
            return
        n, scores = shown.images.shape[1], evaluation.measures["Scores"]
        pixels = shown.images.flatten(0, 1)
        detections = self._detections([self.prompts[i] for i in shown.indices for _ in range(n)], pixels)
        shown_prompts = [self.prompts[index] for index in shown.indices]
        sources = _source_files(shown.indices, shown_prompts, pixels, MAX_SIDE)
        images: dict[str, Image.Image] = {}
        entries: list[dict[str, Any]] = []
        for i, (index, k) in enumerate((index, k) for index in shown.indices for k in range(n)):
            file, prompt = f"{index}-{k}.webp", self.prompts[index]
            values = {name: _number(value[index, k]) for name, value in scores.items()}
            images[file] = _shrunk(pixels[i], MAX_SIDE)
            entries.append(
                {
                    "file": file,
                    "prompt": index,
                    "text": prompt.text,
                    "tag": prompt.metadata.get("tag"),
                    "seed": str(sample_seeds([index], n)[k].item()),  # as text: JavaScript has no 64-bit integers
                    "scores": values,
                    "correct": None if values.get(STRICT) is None else values[STRICT] == 1,
                    "detections": detections[i],
                    **_source_entry(index, prompt),
                }
            )
        line = {"kind": "evaluation", "step": step, "epoch": epoch, "images": entries}
        self._write(f"step-{step:06d}", images | sources, line, _is_small(pixels))
        captions = [f"{entry['text']}: {_caption(entry)}" for entry in entries]
        first_of_prompts = range(0, len(entries), n)
        track_images(self.accelerator, list(images.values()), captions, first_of_prompts, step)

    def rollout(
        self,
        epoch: int,
        step: int,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        images: Tensor,
        scores: Scores,
        advantages: Tensor,
        groups: Sequence[int],
    ) -> None:
        """Keep groups of an epoch's rollout.

        Args:
            epoch, step: epochs and optimiser updates done.
            prompts, seeds: of each group that is kept.
            images: of these groups, uint8 (B, 3, H, W) on the CPU.
            scores, advantages: of all images of the epoch, NaN without a score.
            groups: the numbers of the kept groups among those of the epoch.
        """
        size = len(images) // len(prompts)
        sheets, entries = _source_files(range(len(prompts)), prompts, images, MAX_TILE), []
        for g, (group, prompt, seed) in enumerate(zip(groups, prompts, seeds, strict=True)):
            own = slice(group * size, (group + 1) * size)
            order = advantages[own].nan_to_num(-math.inf).argsort(descending=True, stable=True)
            values = {"reward": scores.values[own], **{name: value[own] for name, value in scores.details.items()}}
            sheets[f"{g}.webp"], columns = _sheet(images[g * size : (g + 1) * size][order])
            entries.append(
                {
                    "file": f"{g}.webp",
                    "columns": columns,
                    "text": prompt.text,
                    "tag": prompt.metadata.get("tag"),
                    "seed": str(seed),
                    "advantages": [_number(value) for value in advantages[own][order]],
                    "scores": {name: [_number(v) for v in value[order]] for name, value in values.items()},
                    **_source_entry(g, prompt),
                }
            )
        line = {"kind": "rollout", "step": step, "epoch": epoch, "groups": entries}
        self._write(f"epoch-{epoch:06d}", sheets, line, _is_small(images))

    def _detections(self, prompts: Sequence[Prompt], images: Tensor) -> list[list[dict[str, Any]]]:
        """What the rewards see on each image (B, 3, H, W); boxes are in shares of the width and height."""
        height, width = images.shape[-2:]
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        batch = RewardBatch(images, texts, metadata, torch.arange(len(prompts)))
        found: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for name, detect in self.detectors.items():
            for own, seen in zip(found, _called(name, detect, batch), strict=True):
                for one in seen:
                    box = [round(v / s, 4) for v, s in zip(one.box, (width, height) * 2, strict=True)]
                    label = f"{one.color} {one.label}" if one.color else one.label
                    own.append({"by": name, "label": label, "score": round(float(one.score), 4), "box": box})
        return found

    def _write(self, name: str, images: Mapping[str, Image.Image], line: dict[str, Any], lossless: bool) -> None:
        """Write a folder of images and its line in the index: both are complete, or not there.

        Raises:
            UserError: the gallery cannot be written.
        """
        with writing(self.folder):
            self._write_files(name, images, line, lossless)

    def _write_files(self, name: str, images: Mapping[str, Image.Image], line: dict[str, Any], lossless: bool) -> None:
        self.folder.mkdir(exist_ok=True)  # not its parents: if the run's folder is gone, the run has to know
        folder, temporary = self.folder / name, self.folder / f".{name}.tmp"
        for remains in (temporary, folder):  # of a process that was killed
            shutil.rmtree(remains, ignore_errors=True)
        temporary.mkdir()
        for file, image in images.items():
            image.save(temporary / file, lossless=lossless, quality=50 if lossless else 85, method=2)
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        temporary.rename(folder)
        with (self.folder / INDEX).open("a") as index:
            index.write(json_lines([finite({"folder": name, "time": round(time.time(), 3), **line})]))
        fsync(self.folder / INDEX)


def cut_back(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Remove from the gallery of a run what the rows of metrics.jsonl do not have, of a run that is resumed."""
    index = run / GALLERY / INDEX
    if not index.is_file():
        return
    evaluated, trained = {row["step"] for row in rows if "eval" in row}, {row.get("epoch") for row in rows}
    kept = {
        entry["folder"]: entry
        for entry in read_rows(index)
        if (entry["step"] in evaluated if entry["kind"] == "evaluation" else entry["epoch"] in trained)
    }
    with atomic_write(index) as path:
        path.write_text(json_lines(list(kept.values())))
    for folder in index.parent.iterdir():
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder)


def _source_files(
    numbers: Iterable[int], prompts: Sequence[Prompt], images: Tensor, side: int
) -> dict[str, Image.Image]:
    """The source image of each prompt by its file's name, in the size of the results; empty for text-to-image."""
    sources = source_images(prompts, *images.shape[-2:])
    return {_source_name(number): _shrunk(source, side) for number, source in zip(numbers, sources, strict=False)}


def _source_entry(number: int, prompt: Prompt) -> dict[str, str]:
    """The key of the index that names the source image of a prompt, if it has one."""
    return {} if prompt.image is None else {"source": _source_name(number)}


def _source_name(number: int) -> str:
    return f"{number}-source.webp"


def _is_kept(number: int, count: int, limit: int) -> bool:
    """Whether item `number` of `count` is among the evenly spread ones, about `limit`, that are kept."""
    return number % -(-count // limit) == 0


def _is_small(images: Tensor) -> bool:
    """Whether images (..., H, W) are so small that they are kept without loss."""
    return max(images.shape[-2:]) <= LOSSLESS_SIDE


def _called(name: str, detect: Callable[[RewardBatch], Any], batch: RewardBatch) -> Any:
    """What a detector sees; nothing if it fails, since a picture is not worth the run."""
    try:
        return detect(batch)
    except Exception as error:
        tqdm.write(f"reward {name}: nothing is drawn over the gallery's images: {type(error).__name__}: {error}")
        return [[] for _ in batch.prompts]


def _number(value: Tensor) -> float | None:
    """A number for the index: six digits are more than anyone reads."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _caption(entry: Mapping[str, Any]) -> str:
    words = {True: ", correct", False: ", wrong", None: ""}
    reward = entry["scores"]["reward"]
    return ("no reward" if reward is None else f"reward {reward:.3f}") + words[entry["correct"]]


def _shrunk(image: Tensor, side: int) -> Image.Image:
    """An image (3, H, W) uint8, at most `side` pixels wide and high."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _sheet(images: Tensor) -> tuple[Image.Image, int]:
    """All images (n, 3, H, W) on one sheet, row by row, and the number of its columns."""
    tiles = [_shrunk(image, MAX_TILE) for image in images]
    width, height = tiles[0].size
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet, columns
