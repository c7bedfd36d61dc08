"""ik_llama.cpp's operators on the arrays of a case, by ctypes on the libraries in the wheel ik-llama-cpp-python.

Weights are repacked as its run-time repack does, to Q4_0_R8, by its own function.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from kimi_native import ops

F32, F16, Q4_0, I32, SILU = 0, 1, 2, 26, 10  # of ggml.h: types, and a unary operation
MEBIBYTE = 2**20
Pointer, Int64 = ctypes.c_void_p, ctypes.c_int64


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool)]


class Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", Pointer),
        ("n_threads", ctypes.c_int),
        ("abort_callback", Pointer),
        ("abort_callback_data", Pointer),
    ]


SIGNATURES = {  # result, arguments
    "ggml_init": (Pointer, [InitParams]),
    "ggml_new_tensor": (Pointer, [Pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(Int64)]),
    "ggml_get_data": (Pointer, [Pointer]),
    "ggml_nbytes": (ctypes.c_size_t, [Pointer]),
    "ggml_view_3d": (Pointer, [Pointer, Pointer, *[Int64] * 3, *[ctypes.c_size_t] * 3]),
    "ggml_moe_up_gate": (Pointer, [*[Pointer] * 5, ctypes.c_int]),
    "ggml_mul_mat_id": (Pointer, [Pointer] * 4),
    "ggml_mul_multi_add": (Pointer, [Pointer] * 3),
    "ggml_flash_attn_ext": (Pointer, [*[Pointer] * 5, *[ctypes.c_float] * 3]),
    "iqk_repack_tensor": (None, [Pointer]),
    "ggml_new_graph": (Pointer, [Pointer]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_graph_plan": (Plan, [Pointer, ctypes.c_int]),
    "ggml_graph_compute": (ctypes.c_int, [Pointer, ctypes.POINTER(Plan)]),
}


@cache
def library():
    """libggml of the wheel, or None where it is not installed."""
    spec = find_spec("ik_llama_cpp")
    if spec is None:
        return None
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Context:
    """Tensors in memory of NumPy's, which asks for huge pages as it does for our arrays."""

    def __init__(self, nbytes: int):
        self.lib = library()
        self._memory = np.empty(nbytes + MEBIBYTE, np.uint8)
        start = -self._memory.ctypes.data % 64
        params = InitParams(self._memory.size - start, self._memory.ctypes.data + start, False)
        self._context = self.lib.ggml_init(params)
        self._kept = []

    def tensor(self, kind: int, array: np.ndarray, shape=None):
        """A tensor with a copy of the array; shape as NumPy has it, if the kind's is not the array's own."""
        shape = (shape or array.shape)[::-1]
        tensor = self.lib.ggml_new_tensor(self._context, kind, len(shape), (Int64 * len(shape))(*shape))
        ctypes.memmove(self.lib.ggml_get_data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return tensor

    def op(self, name: str, *arguments):
        return getattr(self.lib, name)(self._context, *arguments)

    def repack(self, tensor) -> None:
        self.lib.iqk_repack_tensor(tensor)

    def call(self, result, shape):
        """A function that computes `result` and returns it, float32 of the shape."""
        graph = self.lib.ggml_new_graph(self._context)
        self.lib.ggml_build_forward_expand(graph, result)
        plan = self.lib.ggml_graph_plan(graph, ops.num_threads())
        work = np.empty(plan.work_size + 64, np.uint8)
        plan.work_data = work.ctypes.data + -work.ctypes.data % 64
        address = self.lib.ggml_get_data(result)
        values = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(shape))).from_address(address)).reshape(shape)

        def compute(keep=(self, work)):
            status = self.lib.ggml_graph_compute(graph, ctypes.byref(plan))
            assert status == 0, f"ggml_graph_compute: status {status}"
            return values

        return compute


def q4_0(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of Q4_0, uint8 [out, in / 32, 18], of the published INT4: a float16 scale, then values j and j + 16 in a
    byte. Both store q + 8; the scale must fit float16.
    """
    groups = packed.view(np.uint8).reshape(*scale.shape, 16)  # values 2 j and 2 j + 1 in a byte
    low, high = groups[..., :8], groups[..., 8:]
    blocks = np.empty((*scale.shape, 18), np.uint8)
    blocks[..., :2] = scale.astype(np.float32).astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 2::2] = (low & 15) | (high << 4)
    blocks[..., 3::2] = (low >> 4) | (high & 0xF0)
    return blocks


class Experts:
    """The routed experts of a layer: gate, up and SwiGLU fused, down, and the weighted sum."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        one = [q4_0(*matrix) for matrix in arrays[0]]
        self._weights = Context(len(arrays) * sum(blocks.nbytes for blocks in one))
        self._projections = []
        for index, blocks in enumerate(one):
            all_blocks = np.stack([q4_0(*expert[index]) for expert in arrays])
            tensor = self._weights.tensor(Q4_0, all_blocks, (len(arrays), len(blocks), 32 * blocks.shape[1]))
            self._weights.repack(tensor)
            self._projections.append(tensor)
        self._intermediate = len(one[0])

    def call(self, x, topk_weights, topk_ids):
        """A function that returns the layer's output, [T, H]."""
        (T, H), K = x.shape, topk_ids.shape[1]
        context = Context(8 * T * K * (H + self._intermediate) + 8 * x.nbytes)
        gate, up, down = self._projections
        ids = context.tensor(I32, topk_ids)
        hidden = context.op("ggml_moe_up_gate", up, gate, context.tensor(F32, x[:, None]), ids, SILU)  # [T, K, I]
        experts = context.op("ggml_mul_mat_id", down, hidden, ids)  # [T, K, H]
        weights = context.tensor(F32, topk_weights[:, :, None])
        call = context.call(context.op("ggml_mul_multi_add", experts, weights), (T, H))
        return lambda keep=self: call()


def mla_decode(q, rows, value_width: int, scale: float):
    """A function that returns the attention of one token's heads over cached rows, [N, value_width].

    q: float32 [N, C + R]. rows: bfloat16 [S, C + R], which become float16.
    """
    (N, width), S = q.shape, len(rows)
    context = Context(rows.nbytes + 8 * q.nbytes + 64 * S)
    k = context.tensor(F16, rows.astype(np.float32).astype(np.float16)[None])
    v = context.op("ggml_view_3d", k, value_width, S, 1, 2 * width, 2 * width * S, 0)
    mask = context.tensor(F16, np.zeros((16, S), np.float16))  # rows of a mask come in multiples of 16
    attention = context.op("ggml_flash_attn_ext", context.tensor(F32, q[:, None]), k, v, mask, scale, 0.0, 0.0)
    return context.call(attention, (N, value_width))
