"""The server of the pages: on this machine only, and only for what the pages need."""

import json
import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath
from typing import Any

from fastflowgrpo.errors import UserError
from fastflowgrpo.viewing.assets import DATA, TYPES, data_script, pages
from fastflowgrpo.viewing.contents import RunFolder

HOSTS = ("127.0.0.1", "localhost")  # another name in a request is that of a web site that was made to point here
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ViewServer(ThreadingHTTPServer):
    """Serves the pages of runs on 127.0.0.1.

    Args:
        runs: to show.
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, runs: list[RunFolder], port: int):
        self.runs, self.pages = runs, pages()
        self.pages[DATA] = data_script([{"name": run.name} for run in runs], live=True)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"port: cannot listen on 127.0.0.1:{port}: {error.strerror}; try --port 0") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors of the server, not those of a browser that has gone away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in HOSTS:
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"the viewer answers to 127.0.0.1 and localhost only\n")
        path = self.path.partition("?")[0].removeprefix("/") or "index.html"
        if (page := self.server.pages.get(path)) is not None:
            return self._answer(HTTPStatus.OK, page, TYPES[PurePath(path).suffix], "no-cache")
        if (match := re.fullmatch(r"runs/(\d{1,4})\.json", path)) and int(match[1]) < len(self.server.runs):
            return self._run(self.server.runs[int(match[1])])
        match = re.fullmatch(r"runs/(\d{1,4})/([^/]+)/([^/]+)", path)
        if match and int(match[1]) < len(self.server.runs):
            image = self.server.runs[int(match[1])].image(match[2], match[3])
            if image is not None:
                # The page adds the time at which the image was written to its address.
                return self._answer(
                    HTTPStatus.OK, image.read_bytes(), "image/webp", "private, max-age=86400, immutable"
                )
        return self._answer(HTTPStatus.NOT_FOUND, b"not found\n")

    do_HEAD = do_GET

    def _run(self, run: RunFolder) -> None:
        version = f'"{run.version()}"'
        if self.headers.get("If-None-Match") == version:
            return self._answer(HTTPStatus.NOT_MODIFIED, b"", version=version)
        body = json.dumps(run.contents()).encode("ascii")
        return self._answer(HTTPStatus.OK, body, "application/json", "no-cache", version)

    def _answer(
        self,
        status: HTTPStatus,
        body: bytes,
        kind: str = "text/plain; charset=utf-8",
        cache: str = "no-store",
        version: str | None = None,
    ) -> None:
        self.send_response(status)
        headers = HEADERS | {"Cache-Control": cache, "Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (headers | ({"ETag": version} if version else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""
