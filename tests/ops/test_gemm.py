"""gemm: rows times bf16 weights, on the GPU by cuBLAS."""

import numpy as np
import pytest
import reference
from arrays import BF16, FAULTS, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops
from kimi_native.ops import _cublas

MODEL = [(7168, 1536), (7168, 576), (1536, 12288), (7168, 384), (8192, 1024), (7168, 2048), (18432, 128)]
HOSTILE = [(t, i, o) for t in (1, 2, 3, 5, 8, 17, 33) for i, o in ((1, 1), (7, 31), (31, 257), (257, 7), (1, 5))]


def check(x, weight, out):
    # rows of x and weight are of one size, so a sum reaches sqrt(sum of squares) whatever its own value is
    reach = 4 * np.linalg.norm(np.float64(x), axis=1)[:, None] * np.sqrt(np.mean(np.float64(weight) ** 2))
    assert_close(out, reference.gemm(x, weight), out.dtype.name, reduction=x.shape[1], scale=reach)


@pytest.mark.parametrize(("n_in", "n_out"), MODEL)
@pytest.mark.parametrize("T", [1, 5])
def test_model_shapes(on, rng, T, n_in, n_out):
    n_out = n_out // 8 if on.emulated or on.isa == "scalar" else n_out
    x, weight = on.normal(rng, T, n_in), normal(rng, n_out, n_in, dtype=BF16)
    out = on(ops.gemm, x, weight)
    assert out.dtype == on.dtype
    check(x, weight, out)


@pytest.mark.parametrize(("T", "n_in", "n_out"), HOSTILE)
def test_hostile_shapes(on, rng, T, n_in, n_out):
    x, weight = on.normal(rng, T, n_in), normal(rng, n_out, n_in, dtype=BF16)
    check(x, weight, on(ops.gemm, x, weight))


@pytest.mark.parametrize(("T", "n_in", "n_out"), [(0, 64, 8), (3, 64, 0), (3, 0, 8)])
def test_empty(on, T, n_in, n_out):
    out = on(ops.gemm, np.ones((T, n_in), on.dtype), np.ones((n_out, n_in), BF16))
    assert same_bits(out, np.zeros((T, n_out), on.dtype))


@pytest.mark.parametrize("T", [1, 6])
def test_strided_rows_and_out(on, rng, T):
    x, weight, out = on.normal(rng, T, 75), normal(rng, 13, 75, dtype=BF16), strided(poison(T, 13, dtype=on.dtype))
    assert on(ops.gemm, strided(x), weight, out=out) is out
    check(x, weight, out)
    assert np.isnan(out.base[0]).all() and np.isnan(out.base[:, 14:]).all()


@pytest.mark.parametrize("T", [1, 4])
def test_out_in_float32(on, rng, T):
    """On the GPU too: router and head read their products unrounded."""
    x, weight, out = on.normal(rng, T, 300), normal(rng, 21, 300, dtype=BF16), strided(poison(T, 21))
    on(ops.gemm, x, weight, out=out)
    check(x, weight, out)


def test_identity_returns_the_weights(on, rng):
    weight = normal(rng, 45, 67, dtype=BF16)
    assert same_bits(on(ops.gemm, np.eye(67, dtype=on.dtype), weight), weight.astype(on.dtype).T.copy())


def test_rows_do_not_depend_on_the_batch(isa, rng):
    """Up to 8 rows have one order of sums, more have another; a block has 96 rows at most."""
    x, weight = normal(rng, 200, 2300), normal(rng, 37, 2300, dtype=BF16)
    few, many = ops.gemm(x[:8], weight), ops.gemm(x, weight)
    for t in range(8):
        assert same_bits(ops.gemm(x[t : t + 1], weight), few[t : t + 1])
    assert same_bits(ops.gemm(x[3:6], weight[:5]), few[3:6, :5].copy())
    for start, stop in ((0, 9), (5, 16), (7, 103), (104, 200)):
        assert same_bits(ops.gemm(x[start:stop], weight), many[start:stop])
    assert same_bits(ops.gemm(x[:11], weight[:5]), many[:11, :5].copy())


def test_nan_and_inf_stay_in_their_row_and_column(on, rng):
    x, weight = on.normal(rng, 7, 40), normal(rng, 9, 40, dtype=BF16)
    x[3, 39], weight[4, 0] = np.nan, np.inf
    bad = np.zeros((7, 9), bool)
    bad[3], bad[:, 4] = True, True
    assert np.array_equal(~np.isfinite(np.float32(on(ops.gemm, x, weight))), bad)


def arguments(dtype=np.float32):
    return {"x": np.ones((3, 8), dtype), "weight": np.ones((5, 8), BF16), "out": poison(3, 5, dtype=dtype)}


def test_rejects():
    for argument in arguments():
        if argument != "out":
            assert_rejects_faults(ops.gemm, arguments(), argument)
    assert_rejects(ops.gemm, arguments(), "weight", np.ones((5, 7), BF16), ValueError)
    assert_rejects(ops.gemm, arguments(), "weight", strided(np.ones((5, 8), BF16)), ValueError)
    assert_rejects(ops.gemm, arguments(), "out", poison(3, 4), ValueError)
    assert_rejects(ops.gemm, arguments(), "out", poison(2, 5), ValueError)
    assert_rejects(ops.gemm, arguments(), "out", poison(3, 5, dtype=BF16), TypeError)
    assert_rejects(ops.gemm, arguments(), "out", poison(3, 10)[:, ::2], ValueError)
    assert_rejects(ops.gemm, arguments(), "out", read_only(poison(3, 5)), ValueError)


def test_rejects_on_the_gpu(emulator):
    given = arguments(BF16)
    for argument in ("x", "weight"):
        for name, (make_bad, error) in FAULTS.items():
            if name not in ("uint16", "misaligned"):  # NumPy and CuPy arrays of these are bf16 to cuBLAS, or a crash
                assert_rejects(ops.gemm, given, argument, make_bad(given[argument]), error)
    assert_rejects(ops.gemm, given, "x", np.ones((3, 8), np.float32), TypeError)
    assert_rejects(ops.gemm, given, "weight", np.ones((5, 7), BF16), ValueError)
    assert_rejects(ops.gemm, given, "weight", strided(np.ones((5, 8), BF16)), ValueError)
    assert_rejects(ops.gemm, given, "x", np.broadcast_to(np.ones(8, BF16), (3, 8)), ValueError)
    assert_rejects(ops.gemm, given, "x", np.ones((3, 8), BF16)[::-1], ValueError)
    for shape in ((3, 4), (2, 5), (3, 5, 1)):
        assert_rejects(ops.gemm, given, "out", poison(*shape, dtype=BF16), ValueError)
    assert_rejects(ops.gemm, given, "out", poison(3, 10, dtype=BF16)[:, ::2], ValueError)
    assert_rejects(ops.gemm, given, "out", poison(3, 5, dtype=np.float64), TypeError)
    square = np.ones((8, 8), BF16)
    assert_rejects(ops.gemm, {"x": square, "weight": square}, "out", square, ValueError)


def test_a_failed_product_says_so(emulator, monkeypatch):
    monkeypatch.setattr(_cublas, "COMPUTE_32F", 0)
    with pytest.raises(RuntimeError, match="cublasGemmEx: invalid value"):
        ops.gemm(**arguments(BF16))
