"""append_mla_cache and fused_append_mla_cache: new tokens into a bf16 cache."""

import numpy as np
from kimi_native import ops

from bench import shapes

PAGES, POSITIONS = 256, 4096


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    C, R = shapes.KV_LORA_RANK, shapes.ROPE_DIM
    cache = make.bf16(rng, PAGES, shapes.PAGE_SIZE, shapes.CACHE_WIDTH)
    weight, angles = make.bf16(rng, C), rng.random((POSITIONS, R // 2), np.float32) * 6.28
    cos, sin = make.put(np.cos(angles)), make.put(np.sin(angles))
    for T in shapes.TOKENS.of(harness):
        slots = make.put(rng.permutation(PAGES * shapes.PAGE_SIZE)[:T])
        new_rows = T * (C + R) * shapes.BYTES_BF16
        pair = make.normal(rng, T, C), make.normal(rng, T, R), cache, slots
        harness.run(
            "append_mla_cache",
            f"T={T}",
            lambda pair=pair: ops.append_mla_cache(*pair),
            bytes_moved=pair[0].nbytes + pair[1].nbytes + new_rows + slots.nbytes,
            baseline=lambda pair=pair: numpy_append(*pair),
        )
        kv, positions = make.normal(rng, T, C + R), make.put(rng.integers(0, POSITIONS, T, np.int32))
        rows = kv, weight, cos, sin, positions, cache, slots, shapes.RMS_NORM_EPS
        harness.run(
            "fused_append_mla_cache",
            f"T={T}",
            lambda rows=rows: ops.fused_append_mla_cache(*rows),
            bytes_moved=kv.nbytes + new_rows + T * R * shapes.BYTES_F32 + positions.nbytes + slots.nbytes,
            baseline=lambda rows=rows: numpy_fused_append(*rows),
        )


def numpy_append(latent, k_pe, cache, slots):
    rows = np.concatenate([latent, k_pe], axis=1)
    cache.reshape(-1, rows.shape[1])[slots] = rows.astype(cache.dtype)


def numpy_fused_append(kv, weight, cos, sin, positions, cache, slots, eps):
    C, row = len(weight), kv.copy()
    row[:, :C] /= np.sqrt(np.mean(kv[:, :C] ** 2, axis=1, keepdims=True) + eps)
    row[:, :C] *= weight.astype(np.float32)
    c, s = cos[positions], sin[positions]
    row[:, C::2] = kv[:, C::2] * c - kv[:, C + 1 :: 2] * s
    row[:, C + 1 :: 2] = kv[:, C::2] * s + kv[:, C + 1 :: 2] * c
    cache.reshape(-1, row.shape[1])[slots] = row.astype(cache.dtype)
