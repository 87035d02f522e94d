"""A checker of happens-before: vector clocks over CUDA streams and host threads, and an allocator that reuses at once.

Each stream and each thread counts its operations and knows how much of every other one is complete. An access to memory
is a race unless what it conflicts with is complete for whoever makes the access. Freed memory is written again at once
by the stream that it was allocated on, as soon as torch's allocator may: after the streams that `record_stream` named.
"""

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

Clock = dict[object, int]
"""How many operations of each stream and thread are complete."""


class Order:
    """What is known to be complete on every stream and thread; `races` are the accesses that broke it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a block can be freed at any point of its thread
        self.clocks: dict[object, Clock] = {}
        self.local = threading.local()
        self.default = Stream(self, "the main stream")
        self.races: list[str] = []

    @property
    def stream(self) -> "Stream":
        """The current stream of this thread."""
        return getattr(self.local, "stream", self.default)

    @contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        """Make a stream the current one of this thread."""
        previous, self.local.stream = self.stream, stream
        try:
            yield
        finally:
            self.local.stream = previous

    def clock(self, actor: object = None) -> Clock:
        """The clock of a stream, or of this thread."""
        return self.clocks.setdefault(threading.get_ident() if actor is None else actor, {})

    def join(self, actor: object, other: Clock) -> None:
        """Let a stream, or this thread, wait until all that `other` counts is complete."""
        with self.lock:
            clock = self.clock(actor)
            for key, count in other.items():
                clock[key] = max(count, clock.get(key, 0))

    def access(self, reads: "list[Block]", writes: "list[Block]", by_host: bool = False) -> None:
        """Read and write blocks with an operation of the current stream, or of this thread itself."""
        with self.lock:
            actor: object = threading.get_ident() if by_host else self.stream
            self.join(actor, self.clock())  # a stream begins what a thread has launched
            clock = self.clock(actor)
            clock[actor] = clock.get(actor, 0) + 1
            for block in reads:
                self.check(f"{actor} reads", block, clock, block.write)
                block.reads[actor] = clock[actor]
            for block in writes:
                self.check(f"{actor} writes", block, clock, block.write | block.reads)
                block.write, block.reads = {actor: clock[actor]}, {}

    def free(self, block: "Block") -> None:
        """Reuse a block's memory."""
        with self.lock:
            clock = dict(self.clock(block.stream))
            for other in (self.clock(), *block.recorded):
                clock |= {key: max(count, clock.get(key, 0)) for key, count in other.items()}
            self.check(f"{block.stream} reuses", block, clock, block.write | block.reads)

    def check(self, access: str, block: "Block", clock: Clock, earlier: Clock) -> None:
        for actor, count in earlier.items():
            if clock.get(actor, 0) < count:
                self.races.append(f"{access} {block} while {actor} uses it")


class Block:
    """Memory of the device or pinned memory of the host; freed with the last tensor that has it."""

    def __init__(self, order: Order, place: str, size: object):
        self.order, self.place, self.size = order, place, size
        self.stream = order.stream
        self.write: Clock = {}
        self.reads: Clock = {}
        self.recorded: list[Clock] = []

    def record_stream(self, stream: "Stream") -> None:
        self.recorded.append(self.order.clock(stream))  # all that it will have been given when the block is freed

    def __str__(self) -> str:
        return f"{self.place} memory {self.size}"

    def __del__(self) -> None:
        if self.place == "cuda":  # torch's allocator of pinned memory waits for the copies by itself
            self.order.free(self)


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, order: Order, name: str):
        self.order, self.name = order, name

    def __str__(self) -> str:
        return self.name

    def wait_stream(self, other: "Stream") -> None:
        self.order.join(self, self.order.clock(other))

    def wait_event(self, event: "Event") -> None:
        self.order.join(self, event.clock)

    def record_event(self) -> "Event":
        return Event(self.order, dict(self.order.clock(self)))

    def synchronize(self) -> None:
        self.order.join(None, self.order.clock(self))


class Event:
    """Stands in for torch.cuda.Event, recorded."""

    def __init__(self, order: Order, clock: Clock):
        self.order, self.clock = order, clock

    def synchronize(self) -> None:
        self.order.join(None, self.clock)


def install(order: Order, monkeypatch: Any, pipeline: Any) -> None:
    """Replace the streams of torch.cuda, and the queues and futures between threads of the scoring pipeline."""

    class Queue:
        def __init__(self) -> None:
            self.items: SimpleQueue[Any] = SimpleQueue()

        def put(self, item: object) -> None:
            self.items.put((item, dict(order.clock())))

        def get(self) -> Any:
            item, clock = self.items.get()
            order.join(None, clock)
            return item

    class Future(futures.Future):
        def set_result(self, result: Any) -> None:
            self.clock = dict(order.clock())
            super().set_result(result)

        def set_exception(self, exception: BaseException | None) -> None:
            self.clock = dict(order.clock())
            super().set_exception(exception)

        def result(self, timeout: float | None = None) -> Any:
            try:
                return super().result(timeout)
            finally:
                order.join(None, self.clock)

    count = iter(range(100))
    monkeypatch.setattr(pipeline, "SimpleQueue", Queue)
    monkeypatch.setattr(pipeline, "Future", Future)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(order, f"stream {next(count)}"))
    monkeypatch.setattr(torch.cuda, "stream", order.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: order.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
