"""What rewards with a network have in common: loading published weights, the device, the dtype, the linear head."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastflowgrpo.errors import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | None) -> torch.device:
    """Return the device with this name, by default the GPU if there is one; ValueError if it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        # Choose the GPU by the local rank: a worker process of a reward has no current GPU.
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {_reason(error)}") from error


def choose_dtype(dtype: str) -> torch.dtype:
    """Return the dtype with this name; ValueError if it is none of DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{did_you_mean(str(dtype), DTYPES)}, known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def pretrained(cls: Any, model: str, **options: Any) -> Any:
    """Call `cls.from_pretrained(model, **options)`, where cls is a class of transformers.

    Raises:
        ValueError: loading failed; names the model, the reason, and what to do.
    """
    try:
        return cls.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise _not_loaded(model, error) from error


def pretrained_model(cls: Any, model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model of transformers for inference: frozen, on the device, in the dtype.

    Raises:
        ValueError: loading failed, or weights are missing, which transformers would initialise at random.
    """
    network, report = pretrained(cls, model, dtype=dtype, output_loading_info=True)
    missing = sorted({*report["missing_keys"]} & {name for name, _ in network.named_parameters()})
    if missing:
        problem = f"{len(missing)} weights are missing, the first is {missing[0]}"
        raise ValueError(f"{model!r} is no {cls.__name__}: {problem}")
    return network.eval().requires_grad_(False).to(device)


def model_file(model: str, name: str) -> Path:
    """Find a file in a local folder or, if there is no such folder, in a repository of the hub.

    Args:
        model: the folder or the hub id.
        name: of the file.

    Raises:
        ValueError: it is not there or cannot be fetched; names the model, the reason, and what to do.
    """
    from huggingface_hub import hf_hub_download

    if os.path.isdir(model):
        path = Path(model, name)
        if not path.is_file():
            raise ValueError(f"the folder {model!r} has no file {name}")
        return path
    try:
        return Path(hf_hub_download(model, name))
    except (OSError, ValueError) as error:
        raise _not_loaded(model, error) from error


def weights_file(weights: str) -> Path:
    """Find a file of weights: a local one, or hub_owner/repository/file.

    Raises:
        ValueError: it is neither, or cannot be fetched.
    """
    if os.path.isfile(weights):
        return Path(weights)
    parts = weights.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"weights {weights!r}: no such file, and no hub_owner/repository/file")
    return model_file(f"{parts[0]}/{parts[1]}", parts[2])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file that safetensors or torch.save wrote; no code in a pickle is run.

    Raises:
        ValueError: it is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read weights from {str(path)!r}: {_reason(error)}") from error


def below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


class LinearHead(nn.Module):
    """The head of the aesthetic predictor and of ImageReward, from features (B, width) to scores (B,).

    It has five linear layers and no activation function: the published weights were trained with only dropout between
    the layers.

    Args:
        state: the published weights, `layers.0.weight` and so on.

    Raises:
        ValueError: the weights are those of another module.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        if "layers.0.weight" not in state:
            raise ValueError(f"not the weights of LinearHead: expected layers.0.weight, got {', '.join(state)[:200]}")
        width = state["layers.0.weight"].shape[-1]
        sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}  # the others were dropout
        self.layers = nn.ModuleDict({str(i): nn.Linear(*size) for i, size in sizes.items()})
        load_strictly(self, state)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the scores (B,) of features (B, width)."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load all weights of a module and freeze it; ValueError if one is missing, superfluous or has another shape."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"not the weights of {type(module).__name__}: {' '.join(str(error).split())[:300]}") from error
    module.eval().requires_grad_(False)


def _not_loaded(model: str, error: Exception) -> ValueError:
    if os.path.isdir(model):
        return ValueError(f"cannot load the folder {model!r}: {_reason(error)}")
    return ValueError(
        f"cannot load {model!r}: {_reason(error)}; give a local folder, or fetch it where there is a network with "
        f'"hf download {model}" (and unset HF_HUB_OFFLINE)'
    )


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
