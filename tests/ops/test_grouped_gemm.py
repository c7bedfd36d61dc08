"""grouped_gemm and grouped_gemm_int4: a matrix per expert, over rows sorted by expert."""

import numpy as np
import pytest
import reference
from arrays import (
    BF16,
    FAULTS,
    assert_rejects,
    assert_rejects_faults,
    int4,
    normal,
    poison,
    read_only,
    same_bits,
    strided,
)
from backends import Cpu
from close import assert_close
from kimi_native import ops

OPS = {"bf16": ops.grouped_gemm, "int4": ops.grouped_gemm_int4}


def random_experts(on, rng, kind, E, n_out, n_in, distinct=None):
    """(ExpertWeights, float64 matrices) of E experts that share `distinct` arrays: pointers, so no copies.

    The matrices are what the backend multiplies with: q * scale exact on the CPU, rounded to bf16 on the GPU.
    """
    share = [e % (distinct or E) for e in range(E)]
    if kind == "bf16":
        weights = [normal(rng, n_out, n_in, dtype=BF16) for _ in range(distinct or E)]
        exact = reference.ExpertWeights(weights)
        return on(ops.ExpertWeights, [weights[i] for i in share]), [exact[i] for i in share]
    packed, scales = zip(*(int4(rng, n_out, n_in) for _ in range(distinct or E)), strict=True)
    exact = reference.ExpertWeights(packed, scales)
    if on.cuda:
        exact = [np.float64(weight.astype(BF16)) for weight in exact]
    experts = on(ops.ExpertWeights, [packed[i] for i in share], [scales[i] for i in share])
    return experts, [exact[i] for i in share]


def offsets_of(counts):
    return np.cumsum([0, *counts]).astype(np.int32)


def check(on, x, exact, offsets, out):
    reach = 4 * np.linalg.norm(np.float64(x), axis=1)[:, None] * np.sqrt(np.mean(exact[0] ** 2))
    assert_close(out, reference.grouped_gemm(x, exact, offsets), on.dtype.name, reduction=x.shape[1], scale=reach)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize(("n_in", "n_out"), [(7168, 256), (2048, 896)])
def test_model_shapes(on, rng, kind, n_in, n_out):
    n_out = n_out // 16 if on.emulated else n_out // 8 if on.isa == "scalar" else n_out
    experts, exact = random_experts(on, rng, kind, 384, n_out, n_in, distinct=2)
    counts = np.zeros(384, int)
    counts[[0, 1, 7, 200, 383]] = [1, 1, 5, 1, 3]
    x = on.normal(rng, 11, n_in)
    check(on, x, exact, offsets_of(counts), on(OPS[kind], x, experts, offsets_of(counts)))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("counts", [[3], [0, 0, 0], [17, 0, 1], [0, 33], [1, 2, 3, 5, 8], [0, 8, 0, 0, 2, 1, 0]])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 1), (32, 31), (96, 7), (160, 257)])
def test_hostile_shapes(on, rng, kind, counts, n_in, n_out):
    experts, exact = random_experts(on, rng, kind, len(counts), n_out, n_in)
    x, out = on.normal(rng, sum(counts), n_in), poison(sum(counts), n_out, dtype=on.dtype)
    check(on, x, exact, offsets_of(counts), on(OPS[kind], x, experts, offsets_of(counts), out=out))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("counts", [[11, 0, 1, 8, 3], [40, 7, 0, 25], [0, 137, 0, 9]])
def test_many_rows(on, rng, kind, counts):
    """Whole slabs of inputs, experts of one and of several pieces of rows, more than a tile of weight rows."""
    experts, exact = random_experts(on, rng, kind, len(counts), 136, 512)
    x, out = on.normal(rng, sum(counts), 512), poison(sum(counts), 136, dtype=on.dtype)
    check(on, x, exact, offsets_of(counts), on(OPS[kind], x, experts, offsets_of(counts), out=out))


def test_more_experts_than_threads(on, rng):
    """Rows for experts here and there, and for the last."""
    experts, exact = random_experts(on, rng, "int4", 300, 9, 64, distinct=5)
    counts = (rng.random(300) < 0.1).astype(int) * rng.integers(1, 4, 300)
    counts[[127, 128, 299]] = 2
    x = on.normal(rng, counts.sum(), 64)
    check(on, x, exact, offsets_of(counts), on(ops.grouped_gemm_int4, x, experts, offsets_of(counts)))


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (7, 31), (31, 7), (257, 5)])
def test_odd_inputs_of_bf16_experts(on, rng, n_in, n_out):
    experts, exact = random_experts(on, rng, "bf16", 3, n_out, n_in)
    x = on.normal(rng, 12, n_in)
    check(on, x, exact, offsets_of([4, 1, 7]), on(ops.grouped_gemm, x, experts, offsets_of([4, 1, 7])))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("counts", [[2, 0, 4], [60, 0, 50]])
def test_rows_of_no_expert_are_zero(on, rng, kind, counts):
    """Rows past the last offset are written, and not read."""
    experts, exact = random_experts(on, rng, kind, 3, 5, 64)
    n = sum(counts)
    x, offsets, out = on.normal(rng, n + 3, 64), offsets_of(counts), poison(n + 3, 5, dtype=on.dtype)
    x[n:] = np.nan
    assert on(OPS[kind], x, experts, offsets, out=out) is out
    assert same_bits(out[n:], np.zeros((3, 5), on.dtype))
    check(on, x[:n], exact, offsets, out[:n].copy())


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("counts", [[2, 0, 7], [30, 0, 7]])
def test_strided_out_and_rows(on, rng, kind, counts):
    experts, _ = random_experts(on, rng, kind, 3, 5, 64)
    n = sum(counts)
    x, offsets, out = on.normal(rng, n, 64), offsets_of(counts), strided(poison(n, 5, dtype=on.dtype))
    on(OPS[kind], strided(x), experts, offsets, out=out)
    assert same_bits(out.copy(), on(OPS[kind], x, experts, offsets))
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_agrees_with_gemm_int4(on, rng):
    """One expert, all rows: bit for bit."""
    x, (packed, scale) = on.normal(rng, 7, 96), int4(rng, 13, 96)
    experts = on(ops.ExpertWeights, [packed], [scale])
    out = on(ops.grouped_gemm_int4, x, experts, offsets_of([7]))
    assert same_bits(out, on(ops.gemm_int4, x, packed, scale))


