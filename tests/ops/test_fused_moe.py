"""fused_moe: router output to weighted sum of experts."""

import numpy as np
import pytest
import reference
from arrays import (
    BF16,
    assert_rejects,
    assert_rejects_faults,
    int4,
    normal,
    poison,
    read_only,
    same_bits,
    strided,
)
from backends import Cpu
from close import assert_close
from kimi_native import ops

KINDS = ["bf16", "int4"]


def random_experts(on, rng, kind, E, H, width, distinct=None, place=lambda array, i: array, down=None):
    """gate, up, down as (ExpertWeights, float64 matrices); E experts share `distinct` arrays, placed by `place`.

    down: the kind of the third projection, where it is another.

    The matrices are what the backend multiplies with: q * scale exact on the CPU, rounded to bf16 on the GPU.
    """
    share = [e % (distinct or E) for e in range(E)]
    both = {}
    for name, n_out, n_in in (("gate", width, H), ("up", width, H), ("down", H, width)):
        if (down or kind if name == "down" else kind) == "bf16":
            lists = [[normal(rng, n_out, n_in, dtype=BF16, scale=n_in**-0.5) for _ in range(distinct or E)]]
        else:
            lists = list(zip(*(int4(rng, n_out, n_in) for _ in range(distinct or E)), strict=True))
        lists = [[place(array, i) for i, array in enumerate(each)] for each in lists]
        exact = reference.ExpertWeights(*lists)
        if on.cuda:
            exact = [np.float64(weight.astype(BF16)) for weight in exact]
        experts = on(ops.ExpertWeights, *([each[i] for i in share] for each in lists))
        both[name] = experts, [exact[i] for i in share]
    return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}


def random_routes(rng, T, K, E):
    ids = np.array([rng.permutation(E)[:K] for _ in range(T)], np.int32).reshape(T, K)
    weights = rng.uniform(0.1, 1, (T, K)).astype(np.float32)
    return {"topk_weights": weights, "topk_ids": ids}


def check(on, x, routes, exact, out):
    """Two chained sums of H and I products; what reaches the output is as large as its row.

    On the GPU the values between the two, and what each expert gives, are rounded to bf16 as well.
    """
    H, width = exact["down"][0].shape
    expected = reference.fused_moe(x, **routes, **exact)
    scale = np.abs(expected).max(axis=-1, keepdims=True, initial=0)
    if on.cuda:
        scale = scale + inner_error(x, routes, exact) / (2.0**-23 * (4 + np.sqrt(4 * (H + width))))
    assert_close(out, expected, on.dtype.name, reduction=4 * (H + width), scale=scale, roundings=3)


def inner_error(x, routes, exact):
    """[T, H] what the roundings to bf16 inside can add up to: five times the root of the sum of their squares.

    Each element of h, and of each expert's share of the output, is off by 2^-9 of itself in the mean, at random.
    """
    x = np.float64(x)
    squares = np.zeros((x.shape[0], exact["down"][0].shape[0]))
    for (t, k), e in np.ndenumerate(routes["topk_ids"]):
        if 0 <= e < len(exact["gate"]):
            g, u = exact["gate"][e] @ x[t], exact["up"][e] @ x[t]
            h = g / (1 + np.exp(-g)) * u * np.float64(routes["topk_weights"][t, k])
            squares[t] += exact["down"][e] ** 2 @ h**2 + (exact["down"][e] @ h) ** 2
    return 5 * 2.0**-9 * np.sqrt(squares)


INTEGERS = {"int16": 16319, "int8": 127}
# How far a product of a layer may be from the reference that rounds to the same integers, as a share of its norm. What
# goes into the second product is rounded from float32 sums: one in a few thousand of those lands on the next integer.
SAME_INTEGERS = {"int16": 3e-5, "int8": 5e-4}


def rounded(x, limit):
    """x [T, n] as integers to `limit` times a scale per 32 inputs, in the kernels' own float32 arithmetic."""
    groups = np.float32(x).reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    q = np.rint(groups * (np.float32(limit) / largest))
    return (np.float64(q) * (largest / np.float32(limit))).reshape(x.shape)


