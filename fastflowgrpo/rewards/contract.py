"""What a reward gets and gives."""

from collections.abc import Callable
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


Reward = Callable[[RewardBatch], Scores]
