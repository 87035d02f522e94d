"""Scoring in the background: while a batch is sampled, the batches before it are decoded, copied and scored."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.prompts.images import source_images
from fastflowgrpo.scoring.contract import RewardBatch, Scores, checked_scores
from fastflowgrpo.scoring.weighted import WeightedRewards

MAX_BATCHES_IN_FLIGHT = 2  # `submit` waits while so many batches are not scored yet, unless told otherwise
REMINDER_SECONDS = 60.0  # between two messages about a reward that has not answered


class Scoring:
    """Scores batches of latents in the background; each reward has a thread, and all rewards score a batch at once.

    On a GPU the latents are decoded on one stream and the images copied to pinned memory on another, so that neither
    waits for the rollout or delays it. A reward whose attribute `device` is the device of the images gets them there,
    on a GPU with a stream for this reward. The other rewards get the copy.

    If a reward raises an exception, or returns something else than one number per image, the scores of the batch are
    missing (NaN), and each different error is printed once. A UserError ends the scoring, because the user has to
    change something; so does an exception that is no `Exception`, such as KeyboardInterrupt.

    Args:
        rewards: what to score with.
        decode: from latents (B, ...) to uint8 images (B, 3, h, w), or videos (B, F, 3, h, w), on the same device.
        device: of the latents.
        frames: number of frames of a video that are scored: the video is cut into as many equal parts, and the middle
            frame of each part is scored.
        max_in_flight: `submit` waits while so many batches are not scored yet.
    """

    def __init__(
        self,
        rewards: WeightedRewards,
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        frames: int = 1,
        max_in_flight: int = MAX_BATCHES_IN_FLIGHT,
    ):
        self.rewards, self.frames, self.max_in_flight = rewards, frames, max_in_flight
        self.decode = lambda latents: self._scored_frames(decode(latents))
        self.threads = {name: _RewardThread(name, reward, device) for name, reward in rewards.rewards.items()}
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None
        self.in_flight: deque[tuple[dict[str, Future[Scores]], _Events | None]] = deque()
        self.done: list[Scores] = []

    def submit(self, latents: Tensor, prompts: Sequence[Prompt], images_per_prompt: int) -> Tensor:
        """Start to score `images_per_prompt` images of each prompt; waits while `max_in_flight` batches are not.

        Returns:
            The images on the CPU, or of each video the middle one of the scored frames. On a GPU they are complete only
            when `finish` has returned.
        """
        while len(self.in_flight) >= self.max_in_flight:
            self._wait_for_oldest()
        images, host, events = self._decoded(latents)
        sources = source_images(prompts, *images.shape[-2:])
        rows = [i for i in range(len(prompts)) for _ in range(images_per_prompt)]
        batch = RewardBatch(
            host,
            [prompts[i].text for i in rows],
            [prompts[i].metadata for i in rows],
            torch.arange(len(prompts)).repeat_interleave(images_per_prompt),
            [sources[i] for i in rows] if sources else None,
        )
        futures = {
            name: thread.score(replace(batch, images=images) if thread.on_device else batch, events)
            for name, thread in self.threads.items()
        }
        self.in_flight.append((futures, events))
        return host if host.ndim == 4 else host[:, host.shape[1] // 2]

    def finish(self, show: Callable[[str], object] = lambda unfinished: None, leave: int = 0) -> Scores:
        """Wait for the scores of all images since the last call, and return them in the order of their submission.

        Args:
            show: called with the names of the rewards that have not answered yet.
            leave: so many batches, the last ones, are left for the next call.

        Raises:
            UserError: a reward raised it, because the user has to change something.
        """
        while len(self.in_flight) > leave:
            show(_unfinished(self.in_flight[0][0]))
            self._wait_for_oldest()
        count = len(self.done) + len(self.in_flight) - leave
        scores, self.done = Scores.cat(self.done[:count]), self.done[count:]
        return scores

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Wait for the batches in flight; inside it `finish` does not return their scores.

        Other threads may then call the same rewards.
        """
        while self.in_flight:
            self._wait_for_oldest()
        aside, self.done = self.done, []
        try:
            yield
        finally:
            self.done = aside

    def _wait_for_oldest(self) -> None:
        """Wait for the scores of the oldest batch in flight."""
        futures, events = self.in_flight.popleft()
        if events is not None:
            events[1].synchronize()  # if all rewards are on the GPU, none of them waits for the copy
        seconds, unfinished = 0.0, set(futures.values())
        while unfinished:
            done, unfinished = wait(unfinished, REMINDER_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises the exceptions that end the run
            if unfinished and not done:
                seconds += REMINDER_SECONDS
                tqdm.write(f"waiting for the reward {_unfinished(futures)} for {seconds:.0f} s")
        self.done.append(self.rewards.weighted({name: future.result() for name, future in futures.items()}))

    def _scored_frames(self, images: Tensor) -> Tensor:
        """Choose the frames of videos that are scored; images stay as they are."""
        if images.ndim == 4:
            return images
        count = images.shape[1]
        wanted = min(self.frames, count)
        return torch.stack([images[:, (2 * i + 1) * count // (2 * wanted)] for i in range(wanted)], 1)

    def _decoded(self, latents: Tensor) -> tuple[Tensor, Tensor, "_Events | None"]:
        """Start to decode the latents: returns the images, their copy on the CPU, and events after each."""
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


_Events = tuple[torch.cuda.Event, torch.cuda.Event]  # the images are decoded, and copied to the CPU


def _unfinished(futures: dict[str, Future[Scores]]) -> str:
    return ", ".join(name for name, future in futures.items() if not future.done())


class _RewardThread:
    """A daemon thread that calls one reward, batch after batch. An interrupted run does not wait for it."""

    def __init__(self, name: str, reward: Callable[[RewardBatch], Any], device: torch.device):
        self.name, self.reward, self.device = name, reward, device
        wanted = getattr(reward, "device", None) or "cpu"
        try:
            self.on_device = is_same_device(wanted, device)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"rewards.{name}: its attribute device is {wanted!r}, not a device") from error
        self.stream = torch.cuda.Stream(device) if self.on_device and device.type == "cuda" else None
        self.printed_reasons: set[str] = set()
        # Beside a rollout on the CPU a reward computes with one thread: with more OpenMP threads than cores, those of
        # the rollout would sleep at every barrier. get_num_threads fixes the number for the calling thread, so it is
        # called even where the result is not used.
        num_threads = torch.get_num_threads()
        self.num_threads = 1 if device.type == "cpu" else num_threads
        self.queue: SimpleQueue[tuple[Future[Scores], RewardBatch, _Events | None]] = SimpleQueue()
        threading.Thread(target=self._run, name=f"reward {name}", daemon=True).start()

    def score(self, batch: RewardBatch, events: _Events | None) -> "Future[Scores]":
        """Queue a batch; `events` tell when its images are there, None if they are there already."""
        future: Future[Scores] = Future()
        self.queue.put((future, batch, events))
        return future

    @torch.no_grad()
    def _run(self) -> None:
        torch.set_num_threads(self.num_threads)  # for this thread only
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread starts with GPU 0
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
        """Wait for the images where the reward gets them, and call it."""
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
        """Return missing scores; print the reason if it is new."""
        reason, count = str(error).removeprefix(f"reward {self.name}: "), len(batch.prompts)
        if reason not in self.printed_reasons:
            self.printed_reasons.add(reason)
            origin = "".join(traceback.format_exception(error.__cause__ or error))
            tqdm.write(f"{origin}reward {self.name}: {count} images not scored: {reason} (printed once)")
        return Scores.missing(count, reason)

    def _checked(self, batch: RewardBatch) -> Scores:
        """Call the reward. A reward without the attribute `videos` is called for each frame of videos; the scores are
        then the means over the frames."""
        if batch.images.ndim == 4 or getattr(self.reward, "videos", False):
            return checked_scores(self.name, self.reward, batch)
        frames = [replace(batch, images=frame) for frame in batch.images.unbind(1)]
        scores = Scores.cat([checked_scores(self.name, self.reward, frame) for frame in frames])
        values, *details = (
            value.view(len(frames), -1).mean(0)  # NaN if one frame's score is
            for value in (scores.values, *scores.details.values())
        )
        return Scores(values, dict(zip(scores.details, details, strict=True)), scores.error)


def is_same_device(one: torch.device | str, other: torch.device | str) -> bool:
    """Whether two devices are the same; "cuda" is the current GPU."""

    def key(device: torch.device) -> tuple[str, int]:
        current = torch.cuda.current_device() if device.type == "cuda" and device.index is None else 0
        return device.type, current if device.index is None else device.index

    return key(torch.device(one)) == key(torch.device(other))
