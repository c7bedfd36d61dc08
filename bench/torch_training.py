"""A training step of the text model in PyTorch on the CPU, as one would write it there: autograd, scaled dot-product
attention, one linear map after the other for the experts, Muon from the same formulas."""

import torch
import torch.nn.functional as F
from kimi_native import ops
from kimi_native.model import rope_tables, softmax_scale


def engine(config, params, muon, tokens, lr: float):
    """(name, a function that returns the loss of a step's gradients, one that updates the parameters by them)

    params: of kimi_native.train.params, copied. muon: the names that Muon updates. tokens: int32 [B, S + 1].
    """
    trainer = Trainer(config.text_config, params, muon, lr)
    ids, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    return "torch", lambda: trainer.gradients(ids, targets), trainer.update


class Trainer:
    """The model as a function of its parameters, and its optimizer."""

    def __init__(self, config, params, muon, lr: float):
        torch.set_num_threads(ops.num_threads())
        self.config, self.muon, self.lr = config, muon, lr
        self.params = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in params.items()}
        self.momentum = {name: torch.zeros_like(self.params[name]) for name in muon}
        rest = [p for name, p in self.params.items() if name not in muon and not name.endswith("correction_bias")]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.root = next(name for name in params if name.endswith("model.norm.weight")).removesuffix("norm.weight")

    def gradients(self, ids, targets) -> float:
        """ids, targets: [B, S]. The loss; the gradients stay with the parameters."""
        for p in self.params.values():
            p.grad = None
        loss = self._loss(ids, targets)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def update(self) -> None:
        self.adamw.step()
        for name in self.muon:
            p, m = self.params[name], self.momentum[name]
            m.mul_(0.95).add_(p.grad)
            u = newton_schulz(p.grad + 0.95 * m)
            p.mul_(1 - 0.1 * self.lr).sub_(u, alpha=0.2 * self.lr * max(p.shape[-2:]) ** 0.5)

    def _loss(self, ids, targets):
        c, p, root = self.config, self.params, self.root
        x = p[f"{root}embed_tokens.weight"][ids]
        for layer in range(c.num_hidden_layers):
            name = f"{root}layers.{layer}."
            x = x + self._attention(f"{name}self_attn.", self._norm(f"{name}input_layernorm", x))
            h = self._norm(f"{name}post_attention_layernorm", x)
            dense = layer < c.first_k_dense_replace
            x = x + (self._mlp(f"{name}mlp.", h) if dense else self._moe(f"{name}mlp.", h.flatten(0, 1)).view_as(h))
        head = p[root.removesuffix("model.") + "lm_head.weight"]
        logits = F.linear(self._norm(f"{root}norm", x), head)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _norm(self, name, x, eps=None):
        eps = self.config.rms_norm_eps if eps is None else eps
        return F.rms_norm(x, x.shape[-1:], self.params[f"{name}.weight"], eps)

    def _linear(self, name, x):
        return F.linear(x, self.params[f"{name}.weight"])

    def _attention(self, name, x):
        c, (B, S, _) = self.config, x.shape
        N, nope = c.num_attention_heads, c.qk_nope_head_dim
        q = self._linear(f"{name}q_a_proj", x)
        q = self._linear(f"{name}q_b_proj", self._norm(f"{name}q_a_layernorm", q, c.mla_norm_eps))
        q_nope, q_pe = q.view(B, S, N, -1).split([nope, c.qk_rope_head_dim], dim=-1)
        latent, k_pe = self._linear(f"{name}kv_a_proj_with_mqa", x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self._linear(f"{name}kv_b_proj", self._norm(f"{name}kv_a_layernorm", latent, c.mla_norm_eps))
        k_nope, v = kv.view(B, S, N, -1).split([nope, c.v_head_dim], dim=-1)
        cos, sin = (torch.from_numpy(table)[:, None] for table in rope_tables(c, S))
        q = torch.cat([q_nope, _rotate(q_pe, cos, sin)], dim=-1)
        k = torch.cat([k_nope, _rotate(k_pe[:, :, None], cos, sin).expand(-1, -1, N, -1)], dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale(c))
        return self._linear(f"{name}o_proj", out.transpose(1, 2).flatten(2))

    def _mlp(self, name, x):
        return self._linear(
            f"{name}down_proj", F.silu(self._linear(f"{name}gate_proj", x)) * self._linear(f"{name}up_proj", x)
        )

    def _moe(self, name, x):
        c, p = self.config, self.params
        scores = torch.sigmoid(self._linear(f"{name}gate", x))
        ids = torch.topk(scores.detach() + p[f"{name}gate.e_score_correction_bias"], c.num_experts_per_tok).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=c.n_routed_experts).tolist()
        tokens = order // c.num_experts_per_tok
        gate, up, down = (p[f"{name}experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
        rows = x[tokens].split(counts)
        out = [F.linear(F.silu(F.linear(r, gate[e])) * F.linear(r, up[e]), down[e]) for e, r in enumerate(rows)]
        out = torch.cat(out) * weights.flatten()[order, None]
        return self._mlp(f"{name}shared_experts.", x).index_add(0, tokens, out)


def newton_schulz(g, steps: int = 5):
    """Over the last two axes."""
    x = g / (torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True) + 1e-7)
    tall = g.shape[-2] > g.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


def _rotate(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
