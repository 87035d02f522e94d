"""A reward in worker processes: it scores on several cores, and a process that crashes or hangs is replaced."""

import atexit
import math
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores

TIMEOUT = 300.0  # default seconds for a part of a batch; also the seconds that a process may take to start
LONGEST_WAIT = 0.5  # seconds of a single wait for a process
ATTEMPTS = 2  # how often a part is given to a process before its scores count as missing
PARTS_PER_WORKER = 4  # parts that a batch is cut into, so that no process waits long for the others


class WorkerReward:
    """A reward that runs in `workers` processes.

    A batch is cut into parts. A part holds whole groups, unless the reward is `pointwise`. The processes read the
    images from shared memory. A process that dies, or takes longer than `timeout` for a part, is replaced, and the new
    process gets the part. The scores of a part are missing (NaN) when the reward raises an exception, or when
    ATTEMPTS processes died or hung. The reason is printed.

    Args:
        name: for messages.
        make_reward: makes the reward, in each process; it must be picklable (a function at the top of a module, or a
            functools.partial of one).
        workers: number of processes; each computes with one thread.
        timeout: seconds for a part.

    Raises:
        ValueError: the reward cannot be made, or a setting is out of range.
    """

    def __init__(self, name: str, make_reward: Callable[[], Any], workers: int, timeout: float = TIMEOUT):
        if type(workers) is not int or workers < 1:
            raise ValueError(f"workers must be an integer of at least 0, got {workers!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.name, self.timeout = name, timeout
        self.lock, self.closed = threading.Lock(), False
        self.workers = [_Worker(name, make_reward) for _ in range(workers)]
        atexit.register(self.close)
        try:
            pointwise = [worker.wait_until_ready() for worker in self.workers]
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | EOFError):
                raise ValueError(f"a process died or did not start within {TIMEOUT:g} s") from error
            raise
        self.pointwise = all(pointwise)

    def close(self) -> None:
        """Stop the processes."""
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
        """Score a batch in all processes.

        Raises:
            OSError, EOFError: `close` was called meanwhile.
        """
        count = len(batch.prompts)
        size = max(1, -(-count // (PARTS_PER_WORKER * len(self.workers))))
        if self.pointwise:
            parts = [slice(begin, begin + size) for begin in range(0, count, size)]
        else:
            parts = batch.whole_groups(size)
        answers: dict[int, Scores] = {}
        errors: list[BaseException] = []
        todo = iter(range(len(parts)))

        def score_parts(worker: _Worker) -> None:
            try:
                for index in todo:
                    answers[index] = self._score(worker, batch, memory.name, parts[index])
            except BaseException as error:
                errors.append(error)

        with _shared(batch.images) as memory:
            threads = [threading.Thread(target=score_parts, args=(worker,), daemon=True) for worker in self.workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return Scores.cat([answers[index] for index in range(len(parts))])

    def _score(self, worker: "_Worker", batch: RewardBatch, memory: str, rows: slice) -> Scores:
        """Score a part; its scores are missing if the reward failed."""
        count = len(batch.prompts[rows])
        request = (
            memory,
            tuple(batch.images.shape),
            rows,
            batch.prompts[rows],
            batch.metadata[rows],
            batch.group_ids[rows].numpy(),
            None if batch.sources is None else [source.numpy() for source in batch.sources[rows]],
        )
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                answer = worker.ask(request, self.timeout)
            except (OSError, EOFError, ValueError) as error:
                reason = str(error) if isinstance(error, TimeoutError | ValueError) else "the process died"
                with self.lock:
                    if self.closed:  # the run has ended and waits for no part
                        raise
                    self._print(f"{reason}; a new one takes its place")
                    worker.stop()
                    worker.start()
                continue
            if isinstance(answer, str):
                reason = answer
                break
            values, details, reason = answer
            details = {name: torch.from_numpy(value) for name, value in details.items()}
            return Scores(torch.from_numpy(values), details, reason)
        self._print(f"{count} images not scored: {reason}")
        return Scores.missing(count, reason)

    def _print(self, message: str) -> None:
        tqdm.write(f"reward {self.name}: {message}")


class _Worker:
    """A worker process, and the connection to it."""

    def __init__(self, name: str, make_reward: Callable[[], Any]):
        self.arguments = (name, make_reward)
        self.start()

    def start(self) -> None:
        """Start the process, which begins to make the reward."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run_worker, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.pointwise: bool | None = None  # None until the process has made the reward

    def wait_until_ready(self) -> bool:
        """Wait until the process has made the reward; returns whether the reward is pointwise.

        Raises:
            ValueError: the reward cannot be made.
            OSError, EOFError: the process died, or did not start in time (TimeoutError).
        """
        if self.pointwise is None:
            answer = self._receive(TIMEOUT)
            if isinstance(answer, str):
                raise ValueError(answer)
            self.pointwise = bool(answer)
        return self.pointwise

    def ask(self, request: Any, timeout: float) -> Any:
        """Send a request and return the answer: a part's (values, details, error), or a string that says what went
        wrong.

        Raises:
            ValueError: the reward cannot be made.
            OSError, EOFError: the process died, or did not answer in time (TimeoutError).
        """
        self.wait_until_ready()
        self.connection.send(request)
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        # In short waits: while this process is stopped, or the laptop suspended, at most one of them passes.
        waits = math.ceil(timeout / LONGEST_WAIT)
        for _ in range(waits):
            if self.connection.poll(timeout / waits):
                return self.connection.recv()
        raise TimeoutError(f"no answer within {timeout:g} s")

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _shared(images: torch.Tensor) -> Iterator[SharedMemory]:
    """Shared memory with a copy of the images."""
    memory = SharedMemory(create=True, size=max(1, images.numel()))
    try:
        shared: np.ndarray = np.ndarray(images.shape, np.uint8, memory.buf)
        torch.from_numpy(shared).copy_(images)
        del shared
        yield memory
    finally:
        memory.close()
        memory.unlink()


def _run_worker(connection: Connection, name: str, make_reward: Callable[[], Any]) -> None:
    """Make the reward, and answer requests until the connection ends; this runs in the worker process."""
    # These signals reach all processes of the terminal; the run handles them and then stops its workers.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        reward = make_reward()
    except (ValueError, ImportError) as error:
        connection.send(str(error))
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
    sources: list[np.ndarray] | None,
) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    """Score the given rows of the images in shared memory, uint8 of the given shape."""
    memory = SharedMemory(memory_name)
    images = np.ndarray(shape, np.uint8, memory.buf)[rows].copy()
    memory.close()
    originals = None if sources is None else [torch.from_numpy(source) for source in sources]
    batch = RewardBatch(torch.from_numpy(images), prompts, metadata, torch.from_numpy(group_ids), originals)
    scores = checked_scores(name, reward, batch)
    details = {key: value.numpy() for key, value in scores.details.items()}
    return scores.values.numpy(), details, scores.error
