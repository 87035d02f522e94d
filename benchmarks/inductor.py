"""What torch.compile generates for a GPU, compiled without one: `python -m benchmarks.inductor`.

The functions are a transformer block of SD3.5-M with a LoRA, the SDE step, and the loss, in bfloat16, forward and
backward. AOTAutograd traces and splits them on fake CPU tensors, since autograd in a CPU build of torch has no other
device. The graphs are then moved to a pretended GPU, whose properties Inductor is told, and are lowered and scheduled
as for a real one. Every configuration of every kernel that Inductor would try is compiled by Triton for sm_80 and
sm_90. Attention is flash attention and matrix products are cuBLAS: calls of libraries, as on a GPU. Not covered:
Dynamo, which the tests of `policy.compile` run on the CPU, the choice among the configurations, and running anything.

The command exits with 1 if no kernel was made or none of a kernel's configurations fits the GPU. It reads private parts
of the pinned torch, and may need a change for another version.
"""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from diffusers import SD3Transformer2DModel
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from benchmarks.aot import resources
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.sde_step import sde_step
from fastflowgrpo.policy.lora import add_lora
from fastflowgrpo.policy.sd3 import SD3Policy

PROCESSORS = {80: 108, 90: 132}  # of an A100 and an H100, by architecture
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that a block may have
GPU = torch.device("cuda:0")
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
BATCH, TOKENS, TEXT_TOKENS, WIDTH = 8, 1024, 333, 1536

Function = Callable[..., Any]


@contextmanager
def pretended_gpu(architecture: int) -> Iterator[None]:
    """Inside it Inductor and Triton take this machine for one with a GPU."""
    capability = divmod(architecture, 10)
    properties = SimpleNamespace(
        name=f"pretended sm_{architecture}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=PROCESSORS[architecture],
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=SHARED_MEMORY[architecture],
        warp_size=32,
        total_memory=80 << 30,
    )
    answers: dict[str, Function] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    interface = device_interface.CudaInterface
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
    )
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
            if hasattr(interface, name):
                stack.enter_context(patch.object(interface, name, staticmethod(answer)))
        worker = {"current_device": answers["current_device"], "get_device_properties": lambda device=None: properties}
        for name, answer in worker.items():
            stack.enter_context(patch.object(interface.Worker, name, staticmethod(answer)))
        # A build with CUDA would look for a GPU.
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        stack.enter_context(patch.object(torch.version, "cuda", "12.8"))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        triton.runtime.driver.set_active(driver)
        device_interface.register_interface_for_device("cuda:0", interface)
        device_interface.register_interface_for_device("cuda", interface)
        yield


