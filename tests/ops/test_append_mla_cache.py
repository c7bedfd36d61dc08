"""append_mla_cache: rows into the paged latent cache, bit for bit; fused_append_mla_cache: normalised and rotated."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, spaced, strided
from close import assert_close
from kimi_native import ops


def cache_dtypes(on):
    return [BF16] if on.cuda else [BF16, np.float32]


def check(on, latent, k_pe, cache, slots):
    expected = reference.append_mla_cache(latent, k_pe, cache, slots)
    assert on(ops.append_mla_cache, latent, k_pe, cache, slots) is None
    assert same_bits(cache, expected)


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("T", [0, 1, 2, 5, 17, 33])
@pytest.mark.parametrize(("C", "R"), [(512, 64), (1, 2), (7, 6), (31, 10), (16, 0)])
def test_shuffled_slots(on, rng, T, C, R, page_size):
    pages = -(-40 // page_size)
    slots = rng.permutation(pages * page_size)[:T].astype(np.int64)
    for dtype in cache_dtypes(on):
        cache = poison(pages, page_size, C + R, dtype=dtype)
        check(on, on.normal(rng, T, C), on.normal(rng, T, R), cache, slots)


def test_strided_rows(on, rng):
    """The two parts are columns of one projection in the model."""
    slots = np.array([7, 0, 3, 1, 6, 2], np.int64)
    for dtype in cache_dtypes(on):
        rows, cache = on.normal(rng, 6, 39), poison(2, 4, 39, dtype=dtype)
        check(on, rows[:, :29], rows[:, 29:], cache, slots)
        check(on, strided(on.normal(rng, 6, 29)), strided(on.normal(rng, 6, 10)), cache, slots)


def test_rows_of_any_alignment(on, rng):
    """Each array in turn has rows that do not begin on 16 bytes, or not all of them."""
    slots = np.array([7, 0, 3, 1, 6, 2], np.int64)
    latent, k_pe = on.normal(rng, 6, 16), on.normal(rng, 6, 8)
    for first, *strides in ((0,), (0, 20, 1), (4, 24, 1), (1,)):
        check(on, spaced(latent, *strides, first=first), k_pe, poison(2, 4, 24, dtype=BF16), slots)
        check(on, latent, spaced(k_pe, *strides, first=first), poison(2, 4, 24, dtype=BF16), slots)
    check(on, latent, k_pe, spaced(poison(2, 4, 24, dtype=BF16), first=1), slots)


def test_rounds_to_nearest_even(isa, rng):
    """Halfway cases, overflow to inf, subnormals, infinities, random bit patterns; NaN stays NaN."""
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    bits[:2048] = bits[:2048] & 0xFFFF0000 | 0x8000
    values = bits.view(np.float32)
    values[2048:2056] = [3.4e38, -3.4e38, 1e-45, -1e-40, np.inf, -np.inf, np.nan, -0.0]
    cache = np.zeros((1, 1, 4098), BF16)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(BF16)
    ops.append_mla_cache(values[None], np.ones((1, 2), np.float32), cache, np.zeros(1, np.int64))
    got, nan = cache[0, 0, :4096], np.isnan(values)
    assert np.array_equal(got.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(np.float32(got[nan])).all()


BAD_SLOTS = np.array([8, -1, 2**32, 2**62, -(2**63), 2**63 - 1], np.int64)


@pytest.mark.kernels("gpu")  # the CPU refuses them
@pytest.mark.parametrize("C", [13, 16])
def test_slots_outside_the_cache_are_not_written(on, rng, C):
    latent, k_pe, cache = on.normal(rng, 8, C), on.normal(rng, 8, 8), poison(2, 4, C + 8, dtype=BF16)
    expected = reference.append_mla_cache(latent[:2], k_pe[:2], cache, [5, 2])
    on(ops.append_mla_cache, latent, k_pe, cache, np.append([5, 2], BAD_SLOTS))
    assert same_bits(cache, expected)


def tables(P, R):
    angle = np.arange(P)[:, None] * 50000.0 ** (-2 * np.arange(R // 2) / max(1, R))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def check_fused(on, kv, weight, cos, sin, positions, cache, slots, eps=1e-5):
    """Against the oracle in float64, before it is rounded to the cache's dtype."""
    before, C = cache.copy(), len(weight)
    assert on(ops.fused_append_mla_cache, kv, weight, cos, sin, positions, cache, slots, eps) is None
    flat, untouched = cache.reshape(-1, cache.shape[2]), np.ones(cache.shape[0] * cache.shape[1], bool)
    untouched[slots] = False
    assert same_bits(flat[untouched], before.reshape(flat.shape)[untouched])
    latent = reference.rms_norm(kv[:, :C], weight, eps)
    rotated = reference.rope(kv[:, None, C:], cos, sin, positions)[:, 0]
    largest = np.broadcast_to(np.abs(latent).max(axis=1, keepdims=True, initial=0), latent.shape)
    pair = np.hypot(np.float64(kv[:, C::2]), np.float64(kv[:, C + 1 :: 2]))  # what a rotated element may reach
    scale = np.concatenate([largest, np.repeat(pair, 2, axis=1)], axis=1)
    expected = np.concatenate([latent, rotated], axis=1)
    assert_close(flat[slots], expected, cache.dtype.name, reduction=C, scale=scale)


