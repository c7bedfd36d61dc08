"""mla_decode: absorbed attention of the last queries of each sequence against the paged cache."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, same_bits, strided
from close import assert_close
from kimi_native import ops

HUGE = np.iinfo(np.int32).max
SOFTMAX_SCALE = 0.14467962580268923
FLOAT_CACHE = pytest.mark.parametrize("dtype", [BF16, np.float32])  # float32 on the CPU alone


def random_arguments(rng, seq_lens, page_size, N=3, C=16, R=8, dtype=BF16, Q=1, draw=normal):
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
        "q": draw(rng, len(seq_lens), Q, N, C + R),
        "cache": cache,
        "page_table": table,
        "seq_lens": seq_lens,
        "kv_lora_rank": C,
        "scale": 3.0 * (C + R) ** -0.5,
    }


def check(on, given, out, lse):
    """Where tensor cores multiply the weights, these are rounded to bf16 too."""
    expected, expected_lse = reference.mla_decode(**given, return_lse=True)
    score = 1 + np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=0)
    reach = score * np.nanmax(np.abs(np.float32(given["cache"])), initial=0)
    reduction = given["q"].shape[3] + given["seq_lens"].max(initial=0)
    assert_close(lse, expected_lse, reduction=reduction, scale=score)
    if on.cuda:  # a weight moves by 2^-8 of itself at most, so out by as much of the weighted magnitude of the values
        reach = reach + weighted_magnitude(**given) * 2.0**15 / (4 + np.sqrt(reduction))
    assert_close(out, expected, on.dtype.name, reduction=reduction, scale=reach, roundings=2 if on.cuda else 1)


def weighted_magnitude(q, cache, kv_lora_rank, **others):
    """out as it would be with the same weights and the absolute values: these stand before the rows, unseen by q."""
    blind = np.concatenate([np.zeros((*q.shape[:3], kv_lora_rank)), np.float64(q)], axis=-1)
    values = np.concatenate([np.abs(cache[..., :kv_lora_rank]), cache], axis=-1)
    return reference.mla_decode(blind, values, kv_lora_rank=kv_lora_rank, **others)


def decode(on, given):
    """(out, lse) checked."""
    out, lse = on(ops.mla_decode, **given, return_lse=True)
    check(on, given, out, lse)
    return out, lse


def skip_float_cache(on, dtype):
    if on.cuda and dtype != BF16:
        pytest.skip("the cache is bf16 on the GPU")


@FLOAT_CACHE
@pytest.mark.parametrize("seq_lens", [[1], [300], [64, 65, 5]])
def test_model_shapes(on, rng, seq_lens, dtype):
    skip_float_cache(on, dtype)
    N = 8 if on.emulated or on.isa == "scalar" else 64
    given = random_arguments(rng, seq_lens, 64, N, 512, 64, dtype, draw=on.normal)
    decode(on, given | {"scale": SOFTMAX_SCALE})


@FLOAT_CACHE
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("seq_lens", [[], [0], [0, 0, 0], [1, 0, 2, 3, 5, 8, 17, 33], [63, 64, 65, 128, 129, 0, 191]])
def test_shuffled_pages(on, rng, seq_lens, page_size, dtype):
    skip_float_cache(on, dtype)
    given = random_arguments(rng, seq_lens, page_size, dtype=dtype, draw=on.normal)
    out, lse = decode(on, given)
    empty = given["seq_lens"] == 0
    assert (out[empty] == 0).all() and (lse[empty] == -np.inf).all()


@pytest.mark.parametrize(("N", "C", "R"), [(1, 1, 2), (1, 7, 6), (5, 31, 2), (7, 257, 10), (1, 600, 0), (2, 512, 64)])
def test_hostile_shapes(on, rng, N, C, R):
    decode(on, random_arguments(rng, [1, 19, 70], 3, N, C, R, draw=on.normal))


@pytest.mark.parametrize("page_size", [1, 64])
def test_long_context(on, rng, page_size):
    N = 1 if on.emulated else 3
    decode(on, random_arguments(rng, [9001, 3, 4096], page_size, N, draw=on.normal))


@pytest.mark.parametrize("Q", [2, 3, 17])
def test_last_queries(on, rng, Q):
    """Of several queries each sees the rows up to its own; those before the sequence's start see none."""
    given = random_arguments(rng, [Q, 0, 70, 1, 300, Q - 1], 16, N=2 if on.emulated else 5, Q=Q, draw=on.normal)
    out, lse = decode(on, given)
    for b, length in enumerate(given["seq_lens"]):
        unseen = max(0, Q - length)
        assert (out[b, :unseen] == 0).all() and (lse[b, :unseen] == -np.inf).all()
        assert np.isfinite(lse[b, unseen:]).all()


def test_queries_at_once_equal_single_ones(on, rng):
    given = random_arguments(rng, [70, 2, 300], 16, N=5, Q=4, draw=on.normal)
    out, lse = decode(on, given)
    for i in range(4):
        seen = np.maximum(0, given["seq_lens"] - np.int32(3 - i))
        alone = given | {"q": np.ascontiguousarray(given["q"][:, i : i + 1]), "seq_lens": seen}
        check(on, alone, out[:, i : i + 1], lse[:, i : i + 1])
        decode(on, alone)


def test_out_alone(on, rng):
    given = random_arguments(rng, [5, 40], 3, draw=on.normal)
    assert same_bits(on(ops.mla_decode, **given), on(ops.mla_decode, **given, return_lse=True)[0])


def test_pages_and_batch_do_not_change_a_sequence(on, rng):
    """The same rows in another page size, in another order of pages and alone give the same bits. On the GPU the batch
    and the size of the page table decide how a sequence is cut up, so there they stay."""
    given = random_arguments(rng, [37, 200, 90], 64, draw=on.normal)
    whole = on(ops.mla_decode, **given)
    token = np.arange(200)
    rows = given["cache"][given["page_table"][1, token // 64], token % 64]
    for page_size in (1, 8, 200):
        alone = given | {
            "q": given["q"][1:2],
            "cache": rows.reshape(-1, page_size, 24),
            "page_table": np.arange(200 // page_size, dtype=np.int32)[None],
            "seq_lens": given["seq_lens"][1:2],
        }
        if on.cuda:
            decode(on, alone)
        else:
            assert same_bits(on(ops.mla_decode, **alone)[0], whole[1])


def test_a_page_shared_by_two_sequences(on, rng):
    given = random_arguments(rng, [100, 100], 64, draw=on.normal)
    given["page_table"][1] = given["page_table"][0]
    decode(on, given)


def test_huge_scores_do_not_overflow(on, rng):
    given = random_arguments(rng, [70], 3)
    given["q"] = rng.integers(-4, 5, given["q"].shape).astype(on.dtype)
    given["cache"] = rng.integers(-4, 5, given["cache"].shape).astype(BF16)
    for scale in (256.0, -256.0, 2.0**-20):
        decode(on, given | {"scale": scale})


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
