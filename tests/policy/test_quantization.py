"""A LoRA over a quantised transformer, and a quantised reference, on the CPU with torchao's int8 and float8."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.pipelines import tiny_wan_experts_pipeline
from support.tiny_run import command, rows
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastflowgrpo import Trainer
from fastflowgrpo.config import PolicyConfig, parse
from fastflowgrpo.errors import UserError
from fastflowgrpo.evaluate import main as evaluate
from fastflowgrpo.policy import load_policy, offload, quantization
from fastflowgrpo.runs.checkpoints import list_checkpoints
from fastflowgrpo.train import main

TorchAOBaseTensor = pytest.importorskip(
    "torchao.utils", reason="torchao is not installed; CI runs this file with it"
).TorchAOBaseTensor
CONFIG = PolicyConfig(dtype="bfloat16", lora_rank=4, max_sequence_length=8)


def load(folder, kind="int8", **settings):
    return load_policy(str(folder), replace(CONFIG, quantization=kind, **settings))


def frozen(policy):
    """The stored bytes of all weights without a gradient, by name."""

    def stored(tensor):
        if not isinstance(tensor, TorchAOBaseTensor):
            return (tensor.detach().clone(),)
        return tuple(getattr(tensor, name).clone() for name in tensor.__tensor_flatten__()[0])

    return {name: stored(weight) for name, weight in policy.module.named_parameters() if not weight.requires_grad}


def inputs(policy):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(policy.dtype)
    return latents, torch.tensor([0.3, 0.8]), policy.encode(["a cat", "snow"])


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_base_is_quantised_and_only_the_adapter_is_trained(tiny_sd3_folder, kind):
    policy, plain = load(tiny_sd3_folder, kind), load(tiny_sd3_folder, None)
    before, given = frozen(policy), inputs(policy)
    linears = [layer for layer in plain.module.modules() if type(layer) is nn.Linear]
    assert sum(value[0].element_size() == 1 for value in before.values()) == len(linears)
    with torch.no_grad():
        base, exact = policy.velocity(*given), plain.velocity(*given)
    assert 0 < (base - exact).abs().max() < 0.1 * exact.abs().max()
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2)
    for _ in range(2):
        policy.velocity(*given).square().mean().backward()
        optimizer.step()
    assert all(map(torch.equal, sum(before.values(), ()), sum(frozen(policy).values(), ())))
    with torch.no_grad():
        assert not torch.equal(policy.velocity(*given), base)
        with policy.reference():
            assert torch.equal(policy.velocity(*given), base)


def test_the_backward_pass_is_that_of_the_dequantised_weights_and_keeps_no_copy_of_them(tiny_sd3_folder):
    policy = load(tiny_sd3_folder)
    (layer,) = [layer for name, layer in policy.module.named_modules() if name.endswith("blocks.0.ff.net.2")]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        policy.velocity(*inputs(policy))
    kept = {tuple(tensor.shape) for tensor in saved if tensor.ndim == 2}
    weights = {tuple(weight.shape) for weight in policy.module.parameters() if isinstance(weight, TorchAOBaseTensor)}
    assert not kept & {shape[::-1] for shape in weights if shape[0] != shape[1]}
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(y) @ layer.weight.dequantize())


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_full_training_quantises_the_reference_alone_on_the_device_or_offloaded(tiny_sd3_folder, monkeypatch, kind):
    settings = {"lora_rank": 0, "dtype": "float32"}
    policy, plain = load(tiny_sd3_folder, kind, **settings), load(tiny_sd3_folder, None, **settings)
    offloaded = load(tiny_sd3_folder, kind, **settings, offload=True)
    monkeypatch.setattr(offload, "copy_to", lambda tensor, device: tensor.clone())
    given = inputs(policy)

    def reference(policy):
        with torch.no_grad(), policy.reference():
            return policy.velocity(*given)

    exact = reference(plain)
    assert torch.equal(policy.velocity(*given), exact)
    assert 0 < (reference(policy) - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(reference(offloaded), reference(policy))
    layer, stored = offloaded._reference_module.proj_out, []
    monkeypatch.setattr(offloaded, "predict", lambda *given: stored.append(layer.weight.qdata.data_ptr()) or exact)
    reference(offloaded)
    assert layer.weight.qdata.data_ptr() not in stored and len(stored) == 1
    base = reference(policy)
    policy.velocity(*given).square().mean().backward()
    torch.optim.SGD(policy.trainable_parameters(), lr=0.1).step()
    assert not torch.equal(policy.velocity(*given), exact) and torch.equal(reference(policy), base)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("rank", [4, 0])
def test_both_of_two_transformers_are_quantised(tmp_path, rank):
    pipeline = tiny_wan_experts_pipeline()
    pipeline.save_pretrained(tmp_path)
    policy = load(tmp_path, lora_rank=rank)
    linears = [
        name
        for transformer in (pipeline.transformer, pipeline.transformer_2)
        for name, layer in transformer.named_modules()
        if type(layer) is nn.Linear and "time_embedder" not in name  # Wan keeps it in float32
    ]
    frozen_module = policy.module if rank else policy._reference_module
    stored = [weight for weight in frozen_module.parameters() if isinstance(weight, TorchAOBaseTensor)]
    assert len(stored) == len(linears)
    latents = torch.randn(2, *policy.latent_shape(16, 16, 5)).to(policy.dtype)
    given = latents, torch.tensor([0.3, 0.9]), policy.encode(["a cat", "snow"])
    with torch.no_grad(), policy.reference():
        reference = policy.velocity(*given)
    policy.velocity(*given).square().mean().backward()
    assert reference.isfinite().all() and all(weight.grad is not None for weight in policy.trainable_parameters())


def quantised(folder, output, **settings):
    return command(folder, output, **{"policy.quantization": "int8", **settings})


@pytest.mark.slow
def test_the_command_trains_resumes_and_evaluates_a_quantised_model(tiny_sd3_folder, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(quantised(tiny_sd3_folder, whole)) == 0
    assert main(quantised(tiny_sd3_folder, parts, epochs=1)) == 0
    assert main(quantised(tiny_sd3_folder, parts, resume="latest")) == 0
    last, again = list_checkpoints(whole)[-1], list_checkpoints(parts)[-1]
    files = [path.relative_to(last) for path in last.rglob("*.safetensors")]
    assert len(files) > 3
    for name in files:
        one, other = load_file(last / name), load_file(again / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    evaluated, *trained, _ = rows(whole)
    assert [row["kl"] > 0 for row in trained] == [True, True] and "eval" in evaluated
    results = tmp_path / "evaluation"
    assert evaluate(["--run", str(whole), "--output_dir", str(results), "--num_steps", "2"]) == 0
    found = json.loads((results / "evaluation.json").read_text())
    before, after = (found[weights]["Diversity"]["pixels"]["mean"] for weights in ("base", "trained"))
    row = rows(whole)[-1]["eval"]
    assert before != after and after == pytest.approx(row["diversity"], rel=1e-6), (found, row)


@pytest.mark.slow
def test_the_command_trains_in_full_against_a_quantised_reference(tiny_sd3_folder, tmp_path, capsys):
    settings = {"policy.lora_rank": 0, "update.per_epoch": 1}
    for name, kind in (("plain", "null"), ("quantised", "int8")):
        more = {"policy.quantization": kind, "epochs": 1}
        assert main(command(tiny_sd3_folder, tmp_path / name, **settings, **more)) == 0
    (start, first, _), (exact_start, exact, _) = rows(tmp_path / "quantised"), rows(tmp_path / "plain")
    assert start == exact_start and first["reward"] == exact["reward"]
    assert exact["kl"] == 0 < first["kl"]  # the quantised reference is not the policy that training starts with
    results = tmp_path / "evaluation"
    assert evaluate(["--run", str(tmp_path / "quantised"), "--output_dir", str(results), "--num_steps", "2"]) == 0
    base = json.loads((results / "evaluation.json").read_text())["base"]["Diversity"]["pixels"]["mean"]
    assert base == pytest.approx(exact_start["eval"]["diversity"], rel=1e-6)  # of the model that is not quantised


def test_the_ratio_is_exactly_one_and_the_kl_zero_before_the_first_update(tiny_sd3_folder, tmp_path):
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(parse(quantised(tiny_sd3_folder, tmp_path / dtype, **{"policy.dtype": dtype})))
        batch, _ = trainer.collect(0)
        for chosen, slots in trainer.objective.micro_batches(batch, 0, len(batch.advantages)):
            statistics = trainer.objective.loss(batch, chosen, slots)[1]
            assert (statistics["ratio"] == 1).all() and (statistics["kl"] == 0).all()
        trainer.accelerator.end_training()
        trainer.lock.close()


def test_ddp_leaves_the_quantised_weights_alone(tiny_sd3_folder, tmp_path):
    policy = load(tiny_sd3_folder)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy.transformer = DistributedDataParallel(policy.module)
        policy.velocity(*inputs(policy)).square().mean().backward()
    finally:
        distributed.destroy_process_group()
    assert any(parameter.grad.any() for parameter in policy.trainable_parameters())


def test_what_cannot_be_quantised_is_refused(tiny_sd3_folder, monkeypatch):
    with pytest.raises(UserError, match=r"policy\.quantization: full training quantises .* int8 or float8, not to nf4"):
        parse(["--policy.quantization", "nf4"])
    with pytest.raises(
        UserError, match=r"policy\.quantization: quantised layers are not compiled: set policy\.compile"
    ):
        parse(["--policy.quantization", "int8", "--policy.lora_rank", "4", "--policy.compile", "true"])
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'float8 needs torchao: pip install "fastflowgrpo\[quantized\]"'):
        load(tiny_sd3_folder, "float8")
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"policy\.quantization: nf4 needs a GPU"):
        load(tiny_sd3_folder, "nf4")
