"""dequantize_int4 and quantize_int4, bit for bit."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects_faults, int4, normal, same_bits
from kimi_native import ops
from kimi_native.ops._array import run


def packed_words(*words):
    return np.array(words, np.uint32).view(np.int32).reshape(1, -1)


def test_examples_of_the_format(on):
    """Low nibble first, value = nibble - 8, product rounded once to bf16."""
    codes = packed_words(0x0FEDCBA9, 0x76543210, 0x88888888, 0xFFFFFFFF)
    scale = np.array([[0.0123291015625]], BF16)
    q = [1, 2, 3, 4, 5, 6, 7, -8, -8, -7, -6, -5, -4, -3, -2, -1] + [0] * 8 + [7] * 8
    assert np.array_equal(on(ops.dequantize_int4, codes, np.ones((1, 1), BF16)).astype(int)[0], q)
    w = on(ops.dequantize_int4, codes, scale)
    assert w.dtype == BF16
    assert (float(w[0, 6]), float(w[0, 2]), float(w[0, 7])) == (0.08642578125, 0.037109375, -0.0986328125)


def test_every_code_times_every_scale(on):
    """16 codes x 65,536 scales: subnormal and negative ones, overflow, infinity and NaN included."""
    scale = np.arange(0x10000, dtype=np.uint16).view(BF16)[:, None]
    packed = np.repeat(packed_words(0x76543210, 0xFEDCBA98, 0, 0), len(scale), axis=0)
    w = on(ops.dequantize_int4, packed, scale)
    with np.errstate(invalid="ignore"):
        expected = reference.dequantize_int4(packed, scale)
    nan = np.isnan(np.float32(expected))
    assert np.array_equal(np.isnan(np.float32(w)), nan)
    assert same_bits(w[~nan], expected[~nan])


def test_dequantize_to_any_address(on, rng):
    """An output that allows no 16-byte stores, between elements that stay."""
    packed, scale = int4(rng, 5, 96)
    around = np.full(5 * 96 + 2, 1, BF16)
    out = around[1:-1].reshape(5, 96)

    def dequantize(packed, scale, out):
        run("dequantize_int4", weight_packed=packed, weight_scale=scale, out=out)

    on(dequantize, packed, scale, out)
    assert same_bits(out, reference.dequantize_int4(packed, scale))
    assert around[0] == around[-1] == 1


def test_quantize_from_any_address(on, rng):
    flat = np.full(7 * 96 + 2, np.nan, np.float32)
    weight = flat[1:-1].reshape(7, 96)
    weight[...] = normal(rng, 7, 96)
    for actual, expected in zip(on(ops.quantize_int4, weight), reference.quantize_int4(weight), strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 64), (31, 96), (7, 1056), (64, 7168), (0, 32), (3, 0)])
def test_dequantize_shapes(on, rng, rows, columns):
    packed, scale = int4(rng, rows, columns)
    assert same_bits(on(ops.dequantize_int4, packed, scale), reference.dequantize_int4(packed, scale))


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 64), (31, 96), (7, 1056), (64, 7168), (0, 32), (3, 0)])
def test_quantize_shapes(on, rng, rows, columns):
    weight = normal(rng, rows, columns, scale=0.02)
    packed, scale = on(ops.quantize_int4, weight)
    expected_packed, expected_scale = reference.quantize_int4(weight)
    assert same_bits(scale, expected_scale)
    assert same_bits(packed, expected_packed)


def test_quantize_keeps_what_is_on_its_grid(on, rng):
    """q * scale with |q| = 7 in every group returns the same codes and scales."""
    q = rng.integers(-7, 8, (33, 128))
    q[:, ::32] = rng.choice([-7, 7], (33, 4))
    scale = np.exp(rng.uniform(-9, 20, (33, 4))).astype(BF16)
    weight = (q * np.repeat(np.float64(scale), 32, axis=1)).astype(np.float32)
    packed, again = on(ops.quantize_int4, weight)
    assert same_bits(again, scale)
    assert np.array_equal(reference.exact_int4(packed, again), weight)


def test_quantize_error_is_at_most_half_a_step(on, rng):
    weight = normal(rng, 16, 256)
    packed, scale = on(ops.quantize_int4, weight)
    step = np.repeat(np.float64(scale), 32, axis=1)
    # a scale rounded down by bf16 puts the largest value up to 7 * 2^-9 steps past code 7, not half a step
    assert (np.abs(reference.exact_int4(packed, scale) - weight) <= step / 2 * (1 + 1e-6)).all()


def test_quantize_ties_go_to_even_and_extremes_are_clamped(on):
    weight = np.zeros((1, 32), np.float32)
    weight[0, :8] = [7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7]
    packed, scale = on(ops.quantize_int4, weight)
    assert float(scale[0, 0]) == 1
    assert reference.exact_int4(packed, scale)[0, :8].tolist() == [7, 0, 2, 2, 0, -2, -2, -7]
    weight *= np.float32(1.01)  # absmax / 7 rounds to a smaller bf16, the quotient exceeds 7
    packed, scale = on(ops.quantize_int4, weight)
    assert reference.exact_int4(packed, scale)[0, 0] == 7 * float(scale[0, 0])


def test_quantize_floor_of_the_scale(on):
    weight = np.zeros((3, 32), np.float32)
    weight[1], weight[2] = 1e-7, np.float32(1e-45)
    packed, scale = on(ops.quantize_int4, weight)
    assert same_bits(scale, np.full((3, 1), 1e-5, BF16))
    assert same_bits(packed, np.full((3, 4), 0x88888888, np.uint32).view(np.int32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 31])
def test_quantize_non_finite_group_becomes_nan(on, rng, bad, at):
    weight = normal(rng, 2, 96)
    weight[1, 32 + at] = bad
    packed, scale = on(ops.quantize_int4, weight)
    expected_packed, expected_scale = reference.quantize_int4(weight)
    assert np.isnan(np.float32(scale)).tolist() == [[False] * 3, [False, True, False]]
    assert same_bits(packed, expected_packed)
    assert np.array_equal(np.float32(scale), np.float32(expected_scale), equal_nan=True)
    assert packed[1, 4:8].view(np.uint32).tolist() == [0x88888888] * 4


def test_quantize_largest_values(on):
    weight = np.full((1, 32), np.finfo(np.float32).max, np.float32)
    packed, scale = on(ops.quantize_int4, weight)
    expected_packed, expected_scale = reference.quantize_int4(weight)
    assert same_bits(packed, expected_packed) and same_bits(scale, expected_scale)


def test_rejects():
    good = {"weight_packed": np.ones((5, 8), np.int32), "weight_scale": np.ones((5, 2), BF16)}
    for argument in good:
        assert_rejects_faults(ops.dequantize_int4, good, argument)
    for shape in ((4, 2), (5, 1), (5, 3)):
        with pytest.raises(ValueError, match="^dequantize_int4: .*weight_scale"):
            ops.dequantize_int4(good["weight_packed"], np.ones(shape, BF16))
    with pytest.raises(TypeError, match="^dequantize_int4: .*weight_packed"):
        ops.dequantize_int4(np.ones((5, 8), np.uint32), good["weight_scale"])
    assert_rejects_faults(ops.quantize_int4, {"weight": np.ones((5, 64), np.float32)}, "weight")
    with pytest.raises(ValueError, match="^quantize_int4: .*weight.*32"):
        ops.quantize_int4(np.ones((5, 40), np.float32))
    with pytest.raises(TypeError, match="^quantize_int4: .*weight"):
        ops.quantize_int4(np.ones((5, 64), BF16))
