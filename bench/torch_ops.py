"""PyTorch's operators on the CPU, on the arrays of a case. bench.peers has them on a GPU."""

import numpy as np
import torch
from kimi_native import ops
from torch.nn import functional

GROUP = 32
torch.set_num_threads(ops.num_threads())
torch.set_grad_enabled(False)
_convert, _multiply = torch.ops.aten._convert_weight_to_int4pack_for_cpu, torch.ops.aten._weight_int4pack_mm_for_cpu


def bf16(array):
    """The tensor of a bfloat16 array, in the same memory."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


class Int4:
    """A matrix in the layout of _weight_int4pack_mm_for_cpu, (q - 8) * scale + 0."""

    def __init__(self, packed, scale):
        pairs = torch.from_numpy(packed.view(np.uint8))  # [out, in / 2], the first value in the low bits
        values = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).int()
        self._weight, scales = _convert(values, 1), bf16(scale).T
        self._scales = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()  # [in / 32, out, 2]

    def __call__(self, x):
        """bfloat16 [T, in] -> [T, out]"""
        return _multiply(x, self._weight, GROUP, self._scales)


class Experts:
    """The routed experts of a layer, expert by expert. Activations are bf16."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        self._experts = [[Int4(*matrix) for matrix in expert] for expert in arrays]

    def call(self, x, topk_weights, topk_ids):
        """A function that returns the layer's output, [T, H]."""
        x, parts = torch.from_numpy(x).bfloat16(), []
        for e in np.unique(topk_ids):
            tokens, slots = np.nonzero(topk_ids == e)
            weights = torch.from_numpy(topk_weights[tokens, slots, None])
            parts.append((torch.from_numpy(tokens), weights, self._experts[e]))

        def compute():
            out = torch.zeros(x.shape)
            for tokens, weights, (gate, up, down) in parts:
                rows = x[tokens]
                out.index_add_(0, tokens, down(functional.silu(gate(rows)) * up(rows)) * weights)
            return out.numpy()

        return compute


def gemm_int4(x, packed, scale):
    """A function that returns the product with activations in bf16."""
    x, weight = torch.from_numpy(x).bfloat16(), Int4(packed, scale)
    return lambda: weight(x).float().numpy()


def gemm_bf16(x, weight):
    """A function that returns the product with the weights as they are stored, activations in bf16."""
    x, weight = torch.from_numpy(x).bfloat16(), bf16(weight)
    return lambda: functional.linear(x, weight).float().numpy()


def gemm_f32(x, weight):
    """A function that returns the product with weights that have become float32 before."""
    x, weight = torch.from_numpy(x), bf16(weight).float()
    return lambda: functional.linear(x, weight).numpy()


def mla_prefill(q, kv, k_pe, value_width: int, scale: float):
    """A function that returns the causal attention of one sequence's last tokens, [T, N, value_width].

    q: float32 [T, N, D], kv: [S, N, D - R + value_width], k_pe: [S, R]. Values are widened to D by zeros, because
    the fused kernel takes nothing else and what stands in for it needs twice the time.
    """
    (T, N, width), S = q.shape, len(kv)
    q, kv, k_pe = (torch.from_numpy(array) for array in (q, kv, k_pe))
    k, v = kv.split([kv.shape[-1] - value_width, value_width], dim=-1)
    k = torch.cat([k, k_pe[:, None].expand(-1, N, -1)], dim=-1)
    v = functional.pad(v, (0, width - value_width))
    q, k, v = (part.transpose(0, 1).contiguous()[None] for part in (q, k, v))  # [1, N, T or S, D]
    seen = {"is_causal": True} if S == T else {"attn_mask": torch.ones(T, S, dtype=torch.bool).tril(S - T)}
    attend = functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, scale=scale, **seen)[0, :, :, :value_width].transpose(0, 1).numpy()


def attention(q, k, v, B: int, scale: float):
    """A function that returns the attention of B sequences of one length without a mask, [B T, N, D]."""
    shape = q.shape
    q, k, v = (torch.from_numpy(x).unflatten(0, (B, -1)).transpose(1, 2).contiguous() for x in (q, k, v))
    attend = functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, scale=scale).transpose(1, 2).numpy().reshape(shape)
