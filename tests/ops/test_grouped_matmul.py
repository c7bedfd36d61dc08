"""grouped_matmul: one product of float32 matrices per group of rows."""

import numpy as np
import pytest
import reference
from arrays import assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops
from kimi_native.ops import _array

COUNTS = [[3], [0, 0, 0], [17, 0, 1], [0, 33], [1, 2, 3, 5, 8], [0, 400, 0, 9], [20, 300, 97, 0, 64]]


def offsets_of(counts):
    return np.cumsum([0, *counts]).astype(np.int32)


def transposed(x):
    """The same values with the other of the last two axes contiguous."""
    return x.swapaxes(-1, -2).copy().swapaxes(-1, -2)


def check(a, b, offsets, out, reduction):
    scale = 4 * np.sqrt(max(1, reduction))  # of sums of products of normally distributed values
    assert_close(out, reference.grouped_matmul(a, b, offsets), reduction=reduction, scale=scale)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 31), (257, 5), (64, 128), (3, 600)])
@pytest.mark.parametrize("layout", [lambda x: x, transposed], ids=["plain", "transposed"])
def test_a_matrix_per_group(isa, rng, counts, K, N, layout):
    M, offsets = sum(counts), offsets_of(counts)
    a, b, out = layout(normal(rng, M, K)), layout(normal(rng, len(counts), K, N)), poison(M, N)
    assert ops.grouped_matmul(a, b, offsets, out=out) is out
    check(a, b, offsets, out, K)
    for e, matrix in enumerate(b):
        rows = slice(offsets[e], offsets[e + 1])
        assert same_bits(out[rows], ops.matmul(a[rows], matrix))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 31), (257, 5), (64, 128), (3, 600)])
@pytest.mark.parametrize("layout", [lambda x: x, transposed], ids=["plain", "transposed"])
def test_sums_over_the_rows_of_a_group(isa, rng, counts, K, N, layout):
    """The gradients of the matrices; 0 for a group without rows."""
    M, offsets = sum(counts), offsets_of(counts)
    a, b, out = layout(normal(rng, K, M)), layout(normal(rng, M, N)), poison(len(counts), K, N)
    assert ops.grouped_matmul(a, b, offsets, out=out) is out
    check(a, b, offsets, out, max(counts))
    for e in range(len(counts)):
        rows = slice(offsets[e], offsets[e + 1])
        assert same_bits(out[e], ops.matmul(a[:, rows], b[rows]))


def test_rows_of_no_group(isa, rng):
    """Rows past the last offset are not read; of the result they are zero, and add nothing to a sum."""
    offsets, a, b = offsets_of([2, 0, 4]), normal(rng, 9, 20), normal(rng, 3, 20, 7)
    a[6:] = np.nan
    out = ops.grouped_matmul(a, b, offsets, out=poison(9, 7))
    assert same_bits(out[6:], np.zeros((3, 7), np.float32))
    check(a[:6], b, offsets, out[:6], 20)
    sums = ops.grouped_matmul(a.T, np.ones((9, 7), np.float32), offsets)
    check(a[:6].T, np.ones((6, 7)), offsets, sums, 6)


def test_gradients_of_a_layer(isa, rng):
    """As backward.py calls it: the weights [E, out, in] swapped for the way forward, as they are for the way back."""
    offsets, weight = offsets_of([5, 0, 8]), normal(rng, 3, 24, 16)
    x, dy = normal(rng, 13, 16), normal(rng, 13, 24)
    check(x, weight.swapaxes(1, 2), offsets, ops.grouped_matmul(x, weight.swapaxes(1, 2), offsets), 16)
    check(dy, weight, offsets, ops.grouped_matmul(dy, weight, offsets), 24)
    check(dy.T, x, offsets, ops.grouped_matmul(dy.T, x, offsets), 8)


