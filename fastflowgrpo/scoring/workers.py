"""A reward in processes of its own: it scores on all cores, and where it crashes or hangs, a process is replaced."""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores

TIMEOUT = 300.0  # seconds that a part may take, unless the user says else, and that a process may take to start
ATTEMPTS = 2  # times that images are given to a process before their scores count as missing
PARTS = 4  # of a batch per process, so that none waits long for the others


class WorkerReward:
    """A reward of the given name and settings in `workers` processes.

    A batch is cut into parts, of whole groups unless the reward says that it is `pointwise`; the images are passed in
    shared memory. A process that dies, or takes longer than `timeout` for a part, is replaced and the part given to the
    new one; after ATTEMPTS the scores of its images are missing (NaN), as they are where the reward raises. Whatever is
    missing is printed.

    Args:
        name, settings: as in the configuration of rewards.
        workers: number of processes, each with one thread.
        timeout: seconds for a part.

    Raises:
        ValueError: the reward cannot be made, or a setting is out of range.
    """

    def __init__(self, name: str, settings: dict[str, Any], workers: int, timeout: float = TIMEOUT):
        if type(workers) is not int or workers < 1:
            raise ValueError(f"workers must be an integer of at least 0, got {workers!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.name, self.timeout = name, timeout
        self.lock, self.closed = threading.Lock(), False
        self.workers = [_Worker(name, settings) for _ in range(workers)]
        atexit.register(self.close)
        try:
            pointwise = [worker.ready() for worker in self.workers]
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | EOFError):
                raise ValueError(f"a process died or did not start within {TIMEOUT:g} s") from error
            raise
        self.pointwise = all(pointwise)

    def close(self) -> None:
        """End the processes."""
        with self.lock:
            self.closed = True
            for worker in self.workers:
                worker.stop()
        atexit.unregister(self.close)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Ask a process whether the reward can score these prompts.

        Raises:
            ValueError: it cannot.
        """
        try:
            problem = self.workers[0].ask(list(prompts), self.timeout)
        except (OSError, EOFError) as error:
            raise ValueError("a process died or hung while it checked the prompts") from error
        if problem:
            raise ValueError(problem)

    def __call__(self, batch: RewardBatch) -> Scores:
        count = len(batch.prompts)
        size = max(1, -(-count // (PARTS * len(self.workers))))
        if self.pointwise:
            parts = [slice(begin, begin + size) for begin in range(0, count, size)]
        else:
            parts = batch.whole_groups(size)
        answers: dict[int, Scores] = {}
        errors: list[BaseException] = []
        todo = iter(range(len(parts)))

        def work(worker: _Worker) -> None:
            try:
                for index in todo:
                    answers[index] = self._score(worker, batch, memory.name, parts[index])
            except BaseException as error:
                errors.append(error)

        with _shared(batch.images) as memory:
            threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self.workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return Scores.cat([answers[index] for index in range(len(parts))])

    def _score(self, worker: "_Worker", batch: RewardBatch, memory: str, rows: slice) -> Scores:
        """The scores of a part, or none after too many failures."""
        count = len(batch.prompts[rows])
        request = (
            memory,
            tuple(batch.images.shape),
            rows,
            batch.prompts[rows],
            batch.metadata[rows],
            batch.group_ids[rows].numpy(),
        )
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                answer = worker.ask(request, self.timeout)
            except (OSError, EOFError, ValueError) as error:
                reason = str(error) if isinstance(error, TimeoutError | ValueError) else "the process died"
                with self.lock:
                    if self.closed:  # by the end of the run, which waits for no part
                        raise
                    self._tell(f"{reason}; a new one takes its place")
                    worker.stop()
                    worker.start()
                continue
            if isinstance(answer, str):
                reason = answer
                break
            values, details, reason = answer
            details = {name: torch.from_numpy(value) for name, value in details.items()}
            return Scores(torch.from_numpy(values), details, reason)
        self._tell(f"{count} images not scored: {reason}")
        return Scores.missing(count, reason)

    def _tell(self, message: str) -> None:
        tqdm.write(f"reward {self.name}: {message}")


class _Worker:
    """A process that scores, and the connection to it."""

    def __init__(self, name: str, settings: dict[str, Any]):
        self.arguments = (name, settings)
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.made: bool | None = None

    def ready(self) -> bool:
        """Wait until it has made the reward; whether that is pointwise.

        Raises:
            ValueError: it cannot make it.
            OSError, EOFError: it died, or takes too long (TimeoutError).
        """
        if self.made is None:
            answer = self._receive(TIMEOUT)
            if isinstance(answer, str):
                raise ValueError(answer)
            self.made = bool(answer)
        return self.made

    def ask(self, request: Any, timeout: float) -> Any:
        """Its answer to a request: a part's (values, details, error), or what went wrong as a string.

        Raises:
            ValueError: it cannot make the reward.
            OSError, EOFError: it died, or takes too long (TimeoutError).
        """
        self.ready()
        self.connection.send(request)
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        if not self.connection.poll(timeout):
            raise TimeoutError(f"no answer within {timeout:g} s")
        return self.connection.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _shared(images: torch.Tensor) -> Iterator[SharedMemory]:
    """A copy of the images in shared memory."""
    memory = SharedMemory(create=True, size=max(1, images.numel()))
    try:
        shared: np.ndarray = np.ndarray(images.shape, np.uint8, memory.buf)
        torch.from_numpy(shared).copy_(images)
        del shared
        yield memory
    finally:
        memory.close()
        memory.unlink()


def _work(connection: Connection, name: str, settings: dict[str, Any]) -> None:
    """What a process does: make the reward, and score until the connection ends."""
    from fastflowgrpo.rewards import build_rewards

    for signum in (signal.SIGINT, signal.SIGTERM):  # of the whole group, they are for the run, which ends its processes
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        reward = build_rewards({name: settings}).rewards[name]
    except ValueError as error:
        connection.send(str(error).removeprefix(f"rewards.{name}: "))
        return
    connection.send(getattr(reward, "pointwise", False))
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(request, list):
                _check(reward, request)
                connection.send("")
            else:
                connection.send(_score(name, reward, *request))
        except Exception as error:
            connection.send(str(error).removeprefix(f"reward {name}: ") or type(error).__name__)


def _check(reward: Any, prompts: list[Prompt]) -> None:
    if check := getattr(reward, "check_prompts", None):
        check(prompts)


def _score(
    name: str,
    reward: Any,
    memory_name: str,
    shape: tuple[int, ...],
    rows: slice,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    group_ids: np.ndarray,
) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    memory = SharedMemory(memory_name)
    images = np.ndarray(shape, np.uint8, memory.buf)[rows].copy()
    memory.close()
    batch = RewardBatch(torch.from_numpy(images), prompts, metadata, torch.from_numpy(group_ids))
    scores = checked_scores(name, reward, batch)
    details = {key: value.numpy() for key, value in scores.details.items()}
    return scores.values.numpy(), details, scores.error
