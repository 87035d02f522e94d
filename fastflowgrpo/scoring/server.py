"""The reward server's application (docs/serving.md): what it accepts, how requests share a batch, what it measures."""

import asyncio
import hmac
import io
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import numpy as np
import torch
from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, Json
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect

from fastflowgrpo import __version__
from fastflowgrpo.config import ServerConfig
from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores
from fastflowgrpo.scoring.wire import MEDIA_TYPES

PILLOW_FORMATS = {MEDIA_TYPES["png"]: "PNG", MEDIA_TYPES["jpeg"]: "JPEG"}
MIB = 2**20


class ScoreRequest(BaseModel):
    """The field `request` of a score request; lists have an entry per image."""

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[str], Field(min_length=1)]
    metadata: list[dict[str, Any]] | None = None
    """Each prompt's GenEval metadata; by default none has any."""
    group_ids: list[int] | None = None
    """Images of one group are scored in one batch; by default each image is its own group."""
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Height and width of raw images."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds after which nobody waits for the scores any more."""


class ScoreAnswer(BaseModel):
    """Scores in the order of the images; null for an image that could not be scored, with the reason in `error`."""

    scores: list[float | None]
    details: dict[str, list[float | None]]
    error: str | None


class PromptToCheck(BaseModel):
    """A prompt that images are to be scored against."""

    model_config = ConfigDict(extra="forbid")

    text: str
    metadata: dict[str, Any] = {}


class Health(BaseModel):
    """The rewards that are served, and those of them whose scorer has not answered for longer than the timeout."""

    rewards: list[str]
    hanging: list[str]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


@dataclass(eq=False)
class Job:
    """A request's images, on their way through a scorer."""

    batch: RewardBatch
    answer: "Future[ScoreAnswer]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "fastflowgrpo", "registry": self.registry}
        self.requests = Counter("requests", "Answers, by HTTP status.", ["status"], **common)
        self.held = Gauge("requests_held", "Requests being read, waiting or being scored.", **common)
        self.images = Counter("images", "Images scored.", ["reward"], **common)
        self.missing = Counter("missing_scores", "Images that could not be scored.", ["reward"], **common)
        self.batch_size = Histogram(
            "batch_size", "Images scored at once.", ["reward"], buckets=[2**i for i in range(11)], **common
        )
        self.seconds = Histogram("batch_seconds", "Duration of scoring a batch.", ["reward"], **common)


class Scorer:
    """A reward with threads of its own, which scores the images of several requests at once.

    The oldest request is joined by others with images of its size, until there are `batch_size` images or it has waited
    for `delay` seconds. A request is never split, so that a groupwise reward sees whole groups.
    """

    def __init__(self, name: str, reward: Callable[[RewardBatch], Any], config: ServerConfig, metrics: Metrics):
        self.name, self.reward, self.config, self.metrics = name, reward, config, metrics
        self.waiting: deque[Job] = deque()
        self.joined: tuple[list[Job], RewardBatch] | None = None
        self.idle = False
        self.changed = threading.Condition()
        self.busy_since: float | None = None
        for work in (self._join, self._work):
            threading.Thread(target=work, name=f"reward {name}", daemon=True).start()

    @property
    def hangs(self) -> bool:
        busy_since = self.busy_since
        return busy_since is not None and time.monotonic() - busy_since > self.config.timeout

    def submit(self, job: Job) -> None:
        with self.changed:
            self.waiting.append(job)
            self.changed.notify_all()

    def _join(self) -> None:
        """Copies the images of requests into a batch, a full one while another is scored: the scorer never waits."""
        while True:
            jobs = self._take()
            batch = _joined([job.batch for job in jobs])
            with self.changed:
                self.changed.wait_for(lambda: self.joined is None)
                self.joined, self.idle = (jobs, batch), False
                self.changed.notify_all()

    def _work(self) -> None:
        with torch.no_grad():
            while True:
                with self.changed:
                    self.idle = self.joined is None
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.joined)
                    assert self.joined is not None
                    (jobs, batch), self.joined = self.joined, None
                    self.changed.notify_all()
                # A job whose client has given up is cancelled.
                live = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
                if live:
                    self.busy_since = time.monotonic()
                    self._score(live, batch if len(live) == len(jobs) else _joined([job.batch for job in live]))
                    self.busy_since = None

    def _take(self) -> list[Job]:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            first = self.waiting[0]
            self.changed.wait_for(lambda: self.idle or self._full())
            self.changed.wait_for(self._full, first.arrived + self.config.delay - time.monotonic())
            taken: list[Job] = []
            images = 0
            for job in self.waiting:
                if job.batch.images.shape[1:] == first.batch.images.shape[1:]:
                    images += len(job.batch.images)
                    if taken and images > self.config.batch_size:
                        break
                    taken.append(job)
            self.waiting = deque(job for job in self.waiting if job not in taken)
            return taken

    def _full(self) -> bool:
        size = self.waiting[0].batch.images.shape[1:]
        images = (len(job.batch.images) for job in self.waiting if job.batch.images.shape[1:] == size)
        return sum(images) >= self.config.batch_size

    def _score(self, jobs: list[Job], batch: RewardBatch) -> None:
        begin = time.monotonic()
        try:
            scores = checked_scores(self.name, self.reward, batch)
        except Exception as raised:
            if len(jobs) > 1:  # one request's images must not cost the others their scores
                for job in jobs:
                    self._score([job], job.batch)
                return
            scores = Scores.missing(len(jobs[0].batch.prompts), str(raised))
        self.metrics.batch_size.labels(self.name).observe(len(scores.values))
        self.metrics.seconds.labels(self.name).observe(time.monotonic() - begin)
        self.metrics.images.labels(self.name).inc(len(scores.values))
        self.metrics.missing.labels(self.name).inc(int(scores.values.isnan().sum()))
        begin_row = 0
        for job in jobs:
            rows = slice(begin_row, begin_row := begin_row + len(job.batch.prompts))
            details = {name: _json(values[rows]) for name, values in scores.details.items()}
            values = _json(scores.values[rows])
            error = scores.error or None if None in values else None
            job.answer.set_result(ScoreAnswer(scores=values, details=details, error=error))


