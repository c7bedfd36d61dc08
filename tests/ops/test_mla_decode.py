"""mla_decode: absorbed attention of the last queries of each sequence against the paged cache."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, same_bits, strided
from close import assert_close
from kimi_native import ops

HUGE = np.iinfo(np.int32).max
SOFTMAX_SCALE = 0.14467962580268923


def random_arguments(rng, seq_lens, page_size, N=3, C=16, R=8, dtype=BF16, Q=1):
    """Pages in any order; unused ones and the unused end of each last page are NaN, unused entries huge."""
    seq_lens = np.array(seq_lens, np.int32)
    used = -(-seq_lens // page_size)
    table = np.full((len(seq_lens), used.max(initial=0) + 2), HUGE, np.int32)
    pages = iter(rng.permutation(used.sum() + 3).astype(np.int32))
    cache = poison(used.sum() + 3, page_size, C + R, dtype=dtype)
    for b, length in enumerate(seq_lens):
        table[b, : used[b]] = [next(pages) for _ in range(used[b])]
        token = np.arange(length)
        cache[table[b, token // page_size], token % page_size] = normal(rng, length, C + R, dtype=dtype)
    return {
        "q": normal(rng, len(seq_lens), Q, N, C + R),
        "cache": cache,
        "page_table": table,
        "seq_lens": seq_lens,
        "kv_lora_rank": C,
        "scale": 3.0 * (C + R) ** -0.5,
    }


def check(given, out, lse):
    expected, expected_lse = reference.mla_decode(**given, return_lse=True)
    score = 1 + np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=0)
    reach = score * np.nanmax(np.abs(np.float32(given["cache"])), initial=0)
    reduction = given["q"].shape[3] + given["seq_lens"].max(initial=0)
    assert_close(lse, expected_lse, reduction=reduction, scale=score)
    assert_close(out, expected, reduction=reduction, scale=reach)


@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("seq_lens", [[1], [300], [64, 65, 5]])
def test_model_shapes(isa, rng, seq_lens, dtype):
    given = random_arguments(rng, seq_lens, 64, N=8 if isa == "scalar" else 64, C=512, R=64, dtype=dtype)
    given["scale"] = SOFTMAX_SCALE
    check(given, *ops.mla_decode(**given, return_lse=True))


@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("seq_lens", [[], [0], [0, 0, 0], [1, 0, 2, 3, 5, 8, 17, 33], [63, 64, 65, 128, 129, 0, 191]])
def test_shuffled_pages(isa, rng, seq_lens, page_size, dtype):
    given = random_arguments(rng, seq_lens, page_size, dtype=dtype)
    out, lse = ops.mla_decode(**given, return_lse=True)
    check(given, out, lse)
    empty = given["seq_lens"] == 0
    assert (out[empty] == 0).all() and (lse[empty] == -np.inf).all()


@pytest.mark.parametrize(("N", "C", "R"), [(1, 1, 2), (1, 7, 6), (5, 31, 2), (7, 257, 10), (2, 512, 64)])
def test_hostile_shapes(isa, rng, N, C, R):
    given = random_arguments(rng, [1, 19, 70], 3, N, C, R)
    check(given, *ops.mla_decode(**given, return_lse=True))


@pytest.mark.parametrize("page_size", [1, 64])
def test_long_context(isa, rng, page_size):
    given = random_arguments(rng, [9001, 3, 4096], page_size)
    check(given, *ops.mla_decode(**given, return_lse=True))


@pytest.mark.parametrize("Q", [2, 3, 17])
def test_last_queries(isa, rng, Q):
    """Of several queries each sees the rows up to its own; those before the sequence's start see none."""
    given = random_arguments(rng, [Q, 0, 70, 1, 300, Q - 1], 16, N=5, Q=Q)
    out, lse = ops.mla_decode(**given, return_lse=True)
    check(given, out, lse)
    for b, length in enumerate(given["seq_lens"]):
        unseen = max(0, Q - length)
        assert (out[b, :unseen] == 0).all() and (lse[b, :unseen] == -np.inf).all()
        assert np.isfinite(lse[b, unseen:]).all()


