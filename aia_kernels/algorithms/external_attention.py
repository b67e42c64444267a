"""External attention, forward and backward, written once in terms of fused passes.

Forward (double_norm: the mathematics stands in reference/double_norm.py and schemas.py):

    L = x K^T                  P = exp(L - lse)       A = P / mass, mass = eps + sum of P over a group of columns
    o = A V^T + bias           or, for the block, y = relu(A V1^T + shift + x) with BN folded into V1 and shift

Backward, with dA the gradient of A (with respect to o: dA = do V):

    Q = A * (dA - sum over the group of dA * A)       D = column sums of Q          dL = Q - A * mass * D
    dx = dL K                  dK = dL^T x            dV = do^T A

BN of the block, z = A V^T, over the n tokens of the batch, needs the moments of A alone: mean(z) = V mean(A) and
var(z) = diag(V Cov(A) V^T). They are taken of A' = A - origin, the origin being mean(A) as far as it could be rounded:
where the mean of a column dwarfs its spread, a difference of second moments of A itself has lost the digits. As dz sums
to zero over the batch, A' serves in backward too. With g = dy where y > 0, G = g^T A' [C, M] and
zhat = V (A' - mean(A')) * rstd:

    dbeta = sum g              dgamma = sum g * zhat = rstd * rowsum(V * (G - dbeta mean(A')^T))
    dz = factor * (g - dbeta / n - zhat * dgamma / n), factor = gamma * rstd
    dV = dz^T A' = factor * (G - dbeta / n (sum A')^T - rstd * dgamma / n * V T),  T = sum (A' - mean(A')) A'^T
    dA = dz V = g V1 + (A' - mean(A')) K1 - 1 (factor * dbeta / n)^T V
    K1 = -V^T diag(factor * rstd * dgamma / n) V

so z and dz are never formed: x-sized are only x, y, dy, g and dx, and every product over tokens is one of C x M or
M x M. mean(A') is what rounding left of zero, and counts where g has a mean. Where members share the statistics, origin
and mean(A') are of all their tokens, sum A' and T of a member's own. Under fixed statistics dz is factor * g, which
does not sum to zero: G is that of A, and zhat rstd * (z - mean).

The fused passes that a backend has for this stand in external_attention_passes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autocast import without_autocast
from ..common.layouts import as_maps, as_tokens, save, saved, stored_as, unviewed, with_rows
from ..common.process_groups import gather, resolve
from ..reference import Norm
from ..reference import double_normalize as reference_double_normalize
from ..reference import external_attention as reference
from ..reference import external_attention_block as reference_block
from .double_backward import backward_is_followed, gradients
from .external_attention_passes import Attention, BatchTerm, DoubleNorm, Dropout, Passes


class Plan(NamedTuple):
    """What is constant about a call.

    passes: of the backend. group, eps: of the double normalization. shards: the name of the process group whose members
    hold the tokens, or "". scale: dropout's. batch, norm_eps, members: of the block's BN, whether it uses the
    statistics of the batch, what it adds to the variance, and the name of the process group that shares them, or "".
    """

    passes: Passes
    group: int
    eps: float
    shards: str = ""
    scale: float = 1.0
    batch: bool = False
    norm_eps: float = 0.0
    members: str = ""

    def norm(self, padding: Tensor | None = None) -> DoubleNorm:
        """The normalization over slots, as the fused passes take it."""
        return DoubleNorm(self.group, self.eps, padding)

    def dropout(self, keep: Tensor | None) -> Dropout | None:
        """Dropout by a mask, as the fused passes take it."""
        return None if keep is None else Dropout(keep, self.scale)


class BatchNorm(NamedTuple):
    """What the block keeps of its batch; empty under fixed statistics.

    origin and off [M]: the origin, and the mean of A' over the batch of the statistics. total [M] and moment [M, M]:
    the sums of A' and of A'^T A' over the tokens of the local batch.
    """

    origin: Tensor
    off: Tensor
    total: Tensor
    moment: Tensor


class BlockForward(NamedTuple):
    """Result of block_forward: y, what is kept, and statistics [C, 3]: the mean and biased variance that normalized z
    and the share of one token in them, one over the tokens of the batch, or 0 for fixed ones."""

    y: Tensor
    attention: Attention
    signs: Tensor
    batch: BatchNorm
    statistics: Tensor


def log_sum_exp(statistics: Tensor, lse: Tensor, shards: str) -> Tensor:
    """lse [B, M] over the members of a process group, if one is named, given what column_statistics returns."""
    if not shards:
        return lse
    maxima, totals = gather(statistics, shards).unbind(2)
    maximum = maxima.amax(0)
    # A member without a token has maximum -inf and must add nothing, not NaN.
    total = torch.where(totals > 0, totals * (maxima - maximum).exp(), 0.0).sum(0)
    return maximum + total.log()


def attend(plan: Plan, x: Tensor, key: Tensor, norm: DoubleNorm) -> Attention:
    """The attention of x, in the form of the backend."""
    logits, *found = plan.passes.logits(x, key, padding=norm.padding)
    return plan.passes.normalize(logits, log_sum_exp(*found, plan.shards), norm=norm)


@without_autocast
def forward(
    plan: Plan,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Attention]:
    """o [B, N, H * v] and what is kept, for x [B, N, H * k], key [H, M', k], value [H, v, M'] and bias [H * v]."""
    if padding is not None:
        x = x.masked_fill(padding.unsqueeze(-1), 0.0)
    norm = plan.norm(padding)
    attention = attend(plan, x, key, norm)
    o, _ = plan.passes.values(attention, value, norm=norm, bias=bias, dropout=plan.dropout(keep))
    if padding is not None and bias is not None:
        o.masked_fill_(padding.unsqueeze(-1), 0.0)
    return o, attention


@without_autocast
def backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Attention,
    padding: Tensor | None,
    keep: Tensor | None,
    needs_x: bool = True,
    needs_bias: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of x, key, value and bias for the gradient of o; those of the parameters in types as of the passes."""
    if padding is not None:
        x, grad = (a.masked_fill(padding.unsqueeze(-1), 0.0) for a in (x, grad))
    passes, norm, dropout = plan.passes, plan.norm(padding), plan.dropout(keep)
    grad_value, grad_bias = passes.value_gradient(
        grad, attention, shape=value.shape, norm=norm, dropout=dropout, needs_sums=needs_bias
    )
    grad_attention, reduced = passes.attention_gradient(grad, attention, value=value, norm=norm, dropout=dropout)
    reduced = _sum_of_members(reduced, plan.shards)
    grad_x, grad_key = passes.logits_gradient(
        grad_attention, attention, reduced=reduced, x=x, key=key, norm=norm, needs_x=needs_x
    )
    return grad_x, grad_key, grad_value, grad_bias


