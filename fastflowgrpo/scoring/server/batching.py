"""How requests share a batch: a reward scores the images of several requests at once."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from fastflowgrpo.config import ServerConfig
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores
from fastflowgrpo.scoring.server.messages import ScoreAnswer
from fastflowgrpo.scoring.server.metrics import Metrics


@dataclass(eq=False)
class Job:
    """The images of one request, and the answer to come."""

    batch: RewardBatch
    answer: "Future[ScoreAnswer]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class BatchingScorer:
    """A reward with two threads: one joins the images of several requests into a batch, the other scores batches.

    The oldest request is joined by other requests with images of the same size, all with sources or
    all without. The batch is complete when it has
    `batch_size` images, or when the scorer is free and the request has waited for `delay` seconds. A request is never
    split, so that a reward sees whole groups.
    """

    def __init__(self, name: str, reward: Callable[[RewardBatch], Any], config: ServerConfig, metrics: Metrics):
        self.name, self.reward, self.config, self.metrics = name, reward, config, metrics
        self.waiting: deque[Job] = deque()
        self.next_batch: tuple[list[Job], RewardBatch] | None = None
        self.idle = False  # whether the scoring thread waits for a batch
        self.changed = threading.Condition()  # guards the three above
        self.busy_since: float | None = None
        for target in (self._join_batches, self._score_batches):
            threading.Thread(target=target, name=f"reward {name}", daemon=True).start()

    @property
    def hangs(self) -> bool:
        """Whether the current batch takes longer than the server's timeout."""
        busy_since = self.busy_since
        return busy_since is not None and time.monotonic() - busy_since > self.config.timeout

    def submit(self, job: Job) -> None:
        """Queue a request; its `answer` is set once it is scored. Cancel the answer if nobody waits for it."""
        with self.changed:
            self.waiting.append(job)
            self.changed.notify_all()

    def _join_batches(self) -> None:
        """Copy the images of requests into the next batch while another one is scored; runs in the first thread."""
        while True:
            jobs = self._take_jobs()
            batch = _joined([job.batch for job in jobs])
            with self.changed:
                self.changed.wait_for(lambda: self.next_batch is None)
                self.next_batch, self.idle = (jobs, batch), False
                self.changed.notify_all()

    def _take_jobs(self) -> list[Job]:
        """Wait until a batch is complete, and take its requests from the queue."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            first = self.waiting[0]
            self.changed.wait_for(lambda: self.idle or self._full())
            self.changed.wait_for(self._full, first.arrived + self.config.delay - time.monotonic())
            taken: list[Job] = []
            images = 0
            for job in self.waiting:
                if _kind(job) == _kind(first):
                    images += len(job.batch.images)
                    if taken and images > self.config.batch_size:
                        break
                    taken.append(job)
            self.waiting = deque(job for job in self.waiting if job not in taken)
            return taken

    def _full(self) -> bool:
        kind = _kind(self.waiting[0])
        images = (len(job.batch.images) for job in self.waiting if _kind(job) == kind)
        return sum(images) >= self.config.batch_size

    def _score_batches(self) -> None:
        """Score one batch after another; runs in the second thread."""
        with torch.no_grad():
            while True:
                with self.changed:
                    self.idle = self.next_batch is None
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.next_batch)
                    assert self.next_batch is not None
                    (jobs, batch), self.next_batch = self.next_batch, None
                    self.changed.notify_all()
                # The answer is cancelled when the client waits no longer.
                live = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
                if live:
                    self.busy_since = time.monotonic()
                    self._score(live, batch if len(live) == len(jobs) else _joined([job.batch for job in live]))
                    self.busy_since = None

    def _score(self, jobs: list[Job], batch: RewardBatch) -> None:
        """Score a batch and set the answers; if the reward fails, score each request alone."""
        begin = time.monotonic()
        try:
            scores = checked_scores(self.name, self.reward, batch)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._score([job], job.batch)
                return
            scores = Scores.missing(len(jobs[0].batch.prompts), str(error))
        self.metrics.batch_size.labels(self.name).observe(len(scores.values))
        self.metrics.seconds.labels(self.name).observe(time.monotonic() - begin)
        self.metrics.images.labels(self.name).inc(len(scores.values))
        self.metrics.missing.labels(self.name).inc(int(scores.values.isnan().sum()))
        begin_row = 0
        for job in jobs:
            rows = slice(begin_row, begin_row := begin_row + len(job.batch.prompts))
            details = {name: _json(values[rows]) for name, values in scores.details.items()}
            values = _json(scores.values[rows])
            error_text = scores.error or None if None in values else None
            job.answer.set_result(ScoreAnswer(scores=values, details=details, error=error_text))


def _kind(job: Job) -> tuple[torch.Size, bool]:
    """What requests that share a batch have in common."""
    return job.batch.images.shape[1:], job.batch.sources is None


def _joined(batches: list[RewardBatch]) -> RewardBatch:
    """Join several batches into one; groups of different batches stay separate."""
    if len(batches) == 1:
        return batches[0]
    group_ids, groups = [], 0
    for batch in batches:
        group_ids.append(batch.group_ids + groups)
        groups += int(batch.group_ids.max()) + 1
    return RewardBatch(
        torch.cat([batch.images for batch in batches]),
        [prompt for batch in batches for prompt in batch.prompts],
        [metadata for batch in batches for metadata in batch.metadata],
        torch.cat(group_ids),
        None if batches[0].sources is None else [source for batch in batches for source in batch.sources or ()],
    )


def _json(values: torch.Tensor) -> list[float | None]:
    """The values as JSON has them, null for NaN."""
    return [None if value != value else value for value in values.tolist()]
