"""The published shapes of Kimi K2.5's text model, named, and random arrays in them.

Shape letters: T tokens, B sequences, S length, H hidden, I intermediate, N heads, C kv_lora_rank, R rope dim, E
experts, K experts per token. Source: config.json of the checkpoint.
"""

import numpy as np
from kimi_native.ops import ExpertWeights
from ml_dtypes import bfloat16

HIDDEN = 7168
INTERMEDIATE = 18432  # of the dense layer
MOE_INTERMEDIATE = 2048  # of one expert; the shared one has the same width
HEADS = 64
Q_LORA_RANK = 1536
KV_LORA_RANK = 512
NOPE_DIM, ROPE_DIM, V_DIM = 128, 64, 128
CACHE_WIDTH = KV_LORA_RANK + ROPE_DIM
QK_HEAD_DIM = NOPE_DIM + ROPE_DIM
EXPERTS, EXPERTS_PER_TOKEN = 384, 8
ROUTED_SCALING_FACTOR = 2.827
RMS_NORM_EPS = 1e-5
VOCAB = 163840
SOFTMAX_SCALE = QK_HEAD_DIM**-0.5
PAGE_SIZE = 64  # tokens, as kimi_native.cache allocates them
INT4_GROUP = 32

# [out, in] of the bf16 matrices of a layer, of the router and of the head
PROJECTIONS = {
    "q_a_proj": (Q_LORA_RANK, HIDDEN),
    "q_b_proj": (HEADS * QK_HEAD_DIM, Q_LORA_RANK),
    "kv_a_proj": (CACHE_WIDTH, HIDDEN),
    "kv_b_proj": (HEADS * (NOPE_DIM + V_DIM), KV_LORA_RANK),
    "o_proj": (HIDDEN, HEADS * V_DIM),
    "dense gate_proj": (INTERMEDIATE, HIDDEN),
    "shared gate_proj": (MOE_INTERMEDIATE, HIDDEN),
    "shared down_proj": (HIDDEN, MOE_INTERMEDIATE),
    "router": (EXPERTS, HIDDEN),
    "lm_head": (VOCAB, HIDDEN),
}
EXPERT_UP = (MOE_INTERMEDIATE, HIDDEN)  # gate_proj and up_proj of an expert
EXPERT_DOWN = (HIDDEN, MOE_INTERMEDIATE)
BENCH_EXPERTS = 32  # of a layer's 384: 793 MB in INT4, more than any cache holds

BYTES_INT4 = 0.5 + 2 / INT4_GROUP  # of a packed weight with its share of the scale
BYTES_BF16, BYTES_F32 = 2, 4


def rng() -> np.random.Generator:
    return np.random.default_rng(20251)


def random_f32(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def random_bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random sign and mantissa, magnitudes in [2^-7, 2^-5): what weights look like, without drawing normals."""
    bits = rng.integers(0, 2**16, shape, np.uint16)
    bits &= 0x80FF
    bits |= 0x3C00
    return bits.view(bfloat16)


def random_int4(rng: np.random.Generator, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight_packed int32 [out, in / 8], weight_scale bfloat16 [out, in / 32]) with all 16 nibbles."""
    packed = rng.integers(-(2**31), 2**31, (n_out, n_in // 8), np.int32)
    return packed, np.abs(random_bf16(rng, n_out, n_in // INT4_GROUP))


def random_experts(rng: np.random.Generator, n_out: int, n_in: int, quantized: bool = True):
    """(list of BENCH_EXPERTS weights, ExpertWeights of them); a weight is (packed, scale) or (bf16,)."""
    draw = random_int4 if quantized else lambda *a: (random_bf16(*a),)
    arrays = [draw(rng, n_out, n_in) for _ in range(BENCH_EXPERTS)]
    return arrays, ExpertWeights(*zip(*arrays, strict=True))


def random_ids(rng: np.random.Generator, T: int, E: int = BENCH_EXPERTS) -> np.ndarray:
    """int32 [T, EXPERTS_PER_TOKEN]: different experts for each token, all equally likely."""
    return rng.random((T, E)).argsort(axis=1)[:, :EXPERTS_PER_TOKEN].astype(np.int32)


def paged_cache(rng: np.random.Generator, B: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """(cache bfloat16 [pages, PAGE_SIZE, C + R], page_table int32 [B, S / PAGE_SIZE]), pages in random order."""
    pages = B * S // PAGE_SIZE
    return random_bf16(rng, pages, PAGE_SIZE, CACHE_WIDTH), rng.permutation(pages).astype(np.int32).reshape(B, -1)
