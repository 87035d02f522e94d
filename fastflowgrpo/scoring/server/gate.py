"""What a request must satisfy before the application sees it: the token, room in the queue, its size and its time."""

import hmac
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from fastflowgrpo.config import ServerConfig
from fastflowgrpo.scoring.server.metrics import Metrics

MIB = 2**20


class Gate:
    """ASGI middleware that refuses requests without the token, beyond the queue, too large or too slow.

    It also counts the answers and the requests held.
    """

    def __init__(self, app: Any, config: ServerConfig, token: str | None, metrics: Metrics):
        self.app, self.config, self.token, self.metrics = app, config, token, metrics
        self.held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on to the application, or answer it with the reason for the refusal."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        try:
            if scope["path"] != "/health":
                self._check_token(headers)
            if scope["method"] != "POST":
                return await self.app(scope, receive, counted_send)
            with self._hold():
                await self.app(scope, await self._read(headers, receive), counted_send)
        except HTTPException as error:  # raised in this class; the application answers its own
            await JSONResponse({"detail": error.detail}, error.status_code, error.headers)(scope, receive, counted_send)
        except ClientDisconnect:
            pass

    def _check_token(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """Count a request as held until it is answered; refuse it if the queue is full."""
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
        """Read the whole body; returns the `receive` from which the application gets it."""
        limit = self.config.max_request_mib * MIB
        messages: deque[Any] = deque()
        size = int(headers.get(b"content-length", b"0"))  # uvicorn has refused anything but a number
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
