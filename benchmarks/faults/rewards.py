"""The reward of the runs, and how it can misbehave: in a thread, in worker processes, or behind a server."""

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from fastflowgrpo.rewards import RewardBatch


def judge(batch: RewardBatch) -> torch.Tensor:
    """The mean brightness, and some luck: a resumed run must find the random numbers where the killed one was."""
    return batch.images.float().mean((1, 2, 3)) / 255 + 0.1 * torch.rand(len(batch.images))


def faulty(batch: RewardBatch, how: str, once: str) -> torch.Tensor:
    """A reward that misbehaves once: when it makes the file `once` by its third call.

    Without a file name ("") it misbehaves always.
    """
    faulty.calls = getattr(faulty, "calls", 0) + 1  # type: ignore[attr-defined]
    good = batch.images.float().mean((1, 2, 3)) / 255
    if once and (faulty.calls < 3 or Path(once).exists()):  # type: ignore[attr-defined]
        return good
    if once:
        Path(once).touch()
    if how == "raises":
        raise RuntimeError("the reward is broken")
    if how == "NaN":
        return good * torch.nan
    if how == "wrong length":
        return good[:-1]
    if how == "text":
        return "good"  # type: ignore[return-value]
    if how == "exits":
        os._exit(7)
    if how == "sys.exit":
        raise SystemExit(7)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "is killed":  # as by the kernel, for its memory
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(3600)
    if how == "leaks":
        faulty.kept = torch.ones(2**24)  # type: ignore[attr-defined]
    if how == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return good


@contextmanager
def server(how: str, first: int = 3, count: int = 1) -> Iterator[str]:
    """A reward server on loopback that misbehaves from its `first` request on, `count` times; yields its address."""
    calls, lock = [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            images = self.rfile.read(int(self.headers["Content-Length"])).count(b'name="images"')
            if self.path.startswith("/check"):
                return self.answer(200, None)
            with lock:
                calls[0] += 1
                bad = first <= calls[0] < first + count
            scores: list = [0.25 + 0.5 * (i % 2) for i in range(images)]
            if not bad:
                return self.answer(200, {"scores": scores})
            if how == "cut":
                return self.connection.close()
            if how == "hangs":
                time.sleep(4)
            codes = {"error 500": 500, "busy": 503, "wrong token": 401, "unknown path": 404}
            answers = {"NaN": [None] * len(scores), "wrong length": scores[1:], "text": "good"}
            body = answers.get(how, scores)
            return self.answer(codes.get(how, 200), {"scores": body}, half=how == "half an answer")

        def answer(self, status: int, body: object, half: bool = False) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if half else content)
            self.close_connection = half

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
