"""mla_prefill: ragged causal attention over expanded keys and values."""

import numpy as np
import pytest
import reference
from arrays import BF16, FAULTS, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops

SOFTMAX_SCALE = 0.14467962580268923


def i32(*values):
    return np.array(values, np.int32)


def random_arguments(rng, lengths_q, lengths_k, N=2, dn=16, R=8, dv=12, offsets=None, draw=normal):
    """Sequences of these lengths; offsets default to queries that are the last ones of their keys."""
    cu_q, cu_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    return {
        "q": draw(rng, cu_q[-1], N, dn + R),
        "kv": draw(rng, cu_k[-1], N, dn + dv),
        "k_pe": draw(rng, cu_k[-1], R),
        "cu_seqlens_q": i32(*cu_q),
        "cu_seqlens_k": i32(*cu_k),
        "causal_offsets": i32(*(np.subtract(lengths_k, lengths_q) if offsets is None else offsets)),
        "scale": 3.0 * (dn + R) ** -0.5,
    }


def check(on, given, out, lse, calls=1):
    """bf16 roundings behind an element of out: of the weights, where tensor cores multiply them, and of the results of
    so many calls."""
    expected, expected_lse = reference.mla_prefill(**given, return_lse=True)
    # an error d of a score multiplies its weight by exp(d): errors of scores scale with the scores
    width, keys = given["q"].shape[2], given["kv"].shape[0]
    score = 1 + np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=0)
    reach = score * np.abs(given["kv"]).max(initial=0).astype(np.float64)
    assert_close(lse, expected_lse, reduction=width + keys, scale=score)
    if on.cuda:  # each rounding but the last moves out by 2^-8 of the weighted magnitude of the values at most
        magnitude = reference.mla_prefill(**given | {"kv": magnitudes(given)})
        reach = reach + calls * magnitude * 2.0**15 / (4 + np.sqrt(width + keys))
    assert_close(
        out, expected, on.dtype.name, reduction=width + keys, scale=reach, roundings=1 + calls if on.cuda else 1
    )


def magnitudes(given):
    """kv with the absolute values."""
    dn = given["q"].shape[2] - given["k_pe"].shape[1]
    return np.concatenate([given["kv"][..., :dn], np.abs(given["kv"][..., dn:])], axis=-1)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (33, 33), (5, 70)])
def test_model_shapes(on, rng, T, S):
    N = 3 if on.emulated else 8 if on.isa == "scalar" else 64
    given = model_arguments(on, rng, [T], [S], N)
    check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def model_arguments(on, rng, lengths_q, lengths_k, N=1, offsets=None):
    """Head sizes and scale of the model."""
    given = random_arguments(rng, lengths_q, lengths_k, N, 128, 64, 128, offsets, on.normal)
    return given | {"scale": SOFTMAX_SCALE}


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "offsets"),
    [
        ([200, 0, 1, 70], [300, 5, 65, 64], None),
        ([130, 3], [190, 0], [31, 0]),
        ([129], [129], [-40]),
        ([40, 40], [80, 80], [2**31 - 1, -(2**31)]),
    ],
)
def test_model_heads_over_many_tiles(on, rng, lengths_q, lengths_k, offsets):
    given = model_arguments(on, rng, lengths_q, lengths_k, 2 if len(lengths_q) == 2 else 1, offsets)
    out, lse = on(ops.mla_prefill, **given, return_lse=True)
    check(on, given, out, lse)
    assert (out[~np.isfinite(lse)] == 0).all()


@pytest.mark.parametrize(("T", "S", "tiles"), [(128, 128, 1 + 1 + 2 + 2), (20, 128, 2), (1, 65, 2)])
def test_model_heads_run_on_tensor_cores(on, rng, T, S, tiles):
    """Products of 16 x 8 x 16 for a warp's 32 rows: 320 a tile of 64 keys that it sees any of, and no bank conflict."""
    if not on.emulated:
        return
    given = model_arguments(on, rng, [T], [S])
    before = np.array(on.extension.counters())
    on(ops.mla_prefill, **given)
    mma, ldmatrix, conflicts = np.array(on.extension.counters()) - before
    assert mma / 320 == tiles and ldmatrix == 104 * tiles and conflicts == 0


