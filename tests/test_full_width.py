"""The published widths: logits of a two-layer checkpoint with 384 experts a layer, and all 64 shards mapped."""

import os
import shutil
import subprocess
import sys

import kimi_native as kn
import numpy as np
import pytest
from arrays import BF16
from kimi_native import make_tiny as tiny
from kimi_native import ops
from kimi_native.__main__ import main
from kimi_native.checkpoint import Checkpoint
from reference import model as reference

FLOAT32 = 2e-5  # standard deviations of the logits; 2e-6 were seen
TOKENS = [1, 2, 3, 900, 5]
LIVE_EXPERTS = (0, 1, 47, 100, 191, 255, 256, 382, 383)


@pytest.fixture(scope="module")
def full_width(tmp_path_factory):
    """full-width with experts of our own, which take less time to draw and have all 16 codes."""
    folder = tmp_path_factory.mktemp("full") / "width"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FULL_WIDTH_LIVE_EXPERTS", ())
        tiny.make_tiny(folder, "full-width")
    write_experts(Checkpoint(folder), np.random.default_rng(1))
    yield folder
    shutil.rmtree(folder)


def write_experts(checkpoint, rng):
    """Random words and scales for LIVE_EXPERTS, and a bias with which the router takes no others."""

    def overwrite(name, array):
        entry = checkpoint.entries[name]
        assert (entry.shape, entry.nbytes) == (array.shape, array.nbytes)
        with entry.file.open("r+b") as shard:
            shard.seek(entry.begin)
            shard.write(array.tobytes())

    mlp = "model.layers.1.mlp."
    bias = rng.normal(0, 0.1, 384).astype(np.float32)
    bias[list(LIVE_EXPERTS)] += 2  # a sigmoid is at most 1
    overwrite(f"{mlp}gate.e_score_correction_bias", bias)
    for expert in LIVE_EXPERTS:
        for part, (rows, columns) in {"gate": (2048, 7168), "up": (2048, 7168), "down": (7168, 2048)}.items():
            module = f"{mlp}experts.{expert}.{part}_proj"
            words = np.frombuffer(rng.bytes(rows * columns // 2), np.int32).reshape(rows, columns // 8)
            scales = rng.uniform(0.16, 0.24, (rows, columns // 32)) / np.sqrt(columns)
            overwrite(f"{module}.weight_packed", words)
            overwrite(f"{module}.weight_scale", scales.astype(BF16))


# Runs with 100 MB above what the interpreter and the library take: less than two experts in bf16, where 384 are mapped.
CHILD = """
import resource, sys
import numpy as np
import kimi_native as kn
from kimi_native import ops

folder, out, tokens = sys.argv[1], sys.argv[2], list(map(int, sys.argv[3:]))
ops.set_num_threads(2)
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 100_000_000,) * 2)
try:
    np.empty(110_000_000, np.uint8)
except MemoryError:
    pass
else:
    sys.exit("the limit does not hold")
model = kn.load(folder, cache_dtype="float32", activations="float32")
cache = model.new_cache(len(tokens))
np.save(out, np.concatenate([model.forward(tokens[:4], cache), model.forward(tokens[4:], cache)]))
"""


def test_logits_within_little_memory(full_width, tmp_path):
    """Four tokens in the naive form, one in the absorbed form."""
    out = tmp_path / "logits.npy"
    arguments = [sys.executable, "-c", CHILD, full_width, out, *map(str, TOKENS)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    checkpoint, config = Checkpoint(full_width), kn.Config.from_folder(full_width).text_config
    assert sum(entry.nbytes for entry in checkpoint.entries.values()) > 9e9
    expected = reference.logits(checkpoint, config, TOKENS)
    actual = np.load(out)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape == (5, config.vocab_size)
    away = np.abs(actual - expected).max(axis=1) / expected.std()
    assert (away <= FLOAT32).all(), f"standard deviations away, by row: {away}"


def test_router_takes_the_live_experts(full_width, monkeypatch):
    """Guards the test above: every live expert is used, and no hole."""
    model, chosen = kn.load(full_width), []
    moe, choose = model.layers[1].mlp, ops.topk_sigmoid

    def record(*arguments):
        weights, ids = choose(*arguments)
        chosen.append(ids)
        return weights, ids

    monkeypatch.setattr(ops, "topk_sigmoid", record)
    model.forward(TOKENS, model.new_cache(5))
    assert moe.gate_proj.weights.shape == (384, 2048, 7168)
    assert set(np.concatenate(chosen).ravel()) == set(LIVE_EXPERTS)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    folder = tiny.make_tiny(tmp_path_factory.mktemp("full") / "size", "full-size")
    yield folder
    shutil.rmtree(folder)


def test_full_size_loads(full_size):
    """595 GB are mapped under 208,550 names; nothing is read but headers."""
    seen = []
    model = kn.load(full_size, progress=lambda *step: seen.append(step))
    assert seen == [(n, 64) for n in range(1, 65)] + [(n, 61) for n in range(1, 62)]
    assert model.tokenizer is None
    assert model.embed_tokens.shape == (163840, 7168)
    assert not model.embed_tokens[[0, 163839]].any()
    kinds = [type(layer.mlp).__name__ for layer in model.layers]
    assert kinds == ["DenseMLP"] + ["MoE"] * 60
    assert model.layers[60].self_attn.kv_b_proj.shape == (64 * 256, 512)
    cache = model.new_cache(262144)
    assert cache.pool.bytes_per_token == 70_272
    assert cache.pool.pages.nbytes == 18_421_383_168
    with pytest.raises(ValueError, match=r"token_ids\[0\] is 163840"):
        model.forward([163840], cache)


def test_full_size_info(full_size, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["info", str(full_size)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "total │ 1,026,879,376,368 │ 595,148,192,736" in out
    assert "208,550 tensors in 64 files" in out
    for what in ("missing", "unexpected", "wrong"):
        assert f"{what} none" in out
