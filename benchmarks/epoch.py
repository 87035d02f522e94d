"""One epoch of ours against a plain eager loop: `python -m benchmarks.epoch`.

The eager loop does what the existing Flow-GRPO code bases do: it encodes the prompt of every image, looks the timestep
up and computes the SDE step in several passes, runs both halves of the guidance batch through the backward pass, trains
one step of one rollout batch at a time with a reference pass for each, and reads each loss. Both sample the same noise,
so that their gradients can be compared.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastflowgrpo.advantages import group_advantages
from fastflowgrpo.config import Config, EvaluationConfig, RolloutConfig
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.rollout import sample_seeds
from fastflowgrpo.trainer import Trainer, group_seed

RECIPES = {
    "paper": RolloutConfig(window_size=None, guidance_scale=4.5),
    "window": RolloutConfig(window_size=3, window_start=(2, 3)),
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
    ) -> tuple[Tensor, Tensor]:
        """Flow-GRPO's SDE step in eager passes; a step without noise or next sample is an ODE step."""
        scheduler = self.pipeline.scheduler
        index = [scheduler.index_for_timestep(t) for t in timestep]
        shape = (-1, *[1] * (sample.ndim - 1))
        sigmas = scheduler.sigmas.to(sample.device)
        sigma = sigmas[index].view(shape)
        dt = sigmas[[i + 1 for i in index]].view(shape) - sigma
        sample = sample.float()
        if noise is None and prev_sample is None:
            return (sample + dt * velocity).to(self.policy.dtype), torch.zeros(len(sample))
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
        return prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))

    def run(self, epoch: int = 0) -> None:
        """Sample, score and leave the gradients of one update on the parameters."""
        trainer, config = self.trainer, self.config
        rollout, size, device = config.rollout, config.rollout.group_size, trainer.policy.device
        prompts = trainer.choose(epoch)
        groups_at_once = rollout.batch_size // size
        start = rollout.window_start[0] if rollout.window_size else 0
        window = range(start, start + trainer.window_size)
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(rollout.num_steps, device=device)
        batches, rewards = [], []
        for begin in range(0, len(prompts), groups_at_once):
            chosen = [p for p in prompts[begin : begin + groups_at_once] for _ in range(size)]
            with self.phase("rollout"), torch.no_grad():
                embeds, pooled = self.encode([prompt.text for prompt in chosen])
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
                    next_latents, log_prob = self.step(velocity, latents, timestep, drawn, None)
                    if i in window:
                        samples.append(latents)
                        next_samples.append(next_latents)
                        log_probs.append(log_prob)
                    latents = next_latents
            with self.phase("decode"), torch.no_grad():
                vae = self.pipeline.vae
                decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
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
            pairs = sum(len(rows) for rows in kept) * trainer.window_size
            limit = config.update.clip_range
            for number, (embeds, pooled, samples, next_samples, log_probs) in enumerate(batches):
                rows = kept[number]
                halves = torch.cat([rows, rows + len(samples[0])]) if len(embeds) > len(samples[0]) else rows
                advantage = advantages.split(rollout.batch_size)[number][rows]
                advantage = advantage.clamp(-config.advantage.clip, config.advantage.clip)
                for j, i in enumerate(window):
                    timestep = scheduler.timesteps[i].expand(len(rows))
                    sample = samples[j][rows]
                    velocity = self.velocity(sample, timestep, embeds[halves], pooled[halves])
                    with torch.no_grad():
                        self.module.disable_adapters()
                        reference = self.velocity(sample, timestep, embeds[halves], pooled[halves])
                        self.module.enable_adapters()
                    _, log_prob = self.step(velocity, sample, timestep, None, next_samples[j][rows])
                    ratio = torch.exp(log_prob - log_probs[j][rows])
                    clipped = torch.clamp(ratio, 1 - limit, 1 + limit)
                    policy_loss = torch.maximum(-advantage * ratio, -advantage * clipped)
                    kl = ((velocity - reference) ** 2).flatten(1).mean(1)
                    loss = (policy_loss + config.update.kl_weight * kl).sum() / pairs
                    loss.backward()
                    loss.item()


def gradients(trainer: Trainer) -> Tensor:
    flat = torch.cat([p.grad.flatten().cpu() for p in trainer.parameters if p.grad is not None])
    trainer.optimizer.zero_grad()
    assert flat.norm() > 0
    return flat


def measure(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config = Config(
        model=arguments.model,
        overwrite=True,
        trackers=[],
        rollout=RECIPES[recipe],
        evaluation=EvaluationConfig(images_per_prompt=1),
    )
    config.policy.lora_rank = 32
    config.update.kl_weight = 0.002  # the eager loop makes its reference pass in any case, so ours needs one too
    config.update.per_epoch = 1
    config.prompts.per_epoch = arguments.groups
    with TemporaryDirectory() as folder:
        config.output_dir = folder + "/run"
        trainer = Trainer(config)
        # An adapter that does something, so that KL, ratio and gradients are those of a run under way.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        eager = EagerEpoch(trainer)
        seconds: dict[str, list[float]] = {"ours": [], "eager": []}
        phases: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in seconds}
        difference = 0.0
        for repeat in range(arguments.repeats + 1):
            found = {}
            trainer.embed.rows.clear()
            trainer.report.seconds.clear()
            eager.seconds.clear()
            begin = time.perf_counter()
            batch, _ = trainer.collect(repeat)
            with trainer.report.phase("update"):
                trainer.accumulate(batch, trainer.pairs(batch, 0, len(batch.advantages)))
            found["ours"] = (time.perf_counter() - begin, dict(trainer.report.seconds))
            ours = gradients(trainer)
            begin = time.perf_counter()
            eager.run(repeat)
            found["eager"] = (time.perf_counter() - begin, dict(eager.seconds))
            plain = gradients(trainer)
            difference = max(difference, float((ours - plain).norm() / plain.norm()))
            if repeat:  # the first is the warm-up
                for name, (total, parts) in found.items():
                    seconds[name].append(total)
                    for part, value in parts.items():
                        phases[name][part].append(value)
        trainer.accelerator.end_training()
    images = arguments.groups * config.rollout.group_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "recipe": recipe,
        "images": images,
        "images_per_s": {name: images / value for name, value in medians.items()},
        "speedup": statistics.median(e / o for e, o in zip(seconds["eager"], seconds["ours"], strict=True)),
        "seconds": {name: {part: statistics.median(v) for part, v in parts.items()} for name, parts in phases.items()},
        "relative_gradient_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="pipeline folder or hub id")
    parser.add_argument("--groups", type=int, default=24, help="groups per epoch")
    parser.add_argument("--repeats", type=int, default=5, help="measured epochs of each, alternating")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "recipes": [measure(recipe, arguments) for recipe in RECIPES],
    }
    print(f"{device}, torch {torch.__version__}")
    for row in result["recipes"]:
        print(
            f"\n{row['recipe']}: {row['speedup']:.2f}x, gradients differ by {row['relative_gradient_difference']:.1e}"
        )
        for name, parts in row["seconds"].items():
            line = "  ".join(f"{part} {value:.2f} s" for part, value in parts.items())
            print(f"  {name:6} {row['images_per_s'][name]:6.0f} images/s   {line}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
