"""Reading the kept steps of a micro-batch, from the host's memory one micro-batch ahead."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.sampling.host_trajectory import HostTrajectory
from fastflowgrpo.sampling.rollout import Trajectory


@dataclass(frozen=True)
class KeptSteps:
    """What a trajectory has kept of N pairs (sample, step), (N, ...) each on the policy's device."""

    sample: Tensor
    prev_sample: Tensor
    velocity: Tensor | None
    unconditional: Tensor | None

    @classmethod
    def of(cls, trajectory: Trajectory, rows: Tensor, slots: Tensor) -> "KeptSteps":
        """Gather the pairs where the trajectory is."""
        velocities, unconditional = trajectory.velocities, trajectory.unconditional
        return cls(
            trajectory.latents[rows, slots],
            trajectory.latents[rows, slots + 1],
            velocities[rows, slots] if velocities.shape[1] else None,
            unconditional[rows, slots] if unconditional.shape[1] else None,
        )

    def tensors(self) -> list[Tensor]:
        """Return those that there are."""
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def to(self, device: torch.device) -> "KeptSteps":
        """Start to copy them from the host to a device."""

        def start(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        others = (None if tensor is None else start(tensor) for tensor in (self.velocity, self.unconditional))
        return KeptSteps(start(self.sample), start(self.prev_sample), *others)


class StepReader:
    """Reads micro-batches; those of a `HostTrajectory` are copied on a stream of their own.

    Args:
        device: of the policy.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: tuple[Tensor, KeptSteps] | None = None
        """The rows and the steps of the micro-batch that is being copied."""

    def prefetch(self, trajectory: Trajectory, rows: Tensor, slots: Tensor) -> None:
        """Start to copy a micro-batch that `read` will be asked for, rows and slots on the CPU."""
        if isinstance(trajectory, HostTrajectory):
            with torch.cuda.stream(self.stream):
                self.ahead = rows, KeptSteps.of(trajectory, rows, slots).to(self.device)

    def read(
        self, trajectory: Trajectory, on_host: tuple[Tensor, Tensor], on_device: tuple[Tensor, Tensor]
    ) -> KeptSteps:
        """Return the steps of a micro-batch, given its rows and slots on the CPU and on the device."""
        if not isinstance(trajectory, HostTrajectory):
            return KeptSteps.of(trajectory, *on_device)
        if self.ahead is None or self.ahead[0] is not on_host[0]:
            self.prefetch(trajectory, *on_host)
        assert self.ahead is not None
        (_, steps), self.ahead = self.ahead, None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in steps.tensors():
                tensor.record_stream(current)
        return steps
