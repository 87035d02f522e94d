"""Several processes (ranks), one per device: which items each rank has, and everything that ranks tell each other.

Of `total` items rank r of R has r, r + R, r + 2 R, ... In every run of consecutive items, such as the groups of one
optimiser update, the ranks' counts differ by at most one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    fsdp2_prepare_model,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fastflowgrpo.errors import UserError

# How long a rank waits for another, which may itself wait for a reward server. If one rank fails,
# the launcher ends the others.
TIMEOUT = timedelta(hours=2)
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)

T = TypeVar("T")


def make_accelerator(trackers: list[str], project_dir: str) -> Accelerator:
    """Make the accelerator of a training run or an evaluation, from what its launcher says.

    Args:
        trackers: experiment trackers, by accelerate's names.
        project_dir: folder of the trackers' files.

    Raises:
        UserError: a tracker is missing, or the launch is of a kind that is not supported.
    """
    available = [tracker.value for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in available:
            raise UserError(f'trackers: "{tracker}" is unknown or not installed; there are: {", ".join(available)}')
    accelerator = Accelerator(
        # Without this, several processes on a machine without an accelerator would not know of each other.
        cpu=not torch.accelerator.is_available(),
        # The policy sets the precision: autocast of the trained forward pass alone would change only that pass.
        mixed_precision="no",
        log_with=trackers or None,
        project_dir=project_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )
    kind, parallelism = accelerator.distributed_type, accelerator.parallelism_config
    if kind not in SUPPORTED:
        raise UserError(f"accelerate: {kind.value} is not supported; configs/accelerate/ has the supported launches")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("accelerate: FSDP 1 is not supported: set fsdp_version: 2")
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UserError("accelerate: only the data-parallel sizes of parallelism_config are supported")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("accelerate: set gradient_accumulation_steps to 1; update.batch_size sets the micro-batches")
    return accelerator


class Position(NamedTuple):
    """Where a rank is in its work; times are those of its `time.monotonic`."""

    phase: str = "start"
    since: float = 0.0
    """When the phase began."""
    meetings: int = 0
    """Points at which ranks wait for each other that this rank has come to; all ranks come to the same ones."""
    waits_since: float | None = None
    """When it came to the last one, if it may be waiting there."""


class Processes:
    """The ranks of a run, seen from one of them. All ranks must call the methods whose docstrings say collective."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main = self.rank == 0
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.position = Position(since=time.monotonic())
        """Replaced as a whole, so that another thread may read it."""

    def note(self, phase: str) -> None:
        """Note the phase that begins now. With a sharded model, whose passes all ranks run together, a meeting."""
        now = time.monotonic()
        self.position = Position(phase, now, self.position.meetings + self.sharded, now if self.sharded else None)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Surround work in which this rank may wait for the others. Collective."""
        begun = self.position
        self.position = begun._replace(meetings=begun.meetings + 1, waits_since=time.monotonic())
        try:
            yield
        finally:
            self.position = self.position._replace(waits_since=None)

    def rank_indices(self, total: int) -> list[int]:
        """The indices of this rank's items, of `total`."""
        return list(range(self.rank, total, self.count))

    def padded_rank_indices(self, total: int) -> list[int]:
        """`rank_indices`, with another index repeated at the end where other ranks have one more.

        Then all ranks have equally many, as a sharded model needs: they run each of its passes together.
        """
        return [index % total for index in range(self.rank, -(-total // self.count) * self.count, self.count)]

    def local_slice(self, begin: int, end: int) -> slice:
        """Where the items begin, ..., end - 1 are in `rank_indices`."""
        return slice(-((self.rank - begin) // self.count), -((self.rank - end) // self.count))

    def rank_order(self, total: int) -> Tensor:
        """The place of each of `total` items, int64 (total,), when all ranks' items are concatenated."""
        return torch.tensor([index for rank in range(self.count) for index in range(rank, total, self.count)]).argsort()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks. Collective; tensors must be on the CPU."""
        with self.meeting():
            return gather_object([value])

    def wait(self) -> None:
        """Wait until every rank is here. Collective."""
        self.gather(None)

    def gather_rows(self, rows: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
        """Tensors of all items, from those of every rank's padded items. Collective.

        Args:
            rows: (number of padded items, ...) each, on the CPU; the same names on every rank.
            total: items.

        Returns:
            (total, ...) each.
        """
        count, order = len(self.rank_indices(total)), self.rank_order(total)
        parts = self.gather({name: tensor[:count] for name, tensor in rows.items()})
        return {name: torch.cat([part[name] for part in parts])[order] for name in rows}

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result on every rank. Collective.

        Raises:
            UserError: the function raised it; then every rank raises it.
        """
        result: Any = None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                result = error
        result = self.gather(result)[0]
        if isinstance(result, UserError):
            raise mark_collective(result)
        return result

    def is_collective(self, error: BaseException) -> bool:
        """Whether every rank has raised this error at the same point, so that they can go on together."""
        return self.count == 1 or getattr(error, "collective", False)

    def shard(self, module: nn.Module) -> None:
        """Shard a module in place with FSDP2; one on the meta device stays there. Collective."""
        fsdp2_prepare_model(self.accelerator, module)
        assert isinstance(module, FSDPModule)
        # Weights kept after a forward pass would be stale once the averaged weights are copied in.
        module.set_reshard_after_forward(True)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Wrap (DDP) or shard (FSDP2) a module and its optimiser, as the launcher says. Collective.

        A module from `shard` stays as it is.
        """
        with self.meeting():
            if isinstance(module, FSDPModule):
                return module, self.accelerator.prepare_optimizer(optimizer)
            module, optimizer = self.accelerator.prepare(module, optimizer)
        if isinstance(module, DistributedDataParallel):
            module.broadcast_buffers = False  # they never change
            # Otherwise a forward pass without a backward pass would make the next backward pass average gradients.
            module.require_backward_grad_sync = False
        if isinstance(module, FSDPModule):
            # Weights kept after a forward pass would be stale once the averaged weights are copied in.
            module.set_reshard_after_forward(True)
        return module, optimizer

    @contextmanager
    def backward_pass(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Surround the forward and backward pass of a micro-batch; the update's last one averages the gradients."""
        self.accelerator.sync_gradients = last
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        elif isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = last
        with self.meeting() if last else nullcontext():
            yield
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = False

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a scalar loss."""
        self.accelerator.backward(loss)

    def clip_gradient(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the norm of all gradients together; the norm before that, a scalar (a DTensor under FSDP2)."""
        return torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, max_norm))

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module that `prepare` was given."""
        return self.accelerator.unwrap_model(module)

    def full_on_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on rank 0, sharded ones complete and on the CPU; {} on the others. Collective."""
        result = {}
        with self.meeting():
            for name, tensor in tensors.items():
                full = full_tensor(tensor)
                if self.is_main:
                    result[name] = full if full is tensor else full.cpu()
        return result


class FailedElsewhere(RuntimeError):
    """Another process has failed, and prints its own error."""


Error = TypeVar("Error", bound=BaseException)


def mark_collective(error: Error) -> Error:
    """Mark an error that every rank raises at the same point."""
    error.collective = True  # type: ignore[attr-defined]
    return error


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor of one that may be sharded. Collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_begin(tensor: Tensor) -> int:
    """The first row of this rank's part of a tensor that may be sharded by rows."""
    if not isinstance(tensor, DTensor) or not tensor.ndim:
        return 0
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    places = zip(tensor.placements, coordinate, mesh.shape, strict=True)
    return sum(place * -(-len(tensor) // count) for placement, place, count in places if placement.is_shard())


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A complete tensor, sharded as the other one is, if it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def override_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside it `state_dict` of the module and of its children has these tensors in place of its own.

    Args:
        tensors: by their names in the module.
    """

    def override(part: nn.Module, place: str) -> RemovableHandle:
        own = {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}

        def replace(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            state.update({prefix + name: tensor.detach() for name, tensor in own.items()})

        return part.register_state_dict_post_hook(replace)

    handles = [override(module, ""), *(override(child, f"{name}.") for name, child in module.named_children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
