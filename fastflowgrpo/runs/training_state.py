"""The state that training resumes from: weights, optimiser, average, random numbers."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastflowgrpo.distributed import shard_like
from fastflowgrpo.errors import UserError
from fastflowgrpo.runs.checkpoints import Checkpoint
from fastflowgrpo.runs.files import lines


def training_state(
    parameters: Mapping[str, Tensor], optimizer: AcceleratedOptimizer | None, ema: EMAModel | None
) -> dict[str, dict[str, Tensor]]:
    """The tensors that training goes on from, "weights", "optimizer" and "ema", each by its name.

    Args:
        parameters: the trained parameters by name, in the optimiser's order.
        optimizer: None for one that cannot be gone on with.
    """
    state = {"weights": dict(parameters)}
    if optimizer is not None:
        states = optimizer.state_dict()["state"]
        state["optimizer"] = {
            f"{name}/{key}": tensor
            for index, name in enumerate(parameters)
            for key, tensor in states.get(index, {}).items()  # none before the parameter's first gradient
        }
    if ema is not None:
        state["ema"] = dict(zip(parameters, ema.shadow_params, strict=True))
    return state


def save_training(
    folder: Path,
    state: Mapping[str, Mapping[str, Tensor]],
    averages: int | None,
    rngs: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write what training goes on from, into a new folder.

    Args:
        state: `training_state`, of whole tensors.
        averages: steps of the average, if there is one.
        rngs: `rng_state` of each process.
        rows: of metrics.jsonl.
    """
    folder.mkdir()
    for name, tensors in state.items():
        metadata = {"optimization_step": str(averages)} if name == "ema" else None
        save_file(_detached(tensors), folder / f"{name}.safetensors", metadata=metadata)
    (folder / "rng.json").write_text(json.dumps(rngs))
    (folder / "metrics.jsonl").write_text(lines(rows))


def load_training(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    optimizer: AcceleratedOptimizer,
    ema: EMAModel | None,
) -> None:
    """Set weights, optimiser and average to those of a checkpoint; arguments as for `training_state`.

    Raises:
        UserError: other parameters are trained, or the checkpoint is without an optimiser.
    """
    folder = checkpoint.folder / "training"
    if not (folder / "weights.safetensors").is_file():
        raise UserError(
            f"{checkpoint.folder} is not seen by every process: output_dir must be on a disk that all machines share"
        )
    if not (folder / "optimizer.safetensors").is_file():
        raise UserError(f"{checkpoint.folder} was saved under DeepSpeed, without the optimiser: it has no sequel")
    weights = load_file(folder / "weights.safetensors")
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if theirs != ours:
        name = next(name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name))
        raise UserError(
            f"{checkpoint.folder} is of another model: it trains {name} of shape {theirs.get(name)}, "
            f"this one of shape {ours.get(name)}"
        )
    states: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(parameters)}
    for path, tensor in load_file(folder / "optimizer.safetensors").items():
        name, _, key = path.rpartition("/")
        own = parameters[name]
        states.setdefault(index[name], {})[key] = shard_like(tensor, own) if tensor.shape == own.shape else tensor
    # The groups are the present ones, for the learning rate may be another one.
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))
        if ema is not None:
            with safe_open(folder / "ema.safetensors", "pt") as file:
                ema.optimization_step = int(file.metadata()["optimization_step"])
                for name, average in zip(parameters, ema.shadow_params, strict=True):
                    average.copy_(shard_like(file.get_tensor(name), average))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global random numbers, as JSON has it."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - a reward of the user's may draw from it
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
    }


def load_rng(checkpoint: Checkpoint, process: int, device: torch.device) -> None:
    """Set the random numbers to those of a checkpoint. A process that the run did not have keeps its own."""
    states = json.loads((checkpoint.folder / "training" / "rng.json").read_text())
    if process >= len(states):
        return
    state = states[process]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
