"""moe_permute and moe_unpermute."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, spaced, strided
from close import assert_close
from kimi_native import ops


def routes(rng, T, K, E):
    """K different experts a token, as a router gives them."""
    return np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32) if T else np.zeros((0, K), np.int32)


def check_permute(on, x, ids, E):
    for got, wanted in zip(on(ops.moe_permute, x, ids, E), reference.moe_permute(x, ids, E), strict=True):
        assert same_bits(got, wanted.astype(got.dtype))


def narrow(on, H):
    """The model's rows cut for what runs slowly."""
    return H // 16 if H == 7168 and (on.emulated or on.isa == "scalar") else H


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("H", "K", "E"), [(7168, 8, 384), (1, 1, 1), (7, 2, 3), (31, 3, 257), (257, 5, 5), (4, 0, 3)])
def test_permute(on, rng, T, H, K, E):
    check_permute(on, on.normal(rng, T, narrow(on, H)), routes(rng, T, K, E), E)


def test_permute_is_stable_and_skips_minus_one(on):
    x = np.arange(3).astype(on.dtype)[:, None] + on.dtype.type(1)
    ids = np.array([[2, 0], [-1, 2], [0, -1]], np.int32)
    permuted, offsets, inverse = on(ops.moe_permute, x, ids, 4)
    assert permuted[:, 0].tolist() == [1, 3, 1, 2, 0, 0]
    assert offsets.tolist() == [0, 2, 2, 4, 4]
    assert inverse.tolist() == [[2, 0], [-1, 3], [1, -1]]
    assert (offsets.dtype, inverse.dtype) == (np.int32, np.int32)


def test_permute_extremes(on, rng):
    x = on.normal(rng, 9, 13)
    check_permute(on, x, np.full((9, 4), 5, np.int32), 7)  # all rows to one expert
    check_permute(on, x, np.full((9, 4), -1, np.int32), 7)  # none to any
    check_permute(on, x, np.full((9, 4), -1, np.int32), 0)  # for there is none
    check_permute(on, x, rng.integers(-1, 3, (9, 4)).astype(np.int32), 300)  # most experts without a row
    check_permute(on, strided(x), rng.integers(-1, 7, (9, 4)).astype(np.int32), 7)


@pytest.mark.parametrize(("T", "K", "E"), [(300, 8, 384), (257, 4, 1024), (1300, 3, 5), (5000, 1, 2)])
def test_permute_many_pairs(on, rng, T, K, E):
    """More than one block sorts: each has to know what the others place before its own."""
    check_permute(on, on.normal(rng, T, 1), rng.integers(-1, E, (T, K)).astype(np.int32), E)


def test_permute_rows_of_any_alignment(on, rng):
    """Rows of whole 16-byte parts that do not begin at one, or do so at every other row alone."""
    x, ids = on.normal(rng, 6, 16), routes(rng, 6, 2, 5)
    check_permute(on, spaced(x, first=1), ids, 5)
    check_permute(on, spaced(x, 20, 1), ids, 5)


@pytest.mark.kernels("gpu")  # the CPU refuses them
def test_permute_skips_ids_that_no_expert_has(on, rng):
    """On the GPU nobody reads the ids beforehand."""
    x, ids = on.normal(rng, 40, 16), rng.integers(0, 5, (40, 4)).astype(np.int32)
    bad = rng.random(ids.shape) < 0.3
    ids[bad] = rng.choice(np.array([-2, 5, 6, 2**31 - 1, -(2**31)], np.int32), bad.sum())
    for got, wanted in zip(
        on(ops.moe_permute, x, ids, 5), on(ops.moe_permute, x, np.where(bad, -1, ids).astype(np.int32), 5), strict=True
    ):
        assert same_bits(got, wanted)


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("H", "K"), [(7168, 8), (1, 1), (7, 2), (31, 3), (257, 5), (24, 9), (8, 0)])
def test_unpermute(on, rng, T, H, K):
    H = narrow(on, H)
    inverse = rng.permutation(T * K).astype(np.int32).reshape(T, K)
    y, weights = on.normal(rng, T * K, H), normal(rng, T, K)
    check_unpermute(on, y, weights, inverse, on(ops.moe_unpermute, y, weights, inverse))


def check_unpermute(on, y, weights, inverse, out):
    reach = np.abs(np.float32(y)).max(initial=0) * np.abs(weights).sum(axis=1, keepdims=True)
    wanted = reference.moe_unpermute(y, weights, inverse)
    assert_close(out, wanted, on.dtype.name, reduction=inverse.shape[1], scale=reach)


