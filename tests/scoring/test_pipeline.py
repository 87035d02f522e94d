"""Scoring behind the rollout. No test measures a time: rewards wait for what can only happen beside them."""

import threading

import pytest
import torch

from fastflowgrpo.config import Config
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, Scores, WeightedRewards
from fastflowgrpo.scoring import pipeline as module
from fastflowgrpo.scoring.epoch import max_batches_in_flight
from fastflowgrpo.scoring.pipeline import MAX_BATCHES_IN_FLIGHT, Scoring, is_same_device

PROMPTS = [Prompt("a", {}), Prompt("b", {"tag": "x"})]
COPIES = 2
TIMEOUT = 60


def to_images(latents: torch.Tensor) -> torch.Tensor:
    return latents.to(torch.uint8).expand(-1, 3, 4, 4)


def latents(value: int) -> torch.Tensor:
    return torch.arange(value, value + len(PROMPTS) * COPIES).float()[:, None, None, None]


def scoring(**rewards) -> Scoring:
    weighted = WeightedRewards(rewards, {name: 1.0 + i for i, name in enumerate(rewards)})
    return Scoring(weighted, to_images, torch.device("cpu"))


def finished(scorer: Scoring, *show) -> Scores:
    """The scores; what a reward of these tests raises would only be missing."""
    scores = scorer.finish(*show)
    assert not scores.values.isnan().any(), scores.error
    return scores


def level(batch: RewardBatch) -> torch.Tensor:
    return batch.images.float().mean((1, 2, 3))


def test_scores_are_those_of_the_rewards_in_the_order_of_the_batches():
    seen: list[RewardBatch] = []

    def twice(batch):
        seen.append(batch)
        return 2 * level(batch)

    scorer = scoring(level=level, twice=twice)
    images = [scorer.submit(latents(value), PROMPTS, COPIES) for value in (10, 100, 200)]
    scores = scorer.finish()
    expected = torch.cat([latents(value).flatten() for value in (10, 100, 200)])
    assert torch.equal(scores.details["level"], expected)
    assert torch.equal(scores.details["twice"], 2 * expected)
    assert torch.equal(scores.values, expected + 2 * 2 * expected)
    assert torch.equal(torch.cat(images)[:, 0, 0, 0].float(), expected)
    assert seen[0].prompts == ["a", "a", "b", "b"]
    assert seen[0].metadata == [{}, {}, {"tag": "x"}, {"tag": "x"}]
    assert seen[0].group_ids.tolist() == [0, 0, 1, 1]
    scorer.submit(latents(7), PROMPTS, COPIES)
    assert torch.equal(scorer.finish().details["level"], latents(7).flatten())


def test_the_next_batch_can_be_sampled_while_one_is_scored():
    go_on = threading.Event()

    def slow(batch):
        assert go_on.wait(TIMEOUT)
        return level(batch)

    scorer = scoring(slow=slow)
    for value in range(MAX_BATCHES_IN_FLIGHT):
        scorer.submit(latents(value), PROMPTS, COPIES)
    go_on.set()
    assert len(finished(scorer).values) == MAX_BATCHES_IN_FLIGHT * COPIES * len(PROMPTS)


def test_no_more_than_a_few_batches_wait():
    started, go_on, submitted = threading.Semaphore(0), threading.Event(), threading.Event()

    def slow(batch):
        started.release()
        assert go_on.wait(TIMEOUT)
        return level(batch)

    scorer = scoring(slow=slow)

    def sample():
        for value in range(MAX_BATCHES_IN_FLIGHT + 1):
            scorer.submit(latents(value), PROMPTS, COPIES)
        submitted.set()

    thread = threading.Thread(target=sample)
    thread.start()
    assert started.acquire(timeout=TIMEOUT)
    assert not submitted.wait(0.5)
    go_on.set()
    assert submitted.wait(TIMEOUT)
    thread.join()
    assert len(finished(scorer).values) == (MAX_BATCHES_IN_FLIGHT + 1) * COPIES * len(PROMPTS)


def test_the_rewards_of_a_batch_are_called_at_once():
    meeting = threading.Barrier(2, timeout=TIMEOUT)

    def one(batch):
        meeting.wait()
        return level(batch)

    def other(batch):
        meeting.wait()
        return level(batch)

    scorer = scoring(one=one, other=other)
    scorer.submit(latents(1), PROMPTS, COPIES)
    assert not finished(scorer).values.isnan().any()  # one that met nobody has no score


