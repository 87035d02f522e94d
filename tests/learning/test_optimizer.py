"""AdamW with 8-bit averages, on the CPU."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_run import command
from torch import nn

from fastflowgrpo.config import UpdateConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning import optimizer as optimizers
from fastflowgrpo.learning.optimizer import loaded_state, make_optimizer, state_bytes, stored_state
from fastflowgrpo.runs.checkpoints import list_checkpoints
from fastflowgrpo.train import main

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="CI runs this file with torchao")
SHAPES = ((64, 64), (48, 256), (63, 64), (5000,))  # the last two stay in float32: too few values, no multiple of 256


def trained(kind, steps=6):
    """Parameters and their optimiser after some steps; with a stop and a reload after half of them for "reloaded"."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    update = UpdateConfig(optimizer=kind.removesuffix(" reloaded"), learning_rate=1e-2)
    optimizer = make_optimizer(parameters, update)
    for step in range(steps):
        if kind.endswith("reloaded") and step == steps // 2:
            saved = optimizer.state_dict()
            optimizer = make_optimizer(parameters, update)
            state = {i: loaded_state(stored_state(value)) for i, value in saved["state"].items()}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


@needs_torchao
def test_8_bits_follow_nearly_the_same_steps_and_reload_bit_for_bit():
    (exact, full), (near, small), (again, _) = map(trained, ("adamw", "adamw_8bit", "adamw_8bit reloaded"))
    for one, other, shape in zip(exact, near, SHAPES, strict=True):
        difference = one - other
        assert (difference.abs().max() > 1e-5) == (shape in SHAPES[:2])
        assert difference.norm() < 0.1 * 1e-2 * one.numel() ** 0.5  # a tenth of one of the six steps
    assert all(map(torch.equal, near, again))
    sizes = [parameter.numel() for parameter in exact]
    for kind, optimizer in (("adamw", full), ("adamw_8bit", small)):
        stored = [stored_state(state) for state in optimizer.state_dict()["state"].values()]
        held = sum(tensor.nbytes for state in stored for name, tensor in state.items() if name != "step")
        tables = 4 * optimizers.TABLE if kind == "adamw_8bit" else 0  # of two parameters, not stored
        assert state_bytes(sizes, kind) == held + tables


@needs_torchao
@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_stopped(tiny_sd3_folder, tmp_path):
    settings = {"policy.lora_rank": 0, "update.optimizer": "adamw_8bit", "update.learning_rate": 1e-3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(tiny_sd3_folder, whole, **settings)) == 0
    assert main(command(tiny_sd3_folder, parts, **settings, epochs=1)) == 0
    assert main(command(tiny_sd3_folder, parts, **settings, resume="latest")) == 0
    last, again = list_checkpoints(whole)[-1], list_checkpoints(parts)[-1]
    names = [path.relative_to(last) for path in last.rglob("*.safetensors")]
    for name in names:
        one, other = load_file(last / name), load_file(again / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    (state,) = [load_file(last / name) for name in names if name.name == "optimizer.safetensors"]
    assert any(tensor.dtype == torch.uint8 and tensor.any() for tensor in state.values())


def test_without_torchao_the_optimiser_names_what_to_install(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'adamw_8bit needs torchao: pip install "fastflowgrpo\[quantized\]"'):
        make_optimizer([], UpdateConfig(optimizer="adamw_8bit"))
