"""A prompt and its metadata."""

from dataclasses import dataclass, field
from typing import Any

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and the GenEval metadata that rewards may use, {} for a plain text."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
