"""LoRA adapters of a pipeline's transformer: made, loaded and saved as diffusers pipelines load them."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from fastflowgrpo.errors import UserError

ADAPTER = "default"


def add_lora(module: ModelMixin, targets: Sequence[str], rank: int, alpha: int) -> None:
    """A new adapter, which changes nothing yet, on the linear layers whose names end with one of the targets.

    Raises:
        UserError: a target is no linear layer's name.
    """
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linears):
            known = ", ".join(sorted({name.split(".", 2)[-1] for name in linears}))
            raise UserError(f"policy.lora_targets: no linear layer is called {target}; there are: {known}")
    adapter = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    module.add_adapter(adapter, adapter_name=ADAPTER)
    keep_float32(module)


def load_lora(pipeline: DiffusionPipeline, source: str, rank: int | None) -> None:
    """The adapter of a file, folder or hub id, with its own rank, scale and layers.

    Raises:
        UserError: it cannot be read, fits another model, or has another rank than the one asked for.
    """
    module, trouble = pipeline.transformer, f"policy.lora: {source}"
    try:
        # FLUX's loader gives alphas that stand among the weights apart, and SD3's leaves them there.
        weights, *alphas, metadata = pipeline.lora_state_dict(source, return_alphas=True, return_lora_metadata=True)
        scales = {name: float(alpha) for name, alpha in alphas[0].items()} if alphas and alphas[0] else None
        others = sorted({name.split(".")[0] for name in weights} - {"transformer"})
        if others:
            raise UserError(f"{trouble} has weights for {', '.join(others)}, of which this model trains none")
        module.load_lora_adapter(
            weights, prefix="transformer", adapter_name=ADAPTER, metadata=metadata, network_alphas=scales
        )
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{trouble} cannot be loaded into a {type(module).__name__}: {reason}") from error
    # Once more, now that the adapter is float32: diffusers gives it the dtype of the layers under it.
    keep_float32(module)
    own = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    unbound = set_peft_model_state_dict(module, own, ADAPTER).unexpected_keys
    bound = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    if unbound or not bound or bound.keys() != own.keys():
        names = ", ".join(sorted({*unbound, *(bound.keys() ^ own.keys())})[:3])
        raise UserError(f"{trouble} fits another model: {type(module).__name__} has no place for {names}")
    ranks = {tensor.shape[0] for name, tensor in bound.items() if "lora_A" in name}
    if rank is not None and ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        raise UserError(f"{trouble} has rank {found}, not policy.lora_rank {rank}: leave policy.lora_rank out")


def keep_float32(module: nn.Module) -> None:
    """Make the adapter's weights float32, and compute with them in the dtype of the layer's input, as sampling with the
    saved adapter does; peft would convert every activation to float32 instead."""
    cast_training_params(module)
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.__class__ = _InInputDtype


class _InInputDtype(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads."""
    module = pipeline.transformer
    metadata = module.peft_config[ADAPTER].to_dict()  # carries lora_alpha
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order changes by process
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(module, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata=metadata,
    )
