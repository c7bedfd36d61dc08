"""What tokens carry through the layers, and a step of one token that is captured once."""

import math
from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16

from kimi_native import ops
from kimi_native.cache import PAGE_SIZE, Cache
from kimi_native.ops import gpu
from kimi_native.ops._array import empty
from kimi_native.ops.recording import Recording


@dataclass
class Step:
    """What the layers share while a chunk of tokens passes through them. Arrays lie where the model does."""

    positions: np.ndarray  # int32 [T]
    slots: np.ndarray  # int64 [T]
    page_table: np.ndarray  # int32 [1, max_pages]
    seq_lens: np.ndarray  # int32 [1], tokens in the cache when these have passed
    cos: np.ndarray  # float32 [P, R / 2]
    sin: np.ndarray  # float32 [P, R / 2]
    pages: np.ndarray  # [layers, pages, PAGE_SIZE, C + R], the cache's
    key_chunks: list["KeyChunk"]  # empty for the absorbed form
    cache: Cache | None  # None within a graph, which does without its books


@dataclass
class KeyChunk:
    """Cached tokens start .. stop - 1, whose keys and values the naive form expands together."""

    start: int
    stop: int
    cu_seqlens_q: np.ndarray  # int32 [2]
    cu_seqlens_k: np.ndarray  # int32 [2]
    causal_offsets: np.ndarray  # int32 [1]


class DecodeGraph:
    """One token through the model, for one cache, without Python between its ops: as a CUDA graph or recorded calls.

    All that differs from token to token lies in one array, on the GPU filled by one copy before each launch: embedding,
    slot and position of the token, the length, and the page table, which has room for all pages of the cache at once;
    and the residual stream, which starts from zero.
    """

    def __init__(self, model, cache: Cache, embedding):
        """embedding: that of the first token to be launched."""
        max_pages = min(-(-cache.max_tokens // PAGE_SIZE), cache.pool.pages.shape[1])
        hidden, on_cpu = (1, model.embed_tokens.shape[1]), model.device == "cpu"
        fields = {
            "embedding": (hidden, np.dtype(np.float32 if on_cpu else bfloat16)),
            "residual": (hidden, np.dtype(np.float32)),
            "slots": ((1,), np.dtype(np.int64)),
            "positions": ((1,), np.dtype(np.int32)),
            "seq_lens": ((1,), np.dtype(np.int32)),
            "page_table": ((1, max_pages), np.dtype(np.int32)),
        }
        sizes = [-(-math.prod(shape) * dtype.itemsize // 16) * 16 for shape, dtype in fields.values()]
        self._isa, self._host = ops.isa(), np.zeros(sum(sizes), np.uint8)
        self._device = self._host if on_cpu else gpu.put(self._host)
        self._inputs, inputs, at = {}, {}, 0
        for (name, (shape, dtype)), size in zip(fields.items(), sizes, strict=True):
            span = slice(at, at + math.prod(shape) * dtype.itemsize)
            self._inputs[name] = self._host[span].view(dtype).reshape(shape)
            inputs[name] = self._device[span].view(dtype).reshape(shape)
            at += size
        begin, (cos, sin) = (inputs.pop("embedding"), inputs.pop("residual")), model._rope_tables(len(cache) + 1)
        self._fill(embedding, cache)
        self._step = Step(
            **inputs, cos=cos, sin=sin, pages=cache.pool.pages, key_chunks=[], cache=None
        )  # kept: the graph reads its arrays

        def queue():
            hidden = model._through(*begin, self._step)
            logits = empty(hidden, 1, model.config.text_config.vocab_size, dtype=np.float32)
            model.lm_head.logits(hidden, logits)
            return logits

        self._graph = Recording(queue) if on_cpu else gpu.Graph(queue)

    def serves(self, cache: Cache) -> bool:
        """Whether the next token may be launched: on the same instruction set, at a position within the tables."""
        return self._isa == ops.isa() and len(cache) < len(self._step.cos)

    def launch(self, embedding, cache: Cache):
        """Logits float32 [1, V] of the token that follows those in the cache; its row is written, not committed."""
        self._fill(embedding, cache)
        return self._graph.launch().copy()

    def _fill(self, embedding, cache: Cache) -> None:
        inputs, stop = self._inputs, len(cache) + 1
        inputs["slots"][:] = cache.reserve(1)
        inputs["embedding"][:], inputs["residual"][:] = embedding, 0
        inputs["positions"][:], inputs["seq_lens"][:] = stop - 1, stop
        pages = cache.page_table
        inputs["page_table"][:, : pages.shape[1]] = pages  # what lies behind is not read
        if self._device is not self._host:
            self._device.set(self._host)
