"""The text model: MLA, dense and mixture-of-experts layers, and loading. Names are the checkpoint's.

Shapes: T tokens, H hidden, N heads, D qk_head_dim, C kv_lora_rank, R qk_rope_head_dim, Dn/Dv nope and value head dims.
Activations are float32 [T, H] between modules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kimi_native import ops
from kimi_native.cache import PAGE_SIZE, Cache, PagePool
from kimi_native.checkpoint import Checkpoint, CheckpointError
from kimi_native.config import Config, TextConfig
from kimi_native.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # tokens that go through the layers together
KEY_CHUNK = 512  # cached tokens whose keys and values are expanded together in the naive form


@dataclass
class Step:
    """What the layers share while a chunk of tokens passes through them."""

    positions: np.ndarray  # int32 [T]
    slots: np.ndarray  # int64 [T]
    cos: np.ndarray  # float32 [P, R / 2]
    sin: np.ndarray  # float32 [P, R / 2]
    cache: Cache


class Linear:
    """x @ weight.T with the weight where it lies, bf16 or packed INT4: whichever the checkpoint has."""

    def __init__(self, weights: "Weights", name: str, n_out: int, n_in: int):
        self.arrays = weights.linear(name, n_out, n_in)

    def __call__(self, x, out=None):
        return (ops.gemm if len(self.arrays) == 1 else ops.gemm_int4)(x, *self.arrays, out=out)


class MLA:
    """Multi-head latent attention. Naive form for many new tokens, absorbed form for few."""

    def __init__(self, config: TextConfig, weights: "Weights", layer: int):
        c, N = config, config.num_attention_heads
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        self.q_a_proj = Linear(weights, "q_a_proj", c.q_lora_rank, c.hidden_size)
        self.q_a_layernorm = weights.tensor("q_a_layernorm.weight", c.q_lora_rank)
        self.q_b_proj = Linear(weights, "q_b_proj", N * c.qk_head_dim, c.q_lora_rank)
        self.kv_a_proj_with_mqa = Linear(weights, "kv_a_proj_with_mqa", c.cache_width, c.hidden_size)
        self.kv_a_layernorm = weights.tensor("kv_a_layernorm.weight", c.kv_lora_rank)
        kv_dim = c.qk_nope_head_dim + c.v_head_dim
        self.kv_b_proj = weights.tensor("kv_b_proj.weight", N * kv_dim, c.kv_lora_rank)
        per_head = self.kv_b_proj.reshape(N, kv_dim, c.kv_lora_rank)
        self.w_uk = per_head[:, : c.qk_nope_head_dim]  # [N, Dn, C]
        self.w_uv = per_head[:, c.qk_nope_head_dim :]  # [N, Dv, C]
        self.o_proj = Linear(weights, "o_proj", c.hidden_size, N * c.v_head_dim)

    def forward(self, x, step: Step):
        """x: float32 [T, H], normalised. Appends to the cache. Returns float32 [T, H]."""
        c, T = self.config, len(x)
        latent_q = ops.rms_norm(self.q_a_proj(x), self.q_a_layernorm, c.mla_norm_eps)
        q = self.q_b_proj(latent_q).reshape(T, c.num_attention_heads, c.qk_head_dim)
        kv = self.kv_a_proj_with_mqa(x)  # [T, C + R]
        rotation = step.cos, step.sin, step.positions
        q_pe = q[:, :, c.qk_nope_head_dim :]
        ops.rope(q_pe, *rotation, out=q_pe)
        cache = step.cache.layer(self.layer)
        ops.fused_append_mla_cache(kv, self.kv_a_layernorm, *rotation, cache, step.slots, c.mla_norm_eps)
        attend = self._naive if prefers_naive(c, T, int(step.positions[-1]) + 1) else self._absorbed
        return self.o_proj(attend(q, step).reshape(T, -1))

    def _naive(self, q, step: Step):
        """Expand keys and values of the whole context, chunk by chunk; the softmax goes on from chunk to chunk."""
        c, T, stop = self.config, len(q), int(step.positions[-1]) + 1
        state = None
        for start in range(0, stop, KEY_CHUNK):
            rows = step.cache.rows(self.layer, start, min(stop, start + KEY_CHUNK))  # [S, C + R]
            kv = ops.gemm(rows[:, : c.kv_lora_rank], self.kv_b_proj).reshape(len(rows), c.num_attention_heads, -1)
            state = ops.mla_prefill(
                q,
                kv,
                rows[:, c.kv_lora_rank :],
                np.array([0, T], np.int32),
                np.array([0, len(rows)], np.int32),
                step.positions[:1] - np.int32(start),
                self.scale,
                state=state,
                return_lse=True,
            )
        return state[0]

    def _absorbed(self, q, step: Step):
        """Bring the query into latent space and attend to the cache rows themselves, each token on its own."""
        c, (T, N, _) = self.config, q.shape
        latent_q = np.empty((T, N, c.cache_width), np.float32)
        ops.batched_gemm(
            q[:, :, : c.qk_nope_head_dim],
            self.w_uk,
            transpose_weight=True,
            out=latent_q[:, :, : c.kv_lora_rank],
        )
        latent_q[:, :, c.kv_lora_rank :] = q[:, :, c.qk_nope_head_dim :]
        latent_out = ops.mla_decode(
            latent_q[None],
            step.cache.layer(self.layer),
            step.cache.page_table,
            step.positions[-1:] + np.int32(1),
            c.kv_lora_rank,
            self.scale,
        )
        return ops.batched_gemm(latent_out[0], self.w_uv)


class DenseMLP:
    """SwiGLU: down(silu(gate x) * (up x))."""

    def __init__(self, weights: "Weights", hidden_size: int, intermediate_size: int):
        self.intermediate_size = intermediate_size
        self.gate_proj = Linear(weights, "gate_proj", intermediate_size, hidden_size)
        self.up_proj = Linear(weights, "up_proj", intermediate_size, hidden_size)
        self.down_proj = Linear(weights, "down_proj", hidden_size, intermediate_size)

    def forward(self, x):
        """x: float32 [T, H]. Returns float32 [T, H]."""
        gate_up = np.empty((len(x), 2 * self.intermediate_size), np.float32)
        self.gate_proj(x, out=gate_up[:, : self.intermediate_size])
        self.up_proj(x, out=gate_up[:, self.intermediate_size :])
        return self.down_proj(ops.silu_and_mul(gate_up))


class MoE:
    """Routed experts chosen by a sigmoid router, plus the shared expert, which every token passes."""

    def __init__(self, config: TextConfig, weights: "Weights"):
        c, E = config, config.n_routed_experts
        self.config = config
        self.gate = weights.tensor("gate.weight", E, c.hidden_size)
        self.e_score_correction_bias = weights.tensor("gate.e_score_correction_bias", E, dtype="F32")
        self.gate_proj = weights.experts("gate_proj", E, c.moe_intermediate_size, c.hidden_size)
        self.up_proj = weights.experts("up_proj", E, c.moe_intermediate_size, c.hidden_size)
        self.down_proj = weights.experts("down_proj", E, c.hidden_size, c.moe_intermediate_size)
        shared = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = DenseMLP(weights / "shared_experts", c.hidden_size, shared)

    def forward(self, x):
        """x: float32 [T, H]. Returns float32 [T, H]."""
        c = self.config
        topk_weights, topk_ids = ops.topk_sigmoid(
            ops.gemm(x, self.gate),
            self.e_score_correction_bias,
            c.num_experts_per_tok,
            c.routed_scaling_factor,
            c.norm_topk_prob,
        )
        out = ops.fused_moe(x, topk_weights, topk_ids, self.gate_proj, self.up_proj, self.down_proj)
        out += self.shared_experts.forward(x)
        return out


class DecoderLayer:
    """Attention and feed-forward, each behind a norm, both added to the residual stream."""

    def __init__(self, config: TextConfig, weights: "Weights", layer: int):
        self.eps = config.rms_norm_eps
        self.input_layernorm = weights.tensor("input_layernorm.weight", config.hidden_size)
        self.self_attn = MLA(config, weights / "self_attn", layer)
        self.post_attention_layernorm = weights.tensor("post_attention_layernorm.weight", config.hidden_size)
        if layer < config.first_k_dense_replace:
            self.mlp = DenseMLP(weights / "mlp", config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, weights / "mlp")

    def forward(self, delta, residual, step: Step):
        """delta: what the layer before adds to `residual`, both float32 [T, H]. Returns what this layer adds."""
        h = ops.fused_add_rms_norm(delta, residual, self.input_layernorm, self.eps)
        h = self.self_attn.forward(h, step)
        h = ops.fused_add_rms_norm(h, residual, self.post_attention_layernorm, self.eps)
        return self.mlp.forward(h)


class Model:
    """A loaded checkpoint: `config` is its config.json, `tokenizer` is None without a tiktoken.model, `chat_template`
    is the text of chat_template.jinja or None.
    """

    @classmethod
    def load(cls, path, cache_dtype="bfloat16", progress: Callable[[int, int], None] | None = None, **overrides):
        """Map a checkpoint folder as published; no weight is copied or converted.

        cache_dtype: "bfloat16" or "float32". progress(done, total) is called after each file's header,
        then after each layer. Overrides replace fields of the text config, e.g. mla_norm_eps=1e-6.
        Raises ConfigError or CheckpointError, naming file or tensor, what was found and what was expected.
        """
        path = Path(path)
        config = Config.from_folder(path, **overrides)
        model = cls(config, Checkpoint(path, progress), cache_dtype, progress)
        if (path / "tiktoken.model").exists():
            model.tokenizer = Tokenizer.from_folder(path)
        if (path / "chat_template.jinja").exists():
            model.chat_template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        return model

    def __init__(self, config: Config, checkpoint: Checkpoint, cache_dtype: str, progress):
        c = config.text_config
        self.config, self.cache_dtype = config, cache_dtype
        self.tokenizer: Tokenizer | None = None
        self.chat_template: str | None = None
        PagePool(1, c.cache_width, 0, cache_dtype)  # refuses an unknown cache_dtype before anything is read
        weights = Weights(checkpoint, checkpoint.prefix)
        body = weights / "model"
        self.embed_tokens = checkpoint.tensor(
            f"{checkpoint.prefix}model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "BF16"
        )
        self.layers = []
        for layer in range(c.num_hidden_layers):
            self.layers.append(DecoderLayer(c, body / "layers" / str(layer), layer))
            if progress:
                progress(layer + 1, c.num_hidden_layers)
        self.norm = body.tensor("norm.weight", c.hidden_size)
        self.lm_head = Linear(weights, "lm_head", c.vocab_size, c.hidden_size)
        dense, experts = weights.read_bytes["dense"], weights.read_bytes["experts"]
        # What one token reads: everything but the embedding table and the experts it is not routed to.
        self.bytes_per_token = dense + experts * c.num_experts_per_tok // c.n_routed_experts
        self._cos = self._sin = np.empty((0, c.qk_rope_head_dim // 2), np.float32)

    def new_cache(self, max_tokens: int) -> Cache:
        """A latent cache for one sequence of up to max_tokens. Memory is committed as tokens are written.

        Raises ValueError beyond the model's max_position_embeddings.
        """
        c = self.config.text_config
        if not 1 <= max_tokens <= c.max_position_embeddings:
            raise ValueError(
                f"max_tokens is {max_tokens}, expected 1 to the context of {c.max_position_embeddings} tokens"
            )
        pages = -(-max_tokens // PAGE_SIZE)
        return Cache(PagePool(c.num_hidden_layers, c.cache_width, pages, self.cache_dtype), max_tokens)

    def forward(self, token_ids, cache: Cache, last_only: bool = False, progress=None):
        """Run tokens through the model at the positions that follow those in the cache, and append them to it.

        token_ids: integers, at least one, each in [0, vocab_size). Returns logits float32 [T, V], or [1, V] of the last
        token with last_only. Broken off by an exception, the cache keeps the chunks that were finished.
        progress(done, total) is called after each layer of each chunk, in tokens times layers.
        Raises ValueError for an empty list, an id out of range or a full cache.
        """
        ids = self._checked(token_ids)
        if len(cache) + len(ids) > cache.max_tokens:
            cache.reserve(len(ids))  # raises with the numbers
        depth, logits = len(self.layers), []
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            done = partial(_report, progress, start * depth, len(chunk), len(ids) * depth) if progress else None
            hidden = self._hidden(chunk, cache, done)
            if not last_only:
                logits.append(self.lm_head(hidden))
        return self.lm_head(hidden[-1:]) if last_only else np.concatenate(logits)

    def _hidden(self, ids, cache: Cache, layer_done: Callable[[int], None] | None):
        """One chunk through all layers: int [T] -> float32 [T, H] after the final norm."""
        start, stop = len(cache), len(cache) + len(ids)
        cos, sin = self._rope_tables(stop)
        step = Step(np.arange(start, stop, dtype=np.int32), cache.reserve(len(ids)), cos, sin, cache)
        delta = self.embed_tokens[ids].astype(np.float32)
        residual = np.zeros_like(delta)
        for count, layer in enumerate(self.layers, 1):
            delta = layer.forward(delta, residual, step)
            if layer_done:
                layer_done(count)
        cache.commit(ids.tolist())
        return ops.fused_add_rms_norm(delta, residual, self.norm, self.config.text_config.rms_norm_eps)

    def _checked(self, token_ids) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"token_ids is {ids.dtype} of shape {list(ids.shape)}, expected a non-empty list of integers"
            )
        vocab_size = self.config.text_config.vocab_size
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if wrong.size:
            raise ValueError(f"token_ids[{wrong[0]}] is {ids[wrong[0]]}, expected 0 <= id < {vocab_size}")
        return ids.astype(np.int64)

    def _rope_tables(self, length: int):
        """cos and sin for positions 0 .. length - 1 at least; grown by doubling."""
        if length > len(self._cos):
            self._cos, self._sin = rope_tables(self.config.text_config, max(256, 2 * length))
        return self._cos, self._sin


def _report(progress, before: int, tokens: int, total: int, layers_done: int) -> None:
    progress(before + tokens * layers_done, total)


class Weights:
    """The tensors under one prefix of a checkpoint: weights / "mlp" goes down one name."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, read_bytes: dict[str, int] | None = None):
        self.checkpoint, self.prefix = checkpoint, prefix
        self.read_bytes = {"dense": 0, "experts": 0} if read_bytes is None else read_bytes

    def __truediv__(self, name: str) -> "Weights":
        return Weights(self.checkpoint, f"{self.prefix}{name}.", self.read_bytes)

    def tensor(self, name: str, *shape: int, dtype: str = "BF16", kind: str = "dense") -> np.ndarray:
        view = self.checkpoint.tensor(self.prefix + name, shape, dtype)
        self.read_bytes[kind] += view.nbytes
        return view

    def linear(self, name: str, n_out: int, n_in: int, kind: str = "dense") -> tuple[np.ndarray, ...]:
        """(weight,) in bf16 or (weight_packed, weight_scale): INT4 iff weight_packed exists."""
        if f"{self.prefix}{name}.weight_packed" not in self.checkpoint:
            return (self.tensor(f"{name}.weight", n_out, n_in, kind=kind),)
        packed = self.tensor(f"{name}.weight_packed", n_out, n_in // 8, dtype="I32", kind=kind)
        return packed, self.tensor(f"{name}.weight_scale", n_out, n_in // 32, kind=kind)

    def experts(self, name: str, count: int, n_out: int, n_in: int) -> ops.ExpertWeights:
        """One projection of all experts; they must agree on bf16 or INT4."""
        arrays = [self.linear(f"experts.{e}.{name}", n_out, n_in, kind="experts") for e in range(count)]
        kinds = {len(a) for a in arrays}
        if len(kinds) > 1:
            odd = next(e for e in range(count) if len(arrays[e]) != len(arrays[0]))
            raise CheckpointError(
                f"{self.prefix}experts.{odd}.{name}: is {'INT4' if len(arrays[odd]) == 2 else 'bf16'}, expected the "
                f"format of expert 0, {'INT4' if len(arrays[0]) == 2 else 'bf16'}"
            )
        return ops.ExpertWeights(*zip(*arrays, strict=True))


def prefers_naive(config: TextConfig, new_tokens: int, context: int) -> bool:
    """Whether expanding the context costs fewer multiplications per head than attending in latent space."""
    expand = (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    pairs = new_tokens * context
    naive = context * expand + pairs * (config.qk_head_dim + config.v_head_dim)
    absorbed = new_tokens * expand + pairs * (config.cache_width + config.kv_lora_rank)
    return naive < absorbed


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: TextConfig) -> float:
    """qk_head_dim^-0.5, times YaRN's mscale_all_dim correction squared."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_scaling
    return scale * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2 if rope else scale


def inverse_frequencies(config: TextConfig) -> np.ndarray:
    """float32 [R / 2]: RoPE's frequencies, with YaRN blended between f and f / factor.

    Blended in float32, as where the model was trained: float64 would differ in the last digits.
    Source: Peng et al. 2023, arXiv 2309.00071, in the form of DeepSeek-V2's published code.
    """
    R, rope = config.qk_rope_head_dim, config.rope_scaling
    base = (config.rope_theta ** (np.arange(0, R, 2) / R)).astype(np.float32)
    frequencies = 1 / base
    if rope is None:
        return frequencies

    def index_of(rotations: float) -> float:
        """The pair that turns `rotations` times within the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return R * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(index_of(rope.beta_fast)), 0)
    high = min(math.ceil(index_of(rope.beta_slow)), R - 1)
    ramp = (np.arange(R // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    return frequencies * kept + 1 / (np.float32(rope.factor) * base) * (1 - kept)


def rope_tables(config: TextConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [length, R / 2], of position times frequency."""
    rope = config.rope_scaling
    angles = np.arange(length)[:, None] * inverse_frequencies(config).astype(np.float64)
    scale = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim) if rope else 1.0
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
