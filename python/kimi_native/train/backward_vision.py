"""MoonViT-3D and the projector with their gradients: what kimi_native.vision computes, all items of a step at once.

Shapes: T patches of all items, H vt_hidden_size, N heads of width D, I vt_intermediate_size, M = 4 mm_hidden_size.
The linear map behind a norm takes the norm's weight and bias into its own, so what passes over the patches is the plain
normalisation, and the gradients of weight and bias follow from those of the linear map.
Source: Kimi Team 2025, arXiv 2504.07491 (MoonViT), and 2026, arXiv 2602.02276.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_native import ops, vision
from kimi_native.config import Config
from kimi_native.media import MediaItem

SCORES = 2**20  # of attention that are held together, in items; a larger item goes alone
PIECE = 2**16  # numbers that pass through several loops while they are in the cache

PATCHES = "vision_tower.patch_embed.proj"
POSITIONS = "vision_tower.patch_embed.pos_emb.weight"
BLOCKS = "vision_tower.encoder.blocks"
FINAL = "vision_tower.encoder.final_layernorm"
PROJECTOR = "mm_projector"


class Group(NamedTuple):
    """Items of one grid, whose patches stand one after the other."""

    grid: tuple[int, int, int]
    items: list[int]  # where they stand among all items
    rows: slice  # of all patches
    tokens: slice  # of all tokens

    def of(self, x):
        """The group's part of x [T, ...]: [items, t * gh * gw, ...]."""
        return x[self.rows].reshape(len(self.items), math.prod(self.grid), *x.shape[1:])


class Normal(NamedTuple):
    """Rows brought to mean 0 and variance 1, [rows, H], and what they were multiplied by, [rows, 1]."""

    rows: np.ndarray
    factor: np.ndarray


class Block(NamedTuple):
    """What the gradients of a block need."""

    norm0: Normal
    qkv: np.ndarray  # [T, 3, N, D], q and k rotated
    attended: np.ndarray  # [T, H]
    lse: np.ndarray  # [N, T]
    norm1: Normal
    inner: np.ndarray  # [T, I], what goes into the GELU


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of a forward pass."""

    groups: list[Group]
    patches: np.ndarray  # [T, 3 * patch_size ** 2]
    rotation: tuple  # cos and sin, float32 [P, D / 2], and int32 [T], rows of these
    blocks: list[Block]
    final: Normal
    merged: Normal  # 4 rows a token
    inner: np.ndarray  # [tokens, M], what goes into the GELU


def forward(params: dict, config: Config, items: Sequence[MediaItem]) -> tuple[list[np.ndarray], Saved | None]:
    """The rows that stand for the items' tokens, [item.tokens, text_hidden_size] each, and what `backward` needs.

    params: the parameters under the names on disk, all of one dtype, which is that of the rows; those of the text model
    are not looked at. Attention over an item holds its scores, t * gh * gw squared, of one head.
    Raises ValueError for an item of another patch size, with an odd grid or with too many frames, and for a config
    without vision; KeyError for a parameter that is missing.
    """
    if not items:
        return [], None
    if config.vision_config is None:
        raise ValueError(f"backward_vision.forward: config has no vision_config, expected one for {len(items)} items")
    c = config.vision_config
    for index, item in enumerate(items):
        vision.check(f"items[{index}]", item, c)
    groups = _groups(items)
    patches = np.empty((groups[-1].rows.stop, 3 * c.patch_size**2), params[POSITIONS].dtype)
    for group in groups:
        for index, place in zip(group.items, group.of(patches), strict=True):
            place[...] = items[index].normalised(0, len(place))
    x = _linear(params, PATCHES, patches)
    _add_positions(x, params[POSITIONS], groups, vision.sinusoids(c.init_pos_emb_time, c.vt_hidden_size))
    rotation = _rotation(groups, c.vt_hidden_size // c.vt_num_attention_heads)
    blocks = [_block(params, f"{BLOCKS}.{layer}", x, rotation, groups) for layer in range(c.vt_num_hidden_layers)]
    final = _normalise(x, vision.EPS)
    x = final.rows * params[f"{FINAL}.weight"] + params[f"{FINAL}.bias"]
    merged = _normalise(_merge(x, groups), c.projector_ln_eps)
    inner = _behind_norm(params, f"{PROJECTOR}.pre_norm", f"{PROJECTOR}.proj.0", merged)
    rows = _linear(params, f"{PROJECTOR}.proj.2", ops.gelu(inner))
    return _by_item(rows, groups), Saved(groups, patches, rotation, blocks, final, merged, inner)


def backward(params: dict, config: Config, saved: Saved | None, drows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients of all parameters of tower and projector, under their names.

    saved: what `forward` gave for these params and config; None, of no items, gives zeros. drows: the gradients of the
    rows that it gave, one array for each item.
    Raises ValueError for drows of other shapes than the rows.
    """
    if saved is None:
        return {n: np.zeros_like(p) for n, p in params.items() if n.startswith(("vision_tower.", "mm_projector."))}
    grads, groups = {}, saved.groups
    d = _together(drows, groups, params[f"{PROJECTOR}.proj.2.bias"])
    activated = ops.gelu(saved.inner)
    d = _linear_backward(params, grads, f"{PROJECTOR}.proj.2", activated, d)
    _gelu_backward(saved.inner, activated, d, tanh=False)
    d = _behind_norm_backward(params, grads, f"{PROJECTOR}.pre_norm", f"{PROJECTOR}.proj.0", saved.merged, d)
    d = _merge_backward(d, groups)
    grads[f"{FINAL}.weight"] = np.einsum("th,th->h", d, saved.final.rows)
    grads[f"{FINAL}.bias"] = d.sum(axis=0)
    d *= params[f"{FINAL}.weight"]
    _normalise_backward(saved.final, d)
    for layer in reversed(range(len(saved.blocks))):
        _block_backward(params, grads, f"{BLOCKS}.{layer}", saved.blocks[layer], d, saved.rotation, groups)
    grads[POSITIONS] = _positions_backward(d, params[POSITIONS], groups)
    grads[f"{PATCHES}.weight"] = ops.matmul(d.T, saved.patches).reshape(params[f"{PATCHES}.weight"].shape)
    grads[f"{PATCHES}.bias"] = d.sum(axis=0)
    return grads


