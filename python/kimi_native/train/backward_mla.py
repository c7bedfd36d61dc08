"""Multi-head latent attention in its naive form, and its gradients.

Shapes: T tokens of all sequences, H hidden, N heads, Q q_lora_rank, C kv_lora_rank, R qk_rope_head_dim, Dn/Dv nope and
value head dims, D = Dn + R.
Source: DeepSeek-AI 2024, arXiv 2405.04434.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_native import ops
from kimi_native.config import TextConfig
from kimi_native.model import rope_tables, softmax_scale


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a step lie and what rotates their tokens."""

    cu_seqlens: np.ndarray  # int32 [B + 1]
    causal_offsets: np.ndarray  # int32 [B], 0: keys and queries begin together
    positions: np.ndarray  # int32 [T], within the sequence
    cos: np.ndarray  # float32 [longest, R / 2]
    sin: np.ndarray

    @classmethod
    def of(cls, config: TextConfig, cu_seqlens: np.ndarray) -> "Sequences":
        lengths = np.diff(cu_seqlens)
        positions = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
        return cls(cu_seqlens, np.zeros_like(lengths), positions, *rope_tables(config, lengths.max()))

    def rotate(self, x) -> None:
        """x [T, N, R] in place."""
        ops.rope(x, self.cos, self.sin, self.positions, out=x)

    def rotate_back(self, x) -> None:
        """The transpose of `rotate`, which is what its gradient passes through."""
        ops.rope(x, self.cos, -self.sin, self.positions, out=x)


class Saved(NamedTuple):
    """What `backward` needs of a forward pass."""

    latents: np.ndarray  # [T, Q + C + R]: of the query and of keys and values before their norms, rotated rope key
    q: np.ndarray  # [T, N, D], rotated
    kv: np.ndarray  # [T, N, Dn + Dv]
    out: np.ndarray  # [T, N, Dv]
    lse: np.ndarray  # [T, N]
    max_logits: np.ndarray  # [N], the largest score of each head


def forward(w: dict, config: TextConfig, h, sequences: Sequences) -> tuple[np.ndarray, Saved]:
    """h [T, H], normalised, to [T, H]. w: the parameters of self_attn."""
    c, T = config, len(h)
    latents = ops.matmul(h, _down(w).T)
    latent_q, latent_kv, k_pe = _split(c, latents)
    q, kv = _up(w, c, "q", latent_q), _up(w, c, "kv", latent_kv)
    sequences.rotate(q[:, :, c.qk_nope_head_dim :])
    sequences.rotate(k_pe[:, None])
    largest = np.empty((T, c.num_attention_heads), h.dtype)
    out, lse = ops.mla_prefill(q, kv, k_pe, *_attended(c, sequences), return_lse=True, max_logits=largest)
    saved = Saved(latents, q, kv, out, lse, largest.max(axis=0))
    return ops.matmul(out.reshape(T, -1), w["o_proj.weight"].T), saved


def backward(w: dict, config: TextConfig, h, sequences: Sequences, saved: Saved, dout) -> tuple[np.ndarray, dict]:
    """(dh, gradients of w) from dout [T, H]; h as in `forward`."""
    c, (latents, q, kv, out, lse, _), T = config, saved, len(h)
    latent_q, latent_kv, k_pe = _split(c, latents)
    do_proj = ops.matmul(dout.T, out.reshape(T, -1))
    dout = ops.matmul(dout, w["o_proj.weight"]).reshape(out.shape)
    dq, dkv, dk_pe = ops.mla_prefill_backward(q, kv, k_pe, *_attended(c, sequences), out, lse, dout)
    sequences.rotate_back(dk_pe[:, None])
    sequences.rotate_back(dq[:, :, c.qk_nope_head_dim :])
    dlatent_q, of_q = _up_backward(w, c, "q", latent_q, dq)
    dlatent_kv, of_kv = _up_backward(w, c, "kv", latent_kv, dkv)
    dlatents = np.concatenate([dlatent_q, dlatent_kv, dk_pe], axis=1)
    dq_a_proj, dkv_a_proj = np.split(ops.matmul(dlatents.T, h), [c.q_lora_rank])
    down = {"q_a_proj.weight": dq_a_proj, "kv_a_proj_with_mqa.weight": dkv_a_proj}
    return ops.matmul(dlatents, _down(w)), down | of_q | of_kv | {"o_proj.weight": do_proj}


def _up(w: dict, c: TextConfig, side: str, latent) -> np.ndarray:
    """A latent through its norm and the projection to the heads, [T, N, D or Dn + Dv]. side: "q" or "kv"."""
    h = ops.rms_norm(latent, w[f"{side}_a_layernorm.weight"], c.mla_norm_eps)
    return ops.matmul(h, w[f"{side}_b_proj.weight"].T).reshape(len(latent), c.num_attention_heads, -1)


def _up_backward(w: dict, c: TextConfig, side: str, latent, dout) -> tuple[np.ndarray, dict]:
    """(dlatent, gradients of norm and projection) from dout as `_up` gives it."""
    norm, dout = w[f"{side}_a_layernorm.weight"], dout.reshape(len(latent), -1)
    dproj = ops.matmul(dout.T, ops.rms_norm(latent, norm, c.mla_norm_eps))
    dh = ops.matmul(dout, w[f"{side}_b_proj.weight"])
    dlatent, dnorm = ops.rms_norm_backward(latent, norm, c.mla_norm_eps, dh)
    return dlatent, {f"{side}_a_layernorm.weight": dnorm, f"{side}_b_proj.weight": dproj}


def _down(w: dict) -> np.ndarray:
    """Both projections into latent space as one, [Q + C + R, H]."""
    return np.concatenate([w["q_a_proj.weight"], w["kv_a_proj_with_mqa.weight"]])


def _split(c: TextConfig, latents) -> list[np.ndarray]:
    """Views of [T, Q + C + R]: [T, Q], [T, C], [T, R]."""
    return np.split(latents, [c.q_lora_rank, c.q_lora_rank + c.kv_lora_rank], axis=1)


def _attended(c: TextConfig, sequences: Sequences) -> tuple:
    """What mla_prefill and its gradient take after q, kv and k_pe."""
    return sequences.cu_seqlens, sequences.cu_seqlens, sequences.causal_offsets, softmax_scale(c)
