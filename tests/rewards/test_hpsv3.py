"""HPSv3: the same with transformers' processor, image by image. `benchmarks.original_hpsv3` compares it with the
package of its authors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.reward_models import qwen2_vl_folder, sample_images, seeded, to_pil
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastflowgrpo.prompts import Prompt
from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.rewards.hpsv3 import PIXELS, QUESTION, HPSv3, resized

PROMPTS = ["a red cat", "the {tree} there", "x" * 60]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return qwen2_vl_folder(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def parts(base) -> tuple[Qwen2VLModel, nn.Module]:
    """The network with a row for the reward's token, and the head."""
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(AutoTokenizer.from_pretrained(base)) + 1
    head = nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 2))
    return seeded(Qwen2VLModel(config)), seeded(head, gain=2)


def published(parts: tuple[Qwen2VLModel, nn.Module], old_names: bool) -> dict[str, torch.Tensor]:
    """The weights as HPSv3.safetensors has them, with the names of transformers 4.45 or later ones."""
    network, head = parts
    state = {f"model.{name}": weight for name, weight in network.state_dict().items()}
    if old_names:
        state = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): weight
            for name, weight in state.items()
        }
    state |= {f"rm_head.{name}": weight for name, weight in head.state_dict().items()}
    return state | {"lm_head.weight": torch.zeros(3, 32)}


def saved(folder: Path, state: dict[str, torch.Tensor]) -> str:
    save_file(state, folder / "HPSv3.safetensors")
    return str(folder / "HPSv3.safetensors")


@torch.no_grad()
def expected_rating(parts: tuple[Qwen2VLModel, nn.Module], base: str, image, prompt: str) -> torch.Tensor:
    """Mean and log sigma (2,) of one image, without padding and with the positions of a text."""
    network, head = parts
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    processed = Qwen2VLImageProcessorPil(size=size)(image, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    count = int(processed.image_grid_thw.prod()) // 4
    text = QUESTION.format(image="<|image_pad|>" * count, prompt=prompt)
    ids = tokenizer(text, return_tensors="pt").input_ids
    embeddings = network.language_model.embed_tokens(ids)
    seen = network.visual(processed.pixel_values, grid_thw=processed.image_grid_thw).pooler_output
    embeddings[ids == network.config.image_token_id] = seen
    hidden = network.language_model(inputs_embeds=embeddings).last_hidden_state
    return head(hidden[0, ids[0].tolist().index(len(tokenizer) - 1)])


@pytest.mark.parametrize("old_names, height, width", [(True, 448, 448), (False, 300, 200)])
def test_the_score(base, parts, tmp_path, old_names, height, width):
    weights = saved(tmp_path, published(parts, old_names))
    reward = HPSv3(base, weights, device="cpu", dtype="float32", batch_size=2)
    images = sample_images(height, width)[1:4]
    scores = reward(RewardBatch(images, PROMPTS, [{}] * 3, torch.arange(3)))
    ratings = [expected_rating(parts, base, *each) for each in zip(to_pil(images), PROMPTS, strict=True)]
    mean, log_sigma = torch.stack(ratings).unbind(-1)
    assert mean.std() > 0.01 and scores.values.dtype == torch.float32 and reward.pointwise
    assert torch.allclose(scores.values, mean, atol=1e-3)
    assert torch.allclose(scores.details["sigma"], log_sigma.exp(), atol=1e-3)


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (448, 448, (448, 448)),
        (1024, 1024, (448, 448)),
        (512, 384, (532, 392)),
        (50, 70, (392, 532)),
        (20, 2000, (56, 4480)),
    ],
)
def test_the_size_that_images_get(height, width, expected):
    assert resized(height, width, 28) == expected


def test_weights_that_do_not_fit(base, parts, tmp_path):
    def message(state: dict[str, torch.Tensor]) -> str:
        with pytest.raises(ValueError, match=r"^rewards\.hpsv3: '.*HPSv3\.safetensors' does not hold") as error:
            build_rewards({"hpsv3": {"model": base, "weights": saved(tmp_path, state)}})
        return str(error.value)

    state = published(parts, True)
    assert "size mismatch" in message(state | {"rm_head.5.bias": torch.zeros(4)})
    assert "1 weights are missing" in message({name: w for name, w in state.items() if name != "model.norm.weight"})
    assert "the first is visual.extra" in message(state | {"visual.extra": torch.zeros(1)})
    assert "rm_head" in message({name: w for name, w in state.items() if not name.startswith("rm_head.3")})


def test_a_prompt_with_a_token_of_the_network(base, parts, tmp_path):
    reward = HPSv3(base, saved(tmp_path, published(parts, True)), device="cpu")
    reward.check_prompts([Prompt("a <red> cat")])
    for token in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(ValueError, match=r"^prompt 'a <\|.*\|> cat': it holds <\|"):
            reward.check_prompts([Prompt("a dog"), Prompt(f"a {token} cat")])
