"""Products of float32 matrices, none of them a stored weight: what training needs."""

from itertools import pairwise

from kimi_native.ops._array import array_module, empty, on_gpu, run, shape_of, to_host


def matmul(a, b, out=None, symmetric=False):
    """out = a @ b in float32; on the GPU CuPy's matmul.

    a: float32 [M, K] or a batch [B, M, K]; b: [K, N] or [B, K, N]. Of the last two axes of each one is contiguous, so
    a.T and a.swapaxes(1, 2) are as good as a; other axes may be strided. out: [M, N] or [B, M, N], optional, its last
    axis contiguous; must not overlap a or b. Returns out. symmetric: the caller knows that the result is symmetric:
    what lies above its diagonal is copied from below, for half of the work.
    On the CPU an element is summed in pieces of 256 products, in one order whatever the other rows and columns are.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    if on_gpu(a):
        return array_module(a).matmul(a, b, out=out)
    if out is None:
        axes = 3 if getattr(a, "ndim", 2) == 3 else 2
        out = empty(a, *shape_of("matmul", "a", a, axes)[:-1], shape_of("matmul", "b", b, axes)[-1])
    run("matmul", a=a, b=b, out=out, symmetric=symmetric)
    return out


def grouped_matmul(a, b, offsets, out=None):
    """One product per group of rows, in float32: the rows of group e are offsets[e] to offsets[e + 1].

    With b [E, K, N] the rows of a [M, K] are multiplied by the matrix of their group, out [M, N]; rows from offsets[E]
    on become 0. With b [M, N] the columns of a [K, M] that belong to a group are multiplied by those rows of b, out
    [E, K, N]: the gradients of the matrices, with a.T for a.
    a, b: float32; of the last two axes one is contiguous, other axes may be strided. offsets: int32 [E + 1], ascending
    from 0 to at most M. out: optional, its last axis contiguous; must not overlap a or b. Returns out. On the GPU a
    loop over groups of CuPy's matmul, which waits for the offsets.
    Raises ValueError for a shape or offsets, TypeError for a dtype or kind of array that does not fit.
    """
    op = "grouped_matmul"
    sum_rows = getattr(b, "ndim", 3) == 2
    if out is None:
        groups = (max(0, shape_of(op, "offsets", offsets, 1)[0] - 1),) if sum_rows else ()
        out = empty(a, *groups, shape_of(op, "a", a, 2)[0], shape_of(op, "b", b, 2 if sum_rows else 3)[-1])
    if not on_gpu(a):
        run(op, a=a, b=b, offsets=offsets, out=out)
        return out
    ends = to_host(offsets)
    for e, (begin, end) in enumerate(pairwise(ends)):
        if sum_rows:
            array_module(a).matmul(a[:, begin:end], b[begin:end], out=out[e])
        else:
            array_module(a).matmul(a[begin:end], b[e], out=out[begin:end])
    if not sum_rows:
        out[ends[-1] :] = 0
    return out
