"""Text encoders, VAE and reference in the CPU's memory while they are not used."""

import pytest
import torch
from support.tiny_run import command, rows
from torch import nn

from fastflowgrpo import Trainer
from fastflowgrpo.config import PolicyConfig, parse
from fastflowgrpo.policy import load_policy, offload
from fastflowgrpo.policy.offload import OffloadedModule
from fastflowgrpo.train import main


def test_a_module_has_other_tensors_inside_and_its_own_outside(monkeypatch):
    monkeypatch.setattr(offload, "copy_to", lambda tensor, device: tensor.clone())
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).requires_grad_(False)
    module.to(memory_format=torch.channels_last)
    offloaded = OffloadedModule(module, "cpu")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    for _ in range(2):
        with offloaded.on_device():
            for name, tensor in module.state_dict().items():
                assert tensor.data_ptr() != before[name][0] and torch.equal(tensor, before[name][1])
            assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert all(tensor.data_ptr() == before[name][0] for name, tensor in module.state_dict().items())


class Watched:
    """Where the weights of a policy's components are whenever one of them computes, on a device that is a stand-in: its
    tensors are copies on the CPU."""

    def __init__(self, policy, monkeypatch):
        monkeypatch.setattr(offload, "copy_to", lambda tensor, device: tensor.clone())
        encoders = policy.text_encoders()
        self.parts = {**encoders, "vae": policy.pipeline.vae}
        self.on_host = {name: next(part.parameters()).data_ptr() for name, part in self.parts.items()}
        self.seen = set()
        for name, part in encoders.items():
            part.register_forward_pre_hook(lambda *_, name=name: self.note(name))
        policy.pipeline.vae.decoder.register_forward_pre_hook(lambda *_: self.note("vae"))
        policy.module.register_forward_pre_hook(lambda *_: self.note("transformer"))

    def note(self, name):
        where = {part: next(module.parameters()).data_ptr() for part, module in self.parts.items()}
        self.seen.add((name, frozenset(part for part in where if where[part] != self.on_host[part])))


@pytest.mark.slow
def test_each_part_is_on_the_device_while_it_computes_and_changes_no_bit(tiny_sd3_folder, tmp_path, monkeypatch):
    assert main(command(tiny_sd3_folder, tmp_path / "plain")) == 0
    trainer = Trainer(parse(command(tiny_sd3_folder, tmp_path / "offloaded", **{"policy.offload": True})))
    watched = Watched(trainer.policy, monkeypatch)
    trainer.run()
    everything = frozenset(watched.parts)
    assert watched.seen == {
        ("transformer", frozenset()),
        ("vae", frozenset({"vae"})),
        *((name, everything) for name in everything - {"vae"}),
    }
    assert rows(tmp_path / "offloaded") == rows(tmp_path / "plain")


def test_embeddings_on_disk_and_the_reference_of_full_training(tiny_sd3_folder, tmp_path, monkeypatch):
    settings = PolicyConfig(lora_rank=0, max_sequence_length=8, offload=True)
    policy = load_policy(str(tiny_sd3_folder), settings)
    monkeypatch.setattr(offload, "copy_to", lambda tensor, device: tensor.clone())
    weight = policy._reference_module.proj_out.weight
    on_host = weight.data_ptr()
    with policy.reference():
        assert weight.data_ptr() != on_host and policy.transformer is policy._reference_module
    assert weight.data_ptr() == on_host
    policy.drop_encoders()
    assert set(policy._offloaded) == {policy.pipeline.vae, policy._reference_module}
