"""append_mla_cache: latent and rope part of new tokens into a bf16 cache."""

import numpy as np
from kimi_native import ops

from bench import shapes

PAGES = 256


def bench(harness):
    rng = shapes.rng()
    C, R = shapes.KV_LORA_RANK, shapes.ROPE_DIM
    cache, _ = shapes.paged_cache(rng, 1, PAGES * shapes.PAGE_SIZE)
    flat = cache.reshape(-1, C + R)
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
