"""DINO similarity to the source: the formula on PIL images, and what the score says of changes."""

import numpy as np
import pytest
import torch
from support.reward_models import dinov2_folder, sample_images, to_pil
from torch.nn import functional as F
from transformers import Dinov2Model

from fastflowgrpo.errors import UserError
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.rewards.dino import Dino


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return dinov2_folder(tmp_path_factory.mktemp("dinov2"))


def edits(images: torch.Tensor, sources: torch.Tensor | None) -> RewardBatch:
    count = len(images)
    return RewardBatch(
        images, ["an edit"] * count, [{}] * count, torch.arange(count), None if sources is None else list(sources)
    )


def test_the_score(folder):
    images = sample_images(80, 60)
    sources = images.roll(1, 0)
    reward = Dino(folder, device="cpu", batch_size=4)
    scores = reward(edits(images, sources))
    network = Dinov2Model.from_pretrained(folder).eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = np.stack([(np.asarray(image.resize((56, 56), 3)) / 255 - mean) / std for image in to_pil(images)])
    with torch.no_grad():
        features = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    expected = F.cosine_similarity(features, features.roll(1, 0))
    assert expected.std() > 0.05 and torch.allclose(scores.values, expected, atol=1e-3)
    assert reward.pointwise and scores.values.dtype == torch.float32
    assert torch.allclose(reward(edits(images, images)).values, torch.ones(6))


def test_a_change_at_the_edge_counts(folder):
    """The processor's crop of the centre would not see it."""
    source = sample_images(64, 128)[2:3]
    result = source.clone()
    result[..., :16] = 255
    assert Dino(folder, device="cpu")(edits(result, source)).values < 0.999


def test_errors(folder, tmp_path):
    rewards = build_rewards({"dino": {"model": folder, "device": "cpu"}})
    with pytest.raises(UserError, match=r"^rewards\.dino: there are no source images"):
        rewards(edits(sample_images(56, 56), None))
    with pytest.raises(ValueError, match=r"^rewards\.dino: batch_size must be at least 1, got 0"):
        build_rewards({"dino": {"model": folder, "batch_size": 0}})
    with pytest.raises(ValueError, match=r"^rewards\.dino: cannot load the folder"):
        build_rewards({"dino": {"model": str(tmp_path)}})