def test_model_heads_without_keys(on, rng):
    """Nothing but q is loaded, to where the results are put in order. Many heads: q has to be late in one of them."""
    out = on(ops.mla_prefill, **model_arguments(on, rng, [128], [0], N=12))
    assert (out == 0).all()


def test_many_sequences(on, rng):
    """More than a warp counts at once."""
    lengths = rng.integers(0, 3, 71)
    given = random_arguments(rng, lengths, lengths + 1, 1, 4, 2, 4, draw=on.normal)
    check(on, given, *on(ops.mla_prefill, **given, return_lse=True))
    if not on.emulated or on.order[0] == 0:
        given = model_arguments(on, rng, lengths, lengths + 1)
        check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def test_model_heads_largest_score_grows(on, rng):
    """Each tile of keys has larger scores than the one before, then none: what is summed is scaled down."""
    given = model_arguments(on, rng, [33], [330], offsets=[400])
    given["q"][...], given["k_pe"][...] = np.abs(given["q"]), 0
    level = np.r_[np.arange(250) / 1000, np.zeros(80)]
    given["kv"][:, :, :128] = (level[:, None, None] * np.abs(given["kv"][:, :, :128])).astype(on.dtype)
    check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def test_model_heads_huge_and_other_scales(on, rng):
    given = model_arguments(on, rng, [20], [70])
    for name in ("q", "kv", "k_pe"):
        given[name] = rng.integers(-4, 5, given[name].shape).astype(on.dtype)
    for scale in (256.0, -0.125, 0.0, 2.0**-20):
        given["scale"] = scale
        check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def test_model_heads_strided(on, rng):
    """Rows 16 bytes aligned, as a cache row's rope part is; what lies between them is NaN."""
    given = model_arguments(on, rng, [40, 3], [70, 9], N=2)
    expected = on(ops.mla_prefill, **given)
    apart = {}
    for name in ("q", "kv", "k_pe"):
        wide = np.full([n + 8 for n in given[name].shape], np.nan, on.dtype)
        apart[name] = wide[tuple(slice(8, None) for _ in wide.shape)]
        apart[name][...] = given[name]
    assert same_bits(on(ops.mla_prefill, **given | apart), expected)


