"""Whole videos on their way to a reward server, and the example that scores them with VideoAlign."""

import sys
import types
from pathlib import Path

import cv2
import pytest
import torch
from support.reward_server import batch_of, hosted

from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.scoring.client import RemoteReward
from fastflowgrpo.scoring.pipeline import Scoring


def videos(count: int, frames: int = 3, side: int = 8) -> RewardBatch:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, frames, 3, side, side + 2), dtype=torch.uint8, generator=generator)
    return RewardBatch(pixels, ["p"] * count, [{}] * count, torch.arange(count) // 2)


def motion(batch: RewardBatch) -> torch.Tensor:
    return batch.images.float().diff(dim=1).mean((1, 2, 3, 4))


motion.videos = True


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_server_gets_whole_videos(encoding):
    with hosted({"r": motion}) as url:
        client, batch = RemoteReward("r", url, encoding=encoding, batch_size=2, videos=True), videos(6)
        assert motion(batch).std() > 0.1
        torch.testing.assert_close(client(batch).values, motion(batch))


def test_a_server_joins_only_videos_of_as_many_frames():
    seen = []

    def reward(batch):
        seen.append(batch.images.shape[1])
        return motion(batch)

    reward.videos = True
    with hosted({"r": reward}, delay=0.2) as url:
        client = RemoteReward("r", url, videos=True)
        for frames in (3, 5):
            torch.testing.assert_close(client(videos(2, frames)).values, motion(videos(2, frames)))
    assert seen == [3, 5]


def test_a_run_sends_its_scored_frames_together():
    pixels = videos(4, frames=9).images
    with hosted({"r": motion}) as url:
        rewards = build_rewards({"r": {"url": url, "videos": True}})
        scoring = Scoring(rewards, lambda latents: pixels, torch.device("cpu"), frames=3)
        scoring.submit(torch.zeros(4), [Prompt("p"), Prompt("q")], 2)
        values = scoring.finish().values
    torch.testing.assert_close(values, pixels[:, [1, 4, 7]].float().diff(dim=1).mean((1, 2, 3, 4)))


def test_what_a_reward_does_not_take_is_refused():
    with hosted({"video": motion, "image": lambda batch: [0.0] * len(batch.prompts)}) as url:
        with pytest.raises(UserError, match=r"reward image takes images, but gets videos: leave out videos in the run"):
            RemoteReward("image", url, videos=True)(videos(2))
        with pytest.raises(UserError, match=r"reward video takes videos, but gets images: set videos in the run"):
            RemoteReward("video", url)(batch_of([1, 2]))
    with hosted({"video": motion}, max_images=5) as url, pytest.raises(UserError, match="6 images, at most 5"):
        RemoteReward("video", url, videos=True)(videos(2))
    for settings, message in (
        ({"videos": 1}, "true or false, got 1"),
        ({"format": "flow_grpo"}, "no place for videos"),
    ):
        with pytest.raises(ValueError, match=message):
            RemoteReward("video", url, **{"videos": True, **settings})


class Inference:
    """In place of VideoAlign's class: it says what it reads in the files."""

    def __init__(self, checkpoints, device, dtype):
        assert (checkpoints, dtype) == ("weights", torch.bfloat16)

    def reward(self, paths, prompts, use_norm):
        scores = []
        for path in paths:
            file = cv2.VideoCapture(path)
            levels = []
            while (frame := file.read())[0]:
                levels.append(frame[1].mean((0, 1)))  # blue, green, red
            scores.append({"VQ": file.get(cv2.CAP_PROP_FPS), "MQ": len(levels), "TA": float(levels[-1][2])})
            file.release()
        assert use_norm and prompts == ["p"] * len(paths)
        return scores


def test_the_example_for_videoalign_gets_the_frames_in_order_and_their_rate(monkeypatch):
    monkeypatch.setitem(sys.modules, "inference", types.SimpleNamespace(VideoVLMRewardInference=Inference))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    name = "videoalign_reward:videoalign"
    reward = build_rewards({name: {"checkpoints": "weights", "fps": 5.0}}).rewards[name]
    pixels = torch.zeros(2, 4, 3, 32, 48, dtype=torch.uint8)
    pixels[:, -1, 0] = torch.tensor([60, 200]).view(2, 1, 1)  # the last frame is red
    batch = RewardBatch(pixels, ["p"] * 2, [{}] * 2, torch.arange(2))
    with hosted({name: reward}) as url:
        scores = RemoteReward(name, url, videos=True)(batch)
    assert scores.details["VQ"].tolist() == [5, 5] and scores.details["MQ"].tolist() == [4, 4]
    assert scores.details["TA"].tolist() == pytest.approx([60, 200], abs=6)
    assert scores.values.tolist() == pytest.approx([9 + level for level in scores.details["TA"].tolist()])
