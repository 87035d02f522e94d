"""The bundled world of coloured shapes: a tiny Stable Diffusion 3 pipeline, its prompts, scenes and pretraining.

The detector of the shapes is in `rewards`, beside GenEval's other one.
"""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
"""Folder of the bundled pipeline in diffusers' layout."""
BUNDLED = {"shapes": PIPELINE, "shapes_edit": PIPELINE.with_name("edit_pipeline")}
"""The folders of the bundled pipelines by the names that stand for them in settings."""
