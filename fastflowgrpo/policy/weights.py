"""What the saved weights are called; diffusers pipelines load both kinds."""

from pathlib import Path

LORA, LORA_2 = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"
"""Files of the LoRA adapters of a transformer, and of a second one. They lie side by side: in a folder within the
folder, a file of the same name would not be found by diffusers, which looks for the outer one first."""
FULL, FULL_2 = "transformer", "transformer_2"
"""Folders of transformers that were trained in full, by the names of the pipeline's components."""
LORA_OF = {FULL: LORA, FULL_2: LORA_2}
"""File of the LoRA of each component."""


def holds_weights(folder: Path) -> bool:
    """Return whether `Policy.save` has written its weights into a folder."""
    return (folder / LORA).is_file() or (folder / FULL / "config.json").is_file()