def test_agrees_with_gemm(isa, rng):
    """One expert, all rows: bit for bit."""
    x, weight = normal(rng, 7, 96), normal(rng, 13, 96, dtype=BF16)
    out = ops.grouped_gemm(x, ops.ExpertWeights([weight]), offsets_of([7]))
    assert same_bits(out, ops.gemm(x, weight))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("M", [9, 40])
@pytest.mark.parametrize(
    "offsets", [[-7, 4, 2**31 - 1], [2**31 - 1, -(2**31), 3], [0, 9, 4], [-1, -1, -1], [5, 2, -9], [3, 5, 6]]
)
def test_wild_offsets_stay_inside(on, rng, kind, M, offsets):
    """The contents of arrays on a GPU are not checked: nothing outside x and out is touched."""
    experts, _ = random_experts(on, rng, kind, 2, 5, 64)
    x, out = strided(on.normal(rng, M, 64)), strided(poison(M, 5, dtype=on.dtype))
    if not on.cuda:
        with pytest.raises(ValueError, match="offsets"):
            OPS[kind](x, experts, np.array(offsets, np.int32), out=out)
        return
    on(OPS[kind], x, experts, np.array(offsets, np.int32), out=out)
    out[...] = 0
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_expert_weights_describe_themselves(on, rng):
    experts, _ = random_experts(on, rng, "bf16", 3, 5, 64)
    assert (experts.shape, experts.quantized) == ((3, 5, 64), False)
    experts, _ = random_experts(on, rng, "int4", 4, 5, 64)
    assert (experts.shape, experts.quantized) == ((4, 5, 64), True)


def test_expert_weights_keep_their_arrays_alive(on, rng):
    experts, exact = random_experts(on, rng, "int4", 5, 33, 256)
    _ = [np.full((33, 32), -1, np.int32) for _ in range(50)]  # would land where freed arrays were
    x = on.normal(rng, 5, 256)
    check(on, x, exact, offsets_of([1] * 5), on(ops.grouped_gemm_int4, x, experts, offsets_of([1] * 5)))


def test_expert_weights_accept_read_only_arrays(on, rng):
    """What a mapped file gives."""
    packed, scale = int4(rng, 5, 64)
    x = on.normal(rng, 2, 64)
    experts = on(ops.ExpertWeights, [read_only(packed)], [read_only(scale)])
    out = on(ops.grouped_gemm_int4, x, experts, offsets_of([2]))
    assert same_bits(out, on(ops.gemm_int4, x, packed, scale))


@pytest.mark.parametrize("kind", OPS)
def test_rejects(rng, kind):
    on = Cpu("scalar")
    experts, _ = random_experts(on, rng, kind, 2, 5, 64)
    other, _ = random_experts(on, rng, "int4" if kind == "bf16" else "bf16", 2, 5, 64)
    op, given = OPS[kind], {"x": normal(rng, 6, 64), "experts": experts, "offsets": offsets_of([2, 4])}
    for argument in ("x", "offsets"):
        assert_rejects_faults(op, given, argument)
    assert_rejects(op, given, "x", normal(rng, 6, 32), ValueError)
    assert_rejects(op, given, "experts", other, TypeError)
    assert_rejects(op, given, "experts", [np.ones((5, 64), BF16)], TypeError)
    for bad in ([0, 2], [0, 2, 6, 6], [0, 2, 7], [1, 2, 6], [0, 3, 2], [0, -1, 6], [0, 2, 2**31 - 1]):
        assert_rejects(op, given, "offsets", np.array(bad, np.int32), ValueError)
    assert_rejects(op, given, "out", poison(6, 4), ValueError)
    assert_rejects(op, given, "out", read_only(poison(6, 5)), ValueError)


def test_expert_weights_reject(rng):
    """The message names the list and the expert."""
    good, (packed, scale) = normal(rng, 5, 64, dtype=BF16), int4(rng, 5, 64)
    for name, (make_bad, error) in FAULTS.items():
        bad = make_bad(good)
        with pytest.raises(error, match="^ExpertWeights: .*weights.*1"):
            ops.ExpertWeights([good, bad])
        if name not in ("float64", "uint16"):
            with pytest.raises(error, match="^ExpertWeights: .*packed.*1"):
                ops.ExpertWeights([packed, make_bad(packed)], [scale, scale])
        with pytest.raises(error, match="^ExpertWeights: .*scales.*1"):
            ops.ExpertWeights([packed, packed], [scale, make_bad(scale)])
    with pytest.raises(ValueError, match="^ExpertWeights: .*weights"):
        ops.ExpertWeights([good, good[:4]])
    with pytest.raises(ValueError, match="^ExpertWeights: .*scales"):
        ops.ExpertWeights([packed], [scale, scale])
    with pytest.raises(ValueError, match="^ExpertWeights: .*scales"):
        ops.ExpertWeights([packed], [scale[:, :1]])
    with pytest.raises(ValueError, match="^ExpertWeights: .*"):
        ops.ExpertWeights([])
    with pytest.raises(ValueError, match="^ExpertWeights: .*weights"):
        ops.ExpertWeights([strided(good)])