def test_unpermute_skips_minus_one(on, rng):
    """A skipped slot is not read: neither its weight nor any row."""
    y, out = on.normal(rng, 4, 9), poison(3, 9, dtype=on.dtype)
    weights = np.array([[2, np.nan], [np.nan, np.nan], [0.5, 1]], np.float32)
    inverse = np.array([[3, -1], [-1, -1], [0, 1]], np.int32)
    assert on(ops.moe_unpermute, y, weights, inverse, out=out) is out
    rows = np.float64(y)
    expected = np.stack([2.0 * rows[3], 0.0 * rows[0], 0.5 * rows[0] + rows[1]])
    assert_close(out, expected, on.dtype.name, reduction=2, scale=4.0)
    assert (out[1] == 0).all()


@pytest.mark.kernels("gpu")  # the CPU refuses them
def test_unpermute_skips_rows_that_do_not_exist(on, rng):
    y, weights = on.normal(rng, 4, 16), normal(rng, 3, 3)
    bad = np.array([[4, 0, -2], [2**31 - 1, -(2**31), 1], [2, 5, 3]], np.int32)
    weights[(bad < 0) | (bad > 3)] = np.nan
    inverse = np.where((bad < 0) | (bad > 3), -1, bad).astype(np.int32)
    assert same_bits(on(ops.moe_unpermute, y, weights, bad), on(ops.moe_unpermute, y, weights, inverse))


@pytest.mark.parametrize("H", [9, 16])
def test_unpermute_strided_out(on, rng, H):
    y, weights, out = on.normal(rng, 12, H), normal(rng, 4, 3), strided(poison(4, H, dtype=on.dtype))
    inverse = rng.permutation(12).astype(np.int32).reshape(4, 3)
    on(ops.moe_unpermute, y, weights, inverse, out=out)
    assert same_bits(out.copy(), on(ops.moe_unpermute, y, weights, inverse))
    assert np.isnan(out.base).sum() == out.base.size - out.size
    check_unpermute(on, y, weights, inverse, on(ops.moe_unpermute, spaced(y, first=1), weights, inverse))
    for given in ((H + 4, 1), ()):
        out = spaced(poison(4, H, dtype=on.dtype), *given, first=4)
        check_unpermute(on, y, weights, inverse, on(ops.moe_unpermute, y, weights, inverse, out=out))


def test_round_trip(on, rng):
    x, ids = on.normal(rng, 11, 20), routes(rng, 11, 4, 16)
    permuted, _, inverse = on(ops.moe_permute, x, ids, 16)
    weights = np.full((11, 4), 0.25, np.float32)
    assert same_bits(on(ops.moe_unpermute, permuted, weights, inverse), x)


def test_permute_rejects(rng):
    given = {"x": normal(rng, 3, 8), "topk_ids": routes(rng, 3, 2, 5), "num_experts": 5}
    for argument in ("x", "topk_ids"):
        assert_rejects_faults(ops.moe_permute, given, argument)
    assert_rejects(ops.moe_permute, given, "x", given["x"].astype(BF16), TypeError)
    assert_rejects(ops.moe_permute, given, "topk_ids", routes(rng, 4, 2, 5), ValueError)
    assert_rejects(ops.moe_permute, given, "num_experts", -1, ValueError)
    for bad in (-2, 5, 2**31 - 1, -(2**31)):
        ids = given["topk_ids"].copy()
        ids[2, 1] = bad
        assert_rejects(ops.moe_permute, given, "topk_ids", ids, ValueError)


def test_unpermute_rejects(rng):
    given = {
        "y": normal(rng, 6, 8),
        "topk_weights": normal(rng, 3, 2),
        "inverse": np.arange(6, dtype=np.int32).reshape(3, 2),
        "out": poison(3, 8),
    }
    for argument in ("y", "topk_weights", "inverse"):
        assert_rejects_faults(ops.moe_unpermute, given, argument)
    assert_rejects(ops.moe_unpermute, given, "y", given["y"].astype(BF16), TypeError)
    for shape in ((2, 2), (3, 3)):
        with pytest.raises(ValueError, match=r"^moe_unpermute: .*\b(topk_weights|inverse)\b"):
            ops.moe_unpermute(**given | {"topk_weights": normal(rng, *shape)})
    for bad in (-2, 6, 2**31 - 1):
        inverse = given["inverse"].copy()
        inverse[1, 1] = bad
        assert_rejects(ops.moe_unpermute, given, "inverse", inverse, ValueError)
    assert_rejects(ops.moe_unpermute, given, "out", poison(3, 7), ValueError)
    assert_rejects(ops.moe_unpermute, given, "out", read_only(poison(3, 8)), ValueError)
