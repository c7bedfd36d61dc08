"""Experts that are read when chosen, against the same model with all experts mapped."""

import os
import signal
import threading

import kimi_native as kn
import numpy as np
import pytest
from kimi_native import make_tiny as tiny
from kimi_native import ops
from kimi_native.__main__ import main
from kimi_native.checkpoint import CheckpointError
from kimi_native.expert_cache import READERS, budget, parse_bytes, slot_bytes
from kimi_native.placement import available_memory

TOKENS = np.random.default_rng(0).integers(0, 1024, 24).tolist()
TOP_K = 8  # of 32 experts, in the presets
OPTIONS = {"activations": "float32", "cache_dtype": "float32"}


@pytest.fixture(scope="module", params=["int4", "bf16"])
def folder(request, tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("model") / "tiny", experts=request.param)


@pytest.fixture(scope="module")
def size(folder):
    """Of a slot."""
    return kn.load(folder, expert_cache="1GB").expert_cache.slot_bytes


def decode(model, tokens=TOKENS):
    """Logits [T, V], token by token."""
    cache = model.new_cache(len(tokens))
    return np.concatenate([model.forward([token], cache) for token in tokens])


def prefill(model):
    return model.forward(TOKENS, model.new_cache(len(TOKENS)))


def experts_used(model, monkeypatch):
    """(layer, expert) in the order in which decoding uses them, by the router of a model whose experts are mapped."""
    used, layer_of = [], {id(layer.mlp): i for i, layer in enumerate(model.layers)}
    for layer in model.layers:
        if hasattr(layer.mlp, "gate_proj") and hasattr(layer.mlp, "shared_experts"):
            routed = layer.mlp._routed

            def record(x, weights, ids, mlp=layer.mlp, routed=routed, **added_to):
                used.extend((layer_of[id(mlp)], int(e)) for e in np.unique(ids))
                return routed(x, weights, ids, **added_to)

            monkeypatch.setattr(layer.mlp, "_routed", record)
    monkeypatch.setattr(model, "_has_graph", lambda *_: False)  # which would not come by here again
    decode(model)
    return used


def test_the_default_leaves_a_small_model_mapped(folder):
    assert kn.load(folder).expert_cache is None
    assert kn.load(folder, expert_cache=0).expert_cache is None


def test_eviction_changes_no_bit_of_decoding(folder, size):
    expected = decode(kn.load(folder, **OPTIONS))
    model = kn.load(folder, expert_cache=TOP_K * size, **OPTIONS)
    assert model.expert_cache.slots == TOP_K
    np.testing.assert_array_equal(decode(model), expected)
    assert len(model.expert_cache.residents) == TOP_K
    assert model.expert_cache.misses > 2 * TOP_K


def test_a_prompt_that_fits_changes_no_bit(folder):
    model = kn.load(folder, expert_cache="1GB", **OPTIONS)
    expected = prefill(kn.load(folder, **OPTIONS))
    np.testing.assert_array_equal(prefill(model), expected)
    np.testing.assert_array_equal(prefill(model), expected)  # out of the cache
    assert 0.5 <= model.expert_cache.hit_rate < 1


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_a_prompt_in_groups(folder, size, slots):
    """Fewer slots than a layer's chosen experts: sums in another order, and nothing else."""
    expected = prefill(kn.load(folder, **OPTIONS))
    first = prefill(model := kn.load(folder, expert_cache=slots * size, **OPTIONS))
    assert model.expert_cache.slots == slots
    assert np.abs(first - expected).max() < 1e-5 * expected.std()
    np.testing.assert_array_equal(prefill(model), first)  # whatever was in memory


