"""Rewards in processes of their own."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from support import worker_rewards
from support.forks import FORK

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.scoring import workers

pytestmark = pytest.mark.xdist_group("resume")  # forks from the same process
GROUP = 3


@pytest.fixture
def spawned():
    """For a test whose processes are started anew, as in a run."""


@pytest.fixture(autouse=True)
def forked(request, monkeypatch):
    """Processes are forked from one that has imported everything, unless the test asks for `spawned`."""
    if "spawned" not in request.fixturenames:
        monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda method: FORK))


def batch_of(prompts: list[str]) -> RewardBatch:
    """GROUP images of each prompt."""
    repeated = [prompt for prompt in prompts for _ in range(GROUP)]
    images = torch.randint(0, 256, (len(repeated), 3, 5, 7), dtype=torch.uint8, generator=torch.manual_seed(0))
    ids = torch.arange(len(prompts)).repeat_interleave(GROUP)
    return RewardBatch(images, repeated, [{} for _ in repeated], ids)


def worker_reward(name, settings):
    name = f"support.worker_rewards:{name}"
    return build_rewards({name: settings}).rewards[name]


@pytest.fixture
def reward(request):
    """The reward with the name and the settings that the test is parametrised with."""
    name, settings = request.param
    made = worker_reward(name, settings)
    yield made
    made.close()


@pytest.mark.parametrize("reward", [("brightness", {"workers": 2, "scale": 0.5})], indirect=True)
@pytest.mark.usefixtures("spawned")
def test_processes_give_what_the_reward_gives_in_its_order(reward):
    batch = batch_of(["a", "unscorable", "b", "c", "d"])
    scores, expected = reward(batch), worker_rewards.brightness(batch, scale=0.5)
    torch.testing.assert_close(scores.values, expected.values, equal_nan=True)
    assert scores.values.isnan().tolist() == [prompt == "unscorable" for prompt in batch.prompts]
    torch.testing.assert_close(scores.details, expected.details)
    assert scores.error == "the prompt is unscorable"
    torch.testing.assert_close(reward(batch.rows(slice(0, 1))).values, expected.values[:1])


@pytest.mark.parametrize("reward", [("brightness", {"workers": 1, "timeout": 60})], indirect=True)
def test_a_time_in_which_the_run_itself_was_stopped_does_not_count_as_a_hang(reward, monkeypatch):
    """An hour passes within one wait, and the answer comes in the next one."""

    class Stopped:
        def __init__(self, connection):
            self.connection, self.waits = connection, 0

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def poll(self, seconds):
            self.waits += 1
            if self.waits == 1:
                now = time.monotonic()
                monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
                return False
            return self.connection.poll(seconds)

    (worker,) = reward.workers
    first = worker.process.pid
    worker.connection = Stopped(worker.connection)
    assert reward(batch_of(["a"])).error == ""
    assert worker.connection.waits > 1 and worker.process.pid == first


def test_processes_share_a_batch(tmp_path):
    settings = {"workers": 2, "marks": str(tmp_path), "timeout": 60}
    reward = worker_reward("meet", settings)
    try:
        assert reward(batch_of(["a", "b"])).values.tolist() == [1.0] * 2 * GROUP
        assert {path.name for path in tmp_path.iterdir()} == {str(worker.process.pid) for worker in reward.workers}
    finally:
        reward.close()


def test_scores_are_in_order_whichever_part_is_done_first(tmp_path):
    settings = {"workers": 2, "marks": str(tmp_path), "timeout": 60}
    reward = worker_reward("second_first", settings)
    batch = batch_of(["first", "second"])
    try:
        torch.testing.assert_close(reward(batch).values, worker_rewards.brightness(batch).values)
    finally:
        reward.close()


@pytest.mark.parametrize("reward", [("group_size", {"workers": 2})], indirect=True)
def test_a_reward_sees_whole_groups_unless_it_is_pointwise(reward):
    assert reward(batch_of(list("abcdefgh"))).values.tolist() == [GROUP] * GROUP * 8


def test_rewards_of_the_package_share_groups_between_processes():
    reward = build_rewards({"geneval": {"workers": 1}}).rewards["geneval"]
    try:
        assert reward.pointwise
        with pytest.raises(ValueError, match="has no GenEval metadata"):
            reward.check_prompts([Prompt("a cat", {})])
    finally:
        reward.close()


@pytest.mark.parametrize("what", ["die", "hang"])
def test_a_process_that_dies_or_hangs_is_replaced_and_nothing_is_lost(what, tmp_path, capsys):
    settings = {"workers": 1, "timeout": 20, "marks": str(tmp_path), "times": 1}
    reward = worker_reward("bad", settings)
    reward.timeout = 20 if what == "die" else 2
    first = reward.workers[0].process
    try:
        assert reward(batch_of(["fine", what, "fine"])).values.tolist() == [1.0] * 3 * GROUP
        assert reward.workers[0].process is not first
        assert not first.is_alive()
        assert "a new one takes its place" in capsys.readouterr().out
    finally:
        reward.close()


@pytest.mark.parametrize("what", ["die", "raise", "shorten"])
def test_what_cannot_be_scored_is_missing_and_said(what, tmp_path, capsys):
    reward = worker_reward("bad", {"workers": 1, "marks": str(tmp_path)})
    try:
        values = reward(batch_of(["fine", what, "fine"])).values
        reasons = {"die": "the process died", "raise": "KeyError: 'lost'", "shorten": f"expected {GROUP} numbers"}
        assert values.isnan().tolist() == [False] * GROUP + [True] * GROUP + [False] * GROUP
        printed = capsys.readouterr().out
        assert reasons[what] in printed and "reward support.worker_rewards:bad: reward" not in printed
    finally:
        reward.close()


def test_no_process_is_left_behind():
    before = set(multiprocessing.active_children())
    reward = worker_reward("brightness", {"workers": 2})
    assert len(set(multiprocessing.active_children()) - before) == 2
    reward.close()
    assert set(multiprocessing.active_children()) <= before


def test_no_process_takes_the_place_of_one_that_the_end_of_the_run_has_stopped(tmp_path):
    reward = worker_reward("bad", {"workers": 1, "timeout": 20, "marks": str(tmp_path)})
    stopped = reward.workers[0].process
    with ThreadPoolExecutor() as pool:
        scores = pool.submit(reward, batch_of(["hang"]))
        while not (tmp_path / "hang").exists():
            assert not scores.done()
            time.sleep(0.01)
        reward.close()
        with pytest.raises((OSError, EOFError)):
            scores.result(timeout=60)
    assert reward.workers[0].process is stopped and not stopped.is_alive()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers must be"),
        ({"workers": 1.5}, "workers must be"),
        ({"workers": True}, "workers must be"),
        ({"workers": 1, "timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"workers": 1, "scales": 2}, "unknown setting 'scales' (did you mean 'scale'?)"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=r"rewards.support.worker_rewards:brightness: ") as caught:
        build_rewards({"support.worker_rewards:brightness": settings})
    assert message in str(caught.value)
    assert str(caught.value).count("rewards.support.worker_rewards:brightness") == 1