def on_gpu(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """Return a graph that was traced on the CPU, and its inputs, on the pretended GPU."""
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        moved = [fx.node.map_aggregate(part, _moved) for part in (node.args, node.kwargs)]
        node.args, node.kwargs = moved
        schema = getattr(node.target, "_schema", None)
        if schema is not None and not node.all_input_nodes and any(arg.name == "device" for arg in schema.arguments):
            node.kwargs = {**node.kwargs, "device": GPU}  # a new tensor, by default on the CPU
    graph.recompile()
    mode = torch._guards.detect_fake_mode(inputs)
    assert mode is not None
    with mode, torch.no_grad():
        fakes = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
            if isinstance(value, Tensor)
            else value
            for value in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
    return graph, fakes


def _moved(value: Any) -> Any:
    return GPU if isinstance(value, torch.device) else value


def generated_code(function: Function, inputs: Sequence[Tensor]) -> list[str]:
    """Return the Python modules that Inductor writes for a function's forward pass and, if it has one, backward pass.

    Args:
        function: returns a tensor.
        inputs: fake CPU tensors, which require a gradient where the backward pass has one.
    """
    codes: list[str] = []

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Function:
        moved, fakes = on_gpu(gm, example_inputs)
        mode = torch._guards.detect_fake_mode(fakes)
        assert mode is not None
        # A copy into a fake GPU tensor is refused by a CPU build, and changes nothing.
        copies = patch.object(Tensor, "copy_", lambda destination, *_: destination)
        with DebugContext(), V.set_fake_mode(mode), torch.no_grad(), copies:
            compile_fx._recursive_post_grad_passes(moved, is_inference=False)
            lowering = GraphLowering(moved, example_inputs=fakes, shape_env=mode.shape_env)
            with V.set_graph_handler(lowering):
                lowering.run(*fakes)
                codes.append(lowering.codegen()[0].value)
        return make_boxed_func(gm.forward)

    decompositions = select_decomp_table()
    traced = aot_function(
        function, compiler, compiler, partition_fn=compile_fx.partition_fn, decompositions=decompositions
    )
    with patch.dict(os.environ, TRITON_INTERPRET="1"):  # lets step and loss take CPU tensors; nothing is interpreted
        output = traced(*inputs)
        if output.requires_grad:
            output.sum().backward()
    return codes


def compile_kernels(code: str, folder: Path) -> list[dict[str, int]]:
    """Compile the kernels of a module that Inductor has written, for the pretended GPU.

    Returns:
        For each kernel the resources of the configuration that spills least, of those that fit the GPU, and their
        number as "CONFIGURATIONS".

    Raises:
        OutOfResources: none of a kernel's configurations fits the GPU.
    """
    found = []
    for name, source in KERNEL.findall(code):
        file = folder / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner, used = getattr(module, name), []
        for config in tuner.configs:
            compiled = tuner._precompile_config(config).kernel
            limit = SHARED_MEMORY[tuner.device_props.cc]
            if compiled.metadata.shared <= limit:
                used.append(resources(compiled.asm["cubin"]))
        if not used:
            raise OutOfResources(compiled.metadata.shared, limit, f"shared memory of {name}")
        best = min(used, key=lambda usage: usage["STACK"] + usage["LOCAL"])
        found.append(best | {"CONFIGURATIONS": len(used)})
    return found


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention as `scaled_dot_product_attention` calls it on a GPU; the CPU has another operation."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def cases() -> Iterator[tuple[str, Function, list[Tensor]]]:
    """Yield names, functions and their inputs; call it inside a fake mode."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=2,
            num_attention_heads=24,
            attention_head_dim=64,
            caption_projection_dim=WIDTH,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        model.bfloat16().requires_grad_(False)
        add_lora(model, SD3Policy.lora_targets, 32, 64)
    block = model.transformer_blocks[0]
    weights = {
        name: torch.empty(weight.shape, dtype=weight.dtype, requires_grad=weight.requires_grad)
        for name, weight in block.named_parameters()
    }

    def run_block(hidden: Tensor, text: Tensor, embedding: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(weights, values, strict=True))
        text, hidden = torch.func.functional_call(block, given, (hidden, text, embedding))
        return hidden.sum() + text.sum()

    def bfloat16(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    hidden = bfloat16(BATCH, TOKENS, WIDTH).requires_grad_()
    text = bfloat16(BATCH, TEXT_TOKENS, WIDTH).requires_grad_()
    yield "block", run_block, [hidden, text, bfloat16(BATCH, WIDTH), *weights.values()]
    velocity, uncond, sample, prev_sample, reference = (bfloat16(BATCH, 16, 64, 64) for _ in range(5))
    rows = [torch.empty(BATCH) for _ in range(6)]
    seeds = torch.empty(BATCH, dtype=torch.int64)

    def step(velocity: Tensor, uncond: Tensor, sample: Tensor, seeds: Tensor, *rows: Tensor) -> Tensor:
        guided: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 4.5, "backend": "triton"}
        prev_sample, log_prob = sde_step(velocity.sigmoid(), sample, *rows, seed=seeds, offset=3, **guided)[:2]
        return prev_sample.float().mean() + log_prob.sum()

    yield "step", step, [velocity, uncond, sample, seeds, *rows[:3]]

    def loss(velocity: Tensor, sample: Tensor, prev: Tensor, uncond: Tensor, ref: Tensor, *rows: Tensor) -> Tensor:
        guided: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 4.5, "backend": "triton"}
        value = grpo_step_loss(
            velocity.sigmoid(), sample, prev, *rows, clip_range=1e-4, velocity_ref=ref, kl_weight=0.04, **guided
        )[0]
        return value.sum()

    yield "loss", loss, [velocity.clone().requires_grad_(), sample, prev_sample, uncond, reference, *rows]


def report(architecture: int) -> int:
    """Print a line for each pass, and return how many of them have no kernel."""
    empty = 0
    attention = patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    inductor_config.use_static_cuda_launcher = False  # it would keep less of a compiled kernel
    with FakeTensorMode(), attention, pretended_gpu(architecture), TemporaryDirectory() as folder:
        for name, function, inputs in cases():
            for part, code in zip(("forward", "backward"), generated_code(function, inputs), strict=False):
                kernels = compile_kernels(code, Path(folder))
                empty += not kernels
                registers = max((kernel["REG"] for kernel in kernels), default=0)
                spills = sum(kernel["STACK"] + kernel["LOCAL"] > 0 for kernel in kernels)
                configurations = sum(kernel["CONFIGURATIONS"] for kernel in kernels)
                row = f"{f'{name}, {part}':<20}{architecture:>5}{len(kernels):>9}{configurations:>16}"
                print(f"{row}{registers:>11}{spills:>8}", flush=True)
    return empty


def main(argv: list[str]) -> int:
    if argv:
        return bool(report(int(argv[0])))
    print(f"{'':<20}{'sm':>5}{'kernels':>9}{'configurations':>16}{'registers':>11}{'spills':>8}", flush=True)
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # What Inductor knows of a device is cached for a process.
    command = [sys.executable, "-m", "benchmarks.inductor"]
    return max(subprocess.run([*command, str(sm)], env=environment).returncode for sm in PROCESSORS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