def rounding_reference(x, topk_weights, topk_ids, gate, up, down, limit):
    out, x = np.zeros((len(x), len(down[0]))), rounded(x, limit)
    for (t, k), e in np.ndenumerate(topk_ids):
        g, u = gate[e] @ x[t], up[e] @ x[t]
        out[t] += topk_weights[t, k] * (down[e] @ rounded((g / (1 + np.exp(-g)) * u)[None], limit)[0])
    return out


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("activations", INTEGERS)
@pytest.mark.parametrize("T", [1, 2, 35])
@pytest.mark.parametrize(("H", "width"), [(32, 32), (160, 96), (544, 288)])
def test_integer_activations(on, rng, activations, T, H, width):
    experts, exact = random_experts(on, rng, "int4", 5, H, width)
    x, routes = on.normal(rng, T, H), random_routes(rng, T, 2, 5)
    out = ops.fused_moe(x, **routes, **experts, activations=activations)
    expected = rounding_reference(x, **routes, **exact, limit=INTEGERS[activations])
    assert np.linalg.norm(out - expected) < SAME_INTEGERS[activations] * np.linalg.norm(expected)
    # bit for bit, wherever among others; alone too while few tokens share an expert
    backwards = {name: array[::-1].copy() for name, array in routes.items()}
    assert same_bits(ops.fused_moe(x[::-1].copy(), **backwards, **experts, activations=activations), out[::-1])
    for t in range(T if T <= 2 else 0):
        one = {name: array[t : t + 1] for name, array in routes.items()}
        assert same_bits(ops.fused_moe(x[t : t + 1], **one, **experts, activations=activations)[0], out[t])


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("activations", INTEGERS)
@pytest.mark.parametrize("T", [1, 3, 40, 150])
def test_integer_and_float_projections(on, rng, activations, T):
    """INT4 gate and up whose rows fill no whole panel, before a bf16 down."""
    experts, exact = random_experts(on, rng, "int4", 3, 288, 77, down="bf16")
    x, routes = on.normal(rng, T, 288), random_routes(rng, T, 2, 3)
    out = ops.fused_moe(x, **routes, **experts, activations=activations)
    check(on, np.float32(rounded(x, INTEGERS[activations])), routes, exact, out)


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("activations", INTEGERS)
def test_integer_activations_of_odd_values(on, rng, activations):
    """Zeros stay zeros, numbers too small for a scale count as zero, what is not finite stays in its token."""
    experts, exact = random_experts(on, rng, "int4", 3, 64, 32)
    x = on.normal(rng, 6, 64)
    x[0], x[1], x[2, 3], x[3, 40], x[4, 32:] = 0, 1e-38, np.nan, -np.inf, 0
    routes = {"topk_weights": np.ones((6, 1), np.float32), "topk_ids": np.zeros((6, 1), np.int32)}
    out = ops.fused_moe(x, **routes, **experts, activations=activations)
    assert (out[:2] == 0).all() and np.isnan(out[2:4]).all()
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = rounding_reference(
            np.where(x == 0, np.float32(1e-20), x)[4:],
            **{name: array[4:] for name, array in routes.items()},
            **exact,
            limit=INTEGERS[activations],
        )
    assert np.linalg.norm(out[4:] - expected) < SAME_INTEGERS[activations] * np.linalg.norm(expected)


@pytest.mark.kernels("cpu")
def test_integer_activations_are_for_int4_alone(on, rng):
    experts, _ = random_experts(on, rng, "bf16", 3, 64, 32)
    x, routes = on.normal(rng, 2, 64), random_routes(rng, 2, 2, 3)
    assert same_bits(ops.fused_moe(x, **routes, **experts, activations="int8"), ops.fused_moe(x, **routes, **experts))


def test_activations_that_there_are_not(rng):
    experts, _ = random_experts(Cpu("scalar"), rng, "int4", 3, 64, 32)
    x, routes = normal(rng, 2, 64), random_routes(rng, 2, 2, 3)
    with pytest.raises(ValueError, match="fused_moe: activations is 'int4', expected one of: float32, int16, int8"):
        ops.fused_moe(x, **routes, **experts, activations="int4")


