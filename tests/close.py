"""Closeness of a computed array to its float64 oracle, with bounds that follow from the arithmetic."""

import ml_dtypes
import numpy as np

ROUNDING = {
    "float32": 2.0**-23,
    "bfloat16": 2.0**-8,
}  # float32: one ulp at 1; bf16: half an ulp, rounded once
DISSIMILARITY = {"float32": 1e-11, "bfloat16": 3e-6}  # bf16 rounding alone gives 1.4e-6


def assert_close(actual, expected, dtype="float32", *, reduction=1, scale=None, roundings=1):
    """`actual` has this dtype, the shape of `expected` (float64), the same non-finite values, and is near it.

    Two limits. Over the whole array, 1 - 2<a,b> / (<a,a> + <b,b>) stays under the limit of the dtype, times the
    number of `roundings` to it behind an element; an array of few elements does not average them, so it gets up to
    three times that, the worst of one element. Each element may be off by

        rounding(dtype) * |expected|  +  2^-23 * (4 + sqrt(reduction)) * scale

    where `reduction` is the number of float32 additions behind an element and `scale` the magnitude that
    their partial sums reach: the roundings of n additions walk sqrt(n) steps. Default scale: max |expected|
    over the row (last axis), which holds where the sums of a row are of one size; pass it where a result is
    much smaller than what was summed.
    """
    expected = np.asarray(expected, np.float64)
    assert isinstance(actual, np.ndarray), f"got {type(actual).__name__}, expected an array"
    assert actual.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype)), f"dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    got = actual.astype(np.float64)
    finite = np.isfinite(expected)
    same = finite & np.isfinite(got) | (got == expected) | (np.isnan(got) & np.isnan(expected))
    _fail_at(~same, got, expected, "non-finite values differ")
    got, wanted = np.where(finite, got, 0), np.where(finite, expected, 0)
    if scale is None:
        scale = np.abs(wanted).max(axis=-1, keepdims=True, initial=0)
    bound = ROUNDING[dtype] * np.abs(wanted) + 2.0**-23 * (4 + np.sqrt(reduction)) * np.asarray(scale)
    share = np.abs(got - wanted) / np.maximum(bound, np.finfo(np.float32).tiny)
    _fail_at(
        (share > 1) & (share == share.max(initial=0)),
        got,
        wanted,
        f"{share.max(initial=0):.3g} of the tolerance",
    )
    energy = np.sum(got**2) + np.sum(wanted**2)
    dissimilarity = np.sum((got - wanted) ** 2) / energy if energy else 0.0
    limit = DISSIMILARITY[dtype] * roundings * (1 + 2 / np.sqrt(max(1, wanted.size)))
    assert dissimilarity <= limit, f"dissimilarity {dissimilarity:.3g}, limit {limit:.3g}"


def _fail_at(bad, got, expected, what):
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what} at {at}: got {got[at]}, expected {expected[at]} ({np.count_nonzero(bad)} of {bad.size})"
        )
