"""Two transformers that share the noise levels, as one module: DDP wraps it, or FSDP2 shards it, as it does one."""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class Experts(nn.Module):
    """Wan 2.2 A14B's two transformers: `transformer` from a timestep on, `transformer_2` below it.

    A batch may have timesteps of both; each sample passes through one of them. Every pass waits once for the device, to
    see which. An expert without a sample still takes part, since the processes of a run have other samples:

    - with gradients, it gets one of zeros. DDP waits for the gradient of every trained weight, and without them the
      optimiser would skip the expert on one process, and with more processes not.
    - sharded by FSDP2, it computes the first sample, whose result has no weight: all ranks must run every layer.

    Args:
        transformer, transformer_2: of the pipeline.
        boundary: the least timestep of `transformer`.
    """

    _no_split_modules = WanTransformer3DModel._no_split_modules  # what FSDP2 shards one by one
    _keep_in_fp32_modules = WanTransformer3DModel._keep_in_fp32_modules  # what is not quantised

    def __init__(self, transformer: WanTransformer3DModel, transformer_2: WanTransformer3DModel, boundary: float):
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return the velocities (B, C, F, H, W), as the transformers do.

        Args:
            timestep: (B,); on the meta device all are taken to be those of `transformer`.
            hidden_states, encoder_hidden_states, return_dict: as of the transformers.
        """
        inputs = {"hidden_states": hidden_states, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        noisy = [True] * len(timestep) if timestep.is_meta else (timestep >= self.boundary).tolist()
        order: list[int] = []
        outputs, nothing = [], hidden_states.new_zeros(())
        for expert, is_own in ((self.transformer, True), (self.transformer_2, False)):
            rows = [row for row, side in enumerate(noisy) if side is is_own]
            if rows:
                own = {name: tensor[rows] for name, tensor in inputs.items()}
                outputs.append(expert(**own, return_dict=False)[0])
            elif isinstance(self, FSDPModule):
                first = {name: tensor[:1] for name, tensor in inputs.items()}
                nothing = 0 * expert(**first, return_dict=False)[0].sum()
            elif torch.is_grad_enabled():
                trained = [parameter for parameter in expert.parameters() if parameter.requires_grad]
                nothing = sum((0 * parameter.flatten()[0] for parameter in trained), nothing)
            order += rows
        velocity = torch.cat(outputs)
        if len(outputs) == 2:
            velocity = velocity[torch.tensor(order).argsort().to(velocity.device, non_blocking=True)]
        return (velocity + nothing.to(velocity.dtype),)
