"""From logits to tokens."""

import numpy as np

from kimi_native.ops._array import array_module, empty, run, shape_of


def _per_row(xp, name: str, value, B: int, dtype):
    value = xp.asarray(value, dtype)
    if value.shape not in ((), (B,)):
        raise ValueError(f"top_k_top_p_sample: {name} has shape {list(value.shape)}, expected a number or [B = {B}]")
    return xp.ascontiguousarray(xp.broadcast_to(value, (B,)))


def top_k_top_p_sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row.

    p = softmax(logits / temperature); keep the top_k most likely, renormalise; keep the shortest descending prefix
    whose sum reaches top_p; keep p >= min_p * max(p); take the first token of that order at which the cumulative sum
    passes `uniform` times the total. Ties go to the lower index. temperature 0 takes the largest logit.

    logits: float32 [B, V], rows may be strided; NaN counts as -inf. uniform: float32 [B] in [0, 1).
    temperature (>= 0), top_k (0 keeps all), top_p (0 < p <= 1), min_p (0 <= p <= 1): numbers or arrays [B].
    Returns int32 [B].
    Raises ValueError for a shape, a setting out of range or a row whose largest logit is not finite, TypeError for a
    dtype or kind of array. On the GPU values are not read beforehand: a row with such a setting or logit gives -1.
    """
    B, V = shape_of("top_k_top_p_sample", "logits", logits, 2)
    ids, xp = empty(logits, B, dtype=np.int32), array_module(logits)
    run(
        "top_k_top_p_sample",
        logits=logits,
        uniform=uniform,
        temperature=_per_row(xp, "temperature", temperature, B, np.float32),
        top_k=_per_row(xp, "top_k", top_k, B, np.int32),
        top_p=_per_row(xp, "top_p", top_p, B, np.float32),
        min_p=_per_row(xp, "min_p", min_p, B, np.float32),
        probabilities=empty(logits, B, V),
        order=empty(logits, B, V, dtype=np.int32),
        ids=ids,
    )
    return ids
