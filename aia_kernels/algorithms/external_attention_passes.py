"""The fused passes of external attention: what its algorithm asks of a backend, and what the two hand each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

#: What a backend keeps of A [B, N, M], for as long as it is needed: two tensors, their form the backend's business.
Attention = tuple[Tensor, Tensor]


class DoubleNorm(NamedTuple):
    """How the logits [B, N, M] are normalized over the slots.

    group: columns that are normalized together, a divisor of M'. eps: added to their sum. padding: boolean [B, N],
    contiguous, True where a token takes no part and gets A = 0; or None.
    """

    group: int
    eps: float
    padding: Tensor | None


class Dropout(NamedTuple):
    """Where A meets the value, A * keep * scale takes its place. keep: uint8 [B, N, M], contiguous, 0 or 1."""

    keep: Tensor
    scale: float


class BatchTerm(NamedTuple):
    """What the gradient of A gains through the statistics of the block's BN: (A - origin) inner + constant.

    origin: [M]. inner: [M, M]. constant: [M]. All are contiguous and in accumulate_dtype.
    """

    origin: Tensor
    inner: Tensor
    constant: Tensor


class Passes(Protocol):
    """The fused passes of a backend, as methods of an object or as functions of a module.

    Sizes: B samples of N tokens. H heads split the features of a token. A head has M' columns, and M = H * M' are the
    columns of all heads, head by head. A memory that all heads share has a first axis of length one.

    Layouts: x, grad, o, g and their like are [B, N, d]. Either their features are contiguous, or (maps [B, C, H, W] as
    tokens) their tokens are. "Stored as x" means: in the order of torch.empty_like(x). Memories are contiguous.

    Types: x, key, value, o, grad and the gradients of x are in the type of the product. What is only as large as M, d
    or M x M is in accumulate_dtype of it, unless it says otherwise. Tokens of padding hold zeros in x and grad.

    The form of the attention, of the logits and of the gradient of A is the backend's own: they go from one of its
    passes to another. A pass overwrites only what it says, and never the attention.
    """

    # The raw passes over logits that are not fused with products (schemas.DOUBLE_NORM_PASSES).
    column_statistics: Callable[..., tuple[Tensor, Tensor]]
    double_norm_: Callable[..., Tensor]
    double_norm_backward_reduce: Callable[..., Tensor]
    double_norm_backward_: Callable[..., None]
    # Of schemas.PASSES.
    move_statistics_: Callable[..., None]
    # The batch norm of the block (schemas.FOLD_PASSES, or folds.py).
    fold: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    fold_sums: Callable[..., tuple[Tensor, Tensor]]
    fold_back: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    def logits(self, x: Tensor, key: Tensor, *, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """L = x key^T.

        Args:
            x: [B, N, H * k].
            key: [H, M', k].
            padding: As in DoubleNorm.

        Returns:
            The logits, and statistics [B, 2, M] and lse [B, M] of their columns as schemas.column_statistics.
        """

    def normalize(self, logits: Tensor, lse: Tensor, *, norm: DoubleNorm) -> Attention:
        """A, from the logits and their statistics over tokens.

        Args:
            logits: As logits() returns them; may be overwritten.
            lse: [B, M], the logarithm of the sum of exp(L) over tokens; -inf where a sample has no token.
            norm: The normalization over slots.
        """

    def moments(self, attention: Attention, *, norm: DoubleNorm) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of A over all tokens of the batch.

        Args:
            attention: As normalize() returns it.
            norm: That of normalize().

        Returns:
            origin [M], the mean of A as far as it could be rounded; then, of A' = A - origin, the sum [M] and the sum
            of A'^T A' [M, M].
        """

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
        """o = A value^T + bias, or, with a residual and H = 1, o = relu(A value^T + bias + residual).

        Args:
            attention: As normalize() returns it.
            value: [H, v, M'].
            norm: That of normalize().
            bias: [H * v] in accumulate_dtype or, without a residual, in the type of the product; or None.
            dropout: Of A, or None.
            residual: [B, N, v], or None.

        Returns:
            o [B, N, H * v], contiguous, and None. With a residual, o stored as the residual, and the signs: one bit for
            each element of o, set where the sum is positive or NaN, in the form of empty_signs().
        """

    def signed(self, grad_y: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient that relu lets through.

        Args:
            grad_y: [B, N, d], stored as o of values().
            signs: As values() returns them.

        Returns:
            g, grad_y where the sign is set, else 0, stored as grad_y; and its sums [d] over batch and tokens.
        """

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
        """grad^T A, the gradient of the value, or with an origin grad^T (A - origin).

        Args:
            grad: [B, N, H * v], the gradient of o.
            attention: As normalize() returns it.
            shape: The three sizes of the value.
            norm: That of normalize().
            dropout: That of values(), or None; not with an origin.
            origin: [M] in accumulate_dtype, or None.
            needs_sums: Whether the sums of grad are wanted.

        Returns:
            The gradient, of this shape in accumulate_dtype, or in the type of grad where a product in that type rounds
            its sums once; and the sums [H * v] of grad over batch and tokens in accumulate_dtype, or None.
        """

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
        """dA = keep * scale * (grad value) + batch_term, and the sums D of Q over tokens.

        Args:
            grad: [B, N, H * v], the gradient of o.
            attention: As normalize() returns it.
            value: [H, v, M'].
            norm: That of normalize().
            dropout: That of values(), or None.
            batch_term: The second term, or None.

        Returns:
            The gradient of A, and D [B, M].
        """

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
        """With dL the gradient of the logits, dL key + residual_grad and dL^T x.

        Args:
            grad_attention: As attention_gradient() returns it; may be overwritten.
            attention: As normalize() returns it.
            reduced: [B, M], D as attention_gradient() returns it, summed over the processes that share the tokens.
            x: [B, N, H * k], that of logits().
            key: [H, M', k], that of logits().
            norm: That of normalize().
            residual_grad: [B, N, k], stored as x, or None; may be overwritten. H is 1 then.
            needs_x: Whether the gradient of x is wanted.

        Returns:
            The gradient of x, stored as x, or None; and that of the key, shaped as the key, in a type as that of
            value_gradient().
        """

    def empty_attention(self, x: Tensor, *, columns: int, group: int) -> Attention:
        """Tensors without values, in the shapes and types of the attention.

        Args:
            x: [B, N, d], that of logits().
            columns: M.
            group: That of the normalization.
        """

    def empty_signs(self, o: Tensor) -> Tensor:
        """A tensor without values, in the shape and type of the signs of o [B, N, d]."""


#: The names of the fused passes.
FUSED_PASSES = tuple(name for name, of in vars(Passes).items() if callable(of) and not name.startswith("_"))
