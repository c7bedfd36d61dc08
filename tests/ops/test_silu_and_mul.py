"""silu_and_mul."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, strided
from close import assert_close
from kimi_native import ops


def check(x, out):
    # silu and the product are element-wise: a few roundings of the element itself
    expected = reference.silu_and_mul(x)
    assert_close(out, expected, scale=np.abs(np.where(np.isfinite(expected), expected, 0)))


@pytest.mark.parametrize(("T", "width"), [(1, 2048), (3, 18432), (0, 8), (2, 0)])
def test_model_shapes(isa, rng, T, width):
    x = normal(rng, T, 2 * width, scale=3)
    check(x, ops.silu_and_mul(x))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize("width", [1, 7, 31, 257])
def test_hostile_shapes(isa, rng, T, width):
    x = normal(rng, T, 2 * width, scale=3)
    check(x, ops.silu_and_mul(x))


def test_whole_range_of_the_gate(isa):
    """Relative accuracy from -80, where silu is near 1e-33, to 1e30."""
    gate = np.concatenate([np.linspace(-80, 80, 4001), np.geomspace(1e-30, 1e30, 999), [0.0, -0.0, 1e-45]])
    x = np.concatenate([gate, np.ones_like(gate)]).astype(np.float32)[None]
    check(x, ops.silu_and_mul(x))


def test_saturated_and_non_finite(isa):
    gate = np.array([-1e4, -3e38, -np.inf, np.inf, np.nan, 1.0, 0.0], np.float32)
    out = ops.silu_and_mul(np.concatenate([gate, np.ones(7, np.float32)])[None])[0]
    assert (np.abs(out[:2]) < 1e-30).all()
    assert out[3] == np.inf and np.isnan(out[4]) and np.isclose(out[5], 0.7310586) and out[6] == 0
    assert np.isnan(out[2]) or out[2] == 0
    up = np.array([np.nan, np.inf, 2.0], np.float32)
    out = ops.silu_and_mul(np.concatenate([np.ones(3, np.float32), up])[None])[0]
    assert np.isnan(out[0]) and out[1] == np.inf and np.isfinite(out[2])


def test_strided_rows_and_out(isa, rng):
    x, out = normal(rng, 7, 46), strided(poison(7, 23))
    assert ops.silu_and_mul(strided(x), out=out) is out
    check(x, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


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
