"""attention: within each of several packed sequences, without a mask."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops


def i32(*values):
    return np.array(values, np.int32)


def random_arguments(rng, lengths, N=2, D=72, draw=normal):
    T = sum(lengths)
    q, k, v = (draw(rng, T, N, D) for _ in range(3))
    return {"q": q, "k": k, "v": v, "cu_seqlens": i32(*np.cumsum([0, *lengths])), "scale": 2 * D**-0.5}


def check(on, given, out):
    """On the GPU a rounding of the weights to bf16 comes before that of the result."""
    expected = reference.attention(**given)
    # an error d of a score multiplies its weight by exp(d): errors of scores scale with the scores
    largest = [np.linalg.norm(np.float64(given[name]), axis=2).max(initial=0) for name in ("q", "k")]
    reach = (1 + abs(given["scale"]) * np.prod(largest)) * np.abs(given["v"]).max(initial=0).astype(np.float64)
    additions = given["q"].shape[2] + len(given["q"])
    if on.cuda:  # moves out by 2^-8 of the weighted magnitude of the values at most
        magnitude = reference.attention(**given | {"v": np.abs(given["v"])})
        reach = reach + magnitude * 2.0**15 / (4 + np.sqrt(additions))
    assert_close(out, expected, on.dtype.name, reduction=additions, scale=reach, roundings=2 if on.cuda else 1)


@pytest.mark.parametrize("lengths", [[1], [4], [64], [65, 1, 0, 70], [130, 3], [16, 16, 16]])
def test_model_heads(on, rng, lengths):
    given = random_arguments(rng, lengths, draw=on.normal)
    check(on, given, on(ops.attention, **given))


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("lengths", [[500, 129], [1196]])
def test_many_blocks(on, rng, lengths):
    given = random_arguments(rng, lengths, 16 if on.isa != "scalar" else 2)
    check(on, given, on(ops.attention, **given))


@pytest.mark.kernels("gpu")
def test_many_tiles(on, rng):
    given = random_arguments(rng, [200, 61, 128], 1, draw=on.normal)
    check(on, given, on(ops.attention, **given))


@pytest.mark.parametrize(("T", "tiles"), [(20, 4), (65, 8), (130, 24)])
def test_heads_run_on_tensor_cores(on, rng, T, tiles):
    """Products of 16 x 8 x 16: 160 for each of a block's 4 warps and each tile of 64 keys, and no bank conflict."""
    if not on.emulated:
        return
    given = random_arguments(rng, [T], 1, draw=on.normal)
    before = np.array(on.extension.counters())
    on(ops.attention, **given)
    mma, ldmatrix, conflicts = np.array(on.extension.counters()) - before
    assert mma == 160 * tiles and ldmatrix == 50 * tiles and conflicts == 0


@pytest.mark.parametrize("D", [1, 7, 8, 12, 64, 80, 88, 129, 256])
def test_other_heads(on, rng, D):
    given = random_arguments(rng, [19, 70], 3, D, on.normal)
    check(on, given, on(ops.attention, **given))


@pytest.mark.parametrize(("lengths", "N"), [([], 2), ([0, 0], 2), ([3, 4], 0)])
def test_nothing_to_do(on, rng, lengths, N):
    given = random_arguments(rng, lengths, N, draw=on.normal)
    assert on(ops.attention, **given).shape == (sum(lengths), N, 72)


def test_sequences_do_not_see_each_other(on, rng):
    """A row has the same bits alone and packed beside others that hold NaN."""
    given = random_arguments(rng, [70, 33, 90], draw=on.normal)
    for name in ("q", "k", "v"):
        given[name][:70] = given[name][103:] = np.nan
    alone = {name: given[name][70:103] for name in ("q", "k", "v")} | {
        "cu_seqlens": i32(0, 33),
        "scale": given["scale"],
    }
    out = on(ops.attention, **given)
    assert same_bits(out[70:103], on(ops.attention, **alone))
    assert np.isnan(out[:70]).all() and np.isnan(out[103:]).all()


