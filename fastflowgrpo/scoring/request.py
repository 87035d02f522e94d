"""One HTTP request to a reward server, and what its failure means."""

import json
from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.util import parse_url

from fastflowgrpo.errors import UserError

MAX_ANSWER_BYTES = 2**26


class NotAnsweredError(Exception):
    """The server cannot be reached, or says that it cannot answer now."""


class BusyError(NotAnsweredError):
    """The server's queue is full; it asks for a pause of `seconds`."""

    def __init__(self, seconds: float):
        super().__init__(f"busy for {seconds:g} s")
        self.seconds = seconds


class FailedError(Exception):
    """The server tried and failed, or its answer makes no sense."""


class UnscorableError(Exception):
    """The server refuses this one request; it may take others."""


def post(
    http: urllib3.PoolManager,
    server: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    unscorable_statuses: Collection[int] = (),
) -> bytes:
    """Send a POST request and return the body of the answer.

    Args:
        http: the pool of connections.
        server, path: the URL's two parts; messages name the first.
        unscorable_statuses: HTTP statuses which mean that only this request cannot be answered.

    Raises:
        NotAnsweredError, BusyError, FailedError, UnscorableError: see there.
        UserError: the server refuses the request with another 3xx or 4xx status.
    """
    try:
        # The answer is not decompressed: it could be of any size.
        response = http.request(
            "POST", server + path, body=body, headers=headers, preload_content=False, decode_content=False
        )
        with closing(response):
            data = response.read(MAX_ANSWER_BYTES)
            if response.read(1):
                raise FailedError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    except (HTTPError, OSError) as error:
        raise NotAnsweredError(_connection_problem(error)) from error
    status = response.status
    if status == 200:
        return data
    problem = f"HTTP {status}: {_detail(data)}"
    if status == 429:
        raise BusyError(_retry_after(response.headers.get("Retry-After", "1")))
    if status in (408, 502, 503, 504):
        raise NotAnsweredError(problem)
    if status >= 500:
        raise FailedError(problem)
    if status in unscorable_statuses:
        raise UnscorableError(problem)
    raise UserError(f"{server} refuses: {problem}")


def is_http_url(url: Any) -> bool:
    """Whether this is a string of the form http://HOST... or https://HOST..."""
    try:
        return isinstance(url, str) and parse_url(url).scheme in ("http", "https") and bool(parse_url(url).host)
    except HTTPError:
        return False


def _connection_problem(error: Exception) -> str:
    """Say in a few words why a connection failed."""
    refused = isinstance(error, NewConnectionError)  # a subclass of urllib3's TimeoutError
    if isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError) and not refused:
        return "no answer in time"
    return str(error.__cause__ or error).rpartition(": ")[2]


def _detail(body: bytes) -> str:
    """Extract the reason from an error's body: the field `detail` of this package's server, or a traceback's last
    line."""
    try:
        text = str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[-1000:].decode("utf-8", "replace").strip().rpartition("\n")[2]
    return text[:300] or "no detail"


def _retry_after(header: str) -> float:
    """The seconds in a Retry-After header; 1 if it holds a date."""
    try:
        return float(header)
    except ValueError:
        return 1.0
