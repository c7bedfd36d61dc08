"""gemm_int8: rows times weights rounded to int8, and quantize_int8, bit for bit. On the CPU alone."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops


def int8(rng, *shape):
    """(q [..., out, in] with every code from -128 on, scale [..., out, in / 32])"""
    scale = rng.uniform(0.001, 0.003, (*shape[:-1], shape[-1] // 32)).astype(BF16)
    return rng.integers(-128, 128, shape, np.int8), scale


def check(x, weight, scale, out):
    exact = np.float64(weight) * np.repeat(np.float64(scale), 32, axis=-1)
    reach = 4 * np.linalg.norm(np.float64(x), axis=-1)[..., None] * np.sqrt(np.mean(exact**2))
    assert_close(out, reference.gemm_int8(x, weight, scale), "float32", reduction=x.shape[-1], scale=reach)


@pytest.mark.parametrize(("n_in", "n_out"), [(7168, 1536), (1536, 768), (18432, 256)])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_model_shapes(isa, rng, T, n_in, n_out):
    n_out = n_out // 16 if isa == "scalar" else n_out
    x, (weight, scale) = normal(rng, T, n_in), int8(rng, n_out, n_in)
    check(x, weight, scale, ops.gemm_int8(x, weight, scale))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 9, 17, 33, 97])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 1), (32, 31), (64, 7), (96, 17), (352, 13), (1056, 3)])
def test_hostile_shapes(isa, rng, T, n_in, n_out):
    x, (weight, scale), out = normal(rng, T, n_in), int8(rng, n_out, n_in), poison(T, n_out)
    check(x, weight, scale, ops.gemm_int8(x, weight, scale, out=out))


@pytest.mark.parametrize(("T", "n_in", "n_out"), [(0, 64, 8), (3, 64, 0), (3, 0, 8)])
@pytest.mark.parametrize("heads", [(), (4,), (0,)])
def test_empty(isa, T, n_in, n_out, heads):
    weight, scale = np.zeros((*heads, n_out, n_in), np.int8), np.ones((*heads, n_out, n_in // 32), BF16)
    x, zeros = np.ones((T, *heads, n_in), np.float32), np.zeros((T, *heads, n_out), np.float32)
    assert same_bits(ops.gemm_int8(x, weight, scale), zeros)


@pytest.mark.parametrize("T", [1, 6, 18])
def test_strided_rows_and_out(isa, rng, T):
    x, (weight, scale), out = normal(rng, T, 96), int8(rng, 9, 96), strided(poison(T, 9))
    assert ops.gemm_int8(strided(x), weight, scale, out=out) is out
    check(x, weight, scale, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


@pytest.mark.parametrize("T", [1, 6, 130])
@pytest.mark.parametrize(("N", "n_in", "n_out"), [(16, 128, 512), (3, 352, 100), (2, 64, 7), (1, 32, 5)])
def test_one_matrix_per_head(isa, rng, T, N, n_in, n_out):
    """x and out as slices of wider arrays, as MLA has them."""
    x, (weight, scale), out = normal(rng, T, N, n_in + 64), int8(rng, N, n_out, n_in), poison(T, N, n_out + 9)
    x = x[:, :, 64:]
    assert ops.gemm_int8(x, weight, scale, out=out[:, :, :n_out]).base is out
    check(x, weight, scale, out[:, :, :n_out])
    assert np.isnan(out[:, :, n_out:]).all()
    assert same_bits(ops.gemm_int8(x, weight, scale), np.ascontiguousarray(out[:, :, :n_out]))
    for n in range(N):
        assert same_bits(ops.gemm_int8(x[:, n], weight[n], scale[n]), np.ascontiguousarray(out[:, n, :n_out]))


def test_identity_returns_the_weights_exactly(isa, rng):
    """Every code with every kind of scale; the product has 15 bits, so float32 holds it."""
    weight, _ = int8(rng, 21, 160)
    scale = np.exp(rng.uniform(-20, 20, (21, 5))).astype(BF16)
    whole = np.eye(160, dtype=np.float32)
    for x in (whole, whole[:7], whole[-20:]):
        assert np.array_equal(np.float64(ops.gemm_int8(x, weight, scale)), reference.gemm_int8(x, weight, scale))


@pytest.mark.parametrize("T", [1, 12])
def test_rounding_of_x_is_bounded(isa, rng, T):
    """Against x as it is: inputs move by 2^-15 of their group's largest, roundings of float32 add less."""
    x, (weight, scale) = normal(rng, T, 1056) * np.exp(rng.uniform(-9, 9, (T, 1056))), int8(rng, 11, 1056)
    x = x.astype(np.float32)
    exact = np.float64(weight) * np.repeat(np.float64(scale), 32, axis=1)
    largest = np.repeat(np.abs(np.float64(x)).reshape(T, 33, 32).max(axis=-1), 32, axis=1)
    away = np.abs(ops.gemm_int8(x, weight, scale) - np.float64(x) @ exact.T)
    assert (away <= 2.0**-15 * (1 + 2.0**-8) * (largest @ np.abs(exact).T)).all()


