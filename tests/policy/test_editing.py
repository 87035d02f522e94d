"""Families that edit images: the pipeline's own images, what the sources change, and training through the command."""

import json
from dataclasses import replace

import pyarrow
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline
from pyarrow import parquet
from safetensors.torch import load_file
from support.edit_prompts import write_prompts
from support.families import EDITING, assert_same_images, pipeline_images
from support.pipelines import perturb, tiny_sd3_pipeline

from fastflowgrpo import Config, Trainer, load_policy
from fastflowgrpo.config import EvaluationConfig, PolicyConfig, PromptsConfig, RolloutConfig, UpdateConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.planning.passes import run_passes
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.policy.source_images import check_source_images, sources_per_prompt
from fastflowgrpo.prompts import Prompt, load_prompts
from fastflowgrpo.prompts.images import source_images
from fastflowgrpo.sampling.conditioning import expand_row
from fastflowgrpo.sampling.ode import sample_ode
from fastflowgrpo.shapes.pretrain_edit import with_source_channels
from fastflowgrpo.train import main

TEXTS = ["make it red", "remove the dog"]
LENGTH = EDITING["kontext"].length
GUIDED = [(name, guidance) for name in EDITING for guidance in (1.0, 3.0) if (name, guidance) != ("flux2_edit", 3.0)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines, each with prompts.jsonl and source images of the size of the results."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name
            EDITING[name].save(made[name], TEXTS)
        return made[name]

    return folder


def prompts_of(folder):
    return load_prompts(str(folder / "prompts.jsonl"))


def load(folder, **settings):
    return load_policy(
        str(folder), PolicyConfig(**{"max_sequence_length": LENGTH, "lora_rank": 4, "lora_alpha": 8, **settings})
    )


def noise_of(policy, name):
    return torch.randn(2, *policy.latent_shape(**EDITING[name].size), generator=torch.Generator().manual_seed(3))


def sampled(policy, name, prompts, guidance=1.0):
    noise = noise_of(policy, name)
    embed = EmbeddingCache(policy, shape=tuple(noise.shape[1:]))
    unconditional = embed([""]) if guidance != 1 else None
    return sample_ode(policy, embed(prompts), 3, noise, unconditional=unconditional, guidance_scale=guidance)


@pytest.mark.parametrize(("name", "guidance"), GUIDED)
def test_ode_samples_are_the_pipelines_own_images(folders, name, guidance):
    policy, prompts = load(folders(name)), prompts_of(folders(name))
    pipe = DiffusionPipeline.from_pretrained(folders(name))
    expected = pipeline_images(pipe, EDITING[name], noise_of(policy, name), prompts, 3, guidance)
    assert_same_images(policy.decode(sampled(policy, name, prompts, guidance)), expected)


@pytest.mark.parametrize(
    ("name", "size"), [("kontext", (32, 16)), ("edit", (64, 32)), ("plus", (64, 32)), ("klein_edit", (64, 96))]
)
def test_sources_may_have_another_size_than_the_result(folders, tmp_path, name, size):
    family, (height, width) = EDITING[name], size
    policy = load(folders(name), source_height=height, source_width=width)
    prompts = load_prompts(str(write_prompts(tmp_path, TEXTS, height, width, family.sources)))
    pipe = DiffusionPipeline.from_pretrained(folders(name))
    expected = pipeline_images(pipe, family, noise_of(policy, name), prompts, 3, 1.0, size)
    assert_same_images(policy.decode(sampled(policy, name, prompts)), expected)
    shape = policy.latent_shape(**family.size)
    example, encoded = policy.example_edit(2, shape, family.sources), EmbeddingCache(policy, shape=shape)(prompts)
    assert {key: t.shape for key, t in example.items()} == {key: t.shape for key, t in encoded.items()}
    assert policy.encoder_key() != load(folders(name)).encoder_key()
    with pytest.raises(UserError, match=r"policy\.source_height 30 is not a positive multiple of"):
        load(folders(name), source_height=30).encode_edit("a", prompts[0].images, shape)


def test_other_models_take_no_source_size(tiny_sd3_folder):
    with pytest.raises(UserError, match=r"policy\.source_height, policy\.source_width: .*: leave both out$"):
        load(tiny_sd3_folder, source_width=32)


@pytest.mark.parametrize("name", ["kontext", "edit", "plus", "klein_edit"])
def test_each_sample_depends_on_its_own_sources_and_their_order(folders, name):
    policy, (first, second) = load(folders(name)), prompts_of(folders(name))
    one, other = Prompt("a", {}, first.image, first.references), Prompt("a", {}, second.image, second.references)
    both, swapped = sampled(policy, name, [one, other]), sampled(policy, name, [other, other])
    assert (both[0] - swapped[0]).abs().max() > 1e-3
    torch.testing.assert_close(both[1], swapped[1])
    if first.references:
        turned = replace(one, image=first.references[0], references=(first.image,))
        assert (sampled(policy, name, [turned, other])[0] - both[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["edit", "plus"])
def test_the_text_encoder_sees_the_image_with_the_empty_prompt_too(folders, name):
    policy, (first, second) = load(folders(name)), prompts_of(folders(name))
    shape = policy.latent_shape(**EDITING[name].size)
    embed = EmbeddingCache(policy, shape=shape)
    conditioning = embed([first, replace(second, text=first.text), first])
    unconditional = expand_row(embed([""]), conditioning)
    for rows in (conditioning, unconditional):
        embeddings = rows["encoder_hidden_states"]
        assert torch.equal(embeddings[0], embeddings[2]) and (embeddings[0] - embeddings[1]).abs().max() > 1e-3
    assert not torch.equal(conditioning["encoder_hidden_states"], unconditional["encoder_hidden_states"])
    assert torch.equal(unconditional["source"], conditioning["source"])
    lengths = [rows["encoder_hidden_states_mask"].sum(1) for rows in (conditioning, unconditional)]
    assert (lengths[0] > lengths[1]).all() and (lengths[0] < conditioning["encoder_hidden_states"].shape[1]).all()


@pytest.mark.parametrize("name", EDITING)
def test_the_estimate_has_inputs_like_those_of_prompts(folders, name):
    policy, prompts = load(folders(name), dtype="bfloat16"), prompts_of(folders(name))
    shape = policy.latent_shape(**EDITING[name].size)
    example = policy.example_edit(2, shape, EDITING[name].sources)
    encoded = EmbeddingCache(policy, shape=shape)(prompts)
    assert {key: (t.shape, t.dtype) for key, t in example.items()} == {
        key: (t.shape, t.dtype) for key, t in encoded.items()
    }
    if name == "plus":
        passes = run_passes(config_of(folders(name), "", name, dtype="bfloat16"), 1, 1, 1)
        assert passes.conditioning == sum(tensor[0].numel() * tensor.element_size() for tensor in encoded.values())


def test_sources_are_encoded_once_and_kept_on_disk(folders, tmp_path, monkeypatch):
    policy, calls = load(folders("kontext")), []
    encode = policy.encode_sources
    monkeypatch.setattr(policy, "encode_sources", lambda *args: calls.append(args) or encode(*args))
    prompts = prompts_of(folders("kontext"))
    shape = policy.latent_shape(**EDITING["kontext"].size)
    expected = EmbeddingCache(policy, shape=shape)([prompts[0], prompts[1], prompts[0]])
    assert len(calls) == 2 and torch.equal(expected["source"][0], expected["source"][2])
    cache = EmbeddingCache(policy, tmp_path, shape=shape)
    cache.write([Prompt(""), *prompts, *prompts])
    assert len(list(tmp_path.iterdir())) == 3 and len(calls) == 4
    EmbeddingCache(policy, tmp_path, shape=shape).write(prompts)
    assert len(calls) == 4
    found = cache([prompts[0], prompts[1], prompts[0]])
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert "source" not in cache([""])


def test_embeddings_with_the_empty_prompts_come_back_from_the_disk(folders, tmp_path):
    policy, prompts = load(folders("plus")), prompts_of(folders("plus"))
    shape = policy.latent_shape(**EDITING["plus"].size)
    expected = EmbeddingCache(policy, shape=shape)(prompts)
    cache = EmbeddingCache(policy, tmp_path, shape=shape)
    cache.prepare(["", *prompts])
    assert policy.pipeline.text_encoder is None and cache([""]) == {}
    found = cache(prompts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_source_images_must_fit_the_model(folders, tiny_sd3_folder):
    kontext, klein = load(folders("kontext")), load(folders("klein_edit"))
    (one, _), (two, _) = prompts_of(folders("kontext")), prompts_of(folders("klein_edit"))
    with pytest.raises(UserError, match=r"edits images, but the prompt 'a cat' has none: give prompts as a \.jsonl"):
        check_source_images(kontext, [Prompt("a cat")])
    with pytest.raises(UserError, match=r"the prompt 'make it red' has a source image, but the model makes images"):
        check_source_images(load(tiny_sd3_folder), [one])
    with pytest.raises(UserError, match=r"'make it red' has 2 source images, but the model takes 1: name fewer under"):
        check_source_images(kontext, [one, two])
    with pytest.raises(UserError, match=r"'a cat' has 0 source images, but 'make it red' has 2: prompts are sampled"):
        check_source_images(klein, [two, Prompt("a cat")])
    for prompts in ([two, two], [one, one], [Prompt("a"), Prompt("b")]):
        check_source_images(klein, prompts)


def test_images_in_a_table_are_as_good_as_files(folders, tmp_path):
    folder = folders("klein_edit")
    policy, files = load(folder), [replace(prompt, references=()) for prompt in prompts_of(folder)]
    images = [prompt.image.read_bytes() for prompt in files]
    parquet.write_table(pyarrow.table({"edit": TEXTS, "image": images}), tmp_path / "edits.parquet")
    config = config_of(folders("klein_edit"), tmp_path, "klein_edit")
    for columns, count in (("edit", 0), ("edit+image", 1)):
        config.prompts.train = f"{tmp_path}/edits.parquet:{columns}"
        assert sources_per_prompt(policy, config) == count
    prompts = load_prompts(config.prompts.train)
    check_source_images(policy, prompts)
    embed = EmbeddingCache(policy, shape=policy.latent_shape(**EDITING["klein_edit"].size))
    found, expected = embed(prompts), embed(files)
    assert len(embed.rows) == 4 and found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    shown, kept = source_images(prompts, 8, 8), source_images(files, 8, 8)
    assert len(shown) == 2 and all(map(torch.equal, shown, kept))


def test_a_missing_package_is_named(folders, monkeypatch):
    def without_torchvision(*args, **kwargs):
        raise ImportError("\nVideoProcessor requires the Torchvision library\nbut it was not found. See the\npage")

    monkeypatch.setattr(QwenImageEditPipeline, "from_pretrained", without_torchvision)
    message = r'": VideoProcessor requires .* not found; install it: pip install "fastflowgrpo\[edit\]"$'
    with pytest.raises(UserError, match=message):
        load(folders("edit"))


def test_source_channels_change_nothing_before_they_are_trained():
    transformer = tiny_sd3_pipeline().transformer
    latents, source = torch.randn(2, 2, 4, 8, 8).unbind()
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([300.0, 700.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        wider = with_source_channels(transformer)(torch.cat([latents, source], 1), **inputs)[0]
        torch.testing.assert_close(wider, transformer(latents, **inputs)[0])


def config_of(folder, output, name, **policy):
    return Config(
        model=str(folder),
        output_dir=str(output),
        trackers=[],
        policy=PolicyConfig(**{"lora_rank": 4, "lora_alpha": 8, "max_sequence_length": LENGTH, **policy}),
        prompts=PromptsConfig(train=str(folder / "prompts.jsonl"), per_epoch=2),
        rollout=RolloutConfig(
            window_start=(0, 2),
            guidance_scale=3.0,
            group_size=3,
            num_steps=4,
            window_size=1,
            batch_size=6,
            **EDITING[name].size,
        ),
        update=UpdateConfig(batch_size=6, per_epoch=1, ema_decay=0.0),
        rewards={"jpeg_compressibility": 1},
        evaluation=EvaluationConfig(num_steps=3),
    )


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("name", "rank"), [("edit", 0), ("plus", 4), ("klein_edit", 4)])
def test_the_ratio_is_exactly_one_before_the_first_update(folders, tmp_path, name, rank):
    trainer = Trainer(config_of(folders(name), tmp_path, name, dtype="bfloat16", lora_rank=rank))
    perturb(trainer.learner.parameters)
    batch, _ = trainer.collect(0)
    pairs = trainer.objective.micro_batches(batch, 0, len(batch.advantages))
    ratios = torch.cat([trainer.objective.loss(batch, rows, slots)[1]["ratio"] for rows, slots in pairs])
    assert len(ratios) >= 4 and (ratios == 1).all()


@pytest.mark.parametrize(("name", "rank"), [("kontext", 4), ("edit", 0), ("plus", 4), ("klein_edit", 4)])
def test_the_command_trains_weights_that_the_pipeline_loads(folders, tmp_path, name, rank):
    folder, run = folders(name), tmp_path / "run"
    height, width = EDITING[name].size.values()
    command = (
        f"--model {folder} --prompts.train {folder / 'prompts.jsonl'} --output_dir {run} --epochs 1 --trackers [] "
        f"--policy.lora_rank {rank} --policy.max_sequence_length {LENGTH} --rollout.height {height} "
        f"--rollout.width {width} --prompts.per_epoch 2 --rollout.group_size 2 --rollout.batch_size 4 "
        "--rollout.num_steps 3 --rollout.guidance_scale 2 --rollout.window_size 1 --rollout.window_start [0,1] "
        "--update.batch_size 4 --update.kl_weight 0.01 --update.learning_rate 0.01 --evaluation.num_steps 2 "
        "--evaluation.images_per_prompt 1"
    ).split()
    assert main([*command, "--rewards", json.dumps({"support.worker_rewards:unlike_source": 1})]) == 0
    saved = run / "checkpoints/checkpoint-2"
    pipe = DiffusionPipeline.from_pretrained(folder)
    if rank:
        weights = load_file(saved / "pytorch_lora_weights.safetensors")
        assert sum(bool(tensor.any()) for key, tensor in weights.items() if "lora_B" in key) > 10
        pipe.load_lora_weights(saved)
    else:
        trained = type(pipe.transformer).from_pretrained(saved / "transformer").state_dict()
        changed = [not torch.equal(trained[key], tensor) for key, tensor in pipe.transformer.state_dict().items()]
        assert sum(changed) > len(changed) / 2
    card = (saved / "README.md").read_text()
    source = "image=source_images" if EDITING[name].sources > 1 else "image=source_image"
    assert "pipeline_tag: image-to-image" in card and f"image = pipe({source}, prompt=prompt, " in card
