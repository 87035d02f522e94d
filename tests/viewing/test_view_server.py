"""The viewer's server: it gives the pages and images of the runs, and nothing else."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from http.client import HTTPConnection

import pytest
from support.gallery_runs import add_evaluation, make_run, served

from fastflowgrpo.view import main


@pytest.fixture
def server(tmp_path):
    """Its host and port."""
    with served(make_run(tmp_path / "a"), make_run(tmp_path / "b")) as address:
        yield address


def ask(server, path, method="GET", **headers):
    connection = HTTPConnection(*server, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{server[1]}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_pages_runs_and_images(server, tmp_path):
    page, body = ask(server, "/")
    assert page.status == 200 and b"<!doctype html>" in body
    for name in (b"data.js", b"main.js", b"view.css", b"icon.svg"):
        assert name in body and ask(server, f"/{name.decode()}")[0].status == 200
    assert json.loads(ask(server, "/data.js")[1].split(b" = ")[1][:-2])["runs"] == [{"name": "a"}, {"name": "b"}]
    assert json.loads(ask(server, "/runs/1.json")[1])["name"] == "b"
    image, body = ask(server, "/runs/0/step-000000/0-0.webp?1.0")
    assert image.getheader("Content-Type") == "image/webp"
    assert body == (tmp_path / "a/gallery/step-000000/0-0.webp").read_bytes()
    assert ask(server, "/", method="HEAD")[1] == b""
    assert ask(server, "/", method="POST")[0].status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/runs/0/../config.yaml",
        "/runs/0/step-000000/../../config.yaml",
        "/runs/0/step-000000/..%2f..%2fconfig.yaml",
        "/runs/0/%2e%2e/config.yaml",
        "/runs/0/step-000000/link.webp",
        "/runs/2.json",
        "/runs/2/step-000000/0-0.webp",
        "/runs/-1.json",
        "/etc/passwd",
        "//etc/passwd",
        "/config.yaml",
        "/runs/0/step-000000/",
        "/runs/" + "9" * 5000 + ".json",
    ],
)
def test_a_path_outside_the_gallery_is_not_found(server, tmp_path, path):
    (tmp_path / "a/gallery/step-000000/link.webp").symlink_to(tmp_path / "a/config.yaml")
    response, body = ask(server, path)
    assert (response.status, body) == (404, b"Not Found")


def test_another_host_name_is_refused(server):
    port = server[1]
    for host in ("evil.example", f"evil.example:{port}", "", f"127.0.0.1.evil.example:{port}", "localhost.evil:1"):
        response, body = ask(server, "/runs/0.json", Host=host)
        assert response.status == 400 and b"geneval" not in body
    for host in ("localhost", "localhost:9000", "127.0.0.1"):
        assert ask(server, "/runs/0.json", Host=host)[0].status == 200


def test_no_other_site_may_read_or_embed_it(server):
    response, _ = ask(server, "/runs/0.json")
    policy = response.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert response.getheader("Cross-Origin-Resource-Policy") == "same-origin"
    assert response.getheader("Access-Control-Allow-Origin") is None


def test_an_unchanged_run_is_not_sent_again(server, tmp_path):
    version = ask(server, "/runs/0.json")[0].getheader("ETag")
    response, body = ask(server, "/runs/0.json", If_None_Match=version)
    assert response.status == 304 and body == b""
    add_evaluation(tmp_path / "a", 3, 12, ["new"])
    response, body = ask(server, "/runs/0.json", If_None_Match=version)
    assert response.status == 200 and len(json.loads(body)["evaluations"]) == 4


def test_the_server_cannot_be_reached_from_outside(server):
    assert server[0] == "127.0.0.1"


def test_errors_of_the_command(tmp_path, capsys):
    run = str(make_run(tmp_path / "run"))
    assert main([str(tmp_path)]) == 2
    assert main([run, "--port", "70000"]) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([run, "--port", str(taken.getsockname()[1]), "--no-browser"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "is not the directory of a run" in errors[0]
    assert errors[1] == "error: port: must be from 0 to 65535, got 70000"
    assert "try --port 0" in errors[2]


def test_the_command_serves_at_once_and_until_it_is_interrupted(tmp_path):
    code = "import sys; from fastflowgrpo.view import main; print('torch' in sys.modules); sys.exit(main())"
    arguments = [str(make_run(tmp_path / "run")), "--port", "0", "--no-browser"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "False\n"
        address = process.stdout.readline().split()[0]
        assert urllib.request.urlopen(f"{address}runs/0.json", timeout=30).status == 200
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