def test_integers_at_their_limits(isa):
    """Numbers a step below a power of two, whose integers are the largest, powers of two, tiny groups and huge ones."""
    x = np.full((5, 64), 1 - 2.0**-24, np.float32)
    x[0, ::2], x[1] = -1 + 2.0**-24, -1
    x[2], x[3], x[4] = 2.0**-100, 2.0**-101, 3e37
    x[3, 32:], x[4, :32] = 1, 2.0**-99
    weight = np.full((2, 64), -128, np.int8)
    weight[1, ::2] = 127
    scale = np.full((2, 2), 0.001, BF16)
    expected = reference.gemm_int8(x, weight, scale)
    out = ops.gemm_int8(np.repeat(x, 2, axis=0), weight, scale)[::2]
    assert not (out[3] - ops.gemm_int8(x[3:4] * (np.arange(64) >= 32).astype(np.float32), weight, scale)[0]).any()
    for actual in (out, ops.gemm_int8(x, weight, scale)):
        assert np.allclose(actual, expected, rtol=2.0**-21, atol=0)


def test_rows_do_not_depend_on_the_batch(isa, rng):
    x, (weight, scale) = normal(rng, 21, 2336), int8(rng, 37, 2336)
    few, many = ops.gemm_int8(x[:8], weight, scale), ops.gemm_int8(x, weight, scale)
    for t in range(8):
        assert same_bits(ops.gemm_int8(x[t : t + 1], weight, scale), few[t : t + 1])
    for start, stop in ((0, 9), (5, 16), (12, 21)):
        assert same_bits(ops.gemm_int8(x[start:stop], weight, scale), many[start:stop])


@pytest.mark.parametrize("T", [5, 40])
def test_nan_stays_in_its_row_and_column(isa, rng, T):
    x, (weight, scale) = normal(rng, T, 64), int8(rng, 9, 64)
    scale[7, 1], x[3, 50] = np.nan, np.nan
    expected = (np.arange(9)[None] == 7) | (np.arange(T)[:, None] == 3)
    assert np.array_equal(np.isnan(ops.gemm_int8(x, weight, scale)), expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 64), (31, 96), (64, 7168), (0, 32), (3, 0)])
def test_quantize_shapes(rng, rows, columns):
    weight = normal(rng, rows, columns, dtype=BF16, scale=0.02)
    for actual, expected in zip(ops.quantize_int8(weight), reference.quantize_int8(weight), strict=True):
        assert same_bits(actual, expected)


