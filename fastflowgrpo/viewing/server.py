"""The server of the pages, Starlette under uvicorn: on this machine only, and only for what the pages need."""

import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from fastflowgrpo.errors import UserError
from fastflowgrpo.viewing.assets import DATA, PAGES, data_script
from fastflowgrpo.viewing.contents import RunFolder

HOST = "127.0.0.1"
HOSTS = [HOST, "localhost"]  # another name in a request is that of a web site that was made to point here
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
NO_CACHE = {"Cache-Control": "no-cache"}
# The page adds the time at which an image was written to its address.
CACHE = {"Cache-Control": "private, max-age=86400, immutable"}


def listen(port: int) -> socket.socket:
    """Open the socket that the server listens on.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"port: cannot listen on {HOST}:{port}: {error.strerror}; try --port 0") from error
    # asyncio sets this only on sockets that it opens itself; without it each answer waits 40 ms for the client's ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def view_server(runs: list[RunFolder]) -> uvicorn.Server:
    """The server of the pages of runs; its `run` serves on the sockets that it is given until Ctrl+C."""
    data = data_script([{"name": run.name} for run in runs], live=True)

    async def names(request: Request) -> Response:
        return Response(data, media_type="text/javascript", headers=NO_CACHE)

    routes: list[BaseRoute] = [Route(f"/{DATA}", names)]
    for number, run in enumerate(runs):
        routes += _run_routes(f"/runs/{number}", run)
    app = Starlette(
        routes=[*routes, Mount("/", _Pages(directory=PAGES, html=True))],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )
    # Its time until the first page counts: nothing is imported that the pages do not need.
    config = uvicorn.Config(
        app,
        headers=list(HEADERS.items()),
        lifespan="off",
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


class _Pages(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file that the browser asks for again each time, and gets if it has changed."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(NO_CACHE)
        return response


def _run_routes(address: str, run: RunFolder) -> list[Route]:
    """The addresses of a run: its contents and its images."""

    def contents(request: Request) -> Response:
        headers = NO_CACHE | {"ETag": f'"{run.version()}"'}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return JSONResponse(run.contents(), headers=headers)

    def image(request: Request) -> Response:
        path = run.image(**request.path_params)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="image/webp", headers=CACHE)

    return [Route(f"{address}.json", contents), Route(f"{address}/{{folder}}/{{file}}", image)]
