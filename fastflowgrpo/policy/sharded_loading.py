"""Transformers of which each rank reads only its own shards: full training under FSDP2."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from fastflowgrpo.distributed import local_shard, shard_begin
from fastflowgrpo.errors import UserError


def empty_transformer(source: str, component: str, class_name: str, dtype: torch.dtype) -> ModelMixin:
    """Build a pipeline's transformer with its parameters on the meta device, in the dtypes in which it would be loaded.

    Args:
        source: a local folder in diffusers' layout, or a hub id.
        component: name of the transformer in the pipeline.
        class_name: of it, in diffusers.
        dtype: of the parameters that the class does not keep in float32.
    """
    cls = getattr(diffusers, class_name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # buffers are made in it, as `from_pretrained` does
    try:
        with init_empty_weights():  # buffers keep their values
            transformer = cls.from_config(cls.load_config(source, subfolder=component))
    finally:
        torch.set_default_dtype(default)
    kept = set(cls._keep_in_fp32_modules or [])
    if not kept:
        nn.Module.to(transformer, dtype)  # the buffers that are not saved too; diffusers' own `to` may warn
    for name, tensor in transformer.state_dict(keep_vars=True).items():
        tensor.data = tensor.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return transformer.eval()


def weight_files(source: str, component: str) -> list[Path]:
    """Return the safetensors files of a pipeline's transformer, which are fetched from the hub if necessary.

    Raises:
        UserError: it has none.
    """
    folder = Path(source if Path(source).is_dir() else DiffusionPipeline.download(source)) / component
    names, index = {SAFETENSORS_WEIGHTS_NAME}, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}, from which each rank of FSDP2 reads its part in full training")
    return [folder / name for name in sorted(names)]


def read_shards(
    files: Mapping[str, Sequence[Path]], trained: nn.Module, reference: nn.Module, device: torch.device | str
) -> None:
    """Give two sharded modules on the meta device their weights; each rank reads its own rows of them.

    Args:
        files: from `weight_files`, by what the modules' names of their weights begin with.
        trained, reference: of one class, sharded alike. What is read is rounded to the dtypes of the reference first,
            as if the trained weights had been copied from it.
        device: of the weights.

    Raises:
        UserError: a weight is in none of the files.
    """
    states = [_allocated(module, device) for module in (reference, trained)]
    for prefix, of_one in files.items():
        parts = [{name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)} for state in states]
        _read(of_one, *parts)


def _read(files: Sequence[Path], rounded: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of tensors from files, and of others of the same names from the former."""
    unread = set(rounded)
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in unread & set(opened.keys()):
                unread.remove(name)
                begin, local = shard_begin(rounded[name]), local_shard(rounded[name])
                if not local.numel():
                    continue
                part = opened.get_slice(name)[begin : begin + len(local)] if local.ndim else opened.get_tensor(name)
                local.copy_(part)
                local_shard(other[name]).copy_(local)
    if unread:
        raise UserError(f"{files[0].parent} has no weight {min(unread)}, which its configuration asks for")


@torch.no_grad()
def _allocated(module: nn.Module, device: torch.device | str) -> Mapping[str, Tensor]:
    """Allocate a module's shards, keep its buffers' values, and return all tensors that are saved, by name."""
    buffers = dict(module.named_buffers())
    module.to_empty(device=device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
