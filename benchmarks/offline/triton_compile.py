"""Compiles Triton kernels for named GPUs without one, and reads what the machine code says about itself."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aia_kernels import triton as passes
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
}

ALIGNED = [["tt.divisibility", 16]]


@dataclass
class Launch:
    kernel: triton.JITFunction
    arguments: tuple
    constants: dict


@dataclass
class MachineCode:
    """Registers of a thread, its bytes of local memory, the bytes of shared memory, divisions and roots in float32 that
    are not rounded to the nearest, and instruction counts by name."""

    registers: int
    local: int
    shared: int
    approximate: int
    instructions: dict[str, int]

    def count(self, *names: str, wide: bool | None = None) -> int:
        """Instructions that are one of these up to suffixes; of them only the 128-bit ones, or only the others."""
        return sum(
            n
            for instruction, n in self.instructions.items()
            if instruction.split(".")[0] in names and (wide is None or (".128" in instruction) == wide)
        )


@contextlib.contextmanager
def recorded(tiles):
    """Collect launches instead of making them; the passes may then be called with tensors on the meta device."""
    launches = []
    original = tiles.launch
    tiles.launch = lambda kernel, x, grid, *args, **constants: launches.append(Launch(kernel, args, constants))
    try:
        yield launches
    finally:
        tiles.launch = original


def activation(order: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """x [B, T, C, H, W] of this shape, stored in an order, without values."""
    axes = [0, *(1 + "TCHW".index(letter) for letter in order)]
    stored = torch.empty([shape[i] for i in axes], dtype=dtype, device="meta")
    return stored.permute([axes.index(i) for i in range(5)])


def packed(x: Tensor, context: int, *lead: int, index: bool = False) -> Tensor:
    dtype = maps.index_dtype(x.shape, context) if index else accumulate_dtype(x.dtype)
    return x.new_empty((x.shape[0], *lead, maps.packed_size(x.shape, context)), dtype=dtype)


def x_passes(x: Tensor) -> None:
    """What CinST and STinC call."""

    def features(context):
        return packed(x, context, 2), packed(x, context, index=True)

    for inner, outer in ((1, 3), (3, 1)):
        passes.pool(x, inner, None, 0)
        passes.pool(x, outer, packed(x, inner), inner)
        passes.recalibrate(x, packed(x, outer), outer)
        passes.recalibrate_reduce(x, x, outer)
        passes.unpool_reduce(x, *features(outer), outer, inner)
        inner_arguments = (packed(x, inner), inner, *features(inner), inner)
        passes.unpool(x, packed(x, outer), *features(outer), outer, *inner_arguments)


def parameters(launch: Launch) -> list[str]:
    """The arguments that the compiled kernel takes: None and 1 are part of its code, as constants are, unless it is not
    to look at them (tiles.launched)."""
    return [
        parameter.name
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False)
        if isinstance(value, Tensor) or (value is not None and (value != 1 or parameter.do_not_specialize))
    ]


def compiled(launch: Launch, capability: int):
    """What the launch would compile to. Tensors begin at multiples of 16 bytes, as the allocator returns them."""
    constants = dict(launch.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    signature, attributes, taken = dict.fromkeys(constants, "constexpr"), {}, parameters(launch)
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = ALIGNED
        elif name not in taken:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not launch.kernel.params[i].do_not_specialize:
                attributes[(i,)] = ALIGNED
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in launch.kernel.arg_names},
        constexprs={(launch.kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@contextlib.contextmanager
def cubin(kernel):
    """The path of a file with the machine code of what compiled gave."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        yield file.name


def machine_code(launch: Launch, capability: int) -> MachineCode:
    kernel = compiled(launch, capability)
    with cubin(kernel) as path:
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        sass = _tool("nvdisasm", "-c", path)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    instructions: dict[str, int] = {}
    for name in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE):
        instructions[name] = instructions.get(name, 0) + 1
    approximate = len(re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:approx|full)", kernel.asm["ptx"]))
    return MachineCode(registers, stack + local, kernel.metadata.shared, approximate, instructions)


def _tool(name: str, *arguments: str) -> str:
    path = os.path.join(os.path.dirname(nvidia.__file__), "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
