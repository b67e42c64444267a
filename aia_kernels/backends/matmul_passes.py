"""External attention's fused passes, made of the framework's matrix products and a backend's elementary passes.

What a backend takes that has double_norm and residual (schemas.DOUBLE_NORM_PASSES, schemas.RESIDUAL_PASSES) but no
products of its own. The contract stands in algorithms/external_attention_passes.py. Logits and A are [B, N, M]
contiguous in the type of x, and the pair that is kept is A, written over the logits, and its mass. Products over tokens
that give a parameter's gradient are accumulated in accumulate_dtype; x-sized tensors that lie feature by feature enter
as transposed operands, without a copy.

Where a call is a launch (_is_launched), the fewest operators are taken. On a CPU, where a call costs little, those are
that its library is fast at.

Passes overwrite their operands. Whoever sees the framework's operators, a mode or a tensor of another kind, may have
kept what they returned; there products are written into tensors made here (out=), of which nobody expects that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import schemas
from ..algorithms import folds
from ..algorithms.external_attention_passes import Attention, BatchTerm, DoubleNorm, Dropout
from ..common.dtypes import accumulate_dtype
from ..common.running_statistics import move_statistics_
from .choices import FEW_SLOTS


class MatmulPasses:
    """The fused passes over the elementary ones that ``passes`` has as attributes, which stay reachable by name."""

    column_statistics: Callable[..., tuple[Tensor, Tensor]]
    double_norm_: Callable[..., Tensor]
    double_norm_backward_reduce: Callable[..., Tensor]
    double_norm_backward_: Callable[..., None]
    residual_relu_: Callable[..., Tensor]
    residual_relu_backward: Callable[..., tuple[Tensor, Tensor]]
    move_statistics_: Callable[..., None]
    fold: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    fold_sums: Callable[..., tuple[Tensor, Tensor]]
    fold_back: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    def __init__(self, passes: Any):
        for name in (*schemas.DOUBLE_NORM_PASSES, *schemas.RESIDUAL_PASSES):
            setattr(self, name, getattr(passes, name))
        self.move_statistics_ = getattr(passes, "move_statistics_", move_statistics_)
        for name in schemas.FOLD_PASSES:
            setattr(self, name, getattr(passes, name, getattr(folds, name)))

    def logits(self, x: Tensor, key: Tensor, *, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = _by_heads(x, key.mT)
        return logits, *self.column_statistics(logits, padding)

    def normalize(self, logits: Tensor, lse: Tensor, *, norm: DoubleNorm) -> Attention:
        return logits, self.double_norm_(logits, lse, *norm)

    def moments(self, attention: Attention, *, norm: DoubleNorm) -> tuple[Tensor, Tensor, Tensor]:
        a = attention[0].flatten(0, 1)
        origin = a.mean(0, dtype=accumulate_dtype(a.dtype))
        a = a - origin
        return origin, a.sum(0), a.mT @ a

    def values(
        self,
        attention: Attention,
        value: Tensor,
        *,
        norm: DoubleNorm,
        bias: Tensor | None = None,
        dropout: Dropout | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        a = _dropped(attention[0], dropout)
        if residual is None:
            return _by_heads(a, value.mT, bias), None
        z = _times(a, value[0].mT, by_feature=_by_feature(residual))
        return z, self.residual_relu_(z, residual, bias)

    def signed(self, grad_y: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        return self.residual_relu_backward(grad_y, signs)

    def value_gradient(
        self,
        grad: Tensor,
        attention: Attention,
        *,
        shape: Sequence[int],
        norm: DoubleNorm,
        dropout: Dropout | None = None,
        origin: Tensor | None = None,
        needs_sums: bool,
    ) -> tuple[Tensor, Tensor | None]:
        a = _dropped(attention[0], dropout) if origin is None else attention[0] - origin
        sums = grad.sum((0, 1), dtype=accumulate_dtype(grad.dtype)) if needs_sums else None
        return _over_tokens(grad, a, shape), sums

    def attention_gradient(
        self,
        grad: Tensor,
        attention: Attention,
        *,
        value: Tensor,
        norm: DoubleNorm,
        dropout: Dropout | None = None,
        batch_term: BatchTerm | None = None,
    ) -> tuple[Tensor, Tensor]:
        a = attention[0]
        if batch_term is None:
            grad_attention = _by_heads(grad, value)
            if dropout is not None:
                grad_attention.mul_(dropout.keep).mul_(dropout.scale)
        else:
            # The two terms cancel in part: they are added in the type that they come in.
            origin, inner, constant = batch_term
            term = _mm((a - origin).flatten(0, 1), inner, constant).view_as(a)
            grad_attention = _times(grad, value[0], added_to=term.to(a.dtype))
        return grad_attention, self.double_norm_backward_reduce(grad_attention, a, norm.group)

    def logits_gradient(
        self,
        grad_attention: Tensor,
        attention: Attention,
        *,
        reduced: Tensor,
        x: Tensor,
        key: Tensor,
        norm: DoubleNorm,
        residual_grad: Tensor | None = None,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor]:
        grad_logits = grad_attention
        self.double_norm_backward_(grad_logits, *attention, reduced, norm.group)
        grad_key = _over_tokens(grad_logits, x, key.shape)
        if not needs_x:
            return None, grad_key
        if key.shape[2] < x.shape[2]:
            grad_x = _by_heads(grad_logits, key)
            return grad_x if x.is_contiguous() else torch.empty_like(x).copy_(grad_x), grad_key
        return _times(grad_logits, key[0], by_feature=_by_feature(x), added_to=residual_grad), grad_key

    def empty_attention(self, x: Tensor, *, columns: int, group: int) -> Attention:
        b, n, _ = x.shape
        dtype = accumulate_dtype(x.dtype)
        return x.new_empty((b, n, columns)), x.new_empty((b, n, columns // group), dtype=dtype)

    def empty_signs(self, o: Tensor) -> Tensor:
        return o.new_empty(((o.numel() + 7) // 8,), dtype=torch.uint8)


def _wide(t: Tensor) -> bool:
    """Whether t has the type in which products are accumulated: rounding one before it is added then costs nothing."""
    return t.dtype == accumulate_dtype(t.dtype)


def _by_feature(t: Tensor) -> bool:
    """Whether t [B, N, d] is stored feature by feature, its tokens contiguous."""
    return t.shape[2] > 1 and t.stride(2) != 1


def _one_matrix(t: Tensor) -> bool:
    """Whether the tokens of all samples of t [B, N, d] are rows of one matrix."""
    return t.shape[0] == 1 or t.shape[1] == 1 or t.stride(0) == t.shape[1] * t.stride(1)


def _dropped(a: Tensor, dropout: Dropout | None) -> Tensor:
    return a if dropout is None else torch.mul(a, dropout.keep, out=torch.empty_like(a)).mul_(dropout.scale)


def _is_seen(t: Tensor) -> bool:
    """Whether somebody else than the caller gets to see the results of operators on t."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or type(t) is not Tensor)


