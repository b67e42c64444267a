"""Bad input raises before anything runs, and the message names the argument, what came and what is expected."""

from __future__ import annotations

import re

import pytest
import torch

import aia_kernels
from aia_kernels import functional
from aia_kernels.reference import Gate, Norm

X = torch.randn(8, 3, 4, 5)


def call(x=X, unit="C", gates=None, num_segments=4):
    gates = (Gate(torch.randn(1, 2, 3, 3, 3)),) if gates is None else gates
    return functional.attention_in_attention(x, unit, gates, num_segments)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"x": X[0]}, ValueError, ("x:", r"\(3, 4, 5\)", "expected")),
        ({"x": X[None, None]}, ValueError, ("x:", r"\(1, 1, 8", "expected")),
        ({"x": X[:7]}, ValueError, ("x:", "7 frames", "multiple of num_segments = 4")),
        ({"num_segments": 0}, ValueError, ("num_segments:", "0", "at least 1")),
        ({"num_segments": -4}, ValueError, ("num_segments:", "-4", "at least 1")),
        ({"x": X.int()}, TypeError, ("x:", "torch.int32", "floating-point")),
        ({"x": X.to(torch.complex64)}, TypeError, ("x:", "torch.complex64", "floating-point")),
        ({"x": X.numpy()}, TypeError, ("x:", "ndarray", "tensor")),
        ({"x": X.double()}, TypeError, ("weight of gate C", "torch.float32", "expected torch.float64")),
        ({"x": X.to("meta")}, ValueError, ("weight of gate C", "cpu", "meta")),
        ({"unit": "CST"}, ValueError, ("unit:", "'CST'", "CinST")),
        ({"unit": "ST"}, ValueError, ("gates:", "got 1", "expected 3")),
        ({"gates": (Gate(torch.randn(1, 2, 3, 3)),)}, ValueError, ("weight of gate C", r"\(1, 2, 3, 3\)", "expected")),
        (
            {"gates": (Gate(torch.randn(1, 2, 3, 3, 3), Norm(torch.ones(2), torch.ones(1), training=True)),)},
            ValueError,
            ("gate C", r"\(2,\)", r"expected \(1,\)"),
        ),
        (
            {"gates": (Gate(torch.randn(1, 2, 3, 3, 3), Norm(torch.ones(1).double(), training=True)),)},
            TypeError,
            ("gate C", "torch.float64", "expected torch.float32"),
        ),
        (
            {
                "x": X[:1, :, :1, :1],
                "num_segments": 1,
                "gates": (Gate(torch.randn(1, 2, 3, 3, 3), Norm(training=True)),),
            },
            ValueError,
            ("x:", "more than one value"),
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument(arguments, error, words):
    with pytest.raises(error) as caught:
        call(**arguments)
    for word in words:
        assert re.search(word, str(caught.value))


def test_bad_input_to_a_module():
    with pytest.raises(ValueError, match="multiple of num_segments = 8"):
        aia_kernels.CinST()(X[:5])


def test_mixed_types_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert call(X.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"expected torch\.float32"):
            call(X, gates=(Gate(torch.randn(1, 2, 3, 3, 3, dtype=torch.bfloat16)),))
        with pytest.raises(TypeError, match=r"expected torch\.float16"):
            call(X.half())