def test_hits_and_bytes_are_counted(folder, monkeypatch):
    used = experts_used(kn.load(folder, **OPTIONS), monkeypatch)
    cache = (model := kn.load(folder, expert_cache="1GB", **OPTIONS)).expert_cache
    assert cache.hit_rate == 0
    decode(model)
    assert cache.misses == len(set(used)) and cache.hits == len(used) - len(set(used))
    assert cache.hit_rate == cache.hits / len(used)
    expert = sum(entry.nbytes for projection in cache.layers[0] for entry in projection.entries[0])
    assert cache.read_bytes == cache.misses * expert


def test_what_is_used_often_stays(folder, size):
    cache = kn.load(folder, expert_cache=3 * size, **OPTIONS).expert_cache
    x, weight = np.ones((1, cache.layers[0][0].weights.shape[2]), np.float32), np.ones((1, 1), np.float32)

    def use(expert):
        cache.fused_moe(0, x, weight, np.full((1, 1), expert, np.int32), "float32")

    for expert in [5, 5, 5, 6, 6, *range(10, 30)]:
        use(expert)
    assert {5, 6, 29} == set(cache.residents)
    cache.tokens[:] += 10_000  # old uses count for nothing
    for expert in (1, 2, 3):
        use(expert)
    assert {1, 2, 3} == set(cache.residents)


def test_a_file_that_was_cut_is_an_error(tmp_path, folder, size):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = kn.load(tmp_path, expert_cache=TOP_K * size, **OPTIONS)
    cache, entry = model.expert_cache, model.expert_cache.layers[0][2].entries[31][-1]
    whole = entry.file.read_bytes()
    x, weight = np.ones((1, cache.layers[0][0].weights.shape[2]), np.float32), np.ones((1, 1), np.float32)

    def last():
        return cache.fused_moe(0, x, weight, np.full((1, 1), 31, np.int32), "float32")

    os.truncate(entry.file, entry.end - 1)
    for _ in range(2):  # what could not be read is not taken for read
        with pytest.raises(CheckpointError, match=rf"ends at byte {entry.end - 1}, expected {entry.end}"):
            last()
    entry.file.write_bytes(whole)
    assert np.isfinite(last()).all() and len(cache.residents) == 1


@pytest.mark.parametrize("missing", [0, 1, 5, TOP_K - 1])
def test_no_bit_depends_on_which_experts_have_to_be_read(folder, missing):
    """They are multiplied after the others."""
    cache = kn.load(folder, expert_cache="1GB").expert_cache
    gate, up, down = (projection.weights for projection in cache.layers[1])
    x = np.random.default_rng(1).standard_normal((1, gate.shape[2]), np.float32)
    ids = np.random.default_rng(missing).permutation(32)[None, :TOP_K].astype(np.int32)
    weights = np.linspace(0.1, 0.7, TOP_K, dtype=np.float32)[None]
    cache.fused_moe(1, x, weights[:, missing:], ids[:, missing:], "int16")
    out = cache.fused_moe(1, x, weights, ids, "int16")
    np.testing.assert_array_equal(out, ops.fused_moe(x, weights, ids, gate, up, down, activations="int16"))
    assert cache.misses == TOP_K and cache.uses == 2 * TOP_K - missing


def test_experts_are_read_while_the_shared_expert_is_computed(folder):
    """All reads end before anything but the shared expert is computed."""
    model = kn.load(folder, expert_cache="1GB", **OPTIONS)
    mlp, cache = model.layers[1].mlp, model.expert_cache
    forward = mlp.shared_experts.forward

    def wait_for_reads(x):
        assert len(cache.residents) == TOP_K
        for resident in cache.residents.values():
            assert [read.result(timeout=60) for read in resident.reads]
        return forward(x)

    mlp.shared_experts.forward = wait_for_reads
    mlp.forward(np.ones((1, cache.layers[0][0].weights.shape[2]), np.float32))
    assert cache.misses == cache.uses == TOP_K


