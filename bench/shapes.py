"""The published shapes of Kimi K2.5, named, and random arrays in them.

Shape letters: T tokens, B sequences, S length, H hidden, I intermediate, N heads, C kv_lora_rank, R rope dim, E
experts, K experts per token. Source: config.json of the checkpoint.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
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
VISION_HIDDEN, VISION_INTERMEDIATE = 1152, 4304
VISION_HEADS, VISION_HEAD_DIM = 16, 72
PROJECTOR_WIDTH = 4 * VISION_HIDDEN
LAYER_NORM_EPS = 1e-5
INT4_GROUP = INT8_GROUP = 32

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
BYTES_INT8 = 1 + 2 / INT8_GROUP
BYTES_BF16, BYTES_F32 = 2, 4


class Cases(NamedTuple):
    """What a benchmark runs through, on the CPU and on a GPU, there also with --quick."""

    cpu: tuple
    gpu: tuple
    quick: tuple

    def of(self, harness) -> tuple:
        if not harness.cuda:
            return self.cpu
        return self.quick if harness.quick else self.gpu


@dataclass(frozen=True)
class Experts:
    """Tokens of a layer and the matrices that its experts have here."""

    T: int
    E: int
    n_out: int = 2 * MOE_INTERMEDIATE  # gate and up together
    n_in: int = HIDDEN
    routing: str = "uniform"


@dataclass(frozen=True)
class Decode:
    B: int
    S: int
    N: int = HEADS
    Q: int = 1
    page_size: int = PAGE_SIZE
    varied: bool = False  # lengths normal(S, S / 2)
    float32: bool = False  # the cache, else bf16

    def __str__(self):
        rest = [f"Q={self.Q}"] * (self.Q > 1) + [f"page={self.page_size}"] * (self.page_size != PAGE_SIZE)
        rest += ["varied"] * self.varied + ["float32"] * self.float32
        return " ".join([f"B={self.B} S={self.S} N={self.N}", *rest])


@dataclass(frozen=True)
class Prefill:
    T: int  # new tokens of a sequence
    cached: int = 0
    B: int = 1
    N: int = HEADS

    def __str__(self):
        return f"B={self.B} " * (self.B > 1) + f"T={self.T} cached={self.cached} N={self.N}"


@dataclass(frozen=True)
class PrefillBackward:
    B: int
    T: int  # of each sequence
    N: int = HEADS
    dims: tuple = (NOPE_DIM, ROPE_DIM, V_DIM)

    def __str__(self):
        return f"B={self.B} T={self.T} N={self.N} " + "+".join(map(str, self.dims))


POWERS = tuple(2**i for i in range(14))  # 1 to 8192 tokens
STEPS = (1, 8, 64, 512, 4096)

TOKENS = Cases((1, 512), STEPS, (1, 64, 4096))  # of small ops
ROUTER_TOKENS = Cases((1, 512), (*STEPS, 32768), (1, 64, 4096))
PERMUTED_TOKENS = Cases((1, 128), STEPS, (1, 64, 4096))
SAMPLED = Cases((1, 8), (1, 8, 64), (1, 64))
NORM_WIDTHS = Cases((HIDDEN,), (HIDDEN, Q_LORA_RANK, KV_LORA_RANK), (HIDDEN,))
LAYER_TOKENS = Cases((1, 16), (1, 4, 8, 16, 64, 512, 4096), (1, 16, 512))
HEAD_PRODUCT_TOKENS = Cases((1, 64), STEPS, (1, 512))

SWIGLU = Cases(  # (T, I)
    cpu=((1, MOE_INTERMEDIATE), (1, INTERMEDIATE), (512, MOE_INTERMEDIATE)),
    gpu=(*((T, MOE_INTERMEDIATE) for T in STEPS), (1, INTERMEDIATE), (4096, INTERMEDIATE)),
    quick=((1, MOE_INTERMEDIATE), (4096, MOE_INTERMEDIATE)),
)
SWIGLU_BACKWARD = Cases(cpu=((512, MOE_INTERMEDIATE), (6144, 512)), gpu=(), quick=())  # (T, I); the CPU's alone
DEQUANTIZED = Cases(  # [out, in]
    cpu=(EXPERT_UP,),
    gpu=(EXPERT_UP, (3 * MOE_INTERMEDIATE, HIDDEN), (48 * 3 * MOE_INTERMEDIATE, HIDDEN)),  # one expert, 48 experts
    quick=((3 * MOE_INTERMEDIATE, HIDDEN),),
)
_PROMPTS = {"q_b_proj": (64, 512), "o_proj": (64, 512), "router": (512,)}
DENSE = Cases(  # (name, T): no more than 512 rows of logits
    cpu=tuple((name, T) for name in PROJECTIONS for T in (1, *_PROMPTS.get(name, ()))),
    gpu=tuple((name, T) for name in PROJECTIONS for T in STEPS if name != "lm_head" or T <= 512),
    quick=tuple((name, T) for name in ("q_a_proj", "o_proj", "router") for T in (1, 4096)),
)
DENSE_INT8 = Cases(  # (name, T); the CPU's alone
    cpu=tuple((name, T) for name in ("q_a_proj", "o_proj", "lm_head") for T in (1, *_PROMPTS.get(name, ()))),
    gpu=(),
    quick=(),
)
DENSE_INT4 = Cases(  # (T, out, in)
    cpu=tuple((T, *EXPERT_UP) for T in (1, 4, 16, 64, 256)),
    gpu=(
        *((T, 8192, 8192) for T in (*POWERS, 16384)),
        *((T, *shape) for shape in ((7168, 4096), (2048, 7168)) for T in (1, 16, 512, 4096)),
    ),
    quick=tuple((T, 8192, 8192) for T in (1, 16, 256, 4096)),
)
# of training, on the CPU: a matrix that MuonClip makes orthogonal, alone or in a batch
MUON = Cases(
    cpu=((1, 1024, 1024), (1, MOE_INTERMEDIATE, HIDDEN), (400, 64, 128), (32, 256, 512)),  # (B, M, K)
    gpu=(),
    quick=(),
)
TRAINED_LAYERS = Cases(cpu=((2048, 256, 1024), (512, HIDDEN, MOE_INTERMEDIATE)), gpu=(), quick=())  # (T, in, out)
TRAINED_EXPERTS = Cases(  # (tokens of each of the experts, E, in, out)
    cpu=((40, 32, 256, 128), (160, 32, 256, 128), (128, 8, HIDDEN, MOE_INTERMEDIATE)), gpu=(), quick=()
)
TRAINED_NORMS = Cases(cpu=((2048, 256), (512, HIDDEN)), gpu=(), quick=())  # (T, H)
GROUPED_BF16 = Cases(
    cpu=tuple(Experts(T, BENCH_EXPERTS, *EXPERT_UP) for T in (1, 16, 256)),
    gpu=tuple(Experts(T, 48) for T in (8, 64, 512, 4096)),
    quick=(Experts(512, 48),),
)
GROUPED_INT4 = Cases(
    cpu=GROUPED_BF16.cpu,
    gpu=(
        *(Experts(T, EXPERTS) for T in POWERS),
        *(Experts(T, EXPERTS, routing=routing) for routing in ("zipf", "same") for T in (16, 512, 4096)),
        *(Experts(T, 48, routing="remote") for T in (8, 64, 512, 4096)),  # one of eight GPUs
        *(Experts(T, EXPERTS, 2 * MOE_INTERMEDIATE // ways) for ways in (8, 16) for T in STEPS),
        *(Experts(T, EXPERTS, HIDDEN, MOE_INTERMEDIATE) for T in STEPS),
        *(Experts(T, 48, HIDDEN, MOE_INTERMEDIATE, "remote") for T in (8, 64, 512, 4096)),
        *(Experts(T, EXPERTS, HIDDEN, MOE_INTERMEDIATE // ways) for ways in (8, 16) for T in STEPS),
    ),
    quick=tuple(Experts(T, EXPERTS) for T in (1, 8, 64, 512, 4096)),
)
FUSED_MOE = Cases(  # n_out is the intermediate size here
    cpu=tuple(Experts(T, BENCH_EXPERTS, MOE_INTERMEDIATE) for T in (1, 4, 16, 64, 256)),
    gpu=(
        *(Experts(T, EXPERTS, MOE_INTERMEDIATE) for T in POWERS),
        *(
            Experts(T, EXPERTS, MOE_INTERMEDIATE, routing=routing)
            for routing in ("zipf", "same")
            for T in (16, 512, 4096)
        ),
        *(Experts(T, 48, MOE_INTERMEDIATE, routing="remote") for T in (8, 64, 512, 4096)),
        *(Experts(T, EXPERTS, MOE_INTERMEDIATE // 8) for T in STEPS),
    ),
    quick=tuple(Experts(T, EXPERTS, MOE_INTERMEDIATE) for T in (1, 8, 64, 512, 4096)),
)
LENGTHS = 512, 1024, 4096, 8192, 32768, 131072, 262144
DECODE = Cases(
    cpu=(
        *(Decode(B, S) for B, S in ((1, 4096), (1, 32768), (1, 262144), (8, 4096), (8, 32768))),
        *(Decode(1, S, N=16) for S in (4096, 32768)),
        *(Decode(1, 4096, Q=Q) for Q in (4, 16)),
        Decode(1, 4096, float32=True),
    ),
    gpu=(
        *(Decode(B, S) for B in (1, 8, 64, 128) for S in LENGTHS),
        *(Decode(B, S, N) for N in (16, 8) for B, S in ((1, 4096), (8, 4096), (64, 4096), (128, 4096), (1, 131072))),
        *(Decode(B, S, Q=Q) for Q in (2, 4) for B, S in ((1, 4096), (64, 4096), (128, 4096), (8, 32768))),
        *(Decode(128, 4096, page_size=page_size) for page_size in (16, 32, 128)),
        Decode(128, 4096, varied=True),
        *(Decode(B, S, Q=Q) for B in (1, 4) for Q in (16, 64, 128) for S in (8192, 65536, 131072)),
    ),
    quick=(*(Decode(B, 4096) for B in (1, 8, 64, 128)), Decode(1, 131072), Decode(128, 4096, 8)),
)
PREFILL = Cases(
    cpu=(Prefill(512), Prefill(512, 2048)),
    gpu=tuple(
        Prefill(T, cached, B, N)
        for N in (64, 8)
        for T, cached, B in ((4096, 0, 1), (2048, 0, 2), (16384, 0, 1), (4096, 32768, 1))
    ),
    quick=(Prefill(4096), Prefill(4096, 32768)),
)
PREFILL_BACKWARD = Cases(  # the CPU's alone
    cpu=(PrefillBackward(48, 128, 8, (32, 16, 32)), PrefillBackward(1, 512)), gpu=(), quick=()
)

_PATCHES = 256, 1656, 4144, 10764  # of 224 x 224, 640 x 480, 1024 x 768 and 1920 x 1080 pixels
PATCHES = Cases((4144,), _PATCHES, (4144,))
PICTURES = Cases(  # (how many, patches of each)
    cpu=((1, 4144), (1, 10764), (16, 256)),
    gpu=(*((1, T) for T in _PATCHES), (16, 256), (16, 4144)),
    quick=((1, 4144),),
)


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


def random_int8(rng: np.random.Generator, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight int8 [out, in], weight_scale bfloat16 [out, in / 32]) with all 256 codes."""
    weight = rng.integers(-128, 128, (n_out, n_in), np.int8)
    return weight, np.abs(random_bf16(rng, n_out, n_in // INT8_GROUP))


def random_ids(rng: np.random.Generator, T: int, E: int = BENCH_EXPERTS) -> np.ndarray:
    """int32 [T, EXPERTS_PER_TOKEN]: different experts for each token, all equally likely."""
    return rng.random((T, E)).argsort(axis=1)[:, :EXPERTS_PER_TOKEN].astype(np.int32)


def routed_ids(rng: np.random.Generator, T: int, E: int, routing: str) -> np.ndarray:
    """int32 [T, EXPERTS_PER_TOKEN] over E experts here, -1 for a remote one. A new rng for each case keeps it the same
    whatever runs before it.

    uniform: all equally likely. zipf: expert of rank r with weight 1 / r. same: every token the same eight, the worst
    case of load. remote: uniform over all 384 experts of the layer, of which the first E are here.
    """
    if routing == "uniform":
        return random_ids(rng, T, E)
    if routing == "zipf":
        popularity = -np.log(1.0 + rng.permutation(E))
        return np.argsort(-(popularity + rng.gumbel(size=(T, E))), axis=1)[:, :EXPERTS_PER_TOKEN].astype(np.int32)
    if routing == "same":
        return np.tile(np.arange(EXPERTS_PER_TOKEN, dtype=np.int32), (T, 1))
    assert routing == "remote"
    ids = random_ids(rng, T, EXPERTS)
    return np.where(ids < E, ids, np.int32(-1))


def page_table(rng: np.random.Generator, B: int, S: int, page_size: int = PAGE_SIZE) -> np.ndarray:
    """int32 [B, pages]: the pages of B sequences of S tokens in random order."""
    pages = -(-S // page_size)
    return rng.permutation(B * pages).astype(np.int32).reshape(B, pages)
