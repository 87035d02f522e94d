"""What the saved weights are called; diffusers pipelines load both kinds."""

from pathlib import Path

LORA = "pytorch_lora_weights.safetensors"
"""File of a LoRA adapter."""
FULL = "transformer"
"""Folder of a transformer that was trained in full."""


def holds_weights(folder: Path) -> bool:
    """Return whether `Policy.save` has written its weights into a folder."""
    return (folder / LORA).is_file() or (folder / FULL / "config.json").is_file()
