"""What the fused passes of external attention refuse in Triton, before anything is launched: a kernel would read it in
silence. The raw passes stand in test_operator_checks.py."""

from __future__ import annotations

import math
import random

import pytest
import torch
from fuzz import spoiled
from raw_arguments import NO_DEVICE, changed, launches_refused, of, places, put, to, wide
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from aia_kernels import backends

passes = backends.passes("triton", "external_attention")
B, N, HEADS, WIDTH, K, V = 2, 7, 2, 6, 5, 4
M = HEADS * WIDTH


def good() -> dict[str, list]:
    """Arguments that each pass takes, fresh: two heads of six columns in groups of three."""
    x, padding = torch.randn, torch.zeros(B, N, dtype=torch.bool)
    attention = [x(B, N, M), x(B, M)]
    keep, settings = torch.ones(B, N, M, dtype=torch.uint8), (3, 1e-9, padding)
    value, inner = x(HEADS, V, WIDTH), [x(M), x(M, M), x(M)]
    return {
        "logits": [x(B, N, HEADS * K), x(HEADS, WIDTH, K), padding],
        # It starts a kernel for groups that are wider than a tile.
        "normalise": [x(B, N, 400), x(B, 400), 200, *settings[1:]],
        "moments": [attention, *settings],
        "values": [attention, value, x(HEADS * V), keep, 1.25, x(B, N, HEADS * V), *settings],
        "signed": [x(B, N, M), torch.zeros(B, N, 2, dtype=torch.uint8)],
        "value_gradient": [x(B, N, HEADS * V), attention, keep, 1.25, [HEADS, V, WIDTH], x(M), *settings, True],
        "attention_gradient": [x(B, N, HEADS * V), attention, value, keep, 1.25, *inner, *settings],
        "logits_gradient": [
            *(x(B, N, M), attention, x(B, M), x(B, N, HEADS * K), x(HEADS, WIDTH, K), x(B, N, HEADS * K)),
            *(*settings, True),
        ],
    }


def call(name: str, arguments: list) -> None:
    with launches_refused():
        getattr(passes, name)(*arguments)


@pytest.mark.parametrize("name", good())
def test_good_arguments_are_taken(name):
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        call(name, good()[name])


def in_pieces() -> list:
    """The attention of groups wider than a tile, which keeps r and norm of each token and group too."""
    return [torch.randn(B, N, 400), torch.randn(B, 400 + 2 * N * 2)]


def test_groups_in_pieces_keep_more_rows():
    logits, rows = in_pieces()
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        call("moments", [(logits, rows), 200, 0.0, None])
    with pytest.raises(ValueError, match=r"rows must be contiguous float32 \[2, 428\], got float32 \[2, 400\]"):
        call("moments", [(logits, rows[:, :400].contiguous()), 200, 0.0, None])


