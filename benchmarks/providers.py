"""Who competes, and whether their numbers are right: nothing is timed before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import aia_kernels
from aia_kernels.common.dtypes import accumulate_dtype

from . import measure, records
from .registry import DTYPES, Case

COARSE = 16.0
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}
FUSED = ("cpu", "triton", "cuda")


@dataclass(frozen=True)
class Provider:
    """Something that runs a case: its name in the rows, how to build its layer, what to enter around its calls.

    comparable: it computes what the case says, so its numbers can be checked and its speedup means something.
    allowance: how many times the reference's error in the same type its own may be. The published flow, which divides
    by sums that the reference never forms, rounds more coarsely where they are small; that makes it no less a baseline.
    """

    name: str
    build: Callable[[Case], nn.Module]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    comparable: bool = True
    allowance: float = 2.0


def on_backend(backend: str) -> Provider:
    """This package's layers on one of its backends."""
    return Provider(backend, lambda case: case.fused(), partial(aia_kernels.use_backend, backend))


def of_family(device: str, family: str) -> list[Provider]:
    """The published flow, the reference and every fused backend that can run a family on the device; of layers over
    PyTorch's attention, which every backend runs alike, one of these."""
    found = [Provider("published", lambda case: case.published(), allowance=COARSE)]
    if family not in aia_kernels.backends.FAMILIES:
        return [*found, on_backend(BACKENDS[device][-1])]
    reasons = aia_kernels.available_backends(family)
    for backend in BACKENDS[device]:
        if reasons[backend] is None:
            found.append(on_backend(backend))
    return found


def alternatives(case: Case, device: str) -> list[Provider]:
    """What else a user might run on the input of a case, for its time alone."""
    found = case.alternatives(device).items()
    return [Provider(name, lambda case, make=make: make(), comparable=False) for name, make in found]


def compiled(device: str) -> list[Provider]:
    """torch.compile of the published flow, on a GPU also with all tuning but CUDA graphs, which the timing captures."""
    modes = {"compile": None} | ({} if device == "cpu" and not records.rehearsing() else {"compile-max": MAX_AUTOTUNE})
    return [
        Provider(
            name, lambda case, mode=mode: torch.compile(case.published(), dynamic=False, mode=mode), allowance=COARSE
        )
        for name, mode in modes.items()
    ]


def build(provider: Provider, case: Case, device: str) -> nn.Module:
    """The provider's layer; one that is comparable has the parameters that all of them get for this case."""
    torch.manual_seed(0)
    state = case.published().state_dict()
    layer = provider.build(case)
    if provider.comparable:
        getattr(layer, "_orig_mod", layer).load_state_dict(state)
    return layer.to(device, DTYPES[case.dtype])


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Keep cuDNN and cuBLAS from rounding the operands of float32 products to TF32.

    Where numbers are compared: the reference in float32 would be off by 1e-3, and so would be what is allowed to
    others. Times are taken as torch is set up by default, with TF32 in convolutions.
    """
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


class Expected:
    """What a case must give: the reference in float64, and what the reference in the case's own type misses of it."""

    def __init__(self, case: Case, x: Tensor, grad_y: Tensor, device: str):
        reference = on_backend("reference")
        layer = build(reference, case, device)
        with exact_products(), reference.context():
            rounded = measure.results(layer, x, grad_y)
            self.truth = measure.results(layer.double(), x.double(), grad_y.double())
        self.near_ties = case.near_ties
        self.band = torch.finfo(x.dtype).eps + 8 * torch.finfo(accumulate_dtype(x.dtype)).eps
        self.displaced = case.displaced if case.near_ties(x.numel()) else {}
        self.reference_errors = measure.errors(rounded, self.truth, case.near_ties)

    def check(self, found: dict[str, Tensor], allowance: float = 2.0) -> tuple[float, str]:
        """The largest error and, if one is beyond its budget, a sentence that names it (else "").

        The budget is that of aia_kernels.testing: twice (allowance) the error of the reference in the same type, one
        rounding of the largest value and eight of the accumulator's. In a large x rounding may turn a decision or two
        (Case.near_ties), which moves the gradient of x itself and, less, the sums over all of it (Case.displaced).
        """
        errors, complaint = measure.errors(found, self.truth, self.near_ties), ""
        for group, error in errors.items():
            budget = allowance * self.reference_errors[group] + self.band + self.displaced.get(group, 0.0)
            if not error <= budget:
                complaint = f"error of {group} {error:.1e}, at most {budget:.1e} expected"
        del errors["grad x, all"]
        return max(errors.values()), complaint


@dataclass(frozen=True)
class Checked:
    """A layer, what to enter around its calls, its error (None: nothing to compare it with), and a sentence if that is
    too large; then it may not be timed."""

    layer: nn.Module
    context: Callable[[], contextlib.AbstractContextManager]
    error: float | None = None
    complaint: str = ""


def check(provider: Provider, layer: nn.Module, expected: Expected, x: Tensor, grad_y: Tensor) -> Checked:
    """A provider's layer with what is to be said of its numbers."""
    if not provider.comparable:
        return Checked(layer, provider.context)
    with exact_products(), provider.context():
        found = measure.results(layer, x, grad_y)
        return Checked(layer, provider.context, *expected.check(found, provider.allowance))
