"""The passes: the schema, the meaning and the traffic of each; fakes.py says the shapes of its results.

They are raw operators without autograd; whole layers are operators of their own (operators/). A backend implements
each pass under the same name and signature: C++ for the CPU and CUDA C++ for CUDA devices register theirs with the
dispatcher (csrc/register); Triton's are plain Python functions (triton/). The algorithms (algorithms/) are written once
in terms of them.

Common to all of them:

* x, grad_y and y are [B, T, C, H, W] tensors in one of the storage orders of maps.ORDERS, float16, bfloat16, float32
  or float64; grad_y has the strides of x.
* Packed maps are contiguous [B, M] or [B, 2, M] in the accumulation type (accumulate_dtype). ``context`` is
  maps.CHANNEL or maps.SPACETIME; an absent optional map has context maps.NONE.
* The gate *field* of a packed gate is G = g_C for CHANNEL and G = (g_T + g_H + g_W) / 3 for SPACETIME, broadcast over
  the axes that each map lacks.
* The unpooled field of a gradient of pooled features is U = sum over the pooled axes d of grad_mean / size(d) +
  grad_max where the index along d equals argmax.
* B >= 1 and every axis has at least one element: empty inputs are answered before an operator is called.

Traffic in units of |X|, the bytes of x, stands beside each schema; packed maps come on top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fakes import FAKES

NAMESPACE = "aia_kernels"

_SCHEMAS = {
    # Pooled features [B, 2, M] of A = x * G (A = x without a gate) and the index of the maximum [B, M] in
    # maps.index_dtype. The first index wins ties; NaN wins over numbers, the first NaN over later ones. Reads 1 |X|.
    "pool": "(Tensor x, int context, Tensor? gate, int gate_context) -> (Tensor pooled, Tensor argmax)",
    # The transpose of pool with respect to x, joined with that of the outer recalibration:
    #     grad_x = grad_y * G(gate) + U(grad_pooled, argmax)                                          one context
    #     grad_x = grad_y * G(gate) + G(inner_gate) * U(grad_pooled, argmax) + U(inner_grad_pooled, inner_argmax)
    # gate, grad_pooled and argmax belong to `context`; inner_grad_pooled and inner_argmax to `inner_context`.
    # Reads 1 |X|, writes 1 |X|.
    "unpool": "(Tensor grad_y, Tensor gate, Tensor grad_pooled, Tensor argmax, int context, Tensor? inner_gate, "
    "int inner_gate_context, Tensor? inner_grad_pooled, Tensor? inner_argmax, int inner_context) -> Tensor",
    # The transpose of pool with respect to its gate: the gradient [B, M] of each map of a gate of gate_context that
    # multiplied x, given the gradient of the pooled features: sum of x * U over the axes that the map lacks, divided
    # by the number of maps of gate_context. Reads 1 |X|.
    "unpool_reduce": "(Tensor x, Tensor grad_pooled, Tensor argmax, int context, int gate_context) -> Tensor",
    # Gates [B, M] of the n maps packed in pooled [B, 2, M]: g = sigmoid(scale * xhat + shift) with
    # xhat = (z - mean) * rsqrt(var + eps) and z = conv(pooled), 2 -> 1, 3x3x3, zero padding 1, no bias. dims are the
    # 3 n stored lengths. Each list has an entry per map, of any type: weight [1, 2, 3, 3, 3] in stored order of axes
    # with any strides (maps.weights_in_order), and of one element scale (1 where absent), shift (0), and mean (0) and
    # var (1), which are used where batch is false; else those of z over batch and map, the variance biased.
    # Returns the gates; norm [n, 4]: mean, rsqrt(var + eps), scale, shift; and statistics [n, 3]: mean and variance as
    # used, and the share of one element in them, 1 / (elements of batch and map) or 0 where they are not the batch's.
    "gate": "(Tensor pooled, Tensor[] weight, Tensor?[] scale, Tensor?[] shift, Tensor?[] mean, Tensor?[] var, "
    "float[] eps, bool[] batch, int[] dims) -> (Tensor gate, Tensor norm, Tensor statistics)",
    # The same gates from a norm that is known, and the z that they are made of.
    "gate_again": "(Tensor pooled, Tensor[] weight, Tensor norm, int[] dims) -> (Tensor gate, Tensor z)",
    # With g the gate and du = grad_gate * g * (1 - g): [n, 2], the sums of du and of du * xhat over batch and map,
    # which are the gradients of the norm's shift and scale.
    "gate_backward_reduce": "(Tensor grad_gate, Tensor z, Tensor norm, int[] dims) -> Tensor",
    # dz = scale * rstd * (du - mean du - xhat * mean (du * xhat)), the means those sums times the share in statistics,
    # then through the convolution. sums [n, 2] are those of gate_backward_reduce, found here if absent. Returns
    # grad_pooled [B, 2, M], the gradient of each weight, strided and of a type as it, and the sums in that type.
    "gate_backward": "(Tensor grad_gate, Tensor z, Tensor norm, Tensor? sums, Tensor statistics, Tensor pooled, "
    "Tensor[] weight, int[] dims) -> (Tensor grad_pooled, Tensor[] grad_weight, Tensor grad_affine)",
    # y = x * G(gate). Reads 1 |X|, writes 1 |X|.
    "recalibrate": "(Tensor x, Tensor gate, int context) -> Tensor",
    # The gradient [B, M] of each map of the gate of recalibrate: sum of grad_y * x over the axes that the map lacks,
    # divided by the number of maps. Reads 2 |X|.
    "recalibrate_reduce": "(Tensor grad_y, Tensor x, int context) -> Tensor",
    # Moves the running statistics of BNs, per BN mean and variance [C] and the number of batches, toward statistics
    # [C, 3] as of gate: r + momentum * (s - r), the variance unbiased, var / (1 - share); one more batch in each number
    # that is there. Statistics are of an accumulation type, the running ones of any, the numbers int64.
    "move_statistics_": "(Tensor(a!)[] mean, Tensor(b!)[] var, Tensor(c!)[] tracked, Tensor[] statistics, "
    "float momentum) -> ()",
}

# External attention (reference/double_norm.py). Logits [B, N, M] are contiguous, N tokens by M columns; the M columns
# are consecutive groups of `group` slots (a head has one group or several); each token is normalized inside each group.
# padding [B, N] is boolean, True where a token takes no part; attention is exactly 0 there. Statistics, mass and sums
# are in accumulate_dtype. A column reduction is split over N in chunks that depend on the sizes alone.
_DOUBLE_NORM_SCHEMAS = {
    # [B, 2, M]: of each column the maximum over tokens and the sum of exp(logit - maximum); -inf and 0 without a token.
    # And lse [B, M] = maximum + log(sum).
    "column_statistics": "(Tensor logits, Tensor? padding) -> (Tensor statistics, Tensor lse)",
    # With P = exp(logits - lse): overwrites the logits by A = P / mass and returns
    # mass [B, N, M / group] = eps + the sum of P over a token's group. A comes from the maximum of a token's group, so
    # that it is exact where mass underflows; without eps A is then a softmax, with it 0.
    "double_norm_": "(Tensor(a!) logits, Tensor lse, int group, float eps, Tensor? padding) -> Tensor",
    # D [B, M]: the sum over tokens of Q = A * (grad - the sum of grad * A over the token's group), grad that of A.
    "double_norm_backward_reduce": "(Tensor grad, Tensor attention, int group) -> Tensor",
    # Overwrites grad by the gradient of the logits, Q - P * D with P = A * mass.
    "double_norm_backward_": "(Tensor(a!) grad, Tensor attention, Tensor mass, Tensor reduced, int group) -> ()",
}

# The double normalization as one in each direction, so that a call is not what its passes cost. logits, A and their
# gradients are [B, N, S] or, of several heads, [B, N, heads, S], contiguous and not empty; the S slots of a head are a
# group. mass is [B, N, heads], as of double_norm_. A backend may lack them.
_NORMALIZE_SCHEMAS = {
    "double_normalize": "(Tensor logits, float eps) -> (Tensor attention, Tensor mass)",
    # The gradient of the logits for that of A.
    "double_normalize_back": "(Tensor grad, Tensor attention, Tensor mass) -> Tensor",
}

# The end of the external attention block. z and x are [B, N, C], both contiguous or both with contiguous tokens (maps).
_RESIDUAL_SCHEMAS = {
    # Overwrites z by relu(z + shift + x), shift [C] in accumulate_dtype or absent. Returns the signs, one bit per
    # element in the order of storage, lowest bit first, set where the sum is positive or NaN: ceil(numel / 8) bytes.
    # Reads 2 |X|, writes 1 |X|.
    "residual_relu_": "(Tensor(a!) z, Tensor x, Tensor? shift) -> Tensor",
    # g = grad_y where the sign is set, 0 elsewhere, and its sums [C] over batch and tokens. Reads 1 |X|, writes 1 |X|.
    "residual_relu_backward": "(Tensor grad_y, Tensor signs) -> (Tensor grad, Tensor sums)",
}

# The batch norm of the block, folded into V [C, M] (algorithms/external_attention.py has the equations). Numbers are in
# accumulate_dtype, weight, bias, mean and var [C] in any type. of_batch is empty under fixed statistics. A backend may
# lack these; algorithms/folds.py has them in PyTorch's operators. No x-sized traffic.
_FOLD_SCHEMAS = {
    # of_batch: origin [M], and of A' = A - origin over `count` tokens the sum [M] and that of A'^T A' [M, M]; or fixed:
    # mean and var [C]. Returns factor * V in the type of V; shift [C] = bias - mean * factor; statistics [C, 3]: mean
    # and biased variance of z, and 1 / count, or 0; and off [M], the mean of A', or [0].
    "fold": "(Tensor value, Tensor? weight, Tensor? bias, Tensor[] of_batch, float count, Tensor[] fixed, float eps) "
    "-> (Tensor folded, Tensor shift, Tensor statistics, Tensor off)",
    # Given product = g^T A' [C, M] and sums [C] of g: joint [2, C], those sums and the gradient of weight,
    # rstd * (rowsum(V * product) - center * sums); and center [C], V off, or the mean where off is absent.
    "fold_sums": "(Tensor value, Tensor product, Tensor sums, Tensor statistics, Tensor? off, float eps) -> "
    "(Tensor joint, Tensor center)",
    # of_batch: off, and the sum and second moment of the tokens at hand; joint is the sum over all processes that share
    # the statistics. Returns the gradient of V, in its type or in accumulate_dtype, and factor * V in its type;
    # inner [M, M] and constant [M] of the gradient of A, or [0, 0] and [0].
    "fold_back": "(Tensor value, Tensor? weight, Tensor product, Tensor joint, Tensor center, Tensor statistics, "
    "Tensor[] of_batch, float eps) -> (Tensor grad_value, Tensor folded, Tensor inner, Tensor constant)",
}

# The temporal shift (arXiv 1811.08383): in y the first ``fold`` channels of a frame are those of the next frame, the
# next ``fold`` those of the previous one, 0 where there is none, and the others its own; 2 * fold <= C. With reverse
# the next and the previous frame change places: the transpose, and so the gradient. Reads 1 |X|, writes 1 |X|.
_SHIFT_SCHEMAS = {"temporal_shift": "(Tensor x, int fold, bool reverse) -> Tensor"}

# CBAM. x, y and their gradients are [B, C, H, W], contiguous or channels_last, and not empty. A gate of the channels is
# [B, C], one of the positions [B, 1, H, W], both in accumulate_dtype; an absent one is 1 everywhere, and one of them is
# there. Pooled features, maximum and mean in this order, are in accumulate_dtype, and the index of each maximum is
# int32: the first one wins ties; NaN wins over numbers, the first NaN over later ones.
_CBAM_SCHEMAS = {
    # Over H and W, of x: pooled [B, 2, C], argmax [B, C] = h * W + w. Reads 1 |X|.
    "cbam_pool_positions": "(Tensor x) -> (Tensor pooled, Tensor argmax)",
    # Over C, of x * channel: pooled [B, 2, H, W], argmax [B, H, W]. Reads 1 |X|.
    "cbam_pool_channels": "(Tensor x, Tensor? channel) -> (Tensor pooled, Tensor argmax)",
    # y = x * channel * spatial, and with the confounder also x - y, which is made of the exact y and rounded once.
    # Reads 1 |X|, writes 1 |X|, or 2 |X| with the confounder.
    "cbam_recalibrate": "(Tensor x, Tensor? channel, Tensor? spatial, bool confounder) -> Tensor[]",
    # Of q = (grad_y - grad_confounder) * x: grad_channel [B, C], the sum over positions of q * spatial, and
    # grad_spatial [B, 1, H, W], the sum over channels of q * channel. Reads 2 |X|, or 3 |X| with a confounder.
    "cbam_recalibrate_reduce": "(Tensor grad_y, Tensor? grad_confounder, Tensor x, Tensor? channel, "
    "Tensor? spatial) -> (Tensor grad_channel, Tensor grad_spatial)",
    # With U(grad, argmax) the transpose of a pool (above): the sum over positions of x * U(grad_spatial [B, 2, H, W]),
    # [B, C], which is the part of grad_channel that comes through the spatial gate. Reads 1 |X|.
    "cbam_unpool_reduce": "(Tensor x, Tensor grad_spatial, Tensor spatial_argmax) -> Tensor",
    # grad_x = ((grad_y - grad_confounder) * spatial + U(grad_spatial)) * channel + U(grad_channel) + grad_confounder,
    # grad_spatial [B, 2, H, W] and grad_channel [B, 2, C] those of pooled features. A gate, its gradient and its argmax
    # come together. Reads 1 |X|, or 2 |X| with a confounder, writes 1 |X|.
    "cbam_unpool": "(Tensor grad_y, Tensor? grad_confounder, Tensor? channel, Tensor? grad_channel, "
    "Tensor? channel_argmax, Tensor? spatial, Tensor? grad_spatial, Tensor? spatial_argmax) -> Tensor",
}

# The convolution of the spatial gate, k x k with an odd k, zeros around and no bias: z [B, 1, H, W] of pooled features
# [B, 2, H, W] by a weight [1, 2, k, k], all contiguous and in one accumulation type; and its transpose in both
# operands. A backend may lack these two; PyTorch's convolution then takes their place. No x-sized traffic.
_CONVOLVE_SCHEMAS = {
    "cbam_convolve": "(Tensor pooled, Tensor weight) -> Tensor",
    "cbam_convolve_backward": "(Tensor grad_z, Tensor pooled, Tensor weight) -> "
    "(Tensor grad_pooled, Tensor grad_weight)",
}

# The spatial gate of z [B, 1, H, W], all contiguous and in one accumulation type: sigmoid(scale (z - mean) rsqrt(var +
# eps) + shift), where batch is set by the moments of z, and the transpose. The numbers of BN are of any type, as of
# gate. A backend may lack these two; PyTorch's operators then take their place. No x-sized traffic.
_SPATIAL_GATE_SCHEMAS = {
    # The gate [B, 1, H, W] and statistics [1, 3] as gate has them.
    "cbam_spatial_gate": "(Tensor z, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? var, float eps, bool batch) "
    "-> (Tensor spatial, Tensor statistics)",
    "cbam_spatial_gate_backward": "(Tensor grad, Tensor z, Tensor spatial, Tensor statistics, Tensor? scale, "
    "float eps) -> (Tensor grad_z, Tensor grad_scale, Tensor grad_shift)",
}

# The channel gate, of the pools [B, pools, C] of each sample: hidden [B, pools, hidden] = relu(weight_1 pool + bias_1)
# and channel [B, C] = sigmoid(weight_2 (sum of hidden over pools) + pools * bias_2); and the transpose, in pooled, both
# weights, [hidden, C] and [C, hidden], and both biases. All contiguous and in one accumulation type. A backend may lack
# these two; PyTorch's operators then take their place. No x-sized traffic.
_CHANNEL_GATE_SCHEMAS = {
    "cbam_channel_gate": "(Tensor pooled, Tensor weight_1, Tensor? bias_1, Tensor weight_2, Tensor? bias_2) -> "
    "(Tensor hidden, Tensor channel)",
    "cbam_channel_gate_backward": "(Tensor grad_channel, Tensor pooled, Tensor hidden, Tensor channel, "
    "Tensor weight_1, Tensor weight_2) -> (Tensor grad_pooled, Tensor grad_weight_1, Tensor grad_bias_1, "
    "Tensor grad_weight_2, Tensor grad_bias_2)",
}

# All of CBAM as one, passes and gates, so that a small call is not what its calls of passes cost. parameters are those
# of algorithms.cbam.Parameters that have a gradient, in its order, each in accumulate_dtype or in the type of x, and
# contiguous; the channel gate pools by maximum and mean. fixed is empty, or mean and variance of the spatial gate's BN.
# A backend may lack them. Reads 3 |X| and writes 1 |X|; back, reads 4 |X| and writes 1 |X|.
_CBAM_PROPAGATE_SCHEMAS = {
    # y, the confounder if it is wanted, and what a backward takes, in one tensor of bytes; it begins with norm [4] and
    # statistics [3] as gate has them, and without keep ends there. running: empty, or the running mean and variance,
    # and perhaps the number of batches, which move as move_statistics_ has it.
    "cbam_propagate_": "(Tensor x, Tensor?[] parameters, Tensor?[] fixed, Tensor(a!)[] running, float eps, bool batch, "
    "float momentum, bool confounder, bool keep) -> Tensor[]",
    # The gradients that are needed, of parameters, in their order and in accumulate_dtype, and of x.
    "cbam_propagate_back": "(Tensor grad_y, Tensor? grad_confounder, Tensor x, Tensor?[] parameters, Tensor kept, "
    "bool[] needs) -> Tensor[]",
}

# Attention by a memory per sample (algorithms/linear_attention.py; N here is its number of tokens, d the features of a
# key in each of H heads). logits [B, 2 H d, N] are Z, the keys and then the queries of all heads, tokens contiguous.
# feature is the place of phi in reference.linear_attention.FEATURES; a head has R rows of phi, d + 1 for l2, else d.
# padding [B, N] is boolean, True where a token takes no part: all that is made of it is 0. gamma [1] is of the type of
# logits, absent for 1; sums, rows and query are in accumulate_dtype. rows [B, H R + 2 H d, N] are phi(k) of all
# heads, and behind it room for the gradients of keys and queries. On a GPU rows and query are bfloat16 where logits
# are: the products that follow take them so, and a cast would be a launch. No x-sized traffic.
_MEMORY_SCHEMAS = {
    # phi(k) [B, H R, N], or rows, and its sums over tokens, s [B, H R]. statistics [B, 2, H d]: of a softmax over
    # tokens the maximum of each column and its sum of exp(logit - maximum), where known; else they are found here.
    "memory_keys": "(Tensor logits, int feature, int heads, Tensor? padding, Tensor? statistics, bool gradients) "
    "-> (Tensor rows, Tensor sums)",
    # phi(q)' [B, H R, N] = gamma phi(q) / mass with mass = phi(q) (s + eps) / N, eps not for the constant 1 of l2, and
    # where mass is 0 by 1; or gamma phi(q) where phi is a softmax over the features of a head.
    "memory_queries": "(Tensor logits, int feature, int heads, Tensor? padding, Tensor sums, Tensor? gamma, "
    "float eps) -> Tensor",
    # For the gradient `reached` [B, H R, N] of phi(q)', of the type of logits: the gradient of the queries into rows;
    # returns phi(q)', the gradient of s [B, H R] by way of mass, and that of gamma [1].
    "memory_queries_backward_": "(Tensor(a!) rows, Tensor logits, int feature, int heads, Tensor? padding, "
    "Tensor sums, Tensor? gamma, float eps, Tensor reached) -> (Tensor query, Tensor grad_sums, Tensor grad_gamma)",
    # For the gradient reached + grad_sums [B, H R] of phi(k), which is in rows: the gradient of the keys into rows.
    # reduced [B, H d]: of a softmax over tokens the sum of phi(k) times its gradient, where it is known.
    "memory_keys_backward_": "(Tensor(a!) rows, Tensor logits, int feature, int heads, Tensor? padding, "
    "Tensor reached, Tensor grad_sums, Tensor? reduced) -> ()",
}

# The whole unit forward, y = x * G_outer(x * G_inner(x)), where all statistics are fixed: no clip depends on another,
# and a clip may stay on chip, or in cache. inner is a context or NONE, outer the other context, or either one. The
# lists are those of gate, with entries for the gate over C, then for those over T, H and W, as far as the unit has
# them. A backend may lack it. Reads 1 |X| where a clip fits on chip, else 2 or, with an inner context, 3; writes 1 |X|.
_EVALUATE_SCHEMAS = {
    "evaluate": "(Tensor x, Tensor[] weight, Tensor?[] scale, Tensor?[] shift, Tensor?[] mean, Tensor?[] var, "
    "float[] eps, int inner, int outer) -> Tensor",
}

# The inner gate of STinC2: maps over T, H and W, each averaged over C. sizes are the lengths of T, C, H and W. order is
# the place in maps.ORDERS of the order of maps. A backend may lack these two; PyTorch's operators then take their
# place. No x-sized traffic.
_AVERAGE_SCHEMAS = {
    # Of a gate [B, M], (mean g_T + mean g_H + mean g_W) / 3, each broadcast over the axis that it lacks:
    # [B, T * H * W].
    "average_gate": "(Tensor gate, int[] sizes, int order) -> Tensor",
    # Its transpose, of a gradient [B, T * H * W]: [B, M].
    "average_gate_back": "(Tensor grad, int[] sizes, int order) -> Tensor",
}

# All passes of a unit as one, forward and backward, so that a small call is not what its calls of passes cost. inner,
# outer and the lists as of evaluate, batch as of gate. A backend may lack them.
_PROPAGATE_SCHEMAS = {
    # y, and of the inner context, if there is one, and the outer one: pooled and argmax of pool, norm and statistics of
    # gate.
    "propagate": "(Tensor x, Tensor[] weight, Tensor?[] scale, Tensor?[] shift, Tensor?[] mean, Tensor?[] var, "
    "float[] eps, bool[] batch, int inner, int outer) -> Tensor[]",
    # kept: what propagate returns behind y. Returns the gradient of each weight, for the context over C and for that
    # over T, H and W, as far as they are there, grad_affine of gate_backward, and, if it is needed, the gradient of x.
    "propagate_back": "(Tensor grad_y, Tensor x, Tensor[] weight, Tensor[] kept, int inner, int outer, bool needs_x) "
    "-> Tensor[]",
}

# The same of a unit as a network has it, so that Python is not what a small call costs: x is [B * frames, C, H, W] or,
# whatever frames is, [B, C, T, H, W], stored in one of maps.ORDERS. parameters are weight, scale and shift of each
# gate, weights in the paper's order of axes; fixed is empty, or mean and variance of each, as of gate. averaged: the
# inner gates, over T, H and W, are averaged over the channels.
_UNIT_SCHEMAS = {
    # y, stored as x, and what a backward takes, in one tensor of kept_bytes; without keep only
    # the numbers of the gates, and nothing of gates that all have fixed statistics. running: empty, or of each gate the
    # running mean and variance, and perhaps the number of batches, which move as move_statistics_ has it.
    "unit_propagate_": "(Tensor x, int frames, Tensor?[] parameters, Tensor?[] fixed, Tensor(a!)[] running, "
    "float[] eps, bool[] batch, float momentum, int inner, int outer, bool averaged, bool keep) -> "
    "(Tensor y, Tensor kept)",
    # The gradients that are needed, of parameters, in their order, and of x.
    "unit_propagate_back": "(Tensor grad_y, Tensor x, int frames, Tensor?[] parameters, Tensor kept, int inner, "
    "int outer, bool averaged, bool[] needs) -> Tensor[]",
}

# The algorithm of attention by a memory per sample as one, products and passes, so that a small call is not what its
# calls cost; for tokens that are no shards, none of which is padding. x [B, N, C] is float32 or float64, stored
# densely; weights are those of reference.Weights, of as many heads as its value has. A backend may lack them. Traffic:
# see docs/how-it-works.md.
_MEMORY_PROPAGATE_SCHEMAS = {
    # y, Z, T and s.
    "memory_propagate": "(Tensor x, Tensor?[] weights, int feature, float eps, bool residual) -> Tensor[]",
    # kept: Z, T and s, each where it is there. The gradients of x and of the weights; empty for what is absent or not
    # needed, but for gamma.
    "memory_propagate_back": "(Tensor grad, Tensor x, Tensor?[] weights, Tensor?[] kept, int feature, float eps, "
    "bool residual, bool needs_x) -> Tensor[]",
}

# A layer of external attention as one, products and passes, so that a small call is not what its operators cost:
#
#     h = W_1 x        L = K h for each of the heads, which share K [S, k] and V [v, S]        A: mass and A as above
#     u = V A + b_V    z = W_2 u + b_2        and, where norm is not empty, y = relu(BN(z) + x), else y = z
#
# weights are W_1 [heads * k, C], K, V, b_V, W_2 [O, heads * v] and b_2; W_1, W_2 and biases may be absent, the former
# two of one head alone. Behind them b_1, or None, says that there is a residual, of tokens and one head: then h is
# W_1 x + b_1, and y = z + h. fold: K W_1 and W_2 V are made first, and h and u never. norm is empty, or scale, shift,
# mean and variance [C]; the latter two serve where batch is not set, else the moments of z do. x is contiguous
# [B, N, C] or maps [B, C, H, W] in either order, as it is where norm is not empty; and not empty; all else is
# contiguous and of its type. In 16 bits all of it is made in float32, and what is kept is float32. Maps come out with
# as many channels, and take no biases. Weights may have axes of one behind, as those of pointwise convolutions. A
# backend may lack them.
_EXTERNAL_PROPAGATE_SCHEMAS = {
    # y, stored as x, and all that is kept for a backward, in one tensor of parts whose lengths are multiples of 16; the
    # last one of a block begins with its statistics [C, 3]: mean, biased variance and share of one token, 0 where they
    # are fixed. running: the running mean and variance that move by momentum toward those of the batch, and perhaps the
    # number of batches, as move_statistics_ has them; or empty.
    "external_propagate_": "(Tensor x, Tensor?[] weights, Tensor?[] norm, Tensor(a!)[] running, int heads, float eps, "
    "bool fold, bool batch, float norm_eps, float momentum) -> (Tensor y, Tensor kept)",
    # y is given for a block alone. Returns the gradients that are needed, of weights, in their order, of scale, of
    # shift and of x.
    "external_propagate_back": "(Tensor grad, Tensor x, Tensor? y, Tensor?[] weights, Tensor?[] norm, Tensor kept, "
    "int heads, bool fold, float norm_eps, bool[] needs) -> Tensor[]",
}

PASSES = tuple(_SCHEMAS)
DOUBLE_NORM_PASSES = tuple(_DOUBLE_NORM_SCHEMAS)
NORMALIZE_PASSES = tuple(_NORMALIZE_SCHEMAS)
RESIDUAL_PASSES = tuple(_RESIDUAL_SCHEMAS)
FOLD_PASSES = tuple(_FOLD_SCHEMAS)
SHIFT_PASSES = tuple(_SHIFT_SCHEMAS)
CBAM_PASSES = tuple(_CBAM_SCHEMAS)
CONVOLVE_PASSES = tuple(_CONVOLVE_SCHEMAS)
CHANNEL_GATE_PASSES = tuple(_CHANNEL_GATE_SCHEMAS)
SPATIAL_GATE_PASSES = tuple(_SPATIAL_GATE_SCHEMAS)
CBAM_PROPAGATE_PASSES = tuple(_CBAM_PROPAGATE_SCHEMAS)
MEMORY_PASSES = tuple(_MEMORY_SCHEMAS)
MEMORY_PROPAGATE_PASSES = tuple(_MEMORY_PROPAGATE_SCHEMAS)
PROPAGATE_PASSES = tuple(_PROPAGATE_SCHEMAS)
UNIT_PASSES = tuple(_UNIT_SCHEMAS)
EXTERNAL_PROPAGATE_PASSES = tuple(_EXTERNAL_PROPAGATE_SCHEMAS)
AVERAGE_PASSES = tuple(_AVERAGE_SCHEMAS)

_PASS_SCHEMAS = _SCHEMAS | _EVALUATE_SCHEMAS | _DOUBLE_NORM_SCHEMAS | _RESIDUAL_SCHEMAS | _SHIFT_SCHEMAS | _CBAM_SCHEMAS
_PASS_SCHEMAS |= _CONVOLVE_SCHEMAS | _CHANNEL_GATE_SCHEMAS | _PROPAGATE_SCHEMAS | _MEMORY_SCHEMAS
_PASS_SCHEMAS |= _UNIT_SCHEMAS | _EXTERNAL_PROPAGATE_SCHEMAS | _AVERAGE_SCHEMAS | _FOLD_SCHEMAS | _NORMALIZE_SCHEMAS
_PASS_SCHEMAS |= _MEMORY_PROPAGATE_SCHEMAS | _CBAM_PROPAGATE_SCHEMAS | _SPATIAL_GATE_SCHEMAS

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in _PASS_SCHEMAS.items():
    _library.define(_name + _schema)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", FAKES[_name], lib=_library)


def _written(op: torch._ops.OpOverload) -> list[int]:
    """The places of the arguments that an operator writes."""
    return [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _counting(op: torch._ops.OpOverload) -> Callable:
    """A mutable operator whose calls count as changes of what it writes, as those of torch's own in-place operators do.

    Without it autograd and checkpointing would not notice that a tensor which they saved has another content. The
    dispatcher's calls count too, but by way of Python's end of the dispatcher, which takes three times as long.
    """
    written = _written(op)
    below, increment = torch._C._AutoDispatchBelowADInplaceOrView, torch.autograd.graph.increment_version

    def kernel(keys, *arguments):
        with below():
            result = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)
        for i in written:
            increment(arguments[i])
        return result

    def call(*arguments):
        with below():
            result = op(*arguments)
        for i in written:
            increment(arguments[i])
        return result

    _library.impl(op, kernel, "ADInplaceOrView", with_keyset=True)
    return call


_COUNTING = {
    name: _counting(getattr(getattr(torch.ops, NAMESPACE), name).default)
    for name, schema in _PASS_SCHEMAS.items()
    if "!" in schema
}


def _resolving(op: torch._ops.OpOverload) -> None:
    """Views of negatives (torch.Tensor.is_neg) are resolved in lists of tensors that may be absent too: the framework
    resolves single tensors and whole lists alone, and a kernel would read the negatives. What it writes is copied back.
    """
    written = _written(op)

    def resolved(value):
        if isinstance(value, (list, tuple)):
            return [resolved(entry) for entry in value]
        return value.resolve_neg() if isinstance(value, Tensor) else value

    def kernel(*arguments):
        read = [resolved(value) for value in arguments]
        result = op(*read)
        for i in written:
            for given, own in zip(arguments[i], read[i], strict=True):
                if given.is_neg():
                    given.copy_(own)
        return result

    _library.impl(op, kernel, "Negative")


for _name, _schema in _PASS_SCHEMAS.items():
    if "Tensor?[]" in _schema:
        _resolving(getattr(getattr(torch.ops, NAMESPACE), _name).default)


def callable_pass(name: str) -> Callable:
    """The registered operator of a pass."""
    return _COUNTING.get(name) or getattr(getattr(torch.ops, NAMESPACE), name).default
