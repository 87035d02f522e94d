"""The state that training resumes from: weights, optimiser, average, random numbers."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastflowgrpo.distributed import Processes, shard_like
from fastflowgrpo.errors import UserError
from fastflowgrpo.learning.optimizer import loaded_state, stored_state
from fastflowgrpo.learning.snapshot import WeightSnapshot
from fastflowgrpo.runs.checkpoints import Checkpoint
from fastflowgrpo.runs.files import METRICS, json_lines
from fastflowgrpo.sampling.rollout import Trajectory
from fastflowgrpo.scoring.epoch import Drawn

WEIGHTS, OPTIMIZER, EMA, RNG = "weights.safetensors", "optimizer.safetensors", "ema.safetensors", "rng.json"
OLD_POLICY, AHEAD = "old_policy.safetensors", "ahead.safetensors"


def training_state(
    parameters: Mapping[str, Tensor],
    optimizer: AcceleratedOptimizer,
    ema: EMAModel | None,
    old_policy: WeightSnapshot | None,
) -> dict[str, dict[str, Tensor]]:
    """The tensors that training resumes from: "weights", "optimizer" and "ema", each by name.

    Args:
        parameters: the trained parameters by name, in the optimiser's order.
        optimizer: of these parameters.
        ema: their average, if there is one.
        old_policy: the weights that sample, if they are others.
    """
    states = optimizer.state_dict()["state"]
    state = {
        "weights": dict(parameters),
        "optimizer": {
            f"{name}/{key}": tensor
            for index, name in enumerate(parameters)
            for key, tensor in stored_state(states.get(index, {})).items()  # none before the parameter's first gradient
        },
    }
    if ema is not None:
        state["ema"] = dict(zip(parameters, ema.shadow_params, strict=True))
    if old_policy is not None:
        state["old_policy"] = dict(zip(parameters, old_policy.values, strict=True))
    return state


def save_training(
    folder: Path,
    state: Mapping[str, Mapping[str, Tensor]],
    ema_steps: int | None,
    rng_states: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write the state that training resumes from into a new folder.

    Args:
        folder: is made.
        state: from `training_state`, of complete tensors.
        ema_steps: steps of the average, if there is one.
        rng_states: `rng_state` of each process.
        rows: of metrics.jsonl.
    """
    folder.mkdir()
    for name, tensors in state.items():
        metadata = {"optimization_step": str(ema_steps)} if name == "ema" else None
        on_disk = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(on_disk, folder / f"{name}.safetensors", metadata=metadata)
    (folder / RNG).write_text(json.dumps(rng_states))
    (folder / METRICS).write_text(json_lines(rows))


def load_training(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    optimizer: AcceleratedOptimizer,
    ema: EMAModel | None,
    old_policy: WeightSnapshot | None,
) -> None:
    """Set weights, optimiser and average to those of a checkpoint; arguments as for `training_state`.

    Raises:
        UserError: the checkpoint cannot be read here, or another model's parameters are in it.
    """
    folder = checkpoint.training
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{checkpoint.folder} is not seen by every process: output_dir must be on a disk that all machines share"
        )
    weights = load_file(folder / WEIGHTS)
    _check_parameters(checkpoint, weights, parameters)
    states: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(parameters)}
    for path, tensor in load_file(folder / OPTIMIZER).items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        sharded = shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        states.setdefault(index[name], {})[key] = sharded
    # The present parameter groups are kept: the learning rate may have changed.
    groups = optimizer.state_dict()["param_groups"]
    loaded = {number: loaded_state(stored) for number, stored in states.items()}
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))
        if ema is not None:
            with safe_open(folder / EMA, "pt") as file:
                ema.optimization_step = int(file.metadata()["optimization_step"])
                for name, average in zip(parameters, ema.shadow_params, strict=True):
                    average.copy_(shard_like(file.get_tensor(name), average))
        if old_policy is not None:
            saved = load_file(folder / OLD_POLICY)
            for name, value in zip(parameters, old_policy.values, strict=True):
                value.copy_(shard_like(saved[name], value))


def ahead_state(ahead: Drawn, group_size: int, processes: Processes) -> dict[str, Tensor]:
    """The tensors of the trajectories that all processes have sampled ahead, by name, on the CPU. Collective.

    Returns:
        (groups, group_size, ...) each; {} if there are none.
    """
    if not ahead.parts:
        return {}
    own = type(ahead.parts[0]).cat(ahead.parts)
    rows = {f.name: getattr(own, f.name).cpu().unflatten(0, (-1, group_size)) for f in fields(own)}
    return processes.gather_rows(rows, len(rows["final"]) * processes.count)


def load_ahead(checkpoint: Checkpoint, processes: Processes) -> Drawn:
    """This process's share of what a checkpoint holds of the next epoch; its scores have to be asked for again."""
    path = checkpoint.training / AHEAD
    if not path.is_file():
        return Drawn()
    tensors = load_file(path)
    groups = processes.rank_indices(len(tensors["final"]))
    own = {name: tensor[groups].flatten(0, 1) for name, tensor in tensors.items()}
    device = processes.accelerator.device
    own = {name: tensor if name == "steps" else tensor.to(device) for name, tensor in own.items()}
    return Drawn([Trajectory(**own)], is_scored=False)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of the global random numbers of Python, numpy and torch, in JSON's types."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - a reward of the user's may draw from it
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
    }


def load_rng(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    """Set the random numbers to those of a checkpoint. A rank that the saved run did not have keeps its own."""
    states = json.loads((checkpoint.training / RNG).read_text())
    if rank >= len(states):
        return
    state = states[rank]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)


def _check_parameters(checkpoint: Checkpoint, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if theirs != ours:
        name = next(name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name))
        raise UserError(
            f"{checkpoint.folder} is of another model: it trains {name} of shape {theirs.get(name)}, "
            f"this one of shape {ours.get(name)}"
        )


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
