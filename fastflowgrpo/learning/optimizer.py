"""AdamW with its two averages of the gradient in float32, or in 8 bits with a scale per 256: `update.optimizer`.

The 8-bit optimiser is torchao's (arXiv 2110.02861). A tensor of fewer than 4096 values, or of a number of values that
256 does not divide, keeps float32 averages.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastflowgrpo.config import UpdateConfig
from fastflowgrpo.errors import UserError

BLOCK, SMALLEST = 256, 4096  # values that share a scale, and of the smallest tensor in 8 bits: torchao's
TABLE = 256 * 4  # bytes of the 256 float32 values of the codes, which every average has


def make_optimizer(parameters: Sequence[nn.Parameter], update: UpdateConfig) -> torch.optim.Optimizer:
    """Return the optimiser of float32 parameters.

    Raises:
        UserError: torchao is missing.
    """
    settings: dict[str, Any] = {"lr": update.learning_rate, "betas": update.betas, "weight_decay": update.weight_decay}
    if update.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if find_spec("torchao") is None:
        raise UserError('update.optimizer: adamw_8bit needs torchao: pip install "fastflowgrpo[quantized]"')
    from torchao.optim import AdamW8bit

    class EagerAdamW8bit(AdamW8bit):
        """torchao compiles the step once for each shape of a parameter, which on a CPU takes long."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return (EagerAdamW8bit if on_cpu else AdamW8bit)(parameters, block_size=BLOCK, **settings)


def stored_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state as plain tensors: an 8-bit average as NAME.codes, uint8, and NAME.scale, float32."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if hasattr(tensor, "codes") and hasattr(tensor, "scale"):
            stored |= {f"{name}.codes": tensor.codes, f"{name}.scale": tensor.scale}
        else:
            stored[name] = tensor
    return stored


def loaded_state(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state that `stored_state` was given."""
    state = {name: tensor for name, tensor in stored.items() if not name.endswith((".codes", ".scale"))}
    for path, codes in stored.items():
        name, _, part = path.rpartition(".")
        if part == "codes":
            from torchao.optim.subclass_8bit import OptimState8bit

            average = OptimState8bit.zeros(codes.shape, name == "exp_avg", BLOCK, dtype=torch.float32)
            average.codes.copy_(codes)
            average.scale.copy_(stored[f"{name}.scale"])
            state[name] = average
    return state


def state_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Return the bytes of both averages of parameters with so many values each."""
    return sum(2 * _average_bytes(size, optimizer) for size in sizes)


def _average_bytes(size: int, optimizer: str) -> int:
    if optimizer == "adamw" or size < SMALLEST or size % BLOCK:
        return 4 * size
    return size + 4 * (size // BLOCK) + TABLE
