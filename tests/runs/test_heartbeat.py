"""Ranks of one process; test_launcher.py has a heartbeat in two processes."""

import json
import re
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from fastflowgrpo.distributed import Processes
from fastflowgrpo.runs.heartbeat import Heartbeat

LIMIT = 0.2  # seconds


def ranks(count, kind=DistributedType.MULTI_CPU):
    return [
        Processes(SimpleNamespace(process_index=rank, num_processes=count, distributed_type=kind))
        for rank in range(count)
    ]


def beating(stack, folder, processes, limit=LIMIT):
    heartbeat = stack.enter_context(closing(Heartbeat(folder, processes, limit)))
    heartbeat.start()
    return heartbeat


def said(capsys, ends=lambda text: text):
    """What is printed until it is what is waited for."""
    text, deadline = "", time.monotonic() + 30
    while not ends(text):
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
        text += capsys.readouterr().out
    return text


def test_the_first_of_those_that_wait_names_all_that_have_not_come(tmp_path, capsys):
    one, two, three, four = ranks(4)
    one.note("score")
    four.note("update, micro-batch 3 of 9")
    with ExitStack() as stack:
        for rank in (one, two, three, four):
            beating(stack, tmp_path, rank)
        stack.enter_context(three.meeting())
        stack.enter_context(two.meeting())
        text = said(capsys)
        assert text.count("waiting") == 1
        assert re.search(r'process 0 \(\d+ on .+\) has been in the phase "score" for \d s; process 3 \(', text)
        assert re.search(r'in the phase "update, micro-batch 3 of 9" for \d s\n', text)
        assert "process 2" not in text
        assert said(capsys).startswith("waiting")  # again, while nothing changes
    assert not (tmp_path / ".heartbeat").exists()


def test_a_process_that_stopped_writing_has_given_no_sign_of_life(tmp_path, capsys):
    one, two, _ = ranks(3)
    with ExitStack() as stack:
        beating(stack, tmp_path, one)
        beating(stack, tmp_path, two).closed.set()
        stack.enter_context(one.meeting())
        text = said(capsys, lambda text: "sign of life" in text)
    assert re.search(r'in the phase "start" for \d s, and has given no sign of life for \d s', text)
    assert "process 2 has written nothing" in text


def test_where_all_have_come_the_network_hangs(tmp_path, capsys):
    with ExitStack() as stack:
        for rank in ranks(2):
            beating(stack, tmp_path, rank)
            stack.enter_context(rank.meeting())
        assert "the network or a GPU hangs" in said(capsys)


def test_the_phases_of_a_sharded_model_are_meetings(tmp_path, capsys):
    one, two = ranks(2, DistributedType.FSDP)
    with ExitStack() as stack:
        for rank in (one, two):
            beating(stack, tmp_path, rank)
            rank.note("rollout, batch 1")
        one.note("rollout, batch 2")
        assert 'in the phase "rollout, batch 1"' in said(capsys)


def test_a_wait_that_ends_is_not_spoken_of(tmp_path, capsys):
    one, two = ranks(2)
    with ExitStack() as stack:
        for rank in (one, two):
            beating(stack, tmp_path, rank, limit=1)
        for _ in range(11):
            with one.meeting(), two.meeting():
                time.sleep(0.1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("count, limit", [(1, LIMIT), (2, None)])
def test_one_process_or_no_limit_writes_nothing(tmp_path, count, limit):
    with ExitStack() as stack:
        beating(stack, tmp_path, ranks(count)[0], limit)
        assert list(tmp_path.iterdir()) == []


def test_a_file_says_where_its_process_is(tmp_path):
    one, _ = ranks(2)
    with ExitStack() as stack:
        one.note("checkpoint")
        beating(stack, tmp_path, one)
        file = tmp_path / ".heartbeat" / "0"
        while not file.exists():
            time.sleep(0.02)
        assert json.loads(file.read_text())["phase"] == "checkpoint"
