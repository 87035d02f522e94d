"""How an epoch is divided into batches, updates and micro-batches among a number of processes."""

import os
from dataclasses import dataclass

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning import OBJECTIVES


@dataclass(frozen=True)
class Plan:
    """An epoch of `groups` groups of `group_size` images on `processes` processes.

    Groups are assigned to the processes in turn, so that in an epoch and in each update a process has at most one group
    more than another.
    """

    processes: int
    groups: int
    group_size: int
    trained_per_group: int
    """Images of a group that are trained on, each in pairs of its own: all, or 1 where a pair stands for its group."""
    pair_name: str
    """What is paired with an image in training: a trained step or a noise draw."""
    pairs_per_image: int
    updates: int
    groups_per_process: tuple[int, int]
    """Fewest and most groups of a process in an epoch."""
    candidates: int
    """Candidates of a group, 0 if nothing is explored."""
    candidate_batch_size: int
    """Candidates in the largest pass."""
    rollout_batches: int
    """Batches in the rollout of the process with the most groups."""
    rollout_batch_size: int
    """Images in the largest batch."""
    update_groups_per_process: tuple[int, int]
    """Fewest and most groups of a process in an update."""
    micro_batches: int
    """Forward and backward passes in an update of the process with the most groups."""
    micro_batch_size: int
    """Pairs in the largest micro-batch."""
    ahead: int
    """Groups of the next epoch that a process samples before the update."""

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return self.groups * self.group_size

    @property
    def pairs(self) -> int:
        """Pairs of an image and a trained step or noise draw in an epoch."""
        return self.groups * self.trained_per_group * self.pairs_per_image

    @property
    def utilization(self) -> float:
        """Share of the update's time in which the processes do not wait for those with one more group."""
        return self.groups / self.updates / (self.processes * self.update_groups_per_process[1])

    def summary_lines(self) -> list[str]:
        """Return the plan in words."""
        groups, update_groups = _range(*self.groups_per_process), _range(*self.update_groups_per_process)
        images = self.groups_per_process[1] * self.group_size
        pairs = self.update_groups_per_process[1] * self.trained_per_group * self.pairs_per_image
        trained = "each" if self.trained_per_group == self.group_size else "each group"
        lines = [
            f"images   {self.groups} groups x {self.group_size} = {self.images} an epoch, "
            f"{_count(self.pairs_per_image, self.pair_name)} of {trained}: {self.pairs} pairs in "
            f"{_count(self.updates, 'update')}",
            f"rollout  {groups} groups a process, {images} images in "
            f"{_count(self.rollout_batches, 'batch')} of {self.rollout_batch_size}",
            f"update   {update_groups} of {self.groups // self.updates} groups a process, "
            f"{pairs} pairs in {_count(self.micro_batches, 'micro-batch')} of {self.micro_batch_size}",
        ]
        if self.candidates:
            candidates, half = self.groups_per_process[1] * self.candidates, self.group_size // 2
            lines.insert(
                1,
                f"explore  {groups} groups a process, {candidates} candidates in batches of "
                f"{self.candidate_batch_size}; the {half} best and the {half} worst of each {self.candidates} are kept",
            )
        if self.ahead:
            lines.append(
                f"ahead    {self.ahead} groups a process of the next epoch, {self.ahead * self.group_size} images"
            )
        if self.utilization < 1:
            lines.append(
                f"uneven   processes wait {1 - self.utilization:.0%} of the update for those with one more group"
            )
        return lines


def batch_plan(config: Config, processes: int) -> Plan:
    """Return the plan of a run.

    Args:
        config: validated.
        processes: number of processes that the groups are divided among.

    Raises:
        UserError: there are more processes than groups in an update, or they cannot share rollout.ahead evenly.
    """
    rollout, update = config.rollout, config.update
    groups, size = config.prompts.per_epoch, rollout.group_size
    groups_per_update = most_processes(config)
    if processes > groups_per_update:
        raise UserError(
            f"prompts.per_epoch: {groups} groups in {_count(update.per_epoch, 'update')} are {groups_per_update} "
            f"an update, fewer than the {processes} processes; raise it, or lower update.per_epoch"
        )
    if rollout.ahead % processes:
        raise UserError(f"rollout.ahead: {rollout.ahead} groups must be a multiple of the {processes} processes")
    objective = OBJECTIVES[update.algorithm]
    if objective.uses_log_probs:  # the last step is never trained
        pair_name, pairs_per_image = "trained step", rollout.window_size or rollout.num_steps - 1
    else:
        pair_name, pairs_per_image = "noise draw", update.noise_draws
    trained_per_group = 1 if objective.one_pair_per_group else size
    micro_batch_size = max(1, update.batch_size // objective.samples_per_pair(config))
    groups_per_process = groups // processes, -(-groups // processes)
    update_groups_per_process = groups_per_update // processes, -(-groups_per_update // processes)
    images, pairs = groups_per_process[1] * size, update_groups_per_process[1] * trained_per_group * pairs_per_image
    candidates = rollout.candidates or 0
    explored = min(groups_per_process[1], max(1, rollout.batch_size // max(1, candidates)))  # groups at once
    return Plan(
        processes=processes,
        groups=groups,
        group_size=size,
        trained_per_group=trained_per_group,
        pair_name=pair_name,
        pairs_per_image=pairs_per_image,
        updates=update.per_epoch,
        groups_per_process=groups_per_process,
        candidates=candidates,
        candidate_batch_size=min(explored * candidates, rollout.batch_size),
        rollout_batches=-(-images // rollout.batch_size),
        rollout_batch_size=min(images, rollout.batch_size),
        update_groups_per_process=update_groups_per_process,
        micro_batches=-(-pairs // micro_batch_size),
        micro_batch_size=min(pairs, micro_batch_size),
        ahead=rollout.ahead // processes,
    )


def most_processes(config: Config) -> int:
    """Return the number of groups in an update, of which every process needs one."""
    return config.prompts.per_epoch // config.update.per_epoch


def launched_processes() -> int | None:
    """Return the number of processes that torchrun, accelerate or MPI has launched; None without a launcher."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1 if "ACCELERATE_MIXED_PRECISION" in os.environ else None  # set by accelerate launch for one process too


def _range(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} to {most}"


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {plural}"
