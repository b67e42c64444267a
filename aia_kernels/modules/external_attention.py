"""External attention (arXiv 2105.02358) as modules, with the published names, parameters and initialization.

What is folded, and why it is exact: no nonlinearity stands between a projection and the memory beside it. So the two
are one matrix, a product of parameters alone, small beside the tokens. It is formed in every call by differentiable
products, and autograd carries its gradient to both factors, exact but for rounding. A bias before the softmax over
tokens, that of a projection or of the key memory, adds the same number to all tokens of a slot. The softmax does not
see it, so it has no effect and a gradient of zero.

The submodules hold parameters, mode and settings, and may be frozen, parametrized or converted as usual. The layer
reads them and does not call them. If a submodule has hooks or is of another kind (quantized, adapted, replaced), all of
them are called in the published order, with the double normalization between them. Where "auto" counts that there is
too little to fuse (backends.plain_is_faster), what was read goes to a few operators of PyTorch (functional/plain.py);
a draw of dropout is the same on every path, and so excepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends
from ..common.autocast import autocast_dtype, no_autocast
from ..common.layouts import in_order, memory_order, stored_for
from ..common.tracing import is_exporting, is_for_any_sizes, is_observed, is_statically, is_traced
from ..functional import plain, small_calls
from ..functional.block import ACTIVATIONS
from ..functional.checks import check_at_least_one
from ..functional.external_attention import (
    COMPILED_CALLS,
    compiler_fuses,
    compiler_takes,
    double_normalize,
    external_attention,
    external_attention_block,
    without_effect,
)
from ..functional.sharded import is_distributed
from ..reference import Norm
from . import counts
from .recorded import one_call
from .submodules import (
    can_be_read,
    held,
    is_pointwise,
    must_be_called,
    norm_of,
    plain_is_faster,
    read_at_once,
)

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
        if isinstance(x, Proxy):
            return one_call(self, ExternalAttention.forward, x)
        mk, mv = held(self, "mk"), held(self, "mv")
        if type(x) is Tensor and x.ndim == 3 and (found := read_at_once(x, (mk, mv))) is not None:
            key, key_bias, value, value_bias = found
            if (
                x.shape[2] == key.shape[1]
                and x.numel()
                and backends.plain_is_faster(x.device, _rows_to_fuse(x), key.shape[0])
            ):
                return small_calls.external_attention(x, key, value, key_bias, value_bias)
        if getattr(x, "ndim", 3) > 3 or not (can_be_read(mk, nn.Linear) and can_be_read(mv, nn.Linear)):
            return self._through_submodules(x)
        key, key_bias, value, value_bias = memories = (*_linear(mk), *_linear(mv))
        if _are_tokens(x, key):
            rows, slots = x.shape[0] * x.shape[1], key.shape[0]
            if compiler_takes(x, *memories) and compiler_fuses(x, rows, slots, 0, COMPILED_CALLS):
                key = key if key_bias is None else without_effect(key, key_bias)
                return plain.for_a_compiler(x, key, value, value_bias, 0.0, 1)
            if plain_is_faster(x, memories, _rows_to_fuse(x), slots):
                return plain.external_attention(x, key, value, key_bias, value_bias)
        return external_attention(x, key, value, key_bias=key_bias, value_bias=value_bias)

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

    # Those of the published block, which has no attributes for them. TorchScript reads annotations, and not all.
    activation = "relu"
    residual = True
    #: How y is stored: "as x"; where convert has found that the published layer has it otherwise, as of
    #: layouts.stored_for.
    storage = "as x"

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
        if isinstance(x, Proxy):
            return one_call(self, ExternalAttention2d.forward, x)
        if getattr(x, "ndim", 4) in (3, 5):
            return self._attend(x.flatten(2).unsqueeze(3)).reshape(x.shape)
        y = self._attend(x)
        return y if self.storage == "as x" else stored_for(y, self.storage, self._last_weight())

    def _last_weight(self) -> Tensor | None:
        """That of the convolution in conv2, which says how what it makes is stored."""
        first = next(iter(held(self, "conv2")._modules.values()), None)
        return held(first, "weight") if isinstance(first, nn.Conv2d) else None

    def _attend(self, x: Tensor) -> Tensor:
        if (read_now := self._read_at_once(x)) is not None:
            y = self._propagated(x, *read_now)
            return self._by_torch(x, *read_now) if y is None else y
        convolutions, norm = self._parts()
        small = self._is_small(x, convolutions, norm)
        if not self._foldable(convolutions, norm):
            return self._through_submodules(x)
        weights = [held(conv, "weight") for conv in convolutions]  # each is read once, as it may be parametrized
        biases = held(convolutions[0], "bias"), held(convolutions[1], "bias")
        read: Any = norm_of(norm) if isinstance(norm, _BatchNorm) else norm
        if small:
            return self._by_torch(x, weights, biases, norm, read)
        with no_autocast(x):
            first, second, value, *last = [weight.flatten(1) for weight in weights]
            key, value = without_effect(second @ first, *biases), last[0] @ value if last else value
        settings: dict[str, Any] = {"activation": self.activation, "residual": self.residual}
        return external_attention_block(x, key, value, read, eps=EPS, **settings)

    def _read_at_once(self, x: Tensor) -> tuple[list[Any], tuple[Any, Any], Any, Any] | None:
        """The weights, the biases, the norm and what is read of it, of an ordinary call on what is small; a norm that
        is no batch norm is itself what is read. None where it is no such call, or where that cannot be told at once."""
        if is_observed() or getattr(x, "ndim", 0) != 4:  # first, as torch.compile would guard each later check
            return None
        modules: list[Any] = [*self._modules.values()]
        *convolutions, conv2 = modules
        if len(convolutions) != 3 or type(conv2) is not nn.Sequential or must_be_called(conv2):
            return None
        last = [*conv2._modules.values()]
        if last and type(last[0]) is nn.Conv2d:
            convolutions.append(last.pop(0))
        norm: Any = last[0] if last else None
        of_batch = type(norm) is nn.BatchNorm2d or (type(norm) is nn.SyncBatchNorm and not norm.training)
        if len(last) > 1 or (isinstance(norm, _BatchNorm) and not of_batch):
            return None
        found = read_at_once(x, (*convolutions, norm) if of_batch else convolutions)
        if found is None or found[5] is not None or (len(convolutions) > 3 and found[7] is not None):
            return None
        count, sizes = len(convolutions), x.shape
        weights, positions = found[: 2 * count : 2], sizes[0] * sizes[2] * sizes[3]
        fits = sizes[1] == weights[0].shape[1] == weights[1].shape[1] == weights[-1].shape[0] and positions > 1
        if not fits or not counts.block_fusing_costs(x, weights[1].shape[0]):
            return None
        return weights, (found[1], found[3]), norm, norm_of(norm) if of_batch else norm

    def _propagated(self, x: Tensor, weights: list[Any], biases: tuple[Any, Any], norm: Any, read: Any) -> Any:
        """y of an ordinary call, by one operator as far as there is one for it; None where there is none."""
        folds = counts.block_products_saved(x, weights) > 0
        if self.activation == "relu" and self.residual is True and isinstance(read, Norm):
            return small_calls.block(x, weights, biases, read, EPS, folds)
        z = small_calls.values_of_maps(x, weights, biases, EPS, folds)
        return None if z is None else self._finished(x, self._normed(z, norm, read))

    def _by_torch(self, x: Tensor, weights: list[Any], biases: tuple[Any, Any], norm: Any, read: Any) -> Tensor:
        """y in operators of PyTorch."""
        if not counts.block_folding_pays(x, weights):
            z = plain.values_unfolded(x, weights, biases, EPS)
        else:
            first, second, value, *last = [weight.flatten(1) for weight in weights]
            key = _joined_to(second, first, *biases)
            z = plain.values_of_maps(x, key, last[0] @ value if last else value, EPS)
        return self._finished(x, self._normed(z, norm, read))

    def _normed(self, z: Tensor, norm: Any, read: Any) -> Tensor:
        """z behind the norm, of which read was read."""
        of_maps = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
        if isinstance(read, Norm) and of_maps and plain.moves_at_once(read):
            return plain.batch_norm(z, read)
        return z if norm is None else norm(z)

    def _parts(self) -> tuple[list[Any], Any]:
        """The convolutions, in the order in which they are applied, and the norm, None without one."""
        convolutions = [held(self, "conv1"), held(self, "linear_0"), held(self, "linear_1")]
        parts = [*held(self, "conv2")._modules.values()]
        if parts and isinstance(parts[0], nn.Conv2d):
            convolutions.append(parts.pop(0))
        return convolutions, parts[0] if parts else None

    def _is_small(self, x: Tensor, convolutions: list[Any], norm: Any) -> bool:
        """Whether there is too little to fuse. Operators of PyTorch may fold too, so what the passes save is traffic.

        Not where a call is recorded, as torch's batch norm changes what selective checkpointing may have kept; but for
        torch.compile, which fuses such operators itself.
        """
        key = convolutions[1]._parameters.get("weight")
        if key is None or not (type(x) is Tensor or (isinstance(x, Tensor) and not is_distributed(x))) or x.ndim != 4:
            return False
        compiled = torch.compiler.is_compiling() and not is_exporting()
        if is_traced() and not compiled:
            return False
        positions = x.numel() // max(1, x.shape[1])
        if x.shape[1] != key.shape[1] or positions < 2 or isinstance(norm, nn.SyncBatchNorm):
            return False
        of_norm = () if norm is None else (norm._buffers.get("running_mean"), norm._parameters.get("weight"))
        if compiled:
            tensors = [t for t in (x, key, *of_norm) if t is not None]
            wide = x.dtype.is_floating_point and x.dtype.itemsize > 2
            same = all(t.dtype == x.dtype and t.device.type == "cpu" for t in tensors)
            return wide and same and autocast_dtype(x) is None and counts.block_fusing_costs(x, key.shape[0], compiled)
        return plain.serves(x, key, *of_norm) and counts.block_fusing_costs(x, key.shape[0])

    def _foldable(self, convolutions: list[Any], norm: Any) -> bool:
        conv2 = held(self, "conv2")
        parts = len(convolutions) - 3 + (norm is not None)
        if not can_be_read(conv2, nn.Sequential) or len(conv2._modules) != parts:
            return False
        for conv in convolutions:
            if must_be_called(conv) or not is_pointwise(conv):
                return False
        if isinstance(norm, _BatchNorm) and must_be_called(norm):
            return False
        return all(held(conv, "bias") is None for conv in convolutions[2:])

    def _through_submodules(self, x: Tensor) -> Tensor:
        conv1, linear_0, linear_1, conv2 = (held(self, name) for name in ("conv1", "linear_0", "linear_1", "conv2"))
        attention = double_normalize(linear_0(conv1(x).flatten(2)), dims=(2, 1), eps=EPS)
        return self._finished(x, conv2(linear_1(attention).unflatten(2, x.shape[2:])))

    def _finished(self, x: Tensor, z: Tensor) -> Tensor:
        # Stored as x, which comes first.
        y = x + z if self.residual else in_order(z, memory_order(x))
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


class MultiHeadExternalAttention(nn.Module):
    """EAMLP's attention on tokens: 4 * num_heads heads of dim / num_heads features, one pair of memories for all.

    It takes x [B, N, dim] and returns o of that shape. Its submodules are trans_dims (dim to 4 dim), linear_0 and
    linear_1 (64 slots, with biases, shared by the heads) and proj (4 dim to dim). eps is 1e-9.

    Folded: for each head linear_0 and the head's rows of trans_dims into [64, dim] (their biases drop out), proj and
    linear_1 into [dim, 64 * heads], and the bias of linear_1 into that of proj. That leaves external attention of
    64 * heads slots, normalized in groups of 64, and no product per head. Dropout acts between the two, on the map.
    With many heads the folded matrices are larger than what they are made of (counts.products_saved). Then trans_dims
    and proj are products of their own, and all heads together are the rows of one product with the memory they share.

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
        if isinstance(x, Proxy):
            return one_call(self, MultiHeadExternalAttention.forward, x)
        linears = tuple([held(self, name) for name in ("trans_dims", "linear_0", "linear_1", "proj")])
        attn_drop, proj_drop = held(self, "attn_drop"), held(self, "proj_drop")
        parameters = read_at_once(x, linears)
        at_once = parameters is not None
        if not can_be_read(attn_drop, nn.Dropout) or not (at_once or _readable(linears)):
            return self._through_submodules(x)
        if parameters is None:
            parameters = [p for linear in linears for p in _linear(linear)]
        dropout = attn_drop.p if attn_drop.training else 0.0
        saved = self._saved_by_folding(x, parameters[0])
        folds = saved is None or is_statically(saved >= 0)
        if saved is not None and not dropout and self._is_small(x, parameters, at_once, saved if folds else 0):
            by_heads = small_calls.by_heads if at_once else plain.by_heads
            return _dropped(proj_drop, by_heads(x, self.num_heads, EPS, *parameters))
        attend = self._folded if folds else self._by_heads
        return _dropped(proj_drop, attend(x, parameters, dropout))

    def _is_small(self, x: Tensor, parameters: list[Any], at_once: bool, products: int) -> bool:
        """Whether there is too little to fuse, beside the products that folding saves; or so little that torch.compile
        makes more of plain operators."""
        if not at_once and compiler_takes(x, *parameters):
            rows = x.shape[0] * x.shape[1] * self.num_heads
            return compiler_fuses(x, rows, self.k, products, COMPILED_CALLS)
        work = _rows_to_fuse(x, self.num_heads), self.k, products
        return (at_once or plain.serves(x, *parameters)) and backends.plain_is_faster(x.device, *work)

    def _saved_by_folding(self, x: Tensor, trans_dims: Tensor) -> int | None:
        """The multiplications that folding saves. None for DTensors, which are folded, as torch's linear takes no
        shards of uneven sizes; and for what does not fit, which is then refused.
        """
        width, dim = trans_dims.shape
        if type(x) is not Tensor and is_distributed(x):
            return None
        if getattr(x, "ndim", 0) != 3 or x.shape[2] != dim or not x.numel():
            return None
        if x.device != trans_dims.device or (x.dtype != trans_dims.dtype and autocast_dtype(x) is None):
            return None
        tokens = None if is_for_any_sizes() else x.shape[0] * x.shape[1]
        return counts.products_saved(self.num_heads, self.k, (width, dim), (dim, width), tokens)

    def _folded(self, x: Tensor, parameters: list[Any], dropout: float) -> Tensor:
        trans_dims, trans_bias, shared_key, key_bias, shared_value, value_bias, proj, bias = parameters
        with no_autocast(x):
            # [heads, k, dim]; bmm, as matmul would copy both operands and the result.
            by_head = trans_dims.unflatten(0, (self.num_heads, -1))
            key = torch.bmm(shared_key.expand(self.num_heads, -1, -1), by_head)
            key = without_effect(key.flatten(0, 1), trans_bias, key_bias)
            back = proj.unflatten(1, (self.num_heads, -1))  # [dim, heads, dim / heads]
            value = (back @ shared_value).flatten(1)
            if value_bias is not None:
                shared = back.sum(1)
                of_bias = None if bias is None else bias.to(shared.dtype)
                bias = shared @ value_bias if of_bias is None else torch.addmv(of_bias, shared, value_bias)
        return external_attention(x, key, value, value_bias=bias, eps=EPS, group=self.k, dropout=dropout)

    def _by_heads(self, x: Tensor, parameters: list[Any], dropout: float) -> Tensor:
        trans_dims, trans_bias, key, key_bias, value, value_bias, proj, bias = parameters
        rows, key = nn.functional.linear(x, trans_dims), without_effect(key, trans_bias, key_bias)
        settings: dict[str, Any] = {"heads": self.num_heads, "eps": EPS, "dropout": dropout}
        o = external_attention(rows, key, value, value_bias=value_bias, **settings)
        return nn.functional.linear(o, proj, bias)

    def _through_submodules(self, x: Tensor) -> Tensor:
        _check_tokens(x)
        trans_dims, linear_0, linear_1, attn_drop, proj, proj_drop = (
            held(self, name) for name in ("trans_dims", "linear_0", "linear_1", "attn_drop", "proj", "proj_drop")
        )
        heads = trans_dims(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, dim / heads]
        attention = attn_drop(double_normalize(linear_0(heads), eps=EPS))
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
        if isinstance(x, Proxy):
            return one_call(self, TokenExternalAttention.forward, x)
        if (y := self._at_once(x)) is not None:
            return y
        linears, attn_drop = (*self._memories(), held(self, "proj")), held(self, "attn_drop")
        if not _readable(linears) or not can_be_read(attn_drop, nn.Dropout):
            return self._through_submodules(x)
        q, proj_drop = held(self, "q_linear")(x), held(self, "proj_drop")
        dropout = attn_drop.p if attn_drop.training else 0.0
        key, key_bias, value, value_bias, proj, bias = parameters = [p for one in linears for p in _linear(one)]
        ordinary = not dropout and _are_tokens(q, key)
        if ordinary and plain_is_faster(q, parameters, _rows_to_fuse(q), key.shape[0]):
            o = plain.external_attention(q, key, value, key_bias, value_bias, EPS)
            return q + _dropped(proj_drop, nn.functional.linear(o, proj, bias))
        with no_autocast(x):
            folded = proj @ value
            if value_bias is not None:
                bias = nn.functional.linear(value_bias, proj, bias)
        o = external_attention(q, key, folded, key_bias=key_bias, value_bias=bias, eps=EPS, dropout=dropout)
        return q + _dropped(proj_drop, o)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """y of an ordinary call on what is small, without dropouts; None where it is no such call, or where that cannot
        be told at once."""
        if is_observed() or getattr(x, "ndim", 0) != 3:  # first, as torch.compile would guard each later check
            return None
        of: Any = self._modules
        found = read_at_once(x, (of["q_linear"], *(of[name] for name in self.memories), of["proj"]))
        if found is None:
            return None
        for name in ("attn_drop", "proj_drop"):
            drop = of[name]
            if not can_be_read(drop, nn.Dropout) or (drop.training and drop.p):
                return None
        query, query_bias, key, key_bias, value, value_bias, proj, bias = found
        fits = x.shape[2] == query.shape[1] and query.shape[0] == key.shape[1] and key_bias is None and x.numel()
        if not fits or not backends.plain_is_faster(x.device, _rows_to_fuse(x), key.shape[0]):
            return None
        if (y := small_calls.tokens(x, EPS, *found)) is not None:
            return y
        q = nn.functional.linear(x, query, query_bias)
        o = nn.functional.linear(plain.external_attention(q, key, value, None, value_bias, EPS), proj, bias)
        return q + o

    def _through_submodules(self, x: Tensor) -> Tensor:
        _check_tokens(x)
        q, (key, value) = self.q_linear(x), self._memories()
        attention = self.attn_drop(double_normalize(key(q), eps=EPS))
        return q + self.proj_drop(self.proj(value(attention)))


