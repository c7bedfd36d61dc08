"""Attention: rotary embedding, latent cache, prefill and decode of MLA, and the form without a mask."""

import numpy as np

from kimi_native.ops._array import check_host, empty, run, shape_of


def rope(x, cos, sin, positions, out=None):
    """Rotate interleaved pairs (2 i, 2 i + 1) of the last axis: (a, b) -> (a cos - b sin, a sin + b cos).

    x: float32, on the GPU bfloat16 [T, N, R], first two axes may be strided. cos, sin: float32 [P, R / 2], one row per
    position. positions: int32 [T], each in [0, P). out: like x [T, N, R], optional, may be strided; may be x.
    Returns out.
    Raises ValueError for a shape or a position outside the tables, TypeError for a dtype or kind of array. On the GPU
    positions are not read beforehand: one outside the tables gives NaN.
    Source: Su et al. 2021, arXiv 2104.09864.
    """
    out = empty(x, *shape_of("rope", "x", x, 3)) if out is None else out
    run("rope", x=x, cos=cos, sin=sin, positions=positions, out=out)
    return out


def append_mla_cache(latent, k_pe, cache, slots):
    """Write the latent and the rotated rope part of new tokens into the paged cache, in place.

    latent: float32, on the GPU bfloat16 [T, C]. k_pe: likewise [T, R]. Rows of both may be strided.
    cache: bfloat16 (rounded to nearest even) or, on the CPU, float32 [pages, page_size, C + R].
    slots: int64 [T], page * page_size + offset, all different.
    Raises ValueError for a shape or a slot outside the cache, TypeError for a dtype or kind of array. On the GPU slots
    are not read beforehand: one outside the cache is not written.
    """
    run("append_mla_cache", latent=latent, k_pe=k_pe, cache=cache, slots=slots)


def fused_append_mla_cache(kv, weight, cos, sin, positions, cache, slots, eps):
    """rms_norm of the latent, rope of the rope part and append_mla_cache in one pass.

    kv: float32, on the GPU bfloat16 [T, C + R], rows as kv_a_proj_with_mqa gives them, may be strided. weight:
    bfloat16 [C]. cos, sin, positions: as for rope, with one row of R elements a token. cache, slots: as for
    append_mla_cache. eps: float, of the norm. Nothing is rounded but the result.
    Raises ValueError for a shape or an index, TypeError for a dtype or kind of array. On the GPU indices are not read
    beforehand: a slot outside the cache is not written, a position outside the tables gives NaN.
    """
    run(
        "fused_append_mla_cache",
        kv=kv,
        weight=weight,
        cos=cos,
        sin=sin,
        positions=positions,
        cache=cache,
        slots=slots,
        eps=eps,
    )


def mla_prefill(
    q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets, scale, state=None, return_lse=False, max_logits=None
):
    """Causal attention of many new tokens over expanded keys and values (the naive form of MLA).

    score = scale * q . [k_nope, k_pe], out = softmax(score) v, lse = log(sum(exp(score))).

    q: float32, on the GPU bfloat16 [T, N, Dn + R], rope part last. kv: like q [S, N, Dn + Dv]: per head the key without
    rotation, then the value. k_pe: like q [S, R], one for all heads. The last axes are contiguous, the others may be
    strided.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence's queries and keys begin and end.
    causal_offsets: int32 [B]; key j of a sequence is visible to its query i iff j <= i + offset.
    state: (out, lse) of an earlier call over other keys of the same queries; it is continued in place, as if the
    softmax had run over all keys at once.
    max_logits: float32 [T, N], optional, written: the largest score that a query sees, -inf if it sees no key, NaN if a
    score is NaN or +inf. With state it is continued too: it holds what the earlier calls wrote.
    Returns out like q [T, N, Dv], or (out, lse float32 [T, N]) with return_lse. A query that sees no key gets 0, -inf.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit. On the GPU lengths are not
    read beforehand: keys outside kv give NaN, and of queries outside q nothing is written.
    Source: DeepSeek-AI 2024, arXiv 2405.04434; Milakov and Gimelshein 2018, arXiv 1805.02867.
    """
    if state is None:
        T, N, key_dim = shape_of("mla_prefill", "q", q, 3)
        kv_dim, R = shape_of("mla_prefill", "kv", kv, 3)[2], shape_of("mla_prefill", "k_pe", k_pe, 2)[1]
        out = empty(q, T, N, max(0, kv_dim - key_dim + R))
        lse = empty(q, T, N, dtype=np.float32)
    else:
        out, lse = state
    run(
        "mla_prefill",
        q=q,
        kv=kv,
        k_pe=k_pe,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal_offsets=causal_offsets,
        out=out,
        lse=lse,
        max_logits=max_logits,
        scale=scale,
        continue_state=state is not None,
    )
    return (out, lse) if return_lse else out


