"""Rotary embedding and latent attention in float64."""

import numpy as np

from .norm import rms_norm


def rope(x, cos, sin, positions):
    """Rotate pairs (2i, 2i + 1) of x [T, N, R] by row positions[t] of the tables [P, R/2]."""
    x = np.float64(x)
    c, s = (np.float64(table)[positions][:, None, :] for table in (cos, sin))
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
    out[..., 1::2] = x[..., 0::2] * s + x[..., 1::2] * c
    return out


def append_mla_cache(latent, k_pe, cache, slots):
    """A copy of the cache [pages, page_size, C + R] with rows [latent, k_pe] at the slots, in its dtype."""
    new = cache.copy()
    with np.errstate(over="ignore"):
        new.reshape(-1, cache.shape[2])[slots] = np.concatenate([latent, k_pe], axis=1).astype(cache.dtype)
    return new


def mla_prefill(
    q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets, scale, state=None, return_lse=False, max_logits=None
):
    """Ragged causal attention: q [T, N, dn + R], kv [S, N, dn + dv], k_pe [S, R] to out [T, N, dv].

    max_logits [T, N] is written in place: the largest score a query sees, or with `state` the larger of that and what
    it held.
    """
    q, kv, k_pe = np.float64(q), np.float64(kv), np.float64(k_pe)
    dn = q.shape[2] - k_pe.shape[1]
    out = np.zeros((*q.shape[:2], kv.shape[2] - dn))
    lse, largest = np.full(q.shape[:2], -np.inf), np.full(q.shape[:2], -np.inf)
    for b, offset in enumerate(causal_offsets):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        keys = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        score = causal_scores(q[rows], kv[keys], k_pe[keys], offset, scale)
        largest[rows] = score.max(axis=-1, initial=-np.inf)
        p, lse[rows] = softmax(score)
        out[rows] = np.einsum("inj,jnd->ind", p, kv[keys, :, dn:])
    if max_logits is not None:
        max_logits[...] = largest if state is None else np.maximum(max_logits, largest)
    if state is not None:
        out, lse = merge(np.float64(state[0]), np.float64(state[1]), out, lse)
    return (out, lse) if return_lse else out


def mla_prefill_backward(q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets, scale, out, lse, dout):
    """(dq, dkv, dk_pe) of mla_prefill's out from dout [T, N, dv]; out and lse are what mla_prefill gave."""
    q, kv, k_pe, dout = np.float64(q), np.float64(kv), np.float64(k_pe), np.float64(dout)
    dn = q.shape[2] - k_pe.shape[1]
    dq, dkv, dk_pe = np.zeros(q.shape), np.zeros(kv.shape), np.zeros(k_pe.shape)
    for b, offset in enumerate(causal_offsets):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        keys = slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        score = causal_scores(q[rows], kv[keys], k_pe[keys], offset, scale)
        p, _ = softmax(score)
        dp = np.einsum("ind,jnd->inj", dout[rows], kv[keys, :, dn:])
        ds = scale * p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
        dq[rows, :, :dn] = np.einsum("inj,jnd->ind", ds, kv[keys, :, :dn])
        dq[rows, :, dn:] = np.einsum("inj,jr->inr", ds, k_pe[keys])
        dkv[keys, :, :dn] = np.einsum("inj,ind->jnd", ds, q[rows, :, :dn])
        dkv[keys, :, dn:] = np.einsum("inj,ind->jnd", p, dout[rows])
        dk_pe[keys] = np.einsum("inj,inr->jr", ds, q[rows, :, dn:])
    return dq, dkv, dk_pe


def fused_append_mla_cache(kv, weight, cos, sin, positions, cache, slots, eps):
    """append_mla_cache of the normalised latent and the rotated rope part of kv [T, C + R]."""
    C = len(weight)
    k_pe = rope(kv[:, None, C:], cos, sin, positions)[:, 0]
    return append_mla_cache(rms_norm(kv[:, :C], weight, eps), k_pe, cache, slots)


def attention(q, k, v, cu_seqlens, scale):
    """Softmax attention of [T, N, D] within each sequence, without a mask."""
    q, k, v = np.float64(q), np.float64(k), np.float64(v)
    out = np.zeros(q.shape)
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        score = scale * np.einsum("ind,jnd->inj", q[begin:end], k[begin:end])
        out[begin:end] = np.einsum("inj,jnd->ind", softmax(score)[0], v[begin:end])
    return out


def mla_decode(q, cache, page_table, seq_lens, kv_lora_rank, scale, return_lse=False):
    """The last Q queries a sequence, q [B, Q, N, C + R], over its cache rows: key = row, value = its first C numbers.
    Query i sees the rows up to its own."""
    q = np.float64(q)
    out = np.zeros((*q.shape[:3], kv_lora_rank))
    lse = np.full(q.shape[:3], -np.inf)
    page_size, Q = cache.shape[1], q.shape[1]
    for b, length in enumerate(seq_lens):
        token = np.arange(length)
        rows = np.float64(cache[page_table[b, token // page_size], token % page_size])
        score = scale * np.einsum("inc,jc->inj", q[b], rows)
        score[np.broadcast_to(token >= length - (Q - 1 - np.ogrid[:Q, :1, :1][0]), score.shape)] = -np.inf
        p, lse[b] = softmax(score)
        out[b] = p @ rows[:, :kv_lora_rank]
    return (out, lse) if return_lse else out


def causal_scores(q, kv, k_pe, offset, scale):
    """[T, N, S] of one sequence's queries [T, N, dn + R] and keys; -inf where key j > i + offset of query i."""
    dn = q.shape[2] - k_pe.shape[1]
    score = np.einsum("ind,jnd->inj", q[..., :dn], kv[..., :dn]) + np.einsum("inr,jr->inj", q[..., dn:], k_pe)
    i, j = np.ogrid[: score.shape[0], : score.shape[2]]
    return np.where((j > i + offset)[:, None, :], -np.inf, scale * score)


def softmax(score):
    """(softmax, log-sum-exp) over the last axis; without a key above -inf: 0 and -inf."""
    top = score.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0)
    p = np.exp(score - shift[..., None])
    total = p.sum(axis=-1)
    with np.errstate(divide="ignore"):
        return p / np.where(total > 0, total, 1)[..., None], shift + np.log(total)


def merge(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint key sets from the results over each."""
    lse = np.logaddexp(lse_a, lse_b)
    safe = np.where(np.isfinite(lse), lse, 0)
    out = np.exp(lse_a - safe)[..., None] * out_a + np.exp(lse_b - safe)[..., None] * out_b
    return out, lse
