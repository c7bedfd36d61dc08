"""Dense products on the GPU: bf16 operands, float32 sums, by cuBLAS through CuPy."""

from kimi_native.ops._array import BF16, gpu_arrays, shape_of

_ALPHA_BETA = None  # float32 1 and 0 in host memory


def gemm(x, weight, out):
    raise NotImplementedError


def batched_gemm(x, weight, out, transpose_weight):
    raise NotImplementedError
