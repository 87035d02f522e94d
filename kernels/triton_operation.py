"""Registration of Triton kernels as torch operations, and their launch.

An `Operation` is registered with `torch.library`, so that a compiler can trace it. Eager calls on plain tensors skip
torch's dispatcher, which takes the host longer than the rest of the call.
"""

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
PLAIN = frozenset({Tensor, torch.nn.Parameter, float, int, bool, str, torch.dtype, type(None)})


class Operation:
    """A function that launches kernels, registered as the operation `fastflowgrpo::name`.

    The function's annotations are the schema. Where they say Tensor, a call may pass one number for all rows. With
    `keep` and `gradient` the first result is differentiable, once, in the first argument.

    Args:
        name: name of the operation.
        function: computes the results.
        fake: makes empty results from the same arguments.
        keep: returns what the gradient needs from `(arguments, results)`.
        gradient: computes the gradient of the first argument from `(*kept, upstream)`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        keep: Callable[..., tuple[Any, ...]] | None = None,
        gradient: Callable[..., Tensor] | None = None,
    ) -> None:
        *hints, _ = get_type_hints(function).values()
        self.is_tensor = [hint in (Tensor, Tensor | None) for hint in hints]
        self.function = function
        # the interpreter's kernels cannot be traced, so there the operation is opaque
        make: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
        self.registered = make(f"fastflowgrpo::{name}", function, mutates_args=())
        self.registered.register_fake(fake)
        self.direct: Any = None
        if keep is not None and gradient is not None:
            self._differentiate(keep, gradient)

    def _differentiate(self, keep: Callable[..., tuple[Any, ...]], gradient: Callable[..., Tensor]) -> None:
        function, constants = self.function, [None] * (len(self.is_tensor) - 1)

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            values = (output[0], *keep(inputs, output))
            ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
            ctx.numbers = [None if isinstance(value, Tensor) else value for value in values]

        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            pairs = zip(ctx.saved_tensors, ctx.numbers, strict=True)
            result, *kept = (number if tensor is None else tensor for tensor, number in pairs)
            value = gradient(*kept, upstream)
            return _NoSecondDerivative.apply(value, result, upstream) if torch.is_grad_enabled() else value

        # autograd inspects each argument for half a microsecond: all but the first are passed as one tuple
        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, first: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, ...]:
                output = function(first, *rest)
                save(ctx, (first, *rest), output)
                return output

            @staticmethod
            def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor, None]:
                return backward(ctx, upstream), None

        self.direct = Direct.apply
        self.registered.register_autograd(
            lambda ctx, upstream, *_: (backward(ctx, upstream), *constants), setup_context=save
        )

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        if is_eager(first, *rest):
            if self.direct is not None and first.requires_grad and torch.is_grad_enabled():
                return self.direct(first, rest)
            return self.function(first, *rest)
        operands = [
            as_rows(value, first) if is_tensor and value is not None else value
            for value, is_tensor in zip(rest, self.is_tensor[1:], strict=True)
        ]
        return self.registered(first if self.direct is not None else first.detach(), *operands)


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient whose derivative raises an error, so that it is never silently zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *dependencies: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError('Triton\'s step and loss have no second derivative: use backend="reference"')


def is_eager(*values: Any) -> bool:
    """Whether this is a plain eager call: no compiler, tracer or tensor subclass is involved."""
    if not _eager():
        return False
    for value in values:  # noqa: SIM110  a generator takes twice the time
        if type(value) not in PLAIN:
            return False
    return True


def _eager() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def as_rows(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor (B,): a compiler would pass a Python float to the kernel as float64."""
    if isinstance(value, Tensor):
        return value.detach()
    dtype = torch.float32 if isinstance(value, (float, torch.SymFloat)) else torch.int64
    return torch.full((like.shape[0],), value, dtype=dtype, device=like.device)


def launch(kernel: Any, programs: int, like: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs a kernel on the device of `like`, in a way that a compiler can trace."""
    if not INTERPRETED and not _eager():
        kernel = torch.library.wrap_triton(kernel)
    elif like.is_cuda and like.get_device() != torch.cuda.current_device():
        with torch.cuda.device(like.device):  # Triton launches on the current device
            kernel[(programs,)](*arguments, **options)
        return
    kernel[(programs,)](*arguments, **options)
