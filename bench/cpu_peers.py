"""The same maths by others on the CPU, on the arrays of a case, each if it is installed. bench.peers is for the GPU.

Each function returns {name: call}; a call returns its result, which the harness compares with ours.
"""

from importlib.metadata import PackageNotFoundError, version

from bench import ggml

PACKAGES = ("ik-llama-cpp-python", "onnxruntime")
ONNX_ACCURACY = {"onnxruntime i8": 4, "onnxruntime f32": 1}


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def onnx_experts():
    """bench.onnx_experts, or None."""
    try:
        from bench import onnx_experts
    except ImportError:
        return None
    return onnx_experts


def ik_model():
    """bench.ik_model, or None without ik_llama.cpp or gguf, which writes its file."""
    try:
        import gguf  # noqa: F401

        from bench import ik_model
    except ImportError:
        return None
    return ik_model


class Experts:
    """The routed experts of a layer, in ik_llama.cpp's layout when they are first asked for."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        self._arrays, self._ik = arrays, None

    def calls(self, x, topk_weights, topk_ids, exact: bool):
        """exact: those that leave activations float32, else those that round them."""
        case, found = (x, topk_weights, topk_ids), {}
        if ggml.library() and not exact:
            self._ik = self._ik or ggml.Experts(self._arrays)
            found["ik_llama.cpp"] = self._ik.call(*case)
        if onnx_experts():
            name = "onnxruntime f32" if exact else "onnxruntime i8"
            found[name] = onnx_experts().experts(*case, self._arrays, ONNX_ACCURACY[name])
        return found


def gemm_int4(x, packed, scale):
    if not onnx_experts():
        return {}
    return {name: onnx_experts().gemm_int4(x, packed, scale, level) for name, level in ONNX_ACCURACY.items()}


def mla_decode(q, cache, page_table, value_width, scale):
    """q: float32 [1, 1, N, C + R]; the pages of the one sequence are all full."""
    rows = cache[page_table[0]].reshape(-1, cache.shape[-1])
    return {"ik_llama.cpp": ggml.mla_decode(q[0, 0], rows, value_width, scale)} if ggml.library() else {}
