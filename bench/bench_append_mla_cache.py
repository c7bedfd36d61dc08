"""append_mla_cache and fused_append_mla_cache: new tokens into a bf16 cache."""

import numpy as np
from kimi_native import ops

from bench import shapes

PAGES, POSITIONS = 256, 4096


def bench(harness):
    rng = shapes.rng()
    C, R = shapes.KV_LORA_RANK, shapes.ROPE_DIM
    cache, _ = shapes.paged_cache(rng, 1, PAGES * shapes.PAGE_SIZE)
    flat = cache.reshape(-1, C + R)
    weight, angles = shapes.random_bf16(rng, C), rng.random((POSITIONS, R // 2), np.float32) * 6.28
    cos, sin = np.cos(angles), np.sin(angles)
    for T in (1, 512):
        latent, k_pe = shapes.random_f32(rng, T, C), shapes.random_f32(rng, T, R)
        slots = rng.permutation(len(flat))[:T]

        def numpy_append(latent=latent, k_pe=k_pe, slots=slots):
            flat[slots] = np.concatenate([latent, k_pe], axis=1).astype(flat.dtype)

        harness.run(
            "append_mla_cache",
            f"T={T}",
            lambda latent=latent, k_pe=k_pe, slots=slots: ops.append_mla_cache(latent, k_pe, cache, slots),
            bytes_moved=T * (C + R) * (shapes.BYTES_F32 + shapes.BYTES_BF16) + slots.nbytes,
            baseline=numpy_append,
        )
        kv, positions = shapes.random_f32(rng, T, C + R), rng.integers(0, POSITIONS, T, np.int32)
        rows = kv, weight, cos, sin, positions, cache, slots, shapes.RMS_NORM_EPS
        harness.run(
            "fused_append_mla_cache",
            f"T={T}",
            lambda rows=rows: ops.fused_append_mla_cache(*rows),
            bytes_moved=T * (C + R) * (shapes.BYTES_F32 + shapes.BYTES_BF16) + T * (R * shapes.BYTES_F32 + 4 + 8),
            baseline=lambda rows=rows: numpy_fused_append(*rows),
        )


def numpy_fused_append(kv, weight, cos, sin, positions, cache, slots, eps):
    C, row = len(weight), kv.copy()
    row[:, :C] /= np.sqrt(np.mean(kv[:, :C] ** 2, axis=1, keepdims=True) + eps)
    row[:, :C] *= weight.astype(np.float32)
    c, s = cos[positions], sin[positions]
    row[:, C::2] = kv[:, C::2] * c - kv[:, C + 1 :: 2] * s
    row[:, C + 1 :: 2] = kv[:, C::2] * s + kv[:, C + 1 :: 2] * c
    cache.reshape(-1, row.shape[1])[slots] = row.astype(cache.dtype)
