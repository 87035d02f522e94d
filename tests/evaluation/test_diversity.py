"""How different the images of a prompt are."""

import pytest
import torch
from support.reward_models import clip_folder, sample_images

from fastflowgrpo.evaluation.diversity import cosine_distances, diversity
from fastflowgrpo.rewards.clip import CLIP

LATENTS = torch.tensor([0.5, 0.25])


def test_diversity():
    images = sample_images(20, 30)[:4].unflatten(0, (2, 2))
    values = images.double()
    expected = (values[:, 0] - values[:, 1]).square().mean((1, 2, 3)).sqrt()
    found = diversity(images, LATENTS)
    assert found["pixels"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert found["latents"] is LATENTS
    assert diversity(images[:, [0, 0]], LATENTS)["pixels"].tolist() == [0, 0]
    assert diversity(images[:, :1], LATENTS) == {}


def test_clip_diversity(tmp_path):
    clip, images = CLIP(clip_folder(tmp_path)), sample_images(64, 64)[:6]
    embeddings = clip.embed_images(images)
    cosine = embeddings @ embeddings.T
    pairs = [[(0, 1), (0, 2), (1, 2)], [(3, 4), (3, 5), (4, 5)]]
    expected = [sum(1 - float(cosine[pair]) for pair in group) / 3 for group in pairs]
    found = diversity(images.unflatten(0, (2, 3)), LATENTS, clip.embed_images)
    assert list(found) == ["pixels", "latents", "CLIP"]
    assert found["CLIP"].tolist() == pytest.approx(expected, rel=1e-4)
    assert cosine_distances(embeddings[[0, 0, 0]][None]).item() == pytest.approx(0, abs=1e-6)