class TransformerTokenExternalAttention(TokenExternalAttention):
    """The same with the names of the published T2t_vit_t networks: linear_1 is the key memory, linear_2 the value."""

    memories = ("linear_1", "linear_2")


def _check_tokens(x: Tensor, or_more: bool = False) -> None:
    if x.ndim < 3 or (x.ndim > 3 and not or_more):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, N, d]")


def _are_tokens(x: Any, key: Tensor) -> bool:
    """Whether x is what an ordinary call brings: [B, N, d], not empty, for a key memory [S, d]."""
    ordinary = type(x) is Tensor or (isinstance(x, Tensor) and not is_distributed(x))
    return ordinary and x.ndim == 3 and x.shape[2] == key.shape[1] and x.numel() > 0


def _joined_to(second: Tensor, first: Tensor, *biases: Tensor | None) -> Tensor:
    """second @ first, joined to biases that have no effect, so that they get a gradient of zero."""
    bias, *others = biases
    if bias is not None and bias.shape[0] == first.shape[1] and all(other is None for other in others):
        return torch.addmm(bias, second, first, beta=0)  # of 0 * bias nothing is read
    return without_effect(second @ first, *biases)


def _rows_to_fuse(x: Tensor, heads: int = 1) -> int:
    """The rows of the attention map for which choices.fusing_pays counts: none where no gradients are recorded. There
    functional/plain.py has the same passes between its products."""
    return x.shape[0] * x.shape[1] * heads if torch.is_grad_enabled() else 0


def _readable(linears: Iterable[nn.Module]) -> bool:
    return all(can_be_read(linear, nn.Linear) for linear in linears)


def _linear(linear: nn.Module) -> tuple[Any, Any]:
    """Weight and bias, each read once: a parametrized one may move when it is read, as that of spectral_norm does."""
    return held(linear, "weight"), held(linear, "bias")


def _dropped(dropout: nn.Module, x: Tensor) -> Tensor:
    """What a dropout makes of x. A module is not called where it does nothing and nobody wants to see the call."""
    nothing = can_be_read(dropout, nn.Dropout) and not (dropout.training and dropout.p)
    return x if nothing else dropout(x)
