"""The same maths by others, on the arrays of a case: PyTorch (cuBLAS, cuDNN) and Triton, each if it is installed.

Each function returns {name: call, or None where the peer is absent}. Activations and weights are shared with CuPy, not
copied. PyTorch's calls run on the stream that is CuPy's current one and are captured by PyTorch's own CUDA graphs,
which keep its allocator's memory; outputs are allocated by PyTorch.
"""

from functools import cache

import numpy as np
from kimi_native.ops._array import gpu_arrays
from ml_dtypes import bfloat16


@cache
def torch():
    """PyTorch with CUDA, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


@cache
def triton_grouped_gemm():
    """bench.triton_grouped_gemm, or None. Triton reaches the GPU through PyTorch."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    if not torch():
        return None
    from bench import triton_grouped_gemm

    return triton_grouped_gemm


def versions() -> dict[str, str | None]:
    found = {"torch": torch() and torch().__version__, "triton": None}
    if triton_grouped_gemm():
        import triton

        found["triton"] = triton.__version__
    return found


def release() -> None:
    """Hand back the memory that PyTorch keeps."""
    if torch():
        torch().cuda.empty_cache()


class TorchCall:
    """A call of PyTorch's on CuPy's current stream."""

    def __init__(self, call):
        self._call = call
        self._stream = torch().cuda.ExternalStream(gpu_arrays().cuda.get_current_stream().ptr)

    def __call__(self):
        with torch().no_grad(), torch().cuda.stream(self._stream):
            self._call()

    def captured(self):
        """A function that replays the call."""
        t = torch()
        side, graph = t.cuda.Stream(), t.cuda.CUDAGraph()
        with t.no_grad():
            with t.cuda.stream(side):  # sets up what a library keeps for each stream
                self._call()
            t.cuda.synchronize()
            with t.cuda.graph(graph, stream=side):
                self._call()

        def replay():
            with t.cuda.stream(self._stream):
                graph.replay()

        return replay


def tensor(array):
    """CuPy's array as PyTorch's tensor, the same memory."""
    if array.dtype == bfloat16:
        return torch().from_dlpack(array.view(np.int16)).view(torch().bfloat16)
    return torch().from_dlpack(array)


def gemm(x, weight):
    if not torch():
        return {"torch": None}
    x, weight = tensor(x), tensor(weight)
    return {"torch": TorchCall(lambda: torch().nn.functional.linear(x, weight))}


def rms_norm(x, weight, eps):
    if not torch():
        return {"torch": None}
    x, weight = tensor(x), tensor(weight)
    return {"torch": TorchCall(lambda: torch().nn.functional.rms_norm(x, weight.shape, weight, eps))}


def layer_norm(x, weight, bias, eps):
    if not torch():
        return {"torch": None}
    x, weight, bias = tensor(x), tensor(weight), tensor(bias)
    return {"torch": TorchCall(lambda: torch().nn.functional.layer_norm(x, weight.shape, weight, bias, eps))}


def gelu(x, bias, tanh):
    if not torch():
        return {"torch": None}
    x, bias, form = tensor(x), tensor(bias), "tanh" if tanh else "none"
    return {"torch": TorchCall(lambda: torch().nn.functional.gelu(x + bias, approximate=form))}


def silu_and_mul(x):
    if not torch():
        return {"torch": None}
    gate, up = tensor(x).chunk(2, dim=1)
    return {"torch": TorchCall(lambda: torch().nn.functional.silu(gate) * up)}


def mla_prefill(q, kv, k_pe, B, key_dim, scale):
    """cuDNN's causal attention over as many new tokens as keys; q [B T, N, D], kv [B T, N, Dn + Dv], k_pe [B T, R]."""
    if not torch():
        return {"cuDNN": None}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = q.shape[1]
    q, kv, k_pe = (tensor(x).unflatten(0, (B, -1)) for x in (q, kv, k_pe))  # [B, T, ...]
    no_rope = key_dim - k_pe.shape[-1]
    k = torch().cat([kv[..., :no_rope], k_pe[:, :, None].expand(-1, -1, heads, -1)], dim=-1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, kv[..., no_rope:].contiguous()))  # [B, N, T, ...]

    def attention():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch().nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return {"cuDNN": TorchCall(attention)}


def attention(q, k, v, B, scale):
    """FlashAttention over B sequences of one length; q, k, v [B T, N, D]."""
    if not torch():
        return {"FlashAttention": None}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (tensor(x).unflatten(0, (B, -1)).transpose(1, 2).contiguous() for x in (q, k, v))  # [B, N, T, D]

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch().nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    return {"FlashAttention": TorchCall(call)}


def grouped_gemm(x, weight, offsets):
    """weight: [E, out, in], offsets: [E + 1], the last of them the rows of x."""
    if not torch():
        return {"torch._grouped_mm": None}
    x, weight, ends = tensor(x), tensor(weight).transpose(1, 2), tensor(offsets)[1:].contiguous()
    return {"torch._grouped_mm": TorchCall(lambda: torch()._grouped_mm(x, weight, offs=ends))}


def grouped_gemm_int4(x, packed, scale, counts):
    """packed: [E, out, in / 8], scale: [E, out, in / 32], counts: rows of each expert, in NumPy."""
    name = "Triton W4A16"
    module = triton_grouped_gemm()
    if not module:
        return {name: None}
    product = module.GroupedGemm(*map(tensor, (x, packed, scale)), counts)
    return {name: TorchCall(product)}
