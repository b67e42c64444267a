"""Attention by a memory per sample as functions: check, choose a path, call.

The paths are those of external attention (external_attention.py): the registered operator where the call is recorded;
the reference under a functorch transform, forward-mode differentiation or torch.jit.trace, or where it is the backend;
else the autograd Function of algorithms/linear_attention.py, or, where no gradient is wanted, its forward alone. The
products are PyTorch's on every backend. A DTensor is taken shard by shard (sharded.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..algorithms import channel_linear_attention as over_channels
from ..algorithms import linear_attention as algorithm
from ..algorithms.linear_attention import Plan
from ..common.autocast import autocast_dtype, no_autocast
from ..common.layouts import as_maps, as_tokens, contiguous, dense_tokens
from ..common.tracing import is_symbolic, is_traced, needs_reference
from ..operators import linear_attention as operators
from ..reference import Form, Weights
from . import sharded
from .checks import check_tensor
from .external_attention import without_effect
from .external_attention_checks import check_eps, check_parameter, checked_padding, refuse_an_empty_shard
from .linear_attention_checks import channels_of, check_keys, check_residual, checked_biases, checked_input

FAMILY = "linear_attention"

#: The feature maps of linear_attention.
MAPS = ("l2", "softplus")


def linear_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    biases: Sequence[Tensor | None] = (None, None, None),
    gamma: Tensor | None = None,
    heads: int = 1,
    feature: str = "l2",
    eps: float = 1e-6,
    residual: bool = True,
    padding_mask: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """y = x + gamma * phi(q) S / (phi(q) (s + eps)), S = sum of phi(k) v^T, s = sum of phi(k) over tokens.

    Linear attention (arXiv 2007.14902), phi(k) = (1, k / |k|), with eps left out of the 1; or, with the feature
    "softplus", MANet's kernel attention. Time and memory are linear in the tokens.

    Args:
        x: Tokens [B, N, C], or maps [B, C, H, W] or [B, C, D, H, W] whose positions are the tokens, contiguous or
            channels_last (other strides cost a copy); float32, bfloat16, float16 or float64.
        query: W_q, [heads * d, C]; q = x W_q^T + b_q.
        key: W_k, [heads * d, C].
        value: W_v, [C, C].
        biases: b_q [heads * d], b_k [heads * d] and b_v [C], each may be None.
        gamma: [1], or None for 1.
        heads: Each has d consecutive features of q and k, and C / heads of v.
        feature: "l2" or "softplus".
        eps: Added to s.
        residual: Whether x is added to y.
        padding_mask: [B, N] boolean, N the number of positions of maps; True where a token takes no part. Its y is x,
            or 0 without the residual.
        process_group: Its members hold the tokens in shards, each at least one. Forward exchanges the sums over tokens,
            B heads d (C + 1) numbers, and backward their gradients; those of the parameters are those of the shard.

    Returns:
        y, shaped as x, stored as x or, for other strides, contiguous.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected, before anything runs.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    tensors = {"query": query, "key": key, "value": value, "biases": biases, "gamma": gamma}
    settings = {"heads": heads, "feature": feature, "eps": eps, "residual": residual}
    if (y := _of_shards(linear_attention, x, tensors, padding_mask, process_group, settings)) is not None:
        return y
    heads, c = checked_input(x, heads), channels_of(x)
    check_residual(residual)
    if feature not in MAPS:
        raise ValueError(f"feature: got {feature!r}, expected 'l2' or 'softplus'")
    check_eps(eps)
    query_bias, key_bias, value_bias = checked_biases(biases, 3)
    check_keys(x, query, key, query_bias, key_bias, heads)
    if c % heads:
        raise ValueError(f"x: got {c} channels, expected a multiple of heads = {heads}")
    check_parameter("value", value, x, ((c, c),))
    check_parameter("value_bias", value_bias, x, ((c,),))
    check_parameter("gamma", gamma, x, ((1,), ()))
    # The heads of v side by side: W_o of a head puts them where they belong.
    output = None if heads == 1 else torch.eye(c, dtype=value.dtype, device=value.device)
    weights = _weights(x, query, key, query_bias, key_bias, value, value_bias, output, None, gamma, heads)
    return _attend(x, weights, Form(feature, heads, eps, residual), padding_mask, process_group)


