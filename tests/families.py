"""Train the tiny pipeline of every family through the command, in one process and in two.

    python tests/families.py [NAME ...]

Each family trains a LoRA for two epochs of two groups. Two processes (torchrun, gloo) must log the figures of one and
save its LoRA, up to rounding, and the LoRA, loaded into the family's unmodified pipeline, must draw the images of the
run's last evaluation. A row is printed for each family, and the exit code is 1 if one of them failed. A family takes
half a minute on one core.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from support.families import EDITING, GENERATING, assert_same_images, load_loras, pipeline_images
from support.tiny_run import command, rows

from fastflowgrpo import load_policy
from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy.weights import LORA, LORA_2
from fastflowgrpo.prompts import load_prompts
from fastflowgrpo.results import versions
from fastflowgrpo.runs.report import Report
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.train import main as train

FAMILIES = GENERATING | EDITING
TRAIN = "train"  # instead of names: one process of a run, with its arguments
STEPS, IMAGES = 2, 2  # of the evaluation: denoising steps, images per prompt
TOLERANCE = 1e-4  # of figures and weights, relative to the figure and to the largest weight


def arguments_of(family, model, run):
    """A run of two groups an epoch and one trained step. One process too samples and trains the groups one after the
    other: two have the same batches, and add the same two gradients."""
    own = {f"rollout.{name}": value for name, value in family.size.items()}
    if family.length is not None:
        own["policy.max_sequence_length"] = family.length
    settings = {
        "policy.max_sequence_length": "null",
        "prompts.train": family.prompts(model),
        "rollout.batch_size": 4,
        "rollout.guidance_scale": 3,
        "rollout.window_size": 1,
        "rollout.window_start": "[0,3]",
        "update.batch_size": 4,
        "update.per_epoch": 1,
        "update.ema_every": 1,
        "evaluation.guidance_scale": 1,
        "evaluation.num_steps": STEPS,
        "evaluation.images_per_prompt": IMAGES,
        "evaluation.batch_size": IMAGES,
        "reward_frames": 1,
    }
    return command(model, run, **settings | own)


def train_alone(arguments):
    """The command in this process; the images of its last evaluation."""
    shown = []
    evaluated = Report.evaluated

    def note(self, evaluation, step):
        shown.append(evaluation.shown.images.flatten(0, 1))
        evaluated(self, evaluation, step)

    with patch.object(Report, "evaluated", note):
        assert train(arguments) == 0
    return shown[-1]


def train_in_two(arguments, log):
    """The command in two processes. They run this file, which brings the stand-in for Qwen's processor."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        process = [*torchrun, __file__, TRAIN, *arguments]
        subprocess.run(process, env=environment, stdout=file, stderr=file, check=True)


def largest_difference(one, two):
    """The largest relative difference of what two runs logged and saved; 0 if all bits are equal."""
    found = [0.0]

    def compare(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, float) and a != b and not (math.isnan(a) and math.isnan(b)):
            found.append(abs(a - b) / max(abs(a), abs(b)))
        else:
            assert isinstance(a, float) or a == b, (a, b)

    for a, b in zip(rows(one), rows(two), strict=True):
        compare(a, b)
    for file in (*one.glob(f"checkpoints/*/{LORA}"), *one.glob(f"checkpoints/*/{LORA_2}")):
        weights, others = load_file(file), load_file(two / file.relative_to(one))
        assert weights.keys() == others.keys()
        assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
        for name, tensor in weights.items():
            found.append(((tensor - others[name]).abs().max() / tensor.abs().max().clamp(min=1e-8)).item())
    return max(found)


def check_images(family, model, run, images):
    """Raise AssertionError unless the run's LoRA draws its images in a fresh pipeline."""
    (saved,) = run.glob("checkpoints/*")
    pipe = DiffusionPipeline.from_pretrained(model)
    load_loras(pipe, saved)
    policy, prompts = load_policy(str(model), PolicyConfig(lora_rank=1)), load_prompts(str(family.prompts(model)))
    shape = policy.latent_shape(**family.size)
    noise = philox_normal(sample_seeds(range(len(prompts)), IMAGES), 0, (IMAGES * len(prompts), *shape))
    repeated = [prompt for prompt in prompts for _ in range(IMAGES)]
    expected = pipeline_images(pipe, family, noise, repeated, STEPS, 1.0)
    assert_same_images(images, expected[:, expected.shape[1] // 2] if policy.makes_videos else expected)


def check(name, folder):
    """Train a family in one process and in two; the largest difference of the two."""
    family, model, log = FAMILIES[name], folder / name, folder / f"{name}.log"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        family.save(model, ["a cat", "two dogs"])
        images = train_alone(arguments_of(family, model, folder / "one"))
        train_in_two(arguments_of(family, model, folder / "two"), log)
        check_images(family, model, folder / "one", images)
        difference = largest_difference(folder / "one", folder / "two")
    assert difference <= TOLERANCE, f"one process and two differ by {difference:.1g}"
    return difference


def main():
    """Check the families that the command line names, by default all."""
    if sys.argv[1:2] == [TRAIN]:
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(FAMILIES)}")
    names, failed = parser.parse_args().names or FAMILIES, False
    torch.set_num_threads(1)
    print("| | one process and two | the LoRA in a fresh pipeline |\n|-|-|-|", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                difference = check(name, Path(folder))
                result = f"{f'differ by {difference:.0e}' if difference else 'equal bits'} | the run's images |"
            except (AssertionError, subprocess.CalledProcessError) as error:
                failed = True
                log = Path(folder, f"{name}.log").read_text()
                result = f"failed | {' '.join(str(error).split())[:200]} |\n{log}"
        print(f"| {name} | {result}", flush=True)
    print(", ".join(f"{package} {number}" for package, number in versions().items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
