"""The model on the GPU: the whole of it on the emulator's kernels, with a stand-in for CuPy (fake_cupy.py).

Differences are the largest over all logits, in standard deviations of the expected logits.
"""

import json
import sys
from pathlib import Path

import fake_cupy
import kimi_native as kn
import numpy as np
import pytest
from arrays import BF16, same_bits
from kimi_native import _C
from kimi_native import make_tiny as tiny
from kimi_native import model as model_module
from kimi_native import ops
from kimi_native.checkpoint import Checkpoint
from kimi_native.ops import _array, _cublas
from kimi_native.ops import gpu as gpu_module
from reference import model as reference

_E = pytest.importorskip("kimi_native._E", reason="the extension _E, the emulator, is not built")

TOKENS = np.random.default_rng(0).integers(0, 1024, 90).tolist()


@pytest.fixture
def gpu(monkeypatch):
    """Puts the stand-in for CuPy in place, and the emulator's kernels for its arrays."""
    gpu = fake_cupy.Gpu()
    extension = fake_cupy.Extension(gpu, _C, _E)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.module(gpu))
    for name in ("_C", "extension"):
        monkeypatch.setattr(_array, name, extension)
    monkeypatch.setattr(_cublas, "library", fake_cupy.Cublas(gpu))
    monkeypatch.setattr(gpu_module, "_streams", {})
    vars(_cublas._local).clear()
    gpu.extension = extension
    _E.configure(0)
    yield gpu
    vars(_cublas._local).clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("cuda") / "tiny")


# Logits. transformers in bf16 is 0.02 to 0.08 away from its float64 where no expert is turned, here it is 0.05 at most.
BF16_MODEL = 6e-2
# Between two ways through our own kernels, which round at the same places but sum in another order: one bit of bf16 here
# and there, carried through three layers.
SAME_ROUNDING = 3e-2
ROUTER = 2e-2  # how far rounding moves sigmoid + bias, at most; experts that are closer may be turned
TURNED = 0.1  # of the tokens, in one layer or more

GOLDEN = Path(__file__).parent / "golden"
FACTS, GOLD = json.loads((GOLDEN / "text.json").read_text()), dict(np.load(GOLDEN / "text.npz"))
PROMPT, NEW = GOLD["prompt"].tolist(), GOLD["greedy_tokens"].tolist()


def away(actual, expected):
    """By row, the largest difference in standard deviations of the expected logits."""
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    return np.abs(np.float64(actual) - expected).max(axis=1) / np.std(expected, dtype=np.float64)


def assert_near(actual, expected, tolerance):
    rows = away(actual, expected)
    wrong = np.flatnonzero(~(rows <= tolerance)).tolist()
    assert not wrong, f"rows {wrong} are up to {rows.max():.3g} standard deviations away, allowed {tolerance}"


def in_pieces(model, tokens, sizes):
    """Logits [T, V] of the tokens, given to the model in pieces of these sizes."""
    assert sum(sizes) == len(tokens)
    cache, start, pieces = model.new_cache(len(tokens)), 0, []
    for size in sizes:
        pieces.append(model.forward(tokens[start : start + size], cache).get())
        start += size
    return np.concatenate(pieces)


class Routes:
    """The experts that the model chooses, by layer; those of a graph are read after each launch."""

    def __init__(self, monkeypatch, layers):
        self.layers, self.arrays, choose = layers, [], ops.topk_sigmoid

        def record(*arguments):
            weights, ids = choose(*arguments)
            self.arrays.append(ids)
            return weights, ids

        monkeypatch.setattr(ops, "topk_sigmoid", record)
        self.rows = []

    def collect(self):
        """Call it after each forward."""
        self.rows.append([ids.get() for ids in self.arrays[-self.layers :]])

    def ids(self):
        """int [layers, T, K]"""
        return [np.concatenate(layer) for layer in zip(*self.rows, strict=True)]


def reference_with(monkeypatch, ids):
    """Puts our experts in place of the reference's. Returns a list that receives, by layer and token, how far the worst
    of ours is behind the best of the others: above 0 the reference would have chosen otherwise."""
    behind, layers = [], iter(ids)

    def topk_sigmoid(logits, bias, top_k, routed_scaling_factor, norm_topk_prob):
        chosen, scores = next(layers), 1 / (1 + np.exp(-logits)) + np.float64(bias)
        ours = np.take_along_axis(scores, chosen, axis=1).min(axis=1)
        others = scores.copy()
        np.put_along_axis(others, chosen, -np.inf, axis=1)
        behind.append(others.max(axis=1) - ours)
        weights = np.take_along_axis(1 / (1 + np.exp(-logits)), chosen, axis=1)
        if norm_topk_prob:
            weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
        return weights * routed_scaling_factor, chosen

    monkeypatch.setattr(reference, "topk_sigmoid", topk_sigmoid)
    return behind


def tensors_of(folder):
    checkpoint = Checkpoint(folder)
    return {name.removeprefix(checkpoint.prefix): checkpoint[name] for name in checkpoint.names}


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("cuda") / "golden", **FACTS["checkpoint"])


@pytest.mark.parametrize("experts", [None, "cpu"])
def test_logits_of_the_golden_vectors(gpu, golden_folder, monkeypatch, experts):
    """A prompt in the naive form, then token by token in the absorbed form, by a graph unless experts are on the host.

    Rounding turns an expert where two are nearly level. Where it does not, the logits are the golden ones; where it does,
    they are the reference's with the same experts, and the reference finds those level, too.
    """
    model = kn.load(golden_folder, device="cuda", experts=experts, mla_norm_eps=1e-6)
    routes = Routes(monkeypatch, sum(isinstance(layer.mlp, model_module.MoE) for layer in model.layers))
    cache, pieces = model.new_cache(len(PROMPT) + len(NEW)), []
    for tokens in (PROMPT, *([token] for token in NEW[:-1])):
        pieces.append(model.forward(tokens, cache).get())
        routes.collect()
    logits, expected = np.concatenate(pieces), np.concatenate([GOLD["prompt_logits"], GOLD["decode_logits"]])
    behind = reference_with(monkeypatch, routes.ids())
    ours = reference.logits(tensors_of(golden_folder), model.config.text_config, PROMPT + NEW[:-1])
    assert_near(logits, ours, BF16_MODEL)
    turned = np.max(behind, axis=0) > 0
    assert np.max(behind) < ROUTER and turned.mean() < TURNED
    assert_near(logits[~turned], expected[~turned], BF16_MODEL)
    assert (gpu.captured, gpu.launched) == ((0, 0) if experts else (1, len(NEW) - 1))
    on_cpu = {"fused_moe"} if experts else set()
    assert gpu.extension.ran["cpu"] == on_cpu
    assert gpu.extension.ran["cuda"] == OPS - on_cpu


OPS = {"rms_norm", "fused_add_rms_norm", "rope", "fused_append_mla_cache", "mla_prefill", "mla_decode", "silu_and_mul"}
OPS |= {"topk_sigmoid", "fused_moe"}
