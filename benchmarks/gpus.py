"""GPUs on paper: what a prediction divides by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

#: The share of the paper's bandwidth that a kernel is assumed to reach until benchmarks.bandwidth has measured it. An
#: assumption: QuACK reports about 0.9 for softmax on H100 (github.com/Dao-AILab/quack, its article on memory-bound
#: kernels), and a large device copy on an H200 was seen at 4.3 of 4.8 TB/s.
ACHIEVED = 0.9

#: Microseconds that a launch costs however little it does. An assumption: NVIDIA's "Getting Started with CUDA Graphs"
#: (developer.nvidia.com/blog/cuda-graphs) has, on a V100, 3.4 a kernel inside a graph and 3.8 outside of one where the
#: kernel itself takes 2.9, so 0.5 and 0.9 of overhead on the device; the rest of GRAPH is the least that a kernel takes
#: to begin and end. EAGER is what the framework's host side spends on one operator with autograd, measured at 4 to 7.
GRAPH_US, EAGER_US = 2.0, 6.0


@dataclass(frozen=True)
class Machine:
    """A GPU: the bytes a second of its memory, the operations a second of its matrix products, by type, the bytes of
    its L2. ``read`` and ``copy`` are the best bytes a second of a kernel that reads, and of one that reads and writes
    as much."""

    name: str
    bandwidth: float
    rates: dict[torch.dtype, float]
    l2: int
    read: float = 0.0
    copy: float = 0.0
    measured: bool = False

    def __post_init__(self) -> None:
        if not self.measured:
            object.__setattr__(self, "read", ACHIEVED * self.bandwidth)
            object.__setattr__(self, "copy", ACHIEVED * self.bandwidth)

    def with_roof(self, read: float, copy: float) -> Machine:
        """The same with a measured roof."""
        return replace(self, read=read, copy=copy, measured=True)

    def memory_seconds(self, read: int, written: int) -> float:
        """At the roof: what is written together with as much that is read, the rest of the reads alone."""
        return (2 * written) / self.copy + max(read - written, 0) / self.read

    def product_seconds(self, flops: int, dtype: torch.dtype) -> float:
        return flops / self.rates.get(dtype, self.rates[torch.float32])


def _rates(half: float, single: float, double: float) -> dict[torch.dtype, float]:
    """float32 products are not rounded to TF32, as torch leaves it by default."""
    rates = {torch.float16: half, torch.bfloat16: half, torch.float32: single, torch.float64: double}
    return {dtype: rate * 1e12 for dtype, rate in rates.items()}


#: By a part of the name that torch gives the device. Rates are dense, half of the sparse figure where that is given.
MACHINES = {
    # nvidia.com/en-us/data-center/h200, SXM: 4.8 TB/s; 989 TFLOP/s in 16 bits, 67 in float32 and in float64 on tensor
    # cores. L2: 60 MB, as its device properties have it.
    "H200": Machine("H200", 4.8e12, _rates(989, 67, 67), 60 * 2**20),
    # NVIDIA H100 datasheet (nvidia.com/en-us/data-center/h100). SXM5: 3.35 TB/s; 989, 67 and 67 TFLOP/s. PCIe: 2 TB/s;
    # 756, 51 and 51. NVL: 3.9 TB/s; 835, 60 and 60. L2: 50 MB, H100 architecture whitepaper.
    "H100 80GB HBM3": Machine("H100 SXM", 3.35e12, _rates(989, 67, 67), 50 * 2**20),
    "H100 PCIe": Machine("H100 PCIe", 2.0e12, _rates(756, 51, 51), 50 * 2**20),
    "H100 NVL": Machine("H100 NVL", 3.9e12, _rates(835, 60, 60), 50 * 2**20),
    # NVIDIA A100 datasheet (80GB SXM): 2,039 GB/s; 312, 19.5 and 19.5 TFLOP/s. L2: 40 MB, A100 architecture whitepaper.
    "A100": Machine("A100", 2.039e12, _rates(312, 19.5, 19.5), 40 * 2**20),
    # NVIDIA Blackwell architecture technical brief, HGX B200: 8 TB/s; dense 2,250, 80 and 40 TFLOP/s. L2: 126 MB, as
    # published by those who read its device properties.
    "B200": Machine("B200", 8.0e12, _rates(2250, 80, 40), 126 * 2**20),
}

#: Those for which times are predicted on paper: an H100 is an H200 with less bandwidth.
SHOWN = {name: MACHINES[name] for name in ("H200", "A100", "B200")}


def known(device_name: str) -> Machine | None:
    """The machine of a device's name, e.g. of "NVIDIA A100-SXM4-80GB"."""
    return next((machine for part, machine in MACHINES.items() if part in device_name), None)
