"""gemm_int4: float32 rows times packed INT4 weights."""

import numpy as np
import pytest
import reference
from arrays import (
    BF16,
    assert_rejects,
    assert_rejects_faults,
    int4,
    normal,
    poison,
    read_only,
    same_bits,
    strided,
)
from close import assert_close
from kimi_native import ops


def check(x, packed, scale, out):
    weight = reference.exact_int4(packed, scale)
    reach = 4 * np.linalg.norm(np.float64(x), axis=1)[:, None] * np.sqrt(np.mean(weight**2))
    assert_close(out, reference.gemm_int4(x, packed, scale), reduction=x.shape[1], scale=reach)


@pytest.mark.parametrize(("n_in", "n_out"), [(7168, 2048), (2048, 7168)])
@pytest.mark.parametrize("T", [1, 3])
def test_model_shapes(isa, rng, T, n_in, n_out):
    n_out = n_out // 16 if isa == "scalar" else n_out // 2
    x, (packed, scale) = normal(rng, T, n_in), int4(rng, n_out, n_in)
    check(x, packed, scale, ops.gemm_int4(x, packed, scale))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 1), (32, 31), (64, 7), (96, 5), (352, 13), (1056, 3)])
def test_hostile_shapes(isa, rng, T, n_in, n_out):
    x, (packed, scale) = normal(rng, T, n_in), int4(rng, n_out, n_in)
    check(x, packed, scale, ops.gemm_int4(x, packed, scale))


@pytest.mark.parametrize(("T", "n_in", "n_out"), [(0, 64, 8), (3, 64, 0), (3, 0, 8)])
def test_empty(isa, T, n_in, n_out):
    packed, scale = np.zeros((n_out, n_in // 8), np.int32), np.ones((n_out, n_in // 32), BF16)
    out = ops.gemm_int4(np.ones((T, n_in), np.float32), packed, scale)
    assert same_bits(out, np.zeros((T, n_out), np.float32))


@pytest.mark.parametrize("T", [1, 6])
def test_strided_rows_and_out(isa, rng, T):
    x, (packed, scale), out = normal(rng, T, 96), int4(rng, 9, 96), strided(poison(T, 9))
    assert ops.gemm_int4(strided(x), packed, scale, out=out) is out
    check(x, packed, scale, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_identity_returns_q_times_scale_exactly(isa, rng):
    """All 16 codes with every kind of scale; the product has 12 bits, so float32 holds it."""
    packed, _ = int4(rng, 21, 160)
    scale = np.exp(rng.uniform(-20, 20, (21, 5))).astype(BF16)
    out = ops.gemm_int4(np.eye(160, dtype=np.float32), packed, scale)
    assert np.array_equal(np.float64(out), reference.exact_int4(packed, scale).T)


def test_minus_eight(isa):
    packed, scale = np.zeros((3, 8), np.int32), np.full((3, 2), 0.5, BF16)
    out = ops.gemm_int4(np.ones((2, 64), np.float32), packed, scale)
    assert np.array_equal(out, np.full((2, 3), -8 * 0.5 * 64, np.float32))


def test_rows_do_not_depend_on_the_batch(isa, rng):
    x, (packed, scale) = normal(rng, 11, 160), int4(rng, 37, 160)
    whole = ops.gemm_int4(x, packed, scale)
    for t in range(11):
        assert same_bits(ops.gemm_int4(x[t : t + 1], packed, scale), whole[t : t + 1])


def test_nan_scale_stays_in_its_column(isa, rng):
    x, (packed, scale) = normal(rng, 5, 64), int4(rng, 9, 64)
    scale[7, 1] = np.nan
    assert np.array_equal(np.isnan(ops.gemm_int4(x, packed, scale)), np.arange(9)[None] == np.full((5, 1), 7))


def arguments():
    return {
        "x": np.ones((3, 64), np.float32),
        "weight_packed": np.ones((5, 8), np.int32),
        "weight_scale": np.ones((5, 2), BF16),
        "out": poison(3, 5),
    }


def test_rejects():
    for argument in ("x", "weight_packed", "weight_scale"):
        assert_rejects_faults(ops.gemm_int4, arguments(), argument)
    for shape in ((5, 7), (5, 9)):
        assert_rejects(ops.gemm_int4, arguments(), "weight_packed", np.ones(shape, np.int32), ValueError)
    for shape in ((4, 2), (5, 1), (5, 3)):
        assert_rejects(ops.gemm_int4, arguments(), "weight_scale", np.ones(shape, BF16), ValueError)
    assert_rejects(ops.gemm_int4, arguments(), "weight_packed", np.ones((5, 8), np.uint32), TypeError)
    assert_rejects(ops.gemm_int4, arguments(), "out", poison(3, 4), ValueError)
    assert_rejects(ops.gemm_int4, arguments(), "out", read_only(poison(3, 5)), ValueError)


def test_rejects_inputs_that_are_no_whole_groups():
    with pytest.raises(ValueError, match="^gemm_int4: .*32"):
        ops.gemm_int4(np.ones((1, 40), np.float32), np.ones((5, 5), np.int32), np.ones((5, 1), BF16))
