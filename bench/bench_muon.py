"""muon: Newton-Schulz over the model's matrices, and the optimizer's step of a small model."""

from itertools import chain

import numpy as np
from kimi_native.train.muonclip import MuonClip, newton_schulz

from bench import cpu_peers, shapes

STEPS, MOMENTUM, DECAY = 5, 0.95, 0.1
LARGE = "o_proj", "dense gate_proj"  # minutes each: not with --quick
LAYERS, HIDDEN, EXPERTS, INTERMEDIATE, VOCAB = 5, 128, 32, 64, 1024  # of the small model


def bench(harness):
    if harness.cuda:
        return
    matrices = {"2 experts' up_proj": (2, *shapes.EXPERT_UP)}
    matrices |= {name: shapes.PROJECTIONS[name] for name in ("q_b_proj", "kv_b_proj", *LARGE)}
    for name, shape in matrices.items():
        if not (harness.quick and name in LARGE):
            orthogonalise(harness, name, shape)
    small_model(harness)


def orthogonalise(harness, name, shape):
    g = harness.arrays.normal(shapes.rng(), *shape)
    harness.run(
        "newton_schulz",
        name,
        lambda: newton_schulz(g, STEPS),
        bytes_moved=2 * g.nbytes,
        operations=operations(shape),
        baseline=lambda: numpy_newton_schulz(g),
        cpu_peers=lambda: cpu_peers.newton_schulz(g, STEPS),
    )


def operations(shape) -> int:
    """Two a multiply-add, of our form of the iteration, half of each symmetric product. The usual form has 1.2 times as
    many for square matrices and 5.8 times as many for kv_b_proj's."""
    k, longer = sorted(shape[-2:])
    return (shape[0] if len(shape) == 3 else 1) * (3 * k * k * longer + (4 * STEPS - 3) * k**3)


def small_model(harness):
    """One step over 4.6 million parameters. What it returns are one layer's gate projections."""
    named = chain.from_iterable(
        {f"{layer}.{name}": shape for name, shape in layer_shapes().items()}.items() for layer in range(LAYERS)
    )
    every = dict(named) | {"embed": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "norm": (HIDDEN,)}
    rng = shapes.rng()
    params = {name: np.float32(0.02) * shapes.random_f32(rng, *shape) for name, shape in every.items()}
    grads = {name: shapes.random_f32(rng, *shape) for name, shape in every.items()}
    ours, theirs = ({name: w.copy() for name, w in params.items()} for _ in range(2))
    optimizer = MuonClip(ours, momentum=MOMENTUM, weight_decay=DECAY)
    baseline = NumpyMuon(theirs)

    def step():
        optimizer.step(grads)
        return ours["0.experts.gate_proj"]

    harness.run(
        "muon_step",
        f"{sum(w.size for w in params.values()) / 1e6:.1f}M parameters",
        step,
        bytes_moved=6 * sum(w.nbytes for w in params.values()),  # parameters and momentum there and back, gradients
        operations=sum(operations(w.shape) for name, w in params.items() if is_matrix(name, w)),
        baseline=lambda: baseline.step(grads),
        cpu_peers=lambda: cpu_peers.muon_step(params, grads, is_matrix, "0.experts.gate_proj"),
    )


def layer_shapes():
    H, E, I = HIDDEN, EXPERTS, INTERMEDIATE  # noqa: E741
    attention = {"q_a": (64, H), "q_b": (192, 64), "kv_a": (48, H), "kv_b": (256, 32), "o": (H, 128)}
    shared = {"shared.gate_proj": (I, H), "shared.up_proj": (I, H), "shared.down_proj": (H, I)}
    routed = {"experts.gate_proj": (E, I, H), "experts.up_proj": (E, I, H), "experts.down_proj": (E, H, I)}
    return attention | shared | routed | {"router": (E, H), "norm0": (H,), "norm1": (H,)}


def is_matrix(name, w) -> bool:
    return w.ndim > 1 and name not in ("embed", "lm_head")


def numpy_newton_schulz(g):
    """As it is usually written."""
    if g.shape[-2] > g.shape[-1]:
        return numpy_newton_schulz(g.swapaxes(-2, -1)).swapaxes(-2, -1)
    a, b, c = np.float32([3.4445, -4.7750, 2.0315])
    x = g / (np.linalg.norm(g, axis=(-2, -1), keepdims=True) + np.float32(1e-7))
    for _ in range(STEPS):
        gram = x @ x.swapaxes(-2, -1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


class NumpyMuon:
    """Muon and AdamW as one writes them."""

    def __init__(self, params):
        self.params, self.steps = params, 0
        self.first, self.second = ({name: np.zeros_like(w) for name, w in params.items()} for _ in range(2))

    def step(self, grads, lr=2e-3):
        self.steps += 1
        for name, w in self.params.items():
            g, m, v = grads[name], self.first[name], self.second[name]
            if is_matrix(name, w):
                m[...] = MOMENTUM * m + g
                change = 0.2 * max(w.shape[-2:]) ** 0.5 * numpy_newton_schulz(g + MOMENTUM * m)
            else:
                m[...] = 0.9 * m + 0.1 * g
                v[...] = 0.95 * v + 0.05 * g**2
                change = m / (1 - 0.9**self.steps) / (np.sqrt(v / (1 - 0.95**self.steps)) + 1e-8)
            w -= lr * (change + DECAY * w)
