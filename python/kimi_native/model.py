"""The text model: MLA, dense and mixture-of-experts layers, and loading. Names are the checkpoint's.

Shapes: T tokens, H hidden, N heads, D qk_head_dim, C kv_lora_rank, R qk_rope_head_dim, Dn/Dv nope and value head dims.
Activations are [T, H] between modules, float32 on the CPU and bfloat16 on the GPU; the residual stream is float32.
Ops run where their arrays lie: a model is placed by what Weights gives out.
"""

import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from ml_dtypes import bfloat16

from kimi_native import ops
from kimi_native.cache import PAGE_SIZE, Cache, PagePool, check_dtype
from kimi_native.checkpoint import Checkpoint, no_collections
from kimi_native.config import Config, TextConfig
from kimi_native.expert_cache import ExpertCache, budget, parse_bytes
from kimi_native.media import MediaItem, MediaProcessor
from kimi_native.ops import gpu
from kimi_native.ops._array import array_module, empty, to_host
from kimi_native.placement import Weights, check_activations, check_dense, check_device, check_memory, read_ahead
from kimi_native.splice import EncodedMedia, Span, cache_keys, find_spans
from kimi_native.step import DecodeGraph, KeyChunk, Step
from kimi_native.tokenizer import Tokenizer
from kimi_native.vision import VisionModel

PREFILL_CHUNK = 512  # tokens that go through the layers together
KEY_CHUNK = 512  # cached tokens whose keys and values are expanded together in the naive form
# On the GPU the result of a key chunk is rounded to bf16 before the next, and experts with more tokens are faster.
GPU_PREFILL_CHUNK = 2048
GPU_KEY_CHUNK = 16384  # 0.5 GB of keys and values
DEMO = Path(__file__).with_name("demo")  # the checkpoint that ships with the package
ENCODED_MEDIA = 512 << 20  # bytes of encoded media to keep: of K2.5 18,700 tokens, on the GPU twice as many


class Linear:
    """x @ weight.T with the weight where it lies, bf16 or packed INT4: whichever the checkpoint has; or int8.

    Several weights, given as name=n_out, leave their outputs side by side.
    """

    def __init__(self, weights: Weights, n_in: int, **outputs: int):
        self.n_out = sum(outputs.values())
        self.parts = [(_product(arrays), arrays) for arrays in weights.linear(n_in, **outputs)]

    def __call__(self, x, out=None):
        """x: [T, in]. Returns [T, n_out]."""
        out = empty(x, len(x), self.n_out) if out is None else out
        begin = 0
        for product, arrays in self.parts:
            end = begin + len(arrays[0])
            product(x, *arrays, out=out[:, begin:end])
            begin = end
        return out

    def logits(self, x, out) -> None:
        """The product into out, float32 on the GPU too."""
        if self.parts[0][0] is ops.gemm_int4 and out.dtype != x.dtype:
            out[...] = self(x)
        else:
            self(x, out=out)


def _product(arrays):
    if len(arrays) == 1:
        return ops.gemm
    return ops.gemm_int8 if arrays[0].dtype == np.int8 else ops.gemm_int4


