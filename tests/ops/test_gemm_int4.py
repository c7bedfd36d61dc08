"""gemm_int4: rows times packed INT4 weights."""

import numpy as np
import pytest
import reference
from arrays import (
    BF16,
    assert_rejects,
    assert_rejects_faults,
    int4,
    poison,
    read_only,
    same_bits,
    strided,
)
from close import assert_close
from kimi_native import ops


def matrix(on, packed, scale):
    """The weights as float64, as the backend has them: q * scale exact on the CPU, rounded to bf16 on the GPU."""
    return np.float64((reference.dequantize_int4 if on.cuda else reference.exact_int4)(packed, scale))


def check(on, x, packed, scale, out):
    weight = matrix(on, packed, scale)
    reach = 4 * np.linalg.norm(np.float64(x), axis=1)[:, None] * np.sqrt(np.mean(weight**2))
    assert_close(out, reference.gemm(x, weight), on.dtype.name, reduction=x.shape[1], scale=reach)


@pytest.mark.parametrize(("n_in", "n_out"), [(7168, 2048), (2048, 7168)])
@pytest.mark.parametrize("T", [1, 3])
def test_model_shapes(on, rng, T, n_in, n_out):
    n_out = n_out // 64 if on.emulated else n_out // 16 if on.isa == "scalar" else n_out // 2
    x, (packed, scale) = on.normal(rng, T, n_in), int4(rng, n_out, n_in)
    check(on, x, packed, scale, on(ops.gemm_int4, x, packed, scale))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 1), (32, 31), (64, 7), (96, 5), (352, 13), (1056, 3), (8288, 3)])
def test_hostile_shapes(on, rng, T, n_in, n_out):
    x, (packed, scale), out = on.normal(rng, T, n_in), int4(rng, n_out, n_in), poison(T, n_out, dtype=on.dtype)
    check(on, x, packed, scale, on(ops.gemm_int4, x, packed, scale, out=out))


@pytest.mark.parametrize(
    ("T", "n_in", "n_out"), [(8, 1536, 45), (16, 512, 33), (20, 640, 150), (40, 384, 136), (137, 256, 130)]
)
def test_many_rows(on, rng, T, n_in, n_out):
    """Whole slabs of inputs, several pieces of rows, tiles that end early."""
    x, (packed, scale), out = on.normal(rng, T, n_in), int4(rng, n_out, n_in), poison(T, n_out, dtype=on.dtype)
    check(on, x, packed, scale, on(ops.gemm_int4, x, packed, scale, out=out))


@pytest.mark.parametrize("T", [5, 40])
def test_weights_of_any_alignment(on, rng, T):
    """Packed words may start at any multiple of 4 bytes, scales at any multiple of 2."""
    x, (packed, scale) = on.normal(rng, T, 512), int4(rng, 21, 512)
    words, halves = np.zeros(packed.size + 1, np.int32), np.zeros(scale.size + 1, BF16)
    words[1:], halves[1:] = packed.ravel(), scale.ravel()
    expected = on(ops.gemm_int4, x, packed, scale)
    check(on, x, packed, scale, expected)
    assert same_bits(on(ops.gemm_int4, x, words[1:].reshape(packed.shape), scale), expected)
    assert same_bits(on(ops.gemm_int4, x, packed, halves[1:].reshape(scale.shape)), expected)


