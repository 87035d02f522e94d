"""The export command: LoRA files, and merged pipelines that draw the run's images."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from support.pipelines import perturb

from fastflowgrpo import Config, export, load_policy
from fastflowgrpo.config import PolicyConfig, save
from fastflowgrpo.runs import export as export_files
from fastflowgrpo.sampling.ode import sample_ode


def make_run(folder, model, lora_rank):
    """A run directory with a checkpoint of perturbed weights, and the policy that has them."""
    settings = PolicyConfig(lora_rank=lora_rank, lora_alpha=10, max_sequence_length=12)
    policy = load_policy(str(model), settings)
    perturb(policy.trainable_parameters(), scale=0.2 if lora_rank else 0.05)
    policy.save(folder / "checkpoints/checkpoint-3")
    save(Config(model=str(model), policy=settings), folder / "config.yaml")
    return policy


def images(policy):
    noise = torch.randn(2, *policy.latent_shape(16, 24), generator=torch.Generator().manual_seed(3))
    return policy.decode(sample_ode(policy, policy.encode(["a cat", "snow"]), 3, noise)).int()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def arguments(run, form, output, *more):
    return [str(run), "--format", form, "--output", str(output), *more]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_merged_pipeline_is_complete_and_draws_the_runs_images(
    tiny_sd3_folder, run, tmp_path, monkeypatch, capsys, lora_rank
):
    policy = make_run(run, tiny_sd3_folder, lora_rank)
    monkeypatch.setattr(export_files, "MAX_SHARD_SIZE", "100KB")
    merged = tmp_path / "new/merged"
    assert export.main(arguments(run, "merged", merged, "--dtype", "float32")) == 0
    assert capsys.readouterr().out == f"{merged}\n"
    assert {path.name for path in merged.parent.iterdir()} == {"merged"}
    assert {path.name for path in merged.iterdir()} == {path.name for path in tiny_sd3_folder.iterdir()}
    assert len(list((merged / "transformer").glob("*.safetensors"))) > 1
    expected = images(policy)
    with policy.reference():
        assert (images(policy) - expected).abs().max() > 5
    pipeline = DiffusionPipeline.from_pretrained(merged)
    policy.transformer = pipeline.transformer
    assert (images(policy) - expected).abs().max() <= 1

    exact = pipeline.transformer.state_dict()
    assert export.main(arguments(run, "merged", tmp_path / "half")) == 0
    files = (tmp_path / "half/transformer").glob("*.safetensors")
    rounded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert rounded.keys() == exact.keys()
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), exact[name], rtol=0.01, atol=1e-3)


def test_a_lora_in_each_format(tiny_sd3_folder, run, tmp_path):
    make_run(run, tiny_sd3_folder, 4)
    keys = {}
    for form in ("diffusers", "comfyui", "kohya"):
        output = tmp_path / f"{form}.safetensors"
        assert export.main(arguments(run, form, output)) == 0
        keys[form] = set(load_file(output))
    saved = run / "checkpoints/checkpoint-3/pytorch_lora_weights.safetensors"
    assert (tmp_path / "diffusers.safetensors").read_bytes() == saved.read_bytes()
    assert keys["comfyui"] == keys["diffusers"]
    scaled, plain = load_file(tmp_path / "comfyui.safetensors"), load_file(saved)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    assert torch.equal(scaled[name.format("B")], plain[name.format("B")] * 2.5)
    assert torch.equal(scaled[name.format("A")], plain[name.format("A")])
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha" in keys["kohya"]


def test_errors(tiny_sd3_folder, run, tmp_path, capsys):
    def error(*command):
        assert export.main(arguments(*command)) == 2
        return capsys.readouterr().err

    file = tmp_path / "new.safetensors"
    assert f"run {run} has no checkpoint yet" in error(run, "kohya", file)
    make_run(run, tiny_sd3_folder, 0)
    full = run / "checkpoints/checkpoint-3"
    assert f"--format kohya is for a LoRA, and {full} holds a whole transformer" in error(run, "kohya", file)
    assert "has neither pytorch_lora_weights" in error(run, "kohya", file, "--checkpoint", str(tmp_path))
    assert f"--output {tmp_path} exists: give another" in error(run, "merged", tmp_path)
    (run / "file").touch()
    assert f"cannot be exported to {run}/file/merged: " in error(run, "merged", run / "file/merged")

    make_run(run, tiny_sd3_folder, 4)
    assert f"--output {tmp_path}/new: expected a .safetensors file" in error(run, "kohya", tmp_path / "new")
    assert "--dtype is for --format merged, not for kohya" in error(run, "kohya", file, "--dtype", "float16")
    index = tmp_path / "gone/model_index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"_class_name": "SanaPipeline"}))
    save(Config(model=str(index.parent)), run / "config.yaml")
    assert "--format kohya is made for StableDiffusion3Pipeline" in error(run, "kohya", file)
    assert not list(tmp_path.glob("*new*"))  # nothing was left behind
