"""The reward server: what it answers, refuses and survives."""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import schemathesis
import torch
import urllib3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.reward_server import PASSWORD, Server, batch_of, hosted
from urllib3.filepost import encode_multipart_formdata
from urllib3.util import parse_url

from fastflowgrpo.config import TOKEN, ServerConfig
from fastflowgrpo.rewards import RewardBatch, Scores
from fastflowgrpo.scoring.client import RemoteReward
from fastflowgrpo.serve import listen, main

RAW, PNG, JPEG = "application/octet-stream", "image/png", "image/jpeg"


@pytest.fixture(autouse=True, scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, PASSWORD)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory, environment):
    limits = "--max_request_mib=1 --max_images=48 --max_pixels=100000 --queue=24 --timeout=30"
    with Server(tmp_path_factory.mktemp("server"), *limits.split()) as server:
        yield server
        assert server.process.poll() is None, "it survived its tests"


def call(url, path, body=None, method="POST", token=PASSWORD, **headers):
    """(status, answer) of a plain request."""
    headers = {"Authorization": f"Bearer {token}", **headers}
    answer = urllib3.request(method, url + path, body=body, retries=False, timeout=60, headers=headers)
    return answer.status, answer.data.decode()


def connected(url) -> socket.socket:
    return socket.create_connection(("127.0.0.1", parse_url(url).port), timeout=60)


def form(request, *images, kind=RAW):
    """(body, content type) of a score request."""
    request = request if isinstance(request, str) else json.dumps(request)
    return encode_multipart_formdata([("request", request), *(("images", ("image", i, kind)) for i in images)])


def score(url, name, *args, **settings):
    body, content_type = form(*args, **settings)
    return call(url, f"/score/served:{name}", body, **{"Content-Type": content_type})


def metric(url, name) -> float:
    text = call(url, "/metrics", method="GET")[1]
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"fastflowgrpo_{name}"))