@pytest.mark.parametrize(("T", "n_in", "n_out"), [(0, 64, 8), (3, 64, 0), (3, 0, 8)])
def test_empty(on, T, n_in, n_out):
    packed, scale = np.zeros((n_out, n_in // 8), np.int32), np.ones((n_out, n_in // 32), BF16)
    out = on(ops.gemm_int4, np.ones((T, n_in), on.dtype), packed, scale)
    assert same_bits(out, np.zeros((T, n_out), on.dtype))


@pytest.mark.parametrize("T", [1, 6, 18])
@pytest.mark.parametrize("n_in", [96, 256])
def test_strided_rows_and_out(on, rng, T, n_in):
    x, (packed, scale), out = on.normal(rng, T, n_in), int4(rng, 9, n_in), strided(poison(T, 9, dtype=on.dtype))
    assert on(ops.gemm_int4, strided(x), packed, scale, out=out) is out
    check(on, x, packed, scale, out)
    assert np.isnan(out.base).sum() == out.base.size - out.size


@pytest.mark.parametrize("n_in", [160, 256])
def test_identity_returns_the_weights_exactly(on, rng, n_in):
    """All 16 codes with every kind of scale; the product has 12 bits, so float32 holds it."""
    packed, _ = int4(rng, 21, n_in)
    scale = np.exp(rng.uniform(-20, 20, (21, n_in // 32))).astype(BF16)
    whole = np.eye(n_in, dtype=np.float32).astype(on.dtype)
    for x in (whole, whole[:7], whole[-20:]):
        out = on(ops.gemm_int4, x, packed, scale)
        assert np.array_equal(np.float64(out), np.float64(x) @ matrix(on, packed, scale).T)


def test_minus_eight(on):
    packed, scale = np.zeros((3, 8), np.int32), np.full((3, 2), 0.5, BF16)
    out = on(ops.gemm_int4, np.ones((2, 64), on.dtype), packed, scale)
    assert np.array_equal(out, np.full((2, 3), -8 * 0.5 * 64, on.dtype))


def test_rows_do_not_depend_on_the_batch(on, rng):
    """On the CPU up to 8 rows have one order of sums, more have another."""
    n_in = 320 if on.cuda else 2336
    x, (packed, scale) = on.normal(rng, 21, n_in), int4(rng, 37, n_in)
    few, many = on(ops.gemm_int4, x[:8], packed, scale), on(ops.gemm_int4, x, packed, scale)
    for t in range(8):
        assert same_bits(on(ops.gemm_int4, x[t : t + 1], packed, scale), few[t : t + 1])
    for start, stop in ((0, 9), (5, 16), (12, 21)):
        assert same_bits(on(ops.gemm_int4, x[start:stop], packed, scale), many[start:stop])


@pytest.mark.parametrize("T", [5, 40])
def test_nan_stays_in_its_row_and_column(on, rng, T):
    x, (packed, scale) = on.normal(rng, T, 64), int4(rng, 9, 64)
    scale[7, 1] = np.nan
    x[3, 50] = np.nan
    expected = (np.arange(9)[None] == 7) | (np.arange(T)[:, None] == 3)
    assert np.array_equal(np.isnan(on(ops.gemm_int4, x, packed, scale)), expected)


def arguments():
    return {
        "x": np.ones((3, 64), np.float32),
        "weight_packed": np.ones((5, 8), np.int32),
        "weight_scale": np.ones((5, 2), BF16),
        "out": poison(3, 5),
    }


def test_rejects():
    for argument in ("x", "weight_packed", "weight_scale"):
        assert_rejects_faults(ops.gemm_int4, arguments(), argument)
    for shape in ((5, 7), (5, 9)):
        assert_rejects(ops.gemm_int4, arguments(), "weight_packed", np.ones(shape, np.int32), ValueError)
    for shape in ((4, 2), (5, 1), (5, 3)):
        assert_rejects(ops.gemm_int4, arguments(), "weight_scale", np.ones(shape, BF16), ValueError)
    assert_rejects(ops.gemm_int4, arguments(), "weight_packed", np.ones((5, 8), np.uint32), TypeError)
    assert_rejects(ops.gemm_int4, arguments(), "out", poison(3, 4), ValueError)
    assert_rejects(ops.gemm_int4, arguments(), "out", read_only(poison(3, 5)), ValueError)


def test_rejects_inputs_that_are_no_whole_groups():
    with pytest.raises(ValueError, match="^gemm_int4: .*32"):
        ops.gemm_int4(np.ones((1, 40), np.float32), np.ones((5, 5), np.int32), np.ones((5, 1), BF16))
