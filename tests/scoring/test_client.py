"""The client of reward servers: what it does when one fails, and what a run makes of it."""

import io
import json
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from PIL import Image
from support.pipelines import tiny_sd3_pipeline
from support.reward_server import PASSWORD, Server, batch_of, hosted, scripted
from urllib3.connection import HTTPConnection

from fastflowgrpo import Config, Trainer
from fastflowgrpo.config import TOKEN, EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.errors import TemporaryError, UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import REWARDS, build_rewards
from fastflowgrpo.scoring import client
from fastflowgrpo.scoring import endpoint as endpoint_module
from fastflowgrpo.scoring.client import ATTEMPTS, RemoteReward
from fastflowgrpo.scoring.endpoint import Endpoint

NOWHERE = "http://127.0.0.1:9"  # the discard port, on which nothing listens


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE", 0.2)


def scores_of(values, **more) -> tuple[int, dict, bytes]:
    return 200, {}, json.dumps({"scores": values, **more}).encode()


def brightness_of(body: bytes) -> list[float]:
    """The first value of each image of a request in PNG."""
    files = [b"\x89PNG" + part for part in body.split(b"\x89PNG")[1:]]
    return [float(Image.open(io.BytesIO(file)).getpixel((0, 0))[0]) for file in files]


# the configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": ""}, "url must be http://HOST:PORT or a list of such, got ''"),
        ({"url": []}, "url must be http://HOST:PORT or a list of such, got []"),
        ({"url": "localhost:18085"}, "url must be http://HOST:PORT or a list of such, got 'localhost:18085'"),
        ({"url": ["http://a", 3]}, "url must be http://HOST:PORT or a list of such, got ['http://a', 3]"),
        ({"url": "http://a", "timout": 3}, "unknown setting 'timout' (did you mean 'timeout'?), known: weight, url, "),
        ({"url": "http://a", "timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"url": "http://a", "required": "no"}, "required must be true or false, got 'no'"),
        ({"url": "http://a", "format": "flow-grpo"}, "unknown format 'flow-grpo' (did you mean 'flow_grpo'?), known: "),
        (
            {"url": "http://a", "encoding": "jpg"},
            "unknown encoding 'jpg' (did you mean 'jpeg'?), known: raw, png, jpeg",
        ),
        ({"url": "http://a", "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"url": "http://a", "concurrency": True}, "concurrency must be an integer of at least 1, got True"),
    ],
)
def test_configuration_errors(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as a whole
        build_rewards({"pickscore": settings})
    assert str(error.value).startswith(f"rewards.pickscore: {message}")


def test_any_name_with_a_url_is_scored_there():
    paths = []

    def answer(path, body, headers):
        paths.append((path, headers.get("Authorization")))
        return scores_of([1.0, 2.0], details={"strict": [0, 1]})

    with scripted(answer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, PASSWORD)
        config = {"geneval": {"url": f"{url}/gpu7/", "weight": 2.0}, "my_module:mine": {"url": [url], "weight": 0.5}}
        scores = build_rewards(config)(batch_of([1, 2]))
    assert "my_module:mine" not in REWARDS
    assert sorted(paths) == [
        ("/gpu7/score/geneval", f"Bearer {PASSWORD}"),
        ("/score/my_module:mine", f"Bearer {PASSWORD}"),
    ]
    assert scores.values.tolist() == [2.5, 5.0]
    assert scores.details["geneval/strict"].tolist() == [0, 1]


def test_prompts_are_checked_before_a_run(capsys):
    def picky(batch):
        return [0.0]

    def check(prompts):
        raise ValueError(f"prompt {prompts[0].text!r} has no cat")

    picky.check_prompts = check
    with hosted({"picky": picky, "easy": lambda batch: [0.0]}) as url:
        with pytest.raises(
            ValueError, match=r"^rewards\.picky: http.* refuses: HTTP 422: reward picky: prompt 'a dog'"
        ):
            build_rewards({"picky": {"url": url}}).check_prompts([Prompt("a dog")])
        with pytest.raises(
            ValueError, match="there is no reward 'eazy' \\(did you mean 'easy'\\?\\); there are: picky"
        ):
            build_rewards({"eazy": {"url": url}}).check_prompts([Prompt("a dog", {"tag": "x"})])
        build_rewards({"easy": {"url": url}}).check_prompts([Prompt("a dog")])
    assert not capsys.readouterr().out
    build_rewards({"easy": {"url": NOWHERE}}).check_prompts([Prompt("a dog")])
    assert f"reward easy: {NOWHERE} does not answer yet: " in capsys.readouterr().out


# requests


def test_a_batch_is_cut_between_groups():
    sizes = []

    def answer(path, body, headers):
        sizes.append(len(brightness_of(body)))
        return scores_of(brightness_of(body))

    values = list(range(11))
    with scripted(answer) as url:
        reward = RemoteReward("r", url, encoding="png", batch_size=3, concurrency=1)
        scores = reward(batch_of(values, groups=[1, 1, 2, 2, 5, 5, 5, 5, 3, 4, 4]))
    assert sizes == [2, 2, 4, 3], "the group of 4 is sent whole"
    assert scores.values.tolist() == values


def test_an_endpoint_that_answers_sooner_gets_more():
    counts = {"quick": 0, "slow": 0}

    def server(name, seconds):
        def answer(path, body, headers):
            counts[name] += 1
            time.sleep(seconds)
            return scores_of(brightness_of(body))

        return scripted(answer)

    with server("quick", 0.01) as quick, server("slow", 1.0) as slow:
        reward = RemoteReward("r", [slow, quick], encoding="png", batch_size=1, concurrency=2)
        scores, before = reward(batch_of(range(30))), dict(counts)
        reward(batch_of([1, 2]))
    assert counts["slow"] == before["slow"], "what the quick one can take at once"
    assert scores.values.tolist() == list(range(30))
    assert counts["slow"] >= 1 and counts["quick"] > counts["slow"]
    seconds = {url: scores.details[f"seconds/{url.removeprefix('http://')}"] for url in (quick, slow)}
    assert seconds[slow].nanmean() > 1.0 > seconds[quick].nanmean()
    assert (seconds[slow].isnan() != seconds[quick].isnan()).all(), "each image was scored by one of them"


def test_connections_are_kept(monkeypatch):
    opened = []
    connect = HTTPConnection.connect
    monkeypatch.setattr(HTTPConnection, "connect", lambda self: (opened.append(self), connect(self))[1])
    with hosted({"r": lambda batch: [0.0] * len(batch.prompts)}) as url:
        reward = RemoteReward("r", url, concurrency=1)
        for _ in range(5):
            reward(batch_of([1, 2]))
    assert len(opened) == 1


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, b'{"detail": "out of memory"}'),
        (200, {}, b"<html>"),
        (200, {}, b"{}"),
        (200, {}, b'{"scores": [1, 2]}'),
        (200, {}, b'{"scores": [1, 2, 3], "details": {"a": [1]}}'),
        (200, {}, b'{"scores": [1, 2, "3"]}'),
        (200, {}, b'{"scores": [1, 2, Infinity]}'),
        (200, {}, b'{"scores": [1, 2, 1e300]}'),
        (200, {}, b"[" * 100000),
        (200, {}, b"\xff"),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_an_answer_that_is_none_is_asked_for_again_and_then_missing(capsys, bad, required):
    asked = []

    def answer(path, body, headers):
        asked.append(body)
        return bad if len(asked) < wanted else scores_of([1, 2, 3])

    with scripted(answer) as url:
        reward = RemoteReward("r", url, required=required)
        wanted = 3
        assert reward(batch_of([1, 2, 3])).values.tolist() == [1, 2, 3]
        assert len(asked) == 3 and not capsys.readouterr().out
        asked.clear()
        wanted = 1000
        scores = reward(batch_of([1, 2, 3]))
    assert scores.values.isnan().all() and not scores.details
    assert len(asked) == (ATTEMPTS if required else 3)
    assert f"reward r: 3 of 3 images not scored: {url}: " in capsys.readouterr().out


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_a_refusal_stops_the_run_at_once(status):
    asked = []

    def answer(path, body, headers):
        asked.append(path)
        return status, {"Location": "/elsewhere"}, b'{"detail": "no"}'

    with scripted(answer) as url:
        rewards = build_rewards({"r": {"url": url, "required": False}})
        with pytest.raises(UserError, match=rf"^rewards\.r: {url} refuses: HTTP {status}: no$"):
            rewards(batch_of([1]))
    assert asked == ["/score/r"]


def test_a_busy_server_is_no_failure():
    asked = []

    def answer(path, body, headers):
        asked.append(path)
        return scores_of([1]) if len(asked) > 2 * ATTEMPTS else (429, {"Retry-After": "0"}, b"")

    with scripted(answer) as url:
        assert RemoteReward("r", url, required=False)(batch_of([1])).values.tolist() == [1]


@pytest.mark.parametrize("fault", ["hang up", "503", "too late"])
def test_a_required_reward_is_waited_for_and_another_is_not(capsys, monkeypatch, fault):
    monkeypatch.setattr(client, "REMINDER_SECONDS", 0.0)
    down = threading.Event()
    down.set()

    def answer(path, body, headers):
        if not down.is_set():
            return scores_of(brightness_of(body))
        if fault == "too late":
            time.sleep(0.5)
        return (503, {}, b'{"detail": "the reward hangs"}') if fault == "503" else None

    with scripted(answer) as url:
        settings = {"encoding": "png", "timeout": 0.25, "batch_size": 2}
        optional = RemoteReward("r", url, required=False, **settings)
        assert optional(batch_of([1, 2, 3])).values.isnan().all()
        assert "reward r: 3 of 3 images not scored: " in capsys.readouterr().out
        required = RemoteReward("r", url, **settings)
        found = []
        run = threading.Thread(target=lambda: found.append(required(batch_of([1, 2, 3]))))
        run.start()
        while not (printed := capsys.readouterr().out):
            assert run.is_alive()
            time.sleep(0.05)
        reason = {"hang up": "", "503": "HTTP 503: the reward hangs", "too late": "no answer in time"}[fault]
        assert f"reward r: {url} has been down for " in printed and reason in printed
        assert "; the run waits for it\n" in printed
        down.clear()
        run.join(60)
        assert found[0].values.tolist() == [1, 2, 3]
        assert f"reward r: {url} answers again, after " in capsys.readouterr().out


def test_an_endpoint_that_is_down_is_left_alone_while_another_answers(capsys, monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE", 1000.0)
    asked = []

    def dead(path, body, headers):
        asked.append(path)

    with scripted(dead) as first, scripted(lambda path, body, headers: scores_of(brightness_of(body))) as second:
        reward = RemoteReward("r", [first, second], encoding="png", batch_size=1, concurrency=2)
        for _ in range(3):
            assert reward(batch_of(range(10))).values.tolist() == list(range(10))
    assert 1 <= len(asked) <= 2, "what was in flight at once, and nothing after"
    assert reward.endpoints[0].failures == 1


def test_pauses_double_and_what_fails_together_counts_once():
    endpoint = Endpoint("http://a")
    pauses = []
    for _ in range(8):
        now = time.monotonic()
        endpoint.failed(now, "x")
        endpoint.failed(now - 1, "was in flight at the same time")
        pauses.append((endpoint.retry_at - endpoint.failed_at) / endpoint_module.FIRST_PAUSE)
    assert endpoint.failures == 8 and endpoint.down
    for pause, longest in zip(pauses, [1, 2, 4, 8, 10, 10, 10, 10], strict=True):
        assert longest / 2 <= pause <= longest
    endpoint.retry_at = 0.0
    assert endpoint.ready(concurrency=2)
    endpoint.in_flight = 1
    assert not endpoint.ready(concurrency=2), "one request finds out whether it is back"
    endpoint.succeeded(2.0)
    assert endpoint.ready(concurrency=2)
    endpoint.succeeded(4.0)
    assert endpoint.failures == 0 and endpoint.seconds == pytest.approx(2.4)


def test_an_interrupt_ends_the_wait():
    """What is in flight is left behind: Ctrl+C does not wait for a server that is down."""

    def interrupt(*_):
        raise KeyboardInterrupt

    reward = RemoteReward("interrupted", NOWHERE)
    reward._report_endpoints = interrupt
    with pytest.raises(KeyboardInterrupt):
        reward(batch_of([1]))
    for _ in range(600):
        if not any(thread.name == "reward interrupted" for thread in threading.enumerate()):
            return
        time.sleep(0.1)
    pytest.fail("the threads of an interrupted call go on")


# a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    tiny_sd3_pipeline().save_pretrained(path)
    (path / "prompts.txt").write_text("a cat\ntwo cats")
    return path


def config_of(folder, output, rewards, **settings) -> Config:
    return Config(
        model=str(folder),
        output_dir=str(output),
        epochs=4,
        trackers=[],
        policy=PolicyConfig(lora_rank=4, max_sequence_length=8),
        prompts=PromptsConfig(train=str(folder / "prompts.txt"), per_epoch=2),
        rollout=RolloutConfig(group_size=4, num_steps=3, window_size=1, window_start=(0, 1), batch_size=4),
        update=UpdateConfig(batch_size=8, per_epoch=1),
        evaluation=EvaluationConfig(every=0, num_steps=2, images_per_prompt=2),
        rewards=rewards,
        **settings,
    )


def rows_of(output) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "epoch" in row]


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_costs_a_run_nothing(folder, tmp_path, monkeypatch, capsys):
    """The run sees every score once: its rewards, and so its weights, are those of a run that scores by itself."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with Server(tmp_path) as server:
        name = "served:brightness"
        mixture = {"jpeg_compressibility": 0.5}
        Trainer(config_of(folder, tmp_path / "local", {name: 1, **mixture})).run()
        run, port = Trainer.collect, int(server.url.rpartition(":")[2])
        restarted = []

        def collect(trainer, epoch):
            if epoch == 1:
                server.process.kill()
                server.process.wait()
            if epoch == 1:
                later = threading.Timer(1.0, lambda: restarted.append(Server(tmp_path, port=port)))
                later.start()
            return run(trainer, epoch)

        monkeypatch.setattr(Trainer, "collect", collect)
        monkeypatch.setattr(client, "REMINDER_SECONDS", 0.0)
        settings = {"url": server.url, "encoding": "png", "batch_size": 2}
        try:
            Trainer(config_of(folder, tmp_path / "remote", {name: settings, **mixture})).run()
        finally:
            restarted[0].__exit__()
    assert "has been down for " in (printed := capsys.readouterr().out) and "answers again" in printed
    local, remote_rows = rows_of(tmp_path / "local"), rows_of(tmp_path / "remote")
    assert len(remote_rows) == 4
    for ours, theirs in zip(remote_rows, local, strict=True):
        assert ours["missing"] == ours[f"{name}/missing"] == 0 and ours["images"] == 8
        assert ours["reward"] == pytest.approx(ours[name] + 0.5 * ours["jpeg_compressibility"], abs=1e-4)
        for key in ("reward", f"{name}/corner", "log_prob", "grad_norm", "ratio_max"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key


def test_a_run_that_loses_too_many_scores_stops_and_keeps_its_weights(folder, tmp_path):
    calls = count()

    def answer(path, body, headers):
        if path.startswith("/check"):
            return 200, {}, b"null"
        values = brightness_of(body)
        call = next(calls)  # the evaluation is the first, then an epoch asks twice
        return scores_of([None, *values[1:]] if call in (2, 3, 4) else values)

    with scripted(answer) as url:
        rewards = {"r": {"url": url, "encoding": "png"}}
        config = config_of(folder, tmp_path / "run", rewards, max_missing=0.125)
        with pytest.raises(
            TemporaryError, match=r"^2 of the 8 images of epoch 1 have no score; max_missing allows a sh"
        ):
            Trainer(config).run()
    (row,) = rows_of(tmp_path / "run")
    assert row["missing"] == row["r/missing"] == 1
    assert list((tmp_path / "run/checkpoints/checkpoint-1").iterdir())