@without_autocast
def block_forward(
    plan: Plan,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed: Sequence[Tensor],
) -> BlockForward:
    """The block on x [B, N, C], key [M, C], value [C, M]; weight and bias [C] of the BN; fixed: where plan.batch is not
    set, its running mean and variance [C]."""
    passes, norm = plan.passes, plan.norm()
    attention = attend(plan, x, key.unsqueeze(0), norm)
    settings = value, weight, bias
    if not plan.batch:
        folded, shift, statistics, empty = passes.fold(*settings, (), 0.0, fixed, plan.norm_eps)
        batch = BatchNorm(*(torch.empty_like(empty) for _ in BatchNorm._fields))  # an operator returns no tensor twice
    elif not plan.members:
        count = x.shape[0] * x.shape[1]
        origin, *sums = passes.moments(attention, norm=norm)
        folded, shift, statistics, off = passes.fold(*settings, (origin, *sums), count, (), plan.norm_eps)
        batch = BatchNorm(origin, off, *sums)
    else:
        batch, moment, share = _moments_of_members(plan, x, attention)
        of_batch = batch.origin, batch.off, moment
        folded, shift, statistics, _ = passes.fold(*settings, of_batch, 1.0, (), plan.norm_eps)
        statistics[:, 2] = share
    y, signs = passes.values(attention, folded.unsqueeze(0), norm=norm, bias=shift, residual=x)
    return BlockForward(y, attention, signs, batch, statistics)