class MLA:
    """Multi-head latent attention. Naive form for many new tokens, absorbed form for few."""

    def __init__(self, config: TextConfig, weights: Weights, layer: int):
        c, N = config, config.num_attention_heads
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        self.activations = "int16" if weights.upload is None and weights.activations != "float32" else "float32"
        self.qkv_a_proj = Linear(weights, c.hidden_size, q_a_proj=c.q_lora_rank, kv_a_proj_with_mqa=c.cache_width)
        self.q_a_layernorm = weights.tensor("q_a_layernorm.weight", c.q_lora_rank)
        self.q_b_proj = Linear(weights, c.q_lora_rank, q_b_proj=N * c.qk_head_dim)
        self.kv_a_layernorm = weights.tensor("kv_a_layernorm.weight", c.kv_lora_rank)
        kv_dim = c.qk_nope_head_dim + c.v_head_dim
        name, rounded = "kv_b_proj.weight", weights.dense == "int8"
        self.kv_b_proj = weights.tensor(name, N * kv_dim, c.kv_lora_rank, kind="prompt" if rounded else "dense")
        per_head = self.kv_b_proj.reshape(N, kv_dim, c.kv_lora_rank)
        w_uk, w_uv = per_head[:, : c.qk_nope_head_dim], per_head[:, c.qk_nope_head_dim :]  # [N, Dn, C], [N, Dv, C]
        if rounded:
            turned, scale = weights.rounded(name, w_uk.swapaxes(1, 2))  # inputs last, in groups
            self.w_uk = partial(ops.gemm_int8, weight=turned, weight_scale=scale)
            w_uv, scale = weights.rounded(name, w_uv)
            self.w_uv = partial(ops.gemm_int8, weight=w_uv, weight_scale=scale)
        else:
            self.w_uk = partial(ops.batched_gemm, weight=w_uk, transpose_weight=True)
            self.w_uv = partial(ops.batched_gemm, weight=w_uv)
        self.o_proj = Linear(weights, N * c.v_head_dim, o_proj=c.hidden_size)

    def forward(self, x, step: Step):
        """x: [T, H], normalised. Appends to the cache. Returns [T, H]."""
        c, T = self.config, len(x)
        qkv = self.qkv_a_proj(x)
        latent_q, kv = qkv[:, : c.q_lora_rank], qkv[:, c.q_lora_rank :]  # kv: [T, C + R]
        latent_q = ops.rms_norm(latent_q, self.q_a_layernorm, c.mla_norm_eps)
        q = self.q_b_proj(latent_q).reshape(T, c.num_attention_heads, c.qk_head_dim)
        rotation = step.cos, step.sin, step.positions
        pages = step.pages[self.layer]
        ops.fused_append_mla_cache(kv, self.kv_a_layernorm, *rotation, pages, step.slots, c.mla_norm_eps)
        attend = self._naive if step.key_chunks else self._absorbed
        return self.o_proj(attend(q, step).reshape(T, -1))

    def _naive(self, q, step: Step):
        """Expand keys and values of the whole context, chunk by chunk; the softmax goes on from chunk to chunk."""
        c, state = self.config, None
        q_pe = q[:, :, c.qk_nope_head_dim :]
        ops.rope(q_pe, step.cos, step.sin, step.positions, out=q_pe)
        for chunk in step.key_chunks:
            rows = step.cache.rows(self.layer, chunk.start, chunk.stop)  # [S, C + R]
            kv = ops.gemm(rows[:, : c.kv_lora_rank], self.kv_b_proj).reshape(len(rows), c.num_attention_heads, -1)
            state = ops.mla_prefill(
                q,
                kv,
                rows[:, c.kv_lora_rank :],
                chunk.cu_seqlens_q,
                chunk.cu_seqlens_k,
                chunk.causal_offsets,
                self.scale,
                state=state,
                return_lse=True,
            )
        return state[0]

    def _absorbed(self, q, step: Step):
        """Bring the query into latent space and attend to the cache rows themselves, each token on its own."""
        c, (T, N, _) = self.config, q.shape
        q_nope, q_pe = q[:, :, : c.qk_nope_head_dim], q[:, :, c.qk_nope_head_dim :]
        latent_q = empty(q, T, N, c.cache_width)
        self.w_uk(q_nope, out=latent_q[:, :, : c.kv_lora_rank])
        ops.rope(q_pe, step.cos, step.sin, step.positions, out=latent_q[:, :, c.kv_lora_rank :])
        pages = step.pages[self.layer]
        latent_out = ops.mla_decode(
            latent_q[None],
            pages,
            step.page_table,
            step.seq_lens,
            c.kv_lora_rank,
            self.scale,
            activations=self.activations if pages.dtype == bfloat16 else "float32",
        )
        return self.w_uv(latent_out[0])


class DenseMLP:
    """SwiGLU: down(silu(gate x) * (up x))."""

    def __init__(self, weights: Weights, hidden_size: int, intermediate_size: int):
        self.gate_up_proj = Linear(weights, hidden_size, gate_proj=intermediate_size, up_proj=intermediate_size)
        self.down_proj = Linear(weights, intermediate_size, down_proj=hidden_size)

    def forward(self, x):
        """x: [T, H]. Returns [T, H]."""
        return self.down_proj(ops.silu_and_mul(self.gate_up_proj(x)))


