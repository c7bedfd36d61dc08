"""Loss and gradients of the whole model, written by hand: the layers from first to last, then back.

A forward pass keeps of each layer what enters it, what leaves its attention, and what its projections give (see `Saved`
in backward_mla and backward_mlp); norms and SwiGLU are computed again on the way back. Nothing depends on the number of
threads.

Shapes: T tokens, H hidden, V vocab_size, N heads, E routed experts. All arrays are float32.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_native import ops
from kimi_native.checkpoint import root
from kimi_native.config import Config, TextConfig
from kimi_native.splice import find_spans
from kimi_native.train import backward_mla, backward_mlp, backward_vision
from kimi_native.train.backward_mla import Sequences
from kimi_native.train.batch import NO_LOSS, Batch
from kimi_native.train.params import below, check, put_below

LOGITS = 2**20  # that are held together, but of 64 tokens at least
EMBEDDING = "model.embed_tokens.weight"
BIAS = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Gradients:
    """What a step of training takes from a batch.

    loss: mean cross-entropy in nats over the targets that are not NO_LOSS. grads: name -> gradient of each parameter
    but e_score_correction_bias, in its shape, perhaps a view of a larger array; zeros for what no token passed.
    max_logits: of each layer [N], the largest score of a head, scale included. tokens_per_expert: name of each
    e_score_correction_bias -> int64 [E].
    """

    loss: float
    grads: dict[str, np.ndarray]
    max_logits: list[np.ndarray]
    tokens_per_expert: dict[str, np.ndarray]


class _Layer(NamedTuple):
    """What the way back needs of a layer."""

    x: np.ndarray  # [T, H], the residual stream that enters
    middle: np.ndarray  # [T, H], with what attention adds
    attention: backward_mla.Saved
    mlp: backward_mlp.Saved | np.ndarray


def loss_and_gradients(params: dict, config: Config, batch: Batch) -> Gradients:
    """Of the parameters that params.shapes lists.

    Raises ValueError for a parameter or a batch that does not fit the model, naming what it has and what is expected;
    FloatingPointError for a loss that is not finite, naming the parameter or the layer where that begins.
    """
    c, text, sequences = _begin(params, config, batch)
    layers = _layers(text, c)
    x, media = _embed(params, config, batch)
    saved = []
    for w in layers:
        x, of_layer = _layer_forward(w, c, x, sequences)
        saved.append(of_layer)
    loss, dx, grads = _head_backward(text, c, x, batch.targets)
    enters = {f"what enters layer {index}": layer.x for index, layer in enumerate(saved)}
    _check_finite(loss, params, enters | {"what leaves the last layer": x})
    max_logits = [layer.attention.max_logits for layer in saved]
    tokens_per_expert = _tokens_per_expert(config, saved)
    for index in reversed(range(len(layers))):
        dx, dw = _layer_backward(layers[index], c, saved.pop(), sequences, dx)  # forgotten then
        grads |= put_below(f"model.layers.{index}.", dw)
    grads = put_below(root(config), grads) | _embed_backward(params, config, batch, media, dx)
    return Gradients(loss, grads, max_logits, tokens_per_expert)


def loss(params: dict, config: Config, batch: Batch) -> float:
    """The loss alone, in the memory of one layer. Arguments and errors as in loss_and_gradients."""
    c, text, sequences = _begin(params, config, batch)
    result = _head_loss(text, c, _forward(params, config, batch, text, sequences), batch.targets)
    _check_finite(result, params, {})
    return result


def logits(params: dict, config: Config, batch: Batch) -> np.ndarray:
    """[T, V]. Arguments and errors as in loss_and_gradients."""
    c, text, sequences = _begin(params, config, batch)
    x = _forward(params, config, batch, text, sequences)
    return ops.matmul(ops.rms_norm(x, text["model.norm.weight"], c.rms_norm_eps), text["lm_head.weight"].T)


def _begin(params: dict, config: Config, batch: Batch) -> tuple[TextConfig, dict, Sequences]:
    """The text model's config, its parameters without what stands before model. and lm_head., and the sequences."""
    c = config.text_config
    check(params, config)
    _check_batch(batch, c.vocab_size)
    return c, below(params, root(config)), Sequences.of(c, batch.cu_seqlens)


