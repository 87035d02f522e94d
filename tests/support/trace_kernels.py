"""Prints the graphs that torch.compile makes of the compiled kernels, traced on CPU tensors and never run.

It needs its own process, because in the other tests Triton's interpreter runs the kernels.
"""

import os

import torch
import triton
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from triton.backends.compiler import GPUTarget

# decorates the kernels before TRITON_INTERPRET is set
from fastflowgrpo.kernels import grpo_loss_triton, sde_step_triton  # noqa: F401
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.sde_step import sde_step

# makes the backend accept CPU tensors
os.environ["TRITON_INTERPRET"] = "1"


class Driver:
    """Stands in for a GPU; the compiler asks only for its target."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def train_step(velocity, sample, c, velocity_ref, velocity_uncond, seed):
    guided = {"velocity_uncond": velocity_uncond, "guidance_scale": 4.5, "backend": "triton"}
    prev_sample, log_prob = sde_step(velocity.detach(), sample, c, c, c, seed=seed, offset=3, **guided)
    step = (velocity, sample, prev_sample, c, c, c, -c, log_prob, c)
    return grpo_step_loss(*step, clip_range=0.1, velocity_ref=velocity_ref, kl_weight=0.1, **guided)[0]


def show(graph: nn.Module, example_inputs):
    print("graph")
    for node in graph.graph.nodes:
        if node.target is triton_kernel_wrapper_functional:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            print(kernel.fn.__name__, "writes", *sorted(node.kwargs["tensors_to_clone"]))
    outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]

    def stand_in(arguments):
        arguments.clear()
        return [out if out is None else torch.zeros([int(s) for s in out.shape], dtype=out.dtype) for out in outputs]

    stand_in._boxed_call = True
    return stand_in


def backend(module, example_inputs):
    return aot_module_simplified(module, example_inputs, fw_compiler=show, bw_compiler=show)


triton.runtime.driver.set_active(Driver())
velocity, sample, velocity_ref, velocity_uncond = torch.randn(4, 3, 16, 64, 64).bfloat16().unbind()
arguments = (sample, torch.rand(3), velocity_ref, velocity_uncond, torch.arange(3))
velocity = velocity.clone().requires_grad_()
torch.compile(train_step, fullgraph=True, backend=backend)(velocity, *arguments).sum().backward()
