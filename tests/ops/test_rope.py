"""rope: interleaved pairs, tables by position."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, poison, read_only, same_bits, spaced, strided
from close import assert_close
from kimi_native import ops


def tables(P, R):
    angle = np.arange(P)[:, None] * 50000.0 ** (-2 * np.arange(R // 2) / R)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def check(on, x, cos, sin, positions, out):
    # each result is a sum of two products, as large as the pair is long
    pair = np.hypot(np.float64(x)[..., 0::2], np.float64(x)[..., 1::2])
    assert_close(
        out, reference.rope(x, cos, sin, positions), on.dtype.name, reduction=2, scale=np.repeat(pair, 2, axis=-1)
    )


@pytest.mark.parametrize(("T", "N", "R"), [(1, 64, 64), (9, 64, 64), (33, 1, 64), (0, 2, 4), (2, 0, 4)])
@pytest.mark.parametrize("first", [0, 4090])
def test_model_shapes(on, rng, T, N, R, first):
    cos, sin = tables(4200, R)
    x, positions = on.normal(rng, T, N, R), np.arange(first, first + T, dtype=np.int32)
    check(on, x, cos, sin, positions, on(ops.rope, x, cos, sin, positions))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("R", [2, 6, 14, 30, 34, 62])
def test_hostile_shapes(on, rng, T, R):
    cos, sin = tables(50, R)
    x, positions = on.normal(rng, T, 3, R), rng.integers(0, 50, T).astype(np.int32)
    check(on, x, cos, sin, positions, on(ops.rope, x, cos, sin, positions))


def test_known_rotation(on):
    cos, sin = np.array([[1.0, 1.0], [0.0, 0.5]], np.float32), np.array([[0.0, 0.0], [1.0, 0.25]], np.float32)
    x = np.array([[[1, 2, 3, 4]], [[1, 2, 3, 4]]], on.dtype)
    out = on(ops.rope, x, cos, sin, np.array([0, 1], np.int32))
    assert out.tolist() == [[[1, 2, 3, 4]], [[-2, 1, 0.5, 2.75]]]


def test_in_place(on, rng):
    cos, sin = tables(20, 22)
    x, positions = on.normal(rng, 7, 3, 22), np.array([0, 19, 3, 3, 7, 1, 0], np.int32)
    expected = on(ops.rope, x, cos, sin, positions)
    assert on(ops.rope, x, cos, sin, positions, out=x) is x
    assert same_bits(x, expected)


def test_last_columns_of_a_query_in_place(on, rng):
    """What the model does: q [T, N, dn + R], the rope part last."""
    cos, sin = tables(20, 8)
    q, positions = on.normal(rng, 5, 3, 24), np.arange(5, dtype=np.int32)
    before, part = q.copy(), q[..., 16:]
    on(ops.rope, part, cos, sin, positions, out=part)
    check(on, before[..., 16:], cos, sin, positions, part.copy())
    assert same_bits(q[..., :16].copy(), before[..., :16].copy())


def test_strided_x_and_out(on, rng):
    cos, sin = tables(20, 10)
    x, positions, out = (
        on.normal(rng, 5, 3, 10),
        np.arange(5, dtype=np.int32),
        strided(poison(5, 3, 10, dtype=on.dtype)),
    )
    assert on(ops.rope, strided(x), cos, sin, positions, out=out) is out
    check(on, x, cos, sin, positions, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


@pytest.mark.parametrize(("width", "first"), [(32, 16), (32, 8), (32, 4), (30, 0), (17, 1)])
def test_rows_of_any_alignment(on, rng, width, first):
    """Parts of rows that begin on 16 bytes each, only now and then, or never; the rest is neither read nor written."""
    cos, sin = tables(20, 16)
    q, positions = poison(5, 3, width, dtype=on.dtype), np.array([3, 19, 0, 7, 7], np.int32)
    part = q[..., first : first + 16]
    part[...] = x = on.normal(rng, 5, 3, 16)
    on(ops.rope, part, cos, sin, positions, out=part)
    check(on, x, cos, sin, positions, part.copy())
    assert np.isnan(q).sum() == q.size - part.size
    for strides in ((52, 16, 1), (64, 20, 1)):
        check(on, x, cos, sin, positions, on(ops.rope, spaced(x, *strides), cos, sin, positions))
        out = spaced(np.full_like(x, np.nan), *strides)
        on(ops.rope, x, cos, sin, positions, out=out)
        check(on, x, cos, sin, positions, out)
    check(
        on, x, cos, sin, positions, on(ops.rope, x, cos, sin, positions, out=spaced(np.full_like(x, np.nan), first=1))
    )
    check(on, x, cos, sin, positions, on(ops.rope, spaced(x, first=1), cos, sin, positions))
    check(on, x, cos, sin, positions, on(ops.rope, x, spaced(cos, first=1), sin, positions))
    check(on, x, cos, sin, positions, on(ops.rope, x, cos, spaced(sin, first=1), positions))


@pytest.mark.kernels("gpu")  # the CPU refuses them
@pytest.mark.parametrize("R", [6, 16])
def test_positions_outside_the_tables_give_nan(on, rng, R):
    cos, sin = tables(10, R)
    x, good = on.normal(rng, 6, 2, R), [1, 4]
    positions = np.array([10, 9, -1, 2**31 - 1, 0, -(2**31)], np.int32)
    out = on(ops.rope, x, cos, sin, positions)
    check(on, x[good], cos, sin, positions[good], out[good])
    assert np.isnan(out[[0, 2, 3, 5]]).all()


def arguments():
    cos, sin = tables(10, 8)
    positions = np.array([0, 9, 5], np.int32)
    return {
        "x": np.ones((3, 2, 8), np.float32),
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "out": poison(3, 2, 8),
    }


def test_rejects():
    for argument in ("x", "cos", "sin", "positions"):
        assert_rejects_faults(ops.rope, arguments(), argument)
    for shape in ((10, 3), (10, 5), (9, 4)):
        assert_rejects(ops.rope, arguments(), "sin", np.ones(shape, np.float32), ValueError)
    assert_rejects(ops.rope, arguments(), "cos", np.ones((10, 4), BF16), TypeError)
    assert_rejects(ops.rope, arguments(), "positions", np.zeros(2, np.int32), ValueError)
    for shape in ((3, 2, 6), (3, 1, 8), (2, 2, 8), (3, 16)):
        assert_rejects(ops.rope, arguments(), "out", poison(*shape), ValueError)
    assert_rejects(ops.rope, arguments(), "out", poison(3, 2, 8, dtype=np.float64), TypeError)
    assert_rejects(ops.rope, arguments(), "out", read_only(poison(3, 2, 8)), ValueError)


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
def test_rejects_positions_outside_the_tables(bad):
    given = arguments()
    assert_rejects(ops.rope, given, "positions", np.array([0, 1, bad], np.int32), ValueError)
    assert np.isnan(given["out"]).all(), "rows were written before the positions were checked"


def test_rejects_odd_width():
    cos, sin = tables(10, 8)
    with pytest.raises(ValueError, match="^rope: "):
        ops.rope(np.ones((3, 2, 9), np.float32), cos, sin, np.zeros(3, np.int32))
