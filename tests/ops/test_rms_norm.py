"""rms_norm and fused_add_rms_norm."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops

SHAPES = [(1, 7168), (3, 7168), (2, 1536), (5, 512), (0, 64)]
SHAPES += [(t, h) for t in (1, 2, 5, 8, 17, 33) for h in (1, 7, 31, 257)]
# where the CUDA kernels change their ways: rows of a warp to 1536 and of a block to 8192, steps of 8 and of 4
SHAPES += [(9, 8), (3, 12), (4, 520), (2, 1544), (1, 8192), (2, 8200)]


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_rms_norm(on, rng, T, H):
    x, weight = on.normal(rng, T, H), normal(rng, H, dtype=BF16)
    out = on(ops.rms_norm, x, weight, 1e-5)
    assert_close(out, reference.rms_norm(x, weight, 1e-5), on.dtype.name, reduction=H)


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_float32_weight(isa, rng, T, H):
    x, weight = normal(rng, T, H), normal(rng, H)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), reduction=H)
    rounded = weight.astype(BF16)
    assert same_bits(ops.rms_norm(x, np.float32(rounded), 1e-5), ops.rms_norm(x, rounded, 1e-5))


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_fused_add_rms_norm(on, rng, T, H):
    x, residual, weight = on.normal(rng, T, H), normal(rng, T, H, scale=3), normal(rng, H, dtype=BF16)
    total = np.float32(x) + residual
    out = on(ops.fused_add_rms_norm, x, residual, weight, 1e-6)
    assert same_bits(residual, total)
    assert_close(out, reference.rms_norm(total, weight, 1e-6), on.dtype.name, reduction=H)


def test_strided_rows_and_out(on, rng):
    x, residual, weight = on.normal(rng, 9, 83), normal(rng, 9, 83), normal(rng, 83, dtype=BF16)
    out, held = strided(poison(9, 83, dtype=on.dtype)), strided(residual)
    around = held.base.copy()
    around[1:10, 1:84] += np.float32(x)
    assert on(ops.rms_norm, strided(x), weight, 1e-5, out=out) is out
    assert_close(out, reference.rms_norm(x, weight, 1e-5), on.dtype.name, reduction=83)
    assert np.isnan(out.base[0]).all() and np.isnan(out.base[:, 84:]).all()
    assert on(ops.fused_add_rms_norm, strided(x), held, weight, 1e-5, out=out) is out
    assert_close(out, reference.fused_add_rms_norm(x, residual, weight, 1e-5)[0], on.dtype.name, reduction=83)
    assert same_bits(held.base, around)


@pytest.mark.parametrize("H", [40, 1600])
def test_strided_rows_of_whole_vectors(on, rng, H):
    wide, sums, around = (poison(6, H + 16, dtype=dtype) for dtype in (on.dtype, np.float32, on.dtype))
    x, residual, out = (array[1:, 8 : H + 8] for array in (wide, sums, around))
    x[...], residual[...] = on.normal(rng, 5, H), normal(rng, 5, H)
    weight, total = normal(rng, H, dtype=BF16), np.float32(x) + residual
    assert on(ops.rms_norm, x, weight, 1e-5, out=out) is out
    assert_close(np.ascontiguousarray(out), reference.rms_norm(x, weight, 1e-5), on.dtype.name, reduction=H)
    assert on(ops.fused_add_rms_norm, x, residual, weight, 1e-5, out=out) is out
    assert_close(np.ascontiguousarray(out), reference.rms_norm(total, weight, 1e-5), on.dtype.name, reduction=H)
    assert np.array_equal(residual, total)
    for array in (sums, around):
        assert np.isnan(array).sum() == array.size - out.size


@pytest.mark.parametrize("H", [71, 512, 7168])
def test_out_may_be_x(on, rng, H):
    x, residual, weight = on.normal(rng, 3, H), normal(rng, 3, H), normal(rng, H, dtype=BF16)
    once = reference.rms_norm(x, weight, 1e-5)
    total = np.float32(x) + residual
    again = x.copy()
    assert on(ops.rms_norm, x, weight, 1e-5, out=x) is x
    assert_close(x, once, on.dtype.name, reduction=H)
    assert on(ops.fused_add_rms_norm, again, residual, weight, 1e-5, out=again) is again
    assert_close(again, reference.rms_norm(total, weight, 1e-5), on.dtype.name, reduction=H)
    assert same_bits(residual, total)


def test_eps_matters_for_small_rows(on):
    x, weight = np.full((2, 64), 1e-3, on.dtype), np.ones(64, BF16)
    x[1] = 0
    for eps in (1e-5, 1e-6):
        assert_close(on(ops.rms_norm, x, weight, eps), reference.rms_norm(x, weight, eps), on.dtype.name, reduction=64)


@pytest.mark.parametrize("H", [71, 512, 7168])
def test_nan_stays_in_its_row(on, rng, H):
    x, residual, weight = on.normal(rng, 5, H), np.zeros((5, H), np.float32), np.ones(H, BF16)
    x[2, H - 1] = np.nan
    for out in (on(ops.rms_norm, x, weight, 1e-5), on(ops.fused_add_rms_norm, x, residual, weight, 1e-5)):
        assert np.isnan(np.float32(out)).all(axis=1).tolist() == [False, False, True, False, False]
        assert np.isfinite(np.float32(out[[0, 1, 3, 4]])).all()


def arguments(op):
    given = {"x": np.ones((3, 8), np.float32), "weight": np.ones(8, BF16), "eps": 1e-5, "out": poison(3, 8)}
    return given | ({"residual": np.ones((3, 8), np.float32)} if op is ops.fused_add_rms_norm else {})


@pytest.mark.parametrize("op", [ops.rms_norm, ops.fused_add_rms_norm])
def test_rejects(op):
    for argument in arguments(op).keys() - {"eps", "out"}:
        assert_rejects_faults(op, arguments(op), argument)
    written = [name for name in ("out", "residual") if name in arguments(op)]
    for argument in written:
        assert_rejects(op, arguments(op), argument, poison(3, 9), ValueError)
        assert_rejects(op, arguments(op), argument, poison(4, 8), ValueError)
        assert_rejects(op, arguments(op), argument, read_only(poison(3, 8)), ValueError)
        assert_rejects(op, arguments(op), argument, poison(3, 8, dtype=np.float64), TypeError)
    assert_rejects(op, arguments(op), "weight", np.ones(7, BF16), ValueError)
    if op is ops.fused_add_rms_norm:
        assert_rejects(op, arguments(op), "weight", np.ones(8, np.float32), TypeError)
    assert_rejects(op, arguments(op), "x", np.ones((3, 8), BF16), TypeError)