class MoE:
    """Routed experts chosen by a sigmoid router, plus the shared expert, which every token passes.

    With experts="cpu" the routed ones lie in host memory and are computed there: tokens cross, weights don't.
    """

    def __init__(self, config: TextConfig, weights: Weights):
        c, E = config, config.n_routed_experts
        self.config, self.experts_on_host = config, weights.experts_on_host
        self.activations = weights.activations
        self.expert_cache: ExpertCache | None = None
        self.index = -1  # among the layers of the cache
        self.gate = weights.tensor("gate.weight", E, c.hidden_size)
        self.e_score_correction_bias = weights.tensor("gate.e_score_correction_bias", E, dtype="F32")
        self.gate_proj = weights.experts("gate_proj", E, c.moe_intermediate_size, c.hidden_size)
        self.up_proj = weights.experts("up_proj", E, c.moe_intermediate_size, c.hidden_size)
        self.down_proj = weights.experts("down_proj", E, c.hidden_size, c.moe_intermediate_size)
        shared = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = DenseMLP(weights / "shared_experts", c.hidden_size, shared)

    def forward(self, x):
        """x: [T, H]. Returns [T, H]."""
        c = self.config
        topk_weights, topk_ids = ops.topk_sigmoid(
            ops.gemm(x, self.gate, out=empty(x, len(x), c.n_routed_experts, dtype=np.float32)),
            self.e_score_correction_bias,
            c.num_experts_per_tok,
            c.routed_scaling_factor,
            c.norm_topk_prob,
        )
        if self.experts_on_host:
            tokens = to_host(x), to_host(topk_weights), to_host(topk_ids)
            out = self.shared_experts.forward(x)  # queued: the GPU is at it while the CPU computes
            out += gpu.put(self._routed(tokens[0].astype(np.float32), *tokens[1:]).astype(bfloat16))
            return out
        if self.expert_cache is not None:
            self.expert_cache.read_ahead(self.index, topk_ids)  # while the shared expert is computed
            out = self.shared_experts.forward(x)
            out += self._routed(x, topk_weights, topk_ids)
            return out
        return self._routed(x, topk_weights, topk_ids, out=self.shared_experts.forward(x), accumulate=True)

    def _routed(self, x, topk_weights, topk_ids, **added_to):
        if self.expert_cache is not None:
            return self.expert_cache.fused_moe(self.index, x, topk_weights, topk_ids, self.activations)
        projections = self.gate_proj.weights, self.up_proj.weights, self.down_proj.weights
        return ops.fused_moe(x, topk_weights, topk_ids, *projections, activations=self.activations, **added_to)


class DecoderLayer:
    """Attention and feed-forward, each behind a norm, both added to the residual stream."""

    def __init__(self, config: TextConfig, weights: Weights, layer: int):
        self.eps = config.rms_norm_eps
        self.input_layernorm = weights.tensor("input_layernorm.weight", config.hidden_size)
        self.self_attn = MLA(config, weights / "self_attn", layer)
        self.post_attention_layernorm = weights.tensor("post_attention_layernorm.weight", config.hidden_size)
        if layer < config.first_k_dense_replace:
            self.mlp = DenseMLP(weights / "mlp", config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, weights / "mlp")

    def forward(self, delta, residual, step: Step):
        """delta: what the layer before adds to `residual`, both [T, H]. Returns what this layer adds."""
        h = ops.fused_add_rms_norm(delta, residual, self.input_layernorm, self.eps)
        h = self.self_attn.forward(h, step)
        h = ops.fused_add_rms_norm(h, residual, self.post_attention_layernorm, self.eps)
        return self.mlp.forward(h)


