"""Exporting a checkpoint: the LoRA as another tool reads it, or a whole pipeline with the trained weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from fastflowgrpo.config import read_run
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.lora_export import Lora, comfyui, kohya, merge, read_lora
from fastflowgrpo.policy.weights import FULL, LORA, LORA_2, LORA_OF, holds_weights
from fastflowgrpo.runs.files import atomic_write
from fastflowgrpo.shapes import BUNDLED

LAYOUTS: dict[str, Callable[[str, Lora], dict[str, Tensor]]] = {"comfyui": comfyui, "kohya": kohya}
MAX_SHARD_SIZE = "10GB"


def export(run: Path, checkpoint: Path, form: str, output: Path, dtype: str | None = None) -> None:
    """Write the trained weights of a checkpoint for another tool.

    Args:
        run: directory of the run.
        checkpoint: folder of one of its checkpoints, or `raw` in it.
        form: "diffusers", "comfyui", "kohya" or "merged".
        output: the file that is written, .safetensors; a second transformer has a file NAME_2 beside it. For "merged"
            the folder.
        dtype: of the transformer of "merged", by default bfloat16. A LoRA is float32, as it was trained.

    Raises:
        UserError: the checkpoint has no such weights, the format does not suit the model, or `output` exists or cannot
            be written.
    """
    config = read_run(run)
    merged = form == "merged"
    if not holds_weights(checkpoint):
        raise UserError(f"checkpoint {checkpoint}: has neither {LORA} nor {FULL}/config.json, which train writes")
    if not merged and not (checkpoint / LORA).is_file():
        raise UserError(f"--format {form} is for a LoRA, and {checkpoint} holds a whole transformer: use merged")
    if dtype is not None and not merged:
        raise UserError(f"--dtype is for --format merged, not for {form}: a LoRA stays float32")
    if not merged and output.suffix != ".safetensors":
        raise UserError(f"--output {output}: expected a .safetensors file")
    second = output.with_stem(f"{output.stem}_2")
    writes_second = not merged and (checkpoint / LORA_2).is_file()
    for path in (output, second) if writes_second else (output,):
        if path.exists():
            raise UserError(f"--output {path} exists: give another")
    source = str(BUNDLED.get(config.model, config.model))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if merged:
            _write_pipeline(source, checkpoint, output, getattr(torch, dtype or "bfloat16"))
        else:
            _write_lora(source, checkpoint / LORA, form, output)
            if writes_second:
                _write_lora(source, checkpoint / LORA_2, form, second)
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be exported to {output}: {error}") from error


def _write_lora(source: str, file: Path, form: str, output: Path) -> None:
    with atomic_write(output) as temporary:
        if form == "diffusers":
            shutil.copy(file, temporary)
        else:
            family = DiffusionPipeline.load_config(source)["_class_name"]
            save_file(LAYOUTS[form](family, read_lora(file)), temporary, {"format": "pt"})


def _write_pipeline(source: str, checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    """Write a copy of a pipeline, with the trained transformers, under another name, and rename it."""
    base = Path(source) if Path(source).is_dir() else Path(DiffusionPipeline.download(source))
    index = json.loads((base / "model_index.json").read_text())
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        for name, component in index.items():
            if not isinstance(component, list) or component[0] is None:
                continue
            if name not in LORA_OF:
                shutil.copytree(base / name, temporary / name)
                continue
            has_lora, kind = (checkpoint / LORA).is_file(), getattr(diffusers, component[1])
            transformer = kind.from_pretrained((base if has_lora else checkpoint) / name, dtype=dtype)
            if has_lora:
                merge(transformer, read_lora(checkpoint / LORA_OF[name]))
            transformer.save_pretrained(temporary / name, max_shard_size=MAX_SHARD_SIZE)
        shutil.copy(base / "model_index.json", temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
