"""What every Triton kernel compiles to, without a GPU: `python -m benchmarks.aot`.

For sm_80, sm_90 and sm_100 it prints registers, spills, shared memory and the bytes loaded and stored per element,
counted in the PTX, beside the least that the operation must move. It exits with 1 if a kernel spills or moves another
number of bytes: more are waste, fewer are accesses too narrow to be counted, which are slow.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastflowgrpo.kernels import grpo_loss_triton, sde_step_triton
from fastflowgrpo.kernels.triton_rows import MAX_BLOCK, blocks

ARCHITECTURES = (80, 90, 100)
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
# The accesses of a PTX line: .v4.b32 is 16 bytes in each thread.
ACCESS = re.compile(r"\b(ld|st)\.global((?:\.\w+)*?)(?:\.v(\d))?\.[bfus](\d+)\b")


@dataclass
class Case:
    """One specialisation of a kernel, as the operations launch it on large tensors."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Triton's type of every argument that is neither absent nor a constant."""
    constants: dict[str, Any]
    loaded: int
    """The least bytes to load per element."""
    stored: int
    elements: int = MAX_BLOCK
    warps: int = field(default_factory=lambda: blocks(MAX_BLOCK)[2])


def cases() -> Iterator[Case]:
    """All kernels, with everything that they can read and with the least."""
    steps, losses = sde_step_triton, grpo_loss_triton
    floats = ("c_x", "c_v", "std", "dt", "old_log_prob", "advantage", "upstream", "policy_factor", "kl_factor")
    row = dict.fromkeys((*floats, "loss", "table", "log_prob"), "*fp32")
    row |= {"sums": "*fp64", "seed": "*i64", "offset": "*i64"}
    elements = ("velocity", "uncond", "reference", "sample", "noise", "prev_sample", "gradient")
    flags = {"NORMALISED": True, "ONE_BLOCK": False, "BLOCK": MAX_BLOCK}
    for dtype, e in SIZES.items():
        data = row | dict.fromkeys(elements, f"*{dtype}")
        for guided in (True, False):
            absent: dict[str, Any] = {} if guided else {"uncond": None}
            name, read = (" guided", 3 * e) if guided else ("", 2 * e)
            own = {"noise": None}, {"seed": None, "offset": None}, {"noise": None, "seed": None, "offset": None}
            draw, score = {"DRAW": True, **flags}, {"DRAW": False, **flags}
            yield Case(f"draw {dtype}{name} seed", steps.step_kernel, data, draw | absent | own[0], read, e)
            with_noise = data | {"noise": "*fp32"}
            yield Case(f"draw {dtype}{name} noise", steps.step_kernel, with_noise, draw | absent | own[1], read + 4, e)
            yield Case(f"score {dtype}{name}", steps.step_kernel, data, score | absent | own[2], read + e, 0)
            for kl in ("flow_grpo", "none"):
                with_kl = kl != "none"
                without = absent if with_kl else absent | {"reference": None}
                name_kl, read_kl = (" kl", read + 2 * e) if with_kl else ("", read + e)
                yield Case(
                    f"loss {dtype}{name}{name_kl}",
                    losses.loss_kernel,
                    data,
                    flags | {"KL": kl} | without,
                    read_kl,
                    0,
                    warps=losses.LOSS_WARPS * blocks(MAX_BLOCK)[2],
                )
                yield Case(
                    f"gradient {dtype}{name}{name_kl}",
                    steps.velocity_gradient_kernel,
                    data,
                    {"BLOCK": MAX_BLOCK} | without,
                    read_kl,
                    e,
                )
    for normalised, name in ((True, ""), (False, " unnormalised")):
        constants: dict[str, Any] = {"NORMALISED": normalised}
        yield Case(f"log-prob of sums{name}", steps.log_prob_kernel, row, constants, 8, 0, 1024, 4)
        for kl, loaded in (("flow_grpo", 16), ("none", 8)):
            yield Case(
                f"loss of sums {kl}{name}", losses.finish_kernel, row, constants | {"KL": kl}, loaded, 0, 1024, 4
            )


def compile_case(case: Case, architecture: int) -> Any:
    names = case.kernel.arg_names
    floats = ("guidance", "lower", "upper", "advantage_clip", "kl_weight")
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "fp32" if name in floats else "i32")
        for name in names
    }
    constants = {(names.index(name),): value for name, value in case.constants.items() if name in names}
    # as Triton finds it at a launch: tensors are aligned, sizes and strides multiples of 16
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and (name.endswith("_stride") or name in ("size", "num_blocks")))
    }
    source = ASTSource(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps})


def bytes_per_element(ptx: str, case: Case) -> tuple[float, float]:
    """(loaded, stored) by vector accesses; those of one number are a row's coefficients and sums."""
    moved = {"ld": 0, "st": 0}
    for kind, _, width, bits in ACCESS.findall(ptx):
        if width:
            moved[kind] += int(width) * int(bits) // 8
    threads = 32 * case.warps
    return moved["ld"] * threads / case.elements, moved["st"] * threads / case.elements


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of a kernel, by the cuobjdump that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", output)}


def main() -> int:
    print("bytes per element are those found of those needed; spills and shared memory in bytes")
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
        print(f"{failures} kernels spill or move other bytes than their minimum", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