def efficient_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reprojection: Tensor,
    *,
    biases: Sequence[Tensor | None] = (None, None, None, None),
    heads: int = 1,
    residual: bool = True,
    padding_mask: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """y = x + reprojection of softmax_d(q) (softmax_N(k)^T v) of all heads: efficient attention (arXiv 1812.01243).

    Args:
        x: As of linear_attention.
        query: W_q, [heads * d, C]; q = x W_q^T + b_q, normalized over the d features of a head.
        key: W_k, [heads * d, C]; normalized over the tokens.
        value: W_v, [heads * v, C].
        reprojection: W_o, [C, heads * v].
        biases: b_q [heads * d], b_k [heads * d], b_v [heads * v] and b_o [C], each may be None. b_k is without effect,
            as it is a constant to the softmax over tokens; its gradient is zero.
        heads: Each has d consecutive features of q and k, and v of the values.
        residual: As of linear_attention.
        padding_mask: As of linear_attention.
        process_group: As of linear_attention; the maximum and sum of each column of keys are exchanged too.

    Returns:
        y, as of linear_attention.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected, before anything runs.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    tensors = {"query": query, "key": key, "value": value, "reprojection": reprojection, "biases": biases}
    settings = {"heads": heads, "residual": residual}
    if (y := _of_shards(efficient_attention, x, tensors, padding_mask, process_group, settings)) is not None:
        return y
    heads, c = checked_input(x, heads), channels_of(x)
    check_residual(residual)
    query_bias, key_bias, value_bias, reprojection_bias = checked_biases(biases, 4)
    check_keys(x, query, key, query_bias, key_bias, heads)
    check_tensor("value", value)
    values = value.shape[0] if value.ndim else 0
    if values < 1 or values % heads:
        raise ValueError(f"value: got shape {tuple(value.shape)}, expected [heads * v, C] for heads = {heads}, v >= 1")
    check_parameter("value", value, x, ((values, c),))
    check_parameter("value_bias", value_bias, x, ((values,),))
    check_parameter("reprojection", reprojection, x, ((c, values),))
    check_parameter("reprojection_bias", reprojection_bias, x, ((c,),))
    parameters = value, value_bias, reprojection, reprojection_bias
    if key_bias is not None:
        key, key_bias = without_effect(key, key_bias), None
    weights = _weights(x, query, key, query_bias, key_bias, *parameters, None, heads)
    return _attend(x, weights, Form("softmax", heads, 0.0, residual), padding_mask, process_group)


def channel_linear_attention(x: Tensor, gamma: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """Linear attention over channels (arXiv 2007.14902), with xh = x / |x| over the channels of each position:

        M = x xh^T
        y[c, n] = x[c, n] + gamma * (sum_c' x[c', n] + (M xh)[c, n]) / (N + sum_n xh[c, n] (sum_c' xh[c', n] + eps))

    In PyTorch's own operators on every backend.

    Args:
        x: As of linear_attention.
        gamma: [1], or None for 1.
        eps: Added to the sums over channels.

    Returns:
        y, as of linear_attention.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected, before anything runs.
    """
    settings = {"eps": eps}
    if (y := _of_shards(channel_linear_attention, x, {"gamma": gamma}, None, None, settings)) is not None:
        return y
    checked_input(x, 1)
    check_eps(eps)
    check_parameter("gamma", gamma, x, ((1,), ()))
    dtype = _product_dtype(x, gamma)
    tokens = (as_tokens(x) if x.ndim > 3 else x).to(dtype)
    with no_autocast(x):
        if tokens.numel() == 0:
            return _nothing(x.to(dtype) * 1.0, gamma)
        y = _over_channels(tokens, gamma, eps)
    return as_maps(y, x) if x.ndim > 3 else y


def _over_channels(tokens: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """channel_linear_attention of tokens [B, N, C] that are not empty, by one of the paths. A compiled call is one of
    the reference's operators, of which a compiler makes fewer passes over x."""
    is_followed = is_symbolic() or needs_reference()
    if is_followed or backends.select(tokens.device, tokens.dtype, FAMILY) == "reference":
        return reference.channel_linear_attention(tokens.mT, gamma, eps).mT
    x = dense_tokens(tokens).mT
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gamma)):
        return over_channels.ChannelLinearAttentionFunction.apply(x, gamma, eps).mT
    return over_channels.forward(x, gamma, eps)[0].mT


def attention_of_maps(x: Tensor, projections: Sequence[Tensor | None], gamma: Tensor | None, form: Form) -> Tensor:
    """y of maps x [B, C, H, W] by parameters that nothing is to be asked about any more: an ordinary call of a module
    (modules.submodules.read_at_once) whose sizes fit.

    Args:
        x: Not empty.
        projections: The weight and the bias of the convolutions that make queries, keys and values and, for the feature
            "softmax", of the reprojection.
        gamma: [1] or None.
        form: The feature map, the heads and eps.
    """
    query, query_bias, key, key_bias, *others = projections
    if form.feature == "softmax" and key_bias is not None:
        key, key_bias = without_effect(key, key_bias), None
    others = others if len(others) == 4 else (*others, None, None)
    weights = _weights(x, query, key, query_bias, key_bias, *others, gamma, form.heads)
    backend = backends.select(x.device, x.dtype, FAMILY)
    if backend == "reference":
        return as_maps(reference.linear_attention(as_tokens(x), weights, form), x)
    return as_maps(_by_algorithm(dense_tokens(as_tokens(x)), contiguous(*weights), form, None, "", backend), x)


