"""silu_and_mul_backward."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, strided
from close import assert_close
from kimi_native import ops


def check(x, dout, out):
    """A few roundings of the element itself; 1 + gate * (1 - s) may cancel, which leaves those of its terms."""
    expected = reference.silu_and_mul_backward(x, dout)
    gate, up = np.split(np.float64(x), 2, axis=-1)
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-gate))
    terms = [np.abs(dout * up) * s * (1 + np.abs(gate) * (1 - s)), np.abs(dout * gate) * s]
    assert_close(out, expected, scale=np.concatenate(terms, axis=-1))


def random_arguments(rng, T, width):
    return normal(rng, T, 2 * width, scale=3), normal(rng, T, width)


@pytest.mark.parametrize(("T", "width"), [(1, 2048), (3, 18432), (5, 2056), (0, 8), (2, 0)])
def test_model_shapes(isa, rng, T, width):
    given = random_arguments(rng, T, width)
    check(*given, ops.silu_and_mul_backward(*given))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize("width", [1, 7, 8, 31, 257])
def test_hostile_shapes(isa, rng, T, width):
    given = random_arguments(rng, T, width)
    check(*given, ops.silu_and_mul_backward(*given))


@pytest.mark.parametrize("columns", [8, 1])
def test_whole_range_of_the_gate(isa, columns):
    """Vectors and single elements alike, and no cancellation in 1 - s, which is 1e-35 at 80."""
    gate = np.concatenate([np.linspace(-80, 80, 4001), np.geomspace(1e-30, 1e30, 1004), [0.0, -0.0, 1e-45]])
    gate = gate.astype(np.float32).reshape(-1, columns)
    x, dout = np.concatenate([gate, np.full_like(gate, 0.75)], axis=1), np.full_like(gate, 1.25)
    check(x, dout, ops.silu_and_mul_backward(x, dout))


def test_saturated_and_non_finite(isa):
    gate = np.float32([-1e4, -3e38, 1e4, 3e38, np.nan, 1.0, 1.0])
    up, dout = np.float32([1, 1, 1, 1, 1, np.nan, 1]), np.float32([1, 1, 1, 0.5, 1, 1, np.nan])
    dgate, dup = np.split(ops.silu_and_mul_backward(np.concatenate([gate, up])[None], dout[None])[0], 2)
    assert (dgate[:4] == [0, 0, 1, 0.5]).all() and (dup[:4] == [0, 0, np.float32(1e4), np.float32(1.5e38)]).all()
    assert np.isnan(dgate[4:]).all() and np.isnan(dup[[4, 6]]).all() and np.isfinite(dup[5])


def test_gradient_by_differences(isa, rng):
    x, dout = random_arguments(rng, 3, 11)
    moved, step = normal(rng, *x.shape), 2.0**-6
    change = reference.silu_and_mul(x + step * moved) - reference.silu_and_mul(x - step * moved)
    slope = np.sum(ops.silu_and_mul_backward(x, dout) * np.float64(moved))
    assert np.isclose(slope, np.sum(dout * change) / (2 * step), rtol=1e-3)


@pytest.mark.parametrize("width", [23, 24])
def test_strided_rows_and_out(isa, rng, width):
    x, dout = random_arguments(rng, 7, width)
    out = strided(poison(7, 2 * width))
    assert ops.silu_and_mul_backward(strided(x), strided(dout), out=out) is out
    check(x, dout, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


def arguments():
    return {"x": np.ones((3, 8), np.float32), "dout": np.ones((3, 4), np.float32), "out": poison(3, 8)}


def test_rejects():
    op = ops.silu_and_mul_backward
    assert_rejects_faults(op, arguments(), "x")
    assert_rejects_faults(op, arguments(), "dout")
    assert_rejects(op, arguments(), "x", np.ones((3, 9), np.float32), ValueError)
    assert_rejects(op, arguments(), "x", np.ones((3, 8), BF16), TypeError)
    for shape in ((3, 8), (2, 4), (4,)):
        assert_rejects(op, arguments(), "dout", poison(*shape), ValueError)
    for shape in ((3, 4), (2, 8), (8,)):
        assert_rejects(op, arguments(), "out", poison(*shape), ValueError)
    assert_rejects(op, arguments(), "out", poison(3, 8, dtype=np.float64), TypeError)
    assert_rejects(op, arguments(), "out", read_only(poison(3, 8)), ValueError)
    given = arguments()
    assert_rejects(op, given, "out", given["x"], ValueError)


def test_has_no_kernel_for_the_gpu(emulator):
    with pytest.raises(TypeError, match="^silu_and_mul_backward: x is a CuPy array, expected a NumPy array"):
        ops.silu_and_mul_backward(**arguments())
