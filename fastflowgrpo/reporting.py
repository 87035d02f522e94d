"""What a run leaves behind and shows: its directory, its lines, its tables and pictures."""

import json
import math
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import yaml
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo import __version__, checkpoint
from fastflowgrpo.checkpoint import Checkpoint
from fastflowgrpo.config import Config, ConfigError, save
from fastflowgrpo.plan import Plan
from fastflowgrpo.processes import Processes, is_main
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import Scores

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
SHOWN = 12  # prompts of an evaluation in pictures, or as many as there are
MIN_CELL, MAX_CELL = 96, 256  # pixels; smaller images are enlarged in grids, larger ones shrunk
TRACKER = "fastflowgrpo"  # project name of the trackers, and TensorBoard's folder
# What a run writes into its folder, and all that --overwrite removes.
WRITTEN = (
    "metrics.jsonl",
    "summary.json",
    "images",
    "checkpoints",
    TRACKER,
    "before_after.png",
    "curve.png",
    "config.yaml",  # last: by it a run that was killed in between is known
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
        cls, prompts: list[Prompt], images: Tensor, scores: Scores, copies: int, processes: Processes | None = None
    ) -> "Evaluation":
        """Summarise `copies` images of each prompt. Collective, if there are processes: of the images, only those that
        are shown leave their own.

        Args:
            images: (P * copies, 3, H, W); of several processes this one's, beginning with those of `Processes.own`.
            scores: of all prompts.
        """
        values = {"reward": scores.values, **scores.details}
        means = {name: value.nanmean().item() for name, value in values.items()}
        shown = _spread(prompts, SHOWN)
        own = processes.own(len(prompts)) if processes else range(len(prompts))
        groups = dict(zip(own, images.split(copies), strict=False))
        distances = {i: rms_distances(group[None]).item() for i, group in groups.items()} if copies > 1 else {}
        pictures = {i: groups[i][:4] for i in shown if i in groups}
        if processes:
            parts = processes.gather((distances, pictures))
            distances, pictures = ({i: kind[i] for kind in kinds for i in kind} for kinds in zip(*parts, strict=True))
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
            diversity=sum(distances.values()) / len(prompts) / 255 if copies > 1 else None,
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


def rms_distances(groups: Tensor) -> Tensor:
    """The RMS difference of two samples of a group, the mean over its pairs: groups (P, n, ...) -> (P,) float32."""
    return torch.stack([torch.pdist(group.flatten(1).float()).mean() for group in groups]) / groups[0, 0].numel() ** 0.5