def lost(batch: RewardBatch) -> torch.Tensor:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (lost, "KeyError: 'lost'"),
        (lambda batch: [1.0], "expected 4 numbers, one per image, got shape (1,)"),
        (lambda batch: ["a"] * 4, "expected 4 numbers, one per image, got list"),
        (lambda batch: [1.0, 2.0, 3.0, float("inf")], "infinite for image 3"),
    ],
)
def test_what_a_reward_fails_to_score_is_missing_and_the_reason_said_once(capsys, fail, reason):
    def broken(batch):
        return fail(batch) if batch.images.max() < 100 else level(batch)

    scorer = scoring(level=level, broken=broken)
    for value in (10, 20, 200):
        scorer.submit(latents(value), PROMPTS, COPIES)
    scores = scorer.finish()
    assert scores.values.isnan().tolist() == scores.details["broken"].isnan().tolist() == [True] * 8 + [False] * 4
    assert torch.equal(scores.details["level"], torch.cat([latents(value).flatten() for value in (10, 20, 200)]))
    assert scores.error.startswith(f"reward broken: {reason}")
    printed = capsys.readouterr().out
    assert printed.count(f"reward broken: 4 images not scored: {reason}") == 1
    assert ("in lost" in printed) == (fail is lost), "where it was raised"
    scorer.submit(latents(200), PROMPTS, COPIES)
    assert scorer.finish().error == "", "what is past is past"


def test_a_reward_that_returns_nan_is_named():
    scorer = scoring(level=level, empty=lambda batch: [float("nan")] * 4)
    scorer.submit(latents(1), PROMPTS, COPIES)
    assert scorer.finish().error == "reward empty: it returned NaN"


@pytest.mark.parametrize("error", [UserError("set the token"), KeyboardInterrupt("now"), SystemExit(3)])
def test_what_ends_a_run_does_so_at_once(error, monkeypatch):
    monkeypatch.setattr(module, "REMINDER_SECONDS", 10.0 * TIMEOUT)
    go_on, over = threading.Event(), threading.Event()

    def slow(batch):
        go_on.wait(TIMEOUT)
        over.set()
        return level(batch)

    def ends(batch):
        raise error

    scorer = scoring(slow=slow, ends=ends)
    scorer.submit(latents(1), PROMPTS, COPIES)
    with pytest.raises(type(error), match=str(error.args[0])):
        scorer.finish()
    assert not over.is_set(), "without the others"
    go_on.set()


def test_a_reward_that_hangs_is_named(monkeypatch):
    go_on = threading.Event()
    said: list[str] = []

    def hang(batch):
        assert go_on.wait(TIMEOUT)
        return level(batch)

    def write(message):
        said.append(message)
        go_on.set()

    monkeypatch.setattr(module, "REMINDER_SECONDS", 0.5)
    monkeypatch.setattr(module.tqdm, "write", write)
    scorer = scoring(level=level, hang=hang)
    scorer.submit(latents(1), PROMPTS, COPIES)
    finished(scorer)
    assert said[0].startswith("waiting for the reward ") and "hang" in said[0]


def test_same_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for one, other in (("cuda", "cuda:1"), ("cuda", "cuda"), ("cpu", "cpu:0"), (torch.device("cuda", 0), "cuda:0")):
        assert is_same_device(one, other) and is_same_device(other, one), (one, other)
    for one, other in (("cuda", "cuda:0"), ("cuda", "cpu"), (torch.device("cuda", 0), torch.device("cuda", 1))):
        assert not is_same_device(one, other) and not is_same_device(other, one), (one, other)


def test_a_reward_gets_the_images_where_it_wants_them(monkeypatch):
    seen: dict[str, torch.device] = {}

    def reward(name):
        def score(batch):
            seen[name] = batch.images.device
            return [0.0] * len(batch.prompts)

        return score

    rewards = {name: reward(name) for name in ("here", "by_name", "cpu", "anywhere", "elsewhere")}
    rewards["here"].device = torch.device("meta")
    rewards["by_name"].device = "meta:0"
    rewards["cpu"].device = torch.device("cpu")
    rewards["elsewhere"].device = "cuda:5"
    scorer = Scoring(WeightedRewards(rewards, dict.fromkeys(rewards, 1.0)), to_images, torch.device("meta"))
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(scorer, "_decoded", lambda latents: (images.to("meta"), images, None))
    assert scorer.submit(latents(1), PROMPTS, COPIES) is images
    scorer.finish()
    assert {name: device.type for name, device in seen.items()} == {
        "here": "meta",
        "by_name": "meta",
        "cpu": "cpu",
        "anywhere": "cpu",
        "elsewhere": "cpu",
    }


def test_a_device_that_is_none_is_named():
    def reward(batch):
        return level(batch)

    reward.device = "gpu"
    with pytest.raises(UserError, match=r"^rewards\.mine: its attribute device is 'gpu', not a device$"):
        scoring(mine=reward)


