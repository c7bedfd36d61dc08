"""moe_permute and moe_unpermute."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops


def routes(rng, T, K, E):
    """K different experts a token, as a router gives them."""
    return np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32) if T else np.zeros((0, K), np.int32)


def check_permute(x, ids, E):
    for got, wanted in zip(ops.moe_permute(x, ids, E), reference.moe_permute(x, ids, E), strict=True):
        assert same_bits(got, wanted.astype(got.dtype))


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("H", "K", "E"), [(7168, 8, 384), (1, 1, 1), (7, 2, 3), (31, 3, 257), (257, 5, 5), (4, 0, 3)])
def test_permute(isa, rng, T, H, K, E):
    H = H // 16 if isa == "scalar" and H == 7168 else H
    check_permute(normal(rng, T, H), routes(rng, T, K, E), E)


def test_permute_is_stable_and_skips_minus_one(isa):
    x = np.arange(3, dtype=np.float32)[:, None] + 1
    ids = np.array([[2, 0], [-1, 2], [0, -1]], np.int32)
    permuted, offsets, inverse = ops.moe_permute(x, ids, 4)
    assert permuted[:, 0].tolist() == [1, 3, 1, 2, 0, 0]
    assert offsets.tolist() == [0, 2, 2, 4, 4]
    assert inverse.tolist() == [[2, 0], [-1, 3], [1, -1]]
    assert (offsets.dtype, inverse.dtype) == (np.int32, np.int32)


def test_permute_extremes(isa, rng):
    x = normal(rng, 9, 13)
    check_permute(x, np.full((9, 4), 5, np.int32), 7)  # all rows to one expert
    check_permute(x, np.full((9, 4), -1, np.int32), 7)  # none to any
    check_permute(x, rng.integers(-1, 3, (9, 4)).astype(np.int32), 300)  # most experts without a row
    check_permute(strided(x), rng.integers(-1, 7, (9, 4)).astype(np.int32), 7)


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("H", "K"), [(7168, 8), (1, 1), (7, 2), (31, 3), (257, 5)])
def test_unpermute(isa, rng, T, H, K):
    inverse = rng.permutation(T * K).astype(np.int32).reshape(T, K)
    y, weights = normal(rng, T * K, H), normal(rng, T, K)
    out = ops.moe_unpermute(y, weights, inverse)
    reach = np.abs(y).max(initial=0) * np.abs(weights).sum(axis=1, keepdims=True)
    assert_close(out, reference.moe_unpermute(y, weights, inverse), reduction=K, scale=reach)


def test_unpermute_skips_minus_one(isa, rng):
    """A skipped slot is not read: neither its weight nor any row."""
    y, out = normal(rng, 4, 9), poison(3, 9)
    weights = np.array([[2, np.nan], [np.nan, np.nan], [0.5, 1]], np.float32)
    inverse = np.array([[3, -1], [-1, -1], [0, 1]], np.int32)
    assert ops.moe_unpermute(y, weights, inverse, out=out) is out
    assert_close(out, np.stack([2.0 * y[3], 0.0 * y[0], 0.5 * np.float64(y[0]) + y[1]]), reduction=2, scale=4.0)
    assert (out[1] == 0).all()


def test_unpermute_strided_out(isa, rng):
    y, weights, out = normal(rng, 12, 9), normal(rng, 4, 3), strided(poison(4, 9))
    inverse = rng.permutation(12).astype(np.int32).reshape(4, 3)
    ops.moe_unpermute(y, weights, inverse, out=out)
    assert same_bits(out.copy(), ops.moe_unpermute(y, weights, inverse))
    assert np.isnan(out.base).sum() == out.base.size - out.size


def test_round_trip(isa, rng):
    x, ids = normal(rng, 11, 20), routes(rng, 11, 4, 16)
    permuted, _, inverse = ops.moe_permute(x, ids, 16)
    weights = np.full((11, 4), 0.25, np.float32)
    assert same_bits(ops.moe_unpermute(permuted, weights, inverse), x)


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
