"""The bundled world: a tiny Stable Diffusion 3 pipeline that draws coloured shapes, prompts, and an exact detector."""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
"""Folder of the bundled pipeline, in diffusers' layout."""
