"""Rewards that are scored by servers: which server gets which images, and what happens when a server fails."""

import json
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import urllib3
from tqdm import tqdm
from urllib3.util import parse_url

from fastflowgrpo.config import TOKEN
from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores
from fastflowgrpo.scoring.endpoint import Endpoint
from fastflowgrpo.scoring.request import BusyError, FailedError, NotAnsweredError, UnscorableError, is_http_url, post
from fastflowgrpo.scoring.wire import FORMATS, MEDIA_TYPES

ATTEMPTS = 5  # how often images are sent before their scores count as missing
REMINDER_SECONDS = 60.0  # between two messages about an endpoint that is down


class ServedReward(ABC):
    """A reward on one server, or on several that give the same scores and share each batch.

    The score of an image is missing (NaN) if the server says so, or if its request failed ATTEMPTS times. While no
    server answers at all, a reward that is `required` waits: the run pauses, and goes on when a server is back. The
    scores of a reward that is not required are then missing at once. Missing scores and waits are printed. The details
    are those that the server sends, and for each URL the seconds that an image's request took.

    Args:
        name: of the reward, for messages.
        urls: of the servers; a path is kept.
        timeout: seconds for an answer.
        required: whether the run waits while no server answers.
        concurrency: requests in flight per URL.

    Raises:
        ValueError: a setting is out of range.
        UserError: when called, if a server says that a request is wrong; sending it again would not help.
    """

    unscorable_statuses: tuple[int, ...] = ()
    """HTTP statuses that refuse only one request; another 3xx or 4xx status means that the settings are wrong."""

    def __init__(self, name: str, urls: Sequence[str], timeout: float, required: bool, concurrency: int) -> None:
        if type(concurrency) is not int or concurrency < 1:
            raise ValueError(f"concurrency must be an integer of at least 1, got {concurrency!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if not isinstance(required, bool):
            raise ValueError(f"required must be true or false, got {required!r}")
        self.name, self.timeout, self.required, self.concurrency = name, timeout, required, concurrency
        self.endpoints = [Endpoint(url.rstrip("/")) for url in urls]
        self.lock = threading.Lock()
        self.http = urllib3.PoolManager(
            num_pools=len(urls),
            maxsize=concurrency,
            timeout=urllib3.Timeout(connect=min(timeout, 10.0), read=timeout),
            retries=False,
        )

    @abstractmethod
    def _split(self, batch: RewardBatch) -> list[RewardBatch]:
        """Cut a batch into the images of one request each."""

    @abstractmethod
    def _encode(self, part: RewardBatch) -> tuple[str, bytes, str]:
        """Encode a request: (path to append to the URL, body, content type)."""

    @abstractmethod
    def _decode(self, body: bytes, count: int) -> Scores:
        """Read the scores of `count` images from an answer; ValueError if the answer makes no sense."""

    def _join(self, answers: list[Scores]) -> Scores:
        """Make a batch's scores from those of the requests, in the order of `_split`."""
        return Scores.cat(answers)

    @abstractmethod
    def _headers(self) -> dict[str, str]:
        """Return the headers of each request, without the content type."""

    def __call__(self, batch: RewardBatch) -> Scores:
        """Score a batch; see the class for missing scores and errors."""
        parts = self._split(replace(batch, images=batch.images.cpu()))
        answers: dict[int, Scores] = {}
        errors: list[BaseException] = []
        stop = threading.Event()
        todo = iter(range(len(parts)))

        def score_parts() -> None:
            try:
                for index in todo:
                    answers[index] = self._score(parts[index], stop)
            except BaseException as error:
                errors.append(error)
                stop.set()

        # Daemon threads, so that an interrupted run does not wait for the requests in flight.
        count = min(len(parts), self.concurrency * len(self.endpoints))
        threads = [threading.Thread(target=score_parts, name=f"reward {self.name}", daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
                    self._report_endpoints()
        finally:
            stop.set()
        if errors:
            raise errors[0]
        scores = self._join([answers[index] for index in range(len(parts))])
        if missing := int(scores.values.isnan().sum()):
            scores.error = scores.error or "the server gives no reason"
            self._print(f"{missing} of {len(scores.values)} images not scored: {scores.error}")
        return scores

    def _score(self, batch: RewardBatch, stop: threading.Event) -> Scores:
        """Score the images of one request; the scores are missing after too many failures, or when `stop` is set."""
        path, body, content_type = self._encode(batch)
        headers = {"Content-Type": content_type, **self._headers()}
        count, failures = len(batch.prompts), 0
        while (endpoint := self._acquire(stop)) is not None:
            sent = time.monotonic()
            try:
                try:
                    answer = post(self.http, endpoint.url, path, body, headers, self.unscorable_statuses)
                    scores = self._decoded(answer, count)
                except UnscorableError as error:
                    scores = Scores.missing(count, str(error))
                seconds = time.monotonic() - sent
                with self.lock:
                    endpoint.succeeded(seconds)
                scores.details[f"seconds/{parse_url(endpoint.url).netloc}"] = torch.full((count,), seconds)
                return scores
            except BusyError as error:
                endpoint.busy(error.seconds)
            except (NotAnsweredError, FailedError) as error:
                with self.lock:
                    endpoint.failed(sent, str(error))
                failures += not self.required or isinstance(error, FailedError)
                if failures == ATTEMPTS:
                    break
            finally:
                with self.lock:
                    endpoint.in_flight -= 1
        reason = "; ".join(f"{endpoint.url}: {endpoint.reason}" for endpoint in self.endpoints if endpoint.reason)
        return Scores.missing(count, reason)

    def _acquire(self, stop: threading.Event) -> Endpoint | None:
        """Wait for an endpoint that may get a request, and choose the one that should answer first.

        Returns None when `stop` is set, or when all endpoints are down and the reward is not required.
        """
        while not stop.is_set():
            with self.lock:
                ready = [endpoint for endpoint in self.endpoints if endpoint.ready(self.concurrency)]
                if ready:
                    best = min(ready, key=lambda endpoint: (endpoint.expected_seconds, endpoint.in_flight))
                    best.in_flight += 1
                    return best
                if not self.required and all(endpoint.down for endpoint in self.endpoints):
                    return None
            stop.wait(0.05)
        return None

    def _decoded(self, body: bytes, count: int) -> Scores:
        try:
            return self._decode(body, count)
        except ValueError as error:
            raise FailedError(f"unreadable answer: {error}") from error

    def _report_endpoints(self) -> None:
        """Print which endpoints went down, are still down or answer again."""
        now = time.monotonic()
        with self.lock:
            paused = self.required and all(endpoint.down for endpoint in self.endpoints)
            for endpoint in self.endpoints:
                seconds = now - endpoint.down_since
                if endpoint.down and now - endpoint.reported_at >= REMINDER_SECONDS:
                    endpoint.reported_at = now
                    consequence = "; the run waits for it" if paused else ""
                    self._print(f"{endpoint.url} has been down for {seconds:.0f} s ({endpoint.reason}){consequence}")
                elif endpoint.reported_at and not endpoint.failures:
                    endpoint.reported_at = 0.0
                    self._print(f"{endpoint.url} answers again, after {seconds:.0f} s")

    def _print(self, message: str) -> None:
        tqdm.write(f"reward {self.name}: {message}")


class RemoteReward(ServedReward):
    """The reward of a given name on reward servers of this package or of Flow-GRPO.

    A batch is cut into requests of whole groups. Failures are handled as in `ServedReward`. The environment variable
    FASTFLOWGRPO_TOKEN holds the bearer token that this package's server asks for.

    Args:
        name: of the reward on the server.
        url: of the server, or a list of servers that give the same scores.
        timeout: seconds for an answer.
        required: whether the run waits while no server answers.
        format: "fastflowgrpo" for this package's server, "flow_grpo" for Flow-GRPO's (GenEval, DeQA, UnifiedReward).
        encoding: of the images: "raw" or "png", which are lossless, or "jpeg"; flow_grpo always uses jpeg.
        batch_size: images per request; a larger group is sent whole.
        concurrency: requests in flight per URL.
        videos: whether the reward takes all frames of a video together; else it is asked about each frame.

    Raises:
        ValueError: a setting is out of range.
        UserError: when called, if a server says that a request is wrong; sending it again would not help.
    """

    def __init__(
        self,
        name: str,
        url: str | Sequence[str],
        timeout: float = 60.0,
        required: bool = True,
        format: str = "fastflowgrpo",
        encoding: str = "raw",
        batch_size: int = 32,
        concurrency: int = 4,
        videos: bool = False,
    ) -> None:
        urls = [url] if isinstance(url, str) else url
        if not isinstance(urls, list | tuple) or not urls or not all(is_http_url(url) for url in urls):
            raise ValueError(f"url must be http://HOST:PORT or a list of such, got {url!r}")
        for setting, value, known in (("format", format, FORMATS), ("encoding", encoding, MEDIA_TYPES)):
            if value not in known:
                raise ValueError(
                    f"unknown {setting} {value!r}{did_you_mean(str(value), known)}, known: {', '.join(known)}"
                )
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        super().__init__(name, urls, timeout, required, concurrency)
        if not isinstance(videos, bool):
            raise ValueError(f"videos must be true or false, got {videos!r}")
        if videos and format == "flow_grpo":
            raise ValueError("format flow_grpo has no place for videos: leave out videos")
        self.format, self.encoding, self.batch_size, self.videos = format, encoding, batch_size, videos

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Ask each server whether it has the reward and can score these prompts; Flow-GRPO's servers are not asked.

        Raises:
            ValueError: a server says no.
        """
        if self.format != "fastflowgrpo":
            return
        body = json.dumps([{"text": prompt.text, "metadata": prompt.metadata} for prompt in prompts]).encode()
        headers = {"Content-Type": "application/json", **self._headers()}
        for endpoint in self.endpoints:
            try:
                post(self.http, endpoint.url, f"/check/{self.name}", body, headers)
            except (NotAnsweredError, FailedError) as error:
                self._print(f"{endpoint.url} does not answer yet: {error}")

    def _split(self, batch: RewardBatch) -> list[RewardBatch]:
        return [batch.rows(rows) for rows in batch.whole_groups(self.batch_size)]

    def _encode(self, part: RewardBatch) -> tuple[str, bytes, str]:
        return FORMATS[self.format].encode(self.name, part, self.encoding, self.timeout)

    def _decode(self, body: bytes, count: int) -> Scores:
        return FORMATS[self.format].decode(body, count)

    def _headers(self) -> dict[str, str]:
        if TOKEN in os.environ and self.format == "fastflowgrpo":
            return {"Authorization": f"Bearer {os.environ[TOKEN]}"}
        return {}
