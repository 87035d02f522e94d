"""The log of a run: printed lines, metrics.jsonl, trackers, summary."""

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.config import Config, save
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.pictures import image_grid, side_by_side
from fastflowgrpo.evaluation.summary import SHOWN, Evaluation, spread_over_tags
from fastflowgrpo.planning.plan import Plan
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.runs import checkpoints, files
from fastflowgrpo.runs.checkpoints import Checkpoint
from fastflowgrpo.runs.files import TRACKER, WRITTEN, finite, versions


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
        print(*plan.summary_lines(), sep="\n")
        trackers: dict[str, dict[str, Any]] = {}
        if resumed is None:
            self._clear()
        else:
            trackers = {"tensorboard": {"purge_step": resumed.step + 1}}
            self._go_on(resumed)
        trackers["wandb"] = {"id": self.run_id, "resume": "allow"}
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.folder / "config.yaml") as path:
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
        for path in checkpoints.set_later_ones_aside(resumed):
            print(f"  a later checkpoint is now {path}")
        with files.replacing(self.folder / "metrics.jsonl") as path:
            path.write_text(files.lines(self.rows))

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
            UserError: one is over the tolerance.
        """
        largest = {int(step): float(difference[steps == step].max()) for step in steps.unique()}
        self._say("replay: largest |d log_prob| " + "  ".join(f"step {s}: {d:.1e}" for s, d in largest.items()))
        update = self.config.update
        worst = float(difference.max())
        if not worst <= update.replay_tolerance * update.clip_range:
            raise UserError(
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
        saved = checkpoints.saved(self.folder)
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
            "weights": checkpoints.saved(self.folder)[-1],
        }
        if "tensorboard" in self.config.trackers:
            paths["curves"] = f"tensorboard --logdir {self.folder / TRACKER}"
        before, after = (self._image(row["step"]) for row in (evaluated[0], evaluated[-1]))
        if before.is_file() and after.is_file():
            paths["images"] = self.folder / "before_after.png"
            side_by_side(before, after, [prompts[i].text for i in spread_over_tags(prompts, SHOWN)]).save(
                paths["images"]
            )
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
            file.write(files.lines([row]))
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
