"""The passes of attention by a memory per sample in PyTorch's own operators, for any device.

What a backend takes that has none of its own (schemas.MEMORY_PASSES): the same names, arguments and results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..reference.linear_attention import FEATURES, Form, added


def memory_keys(
    logits: Tensor,
    feature: int,
    heads: int,
    padding: Tensor | None,
    statistics: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    key, name = _by_head(logits, heads)[:, 0], FEATURES[feature]
    b, columns, n = logits.shape
    rows = key.new_empty((b, columns // 2 + (heads if name == "l2" else 0) + (columns if gradients else 0), n))
    phi = _rows_of_phi(rows, key, name)
    if name == "softmax":
        phi.copy_(_softmax_over_tokens(key, padding, statistics))
    else:
        _phi(key, name, phi)
        if padding is not None:
            phi.masked_fill_(_per_token(padding), 0.0)
    return rows, phi.sum(3).flatten(1)


def memory_queries(
    logits: Tensor,
    feature: int,
    heads: int,
    padding: Tensor | None,
    sums: Tensor,
    gamma: Tensor | None,
    eps: float,
) -> Tensor:
    query = _phi(_by_head(logits, heads)[:, 1], FEATURES[feature])
    factor = None if gamma is None else gamma.to(query.dtype)
    if FEATURES[feature] != "softmax":
        inverse = _inverse_mass(query, FEATURES[feature], sums, padding, eps)[0]
        factor = inverse if factor is None else inverse * factor
    elif padding is not None:
        query = query.masked_fill(_per_token(padding), 0.0)
    return (query if factor is None else query.mul_(factor)).flatten(1, 2)


def memory_queries_backward_(
    rows: Tensor,
    logits: Tensor,
    feature: int,
    heads: int,
    padding: Tensor | None,
    sums: Tensor,
    gamma: Tensor | None,
    eps: float,
    reached: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    raw, name = _by_head(logits, heads)[:, 1], FEATURES[feature]
    query = _phi(raw, name)
    reached = reached.to(query.dtype).view(query.shape)
    scale = query.new_ones(1) if gamma is None else gamma.to(query.dtype)
    if name == "softmax":
        if padding is not None:
            query = query.masked_fill(_per_token(padding), 0.0)
        grad_sums, grad_gamma = torch.zeros_like(sums), (query * reached).sum().view(1)
        scaled, grad_query = query * scale, reached * scale
    else:
        inverse, s = _inverse_mass(query, name, sums, padding, eps)
        ratio = (query * reached).sum(2, keepdim=True).mul_(inverse)
        factor = inverse * scale
        grad_mass = (ratio * factor).neg_()
        grad_sums = torch.matmul(query, grad_mass.mT).flatten(1) / query.shape[3]
        grad_gamma = ratio.sum().view(1)
        scaled, grad_query = query * factor, torch.addcmul(reached * factor, s, grad_mass)
    _through_phi(raw, query, grad_query, name, padding, _gradients(rows, raw, 1))
    return scaled.flatten(1, 2), grad_sums, grad_gamma


def memory_keys_backward_(
    rows: Tensor,
    logits: Tensor,
    feature: int,
    heads: int,
    padding: Tensor | None,
    reached: Tensor,
    grad_sums: Tensor,
    reduced: Tensor | None,
) -> None:
    raw, name = _by_head(logits, heads)[:, 0], FEATURES[feature]
    phi, out = _rows_of_phi(rows, raw, name), _gradients(rows, raw, 0)
    grad = (reached.to(rows.dtype) + grad_sums.unsqueeze(2)).view(phi.shape)
    if name != "softmax":
        _through_phi(raw, phi, grad, name, padding, out)
    elif reduced is None:
        out.copy_(torch.ops.aten._softmax_backward_data.default(grad, phi, 3, phi.dtype))
    else:
        torch.mul(grad - reduced.view(*phi.shape[:3], 1), phi, out=out)


def _by_head(logits: Tensor, heads: int) -> Tensor:
    """Keys and queries [B, 2, H, d, N] in accumulate_dtype."""
    return logits.to(accumulate_dtype(logits.dtype)).unflatten(1, (2, heads, -1))


def _rows_of_phi(rows: Tensor, key: Tensor, name: str) -> Tensor:
    """The view [B, H, R, N] of rows that has phi(k)."""
    _, heads, d, _ = key.shape
    count = d + (name == "l2")
    return rows[:, : heads * count].unflatten(1, (heads, count))


def _gradients(rows: Tensor, raw: Tensor, which: int) -> Tensor:
    """The view [B, H, d, N] of rows for the gradient of the keys or of the queries."""
    _, heads, d, _ = raw.shape
    return rows[:, -2 * heads * d :].unflatten(1, (2, heads, d))[:, which]


def _per_token(padding: Tensor) -> Tensor:
    """padding [B, N] over heads and rows."""
    return padding.unsqueeze(1).unsqueeze(1)


def _inverse_length(raw: Tensor) -> Tensor:
    square = raw.square().sum(2, keepdim=True)
    return square.add_(square == 0).rsqrt_()


def _phi(raw: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """phi of raw [B, H, d, N], that of queries where it is a softmax."""
    if name == "softmax":
        return raw.softmax(2)
    if name == "softplus":
        phi = torch.nn.functional.softplus(raw)
        return phi if out is None else out.copy_(phi)
    b, heads, d, n = raw.shape
    out = raw.new_empty((b, heads, d + 1, n)) if out is None else out
    out[:, :, :1] = 1.0
    torch.mul(raw, _inverse_length(raw), out=out[:, :, 1:])
    return out


def _softmax_over_tokens(key: Tensor, padding: Tensor | None, statistics: Tensor | None) -> Tensor:
    """Of key [B, H, d, N] over N; 0 where there is no token."""
    if padding is None and statistics is None:
        return key.softmax(3)
    shown = key if padding is None else key.masked_fill(_per_token(padding), -torch.inf)
    if statistics is None:
        maximum = shown.amax(3, keepdim=True)
    else:
        maximum, total = statistics.view(key.shape[0], 2, *key.shape[1:3], 1).unbind(1)
    weight = (shown - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp_()
    total = weight.sum(3, keepdim=True) if statistics is None else total
    return weight.div_(total + (total == 0))


def _inverse_mass(query: Tensor, name: str, sums: Tensor, padding: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """1 / mass [B, H, 1, N], 0 at padding, and (s + eps) / N [B, H, R, 1]."""
    s = sums.view(query.shape[:3])
    s = ((s + added(Form(name, eps=eps), s)) / query.shape[3]).unsqueeze(3)
    mass = torch.matmul(s.mT, query)
    inverse = mass.add_(mass == 0).reciprocal_()
    return inverse if padding is None else inverse.masked_fill(_per_token(padding), 0.0), s


def _through_phi(raw: Tensor, phi: Tensor, grad: Tensor, name: str, padding: Tensor | None, out: Tensor) -> None:
    """The gradient of raw for that of phi, both [B, H, ., N], into out; a softmax is that of queries."""
    if name == "softmax":
        out.copy_(torch.ops.aten._softmax_backward_data.default(grad, phi, 2, phi.dtype))
    elif name == "softplus":
        out.copy_(torch.ops.aten.softplus_backward.default(grad, raw, 1.0, 20.0))
    else:
        hat, of_hat = phi[:, :, 1:], grad[:, :, 1:]
        along = (hat * of_hat).sum(2, keepdim=True)
        torch.addcmul(of_hat, hat, along, value=-1.0, out=out)
        out.mul_(_inverse_length(raw))
    if padding is not None:
        out.masked_fill_(_per_token(padding), 0.0)
