"""A plain grouped product in Triton, bf16 activations and INT4 weights as they lie on disk: what ours has to beat.

Which expert a tile belongs to is worked out beforehand and not timed. 8 inputs share a packed word, 32 a scale.
"""

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    x,  # bf16 [M, in], rows sorted by expert
    packed,  # int32 [E, out, in / 8]
    scale,  # bf16 [E, out, in / 32]
    tiles,  # int32 [tiles, 3]: expert, first row, end of the expert's rows
    out,  # bf16 [M, out]
    n_out,
    n_in,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    # Neighbouring programs share rows of x, which stay in L2, and stream different weights.
    tile = tl.program_id(1)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    m = tl.load(tiles + 3 * tile + 1) + tl.arange(0, TILE_M)
    end = tl.load(tiles + 3 * tile + 2)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside_m, inside_n = (m < end)[:, None], (n < n_out)[:, None]
    row = expert * n_out + n  # of the weights

    k = tl.arange(0, TILE_K)
    word = tl.arange(0, TILE_K // 8)
    group = tl.arange(0, TILE_K // 32)
    x_at = x + m.to(tl.int64)[:, None] * n_in + k[None, :]
    packed_at = packed + row[:, None] * (n_in // 8) + word[None, :]
    scale_at = scale + row[:, None] * (n_in // 32) + group[None, :]
    shift = 4 * tl.arange(0, 8)

    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, n_in, TILE_K):
        left = n_in - start
        a = tl.load(x_at, mask=inside_m & (k < left)[None, :], other=0.0)
        words = tl.load(packed_at, mask=inside_n & (word * 8 < left)[None, :], other=0)  # [TILE_N, TILE_K / 8]
        scales = tl.load(scale_at, mask=inside_n & (group * 32 < left)[None, :], other=0.0)  # [TILE_N, TILE_K / 32]
        q = ((words[:, :, None] >> shift[None, None, :]) & 15) - 8
        q = tl.reshape(q, (TILE_N, TILE_K // 32, 32)).to(tl.float32)
        w = tl.reshape(q * scales[:, :, None].to(tl.float32), (TILE_N, TILE_K)).to(tl.bfloat16)
        total = tl.dot(a, tl.trans(w), total)
        x_at += TILE_K
        packed_at += TILE_K // 8
        scale_at += TILE_K // 32
    out_at = out + m.to(tl.int64)[:, None] * n_out + n[None, :]
    tl.store(out_at, total.to(tl.bfloat16), mask=inside_m & (n < n_out)[None, :])


class GroupedGemm:
    """A product with its output: calling it computes out [M, out]. counts: rows of each expert, in NumPy."""

    def __init__(self, x, packed, scale, counts):
        self._operands = x, packed, scale
        self.out = torch.empty((len(x), packed.shape[1]), dtype=torch.bfloat16, device=x.device)
        used = np.asarray(counts)[np.asarray(counts) > 0]
        mean = used.mean() if len(used) else 1
        self._tile_m = next((rows for rows in (16, 32, 64) if mean <= rows), 128)
        self._tiles = torch.tensor(tiles_of(counts, self._tile_m), dtype=torch.int32, device=x.device).reshape(-1, 3)

    def __call__(self):
        x, packed, scale = self._operands
        n_out, n_in = packed.shape[1], 8 * packed.shape[2]
        many = self._tile_m >= 64
        tile_n, tile_k = (128, 64) if many else (64, 128)
        _kernel[(triton.cdiv(n_out, tile_n), len(self._tiles))](
            x,
            packed,
            scale,
            self._tiles,
            self.out,
            n_out,
            n_in,
            TILE_M=self._tile_m,
            TILE_N=tile_n,
            TILE_K=tile_k,
            num_warps=8 if many else 4,
            num_stages=3 if many else 4,
        )


def tiles_of(counts, tile_m):
    """[(expert, first row, end of the expert's rows)] of all tiles of tile_m rows, experts without rows left out."""
    ends = np.cumsum(counts)
    return [(e, row, int(end)) for e, end in enumerate(ends) for row in range(int(end - counts[e]), int(end), tile_m)]
