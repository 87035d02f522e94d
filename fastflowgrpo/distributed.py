"""Several processes (ranks), one per device: which groups each samples, and all that they tell each other.

Of `total` things rank r of R has r, r + R, r + 2 R, ...: no two ranks' counts differ by more than one, in any run of
consecutive things either, such as the groups of one optimiser update.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastflowgrpo.errors import UserError
from fastflowgrpo.scoring.contract import Scores

# How long ranks wait for one another, who may wait for a reward server; who fails is brought down by the launcher.
TIMEOUT = timedelta(hours=2)
T = TypeVar("T")


def make_accelerator(trackers: list[str], project_dir: str) -> Accelerator:
    """The accelerator of a training run or an evaluation, as its launcher says.

    Raises:
        UserError: it was launched in a way that neither supports.
    """
    accelerator = Accelerator(
        # Without this several processes on a machine without an accelerator would not know of each other.
        cpu=not torch.accelerator.is_available(),
        # Precision is the policy's: autocast around the trained forward pass alone would set the reference's apart.
        mixed_precision="no",
        log_with=trackers or None,
        project_dir=project_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )
    kind, parallelism = accelerator.distributed_type, accelerator.parallelism_config
    if kind not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    ):
        raise UserError(f"accelerate: {kind.value} is not supported; configs/accelerate/ has what is")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("accelerate: FSDP 1 is not supported: set fsdp_version: 2")
    if kind == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage > 2:
        raise UserError("accelerate: ZeRO-3 is not supported: use configs/accelerate/fsdp2.yaml")
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise UserError("accelerate: of parallelism_config only the data-parallel sizes are supported")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("accelerate: set gradient_accumulation_steps to 1: micro-batches are update.batch_size's")
    return accelerator


class Processes:
    """The ranks of a run, seen from one of them. A method is collective where it says so: all ranks must call it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.steps_in_backward = accelerator.distributed_type == DistributedType.DEEPSPEED

    def rank_indices(self, total: int) -> list[int]:
        """Which of `total` things are this rank's."""
        return list(range(self.rank, total, self.count))

    def padded_rank_indices(self, total: int) -> list[int]:
        """`own`, and at its end another rank's thing where others have one more: the same number on every rank, so that
        the passes through a sharded model are as many."""
        return [index % total for index in range(self.rank, -(-total // self.count) * self.count, self.count)]

    def local_slice(self, begin: int, end: int) -> slice:
        """Where in `own` those from begin to end are."""
        return slice(-((self.rank - begin) // self.count), -((self.rank - end) // self.count))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks. Collective; tensors must be on the CPU."""
        return gather_object([value])

    def gather_scores(self, scores: Scores, total: int, images_per_prompt: int) -> Scores:
        """Scores of all `total` prompts' images, from those of every rank's padded prompts. Collective."""
        count = len(self.rank_indices(total)) * images_per_prompt
        details = {name: values[:count] for name, values in scores.details.items()}
        joined = Scores.cat(self.gather(Scores(scores.values[:count], details, scores.error)))
        rows = (self._order(total)[:, None] * images_per_prompt + torch.arange(images_per_prompt)).flatten()
        details = {name: values[rows] for name, values in joined.details.items()}
        return Scores(joined.values[rows], details, joined.error)

    def gather_rows(self, rows: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
        """Tensors (total, ...) on the CPU, from those of every rank's `padded` things of the same names. Collective."""
        count, order = len(self.rank_indices(total)), self._order(total)
        parts = self.gather({name: tensor[:count] for name, tensor in rows.items()})
        return {name: torch.cat([part[name] for part in parts])[order] for name in rows}

    def _order(self, total: int) -> Tensor:
        """Where each of `total` things is among every rank's own, one rank after the other."""
        return torch.tensor([index for rank in range(self.count) for index in range(rank, total, self.count)]).argsort()

    def on_main(self, function: Callable[[], T]) -> T:
        """What it returns on rank 0, where it is called; the UserError that it may raise there is raised everywhere.
        Collective."""
        result: Any = None
        if self.rank == 0:
            try:
                result = function()
            except UserError as error:
                result = error
        result = self.gather(result)[0]
        if isinstance(result, UserError):
            raise mark_collective(result)
        return result

    def is_collective(self, error: BaseException) -> bool:
        """Whether every rank has raised an error here, so that they can still do something together."""
        return self.count == 1 or getattr(error, "collective", False)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[nn.Module, Any]:
        """The module and its optimiser, as the launcher would have them: wrapped (DDP, DeepSpeed) or sharded (FSDP2).
        Collective.

        Args:
            max_norm: that DeepSpeed, which steps by itself, clips gradients to.
        """
        if self.steps_in_backward:
            # The batch size is for its log alone.
            self.accelerator.deepspeed_plugin.deepspeed_config |= {
                "gradient_clipping": max_norm,
                "train_micro_batch_size_per_gpu": 1,
            }
        module, optimizer = self.accelerator.prepare(module, optimizer)
        if isinstance(module, DistributedDataParallel):
            module.broadcast_buffers = False  # in every forward pass; they never change
            # Else a forward pass without a backward one would have the next averaged, be that an update's last or not.
            module.require_backward_grad_sync = False
        if isinstance(module, FSDPModule):
            # What stayed whole after a forward pass would be stale once the averaged weights are copied in.
            module.set_reshard_after_forward(True)
        return module, optimizer

    @contextmanager
    def backward_pass(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; in an update's last the gradients are averaged over
        the ranks."""
        self.accelerator.sync_gradients = last
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        elif isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = last
        yield
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = False

    def full_on_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the tensors, those that are sharded whole and on the CPU; {} elsewhere. Collective."""
        found = {}
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if self.rank == 0:
                found[name] = complete if complete is tensor else complete.cpu()
        return found


class FailedElsewhere(RuntimeError):
    """Another process has failed, and says why itself."""


Error = TypeVar("Error", bound=BaseException)


def mark_collective(error: Error) -> Error:
    """Marks an error that every rank raises at the same point."""
    error.collective = True  # type: ignore[attr-defined]
    return error


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, whole. Collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded where the other one is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def override_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside it the module's `state_dict` has these tensors in place of its own of the same names."""

    def replace(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update({prefix + name: tensor.detach() for name, tensor in tensors.items()})

    handle = module.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()
