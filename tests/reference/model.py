"""The whole text model in float64: every token of one sequence at once, naive attention, no cache.

`tensors` maps names without prefix ("model.layers.0.self_attn.q_a_proj.weight") to arrays; `config` has the
attributes of the text config. A module is INT4 where `<module>.weight_packed` exists.
"""

import math

import numpy as np

from .attention import mla_prefill, rope
from .linear import exact_int4
from .moe import topk_sigmoid
from .norm import rms_norm


def logits(tensors, config, token_ids, placeholder=-1, media=()):
    """float64 [T, V] for the tokens at positions 0..T-1; of each placeholder the next row of media, arrays [n, H]."""
    ids = np.asarray(token_ids, int)
    x = np.float64(tensors["model.embed_tokens.weight"][ids])
    if len(media):
        x[ids == placeholder] = np.concatenate(media)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        h = rms_norm(x, tensors[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(tensors, config, f"{name}.self_attn", h)
        h = rms_norm(x, tensors[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        x = x + (mlp(tensors, f"{name}.mlp", h) if dense else moe(tensors, config, f"{name}.mlp", h))
    return linear(tensors, "lm_head", rms_norm(x, tensors["model.norm.weight"], config.rms_norm_eps))


def linear(tensors, module, x):
    """x @ W.T with the weight of the module, decoded if it is packed."""
    if f"{module}.weight_packed" in tensors:
        weight = exact_int4(tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"])
    else:
        weight = np.float64(tensors[f"{module}.weight"])
    return x @ weight.T


def mlp(tensors, module, x):
    """SwiGLU: down(silu(gate x) * up x)."""
    gate = linear(tensors, f"{module}.gate_proj", x)
    return linear(tensors, f"{module}.down_proj", gate / (1 + np.exp(-gate)) * linear(tensors, f"{module}.up_proj", x))


def moe(tensors, config, module, x):
    """The shared experts plus the weighted sum of the routed ones."""
    weights, ids = topk_sigmoid(
        linear(tensors, f"{module}.gate", x),
        tensors[f"{module}.gate.e_score_correction_bias"],
        config.num_experts_per_tok,
        config.routed_scaling_factor,
        config.norm_topk_prob,
    )
    y = mlp(tensors, f"{module}.shared_experts", x) if config.n_shared_experts else np.zeros_like(x)
    for e in np.unique(ids):
        t, k = np.nonzero(ids == e)
        y[t] += weights[t, k, None] * mlp(tensors, f"{module}.experts.{e}", x[t])
    return y


def attention(tensors, config, module, h):
    """Multi-head latent attention of the normalised rows h [T, H] to themselves, causal."""
    T, N, R = len(h), config.num_attention_heads, config.qk_rope_head_dim
    eps = config.mla_norm_eps
    q = linear(tensors, f"{module}.q_a_proj", h)
    q = linear(tensors, f"{module}.q_b_proj", rms_norm(q, tensors[f"{module}.q_a_layernorm.weight"], eps))
    q = q.reshape(T, N, config.qk_nope_head_dim + R)
    latent, k_pe = np.split(linear(tensors, f"{module}.kv_a_proj_with_mqa", h), [config.kv_lora_rank], axis=1)
    latent = rms_norm(latent, tensors[f"{module}.kv_a_layernorm.weight"], eps)
    kv = linear(tensors, f"{module}.kv_b_proj", latent).reshape(T, N, -1)
    cos, sin = rope_tables(config, T)
    positions = np.arange(T)
    q[..., -R:] = rope(q[..., -R:], cos, sin, positions)
    k_pe = rope(k_pe[:, None, :], cos, sin, positions)[:, 0]
    out = mla_prefill(q, kv, k_pe, [0, T], [0, T], [0], softmax_scale(config))
    return linear(tensors, f"{module}.o_proj", out.reshape(T, -1))


def inverse_frequencies(config):
    """[R/2] angles per position: theta^(-2i/R), with YaRN blended into theta^(-2i/R) / factor."""
    R, yarn = config.qk_rope_head_dim, config.rope_scaling
    i = np.arange(R // 2)
    f = config.rope_theta ** (-2.0 * i / R)
    if yarn is None:
        return f

    def corrected(rotations):
        ratio = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return R * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(corrected(yarn.beta_fast)), 0)
    high = min(math.ceil(corrected(yarn.beta_slow)), R - 1)
    ramp = np.clip((i - low) / (high - low if high != low else 0.001), 0, 1)
    return f * (1 - ramp) + f / yarn.factor * ramp


def magnitude(yarn, mscale):
    """YaRN's factor m(a) = 0.1 a ln(factor) + 1; 1 without scaling."""
    return 0.1 * mscale * math.log(yarn.factor) + 1 if yarn is not None and yarn.factor > 1 else 1.0


def softmax_scale(config):
    """qk_head_dim^-0.5 * m(mscale_all_dim)^2."""
    yarn = config.rope_scaling
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return scale if yarn is None else scale * magnitude(yarn, yarn.mscale_all_dim) ** 2


def rope_tables(config, length):
    """(cos, sin), each [length, R/2]."""
    yarn = config.rope_scaling
    angle = np.arange(length)[:, None] * inverse_frequencies(config)
    factor = 1.0 if yarn is None else magnitude(yarn, yarn.mscale) / magnitude(yarn, yarn.mscale_all_dim)
    return np.cos(angle) * factor, np.sin(angle) * factor
