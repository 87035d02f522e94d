"""A pretended GPU: tensors of the CPU that say that they are on `cuda:0`, with the errors and races of a real one.

The place of a tensor is kept on its storage, so views share it. Every operation of torch is checked, also those of
the backward pass.
"""

import threading
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support import happens_before
from support.happens_before import Block, Order
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")
"""Operations whose result the host needs, at least its shape."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


class _Thread(threading.local):
    makes_tensors = False
    """Whether new tensors are on the device though no device is named, as inside a backward pass."""


class FakeGpu:
    """The device: inside `active`, which each thread enters for itself, tensors can be made on it.

    `races` are conflicting accesses that nothing orders, and `errors` what a GPU refuses or what makes the host wait
    inside `step_loop`. Both are also raised, where no other thread hides them.
    """

    def __init__(self, monkeypatch: Any, pipeline: Any, may_wait: Collection[str] = ()):
        self.may_wait = may_wait  # known functions, as module.function
        self.order = Order()
        self.races = self.order.races
        self.errors: list[str] = []
        self.in_step_loop = False
        self.thread = _Thread()
        happens_before.install(self.order, monkeypatch, pipeline)
        autocast = torch.autocast
        monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kw: autocast("cpu", *args, **kw))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: block_of(tensor).record_stream(stream))

    @contextmanager
    def active(self) -> Iterator[None]:
        with _Operations(self), _Calls(self):
            yield

    @contextmanager
    def step_loop(self) -> Iterator[None]:
        """Inside it the host must not wait for the device."""
        self.in_step_loop = True
        try:
            yield
        finally:
            self.in_step_loop = False

    def fail(self, error: str) -> None:
        self.errors.append(error)
        raise AssertionError(error)

    def wait(self, reason: object) -> None:
        """Let the host wait for the current stream."""
        if self.in_step_loop and self._caller() not in self.may_wait:
            self.fail(f"the host waits in a step loop: {reason}")
        self.order.stream.synchronize()

    @staticmethod
    def _caller() -> str:
        """The function that called torch, as module.function."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        frame = next(frame for frame in reversed(frames) if frame.filename != __file__)
        return f"{Path(frame.filename).stem}.{frame.name}"

    def place(self, tensor: Tensor, place: str) -> None:
        """Give a tensor's memory a place: "cuda" or "pinned"."""
        tensor.untyped_storage().block = Block(self.order, place, tuple(tensor.shape))


def block_of(tensor: Tensor) -> Block | None:
    """The block of a tensor's memory, None for usual memory of the host."""
    return getattr(tensor.untyped_storage(), "block", None)


def on_gpu(tensor: Tensor) -> bool:
    block = block_of(tensor)
    return block is not None and block.place == "cuda"


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


class _Operations(TorchDispatchMode):
    """Checks the operations that torch runs: devices, waits, and the accesses to memory."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu, name = self.gpu, func.overloadpacket.__name__
        tensors = list(tensors_of((*args, *kwargs.values())))
        places = {on_gpu(tensor) for tensor in tensors if tensor.ndim or on_gpu(tensor)}
        gpu_called = True in places or (not tensors and gpu.thread.makes_tensors)
        # Indexing takes indices of the CPU, and then copies them while the host waits.
        if len(places) == 2 and name not in ("copy_", "_to_copy"):
            if name not in INDEXING:
                gpu.fail(f"{func} has tensors on different devices")
            gpu.wait(f"{func} with indices on the CPU")
        output = func(*args, **kwargs)
        if any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns):
            return output  # a view
        if gpu_called:
            for tensor in tensors_of((output,)):
                if block_of(tensor) is None:
                    gpu.place(tensor, "cuda")
        self._access(func, args, kwargs, tensors, output, by_host=not gpu_called)
        blocking = name == "copy_" and len(places) == 2 and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        by_mask = name in INDEXING and any(index.dtype == torch.bool for index in args[1] if index is not None)
        if gpu_called and (name in WAITS or blocking or by_mask):
            gpu.wait(func)
        return output

    def _access(self, func, args, kwargs, tensors, output, by_host) -> None:
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info and argument.alias_info.is_write
        ]
        written += [value for name, value in kwargs.items() if name.startswith("out")]
        results = tensors_of((*written, output))
        reads, writes = ([block for t in part if (block := block_of(t))] for part in (tensors, results))
        if reads or writes:
            self.gpu.order.access(reads, writes, by_host)


class _Calls(TorchFunctionMode):
    """Answers for the device where Python asks, makes tensors there, and moves them."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        attribute = getattr(func, "__self__", None)
        if attribute in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu) and on_gpu(args[0]):
            return {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}[attribute]
        if func is Tensor.get_device and on_gpu(args[0]):
            return CUDA.index
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and on_gpu(args[0]):
            self.gpu.wait(func)
        if func in MOVES:
            return self._move(func, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        device = kwargs.get("device")
        wanted = device is not None and torch.device(device).type == "cuda"
        if wanted:
            kwargs["device"] = "cpu"
        thread = self.gpu.thread
        outer, thread.makes_tensors = thread.makes_tensors, device is None and any(map(on_gpu, tensors_of(args)))
        try:
            made = func(*args, **kwargs)
        finally:
            thread.makes_tensors = outer
        if wanted or pinned:
            if func in (torch.tensor, torch.as_tensor):
                self.gpu.wait(f"{func} copies numbers to the device")
            self.gpu.place(made, "cuda" if wanted else "pinned")
        elif device is not None and on_gpu(made):  # such as zeros_like(tensor, device="cpu")
            made.untyped_storage().block = None
        return made

    def _move(self, func, args, kwargs) -> Tensor:
        source, *rest = args
        like = [value for value in rest if isinstance(value, Tensor)]
        named = [value for value in (*rest, kwargs.get("device")) if isinstance(value, (str, int, torch.device))]
        named = [torch.device(value) for value in named if not isinstance(value, bool)]
        goes = on_gpu(like[0]) if like else named[0].type == "cuda" if named else on_gpu(source)
        goes = func is Tensor.cuda or (goes and func is not Tensor.cpu)

        def on_cpu(value: Any) -> Any:
            is_device = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
            return "cpu" if is_device else value

        rest, kwargs = tree_map(on_cpu, (rest, kwargs))
        if goes == on_gpu(source):
            return func(source, *rest, **kwargs) if func is Tensor.to else source
        with torch.utils._python_dispatch._disable_current_modes():
            moved = Tensor.to(source, *rest, **kwargs) if func is Tensor.to else source
            if moved.untyped_storage()._cdata == source.untyped_storage()._cdata:
                moved = moved.clone()
        non_blocking = kwargs.get("non_blocking", False) or True in [value for value in rest if value is True][:1]
        if goes:
            self.gpu.place(moved, "cuda")
        blocks = [[block for block in [block_of(tensor)] if block] for tensor in (source, moved)]
        self.gpu.order.access(*blocks)
        if not (goes and non_blocking):
            self.gpu.wait(f"a copy {'to' if goes else 'from'} the device")
        return moved
