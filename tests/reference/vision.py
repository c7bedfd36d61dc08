"""The vision tower and its projector in float64, one item at a time, written from the published formulas.

`tensors` maps the names on disk ("vision_tower.encoder.final_layernorm.weight") to arrays; `config` has the attributes
of the vision config.
"""

import numpy as np

from .attention import attention, rope
from .linear import gelu
from .norm import layer_norm

EPS = 1e-5


def encode(tensors, config, patches, grid):
    """float64 [gh * gw / 4, text_hidden_size] of normalised patches [t * gh * gw, 3 * 14 * 14]; grid: (t, gh, gw)."""
    return project(tensors, config, tower(tensors, config, patches, grid), grid)


def tower(tensors, config, patches, grid):
    """[t * gh * gw, H] after the final norm."""
    (t, gh, gw), T, N = grid, len(patches), config.vt_num_attention_heads
    x = linear(tensors, "vision_tower.patch_embed.proj", np.float64(patches))
    x = x + np.tile(positions(tensors["vision_tower.patch_embed.pos_emb.weight"], gh, gw), (t, 1))
    if t > 1:
        x = x + np.repeat(time(t, x.shape[1]), gh * gw, axis=0)
    cos, sin = rotation(gh, gw, x.shape[1] // N)
    place, scale = np.tile(np.arange(gh * gw), t), (x.shape[1] // N) ** -0.5
    for layer in range(config.vt_num_hidden_layers):
        name = f"vision_tower.encoder.blocks.{layer}"
        h = norm(tensors, f"{name}.norm0", x)
        q, k, v = linear(tensors, f"{name}.wqkv", h).reshape(T, 3, N, -1).swapaxes(0, 1)
        q, k = (rope(heads, cos, sin, place) for heads in (q, k))
        x = x + linear(tensors, f"{name}.wo", attention(q, k, v, [0, T], scale).reshape(T, -1))
        h = gelu(linear(tensors, f"{name}.mlp.fc0", norm(tensors, f"{name}.norm1", x)), tanh=True)
        x = x + linear(tensors, f"{name}.mlp.fc1", h)
    return norm(tensors, "vision_tower.encoder.final_layernorm", x)


def project(tensors, config, x, grid):
    """The mean over the frames, 2 x 2 neighbours side by side, norm of each, two linear maps."""
    t, gh, gw = grid
    x = x.reshape(t, gh // 2, 2, gw // 2, 2, -1).mean(axis=0).swapaxes(1, 2)
    x = norm(tensors, "mm_projector.pre_norm", x, config.projector_ln_eps).reshape(gh * gw // 4, -1)
    return linear(tensors, "mm_projector.proj.2", gelu(linear(tensors, "mm_projector.proj.0", x)))


def linear(tensors, module, x):
    weight = np.float64(tensors[f"{module}.weight"])
    return x @ weight.reshape(len(weight), -1).T + np.float64(tensors[f"{module}.bias"])


def norm(tensors, module, x, eps=EPS):
    return layer_norm(x, tensors[f"{module}.weight"], tensors[f"{module}.bias"], eps)


def positions(table, gh, gw):
    """[gh * gw, H]: the table [height, width, H] resampled as torch's bicubic interpolate does, tap by tap."""
    height, width, H = table.shape
    out = np.zeros((gh, gw, H))
    for row, row_taps in enumerate(taps(height, gh)):
        for column, column_taps in enumerate(taps(width, gw)):
            for i, a in row_taps:
                for j, b in column_taps:
                    out[row, column] += a * b * np.float64(table[i, j])
    return out.reshape(gh * gw, H)


def taps(size, n):
    """Of each of n outputs the four (index, weight) of `size` inputs; indices beyond an edge become the edge."""
    for i in range(n):
        source = (i + 0.5) * size / n - 0.5
        first = int(np.floor(source)) - 1
        yield [(min(max(at, 0), size - 1), keys(abs(source - at))) for at in range(first, first + 4)]


def keys(x, a=-0.75):
    """The cubic convolution kernel, 0 <= x <= 2."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a


def time(t, H):
    """[t, H]: sines, then cosines."""
    angle = np.arange(t)[:, None] * 10000.0 ** (-np.arange(H // 2) / (H // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def rotation(gh, gw, D):
    """(cos, sin), each [gh * gw, D / 2]: pair 2 i turns with the column, pair 2 i + 1 with the row."""
    frequency = 10000.0 ** (-4 * np.arange(D // 4) / D)
    angle = np.zeros((gh, gw, D // 2))
    angle[..., 0::2] = np.arange(gw)[None, :, None] * frequency
    angle[..., 1::2] = np.arange(gh)[:, None, None] * frequency
    return np.cos(angle).reshape(gh * gw, -1), np.sin(angle).reshape(gh * gw, -1)
