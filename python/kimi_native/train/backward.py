"""Loss and gradients of the whole model, written by hand: the layers from first to last, then back.

A forward pass keeps of each layer what enters it, what leaves its attention, and what its projections give (see `Saved`
in backward_mla and backward_mlp); norms and SwiGLU are computed again on the way back. Nothing depends on the number of
threads.

Shapes: T tokens, H hidden, V vocab_size, N heads, E routed experts. All arrays are float32.
"""

import math
from collections.abc import Sequence
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
from kimi_native.train.params import below, put_below

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

    Raises ValueError for a batch that does not fit the model, naming what it has and what is expected; KeyError for a
    missing parameter; FloatingPointError for a loss that is not finite, naming the parameter or the layer.
    """
    c, text, sequences = _begin(params, config, batch)
    layers = _layers(text, c)
    x, media = _embed(params, text, config, batch)
    saved = []
    for w in layers:
        x, of_layer = _layer_forward(w, c, x, sequences)
        saved.append(of_layer)
    loss, dx, grads = _head_backward(text, c, x, batch.targets)
    _check_finite(loss, params, [*(layer.x for layer in saved), x])
    max_logits = [layer.attention.max_logits for layer in saved]
    tokens_per_expert = {}
    for index in reversed(range(len(layers))):
        of_layer = saved.pop()  # and forget it then
        if isinstance(of_layer.mlp, backward_mlp.Saved):
            tokens = np.diff(of_layer.mlp.offsets).astype(np.int64)
            tokens_per_expert[f"{root(config)}model.layers.{index}.{BIAS}"] = tokens
        dx, dw = _layer_backward(layers[index], c, of_layer, sequences, dx)
        grads |= put_below(f"model.layers.{index}.", dw)
    grads[EMBEDDING], of_vision = _embed_backward(params, text, config, batch, media, dx)
    return Gradients(loss, put_below(root(config), grads) | of_vision, max_logits, tokens_per_expert)


def loss(params: dict, config: Config, batch: Batch) -> float:
    """The loss alone: one layer's memory. Arguments and errors as in loss_and_gradients."""
    c, text, sequences = _begin(params, config, batch)
    x = _forward(params, text, config, batch, sequences)
    result = _head_loss(text, c, x, batch.targets)
    _check_finite(result, params, [x])
    return result


def logits(params: dict, config: Config, batch: Batch) -> np.ndarray:
    """[T, V]. Arguments and errors as in loss_and_gradients."""
    c, text, sequences = _begin(params, config, batch)
    x = _forward(params, text, config, batch, sequences)
    return ops.matmul(ops.rms_norm(x, text["model.norm.weight"], c.rms_norm_eps), text["lm_head.weight"].T)


def _begin(params: dict, config: Config, batch: Batch) -> tuple[TextConfig, dict, Sequences]:
    """The text model's config and parameters, without what stands before model. and lm_head., and its sequences."""
    c = config.text_config
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


def _check_finite(loss: float, params: dict, streams: Sequence) -> None:
    """streams: what enters each layer, then what leaves the last one."""
    if math.isfinite(loss):
        return
    for name, array in params.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"loss is {loss}, expected a finite number: parameter {name!r} is not finite")
    first = next((i for i, x in enumerate(streams) if not np.isfinite(x).all()), len(streams))
    where = ("the embeddings", *(f"what leaves layer {i}" for i in range(len(streams) - 1)), "the logits")[first]
    raise FloatingPointError(f"loss is {loss}, expected a finite number: {where} is the first that is not finite")


def _layers(text: dict, c: TextConfig) -> list[dict]:
    """The parameters of each layer."""
    return [below(text, f"model.layers.{layer}.") for layer in range(c.num_hidden_layers)]


def _forward(params: dict, text: dict, config: Config, batch: Batch, sequences: Sequences) -> np.ndarray:
    """The residual stream [T, H] that leaves the last layer."""
    x, _ = _embed(params, text, config, batch)
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


def _embed(params: dict, text: dict, config: Config, batch: Batch) -> tuple[np.ndarray, tuple]:
    """[T, H], of media their rows; and (spans, what backward_vision needs)."""
    x = np.take(text[EMBEDDING], batch.token_ids, axis=0)
    if not batch.media:
        return x, ([], None)
    spans = find_spans(batch.token_ids, config.media_placeholder_token_id, batch.media)
    rows, saved = backward_vision.forward(params, config, batch.media)
    for span, of_item in zip(spans, rows, strict=True):
        x[span.start : span.stop] = of_item
    return x, (spans, saved)


def _embed_backward(params: dict, text: dict, config: Config, batch: Batch, media: tuple, dx) -> tuple:
    """(gradient of the embedding, gradients of vision by name) from dx [T, H]."""
    spans, saved = media
    if spans:
        of_vision = backward_vision.backward(params, config, saved, [dx[span.start : span.stop] for span in spans])
    else:
        vision = ("vision_tower.", "mm_projector.")
        of_vision = {name: np.zeros_like(array) for name, array in params.items() if name.startswith(vision)}
    is_text = np.ones(len(dx), bool)
    for span in spans:
        is_text[span.start : span.stop] = False
    at = np.flatnonzero(is_text)
    ids = batch.token_ids[at]
    order = np.argsort(ids, kind="stable")
    tokens, first = np.unique(ids[order], return_index=True)
    gradient = np.zeros_like(text[EMBEDDING])
    if tokens.size:
        gradient[tokens] = np.add.reduceat(dx[at[order]], first)
    return gradient, of_vision


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
