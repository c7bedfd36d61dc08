"""The same maths by others on the CPU, on the arrays of a case, each if it is installed. bench.peers is for the GPU.

Each function returns {name: call}; a call returns its result, which the harness compares with ours.
"""

from importlib.metadata import PackageNotFoundError, version

from bench import ggml, kt_experts

PACKAGES = ("ik-llama-cpp-python", "onnxruntime", "kt-kernel")
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
    """The routed experts of a layer, in each peer's layout from when it is first asked for."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        self._arrays, self._ik, self._kt = arrays, None, None

    def calls(self, x, topk_weights, topk_ids, activations: str):
        """Those to compare ours with: float32 with exact ones, int8 with int8, int16 with those and bf16."""
        case, found = (x, topk_weights, topk_ids), {}
        if ggml.library() and activations != "float32":
            self._ik = self._ik or ggml.Experts(self._arrays)
            found["ik_llama.cpp"] = self._ik.call(*case)
        if onnx_experts():
            name = "onnxruntime f32" if activations == "float32" else "onnxruntime i8"
            found[name] = onnx_experts().experts(*case, self._arrays, ONNX_ACCURACY[name])
        if kt_experts.extension() and activations == "int16" and len(x) <= kt_experts.MAX_TOKENS:
            self._kt = self._kt or kt_experts.Experts(self._arrays, topk_ids.shape[1])
            found["kt-kernel bf16"] = self._kt.call(*case)
        return found


def gemm_int4(x, packed, scale):
    if not onnx_experts():
        return {}
    return {name: onnx_experts().gemm_int4(x, packed, scale, level) for name, level in ONNX_ACCURACY.items()}


def mla_decode(q, cache, page_table, value_width, scale):
    """q: float32 [1, 1, N, C + R]; the pages of the one sequence are all full."""
    rows = cache[page_table[0]].reshape(-1, cache.shape[-1])
    return {"ik_llama.cpp": ggml.mla_decode(q[0, 0], rows, value_width, scale)} if ggml.library() else {}
