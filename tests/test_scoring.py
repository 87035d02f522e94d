"""Scoring behind the rollout. No test measures a time: rewards wait for what can only happen beside them."""

import threading

import pytest
import torch

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, WeightedRewards
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
