"""gelu."""

import numpy as np
import pytest
import reference
from arrays import BF16, FAULTS, assert_rejects, assert_rejects_faults, normal, poison, read_only, strided
from close import assert_close
from kimi_native import ops

pytestmark = pytest.mark.parametrize("tanh", [False, True])


def check(out, x, bias, tanh, dtype):
    # Element-wise: a few roundings of the element; where it is small, those of the exponent of exp(-v^2 / 2) or
    # exp(-2 u). Below 2^-124 the divisor 1 + exp(-2 u) may be infinite, and the result 0.
    expected = reference.gelu(x, bias, tanh)
    square = np.nan_to_num(np.clip(np.float64(x) + (0 if bias is None else np.float64(bias)), -14, 0)) ** 2
    size = np.abs(np.where(np.isfinite(expected), expected, 0)) * (1 + square / 4 * (1 + square / 10 * tanh))
    size += 2.0**-103
    assert_close(out, expected, dtype, scale=size)


@pytest.mark.parametrize(("T", "width"), [(1, 4304), (3, 4608), (5, 2056), (0, 8), (2, 0)])
def test_model_shapes(on, rng, T, width, tanh):
    x, bias = on.normal(rng, T, width, scale=3), normal(rng, width, dtype=BF16)
    check(on(ops.gelu, x, bias, tanh), x, bias, tanh, on.dtype.name)


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize("width", [1, 7, 8, 31, 257])
def test_hostile_shapes(on, rng, T, width, tanh):
    x, bias = on.normal(rng, T, width, scale=3), normal(rng, width, dtype=BF16)
    for given in (None, bias):
        check(on(ops.gelu, x, given, tanh), x, given, tanh, on.dtype.name)


@pytest.mark.parametrize("columns", [8, 1])
def test_whole_range(on, columns, tanh):
    """Relative accuracy down to where the result nears the smallest float32; vectors and single elements alike."""
    x = np.concatenate(
        [np.linspace(-9 if tanh else -12, 12, 4001), np.geomspace(1e-30, 1e30, 1004), [0.0, -0.0, 1e-45]]
    )
    x = np.concatenate([x, -np.geomspace(1e-30, 1, 112)]).astype(on.dtype).reshape(-1, columns)
    check(on(ops.gelu, x, None, tanh), x, None, tanh, on.dtype.name)


def test_saturated_and_non_finite(on, tanh):
    x = np.array([[-20.0, -1e4, -3e38, np.inf, 3e38, np.nan, 0.0, -np.inf]], on.dtype)
    out = np.float32(on(ops.gelu, x, None, tanh)[0])
    assert (out[:3] == 0).all() and out[3] == np.inf and out[4] == np.float32(x[0, 4])
    assert np.isnan(out[5]) and out[6] == 0 and np.isnan(out[7])  # inf times 0


@pytest.mark.parametrize("width", [23, 24])
def test_strided_rows_and_out(on, rng, width, tanh):
    x, out = on.normal(rng, 7, width), strided(poison(7, width, dtype=on.dtype))
    bias = normal(rng, width, dtype=BF16)
    assert on(ops.gelu, strided(x), bias, tanh, out=out) is out
    check(np.ascontiguousarray(out), x, bias, tanh, on.dtype.name)
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_strided_rows_of_whole_vectors(on, rng, tanh):
    wide, around = poison(6, 72, dtype=on.dtype), poison(7, 72, dtype=on.dtype)
    x, out = wide[:, 8:56], around[1:, 8:56]
    x[...], bias = on.normal(rng, 6, 48), normal(rng, 48, dtype=BF16)
    assert on(ops.gelu, x, bias, tanh, out=out) is out
    check(np.ascontiguousarray(out), x, bias, tanh, on.dtype.name)
    assert np.isnan(around).sum() == around.size - out.size


@pytest.mark.parametrize("width", [23, 24])
def test_out_may_be_x(on, rng, width, tanh):
    x, bias = on.normal(rng, 3, width), normal(rng, width, dtype=BF16)
    before = x.copy()
    assert on(ops.gelu, x, bias, tanh, out=x) is x
    check(x, before, bias, tanh, on.dtype.name)


def test_rejects(tanh):
    op = ops.gelu
    given = {"x": np.ones((3, 8), np.float32), "bias": np.ones(8, BF16), "tanh": tanh, "out": poison(3, 8)}
    assert_rejects_faults(op, given, "x")
    for name in FAULTS.keys() - {"None"}:  # is no bias
        make_bad, error = FAULTS[name]
        assert_rejects(op, given, "bias", make_bad(given["bias"]), error)
    assert_rejects(op, given, "bias", np.ones(7, BF16), ValueError)
    assert_rejects(op, given, "x", np.ones((3, 8), BF16), TypeError)
    for shape in ((3, 7), (2, 8), (8,)):
        assert_rejects(op, given, "out", poison(*shape), ValueError)
    assert_rejects(op, given, "out", poison(3, 8, dtype=np.float64), TypeError)
    assert_rejects(op, given, "out", read_only(poison(3, 8)), ValueError)
