"""MuonClip: Muon for matrices, AdamW for the rest, QK-Clip for attention logits that grow too large.

Usable alone, with gradients from anywhere:

    optimizer = MuonClip(params, heads=[MLAHeads(...), ...])
    clipped = optimizer.step(grads, max_logits)

Sources: Kimi K2 (arXiv 2507.20534, Algorithm 1) and Moonlight (arXiv 2502.16982); Keller Jordan's Muon for the
coefficients of Newton-Schulz; AdamW (arXiv 1711.05101); DeepSeek-V3 (arXiv 2412.19437) for the router's bias.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kimi_native import ops
from kimi_native.checkpoint import expected_tensors
from kimi_native.config import Config
from kimi_native.ops._array import array_module, to_host

FLOAT32 = np.dtype(np.float32)
NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315
NS_EPS = 1e-7
MAX_NORM = 1e15  # of a gradient, so that float32 holds the square of what momentum adds up
UPDATE_RMS = 0.2  # what AdamW's updates have: both kinds of parameters can share a learning rate
GROUP_BYTES = 2 << 20  # of matrices that go through Newton-Schulz together
BLOCK = 2**18  # elements that AdamW treats together on the CPU, so that its five arrays stay in the cache
ROUTER_BIAS = "e_score_correction_bias"


def newton_schulz(g, steps: int = 5):
    """About U V^T for each matrix g = U S V^T: after 5 steps singular values from 0.01 |g| on are 0.68 to 1.21.

    g: float32 [..., n, m], NumPy or CuPy. Returns a new array of its shape: X = g / (|g| + 1e-7) in the Frobenius norm,
    then `steps` times X = P X with P = a + b A + c A^2 and A = X X^T. All of these P and A are polynomials of the first
    A: symmetric, they commute, the next A is P A P, and X is multiplied once, by the product of all P. Where n > m they
    stand on the right and A = X^T X, so that A is always the smaller one. Float32 is off by 1e-5 to 1e-3 (the largest
    singular value of the difference), the more the smaller the singular values of g are beside |g|.
    Raises ValueError for fewer than two axes or no step, and as ops.matmul does.
    """
    if g.ndim < 2 or steps < 1:
        raise ValueError(f"newton_schulz: g has shape {list(g.shape)}, steps is {steps}, expected [..., n, m] and >= 1")
    n, m = g.shape[-2:]
    x = g.reshape(math.prod(g.shape[:-2]), n, m)
    xt = x.swapaxes(1, 2)
    gram = ops.matmul(xt, x, symmetric=True) if n > m else ops.matmul(x, xt, symmetric=True)
    norm = _diagonals(gram).sum(axis=1).reshape(-1, 1, 1)  # the trace is |g|^2
    norm **= 0.5
    norm += NS_EPS
    gram /= norm * norm
    factor = product = _polynomial(gram)
    for _ in range(steps - 1):
        gram = ops.matmul(factor, ops.matmul(gram, factor, symmetric=True), symmetric=True)
        factor = _polynomial(gram)
        product = ops.matmul(factor, product, symmetric=True)
    product /= norm
    return (ops.matmul(x, product) if n > m else ops.matmul(product, x)).reshape(g.shape)


def _polynomial(gram):
    """a + A (b + c A) of each A [k, k]."""
    inner = gram * NS_C
    _add_to_diagonals(inner, NS_B)
    result = ops.matmul(gram, inner, symmetric=True)
    _add_to_diagonals(result, NS_A)
    return result


def _diagonals(matrices):
    """A view [B, k] of [B, k, k]."""
    B, k, _ = matrices.shape
    return matrices.reshape(B, k * k)[:, :: k + 1]


def _add_to_diagonals(matrices, value: float) -> None:
    view = _diagonals(matrices)
    view += value


def update_router_bias(bias, tokens_per_expert, rate: float) -> None:
    """bias += rate (sign(e) - mean sign(e)), in place, e_i = mean load - load of expert i.

    bias: float32 [E]. tokens_per_expert: integers [E], how often a step's tokens chose each. Experts with less than
    their share are chosen more from now on. Raises ValueError for a shape, TypeError for a dtype that does not fit.
    """
    load = array_module(bias).asarray(tokens_per_expert)
    if bias.dtype != FLOAT32 or load.dtype.kind not in "iu":
        raise TypeError(
            f"update_router_bias: bias is {bias.dtype}, tokens_per_expert {load.dtype}, expected float32 and integers"
        )
    if bias.ndim != 1 or load.shape != bias.shape:
        raise ValueError(
            f"update_router_bias: bias has shape {list(bias.shape)}, tokens_per_expert {list(load.shape)}, expected [E]"
        )
    sign = array_module(bias).sign(load.sum() - load * len(bias))  # exact, being integers
    bias += rate * (sign - sign.mean())


class Scaled(NamedTuple):
    """Rows `rows` of each head of a parameter, which QK-Clip multiplies by gamma^power. head_rows: None for any."""

    name: str
    head_rows: int | None
    rows: slice
    power: float


@dataclass(frozen=True)
class MLAHeads:
    """The heads of one layer's latent attention.

    q_b: name of the parameter [N (Dn + R), q_lora_rank] (or q_proj's); kv_b: of [N (Dn + Dv), kv_lora_rank].
    """

    q_b: str
    kv_b: str
    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def scaled(self) -> tuple[Scaled, ...]:
        """A score is q_nope . k_nope + q_rope . k_rope, of which all heads share k_rope: q_rope takes all of gamma."""
        nope, q_rows = self.qk_nope_head_dim, self.qk_nope_head_dim + self.qk_rope_head_dim
        return (
            Scaled(self.q_b, q_rows, slice(0, nope), 0.5),
            Scaled(self.q_b, q_rows, slice(nope, q_rows), 1.0),
            Scaled(self.kv_b, nope + self.v_head_dim, slice(0, nope), 0.5),
        )


@dataclass(frozen=True)
class AttentionHeads:
    """The heads of one layer's plain attention. q, k: names of the parameters [N D, in]."""

    q: str
    k: str
    num_heads: int

    @property
    def scaled(self) -> tuple[Scaled, ...]:
        return tuple(Scaled(name, None, slice(None), 0.5) for name in (self.q, self.k))


def mla_heads(config: Config) -> list[MLAHeads]:
    """Of each layer of the text model, in order."""
    text, q_b = config.text_config, "q_b_proj.weight"
    widths = text.num_attention_heads, text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim
    names = (name.removesuffix(q_b) for name in expected_tensors(config) if name.endswith(f".self_attn.{q_b}"))
    return [MLAHeads(f"{prefix}{q_b}", f"{prefix}kv_b_proj.weight", *widths) for prefix in names]


class Piece(NamedTuple):
    """Matrices of one parameter within a group of which all have one shape."""

    name: str
    shape: tuple[int, int, int]  # in which the whole parameter is seen
    matrices: slice  # of the parameter
    place: slice  # in the group
    weight: Any  # [matrices, n, m], views
    momentum: Any


class MuonClip:
    """The optimizer. Parameters are float32 and contiguous, all NumPy or all CuPy, and updated in place.

    params: {name: array}. A router's bias (a name that ends in e_score_correction_bias) is left to update_router_bias.
    muon: the names that Muon updates, of any shape [..., n, m], each matrix by itself; by default arrays of two or
    three axes whose name has neither "embed" nor "lm_head" in it. AdamW updates the others; `muon=()` is AdamW alone.

        Muon:   M = momentum M + G, U = G + momentum M (nesterov) or M,
                W = W (1 - lr weight_decay) - lr 0.2 sqrt(max(n, m)) newton_schulz(U, ns_steps)
        AdamW:  with betas and eps, bias-corrected, the same lr and weight_decay, norms and biases included

    heads: whose logits QK-Clip holds at tau: a head of which a step saw a score S > tau has gamma = tau / S multiplied
    into its weights after the update, so that on the same input its largest score would be tau. tau=None: plain Muon.
    split_heads: for the parameters named in heads, each head's rows are a matrix of their own to Muon.

    Raises ValueError or TypeError, naming argument or parameter, for what does not fit.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        *,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        tau: float | None = 100.0,
        heads: Sequence[MLAHeads | AttentionHeads] = (),
        muon: Iterable[str] | None = None,
        split_heads: bool = False,
    ):
        for name, value, fits in (
            ("lr", lr, 0 <= lr < math.inf),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf),
            ("momentum", momentum, 0 <= momentum < 1),
            ("ns_steps", ns_steps, ns_steps >= 1),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, 0 < eps < math.inf),
            ("tau", tau, tau is None or 0 < tau < math.inf),
        ):
            if not fits:
                raise ValueError(f"MuonClip: {name} is {value}, which is out of range")
        self.lr, self.weight_decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov
        self.ns_steps, self.betas, self.eps, self.tau, self.heads = ns_steps, betas, eps, tau, tuple(heads)
        self.steps = 0
        self._params = {name: w for name, w in params.items() if not name.endswith(ROUTER_BIAS)}
        if not self._params:
            raise ValueError("MuonClip: params has nothing to train")
        self._xp = array_module(next(iter(self._params.values())))
        for name, w in self._params.items():
            what = f"MuonClip: parameter {name}"
            self._check(what, w, None)
            if not w.flags.c_contiguous or not getattr(w.flags, "writeable", True):
                raise ValueError(f"{what} is not contiguous or cannot be written")
        self._check_heads()
        if muon is None:
            muon = [name for name, w in self._params.items() if _is_matrix(name, w)]
        names = list(dict.fromkeys(muon))
        for name in names:
            if name not in self._params or self._params[name].ndim < 2:
                raise ValueError(f"MuonClip: muon names {name}, expected a parameter of two axes or more")
        self._adamw = [name for name in self._params if name not in names]
        kinds = {"momentum": names, "first_moment": self._adamw, "second_moment": self._adamw}
        kept = [(kind, name) for kind, named in kinds.items() for name in named]
        self._state = {f"{kind}.{name}": self._xp.zeros(self._params[name].shape, FLOAT32) for kind, name in kept}
        split = {part.name: layer.num_heads for layer in self.heads for part in layer.scaled} if split_heads else {}
        self._groups = self._grouped({name: self._seen(name, split.get(name)) for name in names})

    def _check(self, what: str, x, shape) -> None:
        """x is float32, lies where the parameters do and has the shape, if one is given."""
        library = self._xp.__name__
        if getattr(x, "dtype", None) != FLOAT32 or array_module(x) is not self._xp:
            found = f"{type(x).__module__}.{type(x).__name__} of {getattr(x, 'dtype', 'no dtype')}"
            raise TypeError(f"{what} is {found}, expected a {library} array of float32")
        if shape is not None and x.shape != shape:
            raise ValueError(f"{what} has shape {list(x.shape)}, expected {list(shape)}")

    def _check_heads(self) -> None:
        for layer, heads in enumerate(self.heads):
            for part in heads.scaled:
                w = self._params.get(part.name)
                if w is None:
                    raise ValueError(f"MuonClip: heads[{layer}] names {part.name}, which is no parameter")
                rows = f"{heads.num_heads} x {part.head_rows or 'head_dim'} rows"
                whole = heads.num_heads > 0 and w.ndim == 2 and w.shape[0] % heads.num_heads == 0
                if not whole or part.head_rows not in (None, w.shape[0] // heads.num_heads):
                    raise ValueError(f"MuonClip: {part.name} has shape {list(w.shape)}, heads[{layer}] expects {rows}")

    def _seen(self, name: str, heads: int | None) -> tuple[int, int, int]:
        """The shape [matrices, n, m] in which Muon sees a parameter."""
        *batch, n, m = self._params[name].shape
        return (heads, n // heads, m) if heads else (math.prod(batch), n, m)

    def _grouped(self, seen: dict[str, tuple[int, int, int]]) -> list[list[Piece]]:
        """Matrices of one shape together, as many as GROUP_BYTES hold and one at least."""
        groups: dict[tuple[int, int], list[list[Piece]]] = {}
        for name, shape in seen.items():
            count, n, m = shape
            most = max(1, GROUP_BYTES // max(1, 4 * n * m))
            weight, momentum = self._params[name].reshape(shape), self._state[f"momentum.{name}"].reshape(shape)
            begin = 0
            while begin < count:
                same = groups.setdefault((n, m), [[]])
                if same[-1] and same[-1][-1].place.stop == most:
                    same.append([])
                first = same[-1][-1].place.stop if same[-1] else 0
                end = min(count, begin + most - first)
                matrices, place = slice(begin, end), slice(first, first + end - begin)
                same[-1].append(Piece(name, shape, matrices, place, weight[matrices], momentum[matrices]))
                begin = end
        return [group for same in groups.values() for group in same]

    def step(self, grads: Mapping[str, Any], max_logits: Sequence | None = None, lr: float | None = None) -> int:
        """Update the parameters; returns how many heads QK-Clip scaled down.

        grads: {name: float32 array}, one for each parameter and of its shape. max_logits: for each entry of heads the
        largest score (what softmax takes, scale included) that each of its heads had in this step's forward pass,
        float32 [N]; may be left out without heads or with tau=None. lr: of this step; by default that of the optimizer.

        Raises FloatingPointError, naming the parameter or layer and head, for values that are not finite and gradients
        with a norm above 1e15; ValueError or TypeError for names, shapes or dtypes. Then nothing has changed.
        """
        lr = self.lr if lr is None else lr
        if not 0 <= lr < math.inf:
            raise ValueError(f"step: lr is {lr}, expected a finite number >= 0")
        self._check_gradients(grads)
        clips = self._checked_logits(max_logits)
        self.steps += 1
        for group in self._groups:
            self._muon_step(group, grads, lr)
        for name in self._adamw:
            self._adamw_step(name, grads[name], lr)
        return sum(self._clip(heads, logits) for heads, logits in clips)

    def _check_gradients(self, grads) -> None:
        for name in self._params:
            if name not in grads:
                raise ValueError(f"step: {name} has no gradient")
        for name, g in grads.items():
            if name not in self._params:
                raise ValueError(f"step: there is a gradient for {name}, which is no parameter of this optimizer")
            self._check(f"step: the gradient of {name}", g, self._params[name].shape)
        squares = {name: self._xp.vdot(g, g) for name, g in grads.items()}  # all queued before the first is waited for
        for name, total in squares.items():
            if not float(total) <= MAX_NORM**2:  # so for NaN
                raise FloatingPointError(f"step: the gradient of {name} is not finite or its norm above {MAX_NORM:.0e}")

    def _checked_logits(self, max_logits) -> list[tuple[MLAHeads | AttentionHeads, np.ndarray]]:
        """(entry of heads, its largest logits [N] on the host); nothing to clip without tau."""
        largest = [np.asarray(to_host(logits)) for logits in (() if max_logits is None else max_logits)]
        if self.tau is not None:
            found, expected = [logits.shape for logits in largest], [(heads.num_heads,) for heads in self.heads]
            if found != expected:
                raise ValueError(f"step: max_logits has arrays of shapes {found}, expected {expected}, as heads")
        for layer, logits in enumerate(largest):
            for head in np.flatnonzero(~np.isfinite(logits)).tolist():
                raise FloatingPointError(f"step: max_logits[{layer}][{head}] (layer, head) is {logits[head]}")
        return list(zip(self.heads, largest, strict=True)) if self.tau is not None else []

    def _muon_step(self, group: list[Piece], grads, lr: float) -> None:
        xp, (_, n, m) = self._xp, group[0].shape
        u = xp.empty((group[-1].place.stop, n, m), FLOAT32)
        for piece in group:
            g, moment, part = grads[piece.name].reshape(piece.shape)[piece.matrices], piece.momentum, u[piece.place]
            moment *= self.momentum
            moment += g
            if self.nesterov:
                xp.multiply(moment, self.momentum, out=part)
                part += g
            else:
                part[...] = moment
        update = newton_schulz(u, self.ns_steps)
        update *= lr * UPDATE_RMS * math.sqrt(max(n, m))
        for piece in group:
            w = piece.weight
            w *= 1 - lr * self.weight_decay
            w -= update[piece.place]

    def _adamw_step(self, name: str, gradient, lr: float) -> None:
        """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2; w loses lr weight_decay w and lr m' / (sqrt(v') + eps), where
        m' = m / (1 - b1^t), v' = v / (1 - b2^t)."""
        xp, (beta1, beta2) = self._xp, self.betas
        root = math.sqrt(1 - beta2**self.steps)
        moments = self._state[f"first_moment.{name}"], self._state[f"second_moment.{name}"]
        arrays = self._params[name], gradient, *moments
        for w, g, m, v in _blocks(*arrays) if xp is np else [arrays]:
            change = xp.empty(g.shape, FLOAT32)
            xp.multiply(g, 1 - beta1, out=change)
            m *= beta1
            m += change
            xp.multiply(g, g, out=change)
            change *= 1 - beta2
            v *= beta2
            v += change
            xp.sqrt(v, out=change)
            change += self.eps * root
            xp.divide(m, change, out=change)
            change *= lr * root / (1 - beta1**self.steps)
            w *= 1 - lr * self.weight_decay
            w -= change

    def _clip(self, heads: MLAHeads | AttentionHeads, logits: np.ndarray) -> int:
        """Scale down the heads over tau; returns how many. float32 holds sqrt(gamma) and gamma to a rounding."""
        over = np.flatnonzero(logits > self.tau).tolist()
        for head in over:
            gamma = self.tau / float(logits[head])
            for part in heads.scaled:
                w = self._params[part.name]
                rows = w.reshape(heads.num_heads, -1, w.shape[1])[head, part.rows]
                rows *= gamma**part.power
        return len(over)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a later optimizer over the same parameters needs to go on bit for bit: NumPy arrays, flat.

        Of parameters in NumPy these are the optimizer's own arrays, which the next step changes. Hyperparameters are
        not among them.
        """
        return {"steps": np.array(self.steps, np.int64)} | {name: to_host(x) for name, x in self._state.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Copy what state_dict gave. Raises ValueError, naming the entry, and then has changed nothing."""
        expected = {"steps": ((), np.dtype(np.int64))} | {name: (x.shape, FLOAT32) for name, x in self._state.items()}
        for name in [*expected, *state]:
            if name not in state or name not in expected:
                missing = "lacks" if name in expected else "has"
                raise ValueError(f"load_state_dict: state {missing} {name}, which does not fit these parameters")
        for name, (shape, dtype) in expected.items():
            x = np.asarray(state[name])
            if (x.shape, x.dtype) != (shape, dtype):
                raise ValueError(
                    f"load_state_dict: {name} is {x.dtype} {list(x.shape)}, expected {dtype} {list(shape)}"
                )
        self.steps = int(state["steps"])
        for name, x in self._state.items():
            x[...] = self._xp.asarray(state[name])


def _is_matrix(name: str, w) -> bool:
    return w.ndim in (2, 3) and "embed" not in name and "lm_head" not in name


def _blocks(*arrays):
    """The same rows of each array, some BLOCK elements at a time."""
    if arrays[0].ndim == 0:
        yield arrays
        return
    rows = max(1, BLOCK // max(1, math.prod(arrays[0].shape[1:])))
    for begin in range(0, len(arrays[0]), rows):
        yield tuple(x[begin : begin + rows] for x in arrays)