def _joined(batches: list[RewardBatch]) -> RewardBatch:
    """One batch of several, whose groups stay apart."""
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
    )


def _json(values: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


class Gate:
    """ASGI middleware: who has the token gets in, while there is room, with a body that keeps to size and time."""

    def __init__(self, app: Any, config: ServerConfig, token: str | None, metrics: Metrics):
        self.app, self.config, self.token, self.metrics = app, config, token, metrics
        self.held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        try:
            if scope["path"] != "/health":
                self._check_token(headers)
            if scope["method"] != "POST":
                return await self.app(scope, receive, counted)
            with self._place():
                await self.app(scope, await self._read(headers, receive), counted)
        except HTTPException as error:  # of this class: the application answers its own
            await JSONResponse({"detail": error.detail}, error.status_code, error.headers)(scope, receive, counted)
        except ClientDisconnect:
            pass

    def _check_token(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.held >= self.config.queue:
            raise HTTPException(429, f"{self.held} requests are held already", {"Retry-After": "1"})
        self.held += 1
        self.metrics.held.set(self.held)
        try:
            yield
        finally:
            self.held -= 1
            self.metrics.held.set(self.held)

    async def _read(self, headers: dict[bytes, bytes], receive: Any) -> Callable[[], Awaitable[Any]]:
        """The whole body, as the application receives it."""
        limit = self.config.max_request_mib * MIB
        messages: deque[Any] = deque()
        size = int(headers.get(b"content-length", b"0"))  # one that is no number does not get past uvicorn
        try:
            with anyio.fail_after(self.config.timeout):
                received = 0
                while not messages or messages[-1].get("more_body"):
                    if max(size, received) > limit:
                        raise HTTPException(413, f"the request is larger than {self.config.max_request_mib} MiB")
                    messages.append(await receive())
                    if messages[-1]["type"] == "http.disconnect":
                        raise ClientDisconnect
                    received += len(messages[-1].get("body", b""))
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {self.config.timeout:g} s") from None

        async def replay() -> Any:
            return messages.popleft() if messages else await receive()

        return replay


def create_app(rewards: Mapping[str, Callable[[RewardBatch], Any]], config: ServerConfig, token: str | None) -> FastAPI:
    """The application that serves `rewards`, each from a thread of its own, to whom has the token (None: to all)."""
    metrics = Metrics()
    scorers = {name: Scorer(name, reward, config, metrics) for name, reward in rewards.items()}
    MultiPartParser.spool_max_size = config.max_request_mib * MIB  # a request stays in memory
    Image.MAX_IMAGE_PIXELS = None  # ours is the limit, and it is an answer instead of a warning
    problems: dict[int | str, Any] = {
        status: {"model": Problem} for status in (400, 401, 404, 408, 413, 415, 422, 429, 503)
    }
    app = FastAPI(
        title="FastFlowGRPO reward server", version=__version__, docs_url=None, redoc_url=None, responses=problems
    )
    app.add_middleware(Gate, config=config, token=token, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Not FastAPI's own answer: it repeats what was sent, which JSON may be unable to hold.
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": "; ".join(found[:5]).encode("utf-8", "replace").decode()}, 422)

    def scorer_of(reward: str) -> Scorer:
        if reward not in scorers:
            hint = did_you_mean(reward, scorers)
            raise HTTPException(404, f"there is no reward {reward!r}{hint}; there are: {', '.join(scorers)}")
        return scorers[reward]

    @app.post("/score/{reward}")
    async def score(
        reward: str, request: Annotated[Json[ScoreRequest], Form()], images: list[UploadFile]
    ) -> ScoreAnswer:
        """Scores of images: the field `request` (JSON), and a file `images` for each image, of PNG, JPEG or raw uint8
        (3, height, width)."""
        scorer = scorer_of(reward)
        if scorer.hangs:
            raise HTTPException(503, f"the reward {reward} hangs", {"Retry-After": "10"})
        job = Job(await asyncio.to_thread(_read_batch, scorer, request, images, config))
        scorer.submit(job)
        timeout = min(config.timeout, request.timeout or math.inf)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.answer), timeout)
        except TimeoutError:
            raise HTTPException(503, f"not scored within {timeout:g} s", {"Retry-After": "1"}) from None

    @app.post("/check/{reward}")
    def check(reward: str, prompts: list[PromptToCheck]) -> None:
        """Can the reward score these prompts? If not, the answer names one that it cannot."""
        _check_prompts(scorer_of(reward), [Prompt(prompt.text, prompt.metadata) for prompt in prompts])

    @app.get("/health")
    async def health(response: Response) -> Health:
        """Status 503 while a reward hangs."""
        hanging = [name for name, scorer in scorers.items() if scorer.hangs]
        response.status_code = 503 if hanging else 200
        return Health(rewards=list(scorers), hanging=hanging)

    @app.get("/metrics", response_class=Response)
    async def metrics_text() -> Response:
        """In Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _check_prompts(scorer: Scorer, prompts: list[Prompt]) -> None:
    check = getattr(scorer.reward, "check_prompts", None)
    if check is not None:
        try:
            check(prompts)
        except ValueError as error:
            raise HTTPException(422, f"reward {scorer.name}: {error}") from error


def _read_batch(scorer: Scorer, request: ScoreRequest, files: list[UploadFile], config: ServerConfig) -> RewardBatch:
    """The batch that a request holds.

    Raises:
        HTTPException: it is too large, holds something else than images, or what it holds does not fit together.
    """
    count = len(request.prompts)
    if count > config.max_images:
        raise HTTPException(413, f"{count} images, at most {config.max_images} are taken at once")
    metadata = request.metadata if request.metadata is not None else [{}] * count
    groups = request.group_ids if request.group_ids is not None else list(range(count))
    for name, number in (("images", len(files)), ("metadata", len(metadata)), ("group_ids", len(groups))):
        if number != count:
            raise HTTPException(422, f"{count} prompts, but {number} {name}")
    _check_prompts(scorer, [Prompt(*pair) for pair in zip(request.prompts, metadata, strict=True)])
    images: list[np.ndarray] = []
    for i, file in enumerate(files):
        pixels = _read_image(f"image {i}", file, request.size, config.max_pixels // count)
        if pixels.shape != (images or [pixels])[0].shape:
            raise HTTPException(422, f"image {i}: another size than image 0")
        images.append(pixels)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return RewardBatch(
        torch.from_numpy(np.stack(images)),
        request.prompts,
        metadata,
        torch.tensor([numbers[group] for group in groups]),
    )


def _read_image(name: str, file: UploadFile, size: tuple[int, int] | None, max_pixels: int) -> np.ndarray:
    """uint8 (3, H, W)."""

    def check_size(height: int, width: int) -> None:
        if height * width > max_pixels:
            raise HTTPException(413, f"{name}: {height} x {width} pixels, at most {max_pixels} each for so many images")

    data = file.file.read()
    if file.content_type == MEDIA_TYPES["raw"]:
        if size is None:
            raise HTTPException(422, f"{name}: raw, but the request has no size")
        check_size(*size)
        if len(data) != 3 * size[0] * size[1]:
            raise HTTPException(422, f"{name}: {len(data)} bytes, but a size of 3 x {size[0]} x {size[1]}")
        return np.frombuffer(data, np.uint8).reshape(3, *size)
    if file.content_type not in PILLOW_FORMATS:
        known = ", ".join(MEDIA_TYPES.values())
        raise HTTPException(415, f"{name}: content type {file.content_type}, known: {known}")
    try:
        # Opening reads the header alone: the size is known before a pixel is decoded.
        with Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[file.content_type]]) as image:
            check_size(image.height, image.width)
            if image.mode != "RGB":
                raise HTTPException(422, f"{name}: mode {image.mode}, not 8-bit RGB")
            return np.asarray(image).transpose(2, 0, 1)
    except HTTPException:
        raise
    except Exception as error:  # a broken file can make Pillow raise anything
        raise HTTPException(422, f"{name}: cannot be read: {error}") from error
