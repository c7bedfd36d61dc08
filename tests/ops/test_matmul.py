"""matmul: products of float32 matrices and of batches of them."""

import sys

import numpy as np
import pytest
import reference
from arrays import assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, spaced, strided
from close import assert_close
from kimi_native import ops

LAYOUTS = {"plain": lambda x: x, "transposed": lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2)}


def check(a, b, out):
    """Partial sums reach four times the product of two norms over the root of their length, as those of random signs
    do, or the result."""
    expected, norm_a, norm_b = reference.matmul(a, b), np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-2)
    scale = 4 * norm_a[..., None] * norm_b[..., None, :] / np.sqrt(a.shape[-1])
    assert_close(out, expected, reduction=a.shape[-1], scale=np.maximum(scale, np.abs(expected)))


def gram(rng, *shape):
    a = normal(rng, *shape)
    return a, a.swapaxes(-1, -2)


@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("M", [1, 2, 7, 49, 97])
@pytest.mark.parametrize("K", [1, 3, 31, 257])
@pytest.mark.parametrize("N", [1, 5, 16, 47])
def test_hostile_shapes(isa, rng, layout_a, layout_b, M, K, N):
    a, b = LAYOUTS[layout_a](normal(rng, M, K)), LAYOUTS[layout_b](normal(rng, K, N))
    out = poison(M, N)
    assert ops.matmul(a, b, out=out) is out
    check(a, b, out)


