import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from support.pipelines import perturb, tiny_sd3_pipeline

from fastflowgrpo import load_policy
from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.embeddings import EmbeddingCache

PROMPTS = ["a cat", "two dogs"]


@pytest.fixture
def folder(tiny_sd3_folder):
    return tiny_sd3_folder


@pytest.fixture(scope="module")
def folder_without_t5(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3-without-t5")
    tiny_sd3_pipeline(t5=False).save_pretrained(path)
    return path


def load(folder, **settings):
    return load_policy(
        str(folder), PolicyConfig(max_sequence_length=8, **{"lora_rank": 4, "lora_alpha": 8, **settings})
    )


def inputs(policy, batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, *policy.latent_shape(None, None), generator=generator)
    return latents.to(policy.dtype), torch.full((batch_size,), 0.7), policy.encode(PROMPTS[:batch_size])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_trained_weights_are_float32_and_frozen_ones_in_the_compute_dtype(folder, dtype, rank):
    policy = load(folder, dtype=dtype, lora_rank=rank)
    assert policy.dtype == getattr(torch, dtype)
    trained = policy.trainable_parameters()
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    # the text encoders' frozen parameters too, but for those that transformers keeps in float32
    for part in (policy.module, policy.pipeline.text_encoder):
        assert all(p.dtype == policy.dtype for p in part.parameters() if not p.requires_grad)
    assert policy.pipeline.vae.dtype == torch.float32
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in policy.module.parameters()) or rank == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_trained_weights_change_the_output_and_the_reference_stays(folder, rank, dtype):
    policy = load(folder, lora_rank=rank, dtype=dtype)
    latents, sigma, conditioning = inputs(policy)
    with torch.no_grad():
        before = policy.velocity(latents, sigma, conditioning)
        base = StableDiffusion3Pipeline.from_pretrained(folder, dtype=policy.dtype).transformer
        plain = base(latents, timestep=sigma * 1000, **conditioning, return_dict=False)[0]
        torch.testing.assert_close(before, plain, rtol=0, atol=0 if dtype == "float32" else 1e-2)
        perturb(policy.trainable_parameters(), 0.1)
        after = policy.velocity(latents, sigma, conditioning)
        assert (after - before).abs().max() > 0.01
        with policy.reference():
            assert torch.equal(policy.velocity(latents, sigma, conditioning), before)
        assert torch.equal(policy.velocity(latents, sigma, conditioning), after)
    assert after.dtype == policy.dtype


def test_the_reference_ends_with_an_exception_too(folder):
    policy = load(folder)
    latents, sigma, conditioning = inputs(policy)
    perturb(policy.trainable_parameters(), 0.1)
    with torch.no_grad():
        after = policy.velocity(latents, sigma, conditioning)
        with pytest.raises(KeyboardInterrupt), policy.reference():
            raise KeyboardInterrupt
        assert torch.equal(policy.velocity(latents, sigma, conditioning), after)


@pytest.mark.parametrize("rank", [0, 4])
def test_saved_weights_give_the_policys_own_velocity_in_a_fresh_pipeline(folder, tmp_path, rank):
    policy = load(folder, lora_rank=rank, lora_alpha=12)
    perturb(policy.trainable_parameters(), 0.1)
    policy.save(tmp_path)
    fresh = StableDiffusion3Pipeline.from_pretrained(folder)
    if rank:
        assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
        fresh.load_lora_weights(tmp_path)
    else:
        fresh.transformer = type(fresh.transformer).from_pretrained(tmp_path / "transformer")
    latents, sigma, conditioning = inputs(policy)
    with torch.no_grad():
        velocity = fresh.transformer(latents, timestep=sigma * 1000, **conditioning, return_dict=False)[0]
        torch.testing.assert_close(velocity, policy.velocity(latents, sigma, conditioning), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_weights_replace_the_trained_ones(folder, tmp_path, rank, dtype):
    policy = load(folder, lora_rank=rank, dtype=dtype)
    perturb(policy.trainable_parameters())
    policy.save(tmp_path)
    saved = [parameter.clone() for parameter in policy.trainable_parameters()]
    perturb(policy.trainable_parameters(), seed=2)
    policy.load(tmp_path)
    assert all(map(torch.equal, policy.trainable_parameters(), saved))
    assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}


def test_weights_of_another_adapter_do_not_replace_the_trained_ones(folder, tmp_path):
    load(folder, lora_rank=2).save(tmp_path / "rank")
    load(folder, lora_targets=["attn.to_q"]).save(tmp_path / "layers")
    policy = load(folder)
    for name, reason in (("rank", "size mismatch"), ("layers", "has no place for"), ("none", "")):
        with pytest.raises(UserError, match=f"checkpoint {tmp_path / name} does not fit the model: .*{reason}"):
            policy.load(tmp_path / name)


def test_a_pipeline_without_t5_loads_and_gets_no_zero_tokens_unless_asked(folder_without_t5):
    policy = load_policy(str(folder_without_t5), PolicyConfig(lora_rank=4))
    clip_tokens = policy.pipeline.tokenizer.model_max_length
    assert policy.encode(PROMPTS)["encoder_hidden_states"].shape[:2] == (2, clip_tokens)
    assert load(folder_without_t5).encode(PROMPTS)["encoder_hidden_states"].shape[:2] == (2, clip_tokens + 8)


def test_each_distinct_prompt_is_encoded_once(folder, monkeypatch):
    policy = load(folder)
    encoded = []
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda prompts: encoded.append(prompts) or encode(prompts))
    embed = EmbeddingCache(policy, size=2)
    rows = embed(["a", "b", "a", "a"])
    assert encoded == [["a"], ["b"]]
    for name, tensor in encode(["b"]).items():
        assert torch.equal(rows[name][1:2], tensor)
        assert torch.equal(rows[name][[0, 0]], rows[name][2:])
    embed(["a"])
    embed(["c"])  # pushes b out, which was asked for longest ago
    embed(["a"])
    assert encoded[2:] == [["c"]]
    embed(["b"])
    assert encoded[3:] == [["b"]]


def test_latent_shape(folder):
    policy = load(folder)
    assert policy.latent_shape(None, None) == (4, 8, 8)
    assert policy.latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(UserError, match=r"rollout\.width 18 is not a positive multiple of 4"):
        policy.latent_shape(16, 18)
    assert policy.latent_shape(32, 16) == (4, 16, 8)
    with pytest.raises(UserError, match=r"rollout\.height 36 is more than 32, the most that this model takes"):
        policy.latent_shape(36, 16)


def test_errors_name_the_remedy(folder, tmp_path):
    with pytest.raises(UserError, match="neither a diffusers folder"):
        load_policy(str(tmp_path / "nowhere"), PolicyConfig())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(
        UserError,
        match=r"is a KandinskyPipeline; supported: StableDiffusion3Pipeline, FluxPipeline, .*docs/models\.md",
    ):
        load_policy(str(tmp_path), PolicyConfig())
    with pytest.raises(UserError, match=r"lora_targets: no linear layer is called to_z; there are: .*attn\.to_q"):
        load(folder, lora_targets=["attn.to_q", "to_z"])