def _check_batch(batch: Batch, vocab_size: int) -> None:
    ids, targets, ends = batch.token_ids, batch.targets, batch.cu_seqlens
    for name, array in (("token_ids", ids), ("targets", targets), ("cu_seqlens", ends)):
        if array.dtype != np.int32 or array.ndim != 1:
            raise ValueError(f"batch: {name} is {array.dtype} {list(array.shape)}, expected int32 with one axis")
    if len(targets) != len(ids):
        raise ValueError(f"batch: targets has {len(targets)} tokens, expected {len(ids)}, those of token_ids")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != len(ids) or np.any(np.diff(ends) < 0):
        raise ValueError(f"batch: cu_seqlens is {ends.tolist()!s:.80}, expected to ascend from 0 to {len(ids)} tokens")
    for name, array, lowest in (("token_ids", ids, 0), ("targets", targets, NO_LOSS)):
        wrong = np.flatnonzero((array < lowest) | (array >= vocab_size))
        if wrong.size:
            found = f"{name}[{wrong[0]}] is {array[wrong[0]]}"
            raise ValueError(f"batch: {found}, expected {lowest} <= id < vocab_size {vocab_size}")
    if np.all(targets == NO_LOSS):
        raise ValueError(f"batch: targets has {len(targets)} times NO_LOSS, expected at least one token to predict")


def _check_finite(loss: float, params: dict, streams: dict) -> None:
    """streams: what it is -> the residual stream there, in the order of the model."""
    if math.isfinite(loss):
        return
    found = f"loss is {loss}, expected a finite number"
    for what, array in ({f"parameter {name!r}": array for name, array in params.items()} | streams).items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{found}: {what} is not finite")
    raise FloatingPointError(f"{found}; the parameters are finite")


def _layers(text: dict, c: TextConfig) -> list[dict]:
    """The parameters of each layer."""
    return [below(text, f"model.layers.{layer}.") for layer in range(c.num_hidden_layers)]


def _tokens_per_expert(config: Config, saved: list[_Layer]) -> dict[str, np.ndarray]:
    return {
        f"{root(config)}model.layers.{index}.{BIAS}": np.diff(layer.mlp.offsets).astype(np.int64)
        for index, layer in enumerate(saved)
        if isinstance(layer.mlp, backward_mlp.Saved)
    }


def _forward(params: dict, config: Config, batch: Batch, text: dict, sequences: Sequences) -> np.ndarray:
    """The residual stream [T, H] that leaves the last layer."""
    x, _ = _embed(params, config, batch)
    for w in _layers(text, config.text_config):
        x, _ = _layer_forward(w, config.text_config, x, sequences)
    return x


def _layer_forward(w: dict, c: TextConfig, x, sequences: Sequences) -> tuple[np.ndarray, _Layer]:
    """The residual stream [T, H] through a layer."""
    h = ops.rms_norm(x, w["input_layernorm.weight"], c.rms_norm_eps)
    middle, attention = backward_mla.forward(below(w, "self_attn."), c, h, sequences)
    middle += x
    h = ops.rms_norm(middle, w["post_attention_layernorm.weight"], c.rms_norm_eps)
    out, mlp = backward_mlp.forward(below(w, "mlp."), c, h)
    out += middle
    return out, _Layer(x, middle, attention, mlp)


def _layer_backward(w: dict, c: TextConfig, saved: _Layer, sequences: Sequences, dout) -> tuple[np.ndarray, dict]:
    """(dx, gradients of w) from dout [T, H]."""
    norm = w["post_attention_layernorm.weight"]
    h = ops.rms_norm(saved.middle, norm, c.rms_norm_eps)
    dh, mlp = backward_mlp.backward(below(w, "mlp."), c, h, saved.mlp, dout)
    dmiddle, dpost = ops.rms_norm_backward(saved.middle, norm, c.rms_norm_eps, dh)
    dmiddle += dout
    norm = w["input_layernorm.weight"]
    h = ops.rms_norm(saved.x, norm, c.rms_norm_eps)
    dh, attention = backward_mla.backward(below(w, "self_attn."), c, h, sequences, saved.attention, dmiddle)
    dx, dinput = ops.rms_norm_backward(saved.x, norm, c.rms_norm_eps, dh)
    dx += dmiddle
    norms = {"input_layernorm.weight": dinput, "post_attention_layernorm.weight": dpost}
    return dx, norms | put_below("self_attn.", attention) | put_below("mlp.", mlp)