def _groups(items: Sequence[MediaItem]) -> list[Group]:
    by_grid, groups, row, token = {}, [], 0, 0
    for index, item in enumerate(items):
        by_grid.setdefault(item.grid, []).append(index)
    for grid, indices in by_grid.items():
        n = math.prod(grid)
        most = max(1, SCORES // n**2)
        for some in (indices[i : i + most] for i in range(0, len(indices), most)):
            rows, tokens = slice(row, row + len(some) * n), slice(token, token + len(some) * grid[1] * grid[2] // 4)
            groups.append(Group(grid, some, rows, tokens))
            row, token = rows.stop, tokens.stop
    return groups


def _by_item(rows, groups: list[Group]) -> list[np.ndarray]:
    """rows [tokens, ...] of all groups to those of each item, in the order of the items."""
    parts = {}
    for group in groups:
        parts |= zip(group.items, np.split(rows[group.tokens], len(group.items)), strict=True)
    return [parts[index] for index in range(len(parts))]


def _together(drows: Sequence[np.ndarray], groups: list[Group], like) -> np.ndarray:
    """What _by_item took apart, in the dtype of `like` [text_hidden_size]."""
    d = np.empty((groups[-1].tokens.stop, len(like)), like.dtype)
    places = _by_item(d, groups)
    if len(drows) != len(places):
        raise ValueError(f"backward_vision.backward: drows has {len(drows)} arrays, expected {len(places)}")
    for index, (place, given) in enumerate(zip(places, drows, strict=True)):
        if given.shape != place.shape:
            found, expected = list(given.shape), list(place.shape)
            raise ValueError(f"backward_vision.backward: drows[{index}] has shape {found}, expected {expected}")
        place[...] = given
    return d


def _linear(params, name: str, x):
    """x [T, in] @ weight.T + bias, [T, out]."""
    weight = params[f"{name}.weight"]
    out = ops.matmul(x, weight.reshape(len(weight), -1).T)
    out += params[f"{name}.bias"]
    return out


def _linear_backward(params, grads, name: str, x, d):
    """The gradient of x from that of the result, d [T, out]."""
    grads[f"{name}.weight"] = ops.matmul(d.T, x)
    grads[f"{name}.bias"] = d.sum(axis=0)
    return ops.matmul(d, params[f"{name}.weight"])


def _scaled(params, norm: str, linear: str):
    """The weight [out, in] of the linear map with the norm's inside; `in` may be several rows of the norm."""
    weight, gain = params[f"{linear}.weight"], params[f"{norm}.weight"]
    return (weight.reshape(-1, len(gain)) * gain).reshape(weight.shape)


def _behind_norm(params, norm: str, linear: str, normal: Normal):
    """What the linear map makes of the norm, [T, out]; normal is the norm before its weight and bias."""
    weight, shift = params[f"{linear}.weight"], params[f"{norm}.bias"]
    out = ops.matmul(normal.rows.reshape(-1, weight.shape[1]), _scaled(params, norm, linear).T)
    shifted = ops.matmul(weight.reshape(-1, len(shift)), shift[:, None]).reshape(len(weight), -1)
    out += params[f"{linear}.bias"] + shifted.sum(axis=1)
    return out


def _behind_norm_backward(params, grads, norm: str, linear: str, normal: Normal, d):
    """The gradient of what went into the norm, [rows, H], from that of what the linear map gave, d [T, out]."""
    weight, gain, shift = params[f"{linear}.weight"], params[f"{norm}.weight"], params[f"{norm}.bias"]
    dscaled = ops.matmul(d.T, normal.rows.reshape(len(d), -1)).reshape(len(weight), -1, len(gain))
    dbias = d.sum(axis=0)
    grads[f"{norm}.weight"] = np.einsum("orh,orh->h", dscaled, weight.reshape(dscaled.shape))
    grads[f"{norm}.bias"] = ops.matmul(dbias[None], weight).reshape(-1, len(shift)).sum(axis=0)
    grads[f"{linear}.weight"] = (dscaled * gain + dbias[:, None, None] * shift).reshape(weight.shape)
    grads[f"{linear}.bias"] = dbias
    dx = ops.matmul(d, _scaled(params, norm, linear)).reshape(normal.rows.shape)
    _normalise_backward(normal, dx)
    return dx


def _normalise(x, eps: float) -> Normal:
    """x [rows, H] without its mean, over the root of its variance and eps."""
    rows = x - _mean(x)
    factor = 1 / np.sqrt(_mean(rows, rows) + eps)
    rows *= factor
    return Normal(rows, factor)


def _normalise_backward(normal: Normal, d) -> None:
    """d, the gradient of normal.rows, becomes in place that of what went in."""
    d -= _mean(d)
    d -= normal.rows * _mean(normal.rows, d)
    d *= normal.factor


def _mean(*factors):
    """The mean of each row of the product of the factors, [rows, H] each: [rows, 1]. np.mean takes twice as long."""
    return np.einsum(",".join(["th"] * len(factors)) + "->t", *factors)[:, None] / factors[0].shape[1]


def _gelu_backward(x, activated, d, tanh: bool) -> None:
    """d, the gradient of activated = gelu(x), becomes in place that of x. All are contiguous and of one shape."""
    x, activated, d = x.ravel(), activated.ravel(), d.reshape(-1)
    for begin in range(0, len(x), PIECE):
        v, g = x[begin : begin + PIECE], activated[begin : begin + PIECE]
        slope = v * v
        with np.errstate(invalid="ignore"):
            share = g / v  # Phi(v), by either formula
        share[slope == 0] = 0.5  # 0 / 0, and numbers so small that g has lost digits
        if tanh:
            slope *= 6 * 0.044715 * math.sqrt(2 / math.pi)
            slope += 2 * math.sqrt(2 / math.pi)
            slope *= g
            slope *= 1 - share
        else:
            slope *= -0.5
            np.exp(slope, out=slope)
            slope *= v
            slope *= 1 / math.sqrt(2 * math.pi)
        slope += share
        d[begin : begin + PIECE] *= slope


def _block(params, name: str, x, rotation, groups: list[Group]) -> Block:
    """Attention and MLP, both added to x [T, H] in place."""
    norm0 = _normalise(x, vision.EPS)
    qkv = _behind_norm(params, f"{name}.norm0", f"{name}.wqkv", norm0)
    qkv = qkv.reshape(len(x), 3, -1, 2 * rotation[0].shape[1])
    _rotate(qkv, *rotation)
    attended, lse = _attend(qkv, groups)
    x += _linear(params, f"{name}.wo", attended)
    norm1 = _normalise(x, vision.EPS)
    inner = _behind_norm(params, f"{name}.norm1", f"{name}.mlp.fc0", norm1)
    x += _linear(params, f"{name}.mlp.fc1", ops.gelu(inner, tanh=True))
    return Block(norm0, qkv, attended, lse, norm1, inner)


def _block_backward(params, grads, name: str, saved: Block, d, rotation, groups: list[Group]) -> None:
    """d, the gradient of what the block made of x [T, H], becomes in place that of x."""
    activated = ops.gelu(saved.inner, tanh=True)
    dinner = _linear_backward(params, grads, f"{name}.mlp.fc1", activated, d)
    _gelu_backward(saved.inner, activated, dinner, tanh=True)
    d += _behind_norm_backward(params, grads, f"{name}.norm1", f"{name}.mlp.fc0", saved.norm1, dinner)
    dattended = _linear_backward(params, grads, f"{name}.wo", saved.attended, d)
    dqkv = _attend_backward(saved, dattended, groups)
    cos, sin, positions = rotation
    _rotate(dqkv, cos, -sin, positions)
    dqkv = dqkv.reshape(len(d), -1)
    d += _behind_norm_backward(params, grads, f"{name}.norm0", f"{name}.wqkv", saved.norm0, dqkv)


def _rotation(groups: list[Group], D: int) -> tuple:
    """cos and sin, float32 [P, D / 2], of all grids one after the other, and int32 [T], rows of these."""
    tables, positions, before = [], [], 0
    for group in groups:
        tables.append(vision.rotation(*group.grid, D))
        n = math.prod(group.grid)
        positions += [np.arange(before, before + n, dtype=np.int32)] * len(group.items)
        before += n
    cos, sin = np.concatenate(tables, axis=1)
    return cos, sin, np.concatenate(positions)


def _rotate(qkv, cos, sin, positions) -> None:
    """q and k of qkv [T, 3, N, D], in place."""
    T, _, N, D = qkv.shape
    qk = qkv.reshape(T, 3 * N, D)[:, : 2 * N]
    qk[...] = ops.rope(qk, cos, sin, positions)


def _attend(qkv, groups: list[Group]):
    """softmax(q k^T / sqrt(D)) v within each item, [T, H], and the log-sum-exps [N, T]. qkv: [T, 3, N, D]."""
    T, _, N, D = qkv.shape
    out, lse = np.empty((T, N, D), qkv.dtype), np.empty((N, T), qkv.dtype)
    for group in groups:
        q, k, v = np.moveaxis(group.of(qkv), 2, 0)
        attended = group.of(out)
        for n in range(N):
            p = ops.matmul(q[:, :, n], k[:, :, n].swapaxes(1, 2))
            p *= D**-0.5
            top = p.max(axis=2, keepdims=True)
            p -= top
            np.exp(p, out=p)
            total = np.einsum("bij->bi", p)[:, :, None]
            np.divide(ops.matmul(p, v[:, :, n]), total, out=attended[:, :, n])
            lse[n, group.rows] = (top + np.log(total)).ravel()
    return out.reshape(T, N * D), lse


def _attend_backward(saved: Block, dout, groups: list[Group]):
    """The gradients of q, k and v, [T, 3, N, D], from that of saved.attended, dout [T, H]."""
    T, _, N, D = saved.qkv.shape
    dout = dout.reshape(T, N, D)
    # The gradient of a softmax is that of its input less their mean under it, which is the sum of out * dout.
    means, dqkv = np.einsum("tnd,tnd->nt", saved.attended.reshape(T, N, D), dout), np.empty_like(saved.qkv)
    for group in groups:
        q, k, v = np.moveaxis(group.of(saved.qkv), 2, 0)
        dq, dk, dv = np.moveaxis(group.of(dqkv), 2, 0)
        dattended = group.of(dout)
        shape = len(group.items), -1, 1
        for n in range(N):
            p = ops.matmul(q[:, :, n], k[:, :, n].swapaxes(1, 2))
            p *= D**-0.5
            p -= saved.lse[n, group.rows].reshape(shape)
            np.exp(p, out=p)
            dv[:, :, n] = ops.matmul(p.swapaxes(1, 2), dattended[:, :, n])
            dp = ops.matmul(dattended[:, :, n], v[:, :, n].swapaxes(1, 2))
            dp -= means[n, group.rows].reshape(shape)
            dp *= p
            dp *= D**-0.5
            dq[:, :, n] = ops.matmul(dp, k[:, :, n])
            dk[:, :, n] = ops.matmul(dp.swapaxes(1, 2), q[:, :, n])
    return dqkv


def _merge(x, groups: list[Group]):
    """x [T, H] -> [4 tokens, H]: the mean over an item's frames, 2 x 2 neighbours one after the other."""
    merged = np.empty((4 * groups[-1].tokens.stop, x.shape[1]), x.dtype)
    for group in groups:
        t, gh, gw = group.grid
        frames = group.of(x).reshape(-1, t, gh // 2, 2, gw // 2, 2, x.shape[1])
        _corners(merged, group)[...] = frames.mean(axis=1)
    return merged


def _merge_backward(dmerged, groups: list[Group]):
    """The gradient of x [T, H] from that of what _merge made of it."""
    d = np.empty((groups[-1].rows.stop, dmerged.shape[1]), dmerged.dtype)
    for group in groups:
        t, gh, gw = group.grid
        frames = group.of(d).reshape(-1, t, gh // 2, 2, gw // 2, 2, d.shape[1])
        np.divide(_corners(dmerged, group)[:, None], t, out=frames)
    return d


def _corners(merged, group: Group):
    """The group's part of merged [4 tokens, H] as a view [items, gh / 2, 2, gw / 2, 2, H]."""
    _, gh, gw = group.grid
    part = merged[4 * group.tokens.start : 4 * group.tokens.stop]
    return part.reshape(-1, gh // 2, gw // 2, 2, 2, merged.shape[1]).swapaxes(2, 3)


def _add_positions(x, table, groups: list[Group], times) -> None:
    """Adds to x [T, H] the learned positions, resampled from table [height, width, H], and times [frames, H]."""
    for group in groups:
        t, gh, gw = group.grid
        frames = group.of(x).reshape(-1, t, gh * gw, x.shape[1])
        frames += _between(table, *_resampling(table, gh, gw)).reshape(gh * gw, -1)
        if t > 1:
            frames += times[:t, None]


def _positions_backward(d, table, groups: list[Group]):
    """The gradient of the table from that of x [T, H]."""
    dtable = np.zeros_like(table)
    for group in groups:
        _, gh, gw = group.grid
        together = d[group.rows].reshape(-1, gh, gw, d.shape[1]).sum(axis=0)
        rows, columns = _resampling(table, gh, gw)
        dtable += _between(together, rows.T, columns.T)
    return dtable


def _resampling(table, gh: int, gw: int):
    """The weights of the table's rows [gh, height] and columns [gw, width]."""
    return (vision.bicubic(*sizes).astype(table.dtype) for sizes in zip(table.shape, (gh, gw), strict=False))


def _between(table, rows, columns):
    """sum over i, j of rows[r, i] columns[c, j] table[i, j]: [height, width, H] -> [r, c, H]."""
    height, width, H = table.shape
    mixed = ops.matmul(rows, table.reshape(height, width * H)).reshape(-1, width, H).swapaxes(0, 1)
    return ops.matmul(columns, mixed.reshape(width, -1)).reshape(len(columns), len(rows), H).swapaxes(0, 1)
