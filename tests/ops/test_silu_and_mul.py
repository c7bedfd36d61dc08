"""silu_and_mul."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, poison, read_only, strided
from close import assert_close
from kimi_native import ops


def check(on, x, out):
    # silu and the product are element-wise: a few roundings of the element itself
    expected = reference.silu_and_mul(x)
    assert_close(out, expected, on.dtype.name, scale=np.abs(np.where(np.isfinite(expected), expected, 0)))


@pytest.mark.parametrize(("T", "width"), [(1, 2048), (3, 18432), (5, 2056), (0, 8), (2, 0)])
def test_model_shapes(on, rng, T, width):
    x = on.normal(rng, T, 2 * width, scale=3)
    check(on, x, on(ops.silu_and_mul, x))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize("width", [1, 7, 8, 31, 257])
def test_hostile_shapes(on, rng, T, width):
    x = on.normal(rng, T, 2 * width, scale=3)
    check(on, x, on(ops.silu_and_mul, x))


@pytest.mark.parametrize("columns", [8, 1])
def test_whole_range_of_the_gate(on, columns):
    """Relative accuracy from -80, where silu is near 1e-33, to 1e30; vectors and single elements alike."""
    gate = np.concatenate([np.linspace(-80, 80, 4001), np.geomspace(1e-30, 1e30, 1004), [0.0, -0.0, 1e-45]])
    gate = gate.astype(on.dtype).reshape(-1, columns)
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    check(on, x, on(ops.silu_and_mul, x))


def test_saturated_and_non_finite(on):
    gate = np.array([-1e4, -3e38, -np.inf, np.inf, np.nan, 1.0, 0.0], on.dtype)
    out = np.float32(on(ops.silu_and_mul, np.concatenate([gate, np.ones(7, on.dtype)])[None])[0])
    assert (np.abs(out[:2]) < 1e-30).all()
    assert out[3] == np.inf and np.isnan(out[4]) and out[6] == 0
    assert np.isclose(out[5], 0.7310586, rtol=2.0**-9 if on.cuda else 1e-6)
    assert np.isnan(out[2]) or out[2] == 0
    up = np.array([np.nan, np.inf, 2.0], on.dtype)
    out = np.float32(on(ops.silu_and_mul, np.concatenate([np.ones(3, on.dtype), up])[None])[0])
    assert np.isnan(out[0]) and out[1] == np.inf and np.isfinite(out[2])


@pytest.mark.parametrize("width", [23, 24])
def test_strided_rows_and_out(on, rng, width):
    x, out = on.normal(rng, 7, 2 * width), strided(poison(7, width, dtype=on.dtype))
    assert on(ops.silu_and_mul, strided(x), out=out) is out
    check(on, x, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_strided_rows_of_whole_vectors(on, rng):
    wide, around = poison(6, 72, dtype=on.dtype), poison(7, 40, dtype=on.dtype)
    x, out = wide[:, 8:56], around[1:, 8:32]
    x[...] = on.normal(rng, 6, 48)
    assert on(ops.silu_and_mul, x, out=out) is out
    check(on, x, out)
    assert np.isnan(around).sum() == around.size - out.size


def arguments():
    return {"x": np.ones((3, 8), np.float32), "out": poison(3, 4)}


def test_rejects():
    assert_rejects_faults(ops.silu_and_mul, arguments(), "x")
    assert_rejects(ops.silu_and_mul, arguments(), "x", np.ones((3, 9), np.float32), ValueError)
    assert_rejects(ops.silu_and_mul, arguments(), "x", np.ones((3, 8), BF16), TypeError)
    for shape in ((3, 8), (2, 4), (4,)):
        assert_rejects(ops.silu_and_mul, arguments(), "out", poison(*shape), ValueError)
    assert_rejects(ops.silu_and_mul, arguments(), "out", poison(3, 4, dtype=np.float64), TypeError)
    assert_rejects(ops.silu_and_mul, arguments(), "out", read_only(poison(3, 4)), ValueError)
