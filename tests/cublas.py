"""cuBLAS on the host, as far as the package calls it: column-major matrices at host addresses, by its manual."""

import ctypes

import numpy as np
from arrays import BF16

SUCCESS, NOT_INITIALIZED, INVALID_VALUE = 0, 1, 7
DTYPES = {0: np.dtype(np.float32), 14: BF16}
TRANSPOSE = {0: False, 1: True}
COMPUTE_32F, GEMM_DEFAULT = 68, -1


def bytes_at(address, count):
    """uint8 [count] at a host address; it may be written."""
    return np.frombuffer((ctypes.c_char * count).from_address(address), np.uint8)


def array_at(address, shape, strides, dtype):
    """The array whose first element lies at a host address; strides in bytes, none negative."""
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    count = 0 if 0 in shape else sum(reach) + dtype.itemsize
    return np.ndarray(shape, dtype, bytes_at(address, count), 0, strides)


def matrix(address, dtype, rows, columns, leading):
    """The rows x columns matrix whose columns are `leading` elements apart."""
    return array_at(address, (rows, columns), (dtype.itemsize, leading * dtype.itemsize), dtype)


class Cublas:
    """Functions under the names of the library; addresses are integers. `calls` counts products."""

    def __init__(self):
        self.handles, self.calls = {}, 0

    def cublasGetStatusString(self, status):
        return {INVALID_VALUE: b"invalid value", NOT_INITIALIZED: b"not initialized"}[status]

    def cublasCreate_v2(self, handle):
        number = len(self.handles) + 1
        ctypes.c_void_p.from_address(handle).value = number
        self.handles[number] = {}
        return SUCCESS

    def _set(self, handle, **settings):
        if handle not in self.handles:
            return NOT_INITIALIZED
        self.handles[handle] |= settings
        return SUCCESS

    def cublasSetStream_v2(self, handle, stream):
        return self._set(handle, stream=stream, workspace=None)  # the manual: it resets the workspace

    def cublasSetWorkspace_v2(self, handle, workspace, size):
        return self._set(handle, workspace=(workspace, size))

    def cublasSetMathMode(self, handle, mode):
        return self._set(handle, mode=mode)

    def cublasGemmEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute, algo
    ):
        if not self.handles.get(handle, {}).get("workspace"):
            return NOT_INITIALIZED
        a_shape = (k, m) if TRANSPOSE[transa] else (m, k)
        b_shape = (n, k) if TRANSPOSE[transb] else (k, n)
        fits = min(m, n, k) >= 0 and (compute, algo) == (COMPUTE_32F, GEMM_DEFAULT)
        fits &= lda >= max(1, a_shape[0]) and ldb >= max(1, b_shape[0]) and ldc >= max(1, m)
        if not fits or max(m, n, k, lda, ldb, ldc) >= 2**31:
            return INVALID_VALUE
        self.calls += 1
        a, b = matrix(A, DTYPES[Atype], *a_shape, lda), matrix(B, DTYPES[Btype], *b_shape, ldb)
        a, b = (a.T if TRANSPOSE[transa] else a), (b.T if TRANSPOSE[transb] else b)
        c = matrix(C, DTYPES[Ctype], m, n, ldc)
        scale = ctypes.c_float.from_address(alpha).value
        assert ctypes.c_float.from_address(beta).value == 0, "C is read where it is not initialised"
        with np.errstate(invalid="ignore"):
            c[...] = scale * (np.float32(a) @ np.float32(b))
        return SUCCESS

    def cublasGemmStridedBatchedEx(
        self,
        handle,
        transa,
        transb,
        m,
        n,
        k,
        alpha,
        A,
        Atype,
        lda,
        strideA,
        B,
        Btype,
        ldb,
        strideB,
        beta,
        C,
        Ctype,
        ldc,
        strideC,
        count,
        compute,
        algo,
    ):
        sizes = [DTYPES[kind].itemsize for kind in (Atype, Btype, Ctype)]
        for i in range(count):
            a, b, c = A + i * strideA * sizes[0], B + i * strideB * sizes[1], C + i * strideC * sizes[2]
            shape = handle, transa, transb, m, n, k
            status = Cublas.cublasGemmEx(
                self, *shape, alpha, a, Atype, lda, b, Btype, ldb, beta, c, Ctype, ldc, compute, algo
            )
            if status:
                return status
        return SUCCESS
