"""The state of a run between epochs, and its checkpoint."""

import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastflowgrpo.config import Config
from fastflowgrpo.distributed import Processes, override_state_dict
from fastflowgrpo.learning.learner import Learner
from fastflowgrpo.runs.checkpoints import TRAINING, Checkpoint, write_checkpoint
from fastflowgrpo.runs.guard import best_step
from fastflowgrpo.runs.resume import config_as_json
from fastflowgrpo.runs.training_state import (
    ahead_state,
    load_ahead,
    load_rng,
    load_training,
    rng_state,
    save_training,
    training_state,
)
from fastflowgrpo.scoring.epoch import Drawn


class RunState:
    """Where a run stands: epochs done, rows logged, time taken, and what was saved last.

    A checkpoint holds the state after the last whole epoch. From then to the next optimiser update only the random
    numbers change, besides the row of an evaluation; `mark_epoch_boundary` keeps the former.

    Args:
        config: of the run.
        processes: of the run.
        learner: whose weights, optimiser and average are saved.
        prompt_digests: of the run's prompts, by setting; see `resume.prompts_digest`.
    """

    def __init__(self, config: Config, processes: Processes, learner: Learner, prompt_digests: dict[str, str]):
        self.config, self.processes, self.learner, self.prompt_digests = config, processes, learner, prompt_digests
        self.run_id = uuid4().hex[:8]
        self.epoch = 0
        """Epochs done."""
        self.rows: list[dict[str, Any]] = []
        """The rows of metrics.jsonl; every rank has them."""
        self.ahead = Drawn()
        """The groups of the next epoch that were sampled before the last update."""
        self.saved_step = 0
        """Optimiser updates done when the last checkpoint was written."""
        self._start = time.perf_counter()
        self.mark_epoch_boundary()

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint.

        Raises:
            UserError: it does not fit the model, or not every process sees it.
        """
        learner = self.learner
        load_training(checkpoint, learner.named_parameters(), learner.optimizer, learner.ema, learner.old_policy)
        load_rng(checkpoint, self.processes.rank, self.processes.accelerator.device)
        self.ahead = load_ahead(checkpoint, self.processes)
        self.run_id, self.epoch, self.rows = checkpoint.manifest["run_id"], checkpoint.epoch, checkpoint.rows()
        learner.step = self.saved_step = checkpoint.step
        self._start -= checkpoint.manifest["wall_s"]
        self.mark_epoch_boundary()

    def mark_epoch_boundary(self) -> None:
        """Note that the weights are those after a whole epoch."""
        self.boundary_step = self.learner.step
        self.boundary_rng = rng_state(self.processes.accelerator.device)

    @property
    def at_epoch_boundary(self) -> bool:
        """Whether no optimiser update has begun since the last whole epoch."""
        return self.learner.step == self.boundary_step

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken over all its starts, without loading the model."""
        return time.perf_counter() - self._start

    @property
    def evaluated_step(self) -> int | None:
        """The step of the last row if that is an evaluation."""
        return self.rows[-1]["step"] if self.rows and "eval" in self.rows[-1] else None

    def save(self) -> None:
        """Write a checkpoint, unless the state is saved already. Collective.

        Raises:
            UserError: it cannot be written; the earlier checkpoints are untouched.
        """
        learner, processes = self.learner, self.processes
        if learner.step == self.saved_step:
            return
        processes.note("checkpoint")
        rng_states = processes.gather(self.boundary_rng)
        state = training_state(learner.named_parameters(), learner.optimizer, learner.ema, learner.old_policy)
        if ahead := ahead_state(self.ahead, self.config.rollout.group_size, processes):
            state["ahead"] = ahead
        state = {name: processes.full_on_main(tensors) for name, tensors in state.items()}
        module = processes.unwrap(learner.policy.transformer)
        # 0: there is no average yet, and both folders get the raw weights.
        ema_steps = learner.ema.optimization_step if learner.ema is not None else None

        def write(folder: Path) -> None:
            with override_state_dict(module, state["ema"] if ema_steps else state["weights"]):
                learner.policy.save(folder)
            if ema_steps is not None:
                with override_state_dict(module, state["weights"]):
                    learner.policy.save(folder / "raw")
            save_training(folder / TRAINING, state, ema_steps, rng_states, self.rows)

        manifest = {
            "epoch": self.epoch,
            "run_id": self.run_id,
            "wall_s": self.wall_s,
            "config": config_as_json(self.config),
            "prompts": self.prompt_digests,
        }
        output_dir, limit = self.config.output_dir, self.config.checkpoints_total_limit
        best = partial(best_step, self.rows)
        processes.on_main(lambda: write_checkpoint(output_dir, limit, write, manifest, learner.step, best))
        self.saved_step = learner.step
