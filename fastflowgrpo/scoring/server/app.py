"""The reward server's application: its addresses, and what each one answers."""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Json
from starlette.formparsers import MultiPartParser

from fastflowgrpo import __version__
from fastflowgrpo.config import ServerConfig
from fastflowgrpo.errors import did_you_mean
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch
from fastflowgrpo.scoring.server.batching import BatchingScorer, Job
from fastflowgrpo.scoring.server.gate import MIB, Gate
from fastflowgrpo.scoring.server.messages import Health, Problem, PromptToCheck, ScoreAnswer, ScoreRequest
from fastflowgrpo.scoring.server.metrics import Metrics
from fastflowgrpo.scoring.server.reading import check_prompts, read_batch

PROBLEMS: dict[int | str, Any] = {
    status: {"model": Problem} for status in (400, 401, 404, 408, 413, 415, 422, 429, 503)
}


def create_app(rewards: Mapping[str, Callable[[RewardBatch], Any]], config: ServerConfig, token: str | None) -> FastAPI:
    """Create the application that serves rewards, each scored in threads of its own.

    Args:
        rewards: the rewards by name.
        config: the limits; host and port are not used here.
        token: what clients must send as bearer token, None to answer everybody.
    """
    metrics = Metrics()
    scorers = {name: BatchingScorer(name, reward, config, metrics) for name, reward in rewards.items()}
    MultiPartParser.spool_max_size = config.max_request_mib * MIB  # keeps requests in memory
    Image.MAX_IMAGE_PIXELS = None  # Pillow would warn; `read_batch` refuses images that are too large
    app = FastAPI(
        title="FastFlowGRPO reward server", version=__version__, docs_url=None, redoc_url=None, responses=PROBLEMS
    )
    app.add_middleware(Gate, config=config, token=token, metrics=metrics)
    app.add_exception_handler(RequestValidationError, _invalid_request)

    @app.post("/score/{reward}")
    async def score(
        reward: str,
        request: Annotated[Json[ScoreRequest], Form()],
        images: list[UploadFile],
        sources: list[UploadFile] | None = None,
    ) -> ScoreAnswer:
        """Score images. The form has the field `request` (JSON) and a file `images` for each image, or each frame of a
        video: PNG, JPEG, or raw uint8 (3, height, width). Edited images also have a file `sources` each, of the same
        size."""
        scorer = _find(scorers, reward)
        if scorer.hangs:
            raise HTTPException(503, f"the reward {reward} hangs", {"Retry-After": "10"})
        job = Job(await asyncio.to_thread(read_batch, reward, scorer.reward, request, images, sources, config))
        scorer.submit(job)
        timeout = min(config.timeout, request.timeout or math.inf)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.answer), timeout)
        except TimeoutError:
            raise HTTPException(503, f"not scored within {timeout:g} s", {"Retry-After": "1"}) from None

    @app.post("/check/{reward}")
    def check(reward: str, prompts: list[PromptToCheck]) -> None:
        """Can the reward score these prompts? If not, the answer names one that it cannot score."""
        scorer = _find(scorers, reward)
        check_prompts(reward, scorer.reward, [Prompt(prompt.text, prompt.metadata) for prompt in prompts])

    @app.get("/health")
    async def health(response: Response) -> Health:
        """Which rewards are served; the status is 503 while one hangs."""
        hanging = [name for name, scorer in scorers.items() if scorer.hangs]
        response.status_code = 503 if hanging else 200
        return Health(rewards=list(scorers), hanging=hanging)

    @app.get("/metrics", response_class=Response)
    async def metrics_text() -> Response:
        """The metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _find(scorers: Mapping[str, BatchingScorer], reward: str) -> BatchingScorer:
    if reward not in scorers:
        hint = did_you_mean(reward, scorers)
        raise HTTPException(404, f"there is no reward {reward!r}{hint}; there are: {', '.join(scorers)}")
    return scorers[reward]


async def _invalid_request(_: Request, error: Exception) -> JSONResponse:
    """Say what is wrong, without the values that were sent: FastAPI's own answer repeats them, and JSON may be unable
    to hold them."""
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return JSONResponse({"detail": "; ".join(found[:5]).encode("utf-8", "replace").decode()}, 422)
