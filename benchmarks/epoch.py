"""One epoch of ours against a plain eager loop: `python -m benchmarks.epoch [--SETTING VALUE ...]`.

The eager loop does what the existing Flow-GRPO code bases do: it encodes the prompt of every image, looks the timestep
up and computes the SDE step in several passes, runs both halves of the guidance batch through the backward pass, trains
one step of one rollout batch at a time with a reference pass for each, and reads each loss. Both sample the same noise,
so that their gradients can be compared: in float32 they differ by rounding, in bfloat16 by what a batch of another size
rounds differently on the way to the images and their rewards. `lean` is ours with the settings that leave out passes:
in the paper's recipe the gradient differs by the share of the KL, in the window's the images are others. With
--policy.compile true, `compiled` is ours too, and the other loops run without the compiler.

Settings are those of `fastflowgrpo.train`, by default for the bundled model. At SD3.5-M's size, with random weights:

    python -m benchmarks.random_sd35 FOLDER
    python -m benchmarks.epoch --config configs/sd35_ocr.yaml --config benchmarks/sd35_medium.yaml --model FOLDER
"""

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from fastflowgrpo.config import Config, parse
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.learning.advantages import group_advantages
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.results import PACKAGES
from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.sampling.rollout import sample_seeds
from fastflowgrpo.trainer import Trainer, group_seed

# What each recipe sets in the rollout and in the update: the paper's, and the window without guidance or KL.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({"window_size": None, "guidance_scale": 4.5}, {"kl": "flow_grpo", "kl_weight": 0.04}),
    "window": ({"window_size": 3, "window_start": (2, 3), "guidance_scale": 1.0}, {"kl_weight": 0.0}),
}
# What `lean` sets besides.
LEAN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({"keep_unconditional": True}, {"kl_share": 0.25}),
    "window": ({"same_noise": True, "tail_steps": 3, "solver": "dpm_solver"}, {}),
}