def _embed(params: dict, config: Config, batch: Batch) -> tuple[np.ndarray, tuple]:
    """[T, H], of media their rows; and (spans, what backward_vision needs)."""
    x = np.take(params[root(config) + EMBEDDING], batch.token_ids, axis=0)
    if not batch.media:
        return x, ([], None)
    spans = find_spans(batch.token_ids, config.media_placeholder_token_id, batch.media)
    rows, saved = backward_vision.forward(params, config, batch.media)
    for span, of_item in zip(spans, rows, strict=True):
        x[span.start : span.stop] = of_item
    return x, (spans, saved)


def _embed_backward(params: dict, config: Config, batch: Batch, media: tuple, dx) -> dict:
    """Gradients of the embedding and of vision from dx [T, H]."""
    spans, saved = media
    name, is_text = root(config) + EMBEDDING, np.ones(len(dx), bool)
    for span in spans:
        is_text[span.start : span.stop] = False
    embedding = _sums_by_token(batch.token_ids[is_text], dx[is_text], len(params[name]))
    of_vision = backward_vision.backward(params, config, saved, [dx[span.start : span.stop] for span in spans])
    return {name: embedding} | of_vision


def _sums_by_token(ids, rows, vocab_size: int) -> np.ndarray:
    """[V, H]: for each token the sum of its rows [T, H]."""
    sums = np.zeros((vocab_size, rows.shape[1]), rows.dtype)
    if ids.size:
        order = np.argsort(ids, kind="stable")
        tokens, first = np.unique(ids[order], return_index=True)
        sums[tokens] = np.add.reduceat(rows[order], first)
    return sums


def _head_loss(text: dict, c: TextConfig, x, targets) -> float:
    """Mean cross-entropy of x [T, H]."""
    at = np.flatnonzero(targets != NO_LOSS)
    h = ops.rms_norm(x[at], text["model.norm.weight"], c.rms_norm_eps)
    total = 0.0
    for rows in _pieces(len(at), c.vocab_size):
        losses, _ = _cross_entropy(ops.matmul(h[rows], text["lm_head.weight"].T), targets[at[rows]])
        total += losses.sum(dtype=np.float64)
    return float(total) / len(at)


def _head_backward(text: dict, c: TextConfig, x, targets) -> tuple[float, np.ndarray, dict]:
    """(_head_loss, dx [T, H], gradients of final norm and head), the logits made and turned piece by piece."""
    at, norm, head = np.flatnonzero(targets != NO_LOSS), text["model.norm.weight"], text["lm_head.weight"]
    seen = x[at]
    h = ops.rms_norm(seen, norm, c.rms_norm_eps)
    total, dh, dhead = 0.0, np.empty_like(h), np.zeros_like(head)
    for rows in _pieces(len(at), c.vocab_size):
        wanted = targets[at[rows]]
        piece = ops.matmul(h[rows], head.T)
        losses, sums = _cross_entropy(piece, wanted)
        total += losses.sum(dtype=np.float64)
        piece *= (1 / (len(at) * sums))[:, None]
        piece[np.arange(len(wanted)), wanted] -= 1 / len(at)
        dhead += ops.matmul(piece.T, h[rows])
        ops.matmul(piece, head, out=dh[rows])
    dx = np.zeros_like(x)
    dx[at], dnorm = ops.rms_norm_backward(seen, norm, c.rms_norm_eps, dh)
    return float(total) / len(at), dx, {"model.norm.weight": dnorm, "lm_head.weight": dhead}


def _pieces(rows: int, vocab_size: int) -> list[slice]:
    size = max(64, LOGITS // vocab_size)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _cross_entropy(logits, targets) -> tuple[np.ndarray, np.ndarray]:
    """Of each row (log(sum(exp(logits))) - the target's logit, sum(exp(logits - largest))); logits [n, V] become the
    exp(logits - largest)."""
    logits -= logits.max(axis=1, keepdims=True)
    wanted = logits[np.arange(len(targets)), targets]
    np.exp(logits, out=logits)
    sums = logits.sum(axis=1)
    return np.log(sums) - wanted, sums