def test_model_heads_unaligned(on, rng):
    given = model_arguments(on, rng, [40, 3], [70, 9], N=2)
    for name in ("q", "kv", "k_pe"):
        apart = given | {name: strided(given[name])}
        check(on, given, *on(ops.mla_prefill, **apart, return_lse=True))


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
def test_sequences_do_not_see_each_other(on, rng, dims):
    given = random_arguments(rng, [4, 3, 5], [4, 70, 5], 2, *dims, draw=on.normal)
    expected = on(ops.mla_prefill, **given)
    given["kv"][4:74], given["k_pe"][4:74], given["q"][4:7] = np.nan, np.nan, np.nan
    out = on(ops.mla_prefill, **given)
    others = np.r_[0:4, 7:12]
    assert same_bits(out[others], expected[others]) and np.isnan(out[4:7].astype(np.float32)).all()


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
def test_state_of_no_keys_is_not_read(on, rng, dims):
    given = random_arguments(rng, [70], [70], 1, *dims, offsets=[-3], draw=on.normal)
    expected = on(ops.mla_prefill, **given, return_lse=True)
    state = poison(70, 1, dims[2], dtype=on.dtype), np.full((70, 1), -np.inf, np.float32)
    on(ops.mla_prefill, **given, state=state)
    assert same_bits(state[0], expected[0]) and same_bits(state[1], expected[1])


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
def test_state_stays_where_no_key_is_seen(on, rng, dims):
    given = random_arguments(rng, [70], [70], 1, *dims, draw=on.normal)
    state = on(ops.mla_prefill, **given, return_lse=True)
    before = state[0].copy(), state[1].copy()
    on(ops.mla_prefill, **given | {"causal_offsets": i32(-70)}, state=state)
    assert same_bits(state[0], before[0]) and same_bits(state[1], before[1])


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
def test_lengths_that_do_not_fit_on_the_gpu(on, rng, dims):
    """Not checked there: keys that do not exist give NaN, queries that do not exist nothing, and no other memory is
    touched."""
    if not on.cuda:
        return
    given = random_arguments(rng, [4, 3, 5], [4, 9, 5], 2, *dims, draw=on.normal)
    expected, _ = on(ops.mla_prefill, **given, return_lse=True)
    bad_keys = given | {"cu_seqlens_k": i32(0, 4, 19, 18)}  # 19 of 18, then a negative length
    for state in (None, (expected.copy(), np.zeros((12, 2), np.float32))):
        out, lse = on(ops.mla_prefill, **bad_keys, state=state, return_lse=True)
        assert np.isnan(out[4:].astype(np.float32)).all() and np.isnan(lse[4:]).all()
        assert state is not None or same_bits(out[:4], expected[:4])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):  # a first sequence that begins before the array
        state = poison(12, 2, dims[2], dtype=on.dtype), np.full((12, 2), -np.inf, np.float32)
        out, _ = on(ops.mla_prefill, **given | {name: given[name] - i32(3, 0, 0, 0)}, state=state, return_lse=True)
        assert np.isnan(out[:4].astype(np.float32)).all() and same_bits(out[4:], expected[4:])
    for cu in (i32(0, 4, 13, 12), i32(0, 4, 2, -1), i32(2**31 - 1, -(2**31), 2**30, 12), i32(0, 4, -1, 2**31 - 1)):
        state = poison(12, 2, dims[2], dtype=on.dtype), np.full((12, 2), -np.inf, np.float32)
        out, lse = on(ops.mla_prefill, **given | {"cu_seqlens_q": cu}, state=state, return_lse=True)
        written = 4 if cu[1] == 4 else 0
        assert same_bits(out[:written], expected[:written])
        assert np.isnan(out[written:].astype(np.float32)).all() and (lse[written:] == -np.inf).all()


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("N", "dn", "R", "dv"), [(1, 1, 2, 1), (3, 7, 6, 31), (2, 31, 2, 7), (1, 5, 10, 257)])
def test_hostile_shapes(on, rng, T, N, dn, R, dv):
    given = random_arguments(rng, [T], [T], N, dn, R, dv, draw=on.normal)
    check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "offsets"),
    [
        ([4, 0, 7, 1, 0], [4, 0, 9, 30, 5], None),
        ([0, 0], [0, 0], None),
        ([], [], None),
        ([3, 5], [0, 5], [0, 0]),
        ([6, 4, 3], [4, 8, 2], [-3, -10, 1000]),
        ([5, 5], [9, 9], [-1, 8]),
        ([2, 2], [3, 3], [2**31 - 1, -(2**31)]),
    ],
)
def test_ragged_batches(on, rng, lengths_q, lengths_k, offsets):
    given = random_arguments(rng, lengths_q, lengths_k, offsets=offsets, draw=on.normal)
    out, lse = on(ops.mla_prefill, **given, return_lse=True)
    check(on, given, out, lse)
    blind = ~np.isfinite(lse)
    assert (out[blind] == 0).all() and (lse[blind] == -np.inf).all()


