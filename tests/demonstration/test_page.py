"""The demo's page, served and asked through Gradio's own client."""

import asyncio
import re
import socket
import threading
import time
from types import SimpleNamespace

import gradio as gr
import gradio_client
import httpx
import numpy as np
import pytest
from support.demo_runs import PROMPT, SHAPES, request, run_command, save_run
from support.forks import FORK

from fastflowgrpo import demo as command
from fastflowgrpo.config import Config, DemoConfig, parse_demo
from fastflowgrpo.demonstration.examples import demo_prompts
from fastflowgrpo.demonstration.generation import Demo
from fastflowgrpo.demonstration.page import build_page, launch
from fastflowgrpo.errors import UserError

HOSTILE = '<script>alert("1")</script> **bold** ![x](http://192.0.2.1/x.png) \u202emirror \U0001f984'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the bundled model with two checkpoints."""
    return save_run(tmp_path_factory.mktemp("page") / "run", Config(rewards=SHAPES), steps=(2, 10))


@pytest.fixture(scope="module")
def page(run):
    """The demo, and the functions of its page by the names of their endpoints."""
    config = parse_demo(["--run", str(run)])
    examples, known = demo_prompts(config)
    demo = Demo.load(config, known)

    async def build():
        return build_page(demo, config, examples)

    blocks = asyncio.run(build())  # Gradio leaves an event loop open unless it is called from one
    return demo, {function.api_name: function.fn for function in blocks.fns.values()}


def values(**changes):
    """The inputs of the page, in their order."""
    wanted = request(**{"rewards": list(SHAPES)} | changes)
    names = ("prompt", "checkpoint", "seed", "num_images", "rewards", "num_steps", "guidance_scale", "dynamics")
    return [*(getattr(wanted, name) for name in names), wanted.noise_level]


def ask(functions, session="a", progress=lambda *_, **__: None, **changes):
    return functions["generate"](*values(**changes), SimpleNamespace(session_hash=session), progress)


def test_the_galleries_hold_the_images_with_their_scores(page):
    demo, functions = page
    seen = []
    progress = lambda done, unit: seen.append(done)  # noqa: E731
    *galleries, summary = ask(functions, progress=progress, checkpoint="checkpoint-2", seed=3)
    assert seen == [(done, 8) for done in range(9)]
    answer = demo.generate(request(checkpoint="checkpoint-2", seed=3, rewards=list(SHAPES)))
    assert list(answer.columns) == ["base", "trained"]
    for gallery, images in zip(galleries, answer.columns.values(), strict=True):
        pixels = images.pixels.permute(0, 2, 3, 1).numpy()
        for row, (picture, caption) in enumerate(gallery):
            assert np.array_equal(np.array(picture), pixels[row])
            geneval, strict = images.scores["geneval"][row], images.scores["geneval/strict"][row]
            size = images.scores["jpeg_compressibility"][row]
            mark = "\u2713" if strict else "\u2717"
            assert caption == f"geneval {geneval:.3g} {mark} \u00b7 jpeg_compressibility {size:.3g}"
    assert "checkpoint-2, 3 images, seed 3" in summary
    assert summary.startswith('<div class="pixels">')  # of 48 px, enlarged with sharp pixels
    base, trained = (images.scores["jpeg_compressibility"].mean() for images in answer.columns.values())
    row = f"<td>jpeg_compressibility</td><td>{base:.3g}</td><td>{trained:.3g}</td><td>{trained - base:+.3g}</td>"
    assert row in summary


def test_hostile_prompts_are_shown_as_text(page):
    *_, summary = ask(page[1], prompt=HOSTILE)
    assert "&lt;script&gt;" in summary
    assert "geneval gives no score" in summary
    known = {f"<{mark}{tag}>" for tag in ("table", "tr", "th", "td", "p", "wbr") for mark in ("", "/")}
    assert set(re.findall(r"<[^>]*>", summary)) <= {*known, '<div class="pixels">', "</div>"}
    with pytest.raises(gr.Error, match="at most 1000"):
        ask(page[1], prompt="x" * 10_000)
    with pytest.raises(gr.Error) as error:
        ask(page[1], checkpoint="<img src=x>")
    assert "&lt;img src=x&gt;" in error.value.message


def test_only_the_visitor_ends_a_request(page):
    functions = page[1]
    steps, pressed = [], {2: "another", 4: "a"}

    def progress(done, unit):
        steps.append(done[0])
        if done[0] in pressed:
            functions["cancel"](SimpleNamespace(session_hash=pressed[done[0]]))

    *galleries, summary = ask(functions, progress=progress)
    assert (galleries, summary) == ([gr.skip(), gr.skip()], "<p>Cancelled.</p>")
    assert steps == [0, 1, 2, 3, 4]
    functions["cancel"](SimpleNamespace(session_hash="a"))  # nothing to end any more
    assert len(ask(functions)) == 3


def test_a_cancelled_request_frees_the_model_for_the_next(page):
    """Gradio starts the next request while the function of the cancelled one still runs."""
    demo, functions = page
    expected = demo.generate(request()).columns["trained"].pixels
    inside, go_on, answers = threading.Event(), threading.Event(), {}

    def progress(done, unit):
        if done[0] == 5:
            inside.set()
            assert go_on.wait(30)

    def run(session, **arguments):
        answers[session] = ask(functions, session=session, **arguments)

    first = threading.Thread(target=run, args=("first",), kwargs={"progress": progress})
    first.start()
    assert inside.wait(30)
    functions["cancel"](SimpleNamespace(session_hash="first"))
    second = threading.Thread(target=run, args=("second",))
    second.start()
    go_on.set()
    first.join(30)
    second.join(30)
    assert answers["first"][-1] == "<p>Cancelled.</p>"
    pictures = [np.array(picture) for picture, _ in answers["second"][1]]
    assert np.array_equal(pictures, expected.permute(0, 2, 3, 1))


@pytest.mark.slow
@pytest.mark.xdist_group("resume")  # forks from the same process, which has imported everything
def test_the_command_serves_the_page_and_nothing_else(run, tmp_path):
    """As a process of its own, asked by Gradio's client."""
    (tmp_path / "secret.txt").write_text("secret")
    command = ["--run", str(run), "--num_steps", "4", "--queue", "1", "--port", str(port())]
    (tmp_path / "tmp").mkdir()
    log = tmp_path / "log"
    log.touch()
    process = FORK.Process(target=run_command, args=(command, tmp_path))
    process.start()
    try:
        while not log.read_text().endswith("\n"):
            assert process.is_alive()
            time.sleep(0.05)
        line = log.read_text()
        assert re.fullmatch(r"open http://127.0.0.1:\d+/; Ctrl\+C ends the demo\n", line)
        url = line.split()[1].rstrip(";")
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False, download_files=False)
        answers = client.predict(prompt=PROMPT, checkpoint="checkpoint-2", api_name="/generate")
        assert [len(gallery) for gallery in answers[:2]] == [4, 4]
        assert "checkpoint-2, 4 images, seed 0" in answers[2]
        picture = answers[0][0]["image"]["url"]
        assert [*(tmp_path / "tmp").rglob("*.png")]
        assert httpx.get(picture).content.startswith(b"\x89PNG")
        for path in ("/etc/passwd", run / "config.yaml", tmp_path / "secret.txt"):
            assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
        text = httpx.get(url).text
        addresses = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', text)
        assert [address for address in addresses if not address.startswith(url)] == []
        assert "fonts.googleapis.com" not in text + httpx.get(f"{url}theme.css").text
        assert client.config["analytics_enabled"] is False
        slow = {"prompt": PROMPT, "num_images": 8, "num_steps": 50, "api_name": "/generate"}
        jobs = [client.submit(**slow) for _ in range(4)]  # at most one is computed, and one waits
        refused = [job for job in jobs if isinstance(job.exception(60), gradio_client.utils.QueueError)]
        assert len(refused) >= 2
        client.close()
    finally:
        process.terminate()
    process.join(30)
    assert process.exitcode == 0
    assert not [*(tmp_path / "tmp").rglob("*.png")]