@pytest.mark.kernels("gpu")
def test_integer_activations_are_for_the_cpu(on, rng):
    experts, _ = random_experts(on, rng, "int4", 3, 64, 32)
    x, routes = on.normal(rng, 2, 64), random_routes(rng, 2, 2, 3)
    with pytest.raises(ValueError, match="fused_moe: activations are integers, which are for the CPU"):
        on(ops.fused_moe, x, **routes, **experts, activations="int16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3])
def test_model_shapes(on, rng, kind, T):
    """384 experts, 8 a token, hidden 7168; the intermediate width is cut, in the emulator both."""
    H, width = (1024, 32) if on.emulated else (896, 64) if on.isa == "scalar" else (7168, 64)
    experts, exact = random_experts(on, rng, kind, 384, H, width, distinct=3)
    x, routes = on.normal(rng, T, H), random_routes(rng, T, 8, 384)
    check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("H", "width", "K", "E"), [(32, 32, 1, 1), (96, 32, 3, 5), (32, 160, 2, 7), (64, 64, 8, 17)])
def test_hostile_shapes(on, rng, kind, T, H, width, K, E):
    experts, exact = random_experts(on, rng, kind, E, H, width)
    x, routes, out = on.normal(rng, T, H), random_routes(rng, T, K, E), poison(T, H, dtype=on.dtype)
    check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **experts, out=out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [0, 1, 8, 9, 33])
@pytest.mark.parametrize(("H", "width"), [(96, 32), (64, 160)])
def test_accumulate(on, rng, kind, T, H, width):
    """Experts are added up before what out holds is added, on the CPU; with no expert chosen it stays."""
    experts, _ = random_experts(on, rng, kind, 5, H, width)
    x, routes, before = on.normal(rng, T, H), random_routes(rng, T, 3, 5), on.normal(rng, T, H)
    alone, out = on(ops.fused_moe, x, **routes, **experts), strided(before)
    assert on(ops.fused_moe, x, **routes, **experts, out=out, accumulate=True) is out
    if on.cuda:  # alone was rounded, then the sum
        sum_of_both = np.float64(before) + np.float64(alone)
        assert (np.abs(out - sum_of_both) <= 2.0**-8 * (np.abs(alone) + np.abs(sum_of_both))).all()
    else:
        assert same_bits(np.ascontiguousarray(out), before + alone)
    nobody = routes | {"topk_ids": np.full_like(routes["topk_ids"], -1)}
    out = before.copy()
    on(ops.fused_moe, x, **nobody, **experts, out=out, accumulate=True)
    assert same_bits(out, before)


def test_accumulate_onto_nothing(on, rng):
    experts, _ = random_experts(on, rng, "int4", 2, 32, 32)
    with pytest.raises(ValueError, match="fused_moe: accumulate without out"):
        on(ops.fused_moe, on.normal(rng, 1, 32), **random_routes(rng, 1, 1, 2), **experts, accumulate=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "K", "E"), [(2, 3, 5), (8, 2, 3), (9, 3, 9), (16, 2, 3), (40, 2, 2)])
def test_whole_slabs(on, rng, kind, T, K, E):
    """Widths of several slabs of inputs for both products, and tiles that end early."""
    experts, exact = random_experts(on, rng, kind, E, 512, 256, distinct=2)
    x, routes, out = on.normal(rng, T, 512), random_routes(rng, T, K, E), poison(T, 512, dtype=on.dtype)
    check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **experts, out=out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [3, 9, 40])
def test_weights_of_any_alignment(on, rng, kind, T):
    """Arrays of neighbouring experts start at multiples of 16 bytes and between them, as tensors in a file do."""

    def place(array, i):
        raw = np.empty(array.size + 8, array.dtype)
        start = (-raw.ctypes.data % 16 // array.itemsize) + i % 2
        copy = raw[start : start + array.size].reshape(array.shape)
        copy[...] = array
        return copy

    experts, exact = random_experts(on, rng, kind, 5, 256, 256, place=place)
    x, routes = on.normal(rng, T, 256), random_routes(rng, T, 3, 5)
    check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **experts))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(("H", "width"), [(1, 1), (7, 31), (31, 7), (257, 3)])
