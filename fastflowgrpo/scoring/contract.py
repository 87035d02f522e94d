"""What a reward gets and gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastflowgrpo.errors import UserError


@dataclass
class RewardBatch:
    """Images to score; the other fields have one entry per image.

    Attributes:
        images: uint8 (B, 3, H, W), on any device; (B, F, 3, H, W), the scored frames of videos, for a reward whose
            attribute `videos` is true.
        prompts: the text each image was made from.
        metadata: each prompt's GenEval metadata, {} if it has none.
        group_ids: int64 (B,); images of one group share their prompt.
    """

    images: torch.Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    group_ids: torch.Tensor

    def rows(self, rows: slice) -> "RewardBatch":
        """Some of the images."""
        return RewardBatch(self.images[rows], self.prompts[rows], self.metadata[rows], self.group_ids[rows])

    def whole_groups(self, size: int) -> list[slice]:
        """Consecutive rows that hold whole groups, `size` at most where a group is not larger."""
        ids = self.group_ids.tolist()
        ends = [row for row in range(1, len(ids) + 1) if row == len(ids) or ids[row] != ids[row - 1]]
        slices: list[slice] = []
        begin = last = 0
        for end in ends:
            if end - begin > size and last > begin:
                slices.append(slice(begin, last))
                begin = last
            last = end
        return [*slices, slice(begin, last)] if last else []


@dataclass
class Scores:
    """A reward's answer.

    Attributes:
        values: float32 CPU tensor (B,); NaN marks an image that could not be scored.
        details: further values to report, by name, each float32 (B,).
        error: why the last of the images that could not be scored has no score, "" if that is not known.
    """

    values: torch.Tensor
    details: dict[str, torch.Tensor] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def missing(cls, count: int, error: str) -> "Scores":
        """No score for any of `count` images."""
        return cls(torch.full((count,), torch.nan), error=error)

    @classmethod
    def cat(cls, parts: Sequence["Scores"]) -> "Scores":
        """The parts one after the other; a detail that only some of them have is NaN for the others' images."""
        names = dict.fromkeys(name for part in parts for name in part.details)
        details = {
            name: torch.cat([part.details.get(name, torch.full_like(part.values, torch.nan)) for part in parts])
            for name in names
        }
        error = next((part.error for part in reversed(parts) if part.error), "")
        return cls(torch.cat([part.values for part in parts]), details, error)


Reward = Callable[[RewardBatch], Scores]
"""Attributes that a reward may have:

- `pointwise`, true if each image's score depends on that image alone, so that several processes may share a group;
- `device`, a torch.device or its name, where it wants the images; without one, that is the CPU. It gets them there if
  they were made there, and else on the CPU, so that it has to move them itself;
- `videos`, true if it takes the frames of videos together, (B, F, 3, H, W); others are called for one frame of each
  after another;
- `check_prompts`, called with the run's prompts at its start; raises ValueError if it cannot score one of them.
"""


def same_device(one: torch.device | str, other: torch.device | str) -> bool:
    """Whether two devices or names of devices are the same one: "cuda" is the current GPU."""

    def place(device: torch.device) -> tuple[str, int]:
        current = torch.cuda.current_device() if device.type == "cuda" and device.index is None else 0
        return device.type, current if device.index is None else device.index

    return place(torch.device(one)) == place(torch.device(other))


def checked_scores(name: str, reward: Callable[[RewardBatch], Any], batch: RewardBatch) -> Scores:
    """What a reward gives for a batch, as the contract has it.

    Raises:
        UserError: the reward raised one; now it names the reward.
        RuntimeError: the reward raised anything else; names the reward and the error.
        TypeError, ValueError: it returned something else than a finite number or NaN per image.
    """
    try:
        output = reward(batch)
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"reward {name}: {type(error).__name__}: {error}") from error
    size, scores = len(batch.prompts), output if isinstance(output, Scores) else Scores(output)
    details = {key: _vector(value, size, f"{name}/{key}") for key, value in scores.details.items()}
    return Scores(_vector(scores.values, size, name), details, scores.error)


def _vector(values: Any, size: int, name: str) -> torch.Tensor:
    """What a reward returned, as a float32 CPU tensor (size,)."""
    try:
        vector = torch.as_tensor(values).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise TypeError(f"reward {name}: expected {size} numbers, one per image, got {kind} ({error})") from error
    if vector.shape != (size,):
        raise ValueError(f"reward {name}: expected {size} numbers, one per image, got shape {tuple(vector.shape)}")
    if vector.isinf().any():
        raise ValueError(f"reward {name}: infinite for image {int(vector.isinf().nonzero()[0])}; NaN marks a failure")
    return vector
