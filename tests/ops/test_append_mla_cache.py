"""append_mla_cache: rows into the paged latent cache, bit for bit."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from kimi_native import ops


def check(latent, k_pe, cache, slots):
    expected = reference.append_mla_cache(latent, k_pe, cache, slots)
    assert ops.append_mla_cache(latent, k_pe, cache, slots) is None
    assert same_bits(cache, expected)


@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("T", [0, 1, 2, 5, 17, 33])
@pytest.mark.parametrize(("C", "R"), [(512, 64), (1, 2), (7, 6), (31, 10)])
def test_shuffled_slots(isa, rng, T, C, R, page_size, dtype):
    pages = -(-40 // page_size)
    cache = poison(pages, page_size, C + R, dtype=dtype)
    slots = rng.permutation(pages * page_size)[:T].astype(np.int64)
    check(normal(rng, T, C), normal(rng, T, R), cache, slots)


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_strided_rows(isa, rng, dtype):
    """The two parts are columns of one projection in the model."""
    rows, cache = normal(rng, 6, 39), poison(2, 4, 39, dtype=dtype)
    check(rows[:, :29], rows[:, 29:], cache, np.array([7, 0, 3, 1, 6, 2], np.int64))
    latent, k_pe = strided(normal(rng, 6, 29)), strided(normal(rng, 6, 10))
    check(latent, k_pe, cache, np.array([7, 0, 3, 1, 6, 2], np.int64))


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
