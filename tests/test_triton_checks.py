"""The Triton passes refuse what they cannot do before anything is launched: a kernel would read it in silence."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from aia_kernels import backends, maps

passes = backends.passes("triton")
B, T, C, H, W = SIZES = 2, 3, 4, 5, 6
X = torch.randn(SIZES)
WIDE = torch.randn(B, T, 2 * C, H, W)[:, :, :C]


def of(context, features=0, dtype=torch.float32):
    lead = (B, features) if features else (B,)
    return torch.zeros((*lead, maps.packed_size(SIZES, context)), dtype=dtype)


GATE, GRAD, INDEX = of(1), of(1, 2), of(1, dtype=torch.uint8)
NONE = None, 0, None, None, 0
DIMS, WEIGHT, NORM, STATISTICS = [T, H, W], [torch.randn(1, 2, 3, 3, 3)], torch.ones(1, 4), torch.ones(1, 3)
LOGITS, LSE, PADDING = torch.randn(2, 7, 6), torch.zeros(2, 6), torch.zeros(2, 7, dtype=torch.bool)
TOKENS, KEY, VALUE = torch.randn(2, 7, 5), torch.randn(1, 6, 5), torch.randn(1, 5, 6)
KEPT = (LOGITS, LSE)

BAD = {
    "x in part": (lambda: passes.pool(WIDE, 1, None, 0), "x is .* stored densely"),
    "x empty": (lambda: passes.pool(X[:0], 1, None, 0), "x is .* not empty"),
    "x of four axes": (lambda: passes.recalibrate(X[0], GATE, 1), "x is "),
    "shift of a part": (lambda: passes.temporal_shift(WIDE, 1, False), "x is .* stored densely"),
    "fold": (lambda: passes.temporal_shift(X, 3, False), "fold is 3"),
    "context": (lambda: passes.pool(X, 2, None, 0), "context is 2"),
    "gate without context": (lambda: passes.pool(X, 3, GATE, 0), "context of gate is 0"),
    "context without gate": (lambda: passes.pool(X, 3, None, 1), "gate is absent"),
    "gate of another context": (lambda: passes.recalibrate(X, of(3), 1), "gate is .* expected torch.float32"),
    "gate of another type": (lambda: passes.recalibrate(X, GATE.double(), 1), "gate is torch.float64"),
    "strided gate": (lambda: passes.recalibrate(X, torch.zeros(B, 2 * T * H * W)[:, ::2], 1), "gate has strides"),
    "gradient alone": (lambda: passes.unpool(X, GATE, GRAD, None, 1, *NONE), "grad_pooled and argmax come together"),
    "index of another type": (lambda: passes.unpool(X, GATE, GRAD, INDEX.short(), 1, *NONE), "argmax is torch.int16"),
    "index of another size": (lambda: passes.unpool_reduce(X, GRAD, of(3, dtype=torch.uint8), 1, 1), "argmax is"),
    "inner gradient without context": (
        lambda: passes.unpool(X, GATE, GRAD, INDEX, 1, None, 0, GRAD, INDEX, 0),
        "context of inner_grad_pooled is 0",
    ),
    "another layout": (lambda: passes.recalibrate_reduce(X.mT.contiguous().mT, X, 1), "grad_y is"),
    "dims": (lambda: passes.gate_again(GRAD, WEIGHT, NORM, [T, H]), "dims are"),
    "negative dims": (lambda: passes.gate_again(GRAD, WEIGHT, NORM, [-T, -H, W]), "dims are"),
    "dims of another map": (lambda: passes.gate_again(GRAD, WEIGHT, NORM, [T, H, W + 1]), "pooled is"),
    "weights": (lambda: passes.gate_again(GRAD, WEIGHT * 2, NORM, DIMS), "weight is"),
    "norm": (lambda: passes.gate_again(GRAD, WEIGHT, NORM[:, :3], DIMS), "norm is"),
    "z": (lambda: passes.gate_backward_reduce(GATE, GATE[:, 1:], NORM, DIMS), "z is"),
    "statistics": (
        lambda: passes.gate_backward(GATE, GATE, NORM, None, NORM, GRAD, WEIGHT, DIMS),
        "statistics is",
    ),
    "group": (lambda: passes.double_norm_(LOGITS.clone(), LSE, 4, 0.0, None), "group is 4"),
    "strided logits": (lambda: passes.column_statistics(LOGITS.mT, None), "logits is .* contiguous"),
    "padding of numbers": (lambda: passes.column_statistics(LOGITS, PADDING.float()), "padding is torch.float32"),
    "padding of another size": (lambda: passes.column_statistics(LOGITS, PADDING[:, 1:]), "padding is"),
    "lse": (lambda: passes.double_norm_(LOGITS.clone(), LSE[:, 1:], 6, 0.0, None), "lse is"),
    "attention": (lambda: passes.double_norm_backward_reduce(LOGITS, LOGITS[:1], 6), "attention is"),
    "key": (lambda: passes.logits(TOKENS, KEY[..., 1:], None), "x is"),
    "key of another type": (lambda: passes.logits(TOKENS, KEY.double(), None), "key is torch.float64"),
    "value": (lambda: passes.values(KEPT, VALUE[..., 1:], None, None, 1.0, None, 5, 0.0, None), "6 columns"),
    "residual": (lambda: passes.values(KEPT, VALUE, None, None, 1.0, TOKENS[:, 1:], 6, 0.0, None), "residual is"),
    "keep": (lambda: passes.values(KEPT, VALUE, None, LOGITS, 1.0, None, 6, 0.0, None), "keep is torch.float32"),
    "gradient": (
        lambda: passes.attention_gradient(TOKENS[..., 1:], KEPT, VALUE, None, 1.0, None, None, None, 6, 0.0, None),
        "grad is",
    ),
    "tokens of a gradient": (
        lambda: passes.value_gradient(TOKENS[:, 1:], KEPT, None, 1.0, 1, None, 6, 0.0, None, False),
        "grad is",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()
