"""MoonViT-3D, the vision tower, and the projector into the text model. Names are the checkpoint's.

Shapes: T patches, H vt_hidden_size, N heads of width D; an item has t frames of gh x gw patches, one token for 2 x 2.
Activations are [T, ...], float32 on the CPU and bfloat16 on the GPU; the residual stream is float32.
Source: Kimi Team 2025, arXiv 2504.07491 (MoonViT), and 2026, arXiv 2602.02276.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from kimi_native import ops
from kimi_native.config import VisionConfig
from kimi_native.media import MediaItem
from kimi_native.ops._array import array_module, empty, on_gpu
from kimi_native.placement import Weights

EPS = 1e-5  # of the tower's norms
GROUP = 16384  # patches that go through the layers together; a larger item goes alone
# What is wider than the residual stream stays small on the CPU: patches that pass from one attention to the next
# together, and those times the heads that attend together.
ROWS, GPU_ROWS = 512, 16384
HEAD_ROWS, GPU_HEAD_ROWS = 36864, 2**20
TABLE_ROWS = 16  # of the grid, that are resampled together


class Linear:
    """x @ weight.T, and the bias, which is for the caller to add where it passes over the result anyway."""

    def __init__(self, weights: Weights, name: str, n_in: int, n_out: int, shape: tuple[int, ...] = ()):
        """shape: of the weight on disk, if it is not [n_out, n_in]."""
        self.weight = weights.tensor(f"{name}.weight", *(shape or (n_out, n_in))).reshape(n_out, n_in)
        self.bias = weights.tensor(f"{name}.bias", n_out)

    def __call__(self, x, out=None):
        """x: [T, n_in]. Returns x @ weight.T, [T, n_out]."""
        return ops.gemm(x, self.weight, out=out)

    def add_to(self, residual, x) -> None:
        """residual += x @ weight.T + bias, float32 [T, n_out]."""
        residual += ops.gemm(x, self.weight, out=empty(residual, *residual.shape))
        residual += _cast(self.bias, np.float32)


class LayerNorm:
    def __init__(self, weights: Weights, name: str, width: int):
        self.weight, self.bias = (weights.tensor(f"{name}.{part}", width) for part in ("weight", "bias"))

    def __call__(self, x, eps: float = EPS):
        """x: float32 [T, width]. Returns activations [T, width]."""
        return ops.layer_norm(_cast(x, bfloat16 if on_gpu(x) else np.float32), self.weight, self.bias, eps)


@dataclass
class Step:
    """What all blocks share, for the items of a group one after the other."""

    qkv: Any  # activations [T, 3, n D], scratch: of n heads at a time
    attended: Any  # activations [T, H], scratch
    rotation: tuple  # cos and sin, float32 [T, D / 2], and int32 [T], rows of these
    cu_seqlens: Any  # int32 [items + 1]
    pieces: list[slice]  # of T, which the parts between two attentions take one by one


class Block:
    """Attention and MLP, each behind a norm, both added to the residual stream."""

    def __init__(self, config: VisionConfig, weights: Weights):
        c, H = config, config.vt_hidden_size
        self.heads = c.vt_num_attention_heads
        self.norm0 = LayerNorm(weights, "norm0", H)
        self.wqkv = Linear(weights, "wqkv", H, 3 * H)
        self.wo = Linear(weights, "wo", H, H)
        self.norm1 = LayerNorm(weights, "norm1", H)
        self.fc0 = Linear(weights / "mlp", "fc0", H, c.vt_intermediate_size)
        self.fc1 = Linear(weights / "mlp", "fc1", c.vt_intermediate_size, H)

    def forward(self, x, step: Step) -> None:
        """x: float32 [T, H], the residual stream, updated in place."""
        (T, H), D = x.shape, x.shape[1] // self.heads
        n = step.qkv.shape[2] // D
        weight, bias = self.wqkv.weight.reshape(3, -1, n * D, H), self.wqkv.bias.reshape(3, -1, n * D)
        qkv = step.qkv.reshape(T, 3 * n, D)
        for some in range(self.heads // n):
            for rows in step.pieces:
                h, projected = self.norm0(x[rows]), step.qkv[rows]
                for part in range(3):
                    ops.gemm(h, weight[part, some], out=projected[:, part])
                projected += _cast(bias[:, some], projected.dtype)
            ops.rope(qkv[:, : 2 * n], *step.rotation, out=qkv[:, : 2 * n])
            out = ops.attention(qkv[:, :n], qkv[:, n : 2 * n], qkv[:, 2 * n :], step.cu_seqlens, D**-0.5)
            step.attended[:, some * n * D : (some + 1) * n * D] = out.reshape(T, n * D)
        for rows in step.pieces:
            residual = x[rows]
            self.wo.add_to(residual, step.attended[rows])
            h = self.fc0(self.norm1(residual))
            self.fc1.add_to(residual, ops.gelu(h, self.fc0.bias, tanh=True, out=h))


class Projector:
    """patchmerger: a norm, 2 x 2 neighbours side by side, two linear maps with a GELU between them."""

    def __init__(self, config: VisionConfig, weights: Weights):
        c, wide = config, 4 * config.mm_hidden_size
        self.eps = c.projector_ln_eps
        self.pre_norm = LayerNorm(weights, "pre_norm", c.mm_hidden_size)
        self.proj_0 = Linear(weights, "proj.0", wide, wide)
        self.proj_2 = Linear(weights, "proj.2", wide, c.text_hidden_size)

    def forward(self, summed, frames: int, out) -> None:
        """summed: float32 [tokens, 4, H], over so many frames. out: activations [tokens, text_hidden_size]."""
        tokens, corners, H = summed.shape
        # The norm of the mean is that of the sum with frames^2 times the epsilon.
        h = self.pre_norm(summed.reshape(tokens * corners, H), self.eps * frames**2)
        h = self.proj_0(h.reshape(tokens, corners * H))
        self.proj_2(ops.gelu(h, self.proj_0.bias, out=h), out=out)
        out += _cast(self.proj_2.bias, out.dtype)


class VisionModel:
    """The tower and its projector: images and chunks of video to rows in the place of token embeddings."""

    def __init__(self, config: VisionConfig, weights: Weights):
        """weights: of the whole checkpoint; where they are uploaded, items are encoded on the GPU.

        Raises CheckpointError for a tensor that is missing or has another shape or dtype.
        """
        c, tower, H, P = config, weights / "vision_tower", config.vt_hidden_size, config.patch_size
        self.config = c
        self.patch_embed = Linear(tower, "patch_embed.proj", 3 * P * P, H, shape=(H, 3, P, P))
        self.place = array_module(self.patch_embed.weight).asarray
        if on_gpu(self.patch_embed.weight):
            self.dtype, self.rows, self.head_rows = bfloat16, GPU_ROWS, GPU_HEAD_ROWS
        else:
            self.dtype, self.rows, self.head_rows = np.float32, ROWS, HEAD_ROWS
        # Stays in host memory, where it is resampled.
        table = c.init_pos_emb_height, c.init_pos_emb_width, H
        self.pos_emb = weights.checkpoint.tensor(f"{tower.prefix}patch_embed.pos_emb.weight", table, "BF16")
        blocks = tower / "encoder" / "blocks"
        self.blocks = [Block(c, blocks / str(layer)) for layer in range(c.vt_num_hidden_layers)]
        self.final_layernorm = LayerNorm(tower / "encoder", "final_layernorm", H)
        self.mm_projector = Projector(c, weights / "mm_projector")

    def encode(self, items: Sequence[MediaItem], progress: Callable[[int, int], None] | None = None) -> list:
        """One array for each item, float32 [item.tokens, text_hidden_size], bfloat16 on the GPU.

        Items go through the layers together and do not see each other; scratch grows with the largest of them, not with
        their number. progress(done, total) is called after each layer of each group of items, in patches times layers;
        on the GPU that is when the layer is queued.
        Raises ValueError for an item of another patch size, with an odd grid or with too many frames.
        """
        for index, item in enumerate(items):
            check(f"items[{index}]", item, self.config)
        total, before, encoded = sum(len(item.patches) for item in items), 0, []
        for group in _groups(items):
            ends = np.cumsum([len(item.patches) for item in group]).tolist()
            places = list(map(slice, [0, *ends], ends))
            x = self._embed(group, places)
            for done in self._through(x, group, [0, *ends]):
                if progress:
                    progress(before * len(self.blocks) + len(x) * done, total * len(self.blocks))
            encoded += [self._project(x[place], *item.grid) for item, place in zip(group, places, strict=True)]
            before += len(x)
        return encoded

    def _embed(self, items: list[MediaItem], places: list[slice]):
        """Patches with their positions, float32 [T, H]: the residual stream. places: of the items in it."""
        H, put = self.config.vt_hidden_size, self.place
        tables = {grid: put(_resample(self.pos_emb, *grid)) for grid in {item.grid[1:] for item in items}}
        times = put(sinusoids(self.config.init_pos_emb_time, H))
        x = empty(times, places[-1].stop, H)
        for item, place in zip(items, places, strict=True):
            embedded, (t, gh, gw) = x[place], item.grid
            for rows in _pieces(len(embedded), self.rows):
                patches = put(item.normalised(rows.start, rows.stop).astype(self.dtype, copy=False))
                self.patch_embed(patches, out=embedded[rows])
            embedded += _cast(self.patch_embed.bias, np.float32)
            frames = embedded.reshape(t, gh * gw, H)
            for index, frame in enumerate(frames):
                frame += tables[gh, gw]
                if t > 1:
                    frame += times[index]
        return x

    def _through(self, x, items: list[MediaItem], cu_seqlens: list[int]) -> Iterator[int]:
        """All blocks over the residual stream x [T, H], in place. Yields how many are done."""
        (T, H), N, put = x.shape, self.config.vt_num_attention_heads, self.place
        tables = np.concatenate([rotation(*item.grid, H // N) for item in items], axis=1)
        n = max(n for n in range(1, N + 1) if N % n == 0 and (n == 1 or n * T <= self.head_rows))
        step = Step(
            qkv=empty(x, T, 3, n * H // N, dtype=self.dtype),
            attended=empty(x, T, H, dtype=self.dtype),
            rotation=(put(tables[0]), put(tables[1]), put(np.arange(T, dtype=np.int32))),
            cu_seqlens=put(np.array(cu_seqlens, np.int32)),
            pieces=_pieces(T, self.rows),
        )
        for done, block in enumerate(self.blocks, 1):
            block.forward(x, step)
            yield done

    def _project(self, x, t: int, gh: int, gw: int):
        """What the last block made of an item, float32 [t * gh * gw, H], to its rows [tokens, text_hidden_size]."""
        frames = x.reshape(t, gh, gw, -1)
        out = empty(x, gh * gw // 4, self.config.text_hidden_size, dtype=self.dtype)
        for band in _pieces(gh // 2, max(1, self.rows // gw)):
            summed = self._merge(frames[:, 2 * band.start : 2 * band.stop])
            self.mm_projector.forward(summed, t, out[band.start * gw // 2 : band.stop * gw // 2])
        return out

    def _merge(self, frames):
        """float32 [t, gh, gw, H] -> [tokens, 4, H]: normalised, summed over the frames, 2 x 2 neighbours in a row."""
        _, gh, gw, H = frames.shape
        merged = array_module(frames).zeros((gh // 2, gw // 2, 4, H), np.float32)
        for frame in frames:
            h = _cast(self.final_layernorm(frame.reshape(gh * gw, H)), np.float32).reshape(gh, gw, H)
            for corner, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                place = merged[:, :, corner]
                place += h[row::2, column::2]
        return merged.reshape(gh * gw // 4, 4, H)


def check(name: str, item: MediaItem, config: VisionConfig) -> None:
    """Raises ValueError, naming the item, for one of another patch size, with an odd grid or with too many frames."""
    (t, gh, gw), most, P = item.grid, config.init_pos_emb_time, config.patch_size
    if not 1 <= t <= most:
        raise ValueError(f"{name} has {t} frames, expected 1 to {most}")
    if min(gh, gw) < 2 or gh % 2 or gw % 2:
        raise ValueError(f"{name} has a grid of {gh} x {gw} patches, expected even numbers")
    if item.patches.shape != (t * gh * gw, 3 * P * P):
        found, expected = list(item.patches.shape), [t * gh * gw, 3 * P * P]
        raise ValueError(f"{name}: patches has shape {found}, expected {expected}")


def _pieces(n: int, most: int) -> list[slice]:
    """0 .. n in slices of at most so many, as equal as can be: a product of a few rows sums in another order."""
    count = -(-n // most)
    ends = [n * i // count for i in range(count + 1)]
    return list(map(slice, ends, ends[1:]))


def _cast(x, dtype):
    """x, or a copy of it in another dtype."""
    if x.dtype == dtype:
        return x
    copy = empty(x, *x.shape, dtype=dtype)
    copy[...] = x
    return copy


def _groups(items: Sequence[MediaItem]) -> Iterator[list[MediaItem]]:
    """Neighbours of at most GROUP patches together."""
    group, size = [], 0
    for item in items:
        if group and size + len(item.patches) > GROUP:
            yield group
            group, size = [], 0
        group.append(item)
        size += len(item.patches)
    if group:
        yield group


def _resample(table, gh: int, gw: int) -> np.ndarray:
    """Learned positions bfloat16 [height, width, H] -> float32 [gh * gw, H]: bicubic, without antialiasing."""
    height, width, H = table.shape
    rows, columns = bicubic(height, gh), bicubic(width, gw)
    flat, out = table.astype(np.float32).reshape(height, -1), np.empty((gh, gw, H), np.float32)
    for i in range(0, gh, TABLE_ROWS):
        mixed = (rows[i : i + TABLE_ROWS] @ flat).reshape(-1, width, H)
        np.matmul(columns, mixed, out=out[i : i + TABLE_ROWS])
    return out.reshape(gh * gw, H)


def bicubic(size: int, n: int) -> np.ndarray:
    """float32 [n, size], the weights of `size` samples in each of n: torch's bicubic interpolate, align_corners false.

    Four neighbours with the cubic convolution kernel of a = -0.75; those beyond an edge are the edge.
    Source: Keys 1981, "Cubic convolution interpolation for digital image processing".
    """
    at, a, matrix = (np.arange(n) + 0.5) * size / n - 0.5, -0.75, np.zeros((n, size))
    for tap in range(-1, 3):
        neighbour = np.floor(at).astype(int) + tap
        d = np.abs(at - neighbour)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        matrix[np.arange(n), np.clip(neighbour, 0, size - 1)] += np.where(d <= 1, near, far)
    return matrix.astype(np.float32)


def sinusoids(t: int, H: int) -> np.ndarray:
    """float32 [t, H], added to each frame of a clip: H / 2 sines, then as many cosines. Frame 0 is not neutral."""
    angles = np.arange(t)[:, None] * (10000.0 ** (-np.arange(H // 2) / (H // 2))).astype(np.float32)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def rotation(t: int, gh: int, gw: int, D: int) -> np.ndarray:
    """cos and sin, float32 [2, t * gh * gw, D / 2]: pair 2 i turns with the column, 2 i + 1 with the row, none with the
    frame."""
    frequencies = (10000.0 ** (-4 * np.arange(D // 4) / D)).astype(np.float32)
    tables = np.empty((2, t, gh, gw, D // 4, 2), np.float32)
    for turn, table in zip((np.cos, np.sin), tables, strict=True):
        table[..., 0] = turn(np.arange(gw)[:, None] * frequencies)
        table[..., 1] = turn(np.arange(gh)[:, None, None] * frequencies)
    return tables.reshape(2, t * gh * gw, D // 2)
