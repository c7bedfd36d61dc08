"""Muon in PyTorch on the CPU: Newton-Schulz as it is usually written, and torch.optim's step."""

import torch
from kimi_native import ops

torch.set_num_threads(ops.num_threads())
torch.set_grad_enabled(False)


def newton_schulz(g, steps: int):
    """A function that returns the result. g: float32 [..., n, m]."""
    g = torch.from_numpy(g)
    return lambda: iterate(g, steps).numpy()


def iterate(g, steps: int):
    if g.shape[-2] > g.shape[-1]:
        return iterate(g.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def batched_step(params, grads, is_matrix, result: str):
    """A function that does a step with experts as batches, in float32, AdamW by torch.optim; returns a parameter."""
    placed = {name: torch.from_numpy(w.copy()) for name, w in params.items()}
    matrices = {name: w for name, w in placed.items() if is_matrix(name, w)}
    momenta = {name: torch.zeros_like(w) for name, w in matrices.items()}
    others = adamw(placed, grads, set(placed) - set(matrices))

    def step():
        for name, w in matrices.items():
            g, m = torch.from_numpy(grads[name]), momenta[name]
            m.mul_(0.95).add_(g)
            update = iterate(g.add(m, alpha=0.95), 5)
            w.mul_(1 - 2e-3 * 0.1).sub_(update, alpha=2e-3 * 0.2 * max(w.shape[-2:]) ** 0.5)
        others.step()
        return placed[result].numpy()

    return step


def optim_step(params, grads, is_matrix, result: str):
    """A function that does torch.optim.Muon's step, which takes matrices one by one and multiplies in bf16."""
    placed = {name: torch.from_numpy(w.copy()) for name, w in params.items()}
    matrices = []
    for name, w in placed.items():
        if is_matrix(name, w):
            g = torch.from_numpy(grads[name])
            matrices += map(parameter, *((w, g) if w.ndim == 3 else (w[None], g[None])))
    options = {"lr": 2e-3, "weight_decay": 0.1}
    muon = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
    others = adamw(placed, grads, {name for name, w in placed.items() if not is_matrix(name, w)})

    def step():
        muon.step()
        others.step()
        return placed[result].numpy()

    return step


def adamw(placed, grads, names):
    parameters = [parameter(placed[name], torch.from_numpy(grads[name])) for name in sorted(names)]
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def parameter(w, g):
    """Of the same memory as w."""
    p = torch.nn.Parameter(w)
    p.grad = g
    return p