def test_quantize_special_groups():
    """Zeros, subnormals whose scale is 0, the largest and the smallest numbers, one outlier, ties."""
    rows = np.zeros((6, 32), np.float32)
    rows[1], rows[2], rows[3], rows[4, 5] = 1e-40, 3.3e38, 2e-38, -1000
    rows[4, 6:8], rows[5] = (1, 3.9), np.arange(32) + 0.5
    rows[5, 0] = 127
    weight = rows.astype(BF16)
    q, scale = ops.quantize_int8(weight)
    for actual, expected in zip((q, scale), reference.quantize_int8(weight), strict=True):
        assert same_bits(actual, expected)
    assert not q[0].any() and not scale[0].any() and q[4, 5] == -127 and q[5, 3] == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_keeps_what_is_not_finite_visible(rng, bad):
    weight = normal(rng, 3, 96, dtype=BF16)
    weight[1, 40] = bad
    q, scale = ops.quantize_int8(weight)
    assert np.array_equal(np.isnan(np.float32(scale)), [[False] * 3, [False, True, False], [False] * 3])
    assert not q[1, 32:64].any()
    for actual, expected in zip((q, scale), reference.quantize_int8(weight), strict=True):
        assert same_bits(actual, expected)


def arguments():
    return {
        "x": np.ones((3, 64), np.float32),
        "weight": np.ones((5, 64), np.int8),
        "weight_scale": np.ones((5, 2), BF16),
        "out": poison(3, 5),
    }


def test_rejects():
    for argument in ("x", "weight_scale"):
        assert_rejects_faults(ops.gemm_int8, arguments(), argument)
    for bad in (np.ones((5, 64), np.uint8), np.ones((5, 64), bool), np.ones((5, 64), np.int32), [[1] * 64] * 5, None):
        assert_rejects(ops.gemm_int8, arguments(), "weight", bad, TypeError)
    for bad in (np.ones((5, 32), np.int8), np.ones((1, 5, 64), np.int8), np.ones((5, 128), np.int8)[:, ::2]):
        assert_rejects(ops.gemm_int8, arguments(), "weight", bad, ValueError)
    for shape in ((4, 2), (5, 1), (5, 3)):
        assert_rejects(ops.gemm_int8, arguments(), "weight_scale", np.ones(shape, BF16), ValueError)
    assert_rejects(ops.gemm_int8, arguments(), "out", poison(3, 4), ValueError)
    assert_rejects(ops.gemm_int8, arguments(), "out", read_only(poison(3, 5)), ValueError)
    heads = {name: np.stack([array] * 2, axis=1 if name in ("x", "out") else 0) for name, array in arguments().items()}
    for argument in ("x", "weight_scale"):
        assert_rejects_faults(ops.gemm_int8, heads, argument)
    assert_rejects(ops.gemm_int8, heads, "weight", np.ones((3, 5, 64), np.int8), ValueError)
    assert_rejects(ops.gemm_int8, heads, "weight", np.ones((5, 64), np.int8), ValueError)
    assert_rejects(ops.gemm_int8, heads, "out", poison(3, 5), ValueError)
    square = np.ones((64, 64), np.float32)
    given = {"x": square, "weight": np.ones((64, 64), np.int8), "weight_scale": np.ones((64, 2), BF16)}
    assert_rejects(ops.gemm_int8, given, "out", square, ValueError)


def test_quantize_rejects():
    assert_rejects_faults(ops.quantize_int8, {"weight": np.ones((5, 64), BF16)}, "weight")


def test_rejects_inputs_that_are_no_whole_groups():
    with pytest.raises(ValueError, match="^gemm_int8: .*32"):
        ops.gemm_int8(np.ones((1, 40), np.float32), np.ones((5, 40), np.int8), np.ones((5, 1), BF16))
    with pytest.raises(ValueError, match="^quantize_int8: .*32"):
        ops.quantize_int8(np.ones((1, 40), BF16))


def test_refuses_arrays_of_the_gpu(emulator):
    with pytest.raises(TypeError, match="^gemm_int8: x is a CuPy array"):
        ops.gemm_int8(**arguments())
    with pytest.raises(TypeError, match="^quantize_int8: weight is a CuPy array"):
        ops.quantize_int8(np.ones((5, 64), BF16))
