"""External attention (arXiv 2105.02358) as modules, with the published names, parameters and initialization.

What is folded, and why it is exact: no nonlinearity stands between a projection and the memory beside it. So the two
are one matrix, a product of parameters alone, small beside the tokens. It is formed in every call by differentiable
products, and autograd carries its gradient to both factors, exact but for rounding. A bias before the softmax over
tokens, that of a projection or of the key memory, adds the same number to all tokens of a slot. The softmax does not
see it, so it has no effect and a gradient of zero.

The submodules hold parameters, mode and settings, and may be frozen, parametrized or converted as usual. The layer
reads them and does not call them. If a submodule has hooks or is of another kind (quantized, adapted, replaced), all of
them are called in the published order, with the double normalization between them. So they are where "auto" counts that
there is too little to fuse (backends.plain_is_faster); a draw of dropout is the same on every path, and so excepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.autocast import autocast_dtype, no_autocast
from ..common.tracing import is_symbolic, is_traced
from ..functional.block import ACTIVATIONS
from ..functional.checks import check_at_least_one
from ..functional.external_attention import (
    double_normalize,
    external_attention,
    external_attention_block,
    without_effect,
)
from ..functional.sharded import is_distributed
from ..reference import published_double_normalize
from .submodules import can_be_read, held, is_pointwise, must_be_called, norm_of, products_saved, published_is_faster

#: What EANet and EAMLP add to the sum over slots.
EPS = 1e-9


class ExternalAttention(nn.Module):
    """Plain external attention on tokens: o = A M_v^T, A the double normalization, without eps, of x M_k^T.

    It takes x [B, N, d_model] and returns o of that shape. As in the popular port with two linear layers, mk and mv
    have no bias, and their weights are normal with a standard deviation of 0.001. Nothing needs folding here.

    The port's code normalizes over axis 1 and then over axis 2 whatever the rank of x. Of more than three axes, such as
    maps [B, H, W, d_model], these are no tokens and slots. There the layer is that code, in plain PyTorch.

    Args:
        d_model: The features of a token.
        S: The number of slots.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1; in forward, x has fewer than three axes.
    """

    def __init__(self, d_model: int, S: int = 64):
        super().__init__()
        check_at_least_one(d_model=d_model, S=S)
        self.mk = nn.Linear(d_model, S, bias=False)
        self.mv = nn.Linear(S, d_model, bias=False)
        for linear in (self.mk, self.mv):
            nn.init.normal_(linear.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        mk, mv = held(self, "mk"), held(self, "mv")
        if getattr(x, "ndim", 3) > 3 or not (can_be_read(mk, nn.Linear) and can_be_read(mv, nn.Linear)):
            return self._through_submodules(x)
        key = held(mk, "weight")  # read once, as it may be parametrized
        if _are_tokens(x, key) and published_is_faster(x, mk, x.shape[0] * x.shape[1], key.shape[0]):
            return mv(published_double_normalize(mk(x)))
        return external_attention(x, key, mv.weight, key_bias=mk.bias, value_bias=mv.bias)

    def _through_submodules(self, x: Tensor) -> Tensor:
        _check_tokens(x, or_more=True)
        logits = self.mk(x)
        if logits.ndim == 3:
            return self.mv(double_normalize(logits))
        attention = logits.softmax(1)
        return self.mv(attention / attention.sum(2, keepdim=True))


class ExternalAttention2d(nn.Module):
    """EANet's block on maps: y = relu(conv2(EA(conv1(x))) + x), conv2 being a 1x1 convolution and a batch norm.

    It takes x [B, c, H, W], contiguous or channels_last, and returns y, shaped and stored as x. Points [B, c, N] and
    volumes [B, c, D, H, W] are taken as maps of one column. eps is 1e-9.

    Folded: linear_0 and conv1 into one [k, c] (the bias of conv1 drops out), conv2.0 and linear_1 into one [c, k],
    which leaves 2 c k of 2 c^2 + 2 c k products per token. With A the attention map, the batch norm sees z = A V^T: its
    mean and variance in training are V mean(A) and diag(V Cov(A) V^T), its scale joins V, its shift and the residual
    and ReLU the pass that writes y. It does what conv2.1 says: training or frozen, SyncBatchNorm, momentum None. Any
    other norm is called. Another activation, or no residual, is PyTorch's own operation on what is folded.

    As published the memories start equal, linear_1.weight = linear_0.weight.permute(1, 0, 2), here without sharing
    storage: a checkpoint in which training has moved them apart loads as it is. The published network (not the block)
    sets the momentum of its batch norms to 3e-4.

    Args:
        c: The channels of x.
        k: The number of slots.
        norm: Makes the norm at the end of conv2 from c: nn.BatchNorm2d, nn.SyncBatchNorm,
            functools.partial(nn.GroupNorm, 8); None for no norm.
        activation: "relu", "gelu", "silu" or None.
        residual: Whether x is added before the activation.
        projection: Whether conv2 begins with a convolution.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1; the activation is none of these.
    """

    #: What a step with statistics of the batch costs, in choices.CALL_COST: the moments of A are many small operators.
    BATCH_CALLS = 4

    # Those of the published block, which has no attributes for them. TorchScript reads annotations, and not all.
    activation = "relu"
    residual = True

    def __init__(
        self,
        c: int,
        k: int = 64,
        *,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        activation: str | None = "relu",
        residual: bool = True,
        projection: bool = True,
    ):
        super().__init__()
        check_at_least_one(c=c, k=k)
        if activation is not None and activation not in ACTIVATIONS:
            expected = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation: got {activation!r}, expected {expected} or None")
        self.k, self.residual = k, residual
        self.activation = activation  # type: ignore[assignment]
        self.conv1 = nn.Conv2d(c, c, 1)
        self.linear_0 = nn.Conv1d(c, k, 1, bias=False)
        self.linear_1 = nn.Conv1d(k, c, 1, bias=False)
        parts = [nn.Conv2d(c, c, 1, bias=False)] if projection else []
        self.conv2 = nn.Sequential(*parts, *([] if norm is None else [norm(c)]))
        with torch.no_grad():
            # The published memories share storage while they are initialized, so the draw for linear_1 is that of both.
            shared = self.linear_0.weight.permute(1, 0, 2)
            for weight in (self.conv1.weight, self.linear_0.weight, shared, *(part.weight for part in parts)):
                weight.normal_(0, math.sqrt(2 / weight.shape[0]))
            self.linear_1.weight.copy_(shared)

    def forward(self, x: Tensor) -> Tensor:
        if getattr(x, "ndim", 4) in (3, 5):
            return self._attend(x.flatten(2).unsqueeze(3)).reshape(x.shape)
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        projection, norm = self._conv2()
        if not self._foldable(projection, norm):
            return self._through_submodules(x)
        if self._published_is_faster(x, projection, norm):
            return self._through_submodules(x, plain=True)
        with no_autocast(x):
            key = self.linear_0.weight.flatten(1) @ self.conv1.weight.flatten(1)
            key = without_effect(key, self.conv1.bias, self.linear_0.bias)
            value = self.linear_1.weight.flatten(1)
            value = value if projection is None else projection.weight.flatten(1) @ value
        read: Any = norm_of(norm) if isinstance(norm, _BatchNorm) else norm
        settings: dict[str, Any] = {"activation": self.activation, "residual": self.residual}
        return external_attention_block(x, key, value, read, eps=EPS, **settings)

    def _conv2(self) -> tuple[Any, nn.Module | None]:
        """The convolution and the norm of conv2, None for what it lacks."""
        parts = [*held(self, "conv2")._modules.values()]
        projection = parts.pop(0) if parts and isinstance(parts[0], nn.Conv2d) else None
        return projection, parts[0] if parts else None

    def _published_is_faster(self, x: Tensor, projection: Any, norm: nn.Module | None) -> bool:
        """By counting: folding leaves out c^2 multiplications per position and projection, and costs c^2 k a call each.

        Not where a call is recorded: torch's batch norm changes what selective checkpointing may have kept.
        """
        linear_0 = held(self, "linear_0")
        weight = linear_0._parameters.get("weight")
        if weight is None or not isinstance(x, Tensor) or is_distributed(x) or x.ndim != 4 or is_traced():
            return False
        (k, c), positions = weight.shape[:2], x.numel() // max(1, x.shape[1])
        if x.shape[1] != c or positions < 2 or isinstance(norm, nn.SyncBatchNorm):
            return False
        for t in () if norm is None else (norm._buffers.get("running_mean"), norm._parameters.get("weight")):
            if t is not None and t.dtype != x.dtype:
                return False
        calls = self.BATCH_CALLS if isinstance(norm, _BatchNorm) and norm.training else 1
        saved = (1 if projection is None else 2) * c * c * (positions - k)
        return published_is_faster(x, linear_0, positions, k, saved, calls)

    def _foldable(self, projection: Any, norm: nn.Module | None) -> bool:
        conv2, linear_1 = held(self, "conv2"), held(self, "linear_1")
        parts = (projection is not None) + (norm is not None)
        if not can_be_read(conv2, nn.Sequential) or len(conv2._modules) != parts:
            return False
        for conv in (held(self, "conv1"), held(self, "linear_0"), linear_1, projection):
            if conv is not None and (must_be_called(conv) or not is_pointwise(conv)):
                return False
        if isinstance(norm, _BatchNorm) and must_be_called(norm):
            return False
        return linear_1.bias is None and (projection is None or projection.bias is None)

    def _through_submodules(self, x: Tensor, plain: bool = False) -> Tensor:
        conv1, linear_0, linear_1, conv2 = (held(self, name) for name in ("conv1", "linear_0", "linear_1", "conv2"))
        logits = linear_0(conv1(x).flatten(2))
        if plain:
            attention = published_double_normalize(logits, EPS, tokens=2, slots=1)
        else:
            attention = double_normalize(logits, dims=(2, 1), eps=EPS)
        z = conv2(linear_1(attention).unflatten(2, x.shape[2:]))
        y = x + z if self.residual else z  # stored as x, which comes first
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


class MultiHeadExternalAttention(nn.Module):
    """EAMLP's attention on tokens: 4 * num_heads heads of dim / num_heads features, one pair of memories for all.

    It takes x [B, N, dim] and returns o of that shape. Its submodules are trans_dims (dim to 4 dim), linear_0 and
    linear_1 (64 slots, with biases, shared by the heads) and proj (4 dim to dim). eps is 1e-9.

    Folded: for each head linear_0 and the head's rows of trans_dims into [64, dim] (their biases drop out), proj and
    linear_1 into [dim, 64 * heads], and the bias of linear_1 into that of proj. That leaves external attention of
    64 * heads slots, normalized in groups of 64, and no product per head. Dropout acts between the two, on the map.
    With many heads the folded matrices are larger than what they are made of: see _folding_pays. Then trans_dims and
    proj are products of their own, and all heads together are the rows of one product with the memory that they share.

    Args:
        dim: The features of a token, a multiple of num_heads.
        num_heads: A quarter of the heads, as published.
        qkv_bias: Without effect, as published; blocks in timm's style pass it.
        qk_scale: Without effect, likewise.
        attn_drop: The probability of dropout on the attention map.
        proj_drop: The probability of dropout on o.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1, or dim no multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        check_at_least_one(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"dim: got {dim}, expected a multiple of num_heads = {num_heads}")
        self.coef = 4
        self.num_heads = num_heads * self.coef
        self.k = 256 // self.coef
        self.trans_dims = nn.Linear(dim, dim * self.coef)
        self.linear_0 = nn.Linear(dim * self.coef // self.num_heads, self.k)
        self.linear_1 = nn.Linear(self.k, dim * self.coef // self.num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim * self.coef, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        linears = tuple([held(self, name) for name in ("trans_dims", "linear_0", "linear_1", "proj")])
        attn_drop = held(self, "attn_drop")
        if not _readable(linears, attn_drop):
            return self._through_submodules(x)
        dropout = attn_drop.p if attn_drop.training else 0.0
        trans_dims = held(linears[0], "weight")  # read once, as it may be parametrized
        saved = self._products_saved(x, trans_dims)
        if saved is not None and not is_symbolic() and not dropout:
            rows = x.shape[0] * x.shape[1] * self.num_heads
            if published_is_faster(x, linears[0], rows, self.k, max(0, saved)):
                return self._through_submodules(x, plain=True)
        attend = self._folded if saved is None or saved >= 0 else self._by_heads
        return self.proj_drop(attend(x, trans_dims, dropout))

    def _products_saved(self, x: Tensor, trans_dims: Tensor) -> int | None:
        """The multiplications that folding saves. None for DTensors, which are folded, as torch's linear takes no
        shards of uneven sizes; and for what does not fit, which is then refused.
        """
        width, dim = trans_dims.shape
        if is_distributed(x) or getattr(x, "ndim", 0) != 3 or x.shape[2] != dim or not x.numel():
            return None
        if x.device != trans_dims.device or (x.dtype != trans_dims.dtype and autocast_dtype(x) is None):
            return None
        tokens = None if is_symbolic() else x.shape[0] * x.shape[1]
        return products_saved(self.num_heads, self.k, (width, dim), (dim, width), tokens)

    def _folded(self, x: Tensor, trans_dims: Tensor, dropout: float) -> Tensor:
        with no_autocast(x):
            # [heads, k, dim]; bmm, as matmul would copy both operands and the result.
            by_head = trans_dims.unflatten(0, (self.num_heads, -1))
            key = torch.bmm(self.linear_0.weight.expand(self.num_heads, -1, -1), by_head)
            key = without_effect(key.flatten(0, 1), self.trans_dims.bias, self.linear_0.bias)
            back = self.proj.weight.unflatten(1, (self.num_heads, -1))  # [dim, heads, dim / heads]
            value = (back @ self.linear_1.weight).flatten(1)
            bias = self.proj.bias
            if self.linear_1.bias is not None:
                shared = back.sum(1) @ self.linear_1.bias
                bias = shared if bias is None else bias + shared
        return external_attention(x, key, value, value_bias=bias, eps=EPS, group=self.k, dropout=dropout)

    def _by_heads(self, x: Tensor, trans_dims: Tensor, dropout: float) -> Tensor:
        key = without_effect(self.linear_0.weight, self.trans_dims.bias, self.linear_0.bias)
        o = external_attention(
            nn.functional.linear(x, trans_dims),
            key,
            self.linear_1.weight,
            heads=self.num_heads,
            value_bias=self.linear_1.bias,
            eps=EPS,
            dropout=dropout,
        )
        return nn.functional.linear(o, self.proj.weight, self.proj.bias)

    def _through_submodules(self, x: Tensor, plain: bool = False) -> Tensor:
        _check_tokens(x)
        trans_dims, linear_0, linear_1, attn_drop, proj, proj_drop = (
            held(self, name) for name in ("trans_dims", "linear_0", "linear_1", "attn_drop", "proj", "proj_drop")
        )
        heads = trans_dims(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, dim / heads]
        normalize = published_double_normalize if plain else double_normalize
        attention = attn_drop(normalize(linear_0(heads), eps=EPS))
        return proj_drop(proj(linear_1(attention).transpose(1, 2).flatten(2)))


class TokenExternalAttention(nn.Module):
    """The external attention of a T2T stage: q = q_linear(x), y = q + proj(linear_1(A)), A from the logits linear_0(q).

    It takes x [B, N, dim] and returns y [B, N, in_dim]. eps is 1e-9.

    Folded: proj and linear_1 into one [in_dim, k], as nothing stands between them. q_linear stays, for q is wanted by
    the residual. As published the memories start equal, linear_1.weight = linear_0.weight^T, here without sharing
    storage.

    Args:
        dim: The features of a token of x.
        in_dim: The features of a token of y.
        k: The number of slots, 128 as published.
        attn_drop: The probability of dropout on the attention map, 0.1 as published.
        proj_drop: The probability of dropout on the branch, 0.1 as published.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1.
    """

    #: The names of the key and the value memory.
    memories = ("linear_0", "linear_1")

    def __init__(self, dim: int, in_dim: int, k: int = 128, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        check_at_least_one(dim=dim, in_dim=in_dim, k=k)
        self.k = k
        self.q_linear = nn.Linear(dim, in_dim)
        self.add_module(self.memories[0], nn.Linear(in_dim, k, bias=False))
        self.add_module(self.memories[1], nn.Linear(k, in_dim))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.tie()

    @torch.no_grad()
    def tie(self) -> None:
        """Give the value memory the values of the key memory: where training starts, not how it must go on."""
        key, value = self._memories()
        value.weight.copy_(key.weight.T)

    def _memories(self) -> tuple[Any, Any]:
        """The key and the value memory: nn.Linear, or what was put in their places."""
        return held(self, self.memories[0]), held(self, self.memories[1])

    def forward(self, x: Tensor) -> Tensor:
        key, value = self._memories()
        if not _readable((key, value, self.proj), self.attn_drop):
            return self._through_submodules(x)
        q = self.q_linear(x)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        memory_key = key.weight  # read once, as it may be parametrized
        ordinary = not dropout and _are_tokens(q, memory_key)
        if ordinary and published_is_faster(q, key, q.shape[0] * q.shape[1], memory_key.shape[0]):
            return self._attend(q, plain=True)
        with no_autocast(x):
            folded = self.proj.weight @ value.weight
            bias: Tensor | None = self.proj.bias
            if value.bias is not None:
                bias = nn.functional.linear(value.bias, self.proj.weight, bias)
        o = external_attention(q, memory_key, folded, key_bias=key.bias, value_bias=bias, eps=EPS, dropout=dropout)
        return q + self.proj_drop(o)

    def _through_submodules(self, x: Tensor) -> Tensor:
        _check_tokens(x)
        return self._attend(self.q_linear(x))

    def _attend(self, q: Tensor, plain: bool = False) -> Tensor:
        key, value = self._memories()
        normalize = published_double_normalize if plain else double_normalize
        attention = self.attn_drop(normalize(key(q), eps=EPS))
        return q + self.proj_drop(self.proj(value(attention)))


class TransformerTokenExternalAttention(TokenExternalAttention):
    """The same with the names of the published T2t_vit_t networks: linear_1 is the key memory, linear_2 the value."""

    memories = ("linear_1", "linear_2")


def _check_tokens(x: Tensor, or_more: bool = False) -> None:
    if x.ndim < 3 or (x.ndim > 3 and not or_more):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, N, d]")


def _are_tokens(x: Any, key: Tensor) -> bool:
    """Whether x is what an ordinary call brings: [B, N, d], not empty, for a key memory [S, d]."""
    return (
        isinstance(x, Tensor) and not is_distributed(x) and x.ndim == 3 and x.shape[2] == key.shape[1] and x.numel() > 0
    )


def _readable(linears: Iterable[nn.Module], dropout: nn.Module) -> bool:
    for linear in linears:
        if not can_be_read(linear, nn.Linear):
            return False
    return can_be_read(dropout, nn.Dropout)