class EagerEpoch:
    """The plain loop, over the trainer's own model, prompts and rewards."""

    def __init__(self, trainer: Trainer):
        assert isinstance(trainer.policy, SD3Policy)
        self.trainer, self.config, self.policy = trainer, trainer.config, trainer.policy
        self.pipeline, self.module = trainer.policy.pipeline, trainer.policy.module
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - begin

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        guided = self.config.rollout.guidance_scale != 1
        with torch.no_grad():
            embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=guided, max_sequence_length=self.policy.sequence_length
            )
        if guided:
            return torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        return embeds, pooled

    def velocity(self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        guidance = self.config.rollout.guidance_scale
        if guidance != 1:
            latents, timestep = torch.cat([latents] * 2), torch.cat([timestep] * 2)
        velocity = self.module(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        if guidance != 1:
            uncond, cond = velocity.chunk(2)
            velocity = uncond.detach() + guidance * (cond - uncond.detach())
        return velocity

    def step(
        self, velocity: Tensor, sample: Tensor, timestep: Tensor, noise: Tensor | None, prev_sample: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flow-GRPO's SDE step in eager passes: the next sample, its log-prob, mean and diffusion. Without noise or a
        next sample it is an ODE step."""
        scheduler = self.pipeline.scheduler
        index = [scheduler.index_for_timestep(t) for t in timestep]
        shape = (-1, *[1] * (sample.ndim - 1))
        sigmas = scheduler.sigmas.to(sample.device)
        sigma = sigmas[index].view(shape)
        dt = sigmas[[i + 1 for i in index]].view(shape) - sigma
        sample = sample.float()
        if noise is None and prev_sample is None:
            mean = sample + dt * velocity
            return mean.to(self.policy.dtype), torch.zeros(len(sample)), mean, torch.zeros_like(sigma)
        largest = sigmas[1].item()
        std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, largest, sigma))) * self.config.rollout.noise_level
        drift = 1 + std**2 / (2 * sigma) * dt
        mean = sample * drift + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        deviation = std * torch.sqrt(-dt)
        if noise is not None:
            prev_sample = (mean + deviation * noise).to(self.policy.dtype)
        assert prev_sample is not None
        log_prob = (
            -((prev_sample.detach().float() - mean) ** 2) / (2 * deviation**2)
            - torch.log(deviation)
            - math.log(math.sqrt(2 * math.pi))
        )
        return prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim))), mean, std

    def run(self, epoch: int = 0) -> dict[str, float]:
        """Sample, score and leave the gradients of one update on the parameters; the seconds of each phase."""
        trainer, config = self.trainer, self.config
        self.seconds.clear()
        rollout, size, device = config.rollout, config.rollout.group_size, trainer.policy.device
        prompts = trainer.epoch_prompts(epoch)
        groups_at_once = rollout.batch_size // size
        start = rollout.window_start[0] if rollout.window_size else 0
        window = range(start, start + trainer.sampler.window_size)
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(rollout.num_steps, device=device)
        batches, rewards = [], []
        for begin in range(0, len(prompts), groups_at_once):
            chosen = [p for p in prompts[begin : begin + groups_at_once] for _ in range(size)]
            with self.phase("encode"):
                embeds, pooled = self.encode([prompt.text for prompt in chosen])
            with self.phase("rollout"), torch.no_grad():
                seeds = [group_seed(config.seed, epoch, begin + i) for i in range(len(chosen) // size)]
                noise = partial(
                    philox_normal, sample_seeds(seeds, size).to(device), shape=(len(chosen), *trainer.shape)
                )
                latents = noise(offset=0).to(trainer.policy.dtype)
                samples, next_samples, log_probs = [], [], []
                for i, t in enumerate(scheduler.timesteps):
                    timestep = t.expand(len(latents))
                    velocity = self.velocity(latents, timestep, embeds, pooled)
                    drawn = noise(offset=i + 1) if i in window else None
                    next_latents, log_prob, _, _ = self.step(velocity, latents, timestep, drawn, None)
                    if i in window:
                        samples.append(latents)
                        next_samples.append(next_latents)
                        log_probs.append(log_prob)
                    latents = next_latents
            with self.phase("decode"), torch.no_grad():
                vae = self.pipeline.vae
                scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
                parts = scaled.to(vae.dtype).split(config.policy.decode_batch_size)
                decoded = torch.cat([vae.decode(part).sample for part in parts])
                images = (decoded.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
            with self.phase("score"):
                rewards.append(
                    trainer.rewards(
                        RewardBatch(
                            images,
                            [prompt.text for prompt in chosen],
                            [prompt.metadata for prompt in chosen],
                            torch.arange(len(seeds)).repeat_interleave(size),
                        )
                    ).values
                )
            batches.append((embeds, pooled, samples, next_samples, log_probs))
        with self.phase("update"):
            ids = torch.arange(len(prompts)).repeat_interleave(size)
            advantages = group_advantages(torch.cat(rewards), ids, config.advantage.std).to(device, torch.float32)
            kept = [advantage.nonzero()[:, 0] for advantage in advantages.split(rollout.batch_size)]
            pairs = sum(len(rows) for rows in kept) * trainer.sampler.window_size
            limit = config.update.clip_range
            for number, (embeds, pooled, samples, next_samples, log_probs) in enumerate(batches):
                rows = kept[number]
                halves = torch.cat([rows, rows + len(samples[0])]) if len(embeds) > len(samples[0]) else rows
                advantage = advantages.split(rollout.batch_size)[number][rows]
                advantage = advantage.clamp(-config.advantage.clip, config.advantage.clip)
                for j, i in enumerate(window):
                    timestep = scheduler.timesteps[i].expand(len(rows))
                    sample = samples[j][rows]
                    condition = (timestep, embeds[halves], pooled[halves])
                    velocity = self.velocity(sample, *condition)
                    _, log_prob, mean, std = self.step(velocity, sample, timestep, None, next_samples[j][rows])
                    ratio = torch.exp(log_prob - log_probs[j][rows])
                    clipped = torch.clamp(ratio, 1 - limit, 1 + limit)
                    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
                    if config.update.kl_weight:
                        with torch.no_grad():
                            self.module.disable_adapters()
                            reference = self.velocity(sample, *condition)
                            self.module.enable_adapters()
                            _, _, mean_ref, _ = self.step(reference, sample, timestep, None, next_samples[j][rows])
                        kl = ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)
                        loss = loss + config.update.kl_weight * kl
                    loss = loss.sum() / pairs
                    loss.backward()
                    loss.item()
        return dict(self.seconds)


def run_ours(trainer: Trainer, epoch: int) -> dict[str, float]:
    """The trainer's own epoch, less the optimiser's step; the seconds of each phase."""
    trainer.embed.rows.clear()
    trainer.report.seconds.clear()
    batch, _ = trainer.collect(epoch)
    with trainer.report.phase("update"):
        trainer.learner.accumulate(batch, trainer.objective.micro_batches(batch, 0, len(batch.advantages)))
    return dict(trainer.report.seconds)


def run_lean(trainer: Trainer, recipe: str, epoch: int) -> dict[str, float]:
    """`run_ours` with the settings of `LEAN`."""
    changes = zip((trainer.config.rollout, trainer.config.update), LEAN[recipe], strict=True)
    with ExitStack() as stack:
        for settings, values in changes:
            for name, value in values.items():
                stack.enter_context(patch.object(settings, name, value))
        return run_ours(trainer, epoch)


def uncompiled(trainer: Trainer, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` without the compiler, for a trainer with or without `policy.compile`."""

    def inner(*arguments: Any) -> Any:
        with torch.compiler.set_stance("force_eager"), patch.object(trainer.config.policy, "compile", False):
            return run(*arguments)

    return inner


def gradients(trainer: Trainer) -> Tensor:
    flat = torch.cat([p.grad.flatten().cpu() for p in trainer.learner.parameters if p.grad is not None])
    trainer.learner.optimizer.zero_grad()
    assert flat.norm() > 0
    return flat


def transformer_flops(trainer: Trainer) -> dict[str, int]:
    """FLOPs of one sample's pass, counted: of the forward alone, and of forward and backward through the adapter."""
    policy = trainer.policy
    assert isinstance(policy, SD3Policy)
    condition = policy.encode([""])
    latents = torch.zeros(1, *trainer.shape, dtype=policy.dtype, device=policy.device)
    sigma = torch.ones(1, device=policy.device)
    flops = {}
    # Attention as plain products: these are counted on every device.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            policy.velocity(latents, sigma, condition)
        flops["forward"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            policy.velocity(latents, sigma, condition).sum().backward()
        flops["forward_backward"] = counter.get_total_flops()
    trainer.learner.optimizer.zero_grad()
    return flops


@contextmanager
def count_passes(module: torch.nn.Module) -> Iterator[Counter[str]]:
    """Counts the samples that pass through the transformer, with and without a backward pass to come."""
    passes: Counter[str] = Counter()

    def count(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        passes["forward_backward" if torch.is_grad_enabled() else "forward"] += len(arguments["hidden_states"])

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    yield passes
    handle.remove()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random matrices in the model's dtype: what the device can give."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange(min_run_time=0.5).median / 1e12


def measure(recipe: str, config: Config, repeats: int) -> dict[str, Any]:
    """The loops on a recipe: medians over `repeats` epochs of each, alternating, after one of each to warm up."""
    gc.collect()  # the model of the recipe before, which the trainer's cycles keep
    rollout, update = RECIPES[recipe]
    config = replace(config, rollout=replace(config.rollout, **rollout), update=replace(config.update, **update))
    with TemporaryDirectory() as folder:
        config.output_dir = folder + "/run"
        trainer = Trainer(config)
        assert isinstance(trainer.policy, SD3Policy)
        # An adapter that does something, so that KL, ratio and gradients are those of a run under way.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.learner.parameters:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        flops = uncompiled(trainer, transformer_flops)(trainer)
        on_gpu = trainer.policy.device.type == "cuda"
        loops: dict[str, Callable[[int], dict[str, float]]] = {
            "ours": partial(run_ours, trainer),
            "lean": partial(run_lean, trainer, recipe),
            "eager": EagerEpoch(trainer).run,
        }
        loops = {name: uncompiled(trainer, run) for name, run in loops.items()}
        if config.policy.compile:
            loops["compiled"] = partial(run_ours, trainer)
        seconds: dict[str, list[float]] = defaultdict(list)
        phases: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in loops}
        results: dict[str, dict[str, Any]] = {name: {} for name in loops}
        other_images = ["eager"] if recipe == "paper" else ["eager", "lean"]
        differences = {name: 0.0 for name in loops if name not in other_images}
        for repeat in range(repeats + 1):
            found = {}
            for name, loop in loops.items():
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                with count_passes(trainer.policy.module) as passes:
                    begin = time.perf_counter()
                    parts = loop(repeat)
                    total = time.perf_counter() - begin
                # Compiled, the rollout runs with gradients too, so that its passes cannot be told apart; they are ours.
                results[name]["passes"] = results["ours"]["passes"] if name == "compiled" else dict(passes)
                if on_gpu:
                    results[name]["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
                found[name] = gradients(trainer)
                if repeat:
                    seconds[name].append(total)
                    for part, value in parts.items():
                        phases[name][part].append(value)
            for name, largest in differences.items():
                difference = float((found[name] - found["eager"]).norm() / found["eager"].norm())
                differences[name] = max(largest, difference)
        trainer.accelerator.end_training()
    images = config.prompts.per_epoch * config.rollout.group_size
    for name, result in results.items():
        result["speedup"] = statistics.median(e / o for e, o in zip(seconds["eager"], seconds[name], strict=True))
        result["images_per_s"] = images / statistics.median(seconds[name])
        result["seconds"] = {part: statistics.median(values) for part, values in phases[name].items()}
        done = sum(count * flops[kind] for kind, count in result["passes"].items())
        result["tflop_per_s"] = done / (result["seconds"]["rollout"] + result["seconds"]["update"]) / 1e12
    return {
        "recipe": recipe,
        "images": images,
        "flops_per_pass": flops,
        "loops": results,
        "speedup": results["ours"]["speedup"],
        "relative_gradient_difference": differences["ours"],
        "lean_gradient_difference": differences.get("lean"),
        "compiled_gradient_difference": differences.get("compiled"),
        "config": asdict(config) | {"output_dir": None},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured epochs of each, alternating")
    parser.add_argument("--output", type=Path, help="write the result as JSON, after each recipe")
    arguments, settings = parser.parse_known_args(argv)
    config = parse(["--policy.lora_rank=32", "--update.per_epoch=1", *settings])
    config.trackers = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rate = matrix_rate(device, getattr(torch, config.policy.dtype))
    result: dict[str, Any] = {
        "device": name,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "model": config.model,
        "dtype": config.policy.dtype,
        "matrix_tflop_per_s": rate,
        "recipes": [],
    }
    print(f"{name}, torch {torch.__version__}, {config.policy.dtype} products at {rate:.3g} TFLOP/s")
    for recipe in RECIPES:
        row = measure(recipe, config, arguments.repeats)
        result["recipes"].append(row)
        print(f"\n{recipe}: {row['speedup']:.2f}x, gradients differ by {row['relative_gradient_difference']:.1e}")
        lean = f"  lean: {row['loops']['lean']['speedup']:.2f}x"
        if row["lean_gradient_difference"] is not None:
            lean += f", gradients differ by {row['lean_gradient_difference']:.1e}, which is the share of the KL"
        print(lean)
        if "compiled" in row["loops"]:
            speedup, difference = row["loops"]["compiled"]["speedup"], row["compiled_gradient_difference"]
            print(f"  compiled: {speedup:.2f}x, gradients differ by {difference:.1e}")
        each = {kind: f"{count / 1e9:.4g}" for kind, count in row["flops_per_pass"].items()}
        print(f"  GFLOP of a sample's pass: forward {each['forward']}, forward and backward {each['forward_backward']}")
        for loop, of in row["loops"].items():
            line = "  ".join(f"{part} {value:.2f} s" for part, value in of["seconds"].items())
            print(f"  {loop:6} {of['images_per_s']:6.3g} images/s   {line}")
            passes = of["passes"]
            line = f"{passes['forward']} forward passes and {passes['forward_backward']} with backward"
            line += f" at {of['tflop_per_s']:.3g} TFLOP/s ({of['tflop_per_s'] / rate:.0%})"
            print(f"         {line}" + (f", peak {of['peak_mb']:.0f} MB" if "peak_mb" in of else ""))
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
