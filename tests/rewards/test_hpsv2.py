"""HPSv2: weights in open_clip's layout, and its own preprocessing. `benchmarks.original_rewards` compares it with the
package of its authors."""

import pytest
import torch
from support.reward_models import clip_folder, sample_images
from torch.nn import functional as F
from transformers import CLIPModel

from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.rewards.clip import CLIP, PadToSquare, hpsv2

PROMPTS = ["a cat", "two dogs", "a CAT", "", "é", "x" * 200]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


def open_clip_tower(tower, prefix: str, depth: int) -> dict[str, torch.Tensor]:
    """The transformer blocks of a tower of CLIPModel, as open_clip names them."""
    state = {}
    for i in range(depth):
        layer, name = tower.encoder.layers[i], f"{prefix}transformer.resblocks.{i}"
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            state[f"{name}.attn.in_proj_{kind}"] = torch.cat([getattr(p, kind) for p in projections])
            state[f"{name}.attn.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            state[f"{name}.ln_1.{kind}"] = getattr(layer.layer_norm1, kind)
            state[f"{name}.ln_2.{kind}"] = getattr(layer.layer_norm2, kind)
            state[f"{name}.mlp.c_fc.{kind}"] = getattr(layer.mlp.fc1, kind)
            state[f"{name}.mlp.c_proj.{kind}"] = getattr(layer.mlp.fc2, kind)
    return state


def open_clip_state(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights of a CLIPModel in the layout of HPS_v2.1_compressed.pt."""
    vision, text = model.vision_model, model.text_model
    state = {
        "positional_embedding": text.embeddings.position_embedding.weight,
        "text_projection": model.text_projection.weight.T,
        "logit_scale": model.logit_scale,
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.ln_pre.weight": vision.pre_layrnorm.weight,
        "visual.ln_pre.bias": vision.pre_layrnorm.bias,
        **open_clip_tower(vision, "visual.", 2),
        "visual.ln_post.weight": vision.post_layernorm.weight,
        "visual.ln_post.bias": vision.post_layernorm.bias,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        **open_clip_tower(text, "", 2),
        "ln_final.weight": text.final_layer_norm.weight,
        "ln_final.bias": text.final_layer_norm.bias,
    }
    return {name: value.detach().clone() for name, value in state.items()}


def scores(folder: str, weights: str | None, images: torch.Tensor) -> torch.Tensor:
    batch = RewardBatch(images, PROMPTS, [{}] * len(PROMPTS), torch.arange(len(PROMPTS)))
    return hpsv2(folder, weights)(batch).values


def test_weights_in_the_layout_of_open_clip(clip, tmp_path):
    state = open_clip_state(CLIPModel.from_pretrained(clip))
    torch.save({"epoch": 3, "state_dict": state | {"attn_mask": torch.zeros(77, 77)}}, tmp_path / "hps.pt")
    torch.save(state, tmp_path / "plain.pt")
    images, expected = sample_images(80, 60), None
    expected = scores(clip, None, images)
    assert expected.std() > 0.01
    assert torch.equal(scores(clip, str(tmp_path / "hps.pt"), images), expected)
    assert torch.equal(scores(clip, str(tmp_path / "plain.pt"), images), expected)
    changed = state | {
        "visual.transformer.resblocks.1.attn.in_proj_weight": -state[
            "visual.transformer.resblocks.1.attn.in_proj_weight"
        ]
    }
    torch.save(changed, tmp_path / "changed.pt")
    assert not torch.allclose(scores(clip, str(tmp_path / "changed.pt"), images), expected, atol=1e-3)


def test_weights_that_do_not_fit(clip, tmp_path):
    state = open_clip_state(CLIPModel.from_pretrained(clip))
    torch.save({"state_dict": state | {"visual.proj": torch.zeros(32, 8)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"^rewards\.hpsv2: '.*other\.pt' does not fit '.*clip.': .*size mismatch"):
        build_rewards({"hpsv2": {"model": clip, "weights": str(tmp_path / "other.pt")}})
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"Missing key\(s\).*final_layer_norm\.bias"):
        build_rewards({"hpsv2": {"model": clip, "weights": str(tmp_path / "short.pt")}})


@pytest.mark.parametrize("height, width", [(112, 112), (112, 84), (30, 56), (56, 21)])
def test_images_are_resized_whole_and_padded_with_black(height, width):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    images = sample_images(height, width)
    pixels = PadToSquare(56, mean, std)(images) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    scale = 56 / max(height, width)
    inner = round(height * scale), round(width * scale)
    top, left = (56 - inner[0]) // 2, (56 - inner[1]) // 2
    expected = torch.zeros(len(images), 3, 56, 56)
    resized = F.interpolate(images / 255, inner, mode="bicubic", antialias=True) if scale != 1 else images / 255
    expected[..., top : top + inner[0], left : left + inner[1]] = resized
    assert torch.allclose(pixels, expected, atol=1e-6)


def test_it_keeps_its_preprocessing_to_itself(clip):
    reward = hpsv2(clip, None)
    assert isinstance(reward.clip.preprocess, PadToSquare) and reward.clip.preprocess.size == 56
    assert not isinstance(CLIP(clip).preprocess, PadToSquare)
    assert reward.clip.network is CLIP(clip).network
