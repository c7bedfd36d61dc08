"""Feed-forward layers, dense or mixture of experts, and their gradients.

Shapes: T tokens, H hidden, I intermediate, E routed experts, K experts a token. What goes to routed experts stands
sorted by expert, one row for each choice of a token: [T K, ...].
Sources: Shazeer 2020, arXiv 2002.05202 (SwiGLU); DeepSeek-AI 2024, arXiv 2412.19437 (router).
"""

from typing import NamedTuple

import numpy as np

from kimi_native import ops
from kimi_native.config import TextConfig
from kimi_native.train.params import below, put_below

ROUTER = "gate.weight"
EXPERTS = "experts."
SHARED = "shared_experts."


class Saved(NamedTuple):
    """What `backward` of the mixture of experts needs of a forward pass."""

    scores: np.ndarray  # [T, K] of the chosen experts, sigmoid of the logits
    weights: np.ndarray  # [T, K]
    ids: np.ndarray  # int32 [T, K]
    offsets: np.ndarray  # int32 [E + 1], rows of each expert
    inverse: np.ndarray  # int32 [T, K], the row of each choice
    gate_up: np.ndarray  # [T K, 2 I]
    shared: np.ndarray  # [T, 2 I], gate_up of the shared expert


def forward(w: dict, config: TextConfig, h) -> tuple[np.ndarray, Saved | np.ndarray]:
    """h [T, H], normalised, to [T, H]. w: the parameters of mlp, which say whether the layer is dense."""
    return moe_forward(w, config, h) if ROUTER in w else swiglu_forward(w, h)


def backward(w: dict, config: TextConfig, h, saved: Saved | np.ndarray, dout) -> tuple[np.ndarray, dict]:
    """(dh, gradients of w) from dout [T, H]; h as in `forward`, saved what it gave."""
    return moe_backward(w, config, h, saved, dout) if ROUTER in w else swiglu_backward(w, h, saved, dout)


def swiglu_forward(w: dict, h) -> tuple[np.ndarray, np.ndarray]:
    """down(silu(gate h) * (up h)) of h [T, H], and what `swiglu_backward` needs, gate_up [T, 2 I]."""
    gate_up = ops.matmul(h, _gate_up(w).T)
    return ops.matmul(ops.silu_and_mul(gate_up), w["down_proj.weight"].T), gate_up


def swiglu_backward(w: dict, h, gate_up, dout) -> tuple[np.ndarray, dict]:
    """(dh, gradients of w) from dout [T, H]."""
    ddown = ops.matmul(dout.T, ops.silu_and_mul(gate_up))
    dgate_up = ops.silu_and_mul_backward(gate_up, ops.matmul(dout, w["down_proj.weight"]))
    grads = _gradients(ops.matmul(dgate_up.T, h), ddown)
    return ops.matmul(dgate_up, _gate_up(w)), grads


def moe_forward(w: dict, config: TextConfig, h) -> tuple[np.ndarray, Saved]:
    """Routed experts plus the shared one, of h [T, H]."""
    c, experts = config, below(w, EXPERTS)
    logits = ops.matmul(h, w[ROUTER].T)
    bias = w["gate.e_score_correction_bias"]
    weights, ids = ops.topk_sigmoid(logits, bias, c.num_experts_per_tok, c.routed_scaling_factor, c.norm_topk_prob)
    rows, offsets, inverse = ops.moe_permute(h, ids, c.n_routed_experts)
    gate_up = ops.grouped_matmul(rows, _gate_up(experts).swapaxes(1, 2), offsets)
    y = ops.grouped_matmul(ops.silu_and_mul(gate_up), experts["down_proj.weight"].swapaxes(1, 2), offsets)
    out, shared = swiglu_forward(below(w, SHARED), h)
    out += ops.moe_unpermute(y, weights, inverse)
    return out, Saved(_sigmoid(np.take_along_axis(logits, ids, 1)), weights, ids, offsets, inverse, gate_up, shared)


def moe_backward(w: dict, config: TextConfig, h, saved: Saved, dout) -> tuple[np.ndarray, dict]:
    """(dh, gradients of w, but for the bias, which has none) from dout [T, H]."""
    dh, shared = swiglu_backward(below(w, SHARED), h, saved.shared, dout)
    dh_routed, dweights, routed = _experts_backward(below(w, EXPERTS), config.n_routed_experts, h, saved, dout)
    dlogits = _router_backward(config, saved, dweights)
    dh += dh_routed
    dh += ops.matmul(dlogits, w[ROUTER])
    router = {ROUTER: ops.matmul(dlogits.T, h)}
    return dh, router | put_below(EXPERTS, routed) | put_below(SHARED, shared)


def _experts_backward(w: dict, E: int, h, saved: Saved, dout) -> tuple[np.ndarray, np.ndarray, dict]:
    """(dh, gradient of the weights [T, K], gradients of w) from dout [T, H]. w: the parameters of experts."""
    inverse, offsets = saved.inverse, saved.offsets
    drows, _, _ = ops.moe_permute(dout, saved.ids, E)  # [T K, H], not weighted yet
    activated = ops.silu_and_mul(saved.gate_up)  # [T K, I]
    dactivated = ops.grouped_matmul(drows, w["down_proj.weight"], offsets)
    # dout . down(activated) is (dout down) . activated: what down gave is not needed.
    dweights = np.einsum("mi,mi->m", activated, dactivated)[inverse]
    row_weights = np.empty((inverse.size, 1), h.dtype)
    row_weights[inverse.ravel(), 0] = saved.weights.ravel()
    activated *= row_weights
    dactivated *= row_weights
    ddown = ops.grouped_matmul(drows.T, activated, offsets)
    dgate_up = ops.silu_and_mul_backward(saved.gate_up, dactivated)
    rows, _, _ = ops.moe_permute(h, saved.ids, E)
    grads = _gradients(ops.grouped_matmul(dgate_up.T, rows, offsets), ddown)
    drows = ops.grouped_matmul(dgate_up, _gate_up(w), offsets)
    return ops.moe_unpermute(drows, np.ones_like(saved.weights), inverse), dweights, grads


def _router_backward(config: TextConfig, saved: Saved, dweights) -> np.ndarray:
    """dlogits [T, E] from dweights [T, K]: the choice has no gradient, the weights of what was chosen have.

    weights = scale * scores / sum(scores), or without norm_topk_prob scale * scores.
    """
    s, dscores = saved.scores, config.routed_scaling_factor * dweights
    if config.norm_topk_prob:
        dscores -= np.sum(dweights * saved.weights, axis=1, keepdims=True)
        dscores /= s.sum(axis=1, keepdims=True) + 1e-20  # as in topk_sigmoid
    dlogits = np.zeros((len(s), config.n_routed_experts), s.dtype)
    np.put_along_axis(dlogits, saved.ids, dscores * s * (1 - s), axis=1)
    return dlogits


def _sigmoid(x) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _gate_up(w: dict) -> np.ndarray:
    """gate_proj over up_proj: [2 I, H], or [E, 2 I, H] of stacked experts."""
    return np.concatenate([w["gate_proj.weight"], w["up_proj.weight"]], axis=-2)


def _gradients(dgate_up, ddown) -> dict:
    """dgate_up: of `_gate_up`; its two halves are given out as views."""
    dgate, dup = np.split(dgate_up, 2, axis=-2)
    return {"gate_proj.weight": dgate, "up_proj.weight": dup, "down_proj.weight": ddown}
