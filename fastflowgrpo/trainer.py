"""The Flow-GRPO loop (arXiv 2505.05470): rollout, score, normalise, update, report."""

import time
from contextlib import closing
from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor

from fastflowgrpo.config import Config, validate
from fastflowgrpo.console import log_to
from fastflowgrpo.distributed import Processes, make_accelerator, mark_collective
from fastflowgrpo.errors import GuardStop, UserError
from fastflowgrpo.evaluation.guard import with_guard
from fastflowgrpo.evaluation.sampling import Samples, sample_and_score
from fastflowgrpo.evaluation.summary import Evaluation
from fastflowgrpo.learning import OBJECTIVES, Batch
from fastflowgrpo.learning.advantages import share_without_spread
from fastflowgrpo.learning.learner import Learner
from fastflowgrpo.planning.memory import warn_if_short
from fastflowgrpo.planning.micro_batch import with_micro_batch
from fastflowgrpo.planning.passes import example_inputs
from fastflowgrpo.planning.plan import batch_plan
from fastflowgrpo.policy import load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.guidance import check_guidance
from fastflowgrpo.policy.source_images import check_source_images
from fastflowgrpo.prompts import Prompt, epoch_prompts
from fastflowgrpo.prompts.geneval import MIX
from fastflowgrpo.prompts.sources import run_prompts
from fastflowgrpo.rewards import Scores, build_rewards
from fastflowgrpo.runs.checkpoints import last_checkpoint
from fastflowgrpo.runs.files import LOG
from fastflowgrpo.runs.gallery import GROUPS, Gallery
from fastflowgrpo.runs.guard import best_checkpoint, guard_fall, is_best_by_guard
from fastflowgrpo.runs.heartbeat import Heartbeat
from fastflowgrpo.runs.hub import check_push, publish
from fastflowgrpo.runs.lock import RunLock
from fastflowgrpo.runs.report import Report
from fastflowgrpo.runs.resume import checkpoint_to_resume, prompts_digest
from fastflowgrpo.runs.signals import Signals
from fastflowgrpo.runs.state import RunState
from fastflowgrpo.sampling.coefficients import step_coefficients
from fastflowgrpo.sampling.groups import GroupSampler
from fastflowgrpo.scoring.epoch import EpochSampler, group_seed, max_batches_in_flight
from fastflowgrpo.scoring.exploration import exploration_metrics
from fastflowgrpo.scoring.gather import check_missing, gather_scores
from fastflowgrpo.scoring.pipeline import Scoring