@pytest.mark.parametrize("T", [0, 1, 2, 5, 17, 33])
@pytest.mark.parametrize(("C", "R"), [(512, 64), (11, 2), (7, 6), (31, 10), (264, 8), (48, 264), (257, 70), (16, 0)])
def test_fused(on, rng, T, C, R):
    kv, weight = on.normal(rng, T, C + R, scale=3), normal(rng, C, dtype=BF16)
    positions, slots = rng.integers(0, 50, T).astype(np.int32), rng.permutation(42)[:T].astype(np.int64)
    for dtype in cache_dtypes(on):
        check_fused(on, kv, weight, *tables(50, R), positions, poison(7, 6, C + R, dtype=dtype), slots)


@pytest.mark.kernels("cpu")  # on the GPU bf16 is rounded between the three
def test_fused_is_rms_norm_rope_and_append(on, rng):
    """Where nothing is rounded between them, that is on the CPU, the three ops give the same bits."""
    C, R, (cos, sin) = 64, 16, tables(9, 16)
    kv, weight = on.normal(rng, 5, C + R), normal(rng, C, dtype=BF16)
    positions, slots = np.array([0, 8, 3, 3, 1], np.int32), np.array([3, 0, 7, 2, 5], np.int64)
    fused, parts = poison(2, 4, C + R, dtype=BF16), poison(2, 4, C + R, dtype=BF16)
    ops.fused_append_mla_cache(kv, weight, cos, sin, positions, fused, slots, 1e-6)
    latent = ops.rms_norm(kv[:, :C], weight, 1e-6)
    ops.append_mla_cache(latent, ops.rope(kv[:, None, C:], cos, sin, positions)[:, 0], parts, slots)
    assert same_bits(fused, parts)


@pytest.mark.parametrize(("width", "first"), [(40, 8), (40, 4), (39, 0), (41, 1)])
def test_fused_rows_of_any_alignment(on, rng, width, first):
    kv, weight = poison(5, width, dtype=on.dtype), normal(rng, 16, dtype=BF16)
    kv[:, first : first + 24] = on.normal(rng, 5, 24)
    given = dict(kv=kv[:, first : first + 24], weight=weight, cache=poison(2, 4, 24, dtype=BF16))
    given |= dict(positions=np.array([3, 0, 9, 1, 2], np.int32), slots=np.array([3, 0, 7, 2, 5], np.int64))
    given |= dict(zip(("cos", "sin"), tables(10, 8), strict=True))
    check_fused(on, **given)
    for name in ("weight", "cos", "sin", "cache"):
        check_fused(on, **given | {name: spaced(given[name], first=1)})


def test_fused_eps_matters_for_small_rows(on):
    kv, cache = np.full((2, 12), 1e-3, on.dtype), poison(1, 2, 12, dtype=BF16)
    kv[1] = 0
    for eps in (1e-5, 1e-6):
        check_fused(on, kv, np.ones(8, BF16), *tables(3, 4), np.array([2, 1], np.int32), cache, np.array([1, 0]), eps)


@pytest.mark.kernels("gpu")  # the CPU refuses them
@pytest.mark.parametrize(("C", "R"), [(13, 6), (16, 8)])
def test_fused_indices_out_of_range(on, rng, C, R):
    """A slot outside the cache is not written; a position outside the tables makes the rope part NaN."""
    cos, sin = tables(10, R)
    kv, weight, cache = on.normal(rng, 8, C + R), normal(rng, C, dtype=BF16), poison(2, 4, C + R, dtype=BF16)
    slots, positions = np.append([5, 2], BAD_SLOTS), np.array([9, 0] + [3] * 6, np.int32)
    on(ops.fused_append_mla_cache, kv, weight, cos, sin, positions, cache, slots, 1e-5)
    wanted = poison(2, 4, C + R, dtype=BF16)
    on(ops.fused_append_mla_cache, kv[:2], weight, cos, sin, positions[:2], wanted, slots[:2], 1e-5)
    assert same_bits(cache, wanted) and np.isfinite(np.float32(cache)).sum() == 2 * (C + R)
    bad = np.array([10, -1, 2**31 - 1, -(2**31)], np.int32)
    on(ops.fused_append_mla_cache, kv[:4], weight, cos, sin, bad, cache, np.arange(4), 1e-5)
    assert np.isnan(cache[0, :, C:]).all() and np.isfinite(np.float32(cache[0, :, :C])).all()