@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize(("M", "K", "N"), [(385, 600, 531), (800, 40, 1100), (3, 1200, 1057)])
def test_several_blocks(isa, rng, layout_a, layout_b, M, K, N):
    a, b = LAYOUTS[layout_a](normal(rng, M, K)), LAYOUTS[layout_b](normal(rng, K, N))
    check(a, b, ops.matmul(a, b, out=poison(M, N)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("B", "M", "K", "N"), [(1, 1, 1, 1), (7, 64, 64, 128), (3, 50, 300, 9), (2, 400, 20, 30)])
def test_batches(isa, rng, layout, B, M, K, N):
    a, b = LAYOUTS[layout](normal(rng, B, M, K)), LAYOUTS[layout](normal(rng, B, K, N))
    out = ops.matmul(a, b, out=poison(B, M, N))
    check(a, b, out)
    for i in range(B):
        assert same_bits(out[i], ops.matmul(a[i], b[i]))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("batch", [(), (0,), (2,)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_empty(isa, shape, batch, symmetric):
    M, K, N = (shape[0], shape[1], shape[0]) if symmetric else shape
    a, b = np.ones((*batch, M, K), np.float32), np.ones((*batch, K, N), np.float32)
    out = ops.matmul(a, b, out=poison(*batch, M, N), symmetric=symmetric)
    assert same_bits(out, np.full((*batch, M, N), K, np.float32))


@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 31, 97, 385, 900])
@pytest.mark.parametrize("K", [1, 33, 300])
def test_symmetric(isa, rng, M, K):
    """Equal to what is computed without knowing, bit for bit: the products are the same and so is their order."""
    a, b = gram(rng, M, K)
    out = ops.matmul(a, b, out=poison(M, M), symmetric=True)
    check(a, b, out)
    assert np.array_equal(out, out.T)
    assert same_bits(out, ops.matmul(a, b))


@pytest.mark.parametrize(("B", "M", "K"), [(5, 64, 128), (3, 33, 7), (2, 400, 50)])
def test_symmetric_batches(isa, rng, B, M, K):
    a, b = gram(rng, B, M, K)
    out = ops.matmul(a, b, out=poison(B, M, M), symmetric=True)
    assert same_bits(out, ops.matmul(a, b))
    square = ops.matmul(out, out, symmetric=True)
    check(out, out, square)
    assert np.array_equal(square, square.swapaxes(1, 2))


def test_symmetric_reads_nothing_of_the_upper_half(isa, rng):
    """What the caller promises is used: a result that is not symmetric comes out as its lower half says."""
    a, b = normal(rng, 200, 30), normal(rng, 30, 200)
    plain, mirrored = ops.matmul(a, b), ops.matmul(a, b, symmetric=True)
    assert np.array_equal(np.tril(mirrored), np.tril(plain)) and np.array_equal(mirrored, mirrored.T)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_strided_arrays(isa, rng, batch, symmetric):
    """Rows, columns and matrices with gaps, in both orders."""
    a, b = gram(rng, *batch, 53, 40)
    expected = ops.matmul(a, b)
    gaps_a, gaps_b = strided(a), strided(b)
    other_a, other_b = strided(b).swapaxes(-1, -2), strided(a).swapaxes(-1, -2)
    for left in (gaps_a, other_a):
        for right in (gaps_b, other_b):
            out = strided(poison(*batch, 53, 53))
            assert ops.matmul(left, right, out=out, symmetric=symmetric) is out
            assert same_bits(out.copy(), expected)
            assert np.isnan(out.base).sum() == out.base.size - out.size


def test_rows_far_apart(isa, rng):
    """Rows further apart than those that are read where they are, and rows in descending and in no order."""
    a, b = normal(rng, 100, 70), normal(rng, 70, 20)
    expected = ops.matmul(a, b)
    assert same_bits(ops.matmul(spaced(a, 4096, 1), spaced(b, 1, 4096)), expected)
    assert same_bits(ops.matmul(a[::-1], b)[::-1].copy(), expected)
    one = np.broadcast_to(a[:1], a.shape)
    assert same_bits(ops.matmul(one, b), np.repeat(expected[:1], 100, axis=0))


def test_one_matrix_for_a_batch(isa, rng):
    a, b = normal(rng, 3, 20, 9), normal(rng, 9, 33)
    shared = np.broadcast_to(b, (3, 9, 33))
    assert same_bits(ops.matmul(a, shared), np.stack([ops.matmul(x, b) for x in a]))


@pytest.mark.parametrize("first", range(1, 8))
def test_any_alignment(isa, rng, first):
    a, b = normal(rng, 37, 45), normal(rng, 45, 29)
    out = spaced(poison(37, 29), first=first)
    ops.matmul(spaced(a, first=first), spaced(b, first=first), out=out)
    assert same_bits(out.copy(), ops.matmul(a, b))


def test_an_element_does_not_depend_on_the_others(isa, rng):
    """Whatever blocks it is computed in."""
    a, b = normal(rng, 401, 700), normal(rng, 700, 600)
    out = ops.matmul(a, b)
    for rows, columns in (
        (slice(0, 1), slice(0, 1)),
        (slice(100, 231), slice(77, 401)),
        (slice(400, 401), slice(590, 600)),
    ):
        assert same_bits(ops.matmul(a[rows], b[:, columns]), out[rows, columns].copy())


def test_not_finite_stays_in_its_row_and_column(isa):
    a, b = np.ones((100, 300), np.float32), np.ones((300, 100), np.float32)
    a[7, 280], b[20, 50] = np.nan, np.inf
    out = ops.matmul(a, b)
    assert np.isnan(out[7]).all() and np.isnan(out).sum() == 100
    assert np.isinf(np.delete(out[:, 50], 7)).all() and np.isinf(out).sum() == 99


def test_inputs_may_be_read_only_and_one_array(isa, rng):
    a = normal(rng, 60, 60)
    before = a.copy()
    check(a, a, ops.matmul(read_only(a), a))
    assert same_bits(a, before)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_rejects(rng, batch):
    op, given = (
        ops.matmul,
        {"a": normal(rng, *batch, 6, 8), "b": normal(rng, *batch, 8, 6), "out": poison(*batch, 6, 6)},
    )
    assert_rejects_faults(op, given, "b")
    for array in (given["a"].tolist(), None, np.float64(given["a"]), given["a"][0, 0]):
        assert_rejects(op, given, "a", array, (TypeError, ValueError))
        if array is not None:
            assert_rejects(op, given, "out", array, (TypeError, ValueError))
    assert_rejects(op, given, "a", np.repeat(given["a"], 2, axis=-1)[..., ::2], ValueError)
    assert_rejects(op, given, "b", normal(rng, *batch, 7, 6), ValueError)
    assert_rejects(op, given, "b", normal(rng, 3, 8, 6), ValueError)
    assert_rejects(op, given, "out", poison(*batch, 6, 5), ValueError)
    assert_rejects(op, given, "out", poison(*batch, 6, 6).swapaxes(-1, -2), ValueError)
    assert_rejects(op, given, "out", read_only(poison(*batch, 6, 6)), ValueError)
    assert_rejects(op, given | {"b": given["a"][..., :6, :].swapaxes(-1, -2)}, "out", given["a"][..., :6], ValueError)
    with pytest.raises(ValueError, match="^matmul: symmetric, but out is 6 by 5"):
        op(given["a"], given["b"][..., :5], symmetric=True)


def test_on_cupy_arrays_it_is_cupys(monkeypatch):
    class Array:
        __module__ = "cupy"

    a, b, out = Array(), Array(), Array()
    called = []
    library = type(
        "cupy", (), {"matmul": staticmethod(lambda *arguments, **named: called.append((arguments, named)) or out)}
    )
    monkeypatch.setitem(sys.modules, "cupy", library)
    assert ops.matmul(a, b, out=out, symmetric=True) is out
    assert called == [((a, b), {"out": out})]
