"""Dense products on the GPU by cuBLAS: bf16 operands, float32 sums, results in bf16 or float32.

cuBLAS is the one that CuPy loads, called by ctypes: CuPy's own wrappers refuse to be captured in a CUDA graph.

cuBLAS is column-major. A row-major array [r, c] whose rows are s elements apart is to it a c x r matrix of leading
dimension s, so the products here are written transposed: out^T = weight x^T, where weight arrives transposed and is
turned back by the operation T, and x^T is what arrives.
"""

import ctypes
import threading

import numpy as np

from kimi_native.ops._array import BF16, address, array_module, device_of, empty, on_gpu, stream_of

# Values of cublas_api.h and library_types.h
OP_N, OP_T = 0, 1
CUDA_R_32F, CUDA_R_16BF = 0, 14
COMPUTE_32F = 68
GEMM_DEFAULT = -1
MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises on Hopper; less on older chips
FLOAT32 = np.dtype(np.float32)
DATA_TYPES = {BF16: CUDA_R_16BF, FLOAT32: CUDA_R_32F}
ONE, ZERO = ctypes.c_float(1), ctypes.c_float(0)

library = None  # cuBLAS, loaded with the first product; the tests put a stand-in here
_local = threading.local()  # .handles: (device, stream) -> (handle, workspace); cuBLAS handles are for one thread each


def gemm(x, weight, out):
    """out = x @ weight.T; shapes and strides as ops.gemm says, all on the GPU."""
    check = Check("gemm", x)
    T, n_in = check("x", x, "T", "in")
    n_out, _ = check("weight", weight, "out", "in")
    check("out", out, "T", "out", dtypes=(BF16, FLOAT32))
    check.dense("weight", weight)
    ldx, ldout = check.row_stride("x", x), check.row_stride("out", out)
    check.apart(out, x)
    if T == 0 or n_out == 0:
        return
    call(
        "cublasGemmEx",
        x,
        (OP_T, OP_N, n_out, T, n_in, ctypes.addressof(ONE)),
        (address(weight), CUDA_R_16BF, max(1, n_in)),
        (address(x), CUDA_R_16BF, ldx),
        (ctypes.addressof(ZERO), address(out), DATA_TYPES[out.dtype], ldout),
        (COMPUTE_32F, GEMM_DEFAULT),
    )


