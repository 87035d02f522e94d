"""The arithmetic of batches: what an epoch is for a given number of processes."""

import os
from dataclasses import dataclass

from fastflowgrpo.config import POLICY_GRADIENTS, Config
from fastflowgrpo.errors import UserError


@dataclass(frozen=True)
class Plan:
    """An epoch of `groups` groups of `group_size` images on `processes` processes.

    Groups are dealt out in turn, so that a process has at most one more than another, in an epoch and in an update.
    """

    processes: int
    groups: int
    group_size: int
    trained_per_group: int
    """Images of a group that are trained on: all, or of sft and dpo the best, which of dpo stands for a pair."""
    slot: str
    """What an image is trained on several of: trained steps, or the noise draws of dpo, sft and rwr."""
    slots: int
    updates: int
    groups_each: tuple[int, int]
    """Least and most groups of a process in an epoch."""
    rollout_batches: int
    """Most batches that a process samples an epoch in."""
    rollout_batch: int
    """Images of its largest."""
    update_groups_each: tuple[int, int]
    """Least and most groups of a process in an update."""
    micro_batches: int
    """Most forward and backward passes of a process in an update."""
    micro_batch: int
    """Pairs of its largest."""

    @property
    def images(self) -> int:
        return self.groups * self.group_size

    @property
    def pairs(self) -> int:
        """(image, slot) pairs of an epoch."""
        return self.groups * self.trained_per_group * self.slots

    @property
    def busy(self) -> float:
        """Share of the processes' time in the update that is not spent waiting for those with one more group."""
        return self.groups / self.updates / (self.processes * self.update_groups_each[1])

    def lines(self) -> list[str]:
        """The plan in words."""
        each, of_update = (_range(*limits) for limits in (self.groups_each, self.update_groups_each))
        images, pairs = (
            self.groups_each[1] * self.group_size,
            self.update_groups_each[1] * self.trained_per_group * self.slots,
        )
        trained = "each" if self.trained_per_group == self.group_size else "the best of each group"
        lines = [
            f"images   {self.groups} groups x {self.group_size} = {self.images} an epoch, "
            f"{_count(self.slots, self.slot)} of {trained}: {self.pairs} pairs in {_count(self.updates, 'update')}",
            f"rollout  {each} groups a process, {images} images in "
            f"{_count(self.rollout_batches, 'batch')} of {self.rollout_batch}",
            f"update   {of_update} of {self.groups // self.updates} groups a process, "
            f"{pairs} pairs in {_count(self.micro_batches, 'micro-batch')} of {self.micro_batch}",
        ]
        if self.busy < 1:
            lines.append(f"uneven   processes wait {1 - self.busy:.0%} of the update for those with one more group")
        return lines


def batch_plan(config: Config, processes: int) -> Plan:
    """The plan of a validated config on a number of processes.

    Raises:
        UserError: there are more processes than groups in an update.
    """
    rollout, update = config.rollout, config.update
    groups, size = config.prompts.per_epoch, rollout.group_size
    of_update = groups // update.per_epoch
    if processes > of_update:
        raise UserError(
            f"prompts.per_epoch: {groups} groups in {_count(update.per_epoch, 'update')} are {of_update} an update, "
            f"fewer than the {processes} processes; raise it, or lower update.per_epoch"
        )
    if update.algorithm in POLICY_GRADIENTS:
        slot, slots = "trained step", rollout.window_size or rollout.num_steps - 1  # the last step is never trained
    else:
        slot, slots = "noise draw", update.noise_draws
    trained_per_group = 1 if update.algorithm in ("dpo", "sft") else size
    micro_batch = max(1, update.batch_size // 2) if update.algorithm == "dpo" else update.batch_size
    groups_each = groups // processes, -(-groups // processes)
    update_groups_each = of_update // processes, -(-of_update // processes)
    images, pairs = groups_each[1] * size, update_groups_each[1] * trained_per_group * slots
    return Plan(
        processes=processes,
        groups=groups,
        group_size=size,
        trained_per_group=trained_per_group,
        slot=slot,
        slots=slots,
        updates=update.per_epoch,
        groups_each=groups_each,
        rollout_batches=-(-images // rollout.batch_size),
        rollout_batch=min(images, rollout.batch_size),
        update_groups_each=update_groups_each,
        micro_batches=-(-pairs // micro_batch),
        micro_batch=min(pairs, micro_batch),
    )


def launched_processes() -> int:
    """Processes of this launch, as torchrun and accelerate tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {plural}"
