"""Each rank in turn, with a process group that sends nothing; test_distributed.py trains on what real ranks load."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import tiny_sd3_pipeline, tiny_wan_pipeline
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.distributed import local_shard
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy import load_policy, sharded_loading


@contextmanager
def sharding(rank, shape):
    """Inside it this process is one of a mesh's ranks: gives the function that shards a module over its last axis."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(shape).numel())
    try:
        # DTensor keeps the specs of operations, with their mesh: each rank's needs another name.
        names = f"replicate{rank}", f"shard{rank}"
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])

        def shard(module):
            for block in module.modules():
                if type(block).__name__ in module._no_split_modules:
                    fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)

        yield shard
    finally:
        dist.destroy_process_group()


def counting_opener(read):
    """`safe_open` whose tensors' bytes are appended to a list."""

    class Slice:
        def __init__(self, tensor):
            self.tensor = tensor

        def __getitem__(self, rows):
            read.append(self.tensor[rows].nbytes)
            return self.tensor[rows]

    class File:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def keys(self):
            return self.opened.keys()

        def get_slice(self, name):
            return Slice(self.opened.get_slice(name))

    return File


def tensors(policy):
    """All weights and buffers of the trained module and of the reference."""
    modules = {"trained": policy.module, "reference": policy._reference_module}
    return {
        (kind, name): local_shard(tensor.detach())
        for kind, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


@pytest.mark.parametrize("make, shape", [(tiny_sd3_pipeline, (3,)), (tiny_wan_pipeline, (2, 2))])
def test_each_rank_reads_and_holds_only_its_rows_of_the_whole_model(make, shape, tmp_path, monkeypatch):
    """In bfloat16, to which the files' float32 is rounded, but Wan keeps some layers in float32; several files."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
    pipeline.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="30KB")
    config = PolicyConfig(dtype="bfloat16", lora_rank=0, max_sequence_length=8)
    whole, parts, read = tensors(load_policy(str(tmp_path), config)), [], []
    monkeypatch.setattr(sharded_loading, "safe_open", counting_opener(read))
    for rank in range(torch.Size(shape).numel())[-shape[-1] :]:  # those of the last replica
        with sharding(rank, shape) as shard:
            parts.append(tensors(load_policy(str(tmp_path), config, "cpu", shard)))
    parameters = dict(pipeline.transformer.named_parameters())
    for key, tensor in whole.items():
        pieces = [part[key] for part in parts]
        if key[1] in parameters:
            assert all(len(piece) <= -(-len(tensor) // shape[-1]) for piece in pieces)
            pieces = [torch.cat(pieces)]
        assert all(piece.dtype == tensor.dtype and torch.equal(piece, tensor) for piece in pieces), key
    saved = pipeline.transformer.state_dict()
    copies = {name: 1 if name in parameters else shape[-1] for name in saved}  # of buffers one on each rank
    assert sum(read) == sum(copies[name] * tensor.nbytes for name, tensor in saved.items())


def test_what_the_files_lack_is_named(tmp_path):
    tiny_sd3_pipeline().save_pretrained(tmp_path)
    file, config = tmp_path / "transformer/diffusion_pytorch_model.safetensors", PolicyConfig(lora_rank=0)
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file)
    with sharding(0, (2,)) as shard, pytest.raises(UserError, match=r"has no weight proj_out\.bias"):
        load_policy(str(tmp_path), config, "cpu", shard)
    file.unlink()
    with sharding(0, (2,)) as shard, pytest.raises(UserError, match=f"has no {file.name}, from which each rank"):
        load_policy(str(tmp_path), config, "cpu", shard)
