"""batched_gemm: one bf16 matrix per head, MLA's absorbed projections."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, poison, read_only, same_bits, strided
from close import assert_close
from kimi_native import ops


@pytest.mark.parametrize("T", [1, 3])
def test_absorbed_projections_of_the_model(on, rng, T):
    N = 8 if on.emulated or on.isa == "scalar" else 64
    kv_b = normal(rng, N, 256, 512, dtype=BF16)
    q, o = on.normal(rng, T, N, 192), on.normal(rng, T, N, 512)
    latent = on(ops.batched_gemm, q[..., :128], kv_b[:, :128], transpose_weight=True)
    expected = reference.batched_gemm(q[..., :128], kv_b[:, :128], True)
    assert_close(latent, expected, on.dtype.name, reduction=128)
    value = on(ops.batched_gemm, o, kv_b[:, 128:])
    assert_close(value, reference.batched_gemm(o, kv_b[:, 128:]), on.dtype.name, reduction=512)


@pytest.mark.parametrize("transpose_weight", [False, True])
@pytest.mark.parametrize("T", [0, 1, 2, 5, 8, 17, 33])
@pytest.mark.parametrize(
    ("N", "n_in", "n_out"), [(1, 1, 1), (3, 7, 31), (2, 31, 7), (5, 257, 3), (2, 9, 557), (0, 4, 4), (2, 4, 0)]
)
def test_hostile_shapes(on, rng, T, N, n_in, n_out, transpose_weight):
    shape = (N, n_in, n_out) if transpose_weight else (N, n_out, n_in)
    x, weight = on.normal(rng, T, N, n_in), normal(rng, *shape, dtype=BF16)
    out = on(ops.batched_gemm, x, weight, transpose_weight=transpose_weight)
    reach = 4 * np.linalg.norm(np.float64(x), axis=2)[..., None]
    expected = reference.batched_gemm(x, weight, transpose_weight)
    assert_close(out, expected, on.dtype.name, reduction=n_in, scale=reach)


@pytest.mark.parametrize("transpose_weight", [False, True])
@pytest.mark.parametrize("T", [1, 6])
def test_strided_x_weight_and_out(on, rng, T, transpose_weight):
    x, weight = on.normal(rng, T, 3, 20), normal(rng, 3, 20, 20, dtype=BF16)
    out = strided(poison(T, 3, 20, dtype=on.dtype))
    heads = np.full((3, 25, 20), np.nan, BF16)
    heads[:, 2:22] = weight
    got = on(ops.batched_gemm, strided(x), heads[:, 2:22], transpose_weight=transpose_weight, out=out)
    assert got is out
    assert_close(out, reference.batched_gemm(x, weight, transpose_weight), on.dtype.name, reduction=20)
    assert np.isnan(np.float32(out.base)).sum() == out.base.size - out.size


def test_heads_in_another_order(on, rng):
    x, weight = on.normal(rng, 5, 4, 9), normal(rng, 4, 6, 9, dtype=BF16)
    swapped = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    assert same_bits(on(ops.batched_gemm, swapped, weight), on(ops.batched_gemm, x, weight))


def arguments(dtype=np.float32):
    return {
        "x": np.ones((3, 2, 8), dtype),
        "weight": np.ones((2, 5, 8), BF16),
        "transpose_weight": False,
        "out": poison(3, 2, 5, dtype=dtype),
    }


def test_rejects():
    for argument in ("x", "weight"):
        assert_rejects_faults(ops.batched_gemm, arguments(), argument)
    for shape in ((3, 5, 8), (2, 5, 7)):
        assert_rejects(ops.batched_gemm, arguments(), "weight", np.ones(shape, BF16), ValueError)
    assert_rejects(ops.batched_gemm, arguments(), "weight", strided(np.ones((2, 5, 8), BF16)), ValueError)
    assert_rejects(
        ops.batched_gemm,
        arguments() | {"transpose_weight": True},
        "weight",
        np.ones((2, 5, 8), BF16),
        ValueError,
    )
    for shape in ((3, 2, 4), (3, 1, 5), (2, 2, 5), (3, 2, 5, 1)):
        assert_rejects(ops.batched_gemm, arguments(), "out", poison(*shape), ValueError)
    assert_rejects(ops.batched_gemm, arguments(), "out", poison(3, 2, 5, dtype=BF16), TypeError)
    assert_rejects(ops.batched_gemm, arguments(), "out", read_only(poison(3, 2, 5)), ValueError)


def test_rejects_on_the_gpu(emulator):
    given = arguments(BF16)
    for argument in ("x", "weight"):
        assert_rejects(ops.batched_gemm, given, argument, np.float32(given[argument]), TypeError)
        assert_rejects(ops.batched_gemm, given, argument, given[argument].tolist(), TypeError)
        assert_rejects(ops.batched_gemm, given, argument, given[argument][0], ValueError)
        assert_rejects(ops.batched_gemm, given, argument, given[argument].repeat(2, axis=2)[..., ::2], ValueError)
    for shape in ((3, 5, 8), (2, 5, 7)):
        assert_rejects(ops.batched_gemm, given, "weight", np.ones(shape, BF16), ValueError)
    assert_rejects(ops.batched_gemm, given, "weight", strided(np.ones((2, 5, 8), BF16)), ValueError)
    transposed = given | {"transpose_weight": True}
    assert_rejects(ops.batched_gemm, transposed, "weight", np.ones((2, 5, 8), BF16), ValueError)
    for shape in ((3, 2, 4), (3, 1, 5), (2, 2, 5), (3, 2, 5, 1)):
        assert_rejects(ops.batched_gemm, given, "out", poison(*shape, dtype=BF16), ValueError)
    assert_rejects(ops.batched_gemm, given, "x", np.ones((3, 2, 8), BF16)[::-1], ValueError)
