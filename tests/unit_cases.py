"""Units, plans and arguments for the tests of the CPU's operators that are a whole unit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pass_cases import CASES

from aia_kernels import backends, schemas
from aia_kernels.algorithms import attention_in_attention as algorithm
from aia_kernels.common.layouts import dense_clips
from aia_kernels.reference import UNITS

if backends.select("cpu", torch.float32, "attention_in_attention") != "cpu":
    pytest.skip("only the C++ of the CPU has them", allow_module_level=True)

PASSES = backends.passes("cpu", "attention_in_attention")
AS_ONE = schemas.PROPAGATE_PASSES + schemas.UNIT_PASSES
ONE_BY_ONE = SimpleNamespace(**{k: v for k, v in vars(PASSES).items() if k not in AS_ONE})
#: Of a gate: scale, shift, mean and variance that are there.
NORMS = {"batch": (True, True, False, False), "fixed": (True, True, True, True), "bare": (False, False, False, False)}
UNITS_IN_ONE = [name for name, unit in UNITS.items() if not unit.averaged]


def arguments(unit: str, case: str, norm: str) -> tuple:
    """A plan without passes, x, the gradient of y and the gates."""
    torch.manual_seed(0)
    shape, order, dtype, _ = CASES[case]
    axes = [0, *(1 + "TCHW".index(letter) for letter in order)]
    stored = torch.randn(2, *(shape[axis] for axis in axes))
    x, grad_y = (a.permute([axes.index(axis) for axis in range(5)]).to(dtype) for a in stored)
    gates = []
    for letter in UNITS[unit].letters:
        numbers = (torch.rand(1, dtype=dtype) + 0.5 if there else None for there in NORMS[norm])
        # One weight is stored in another order of axes.
        weight = torch.randn(1, 2, 3, 3, 3, dtype=dtype)
        gates.append(algorithm.GateParameters(weight.mT if letter == "T" else weight, *numbers))
    n = len(gates)
    settings = (norm == "batch",) * n, (1e-5,) * n, ("",) * n
    return algorithm.Plan(UNITS[unit], None, *settings), dense_clips(x), grad_y, gates
