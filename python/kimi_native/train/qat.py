"""Quantisation-aware training: forward and gradient see the values that the exported checkpoint will hold.

The gradient at these values goes to the float32 masters unchanged (straight-through). Nothing needs a mask: the scale
of a group follows its largest weight, so that no weight is clipped. Source: the grid of Kimi-K2-Thinking's INT4
experts, as slime trains it (LMSYS, 2026-01-26): scale = absmax / 7, not the absmax / 7.5 of compressed-tensors.
"""

import ml_dtypes
import numpy as np

from kimi_native.ops.linear import GROUP

SMALLEST_SCALE = np.float32(1e-5)


def quantize(w: np.ndarray, levels: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Codes q and scales s of w, per GROUP inputs: s = bf16(max(absmax / levels, 1e-5)), q = rint(w / s).

    w: float32 [..., out, in], in a multiple of GROUP, values finite. levels: 1 (ternary) to 7 (INT4). Returns (q int8
    [..., out, in] in -levels..levels, s bfloat16 [..., out, in / GROUP]). Quantising q * s again gives the same. With 7
    levels that is ops.quantize_int4. Raises ValueError for a shape or levels, TypeError for a dtype that does not fit.
    """
    q, scale = _quantize("quantize", w, levels)
    return q.astype(np.int8).reshape(w.shape), scale


def fake_quantize(w: np.ndarray, levels: int = 7) -> np.ndarray:
    """q * s of `quantize`, float32 like w and exact. Arguments and errors as there; a group with a value that is not
    finite becomes NaN."""
    q, scale = _quantize("fake_quantize", w, levels)
    with np.errstate(invalid="ignore"):
        q *= scale.astype(np.float32)[..., None]
    return q.reshape(w.shape)


def deployed(params: dict[str, np.ndarray], levels: int = 7) -> dict[str, np.ndarray]:
    """What `export` makes of the masters, as float32 under the same names: routed experts [E, out, in] on the grid, the
    routers' e_score_correction_bias as it is, everything else rounded to bf16."""
    return {name: _deployed(name, w, levels) for name, w in params.items()}


def _deployed(name: str, w: np.ndarray, levels: int) -> np.ndarray:
    if ".mlp.experts." in name:
        return fake_quantize(w, levels)
    if name.endswith("e_score_correction_bias"):
        return w
    return w.astype(ml_dtypes.bfloat16).astype(np.float32)


def _quantize(function: str, w: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """(q float32 [..., in / GROUP, GROUP], s bf16 [..., in / GROUP])."""
    if levels not in range(1, 8):
        raise ValueError(f"{function}: levels is {levels!r}, expected 1 to 7")
    if w.dtype != np.float32:
        raise TypeError(f"{function}: w is {w.dtype}, expected float32")
    if w.ndim < 2 or w.shape[-1] % GROUP:
        raise ValueError(f"{function}: w has shape {list(w.shape)}, expected [..., out, in], in a multiple of {GROUP}")
    groups = w.reshape(*w.shape[:-1], w.shape[-1] // GROUP, GROUP)
    with np.errstate(invalid="ignore"):
        absmax = np.abs(groups).max(axis=-1)
        scale = np.maximum(absmax / np.float32(levels), SMALLEST_SCALE).astype(ml_dtypes.bfloat16)
        q = groups / scale.astype(np.float32)[..., None]
        return np.rint(q, out=q), scale  # bf16 moves absmax / s by 2^-8 of levels at most: no clamp changes a code
