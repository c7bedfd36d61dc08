"""The same maths by others on the CPU, on the arrays of a case, each if it is installed. bench.peers is for the GPU.

Each function returns {name: call}; a call returns its result, which the harness compares with ours.
"""

from importlib.metadata import PackageNotFoundError, version

from bench import ggml

PACKAGES = ("ik-llama-cpp-python",)


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Experts:
    """The routed experts of a layer in each peer's own layout, converted when they are first asked for."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        self._arrays, self._ik = arrays, None

    def calls(self, x, topk_weights, topk_ids):
        found = {}
        if ggml.library():
            self._ik = self._ik or ggml.Experts(self._arrays)
            found["ik_llama.cpp"] = self._ik.call(x, topk_weights, topk_ids)
        return found


def mla_decode(q, cache, page_table, value_width, scale):
    """q: float32 [1, 1, N, C + R]; the pages of the one sequence are all full."""
    rows = cache[page_table[0]].reshape(-1, cache.shape[-1])
    return {"ik_llama.cpp": ggml.mla_decode(q[0, 0], rows, value_width, scale)} if ggml.library() else {}