@pytest.mark.parametrize("D", [12, 72])
def test_views_of_one_array(on, rng, D):
    """q, k and v as columns of one projection."""
    given = random_arguments(rng, [70, 9], D=D, draw=on.normal)
    packed = np.stack([given[name] for name in ("q", "k", "v")], axis=1)
    views = {"q": packed[:, 0], "k": packed[:, 1], "v": packed[:, 2]}
    expected, out = on(ops.attention, **given), poison(79, 2, D, dtype=on.dtype)
    assert on(ops.attention, **given | views, out=out) is out
    assert same_bits(out, expected)


def test_strided_inputs(on, rng):
    given = random_arguments(rng, [70, 9], draw=on.normal)
    expected = on(ops.attention, **given)
    apart = {name: strided(given[name]) for name in ("q", "k", "v")}
    check(on, given, on(ops.attention, **given | apart))
    assert on.cuda or same_bits(on(ops.attention, **given | apart), expected)


def test_huge_scores_do_not_overflow(on, rng):
    """Integers and a scale that is a power of two: scores up to 2^18, exact in float32."""
    given = random_arguments(rng, [70], draw=on.normal)
    for name in ("q", "k", "v"):
        given[name] = rng.integers(-4, 5, given[name].shape).astype(on.dtype)
    for scale in (256.0, -256.0, 0.0, 2.0**-20):
        given["scale"] = scale
        check(on, given, on(ops.attention, **given))


@pytest.mark.kernels("gpu")
@pytest.mark.parametrize("cu_seqlens", [i32(5, 20), i32(-1, 20), i32(20, 5), i32(0, 91), i32(0, 2**31 - 1)])
@pytest.mark.parametrize("D", [12, 72])
def test_lengths_that_do_not_fit(on, rng, cu_seqlens, D):
    """What lies in no sequence inside the arrays is not written."""
    given = random_arguments(rng, [90], D=D, draw=on.normal) | {"cu_seqlens": cu_seqlens}
    out = on(ops.attention, **given, out=poison(90, 2, D, dtype=on.dtype))
    written = range(5, 20) if cu_seqlens[0] == 5 else []
    assert (~np.isnan(np.float32(out))).all(axis=(1, 2)).nonzero()[0].tolist() == list(written)
    assert np.isnan(np.float32(out)).sum() == 2 * D * (90 - len(written))


def test_rejects(rng):
    op, given = ops.attention, random_arguments(rng, [4, 3], D=8) | {"out": poison(7, 2, 8)}
    for argument in ("q", "k", "v", "cu_seqlens"):
        assert_rejects_faults(op, given, argument)
    for argument in ("k", "v", "out"):
        for shape in ((6, 2, 8), (7, 3, 8), (7, 2, 9)):
            assert_rejects(op, given, argument, poison(*shape), ValueError)
    assert_rejects(op, given, "q", given["q"].astype(BF16), TypeError)
    assert_rejects(op, given, "out", strided(given["out"]), ValueError)
    assert_rejects(op, given, "out", read_only(given["out"]), ValueError)
    for argument in ("q", "k", "v"):
        assert_rejects(op, given, "out", given[argument], ValueError)
    for bad in ((0, 4, 8), (0, 4, 6), (1, 4, 7), (0, 8, 7), ()):
        assert_rejects(op, given, "cu_seqlens", i32(*bad), ValueError)


@pytest.mark.parametrize("D", [0, 1025])
def test_rejects_a_width(rng, D):
    with pytest.raises(ValueError, match=f"^attention: q has D = {D}, expected 1 to 1024"):
        ops.attention(**random_arguments(rng, [2], D=max(D, 1)) | {"q": normal(rng, 2, 2, D)})


def test_the_widest_heads(on, rng):
    given = random_arguments(rng, [20], 1, 1024, on.normal)
    check(on, given, on(ops.attention, **given))