def arguments():
    return {
        "latent": np.ones((3, 8), np.float32),
        "k_pe": np.ones((3, 4), np.float32),
        "cache": poison(5, 2, 12, dtype=BF16),
        "slots": np.array([9, 0, 4], np.int64),
    }


def test_rejects():
    for argument in arguments():
        assert_rejects_faults(
            ops.append_mla_cache, {**arguments(), "cache": np.zeros((5, 2, 12), np.float32)}, argument
        )
    assert_rejects(ops.append_mla_cache, arguments(), "k_pe", np.ones((2, 4), np.float32), ValueError)
    assert_rejects(ops.append_mla_cache, arguments(), "latent", np.ones((3, 8), BF16), TypeError)
    for width in (11, 13):
        assert_rejects(ops.append_mla_cache, arguments(), "cache", poison(5, 2, width, dtype=BF16), ValueError)
    assert_rejects(ops.append_mla_cache, arguments(), "cache", strided(arguments()["cache"]), ValueError)
    assert_rejects(ops.append_mla_cache, arguments(), "cache", read_only(arguments()["cache"]), ValueError)
    assert_rejects(ops.append_mla_cache, arguments(), "slots", np.zeros(2, np.int64), ValueError)


@pytest.mark.parametrize("bad", [-1, 10, 2**32, 2**62, -(2**63)])
def test_rejects_slots_outside_the_cache(bad):
    given = arguments()
    assert_rejects(ops.append_mla_cache, given, "slots", np.array([0, 1, bad], np.int64), ValueError)
    assert np.isnan(np.float32(given["cache"])).all(), "rows were written before the slots were checked"


def fused_arguments():
    cos, sin = tables(10, 4)
    return {
        "kv": np.ones((3, 12), np.float32),
        "weight": np.ones(8, BF16),
        "cos": cos,
        "sin": sin,
        "positions": np.array([0, 9, 5], np.int32),
        "cache": poison(5, 2, 12, dtype=BF16),
        "slots": np.array([9, 0, 4], np.int64),
        "eps": 1e-5,
    }


def test_fused_rejects():
    op = ops.fused_append_mla_cache
    for argument in fused_arguments().keys() - {"eps"}:
        assert_rejects_faults(op, {**fused_arguments(), "cache": np.zeros((5, 2, 12), np.float32)}, argument)
    for bad in (np.ones((3, 11), np.float32), np.ones((2, 12), np.float32)):  # odd R; too few rows
        with pytest.raises(ValueError, match="^fused_append_mla_cache: "):
            op(**{**fused_arguments(), "kv": bad})
    assert_rejects(op, fused_arguments(), "kv", np.ones((3, 12), BF16), TypeError)
    assert_rejects(op, fused_arguments(), "weight", np.ones(13, BF16), ValueError)
    assert_rejects(op, fused_arguments(), "weight", np.ones(8, np.float32), TypeError)
    for table in ("cos", "sin"):
        assert_rejects(op, fused_arguments(), table, np.ones((10, 3), np.float32), ValueError)
    assert_rejects(op, fused_arguments(), "sin", np.ones((9, 2), np.float32), ValueError)
    assert_rejects(op, fused_arguments(), "positions", np.zeros(2, np.int32), ValueError)
    for width in (11, 13):
        assert_rejects(op, fused_arguments(), "cache", poison(5, 2, width, dtype=BF16), ValueError)
    assert_rejects(op, fused_arguments(), "cache", strided(fused_arguments()["cache"]), ValueError)
    assert_rejects(op, fused_arguments(), "cache", read_only(fused_arguments()["cache"]), ValueError)
    assert_rejects(op, fused_arguments(), "slots", np.zeros(2, np.int64), ValueError)


@pytest.mark.parametrize(("argument", "bad"), [("slots", -1), ("slots", 10), ("positions", -1), ("positions", 10)])
def test_fused_rejects_indices_out_of_range(argument, bad):
    given = fused_arguments()
    indices = given[argument].copy()
    indices[2] = bad
    assert_rejects(ops.fused_append_mla_cache, given, argument, indices, ValueError)
    assert np.isnan(np.float32(given["cache"])).all(), "rows were written before the indices were checked"
