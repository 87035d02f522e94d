"""Rewards that are scored by servers: which server gets what, and what happens when one fails."""

import json
import math
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
import urllib3
from tqdm import tqdm
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.util import parse_url

from fastflowgrpo.config import TOKEN
from fastflowgrpo.errors import UserError, did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores
from fastflowgrpo.scoring.wire import FORMATS, MEDIA_TYPES

DOWN = 3  # failures in a row from which on an endpoint counts as down
ATTEMPTS = 5  # times that images are sent before their scores count as missing
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds without a request after the first failure, and at most
REMIND = 60.0  # seconds between two messages about an endpoint that is down
MAX_ANSWER = 2**26  # bytes


class _NotAnsweredError(Exception):
    """The server cannot be reached, or says that it cannot answer now."""


class _BusyError(_NotAnsweredError):
    """The server is there, and its queue full."""

    def __init__(self, seconds: float):
        super().__init__(f"busy for {seconds:g} s")
        self.seconds = seconds


class _FailedError(Exception):
    """The server tried and failed, or its answer makes no sense."""


class _UnscorableError(Exception):
    """The server takes no such request, whatever else it takes."""


@dataclass
class Endpoint:
    """A URL, what was measured of it, and its circuit breaker: after a failure it gets no request until `retry_at`,
    twice as far away after each further one, and then a single one, until one succeeds.

    Attributes:
        in_flight: requests sent and not answered.
        seconds: moving average of a request's duration.
        failures: since the last success.
        failed_at, retry_at: when the last failure was noticed, and when the next request may be sent.
        reason: of the last failure.
        down_since, told_at: when it went down, and when the user was last told; 0 while it is up.
    """

    url: str
    in_flight: int = 0
    seconds: float = 0.0
    failures: int = 0
    failed_at: float = 0.0
    retry_at: float = 0.0
    reason: str = ""
    down_since: float = 0.0
    told_at: float = 0.0

    @property
    def down(self) -> bool:
        return self.failures >= DOWN

    def ready(self, concurrency: int) -> bool:
        return time.monotonic() >= self.retry_at and self.in_flight < (1 if self.failures else concurrency)

    def succeeded(self, seconds: float) -> None:
        self.failures = 0
        self.seconds += (seconds - self.seconds) * (0.2 if self.seconds else 1.0)

    def failed(self, sent: float, reason: str) -> None:
        if sent < self.failed_at:  # what was in flight together fails together: that is one failure
            return
        now = time.monotonic()
        self.failures, self.failed_at, self.reason = self.failures + 1, now, reason
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures - 1, 16))
        self.retry_at = now + random.uniform(0.5, 1) * longest
        if self.failures == DOWN:
            self.down_since = now


