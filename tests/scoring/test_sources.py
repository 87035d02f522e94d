"""Source images of edits on their way to rewards: through threads, processes and servers."""

import io

import pytest
import torch
from PIL import Image
from support import worker_rewards
from support.reward_server import hosted

from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, WeightedRewards, build_rewards
from fastflowgrpo.scoring.client import RemoteReward
from fastflowgrpo.scoring.pipeline import Scoring


def batch_of(count: int, side: int = 6) -> RewardBatch:
    """Images in pairs, each pair with a source of its own."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 4, side), dtype=torch.uint8, generator=generator)
    sources = torch.randint(0, 256, (count // 2, 3, 4, side), dtype=torch.uint8, generator=generator)
    rows = torch.arange(count) // 2
    return RewardBatch(images, ["p"] * count, [{}] * count, rows, list(sources[rows]))


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "png")
    return file.getvalue()


def test_each_image_comes_with_its_source_in_the_size_of_the_images():
    seen = []
    rewards = WeightedRewards(
        {"r": lambda batch: seen.append(batch) or worker_rewards.unlike_source(batch)}, {"r": 1.0}
    )
    scoring = Scoring(rewards, lambda latents: latents.to(torch.uint8).expand(-1, 3, 4, 6), torch.device("cpu"))
    prompts = [Prompt("a", image=png(10)), Prompt("b", image=png(50))]
    scoring.submit(torch.tensor([10.0, 20.0, 30.0, 40.0]).view(-1, 1, 1, 1), prompts, 2)
    assert scoring.finish().values.tolist() == [0, 10, 20, 10]
    assert seen[0].sources[0] is seen[0].sources[1] and seen[0].sources[0].shape == (3, 4, 6)
    assert len(seen[0].rows(slice(1, 3)).sources) == 2


def test_processes_get_the_sources_of_their_part():
    name = "support.worker_rewards:unlike_source"
    reward = build_rewards({name: {"workers": 1}}).rewards[name]
    try:
        batch = batch_of(6)
        assert torch.equal(reward(batch).values, worker_rewards.unlike_source(batch))
    finally:
        reward.close()


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_server_gets_sources_and_joins_only_like_requests(encoding):
    seen = []

    def reward(batch):
        seen.append(batch.sources is not None)
        return worker_rewards.unlike_source(batch) if seen[-1] else torch.zeros(len(batch.prompts))

    with hosted({"r": reward}) as url:
        client, batch = RemoteReward("r", url, encoding=encoding, batch_size=2), batch_of(6)
        torch.testing.assert_close(client(batch).values, worker_rewards.unlike_source(batch))
        batch.sources = None
        assert client(batch).values.tolist() == [0] * 6
    assert set(seen) == {True, False}


def test_a_server_refuses_sources_that_do_not_fit():
    with hosted({"r": worker_rewards.unlike_source}) as url:
        batch = batch_of(2)
        batch.sources = batch_of(2, side=8).sources
        with pytest.raises(UserError, match="source 0: another size than image 0"):
            RemoteReward("r", url, encoding="png")(batch)
    with pytest.raises(UserError, match="flow_grpo has no place for the source images"):
        RemoteReward("r", "http://127.0.0.1:9", format="flow_grpo")(batch)