def test_long_context(on, rng):
    lengths = ([3, 20], [300, 140]) if on.emulated else ([3, 130], [1500, 700])
    given = random_arguments(rng, *lengths, draw=on.normal)
    check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def test_out_alone(on, rng):
    given = random_arguments(rng, [4, 3], [4, 9], draw=on.normal)
    assert same_bits(on(ops.mla_prefill, **given), on(ops.mla_prefill, **given, return_lse=True)[0])


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
@pytest.mark.parametrize("chunks", [[40], [1, 39], [13, 13, 14], [40, 0], [0, 40], [7] * 5 + [5]])
def test_chunks_of_keys_by_state(on, rng, chunks, dims):
    """Softmax over the union, updated in place; early queries see nothing of the late chunks."""
    given = random_arguments(rng, [33, 9], [40, 40], 1, *dims, draw=on.normal)
    state, first = None, 0
    for size in chunks:
        keys = np.r_[first : first + size, 40 + first : 40 + first + size]
        part = given | {
            "kv": given["kv"][keys],
            "k_pe": given["k_pe"][keys],
            "cu_seqlens_k": i32(0, size, 2 * size),
        }
        part["causal_offsets"] = given["causal_offsets"] - np.int32(first)
        out, lse = on(ops.mla_prefill, **part, state=state, return_lse=True)
        assert state is None or (out is state[0] and lse is state[1])
        state, first = (out, lse), first + size
    check(on, given, *state, calls=len(chunks))


def test_state_against_the_reference(on, rng):
    given = random_arguments(rng, [6], [6], draw=on.normal)
    more = random_arguments(rng, [6], [9], offsets=[9], draw=on.normal) | {"q": given["q"]}
    before = on(ops.mla_prefill, **given, return_lse=True)
    expected, expected_lse = reference.mla_prefill(**more, state=before, return_lse=True)
    out, lse = on(ops.mla_prefill, **more, state=before, return_lse=True)
    score = 1 + np.abs(expected_lse).max()
    assert_close(lse, expected_lse, reduction=40, scale=score)
    reach = np.abs(given["kv"]).max().astype(np.float64) * score
    assert_close(out, expected, on.dtype.name, reduction=40, scale=reach)


def test_queries_split_over_calls(on, rng):
    """Chunked prefill: the later queries of a prompt with all keys so far give the rows of one long call."""
    given = random_arguments(rng, [21], [21], draw=on.normal)
    late = given | {"q": given["q"][8:], "cu_seqlens_q": i32(0, 13), "causal_offsets": i32(8)}
    whole, part = on(ops.mla_prefill, **given), on(ops.mla_prefill, **late)
    reach = 4 * np.abs(given["kv"]).max().astype(np.float64)
    assert_close(part, np.float64(whole[8:]), on.dtype.name, reduction=40, scale=reach)


def test_huge_scores_do_not_overflow(on, rng):
    """Integers and a scale that is a power of two: scores up to 2^16, exact in float32."""
    given = random_arguments(rng, [17], [17], draw=on.normal)
    for name in ("q", "kv", "k_pe"):
        given[name] = rng.integers(-4, 5, given[name].shape).astype(on.dtype)
    for scale in (256.0, -256.0, 2.0**-20):
        given["scale"] = scale
        check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def test_strided_inputs(on, rng):
    given = random_arguments(rng, [4, 3], [4, 9], draw=on.normal)
    expected = on(ops.mla_prefill, **given)
    apart = {name: strided(given[name]) for name in ("q", "kv", "k_pe")}
    assert same_bits(on(ops.mla_prefill, **given | apart), expected)


def check_max_logits(given, max_logits):
    expected = np.zeros(max_logits.shape)
    reference.mla_prefill(**given, max_logits=expected)
    q, k, k_pe = (np.abs(given[name]).max(initial=0).astype(np.float64) for name in ("q", "kv", "k_pe"))
    width = given["q"].shape[2]
    assert_close(max_logits, expected, reduction=width, scale=abs(given["scale"]) * np.sqrt(width) * q * max(k, k_pe))


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "offsets", "scale"),
    [
        ([4, 0, 37, 1], [4, 0, 90, 30], None, 0.3),
        ([6, 40, 3], [4, 8, 2], [-3, -10, 1000], 0.3),
        ([2, 20], [3, 70], [-(2**31), 2**31 - 1], 256.0),
        ([20], [70], None, -0.125),
        ([20], [70], None, 0.0),
        ([0], [0], None, 0.3),
    ],
)
def test_max_logits(on, rng, dims, lengths_q, lengths_k, offsets, scale):
    """The rest is the same to the bit with them and without."""
    given = random_arguments(rng, lengths_q, lengths_k, 2, *dims, offsets, on.normal) | {"scale": scale}
    max_logits = poison(sum(lengths_q), 2)
    out, lse = on(ops.mla_prefill, **given, return_lse=True, max_logits=max_logits)
    check_max_logits(given, max_logits)
    expected, expected_lse = on(ops.mla_prefill, **given, return_lse=True)
    assert same_bits(out, expected) and same_bits(lse, expected_lse)


