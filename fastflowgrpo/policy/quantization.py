"""A frozen transformer in 8 or 4 bits, a LoRA's base or the reference of full training: `policy.quantization`.

int8     torchao, one scale per output; weights only, activations keep the compute dtype
float8   torchao, float8_e4m3fn with one scale per output; weights only
nf4      bitsandbytes' 4-bit NormalFloat of QLoRA (arXiv 2305.14314), one scale per 64 weights; diffusers loads it only
         on a GPU, so that it is for a LoRA's base alone
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, ModelMixin, PipelineQuantizationConfig, TorchAoConfig
from torch import Tensor, nn
from torch.nn import functional as F

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError

NF4_BLOCK = 64  # weights that share a scale, bitsandbytes' default


def quantization_config(config: PolicyConfig, transformers: Iterable[str]) -> PipelineQuantizationConfig | None:
    """Return what diffusers' loader needs to quantise a LoRA's base, None if it is not quantised.

    Args:
        config: with its default rank.
        transformers: names of the components.

    Raises:
        UserError: a package or the GPU that `policy.quantization` needs is missing.
    """
    kind = config.quantization
    if kind is None:
        return None
    package = "bitsandbytes" if kind == "nf4" else "torchao"
    if find_spec(package) is None:
        raise UserError(f'policy.quantization: {kind} needs {package}: pip install "fastflowgrpo[quantized]"')
    if config.lora is None and not config.lora_rank:
        return None  # the reference is quantised once it has been copied
    if kind == "nf4":
        if not torch.cuda.is_available():
            raise UserError("policy.quantization: nf4 needs a GPU; int8 and float8 also run on a CPU")
        settings: Any = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, config.dtype)
        )
    else:
        settings = TorchAoConfig(_torchao_config(kind))
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(transformers, settings))


def quantise_reference(module: ModelMixin, kind: str) -> None:
    """Quantise a frozen transformer in place, as the loader does a LoRA's base: `kind` is int8 or float8."""
    from torchao.quantization import quantize_

    linears = set(linear_layers(module).values())
    quantize_(module, _torchao_config(kind), filter_fn=lambda layer, name: layer in linears)


def linear_layers(module: ModelMixin) -> dict[str, nn.Linear]:
    """Return the layers whose weights are quantised, by name: diffusers leaves out those that it keeps in float32."""
    kept = module._keep_in_fp32_modules or ()
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and not any(part in name.split(".") for part in kept)
    }


def _torchao_config(kind: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def prepare_quantised(module: ModelMixin) -> None:
    """Make a quantised transformer with its adapter ready for the backward pass and for DDP."""
    for layer in module.modules():
        if type(layer) is nn.Linear and type(layer.weight) is not nn.Parameter:  # a tensor of torchao's
            # Its own forward pass would keep a dequantised copy of every weight for the backward pass.
            layer.__class__ = _DequantisedAgainLinear
    # DDP would broadcast the weights from rank 0, which torchao's do not support. All ranks have loaded the same ones.
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    module._ddp_params_and_buffers_to_ignore = frozen


class _DequantisedAgainLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer without a gradient for its weights, which the backward pass dequantises again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(input, weight.dequantize().to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None, None


def quantised_bytes(kind: str, rows: int, columns: int) -> int:
    """Return the bytes of a linear layer's quantised weight (rows, columns), with its scales."""
    if kind == "nf4":
        return rows * columns // 2 + 4 * (rows * columns // NF4_BLOCK)
    return rows * columns + (5 if kind == "int8" else 4) * rows  # a float32 scale a row, and int8's zero point
