"""Run directories with checkpoints, made without training, requests to a demo, and its command."""

import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.pipelines import perturb

from fastflowgrpo.config import Config, save
from fastflowgrpo.demonstration.generation import Request
from fastflowgrpo.policy import load_policy

PROMPT = "a photo of a red circle and a blue square"
SHAPES = {"geneval": {"weight": 1.0, "strict": 0.6}, "jpeg_compressibility": 1.0}


def save_run(folder: Path, config: Config, steps: tuple[int, ...]) -> Path:
    """Write the config and a checkpoint for each step, whose weights differ from the model's and from each other."""
    folder.mkdir()
    save(config, folder / "config.yaml")
    policy = load_policy(config.model, config.policy)
    for step in steps:
        perturb(policy.trainable_parameters(), seed=step)
        policy.save(folder / f"checkpoints/checkpoint-{step}")
    return folder


def request(**changes: Any) -> Request:
    """A small request; `changes` by the names of its fields."""
    values: dict[str, Any] = {
        "prompt": PROMPT,
        "seed": 0,
        "num_images": 3,
        "num_steps": 4,
        "guidance_scale": 1.0,
        "dynamics": "ode",
        "noise_level": 0.7,
        "rewards": [],
        "checkpoint": "checkpoint-10",
    }
    return Request(**values | changes)


def run_command(arguments: list[str], folder: Path) -> None:
    """`python -m fastflowgrpo.demo`, in a process forked for it.

    Args:
        arguments: its command line.
        folder: where it runs; has a folder `tmp` for temporary files, and a file `log` for what it prints.
    """
    os.chdir(folder)
    tempfile.tempdir = str(folder / "tmp")
    os.dup2(os.open("log", os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = ["fastflowgrpo.demo", *arguments]
    runpy.run_module("fastflowgrpo.demo", run_name="__main__")