def test_max_logits_of_wide_values(on, rng):
    """Columns of values that the plain CUDA kernel takes in several passes."""
    given, max_logits = random_arguments(rng, [7], [9], 1, 6, 2, 1100, draw=on.normal), poison(7, 1)
    on(ops.mla_prefill, **given, max_logits=max_logits)
    check_max_logits(given, max_logits)


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
@pytest.mark.parametrize("chunks", [[1, 39], [13, 13, 14], [40, 0], [0, 40]])
def test_max_logits_by_state(on, rng, chunks, dims):
    given = random_arguments(rng, [33, 9], [40, 40], 1, *dims, draw=on.normal)
    max_logits, state, first = poison(42, 1), None, 0
    for size in chunks:
        keys = np.r_[first : first + size, 40 + first : 40 + first + size]
        part = given | {"kv": given["kv"][keys], "k_pe": given["k_pe"][keys], "cu_seqlens_k": i32(0, size, 2 * size)}
        part["causal_offsets"] = given["causal_offsets"] - np.int32(first)
        state = on(ops.mla_prefill, **part, state=state, return_lse=True, max_logits=max_logits)
        first += size
    check_max_logits(given, max_logits)
    check(on, given, *state, calls=len(chunks))


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
def test_max_logits_stay_where_no_score_is_larger(on, rng, dims):
    """Of later keys: no query sees one, then all have small scores."""
    given, max_logits = random_arguments(rng, [40], [70], 2, *dims, draw=on.normal), poison(40, 2)
    state = on(ops.mla_prefill, **given, return_lse=True, max_logits=max_logits)
    before = max_logits.copy(), state[0].copy(), state[1].copy()
    on(ops.mla_prefill, **given | {"causal_offsets": i32(-40)}, state=state, max_logits=max_logits)
    for got, expected in zip((max_logits, *state), before, strict=True):
        assert same_bits(got, expected)
    max_logits += 1000
    on(ops.mla_prefill, **given, state=(state[0], state[1] + np.float32(1000)), max_logits=max_logits)
    assert same_bits(max_logits, before[0] + np.float32(1000))


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_max_logits_show_what_is_not_finite(on, rng, bad, dims):
    """A query, and the queries that see a key; also when that was in an earlier call."""
    given = random_arguments(rng, [40], [70], 2, *dims, draw=on.normal)
    max_logits, expected = poison(40, 2), poison(40, 2)
    given["q"][...] = np.abs(given["q"])  # +inf times these is +inf
    on(ops.mla_prefill, **given, max_logits=expected)
    spoiled = given | {"q": given["q"].copy(), "kv": given["kv"].copy()}
    spoiled["q"][3, 1, 2], spoiled["kv"][50, 0, 5] = np.nan, bad
    state = on(ops.mla_prefill, **spoiled, return_lse=True, max_logits=max_logits)
    finite = np.ones((40, 2), bool)
    finite[3, 1] = finite[20:, 0] = False
    assert np.isnan(max_logits[~finite]).all() and same_bits(max_logits[finite], expected[finite])
    on(ops.mla_prefill, **given, state=state, max_logits=max_logits)
    assert np.isnan(max_logits[~finite]).all()


@pytest.mark.parametrize("dims", [(16, 8, 12), (128, 64, 128)])
def test_max_logits_of_keys_that_do_not_exist(on, rng, dims):
    if not on.cuda:
        return
    given, max_logits = random_arguments(rng, [4, 3], [4, 9], 2, *dims, draw=on.normal), poison(7, 2)
    on(ops.mla_prefill, **given, max_logits=max_logits)
    expected = max_logits.copy()
    on(ops.mla_prefill, **given | {"cu_seqlens_k": i32(0, 4, 14)}, max_logits=max_logits)
    assert same_bits(max_logits[:4], expected[:4]) and np.isnan(max_logits[4:]).all()