def test_queries_at_once_equal_single_ones(isa, rng):
    given = random_arguments(rng, [70, 2, 300], 16, N=5, Q=4)
    out, lse = ops.mla_decode(**given, return_lse=True)
    for i in range(4):
        seen = np.maximum(0, given["seq_lens"] - np.int32(3 - i))
        alone = given | {"q": np.ascontiguousarray(given["q"][:, i : i + 1]), "seq_lens": seen}
        check(alone, out[:, i : i + 1], lse[:, i : i + 1])
        check(alone, *ops.mla_decode(**alone, return_lse=True))


def test_out_alone(isa, rng):
    given = random_arguments(rng, [5, 40], 3)
    assert same_bits(ops.mla_decode(**given), ops.mla_decode(**given, return_lse=True)[0])


def test_pages_and_batch_do_not_change_a_sequence(isa, rng):
    """The same rows in another page size, in another order of pages and alone give the same bits."""
    given = random_arguments(rng, [37, 200, 90], 64)
    whole = ops.mla_decode(**given)
    token = np.arange(200)
    rows = given["cache"][given["page_table"][1, token // 64], token % 64]
    for page_size in (1, 8, 200):
        alone = given | {
            "q": given["q"][1:2],
            "cache": rows.reshape(-1, page_size, 24),
            "page_table": np.arange(200 // page_size, dtype=np.int32)[None],
            "seq_lens": given["seq_lens"][1:2],
        }
        assert same_bits(ops.mla_decode(**alone)[0], whole[1])


def test_a_page_shared_by_two_sequences(isa, rng):
    given = random_arguments(rng, [100, 100], 64)
    given["page_table"][1] = given["page_table"][0]
    check(given, *ops.mla_decode(**given, return_lse=True))


def test_huge_scores_do_not_overflow(isa, rng):
    given = random_arguments(rng, [70], 3)
    given["q"] = rng.integers(-4, 5, given["q"].shape).astype(np.float32)
    given["cache"] = rng.integers(-4, 5, given["cache"].shape).astype(BF16)
    for scale in (256.0, -256.0, 2.0**-20):
        given["scale"] = scale
        check(given, *ops.mla_decode(**given, return_lse=True))


def test_rejects(rng):
    op, given = ops.mla_decode, random_arguments(rng, [5, 40], 3)
    assert_rejects_faults(op, given | {"cache": np.zeros(given["cache"].shape, np.float32)}, "cache")
    for argument in ("q", "page_table", "seq_lens"):
        assert_rejects_faults(op, given, argument)
    assert_rejects(op, given, "q", given["q"].astype(BF16), TypeError)
    assert_rejects(op, given, "cache", strided(given["cache"]), ValueError)
    assert_rejects(op, given, "page_table", strided(given["page_table"]), ValueError)
    assert_rejects(op, given, "page_table", given["page_table"][:1], ValueError)
    assert_rejects(op, given, "seq_lens", given["seq_lens"][:1], ValueError)
    for width in (23, 25):
        with pytest.raises(ValueError, match=r"^mla_decode: .*\b(q|cache)\b"):
            op(**given | {"q": normal(rng, 2, 1, 3, width)})
    for rank in (-1, 25, 2**31 - 1):
        assert_rejects(op, given, "kv_lora_rank", rank, ValueError)


@pytest.mark.parametrize("bad", [-1, 2**31 - 1, -(2**31), 10**6])
def test_rejects_used_pages_outside_the_cache(rng, bad):
    given = random_arguments(rng, [5, 40], 3)
    given["page_table"][1, 13] = bad
    with pytest.raises(ValueError, match=r"^mla_decode: .*\bpage_table\b"):
        ops.mla_decode(**given)


@pytest.mark.parametrize("bad", [-1, -(2**31), 49, 2**31 - 1])
def test_rejects_seq_lens_past_the_table(rng, bad):
    given = random_arguments(rng, [5, 40], 3)
    assert given["page_table"].shape[1] * 3 == 48
    given["page_table"][:] = 0
    assert_rejects(ops.mla_decode, given, "seq_lens", np.array([5, bad], np.int32), ValueError)
