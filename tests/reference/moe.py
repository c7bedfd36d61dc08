"""Routing and experts in float64. Experts are a list of float64 matrices [out, in]."""

import numpy as np

from .linear import exact_int4


def ExpertWeights(weights, scales=None):
    """The experts as float64 matrices; INT4 ones as q * scale without rounding."""
    if scales is None:
        return [np.float64(weight) for weight in weights]
    return [exact_int4(packed, scale) for packed, scale in zip(weights, scales, strict=True)]


def topk_sigmoid(logits, bias, top_k, routed_scaling_factor=1.0, norm_topk_prob=True):
    """(weights, ids) of the top_k largest sigmoid + bias: ties to the lower index, NaN last."""
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-np.float64(logits)))
    ids = np.argsort(-(s + np.float64(bias)), axis=-1, kind="stable")[:, :top_k]
    w = np.take_along_axis(s, ids, axis=-1)
    if norm_topk_prob:
        w = w / (w.sum(axis=-1, keepdims=True) + 1e-20)
    return w * routed_scaling_factor, ids.astype(np.int32)


def moe_permute(x, topk_ids, num_experts):
    """(rows sorted by expert, offsets [E + 1], inverse [T, K]); stable in (token, slot), -1 skipped."""
    ids = topk_ids.ravel()
    order = [i for e in range(num_experts) for i in np.flatnonzero(ids == e)]
    permuted = np.zeros((ids.size, x.shape[1]))
    permuted[: len(order)] = np.float64(x)[np.array(order, int) // topk_ids.shape[1]] if order else 0
    inverse = np.full(ids.size, -1, np.int32)
    inverse[order] = np.arange(len(order))
    counts = [np.count_nonzero(ids == e) for e in range(num_experts)]
    return permuted, np.cumsum([0, *counts]).astype(np.int32), inverse.reshape(topk_ids.shape)


def moe_unpermute(y, topk_weights, inverse):
    """out[t] = sum over k of topk_weights[t, k] * y[inverse[t, k]], inverse -1 skipped."""
    out = np.zeros((inverse.shape[0], y.shape[1]))
    for t, k in np.argwhere(inverse >= 0):
        out[t] += np.float64(topk_weights[t, k]) * np.float64(y[inverse[t, k]])
    return out


def grouped_gemm(x, experts, offsets):
    """Rows offsets[e]..offsets[e + 1] of x times expert e; rows from offsets[E] on are zero."""
    out = np.zeros((x.shape[0], experts[0].shape[0]))
    for e, weight in enumerate(experts):
        rows = slice(offsets[e], offsets[e + 1])
        out[rows] = np.float64(x[rows]) @ weight.T
    return out


grouped_gemm_int4 = grouped_gemm  # the decoded experts are matrices like any other


def fused_moe(x, topk_weights, topk_ids, gate, up, down):
    """out[t] = sum over k of w * down(silu(gate x) * up x) with the matrices of expert topk_ids[t, k]."""
    x = np.float64(x)
    out = np.zeros((x.shape[0], down[0].shape[0]))
    for e in np.unique(topk_ids[topk_ids >= 0]):
        t, k = np.nonzero(topk_ids == e)
        g, u = x[t] @ gate[e].T, x[t] @ up[e].T
        y = (g / (1 + np.exp(-g)) * u) @ down[e].T
        np.add.at(out, t, np.float64(topk_weights)[t, k, None] * y)
    return out
