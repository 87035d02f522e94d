"""The Flow-GRPO loop (arXiv 2505.05470): rollout, score, normalise, update, report."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from fastflowgrpo.advantages import group_advantages
from fastflowgrpo.config import Config, ConfigError, validate
from fastflowgrpo.evaluation import sample_and_score
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.sde_step import guided_velocity
from fastflowgrpo.modelcard import check_push, push, write_card
from fastflowgrpo.policy import Conditioning, load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.trained import last_checkpoint
from fastflowgrpo.prompts import Prompt, epoch_prompts, load_prompts
from fastflowgrpo.reporting import Evaluation, Report, check_output, progress
from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.rewards.scoring import Scoring
from fastflowgrpo.rollout import Trajectory, expand_row, repeat_rows, sample_groups, window_starts
from fastflowgrpo.sde import resolve_log_prob, step_coefficients
from fastflowgrpo.shapes import scenes

# Without evaluation prompts of its own, a run shows what becomes of its first training prompts.
EVAL_PROMPTS = 16
# The paper trains GenEval with this mix of tags.
TAG_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


@dataclass
class Batch:
    """The groups of an epoch, or of one update of it: G groups of `group_size` samples, in order."""

    trajectory: Trajectory
    conditioning: Conditioning
    """A row per group."""
    advantages: Tensor
    """(B,): NaN where the score is missing."""


class Trainer:
    """Trains `config.model` as `config` says; `run` does all of it.

    Raises:
        ConfigError: for everything that the user can put right, before anything is sampled.
    """

    def __init__(self, config: Config):
        validate(config)
        check_output(config)
        set_seed(config.seed)
        if config.hub_model_id is not None:
            check_push(config.hub_model_id)
        self.config = config
        self.train_prompts, self.eval_prompts = training_prompts(config), evaluation_prompts(config)
        available = [tracker.value for tracker in get_available_trackers()]
        for tracker in config.trackers:
            if tracker not in available:
                raise ConfigError(
                    f'trackers: "{tracker}" is unknown or not installed; there are: {", ".join(available)}'
                )
        try:
            self.choose(0)
        except ValueError as error:
            raise ConfigError(f"prompts.{error}") from error
        try:
            self.rewards = build_rewards(config.rewards)
            self.rewards.check_prompts([*self.train_prompts, *self.eval_prompts])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        # Precision is the policy's: autocast around the trained forward pass alone would set the reference's apart.
        self.accelerator = Accelerator(
            mixed_precision="no", log_with=config.trackers or None, project_dir=config.output_dir
        )
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"training runs in one process so far, and this one is of {self.accelerator.num_processes}"
            )
        self.policy = load_policy(config.model, config.policy, self.accelerator.device)
        self.shape = self.policy.latent_shape(config.rollout.height, config.rollout.width)
        self.embed = EmbeddingCache(self.policy)
        self.scoring = Scoring(self.rewards, self.policy.decode, self.policy.device)
        update, rollout = config.update, config.rollout
        self.parameters = self.policy.trainable_parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=update.learning_rate, betas=update.betas, weight_decay=update.weight_decay
        )
        self.policy.transformer, self.optimizer = self.accelerator.prepare(self.policy.transformer, self.optimizer)
        self.ema = EMAModel(self.parameters, decay=update.ema_decay) if update.ema_decay else None
        self.coefficients = step_coefficients(
            self.policy.sigmas(rollout.num_steps), rollout.dynamics, rollout.noise_level
        )
        self.log_prob = resolve_log_prob(rollout.log_prob, rollout.dynamics)
        # The last step is sampled but never trained on.
        self.window_size = rollout.window_size or rollout.num_steps - 1
        self.window_start = rollout.window_start if rollout.window_size else (0, 1)
        self.step = 0
        self.report = Report(config, self.accelerator, sum(p.numel() for p in self.parameters))

    def run(self) -> None:
        """All epochs, with an evaluation before and after. However it ends, the weights of the last epoch are saved."""
        try:
            self._run()
        finally:
            if self.step:
                self.save()
        self.report.finish()
        self.publish()

    def _run(self) -> None:
        config = self.config
        self.evaluate()
        for epoch in range(config.epochs):
            batch, metrics = self.collect(epoch)
            if epoch == 0:
                self.check_replay(batch)
            with self.report.phase("update"):
                metrics |= self.update(batch)
            self.report.epoch(epoch, self.step, metrics)
            if epoch + 1 < config.epochs:
                if config.evaluation.every and (epoch + 1) % config.evaluation.every == 0:
                    self.evaluate()
                if config.save_every and (epoch + 1) % config.save_every == 0:
                    self.save()
        self.evaluate()

    def collect(self, epoch: int) -> tuple[Batch, dict[str, float]]:
        """Sample and score the groups of an epoch."""
        config, size = self.config, self.config.rollout.group_size
        chosen = self.choose(epoch)
        groups_at_once = config.rollout.batch_size // size
        seeds = [group_seed(config.seed, epoch, group) for group in range(len(chosen))]
        with self.report.phase("encode"):
            conditioning = self.embed([prompt.text for prompt in chosen])
            unconditional = self._unconditional(config.rollout.guidance_scale)
        parts: list[Trajectory] = []
        steps = config.rollout.num_steps * -(-len(chosen) // groups_at_once)
        with progress("rollout", steps) as sampling:
            for begin in range(0, len(chosen), groups_at_once):
                groups = slice(begin, begin + groups_at_once)
                with self.report.phase("rollout"):
                    part = sample_groups(
                        self.policy,
                        {name: tensor[groups] for name, tensor in conditioning.items()},
                        self.coefficients,
                        window_starts(*self.window_start, seeds[groups]),
                        self.window_size,
                        size,
                        seeds[groups],
                        self.shape,
                        unconditional=unconditional,
                        guidance_scale=config.rollout.guidance_scale,
                        same_noise=config.rollout.same_noise,
                        log_prob=self.log_prob,
                        on_step=sampling.update,
                    )
                with self.report.phase("decode"):
                    self.scoring.submit(part.final, chosen[groups], size)
                parts.append(part)
            with self.report.phase("score"):
                scores = self.scoring.finish(sampling.set_postfix_str)
        trajectory = Trajectory(
            *(torch.cat([getattr(part, name) for part in parts]) for name in Trajectory.__dataclass_fields__)
        )
        rewards, missing = scores.values, int(scores.values.isnan().sum())
        if missing == len(rewards) or missing > config.max_missing * len(rewards):
            raise RuntimeError(
                f"{missing} of the {len(rewards)} images of epoch {epoch} have no score; "
                f"max_missing allows a share of {config.max_missing:g}"
            )
        group_ids = torch.arange(len(chosen)).repeat_interleave(size)
        advantages = group_advantages(rewards, group_ids, config.advantage.std)
        metrics = {
            "reward": rewards.nanmean().item(),
            "missing": missing,
            "images": len(rewards),
            **{name: value.nanmean().item() for name, value in scores.details.items()},
            **{f"{name}/missing": int(scores.details[name].isnan().sum()) for name in self.rewards.rewards},
        }
        return Batch(trajectory, conditioning, advantages), metrics

    def update(self, batch: Batch) -> dict[str, float]:
        """The optimiser updates of an epoch, on equal shares of its groups."""
        config = self.config.update
        share = len(batch.advantages) // config.per_epoch
        statistics: list[dict[str, Tensor]] = []
        for begin in range(0, len(batch.advantages), share):
            found = self.accumulate(batch, self.pairs(batch, begin, share))
            if found:
                norm = self.accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                found[-1]["grad_norm"] = norm.reshape(1)
                for parameter in self.parameters:
                    # What is not finite must not spoil the weights before `_flush` sees it and stops the run.
                    if parameter.grad is not None:
                        parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            statistics += found
            self.step += 1
            if self.ema is not None and self.step % config.ema_every == 0:
                self.ema.step(self.parameters)
        return _flush(statistics)

    def pairs(self, batch: Batch, begin: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches (rows, slots) of the (sample, step) pairs of `count` samples, less those whose advantage is 0
        or missing. Step after step, in the order of the rollout: with equal batch sizes the replay is the rollout's
        own batch, bit for bit."""
        advantages = batch.advantages[begin : begin + count]
        rows = begin + torch.nonzero((advantages != 0) & ~advantages.isnan())[:, 0]
        slots = torch.arange(self.window_size).repeat_interleave(len(rows))
        size = self.config.update.batch_size
        return list(zip(rows.repeat(self.window_size).split(size), slots.split(size), strict=True)) if len(rows) else []

    def accumulate(self, batch: Batch, micro_batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
        """Leave the gradient of the mean loss over the micro-batches; the statistics of each stay on the device."""
        count = sum(len(rows) for rows, _ in micro_batches)
        # A log-prob is a mean over a sample's elements; float16 would round the gradient of each to 0.
        scale = batch.trajectory.final[0].numel()
        statistics = []
        for rows, slots in progress("update", micro_batches):
            loss, stats = self.loss(batch, rows, slots)
            self.accelerator.backward(scale * loss.sum())
            statistics.append(stats)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale * count
        return statistics

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics of (sample, step) pairs, (N,) each: sample rows[i] at its trained step slots[i]."""
        config, guidance = self.config.update, self.config.rollout.guidance_scale
        trajectory, policy = batch.trajectory, self.policy
        at = self.coefficients.at(trajectory.steps[rows, slots], policy.device)
        advantages = batch.advantages[rows].float().to(policy.device, non_blocking=True)
        rows, slots = (index.to(policy.device, non_blocking=True) for index in (rows, slots))
        sample = trajectory.latents[rows, slots]
        conditioning = repeat_rows(batch.conditioning, rows // self.config.rollout.group_size)
        unconditional = expand_row(self._unconditional(guidance), len(rows))

        velocity_ref = velocity_uncond = None
        with torch.no_grad():
            if unconditional is not None:
                velocity_uncond = policy.velocity(sample, at.sigma, unconditional)
            if config.kl_weight:
                with policy.reference():
                    velocity_ref = policy.velocity(sample, at.sigma, conditioning)
                    uncond_ref = policy.velocity(sample, at.sigma, unconditional) if unconditional is not None else None
                velocity_ref = guided_velocity(velocity_ref, uncond_ref, guidance)
        return grpo_step_loss(
            policy.velocity(sample, at.sigma, conditioning),
            sample,
            trajectory.latents[rows, slots + 1],
            at.c_x,
            at.c_v,
            at.std,
            at.dt,
            trajectory.log_probs[rows, slots],
            advantages,
            clip_range=config.clip_range,
            advantage_clip=self.config.advantage.clip,
            velocity_ref=velocity_ref,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance,
            kl=config.kl,
            kl_weight=config.kl_weight,
            log_prob=self.log_prob,
        )

    def check_replay(self, batch: Batch) -> None:
        """Replay some of the update's micro-batches with the weights that sampled them: they must find the log-probs of
        the rollout. Every trained step takes part, and the last micro-batch, which may be smaller than the others."""
        micro_batches = self.pairs(batch, 0, len(batch.advantages))
        if not micro_batches:
            return
        first = micro_batches[0][0]
        for rows, slots in ((first, torch.arange(len(first)) % self.window_size), micro_batches[-1]):
            _, stats = self.loss(batch, rows, slots)
            self.report.replay(batch.trajectory.steps[rows, slots], stats["log_prob_difference"].abs().cpu())

    def evaluate(self) -> None:
        """Score ODE samples of the evaluation prompts, made with the averaged weights."""
        config = self.config.evaluation
        guidance = self.config.rollout.guidance_scale if config.guidance_scale is None else config.guidance_scale
        with self.report.phase("evaluate"), self.averaged_weights():
            samples = sample_and_score(
                self.policy,
                self.embed,
                self.scoring,
                list(enumerate(self.eval_prompts)),
                self.shape,
                num_steps=config.num_steps,
                copies=config.images_per_prompt,
                batch_size=config.batch_size,
                guidance_scale=guidance,
            )
        evaluation = Evaluation.of(self.eval_prompts, samples.images, samples.scores, config.images_per_prompt)
        self.report.evaluated(evaluation, self.step)

    def save(self) -> None:
        with self.averaged_weights():
            self.policy.save(self.report.checkpoint(self.step))

    def publish(self) -> None:
        """Put a model card beside the last weights, and both on the hub if that is asked for; the run is saved already,
        and a push that fails says how to do it again."""
        if not self.accelerator.is_main_process:
            return
        run = Path(self.config.output_dir)
        checkpoint = last_checkpoint(run)
        print(f"{'card':8} {write_card(run, checkpoint)}")
        if self.config.hub_model_id is not None:
            try:
                print(f"{'hub':8} {push(run, checkpoint, self.config.hub_model_id, self.config.hub_private)}")
            except ConfigError as error:
                print(f"warning: {error}", file=sys.stderr)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside it, the trained weights are their exponential moving average, once there is one."""
        if self.ema is None or not self.ema.optimization_step:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def choose(self, epoch: int) -> list[Prompt]:
        """The prompts of an epoch's groups."""
        tags = {prompt.metadata.get("tag") for prompt in self.train_prompts}
        mix = self.config.prompts.mix or {tag: weight for tag, weight in TAG_MIX.items() if tag in tags} or None
        count = self.config.prompts.per_epoch
        return [self.train_prompts[i] for i in epoch_prompts(self.train_prompts, count, self.config.seed, epoch, mix)]

    def _unconditional(self, guidance_scale: float) -> Conditioning | None:
        """The empty prompt's conditioning, one row, where guidance needs it."""
        return self.embed([""]) if guidance_scale != 1 else None


def training_prompts(config: Config) -> list[Prompt]:
    """What a run trains on."""
    return read_prompts("prompts.train", config.prompts.train, scenes.train_prompts)


def evaluation_prompts(config: Config) -> list[Prompt]:
    """What a run evaluates on."""
    source = config.prompts.eval or ("shapes" if config.prompts.train == "shapes" else None)
    if source is None:
        return training_prompts(config)[:EVAL_PROMPTS]
    return read_prompts("prompts.eval", source, scenes.eval_prompts)


def read_prompts(setting: str, source: str, bundled: Callable[[], list[Prompt]]) -> list[Prompt]:
    """The prompts of a file, or the bundled ones for "shapes"; ConfigError, naming the setting, if it is wrong."""
    if source == "shapes":
        return bundled()
    try:
        return load_prompts(source)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {error}") from error


def group_seed(seed: int, epoch: int, group: int) -> int:
    """The seed of all that is random in a group: its window and its noise."""
    return int(np.random.SeedSequence((seed, epoch, group)).generate_state(1)[0])


def _flush(statistics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over an epoch's pairs, and the ratio's extremes: the only wait for the device in an update."""
    if not statistics:
        return {"trained_pairs": 0}
    joined = {
        name: torch.cat([stats[name] for stats in statistics if name in stats])
        for name in dict.fromkeys(name for stats in statistics for name in stats)
    }
    ratio, difference = joined["ratio"], joined.pop("log_prob_difference")
    values = {name: tensor.mean() for name, tensor in joined.items()}
    values |= {
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - difference).mean(),
    }
    flat = dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))
    if not math.isfinite(flat["grad_norm"]):
        raise FloatingPointError("the gradient is not finite: lower update.learning_rate or use another policy.dtype")
    return {"trained_pairs": len(ratio), **flat}
