"""The Flow-GRPO loop (arXiv 2505.05470): rollout, score, normalise, update, report."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from fastflowgrpo.config import POLICY_GRADIENTS, Config, validate
from fastflowgrpo.console import progress
from fastflowgrpo.distributed import Processes, full_tensor, make_accelerator, mark_collective, override_state_dict
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluation.sampling import Samples, sample_and_score
from fastflowgrpo.evaluation.summary import Evaluation
from fastflowgrpo.learning.advantages import group_advantages
from fastflowgrpo.learning.objective import Batch, Objective, sample_weights
from fastflowgrpo.planning.plan import batch_plan
from fastflowgrpo.policy import Conditioning, load_policy
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.prompts import Prompt, epoch_prompts
from fastflowgrpo.prompts.geneval import MIX
from fastflowgrpo.prompts.sources import run_prompts
from fastflowgrpo.rewards import Scores, build_rewards
from fastflowgrpo.runs import checkpoints, resume, training_state
from fastflowgrpo.runs.hub import check_push, push
from fastflowgrpo.runs.model_card import CARD, write_card
from fastflowgrpo.runs.report import Report
from fastflowgrpo.runs.resume import check_output
from fastflowgrpo.runs.signals import Signals
from fastflowgrpo.sampling.coefficients import step_coefficients
from fastflowgrpo.sampling.rollout import Trajectory, sample_groups, sliding_start, window_starts
from fastflowgrpo.scoring.pipeline import Scoring


class Trainer:
    """Trains `config.model` as `config` says; `run` does all of it.

    Raises:
        UserError: for everything that the user can put right, before anything is sampled.
    """

    def __init__(self, config: Config):
        validate(config)
        available = [tracker.value for tracker in get_available_trackers()]
        for tracker in config.trackers:
            if tracker not in available:
                raise UserError(f'trackers: "{tracker}" is unknown or not installed; there are: {", ".join(available)}')
        self.config = config
        self.accelerator = make_accelerator(config.trackers, config.output_dir)
        self.processes = Processes(self.accelerator)
        resumed = self.processes.on_main(lambda: _checked_output(config))
        if resumed and self.processes.steps_in_backward:
            raise UserError("resume: DeepSpeed keeps its optimiser to itself; use configs/accelerate/fsdp2.yaml")
        set_seed(config.seed)
        if (hub := config.hub_model_id) is not None:
            self.processes.on_main(lambda: check_push(hub))
        self.train_prompts, self.eval_prompts = run_prompts(config)
        self.prompt_digests = {
            "prompts.train": resume.digest(self.train_prompts),
            "prompts.eval": resume.digest(self.eval_prompts),
        }
        if resumed:
            resumed.check_prompts(self.prompt_digests)
        try:
            self.epoch_prompts(0)
        except ValueError as error:
            raise UserError(f"prompts.{error}") from error
        try:
            self.rewards = build_rewards(config.rewards)
            self.rewards.check_prompts([*self.train_prompts, *self.eval_prompts])
        except ValueError as error:
            raise UserError(str(error)) from error
        self.plan = batch_plan(config, self.processes.count)
        self.policy = load_policy(config.model, config.policy, self.accelerator.device)
        self.shape = self.policy.latent_shape(config.rollout.height, config.rollout.width, config.rollout.num_frames)
        self.embed = EmbeddingCache(self.policy, config.policy.embeddings_dir)
        if config.policy.embeddings_dir is not None:
            texts = ["", *dict.fromkeys(prompt.text for prompt in [*self.train_prompts, *self.eval_prompts])]
            self.embed.write(texts[self.processes.rank :: self.processes.count])
            self.processes.gather(None)  # on disks that are not shared each encodes what it lacks
            self.embed.prepare(texts)
        self.scoring = Scoring(self.rewards, self.policy.decode, self.policy.device, config.reward_frames)
        update, rollout = config.update, config.rollout
        self.optimizer = torch.optim.AdamW(
            self.policy.trainable_parameters(),
            lr=update.learning_rate,
            betas=update.betas,
            weight_decay=update.weight_decay,
        )
        self.policy.transformer, self.optimizer = self.processes.prepare(
            self.policy.transformer, self.optimizer, update.max_grad_norm
        )
        self.parameters = self.policy.trainable_parameters()  # others than before where they are sharded now
        if self.processes.rank:
            set_seed(config.seed + self.processes.rank)  # rewards may draw; the weights are made
        self.ema = EMAModel(self.parameters, decay=update.ema_decay) if update.ema_decay else None
        self.coefficients = step_coefficients(
            self.policy.sigmas(rollout.num_steps, self.shape), rollout.dynamics, rollout.noise_level
        )
        # The last step is an ODE step and is never trained.
        self.window_size = rollout.window_size or rollout.num_steps - 1
        self.window_start = rollout.window_start if rollout.window_size else (0, 1)
        self.objective = Objective(config, self.policy, self.coefficients, self.window_size)
        self.signals = Signals(self.processes)
        self.epoch = self.step = 0
        if resumed:
            training_state.load_training(resumed, self.named_parameters(), self.optimizer, self.ema)
            training_state.load_rng(resumed, self.processes.rank, self.accelerator.device)
            self.epoch, self.step = resumed.epoch, resumed.step
        self.saved_step = self.step
        self.mark_epoch_boundary()
        self.report = Report(config, self.accelerator, self.plan, sum(p.numel() for p in self.parameters), resumed)

    def run(self) -> None:
        """The epochs that are left, with an evaluation before the first and after the last. However it ends, the state
        after the last whole epoch is saved, unless an update of the next has changed it already.

        Raises:
            Interrupted: on SIGTERM or Ctrl+C, once an update under way is finished.
        """
        with self.signals:
            try:
                self._run()
            except BaseException as error:
                try:
                    if self.step == self.boundary_step and self.processes.is_collective(error):
                        self.save()
                finally:
                    self.report.stopped()
                raise
            self.report.finish(self.eval_prompts)
            self.publish()

    def _run(self) -> None:
        config = self.config
        first = self.epoch
        while True:
            last = self.epoch == config.epochs
            due = self.epoch == 0 or last or (config.evaluation.every and self.epoch % config.evaluation.every == 0)
            if due and self.report.evaluated_at != self.step:
                self.evaluate()
                self.mark_epoch_boundary()
            if last or (config.save_every and self.epoch % config.save_every == 0):
                self.save()
            if last:
                return
            batch, metrics = self.collect(self.epoch)
            if self.epoch == first and config.update.algorithm in POLICY_GRADIENTS:
                self.check_replay(batch)
            with self.report.phase("update"):
                metrics |= self.update(batch)
            self.report.epoch(self.epoch, self.step, metrics)
            self.epoch += 1
            self.mark_epoch_boundary()

    def mark_epoch_boundary(self) -> None:
        """Between two epochs. Until the next update only the random numbers change, and these are kept."""
        self.boundary_step = self.step
        self.rng = training_state.rng_state(self.accelerator.device)

    def collect(self, epoch: int) -> tuple[Batch, dict[str, float]]:
        """Sample and score this process's groups of an epoch; the metrics are of all, and so is what advantages are
        relative to."""
        config, size = self.config, self.config.rollout.group_size
        chosen = self.epoch_prompts(epoch)
        trajectory, conditioning, unconditional, scores = self.signals.interruptible(self.sample, epoch, chosen)
        scores = self.processes.gather_scores(scores, len(chosen), size)
        rewards, missing = scores.values, int(scores.values.isnan().sum())
        if missing == len(rewards) or missing > config.max_missing * len(rewards):
            raise mark_collective(
                RuntimeError(
                    f"{missing} of the {len(rewards)} images of epoch {epoch} have no score; "
                    f"max_missing allows a share of {config.max_missing:g}; the last error: {scores.error}"
                )
            )
        if config.update.algorithm in POLICY_GRADIENTS:
            weights = self.rewards.weights
            advantages = group_advantages(
                torch.stack([scores.details[name] for name in weights], 1),
                torch.arange(len(chosen)).repeat_interleave(size),
                config.advantage.std,
                weights=list(weights.values()),
                mode=config.advantage.mode,
            )
        else:
            advantages = sample_weights(config.update.algorithm, rewards, size, config.update.rwr_temperature)
        advantages = advantages.view(-1, size)[self.processes.rank_indices(len(chosen))].flatten()
        metrics = {
            "reward": rewards.nanmean().item(),
            "missing": missing,
            "images": len(rewards),
            **{name: value.nanmean().item() for name, value in scores.details.items()},
            **{f"{name}/missing": int(scores.details[name].isnan().sum()) for name in self.rewards.rewards},
        }
        return Batch(trajectory, conditioning, unconditional, advantages), metrics

    def sample(self, epoch: int, chosen: list[Prompt]) -> tuple[Trajectory, Conditioning, Conditioning | None, Scores]:
        """The trajectories of this process's groups, the conditioning of each and the unconditional, the scores."""
        config, size = self.config, self.config.rollout.group_size
        groups_at_once = config.rollout.batch_size // size
        dealt = self.processes.padded_rank_indices(len(chosen))
        chosen, seeds = [chosen[i] for i in dealt], [group_seed(config.seed, epoch, group) for group in dealt]
        with self.report.phase("encode"):
            conditioning = self.embed([prompt.text for prompt in chosen])
            unconditional = self._unconditional(config.rollout.guidance_scale)
        offline = config.update.data == "offline"
        parts: list[Trajectory] = []
        steps = config.rollout.num_steps * -(-len(chosen) // groups_at_once)
        with progress("rollout", steps) as sampling:
            for begin in range(0, len(chosen), groups_at_once):
                groups = slice(begin, begin + groups_at_once)
                with self.report.phase("rollout"), self.policy.reference() if offline else nullcontext():
                    part = sample_groups(
                        self.policy,
                        {name: tensor[groups] for name, tensor in conditioning.items()},
                        self.coefficients,
                        self.window_starts(epoch, seeds[groups]),
                        self.window_size,
                        size,
                        seeds[groups],
                        self.shape,
                        unconditional=unconditional,
                        guidance_scale=config.rollout.guidance_scale,
                        same_noise=config.rollout.same_noise,
                        log_prob=self.objective.log_prob,
                        keep_steps=config.update.algorithm in POLICY_GRADIENTS,
                        keep_velocities=config.update.algorithm == "grpo_guard",
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
        return trajectory, conditioning, unconditional, scores

    def update(self, batch: Batch) -> dict[str, float]:
        """The optimiser updates of an epoch, on equal shares of its groups."""
        config, size = self.config.update, self.config.rollout.group_size
        share = self.config.prompts.per_epoch // config.per_epoch
        if self.processes.steps_in_backward:
            self.boundary_step = -1  # the state is that of no whole epoch before `step` says so
        statistics: list[dict[str, Tensor]] = []
        for number in range(config.per_epoch):
            groups = self.processes.local_slice(number * share, (number + 1) * share)
            count = (groups.stop - groups.start) * size
            micro_batches = self.objective.micro_batches(batch, groups.start * size, count)
            found = self.accumulate(batch, micro_batches)
            if found:
                total_norm = self.accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                norm = full_tensor(torch.as_tensor(total_norm))
                if not math.isfinite(norm):
                    raise mark_collective(
                        FloatingPointError(
                            "the gradient is not finite: lower update.learning_rate or use another policy.dtype"
                        )
                    )
                if self.accelerator.is_main_process:
                    found[-1]["grad_norm"] = norm.reshape(1)
            self.step += 1  # first: from here on the state is that of no whole epoch
            self.optimizer.step()  # does nothing without a gradient
            self.optimizer.zero_grad()
            statistics += found
            if self.ema is not None and self.step % config.ema_every == 0:
                # Its decay grows to ema_decay with the updates, as in the paper's code: s / (9 + s) after s of them.
                self.ema.optimization_step = self.step - 1
                self.ema.step(self.parameters)
        return _flush(self.processes.gather({name: tensor.cpu() for name, tensor in _joined(statistics).items()}))

    def accumulate(self, batch: Batch, micro_batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
        """Leave the gradient of the mean loss over the pairs of all processes; the statistics of this one's
        micro-batches stay on the device. Without a unit on any process, nothing happens and [] is returned."""
        counts = self.processes.gather((sum(len(rows) for rows, _ in micro_batches), len(micro_batches)))
        count, passes = sum(pairs for pairs, _ in counts), max(number for _, number in counts)
        if not count:
            return []
        mean = self.processes.count / count  # of the processes' gradients too the mean is taken
        # A log-prob, as an error, is a mean over a sample's elements; float16 would round the gradient of each to 0.
        scale = mean if self.processes.steps_in_backward else batch.trajectory.final[0].numel()
        statistics: list[dict[str, Tensor]] = [{}]
        for number in progress("update", range(passes)):
            with self.processes.backward_pass(self.policy.transformer, last=number + 1 == passes):
                if number < len(micro_batches):
                    loss, stats = self.objective.loss(batch, *micro_batches[number])
                    self.accelerator.backward(scale * loss.sum())
                    statistics.append(stats)
                else:
                    self.accelerator.backward(0 * self.dummy_loss(batch).sum())
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad *= mean / scale
        return statistics

    def dummy_loss(self, batch: Batch) -> Tensor:
        """The loss of a unit that does not count, for a process that has none left while another has: sharded weights
        are brought together in every pass."""
        first, none = torch.zeros(1, dtype=torch.int64), torch.zeros(len(batch.trajectory.final))
        return self.objective.loss(replace(batch, advantages=none), first, first)[0]

    def check_replay(self, batch: Batch) -> None:
        """Replay some of the update's micro-batches with the weights that sampled them: they must find the log-probs of
        the rollout. Every trained step takes part, and the last micro-batch, which may be smaller than the others."""
        micro_batches = self.objective.micro_batches(batch, 0, len(batch.advantages))
        found: list[tuple[Tensor, Tensor]] = []
        if micro_batches:
            first = micro_batches[0][0]
            for rows, slots in ((first, torch.arange(len(first)) % self.window_size), micro_batches[-1]):
                stats = self.objective.loss(batch, rows, slots)[1]  # the loss would hold a graph beside the next one
                found.append((batch.trajectory.steps[rows, slots], stats["log_prob_difference"].abs().cpu()))
        else:
            for _ in range(2):
                self.dummy_loss(batch)
        everyones = [pair for pairs in self.processes.gather(found) for pair in pairs]
        if everyones:
            self.report.replay(*(torch.cat(tensors) for tensors in zip(*everyones, strict=True)))

    def evaluate(self) -> None:
        """Score ODE samples of the evaluation prompts, made with the averaged weights."""
        with self.report.phase("evaluate"), self.averaged_weights():
            samples = self.signals.interruptible(self.sample_evaluation)
        scores = self.processes.gather_scores(samples.scores, len(self.eval_prompts), samples.images_per_prompt)
        evaluation = Evaluation.of(self.eval_prompts, samples.images, scores, samples.images_per_prompt, self.processes)
        self.report.evaluated(evaluation, self.step)

    def sample_evaluation(self) -> Samples:
        """The images of this process's evaluation prompts, and their scores."""
        config = self.config.evaluation
        guidance = self.config.rollout.guidance_scale if config.guidance_scale is None else config.guidance_scale
        return sample_and_score(
            self.policy,
            self.embed,
            self.scoring,
            [(i, self.eval_prompts[i]) for i in self.processes.padded_rank_indices(len(self.eval_prompts))],
            self.shape,
            num_steps=config.num_steps,
            images_per_prompt=config.images_per_prompt,
            batch_size=config.batch_size,
            guidance_scale=guidance,
        )

    def save(self) -> None:
        """Make a checkpoint of the state after the last epoch, unless there is one or nothing was trained."""
        if self.step == self.saved_step:
            return
        rngs = self.processes.gather(self.rng)
        optimizer = None if self.processes.steps_in_backward else self.optimizer
        state = training_state.training_state(self.named_parameters(), optimizer, self.ema)
        state = {name: self.processes.full_on_main(tensors) for name, tensors in state.items()}
        module = self.accelerator.unwrap_model(self.policy.transformer)
        averages = self.ema.optimization_step if self.ema is not None else None

        def write(folder: Path) -> None:
            with override_state_dict(module, state["ema"] if averages else state["weights"]):
                self.policy.save(folder)
            if averages is not None:
                with override_state_dict(module, state["weights"]):
                    self.policy.save(folder / "raw")
            training_state.save_training(folder / "training", state, averages, rngs, self.report.rows)

        manifest = {
            "epoch": self.epoch,
            "run_id": self.report.run_id,
            "wall_s": self.report.wall(),
            "config": resume.plain(self.config),
            "prompts": self.prompt_digests,
        }
        output, limit = self.config.output_dir, self.config.checkpoints_total_limit
        self.processes.on_main(lambda: checkpoints.save(output, limit, write, manifest, self.step))
        self.saved_step = self.step

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by their name in the model."""
        module = self.accelerator.unwrap_model(self.policy.transformer)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {names[id(parameter)]: parameter for parameter in self.parameters}

    def publish(self) -> None:
        """Put a model card beside the last weights, and both on the hub if that is asked for; the run is saved already,
        and a push that fails says how to do it again."""
        if not self.accelerator.is_main_process:
            return
        run = Path(self.config.output_dir)
        last = checkpoints.saved(run)[-1]
        card = last / CARD
        print(f"{'card':8} {card if card.is_file() else write_card(run, last)}")
        if self.config.hub_model_id is not None:
            try:
                print(f"{'hub':8} {push(run, last, self.config.hub_model_id, self.config.hub_private)}")
            except UserError as error:
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

    def window_starts(self, epoch: int, seeds: list[int]) -> list[int]:
        """The first trained step of each group."""
        rollout, (low, high) = self.config.rollout, self.window_start
        if rollout.window_stride:
            return [sliding_start(low, high, rollout.window_stride, rollout.window_epochs, epoch)] * len(seeds)
        return window_starts(low, high, seeds)

    def epoch_prompts(self, epoch: int) -> list[Prompt]:
        """The prompts of an epoch's groups."""
        tags = {prompt.metadata.get("tag") for prompt in self.train_prompts}
        mix = self.config.prompts.mix or {tag: weight for tag, weight in MIX.items() if tag in tags} or None
        count = self.config.prompts.per_epoch
        return [self.train_prompts[i] for i in epoch_prompts(self.train_prompts, count, self.config.seed, epoch, mix)]

    def _unconditional(self, guidance_scale: float) -> Conditioning | None:
        """The empty prompt's conditioning, one row, where guidance needs it."""
        return self.embed([""]) if guidance_scale != 1 else None


def group_seed(seed: int, epoch: int, group: int) -> int:
    """The seed of all that is random in a group: its window and its noise."""
    return int(np.random.SeedSequence((seed, epoch, group)).generate_state(1)[0])


def _checked_output(config: Config) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from, once it is known that the output folder may be written."""
    resumed = resume.find(config)
    check_output(config, resumed)
    return resumed


def _flush(statistics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over an epoch's pairs, and the ratio's extremes, of statistics on the CPU."""
    joined = _joined(statistics)
    if not joined:
        return {"trained_pairs": 0}
    pairs = max(len(tensor) for tensor in joined.values())
    difference = joined.pop("log_prob_difference", None)
    values = {name: tensor.mean() for name, tensor in joined.items()}
    if difference is not None:
        ratio = joined["ratio"]
        values |= {
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "approx_kl": (ratio - 1 - difference).mean(),
        }
    return {"trained_pairs": pairs, **{name: value.item() for name, value in values.items()}}


def _joined(statistics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of each name one after the other, from the parts that have it."""
    names = dict.fromkeys(name for part in statistics for name in part)
    return {name: torch.cat([part[name] for part in statistics if name in part]) for name in names}