def _of_shards(
    function: Any, x: Any, tensors: dict[str, Any], padding_mask: Any, process_group: Any, settings: dict[str, Any]
) -> Tensor | None:
    """y of a DTensor x; None for another tensor."""
    check_tensor("x", x)
    if not sharded.is_distributed(x):
        return None
    return sharded.linear_attention(function, x, tensors, padding_mask, process_group, settings)


def _product_dtype(x: Tensor, gamma: Tensor | None = None) -> torch.dtype:
    """The type that the layer computes in: under autocast that of the sum of x and gamma times a product."""
    autocast = autocast_dtype(x)
    if autocast is None:
        return x.dtype
    dtype = torch.promote_types(x.dtype, autocast)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def _weights(
    x: Tensor,
    query: Any,
    key: Any,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value: Any,
    value_bias: Tensor | None,
    output: Tensor | None,
    output_bias: Tensor | None,
    gamma: Tensor | None,
    heads: int,
) -> Weights:
    """The parameters as the algorithm takes them, in the type that it computes in. Matrices may have axes of one behind
    theirs, as those of convolutions do. A view costs less than what names the axes, and this is part of every call."""
    bias, c = None, channels_of(x)
    if key_bias is not None or query_bias is not None:
        biases = (m.new_zeros(m.shape[0]) if b is None else b for m, b in ((key, key_bias), (query, query_bias)))
        bias = torch.cat([*biases])
    weights = Weights(
        torch.cat((key, query)).view(-1, c),
        bias,
        value.view(heads, -1, c),
        None if value_bias is None else value_bias.view(heads, -1),
        None if output is None else output.view(1, c, -1) if heads == 1 else output.view(c, heads, -1).transpose(0, 1),
        output_bias,
        None if gamma is None else gamma.view(1),
    )
    dtype = _product_dtype(x, gamma)
    return Weights(*(t if t is None or t.dtype is dtype else t.to(dtype) for t in weights))


def _attend(x: Tensor, weights: Weights, form: Form, padding_mask: Tensor | None, process_group: Any) -> Tensor:
    """y by one of the paths."""
    if not (process_group is None or hasattr(process_group, "group_name")):
        raise TypeError(f"process_group: got {process_group!r}, expected a torch.distributed.ProcessGroup")
    tokens = (as_tokens(x) if x.ndim > 3 else x).to(weights.projection.dtype)
    padding = checked_padding(padding_mask, tokens, tokens.shape[:2])
    if tokens.numel() == 0:
        refuse_an_empty_shard("x", x, process_group)
        return _nothing(x.to(tokens.dtype) * 1.0, *weights)
    with no_autocast(x):
        y = _by_path(tokens, weights, form, padding, process_group)
    return as_maps(y, x) if x.ndim > 3 else y


def _by_path(x: Tensor, weights: Weights, form: Form, padding: Tensor | None, process_group: Any) -> Tensor:
    backend = backends.select(x.device, x.dtype, FAMILY)
    if backend == "reference" or needs_reference():
        return reference.linear_attention(x, weights, form, padding, process_group)
    name = "" if process_group is None else process_group.group_name
    return _by_algorithm(dense_tokens(x), contiguous(*weights), form, padding, name, backend)


def _by_algorithm(
    x: Tensor, tensors: list[Tensor | None], form: Form, padding: Tensor | None, name: str, backend: str
) -> Tensor:
    """y of dense tokens and contiguous Weights by the algorithm, on a backend with passes; name: of a process group."""
    _, n, c = x.shape
    weights = Weights(*tensors)
    keys = weights.projection.shape[0] // 2
    rows = keys + (form.heads if form.feature == "l2" else 0)
    kept = algorithm.keeps(c, keys, rows, None if is_symbolic() else n)
    if is_traced():
        settings = *form, name, *kept, backend
        return operators.linear_attention_forward(x, *tensors, padding, *settings)[0]
    plan = Plan(backends.passes(backend, FAMILY), form, name, *kept)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return algorithm.LinearAttentionFunction.apply(x, *tensors, plan, padding)
    return algorithm.forward(plan, x, weights, padding)[0]


def _nothing(x: Tensor, *inputs: Tensor | None) -> Tensor:
    """The empty y of an empty x, with gradients of zero to every input."""
    for a in inputs:
        if a is not None:
            x = x + a.flatten()[:0].sum().to(x.dtype)
    return x
