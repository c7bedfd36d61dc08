"""layer_norm."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, strided
from close import assert_close
from kimi_native import ops

SHAPES = [(1, 1152), (3, 1152), (2, 4608), (5, 512), (0, 64)]
SHAPES += [(t, h) for t in (1, 2, 5, 8, 17, 33) for h in (1, 7, 31, 257)]
# where the CUDA kernel changes its ways: rows of a warp to 1536, element by element beyond and where vectors do not fit
SHAPES += [(9, 8), (3, 12), (4, 520), (2, 1536), (2, 1544)]


def weights(rng, H):
    return normal(rng, H, dtype=BF16), normal(rng, H, dtype=BF16)


def check(on, out, x, weight, bias, eps):
    # the largest deviation times the largest weight is what a row's rounding errors are relative to
    expected = reference.layer_norm(x, weight, bias, eps)
    assert_close(
        out, expected, on.dtype.name, reduction=x.shape[1], scale=4 * np.abs(np.float64(weight)).max(initial=0)
    )


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_shapes(on, rng, T, H):
    x, (weight, bias) = on.normal(rng, T, H), weights(rng, H)
    check(on, on(ops.layer_norm, x, weight, bias, 1e-5), x, weight, bias, 1e-5)


@pytest.mark.parametrize("H", [71, 1152, 1600])
def test_a_mean_far_from_zero(on, rng, H):
    """Squares of x minus the square of its mean would lose all digits: 2^10 + small integers, exact in both dtypes."""
    x = (rng.integers(-8, 9, (5, H)) * 4 + 1024).astype(on.dtype)
    weight, bias = weights(rng, H)
    check(on, on(ops.layer_norm, x, weight, bias, 1e-5), x, weight, bias, 1e-5)


def test_eps_matters_for_rows_of_one_value(on):
    x, weight, bias = np.full((2, 64), 0.5, on.dtype), np.ones(64, BF16), np.full(64, 2.0, BF16)
    x[1, ::2] += 2.0**-6
    assert (on(ops.layer_norm, x, weight, bias, 1e-5)[0] == 2).all()
    for eps in (1e-4, 1e-6):
        check(on, on(ops.layer_norm, x, weight, bias, eps), x, weight, bias, eps)


@pytest.mark.parametrize("H", [40, 83, 1600])
def test_strided_rows_and_out(on, rng, H):
    x, (weight, bias) = on.normal(rng, 9, H), weights(rng, H)
    out = strided(poison(9, H, dtype=on.dtype))
    assert on(ops.layer_norm, strided(x), weight, bias, 1e-5, out=out) is out
    check(on, np.ascontiguousarray(out), x, weight, bias, 1e-5)
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_strided_rows_of_whole_vectors(on, rng):
    wide, around = poison(6, 1168, dtype=on.dtype), poison(7, 1168, dtype=on.dtype)
    x, out = wide[:, 8:1160], around[1:, 8:1160]
    x[...] = on.normal(rng, 6, 1152)
    weight, bias = weights(rng, 1152)
    assert on(ops.layer_norm, x, weight, bias, 1e-5, out=out) is out
    check(on, np.ascontiguousarray(out), x, weight, bias, 1e-5)
    assert np.isnan(around).sum() == around.size - out.size


@pytest.mark.parametrize("H", [71, 1152, 1600])
def test_out_may_be_x(on, rng, H):
    x, (weight, bias) = on.normal(rng, 3, H), weights(rng, H)
    before = x.copy()
    assert on(ops.layer_norm, x, weight, bias, 1e-5, out=x) is x
    check(on, x, before, weight, bias, 1e-5)


@pytest.mark.parametrize("H", [71, 1152, 1600])
def test_nan_stays_in_its_row(on, rng, H):
    x, (weight, bias) = on.normal(rng, 5, H), weights(rng, H)
    x[2, H - 1] = np.nan
    out = np.float32(on(ops.layer_norm, x, weight, bias, 1e-5))
    assert np.isnan(out).all(axis=1).tolist() == [False, False, True, False, False]
    assert np.isfinite(out[[0, 1, 3, 4]]).all()


def test_rejects():
    op = ops.layer_norm
    given = {
        "x": np.ones((3, 8), np.float32),
        "weight": np.ones(8, BF16),
        "bias": np.ones(8, BF16),
        "eps": 1e-5,
        "out": poison(3, 8),
    }
    for argument in ("x", "weight", "bias"):
        assert_rejects_faults(op, given, argument)
    for argument in ("weight", "bias"):
        assert_rejects(op, given, argument, np.ones(7, BF16), ValueError)
        assert_rejects(op, given, argument, np.ones(8, np.float32), TypeError)
    assert_rejects(op, given, "x", np.ones((3, 8), BF16), TypeError)
    for shape in ((3, 9), (4, 8)):
        assert_rejects(op, given, "out", poison(*shape), ValueError)
    assert_rejects(op, given, "out", read_only(poison(3, 8)), ValueError)
    assert_rejects(op, given, "out", poison(3, 8, dtype=np.float64), TypeError)
