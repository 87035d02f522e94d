"""The optimiser updates of an epoch: gradients over micro-batches, clipping, AdamW, the weights' moving average."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.config import Config
from fastflowgrpo.console import progress
from fastflowgrpo.distributed import Processes, full_tensor, mark_collective
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning.objective import Batch, MicroBatches, Objective, Statistics
from fastflowgrpo.learning.optimizer import make_optimizer
from fastflowgrpo.learning.snapshot import WeightSnapshot
from fastflowgrpo.policy import Conditioning, Policy

Result = TypeVar("Result")


class Learner:
    """Trains a policy's weights on batches. DDP wraps the transformer, or FSDP2 shards it, as accelerate was launched.

    Args:
        config: of the run.
        policy: whose trainable parameters are optimised.
        objective: computes the loss.
        processes: share a global batch.
    """

    def __init__(self, config: Config, policy: Policy, objective: Objective, processes: Processes):
        self.config, self.policy, self.objective, self.processes = config, policy, objective, processes
        update = config.update
        if update.halve_batch_size and processes.sharded:
            raise UserError("update.halve_batch_size: the ranks of a sharded model (FSDP2) cannot repeat a pass alone")
        if config.policy.quantization is not None and policy.uses_lora and processes.sharded:
            raise UserError("policy.quantization: FSDP2 cannot shard quantised weights; launch with DDP instead")
        if config.rollout.ahead and config.rollout.keep_unconditional and processes.sharded:
            raise UserError(
                "rollout.keep_unconditional: with rollout.ahead ranks would compute different passes, and those of a "
                "sharded model (FSDP2) cannot; set it to false"
            )
        if update.optimizer == "adamw_8bit" and processes.sharded:
            raise UserError("update.optimizer: the state of adamw_8bit is not sharded (FSDP2); launch with DDP instead")
        optimizer = make_optimizer(policy.trainable_parameters(), update)
        policy.transformer, self.optimizer = processes.prepare(policy.transformer, optimizer)
        self.parameters = policy.trainable_parameters()  # sharding has replaced them
        self.ema: EMAModel | None = None
        if update.ema_decay:
            # torch._foreach_copy_ takes no sharded parameters.
            self.ema = EMAModel(self.parameters, decay=update.ema_decay, foreach=not processes.sharded)
        self.old_policy: WeightSnapshot | None = None
        if objective.uses_old_policy:
            self.old_policy = objective.old_policy = WeightSnapshot(self.parameters)
        self.step = 0
        """Optimiser updates done."""

    def warm_up(self, inputs: tuple[Tensor, Tensor, Conditioning]) -> None:
        """Run a pass forward and backward, and one of the reference, for what it compiles. Collective.

        Args:
            inputs: of `Policy.velocity`, of any contents.
        """
        with self.processes.backward_pass(self.policy.transformer, last=True):
            self.processes.backward(self.policy.velocity(*inputs).sum())
        self.optimizer.zero_grad()
        with torch.no_grad(), self.policy.reference():
            self.policy.velocity(*inputs)

    def update(self, batch: Batch) -> dict[str, float]:
        """Run the optimiser updates of an epoch, each on an equal share of the batch's groups. Collective.

        Returns:
            Means of the statistics over the epoch's pairs.

        Raises:
            UserError: a gradient is not finite.
        """
        update, group_size = self.config.update, self.config.rollout.group_size
        groups_per_update = self.config.prompts.per_epoch // update.per_epoch
        statistics: list[Statistics] = []
        for number in range(update.per_epoch):
            groups = self.processes.local_slice(number * groups_per_update, (number + 1) * groups_per_update)
            begin, count = groups.start * group_size, (groups.stop - groups.start) * group_size
            batch = replace(batch, has_rollout_weights=number == 0)
            update_statistics = self.halving(self._accumulate_groups, batch, begin, count)
            if update_statistics:
                norm = self._clip_gradient()
                if self.processes.is_main:
                    update_statistics[-1]["grad_norm"] = norm.reshape(1)
            self.step += 1  # before the optimiser's step: from here on the state is inside an epoch
            self.optimizer.step()  # does nothing without a gradient
            self.optimizer.zero_grad()
            self._update_ema()
            statistics += update_statistics
        if self.old_policy is not None:
            grown = update.old_decay_slope * max(self.step - update.old_decay_start, 0)
            self.old_policy.follow(min(grown, update.old_decay_max))
        on_cpu = {name: tensor.cpu() for name, tensor in concatenate(statistics).items()}
        means = mean_statistics(self.processes.gather(on_cpu))
        return means | {"effective_pairs": self._effective_share(means)}

    def halving(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that runs micro-batches; with `update.halve_batch_size`, again when memory was short.

        Raises:
            torch.OutOfMemoryError: memory is short, and it is not set or the micro-batches have one pair.
        """
        while True:
            try:
                return work(*arguments)
            except torch.OutOfMemoryError:
                if self.objective.pairs == 1 or not self.config.update.halve_batch_size:
                    raise
            # Here, where the error holds no tensors any more.
            self.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.objective.halvings += 1
            if self.processes.is_main:
                tqdm.write(f"out of memory: update.batch_size is {self.objective.batch_size} from now on")

    def accumulate(self, batch: Batch, micro_batches: MicroBatches) -> list[Statistics]:
        """Leave the gradient of the mean loss over all processes' pairs on the parameters. Collective.

        Returns:
            The statistics of this process's micro-batches, on its device; [] if no process has a pair, and then there
            is no gradient.
        """
        counts = self.processes.gather((sum(len(rows) for rows, _ in micro_batches), len(micro_batches)))
        pairs, num_passes = sum(pairs for pairs, _ in counts), max(number for _, number in counts)
        if not pairs:
            return []
        mean_factor = self.processes.count / pairs  # the processes' gradients are averaged, not summed
        # The loss is a mean over a sample's elements: without this factor float16 rounds their gradients to 0.
        scale = batch.trajectory.final[0].numel()
        statistics: list[Statistics] = [{}]

        def run_passes(last: int) -> None:
            for i in progress("update", range(num_passes)):
                self.processes.note(f"update, micro-batch {i + 1} of {num_passes}")
                with self.processes.backward_pass(self.policy.transformer, last=i + 1 == last):
                    if i < len(micro_batches):
                        loss, pair_statistics = self._loss(batch, *micro_batches[i])
                        if i + 1 < len(micro_batches):
                            self.objective.prefetch(batch, *micro_batches[i + 1])
                        self.processes.backward(scale * loss.sum())
                        statistics.append(pair_statistics)
                    else:
                        self.processes.backward(0 * self.dummy_loss(batch).sum())

        if self.config.update.halve_batch_size and self.processes.count > 1:
            self._agree_on_memory(run_passes)
            with self.processes.backward_pass(self.policy.transformer, last=True):
                self.processes.backward(0 * self.dummy_loss(batch).sum())
        else:
            run_passes(num_passes)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, mean_factor / scale)
        return statistics

    def _loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        """The objective's loss of a micro-batch; with `policy.compile`, computed in a full one.

        The last pair is repeated and the repeats' losses left out, so that no other size is compiled. With an
        `update.kl_share` below 1 the repeats would change which pairs have a KL.
        """
        pairs, size = len(rows), self.objective.pairs
        if not self.config.policy.compile or self.config.update.kl_share < 1 or pairs >= size:
            return self.objective.loss(batch, rows, slots)
        full = torch.arange(size).clamp(max=pairs - 1)
        loss, statistics = self.objective.loss(batch, rows[full], slots[full])
        return loss[:pairs], {name: tensor[:pairs] for name, tensor in statistics.items()}

    def _accumulate_groups(self, batch: Batch, begin: int, count: int) -> list[Statistics]:
        return self.accumulate(batch, self.objective.micro_batches(batch, begin, count))

    def _agree_on_memory(self, run_passes: Callable[[int], None]) -> None:
        """Run passes of which none exchanges gradients; all ranks raise where one of them is out of memory."""
        short = False
        try:
            run_passes(0)
        except torch.OutOfMemoryError:
            short = True
        if any(self.processes.gather(short)):
            raise mark_collective(torch.OutOfMemoryError("out of memory in an update, on at least one process"))

    def dummy_loss(self, batch: Batch) -> Tensor:
        """The loss of one pair with advantage 0, (1,).

        A process without a micro-batch runs it while another one has some: all ranks of a sharded model run every pass.
        """
        first, no_advantages = torch.zeros(1, dtype=torch.int64), torch.zeros(len(batch.trajectory.final))
        return self.objective.loss(replace(batch, advantages=no_advantages), first, first)[0]

    def replay(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Compute log-probs of sampled steps again, with the weights that sampled them. Collective.

        It replays a first micro-batch with one pair per row, its slots in turn, and the last micro-batch, which may be
        smaller. Stale samples are left out.

        Returns:
            Steps and absolute differences from the rollout's log-probs, (N,) each on the CPU, of all processes; None
            if no process has a pair.
        """
        fresh = len(batch.advantages) - batch.stale
        micro_batches = self.objective.micro_batches(batch, batch.stale, fresh)
        replayed: list[tuple[Tensor, Tensor]] = []
        if micro_batches:
            first = micro_batches[0][0]
            for rows, slots in ((first, torch.arange(len(first)) % self.objective.slots), micro_batches[-1]):
                # Only the statistics are kept: the loss would hold its graph beside the next one.
                statistics = self._loss(batch, rows, slots)[1]
                difference = statistics["log_prob_difference"].abs().cpu()
                replayed.append((batch.trajectory.steps[rows, slots], difference))
        else:
            for _ in range(2):
                self.dummy_loss(batch)
        all_replayed = [pair for rank_replayed in self.processes.gather(replayed) for pair in rank_replayed]
        if not all_replayed:
            return None
        steps, differences = zip(*all_replayed, strict=True)
        return torch.cat(steps), torch.cat(differences)

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Inside it the policy has the weights that sample the rollout."""
        if self.config.update.data == "offline":
            return self.policy.reference()
        return nullcontext() if self.old_policy is None else self.old_policy.active()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside it the trained weights are their moving average, once there is one."""
        if self.ema is None or not self.ema.optimization_step:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by their name in the unwrapped transformer, in the optimiser's order."""
        module = self.processes.unwrap(self.policy.transformer)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {names[id(parameter)]: parameter for parameter in self.parameters}

    def _effective_share(self, means: dict[str, float]) -> float:
        """The share of the epoch's pairs that have an advantage and that no trust region stopped."""
        per_group = 1 if self.objective.one_pair_per_group else self.config.rollout.group_size
        pairs = self.config.prompts.per_epoch * per_group * self.objective.slots
        stopped = means.get("clipped_above", 0) + means.get("clipped_below", 0)
        return means["trained_pairs"] * (1 - stopped) / pairs

    def _clip_gradient(self) -> Tensor:
        """Clip the gradient to `update.max_grad_norm`; its norm before that."""
        with self.processes.meeting():
            norm = full_tensor(self.processes.clip_gradient(self.parameters, self.config.update.max_grad_norm))
            finite = math.isfinite(norm)  # on a GPU the host waits for the others here
        if not finite:
            raise mark_collective(
                UserError("the gradient is not finite: lower update.learning_rate or use another policy.dtype")
            )
        return norm

    def _update_ema(self) -> None:
        if self.ema is not None and self.step % self.config.update.ema_every == 0:
            # The decay grows with the updates s to ema_decay, as s / (9 + s). EMAModel would count its own calls.
            self.ema.optimization_step = self.step - 1
            self.ema.step(self.parameters)


def mean_statistics(parts: list[Statistics]) -> dict[str, float]:
    """Means over pairs, and the ratio's extremes, of statistics on the CPU."""
    joined = concatenate(parts)
    if not joined:
        return {"trained_pairs": 0}
    pairs = max(len(tensor) for tensor in joined.values())
    joined.pop("log_prob_difference", None)
    values = {name: tensor.mean() for name, tensor in joined.items()}
    if "ratio" in joined:
        ratio = joined["ratio"].double()
        values |= {
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "approx_kl": (ratio - 1 - ratio.log()).mean(),
        }
    return {"trained_pairs": pairs, **{name: value.item() for name, value in values.items()}}


def concatenate(parts: list[Statistics]) -> Statistics:
    """The tensors of each name one after the other, from the parts that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
