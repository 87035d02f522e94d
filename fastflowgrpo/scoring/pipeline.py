"""Scoring behind the rollout: while a batch is sampled, those before it are decoded, copied and scored."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores, same_device
from fastflowgrpo.scoring.weighted import WeightedRewards

DEPTH = 2  # batches that may be under way before `submit` waits
REMIND = 60.0  # seconds between two messages about a reward that is awaited


class Scoring:
    """Scores batches of latents, all rewards of a batch at once, each reward in a thread of its own.

    On a GPU the latents are decoded on a stream of their own and the images copied to pinned memory on another, so that
    nothing of it waits for the rollout or holds it up. A reward whose attribute `device` is that of the images gets
    them there, on a GPU with a stream of its own; the others get the copy.

    Where a reward raises an exception, or returns something else than a number per image, the scores of the batch are
    missing (NaN); each different error is printed once. A UserError ends the scoring, since nothing that follows
    could succeed, and so does what is no Exception, such as KeyboardInterrupt.

    Args:
        rewards: what to score with.
        decode: from latents (B, ...) to uint8 images (B, 3, h, w), or videos (B, F, 3, h, w), on the same device.
        device: of the latents.
        frames: of a video that are scored, each the middle one of as many equal parts.
    """

    def __init__(
        self, rewards: WeightedRewards, decode: Callable[[Tensor], Tensor], device: torch.device, frames: int = 1
    ):
        self.rewards, self.frames = rewards, frames
        self.decode = lambda latents: self._scored_frames(decode(latents))
        self.threads = {name: _RewardThread(name, reward, device) for name, reward in rewards.rewards.items()}
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None
        self.under_way: deque[tuple[dict[str, Future[Scores]], _Events | None]] = deque()
        self.done: list[Scores] = []

    def submit(self, latents: Tensor, prompts: Sequence[Prompt], images_per_prompt: int) -> Tensor:
        """Begin to score `images_per_prompt` images of each prompt, once at most DEPTH - 1 batches are still under way.

        Returns:
            The images on the CPU, of a video the middle one of the scored frames; complete when `finish` returns.
        """
        while len(self.under_way) >= DEPTH:
            self._await()
        images, host, events = self._decoded(latents)
        repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        texts, metadata = [prompt.text for prompt in repeated], [prompt.metadata for prompt in repeated]
        group_ids = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
        futures = {
            name: thread.score(RewardBatch(images if thread.on_device else host, texts, metadata, group_ids), events)
            for name, thread in self.threads.items()
        }
        self.under_way.append((futures, events))
        return host if host.ndim == 4 else host[:, host.shape[1] // 2]

    def finish(self, show: Callable[[str], object] = lambda awaited: None) -> Scores:
        """The scores of all images since the last call, in the order in which they were submitted.

        Args:
            show: is told which rewards are awaited.

        Raises:
            UserError: a reward raised it: the user can put something right.
        """
        while self.under_way:
            show(_awaited(self.under_way[0][0]))
            self._await()
        scores, self.done = Scores.cat(self.done), []
        return scores

    def _await(self) -> None:
        futures, events = self.under_way.popleft()
        if events is not None:
            events[1].synchronize()  # no reward waits for the copy if all are on the GPU
        seconds, awaited = 0.0, set(futures.values())
        while awaited:
            done, awaited = wait(awaited, REMIND, FIRST_EXCEPTION)
            for future in done:
                future.result()  # what ends the run does so now
            if awaited and not done:
                seconds += REMIND
                tqdm.write(f"waiting for the reward {_awaited(futures)} for {seconds:.0f} s")
        self.done.append(self.rewards.weighted({name: future.result() for name, future in futures.items()}))

    def _scored_frames(self, images: Tensor) -> Tensor:
        if images.ndim == 4:
            return images
        count = images.shape[1]
        wanted = min(self.frames, count)
        return torch.stack([images[:, (2 * i + 1) * count // (2 * wanted)] for i in range(wanted)], 1)

    def _decoded(self, latents: Tensor) -> tuple[Tensor, Tensor, "_Events | None"]:
        """The images, their copy on the CPU, and when each is there."""
        if self.streams is None:
            images = self.decode(latents)
            return images, images, None
        decoding, copying = self.streams
        decoding.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(decoding):
            images = self.decode(latents)
            latents.record_stream(decoding)
        decoded = decoding.record_event()
        copying.wait_event(decoded)
        host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
        with torch.cuda.stream(copying):
            host.copy_(images, non_blocking=True)
            images.record_stream(copying)
        return images, host, (decoded, copying.record_event())


_Events = tuple[torch.cuda.Event, torch.cuda.Event]


def _awaited(futures: dict[str, Future[Scores]]) -> str:
    return ", ".join(name for name, future in futures.items() if not future.done())


class _RewardThread:
    """Calls one reward, batch after batch. A daemon: a run that is interrupted does not wait for it."""

    def __init__(self, name: str, reward: Callable[[RewardBatch], Any], device: torch.device):
        self.name, self.reward, self.device = name, reward, device
        wanted = getattr(reward, "device", None) or "cpu"
        try:
            self.on_device = same_device(wanted, device)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"rewards.{name}: its attribute device is {wanted!r}, not a device") from error
        self.stream = torch.cuda.Stream(device) if self.on_device and device.type == "cuda" else None
        self.told: set[str] = set()
        # Beside a rollout on the CPU a reward has one thread: where there are more OpenMP threads than cores, those of
        # the rollout sleep at every barrier. To ask for the number settles that of the caller.
        num_threads = torch.get_num_threads()
        self.num_threads = 1 if device.type == "cpu" else num_threads
        self.queue: SimpleQueue[tuple[Future[Scores], RewardBatch, _Events | None]] = SimpleQueue()
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def score(self, batch: RewardBatch, events: _Events | None) -> "Future[Scores]":
        future: Future[Scores] = Future()
        self.queue.put((future, batch, events))
        return future

    @torch.no_grad()
    def _work(self) -> None:
        torch.set_num_threads(self.num_threads)  # of this thread alone
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread begins with GPU 0
        while True:
            future, batch, events = self.queue.get()
            try:
                future.set_result(self._score(batch, events))
            except UserError as error:
                future.set_exception(error)
            except Exception as error:
                future.set_result(self._missing(batch, error))
            except BaseException as error:
                future.set_exception(error)

    def _score(self, batch: RewardBatch, events: _Events | None) -> Scores:
        if events is not None:
            decoded, copied = events
            if self.stream is not None:
                self.stream.wait_event(decoded)
                with torch.cuda.stream(self.stream):
                    batch.images.record_stream(self.stream)
                    return self._checked(batch)
            copied.synchronize()
        return self._checked(batch)

    def _missing(self, batch: RewardBatch, error: Exception) -> Scores:
        """No scores, and the reason printed if it is new."""
        reason, count = str(error).removeprefix(f"reward {self.name}: "), len(batch.prompts)
        if reason not in self.told:
            self.told.add(reason)
            origin = "".join(traceback.format_exception(error.__cause__ or error))
            tqdm.write(f"{origin}reward {self.name}: {count} images not scored: {reason} (said once)")
        return Scores.missing(count, reason)

    def _checked(self, batch: RewardBatch) -> Scores:
        """The reward's scores; of videos, unless it takes these itself, the means over their frames."""
        if batch.images.ndim == 4 or getattr(self.reward, "videos", False):
            return checked_scores(self.name, self.reward, batch)
        frames = [replace(batch, images=frame) for frame in batch.images.unbind(1)]
        scores = Scores.cat([checked_scores(self.name, self.reward, frame) for frame in frames])
        values, *details = (
            value.view(len(frames), -1).mean(0)  # NaN where a frame's is
            for value in (scores.values, *scores.details.values())
        )
        return Scores(values, dict(zip(scores.details, details, strict=True)), scores.error)