class Model:
    """A loaded checkpoint: `config` is its config.json, `tokenizer` is None without a tiktoken.model, `chat_template`
    is the text of chat_template.jinja or None. `vision` is None where it takes text alone; `media_processor` makes
    images and video into what it encodes.
    """

    @classmethod
    @no_collections()
    def load(
        cls,
        path=DEMO,
        device: str = "cpu",
        experts: str | None = None,
        activations: str = "int16",
        dense: str = "bfloat16",
        cache_dtype: str = "bfloat16",
        expert_cache: int | str | None = None,
        progress: Callable[[int, int], None] | None = None,
        **overrides,
    ):
        """Map a checkpoint folder as published, and copy it to the GPU for device "cuda". No weight is converted, but
        for dense "int8". Without a path it is the toy that ships with the package.

        device: "cpu" or "cuda". experts: "cpu" leaves the routed experts, nearly all of the weights, in host memory
        when the rest goes to the GPU; None keeps them beside the rest. activations: what INT4 experts on the CPU are
        multiplied by, "int16", "int8" or "float32" (see ops.fused_moe); with either kind of integer, attention of a few
        tokens to a bf16 cache is in int16 too (see ops.mla_decode). dense: "int8", on the CPU alone, rounds the bf16
        matrices outside the experts as it loads them, but for the router and, in a prompt, kv_b_proj (see
        ops.quantize_int8): half the bytes to read for a token, in memory of their own instead of the file's.
        cache_dtype: "bfloat16" or, on the CPU, "float32". expert_cache: memory for routed experts on the CPU, in bytes
        or as in "12GB", the others being read from the files when chosen; None takes what is available and leaves all
        of them mapped if they fit; 0 leaves them mapped. progress(done, total) is called after each file's header, then
        after each layer or, on the GPU, as weights are copied. Overrides replace fields of the text config, e.g.
        mla_norm_eps=1e-6.
        Raises ConfigError or CheckpointError, naming file or tensor, what was found and what was expected, ValueError
        for a device that there is not, RuntimeError without a GPU or enough memory on it, before anything is copied.
        """
        check_device(device, experts)
        check_activations(activations)
        check_dense(dense, device)
        check_dtype(cache_dtype, device)
        if expert_cache is not None:
            expert_cache = parse_bytes(expert_cache)
        if device == "cuda":
            gpu.check()
        path = Path(path)
        config = Config.from_folder(path, **overrides)
        checkpoint = Checkpoint(path, progress)
        read_ahead(checkpoint)
        places = device, experts == "cpu", activations, dense, cache_dtype, expert_cache
        model = cls(config, checkpoint, *places, progress)
        if (path / "tiktoken.model").exists():
            model.tokenizer = Tokenizer.from_folder(path)
        if (path / "chat_template.jinja").exists():
            model.chat_template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        return model

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        device: str,
        experts_on_host: bool,
        activations: str,
        dense: str,
        cache_dtype: str,
        expert_cache: int | None,
        progress: Callable[[int, int], None] | None,
    ):
        c = config.text_config
        self.config, self.device, self.cache_dtype = config, device, cache_dtype
        self.folder = checkpoint.folder
        self.experts_on_host = device == "cuda" and experts_on_host
        self.tokenizer: Tokenizer | None = None
        self.chat_template: str | None = None
        # Mapped in host memory on the GPU too: a step needs a row of it for each token.
        self.embed_tokens = checkpoint.tensor(
            f"{checkpoint.prefix}model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "BF16"
        )
        activations = activations if device == "cpu" or experts_on_host else "float32"
        weights = Weights(checkpoint, checkpoint.prefix, activations=activations, dense=dense)
        self._build(weights, progress if device == "cpu" else None)
        vision = Weights(checkpoint, "")  # apart from the text model's: no token reads them
        self.vision = _vision(config, vision)
        # What one token reads: everything but the embedding table and the experts it is not routed to.
        read = weights.read_bytes
        experts = read["experts"]
        self.bytes_per_token = read["dense"] + read["rounded"] + experts * c.num_experts_per_tok // c.n_routed_experts
        self._place = np.asarray
        if device == "cuda":  # what was built so far has checked every tensor and added up their sizes
            self._place = gpu.put
            weights.room["dense"] += sum(vision.room.values())
            check_memory(c, weights.room, self.experts_on_host, GPU_PREFILL_CHUNK, GPU_KEY_CHUNK)
            total = weights.room["dense"] + (0 if self.experts_on_host else weights.room["experts"])
            upload = gpu.Upload(total, progress)
            self._build(Weights(checkpoint, checkpoint.prefix, upload, self.experts_on_host, activations), None)
            self.vision = _vision(config, Weights(checkpoint, "", upload))
            upload.finish()
        self._encoded = EncodedMedia(self.vision.encode, ENCODED_MEDIA) if self.vision else None
        mapped = read["dense"] + read["prompt"] if device == "cpu" else 0
        self.expert_cache = self._cache_experts(expert_cache, mapped, experts)
        self._cos = self._sin = self._place(np.empty((0, c.qk_rope_head_dim // 2), np.float32))
        self._decode_graphs: WeakKeyDictionary[Cache, DecodeGraph] = WeakKeyDictionary()

    def _build(self, weights: Weights, layer_done: Callable[[int, int], None] | None) -> None:
        c, body = self.config.text_config, weights / "model"
        self.layers = []
        for layer in range(c.num_hidden_layers):
            self.layers.append(DecoderLayer(c, body / "layers" / str(layer), layer))
            if layer_done:
                layer_done(layer + 1, c.num_hidden_layers)
        self.norm = body.tensor("norm.weight", c.hidden_size)
        self.lm_head = Linear(weights, c.hidden_size, lm_head=c.vocab_size)

    def _cache_experts(self, asked: int | None, dense: int, experts: int) -> ExpertCache | None:
        """dense, experts: bytes of the weights that are mapped in host memory. None where the experts stay mapped."""
        if self.device == "cuda" and not self.experts_on_host:
            if asked is not None:
                raise ValueError(f"expert_cache is {asked!r}, expected None with the experts on the GPU")
            return None
        moes = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]
        projections = [(moe.gate_proj, moe.up_proj, moe.down_proj) for moe in moes]
        size = budget(asked, projections, dense, experts, self.config.text_config.num_experts_per_tok) if moes else None
        if size is None:
            return None
        cache = ExpertCache(projections, size)
        for index, moe in enumerate(moes):
            moe.expert_cache, moe.index = cache, index
        return cache

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
        return Cache(PagePool(c.num_hidden_layers, c.cache_width, pages, self.cache_dtype, self.device), max_tokens)

    @cached_property
    def media_processor(self) -> MediaProcessor:
        """Read when media first come: a preprocessor_config.json of other keys does not keep anybody from text."""
        return MediaProcessor.from_folder(self.folder)

    def check_vision(self) -> None:
        """Raises ValueError, saying why, if the model takes text alone."""
        if self.vision is None:
            has_config = self.config.vision_config is not None
            why = "the checkpoint has no tensors vision_tower.*" if has_config else "it has no vision_config"
            raise ValueError(f"the model takes no images or video: {why}")

    def encode_media(self, items, progress=None) -> list:
        """The rows [tokens, H] of each MediaItem, float32 on the CPU, bfloat16 on the GPU; the last ones are kept.

        items: what media_processor returns. progress(items, done, total) follows those that are not there yet, in
        patches times layers. Raises ValueError if the model takes text alone.
        """
        self.check_vision()
        return self._encoded.rows(items, progress)

    def forward(self, token_ids, cache: Cache, last_only: bool = False, progress=None, media=None, media_progress=None):
        """Run tokens through the model at the positions that follow those in the cache, and append them to it.

        token_ids: integers, at least one, each in [0, vocab_size). Returns logits float32 [T, V], or [1, V] of the last
        token with last_only, where the model lies: a CuPy array on the GPU. Broken off by an exception, the cache keeps
        the chunks that were finished. progress(done, total) is called after each layer of each chunk, in tokens times
        layers, on the GPU when the layer is queued; of a single token that is captured at its end alone.
        media: the MediaItems, or their rows as encode_media returns them, whose placeholders stand in token_ids, one
        for each row: rows replace the embeddings of placeholders, in order. They are encoded when the first chunk comes
        that has some; media_progress as in encode_media. The cache knows them by content, see splice.Span.key. With
        None a placeholder is a token like others.
        Raises ValueError for an empty list, an id out of range, a full cache, or other media than placeholders.
        """
        ids = self._checked(token_ids)
        spans = self._spans(ids, media)
        if len(cache) + len(ids) > cache.max_tokens:
            cache.reserve(len(ids))  # raises with the numbers
        if not spans and self._has_graph(len(ids), cache):
            logits = self._decode(ids, cache)
            if progress:
                progress(len(self.layers), len(self.layers))
            return logits
        depth, size = len(self.layers), GPU_PREFILL_CHUNK if self.device == "cuda" else PREFILL_CHUNK
        logits, keys = None, cache_keys(ids.tolist(), spans)
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            embedded = self._embed(chunk, start, spans, media_progress)
            done = partial(_report, progress, start * depth, len(chunk), len(ids) * depth) if progress else None
            residual = array_module(embedded).zeros(embedded.shape, np.float32)
            hidden = self._through(embedded, residual, self._step(len(chunk), cache), done)
            cache.commit(keys[start : start + size])
            if logits is None:
                rows = 1 if last_only else len(ids)
                logits = empty(hidden, rows, self.config.text_config.vocab_size, dtype=np.float32)
            if not last_only:
                self.lm_head.logits(hidden, logits[start : start + len(chunk)])
        if last_only:
            self.lm_head.logits(hidden[-1:], logits)
        return logits

    def _spans(self, ids, media) -> list[Span]:
        if media is None:
            return []
        width, dtype = self.embed_tokens.shape[1], np.dtype(bfloat16 if self.device == "cuda" else np.float32)
        for index, item in enumerate(media):
            shape, found = list(getattr(item, "shape", [])), getattr(item, "dtype", type(item).__name__)
            if isinstance(item, MediaItem):
                self.check_vision()
            elif found != dtype or len(shape) != 2 or shape[0] == 0 or shape[1] != width:
                expected = f"a MediaItem or rows of {dtype} [tokens, {width}]"
                raise ValueError(f"media[{index}] is {found} {shape}, expected {expected}")
        return find_spans(ids, self.config.media_placeholder_token_id, media)

    def _embed(self, ids, start: int, spans: list[Span], media_progress):
        """int [T], those from `start` on -> activations [T, H]; of media their rows."""
        rows, stop = self.embed_tokens[ids], start + len(ids)
        embedded = gpu.put(rows) if self.device == "cuda" else rows.astype(np.float32)
        here = [span for span in spans if span.start < stop and span.stop > start]
        items = [span.item for span in here if isinstance(span.item, MediaItem)]
        encoded = iter(self.encode_media(items, media_progress) if items else [])
        for span in here:
            rows = next(encoded) if isinstance(span.item, MediaItem) else span.item
            begin, end = max(span.start, start), min(span.stop, stop)
            embedded[begin - start : end - start] = rows[begin - span.start : end - span.start]
        return embedded

    def _step(self, T: int, cache: Cache) -> Step:
        """Reserves room for T tokens and says where they and what they see lies."""
        start, stop, put = len(cache), len(cache) + T, self._place
        slots, (cos, sin) = cache.reserve(T), self._rope_tables(stop)
        chunks, size = [], GPU_KEY_CHUNK if self.device == "cuda" else KEY_CHUNK
        if prefers_naive(self.config.text_config, T, stop):
            for begin in range(0, stop, size):
                end = min(stop, begin + size)
                arrays = [put(np.array(values, np.int32)) for values in ([0, T], [0, end - begin], [start - begin])]
                chunks.append(KeyChunk(begin, end, *arrays))
        return Step(
            positions=put(np.arange(start, stop, dtype=np.int32)),
            slots=put(slots),
            page_table=put(cache.page_table),
            seq_lens=put(np.array([stop], np.int32)),
            cos=cos,
            sin=sin,
            pages=cache.pool.pages,
            key_chunks=chunks,
            cache=cache,
        )

    def _through(self, delta, residual, step: Step, layer_done: Callable[[int], None] | None = None):
        """Embedded tokens [T, H] through all layers and the final norm; residual: float32 zeros of that shape. Nothing
        is read back from the GPU on the way.
        """
        for count, layer in enumerate(self.layers, 1):
            delta = layer.forward(delta, residual, step)
            if layer_done:
                layer_done(count)
        return ops.fused_add_rms_norm(delta, residual, self.norm, self.config.text_config.rms_norm_eps)

    def _has_graph(self, T: int, cache: Cache) -> bool:
        """Whether these tokens are a step that is captured: one token, in the absorbed form, all of it in one place,
        where Python need not see to it that experts are in memory.
        """
        if self.experts_on_host or self.expert_cache is not None or T > 1:
            return False
        return not prefers_naive(self.config.text_config, T, len(cache) + T)

    def _decode(self, ids, cache: Cache):
        """Logits [1, V] of one token by the cache's graph, captured when the first token needs it, and anew where it
        no longer serves.
        """
        graph, embedding = self._decode_graphs.get(cache), self.embed_tokens[ids]
        if graph is None or not graph.serves(cache):
            graph = self._decode_graphs[cache] = DecodeGraph(self, cache, embedding)
        logits = graph.launch(embedding, cache)
        cache.commit(ids.tolist())
        return logits

    def _checked(self, token_ids) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"token_ids is {ids.dtype} of shape {list(ids.shape)}, expected a non-empty list of integers"
            )
        values, vocab_size = ids.tolist(), self.config.text_config.vocab_size
        if min(values) < 0 or max(values) >= vocab_size:
            at = next(i for i, value in enumerate(values) if not 0 <= value < vocab_size)
            raise ValueError(f"token_ids[{at}] is {values[at]}, expected 0 <= id < {vocab_size}")
        return ids.astype(np.int64)

    def _rope_tables(self, length: int):
        """cos and sin for positions 0 .. length - 1 at least; grown by doubling."""
        if length > len(self._cos):
            self._cos, self._sin = map(self._place, rope_tables(self.config.text_config, max(256, 2 * length)))
        return self._cos, self._sin


def _vision(config: Config, weights: Weights) -> VisionModel | None:
    """None for a text-only config, or where the checkpoint leaves the tower out."""
    if config.vision_config is None or "vision_tower.patch_embed.proj.weight" not in weights.checkpoint:
        return None
    return VisionModel(config.vision_config, weights)


def _report(progress, before: int, tokens: int, total: int, layers_done: int) -> None:
    progress(before + tokens * layers_done, total)


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
