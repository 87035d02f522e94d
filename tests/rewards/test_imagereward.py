"""ImageReward: its networks written out over the published names of the weights, on PIL images."""

import pytest
import torch
from PIL import Image
from support.reward_models import bert_tokenizer_folder, linear_head, sample_images, to_pil, write_json
from torch.nn import functional as F

from fastflowgrpo.rewards import RewardBatch, build_rewards
from fastflowgrpo.rewards.imagereward import ImageReward

VISION_WIDTH, VISION_HEADS, PATCH, SIDE = 128, 2, 16, 32
TEXT = {
    "vocab_size": 70,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 48,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "add_cross_attention": True,  # as in the published file, with others that are of no use here
    "encoder_width": 768,
}
PROMPTS = ["a red cat", "dog", "a red cat", "a b c d e f " * 10, "a dog on a red cat", "x"]


def published_weights() -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of ImageReward.pt."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        deviation = 0.1 if len(shape) == 1 else 0.5 * torch.Size(shape[1:]).numel() ** -0.5
        state[name] = torch.empty(shape).normal_(0, deviation, generator=generator)

    def linear(name: str, out: int, width: int) -> None:
        add(f"{name}.weight", out, width)
        add(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        state[f"{name}.weight"] += 1
        add(f"{name}.bias", width)

    vision, v = "blip.visual_encoder", VISION_WIDTH
    add(f"{vision}.cls_token", 1, 1, v)
    add(f"{vision}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, v)
    add(f"{vision}.patch_embed.proj.weight", v, 3, PATCH, PATCH)
    add(f"{vision}.patch_embed.proj.bias", v)
    for i in range(2):
        norm(f"{vision}.blocks.{i}.norm1", v)
        linear(f"{vision}.blocks.{i}.attn.qkv", 3 * v, v)
        linear(f"{vision}.blocks.{i}.attn.proj", v, v)
        norm(f"{vision}.blocks.{i}.norm2", v)
        linear(f"{vision}.blocks.{i}.mlp.fc1", 96, v)
        linear(f"{vision}.blocks.{i}.mlp.fc2", v, 96)
    norm(f"{vision}.norm", v)

    text, t = "blip.text_encoder", TEXT["hidden_size"]
    add(f"{text}.embeddings.word_embeddings.weight", TEXT["vocab_size"], t)
    add(f"{text}.embeddings.position_embeddings.weight", TEXT["max_position_embeddings"], t)
    state[f"{text}.embeddings.position_ids"] = torch.arange(TEXT["max_position_embeddings"])[None]
    norm(f"{text}.embeddings.LayerNorm", t)
    for i in range(TEXT["num_hidden_layers"]):
        for attention, width in (("attention", t), ("crossattention", v)):
            linear(f"{text}.encoder.layer.{i}.{attention}.self.query", t, t)
            linear(f"{text}.encoder.layer.{i}.{attention}.self.key", t, width)
            linear(f"{text}.encoder.layer.{i}.{attention}.self.value", t, width)
            linear(f"{text}.encoder.layer.{i}.{attention}.output.dense", t, t)
            norm(f"{text}.encoder.layer.{i}.{attention}.output.LayerNorm", t)
        linear(f"{text}.encoder.layer.{i}.intermediate.dense", TEXT["intermediate_size"], t)
        linear(f"{text}.encoder.layer.{i}.output.dense", t, TEXT["intermediate_size"])
        norm(f"{text}.encoder.layer.{i}.output.LayerNorm", t)

    linear("blip.vision_proj", 16, v)
    linear("blip.text_proj", 16, t)
    return state | {f"mlp.{name}": weight for name, weight in linear_head(t).items()}


def source_score(state: dict[str, torch.Tensor], image: Image.Image, tokens: list[int]) -> float:
    """ImageReward of one image and one prompt: BLIP's vision transformer and its image-grounded text encoder."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    side = min(image.size)
    image = image.resize([int(SIDE * length / side) for length in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    image = image.crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.tensor(list(image.tobytes())).reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]

    p = "blip.visual_encoder"
    patches = F.conv2d(pixels[None], state[f"{p}.patch_embed.proj.weight"], state[f"{p}.patch_embed.proj.bias"], PATCH)
    x = torch.cat([state[f"{p}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{p}.pos_embed"][0]
    for i in range(2):
        b = f"{p}.blocks.{i}"
        q, k, v = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{b}.attn.proj", attention(q, k, v, VISION_HEADS))
        x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
    seen = norm(f"{p}.norm", x, 1e-6)

    p = "blip.text_encoder"
    x = state[f"{p}.embeddings.word_embeddings.weight"][tokens]
    x = norm(f"{p}.embeddings.LayerNorm", x + state[f"{p}.embeddings.position_embeddings.weight"][: len(x)], 1e-12)
    for i in range(TEXT["num_hidden_layers"]):
        for part, other in (("attention", None), ("crossattention", seen)):
            a = f"{p}.encoder.layer.{i}.{part}"
            context = x if other is None else other
            q, k, v = linear(f"{a}.self.query", x), linear(f"{a}.self.key", context), linear(f"{a}.self.value", context)
            read = linear(f"{a}.output.dense", attention(q, k, v, TEXT["num_attention_heads"]))
            x = norm(f"{a}.output.LayerNorm", x + read, 1e-12)
        layer = f"{p}.encoder.layer.{i}"
        x = norm(
            f"{layer}.output.LayerNorm",
            x + linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x))),
            1e-12,
        )
    x = x[0]
    for i in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{i}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(published_weights(), folder / "ImageReward.pt")
    write_json(folder / "med_config.json", TEXT)
    return str(folder), bert_tokenizer_folder(folder / "bert")


def batch(images: torch.Tensor, prompts: list[str] = PROMPTS) -> RewardBatch:
    return RewardBatch(images, prompts, [{}] * len(images), torch.arange(len(images)))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (61, 100), (90, 50)], ids=str)
def test_score_is_that_of_the_source(folders, size):
    images = sample_images(*size)
    reward = ImageReward(*folders)
    values = reward(batch(images)).values
    tokens = [reward.tokenizer(prompt, truncation=True, max_length=35).input_ids for prompt in PROMPTS]
    assert [len(row) for row in tokens] == [5, 3, 5, 35, 9, 3]
    expected = [
        source_score(published_weights(), image, row) for image, row in zip(to_pil(images), tokens, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, abs=1e-3)
    assert values.dtype == torch.float32 and values.std() > 0.05
    assert reward.pointwise and reward.device == next(reward.text.parameters()).device


def test_nothing_depends_on_the_batch(folders):
    images = sample_images(64, 64)
    whole = ImageReward(*folders)(batch(images)).values
    parts = ImageReward(*folders, batch_size=4)(batch(images)).values
    single = [ImageReward(*folders)(batch(images[i : i + 1], PROMPTS[i : i + 1])).values.item() for i in (1, 3)]
    assert torch.allclose(whole, parts, atol=1e-5)
    assert whole[[1, 3]].tolist() == pytest.approx(single, abs=1e-5)


def test_half_precision_is_near(folders):
    images = batch(sample_images(64, 64))
    exact, near = ImageReward(*folders)(images).values, ImageReward(*folders, dtype="bfloat16")(images).values
    assert not torch.equal(exact, near) and torch.allclose(exact, near, atol=0.1)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda state: state.pop("blip.visual_encoder.pos_embed"), "does not hold ImageReward's weights: 'pos_embed'"),
        (
            lambda state: state.pop("blip.text_encoder.embeddings.LayerNorm.bias"),
            "not the weights of BlipTextModel: .*",
        ),
        (
            lambda state: state.update({"mlp.layers.9.bias": torch.zeros(1)}),
            "not the weights of LinearHead: .*layers.9",
        ),
        (lambda state: state.clear(), "does not hold ImageReward's weights: "),
    ],
)
def test_other_weights_are_refused(folders, tmp_path, spoil, message):
    state = published_weights()
    spoil(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    write_json(tmp_path / "med_config.json", TEXT)
    with pytest.raises(ValueError, match=rf"^rewards\.imagereward: .*{message}") as error:
        build_rewards({"imagereward": {"model": str(tmp_path), "tokenizer": folders[1]}})
    assert "\n" not in str(error.value)


def test_missing_files(folders, tmp_path):
    with pytest.raises(ValueError, match=r"^rewards\.imagereward: the folder '.*' has no file ImageReward.pt$"):
        build_rewards({"imagereward": {"model": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"^rewards\.imagereward: cannot load 'no/tokenizer': .*; give a local folder"):
        build_rewards({"imagereward": {"model": folders[0], "tokenizer": "no/tokenizer"}})
    (tmp_path / "ImageReward.pt").write_bytes((tmp_path / folders[0] / "ImageReward.pt").read_bytes())
    write_json(tmp_path / "med_config.json", {key: value for key, value in TEXT.items() if key != "vocab_size"})
    with pytest.raises(ValueError, match="does not hold ImageReward's weights: 'vocab_size'"):
        ImageReward(str(tmp_path), folders[1])
    (tmp_path / "med_config.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold ImageReward's weights: "):
        ImageReward(str(tmp_path), folders[1])