@without_autocast
def block_backward(
    plan: Plan,
    grad_y: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    attention: Attention,
    signs: Tensor,
    batch: BatchNorm,
    statistics: Tensor,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, key, value, weight and bias for grad_y stored as x; those of key and value in types as of the
    passes, of weight and bias in accumulate_dtype. Arguments as for block_forward and as kept by it. Where
    members share the statistics, the gradients of the parameters are shares of the whole batch's: their sum over the
    members is exact."""
    passes, norm = plan.passes, plan.norm()
    origin, off, *sums = batch if plan.batch else (None, None)
    g, of_g = passes.signed(grad_y, signs)
    product, _ = passes.value_gradient(
        g, attention, shape=(1, *value.shape), norm=norm, origin=origin, needs_sums=False
    )
    product = product[0].to(statistics.dtype)
    joint, center = passes.fold_sums(value, product, of_g, statistics, off, plan.norm_eps)
    grad_weight, joint = joint[1], _sum_of_members(joint, plan.members)
    of_batch = (off, *sums) if plan.batch else ()
    grad_value, folded, inner, constant = passes.fold_back(
        value, weight, product, joint, center, statistics, of_batch, plan.norm_eps
    )
    grad_attention, reduced = passes.attention_gradient(
        g,
        attention,
        value=folded.unsqueeze(0),
        norm=norm,
        batch_term=BatchTerm(origin, inner, constant) if plan.batch else None,
    )
    grad_x, grad_key = passes.logits_gradient(
        grad_attention,
        attention,
        reduced=reduced,
        x=x,
        key=key.unsqueeze(0),
        norm=norm,
        residual_grad=g if needs_x else None,
        needs_x=needs_x,
    )
    return grad_x, grad_key[0], grad_value, grad_weight, of_g


def _sum_of_members(part: Tensor, name: str) -> Tensor:
    """The sum over the members of a process group, in the order of their ranks; the part itself without a group."""
    return gather(part, name).sum(0) if name else part


def _moments_of_members(plan: Plan, x: Tensor, attention: Attention) -> tuple[BatchNorm, Tensor, Tensor]:
    """What is kept of the batch, and of that which the members share the mean of A'^T A' [M, M] and one over its
    tokens."""
    count = x.shape[0] * x.shape[1]
    origin, total, second = plan.passes.moments(attention, norm=plan.norm())
    part = torch.cat((origin, total, second.flatten(), origin.new_full((1,), count)))
    *of_members, counts = gather(part, plan.members).split((*[origin.numel()] * 2, second.numel(), 1), 1)
    origins, totals, seconds = of_members
    share = counts.sum().reciprocal()
    joint = (counts * share * origins).sum(0)
    # About the joint origin: what a member's own origin is off moves its sums.
    off = origins - joint
    crossed = off.mT @ totals
    joint_second = seconds.sum(0).view_as(second) + crossed + crossed.mT + off.mT @ (counts * off)
    mean = (totals + counts * off).sum(0) * share
    off = origin - joint
    crossed = off.outer(total)
    second = second + crossed + crossed.mT + count * off.outer(off)
    return BatchNorm(joint, mean, total + count * off, second), joint_second * share, share


def double_normalize_forward(plan: Plan, logits: Tensor, padding: Tensor | None) -> Attention:
    """A, contiguous, and mass (schemas.double_norm_) of logits [B, N, M]."""
    attention = logits.new_empty(logits.shape).copy_(logits)
    if padding is not None:
        attention.masked_fill_(padding.unsqueeze(-1), 0.0)
    lse = log_sum_exp(*plan.passes.column_statistics(attention, padding), plan.shards)
    return attention, plan.passes.double_norm_(attention, lse, plan.group, plan.eps, padding)


def double_normalize_backward(
    plan: Plan, grad: Tensor, attention: Tensor, mass: Tensor, padding: Tensor | None
) -> Tensor:
    """The gradient of the logits, contiguous, for that of A."""
    grad = torch.empty_like(attention).copy_(grad)
    if padding is not None:
        grad.masked_fill_(padding.unsqueeze(-1), 0.0)
    reduced = plan.passes.double_norm_backward_reduce(grad, attention, plan.group)
    reduced = _sum_of_members(reduced, plan.shards)
    plan.passes.double_norm_backward_(grad, attention, mass, reduced, plan.group)
    return grad


def normalize_formula(plan: Plan, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A of the reference as a function of the logits."""
    return lambda logits: reference_double_normalize(logits, plan.group, plan.eps, padding, resolve(plan.shards))


def attention_formula(plan: Plan, padding: Tensor | None, keep: Tensor | None) -> Callable[..., Tensor]:
    """o of the reference as a function of x, key, value and bias."""
    settings = plan.group, plan.eps, padding, keep, plan.scale, resolve(plan.shards)
    return lambda *tensors: reference(*tensors, *settings)


def block_formula(plan: Plan, statistics: Tensor) -> Callable[..., Tensor]:
    """y of the reference as a function of x [B, N, C], key, value, weight and bias; statistics as of block_forward."""
    mean, var, _ = statistics.unbind(1)

    def formula(x, key, value, weight, bias):
        norm = Norm(weight, bias, mean, var, training=plan.batch, eps=plan.norm_eps)
        return reference_block(x, key, value, norm._replace(process_group=resolve(plan.members)), plan.eps)[0]

    return formula


class DoubleNormalizeFunction(torch.autograd.Function):
    """A = apply(logits, plan, padding) of logits [B, N, M], not empty, with exact first and second derivatives."""

    @staticmethod
    def forward(ctx, logits, plan, padding):
        attention, mass = double_normalize_forward(plan, logits, padding)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, logits, attention, mass, padding)
        return attention

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 3
        logits, attention, mass, padding = saved(ctx)
        plan = ctx.plan
        if backward_is_followed():
            return *gradients(normalize_formula(plan, padding), (logits,), (True,), grad), None, None
        return double_normalize_backward(plan, grad, attention, mass, padding), None, None


