"""CLIPScore, PickScore and the aesthetic score, against the processor of transformers on PIL images."""

import pytest
import torch
from safetensors.torch import save_file
from support.reward_models import clip_folder, linear_head, sample_images, seeded, to_pil, write_json
from transformers import BertConfig, BertModel, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastflowgrpo.rewards import REWARDS, RewardBatch, build_rewards
from fastflowgrpo.rewards import clip as module
from fastflowgrpo.rewards.clip import CLIP, Preprocess

SIZES = [(56, 56), (64, 64), (128, 128), (100, 61), (40, 57), (20, 20)]
PROMPTS = ["a cat", "A photo of a CAT", "a cat", 'the word "é" ' + "x" * 200, "", "two dogs, one on the other"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(linear_head(24), path)
    return str(path)


def batch(images: torch.Tensor, prompts: list[str] | None = None) -> RewardBatch:
    prompts = prompts or PROMPTS[: len(images)]
    return RewardBatch(images, prompts, [{}] * len(images), torch.arange(len(images)))


def source(model: str, images: torch.Tensor) -> tuple[CLIPModel, torch.Tensor, torch.Tensor]:
    """The model, its unit embeddings of PROMPTS, and those of the images, as the rewards' sources compute them."""
    network, processor = CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)
    texts = processor(text=PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    pixels = processor(images=to_pil(images), return_tensors="pt")
    with torch.no_grad():
        output = network(**texts, **pixels)
    return network, output.text_embeds, output.image_embeds


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name, factor", [("clipscore", 100 / 30), ("pickscore", 100 / 26)])
def test_similarity_is_that_of_the_source(clip, name, factor, size):
    images = sample_images(*size)
    values = REWARDS[name](clip)(batch(images)).values
    _, texts, pictures = source(clip, images)
    assert torch.allclose(values, factor * (texts * pictures).sum(-1), atol=1e-3)
    assert values.dtype == torch.float32 and values.shape == (6,) and values.std() > 0.03 * factor


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_aesthetic_is_that_of_the_source(clip, head, size):
    images = sample_images(*size)
    values = REWARDS["aesthetic"](clip, head)(batch(images)).values
    expected = source(clip, images)[2]
    for name in (0, 2, 4, 6, 7):
        weights = torch.load(head)
        expected = expected @ weights[f"layers.{name}.weight"].T + weights[f"layers.{name}.bias"]
    assert torch.allclose(values, expected[:, 0], atol=1e-3)
    assert values.shape == (6,) and values.std() > 0.01


@pytest.mark.parametrize(
    "processing",
    [
        {"resample": 2},
        {"size": {"height": 56, "width": 56}},
        {"size": {"height": 56, "width": 56}, "do_center_crop": False},
        {"size": {"shortest_edge": 70}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    ],
)
def test_preprocessing_follows_the_processor(tmp_path, processing):
    clip = clip_folder(tmp_path, **processing)
    for size in ((64, 64), (61, 100), (57, 80)):
        images = sample_images(*size)
        processor = CLIPProcessor.from_pretrained(clip).image_processor
        expected = processor(to_pil(images), return_tensors="pt").pixel_values
        difference = (CLIP(clip).preprocess(images) - expected).abs()
        assert difference.max() < 2.5 / 255 / 0.2 and difference.mean() < 1e-3


def test_the_layout_of_older_files(tmp_path):
    folder = clip_folder(tmp_path)
    expected = CLIP(folder).preprocess
    (tmp_path / "processor_config.json").unlink()
    older = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56, "resample": 3}
    older |= {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    write_json(tmp_path / "preprocessor_config.json", older)
    assert CLIP(folder, dtype="bfloat16").preprocess == expected


def test_unusual_processors_are_refused(tmp_path):
    message = "its image processor does not resize, crop and normalise as CLIP's does"
    for i, processing in enumerate(({"do_normalize": False}, {"resample": 1}, {"size": {"shortest_edge": 40}})):
        folder = clip_folder(tmp_path / str(i), **processing)
        with pytest.raises(ValueError, match=f"^{folder!r}: {message}$"):
            CLIP(folder)


def test_a_prompt_is_encoded_once_and_nothing_depends_on_the_batch_size(clip):
    images, prompts = sample_images(64, 64), ["a", "b", "a", "c", "b", "a"]
    whole = REWARDS["pickscore"](clip)(batch(images, prompts)).values
    encoder = CLIP(clip).network.text_model
    rows = []
    handle = encoder.register_forward_hook(lambda module, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
    pickscore = REWARDS["pickscore"](clip, batch_size=2)
    parts = pickscore(batch(images, prompts)).values
    assert rows == [2, 1]
    again = pickscore(batch(images, prompts[::-1])).values
    pickscore(batch(images[:2], ["c", "new"]))
    handle.remove()
    assert rows == [2, 1, 1], "once per run"
    fresh = REWARDS["pickscore"](clip)(batch(images, prompts[::-1])).values
    assert torch.allclose(again, fresh, atol=1e-5) and not torch.allclose(again, parts, atol=1e-3)
    assert torch.allclose(whole, parts, atol=1e-5)
    single = [REWARDS["pickscore"](clip)(batch(images[i : i + 1], [prompts[i]])).values.item() for i in range(6)]
    assert whole.tolist() == pytest.approx(single, abs=1e-5)


def test_the_embeddings_kept_are_the_last_used(clip, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_TEXTS", 2)
    reader = CLIP(clip)
    whole = reader.embed_texts(["a", "b", "c", "a"])
    assert whole.shape == (4, 24) and torch.equal(whole[0], whole[3]) and list(reader.texts) == ["b", "c"]
    assert torch.equal(reader.embed_texts(["b"]), whole[1:2]) and list(reader.texts) == ["c", "b"]
    reader.embed_texts(["d"])
    assert list(reader.texts) == ["b", "d"]
    sizes = {embedding.untyped_storage().nbytes() for embedding in reader.texts.values()}
    assert sizes == {24 * 4}, "nothing else is kept alive"


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "aesthetic"])
def test_images_are_wanted_where_the_network_is_and_one_by_one(clip, head, name):
    weights = {"aesthetic": {"weights": head}, "hpsv2": {"weights": None}}
    reward = build_rewards({name: {"model": clip} | weights.get(name, {})}).rewards[name]
    assert reward.device == next(reward.clip.network.parameters()).device
    assert reward.pointwise


def test_images_of_several_sizes(clip):
    images = [*sample_images(40, 57), *sample_images(1, 90), *sample_images(64, 64)]
    found = CLIP(clip, batch_size=5).embed_images(images)
    assert torch.allclose(found[:6], CLIP(clip).embed_images(sample_images(40, 57)), atol=1e-5)
    assert torch.allclose(found.norm(dim=-1), torch.ones(18))


def test_networks_are_shared(clip):
    assert CLIP(clip).network is CLIP(clip, batch_size=1).network
    assert CLIP(clip, dtype="bfloat16").network is not CLIP(clip).network


def test_half_precision_is_near(clip):
    images = batch(sample_images(64, 64))
    exact, near = (REWARDS["clipscore"](clip, dtype=dtype)(images).values for dtype in ("float32", "bfloat16"))
    assert not torch.equal(exact, near) and torch.allclose(exact, near, atol=0.1)


def test_weights_of_an_aesthetic_head(clip, head, tmp_path):
    save_file(linear_head(24), tmp_path / "head.safetensors")
    images = batch(sample_images(56, 56))
    expected = REWARDS["aesthetic"](clip, head)(images).values
    assert torch.equal(REWARDS["aesthetic"](clip, str(tmp_path / "head.safetensors"))(images).values, expected)

    torch.save(linear_head(32), tmp_path / "wide.pth")
    torch.save({"linear.weight": torch.zeros(1, 24)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for weights, message in {
        str(tmp_path / "wide.pth"): "is for embeddings of width 32, those of .* have 24$",
        str(tmp_path / "other.pth"): "not the weights of LinearHead: .*linear.weight",
        str(tmp_path / "text.pth"): "cannot read weights from '.*text.pth'",
        "nowhere.pth": "weights 'nowhere.pth': no such file, and no hub_owner/repository/file$",
        "owner/repo/head.pth": "cannot load 'owner/repo': .*; give a local folder, or fetch it .*hf download owner/re",
    }.items():
        with pytest.raises(ValueError, match=rf"^rewards\.aesthetic: .*{message}") as error:
            build_rewards({"aesthetic": {"model": clip, "weights": weights}})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward"])
def test_a_model_that_is_not_there(name, tmp_path):
    default = build_error({name: 1})
    assert "cannot load" in default and "give a local folder, or fetch it where there is a network" in default
    assert 'hf download someone/something" (and unset' in build_error({name: {"model": "someone/something"}})
    assert f"{str(tmp_path)!r}" in build_error({name: {"model": str(tmp_path)}})


def build_error(config: dict[str, object]) -> str:
    with pytest.raises(ValueError, match=rf"^rewards\.{next(iter(config))}: ") as error:
        build_rewards(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_of_another_network_are_refused(clip, tmp_path):
    folder = clip_folder(tmp_path / "other")
    seeded(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").replace(tmp_path / "other/model.safetensors")
    assert "is no CLIPModel: 78 weights are missing, the first is logit_scale" in build_error(
        {"clipscore": {"model": folder}}
    )


def test_settings_errors(clip):
    for settings, message in (
        (
            {"dtype": "float23"},
            r"unknown dtype 'float23' \(did you mean 'float32'\?\), known: float32, bfloat16, float16",
        ),
        ({"device": "gpu"}, "device 'gpu' cannot be used: "),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"devise": "cpu"}, r"unknown setting 'devise' \(did you mean 'device'\?\), known: weight, model, device"),
    ):
        with pytest.raises(ValueError, match=rf"^rewards\.pickscore: {message}"):
            build_rewards({"pickscore": {"model": clip, **settings}})
    if not torch.cuda.is_available():
        assert "device 'cuda' cannot be used: " in build_error({"pickscore": {"model": clip, "device": "cuda"}})


def test_the_default_preprocessing_is_that_of_clip():
    images = sample_images(256, 256)
    assert Preprocess()(images).shape == (6, 3, 224, 224)
    expected = CLIPImageProcessorPil()(to_pil(images), return_tensors="pt").pixel_values
    assert (Preprocess()(images) - expected).abs().max() < 2.5 / 255 / 0.2
