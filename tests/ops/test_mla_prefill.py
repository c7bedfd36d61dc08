"""mla_prefill: ragged causal attention over expanded keys and values."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops

SOFTMAX_SCALE = 0.14467962580268923


def i32(*values):
    return np.array(values, np.int32)


def random_arguments(rng, lengths_q, lengths_k, N=2, dn=16, R=8, dv=12, offsets=None):
    """Sequences of these lengths; offsets default to queries that are the last ones of their keys."""
    cu_q, cu_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    return {
        "q": normal(rng, cu_q[-1], N, dn + R),
        "kv": normal(rng, cu_k[-1], N, dn + dv),
        "k_pe": normal(rng, cu_k[-1], R),
        "cu_seqlens_q": i32(*cu_q),
        "cu_seqlens_k": i32(*cu_k),
        "causal_offsets": i32(*(np.subtract(lengths_k, lengths_q) if offsets is None else offsets)),
        "scale": 3.0 * (dn + R) ** -0.5,
    }


def check(given, out, lse):
    expected, expected_lse = reference.mla_prefill(**given, return_lse=True)
    # an error d of a score multiplies its weight by exp(d): errors of scores scale with the scores
    width, keys = given["q"].shape[2], given["kv"].shape[0]
    score = 1 + np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=0)
    reach = score * np.abs(given["kv"]).max(initial=0)
    assert_close(lse, expected_lse, reduction=width + keys, scale=score)
    assert_close(out, expected, reduction=width + keys, scale=reach)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (33, 33), (5, 70)])
def test_model_shapes(isa, rng, T, S):
    given = random_arguments(rng, [T], [S], N=8 if isa == "scalar" else 64, dn=128, R=64, dv=128)
    given["scale"] = SOFTMAX_SCALE
    check(given, *ops.mla_prefill(**given, return_lse=True))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("N", "dn", "R", "dv"), [(1, 1, 2, 1), (3, 7, 6, 31), (2, 31, 2, 7), (1, 5, 10, 257)])
def test_hostile_shapes(isa, rng, T, N, dn, R, dv):
    given = random_arguments(rng, [T], [T], N, dn, R, dv)
    check(given, *ops.mla_prefill(**given, return_lse=True))


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
def test_ragged_batches(isa, rng, lengths_q, lengths_k, offsets):
    given = random_arguments(rng, lengths_q, lengths_k, offsets=offsets)
    out, lse = ops.mla_prefill(**given, return_lse=True)
    check(given, out, lse)
    blind = ~np.isfinite(lse)
    assert (out[blind] == 0).all() and (lse[blind] == -np.inf).all()


def test_long_context(isa, rng):
    given = random_arguments(rng, [3, 130], [1500, 700])
    check(given, *ops.mla_prefill(**given, return_lse=True))


def test_out_alone(isa, rng):
    given = random_arguments(rng, [4, 3], [4, 9])
    assert same_bits(ops.mla_prefill(**given), ops.mla_prefill(**given, return_lse=True)[0])


@pytest.mark.parametrize("chunks", [[40], [1, 39], [13, 13, 14], [40, 0], [0, 40], [7] * 5 + [5]])
def test_chunks_of_keys_by_state(isa, rng, chunks):
    """Softmax over the union, updated in place; early queries see nothing of the late chunks."""
    given = random_arguments(rng, [33, 9], [40, 40])
    state, first = None, 0
    for size in chunks:
        keys = np.r_[first : first + size, 40 + first : 40 + first + size]
        part = given | {
            "kv": given["kv"][keys],
            "k_pe": given["k_pe"][keys],
            "cu_seqlens_k": i32(0, size, 2 * size),
        }
        part["causal_offsets"] = given["causal_offsets"] - np.int32(first)
        out, lse = ops.mla_prefill(**part, state=state, return_lse=True)
        assert state is None or (out is state[0] and lse is state[1])
        state, first = (out, lse), first + size
    check(given, *state)


def test_state_against_the_reference(isa, rng):
    given, more = random_arguments(rng, [6], [6]), random_arguments(rng, [6], [9], offsets=[9])
    before = ops.mla_prefill(**given, return_lse=True)
    joined = more | {"q": given["q"]}
    expected = reference.mla_prefill(**joined, state=before, return_lse=True)
    out, lse = ops.mla_prefill(**joined, state=before, return_lse=True)
    assert_close(lse, expected[1], reduction=40)
    assert_close(out, expected[0], reduction=40, scale=np.abs(given["kv"]).max() * (1 + np.abs(expected[1]).max()))


def test_queries_split_over_calls(isa, rng):
    """Chunked prefill: the later queries of a prompt with all keys so far give the rows of one long call."""
    given = random_arguments(rng, [21], [21])
    whole = ops.mla_prefill(**given)
    late = given | {"q": given["q"][8:], "cu_seqlens_q": i32(0, 13), "causal_offsets": i32(8)}
    assert_close(ops.mla_prefill(**late), np.float64(whole[8:]), reduction=40, scale=4 * np.abs(given["kv"]).max())


def test_huge_scores_do_not_overflow(isa, rng):
    """Integers and a scale that is a power of two: scores up to 2^16, exact in float32."""
    given = random_arguments(rng, [17], [17])
    for name in ("q", "kv", "k_pe"):
        given[name] = rng.integers(-4, 5, given[name].shape).astype(np.float32)
    for scale in (256.0, -256.0, 2.0**-20):
        given["scale"] = scale
        check(given, *ops.mla_prefill(**given, return_lse=True))


def test_strided_inputs(isa, rng):
    given = random_arguments(rng, [4, 3], [4, 9])
    expected = ops.mla_prefill(**given)
    apart = {name: strided(given[name]) for name in ("q", "kv", "k_pe")}
    assert same_bits(ops.mla_prefill(**given | apart), expected)


def test_sequences_do_not_see_each_other(isa, rng):
    given = random_arguments(rng, [4, 3, 5], [4, 9, 5])
    expected = ops.mla_prefill(**given)
    given["kv"][4:13], given["k_pe"][4:13], given["q"][4:7] = np.nan, np.nan, np.nan
    out = ops.mla_prefill(**given)
    others = np.r_[0:4, 7:12]
    assert same_bits(out[others], expected[others]) and np.isnan(out[4:7]).all()


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