class ExternalAttentionFunction(torch.autograd.Function):
    """o = apply(x, key, value, bias, plan, padding, keep), as forward of this module on non-empty tensors of one type,
    with exact first and second derivatives."""

    @staticmethod
    def forward(ctx, x, key, value, bias, plan, padding, keep):
        o, attention = forward(plan, x, key, value, bias, padding, keep)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, x, key, value, bias, padding, keep, *attention)
        return unviewed(o)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        plan, needs = ctx.plan, ctx.needs_input_grad[:4]
        x, key, value, bias, padding, keep, *attention = saved(ctx)
        if backward_is_followed():
            formula = attention_formula(plan, padding, keep)
            return *gradients(formula, (x, key, value, bias), needs, grad), None, None, None
        grads = backward(plan, with_rows(grad), x, key, value, tuple(attention), padding, keep, needs[0], needs[3])
        return *(_typed(g, a) for g, a in zip(grads, (x, key, value, bias), strict=True)), None, None, None


class ExternalAttentionBlockFunction(torch.autograd.Function):
    """y, statistics = apply(x, key, value, weight, bias, plan, fixed): the block with exact first and second
    derivatives.

    x [B, C, H, W] is contiguous or channels_last and not empty; key, value, weight, bias, plan, fixed and statistics as
    in block_forward of this module. The running statistics are the caller's business.
    """

    @staticmethod
    def forward(ctx, x, key, value, weight, bias, plan, fixed):
        result = block_forward(plan, as_tokens(x), key, value, weight, bias, fixed)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(result.statistics)
        save(ctx, x, key, value, weight, bias, *result.attention, result.signs, *result.batch, result.statistics)
        return unviewed(as_maps(result.y, x)), result.statistics

    @staticmethod
    def backward(ctx, grad_y, _grad_statistics):
        if grad_y is None:
            return (None,) * 7
        plan, needs = ctx.plan, ctx.needs_input_grad[:5]
        x, key, value, weight, bias, first, second, signs, *batch, statistics = saved(ctx)
        inputs = x, key, value, weight, bias
        if backward_is_followed():
            formula = block_formula(plan, statistics)

            def y_of(x, *parameters):
                return as_maps(formula(as_tokens(x), *parameters), x)

            return *gradients(y_of, inputs, needs, grad_y), None, None
        tokens, grad = as_tokens(x), as_tokens(stored_as(grad_y, x))
        batch, attention = BatchNorm(*batch), (first, second)
        grad_x, *grads = block_backward(
            plan, grad, tokens, key, value, weight, attention, signs, batch, statistics, needs[0]
        )
        grad_x = None if grad_x is None else as_maps(grad_x, x)
        return grad_x, *(_typed(g, a) for g, a in zip(grads, inputs[1:], strict=True)), None, None


def _typed(grad: Tensor | None, of: Tensor | None) -> Tensor | None:
    return None if grad is None or of is None else grad.to(of.dtype)