def mla_prefill_backward(q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets, scale, out, lse, dout):
    """The gradients of q, kv and k_pe from that of mla_prefill's out. On the CPU only.

    With p = exp(score - lse), which is computed again: dscore = p * (dout . v - dout . out), from which follow the
    gradients of q, k_nope and, summed over the heads in their order, k_pe; dv = sum of p * dout. A key that no query
    sees gets 0. Memory beside arguments and results: N * S * R floats.

    q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, causal_offsets, scale: as for mla_prefill. out: float32 [T, N, Dv] and lse:
    float32 [T, N]: what it returned; if its keys came in several calls, those of the last one. dout: float32
    [T, N, Dv], contiguous.
    Returns (dq [T, N, Dn + R], dkv [S, N, Dn + Dv], dk_pe [S, R]), float32.
    Raises ValueError for a shape or lengths, TypeError for a dtype or kind of array that does not fit.
    Source: Dao et al. 2022, arXiv 2205.14135.
    """
    op = "mla_prefill_backward"
    check_host(op, "q", q)
    arguments = dict(q=q, kv=kv, k_pe=k_pe, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    arguments |= dict(causal_offsets=causal_offsets, out=out, lse=lse, dout=dout)
    dq, dkv = empty(q, *shape_of(op, "q", q, 3)), empty(kv, *shape_of(op, "kv", kv, 3))
    dk_pe = empty(k_pe, *shape_of(op, "k_pe", k_pe, 2))
    arguments |= dict(dq=dq, dkv=dkv, dk_pe=dk_pe)
    floats = run(op, **arguments, workspace=None, scale=scale)
    run(op, **arguments, workspace=empty(q, floats, dtype=np.float32), scale=scale)
    return dq, dkv, dk_pe


def mla_decode(q, cache, page_table, seq_lens, kv_lora_rank, scale, return_lse=False, activations="float32"):
    """The last Q tokens of each sequence against its paged latent cache (the absorbed form of MLA).

    All heads share one key per token, the whole cache row, and one value, its first kv_lora_rank elements:
    score = scale * q . row, out = softmax(score) row[:C], lse = log(sum(exp(score))).

    q: float32, on the GPU bfloat16 [B, Q, N, C + R], projected into latent space, rope part last; query i of sequence
    b sees its first seq_lens[b] - (Q - 1 - i) rows. cache: bfloat16, on the CPU also float32
    [pages, page_size, C + R]. page_table: int32 [B, max_pages]; entries behind a sequence's last page are not read.
    seq_lens: int32 [B], the last Q tokens included; a query that sees no row gets 0 and -inf. kv_lora_rank: C.
    activations: what both products are made of on the CPU. "float32", or for a bfloat16 cache "int16": rows become
    integers to 11000, 64 numbers of a query and the weights of a block of keys integers to 32767, each with a scale.
    Faster; out moves by 1e-4 to 3e-4 of itself, a tenth of what rounding the cache to bfloat16 does. A row that holds
    an infinity is NaN to the queries that see it.
    Returns out like q [B, Q, N, C], or (out, lse float32 [B, Q, N]) with return_lse.
    Raises ValueError for a shape, a length, a page or activations that do not fit, TypeError for a dtype or kind of
    array, or integers with a float32 cache. On the GPU lengths and pages are not read beforehand: a
    length beyond max_pages * page_size or a page that does not exist gives NaN.
    Source: DeepSeek-AI 2024, arXiv 2405.04434.
    """
    B, Q, N, width = shape_of("mla_decode", "q", q, 4)
    if not 1 <= kv_lora_rank <= width:
        raise ValueError(f"mla_decode: kv_lora_rank is {kv_lora_rank}, expected 1 to the width of q, {width}")
    out, lse = empty(q, B, Q, N, kv_lora_rank), empty(q, B, Q, N, dtype=np.float32)
    arguments = dict(q=q, cache=cache, page_table=page_table, seq_lens=seq_lens, out=out, lse=lse)
    if activations not in ("float32", "int16"):
        raise ValueError(f"mla_decode: activations is {activations!r}, expected one of: float32, int16")
    arithmetic = dict(scale=scale, integers=activations == "int16")
    floats = run("mla_decode", **arguments, workspace=None, **arithmetic)
    run("mla_decode", **arguments, workspace=empty(q, floats, dtype=np.float32), **arithmetic)
    return (out, lse) if return_lse else out


def attention(q, k, v, cu_seqlens, scale, out=None):
    """Attention without a mask over packed sequences: a token sees all tokens of its sequence and no others.

    score = scale * q . k, out = softmax(score) v. Memory beside the arguments does not grow with the lengths.

    q, k, v: float32, on the GPU bfloat16 [T, N, D], D of 1 to 1024; the last axes are contiguous, the others may be
    strided. cu_seqlens: int32 [B + 1], where each sequence begins and ends. out: like q [T, N, D], contiguous,
    optional; must not overlap q, k or v. Returns out.
    Raises ValueError for a shape or lengths that do not fit, TypeError for a dtype or kind of array. On the GPU lengths
    are not read beforehand: of tokens that lie in no sequence inside the arrays nothing is written.
    Source: Vaswani et al. 2017, arXiv 1706.03762; Milakov and Gimelshein 2018, arXiv 1805.02867.
    """
    out = empty(q, *shape_of("attention", "q", q, 3)) if out is None else out
    run("attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens, out=out, scale=scale)
    return out
