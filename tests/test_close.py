"""assert_close itself: what it lets pass and what it reports."""

import ml_dtypes
import numpy as np
import pytest
from close import assert_close


def test_accepts_rounding_and_refuses_more():
    expected = np.linspace(-3, 3, 1001).reshape(7, 143)
    assert_close(expected.astype(np.float32), expected)
    assert_close(expected.astype(ml_dtypes.bfloat16), expected, "bfloat16")
    with pytest.raises(AssertionError, match="of the tolerance"):
        assert_close(expected.astype(ml_dtypes.bfloat16).astype(np.float32), expected)
    with pytest.raises(AssertionError, match="of the tolerance|dissimilarity"):
        assert_close((expected * 1.01).astype(ml_dtypes.bfloat16), expected, "bfloat16")


def test_reports_position_and_values():
    expected = np.ones((3, 4))
    actual = expected.astype(np.float32)
    actual[2, 1] = 1.5
    with pytest.raises(AssertionError, match=r"at \(2, 1\): got .*1\.5.*expected .*1\.0"):
        assert_close(actual, expected)


def test_bound_grows_with_the_root_of_the_reduction():
    expected, off = np.ones((1, 100)), np.ones((1, 100), np.float32)
    off[0, 30] = 1 + 50 * 2**-23
    assert_close(off, expected, reduction=50**2)
    with pytest.raises(AssertionError, match="of the tolerance"):
        assert_close(off, expected, reduction=40**2)


def test_scale_replaces_the_row_maximum():
    expected, off = np.array([[1e-3, 1.0]]), np.float32([[1e-3 + 1e-7, 1.0]])
    assert_close(off, expected)
    with pytest.raises(AssertionError, match="of the tolerance"):
        assert_close(off, expected, scale=np.array([[1e-3, 1.0]]))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([np.nan, 1], [1, 1]),
        ([1, 1], [np.nan, 1]),
        ([np.inf, 1], [-np.inf, 1]),
        ([np.inf, 1], [np.nan, 1]),
        ([3e38, 1], [np.inf, 1]),
    ],
)
def test_non_finite_values_must_agree(actual, expected):
    with pytest.raises(AssertionError, match="non-finite"):
        assert_close(np.float32(actual), np.float64(expected))


def test_equal_non_finite_values_pass():
    values = np.array([np.nan, np.inf, -np.inf, 2.0])
    assert_close(values.astype(np.float32), values)


def test_refuses_another_dtype_shape_or_kind():
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(np.ones(3), np.ones(3))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.ones((1, 3), np.float32), np.ones(3))
    with pytest.raises(AssertionError, match="list"):
        assert_close([1.0], np.ones(1))


def test_all_zero_and_empty():
    assert_close(np.zeros((2, 3), np.float32), np.zeros((2, 3)))
    assert_close(np.zeros((0, 3), np.float32), np.zeros((0, 3)))
    with pytest.raises(AssertionError, match="of the tolerance"):
        assert_close(np.full((2, 3), 1e-30, np.float32), np.zeros((2, 3)))


def test_a_common_error_below_every_bound_is_still_dissimilar():
    """Each element within its wide bound, the whole array plainly off."""
    expected = np.random.default_rng(0).standard_normal((20, 50))
    with pytest.raises(AssertionError, match="dissimilarity"):
        assert_close(np.float32(expected + 1e-5), expected, reduction=7168)