def test_odd_widths_of_bf16_experts(on, rng, T, H, width):
    experts, exact = random_experts(on, rng, "bf16", 5, H, width)
    x, routes = on.normal(rng, T, H), random_routes(rng, T, 3, 5)
    out = on(ops.fused_moe, x, **routes, **experts)
    if on.cuda:
        check(on, x, routes, exact, out)
        return
    reach = 2 * np.abs(x).max(axis=1, keepdims=True)  # a result may cancel far below what it sums
    assert_close(out, reference.fused_moe(x, **routes, **exact), reduction=H + width, scale=reach)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [8, 21])
def test_all_tokens_to_one_expert(on, rng, kind, T):
    experts, exact = random_experts(on, rng, kind, 6, 64, 32)
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 1, 6)
    routes["topk_ids"][:] = 4
    check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [7, 29])
def test_skips_minus_one(on, rng, kind, T):
    experts, exact = random_experts(on, rng, kind, 7, 64, 32)  # no gap in the workspace behind the 8 offsets
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 3, 7)
    routes["topk_ids"][rng.random((T, 3)) < 0.5] = -1
    routes["topk_ids"][4] = -1
    routes["topk_weights"][routes["topk_ids"] < 0] = np.nan
    x[4] = np.nan
    out = on(ops.fused_moe, x, **routes, **experts)
    assert (out[4] == 0).all()
    x[4] = 0
    check(on, x, routes, exact, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [7, 29])
def test_no_token_has_an_expert(on, rng, kind, T):
    experts, _ = random_experts(on, rng, kind, 6, 64, 32)
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 3, 6)
    routes["topk_ids"][:] = -1
    out = on(ops.fused_moe, x, **routes, **experts, out=poison(T, 64, dtype=on.dtype))
    assert same_bits(out, np.zeros((T, 64), on.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [7, 29])
def test_wild_ids_count_as_minus_one(on, rng, kind, T):
    """The contents of arrays on a GPU are not checked."""
    experts, _ = random_experts(on, rng, kind, 6, 64, 32)
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 3, 6)
    wild = rng.random((T, 3)) < 0.4
    routes["topk_ids"][wild] = rng.choice([-2, 6, 2**31 - 1, -(2**31)], wild.sum())
    if not on.cuda:
        with pytest.raises(ValueError, match="topk_ids"):
            ops.fused_moe(x, **routes, **experts)
        return
    skipped = routes | {"topk_ids": np.where(wild, np.int32(-1), routes["topk_ids"])}
    assert same_bits(on(ops.fused_moe, x, **routes, **experts), on(ops.fused_moe, x, **skipped, **experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [5, 25])
def test_the_same_expert_twice(on, rng, kind, T):
    experts, exact = random_experts(on, rng, kind, 6, 64, 32)
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 3, 6)
    routes["topk_ids"][:, 1] = routes["topk_ids"][:, 0]
    check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [7, 29])
def test_strided_rows_and_out(on, rng, kind, T):
    experts, exact = random_experts(on, rng, kind, 6, 64, 32)
    x, routes, out = on.normal(rng, T, 64), random_routes(rng, T, 3, 6), strided(poison(T, 64, dtype=on.dtype))
    assert on(ops.fused_moe, strided(x), **routes, **experts, out=out) is out
    check(on, x, routes, exact, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [7, 29])
