"""The log of a run: printed lines, metrics.jsonl, trackers, images, summary."""

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.config import Config, save
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.guard import GUARD
from fastflowgrpo.evaluation.pictures import draw_curve, image_grid, side_by_side
from fastflowgrpo.evaluation.shown import shown_prompts
from fastflowgrpo.evaluation.summary import Evaluation
from fastflowgrpo.evaluation.tables import before_after_table
from fastflowgrpo.planning.plan import Plan
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.results import finite, versions
from fastflowgrpo.runs.checkpoints import (
    Checkpoint,
    checkpoint_step,
    list_checkpoints,
    remove_remains,
    set_aside_later,
)
from fastflowgrpo.runs.files import (
    BEFORE_AFTER,
    CHECKPOINTS,
    CONFIG,
    CURVE,
    GALLERY,
    IMAGES,
    METRICS,
    SUMMARY,
    TRACKER,
    WRITTEN,
    atomic_write,
    json_lines,
    writing,
)
from fastflowgrpo.runs.gallery import cut_back
from fastflowgrpo.runs.guard import best_step
from fastflowgrpo.runs.lock import RunLock
from fastflowgrpo.runs.state import RunState


class Report:
    """Logs a run. Every rank keeps the rows; only the main one writes and prints.

    Args:
        config: of the run.
        accelerator: with the trackers.
        state: whose rows are written.
        lock: on the run's folder.
    """

    def __init__(self, config: Config, accelerator: Accelerator, state: RunState, lock: RunLock):
        self.config, self.accelerator, self.state, self.lock = config, accelerator, state, lock
        self.folder = Path(config.output_dir)
        self.main = accelerator.is_main_process
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds of each phase since the last epoch was logged."""
        self.failure: UserError | None = None

    def start(self, plan: Plan, num_parameters: int, resumed: Checkpoint | None = None) -> None:
        """Print what is trained, and make the run directory or set it back to the checkpoint that is resumed.

        Args:
            plan: the batches, which are printed.
            num_parameters: trained ones.
            resumed: the checkpoint that `state` was loaded from.
        """
        if not self.main:
            return
        where = f", {plan.processes} processes" if plan.processes > 1 else ""
        device = self.accelerator.device
        print(f"{self.config.model}: {num_parameters / 1e6:.2f} M trained parameters on {device}{where}")
        print(*plan.summary_lines(), sep="\n")
        trackers: dict[str, dict[str, Any]] = {"wandb": {"id": self.state.run_id, "resume": "allow"}}
        if resumed is None:
            self._remove_old_run()
        else:
            trackers["tensorboard"] = {"purge_step": resumed.step + 1}
            self._set_back(resumed)
        self._write_config()
        with writing(self.folder / IMAGES):
            (self.folder / IMAGES).mkdir(exist_ok=True)
        self.accelerator.init_trackers(TRACKER, init_kwargs=trackers)

    @contextmanager
    def phase(self, name: str, batch: int | None = None) -> Iterator[None]:
        """Add the time spent inside to the phase's seconds; an error gets the attribute `phase`, its name.

        Args:
            name: of the phase.
            batch: its number, from 0, where each batch enters the phase anew.
        """
        self.state.processes.note(name if batch is None else f"{name}, batch {batch + 1}")
        begin = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.phase = name  # type: ignore[attr-defined]
            raise
        if self.accelerator.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # decoding and rewards go on behind it, on their own streams
        self.seconds[name] += time.perf_counter() - begin

    def compiled(self, seconds: float) -> None:
        """Print how long compiling took."""
        self._print(f"compiled the transformer's blocks in {seconds:.1f} s; no epoch's time has it")

    def replay(self, steps: Tensor, difference: Tensor) -> None:
        """Print the replay's largest log-prob difference of each step; steps, difference: (N,)."""
        largest = {int(step): float(difference[steps == step].max()) for step in steps.unique()}
        self._print("replay: largest |d log_prob| " + "  ".join(f"step {s}: {d:.1e}" for s, d in largest.items()))

    def epoch(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Log an epoch: one line, one row."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        seconds.pop("evaluate", None)
        images_per_s = metrics["images"] / sum(seconds.values())
        self._log({"epoch": epoch, "step": step, **metrics, "images_per_s": images_per_s, "seconds": seconds})
        parts = [
            f"epoch {epoch + 1:>{len(str(self.config.epochs))}}/{self.config.epochs}",
            f"reward {metrics['reward']:.3f}",
        ]
        if "geneval/strict" in metrics:
            parts.append(f"accuracy {metrics['geneval/strict']:.3f}")
        if metrics["missing"]:
            parts.append(f"missing {metrics['missing']}")
        if "candidates/rank_correlation" in metrics:
            parts.append(f"rank correlation {metrics['candidates/rank_correlation']:.2f}")
        if "ratio" in metrics:
            parts.append(f"ratio 1{metrics['ratio_min'] - 1:+.1e}..{metrics['ratio_max'] - 1:+.1e}")
            parts.append(f"clipped {metrics['clipped_above'] + metrics['clipped_below']:.0%}")
        if "stale_pairs" in metrics:
            parts.append(f"stale {metrics['stale_pairs']:.0%}")
        if "kl" in metrics:
            parts.append(f"kl {metrics['kl']:.1e}")
        parts.append(f"{images_per_s:.0f} images/s")
        parts.append(" ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value >= 0.005) + " s")
        self._print("  ".join(parts))

    def evaluated(self, evaluation: Evaluation, step: int) -> None:
        """Log an evaluation: one line, one row, a grid of images."""
        if self.main:
            with self._remembering(self._grid_path(step)):
                image_grid([evaluation.shown]).save(self._grid_path(step))
        self._log({"step": step, "eval": evaluation.row()})
        tags = "  ".join(f"{tag} {value:.3f}" for tag, value in evaluation.tags.items())
        guard = f"guard {evaluation.scores[GUARD]:.3f}  " if GUARD in evaluation.scores else ""
        missing = f"missing {evaluation.missing}" if evaluation.missing else ""
        self._print(f"evaluation at step {step}: overall {evaluation.overall:.3f}  {tags}  {guard}{missing}".rstrip())

    def warn(self, text: str) -> None:
        """Print a warning."""
        if self.main:
            print(f"warning: {text}", file=sys.stderr)

    def check(self) -> None:
        """Check that all could be written so far, and may be; here, where all ranks can hear of it.

        Raises:
            UserError: something could not be written, or another run has taken the folder.
        """
        if self.failure:
            raise self.failure
        self.lock.confirm()

    def stopped(self) -> None:
        """Print where a run that does not reach its end can be resumed, and close the trackers."""
        if not self.main:
            return
        checkpoints = list_checkpoints(self.folder)
        if checkpoints:
            if not (self.folder / CONFIG).exists():  # the folder was removed, and made again for the checkpoint
                self._write_config()
            command = f"python -m fastflowgrpo.train --config {self.folder / CONFIG} --resume latest"
            print(f"the last checkpoint is {checkpoints[-1]}; to go on: {command}", file=sys.stderr)
        else:
            print("no epoch was finished: there is no checkpoint", file=sys.stderr)
        for tracker in self.accelerator.trackers:  # not end_training, which may wait for a process that has failed
            tracker.finish()

    def finish(self, prompts: list[Prompt]) -> None:
        """Write the summary and the pictures of the evaluation prompts, and print the closing table."""
        if not self.main:
            self.accelerator.end_training()
            return
        wall = self.state.wall_s
        trained = [row for row in self.state.rows if "epoch" in row]
        evaluated = [row for row in self.state.rows if "eval" in row]
        images, seconds = sum(row["images"] for row in trained), sum(sum(row["seconds"].values()) for row in trained)
        first, last = evaluated[0]["eval"], evaluated[-1]["eval"]
        self._write_summary(wall, images / seconds, {"first": first, "last": last})
        self.accelerator.end_training()
        print(f"\n{images} images in {wall:.0f} s, {images / seconds:.0f} images/s while training")
        print(before_after_table(first, last))
        checkpoints = {checkpoint_step(path): path for path in list_checkpoints(self.folder)}
        paths: dict[str, Path | str] = {"metrics": self.folder / METRICS, "weights": checkpoints[max(checkpoints)]}
        best = best_step(self.state.rows, checkpoints)
        if best is not None:
            paths["best"] = checkpoints[best]
        if "tensorboard" in self.config.trackers:
            paths["curves"] = f"tensorboard --logdir {self.folder / TRACKER}"
        before, after = (self._grid_path(row["step"]) for row in (evaluated[0], evaluated[-1]))
        if before.is_file() and after.is_file():
            paths["images"] = self.folder / BEFORE_AFTER
            shown = [prompts[i].text for i in shown_prompts(prompts)]
            with writing(self.folder / BEFORE_AFTER):
                side_by_side(before, after, shown).save(self.folder / BEFORE_AFTER)
        with writing(self.folder / CURVE):
            paths["curve"] = draw_curve(trained, evaluated, self.folder / CURVE)
        if (self.folder / GALLERY).is_dir():
            paths["view"] = f"python -m fastflowgrpo.view {self.folder}"
        for name, path in paths.items():
            print(f"{name:8} {path}")

    def _write_summary(self, wall_s: float, images_per_s: float, evaluations: dict[str, Any]) -> None:
        summary: dict[str, Any] = {
            "wall_s": wall_s,
            "images_per_s": images_per_s,
            "seed": self.config.seed,
            "versions": versions(),
            "eval": evaluations,
        }
        if self.accelerator.device.type == "cuda":
            summary["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            summary["gpu"] = torch.cuda.get_device_name()
        with writing(self.folder / SUMMARY):
            (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _write_config(self) -> None:
        with writing(self.folder / CONFIG), atomic_write(self.folder / CONFIG) as path:
            save(self.config, path)

    def _remove_old_run(self) -> None:
        for path in (self.folder / name for name in WRITTEN):
            with writing(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _set_back(self, resumed: Checkpoint) -> None:
        """Take back what was written after the checkpoint, and print where the run goes on."""
        print(f"goes on from {resumed.folder}: epoch {resumed.epoch} of {self.config.epochs}")
        for name, (old, new) in resumed.changed.items():
            print(f"  {name} was {old}, is now {new}")
        for path in set_aside_later(resumed):
            print(f"  a later checkpoint is now {path}")
        with writing(self.folder / CHECKPOINTS):
            remove_remains(self.folder)
        with writing(self.folder / METRICS), atomic_write(self.folder / METRICS) as path:
            path.write_text(json_lines(self.state.rows))
        with writing(self.folder / GALLERY):
            cut_back(self.folder, self.state.rows)

    def _print(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def _grid_path(self, step: int) -> Path:
        return self.folder / IMAGES / f"step-{step:06d}.png"

    @contextmanager
    def _remembering(self, path: Path) -> Iterator[None]:
        """Inside it `path` is written; if that fails, `check` raises the error."""
        try:
            with writing(path):
                yield
        except UserError as error:
            self.failure = self.failure or error

    def _log(self, row: dict[str, Any]) -> None:
        row = finite({**row, "wall_s": round(self.state.wall_s, 3)})
        self.state.rows.append(row)
        if not self.main:
            return
        with self._remembering(self.folder / METRICS), (self.folder / METRICS).open("a") as file:
            file.write(json_lines([row]))
        with self._remembering(self.folder / TRACKER):
            self.accelerator.log(dict(_flat(row)), step=row["step"])


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None and name not in ("epoch", "step"):
            yield prefix + name, value
