"""mla_prefill_backward: the gradients of ragged causal attention."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, same_bits, strided
from close import DISSIMILARITY, assert_close
from kimi_native import ops


def i32(*values):
    return np.array(values, np.int32)


def random_arguments(rng, lengths_q, lengths_k, N=2, dn=16, R=8, dv=12, offsets=None, scale=3.0):
    """Sequences of these lengths; offsets default to queries that are the last ones of their keys. out and lse are the
    oracle's, rounded."""
    cu_q, cu_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    given = {
        "q": normal(rng, cu_q[-1], N, dn + R),
        "kv": normal(rng, cu_k[-1], N, dn + dv),
        "k_pe": normal(rng, cu_k[-1], R),
        "cu_seqlens_q": i32(*cu_q),
        "cu_seqlens_k": i32(*cu_k),
        "causal_offsets": i32(*(np.subtract(lengths_k, lengths_q) if offsets is None else offsets)),
        "scale": scale * (dn + R) ** -0.5,
    }
    return completed(given) | {"dout": normal(rng, cu_q[-1], N, dv)}


def completed(given):
    out, lse = reference.mla_prefill(**given, return_lse=True)
    return given | {"out": np.float32(out), "lse": np.float32(lse)}


def reach(given):
    """Errors of scores and of lse grow with these, and one of e makes one of e of a weight."""
    return 1 + np.abs(given["lse"][np.isfinite(given["lse"])]).max(initial=0).astype(np.float64)


def magnitudes(given):
    """What the partial sums of dq, dkv and dk_pe reach: the oracle of absolute values, with the true weights times
    reach."""
    q, kv, k_pe, dout, out = (np.abs(np.float64(given[name])) for name in ("q", "kv", "k_pe", "dout", "out"))
    dn = q.shape[2] - k_pe.shape[1]
    dq, dkv, dk_pe = np.zeros(q.shape), np.zeros(kv.shape), np.zeros(k_pe.shape)
    for b, offset in enumerate(given["causal_offsets"]):
        rows = slice(*given["cu_seqlens_q"][b : b + 2])
        keys = slice(*given["cu_seqlens_k"][b : b + 2])
        full = np.concatenate([kv[keys, :, :dn], np.repeat(k_pe[keys, None], q.shape[1], axis=1)], axis=2)
        signed = np.float64(given["q"][rows]), np.float64(given["kv"][keys, :, :dn]), np.float64(given["k_pe"][keys])
        score = np.einsum("ind,jnd->inj", signed[0][..., :dn], signed[1])
        score += np.einsum("inr,jr->inj", signed[0][..., dn:], signed[2])
        i, j = np.ogrid[: score.shape[0], : score.shape[2]]
        with np.errstate(invalid="ignore", over="ignore"):
            p = np.exp(given["scale"] * score - given["lse"][rows][..., None])
        p = reach(given) * np.where(np.broadcast_to((j > i + offset)[:, None, :], p.shape), 0, p)
        mean = np.einsum("ind,ind->in", dout[rows], out[rows])[..., None]
        ds = abs(given["scale"]) * p * (np.einsum("ind,jnd->inj", dout[rows], kv[keys, :, dn:]) + mean)
        dq[rows] = np.einsum("inj,jnd->ind", ds, full)
        dkv[keys, :, :dn] = np.einsum("inj,ind->jnd", ds, q[rows, :, :dn])
        dkv[keys, :, dn:] = np.einsum("inj,ind->jnd", p, dout[rows])
        dk_pe[keys] = np.einsum("inj,inr->jr", ds, q[rows, :, dn:])
    return dq, dkv, dk_pe


def assert_near(given, results, expected):
    """All three as one array: where softmax has one key, dq and dk are 0, or what the roundings of dv's size leave."""
    assert [a.shape for a in results] == [a.shape for a in expected]
    width, longest = given["q"].shape[2] + given["dout"].shape[2], max(len(given["q"]), len(given["kv"]))
    got, wanted, scale = (np.concatenate([a.ravel() for a in each]) for each in (results, expected, magnitudes(given)))
    roundings = 1 + (2.0**-24 * reach(given)) ** 2 / DISSIMILARITY["float32"]  # of lse, which all weights share
    assert_close(got, wanted, reduction=width + longest, scale=scale, roundings=roundings)


def check(given, results):
    assert_near(given, results, reference.mla_prefill_backward(**given))


@pytest.mark.parametrize(("T", "S"), [(1, 1), (33, 33), (5, 70), (130, 200)])
def test_model_shapes(isa, rng, T, S):
    given = random_arguments(rng, [T], [S], 2 if isa == "scalar" else 8, 128, 64, 128, scale=2.0)
    check(given, ops.mla_prefill_backward(**given))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("N", "dn", "R", "dv"), [(1, 1, 2, 1), (3, 7, 6, 31), (2, 31, 2, 7), (1, 5, 10, 257)])
