"""LoRA adapters of a pipeline's transformer: adding, loading and saving them in diffusers' format."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.weights import FULL, LORA, LORA_2, LORA_OF

ADAPTER = "default"


def add_lora(module: ModelMixin, targets: Sequence[str], rank: int, alpha: int) -> None:
    """Add a new adapter, which does not change the output yet.

    Args:
        module: the transformer.
        targets: names of linear layers, matched from the end of the module name.
        rank, alpha: the adapter's output is scaled by alpha / rank.

    Raises:
        UserError: no linear layer has the name of a target.
    """
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linears):
            known = ", ".join(sorted({name.split(".", 2)[-1] for name in linears}))
            raise UserError(f"policy.lora_targets: no linear layer is called {target}; there are: {known}")
    adapter = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    module.add_adapter(adapter, adapter_name=ADAPTER)
    _make_float32(module)


def load_lora(pipeline: DiffusionPipeline, source: str, rank: int | None, transformer: str = FULL) -> None:
    """Load an adapter, with its own rank, scale and layers, into a transformer of the pipeline.

    Args:
        pipeline: whose transformer gets the adapter; on the meta device only its shapes are loaded.
        source: a file, folder or hub id.
        rank: that the adapter must have; None for any.
        transformer: name of the component; the adapter of a second one is in a file of another name.

    Raises:
        UserError: the adapter cannot be read, fits another model or has another rank.
    """
    module, setting = getattr(pipeline, transformer), f"policy.lora: {source}"
    name = None if transformer == FULL else LORA_2  # None: diffusers finds the file
    if name is not None and Path(source).is_file():
        raise UserError(f"{setting} is one file: this model takes a folder with {LORA} and {LORA_2}")
    try:
        # FLUX's loader returns alphas separately, SD3's leaves them among the weights.
        weights, *alphas, metadata = pipeline.lora_state_dict(
            source, return_alphas=True, return_lora_metadata=True, weight_name=name
        )
        if module.device.type == "meta":  # alphas, which have no dimension, keep their values
            weights = {name: weight.to("meta") if weight.ndim else weight for name, weight in weights.items()}
        scales = {name: float(alpha) for name, alpha in alphas[0].items()} if alphas and alphas[0] else None
        others = sorted({name.split(".")[0] for name in weights} - {"transformer"})
        if others:
            raise UserError(f"{setting} has weights for {', '.join(others)}, which are not trained here")
        module.load_lora_adapter(
            weights, prefix="transformer", adapter_name=ADAPTER, metadata=metadata, network_alphas=scales
        )
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{setting} cannot be loaded into a {type(module).__name__}: {reason}") from error
    # diffusers has loaded the adapter in the dtype of the layers that carry it: load it again in float32.
    _make_float32(module)
    try:
        _set_weights(module, weights)
    except ValueError as error:
        raise UserError(f"{setting} fits another model: {error}") from error
    loaded = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    ranks = {weight.shape[0] for name, weight in loaded.items() if "lora_A" in name}
    if rank is not None and ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        raise UserError(f"{setting} has rank {found}, not policy.lora_rank {rank}: leave policy.lora_rank out")


def load_lora_weights(pipeline: DiffusionPipeline, folder: Path, transformer: str = FULL) -> None:
    """Replace the weights of a transformer's adapter with those that `save_lora` wrote.

    Raises:
        ValueError, RuntimeError: the saved adapter has other layers, or another rank.
        OSError: it cannot be read.
    """
    _set_weights(getattr(pipeline, transformer), pipeline.lora_state_dict(folder, weight_name=LORA_OF[transformer]))


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """Leave the adapter out of the passes of a transformer."""
    # diffusers' disable_adapters and enable_adapters do the same, but look up peft's version each time, for 5 ms.
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _set_weights(module: ModelMixin, weights: Mapping[str, Tensor]) -> None:
    given = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    unexpected = set_peft_model_state_dict(module, given, ADAPTER).unexpected_keys
    loaded = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    if unexpected or not loaded or loaded.keys() != given.keys():
        names = ", ".join(sorted({*unexpected, *(loaded.keys() ^ given.keys())})[:3])
        raise ValueError(f"{type(module).__name__} has no place for {names}")


def _make_float32(module: nn.Module) -> None:
    """Make the adapter's weights float32, but compute in the dtype of each layer's input.

    Sampling with the saved adapter computes in that dtype too. peft would convert every activation to float32 instead.
    """
    cast_training_params(module)
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.__class__ = _InputDtypeLinear


class _InputDtypeLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def save_lora(pipeline: DiffusionPipeline, folder: Path, transformer: str = FULL) -> None:
    """Write the adapter of a transformer, the component of this name, for `pipeline.load_lora_weights`."""
    module = getattr(pipeline, transformer)
    metadata = module.peft_config[ADAPTER].to_dict()  # carries lora_alpha
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order changes by process
    pipeline.save_lora_weights(
        folder,
        weight_name=LORA_OF[transformer],
        transformer_lora_layers=get_peft_model_state_dict(module, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata=metadata,
    )
