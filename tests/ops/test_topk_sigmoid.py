"""topk_sigmoid: the router. Ids compare exactly."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, same_bits, spaced, strided
from close import assert_close
from kimi_native import ops


def spread_out(rng, T, E):
    """(logits, bias) whose choices s + bias are far apart, so that float32 orders them as float64 does."""
    choice = np.stack([rng.permutation(np.linspace(0.3, 0.7, E)) for _ in range(T)]) if T else np.zeros((0, E))
    bias = rng.uniform(-0.2, 0.2, E).astype(np.float32)
    s = choice - bias
    return np.log(s / (1 - s)).astype(np.float32), bias


def check(on, logits, bias, top_k, *options):
    weights, ids = on(ops.topk_sigmoid, logits, bias, top_k, *options)
    expected, expected_ids = reference.topk_sigmoid(logits, bias, top_k, *options)
    assert same_bits(ids, expected_ids)
    # each weight is a quotient of element-wise functions and a sum of top_k of them
    assert_close(weights, expected, reduction=top_k, scale=np.where(np.isfinite(expected), np.abs(expected), 0))


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize("options", [(), (2.827,), (2.827, False), (1.0, True)])
def test_model_shapes(on, rng, T, options):
    check(on, *spread_out(rng, T, 384), 8, *options)


@pytest.mark.parametrize(
    ("E", "top_k"), [(1, 1), (2, 1), (7, 7), (31, 5), (257, 8), (257, 257), (1000, 64), (64, 65 - 1)]
)
def test_hostile_shapes(on, rng, E, top_k):
    check(on, *spread_out(rng, 5, E), top_k, 2.5, True)


def test_bias_chooses_and_does_not_weigh(on):
    logits = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
    weights, ids = on(ops.topk_sigmoid, logits, np.array([0, 0, 0, 5], np.float32), 2, 1.0, False)
    assert ids.tolist() == [[3, 0]]
    assert np.allclose(weights, [[0.26894143, 0.8807971]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("E", [8, 31, 257, 384])
def test_ties_go_to_the_lower_index(on, E):
    """Equal inputs give equal scores wherever they stand, vector body or tail."""
    logits = np.full((3, E), 0.3, np.float32)
    logits[1, [E - 1, E - 2]] = 0.5
    logits[2, 0] = 0.1
    _, ids = on(ops.topk_sigmoid, logits, np.full(E, 0.1, np.float32), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [E - 2, E - 1, 0, 1, 2], [1, 2, 3, 4, 5]]


def test_ties_of_saturated_scores(on):
    logits = np.array([[50, 100, np.inf, 3e38, 60, 0, 70]], np.float32)
    weights, ids = on(ops.topk_sigmoid, logits, np.zeros(7, np.float32), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]
    _, ids = on(ops.topk_sigmoid, -logits, np.zeros(7, np.float32), 3)
    assert ids[0, 0] == 5 and (np.sort(ids[0]) == np.unique(ids[0])).all()


def test_infinite_logits(on):
    logits = np.array([[0, np.inf, -np.inf, 1]], np.float32)
    weights, ids = on(ops.topk_sigmoid, logits, np.zeros(4, np.float32), 4, 1.0, False)
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert np.allclose(weights, [[1, 0.7310586, 0.5, 0]], rtol=1e-6, atol=0)


def test_nan_ranks_below_everything(on):
    """Lower index first among NaN; -inf from the bias still ranks above it; every slot is written."""
    logits = np.array([[np.nan, 1, np.nan, 0, np.nan, 2]], np.float32)
    bias = np.array([0, 0, 0, -np.inf, 0, 0], np.float32)
    weights, ids = on(ops.topk_sigmoid, logits, bias, 6, 1.0, False)
    assert ids.tolist() == [[5, 1, 3, 0, 2, 4]]
    assert np.isnan(weights).tolist() == [[False] * 3 + [True] * 3]
    weights, ids = on(ops.topk_sigmoid, logits, bias, 2)
    assert ids.tolist() == [[5, 1]] and np.isfinite(weights).all()
    _, ids = on(ops.topk_sigmoid, logits, np.array([0, np.nan, 0, 0, 0, 0], np.float32), 3)
    assert ids.tolist() == [[5, 3, 0]]


@pytest.mark.parametrize("E", [8, 31, 384])
def test_all_nan_writes_every_slot(on, E):
    weights, ids = on(ops.topk_sigmoid, np.full((3, E), np.nan, np.float32), np.zeros(E, np.float32), 8)
    assert ids.tolist() == [list(range(8))] * 3
    assert np.isnan(weights).all()


def test_nan_stays_in_its_row(on, rng):
    logits, bias = spread_out(rng, 5, 31)
    expected = on(ops.topk_sigmoid, logits, bias, 4)
    logits[2] = np.nan
    others = [0, 1, 3, 4]
    for got, wanted in zip(on(ops.topk_sigmoid, logits, bias, 4), expected, strict=True):
        assert same_bits(got[others], wanted[others])


def test_weights_of_scores_that_vanish(on):
    """sigmoid(-200) is below float32: the sum is 0 and the 1e-20 in the divisor keeps the weights at 0."""
    weights, ids = on(ops.topk_sigmoid, np.full((1, 5), -200, np.float32), np.zeros(5, np.float32), 3, 2.827)
    assert ids.tolist() == [[0, 1, 2]] and weights.tolist() == [[0, 0, 0]]


def assert_same(on, logits, same, bias):
    """Two arrays with the same values are routed alike, bit for bit."""
    for got, wanted in zip(on(ops.topk_sigmoid, logits, bias, 5), on(ops.topk_sigmoid, same, bias, 5), strict=True):
        assert same_bits(got, wanted)


def test_strided_rows(on, rng):
    logits, bias = spread_out(rng, 6, 33)
    assert_same(on, strided(logits), logits, bias)


@pytest.mark.parametrize(("E", "width", "first"), [(384, 388, 4), (384, 390, 0), (384, 388, 1), (36, 40, 2)])
def test_rows_of_any_alignment(on, rng, E, width, first):
    """Rows that begin on 16 bytes each, at every other row, or never."""
    logits, bias = spread_out(rng, 5, E)
    assert_same(on, spaced(logits, width, 1, first=first), logits, bias)
    for got, wanted in zip(
        on(ops.topk_sigmoid, logits, spaced(bias, first=1), 8), on(ops.topk_sigmoid, logits, bias, 8), strict=True
    ):
        assert same_bits(got, wanted)


@pytest.mark.parametrize("E", [31, 384, 385, 1024])
@pytest.mark.parametrize("step", [1, 2, 4, 32, 128])
def test_best_experts_side_by_side(on, E, step):
    """Whatever experts a thread looks after, it may have to give all of them, best last or best first."""
    K = min(-(-E // step), 40)
    logits = np.full((2, E), -5, np.float32)
    logits[0, step * np.arange(K)] = np.linspace(1, 2, K)
    logits[1, step * np.arange(K)] = np.linspace(2, 1, K)
    check(on, logits, np.zeros(E, np.float32), K)


def test_random_choices_with_ties(on, rng):
    """Few different logits: nearly every choice is a tie."""
    logits = rng.integers(-2, 3, (9, 384)).astype(np.float32)
    check(on, logits, rng.integers(0, 2, 384).astype(np.float32), 33)


def test_choices_below_zero(on, rng):
    logits, bias = spread_out(rng, 5, 100)
    check(on, logits, bias - np.float32(0.5), 100)


@pytest.mark.kernels("gpu")  # the CPU routes any number
def test_more_experts_than_the_gpu_routes(on):
    with pytest.raises(RuntimeError, match="^topk_sigmoid: E is 1025, expected at most 1024$"):
        on(ops.topk_sigmoid, np.zeros((1, 1025), np.float32), np.zeros(1025, np.float32), 8)


def test_rejects(rng):
    op, given = ops.topk_sigmoid, {"logits": normal(rng, 3, 16), "bias": normal(rng, 16), "top_k": 4}
    for argument in ("logits", "bias"):
        assert_rejects_faults(op, given, argument)
    assert_rejects(op, given, "bias", normal(rng, 15), ValueError)
    assert_rejects(op, given, "bias", normal(rng, 16, dtype=BF16), TypeError)
    for top_k in (17, -1, 2**31 - 1):
        assert_rejects(op, given, "top_k", top_k, ValueError)
