"""Fake quantisation: codes, scales and values bit for bit, and what training on them does."""

import warnings

import ml_dtypes
import numpy as np
import pytest
import reference
from arrays import BF16, normal, same_bits
from kimi_native import ops
from kimi_native.checkpoint_writer import pack_int4
from kimi_native.train.qat import deployed, fake_quantize, quantize

LEVELS = range(1, 8)


def spread(rng, *shape):
    """Groups from below the smallest scale to 1e20, one of them all zero."""
    w = normal(rng, *shape).reshape(-1, 32)
    w *= np.exp(rng.uniform(-20, 46, (len(w), 1))).astype(np.float32)
    w[0] = 0
    return w.reshape(shape)


def one_by_one(w, levels):
    """The grid as its formula, a weight at a time; the two quotients are float32."""
    q, scale = np.zeros(w.shape, int), np.zeros((*w.shape[:-1], w.shape[-1] // 32), BF16)
    for group in np.ndindex(scale.shape):
        at = [(*group[:-1], 32 * group[-1] + i) for i in range(32)]
        largest = max(abs(w[i]) for i in at)
        scale[group] = ml_dtypes.bfloat16(max(largest / np.float32(levels), np.float32(1e-5)))
        for i in at:
            q[i] = min(max(round(float(w[i] / np.float32(scale[group]))), -levels), levels)  # round: ties to even
    return q, scale


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 5, 64), (0, 32), (4, 0)], ids=str)
def test_codes_and_scales(rng, levels, shape):
    w = spread(rng, *shape) if np.prod(shape) else np.zeros(shape, np.float32)
    q, scale = quantize(w, levels)
    expected_q, expected_scale = one_by_one(w, levels)
    assert q.dtype == np.int8
    assert same_bits(scale, expected_scale)
    assert np.array_equal(q, expected_q)
    fake = fake_quantize(w, levels)
    assert fake.dtype == np.float32
    assert np.array_equal(fake, expected_q * np.repeat(np.float64(expected_scale), 32, axis=-1))  # no rounding


def test_seven_levels_are_those_of_the_op(rng):
    w = spread(rng, 64, 256)
    q, scale = quantize(w)
    packed, expected_scale = ops.quantize_int4(w)
    assert same_bits(scale, expected_scale)
    assert same_bits(pack_int4(q), packed)
    assert np.array_equal(fake_quantize(w), reference.exact_int4(packed, expected_scale))


@pytest.mark.parametrize("levels", LEVELS)
def test_quantising_again_gives_the_same(rng, levels):
    w = spread(rng, 4, 64, 128)
    once, again = quantize(w, levels), quantize(fake_quantize(w, levels), levels)
    for a, b in zip(once, again, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("draw", "expected"), [("standard_normal", 0.0970), ("laplace", 0.1211)])
def test_error_of_the_grid(rng, draw, expected):
    """Relative root mean square error of 7 levels."""
    w = getattr(rng, draw)(size=(4096, 1024)).astype(np.float32)
    error = np.float64(fake_quantize(w)) - w
    assert np.sqrt(np.mean(error**2) / np.mean(np.float64(w) ** 2)) == pytest.approx(expected, abs=4e-4)


def test_experts_do_not_see_each_other(rng):
    w = spread(rng, 5, 16, 64)
    assert same_bits(fake_quantize(w), np.stack([fake_quantize(matrix) for matrix in w]))


def test_strided_weights_stay_as_they_are(rng):
    around = spread(rng, 6, 9, 64)
    before = around.copy()
    assert same_bits(fake_quantize(around[::2, 1:]), fake_quantize(np.ascontiguousarray(around[::2, 1:])))
    assert same_bits(around, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_becomes_nan(rng, bad):
    w = normal(rng, 2, 96)
    w[1, 40] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fake = fake_quantize(w)
    assert np.array_equal(np.isnan(fake), [[False] * 96, [False] * 32 + [True] * 32 + [False] * 32])


@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_bad_arguments(function):
    name, w = function.__name__, np.zeros((2, 32), np.float32)
    for levels in (0, 8, -1, 2.5):
        with pytest.raises(ValueError, match=f"{name}: levels is {levels}, expected 1 to 7"):
            function(w, levels)
    with pytest.raises(TypeError, match=f"{name}: w is float64, expected float32"):
        function(w.astype(np.float64))
    for shape in ((2, 33), (32,)):
        with pytest.raises(
            ValueError, match=rf"{name}: w has shape .*, expected \[..., out, in\], in a multiple of 32"
        ):
            function(np.zeros(shape, np.float32))


@pytest.mark.parametrize("levels", [1, 7])
def test_deployed(rng, levels):
    layer = "language_model.model.layers.1"
    experts, bias = f"{layer}.mlp.experts.up_proj.weight", f"{layer}.mlp.gate.e_score_correction_bias"
    params = {
        experts: normal(rng, 4, 8, 32),
        f"{layer}.mlp.shared_experts.up_proj.weight": normal(rng, 8, 32),
        f"{layer}.mlp.gate.weight": normal(rng, 4, 32),
        bias: normal(rng, 4),
        f"{layer}.input_layernorm.weight": normal(rng, 32),
        "vision_tower.patch_embed.proj.weight": normal(rng, 8, 3, 14, 14),
    }
    before = {name: w.copy() for name, w in params.items()}
    found = deployed(params, levels)
    expected = {name: w.astype(BF16).astype(np.float32) for name, w in params.items()}
    expected |= {experts: fake_quantize(params[experts], levels), bias: params[bias]}
    assert list(found) == list(params)
    for name in params:
        assert same_bits(found[name], expected[name]), name
        assert same_bits(params[name], before[name]), name


def test_straight_through_gradients_lead_to_the_best_point_of_the_grid(rng):
    """Of |deployed(w) - t|^2 with t on the grid: its gradient at deployed(w), applied to w, ends where it is zero."""
    name = "model.layers.1.mlp.experts.up_proj.weight"
    target = fake_quantize(normal(rng, 2, 8, 64))
    params = {name: normal(rng, 2, 8, 64)}
    for _ in range(400):
        params[name] -= np.float32(0.1) * (deployed(params)[name] - target)
    assert np.array_equal(deployed(params)[name], target)


@pytest.mark.parametrize("levels", [1, 3])
def test_training_on_a_harsh_grid_beats_rounding_afterwards(rng, levels):
    """Least squares in 64 correlated inputs: the rounded solution, and what training brings it to. 0.62 to 0.77 of the
    loss were seen over grids and seeds."""
    name, steps = "model.layers.1.mlp.experts.up_proj.weight", 200
    x = normal(rng, 512, 64) @ normal(rng, 64, 64, scale=1 / 8)
    covariance = x.T @ x / np.float32(len(x))
    solution = normal(rng, 1, 32, 64)
    params = {name: solution.copy()}

    def away():
        return deployed(params, levels)[name] - solution

    def loss():
        return float(np.vdot(away() @ covariance, away()))

    rounded = loss()
    for step in range(steps):
        params[name] -= np.float32(2e-3 * (1 - step / steps)) * (away() @ covariance)
    assert loss() < 0.85 * rounded
