"""Reward servers for the tests: in another process, in a thread, and one whose answers the test decides."""

import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import uvicorn

from fastflowgrpo.config import ServerConfig
from fastflowgrpo.rewards import RewardBatch
from fastflowgrpo.scoring.server import create_app

PASSWORD = "open sesame"
# Every image of these tests is grey and known by its brightness.
REWARDS = """
import time
from pathlib import Path

import torch
from fastflowgrpo.rewards import Scores


def brightness(batch):
    return Scores(batch.images.float().mean((1, 2, 3)), {"corner": batch.images[:, 0, 0, 0]})


def slow(batch):
    Path("scoring").touch()
    time.sleep(1)
    return brightness(batch)


def rank(batch):
    values = brightness(batch).values
    return [(values[batch.group_ids == group] < value).sum() for group, value in zip(batch.group_ids, values)]


def faulty(batch):
    values = brightness(batch).values
    if (values == 13).any():
        raise KeyError("thirteen")
    values[values < 10] = torch.nan
    return values[1:] if (values == 14).any() else values


def picky(batch):
    return [len(prompt) for prompt in batch.prompts]


def check(prompts):
    for prompt in prompts:
        if "cat" not in prompt.text:
            raise ValueError(f"prompt {prompt.text!r} has no cat")


picky.check_prompts = check
"""
NAMES = ",".join(f"served:{name}" for name in ("brightness", "slow", "rank", "faulty", "picky"))


def batch_of(values, groups=None, side=8) -> RewardBatch:
    """Make a batch with a grey image for each value."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, side, side)
    groups = range(len(values)) if groups is None else groups
    return RewardBatch(images, ["a cat"] * len(values), [{}] * len(values), torch.tensor([*groups]))


class Server:
    """`python -m fastflowgrpo.serve` with the rewards above, in `folder`."""

    def __init__(self, folder: Path, *options: str, port: int = 0):
        (folder / "served.py").write_text(REWARDS)
        command = [sys.executable, "-m", "fastflowgrpo.serve", "--rewards", NAMES, "--port", str(port), *options]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http://127\.0\.0\.1:\d+", self.process.stdout.readline())[0]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def hosted(rewards, **settings):
    """Start a server in a thread; yields its URL."""
    app = create_app(rewards, ServerConfig(rewards="", **settings), None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def scripted(answer):
    """Start a server and yield its URL. `answer(path, body, headers)` is (status, headers, body); None hangs up."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answered = answer(self.path, body, self.headers)
            if answered is None:
                self.close_connection = True
                return
            status, headers, content = answered
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