def test_strided_arrays(isa, rng):
    offsets, a, b = offsets_of([30, 0, 23]), normal(rng, 53, 40), normal(rng, 3, 40, 21)
    for left in (strided(a), strided(a.T).T):
        for right in (strided(b), strided(b.swapaxes(1, 2)).swapaxes(1, 2)):
            out = strided(poison(53, 21))
            ops.grouped_matmul(left, right, offsets, out=out)
            assert same_bits(out.copy(), ops.grouped_matmul(a, b, offsets))
            assert np.isnan(out.base).sum() == out.base.size - out.size
        out = strided(poison(3, 40, 21))
        y = normal(rng, 53, 21)
        ops.grouped_matmul(left.T, strided(y), offsets, out=out)
        assert same_bits(out.copy(), ops.grouped_matmul(a.T, y, offsets))
        assert np.isnan(out.base).sum() == out.base.size - out.size


def test_no_groups(isa):
    """Nothing to multiply: rows are zero."""
    none = np.zeros(1, np.int32)
    out = ops.grouped_matmul(np.ones((2, 3), np.float32), np.ones((0, 3, 4), np.float32), none, out=poison(2, 4))
    assert same_bits(out, np.zeros((2, 4), np.float32))
    assert ops.grouped_matmul(np.ones((3, 2), np.float32), np.ones((2, 4), np.float32), none).shape == (0, 3, 4)


def test_on_the_gpu_it_is_a_loop(monkeypatch, rng):
    """As the emulator has it: NumPy in the part of CuPy."""
    offsets, a, b, y = offsets_of([5, 0, 8]), normal(rng, 16, 9), normal(rng, 3, 9, 4), normal(rng, 16, 4)
    monkeypatch.setattr(_array, "extension", None)
    check(a, b, offsets, ops.grouped_matmul(a, b, offsets, out=poison(16, 4)), 9)
    check(a.T, y, offsets, ops.grouped_matmul(a.T, y, offsets), 8)


@pytest.mark.parametrize("sum_rows", [False, True])
def test_rejects(rng, sum_rows):
    op, given = ops.grouped_matmul, {"a": normal(rng, 6, 8), "b": normal(rng, 2, 8, 5), "offsets": offsets_of([2, 4])}
    if sum_rows:
        given |= {"a": given["a"].T.copy(), "b": normal(rng, 6, 5)}
    for array in (
        given["a"].tolist(),
        None,
        np.float64(given["a"]),
        given["a"][None],
        given["a"].repeat(2, axis=1)[:, ::2],
    ):
        assert_rejects(op, given, "a", array, (TypeError, ValueError))
    for array in (given["b"].tolist(), None, np.float64(given["b"]), given["b"].repeat(2, axis=-1)[..., ::2]):
        assert_rejects(op, given, "b", array, (TypeError, ValueError))
    assert_rejects(op, given, "b", given["b"][..., :4, :], ValueError)
    assert_rejects(op, given, "b", given["b"][None, None], ValueError)
    assert_rejects_faults(op, given, "offsets")
    assert_rejects(op, given, "offsets", np.zeros(0, np.int32), ValueError)
    for bad in ([0, 2, 7], [1, 2, 6], [0, 3, 2], [0, -1, 6], [0, 2, 2**31 - 1]):
        assert_rejects(op, given, "offsets", np.array(bad, np.int32), ValueError)
    shape = (2, 8, 5) if sum_rows else (6, 5)
    for array in (poison(*shape).tolist(), poison(*shape, dtype=np.float64), poison(*shape)[0]):
        assert_rejects(op, given, "out", array, (TypeError, ValueError))
    assert_rejects(op, given, "out", poison(*shape[:-1], 4), ValueError)
    assert_rejects(op, given, "out", read_only(poison(*shape)), ValueError)
    flat = normal(rng, 80)
    out, b = (flat[: np.prod(x)].reshape(x) for x in (shape, given["b"].shape))
    assert_rejects(op, given | {"b": b}, "out", out, ValueError)