def test_hostile_shapes(isa, rng, T, N, dn, R, dv):
    given = random_arguments(rng, [T], [T], N, dn, R, dv)
    check(given, ops.mla_prefill_backward(**given))


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
        ([200, 0, 1, 70], [300, 5, 65, 64], None),
        ([150, 3], [190, 0], [31, 0]),
        ([129], [129], [-40]),
        ([100], [300], [-20]),
    ],
)
def test_ragged_batches(isa, rng, lengths_q, lengths_k, offsets):
    given = random_arguments(rng, lengths_q, lengths_k, offsets=offsets)
    dq, dkv, dk_pe = ops.mla_prefill_backward(**given)
    check(given, (dq, dkv, dk_pe))
    assert (dq[given["lse"] == -np.inf] == 0).all()
    unseen = np.ones(len(dkv), bool)
    for b, offset in enumerate(given["causal_offsets"]):
        if lengths_q[b]:
            unseen[slice(*given["cu_seqlens_k"][b : b + 2])][: max(0, lengths_q[b] + int(offset))] = False
    assert (dkv[unseen] == 0).all() and (dk_pe[unseen] == 0).all()


def test_many_short_sequences(isa, rng):
    lengths = rng.integers(0, 9, 71)
    given = random_arguments(rng, lengths, lengths, 3, 8, 4, 8)
    check(given, ops.mla_prefill_backward(**given))


@pytest.mark.parametrize("N", [0, 1, 7])
def test_numbers_of_heads(isa, rng, N):
    given = random_arguments(rng, [20], [20], N)
    check(given, ops.mla_prefill_backward(**given))


def test_without_a_rope_part(isa, rng):
    given = random_arguments(rng, [40], [40], 2, 16, 0, 16)
    check(given, ops.mla_prefill_backward(**given))


def test_the_widest_heads(isa, rng):
    for dims in ((1000, 48, 1000), (2045, 2, 1), (1, 1, 2046)):
        given = random_arguments(rng, [20], [30], 1, *dims)
        check(given, ops.mla_prefill_backward(**given))


def test_gradient_by_differences(isa, rng):
    """Of the oracle of mla_prefill in float64, along a random direction in all three arguments at once."""
    given = random_arguments(rng, [20, 9], [20, 30], 2, 8, 4, 8, scale=1.0)
    moved = {name: normal(rng, *given[name].shape) for name in ("q", "kv", "k_pe")}
    step, forward = 1e-5, {name: given[name] for name in given.keys() - {"out", "lse", "dout"}}

    def loss(sign):
        there = {name: np.float64(given[name]) + sign * step * direction for name, direction in moved.items()}
        return np.sum(given["dout"] * reference.mla_prefill(**forward | there))

    slopes = zip(ops.mla_prefill_backward(**given), moved.values(), strict=True)
    assert np.isclose(sum(np.sum(np.float64(d) * m) for d, m in slopes), (loss(1) - loss(-1)) / (2 * step), rtol=1e-4)


def test_after_mla_prefill(isa, rng):
    """With out and lse as the forward op gives them."""
    given = random_arguments(rng, [70, 33], [70, 33], 2, 32, 16, 32)
    forward = {name: given[name] for name in given.keys() - {"out", "lse", "dout"}}
    out, lse = ops.mla_prefill(**forward, return_lse=True)
    given |= {"out": out, "lse": lse}
    check(given, ops.mla_prefill_backward(**given))


def test_keys_in_several_calls(isa, rng):
    """With out and lse over all keys, those of each part get their gradient, and dq is the sum."""
    given = random_arguments(rng, [33], [40], 2)
    whole = reference.mla_prefill_backward(**given)
    parts = []
    for keys in (slice(0, 25), slice(25, 40)):
        part = given | {
            "kv": given["kv"][keys],
            "k_pe": given["k_pe"][keys],
            "cu_seqlens_k": i32(0, keys.stop - keys.start),
        }
        parts.append(ops.mla_prefill_backward(**part | {"causal_offsets": i32(7 - keys.start)}))
    joined = [
        parts[0][0] + parts[1][0],
        *(np.concatenate([a, b]) for a, b in zip(parts[0][1:], parts[1][1:], strict=True)),
    ]
    assert_near(given, joined, whole)


