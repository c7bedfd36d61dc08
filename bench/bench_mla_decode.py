"""mla_decode: the last tokens of a batch of sequences, 64 heads or fewer, over the cached tokens, bf16 or float32.

On the CPU a bf16 cache is multiplied as int16, the default of models, and as float32.
"""

import numpy as np
from kimi_native import ops

from bench import baseline, cpu_peers, shapes


def bench(harness):
    rng = shapes.rng()
    for case in shapes.DECODE.of(harness):
        nbytes = case.B * case.S * shapes.CACHE_WIDTH * shapes.BYTES_BF16
        if harness.room_for("mla_decode", str(case), 1.1 * nbytes):
            run(harness, rng, case)


def run(harness, rng, case):
    make, C, width = harness.arrays, shapes.KV_LORA_RANK, shapes.CACHE_WIDTH
    B, Q, N, scale = case.B, case.Q, case.N, shapes.SOFTMAX_SCALE
    lengths = case_lengths(rng, case)
    pages = B * -(-int(lengths.max()) // case.page_size)
    cache = (make.normal if case.float32 else make.bf16)(rng, pages, case.page_size, width)
    page_table = shapes.page_table(rng, B, int(lengths.max()), case.page_size)
    q, placed = make.normal(rng, B, Q, N, width), (make.put(page_table), make.put(lengths))
    read, pairs = tokens_and_pairs(lengths, Q)
    for activations in ("float32",) if harness.cuda or case.float32 else ("int16", "float32"):
        harness.run(
            "mla_decode",
            f"{case} int16" if activations == "int16" else str(case),
            lambda activations=activations: ops.mla_decode(q, cache, *placed, C, scale, activations=activations),
            bytes_moved=read * width * cache.itemsize + q.nbytes + q.nbytes // width * C,
            operations=2 * pairs * N * (width + C),
            baseline=lambda: numpy_mla_decode(q, cache, page_table),
            cpu_peers=(lambda: cpu_peers.mla_decode(q, cache, page_table, C, scale)) if B == Q == 1 else None,
        )


def case_lengths(rng, case):
    """int32 [B]"""
    if not case.varied:
        return np.full(case.B, case.S, np.int32)
    return np.clip(rng.normal(case.S, case.S / 2, case.B), case.Q, 2 * case.S).astype(np.int32)


def tokens_and_pairs(lengths, Q):
    """(cached tokens read, pairs of a query and a token that it sees); query i sees the first S - Q + 1 + i."""
    read = int(lengths.sum(dtype=np.int64))
    return read, Q * read - len(lengths) * Q * (Q - 1) // 2


def numpy_mla_decode(q, cache, page_table):
    """Sequence by sequence: its rows as float32, two matrix products. The last query sees all tokens."""
    B, Q, N, width = q.shape
    out = np.empty((B, Q, N, shapes.KV_LORA_RANK), np.float32)
    for b, pages in enumerate(page_table):
        rows = cache[pages].reshape(-1, width).astype(np.float32)  # [S, C + R]
        scores = (q[b].reshape(Q * N, width) @ rows.T).reshape(Q, N, -1)
        scores *= np.float32(shapes.SOFTMAX_SCALE)
        for i in range(Q - 1):
            scores[i, :, len(rows) - Q + 1 + i :] = -np.inf
        weights = baseline.softmax(scores.reshape(Q * N, -1))
        out[b] = (weights @ rows[:, : shapes.KV_LORA_RANK]).reshape(Q, N, -1)
    return out
