"""What a run leaves behind and shows: its directory, its lines, its tables and pictures."""

import json
import math
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.config import Config, ConfigError, save
from fastflowgrpo.processes import Processes, is_main
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import Scores

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
MIN_CELL, MAX_CELL = 96, 256  # pixels; smaller images are enlarged in grids, larger ones shrunk
TRACKER = "fastflowgrpo"  # project name of the trackers, and TensorBoard's folder
# What a run writes into its folder, and all that --overwrite removes.
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "images",
    "checkpoints",
    TRACKER,
    "before_after.png",
    "curve.png",
)


def progress(name: str, work: int | Iterable[Any]) -> tqdm:
    """A progress bar over a number of steps or an iterable; none where the output is no terminal, and of several
    processes only the first's."""
    count, iterable = (work, None) if isinstance(work, int) else (None, work)
    return tqdm(iterable, desc=name, total=count, leave=False, disable=None if is_main() else True)


@dataclass
class Evaluation:
    """Scores of the evaluation prompts, and their images."""

    overall: float
    """Mean of the tags' accuracies, as GenEval counts; the mean reward where prompts have no tags."""
    tags: dict[str, float]
    """Strict accuracy of each GenEval tag."""
    scores: dict[str, float]
    """Mean of the total reward and of every named score."""
    diversity: float | None
    """Mean RMS pixel difference between two images of a prompt, as a share of the full range; None with one image."""
    images: int
    missing: int
    """Images without a score."""
    prompts: list[str]
    """The prompts of `shown`."""
    shown: Tensor
    """(prompts, n, 3, H, W) uint8: images of some prompts, spread over the tags."""
    correct: Tensor | None
    """(prompts, n) bool, if the prompts have tags."""

    @classmethod
    def of(
        cls, prompts: list[Prompt], images: Sequence[Tensor], scores: Scores, copies: int, processes: Processes
    ) -> "Evaluation":
        """Summarise `copies` images of each prompt.

        Collective: of the images, only those that are shown leave their process.

        Args:
            images: batches (_, 3, H, W) of the images of this process's own prompts, in order.
            scores: of all prompts.
        """
        values = {"reward": scores.values, **scores.details}
        means = {name: value.nanmean().item() for name, value in values.items()}
        shown = _spread(prompts, 12)
        groups = dict(
            zip(processes.own(len(prompts)), (g for batch in images for g in batch.split(copies)), strict=True)
        )
        parts = processes.gather(
            (
                {index: _diversity(group) for index, group in groups.items()},
                {index: groups[index][:4] for index in shown if index in groups},
            )
        )
        diversity, pictures = (
            {i: value for part in kind for i, value in part.items()} for kind in zip(*parts, strict=True)
        )
        tag_of = [prompt.metadata.get("tag") for prompt in prompts]
        strict = values.get("geneval/strict")
        tags: dict[str, float] = {}
        if strict is not None:
            strict = strict.view(-1, copies)
            for tag in TAGS:
                rows = [i for i, other in enumerate(tag_of) if other == tag]
                if rows:
                    tags[tag] = strict[rows].nanmean().item()
        return cls(
            overall=sum(tags.values()) / len(tags) if tags else means["reward"],
            tags=tags,
            scores=means,
            diversity=sum(diversity[i] for i in range(len(prompts))) / len(prompts) if copies > 1 else None,
            images=len(scores.values),
            missing=int(scores.values.isnan().sum()),
            prompts=[prompts[i].text for i in shown],
            shown=torch.stack([pictures[i] for i in shown]),
            correct=None if strict is None else strict[shown, :4] == 1,
        )

    def row(self) -> dict[str, Any]:
        """What `metrics.jsonl` and `summary.json` hold of it."""
        return {
            "overall": self.overall,
            **self.tags,
            "diversity": self.diversity,
            "images": self.images,
            "missing": self.missing,
            "scores": self.scores,
        }


