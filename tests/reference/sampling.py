"""Sampling in float64."""

import numpy as np


def kept_tokens(logits, temperature, top_k, top_p, min_p):
    """(ids, probabilities that sum to 1) of the tokens one row may draw, most likely first."""
    logits = np.where(np.isnan(logits), -np.inf, np.float64(logits))
    if not np.isfinite(logits).any():
        raise ValueError("logits: a row without a finite logit")
    ids = np.argsort(-logits, kind="stable")
    if temperature == 0:
        return ids[:1], np.ones(1)
    p = np.exp((logits[ids] - logits[ids[0]]) / temperature)
    p = p[: top_k or None] / p[: top_k or None].sum()
    prefix = 1 + np.count_nonzero(np.cumsum(p)[:-1] < top_p)
    p = p[:prefix]
    p = p[p >= min_p * p[0]]
    return ids[: p.size], p / p.sum()


def top_k_top_p_sample(logits, uniform, temperature, top_k, top_p, min_p):
    """ids [B]: the first kept token whose cumulated probability exceeds uniform[b]."""
    settings = np.broadcast_arrays(np.asarray(uniform), temperature, top_k, top_p, min_p)
    drawn = []
    for row, u, *setting in zip(logits, *settings, strict=True):
        ids, p = kept_tokens(row, *setting)
        drawn.append(ids[np.searchsorted(np.cumsum(p)[:-1], u, side="right")])
    return np.array(drawn, np.int32)
