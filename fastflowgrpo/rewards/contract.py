"""What a reward gets and gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class RewardBatch:
    """Images to score; the other fields have one entry per image.

    Attributes:
        images: uint8 (B, 3, H, W), on any device.
        prompts: the text each image was made from.
        metadata: each prompt's GenEval metadata, {} if it has none.
        group_ids: int64 (B,); images of one group share their prompt.
    """

    images: torch.Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    group_ids: torch.Tensor


@dataclass
class Scores:
    """A reward's answer.

    Attributes:
        values: float32 CPU tensor (B,); NaN marks an image that could not be scored.
        details: further values to report, by name, each float32 (B,).
    """

    values: torch.Tensor
    details: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def cat(cls, parts: Sequence["Scores"]) -> "Scores":
        """The parts one after the other; a detail that only some of them have is NaN for the others' images."""
        names = dict.fromkeys(name for part in parts for name in part.details)
        details = {
            name: torch.cat([part.details.get(name, torch.full_like(part.values, torch.nan)) for part in parts])
            for name in names
        }
        return cls(torch.cat([part.values for part in parts]), details)


Reward = Callable[[RewardBatch], Scores]
