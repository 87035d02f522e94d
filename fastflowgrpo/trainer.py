"""The Flow-GRPO loop (arXiv 2505.05470): rollout, score, normalise, update, report."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from fastflowgrpo.advantages import group_advantages
from fastflowgrpo.config import Config, ConfigError, validate
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity
from fastflowgrpo.policy import Conditioning, load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.processes import Processes, make_accelerator, whole
from fastflowgrpo.prompts import Prompt, epoch_prompts, load_prompts
from fastflowgrpo.reporting import Evaluation, Report, check_output, progress
from fastflowgrpo.rewards import build_rewards
from fastflowgrpo.rewards.scoring import Scoring
from fastflowgrpo.rollout import (
    Trajectory,
    expand_row,
    repeat_rows,
    sample_groups,
    sample_ode,
    sample_seeds,
    window_starts,
)
from fastflowgrpo.sde import resolve_log_prob, step_coefficients

# Without evaluation prompts of its own, a run shows what becomes of its first training prompts.
EVAL_PROMPTS = 16
# The paper trains GenEval with this mix of tags.
TAG_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


@dataclass
class Batch:
    """This process's groups of an epoch: G groups of `group_size` samples, in order."""

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
        available = [tracker.value for tracker in get_available_trackers()]
        for tracker in config.trackers:
            if tracker not in available:
                raise ConfigError(
                    f'trackers: "{tracker}" is unknown or not installed; there are: {", ".join(available)}'
                )
        self.config = config
        self.accelerator = make_accelerator(config.trackers, config.output_dir)
        self.processes = Processes(self.accelerator)
        self.processes.on_main(lambda: check_output(config))
        set_seed(config.seed)
        self.train_prompts, self.eval_prompts = _load_prompts(config)
        try:
            self.choose(0)
        except ValueError as error:
            raise ConfigError(f"prompts.{error}") from error
        try:
            self.rewards = build_rewards(config.rewards)
            self.rewards.check_prompts([*self.train_prompts, *self.eval_prompts])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.policy = load_policy(config.model, config.policy, self.accelerator.device)
        self.shape = self.policy.latent_shape(config.rollout.height, config.rollout.width)
        self.embed = EmbeddingCache(self.policy)
        self.scoring = Scoring(self.rewards, self.policy.decode, self.policy.device)
        update, rollout = config.update, config.rollout
        parameters = self.policy.trainable_parameters()
        num_parameters = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=update.learning_rate, betas=update.betas, weight_decay=update.weight_decay
        )
        self.policy.transformer, self.optimizer = self.processes.prepare(
            self.policy.transformer, self.optimizer, update.max_grad_norm
        )
        self.parameters = self.policy.trainable_parameters()  # others than before where they are sharded now
        self.ema = EMAModel(self.parameters, decay=update.ema_decay) if update.ema_decay else None
        self.coefficients = step_coefficients(
            self.policy.sigmas(rollout.num_steps), rollout.dynamics, rollout.noise_level
        )
        self.log_prob = resolve_log_prob(rollout.log_prob, rollout.dynamics)
        # The last step is sampled but never trained on.
        self.window_size = rollout.window_size or rollout.num_steps - 1
        self.window_start = rollout.window_start if rollout.window_size else (0, 1)
        self.step = 0
        self.report = Report(config, self.accelerator, num_parameters)

    def run(self) -> None:
        """All epochs, with an evaluation before and after. However it ends, the weights of the last epoch are saved."""
        try:
            self._run()
        finally:
            if self.step:
                self.save()
        self.report.finish()

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
        """Sample this process's groups of an epoch; the scores, the advantages and the metrics are of all."""
        config, size = self.config, self.config.rollout.group_size
        chosen = self.choose(epoch)
        groups_at_once = config.rollout.batch_size // size
        own, sampled = self.processes.own(len(chosen)), self.processes.padded(len(chosen))
        seeds = [group_seed(config.seed, epoch, group) for group in sampled]
        with self.report.phase("encode"):
            conditioning = self.embed([chosen[group].text for group in sampled])
            unconditional = self._unconditional(config.rollout.guidance_scale)
        parts: list[Trajectory] = []
        steps = config.rollout.num_steps * -(-len(sampled) // groups_at_once)
        with progress("rollout", steps) as sampling:
            for begin in range(0, len(sampled), groups_at_once):
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
                if prompts := [chosen[group] for group in own[groups]]:
                    with self.report.phase("decode"):
                        self.scoring.submit(part.final[: len(prompts) * size], prompts, size)
                parts.append(part)
            with self.report.phase("score"):
                scores = self.processes.gather_scores(self.scoring.finish(sampling.set_postfix_str), size)
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
        advantages = group_advantages(rewards, group_ids, config.advantage.std).view(-1, size)[own].flatten()
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
        config, size = self.config.update, self.config.rollout.group_size
        share = self.config.prompts.per_epoch // config.per_epoch
        statistics: list[dict[str, Tensor]] = []
        for number in range(config.per_epoch):
            groups = self.processes.places(number * share, (number + 1) * share)
            pairs = self.pairs(batch, groups.start * size, (groups.stop - groups.start) * size)
            found = self.accumulate(batch, pairs)
            if found:
                norm = whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)))
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
        return _flush(statistics, self.processes)

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
        """Leave the gradient of the mean loss over the micro-batches of all processes; the statistics of this one's
        stay on the device. Nothing happens, and [] is returned, where no process has any."""
        counts = self.processes.gather((sum(len(rows) for rows, _ in micro_batches), len(micro_batches)))
        count, passes = sum(pairs for pairs, _ in counts), max(number for _, number in counts)
        if not count:
            return []
        mean = self.processes.count / count  # of the processes' gradients too the mean is taken
        # A log-prob is a mean over a sample's elements; float16 would round the gradient of each to 0.
        scale = mean if self.processes.steps_in_backward else batch.trajectory.final[0].numel()
        statistics: list[dict[str, Tensor]] = [{}]
        for number in progress("update", range(passes)):
            with self.processes.backward_pass(self.policy.transformer, last=number + 1 == passes):
                if number < len(micro_batches):
                    loss, stats = self.loss(batch, *micro_batches[number])
                    self.accelerator.backward(scale * loss.sum())
                    statistics.append(stats)
                else:
                    self.accelerator.backward(0 * self.filler(batch)[0].sum())
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad *= mean / scale
        return statistics

    def filler(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one pair that does not count, while another process still has one that does: sharded weights are
        brought together in every pass."""
        first = torch.zeros(1, dtype=torch.int64)
        return self.loss(replace(batch, advantages=torch.zeros(1)), first, first)

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
        found: list[tuple[Tensor, Tensor]] = []
        if micro_batches:
            first = micro_batches[0][0]
            for rows, slots in ((first, torch.arange(len(first)) % self.window_size), micro_batches[-1]):
                _, stats = self.loss(batch, rows, slots)
                found.append((batch.trajectory.steps[rows, slots], stats["log_prob_difference"].abs().cpu()))
        else:
            for _ in range(2):
                self.filler(batch)
        everywhere = [pair for pairs in self.processes.gather(found) for pair in pairs]
        if everywhere:
            self.report.replay(*(torch.cat(tensors) for tensors in zip(*everywhere, strict=True)))

    def evaluate(self) -> None:
        """Score ODE samples of the evaluation prompts, made with the averaged weights."""
        config = self.config.evaluation
        images_of: list[Tensor] = []
        copies = config.images_per_prompt
        prompts_at_once = max(1, config.batch_size // copies)
        guidance = self.config.rollout.guidance_scale if config.guidance_scale is None else config.guidance_scale
        unconditional = self._unconditional(guidance)
        with self.report.phase("evaluate"), self.averaged_weights(), torch.no_grad():
            own, sampled = (share(len(self.eval_prompts)) for share in (self.processes.own, self.processes.padded))
            for begin in progress("evaluation", range(0, len(sampled), prompts_at_once)):
                now = slice(begin, begin + prompts_at_once)
                conditioning = self.embed([self.eval_prompts[index].text for index in sampled[now]])
                rows = torch.arange(len(sampled[now]), device=self.policy.device).repeat_interleave(copies)
                # The same noise in every run and at every step: images are compared, not their luck.
                seeds = sample_seeds(sampled[now], copies).to(self.policy.device)
                noise = philox_normal(seeds, 0, (len(seeds), *self.shape))
                latents = sample_ode(
                    self.policy,
                    repeat_rows(conditioning, rows),
                    config.num_steps,
                    noise,
                    unconditional=unconditional,
                    guidance_scale=guidance,
                )
                if prompts := [self.eval_prompts[index] for index in own[now]]:
                    images_of.append(self.scoring.submit(latents[: len(prompts) * copies], prompts, copies))
            scores = self.processes.gather_scores(self.scoring.finish(), copies)
        evaluation = Evaluation.of(self.eval_prompts, images_of, scores, copies, self.processes)
        self.report.evaluated(evaluation, self.step)

    def save(self) -> None:
        with self.averaged_weights(), self.processes.whole_weights(self.policy.module):
            if self.accelerator.is_main_process:
                self.policy.save(self.report.checkpoint(self.step))

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


def _load_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation) prompts."""
    from fastflowgrpo.shapes import scenes

    def load(setting: str, source: str, bundled: list[Prompt]) -> list[Prompt]:
        if source == "shapes":
            return bundled
        try:
            return load_prompts(source)
        except (ValueError, OSError) as error:
            raise ConfigError(f"prompts.{setting}: {error}") from error

    train = load("train", config.prompts.train, scenes.train_prompts())
    if config.prompts.eval is None:
        return train, scenes.eval_prompts() if config.prompts.train == "shapes" else train[:EVAL_PROMPTS]
    return train, load("eval", config.prompts.eval, scenes.eval_prompts())


def group_seed(seed: int, epoch: int, group: int) -> int:
    """The seed of all that is random in a group: its window and its noise."""
    return int(np.random.SeedSequence((seed, epoch, group)).generate_state(1)[0])


def _flush(statistics: list[dict[str, Tensor]], processes: Processes) -> dict[str, float]:
    """Means over an epoch's pairs of all processes, and the ratio's extremes: the only wait for the device in an
    update."""
    parts = processes.gather({name: tensor.cpu() for name, tensor in _joined(statistics).items()})
    joined = _joined(parts)
    if not joined:
        return {"trained_pairs": 0}
    ratio, difference = joined["ratio"], joined.pop("log_prob_difference")
    values = {name: tensor.mean() for name, tensor in joined.items()}
    values |= {
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - difference).mean(),
    }
    flat = {name: value.item() for name, value in values.items()}
    if not math.isfinite(flat["grad_norm"]):
        raise FloatingPointError("the gradient is not finite: lower update.learning_rate or use another policy.dtype")
    return {"trained_pairs": len(ratio), **flat}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of each name one after the other, from the parts that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