def port():
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_port_that_is_taken():
    def fail(**_):
        raise OSError("Cannot find empty port in range: 7911-7911. You can specify a different port")

    with pytest.raises(UserError, match=r"port: cannot listen on 127\.0\.0\.1:7911: Cannot .* 7911-7911$"):
        launch(SimpleNamespace(launch=fail), DemoConfig(port=7911))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_images", "9"], "num_images: must be at most 8, got 9"),
        (["--num_steps", "0"], "num_steps: must be at least 1, got 0"),
        (["--port", "70000"], "port: must be at most 65535, got 70000"),
        (["--run", "nowhere"], "run nowhere is not the directory of a run"),
        (["--checkpoint", "nowhere"], "checkpoint nowhere: there is no such folder"),
        (["--rewards", "genevall"], "did you mean 'geneval'?"),
        (["--shared"], "unknown setting shared (did you mean 'share'?)"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_settings_of_the_run_are_the_defaults(tmp_path):
    config = Config(rewards=SHAPES)
    config.rollout.noise_level, config.evaluation.num_steps, config.rollout.guidance_scale = 0.4, 12, 2.5
    run = save_run(tmp_path / "run", config, steps=())
    demo = parse_demo(["--run", str(run), "--num_steps", "5"])
    assert (demo.num_steps, demo.guidance_scale, demo.noise_level, demo.rewards) == (5, 2.5, 0.4, SHAPES)
    assert (demo.share, demo.host) == (False, "127.0.0.1")