class Trainer:
    """Trains `config.model` as `config` says; `run` does all of it.

    Raises:
        UserError: a setting, file, model or launch is wrong; raised before anything is sampled.
    """

    def __init__(self, config: Config):
        validate(config)
        self.config = config
        self.accelerator = make_accelerator(config.trackers, config.output_dir)
        self.processes = Processes(self.accelerator)
        self.lock = RunLock(config.output_dir)
        self.processes.on_main(self.lock.acquire)
        self.heartbeat = Heartbeat(config.output_dir, self.processes, config.hang_warning)
        try:
            self.heartbeat.start()
            self._load()
        except BaseException:
            self.heartbeat.close()
            self.lock.close()
            raise

    def _load(self) -> None:
        config = self.config
        resumed = self.processes.on_main(lambda: checkpoint_to_resume(config))
        log_to(Path(config.output_dir) / LOG)
        set_seed(config.seed)
        if (repository := config.hub_model_id) is not None:
            self.processes.on_main(lambda: check_push(repository))
        self._load_prompts_and_rewards()
        digests = {
            "prompts.train": prompts_digest(self.train_prompts),
            "prompts.eval": prompts_digest(self.eval_prompts),
        }
        if resumed:
            resumed.check_prompts(digests)
        if not config.update.batch_size:
            config = self.config = with_micro_batch(
                config, self.processes, resumed.manifest["config"] if resumed else None
            )
        self.plan = batch_plan(config, self.processes.count)
        rollout = config.rollout
        if self.processes.is_main:
            warn_if_short(config, self.processes.count, self.accelerator.device)
        shard = self.processes.shard if self.processes.sharded else None
        self.policy = load_policy(config.model, config.policy, self.accelerator.device, shard)
        self.shape = self.policy.latent_shape(rollout.height, rollout.width, rollout.num_frames)
        check_source_images(self.policy, [*self.train_prompts, *self.eval_prompts])
        check_guidance(self.policy, rollout.guidance, config.evaluation_guidance)
        self.embed = self._embeddings()
        scoring = self.policy.decode, self.policy.device, config.reward_frames
        in_flight = max_batches_in_flight(config, self.processes.count)
        self.scoring = self.evaluation_scoring = Scoring(self.rewards, *scoring, in_flight)
        if self.evaluation_rewards is not self.rewards:
            self.evaluation_scoring = Scoring(self.evaluation_rewards, *scoring)
        sigmas = self.policy.sigmas(rollout.num_steps, self.shape)
        self.coefficients = step_coefficients(sigmas, rollout.dynamics, rollout.noise_level)
        objective_class = OBJECTIVES[config.update.algorithm]
        self.sampler = GroupSampler(
            rollout,
            self.policy,
            self.coefficients,
            self.shape,
            keep_steps=objective_class.uses_log_probs,
            keep_velocities=objective_class.keeps_velocities(config),
            equal_passes=self.processes.sharded,
            fill_up_to=config.policy.compile * (self.plan.rollout_batch_size // rollout.group_size),
        )
        if objective_class.uses_log_probs:
            self.policy.train_only_at(sigmas[self.sampler.trained_steps])
        self.objective = objective_class(config, self.policy, self.coefficients, self.sampler.window_size)
        self.learner = Learner(config, self.policy, self.objective, self.processes)
        if self.processes.rank:
            # For rewards that draw random numbers: the weights are initialised, and alike on all ranks.
            set_seed(config.seed + self.processes.rank)
        self.signals = Signals(self.processes)
        self.state = RunState(config, self.processes, self.learner, digests)
        if resumed:
            self.state.load(resumed)
        self.report = Report(config, self.accelerator, self.state, self.lock)
        self.gallery = Gallery(config, self.eval_prompts, self.rewards, self.accelerator)
        self.epoch_sampler = self._epoch_sampler()
        self.report.start(self.plan, sum(p.numel() for p in self.learner.parameters), resumed)
        guided = rollout.guidance_scale != 1 or config.evaluation_guidance != 1
        for warning in self.policy.warnings(guided):
            self.report.warn(warning)

    def run(self) -> None:
        """Train the epochs that are left, with an evaluation before the first and after the last.

        When it fails or is interrupted, the state after the last whole epoch is saved, unless an update of the next one
        has begun, or only some of several processes have failed.

        Raises:
            Interrupted: on SIGTERM, SIGHUP or Ctrl+C, after an update under way is finished.
            GuardStop: `evaluation.guard` has stopped the run; it is saved, with its summary and pictures.
        """
        with self.signals, closing(self.lock), closing(self.heartbeat):
            try:
                stopped = self._run_epochs()
            except BaseException as error:
                try:
                    whole = self.state.at_epoch_boundary and self.processes.is_collective(error)
                    if whole and self.processes.on_main(self.lock.regain):
                        self.state.save()
                finally:
                    self.report.stopped()
                raise
            run = self.config.output_dir
            checkpoint = self.processes.on_main(lambda: best_checkpoint(run) if stopped else last_checkpoint(run))
            self.report.finish(self.eval_prompts)  # ends the communication of the processes
            if self.processes.is_main:
                publish(self.config, checkpoint)
        if stopped:
            raise GuardStop(
                f"{stopped}; the best checkpoint is {checkpoint}; to go on from it: --resume best, from the last one: "
                "--resume latest --evaluation.guard_action warn"
            )

    def _run_epochs(self) -> str:
        """Train, and return why the guard has stopped the run, "" if it has not."""
        config, state = self.config, self.state
        first = state.epoch
        while True:
            self.processes.on_main(self.report.check)
            last = state.epoch == config.epochs
            every = config.evaluation.every
            evaluation_due = state.epoch == 0 or last or (every and state.epoch % every == 0)
            if evaluation_due and state.evaluated_step != self.learner.step:
                self.evaluate()
                state.mark_epoch_boundary()
            fall = guard_fall(state.rows, config.evaluation.guard_patience)
            if fall and config.evaluation.guard_action == "warn":
                self.report.warn(fall)
                fall = ""
            save_due = last or (config.save_every and state.epoch % config.save_every == 0)
            if save_due or fall or is_best_by_guard(state.rows):
                state.save()
            if last or fall:
                self.processes.on_main(self.report.check)
                return fall
            if state.epoch == first and config.policy.compile:
                self._warm_up()
            batch, metrics = self.collect(state.epoch)
            if state.epoch == first and self.objective.uses_log_probs:
                self.check_replay(batch)
            with self.report.phase("update"):
                metrics |= self.learner.update(batch)
            del batch  # the next rollout can have its memory
            state.epoch += 1
            state.ahead = self.epoch_sampler.ahead
            state.mark_epoch_boundary()
            self.report.epoch(state.epoch - 1, self.learner.step, metrics)

    def _warm_up(self) -> None:
        """Compile the batches of the rollout and of the update, so that no epoch's seconds have it."""
        begin = time.perf_counter()
        for size in sorted({self.plan.rollout_batch_size, self.objective.batch_size}):
            self.learner.warm_up(example_inputs(self.policy, self.config, size))
        self.report.compiled(time.perf_counter() - begin)

    def collect(self, epoch: int) -> tuple[Batch, dict[str, float]]:
        """Sample and score an epoch's groups.

        Returns:
            The groups of this process, with advantages relative to those of all, and the metrics of all.

        Raises:
            TemporaryError: more scores are missing than `max_missing` allows.
        """
        rollout, size = self.config.rollout, self.config.rollout.group_size
        prompts = self.epoch_prompts(epoch)
        sampled = self.signals.interruptible(self.epoch_sampler.sample, epoch, prompts)
        scores = gather_scores(self.processes, sampled.scores, len(prompts), size)
        check_missing(scores, self.config.max_missing, f"images of epoch {epoch}")
        rewards = scores.values
        advantages = self.objective.advantages(scores, self.rewards.weights)
        if self.gallery.keeps_epoch(epoch):
            self.processes.on_main(lambda: self._show_groups(epoch, prompts, sampled.shown, scores, advantages))
        advantages = advantages.view(-1, size)[self.processes.rank_indices(len(prompts))].flatten()
        metrics = {
            "reward": rewards.nanmean().item(),
            "missing": int(rewards.isnan().sum()),
            "images": len(rewards),
            "latent_rms": self._latent_rms(sampled.trajectory.final, len(prompts)),
            "groups_without_spread": share_without_spread(rewards, size),
            **{name: value.nanmean().item() for name, value in scores.details.items()},
            **{f"{name}/missing": int(scores.details[name].isnan().sum()) for name in self.rewards.rewards},
        }
        if sampled.candidates is not None and rollout.candidates:
            candidates = gather_scores(self.processes, sampled.candidates, len(prompts), rollout.candidates)
            check_missing(candidates, self.config.max_missing, f"candidates of epoch {epoch}")
            metrics |= exploration_metrics(candidates.values.view(-1, rollout.candidates), rewards.view(-1, size))
        batch = Batch(sampled.trajectory, sampled.conditioning, sampled.unconditional, advantages, stale=sampled.stale)
        return batch, metrics

    def _latent_rms(self, latents: Tensor, groups: int) -> float:
        """The mean RMS of the clean latents (B, ...) of all processes' groups. Collective."""
        rms = latents.float().flatten(1).square().mean(1).sqrt().cpu().view(-1, self.config.rollout.group_size)
        return self.processes.gather_rows({"rms": rms}, groups)["rms"].mean().item()

    def check_replay(self, batch: Batch) -> None:
        """Compute log-probs of the rollout's steps again, with the weights that sampled them, and compare.

        Raises:
            UserError: they differ by more than `update.replay_tolerance` allows.
        """
        replayed = self.learner.halving(self.learner.replay, batch)
        if replayed is None:
            return
        self.report.replay(*replayed)
        update, largest = self.config.update, float(replayed[1].max())
        limit = "clip_range" if update.trust_region == "clip" else "divergence_limit"
        if not largest <= update.replay_tolerance * getattr(update, limit):
            raise mark_collective(
                UserError(
                    f"replayed log-probs differ from the rollout's by up to {largest:.1e}, more than "
                    f"update.replay_tolerance {update.replay_tolerance:g} x update.{limit} {getattr(update, limit):g}: "
                    "set update.batch_size to rollout.batch_size, or policy.dtype to float32"
                )
            )

    def evaluate(self) -> None:
        """Score ODE samples of the evaluation prompts, made with the averaged weights."""
        with self.report.phase("evaluate"), self.learner.ema_weights():
            samples = self.signals.interruptible(self._sample_evaluation)
        shown = self.config.evaluation.gallery
        evaluation = Evaluation.of(self.eval_prompts, samples, self.processes, gallery=shown)
        self.processes.on_main(lambda: self.gallery.evaluation(evaluation, self.state.epoch, self.learner.step))
        self.report.evaluated(evaluation, self.learner.step)

    def epoch_prompts(self, epoch: int) -> list[Prompt]:
        """The prompts of an epoch's groups, of all processes."""
        tags = {prompt.metadata.get("tag") for prompt in self.train_prompts}
        mix = self.config.prompts.mix or {tag: weight for tag, weight in MIX.items() if tag in tags} or None
        count = self.config.prompts.per_epoch
        return [self.train_prompts[i] for i in epoch_prompts(self.train_prompts, count, self.config.seed, epoch, mix)]

    def _show_groups(
        self, epoch: int, prompts: list[Prompt], images: Tensor, scores: Scores, advantages: Tensor
    ) -> None:
        """Keep the images of this process's first groups in the gallery; scores and advantages are of all groups."""
        groups = self.processes.rank_indices(len(prompts))[: len(images) // self.config.rollout.group_size]
        seeds = [group_seed(self.config.seed, epoch, group) for group in groups]
        shown = [prompts[group] for group in groups]
        self.gallery.rollout(epoch, self.learner.step, shown, seeds, images, scores, advantages, groups)

    def _load_prompts_and_rewards(self) -> None:
        self.train_prompts, self.eval_prompts = run_prompts(self.config)
        try:
            self.epoch_prompts(0)
        except ValueError as error:
            raise UserError(f"prompts.{error}") from error
        try:
            self.rewards = build_rewards(self.config.rewards)
            self.rewards.check_prompts([*self.train_prompts, *self.eval_prompts])
        except ValueError as error:
            raise UserError(str(error)) from error
        self.evaluation_rewards = with_guard(self.rewards, self.config.evaluation.guard, self.eval_prompts)

    def _embeddings(self) -> EmbeddingCache:
        """The prompt embeddings; with `policy.embeddings_dir` all of them are made now, by all processes together."""
        folder = self.config.policy.embeddings_dir
        embed = EmbeddingCache(self.policy, folder, shape=self.shape)
        if folder is not None:
            both = [Prompt(""), *self.train_prompts, *self.eval_prompts]
            distinct = list({(prompt.text, prompt.images): prompt for prompt in both}.values())
            embed.write(distinct[self.processes.rank :: self.processes.count])
            self.processes.wait()  # where the disk is not shared, each process then encodes what it lacks
            embed.prepare(distinct)
        return embed

    def _epoch_sampler(self) -> EpochSampler:
        made = EpochSampler(
            self.config,
            self.processes,
            self.sampler,
            self.embed,
            self.scoring,
            prompts=self.epoch_prompts,
            weights=self.learner.sampling_weights,
            phase=self.report.phase,
            num_shown=lambda epoch: GROUPS if self.processes.is_main and self.gallery.keeps_epoch(epoch) else 0,
        )
        made.ahead = self.state.ahead
        return made

    def _sample_evaluation(self) -> Samples:
        config = self.config.evaluation
        with self.scoring.set_aside():
            return sample_and_score(
                self.policy,
                self.embed,
                self.evaluation_scoring,
                [(i, self.eval_prompts[i]) for i in self.processes.padded_rank_indices(len(self.eval_prompts))],
                self.shape,
                num_steps=config.num_steps,
                images_per_prompt=config.images_per_prompt,
                batch_size=config.batch_size,
                guidance_scale=self.config.evaluation_guidance,
            )