def batched_gemm(x, weight, out, transpose_weight):
    """out[:, n] = x[:, n] @ weight[n].T, or @ weight[n] with transpose_weight; as ops.batched_gemm says, on the GPU."""
    check = Check("batched_gemm", x)
    T, N, n_in = check("x", x, "T", "N", "in")
    _, rows, columns = check("weight", weight, "N", *(("in", "out") if transpose_weight else ("out", "in")))
    n_out = columns if transpose_weight else rows
    check("out", out, "T", "N", "out", dtypes=(BF16, FLOAT32))
    if rows > 1 and weight.size and weight.strides[1] != columns * weight.itemsize:
        raise ValueError("batched_gemm: the rows of weight[n] are not contiguous")
    ldx, ldout = check.row_stride("x", x), check.row_stride("out", out)
    check.apart(out, x)
    if 0 in (T, N, n_out):
        return
    call(
        "cublasGemmStridedBatchedEx",
        x,
        (OP_N if transpose_weight else OP_T, OP_N, n_out, T, n_in, ctypes.addressof(ONE)),
        (address(weight), CUDA_R_16BF, max(1, columns), weight.strides[0] // weight.itemsize),
        (address(x), CUDA_R_16BF, ldx, x.strides[1] // x.itemsize),
        (ctypes.addressof(ZERO), address(out), DATA_TYPES[out.dtype], ldout, out.strides[1] // out.itemsize),
        (N, COMPUTE_32F, GEMM_DEFAULT),
    )


def call(function: str, x, *arguments) -> None:
    """Queue a product where x lies. RuntimeError if cuBLAS refuses it."""
    flat = (value for group in arguments for value in group)
    _succeed(function, getattr(_loaded(), function)(_handle(x), *flat))


def _handle(x) -> int:
    """This thread's handle for the GPU and the stream of x, with a workspace of its own, which a CUDA graph keeps."""
    if array_module(x) is not np:
        x.device.use()
    key, handles = (device_of(x), stream_of(x)), vars(_local).setdefault("handles", {})
    if key not in handles:
        lib, handle = _loaded(), ctypes.c_void_p()
        workspace = empty(x, WORKSPACE_BYTES, dtype=np.uint8)
        _succeed("cublasCreate", lib.cublasCreate_v2(ctypes.addressof(handle)))
        _succeed("cublasSetStream", lib.cublasSetStream_v2(handle.value, key[1]))
        _succeed("cublasSetWorkspace", lib.cublasSetWorkspace_v2(handle.value, address(workspace), WORKSPACE_BYTES))
        # Without this, parts of a long sum may be added up in bf16.
        _succeed("cublasSetMathMode", lib.cublasSetMathMode(handle.value, MATH_DISALLOW_REDUCED_PRECISION_REDUCTION))
        handles[key] = handle.value, workspace
    return handles[key][0]


def _succeed(function: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{function}: {_loaded().cublasGetStatusString(status).decode()}")


def _loaded():
    global library
    if library is None:
        from cupy_backends.cuda.libs import cublas  # noqa: F401  finds the library, also in NVIDIA's wheels, and loads it

        library = _declared(ctypes.CDLL(f"libcublas.so.{_cuda_version()}"))
    return library


def _cuda_version() -> int:
    """12 or 13: CuPy, its CUDA runtime and its cuBLAS are of one major version."""
    from cupy.cuda import runtime

    return runtime.runtimeGetVersion() // 1000


def _declared(lib):
    """The library with the types of the functions that are called."""
    i, p, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong
    head = [p, i, i, i, i, i, p]  # handle, both operations, m, n, k, alpha
    lib.cublasGetStatusString.argtypes, lib.cublasGetStatusString.restype = [i], ctypes.c_char_p
    lib.cublasCreate_v2.argtypes = [p]
    lib.cublasSetStream_v2.argtypes = [p, p]
    lib.cublasSetWorkspace_v2.argtypes = [p, p, ctypes.c_size_t]
    lib.cublasSetMathMode.argtypes = [p, i]
    lib.cublasGemmEx.argtypes = [*head, p, i, i, p, i, i, p, p, i, i, i, i]
    lib.cublasGemmStridedBatchedEx.argtypes = [*head, p, i, i, long, p, i, i, long, p, p, i, i, long, i, i, i]
    return lib


class Check:
    """The checks of the extension's bindings, with their messages. A letter is bound by the first array that has it."""

    def __init__(self, op: str, first):
        self.op, self.sizes = op, {}
        self.place = (on_gpu(first), device_of(first))

    def __call__(self, name: str, x, *letters: str, dtypes=(BF16,)) -> tuple[int, ...]:
        """The shape of x, which lies beside the first array, has one of the dtypes and a contiguous last axis."""
        expected = " or ".join(map(str, dtypes))
        dtype = getattr(x, "dtype", None)
        if dtype not in dtypes:
            found = type(x).__name__ if dtype is None else dtype
            raise TypeError(f"{self.op}: {name} is {found}, expected a CuPy array of {expected}")
        if not on_gpu(x):
            raise TypeError(f"{self.op}: {name} is a NumPy array, expected a CuPy array like the first argument")
        if device_of(x) != self.place[1]:
            raise ValueError(f"{self.op}: {name} is on GPU {device_of(x)}, expected GPU {self.place[1]}")
        fits = len(x.shape) == len(letters) and all(
            self.sizes.get(letter, size) == size < 2**31 for letter, size in zip(letters, x.shape, strict=True)
        )
        if not fits:
            bound = ", ".join(f"{letter} = {self.sizes[letter]}" for letter in letters if letter in self.sizes)
            raise ValueError(
                f"{self.op}: {name} has shape {list(x.shape)}, expected [{', '.join(letters)}]"
                + (f" with {bound}" if bound else "")
            )
        if x.shape[-1] > 1 and x.size and x.strides[-1] != x.itemsize:
            raise ValueError(f"{self.op}: the last axis of {name} is not contiguous")
        self.sizes.update(zip(letters, x.shape, strict=True))
        return x.shape

    def dense(self, name: str, x) -> None:
        if not x.flags.c_contiguous:
            raise ValueError(f"{self.op}: {name} is not contiguous")

    def row_stride(self, name: str, x) -> int:
        """Elements from one row of x to the next, as cuBLAS takes it: not less than a row, and an int."""
        width = max(1, x.shape[-1])
        if x.shape[0] <= 1 or x.size == 0:
            return width
        stride = x.strides[0] // x.itemsize
        if not width <= stride < 2**31:
            raise ValueError(f"{self.op}: rows of {name} are {stride} elements apart, expected {width} to 2^31 - 1")
        return stride

    def apart(self, out, x) -> None:
        (start, end), (begin, stop) = extent(out), extent(x)
        if out.size and x.size and start < stop and begin < end:
            raise ValueError(f"{self.op}: out overlaps x")


def extent(x) -> tuple[int, int]:
    """First byte of x, which is not empty, and one past its last."""
    reach = [(size - 1) * stride for size, stride in zip(x.shape, x.strides, strict=True)]
    first = address(x) + sum(r for r in reach if r < 0)
    return first, address(x) + sum(r for r in reach if r > 0) + x.itemsize
