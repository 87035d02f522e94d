"""Scoring behind the rollout. No test measures a time: rewards wait for what can only happen beside them."""

import threading

import pytest
import torch

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, Scores, WeightedRewards
from fastflowgrpo.rewards.scoring import DEPTH, Scoring

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
    for value in range(DEPTH):
        scorer.submit(latents(value), PROMPTS, COPIES)
    go_on.set()
    assert len(scorer.finish().values) == DEPTH * COPIES * len(PROMPTS)


def test_no_more_than_a_few_batches_wait():
    started, go_on, submitted = threading.Semaphore(0), threading.Event(), threading.Event()

    def slow(batch):
        started.release()
        assert go_on.wait(TIMEOUT)
        return level(batch)

    scorer = scoring(slow=slow)

    def sample():
        for value in range(DEPTH + 1):
            scorer.submit(latents(value), PROMPTS, COPIES)
        submitted.set()

    thread = threading.Thread(target=sample)
    thread.start()
    assert started.acquire(timeout=TIMEOUT)
    assert not submitted.wait(0.5)
    go_on.set()
    assert submitted.wait(TIMEOUT)
    thread.join()
    assert len(scorer.finish().values) == (DEPTH + 1) * COPIES * len(PROMPTS)


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
    scorer.finish()


def test_a_failed_reward_ends_it_with_its_name():
    def broken(batch):
        raise KeyError("lost")

    scorer = scoring(level=level, broken=broken)
    scorer.submit(latents(1), PROMPTS, COPIES)
    with pytest.raises(RuntimeError, match="reward broken: KeyError: 'lost'"):
        scorer.finish()


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
    scorer.finish(show)
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
