"""A training run in a forked process, killed where the test says."""

import os
import random
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from fastflowgrpo.console import run_and_exit
from fastflowgrpo.train import main

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


def noisy(batch):
    """A reward that draws from all global random numbers: a resumed run must find them where the killed one was."""
    sizes = batch.images.float().mean((1, 2, 3)) / 255
    return sizes + 0.1 * torch.rand(len(sizes)) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002


def busy(batch, once):
    """A reward that makes the file `once` after some batches and computes from then on without an end."""
    busy.batches = getattr(busy, "batches", 0) + 1
    if busy.batches > 7:
        open(once, "w").close()
        numbers = torch.ones(300, 300)
        while True:
            numbers = torch.nn.functional.gelu(numbers @ numbers).clamp(-1, 1)
    return batch.images.float().mean((1, 2, 3))


def run(
    arguments: list[str],
    folder: str,
    log: str,
    kill_at: int | None = None,
    count: str | None = None,
    largest_file: int | None = None,
) -> None:
    """`main(arguments)`, its output in the file `log`.

    Args:
        kill_at: SIGKILL at that many touches of files in `folder`.
        count: a file for the number of touches.
        largest_file: bytes that a file may have, instead of a disk that is full.
    """
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    touches = 0

    def touch(event, details):
        nonlocal touches
        if event in EVENTS and isinstance(details[0], str | os.PathLike) and str(details[0]).startswith(folder):
            if touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            touches += 1

    sys.addaudithook(touch)
    torch.set_num_threads(1)

    def work() -> int:
        code = main(arguments)
        if count:
            Path(count).write_text(str(touches))
        return code

    run_and_exit(work)
