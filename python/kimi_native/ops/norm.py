"""Normalisation."""

from kimi_native.ops._array import check_host, empty, run, shape_of

BACKWARD_ROWS = 64  # that share a row of the workspace of rms_norm_backward


def rms_norm(x, weight, eps, out=None):
    """Root mean square normalisation over the last axis.

    out = x * rsqrt(mean(x**2) + eps) * weight, computed in float32.

    x: float32, on the GPU bfloat16 [T, H], rows may be strided. weight: bfloat16, on the CPU also float32 [H].
    eps: float.
    out: like x, optional; may be x. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    out = empty(x, *shape_of("rms_norm", "x", x, 2)) if out is None else out
    run("rms_norm", x=x, weight=weight, out=out, eps=eps)
    return out


def rms_norm_backward(x, weight, eps, dout):
    """Gradients of rms_norm with a float32 weight. On the CPU only.

    With r = rsqrt(mean(x**2) + eps) and d = dout * weight: dx = r d - r**3 mean(d x) x, and dweight is the sum over the
    rows of r dout x, in pieces of 64 rows.
    x, dout: float32 [T, H], rows may be strided. weight: float32 [H]. eps: float.
    Returns (dx float32 [T, H], dweight float32 [H]).
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    op = "rms_norm_backward"
    check_host(op, "x", x)
    T, H = shape_of(op, "x", x, 2)
    dx, dweight, workspace = empty(x, T, H), empty(x, H), empty(x, -(-T // BACKWARD_ROWS), H)
    run(op, x=x, weight=weight, dout=dout, dx=dx, dweight=dweight, workspace=workspace, eps=eps)
    return dx, dweight


def fused_add_rms_norm(x, residual, weight, eps, out=None):
    """Residual add and normalisation in one pass: residual += x, out = rms_norm(residual, weight, eps).

    x: float32, on the GPU bfloat16 [T, H]. residual: float32 [T, H], updated in place. weight: bfloat16 [H].
    eps: float. out: like x, optional; must not overlap residual. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    op = "fused_add_rms_norm"
    out = empty(x, *shape_of(op, "x", x, 2)) if out is None else out
    run(op, x=x, residual=residual, weight=weight, out=out, eps=eps)
    return out


def layer_norm(x, weight, bias, eps, out=None):
    """Layer normalisation over the last axis.

    out = (x - mean(x)) * rsqrt(mean((x - mean(x))**2) + eps) * weight + bias, computed in float32.

    x: float32, on the GPU bfloat16 [T, H], rows may be strided. weight, bias: bfloat16 [H]. eps: float.
    out: like x, optional, rows may be strided; may be x. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.
    """
    out = empty(x, *shape_of("layer_norm", "x", x, 2)) if out is None else out
    run("layer_norm", x=x, weight=weight, bias=bias, out=out, eps=eps)
    return out