def test_a_forked_child_reads_for_itself(folder, size):
    """Also what the parent's readers were about to read, and while another thread of the parent is in a call."""
    expected = decode(kn.load(folder, **OPTIONS))
    model = kn.load(folder, expert_cache=TOP_K * size, **OPTIONS)
    decode(model)
    never = threading.Event()
    waiting = [model.expert_cache.readers.submit(never.wait) for _ in range(READERS)]
    model.expert_cache.read_ahead(0, np.arange(TOP_K)[None])
    with model.expert_cache.lock:
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if np.array_equal(decode(model), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    never.set()
    assert all(future.result(timeout=60) for future in waiting)
    np.testing.assert_array_equal(decode(model), expected)


def test_a_call_that_is_broken_off_leaves_no_garbage(folder, size, monkeypatch):
    """Ctrl-C between any two steps: the next call computes what it should."""
    expected = decode(kn.load(folder, **OPTIONS))
    model = kn.load(folder, expert_cache=TOP_K * size, **OPTIONS)
    generator = np.random.default_rng(1)
    for method in ("_finish", "_give_up", "_is_resident"):
        original, calls = getattr(model.expert_cache, method), int(generator.integers(1, 9))

        def stop(*arguments, original=original):
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(model.expert_cache, method, stop)
            with pytest.raises(KeyboardInterrupt):
                decode(model)
        np.testing.assert_array_equal(decode(model), expected)


def test_less_than_two_experts_are_refused(folder, size):
    with pytest.raises(ValueError, match=rf"expert_cache is {2 * size - 1} bytes, expected at least {2 * size}"):
        kn.load(folder, expert_cache=2 * size - 1)


@pytest.mark.parametrize(
    "size, expected",
    [(0, 0), (12, 12), ("12GB", 12 * 10**9), ("1.5 kB", 1500), ("0.5tb", 5 * 10**11), ("2mb", 2 * 10**6)],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "12GiB", -1, 1.5e300, True, "1 2"])
def test_what_is_no_size(folder, size):
    with pytest.raises(ValueError, match="expert_cache is .*, expected bytes as in"):
        kn.load(folder, expert_cache=size)


def test_default_budget(folder, size, monkeypatch):
    layers = kn.load(folder, expert_cache="1GB").expert_cache.layers
    assert slot_bytes(layers) == size
    for available, expected in {2_100: None, 2_099: 1_099, 500: 2 * TOP_K * size}.items():
        monkeypatch.setattr("kimi_native.expert_cache.available_memory", lambda available=available: available)
        monkeypatch.setattr("kimi_native.expert_cache.RESERVE", 600)
        monkeypatch.setattr("kimi_native.expert_cache.slot_bytes", lambda layers: size)
        assert budget(None, layers, 400, 1_100, TOP_K) == (expected and max(expected, 2 * TOP_K * size))
    assert budget(0, layers, 400, 1_100, TOP_K) is None


GROUPS = {
    "no group": ({}, 8_000 * 1024),
    "v2": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "4000000\n",
            "sys/fs/cgroup/a/memory.current": "3000000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\nactive_file 500\ninactive_file 70\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "1\n",
            "sys/fs/cgroup/a/b/memory.stat": "anon 1\n",
        },
        1_000_570,
    ),
    "v1": (
        {
            "proc/self/cgroup": "4:memory:/a\n1:cpu:/\n0::/\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2000000\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "500000\n",
            "sys/fs/cgroup/memory/a/memory.stat": "active_file 1\ntotal_active_file 3000\ntotal_inactive_file 40\n",
        },
        1_503_040,
    ),
}


@pytest.mark.parametrize("files, expected", GROUPS.values(), ids=GROUPS.keys())
def test_available_memory(tmp_path, files, expected):
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", "proc/self/cgroup": "0::/\n"} | files
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == expected


def test_summary_line(folder, size, capsys):
    options = ["--max-new-tokens", "3", "--expert-cache", str(16 * size)]
    assert main(["generate", "--model", str(folder), "Hello", *options]) == 0
    assert " hits, " in capsys.readouterr().err
