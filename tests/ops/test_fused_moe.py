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
from close import assert_close
from kimi_native import ops

KINDS = ["bf16", "int4"]


def random_experts(rng, kind, E, H, width, distinct=None):
    """gate, up, down as (ExpertWeights, float64 matrices); E experts share `distinct` arrays."""
    share = [e % (distinct or E) for e in range(E)]
    both = {}
    for name, n_out, n_in in (("gate", width, H), ("up", width, H), ("down", H, width)):
        if kind == "bf16":
            lists = [[normal(rng, n_out, n_in, dtype=BF16, scale=n_in**-0.5) for _ in range(distinct or E)]]
        else:
            lists = list(zip(*(int4(rng, n_out, n_in) for _ in range(distinct or E)), strict=True))
        exact = reference.ExpertWeights(*lists)
        both[name] = (
            ops.ExpertWeights(*([each[i] for i in share] for each in lists)),
            [exact[i] for i in share],
        )
    return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}


def random_routes(rng, T, K, E):
    ids = np.array([rng.permutation(E)[:K] for _ in range(T)], np.int32).reshape(T, K)
    weights = rng.uniform(0.1, 1, (T, K)).astype(np.float32)
    return {"topk_weights": weights, "topk_ids": ids}


def check(x, routes, exact, out):
    """Two chained sums of H and I products; what reaches the output is as large as its row."""
    H, width = exact["down"][0].shape
    assert_close(out, reference.fused_moe(x, **routes, **exact), reduction=4 * (H + width))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3])
def test_model_shapes(isa, rng, kind, T):
    """384 experts, 8 a token, hidden 7168; the intermediate width is cut."""
    experts, exact = random_experts(rng, kind, 384, 896 if isa == "scalar" else 7168, 64, distinct=3)
    x, routes = normal(rng, T, exact["down"][0].shape[0]), random_routes(rng, T, 8, 384)
    check(x, routes, exact, ops.fused_moe(x, **routes, **experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("H", "width", "K", "E"), [(32, 32, 1, 1), (96, 32, 3, 5), (32, 160, 2, 7), (64, 64, 8, 17)])
def test_hostile_shapes(isa, rng, kind, T, H, width, K, E):
    experts, exact = random_experts(rng, kind, E, H, width)
    x, routes = normal(rng, T, H), random_routes(rng, T, K, E)
    check(x, routes, exact, ops.fused_moe(x, **routes, **experts))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(("H", "width"), [(1, 1), (7, 31), (31, 7), (257, 3)])
def test_odd_widths_of_bf16_experts(isa, rng, T, H, width):
    experts, exact = random_experts(rng, "bf16", 5, H, width)
    x, routes = normal(rng, T, H), random_routes(rng, T, 3, 5)
    out = ops.fused_moe(x, **routes, **experts)
    reach = 2 * np.abs(x).max(axis=1, keepdims=True)  # a result may cancel far below what it sums
    assert_close(out, reference.fused_moe(x, **routes, **exact), reduction=H + width, scale=reach)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_to_one_expert(isa, rng, kind):
    experts, exact = random_experts(rng, kind, 6, 64, 32)
    x, routes = normal(rng, 21, 64), random_routes(rng, 21, 1, 6)
    routes["topk_ids"][:] = 4
    check(x, routes, exact, ops.fused_moe(x, **routes, **experts))


@pytest.mark.parametrize("kind", KINDS)
def test_skips_minus_one(isa, rng, kind):
    experts, exact = random_experts(rng, kind, 6, 64, 32)
    x, routes = normal(rng, 9, 64), random_routes(rng, 9, 3, 6)
    routes["topk_ids"][rng.random((9, 3)) < 0.5] = -1
    routes["topk_ids"][4] = -1
    routes["topk_weights"][routes["topk_ids"] < 0] = np.nan
    out = ops.fused_moe(x, **routes, **experts)
    assert (out[4] == 0).all()
    check(x, routes, exact, out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_expert_twice(isa, rng, kind):
    experts, exact = random_experts(rng, kind, 6, 64, 32)
    x, routes = normal(rng, 5, 64), random_routes(rng, 5, 3, 6)
    routes["topk_ids"][:, 1] = routes["topk_ids"][:, 0]
    check(x, routes, exact, ops.fused_moe(x, **routes, **experts))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_out(isa, rng, kind):
    experts, exact = random_experts(rng, kind, 6, 64, 32)
    x, routes, out = normal(rng, 7, 64), random_routes(rng, 7, 3, 6), strided(poison(7, 64))
    assert ops.fused_moe(strided(x), **routes, **experts, out=out) is out
    check(x, routes, exact, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(isa, rng, kind):
    experts, _ = random_experts(rng, kind, 6, 64, 32)
    x, routes = normal(rng, 7, 64), random_routes(rng, 7, 3, 6)
    expected = ops.fused_moe(x, **routes, **experts)
    x[2] = np.nan
    out, others = ops.fused_moe(x, **routes, **experts), [0, 1, 3, 4, 5, 6]
    assert np.isnan(out[2]).all() and same_bits(out[others], expected[others])


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_its_parts(isa, rng, kind):
    """moe_permute, three grouped GEMMs, silu_and_mul and moe_unpermute compute the same."""
    experts, exact = random_experts(rng, kind, 6, 64, 32)
    x, routes = normal(rng, 9, 64), random_routes(rng, 9, 3, 6)
    grouped = ops.grouped_gemm if kind == "bf16" else ops.grouped_gemm_int4
    rows, offsets, inverse = ops.moe_permute(x, routes["topk_ids"], 6)
    hidden = np.concatenate([grouped(rows, experts[name], offsets) for name in ("gate", "up")], axis=1)
    y = grouped(ops.silu_and_mul(hidden), experts["down"], offsets)
    check(x, routes, exact, ops.moe_unpermute(y, routes["topk_weights"], inverse))


def test_bf16_and_int4_may_mix(isa, rng):
    plain, exact_plain = random_experts(rng, "bf16", 6, 64, 32)
    packed, exact_packed = random_experts(rng, "int4", 6, 64, 32)
    x, routes = normal(rng, 5, 64), random_routes(rng, 5, 3, 6)
    for name in plain:
        mixed, exact = plain | {name: packed[name]}, exact_plain | {name: exact_packed[name]}
        check(x, routes, exact, ops.fused_moe(x, **routes, **mixed))


@pytest.mark.parametrize("kind", KINDS)
def test_rejects(rng, kind):
    experts, _ = random_experts(rng, kind, 6, 64, 32)
    fewer, _ = random_experts(rng, kind, 5, 64, 32)
    wider, _ = random_experts(rng, kind, 6, 64, 96)
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
