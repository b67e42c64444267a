"""What the fused passes of external attention refuse in Triton, before anything is launched: a kernel would read it in
silence. The raw passes stand in test_operator_checks.py."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fuzz import spoiled
from raw_arguments import NO_DEVICE, launches_refused, put, to, wide
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from aia_kernels import backends
from aia_kernels.algorithms.external_attention_passes import BatchTerm, DoubleNorm, Dropout

passes = backends.passes("triton", "external_attention")
B, N, HEADS, WIDTH, K, V = 2, 7, 2, 6, 5, 4
M = HEADS * WIDTH


class Kept(NamedTuple):
    """What is kept of the attention."""

    logits: Tensor
    rows: Tensor


def good() -> dict[str, dict[str, Any]]:
    """Arguments that each pass takes, fresh: two heads of six columns in groups of three."""
    x, padding = torch.randn, torch.zeros(B, N, dtype=torch.bool)
    attention = Kept(x(B, N, M), x(B, M))
    norm, dropout = DoubleNorm(3, 1e-9, padding), Dropout(torch.ones(B, N, M, dtype=torch.uint8), 1.25)
    key, value, batch_term = x(HEADS, WIDTH, K), x(HEADS, V, WIDTH), BatchTerm(x(M), x(M, M), x(M))
    common = {"attention": attention, "norm": norm}
    return {
        "logits": {"x": x(B, N, HEADS * K), "key": key, "padding": padding},
        # It starts a kernel for groups that are wider than a tile.
        "normalize": {"logits": x(B, N, 400), "lse": x(B, 400), "norm": norm._replace(group=200)},
        "moments": common,
        "values": common | {"value": value, "bias": x(HEADS * V), "dropout": dropout, "residual": x(B, N, HEADS * V)},
        "signed": {"grad_y": x(B, N, M), "signs": torch.zeros(B, N, 2, dtype=torch.uint8)},
        "value_gradient": common
        | {"grad": x(B, N, HEADS * V), "shape": [HEADS, V, WIDTH], "dropout": dropout}
        | {"origin": x(M), "needs_sums": True},
        "attention_gradient": common
        | {"grad": x(B, N, HEADS * V), "value": value, "dropout": dropout, "batch_term": batch_term},
        "logits_gradient": common
        | {"grad_attention": x(B, N, M), "reduced": x(B, M), "x": x(B, N, HEADS * K), "key": key}
        | {"residual_grad": x(B, N, HEADS * K), "needs_x": True},
    }


def of(arguments: dict[str, Any], place: str) -> Any:
    """An argument, or an entry of one: "x", "norm.padding"."""
    name, _, entry = place.partition(".")
    return getattr(arguments[name], entry) if entry else arguments[name]


def changed(arguments: dict[str, Any], place: str, change: Callable) -> dict[str, Any]:
    """The arguments with one of them, or an entry of one, changed."""
    name, _, entry = place.partition(".")
    new = change(of(arguments, place))
    return arguments | {name: arguments[name]._replace(**{entry: new}) if entry else new}


def places(arguments: dict[str, Any]) -> list[str]:
    """Where the tensors are among arguments."""
    entries = {name: getattr(value, "_fields", ()) for name, value in arguments.items()}
    found = [*arguments, *(f"{name}.{entry}" for name in entries for entry in entries[name])]
    return [place for place in found if isinstance(of(arguments, place), Tensor)]


def call(name: str, arguments: dict[str, Any]) -> None:
    with launches_refused():
        getattr(passes, name)(**arguments)


@pytest.mark.parametrize("name", good())
def test_good_arguments_are_taken(name):
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        call(name, good()[name])


def in_pieces() -> list:
    """The attention of groups wider than a tile, which keeps r and norm of each token and group too."""
    return [torch.randn(B, N, 400), torch.randn(B, 400 + 2 * N * 2)]


def test_groups_in_pieces_keep_more_rows():
    logits, rows = in_pieces()
    norm = DoubleNorm(200, 0.0, None)
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        call("moments", {"attention": (logits, rows), "norm": norm})
    with pytest.raises(ValueError, match=r"rows must be contiguous float32 \[2, 428\], got float32 \[2, 400\]"):
        call("moments", {"attention": (logits, rows[:, :400].contiguous()), "norm": norm})


#: Pass, and what is wrong: which argument or entry of one, what it becomes, the words expected.
BAD = {
    "logits: x of two axes": ("x", lambda x: x[0], r"x must be \[B, N, d\]"),
    "logits: features of x": ("x", lambda x: x[..., 1:], r"x must be float32 \[2, 7, 10\]"),
    "logits: integers": ("x", to(torch.int32), "x must be float16, bfloat16, float32 or float64, got int32"),
    "logits: key's type": ("key", to(torch.float64), "key must be float32 with three axes"),
    "logits: key of two axes": ("key", lambda k: k[0], "key must be float32 with three axes"),
    "logits: no column": ("key", lambda k: k[:, :0], "key must be .* not empty"),
    "logits: padding's type": ("padding", to(torch.uint8), r"padding must be contiguous bool \[2, 7\]"),
    "normalize: apart": ("logits", wide(2), r"logits must be contiguous \[B, N, M\]"),
    "normalize: lse's type": ("lse", to(torch.float64), r"lse must be contiguous float32 \[2, 400\]"),
    "normalize: eps": ("norm.eps", put(math.nan), "eps must not be negative, infinite or NaN, got nan"),
    "moments: rows": ("attention.rows", lambda r: r[:, 1:].contiguous(), r"rows must be contiguous float32 \[2, 12\]"),
    "moments: rows apart": ("attention.rows", wide(1), "rows must be contiguous"),
    "moments: group": ("norm.group", put(5), "group must divide the 12 columns of the attention, got 5"),
    "moments: no group": ("norm.group", put(0), "group must divide the 12 columns of the attention, got 0"),
    "moments: eps": ("norm.eps", put(-1.0), "eps must not be negative"),
    "values: a group over heads": ("norm.group", put(4), "group must divide the 6 columns of a head, got 4"),
    "values: columns of value": ("value", lambda v: v[..., 1:], "the attention must have 2 x 5 columns"),
    "values: value's type": ("value", to(torch.bfloat16), "value must be float32 with three axes"),
    "values: bias's size": ("bias", lambda b: b[1:], r"bias must be float32 \[8\]"),
    "values: bias's type": ("bias", to(torch.bfloat16), r"bias must be float32 \[8\]"),
    "values: keep's type": ("dropout.keep", to(torch.bool), r"keep must be contiguous uint8 \[2, 7, 12\]"),
    "values: keep apart": ("dropout.keep", wide(2), "keep must be contiguous"),
    "values: residual's size": ("residual", lambda r: r[:, 1:], r"residual must be float32 \[2, 7, 8\]"),
    "signed: grad_y's rank": ("grad_y", lambda g: g[0], r"grad_y must be \[B, N, d\]"),
    "signed: stored otherwise": ("grad_y", lambda g: g.mT.contiguous().mT, r"signs must be contiguous uint8"),
    "signed: signs' type": ("signs", to(torch.int32), r"signs must be contiguous uint8 \[2, 7, 2\]"),
    "signed: signs apart": ("signs", wide(2), "signs must be contiguous"),
    "value_gradient: tokens": ("grad", lambda g: g[:, 1:], r"grad must be float32 \[2, 7, 8\]"),
    "value_gradient: features": ("grad", lambda g: g[..., 1:], r"grad must be float32 \[2, 7, 8\]"),
    "value_gradient: no heads": ("shape", put([0, V, WIDTH]), "shape must be that of a value"),
    "value_gradient: heads": ("shape", put([5, V, 2]), "the attention must have 5 x 2 columns"),
    "value_gradient: origin": ("origin", lambda o: o[1:], r"origin must be contiguous float32 \[12\]"),
    "attention_gradient: constant alone": ("batch_term.inner", put(None), "inner and constant must come together"),
    "attention_gradient: no origin": ("batch_term.origin", put(None), "inner and constant must come together"),
    "attention_gradient: inner": ("batch_term.inner", lambda i: i[1:], r"inner must be contiguous float32 \[12, 12\]"),
    "attention_gradient: inner's type": ("batch_term.inner", to(torch.bfloat16), "inner must be contiguous"),
    "attention_gradient: grad": ("grad", lambda g: g[..., 1:], r"grad must be float32 \[2, 7, 8\]"),
    "logits_gradient: apart": ("grad_attention", wide(1), "grad_attention must be contiguous"),
    "logits_gradient: its type": ("grad_attention", to(torch.float64), "grad_attention must be contiguous"),
    "logits_gradient: reduced": ("reduced", lambda d: d[:1], r"reduced must be contiguous float32 \[2, 12\]"),
    "logits_gradient: x": ("x", lambda x: x[..., 1:], r"x must be float32 \[2, 7, 10\]"),
    "logits_gradient: key": ("key", lambda k: k[:, 1:], "the attention must have 2 x 5 columns"),
    "logits_gradient: residual": ("residual_grad", lambda r: r[..., 1:], r"residual_grad must be float32 \[2, 7, 10\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(what):
    name, _, _ = what.partition(":")
    place, change, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        call(name, changed(good()[name], place, change))


#: Where the tensors of each pass are, and what it can do without.
OPERANDS = [(name, place) for name, arguments in good().items() for place in places(arguments)]
OPTIONAL = [
    *(("logits", "padding"), ("normalize", "norm.padding"), ("moments", "norm.padding")),
    *(("values", place) for place in ("norm.padding", "bias", "dropout", "residual")),
    *(("value_gradient", place) for place in ("norm.padding", "dropout", "origin")),
    *(("attention_gradient", place) for place in ("norm.padding", "dropout", "batch_term")),
    *(("logits_gradient", place) for place in ("norm.padding", "residual_grad")),
]


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
def test_types_and_sizes_of_every_operand(name, place):
    wrong = torch.complex64 if of(good()[name], place).is_floating_point() else torch.float32
    for change in (to(wrong), lambda t: t.repeat(*[2] * t.ndim), lambda t: t[None]):
        with pytest.raises(ValueError, match="must"):
            call(name, changed(good()[name], place, change))


@pytest.mark.parametrize("name, place", [given for given in OPERANDS if given not in OPTIONAL])
def test_absence_of_every_other_operand(name, place):
    with pytest.raises(ValueError, match="must"):
        call(name, changed(good()[name], place, put(None)))


@pytest.mark.parametrize("name, place", OPTIONAL)
def test_what_a_pass_can_do_without(name, place):
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        call(name, changed(good()[name], place, put(None)))


def test_a_bias_of_any_strides():
    """A parameter may be a column of a matrix: the pass takes its numbers, not what lies between them."""
    bias = torch.randn(HEADS * V, 2)[:, 0]
    attention, value = (torch.rand(B, N, M), torch.rand(B, M)), torch.randn(HEADS, V, WIDTH)
    norm = DoubleNorm(3, 0.0, None)
    got, want = (passes.values(attention, value, norm=norm, bias=b)[0] for b in (bias, bias.contiguous()))
    assert torch.equal(got, want)