def test_nan_stays_in_its_row(on, rng, kind, T):
    experts, _ = random_experts(on, rng, kind, 6, 64, 32)
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 3, 6)
    expected = on(ops.fused_moe, x, **routes, **experts)
    x[0] = np.nan  # the row that stands in where there is nothing to copy
    out, others = on(ops.fused_moe, x, **routes, **experts), np.arange(T) != 0
    assert np.isnan(out[0]).all() and same_bits(out[others], expected[others])


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_its_parts(on, rng, kind):
    """moe_permute, three grouped GEMMs, silu_and_mul and moe_unpermute compute the same."""
    experts, exact = random_experts(on, rng, kind, 6, 64, 32)
    x, routes = on.normal(rng, 9, 64), random_routes(rng, 9, 3, 6)
    grouped = ops.grouped_gemm if kind == "bf16" else ops.grouped_gemm_int4
    rows, offsets, inverse = on(ops.moe_permute, x, routes["topk_ids"], 6)
    hidden = np.concatenate([on(grouped, rows, experts[name], offsets) for name in ("gate", "up")], axis=1)
    y = on(grouped, on(ops.silu_and_mul, hidden), experts["down"], offsets)
    out = on(ops.moe_unpermute, y, routes["topk_weights"], inverse)
    if on.cuda:  # gate and up are rounded too, by half an ulp of each; twice what fused_moe may be off
        reach = 2 * np.abs(inner_error(x, routes, exact)).max()
        assert np.abs(np.float64(out) - reference.fused_moe(x, **routes, **exact)).max() < reach
    else:
        check(on, x, routes, exact, out)


@pytest.mark.parametrize("T", [5, 29])
def test_bf16_and_int4_may_mix(on, rng, T):
    """On the GPU gate and up are of one kind."""
    plain, exact_plain = random_experts(on, rng, "bf16", 6, 64, 32)
    packed, exact_packed = random_experts(on, rng, "int4", 6, 64, 32)
    x, routes = on.normal(rng, T, 64), random_routes(rng, T, 3, 6)
    for names in (["gate"], ["up"], ["down"], ["gate", "up"]):
        mixed = plain | {name: packed[name] for name in names}
        exact = exact_plain | {name: exact_packed[name] for name in names}
        if on.cuda and len({"gate", "up"} & set(names)) == 1:
            with pytest.raises(ValueError, match=r"^fused_moe: .*gate.*up"):
                on(ops.fused_moe, x, **routes, **mixed)
        else:
            check(on, x, routes, exact, on(ops.fused_moe, x, **routes, **mixed))


@pytest.mark.parametrize("kind", KINDS)
def test_rejects(rng, kind):
    on = Cpu("scalar")
    experts, _ = random_experts(on, rng, kind, 6, 64, 32)
    fewer, _ = random_experts(on, rng, kind, 5, 64, 32)
    wider, _ = random_experts(on, rng, kind, 6, 64, 96)
    op, given = (
        ops.fused_moe,
        {"x": normal(rng, 3, 64), **random_routes(rng, 3, 2, 6), **experts, "out": poison(3, 64)},
    )
    for argument in ("x", "topk_weights", "topk_ids"):
        assert_rejects_faults(op, given, argument)
    with pytest.raises(ValueError, match=r"^fused_moe: .*\b(x|gate)\b"):
        op(**given | {"x": normal(rng, 3, 32)})
    assert_rejects(op, given, "topk_ids", given["topk_ids"][:2], ValueError)
    for shape in ((2, 2), (3, 1)):
        with pytest.raises(ValueError, match=r"^fused_moe: .*\b(topk_weights|topk_ids)\b"):
            op(**given | {"topk_weights": normal(rng, *shape)})
    for bad in (-2, 6, 2**31 - 1, -(2**31)):
        ids = given["topk_ids"].copy()
        ids[2, 1] = bad
        assert_rejects(op, given, "topk_ids", ids, ValueError)
    for argument in ("up", "down"):
        assert_rejects(op, given, argument, fewer[argument], ValueError)
        assert_rejects(op, given, argument, wider[argument], ValueError)
    assert_rejects(op, given, "gate", [np.ones((32, 64), BF16)] * 6, TypeError)
    for shape in ((3, 32), (2, 64), (3, 64, 1)):
        assert_rejects(op, given, "out", poison(*shape), ValueError)
    assert_rejects(op, given, "out", read_only(poison(3, 64)), ValueError)
