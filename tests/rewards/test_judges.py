"""Rewards behind an OpenAI-compatible server: a real one on loopback that answers what a test tells it to."""

import base64
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.reward_models import sample_images, to_pil

from fastflowgrpo.errors import UserError
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.rewards.editscore import EditScore
from fastflowgrpo.rewards.judges import DeQA, Judge, QwenVL, UnifiedReward
from fastflowgrpo.scoring import endpoint
from fastflowgrpo.scoring.client import ATTEMPTS

CUT_OFF = b'{"choices": ['  # sent as if more were to come


class Server(ThreadingHTTPServer):
    """Records requests as (path, headers, JSON), and answers with what `answer` makes of the JSON: (status, bytes), or
    None to hang up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, Any, dict[str, Any]]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes] | None] = lambda request: completion("")
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers, request))
        answer = self.server.answer(request)
        if answer is not None:
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1]) + 9 * (answer[1] == CUT_OFF)))
            self.end_headers()
            self.wfile.write(answer[1])

    def log_message(self, *args: Any) -> None:
        """Not on stderr."""


def completion(text: str | None, **more: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, **more}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def batch(size: int = 6, height: int = 20, width: int = 30) -> RewardBatch:
    prompts = [f"prompt {i} with {{braces}}" for i in range(size)]
    return RewardBatch(sample_images(height, width)[:size], prompts, [{}] * size, torch.arange(size))


def sent_image(request: dict[str, Any], place: int = 0) -> Image.Image:
    part = request["messages"][0]["content"][place]
    kind, _, data = part["image_url"]["url"].partition(",")
    assert (part["type"], kind) == ("image_url", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def sent_text(request: dict[str, Any]) -> str:
    part = request["messages"][0]["content"][1]
    assert part["type"] == "text"
    return part["text"]


def test_unifiedreward(server):
    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        number = int(sent_text(request).split("Text Caption: [prompt ")[1][0])
        time.sleep(0.05 * (6 - number))  # the first answers come last
        return completion(f"It aligns well.\nFinal Score: {[1, 2.5, '**3**', 4, 4.75, 5][number]}")

    server.answer = answer
    given = batch()
    scores = UnifiedReward(server.url)(given)
    assert scores.values.tolist() == pytest.approx([0.2, 0.5, 0.6, 0.8, 0.95, 1.0])
    assert scores.values.dtype == torch.float32 and scores.details["failed"].tolist() == [0] * 6
    by_prompt = {sent_text(request): request for _, _, request in server.requests}
    assert len(by_prompt) == 6
    for image, prompt in zip(to_pil(given.images), given.prompts, strict=True):
        (text,) = [text for text in by_prompt if text.endswith(f"\nText Caption: [{prompt}]")]
        request = by_prompt[text]
        assert text.startswith(
            "<image>\nYou are given a text caption and a generated image based on that caption. Your"
        )
        assert "two key criteria:\n1. Alignment with the Caption: Assess how well" in text
        assert (request["model"], request["temperature"]) == ("UnifiedReward-7b-v1.5", 0)
        assert np.array_equal(sent_image(request), image.resize((512, 512)))
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}


def test_qwenvl(server):
    server.answer = lambda request: completion("<Thought>\nSharp.\n</Thought>\n<Score>4</Score>")
    given = batch(2)
    assert QwenVL(server.url + "/", model="qwen")(given).values.tolist() == pytest.approx([0.8, 0.8])
    for path, headers, request in server.requests:
        assert path == "/v1/chat/completions" and "Authorization" not in headers
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("qwen", 0, 2048)
        assert "5. Excellent: Exceptional clarity" in sent_text(request) and "<Score>X</Score>" in sent_text(request)
        assert any(np.array_equal(sent_image(request), image) for image in to_pil(given.images))


def deqa_answer(**levels: float) -> tuple[int, bytes]:
    """The alternatives of a first token, by their probabilities."""
    alternatives = [{"token": token, "logprob": math.log(p)} for token, p in levels.items()]
    return completion(max(levels, key=levels.__getitem__), logprobs={"content": [{"top_logprobs": alternatives}]})


def test_deqa(server):
    answers = iter(
        [
            deqa_answer(**{" excellent": 0.1, " good": 0.4, "▁fair": 0.2, "Ġpoor": 0.06, "bad": 0.04, " a": 0.2}),
            deqa_answer(Excellent=0.97, nice=0.03),
        ]
    )
    server.answer = lambda request: next(answers)
    scores = DeQA(server.url, concurrency=1)(batch(2))
    expected = (5 * 0.1 + 4 * 0.4 + 3 * 0.2 + 2 * 0.06 + 1 * 0.04) / 0.8 / 5
    assert scores.values.tolist() == pytest.approx([expected, 1.0])
    for _, _, request in server.requests:
        assert sent_text(request) == "How would you rate the quality of this image?"
        assert request["messages"][1] == {"role": "assistant", "content": "The quality of the image is"}
        assert request["continue_final_message"] is True and request["add_generation_prompt"] is False
        assert (request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (1, True, 20)


def edits(size: int = 3) -> RewardBatch:
    given = batch(size)
    return replace(given, sources=list(sample_images(20, 30, seed=1)[:size]))


def edit_answer(request: dict[str, Any], edit: Any = (20, 15), quality: Any = (25, 10.5)) -> tuple[int, bytes]:
    """The scores that EditScore gives: `edit` with the source, `quality` without."""
    score = edit if len(request["messages"][0]["content"]) == 5 else quality
    return completion('{"reasoning": "The "car" is red, [1, 2]", "score": ' + f"{list(score)}}}")


def test_editscore(server):
    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        last = request["messages"][0]["content"][-1]["text"]
        return edit_answer(request, edit=(20, 5)) if "Editing instruction: prompt 1 " in last else edit_answer(request)

    server.answer = answer
    given = edits()
    scores = EditScore(server.url)(given)
    expected = [math.sqrt(0.6 * 0.42), math.sqrt(0.2 * 0.42), math.sqrt(0.6 * 0.42)]
    assert scores.values.tolist() == pytest.approx(expected)
    named = {"instruction": [0.8] * 3, "consistency": [0.6, 0.2, 0.6], "naturalness": [1] * 3, "artifacts": [0.42] * 3}
    for name, numbers in named.items():
        assert scores.details[name].tolist() == pytest.approx(numbers)
    assert scores.details["failed"].tolist() == [0] * 3
    contents = [request["messages"][0]["content"] for _, _, request in server.requests]
    about_edits = {content[-1]["text"]: i for i, content in enumerate(contents) if len(content) == 5}
    assert len(about_edits) == 3 and len(contents) == 6
    for result, source, prompt in zip(to_pil(given.images), to_pil(given.sources), given.prompts, strict=True):
        (text,) = [text for text in about_edits if text.endswith(f"\n\nEditing instruction: {prompt}\n")]
        request = server.requests[about_edits[text]][2]
        assert [part["text"] for part in request["messages"][0]["content"][:4:2]] == ["<img1>: ", "<img2>: "]
        assert np.array_equal(sent_image(request, 1), source) and np.array_equal(sent_image(request, 3), result)
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("EditScore-7B", 0, 512)
    alone = [request for (_, _, request), content in zip(server.requests, contents, strict=True) if len(content) == 3]
    assert all("naturalness" in request["messages"][0]["content"][2]["text"] for request in alone)
    sent = [np.asarray(sent_image(request, 1)).tolist() for request in alone]
    assert all(np.asarray(image).tolist() in sent for image in to_pil(given.images))


@pytest.mark.parametrize("question", ["edit", "quality"])
@pytest.mark.parametrize("answer", [(20,), (20, 26), (20, -1), (1, 2, 3), ("x", 2), (None, 2)])
def test_editscore_needs_both_numbers_of_both_answers(server, capsys, question, answer):
    server.answer = lambda request: edit_answer(request, **{question: answer})
    scores = EditScore(server.url, concurrency=1)(edits(2))
    assert scores.values.isnan().all() and scores.details["failed"].tolist() == [1, 1]
    assert 'reward editscore: 2 of 2 images not scored: no "score": [A, B] from 0 to 25' in capsys.readouterr().out
    assert len(server.requests) == 4


def test_editscore_needs_sources(server):
    with pytest.raises(UserError, match=r"^rewards\.editscore: there are no source images"):
        build_rewards({"editscore": {"base_url": server.url}})(batch(1))


def test_other_judges_do_not_see_the_source(server):
    server.answer = lambda request: completion("<Score>5</Score>")
    QwenVL(server.url)(edits(1))
    assert len(server.requests[0][2]["messages"][0]["content"]) == 2


# a failure, the number of requests that it takes to give up, and the reason
FAILURES: list[tuple[type[Judge], tuple[int, bytes], int, str]] = [
    (QwenVL, (500, b"out of memory"), ATTEMPTS, "HTTP 500: out of memory"),
    (QwenVL, (200, b"<html>"), ATTEMPTS, "expected a chat completion, got '<html>'"),
    (QwenVL, (200, b"[]"), ATTEMPTS, r"expected a chat completion, got '\[\]'"),
    (QwenVL, (200, b'{"choices": []}'), ATTEMPTS, "expected a chat completion, got"),
    (QwenVL, (200, b'{"choices": [{"message": {"content": [1]}}]}'), ATTEMPTS, "expected a chat completion, got"),
    (QwenVL, completion(None), ATTEMPTS, "expected a chat completion, got"),
    (QwenVL, (400, b'{"detail": "the prompt is too long"}'), 1, "HTTP 400: the prompt is too long"),
    (QwenVL, completion(""), 1, "no score from 1 to 5 in the answer that ends in ''"),
    (QwenVL, completion("<Score>X</Score>"), 1, "no score from 1 to 5"),
    (QwenVL, completion("<Score>0</Score>"), 1, "no score from 1 to 5"),
    (QwenVL, completion("<Score>9</Score>"), 1, "no score from 1 to 5"),
    (QwenVL, completion("Score: 4"), 1, "no score from 1 to 5"),
    (UnifiedReward, completion("Final Score: none"), 1, "no score from 1 to 5"),
    (UnifiedReward, completion("Final Score: 45"), 1, "no score from 1 to 5"),
    (UnifiedReward, completion("Final Score: 5.5"), 1, "no score from 1 to 5"),
    (DeQA, completion("good"), 1, "the server returned no top_logprobs"),
    (DeQA, completion("good", logprobs=None), 1, "the server returned no top_logprobs"),
    (DeQA, completion("good", logprobs={"content": []}), 1, "the server returned no top_logprobs"),
    (DeQA, deqa_answer(very=0.6, good=0.4), 1, "expected one of excellent, good, fair, poor, bad, got 'very'"),
]


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 0.02)


@pytest.mark.parametrize("judge, failure, requests, reason", FAILURES)
def test_a_failure_is_missing_counted_and_said(server, capsys, short_pauses, judge, failure, requests, reason):
    good = {
        QwenVL: completion("<Score>3</Score>"),
        UnifiedReward: completion("Final Score: 3"),
        DeQA: deqa_answer(fair=0.9, large=0.1),
    }[judge]
    images: list[str] = []

    def answer(request):
        images.append(request["messages"][0]["content"][0]["image_url"]["url"])
        return failure if images[-1] in [*dict.fromkeys(images)][1:2] else good

    server.answer = answer
    scores = judge(server.url, concurrency=1)(batch(3))
    assert scores.values.isnan().tolist() == [False, True, False]
    assert scores.values[[0, 2]].tolist() == pytest.approx([0.6, 0.6])
    assert scores.details["failed"].tolist() == [0, 1, 0]
    assert len(images) == 2 + requests
    printed = capsys.readouterr().out
    assert f"reward {judge.__name__.lower()}: 1 of 3 images not scored: " in printed
    assert re.search(reason, printed) and re.search(reason, scores.error)
    assert judge.pointwise


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_stops_the_run(server, status):
    server.answer = lambda request: (status, b'{"detail": "no"}')
    rewards = build_rewards({"qwenvl": {"base_url": server.url}})
    with pytest.raises(UserError, match=rf"^rewards\.qwenvl: {server.url} refuses: HTTP {status}: no$"):
        rewards(batch(1))


@pytest.mark.parametrize("failure", [None, (200, CUT_OFF), (503, b"loading"), (429, b"")])
def test_a_server_that_is_down_is_waited_for(server, short_pauses, failure):
    """However long: here for more requests than a failed one is given."""
    answers = [failure] * 2 * ATTEMPTS
    server.answer = lambda request: answers.pop() if answers else completion("<Score>5</Score>")
    assert QwenVL(server.url, concurrency=1)(batch(2)).values.tolist() == [1, 1]
    assert len(server.requests) == 2 * ATTEMPTS + 2


def test_a_server_that_is_not_there_and_not_required(capsys, short_pauses):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        scores = QwenVL(url, required=False)(batch(4))
    assert scores.values.isnan().all() and scores.details["failed"].sum() == 4
    printed = capsys.readouterr().out
    assert "4 of 4 images not scored: " in printed and "refused" in printed


def test_a_server_that_hangs(server, capsys, short_pauses):
    released = threading.Event()
    server.answer = lambda request: released.wait(60) and None
    scores = QwenVL(server.url, timeout=0.3, required=False)(batch(3))
    assert not released.is_set()
    released.set()
    assert scores.values.isnan().all() and "no answer in time" in capsys.readouterr().out


def test_images_are_spread_over_servers(server):
    server.answer = lambda request: completion("<Score>5</Score>")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert QwenVL([dead, server.url])(batch(6)).values.tolist() == [1] * 6


def test_requests_run_side_by_side(server):
    together = threading.Barrier(6, timeout=60)
    server.answer = lambda request: completion("<Score>5</Score>") if together.wait() >= 0 else None
    assert QwenVL(server.url, concurrency=6)(batch(6)).values.tolist() == [1] * 6


def test_the_key_comes_from_the_environment(server, monkeypatch):
    server.answer = lambda request: completion("<Score>5</Score>")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    QwenVL(server.url, api_key_env="JUDGE_KEY")(batch(1))
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"base_url": "127.0.0.1:8000"},
            "base_url must be http://HOST:PORT/v1 or a list of such, got '127.0.0.1:8000'",
        ),
        ({"base_url": "file:///etc/passwd"}, "base_url must be http://HOST:PORT/v1 or a list of such"),
        ({"base_url": []}, "base_url must be http://HOST:PORT/v1 or a list of such"),
        ({"required": 1}, "required must be true or false, got 1"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"timeout": math.nan}, "timeout must be a number of seconds above 0, got nan"),
        ({"concurrency": 0}, "concurrency must be an integer of at least 1, got 0"),
        ({"api_key_env": "NOT_SET"}, "the environment variable NOT_SET is not set"),
        ({"uri": "x"}, r"unknown setting 'uri'"),
    ],
)
@pytest.mark.parametrize("name", ["deqa", "editscore", "qwenvl", "unifiedreward"])
def test_settings_errors(name, settings, message):
    with pytest.raises(ValueError, match=rf"^rewards\.{name}: {message}"):
        build_rewards({name: settings})


def test_in_a_weighted_sum(server):
    server.answer = lambda request: completion("<Score>4</Score> Final Score: 5")
    rewards = build_rewards(
        {"qwenvl": {"weight": 0.5, "base_url": server.url}, "unifiedreward": {"base_url": server.url}}
    )
    scores = rewards(batch(2))
    assert scores.values.tolist() == pytest.approx([1.4, 1.4])
    assert scores.details["qwenvl"].tolist() == pytest.approx([0.8, 0.8])
    assert scores.details["unifiedreward/failed"].tolist() == [0, 0]
