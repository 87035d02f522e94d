"""The bundled world of coloured shapes: a tiny Stable Diffusion 3 pipeline, its prompts, scenes and pretraining.

The detector of the shapes is in `rewards`, beside GenEval's other one.
"""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
"""Folder of the bundled pipeline in diffusers' layout."""
