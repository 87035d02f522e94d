"""A report on every compiled Triton kernel, without a GPU: `python -m benchmarks.aot`.

For sm_80, sm_90 and sm_100 it prints registers, spills, shared memory, and the bytes loaded and stored per element,
counted in the PTX, next to the minimum that the operation must move. It exits with 1 if a kernel spills or moves more
or fewer bytes: more bytes are waste, and fewer mean narrow accesses, which are not counted and are slow.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastflowgrpo.kernels import grpo_loss_triton, sde_step_triton
from fastflowgrpo.kernels.triton_rows import MAX_BLOCK, blocks
from fastflowgrpo.kernels.velocity_gradient_triton import GRADIENT_WARPS, velocity_gradient_kernel

ARCHITECTURES = (80, 90, 100)
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A memory access in PTX: .v4.b32 is 16 bytes per thread.
ACCESS = re.compile(r"\b(ld|st)\.global((?:\.\w+)*?)(?:\.v(\d))?\.[bfus](\d+)\b")


@dataclass
class Case:
    """One specialisation of a kernel, as an operation launches it on large tensors."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Triton's type of each argument, except for absent ones and constants."""
    constants: dict[str, Any]
    loaded: int
    """Minimum of bytes to load per element; `stored` likewise."""
    stored: int
    elements: int = MAX_BLOCK
    warps: int = field(default_factory=lambda: blocks(MAX_BLOCK)[2])


def cases() -> Iterator[Case]:
    """All kernels, with all optional tensors and with none."""
    step, loss = sde_step_triton.step_kernel, grpo_loss_triton.loss_kernel
    gradient, warps = velocity_gradient_kernel, GRADIENT_WARPS * blocks(MAX_BLOCK)[2]
    floats = ("c_x", "c_v", "std", "dt", "old_log_prob", "advantage", "upstream", "log_prob", "factor", "factors")
    row = dict.fromkeys((*floats, "loss", "statistics", "table"), "*fp32")
    row |= {"sums": "*fp64", "seed": "*i64", "offset": "*i64"}
    elements = ("velocity", "uncond", "old", "reference", "sample", "noise", "prev_sample", "gradient")
    flags = {"NORMALISED": True, "ONE_BLOCK": False, "BLOCK": MAX_BLOCK}

    def absent(*names: str) -> dict[str, Any]:
        return dict.fromkeys(names)

    for dtype, e in SIZES.items():
        data = row | dict.fromkeys(elements, f"*{dtype}")
        own_mean = absent("uncond", "sample", "c_x", "c_v")
        score = flags | {"DRAW": False} | absent("noise", "seed", "offset")
        yield Case(f"log-prob {dtype}", step, data, score | own_mean, 2 * e, 0)
        parts = {"BLOCK": MAX_BLOCK} | absent("old", "reference") | own_mean
        yield Case(f"gradient {dtype} log-prob", gradient, data, parts, 2 * e, e, warps=warps)
        for guided in (True, False):
            without, name, read = ({}, " guided", 3 * e) if guided else (absent("uncond"), "", 2 * e)
            draw = flags | {"DRAW": True} | absent("factor") | without
            yield Case(f"draw {dtype}{name} seed", step, data, draw | absent("noise"), read, e)
            with_noise = data | {"noise": "*fp32"}
            yield Case(f"draw {dtype}{name} noise", step, with_noise, draw | absent("seed", "offset"), read + 4, e)
            yield Case(f"score {dtype}{name}", step, data, score | without, read + e, 0)
            for kl, guard in product((True, False), (True, False)):
                name_loss = name + " kl" * kl + " guard" * guard
                missing = without | (absent() if kl else absent("reference")) | (absent() if guard else absent("old"))
                variant = {"KL": "flow_grpo" if kl else "none", "GUARD": guard}
                read_loss = read + e * (1 + kl + guard)
                yield Case(f"loss {dtype}{name_loss}", loss, data, flags | variant | missing, read_loss, 0)
                # without a KL, the gradient of GRPO-Guard reads the old velocity instead of the new one
                if kl or not guard:
                    parts = {"BLOCK": MAX_BLOCK} | missing
                    yield Case(f"gradient {dtype}{name_loss}", gradient, data, parts, read_loss, e, warps=warps)
    for normalised, name in ((True, ""), (False, " unnormalised")):
        constants: dict[str, Any] = {"NORMALISED": normalised}
        yield Case(f"log-prob of sums{name}", sde_step_triton.log_prob_kernel, row, constants, 8, 0, 1024, 4)
        for kl, guard in product((True, False), (True, False)):
            variant = constants | {"KL": "flow_grpo" if kl else "none", "GUARD": guard}
            name_loss = f"loss of sums{name}{' kl' * kl}{' guard' * guard}"
            yield Case(name_loss, grpo_loss_triton.finish_kernel, row, variant, 8 * (1 + kl + guard), 0, 1024, 4)
    one = flags | {"KL": "flow_grpo", "GUARD": True, "batch_size": 1}
    yield Case("loss fp32 guided kl guard, one row", loss, row | dict.fromkeys(elements, "*fp32"), one, 24, 0)
    yield Case("loss of log-probs", grpo_loss_triton.policy_kernel, row, {"BLOCK": 256}, 12, 24, 256, 4)


def compile_case(case: Case, architecture: int) -> Any:
    names = case.kernel.arg_names
    floats = ("guidance", "lower", "upper", "advantage_clip", "kl_weight")
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "fp32" if name in floats else "i32")
        for name in names
    }
    constants = {(names.index(name),): value for name, value in case.constants.items() if name in names}
    # as at a real launch: tensors are aligned, and sizes and strides are multiples of 16
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and (name.endswith("_stride") or name in ("size", "num_blocks", "batch_size")))
    }
    source = ASTSource(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps})


def bytes_per_element(ptx: str, case: Case) -> tuple[float, float]:
    """(loaded, stored) by vector accesses; scalar accesses are the coefficients and sums of a row."""
    moved = {"ld": 0, "st": 0}
    for kind, _, width, bits in ACCESS.findall(ptx):
        if width:
            moved[kind] += int(width) * int(bits) // 8
    threads = 32 * case.warps
    return moved["ld"] * threads / case.elements, moved["st"] * threads / case.elements


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of a kernel, from the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", output)}


def main() -> int:
    print("loaded and stored: bytes per element found of bytes needed; spills and shared memory in bytes")
    print(f"{'kernel':<40}{'sm':>5}{'registers':>11}{'spills':>8}{'shared':>8}{'loaded':>12}{'stored':>12}")
    failures = 0
    for case in cases():
        for architecture in ARCHITECTURES:
            compiled = compile_case(case, architecture)
            usage = resources(compiled.asm["cubin"])
            spills = usage["STACK"] + usage["LOCAL"]
            loaded, stored = bytes_per_element(compiled.asm["ptx"], case)
            good = spills == 0 and (loaded, stored) == (case.loaded, case.stored)
            failures += not good
            print(
                f"{case.name:<40}{architecture:>5}{usage['REG']:>11}{spills:>8}{compiled.metadata.shared:>8}"
                f"{f'{loaded:g} of {case.loaded}':>12}{f'{stored:g} of {case.stored}':>12}{'' if good else '  FAILED'}"
            )
    if failures:
        print(f"{failures} kernels spill or move more or fewer bytes than needed", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
