"""Measure the GPU memory of epochs against the estimate of `--dry_run`: `python -m benchmarks.memory`.

Settings are those of `fastflowgrpo.train`. It prints the peak and the seconds of each epoch's rollout and update, and
the range of the ratio. At SD3.5-M's size, with random weights:

    python -m benchmarks.random_sd35 FOLDER
    python -m benchmarks.memory --config configs/sd35_ocr_24gb.yaml --config benchmarks/sd35_medium.yaml --model FOLDER
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastflowgrpo.config import Config, parse
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.results import versions
from fastflowgrpo.trainer import Trainer


def peak(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what `work` returns, with its seconds and its peak memory in GB."""
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, {"seconds": time.perf_counter() - begin, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def epochs(config: Config, count: int) -> list[dict[str, Any]]:
    """Run epochs of a new trainer and measure them."""
    rows = []
    with TemporaryDirectory() as folder:
        config.output_dir = folder + "/run"
        trainer = Trainer(config)
        for epoch in range(count):
            (batch, _), rollout = peak(partial(trainer.collect, epoch))
            metrics, update = peak(partial(trainer.learner.update, batch))
            ratio = {name: metrics[name] for name in ("ratio_min", "ratio_max") if name in metrics}
            rows.append({"rollout": rollout, "update": update, **ratio})
        trainer.accelerator.end_training()
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=3, help="epochs")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments, settings = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    config = parse(settings)
    config.trackers = []
    expected = estimate(config).total_memory(config.policy.gradient_checkpointing) / 1e9
    rows = epochs(config, arguments.repeats)
    most = max(row[phase]["peak_gb"] for row in rows for phase in ("rollout", "update"))
    print(f"{torch.cuda.get_device_name()}: {most:.2f} GB at most, estimated {expected:.2f} GB")
    for row in rows:
        for name in ("rollout", "update"):
            print(f"  {name} {row[name]['seconds']:.2f} s, {row[name]['peak_gb']:.2f} GB")
        print("  ratio", *(f"{row[name]:.6g}" for name in row if name.startswith("ratio")))
    if arguments.output:
        result = {
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "settings": settings,
            "estimated_gb": expected,
            "measured_gb": most,
            "epochs": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