def test_huge_scores(isa, rng):
    """Integers and a scale that is a power of two: scores up to 2^16, exact in float32; lse is not."""
    given = random_arguments(rng, [17], [17])
    for name in ("q", "kv", "k_pe"):
        given[name] = rng.integers(-4, 5, given[name].shape).astype(np.float32)
    for scale in (256.0, -256.0, 2.0**-20, 0.0):
        exact = completed({name: given[name] for name in given.keys() - {"out", "lse", "dout"}} | {"scale": scale})
        exact["dout"] = given["dout"]
        check(exact, ops.mla_prefill_backward(**exact))


def test_sequences_do_not_see_each_other(isa, rng):
    given = random_arguments(rng, [4, 3, 5], [4, 70, 5])
    expected = ops.mla_prefill_backward(**given)
    given["kv"][4:74], given["k_pe"][4:74], given["q"][4:7] = np.nan, np.nan, np.nan
    dq, dkv, dk_pe = ops.mla_prefill_backward(**given)
    rows, keys = np.r_[0:4, 7:12], np.r_[0:4, 74:79]
    for got, wanted, others in zip((dq, dkv, dk_pe), expected, (rows, keys, keys), strict=True):
        assert same_bits(got[others], wanted[others])
    assert np.isnan(dq[4:7]).all() and np.isnan(dkv[4:74]).all() and np.isnan(dk_pe[4:74]).all()


def test_strided_inputs(isa, rng):
    given = random_arguments(rng, [4, 30], [4, 90])
    expected = ops.mla_prefill_backward(**given)
    apart = {name: strided(given[name]) for name in ("q", "kv", "k_pe")}
    for got, wanted in zip(ops.mla_prefill_backward(**given | apart), expected, strict=True):
        assert same_bits(got, wanted)


def test_every_element_is_written(isa, rng, monkeypatch):
    """Results and workspace begin as NaN."""
    given = random_arguments(rng, [4, 3, 5], [4, 70, 5], offsets=[-2, 3, -9])
    expected = ops.mla_prefill_backward(**given)
    names = ops.mla_prefill_backward.__globals__
    monkeypatch.setitem(names, "empty", lambda like, *shape, dtype=None: poison(*shape, dtype=dtype or like.dtype))
    for got, wanted in zip(ops.mla_prefill_backward(**given), expected, strict=True):
        assert same_bits(got, wanted)


def test_rejects(rng):
    op, given = ops.mla_prefill_backward, random_arguments(rng, [4, 3], [4, 9])
    for argument in given.keys() - {"scale"}:
        assert_rejects_faults(op, given, argument)
    assert_rejects(op, given, "q", normal(rng, 7, 2, 7), ValueError)  # narrower than k_pe
    for shape in ((13, 3, 28), (13, 2, 15)):
        assert_rejects(op, given, "kv", normal(rng, *shape), ValueError)
    for shape in ((12, 8), (13, 25)):
        assert_rejects(op, given, "k_pe", normal(rng, *shape), ValueError)
    for name in ("out", "dout"):
        for shape in ((6, 2, 12), (7, 1, 12), (7, 2, 11)):
            assert_rejects(op, given, name, normal(rng, *shape), ValueError)
    for shape in ((6, 2), (7, 3)):
        assert_rejects(op, given, "lse", normal(rng, *shape), ValueError)
    assert_rejects(op, given, "dout", given["dout"].astype(BF16), TypeError)
    for name in ("out", "dout"):
        assert_rejects(op, given, name, strided(given[name]), ValueError)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("cu_seqlens_q", i32(0, 4, 8)),
        ("cu_seqlens_q", i32(1, 4, 7)),
        ("cu_seqlens_q", i32(0, 8, 7)),
        ("cu_seqlens_q", i32()),
        ("cu_seqlens_k", i32(0, 4, 12)),
        ("cu_seqlens_k", i32(-1, 4, 13)),
        ("cu_seqlens_k", i32(0, 4, 9, 13)),
    ],
)
def test_rejects_lengths(rng, argument, bad):
    assert_rejects(ops.mla_prefill_backward, random_arguments(rng, [4, 3], [4, 9]), argument, bad, ValueError)


def test_rejects_wider_heads(rng):
    match = r"^mla_prefill_backward: q and kv have Dn \+ R \+ Dv = 2049, expected at most 2048"
    with pytest.raises(ValueError, match=match):
        ops.mla_prefill_backward(**random_arguments(rng, [2], [2], 1, 1000, 48, 1001))


def test_has_no_kernel_for_the_gpu(emulator, rng):
    with pytest.raises(TypeError, match="^mla_prefill_backward: q is a CuPy array, expected a NumPy array"):
        ops.mla_prefill_backward(**random_arguments(rng, [4, 3], [4, 9]))
