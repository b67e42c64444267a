"""Bad input raises before anything runs, and the message names the argument, what came and what is expected."""

from __future__ import annotations

import re

import numpy
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
        ({"num_segments": 4.0}, TypeError, ("num_segments:", "4.0", "integer")),
        ({"num_segments": None}, TypeError, ("num_segments:", "None", "integer")),
        ({"x": X.int()}, TypeError, ("x:", "torch.int32", "floating-point")),
        ({"x": X.to(torch.float8_e4m3fn)}, TypeError, ("x:", "float8_e4m3fn", r"torch\.bfloat16")),
        ({"x": X.to_sparse()}, TypeError, ("x:", "sparse", "dense")),
        ({"x": torch.nested.as_nested_tensor([X, X], layout=torch.jagged)}, TypeError, ("x:", "nested", "dense")),
        ({"x": X.to(torch.complex64)}, TypeError, ("x:", "torch.complex64", "floating-point")),
        ({"x": X.numpy()}, TypeError, ("x:", "ndarray", "tensor")),
        ({"x": X.double()}, TypeError, ("weight of gate C", "torch.float32", "expected torch.float64")),
        ({"x": X.to("meta")}, ValueError, ("weight of gate C", "cpu", "meta")),
        ({"unit": "CST"}, ValueError, ("unit:", "'CST'", "CinST")),
        ({"unit": ["C"]}, ValueError, ("unit:", r"\['C'\]", "CinST")),
        ({"gates": torch.randn(1, 2, 3, 3, 3)}, TypeError, ("gate C:", "Tensor", "expected a Gate")),
        ({"gates": (Gate(None),)}, TypeError, ("weight of gate C", "NoneType", "tensor")),
        (
            {"gates": (Gate(torch.randn(1, 2, 3, 3, 3), Norm(running_mean=torch.zeros(1))),)},
            ValueError,
            ("BN of gate C", "running_var", "both or neither"),
        ),
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
            ("BN's weight of gate C", "torch.float64", "expected torch.float32"),
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
    hooked = aia_kernels.CinST(4)
    hooked.C_conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 4, 5\)"):
        hooked(X[0])


def test_mixed_types_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert call(X.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"expected torch\.float32"):
            call(X, gates=(Gate(torch.randn(1, 2, 3, 3, 3, dtype=torch.bfloat16)),))
        with pytest.raises(TypeError, match=r"expected torch\.float16"):
            call(X.half())


TOKENS, MASK = torch.randn(2, 7, 6), torch.zeros(2, 7, dtype=torch.bool)
KEY, VALUE = torch.randn(4, 6), torch.randn(5, 4)


def attend(x=TOKENS, key=KEY, value=VALUE, **settings):
    return functional.external_attention(x, key, value, **settings)


def block(x=torch.randn(2, 6, 3, 4), key=KEY, value=torch.randn(6, 4), norm=Norm(training=True), **settings):  # noqa: B008
    return functional.external_attention_block(x, key, value, norm, **settings)