def _spread(prompts: list[Prompt], count: int) -> list[int]:
    """Indices of up to `count` different prompts, the same number from every tag, evenly spaced."""
    by_tag: dict[str | None, list[int]] = defaultdict(list)
    for i in {prompt.text: i for i, prompt in enumerate(prompts)}.values():
        by_tag[prompts[i].metadata.get("tag")].append(i)
    share = max(1, count // len(by_tag))
    chosen = []
    for rows in by_tag.values():
        number = min(share, len(rows))
        chosen += [rows[i * len(rows) // number] for i in range(number)]
    return chosen


def _diversity(images: Tensor) -> float:
    """Mean over pairs of images of the RMS difference; images (n, 3, H, W) uint8. NaN for one image."""
    return torch.pdist(images.flatten(1) / 255).mean().item() / images[0].numel() ** 0.5


def check_output(config: Config) -> None:
    """Raises ConfigError if the output folder holds a run that may not be replaced."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file")
    if not config.overwrite and any((folder / name).exists() for name in WRITTEN):
        raise ConfigError(f"output_dir {folder} holds a run already: give another, or --overwrite true to replace it")


class Report:
    """Writes a run directory and prints its progress; of several processes only the first does."""

    def __init__(self, config: Config, accelerator: Accelerator, num_parameters: int):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output_dir)
        self.seconds: dict[str, float] = defaultdict(float)
        self.sampled = 0
        self.sampling_seconds = 0.0
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.start = time.perf_counter()
        self.silent = not accelerator.is_main_process
        if self.silent:
            return
        for name in WRITTEN:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        save(config, self.folder / "config.yaml")
        accelerator.init_trackers(TRACKER)
        rollout, prompts, update = config.rollout, config.prompts, config.update
        images = prompts.per_epoch * rollout.group_size
        steps = rollout.window_size or rollout.num_steps - 1
        print(
            f"{config.model}: {num_parameters / 1e6:.2f} M trained parameters on {accelerator.device}"
            f"{f', {accelerator.num_processes} processes' if accelerator.num_processes > 1 else ''}\n"
            f"an epoch: {prompts.per_epoch} groups x {rollout.group_size} = {images} images, "
            f"{images * steps} (image, step) pairs in {update.per_epoch} updates"
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the phase's seconds."""
        begin = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - begin

    def replay(self, steps: Tensor, difference: Tensor) -> None:
        """Print the replay's largest log-prob difference per step; steps, difference: (N,).

        Raises:
            ConfigError: one is over the tolerance.
        """
        largest = {int(step): float(difference[steps == step].max()) for step in steps.unique()}
        if not self.silent:
            print("replay: largest |d log_prob| " + "  ".join(f"step {s}: {d:.1e}" for s, d in largest.items()))
        update = self.config.update
        worst = float(difference.max())
        if not worst <= update.replay_tolerance * update.clip_range:
            raise ConfigError(
                f"replayed log-probs differ from the rollout's by up to {worst:.1e}, more than "
                f"update.replay_tolerance {update.replay_tolerance:g} x update.clip_range {update.clip_range:g}: "
                "set update.batch_size to rollout.batch_size, or policy.dtype to float32"
            )

    def epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """One line, one row."""
        if self.silent:
            return
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        seconds.pop("evaluate", None)
        total = sum(seconds.values())
        self.sampled += int(metrics["images"])
        self.sampling_seconds += total
        metrics["images_per_s"] = metrics["images"] / total
        self._log({"epoch": epoch, "step": step, **metrics, "seconds": seconds})
        parts = [
            f"epoch {epoch + 1:>{len(str(self.config.epochs))}}/{self.config.epochs}",
            f"reward {metrics['reward']:.3f}",
        ]
        if "geneval/strict" in metrics:
            parts.append(f"accuracy {metrics['geneval/strict']:.3f}")
        if metrics["missing"]:
            parts.append(f"missing {metrics['missing']}")
        if metrics["trained_pairs"]:
            parts.append(f"ratio 1{metrics['ratio_min'] - 1:+.1e}..{metrics['ratio_max'] - 1:+.1e}")
            parts.append(f"clipped {metrics['clipped_above'] + metrics['clipped_below']:.0%}")
        if "kl" in metrics:
            parts.append(f"kl {metrics['kl']:.1e}")
        parts.append(f"{metrics['images_per_s']:.0f} images/s")
        parts.append(" ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value >= 0.005) + " s")
        tqdm.write("  ".join(parts))

    def evaluated(self, evaluation: Evaluation, step: int) -> None:
        """One line, one row, a grid of images."""
        if self.silent:
            return
        self.evaluations.append((step, evaluation))
        self._log({"step": step, "eval": evaluation.row()})
        tags = "  ".join(f"{tag} {value:.3f}" for tag, value in evaluation.tags.items())
        missing = f"missing {evaluation.missing}" if evaluation.missing else ""
        tqdm.write(f"evaluation at step {step}: overall {evaluation.overall:.3f}  {tags}  {missing}".rstrip())
        _grid([evaluation]).save(self.folder / "images" / f"step-{step:06d}.png")

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint, made."""
        folder = self.folder / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.last_checkpoint = folder
        return folder

    def finish(self) -> None:
        """`summary.json`, the pictures, and the closing table."""
        if self.silent:
            self.accelerator.end_training()
            return
        wall = time.perf_counter() - self.start
        summary: dict[str, Any] = {
            "wall_s": wall,
            "images_per_s": self.sampled / self.sampling_seconds,
            "seed": self.config.seed,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        if self.accelerator.device.type == "cuda":
            summary["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            summary["gpu"] = torch.cuda.get_device_name()
        print(f"\n{self.sampled} images in {wall:.0f} s, {summary['images_per_s']:.0f} images/s while training")
        paths: dict[str, Path | str] = {"metrics": self.folder / "metrics.jsonl", "weights": self.last_checkpoint}
        if "tensorboard" in self.config.trackers:
            paths["curves"] = f"tensorboard --logdir {self.folder / TRACKER}"
        first, last = self.evaluations[0][1], self.evaluations[-1][1]
        summary["eval"] = {"first": first.row(), "last": last.row()}
        (self.folder / "summary.json").write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")
        self.accelerator.end_training()
        print(_table(first, last))
        paths["images"] = self.folder / "before_after.png"
        _grid([first, last]).save(self.folder / "before_after.png")
        paths["curve"] = self._curve()
        for name, path in paths.items():
            print(f"{name:8} {path}")

    def _log(self, row: dict[str, Any]) -> None:
        row = {**row, "wall_s": round(time.perf_counter() - self.start, 3)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self.accelerator.log(dict(_flat(row)), step=row["step"])

    def _curve(self) -> Path | str:
        """Accuracy over optimiser steps: evaluations, and the training batches behind them."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return 'not drawn, for want of matplotlib: pip install "fastflowgrpo[demo]"'

        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        trained = [row for row in rows if "epoch" in row]
        key = "geneval/strict" if "geneval/strict" in trained[0] else "reward"
        axes.plot([r["step"] for r in trained], [r[key] for r in trained], color="0.75", lw=1, label="training batches")
        steps = [step for step, _ in self.evaluations]
        for tag in self.evaluations[0][1].tags:
            axes.plot(steps, [e.tags[tag] for _, e in self.evaluations], lw=1, marker=".", label=tag)
        axes.plot(steps, [e.overall for _, e in self.evaluations], "k", lw=2, marker="o", label="overall")
        axes.set(xlabel="optimiser step", ylabel="strict accuracy" if key != "reward" else "reward")
        axes.legend(fontsize="small", ncols=2)
        path = self.folder / "curve.png"
        figure.savefig(path, dpi=150)
        return path


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None and name not in ("epoch", "step"):
            yield prefix + name, value


def _table(first: Evaluation, last: Evaluation) -> str:
    """Before and after, a line per tag and score."""
    pairs: dict[str, tuple[float | None, float | None]] = {
        **{tag: (first.tags[tag], last.tags[tag]) for tag in first.tags},
        "overall": (first.overall, last.overall),
        **{name: (value, last.scores.get(name)) for name, value in first.scores.items()},
        "diversity": (first.diversity, last.diversity),
    }
    lines = [f"{f'{last.images} images':24} before   after"]
    lines += [f"{name:24} {a:6.3f}  {b:6.3f}" for name, (a, b) in pairs.items() if a is not None and b is not None]
    return "\n".join(lines)


def _grid(evaluations: list[Evaluation]) -> Image.Image:
    """The same prompts a row each; a block of images per evaluation, framed green or red where correctness is known."""
    prompts, (_, n, _, height, width) = evaluations[0].prompts, evaluations[0].shown.shape
    if min(height, width) < MIN_CELL:
        scale, resampling = float(-(-MIN_CELL // min(height, width))), Image.Resampling.NEAREST
    else:
        scale, resampling = min(1.0, MAX_CELL / max(height, width)), Image.Resampling.LANCZOS
    height, width = round(height * scale), round(width * scale)
    font = ImageFont.load_default(size=14)
    text = int(max(font.getlength(prompt) for prompt in prompts)) + 16
    gap, frame = 16, 3
    block = n * (width + 2 * frame)
    canvas = Image.new("RGB", (text + len(evaluations) * (block + gap), len(prompts) * (height + 2 * frame)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, prompt in enumerate(prompts):
        y = row * (height + 2 * frame)
        draw.text((8, y + height // 2 - 8), prompt, "black", font)
        for k, evaluation in enumerate(evaluations):
            for column in range(n):
                x = text + k * (block + gap) + column * (width + 2 * frame)
                if evaluation.correct is not None:
                    color = "#2a9d3a" if evaluation.correct[row, column] else "#d03030"
                    draw.rectangle((x, y, x + width + 2 * frame - 1, y + height + 2 * frame - 1), color)
                pixels = evaluation.shown[row, column].permute(1, 2, 0).numpy()
                image = Image.fromarray(pixels).resize((width, height), resampling)
                canvas.paste(image, (x + frame, y + frame))
    return canvas