def check_output(config: Config, resumed: Checkpoint | None) -> None:
    """Raises ConfigError if the output folder holds a run that may be neither replaced nor gone on with."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file")
    if config.overwrite or resumed or not any((folder / name).exists() for name in WRITTEN):
        return
    if config.resume is None:
        raise ConfigError(
            f"output_dir {folder} holds a run already: give another, --resume latest to go on with it, "
            "or --overwrite true to replace it"
        )
    # A run that was killed before its first checkpoint begins anew, and makes the same again.
    if not (folder / "config.yaml").exists():
        found = ", ".join(name for name in WRITTEN if (folder / name).exists())
        raise ConfigError(
            f"output_dir {folder} holds {found}, but no config.yaml: give another, or --overwrite true to remove them"
        )
    before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    checkpoint.refuse_changes(folder, checkpoint.changed_settings(before, config))


class Report:
    """Writes a run directory and prints its progress; of several processes only the first does, while all know the
    rows."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        plan: Plan,
        num_parameters: int,
        resumed: Checkpoint | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output_dir)
        self.rows: list[dict[str, Any]] = []
        """Those of metrics.jsonl."""
        self.run_id, before = uuid4().hex[:8], 0.0
        if resumed:
            self.rows, self.run_id, before = resumed.rows(), resumed.manifest["run_id"], resumed.manifest["wall_s"]
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter() - before
        self.main = accelerator.is_main_process
        if not self.main:
            return
        where = f", {plan.processes} processes" if plan.processes > 1 else ""
        print(f"{config.model}: {num_parameters / 1e6:.2f} M trained parameters on {accelerator.device}{where}")
        print(*plan.lines(), sep="\n")
        trackers: dict[str, dict[str, Any]] = {}
        if resumed is None:
            self._clear()
        else:
            trackers = {"tensorboard": {"purge_step": resumed.step + 1}}
            self._go_on(resumed)
        trackers["wandb"] = {"id": self.run_id, "resume": "allow"}
        self.folder.mkdir(parents=True, exist_ok=True)
        with checkpoint.replacing(self.folder / "config.yaml") as path:
            save(config, path)
        (self.folder / "images").mkdir(exist_ok=True)
        accelerator.init_trackers(TRACKER, init_kwargs=trackers)

    def _clear(self) -> None:
        """Remove the run that is replaced."""
        for name in WRITTEN:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _go_on(self, resumed: Checkpoint) -> None:
        """Take back what was written after the checkpoint, and say from where the run goes on."""
        print(f"goes on from {resumed.folder}: epoch {resumed.epoch} of {self.config.epochs}")
        for name, (old, new) in resumed.changed.items():
            print(f"  {name} was {old}, is {new}")
        for path in checkpoint.set_later_ones_aside(resumed):
            print(f"  a later checkpoint is now {path}")
        with checkpoint.replacing(self.folder / "metrics.jsonl") as path:
            path.write_text(checkpoint.lines(self.rows))

    def wall(self) -> float:
        """Seconds that the run has taken, over all its starts."""
        return time.perf_counter() - self.start

    @property
    def evaluated_at(self) -> int | None:
        """The step of the last row if that is an evaluation."""
        return self.rows[-1]["step"] if self.rows and "eval" in self.rows[-1] else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the phase's seconds."""
        begin = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # decoding and rewards go on behind it, on streams of their own
        self.seconds[name] += time.perf_counter() - begin

    def replay(self, steps: Tensor, difference: Tensor) -> None:
        """Print the replay's largest log-prob difference per step; steps, difference: (N,).

        Raises:
            ConfigError: one is over the tolerance.
        """
        largest = {int(step): float(difference[steps == step].max()) for step in steps.unique()}
        self._say("replay: largest |d log_prob| " + "  ".join(f"step {s}: {d:.1e}" for s, d in largest.items()))
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
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        seconds.pop("evaluate", None)
        metrics["images_per_s"] = metrics["images"] / sum(seconds.values())
        self._log({"epoch": epoch, "step": step, **metrics, "seconds": seconds})
        parts = [
            f"epoch {epoch + 1:>{len(str(self.config.epochs))}}/{self.config.epochs}",
            f"reward {metrics['reward']:.3f}",
        ]
        if "geneval/strict" in metrics:
            parts.append(f"accuracy {metrics['geneval/strict']:.3f}")
        if metrics["missing"]:
            parts.append(f"missing {metrics['missing']}")
        if "ratio" in metrics:
            parts.append(f"ratio 1{metrics['ratio_min'] - 1:+.1e}..{metrics['ratio_max'] - 1:+.1e}")
            parts.append(f"clipped {metrics['clipped_above'] + metrics['clipped_below']:.0%}")
        if "kl" in metrics:
            parts.append(f"kl {metrics['kl']:.1e}")
        parts.append(f"{metrics['images_per_s']:.0f} images/s")
        parts.append(" ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value >= 0.005) + " s")
        self._say("  ".join(parts))

    def evaluated(self, evaluation: Evaluation, step: int) -> None:
        """One line, one row, a grid of images."""
        if self.main:
            image_grid([evaluation]).save(self._image(step))
        self._log({"step": step, "eval": evaluation.row()})
        tags = "  ".join(f"{tag} {value:.3f}" for tag, value in evaluation.tags.items())
        missing = f"missing {evaluation.missing}" if evaluation.missing else ""
        self._say(f"evaluation at step {step}: overall {evaluation.overall:.3f}  {tags}  {missing}".rstrip())

    def stopped(self) -> None:
        """Say where a run that does not reach its end can go on, and close the trackers."""
        if not self.main:
            return
        saved = checkpoint.saved(self.folder)
        if saved:
            command = f"python -m fastflowgrpo.train --config {self.folder / 'config.yaml'} --resume latest"
            print(f"the last checkpoint is {saved[-1]}; to go on: {command}", file=sys.stderr)
        else:
            print("no epoch was finished: there is no checkpoint", file=sys.stderr)
        for tracker in self.accelerator.trackers:  # and not end_training, which may wait for a process that has failed
            tracker.finish()

    def finish(self, prompts: list[Prompt]) -> None:
        """`summary.json`, the pictures of the evaluation prompts, and the closing table."""
        if not self.main:
            self.accelerator.end_training()
            return
        wall = self.wall()
        trained = [row for row in self.rows if "epoch" in row]
        evaluated = [row for row in self.rows if "eval" in row]
        images, seconds = sum(row["images"] for row in trained), sum(sum(row["seconds"].values()) for row in trained)
        first, last = evaluated[0]["eval"], evaluated[-1]["eval"]
        summary: dict[str, Any] = {
            "wall_s": wall,
            "images_per_s": images / seconds,
            "seed": self.config.seed,
            "versions": versions(),
            "eval": {"first": first, "last": last},
        }
        if self.accelerator.device.type == "cuda":
            summary["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            summary["gpu"] = torch.cuda.get_device_name()
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        self.accelerator.end_training()
        print(f"\n{images} images in {wall:.0f} s, {images / seconds:.0f} images/s while training")
        print(_table(first, last))
        paths: dict[str, Path | str] = {
            "metrics": self.folder / "metrics.jsonl",
            "weights": checkpoint.saved(self.folder)[-1],
        }
        if "tensorboard" in self.config.trackers:
            paths["curves"] = f"tensorboard --logdir {self.folder / TRACKER}"
        before, after = (self._image(row["step"]) for row in (evaluated[0], evaluated[-1]))
        if before.is_file() and after.is_file():
            paths["images"] = self.folder / "before_after.png"
            _beside(before, after, [prompts[i].text for i in _spread(prompts, SHOWN)]).save(paths["images"])
        paths["curve"] = self._curve(trained, evaluated)
        for name, path in paths.items():
            print(f"{name:8} {path}")

    def _say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def _image(self, step: int) -> Path:
        return self.folder / "images" / f"step-{step:06d}.png"

    def _log(self, row: dict[str, Any]) -> None:
        row = finite({**row, "wall_s": round(self.wall(), 3)})
        self.rows.append(row)
        if not self.main:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(checkpoint.lines([row]))
        self.accelerator.log(dict(_flat(row)), step=row["step"])

    def _curve(self, trained: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> Path | str:
        """Accuracy over optimiser steps: evaluations, and the training batches behind them."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return 'not drawn, for want of matplotlib: pip install "fastflowgrpo[demo]"'

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        key = "geneval/strict" if "geneval/strict" in trained[0] else "reward"
        axes.plot([r["step"] for r in trained], [r[key] for r in trained], color="0.75", lw=1, label="training batches")
        steps = [row["step"] for row in evaluated]
        for tag in TAGS:
            if tag in evaluated[0]["eval"]:
                axes.plot(steps, [row["eval"][tag] for row in evaluated], lw=1, marker=".", label=tag)
        axes.plot(steps, [row["eval"]["overall"] for row in evaluated], "k", lw=2, marker="o", label="overall")
        axes.set(xlabel="optimiser step", ylabel="strict accuracy" if key != "reward" else "reward")
        axes.legend(fontsize="small", ncols=2)
        path = self.folder / "curve.png"
        figure.savefig(path, dpi=150)
        return path


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide about the numbers."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "fastflowgrpo": __version__, **packages}


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None and name not in ("epoch", "step"):
            yield prefix + name, value


def _table(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Before and after, two `Evaluation.row`s, a line per tag and score."""
    names = [*(tag for tag in TAGS if tag in first), "overall"]
    pairs: dict[str, tuple[float | None, float | None]] = {
        **{name: (first[name], last[name]) for name in names},
        **{name: (value, last["scores"].get(name)) for name, value in first["scores"].items()},
        "diversity": (first["diversity"], last["diversity"]),
    }
    lines = [f"{str(last['images']) + ' images':24} before   after"]
    lines += [f"{name:24} {a:6.3f}  {b:6.3f}" for name, (a, b) in pairs.items() if a is not None and b is not None]
    return "\n".join(lines)


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


def _beside(before: Path, after: Path, prompts: list[str]) -> Image.Image:
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
