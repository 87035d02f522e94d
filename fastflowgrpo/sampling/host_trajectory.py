"""Trajectories in the host's memory: `rollout.offload_trajectory`."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from fastflowgrpo.sampling.rollout import Trajectory

_ON_HOST = ("latents", "velocities", "unconditional")


class HostTrajectory(Trajectory):
    """A trajectory whose steps are in the host's memory, pinned if it was sampled on a GPU. The rest stays there."""

    @classmethod
    def of(cls, trajectory: Trajectory) -> "HostTrajectory":
        """Start to copy the steps of a trajectory; they are complete in the result of `cat`."""
        values = {field.name: getattr(trajectory, field.name) for field in fields(cls)}
        return cls(**values | {name: _start_copy(values[name]) for name in _ON_HOST})

    @classmethod
    def cat(cls, parts: Sequence[Trajectory]) -> Trajectory:
        device = parts[0].final.device
        if device.type != "cuda":
            return super().cat(parts)
        torch.cuda.current_stream(device).synchronize()
        joined = super().cat(parts)
        return replace(joined, **{name: getattr(joined, name).pin_memory() for name in _ON_HOST})


def _start_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
