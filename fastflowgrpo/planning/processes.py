"""How many processes a run starts on a machine without a GPU."""

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.estimate import estimate
from fastflowgrpo.planning.plan import most_processes

# Allowed for what a process needs beside the estimate: Python, PyTorch and its workspaces.
PROCESS_BYTES = 2**29


def usable_cores(cores: int, others: float) -> int:
    """Return the cores to use on a busy machine: those that are free, but at least two thirds.

    Where other processes want every core, two thirds as many threads as theirs get 0.4 of the machine.
    """
    return max(round(cores - others), -(-2 * cores // 3))


def process_count(config: Config, at_most: int, memory: int) -> int:
    """Return the largest number of processes that the groups of an update and the memory allow, at least 1.

    Args:
        config: validated.
        at_most: processes, as the cores allow.
        memory: free bytes.
    """
    count = max(1, min(at_most, most_processes(config)))
    while count > 1:
        if config.rollout.ahead % count:
            count -= 1
            continue
        try:
            needed = estimate(config, count).total_memory(config.policy.gradient_checkpointing) + PROCESS_BYTES
        except UserError:
            return 1  # the run itself will say what is wrong
        if count * needed <= memory:
            break
        count = max(1, min(count - 1, memory // needed))
    return count
