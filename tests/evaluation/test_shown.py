"""Which prompts and images a picture shows."""

import pickle
from types import SimpleNamespace

import torch

from fastflowgrpo.evaluation.sampling import Samples
from fastflowgrpo.evaluation.shown import gather_shown, shown_prompts
from fastflowgrpo.prompts import TAGS, Prompt
from fastflowgrpo.rewards import Scores


def test_the_same_number_of_different_prompts_from_every_tag():
    prompts = [Prompt(f"{tag} {i % 5}", {"tag": tag}) for tag in TAGS for i in range(10)]
    shown = [prompts[i] for i in shown_prompts(prompts)]
    assert [prompt.metadata["tag"] for prompt in shown] == [tag for tag in TAGS for _ in range(2)]
    assert len({prompt.text for prompt in shown}) == 12
    assert len(shown_prompts([Prompt(f"{i}") for i in range(100)])) == 12
    assert shown_prompts([Prompt("a"), Prompt("b"), Prompt("a")]) == [2, 1]


def test_only_the_shown_images_are_sent():
    prompts = [Prompt(f"{i}") for i in range(100)]
    images = torch.arange(600, dtype=torch.int16).view(600, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    sent = []

    def gather(value):
        sent.append(pickle.dumps(value))
        return [value]

    processes = SimpleNamespace(rank_indices=lambda total: list(range(total)), gather=gather)
    strict = (torch.arange(100) == 50).float()[:, None].repeat(1, 6)
    shown = gather_shown(prompts, Samples(6, images, Scores(torch.zeros(600)), torch.zeros(100)), strict, processes)
    assert shown.prompts == [f"{i * 100 // 12}" for i in range(12)]
    assert shown.images[:, :, 0, 0, 0].tolist() == [[6 * (i * 100 // 12) + n for n in range(4)] for i in range(12)]
    assert shown.correct.shape == (12, 4)
    assert shown.correct.any(1).tolist() == [prompt == "50" for prompt in shown.prompts]
    shown_bytes = 12 * 4 * images[0].numel() * images.element_size()
    assert len(sent[0]) < 1.1 * shown_bytes