@pytest.mark.parametrize(
    "call, arguments, error, words",
    [
        (attend, {"x": TOKENS[0]}, ValueError, ("x:", r"\(7, 6\)", r"\[B, N, d\]")),
        (attend, {"x": TOKENS.int()}, TypeError, ("x:", "torch.int32", "floating-point")),
        (attend, {"x": TOKENS.numpy()}, TypeError, ("x:", "ndarray", "tensor")),
        (attend, {"x": TOKENS.double()}, TypeError, ("memory_key:", "torch.float32", "expected torch.float64")),
        (attend, {"x": TOKENS.to("meta")}, ValueError, ("memory_key:", "cpu", "meta")),
        (attend, {"x": TOKENS[..., :0], "key": KEY[:, :0]}, ValueError, ("x:", r"\(2, 7, 0\)", "one feature")),
        (attend, {"heads": 2.0}, TypeError, ("heads:", "2.0", "integer")),
        (attend, {"heads": None}, TypeError, ("heads:", "None", "integer")),
        (attend, {"group": 2.0}, TypeError, ("group:", "2.0", "integer")),
        (attend, {"eps": None}, TypeError, ("eps:", "None", "number")),
        (attend, {"dropout": "half"}, TypeError, ("dropout:", "half", "number")),
        (aia_kernels.ExternalAttention, {"d_model": 8, "S": "4"}, TypeError, ("S:", "4", "integer")),
        (aia_kernels.ExternalAttention2d, {"c": 3.5}, TypeError, ("c:", "3.5", "integer")),
        (attend, {"heads": 0}, ValueError, ("heads:", "0", "at least 1")),
        (attend, {"heads": 4}, ValueError, ("x:", "6 features", "multiple of heads = 4")),
        (attend, {"key": KEY[:, :5]}, ValueError, ("memory_key:", r"\(4, 5\)", r"\(4, 6\)")),
        (attend, {"key": KEY[0]}, ValueError, ("memory_key:", r"\(6,\)", r"\[S, d / heads\]")),
        (attend, {"key": KEY[None].expand(2, -1, -1)}, ValueError, ("memory_key:", r"\(2, 4, 6\)", r"\(1, 4, 6\)")),
        (attend, {"key": KEY[:0], "value": VALUE[:, :0]}, ValueError, ("memory_key:", "0 slots", "at least 1")),
        (attend, {"value": VALUE.mT}, ValueError, ("memory_value:", r"\(4, 5\)", "expected")),
        (attend, {"value": VALUE.half()}, TypeError, ("memory_value:", "torch.float16", "expected torch.float32")),
        (attend, {"key_bias": torch.ones(5)}, ValueError, ("key_bias:", r"\(5,\)", r"\(4,\)")),
        (attend, {"value_bias": torch.ones(4)}, ValueError, ("value_bias:", r"\(4,\)", r"\(5,\)")),
        (attend, {"eps": -1e-9}, ValueError, ("eps:", "-1e-09", "0 or more")),
        (attend, {"eps": float("nan")}, ValueError, ("eps:", "nan", "finite")),
        (attend, {"group": 3}, ValueError, ("group:", "3", "divisor of the 4 slots")),
        (attend, {"group": 0}, ValueError, ("group:", "0", "divisor")),
        (attend, {"dropout": 1.5}, ValueError, ("dropout:", "1.5", "0 to 1")),
        (attend, {"dropout": -0.1}, ValueError, ("dropout:", "-0.1", "0 to 1")),
        (attend, {"padding_mask": MASK.int()}, TypeError, ("padding_mask:", "torch.int32", "torch.bool")),
        (attend, {"padding_mask": MASK[:, :5]}, ValueError, ("padding_mask:", r"\(2, 5\)", r"\(2, 7\)")),
        (attend, {"padding_mask": MASK.tolist()}, TypeError, ("padding_mask:", "list", "tensor")),
        (attend, {"padding_mask": MASK.to("meta")}, ValueError, ("padding_mask:", "meta", "cpu")),
        (attend, {"process_group": "world"}, TypeError, ("process_group:", "world", "ProcessGroup")),
        (block, {"norm": 3}, TypeError, ("norm:", "int", "Norm")),
        (block, {"activation": "tanh"}, ValueError, ("activation:", "tanh", "gelu")),
        (block, {"residual": torch.ones(2, 6, 3)}, ValueError, ("residual:", r"\(2, 6, 3\)", r"\(2, 6, 3, 4\)")),
        (block, {"residual": 1.0}, TypeError, ("residual:", "float", "tensor")),
        (block, {"value_bias": torch.ones(5)}, ValueError, ("value_bias:", r"\(5,\)", r"\(6,\)")),
        (block, {"x": TOKENS[0]}, ValueError, ("x:", r"\(7, 6\)", r"\[B, C, H, W\]")),
        (block, {"x": TOKENS}, ValueError, ("key:", r"\(4, 6\)", r"\(4, 7\)")),
        (block, {"key": KEY[0]}, ValueError, ("key:", r"\(6,\)", r"\[S, C\]")),
        (block, {"key": KEY[:, :5]}, ValueError, ("key:", r"\(4, 5\)", r"\(4, 6\)")),
        (block, {"key": KEY[:0]}, ValueError, ("key:", "0 slots", "at least 1")),
        (block, {"value": KEY}, ValueError, ("value:", r"\(4, 6\)", r"\(6, 4\)")),
        (block, {"eps": -1.0}, ValueError, ("eps:", "-1.0", "0 or more")),
        (block, {"norm": Norm(torch.ones(5), training=True)}, ValueError, ("weight of norm:", r"\(5,\)", r"\(6,\)")),
        (block, {"x": torch.randn(1, 6, 1, 1)}, ValueError, ("x:", "more than one value per channel")),
        (functional.double_normalize, {"logits": torch.randn(5)}, ValueError, ("logits:", r"\(5,\)", "N, M")),
        (functional.double_normalize, {"logits": torch.ones(5, 4).int()}, TypeError, ("logits:", "torch.int32")),
        (functional.double_normalize, {"logits": torch.ones(5, 0)}, ValueError, ("logits:", "0 slots", "at least 1")),
        (
            functional.double_normalize,
            {"logits": torch.ones(5, 4), "process_group": 0},
            TypeError,
            ("process_group:", "0"),
        ),
        (functional.double_normalize, {"logits": torch.ones(5, 4), "group": 3}, ValueError, ("group:", "3", "4 slots")),
        (functional.double_normalize, {"logits": torch.ones(5, 4), "dims": 1}, ValueError, ("dims:", "1")),
        (functional.double_normalize, {"logits": torch.ones(5, 4), "dims": (1, -1)}, ValueError, ("dims:", "two axes")),
        (functional.double_normalize, {"logits": torch.ones(5, 4), "dims": (0, 2)}, ValueError, ("dims:", "two axes")),
        (functional.double_normalize, {"logits": torch.ones(5, 4), "dims": (0, 1.0)}, TypeError, ("dims:", "1.0")),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_of_external_attention(call, arguments, error, words):
    with pytest.raises(error) as caught:
        call(**arguments)
    for word in words:
        assert re.search(word, str(caught.value))


def test_mixed_types_of_external_attention_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(TOKENS.bfloat16()).dtype == attend(TOKENS, KEY.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="memory_key"):
            attend(TOKENS, KEY.half())


SEQUENCE, MEMORIES = torch.randn(2, 5, 4), (torch.randn(6, 2), torch.randn(3, 6))
#: By argument, a call with it that takes 2.
INTEGERS = {
    "num_segments": lambda value: call(num_segments=value),
    "num_segments of the shift": lambda value: functional.temporal_shift(X, value, 3),
    "num_segments of a module": lambda value: aia_kernels.CinST(value)(X),
    "num_segments of a network": lambda value: aia_kernels.models.aia_resnet50(num_segments=value),
    "fold_div": lambda value: functional.temporal_shift(X, 4, value),
    "fold_div of a module": lambda value: aia_kernels.TemporalShift(4, value)(X),
    "heads": lambda value: functional.external_attention(SEQUENCE, *MEMORIES, heads=value),
    "group": lambda value: functional.double_normalize(SEQUENCE, group=value),
    "S": lambda value: aia_kernels.ExternalAttention(4, S=value),
    "k": lambda value: aia_kernels.ExternalAttention2d(4, k=value),
    "num_heads": lambda value: aia_kernels.MultiHeadExternalAttention(4, num_heads=value),
}


@pytest.mark.parametrize("argument", INTEGERS)
def test_integers(argument):
    """One notion of an integer: Python's, numpy's and a tensor of one; anything else is named."""
    for value in (2, numpy.int64(2), torch.tensor(2), torch.tensor([2])):
        INTEGERS[argument](value)
    name = argument.split()[0]
    for value in (torch.tensor([2, 2]), torch.tensor(2.0), 2.0, "2", None, True, (2,), numpy.array([2, 2])):
        if not (argument == "group" and value is None):
            with pytest.raises(TypeError, match=rf"{name}: got .*, expected an integer"):
                INTEGERS[argument](value)
