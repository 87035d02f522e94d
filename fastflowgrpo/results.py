"""What every file of results needs: the versions of the packages, and numbers that JSON can hold."""

import math
import platform
from importlib.metadata import version
from typing import Any

from fastflowgrpo import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def versions() -> dict[str, str]:
    """The versions of Python, of this library, and of the packages that the numbers depend on."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "fastflowgrpo": __version__, **packages}


def finite(value: Any) -> Any:
    """The value with None in place of every NaN and infinity, which JSON cannot hold. Looks into nested dicts."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
