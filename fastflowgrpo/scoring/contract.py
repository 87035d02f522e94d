"""What a reward gets and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastflowgrpo.errors import UserError


@dataclass
class RewardBatch:
    """Images to score; the other fields have one entry per image.

    Attributes:
        images: uint8 (B, 3, H, W), on any device. A reward whose attribute `videos` is true gets the frames of videos,
            uint8 (B, F, 3, H, W).
        prompts: the text each image was made from.
        metadata: each prompt's GenEval metadata, {} if it has none.
        group_ids: int64 (B,); images of one group share their prompt.
        sources: of an editing model, the first source image of each, uint8 (3, H, W) on the CPU; images of one group
            share theirs. None for text-to-image.
    """

    images: torch.Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    group_ids: torch.Tensor
    sources: list[torch.Tensor] | None = None

    def rows(self, rows: slice) -> "RewardBatch":
        """Return a part of the batch."""
        sources = None if self.sources is None else self.sources[rows]
        return RewardBatch(self.images[rows], self.prompts[rows], self.metadata[rows], self.group_ids[rows], sources)

    def whole_groups(self, size: int) -> list[slice]:
        """Cut the batch into slices of whole groups, with at most `size` images unless one group is larger."""
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
    """What a reward returns.

    Attributes:
        values: float32 CPU tensor (B,); NaN marks an image that could not be scored.
        details: further values to report, by name, each float32 (B,).
        error: why the last image with the value NaN could not be scored, "" if that is not known.
    """

    values: torch.Tensor
    details: dict[str, torch.Tensor] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def missing(cls, count: int, error: str) -> "Scores":
        """Scores of `count` images of which none could be scored."""
        return cls(torch.full((count,), torch.nan), error=error)

    @classmethod
    def cat(cls, parts: Sequence["Scores"]) -> "Scores":
        """Concatenate scores; a detail that a part lacks is NaN for that part's images."""
        names = dict.fromkeys(name for part in parts for name in part.details)
        details = {
            name: torch.cat([part.details.get(name, torch.full_like(part.values, torch.nan)) for part in parts])
            for name in names
        }
        error = next((part.error for part in reversed(parts) if part.error), "")
        return cls(torch.cat([part.values for part in parts]), details, error)


Reward = Callable[[RewardBatch], Scores]
"""Attributes that a reward may have:

- `pointwise`: true if the score of an image depends only on that image and its prompt, so that a group may be split
  between processes.
- `device`: the torch.device, or its name, where the reward wants the images; by default the CPU. If the images were
  made on that device, the reward gets them there. Otherwise it gets them on the CPU and has to move them.
- `videos`: true if the reward takes all frames of a video together, (B, F, 3, H, W). Other rewards are called once per
  frame.
- `detect`: called with a RewardBatch; returns for each image a list of what the reward sees on it, to be drawn over the
  image. Each has the attributes `label`, `box` (x0, y0, x1, y1, in pixels), `score`, and `color` (a name or None).
- `check_prompts`: called with the run's prompts when the run starts; raises ValueError if one cannot be scored.
"""


def checked_scores(name: str, reward: Callable[[RewardBatch], Any], batch: RewardBatch) -> Scores:
    """Call a reward, and check and convert what it returns.

    Args:
        name: of the reward, for messages.
        reward: returns `Scores`, or one number per image in a form that `torch.as_tensor` takes.
        batch: the images.

    Raises:
        UserError: the reward raised a UserError; the message now names the reward.
        RuntimeError: the reward raised another exception; names the reward and the exception.
        TypeError, ValueError: the reward did not return one number per image, or a number is infinite.
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
    """Convert what a reward returned to a float32 CPU tensor (size,)."""
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
