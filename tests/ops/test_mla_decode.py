"""mla_decode: absorbed attention of the last queries of each sequence against the paged cache."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, same_bits, strided
from close import assert_close
from kimi_native import ops

HUGE = np.iinfo(np.int32).max
SOFTMAX_SCALE = 0.14467962580268923


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


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("Q", [1, 3])
def test_room_for_more_pages_changes_nothing(on, rng, page_size, Q):
    """A context shorter than its page table is cut as one in a table that it fills, in memory for any context."""
    given = random_arguments(rng, [2000], page_size, Q=Q, draw=on.normal)
    for length in (1, 48, 49, 384, 385, 1300, 1536, 1537, 1985):
        given["seq_lens"] = np.int32([length])
        exact = given | {"page_table": given["page_table"][:, : -(-length // page_size)].copy()}
        wide, narrow = (on(ops.mla_decode, **each, return_lse=True) for each in (given, exact))
        check(on, given, *wide)
        if not on.cuda:  # where the table's room decides
            assert all(map(same_bits, wide, narrow))


@pytest.mark.parametrize("seq_lens", [[1], [300], [64, 65, 5]])
def test_model_shapes(on, rng, seq_lens, cache_dtype):
    N = 8 if on.emulated or on.isa == "scalar" else 64
    given = random_arguments(rng, seq_lens, 64, N, 512, 64, cache_dtype, draw=on.normal)
    decode(on, given | {"scale": SOFTMAX_SCALE})


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("seq_lens", [[], [0], [0, 0, 0], [1, 0, 2, 3, 5, 8, 17, 33], [63, 64, 65, 128, 129, 0, 191]])
def test_shuffled_pages(on, rng, seq_lens, page_size, cache_dtype):
    given = random_arguments(rng, seq_lens, page_size, dtype=cache_dtype, draw=on.normal)
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


@pytest.mark.parametrize(("C", "R"), [(16, 8), (300, 4)])
def test_many_runs_of_one_sequence(on, rng, C, R):
    """More than there are warps to join them."""
    decode(on, random_arguments(rng, [3000], 64, 1, C, R, draw=on.normal))


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


TILED = [(64, 16), (512, 64)]  # sizes for which the GPU has tensor-core kernels


@pytest.mark.parametrize(("Q", "N"), [(1, 1), (1, 4), (4, 4), (1, 17), (3, 8), (4, 8), (1, 64), (5, 16), (65, 2)])
@pytest.mark.parametrize("page_size", [3, 16])
def test_rows_that_share_keys(on, rng, Q, N, page_size):
    """Tiles of 16, 32 and 64 rows, several tiles, tiles not full."""
    given = random_arguments(rng, [1, 200, 0, 31, 32, 65, Q], page_size, N, 64, 16, Q=Q, draw=on.normal)
    decode(on, given)


@pytest.mark.parametrize(("Q", "N"), [(1, 16), (2, 16), (1, 64), (2, 64)])
def test_rows_that_share_keys_of_the_model(on, rng, Q, N):
    given = random_arguments(rng, [100, 33] if N < 64 else [97], 64, N, 512, 64, Q=Q, draw=on.normal)
    decode(on, given | {"scale": SOFTMAX_SCALE})


@pytest.mark.parametrize(("C", "R"), TILED)
def test_long_runs(on, rng, C, R):
    """More tiles of keys than are in flight, in one run a sequence and in several."""
    lengths = [1000, 3, 517] if C == 64 else [700]
    decode(on, random_arguments(rng, lengths, 32, 4, C, R, draw=on.normal))
    decode(on, random_arguments(rng, [300, 290, 310, 9, 280], 32, 2, C, R, draw=on.normal))


@pytest.mark.parametrize("N", [8, 32, 64])
def test_more_tiles_in_flight(on, rng, N):
    """As on a GPU with more shared memory than the emulated one."""
    if on.emulated:
        on.extension.configure(*on.order, shared_per_block=160 << 10)
    decode(on, random_arguments(rng, [170], 64, N, 512, 64, draw=on.normal))


@pytest.mark.parametrize(("C", "R"), TILED)
def test_largest_score_moves(on, rng, C, R):
    """The scores rise and fall over the keys by much more than float32's exponent can hold."""
    given = random_arguments(rng, [160, 160], 16, 4, C, R, draw=on.normal)
    given["q"][...] = 1
    token = np.arange(160)
    slope = np.where(token < 100, token, 200 - token) * 4.0 - 200
    for b, sign in enumerate((1, -1)):
        rows = given["cache"][given["page_table"][b, token // 16], token % 16]
        rows[:, C:] = (sign * slope / R)[:, None]
        given["cache"][given["page_table"][b, token // 16], token % 16] = rows
    decode(on, given | {"scale": 1.0})


@pytest.mark.kernels("cpu")
def test_a_score_of_minus_infinity_weighs_nothing(on, rng):
    """In some keys of a run, in all of a run, in all of a sequence."""
    given = random_arguments(rng, [300, 900, 40], 16, 3, 16, 8, Q=2)
    given["q"][..., 16:] = 1
    for b, hidden in enumerate((np.arange(0, 300, 3), np.arange(50, 600), np.arange(40))):
        given["cache"][given["page_table"][b, hidden // 16], hidden % 16, 23] = -np.inf
    out, lse = decode(on, given)
    assert (out[2] == 0).all() and (lse[2] == -np.inf).all() and np.isfinite(lse[:2]).all()


@pytest.mark.kernels("cpu")
def test_runs_of_groups_of_queries(on, rng):
    """More heads of queries than share a row, over several runs of keys and a sequence that ends in the first."""
    decode(on, random_arguments(rng, [700, 3], 64, 17, 512, 64, Q=5))


@pytest.mark.kernels("cpu")
def test_the_widest_rows(on, rng):
    decode(on, random_arguments(rng, [70], 16, 3, 2000, 48))


@pytest.mark.parametrize(("C", "R"), [*TILED, (31, 2)])
def test_nan_reaches_those_who_see_it(on, rng, C, R):
    given = random_arguments(rng, [70, 40], 16, 3, C, R, Q=2, draw=on.normal)
    given["q"][0, 0, 1, 5] = np.nan
    out, lse = on(ops.mla_decode, **given, return_lse=True)
    rows = np.isnan(np.float32(out)).all(axis=-1)
    assert (rows == np.isnan(lse)).all() and np.argwhere(rows).tolist() == [[0, 0, 1]]
    given["q"][0, 0, 1, 5] = 0
    given["cache"][given["page_table"][1, 2], 39 - 32, C:] = np.nan  # the last key's rope part
    out, lse = on(ops.mla_decode, **given, return_lse=True)
    rows = np.isnan(np.float32(out)).all(axis=-1)
    assert (rows == np.isnan(lse)).all() and np.argwhere(rows).tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 2]]
    assert np.isfinite(np.float32(out[~rows])).all()


RUN, KEYS, ROW_LIMIT = 64, 96, np.float32(11000)  # as in cpu/kernels.h
LANE_SUM = np.float32(2**31 - 2**21) / ROW_LIMIT
# How far out may be from the reference that rounds rows and queries to the same integers, as a share of its norm: it
# does not know the blocks of keys in which weights are rounded.
SAME_INTEGERS = 1e-4


def rounded_rows(cache, C):
    """(rows as integers times scales, the scale of the value), in the kernels' own float32 arithmetic."""
    rows, scales = np.zeros(cache.shape), []
    for part in (slice(0, C), slice(C, None)):
        x = np.nan_to_num(np.float32(cache[..., part]))  # what is not used is NaN
        largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
        largest[largest == 0] = 1
        scales.append(largest * (1 / ROW_LIMIT))
        rows[..., part] = np.rint(np.float64(x) * (ROW_LIMIT / largest)) * np.float64(scales[-1])
    return rows, np.float64(scales[0][..., 0])


def rounded_queries(q, C):
    out, width = np.zeros(q.shape), q.shape[3]
    for begin in [*range(0, C, RUN), *range(C, width, RUN)]:
        run = np.s_[..., begin : min(begin + RUN, C if begin < C else width)]
        size = np.abs(q[run])
        even, odd = (np.cumsum(size[..., i::2], axis=-1)[..., -1:] for i in (0, 1))
        total = even + (odd if odd.size else 0)
        scale = np.maximum(total * (1 / LANE_SUM), size.max(axis=-1, keepdims=True) * np.float32(1 / 32767))
        out[run] = np.rint(np.float64(q[run]) * (1 / scale)) * np.float64(scale)
    return out


def check_integers(given, out, lse):
    """Against the reference that rounds alike, over all and by element: with f the weight of a key times the scale of
    its row, no weight of a block moves by more than half of max(sum(f) / LANE_SUM, max(f) / 32767)."""
    C = given["kv_lora_rank"]
    rows, scales = rounded_rows(given["cache"], C)
    alike = given | {"q": rounded_queries(given["q"], C), "cache": rows}
    expected, expected_lse = reference.mla_decode(**alike, return_lse=True)
    score = 1 + np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=0)
    assert_close(lse, expected_lse, reduction=given["q"].shape[3] + given["seq_lens"].max(initial=0), scale=score)
    assert np.linalg.norm(out - expected) <= SAME_INTEGERS * np.linalg.norm(expected)
    for b, length in enumerate(given["seq_lens"]):
        token = np.arange(length)
        page, slot = given["page_table"][b, token // rows.shape[1]], token % rows.shape[1]
        scores = given["scale"] * np.einsum("inc,jc->inj", alike["q"][b], rows[page, slot])
        with np.errstate(invalid="ignore"):
            f = np.exp(scores - expected_lse[b][..., None]) * scales[page, slot]
        f[~np.isfinite(f)] = 0
        most = f.max(axis=-1, initial=0)
        step = np.maximum(np.minimum(f.sum(axis=-1), KEYS * most) / LANE_SUM, most / 32767)
        magnitudes = (np.abs(rows[page, slot, :C]) / scales[page, slot, None]).sum(axis=0)  # of the integers
        bound = step[..., None] / 2 * magnitudes + 1e-5 * score * np.abs(rows[page, slot, :C]).max(initial=0)
        assert (np.abs(out[b] - expected[b]) <= bound).all()


def decode_integers(given):
    out, lse = ops.mla_decode(**given, return_lse=True, activations="int16")
    check_integers(given, out, lse)
    return out, lse


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("seq_lens", [[], [0], [1, 0, 2, 3, 5, 8, 17, 33], [63, 64, 65, 128, 129, 0, 191]])
def test_integers_over_shuffled_pages(on, rng, seq_lens, page_size):
    out, lse = decode_integers(given := random_arguments(rng, seq_lens, page_size))
    empty = given["seq_lens"] == 0
    assert (out[empty] == 0).all() and (lse[empty] == -np.inf).all()


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize(("N", "C", "R"), [(1, 1, 2), (1, 7, 6), (5, 31, 2), (7, 257, 10), (1, 600, 0), (3, 2000, 48)])
def test_integers_of_hostile_shapes(on, rng, N, C, R):
    decode_integers(random_arguments(rng, [1, 19, 70], 3, N, C, R))


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize(
    ("seq_lens", "N", "Q"), [([1], 64, 1), ([700, 3], 17, 5), ([2000], 2, 1), ([70, 1, 300], 5, 4)]
)
def test_integers_of_the_model(on, rng, seq_lens, N, Q):
    """Near the exact result too: by less than a fifth of what rounding the cache to bf16 moves it."""
    N = min(N, 8) if on.isa == "scalar" else N
    exact = random_arguments(rng, seq_lens, 64, N, 512, 64, np.float32, Q) | {"scale": SOFTMAX_SCALE / 3}
    given = exact | {"cache": exact["cache"].astype(BF16)}
    out, _ = decode_integers(given)
    expected = reference.mla_decode(**given)
    moved = np.linalg.norm(expected - reference.mla_decode(**exact))
    assert np.linalg.norm(out - expected) < min(moved / 5, 2e-4 * np.linalg.norm(expected))


@pytest.mark.kernels("cpu")
def test_integers_do_not_overflow(on, rng):
    """Sums as large as they may become: all numbers alike, of both signs, and all weights."""
    given = random_arguments(rng, [96, 300], 16, 3, 512, 64)
    given["q"][0], given["q"][1] = 3.0, -3.0
    given["cache"][...] = -1.7
    out, lse = ops.mla_decode(**given | {"scale": 0.01}, return_lse=True, activations="int16")
    value, lengths = float(given["cache"][0, 0, 0]), given["seq_lens"][:, None, None]
    score = 0.01 * 576 * 3.0 * value * np.array([1, -1])[:, None, None]
    assert np.allclose(out, value, rtol=2e-4) and np.allclose(lse, score + np.log(lengths), rtol=2e-4)
    given["q"][:, :, :, ::2] *= -1
    assert np.allclose(ops.mla_decode(**given, activations="int16"), value, rtol=2e-4)


@pytest.mark.kernels("cpu")
def test_integers_of_parts_of_unlike_size(on, rng):
    """The rope part does not take the value's digits, a key of small numbers none from a large one's; zeros stay."""
    given = random_arguments(rng, [70, 9], 16, 3, 64, 16)
    given["cache"][..., 64:] *= BF16.type(256)
    given["cache"][:, ::3] *= BF16.type(2.0**-12)
    given["cache"][:, 1] = 0
    given["q"][..., 64:] /= 256
    given["q"][..., :20] *= 100
    decode_integers(given)


@pytest.mark.kernels("cpu")
def test_integers_where_the_largest_score_moves(on, rng):
    given = random_arguments(rng, [160, 160], 16, 4, 64, 16)
    given["q"][...] = 1
    token = np.arange(160)
    for b, sign in enumerate((1, -1)):
        at = given["page_table"][b, token // 16], token % 16
        rows = given["cache"][at]
        rows[:, 64:] = (sign * (np.where(token < 100, token, 200 - token) * 4.0 - 200) / 16)[:, None]
        given["cache"][at] = rows
    decode_integers(given | {"scale": 1.0})


@pytest.mark.kernels("cpu")
def test_integers_of_pages_and_batch_do_not_change_a_sequence(on, rng):
    given = random_arguments(rng, [37, 200, 90], 64)
    whole, token = ops.mla_decode(**given, activations="int16"), np.arange(200)
    rows = given["cache"][given["page_table"][1, token // 64], token % 64]
    for page_size in (1, 8, 200):
        alone = {
            "q": given["q"][1:2],
            "cache": rows.reshape(-1, page_size, 24),
            "page_table": np.arange(200 // page_size, dtype=np.int32)[None],
            "seq_lens": given["seq_lens"][1:2],
        }
        assert same_bits(ops.mla_decode(**given | alone, activations="int16")[0], whole[1])


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [5, 70])
def test_what_is_not_finite_reaches_those_who_see_it_in_integers(on, rng, bad, column):
    given = random_arguments(rng, [70, 40], 16, 3, 64, 16, Q=2)
    given["q"][0, 0, 1, column] = bad
    out, lse = ops.mla_decode(**given, return_lse=True, activations="int16")
    rows = np.isnan(out).all(axis=-1)
    assert (rows == np.isnan(lse)).all() and np.argwhere(rows).tolist() == [[0, 0, 1]] and np.isfinite(out[~rows]).all()
    given["q"][0, 0, 1, column] = 0
    given["cache"][given["page_table"][1, 2], 39 - 32, max(column, 64)] = bad  # the last key's rope part
    out, lse = ops.mla_decode(**given, return_lse=True, activations="int16")
    rows = np.isnan(out).all(axis=-1)
    assert (rows == np.isnan(lse)).all() and np.argwhere(rows).tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 2]]
    assert np.isfinite(out[~rows]).all()


def test_rejects_activations(rng):
    given = random_arguments(rng, [5, 40], 3)
    with pytest.raises(ValueError, match="mla_decode: activations is 'int8', expected one of: float32, int16"):
        ops.mla_decode(**given, activations="int8")
    given["cache"] = given["cache"].astype(np.float32)
    with pytest.raises(TypeError, match="mla_decode: activations are integers, which are for a bfloat16 cache"):
        ops.mla_decode(**given, activations="int16")


@pytest.mark.kernels("gpu")
def test_integers_are_for_the_cpu(on, rng):
    given = random_arguments(rng, [5, 40], 3, draw=on.normal)
    with pytest.raises(ValueError, match="mla_decode: activations are integers, which are for the CPU"):
        on(ops.mla_decode, **given, activations="int16")


@pytest.mark.kernels("gpu")  # the CPU refuses them
@pytest.mark.parametrize("bad", [-1, 2**31 - 1, -(2**31), 10**6, "pages"])
@pytest.mark.parametrize(("C", "R"), [*TILED, (31, 2)])
def test_pages_outside_the_cache_give_nan_on_the_gpu(on, rng, C, R, bad):
    """To the queries that see them, in a run of their own or not."""
    given = random_arguments(rng, [70, 33, 300], 16, 3, C, R, Q=2, draw=on.normal)
    expected = reference.mla_decode(**given)
    bad = len(given["cache"]) if bad == "pages" else bad
    given["page_table"][1, 2] = bad  # its one token is seen by the last query alone
    given["page_table"][2, 7] = bad
    out, lse = on(ops.mla_decode, **given, return_lse=True)
    hit = np.zeros((3, 2), bool)
    hit[1, 1] = hit[2] = True
    assert np.isnan(np.float32(out[hit])).all() and np.isnan(lse[hit]).all()
    assert_close(out[~hit], expected[~hit], "bfloat16", reduction=400, scale=2.0**15, roundings=2)
    assert np.isfinite(lse[~hit]).all()


@pytest.mark.kernels("gpu")  # the CPU refuses them
@pytest.mark.parametrize(("C", "R"), [*TILED, (31, 2)])
def test_lengths_past_the_table_give_nan_on_the_gpu(on, rng, C, R):
    given = random_arguments(rng, [40] * 5, 8, 3, C, R, draw=on.normal)
    expected = reference.mla_decode(**given)
    given["page_table"][:, 5:] = given["page_table"][:, :2]  # nothing but the length is wrong
    given["seq_lens"][:] = [-1, 40, 57, 2**31 - 1, -(2**31)]
    assert given["page_table"].shape[1] * 8 == 56
    out, lse = on(ops.mla_decode, **given, return_lse=True)
    assert np.isnan(np.float32(out[[0, 2, 3, 4]])).all() and np.isnan(lse[[0, 2, 3, 4]]).all()
    assert_close(out[1], expected[1], "bfloat16", reduction=400, scale=2.0**15, roundings=2)


@pytest.mark.parametrize(("C", "R"), TILED)
def test_arrays_between_16_bytes(on, rng, C, R):
    given = random_arguments(rng, [70], 16, 3, C, R, draw=on.normal)
    for name in ("q", "cache"):
        shifted = np.empty(given[name].size + 1, given[name].dtype)[1:].reshape(given[name].shape)
        shifted[...] = given[name]
        decode(on, given | {name: shifted})


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


def test_rejects_wider_rows(rng):
    with pytest.raises(ValueError, match=r"^mla_decode: cache has C \+ R = 2049, expected at most 2048"):
        ops.mla_decode(**random_arguments(rng, [2], 1, 1, 2000, 49))


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