#: What is wrong: pass, which argument and which entry of it, what it becomes, the words expected.
BAD = {
    "logits: x of two axes": ("logits", 0, lambda x: x[0], r"x must be \[B, N, d\]"),
    "logits: features of x": ("logits", 0, lambda x: x[..., 1:], r"x must be float32 \[2, 7, 10\]"),
    "logits: integers": ("logits", 0, to(torch.int32), "x must be float16, bfloat16, float32 or float64, got int32"),
    "logits: key's type": ("logits", 1, to(torch.float64), "key must be float32 with three axes"),
    "logits: key of two axes": ("logits", 1, lambda k: k[0], "key must be float32 with three axes"),
    "logits: no column": ("logits", 1, lambda k: k[:, :0], "key must be .* not empty"),
    "logits: padding's type": ("logits", 2, to(torch.uint8), r"padding must be contiguous bool \[2, 7\]"),
    "normalise: apart": ("normalise", 0, wide(2), r"logits must be contiguous \[B, N, M\]"),
    "normalise: lse's type": ("normalise", 1, to(torch.float64), r"lse must be contiguous float32 \[2, 400\]"),
    "normalise: eps": ("normalise", 3, put(math.nan), "eps must not be negative, infinite or NaN, got nan"),
    "moments: rows": ("moments", (0, 1), lambda r: r[:, 1:].contiguous(), r"rows must be contiguous float32 \[2, 12\]"),
    "moments: rows apart": ("moments", (0, 1), wide(1), "rows must be contiguous"),
    "moments: group": ("moments", 1, put(5), "group must divide the 12 columns of the attention, got 5"),
    "moments: no group": ("moments", 1, put(0), "group must divide the 12 columns of the attention, got 0"),
    "moments: eps": ("moments", 2, put(-1.0), "eps must not be negative"),
    "values: a group over heads": ("values", 6, put(4), "group must divide the 6 columns of a head, got 4"),
    "values: columns of value": ("values", 1, lambda v: v[..., 1:], "the attention must have 2 x 5 columns"),
    "values: value's type": ("values", 1, to(torch.bfloat16), "value must be float32 with three axes"),
    "values: bias's size": ("values", 2, lambda b: b[1:], r"bias must be float32 \[8\]"),
    "values: bias's type": ("values", 2, to(torch.bfloat16), r"bias must be float32 \[8\]"),
    "values: keep's type": ("values", 3, to(torch.bool), r"keep must be contiguous uint8 \[2, 7, 12\]"),
    "values: keep apart": ("values", 3, wide(2), "keep must be contiguous"),
    "values: residual's size": ("values", 5, lambda r: r[:, 1:], r"residual must be float32 \[2, 7, 8\]"),
    "signed: grad_y's rank": ("signed", 0, lambda g: g[0], r"grad_y must be \[B, N, d\]"),
    "signed: stored otherwise": ("signed", 0, lambda g: g.mT.contiguous().mT, r"signs must be contiguous uint8"),
    "signed: signs' type": ("signed", 1, to(torch.int32), r"signs must be contiguous uint8 \[2, 7, 2\]"),
    "signed: signs apart": ("signed", 1, wide(2), "signs must be contiguous"),
    "value_gradient: tokens": ("value_gradient", 0, lambda g: g[:, 1:], r"grad must be float32 \[2, 7, 8\]"),
    "value_gradient: features": ("value_gradient", 0, lambda g: g[..., 1:], r"grad must be float32 \[2, 7, 8\]"),
    "value_gradient: no heads": ("value_gradient", 4, put([0, V, WIDTH]), "shape must be that of a value"),
    "value_gradient: heads": ("value_gradient", 4, put([5, V, 2]), "the attention must have 5 x 2 columns"),
    "value_gradient: origin": ("value_gradient", 5, lambda o: o[1:], r"origin must be contiguous float32 \[12\]"),
    "attention_gradient: constant alone": ("attention_gradient", 6, put(None), "inner and constant must come together"),
    "attention_gradient: no origin": ("attention_gradient", 5, put(None), "inner and constant must come together"),
    "attention_gradient: inner": (
        "attention_gradient",
        6,
        lambda i: i[1:],
        r"inner must be contiguous float32 \[12, 12\]",
    ),
    "attention_gradient: inner's type": ("attention_gradient", 6, to(torch.bfloat16), "inner must be contiguous"),
    "attention_gradient: grad": ("attention_gradient", 0, lambda g: g[..., 1:], r"grad must be float32 \[2, 7, 8\]"),
    "logits_gradient: apart": ("logits_gradient", 0, wide(1), "grad_attention must be contiguous"),
    "logits_gradient: its type": ("logits_gradient", 0, to(torch.float64), "grad_attention must be contiguous"),
    "logits_gradient: reduced": (
        "logits_gradient",
        2,
        lambda d: d[:1],
        r"reduced must be contiguous float32 \[2, 12\]",
    ),
    "logits_gradient: x": ("logits_gradient", 3, lambda x: x[..., 1:], r"x must be float32 \[2, 7, 10\]"),
    "logits_gradient: key": ("logits_gradient", 4, lambda k: k[:, 1:], "the attention must have 2 x 5 columns"),
    "logits_gradient: residual": (
        "logits_gradient",
        5,
        lambda r: r[..., 1:],
        r"residual_grad must be float32 \[2, 7, 10\]",
    ),
}


@pytest.mark.parametrize("name, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(name, place, change, words):
    with pytest.raises(ValueError, match=words):
        call(name, changed(good()[name], place, change))


#: Where the tensors of each pass are, and which of them it can do without.
OPERANDS = [(name, place) for name, arguments in good().items() for place in places(arguments)]
OPTIONAL = {
    "logits": (2,),
    "normalise": (4,),
    "moments": (3,),
    "values": (2, 3, 5, 8),
    "value_gradient": (2, 5, 8),
    "attention_gradient": (3, 10),
    "logits_gradient": (5, 8),
}


@pytest.mark.parametrize("name, place", OPERANDS)
def test_memory_of_every_operand(name, place):
    """Between the addresses of its type, negated in name only, and beyond the end of its storage."""
    given = of(good()[name], place)
    if given.element_size() > 1:
        with pytest.raises(ValueError, match="must begin at an address that is a multiple of its"):
            call(name, changed(good()[name], place, lambda t: spoiled.misaligned(random.Random(0), t)))
    if given.is_floating_point():
        with pytest.raises(ValueError, match="must hold its own values"):
            call(name, changed(good()[name], place, torch._neg_view))
    arguments = good()[name]
    of(arguments, place).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must lie inside its storage of 0 bytes"):
        call(name, arguments)


@pytest.mark.parametrize("name, place", OPERANDS)
def test_types_sizes_and_absence_of_every_operand(name, place):
    wrong = torch.complex64 if of(good()[name], place).is_floating_point() else torch.float32
    for change in (to(wrong), lambda t: t.repeat(*[2] * t.ndim), lambda t: t[None]):
        with pytest.raises(ValueError, match="must"):
            call(name, changed(good()[name], place, change))
    error, words = (RuntimeError, NO_DEVICE) if place in OPTIONAL.get(name, ()) else (ValueError, "must")
    with pytest.raises(error, match=words):
        call(name, changed(good()[name], place, put(None)))


def test_a_bias_of_any_strides():
    """A parameter may be a column of a matrix: the pass takes its numbers, not what lies between them."""
    attention, bias = [torch.rand(B, N, M), torch.rand(B, M)], torch.randn(HEADS * V, 2)[:, 0]
    arguments: list[Tensor | None] = [attention, torch.randn(HEADS, V, WIDTH), bias, None, 1.0, None, 3, 0.0, None]
    got, want = (passes.values(*changed(arguments, 2, put(b)))[0] for b in (bias, bias.contiguous()))
    assert torch.equal(got, want)