class Served(ABC):
    """A reward on one or several servers that score alike, between which each batch is spread.

    An image's score is missing (NaN) if the server says so, or if its request failed ATTEMPTS times; while no server
    answers at all, a reward that is `required` waits, so that the run pauses and goes on by itself, and the scores of
    another are missing at once. Whatever is missing or waited for is printed. The details are the server's, and per URL
    the seconds that an image's request took.

    Raises:
        ValueError: a setting is out of range.
        UserError: when called, if a server says that a request is wrong: no retry would put that right.
    """

    unscorable: tuple[int, ...] = ()  # HTTP statuses by which a server refuses one request and not the user's settings

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
    def _parts(self, batch: RewardBatch) -> list[RewardBatch]:
        """What is sent in a request each."""

    @abstractmethod
    def _encode(self, part: RewardBatch) -> tuple[str, bytes, str]:
        """(path to append to the URL, body, content type) of a request."""

    @abstractmethod
    def _decode(self, body: bytes, count: int) -> Scores:
        """The scores of so many images in an answer; ValueError if it makes no sense."""

    @abstractmethod
    def _headers(self) -> dict[str, str]:
        """Headers of each request."""

    def __call__(self, batch: RewardBatch) -> Scores:
        batch = replace(batch, images=batch.images.cpu())
        parts = self._parts(batch)
        answers: dict[int, Scores] = {}
        errors: list[BaseException] = []
        stop = threading.Event()
        todo = iter(range(len(parts)))

        def work() -> None:
            try:
                for index in todo:
                    answers[index] = self._score(parts[index], stop)
            except BaseException as error:
                errors.append(error)
                stop.set()

        # Daemons: an interrupted run does not wait for what is in flight.
        count = min(len(parts), self.concurrency * len(self.endpoints))
        threads = [threading.Thread(target=work, name=f"reward {self.name}", daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
                    self._tell_of_endpoints()
        finally:
            stop.set()
        if errors:
            raise errors[0]
        scores = Scores.cat([answers[index] for index in range(len(parts))])
        if missing := int(scores.values.isnan().sum()):
            scores.error = scores.error or "the server gives no reason"
            self._tell(f"{missing} of {len(scores.values)} images not scored: {scores.error}")
        return scores

    def _score(self, batch: RewardBatch, stop: threading.Event) -> Scores:
        """The scores of one request's images, or none after too many failures, or when `stop` is set."""
        path, body, content_type = self._encode(batch)
        count, failures = len(batch.prompts), 0
        while (endpoint := self._acquire(stop)) is not None:
            sent = time.monotonic()
            try:
                try:
                    scores = self._read(self._request(endpoint, path, body, content_type), count)
                except _UnscorableError as error:
                    scores = Scores.missing(count, str(error))
                seconds = time.monotonic() - sent
                with self.lock:
                    endpoint.succeeded(seconds)
                scores.details[f"seconds/{parse_url(endpoint.url).netloc}"] = torch.full((count,), seconds)
                return scores
            except _BusyError as error:
                endpoint.retry_at = time.monotonic() + error.seconds * random.uniform(1, 1.5)
            except (_NotAnsweredError, _FailedError) as error:
                with self.lock:
                    endpoint.failed(sent, str(error))
                failures += not self.required or isinstance(error, _FailedError)
                if failures == ATTEMPTS:
                    break
            finally:
                with self.lock:
                    endpoint.in_flight -= 1
        reason = "; ".join(f"{endpoint.url}: {endpoint.reason}" for endpoint in self.endpoints if endpoint.reason)
        return Scores.missing(count, reason)

    def _acquire(self, stop: threading.Event) -> Endpoint | None:
        """The endpoint that should answer first, once there is one; None when there is nothing to wait for."""
        while not stop.is_set():
            with self.lock:
                ready = [endpoint for endpoint in self.endpoints if endpoint.ready(self.concurrency)]
                if ready:
                    best = min(
                        ready, key=lambda endpoint: ((endpoint.in_flight + 1) * endpoint.seconds, endpoint.in_flight)
                    )
                    best.in_flight += 1
                    return best
                if not self.required and all(endpoint.down for endpoint in self.endpoints):
                    return None
            stop.wait(0.05)
        return None

    def _request(self, endpoint: Endpoint, path: str, body: bytes, content_type: str) -> bytes:
        """The body of the answer.

        Raises:
            _NotAnsweredError, _FailedError, _UnscorableError: there is none.
            UserError: the server refuses the request.
        """
        headers = {"Content-Type": content_type, **self._headers()}
        try:
            # Not decoded: an answer that was compressed could be of any size.
            response = self.http.request(
                "POST", endpoint.url + path, body=body, headers=headers, preload_content=False, decode_content=False
            )
            with closing(response):
                data = response.read(MAX_ANSWER)
                if response.read(1):
                    raise _FailedError(f"the answer is longer than {MAX_ANSWER} bytes")
        except (HTTPError, OSError) as error:
            raise _NotAnsweredError(_plain(error)) from error
        if response.status == 200:
            return data
        said = f"HTTP {response.status}: {_detail(data)}"
        if response.status == 429:
            raise _BusyError(_seconds(response.headers.get("Retry-After", "1")))
        if response.status in (408, 502, 503, 504):
            raise _NotAnsweredError(said)
        if response.status >= 500:
            raise _FailedError(said)
        if response.status in self.unscorable:
            raise _UnscorableError(said)
        raise UserError(f"{endpoint.url} refuses: {said}")

    def _read(self, body: bytes, count: int) -> Scores:
        try:
            return self._decode(body, count)
        except ValueError as error:
            raise _FailedError(f"unreadable answer: {error}") from error

    def _tell_of_endpoints(self) -> None:
        """Print which endpoints went down, are still down or came back."""
        now = time.monotonic()
        with self.lock:
            paused = self.required and all(endpoint.down for endpoint in self.endpoints)
            for endpoint in self.endpoints:
                seconds = now - endpoint.down_since
                if endpoint.down and now - endpoint.told_at >= REMIND:
                    endpoint.told_at = now
                    then = "; the run waits for it" if paused else ""
                    self._tell(f"{endpoint.url} has been down for {seconds:.0f} s ({endpoint.reason}){then}")
                elif endpoint.told_at and not endpoint.failures:
                    endpoint.told_at = 0.0
                    self._tell(f"{endpoint.url} answers again, after {seconds:.0f} s")

    def _tell(self, message: str) -> None:
        tqdm.write(f"reward {self.name}: {message}")


class RemoteReward(Served):
    """A reward with the given name on one or several servers, between which each batch is spread.

    A batch is cut into requests of whole groups; see `Served`.

    Args:
        url: of the server, or of several that score alike.
        timeout: seconds for an answer.
        required: whether the run waits while no server answers.
        format: "fastflowgrpo" for this package's server, "flow_grpo" for Flow-GRPO's (GenEval, DeQA, UnifiedReward).
        encoding: of the images: "raw" or "png" without loss, or "jpeg", in which flow_grpo always sends them.
        batch_size: images per request; a larger group is sent whole.
        concurrency: requests in flight per URL.

    The environment variable FASTFLOWGRPO_TOKEN is the bearer token that this package's server asks for.

    Raises:
        ValueError: a setting is out of range.
        UserError: when called, if a server says that a request is wrong: no retry would put that right.
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
    ) -> None:
        urls = [url] if isinstance(url, str) else url
        if not isinstance(urls, list | tuple) or not urls or not all(is_http(url) for url in urls):
            raise ValueError(f"url must be http://HOST:PORT or a list of such, got {url!r}")
        for setting, value, known in (("format", format, FORMATS), ("encoding", encoding, MEDIA_TYPES)):
            if value not in known:
                raise ValueError(
                    f"unknown {setting} {value!r}{did_you_mean(str(value), known)}, known: {', '.join(known)}"
                )
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        super().__init__(name, urls, timeout, required, concurrency)
        self.format, self.encoding, self.batch_size = format, encoding, batch_size

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Ask each server of this package's format whether it has the reward and can score these prompts.

        Raises:
            ValueError: one says no.
        """
        if self.format != "fastflowgrpo":
            return
        body = [{"text": prompt.text, "metadata": prompt.metadata} for prompt in prompts]
        for endpoint in self.endpoints:
            try:
                self._request(endpoint, f"/check/{self.name}", json.dumps(body).encode(), "application/json")
            except (_NotAnsweredError, _FailedError) as error:
                self._tell(f"{endpoint.url} does not answer yet: {error}")

    def _parts(self, batch: RewardBatch) -> list[RewardBatch]:
        return [batch.rows(rows) for rows in batch.whole_groups(self.batch_size)]

    def _encode(self, part: RewardBatch) -> tuple[str, bytes, str]:
        return FORMATS[self.format].encode(self.name, part, self.encoding, self.timeout)

    def _decode(self, body: bytes, count: int) -> Scores:
        return FORMATS[self.format].decode(body, count)

    def _headers(self) -> dict[str, str]:
        if TOKEN in os.environ and self.format == "fastflowgrpo":
            return {"Authorization": f"Bearer {os.environ[TOKEN]}"}
        return {}


def is_http(url: Any) -> bool:
    try:
        return isinstance(url, str) and parse_url(url).scheme in ("http", "https") and bool(parse_url(url).host)
    except HTTPError:
        return False


def _plain(error: Exception) -> str:
    """What went wrong with a connection, in few words."""
    refused = isinstance(error, NewConnectionError)  # which urllib3 counts among the time-outs
    if isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError) and not refused:
        return "no answer in time"
    return str(error.__cause__ or error).rpartition(": ")[2]


def _detail(body: bytes) -> str:
    """What an error's body says: the `detail` of this package's server, the last line of a traceback."""
    try:
        text = str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[-1000:].decode("utf-8", "replace").strip().rpartition("\n")[2]
    return text[:300] or "no detail"


def _seconds(text: str) -> float:
    """Of a Retry-After header; 1 where it holds a date."""
    try:
        return min(max(float(text), 0.1), LONGEST_PAUSE)
    except ValueError:
        return 1.0
