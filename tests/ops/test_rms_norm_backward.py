"""rms_norm_backward."""

import numpy as np
import pytest
import reference
from arrays import assert_rejects, assert_rejects_faults, normal, same_bits, strided
from close import assert_close
from kimi_native import ops

SHAPES = [(1, 7168), (5, 512), (0, 64), (130, 33), (64, 8), (65, 9), (300, 257)]
SHAPES += [(t, h) for t in (1, 2, 17) for h in (2, 7, 31)]


def check(x, weight, eps, dout, dx, dweight):
    """dx is a difference of two terms, dweight a sum over rows: partial results reach the size of a term, and four
    times the norm of the terms."""
    T, H = x.shape
    expected_dx, expected_dweight = reference.rms_norm_backward(x, weight, eps, dout)
    r = 1 / np.sqrt(np.mean(np.float64(x) ** 2, axis=1, keepdims=True) + eps)
    reach = r * np.abs(dout * weight).max(axis=1, keepdims=True, initial=0) * np.maximum(1, r * np.abs(x))
    assert_close(dx, expected_dx, reduction=H, scale=reach)
    terms = np.linalg.norm(r * dout * x, axis=0)
    assert_close(dweight, expected_dweight, reduction=T + H, scale=4 * terms)


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_gradients(isa, rng, T, H):
    x, weight, dout = normal(rng, T, H, scale=3), 1 + normal(rng, H, scale=0.3), normal(rng, T, H)
    check(x, weight, 1e-5, dout, *ops.rms_norm_backward(x, weight, 1e-5, dout))


def test_one_column(isa, rng):
    """A row of one element is normalised to its sign, whatever it is: dx is what rounding leaves of 0."""
    x, weight, dout = normal(rng, 70, 1), normal(rng, 1), normal(rng, 70, 1)
    dx, dweight = ops.rms_norm_backward(x, weight, 0.0, dout)
    assert (np.abs(dx) <= 2.0**-21 * np.abs(dout * weight / x)).all()
    assert_close(dweight, np.sum(np.float64(dout) * np.sign(x), axis=0), reduction=70, scale=4 * np.linalg.norm(dout))


def test_agrees_with_finite_differences(isa, rng):
    """Of the oracle of the way forward."""
    x, weight, dout = normal(rng, 3, 5), normal(rng, 5), normal(rng, 3, 5)
    dx, dweight = ops.rms_norm_backward(x, weight, 0.1, dout)

    def loss(x, weight):
        return np.sum(reference.rms_norm(x, weight, 0.1) * dout)

    step, x, weight = 1e-5, np.float64(x), np.float64(weight)
    for array, gradient in ((x, dx), (weight, dweight)):
        for at in np.ndindex(array.shape):
            here = array[at]
            array[at] = here + step
            above = loss(x, weight)
            array[at] = here - step
            slope = (above - loss(x, weight)) / (2 * step)
            array[at] = here
            assert abs(slope - gradient[at]) < 1e-5


def test_strided_rows(isa, rng):
    x, weight, dout = normal(rng, 90, 83), normal(rng, 83), normal(rng, 90, 83)
    expected = ops.rms_norm_backward(x, weight, 1e-5, dout)
    for got, wanted in zip(ops.rms_norm_backward(strided(x), weight, 1e-5, strided(dout)), expected, strict=True):
        assert same_bits(got, wanted)


def test_eps_matters_for_small_rows(isa):
    x, weight, dout = np.full((2, 64), 1e-3, np.float32), np.ones(64, np.float32), np.ones((2, 64), np.float32)
    x[1] = 0
    dout[:, ::2] = -2
    for eps in (1e-5, 1e-6):
        check(x, weight, eps, dout, *ops.rms_norm_backward(x, weight, eps, dout))


def test_nan_stays_in_its_row(isa, rng):
    x, weight, dout = normal(rng, 5, 71), np.ones(71, np.float32), normal(rng, 5, 71)
    x[2, 70] = np.nan
    dx, dweight = ops.rms_norm_backward(x, weight, 1e-5, dout)
    assert np.isnan(dx).all(axis=1).tolist() == [False, False, True, False, False]
    assert np.isfinite(dx[[0, 1, 3, 4]]).all() and np.isnan(dweight).all()


def test_rejects():
    rows = np.ones((3, 8), np.float32)
    given = {"x": rows, "weight": np.ones(8, np.float32), "eps": 1e-5, "dout": rows}
    for argument in ("x", "weight", "dout"):
        assert_rejects_faults(ops.rms_norm_backward, given, argument)
    assert_rejects(ops.rms_norm_backward, given, "dout", np.ones((3, 9), np.float32), ValueError)
    assert_rejects(ops.rms_norm_backward, given, "dout", np.ones((4, 8), np.float32), ValueError)
    assert_rejects(ops.rms_norm_backward, given, "weight", np.ones(9, np.float32), ValueError)


def test_rejects_on_the_gpu(emulator):
    with pytest.raises(TypeError, match="^rms_norm_backward: x is a CuPy array"):
        ops.rms_norm_backward(np.ones((3, 8)), np.ones(8), 1e-5, np.ones((3, 8)))