def file(width, height, kind="png", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of some 100 kB that holds the first 10000 of 30000 x 30000 pixels."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + 3 * 30000)) for _ in range(1000)) + packer.flush()
    header = (30000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )


# scores


@pytest.mark.parametrize(("encoding", "tolerance"), [("raw", 1e-4), ("png", 1e-4), ("jpeg", 2)])
def test_scores_are_those_of_the_images_sent(server, encoding, tolerance):
    images = torch.randint(0, 256, (7, 3, 24, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 0] //= 2  # neither channels nor rows and columns can be swapped unseen
    images[:, :, :12] //= 3
    batch = RewardBatch(images, ["a cat"] * 7, [{}] * 7, torch.tensor([3, 3, 3, 9, 9, 9, 4]))
    scores = RemoteReward("served:brightness", server.url, encoding=encoding, batch_size=2)(batch)
    assert torch.allclose(scores.values, images.float().mean((1, 2, 3)), atol=tolerance)
    if encoding != "jpeg":
        assert torch.equal(scores.details["corner"], images[:, 0, 0, 0].float())


def test_a_plain_request_needs_only_prompts_and_images(server):
    status, answer = score(server.url, "brightness", {"prompts": ["a", "b"]}, file(6, 4), file(6, 4), kind=PNG)
    assert status == 200
    assert json.loads(answer) == {"scores": [0.0, 0.0], "details": {"corner": [0.0, 0.0]}, "error": None}


def test_groups_stay_whole_and_those_of_different_requests_apart():
    seen = []

    def reward(batch):
        seen.append(batch.group_ids.tolist())
        return batch.images.float().mean((1, 2, 3))

    groups = [7, 7, 2**40], [7, -3, -3]
    with hosted({"r": reward}, delay=60.0, batch_size=6) as url, ThreadPoolExecutor(2) as pool:
        client = RemoteReward("r", url)
        first = pool.submit(client, batch_of([1, 2, 3], groups[0]))
        time.sleep(0.5)
        answers = [pool.submit(client, batch_of([4, 5, 6], groups[1])).result(), first.result()][::-1]
    assert [answer.values.tolist() for answer in answers] == [[1, 2, 3], [4, 5, 6]]
    assert sorted(seen) in ([[0, 0, 1, 2, 3, 3]], [[0, 1, 1, 2, 2, 3]]), "one batch of both"


def test_images_of_different_sizes_do_not_share_a_batch():
    seen = []

    def reward(batch):
        seen.append(tuple(batch.images.shape))
        return batch.images.float().mean((1, 2, 3))

    with hosted({"r": reward}, delay=60.0, batch_size=4) as url, ThreadPoolExecutor(4) as pool:
        batches = [batch_of([v, v + 1], side=side) for v, side in ((1, 8), (3, 16), (5, 8), (7, 16))]
        answers = list(pool.map(RemoteReward("r", url, concurrency=4), batches))
    assert [answer.values.tolist() for answer in answers] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert sorted(seen) == [(4, 3, 8, 8), (4, 3, 16, 16)]


def test_a_scorer_that_fails_costs_only_the_request_that_it_fails_for(capsys):
    sizes = []

    def reward(batch):
        values = batch.images.float().mean((1, 2, 3))
        sizes.append(len(values))
        if (values == 13).any():
            raise KeyError("thirteen")
        if (values == 14).any():
            return values[1:]
        return Scores(torch.where(values == 15, torch.nan, values))

    batches = batch_of([1, 2]), batch_of([13, 3]), batch_of([14, 4]), batch_of([15, 5])
    with hosted({"r": reward}, delay=60.0, batch_size=8) as url, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(RemoteReward("r", url), batches))
    assert sizes == [8, 2, 2, 2, 2], "together, then each alone"
    expected = torch.tensor([[1, 2], [torch.nan] * 2, [torch.nan] * 2, [torch.nan, 5]])
    assert torch.equal(torch.stack([answer.values for answer in answers]).nan_to_num(-1), expected.nan_to_num(-1))
    printed = capsys.readouterr().out
    assert "reward r: 2 of 2 images not scored: reward r: KeyError: 'thirteen'\n" in printed
    assert "2 of 2 images not scored: reward r: expected 2 numbers, one per image, got shape (1,)\n" in printed
    assert "reward r: 1 of 2 images not scored: the server gives no reason\n" in printed


def test_a_scorer_that_hangs_is_reported_and_recovers():
    release = threading.Event()

    def hang(batch):
        release.wait(60)
        return [1.0] * len(batch.prompts)

    request = {"prompts": ["a"], "timeout": 1.0}
    with hosted({"served:hang": hang, "served:fine": lambda batch: [2.0]}, timeout=2.0) as url:
        status, answer = score(url, "hang", request, file(4, 4), kind=PNG)
        assert (status, answer) == (503, '{"detail":"not scored within 1 s"}')
        while call(url, "/health", method="GET")[0] == 200:
            time.sleep(0.1)
        assert json.loads(call(url, "/health", method="GET")[1])["hanging"] == ["served:hang"]
        assert score(url, "hang", request, file(4, 4), kind=PNG) == (503, '{"detail":"the reward served:hang hangs"}')
        assert score(url, "fine", request, file(4, 4), kind=PNG)[0] == 200
        release.set()
        while call(url, "/health", method="GET")[0] == 503:
            time.sleep(0.1)
        assert score(url, "hang", request, file(4, 4), kind=PNG)[0] == 200


def test_requests_that_nobody_waits_for_any_more_are_not_scored():
    seen, release = [], threading.Event()

    def reward(batch):
        seen.append(batch.prompts)
        release.wait(60)
        return [1.0] * len(batch.prompts)

    with hosted({"served:r": reward}, delay=0.0) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(score, url, "r", {"prompts": ["first"]}, file(4, 4), kind=PNG)
        while not seen:
            time.sleep(0.01)
        assert score(url, "r", {"prompts": ["given up"], "timeout": 0.2}, file(4, 4), kind=PNG)[0] == 503
        release.set()
        assert first.result()[0] == 200
        assert score(url, "r", {"prompts": ["last"]}, file(4, 4), kind=PNG)[0] == 200
    assert seen == [["first"], ["last"]]


def test_a_request_that_was_given_up_is_not_scored_with_those_that_share_its_batch():
    seen, release = [], threading.Event()

    def reward(batch):
        seen.append(batch.prompts)
        release.wait(60)
        return [1.0] * len(batch.prompts)

    with hosted({"served:r": reward}, delay=0.0, batch_size=2) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(score, url, "r", {"prompts": ["first"]}, file(4, 4), kind=PNG)
        while not seen:
            time.sleep(0.01)
        patient = pool.submit(score, url, "r", {"prompts": ["patient"]}, file(4, 4), kind=PNG)
        assert score(url, "r", {"prompts": ["given up"], "timeout": 0.5}, file(4, 4), kind=PNG)[0] == 503
        release.set()
        assert (first.result()[0], patient.result()[0]) == (200, 200)
    assert seen == [["first"], ["patient"]]


# refusals


def test_without_the_token_nothing_but_health_is_answered(server):
    for path, method in (("/score/served:brightness", "POST"), ("/metrics", "GET"), ("/openapi.json", "GET")):
        for token in ("", "open", PASSWORD + "!", "ü"):
            status, answer = call(server.url, path, method=method, token=token)
            assert (status, answer) == (401, '{"detail":"the bearer token is missing or wrong"}')
    assert call(server.url, "/health", method="GET", token="")[0] == 200
    assert call(server.url, "/metrics", method="GET")[0] == 200


ONE, EIGHT = {"prompts": ["a cat"]}, {"prompts": ["a cat"], "size": [8, 8]}
GREY = bytes(3 * 8 * 8)


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "status", "message"),
    [
        ("brightness", (ONE, bytes(2**20)), RAW, 413, "the request is larger than 1 MiB"),
        ("brightness", ({"prompts": ["a"] * 49}, file(4, 4)), PNG, 413, "49 images, at most 48 are taken at once"),
        ("brightness", (ONE, bomb()), PNG, 413, "image 0: 30000 x 30000 pixels, at most 100000 each"),
        ("brightness", ({**ONE, "size": [10**9, 10**9]}, GREY), RAW, 413, "image 0: 1000000000 x 1000000000 pixels"),
        ("brightness", ({"prompts": ["a"] * 2}, *[file(300, 300)] * 2), PNG, 413, "at most 50000 each for so many"),
        ("brightness", (ONE, file(64, 64)[:60]), PNG, 422, "image 0: cannot be read: "),
        ("brightness", (ONE, file(64, 64, "jpeg")[:-100]), JPEG, 422, "image 0: cannot be read: "),
        ("brightness", (ONE, file(8, 8, "gif")), PNG, 422, "image 0: cannot be read: "),
        ("brightness", (ONE, file(8, 8)), JPEG, 422, "image 0: cannot be read: "),
        ("brightness", (ONE, file(8, 8, mode="RGBA")), PNG, 422, "image 0: mode RGBA, not 8-bit RGB"),
        ("brightness", (ONE, file(8, 8, "gif")), "image/gif", 415, "image 0: content type image/gif, known: "),
        ("brightness", (ONE, GREY), RAW, 422, "image 0: raw, but the request has no size"),
        ("brightness", (EIGHT, GREY[1:]), RAW, 422, "image 0: 191 bytes, but a size of 3 x 8 x 8"),
        ("brightness", ({**ONE, "size": [0, 8]}, b""), RAW, 422, "body.request.size.0: Input should be greater"),
        ("brightness", ({"prompts": ["a"] * 2}, file(8, 8), file(8, 9)), PNG, 422, "image 1: another size than image"),
        ("brightness", ({"prompts": ["a"] * 2}, file(8, 8)), PNG, 422, "2 prompts, but 1 images"),
        ("brightness", ({**ONE, "metadata": []}, file(8, 8)), PNG, 422, "1 prompts, but 0 metadata"),
        ("brightness", ({**ONE, "group_ids": [1, 1]}, file(8, 8)), PNG, 422, "1 prompts, but 2 group_ids"),
        ("brightness", ({"prompts": []}, file(8, 8)), PNG, 422, "body.request.prompts: List should have at least 1"),
        ("brightness", ({**ONE, "promts": 1}, file(8, 8)), PNG, 422, "body.request.promts: Extra inputs are not"),
        ("brightness", ("{", file(8, 8)), PNG, 422, "body.request: Invalid JSON"),
        ("brightness", ('{"prompts": ["a"], "timeout": NaN}', file(8, 8)), PNG, 422, "body.request.timeout: Input"),
        ("brightness", (ONE,), PNG, 422, "body.images: Field required"),
        ("picky", ({"prompts": ["a dog"]}, file(8, 8)), PNG, 422, "reward served:picky: prompt 'a dog' has no cat"),
        ("brightnes", (ONE, file(8, 8)), PNG, 404, "there is no reward 'served:brightnes' (did you mean 'served:b"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_one_line(server, name, arguments, kind, status, message):
    found, answer = score(server.url, name, *arguments, kind=kind)
    assert found == status and "\n" not in answer
    assert message in json.loads(answer)["detail"]


def test_a_body_that_ends_early_or_never_or_is_no_form(server):
    body, content_type = form(EIGHT, GREY)
    path, headers = "/score/served:brightness", {"Content-Type": content_type}
    for cut in range(0, len(body) - 5, 40):
        assert call(server.url, path, body[:cut], **headers)[0] in (400, 422)
    assert call(server.url, path, b"{}", **{"Content-Type": "application/json"})[0] == 422
    # without a length, so that only counting tells that it is too long
    assert call(server.url, path, (bytes(2**16) for _ in range(20)), **headers)[0] == 413
    for request in (b"POST /score/served:brightness HTTP/1.1\r\n", b"nonsense\r\n\r\n"):
        with connected(server.url) as connection:
            connection.sendall(request)
    head = f"POST {path} HTTP/1.1\r\nAuthorization: Bearer {PASSWORD}\r\nContent-Length: 1000\r\n\r\n"
    with connected(server.url) as connection:
        connection.sendall(head.encode() + body[:100])
    while metric(server.url, "requests_held"):  # whoever hung up holds no place
        time.sleep(0.05)
    assert score(server.url, "brightness", EIGHT, GREY)[0] == 200


def test_a_request_that_does_not_arrive_is_given_up():
    with hosted({"r": lambda batch: [0.0]}, timeout=1.0) as url, connected(url) as connection:
        connection.sendall(b"POST /score/r HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nslow")
        assert b"408" in connection.recv(1000)


def test_prompts_are_checked_without_images(server):
    def check(name, prompts):
        body = json.dumps([{"text": text} for text in prompts])
        return call(server.url, f"/check/served:{name}", body, **{"Content-Type": "application/json"})

    assert check("picky", ["a cat", "two cats"])[0] == 200
    assert check("brightness", ["a dog"])[0] == 200
    status, answer = check("picky", ["a cat", "a dog"])
    assert status == 422 and "prompt 'a dog' has no cat" in answer
    assert check("pick", ["a cat"])[0] == 404


# many clients, and the end


def test_a_hundred_clients_at_once(server):
    before = metric(server.url, "images_total")

    def ask(client):
        reward = RemoteReward("served:brightness", server.url)
        return [reward(batch_of([client, 100 + client])).values.tolist() for _ in range(2)]

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers == [[[client, 100 + client]] * 2 for client in range(100)]
    assert metric(server.url, "images_total") - before == 400, "each image was scored once"


def test_those_whom_a_full_queue_sends_away_come_back():
    release, seen = threading.Event(), []

    def reward(batch):
        release.wait(60)
        seen.extend(batch.images[:, 0, 0, 0].tolist())
        return batch.images.float().mean((1, 2, 3))

    with hosted({"served:r": reward}, queue=2) as url, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(RemoteReward("served:r", url), batch_of([value])) for value in range(4)]
        while not metric(url, 'requests_total{status="429"}'):
            time.sleep(0.01)
        assert metric(url, "requests_held") == 2
        assert score(url, "r", ONE, file(8, 8), kind=PNG) == (429, '{"detail":"2 requests are held already"}')
        release.set()
        assert [answer.result().values.tolist() for answer in answers] == [[0], [1], [2], [3]]
    assert sorted(seen) == [0, 1, 2, 3], "each was scored once"


def test_sigterm_finishes_what_was_taken(tmp_path):
    with Server(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        reward = RemoteReward("served:slow", server.url)
        first = pool.submit(reward, batch_of([1, 2]))
        while not (tmp_path / "scoring").exists():
            time.sleep(0.01)
        others = [pool.submit(reward, batch_of([value])) for value in (3, 4)]
        while metric(server.url, "requests_held") < 3:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert first.result().values.tolist() == [1, 2]
        assert [other.result().values.tolist() for other in others] == [[3], [4]]
        assert server.process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            connected(server.url)


# anything may be sent


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def test_requests_made_from_the_openapi_schema_never_break_the_server(server):
    headers = {"Authorization": f"Bearer {PASSWORD}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    operations = [result.ok() for result in schema.get_all_operations()]
    seen = set()

    @FUZZ
    @given(st.one_of([operation.as_strategy() for operation in operations]))
    def send(case):
        answer = case.call(headers=headers, timeout=60)
        assert answer.status_code < 500, answer.text
        seen.add(case.operation.path)

    send()
    assert seen == {"/score/{reward}", "/check/{reward}", "/health", "/metrics"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
REQUEST = st.fixed_dictionaries(
    {"prompts": st.lists(st.text(max_size=8) | JSON, max_size=3)},
    optional={
        "metadata": st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=2) | JSON, max_size=3) | JSON,
        "group_ids": st.lists(st.integers() | JSON, max_size=3) | JSON,
        "size": st.lists(st.integers(-1, 9) | st.integers(), min_size=2, max_size=2) | JSON,
        "timeout": st.floats(1, 30) | JSON,
    },
)
IMAGE = st.sampled_from([GREY, file(8, 8), file(4, 4), file(8, 8, "jpeg"), bomb()]) | st.binary(max_size=300)
DAMAGE = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=2)


@FUZZ
@given(
    request=REQUEST | JSON,
    images=st.lists(IMAGE, max_size=3),
    kind=st.sampled_from([RAW, PNG, JPEG, "text/plain", "\xff"]),
    name=st.sampled_from(["brightness", "rank", "faulty", "picky"]),
    damage=DAMAGE,
)
def test_damaged_requests_never_break_the_server(server, request, images, kind, name, damage):
    body, content_type = form(json.dumps(request), *images, kind=kind)
    damaged = bytearray(body)
    for place, byte in damage:
        damaged[place % len(damaged)] = byte
    answered = call(server.url, f"/score/served:{name}", bytes(damaged), **{"Content-Type": content_type})
    assert answered[0] < 500, answered


# the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards", "orc"], "error: rewards: unknown reward 'orc' (did you mean 'ocr'?); known: "),
        (["--rewards", '{"geneval": {"strickt": 1}}'], "error: rewards.geneval: unknown setting 'strickt' (did you"),
        (["--rewards", "geneval", "--host", "0.0.0.0"], "error: host: 0.0.0.0 can be reached from other machines; set"),
        (["--rewards", "geneval", "--host", "gpu7"], "error: host: gpu7 can be reached from other machines; set a tok"),
        (["--rewards", "geneval", "--port", "99999"], "error: port: must be at most 65535, got 99999"),
        (["--rewards", "geneval", "--queue", "0"], "error: queue: must be at least 1, got 0"),
        (["--rewards", "geneval", "--delay", "-1"], "error: delay: must be at least 0, got -1"),
        (["--rewards", "geneval", "--port", "x"], "error: "),
        ([], "error: "),
    ],
)
def test_what_a_user_can_put_right_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.delenv(TOKEN)
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_the_port_of_another_server_is_an_error(server, capsys):
    assert main(["--rewards", "geneval", "--port", str(parse_url(server.url).port)]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_the_extra():
    code = (
        "import sys; sys.modules.update(torch=None, fastapi=None); import fastflowgrpo.serve as s; s.main(['--help'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Requests held at once" in printed and "18085" in printed


def test_without_its_extra_the_command_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastflowgrpo.scoring.server", None)
    assert main(["--rewards", "geneval"]) == 2
    assert 'pip install "fastflowgrpo[serve]"' in capsys.readouterr().err


def test_answers_are_not_held_back_until_the_client_acknowledges_their_header():
    with listen(ServerConfig(rewards="", port=0), None) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
