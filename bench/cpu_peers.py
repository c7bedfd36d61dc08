"""The same maths by others on the CPU, on the arrays of a case, each if it is installed. bench.peers is for the GPU.

Each function returns {name: call}; a call returns its result, which the harness compares with ours.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from bench import ggml, kt_experts
from bench.expert_graph import experts

PACKAGES = ("ik-llama-cpp-python", "llama-cpp-python", "onnxruntime", "openvino", "torch", "transformers", "kt-kernel")
ONNX_ACCURACY = {"onnxruntime i8": 4, "onnxruntime f32": 1}


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def module(name: str):
    """bench.<name>, or None where a package that it imports is not installed."""
    try:
        return import_module(f"bench.{name}")
    except ModuleNotFoundError:
        return None


def ggml_engines() -> list[str]:
    return [engine for engine in ggml.EXPERTS if ggml.library(engine)]


def int4_graphs(x) -> dict:
    """{name: an empty graph for float32 x [T, width]}"""
    found = {}
    if module("onnx_graph"):
        found |= {name: module("onnx_graph").Graph(accuracy) for name, accuracy in ONNX_ACCURACY.items()}
    if module("openvino_graph"):
        found["openvino f32"] = module("openvino_graph").Graph(*x.shape)
    return found


class Experts:
    """The routed experts of a layer, in each peer's layout from when it is first asked for."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        self._arrays, self._placed = arrays, {}

    def calls(self, x, topk_weights, topk_ids, activations: str):
        """Those to compare ours with: float32 with exact ones, int8 with int8, int16 with those and bf16."""
        case = x, topk_weights, topk_ids
        makers = {}
        if activations != "float32":
            makers |= {engine: ggml.EXPERTS[engine] for engine in ggml_engines()}
        if activations == "int16" and module("torch_ops"):
            makers["torch bf16"] = module("torch_ops").Experts
        if activations == "int16" and kt_experts.extension() and len(x) <= kt_experts.MAX_TOKENS:
            makers["kt-kernel bf16"] = lambda arrays: kt_experts.Experts(arrays, topk_ids.shape[1])
        found = {}
        for name, make in makers.items():
            if name not in self._placed:
                self._placed[name] = make(self._arrays)
            found[name] = self._placed[name].call(*case)
        for name, graph in int4_graphs(x).items():
            if name.endswith(" f32") == (activations == "float32"):
                found[name] = experts(graph, *case, self._arrays)
        return found


def gemm(x, weight):
    torch_ops = module("torch_ops")
    if not torch_ops:
        return {}
    found = {"torch bf16": torch_ops.gemm_bf16(x, weight)}
    if len(x) > 1:  # one token reads float32 weights in twice the time
        found["torch f32"] = torch_ops.gemm_f32(x, weight)
    return found


def gemm_int4(x, packed, scale):
    found = {name: graph.call(x, graph.product(graph.x, packed, scale)) for name, graph in int4_graphs(x).items()}
    if module("torch_ops"):
        found["torch bf16"] = module("torch_ops").gemm_int4(x, packed, scale)
    return found


def mla_decode(q, cache, page_table, value_width, scale):
    """q: float32 [1, 1, N, C + R]; the pages of the one sequence are all full."""
    rows = cache[page_table[0]].reshape(-1, cache.shape[-1])
    return {engine: ggml.mla_decode(engine, q[0, 0], rows, value_width, scale) for engine in ggml_engines()}


def mla_prefill(q, kv, k_pe, value_width, scale):
    """q: float32 [T, N, D], the last tokens of one sequence; kv: [S, N, Dn + Dv], k_pe: [S, R]."""
    torch_ops = module("torch_ops")
    return {"torch f32": torch_ops.mla_prefill(q, kv, k_pe, value_width, scale)} if torch_ops else {}


def attention(q, k, v, B, scale):
    """q, k, v: float32 [B T, N, D] of B sequences of one length."""
    torch_ops = module("torch_ops")
    return {"torch f32": torch_ops.attention(q, k, v, B, scale)} if torch_ops else {}


def newton_schulz(g, steps):
    torch_muon = module("torch_muon")
    return {"torch f32": torch_muon.newton_schulz(g, steps)} if torch_muon else {}


def muon_step(params, grads, is_matrix, result):
    """result: the name of the parameter that a call returns; params are copied."""
    torch_muon, case = module("torch_muon"), (params, grads, is_matrix, result)
    if not torch_muon:
        return {}
    return {"torch f32": torch_muon.batched_step(*case), "torch.optim bf16": torch_muon.optim_step(*case)}
