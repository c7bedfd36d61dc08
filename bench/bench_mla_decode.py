"""mla_decode: one token of 1 and 8 sequences, 64 heads, over 4096 and 32768 cached tokens in bf16."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    N, C, width, scale = shapes.HEADS, shapes.KV_LORA_RANK, shapes.CACHE_WIDTH, shapes.SOFTMAX_SCALE
    for B, S in ((1, 4096), (1, 32768), (8, 4096), (8, 32768)):
        cache, page_table = shapes.paged_cache(rng, B, S)
        q, lengths = shapes.random_f32(rng, B, 1, N, width), np.full(B, S, np.int32)
        harness.run(
            "mla_decode",
            f"B={B} S={S} N={N}",
            lambda q=q, cache=cache, table=page_table, lengths=lengths: ops.mla_decode(
                q, cache, table, lengths, C, scale
            ),
            bytes_moved=cache.nbytes + q.nbytes + B * N * C * shapes.BYTES_F32,
            operations=2 * B * S * N * (width + C),
            baseline=lambda q=q, cache=cache, table=page_table: numpy_mla_decode(q, cache, table),
        )


def numpy_mla_decode(q, cache, page_table):
    """Sequence by sequence: its rows as float32, two matrix products."""
    out = np.empty((len(q), 1, shapes.HEADS, shapes.KV_LORA_RANK), np.float32)
    for b, pages in enumerate(page_table):
        rows = cache[pages].reshape(-1, shapes.CACHE_WIDTH).astype(np.float32)  # [S, C + R]
        scores = q[b] @ rows.T
        scores *= np.float32(shapes.SOFTMAX_SCALE)
        out[b] = baseline.softmax(scores) @ rows[:, : shapes.KV_LORA_RANK]
    return out
