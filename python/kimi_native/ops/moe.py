"""Mixture of experts: routing, permutation, grouped products, and all of it in one call."""

import numpy as np

from kimi_native.ops import _array
from kimi_native.ops._array import array_module, bits, empty, on_gpu, run, shape_of


class ExpertWeights:
    """One projection of all experts, each used where it lies: no copy, no stacking.

    ExpertWeights(weights): E bfloat16 arrays [out, in].
    ExpertWeights(packed, scales): E int32 arrays [out, in / 8] and E bfloat16 arrays [out, in / 32], the published INT4
    format (see gemm_int4). All of one shape and C-contiguous; a mapped file will do.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """

    def __init__(self, weights, scales=()):
        self._arrays = [bits("ExpertWeights", f"weights[{e}]", w) for e, w in enumerate(weights)]
        self._scales = [bits("ExpertWeights", f"scales[{e}]", s) for e, s in enumerate(scales)]
        self.table = _array.extension.ExpertTable(self._arrays, self._scales)
        if self._arrays and on_gpu(self._arrays[0]):
            self._addresses = array_module(self._arrays[0]).asarray(np.array(self.table.addresses(), np.int64))
            self.table.place(self._addresses)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)"""
        return self.table.shape

    @property
    def quantized(self) -> bool:
        return bool(self._scales)


def topk_sigmoid(logits, bias, top_k, routed_scaling_factor=1.0, norm_topk_prob=True):
    """Choose experts: s = sigmoid(logits); the top_k largest of s + bias; weights from s alone.

    w = s[ids]; if norm_topk_prob: w /= sum(w) + 1e-20; w *= routed_scaling_factor.
    logits: float32 [T, E], rows may be strided; on the GPU E is at most 1024. bias: float32 [E]
    (e_score_correction_bias). top_k: 1 to E.
    Returns (weights float32 [T, top_k], ids int32 [T, top_k]) in descending order of choice, ties to the lower index.
    NaN ranks below everything; every slot is written whatever comes in.
    Raises ValueError for a shape or top_k, TypeError for a dtype or kind of array that does not fit, RuntimeError for
    more experts than the GPU routes.
    Source: DeepSeek-AI 2024, arXiv 2412.19437 (auxiliary-loss-free balancing).
    """
    T, E = shape_of("topk_sigmoid", "logits", logits, 2)
    if not 1 <= top_k <= E:
        raise ValueError(f"topk_sigmoid: top_k is {top_k}, expected 1 to E = {E}")
    weights, ids = empty(logits, T, top_k), empty(logits, T, top_k, dtype=np.int32)
    run(
        "topk_sigmoid",
        logits=logits,
        bias=bias,
        weights=weights,
        ids=ids,
        workspace=empty(logits, T, E),
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
    )
    return weights, ids


def moe_permute(x, topk_ids, num_experts):
    """Sort (token, slot) rows by expert, stable.

    x: float32, on the GPU bfloat16 [T, H], rows may be strided. topk_ids: int32 [T, K], -1 (skipped) or
    0 <= id < num_experts, on the GPU at most 1024.
    Returns (permuted like x [T * K, H], offsets int32 [num_experts + 1], inverse int32 [T, K]): expert e has rows
    offsets[e] .. offsets[e + 1], row inverse[t, k] is token t; skipped slots have inverse -1, rows behind the last
    expert are zero.
    Raises ValueError for a shape or an id, TypeError for a dtype or kind of array that does not fit. On the GPU the ids
    are not read beforehand: one that no expert has counts as -1.
    """
    (T, H), (_, K) = shape_of("moe_permute", "x", x, 2), shape_of("moe_permute", "topk_ids", topk_ids, 2)
    if num_experts < 0:
        raise ValueError(f"moe_permute: num_experts is {num_experts}, expected >= 0")
    permuted = empty(x, T * K, H)
    offsets, inverse = empty(x, num_experts + 1, dtype=np.int32), empty(x, T, K, dtype=np.int32)
    run("moe_permute", x=x, topk_ids=topk_ids, permuted=permuted, offsets=offsets, inverse=inverse)
    return permuted, offsets, inverse


def moe_unpermute(y, topk_weights, inverse, out=None):
    """The weighted way back: out[t] = sum_k topk_weights[t, k] * y[inverse[t, k]], slots of -1 left out.

    y: float32, on the GPU bfloat16 [M, H]. topk_weights: float32 [T, K]. inverse: int32 [T, K], -1 or a row of y.
    out: like y [T, H], optional; must not overlap y. Returns out.
    Raises ValueError for a shape or an index, TypeError for a dtype or kind of array that does not fit. On the GPU the
    indices are not read beforehand: one that is no row of y counts as -1.
    """
    if out is None:
        T, _ = shape_of("moe_unpermute", "topk_weights", topk_weights, 2)
        out = empty(y, T, shape_of("moe_unpermute", "y", y, 2)[1])
    run("moe_unpermute", y=y, topk_weights=topk_weights, inverse=inverse, out=out)
    return out


def _grouped(op, x, experts, offsets, out, **options):
    if not isinstance(experts, ExpertWeights):
        raise TypeError(f"{op}: experts is {type(experts).__name__}, expected ExpertWeights")
    if out is None:
        out = empty(x, shape_of(op, "x", x, 2)[0], experts.shape[1])
    run(op, x=x, experts=experts.table, offsets=offsets, out=out, **options)
    return out


def grouped_gemm(x, experts, offsets, out=None):
    """A GEMM per expert with bf16 weights: out[m] = W_e x[m] for offsets[e] <= m < offsets[e + 1].

    x: float32, on the GPU bfloat16 [M, in], rows sorted by expert, may be strided. experts: ExpertWeights of bfloat16.
    offsets: int32 [E + 1], ascending from 0 to at most M. out: like x [M, out], optional; rows from offsets[E] on are
    zero. Returns out.
    Raises ValueError for a shape or offsets, TypeError for a dtype or kind of array that does not fit. On the GPU
    offsets are not read beforehand: others than these give undefined rows.
    """
    return _grouped("grouped_gemm", x, experts, offsets, out)


def grouped_gemm_int4(x, experts, offsets, out=None, sm90=False):
    """grouped_gemm with ExpertWeights in the published INT4 format; q * scale as gemm_int4 has it.

    sm90=True runs the kernel for Hopper GPUs, which on none of them has run yet; RuntimeError where it does not fit.
    """
    return _grouped("grouped_gemm_int4", x, experts, offsets, out, sm90=sm90)


DIGITS = {"float32": 0, "int16": 2, "int8": 1}  # signed bytes of an integer activation


def fused_moe(x, topk_weights, topk_ids, gate, up, down, out=None, activations="float32", accumulate=False):
    """Routed experts in one call: out[t] = sum_k w[t, k] * down_e( silu(gate_e x[t]) * up_e x[t] ), e = topk_ids[t, k].
    With accumulate the sum is added to what out holds.

    x: float32, on the GPU bfloat16 [T, H], rows may be strided. topk_weights: float32 [T, K]. topk_ids: int32 [T, K],
    -1 (skipped) or an expert. gate, up: ExpertWeights [E, I, H]. down: ExpertWeights [E, H, I]. bf16 or INT4 each, on
    the GPU gate and up alike. out: like x [T, H], optional; must not overlap x. Returns out. The order in which experts
    are added is fixed.
    activations: what INT4 weights are multiplied by on the CPU. "float32": x as it is. "int16": per 32 inputs integers
    to 16319 and a scale, twice as fast, error 4e-5 of a product. "int8": integers to 127, faster still, error 5e-3.
    Raises ValueError for a shape, an id or activations, TypeError for a dtype or kind of array that does not fit. On
    the GPU ids are not read beforehand: one that no expert has counts as -1.
    """
    for name, experts in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(experts, ExpertWeights):
            raise TypeError(f"fused_moe: {name} is {type(experts).__name__}, expected ExpertWeights")
    if out is None:
        if accumulate:
            raise ValueError("fused_moe: accumulate without out, expected an array to add to")
        out = empty(x, *shape_of("fused_moe", "x", x, 2))
    arguments = dict(x=x, topk_weights=topk_weights, topk_ids=topk_ids)
    arguments |= dict(gate=gate.table, up=up.table, down=down.table, out=out)
    if activations not in DIGITS:
        raise ValueError(f"fused_moe: activations is {activations!r}, expected one of: {', '.join(DIGITS)}")
    how = dict(digits=DIGITS[activations], accumulate=accumulate)
    floats = run("fused_moe", **arguments, workspace=None, **how)
    run("fused_moe", **arguments, workspace=empty(x, floats, dtype=np.float32), **how)
    return out