def _is_launched(t: Tensor) -> bool:
    """Whether an operator on t costs a launch, whatever it does."""
    return t.device.type != "cpu"


def _mm(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a [p, q] @ b [q, r], and a row [r] added, to be overwritten."""
    out = a.new_empty((a.shape[0], b.shape[1])) if _is_seen(a) else None
    return torch.mm(a, b, out=out) if added is None else torch.addmm(added, a, b, out=out)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [n, p, q] @ b [n, q, r], to be overwritten."""
    return torch.bmm(a, b, out=a.new_empty((*a.shape[:2], b.shape[2]))) if _is_seen(a) else torch.bmm(a, b)


def _times(t: Tensor, matrix: Tensor, by_feature: bool = False, added_to: Tensor | None = None) -> Tensor:
    """t [B, N, p] times a matrix [p, q]: [B, N, q], its tokens contiguous if by_feature, else its features. To be
    overwritten.

    added_to, if given, is overwritten by its sum with the product, and decides the storage.
    """
    b, n, _ = t.shape
    if not _is_launched(t) and _turns_result(t, by_feature if added_to is None else _by_feature(added_to)):
        # With t as it lies, and its narrow result turned afterwards: twice as fast as with t as a transposed operand.
        product = _bmm(matrix.mT.contiguous().expand(b, -1, -1), t.mT).mT
        return product.contiguous() if added_to is None else added_to.add_(product)
    if added_to is None and by_feature and b == 1:
        return _mm(matrix.mT, t[0].mT).unsqueeze(0).mT
    if added_to is None and by_feature:
        return _bmm(matrix.mT.expand(b, -1, -1), t.mT).mT
    if added_to is None and _one_matrix(t):
        rows = t.flatten(0, 1)
        if matrix.shape[1] < FEW_SLOTS <= matrix.shape[0] and not _is_launched(t):
            # A library's product of few columns takes up to four times as long as one of few rows.
            product = rows.new_empty((b * n, matrix.shape[1]))  # who sees what operators return sees no overwritten one
            return product.copy_(_mm(matrix.mT, rows.mT).mT).view(b, n, -1)
        return _mm(rows, matrix).view(b, n, -1)
    if added_to is None:
        return _bmm(t, matrix.expand(b, -1, -1))
    if _by_feature(added_to):
        added_to.mT.baddbmm_(matrix.mT.expand(b, -1, -1), t.mT)
    else:
        added_to.baddbmm_(t, matrix.expand(b, -1, -1))
    return added_to


def _turns_result(t: Tensor, by_feature: bool) -> bool:
    return _by_feature(t) and not by_feature and _wide(t)


def _rows(t: Tensor, p: int) -> Tensor:
    """t [B, N, H * p] as [B, N * H, p]: what one matrix does to every head it does to rows of one product."""
    return t if t.shape[2] == p else t.reshape(t.shape[0], -1, p)


def _by_heads(t: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each head's features of t [B, N, H * p] times its matrix of [H, p, q], or that of all, [1, p, q]: [B, N, H * q],
    contiguous. With a bias [H * q] it is added."""
    heads, p, q = matrices.shape
    b, n, d = t.shape
    if heads == 1 and d == p and bias is not None and _is_launched(t) and _one_matrix(t):
        return torch.addmm(bias.to(t.dtype), t.flatten(0, 1), matrices[0]).view(b, n, q)
    if heads == 1:
        out = _times(_rows(t, p), matrices[0])
    else:
        rows, out = t.reshape(b * n, heads * p), t.new_empty((b * n, heads * q))
        for h in range(heads):
            torch.mm(rows[:, h * p : (h + 1) * p], matrices[h], out=out[:, h * q : (h + 1) * q])
    out = out.view(b, n, -1)
    return out if bias is None else out.add_(bias)


def _over_tokens(s: Tensor, t: Tensor, shape: Sequence[int]) -> Tensor:
    """For each head the product s^T t over all tokens of s [B, N, H * p] and t [B, N, H * q]: [H, p, q]; or their sum,
    [1, p, q], as the shape says."""
    heads, p, q = shape
    dtype = accumulate_dtype(s.dtype)
    if heads == 1:
        s, t = _rows(s, p), _rows(t, q)
    if heads == 1 and _is_launched(s):
        return _over_tokens_at_once(s, t)
    if heads == 1 and p > q and not _by_feature(s) and (q < FEW_SLOTS or torch.get_num_threads() == 1):
        # Rows of the longer side are contiguous: one core runs faster along them, by a fifteenth with 64 slots. But a
        # library divides the longer side among cores, and two of them are a tenth faster with its elements as rows.
        return _over_tokens(t, s, (1, q, p)).mT.contiguous()
    one_matrix = _one_matrix(s) and _one_matrix(t)
    if heads == 1 and one_matrix and s.dtype == t.dtype == dtype:
        return _mm(s.flatten(0, 1).mT, t.flatten(0, 1)).unsqueeze(0)
    # bfloat16 has the range of the wider type, and the framework's product rounds its sum once, as it does a gradient.
    narrow = s.dtype == t.dtype == torch.bfloat16
    factor = torch.bfloat16 if narrow else dtype
    if s.dtype == t.dtype == factor and one_matrix:
        pairs = [(s.flatten(0, 1), t.flatten(0, 1))]
    else:
        # One sample after the other, so that a copy in the wider type stays small.
        pairs = ((one.to(factor), other.to(factor)) for one, other in zip(s, t, strict=True))
    out = s.new_zeros((heads, p, q), dtype=dtype)
    for one, other in pairs:
        if heads > 1:
            one, other = one.unflatten(1, (heads, p)).transpose(0, 1), other.unflatten(1, (heads, q)).transpose(0, 1)
        if narrow:
            out += one.mT @ other
        elif heads == 1:
            out[0].addmm_(one.mT, other)
        else:
            out.baddbmm_(one.mT, other)
    return out


def _over_tokens_at_once(s: Tensor, t: Tensor) -> Tensor:
    """_over_tokens of one head in the fewest launches. That of bfloat16 alone stays in this type."""
    dtype = accumulate_dtype(s.dtype)
    if not s.dtype == t.dtype == torch.bfloat16:
        s, t = s.to(dtype), t.to(dtype)
    if _one_matrix(s) and _one_matrix(t):
        return _mm(s.flatten(0, 1).mT, t.flatten(0, 1)).unsqueeze(0)
    return torch.bmm(s.mT, t).sum(0, keepdim=True)  # of bfloat16 too this adds in float32