@pytest.mark.kernels("cpu")
def test_the_widest_heads(on, rng):
    given = random_arguments(rng, [40], [100], 1, 1000, 48, 1000)
    check(on, given, *on(ops.mla_prefill, **given, return_lse=True))


def test_rejects_wider_heads(rng):
    with pytest.raises(ValueError, match=r"^mla_prefill: q and kv have Dn \+ R \+ Dv = 2049, expected at most 2048"):
        ops.mla_prefill(**random_arguments(rng, [2], [2], 1, 1000, 48, 1001))


def test_rejects(rng):
    op, given = ops.mla_prefill, random_arguments(rng, [4, 3], [4, 9])
    for argument in given.keys() - {"scale"}:
        assert_rejects_faults(op, given, argument)
    assert_rejects(op, given, "q", normal(rng, 7, 2, 7), ValueError)  # narrower than k_pe
    for shape in ((13, 3, 28), (13, 2, 15)):
        assert_rejects(op, given, "kv", normal(rng, *shape), ValueError)
    for shape in ((12, 8), (13, 25)):
        assert_rejects(op, given, "k_pe", normal(rng, *shape), ValueError)
    assert_rejects(op, given, "q", given["q"].astype(BF16), TypeError)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("cu_seqlens_q", i32(0, 4, 8)),
        ("cu_seqlens_q", i32(0, 4, 6)),
        ("cu_seqlens_q", i32(1, 4, 7)),
        ("cu_seqlens_q", i32(0, 8, 7)),
        ("cu_seqlens_q", i32(0, -1, 7)),
        ("cu_seqlens_q", i32()),
        ("cu_seqlens_k", i32(0, 4, 14)),
        ("cu_seqlens_k", i32(0, 4, 12)),
        ("cu_seqlens_k", i32(0, 14, 13)),
        ("cu_seqlens_k", i32(-1, 4, 13)),
        ("cu_seqlens_k", i32(0, 4, 9, 13)),
    ],
)
def test_rejects_lengths(rng, argument, bad):
    assert_rejects(ops.mla_prefill, random_arguments(rng, [4, 3], [4, 9]), argument, bad, ValueError)


def test_rejects_another_number_of_sequences(rng):
    given = random_arguments(rng, [4, 3], [4, 9])
    for bad in (i32(0), i32(0, 6, 0)):
        with pytest.raises(ValueError, match=r"^mla_prefill: (cu_seqlens_q|causal_offsets) has shape"):
            ops.mla_prefill(**given | {"causal_offsets": bad})


def test_rejects_max_logits(rng):
    given = random_arguments(rng, [4, 3], [4, 9]) | {"max_logits": np.zeros((7, 2), np.float32)}
    for fault in FAULTS.keys() - {"None"}:
        make_bad, error = FAULTS[fault]
        assert_rejects(ops.mla_prefill, given, "max_logits", make_bad(given["max_logits"]), error)
    for bad in (poison(6, 2), poison(7, 3), read_only(poison(7, 2)), strided(poison(7, 2))):
        assert_rejects(ops.mla_prefill, given, "max_logits", bad, ValueError)


def test_rejects_state(rng):
    given = random_arguments(rng, [4, 3], [4, 9])
    out, lse = ops.mla_prefill(**given, return_lse=True)
    for bad in (
        (out[:6], lse),
        (out, lse[:6]),
        (out, lse[:, :1]),
        (read_only(out), lse),
        (out, read_only(lse)),
    ):
        with pytest.raises(ValueError, match="^mla_prefill: .*(state|out|lse)"):
            ops.mla_prefill(**given, state=bad)
    for bad in ((out.astype(np.float64), lse), (out, lse.tolist())):
        with pytest.raises(TypeError, match="^mla_prefill: .*(state|out|lse)"):
            ops.mla_prefill(**given, state=bad)