def test_the_last_batches_are_left_for_the_next_call_whatever_else_is_scored_meanwhile():
    go_on = threading.Event()

    def reward(batch):
        assert batch.images.float().mean() < 150 or go_on.wait(TIMEOUT)
        return level(batch)

    scorer = scoring(reward=reward)
    for value in (10, 100, 200, 201):  # the last two are not scored before `go_on`
        scorer.submit(latents(value), PROMPTS, COPIES)
    assert scorer.finish(leave=3).values.tolist() == [10, 11, 12, 13]
    assert scorer.finish(leave=2).values.tolist() == [100, 101, 102, 103]
    go_on.set()
    with scorer.set_aside():
        scorer.submit(latents(50), PROMPTS, COPIES)
        assert finished(scorer).values.tolist() == [50, 51, 52, 53]
    scorer.submit(latents(20), PROMPTS, COPIES)
    assert finished(scorer).values.tolist() == [200, 201, 202, 203, 201, 202, 203, 204, 20, 21, 22, 23]


def test_as_many_batches_as_asked_for_wait_for_their_scores():
    go_on = threading.Event()

    def slow(batch):
        assert go_on.wait(TIMEOUT)
        return level(batch)

    scorer = Scoring(WeightedRewards({"slow": slow}, {"slow": 1.0}), to_images, torch.device("cpu"), max_in_flight=4)
    for value in range(4):
        scorer.submit(latents(value), PROMPTS, COPIES)  # would wait for ever
    go_on.set()
    assert len(finished(scorer).values) == 16
    config = Config()
    assert max_batches_in_flight(config, 1) == MAX_BATCHES_IN_FLIGHT
    config.rollout.ahead, config.rollout.batch_size = 20, 48
    assert [max_batches_in_flight(config, processes) for processes in (1, 4, 20)] == [11, 4, 2]


def test_what_is_awaited_is_shown():
    go_on = threading.Event()

    def slow(batch):
        assert go_on.wait(TIMEOUT)
        return level(batch)

    def show(awaited):
        shown.append(awaited)
        go_on.set()

    shown: list[str] = []
    quick_done = threading.Event()

    def quick(batch):
        quick_done.set()
        return level(batch)

    scorer = scoring(quick=quick, slow=slow)
    scorer.submit(latents(1), PROMPTS, COPIES)
    assert quick_done.wait(TIMEOUT)
    finished(scorer, show)
    assert "slow" in shown[0]


def test_rewards_build_no_graph():
    enabled: list[bool] = []

    def reward(batch):
        enabled.append(torch.is_grad_enabled())
        return level(batch)

    scorer = scoring(reward=reward)
    scorer.submit(latents(1), PROMPTS, COPIES)
    scorer.finish()
    assert enabled == [False]


def test_a_reward_beside_a_rollout_on_the_cpu_has_one_thread_and_the_rollout_keeps_its_own():
    seen = []

    def reward(batch):
        seen.append(torch.get_num_threads())
        return level(batch)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = scoring(one=reward)
        run.submit(latents(1), PROMPTS, COPIES)
        run.finish()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def videos(latents: torch.Tensor) -> torch.Tensor:
    """Of 9 frames, whose level is the latents' and the frame's number."""
    levels = latents.view(-1, 1) + torch.arange(9)
    return levels.to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 3, 4, 4)


def test_a_video_is_scored_by_the_mean_over_its_frames_and_shown_by_the_middle_one():
    shapes = []

    def lost(batch):
        """The frame of level 15 has no score."""
        shapes.append(tuple(batch.images.shape))
        values = level(batch)
        return Scores(values.where(values != 15, torch.nan), {"twice": 2 * values})

    def whole(batch):
        shapes.append(tuple(batch.images.shape))
        return batch.images[:, :, 0, 0, 0].float().amax(1)

    whole.videos = True
    rewards = WeightedRewards({"lost": lost, "whole": whole}, {"lost": 1.0, "whole": 0.0})
    scorer = Scoring(rewards, videos, torch.device("cpu"), frames=3)
    images = scorer.submit(latents(10), PROMPTS, COPIES)
    scores = scorer.finish()
    assert sorted(shapes) == [(4, 3, 3, 4, 4), *[(4, 3, 4, 4)] * 3]
    # frames 1, 4 and 7 of 9; level 15 is frame 4 of the second video and frame 1 of none
    assert images[:, 0, 0, 0].tolist() == [14, 15, 16, 17]
    assert scores.values.isnan().tolist() == [False, True, False, False]
    assert scores.values[[0, 2, 3]].tolist() == [14, 16, 17]
    assert scores.details["lost/twice"].tolist() == [28, 30, 32, 34]
    assert scores.details["whole"].tolist() == [17, 18, 19, 20]


def test_a_video_of_fewer_frames_is_scored_by_all_of_them():
    rewards = WeightedRewards({"level": level}, {"level": 1.0})
    scorer = Scoring(rewards, lambda latents: videos(latents)[:, :2], torch.device("cpu"), frames=5)
    scorer.submit(latents(10), PROMPTS, COPIES)
    assert scorer.finish().values.tolist() == [10.5, 11.5, 12.5, 13.5]
