"""The benchmarks without a GPU: arguments, case lists, counted bytes and operations, and how a GPU would be timed."""

import ctypes
import importlib
import json
import math
from collections import Counter
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import reference.vision
from arrays import BF16
from kimi_native import ops
from kimi_native.checkpoint import expected_tensors
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config
from kimi_native.train import params as parameters
from kimi_native.train.muonclip import MuonClip, newton_schulz

from bench import __main__ as command
from bench import (
    arrays,
    baseline,
    bench_generate,
    bench_muon,
    bench_training,
    bench_vision,
    cpu_peers,
    expert_graph,
    ggml,
    gguf_models,
    gpu,
    harness,
    peers,
    plot,
    results,
    results_page,
    roofline,
    shapes,
)
from bench.bench_mla_decode import tokens_and_pairs

TIMED_OPS = [name for name in command.NAMES if name not in ("generate", "training", "vision")]
CPU_OPS = {"gemm_int8", "grouped_matmul", "matmul", "muon"}
CPU_OPS |= {"mla_prefill_backward", "rms_norm_backward", "silu_and_mul_backward"}


class Shapes:
    """Arrays of the right shape and dtype that take no memory."""

    def __init__(self, activation):
        self.activation = np.dtype(activation)

    def put(self, array):
        return array

    def float32(self, rng, *shape):
        return np.broadcast_to(np.float32(0), shape)

    def normal(self, rng, *shape):
        return self.zeros(*shape)

    def zeros(self, *shape, dtype=None):
        return np.broadcast_to(np.zeros((), dtype or self.activation), shape)

    def bf16(self, rng, *shape):
        return np.broadcast_to(BF16.type(0), shape)

    def int4(self, rng, n_out, n_in):
        return np.broadcast_to(np.int32(0), (n_out, n_in // 8)), self.bf16(rng, n_out, n_in // 32)

    def int8(self, rng, n_out, n_in):
        return np.broadcast_to(np.int8(0), (n_out, n_in)), self.bf16(rng, n_out, n_in // 32)

    def experts(self, rng, E, n_out, n_in, quantized=True):
        return [()] * E, SimpleNamespace(shape=(E, n_out, n_in), quantized=quantized)


class Recorder:
    """A harness that notes the cases and runs nothing."""

    def __init__(self, cuda, quick=False):
        self.cuda = self.hopper = cuda
        self.quick, self.cases = quick, {}
        self.arrays = Shapes(BF16 if cuda else np.float32)

    def room_for(self, op, case, nbytes):
        assert 0 < nbytes < 60e9, "more than a GPU of 80 GB has beside the rest"
        return True

    def run(self, op, case, call, *, bytes_moved=0, operations=0, **compared_with):
        assert (op, case) not in self.cases
        assert bytes_moved > 0 and math.isfinite(bytes_moved + operations) and callable(call)
        assert len(op) < 24 and len(case) < (36 if self.cuda else 32), "wider than its column"
        self.cases[op, case] = bytes_moved, operations


@cache
def recorded(name, cuda, quick=False):
    harness = Recorder(cuda, quick)
    importlib.import_module(f"bench.bench_{name}").bench(harness)
    return harness.cases


@pytest.mark.parametrize("name", TIMED_OPS)
def test_cases(name):
    cpu, quick, full = recorded(name, cuda=False), recorded(name, cuda=True, quick=True), recorded(name, cuda=True)
    assert cpu and (not full if name in CPU_OPS else quick and len(quick) < len(full))
    assert {op for op, _ in quick} == {op for op, _ in full}
    assert {op for op, _ in full} == (set() if name in CPU_OPS else {op for op, _ in cpu})
    assert all(full[case] == quick[case] for case in full.keys() & quick.keys())


def test_number_of_cases_on_a_gpu():
    """A case takes about half a second at most, and all of them six minutes."""
    assert 250 < sum(len(recorded(name, cuda=True)) for name in TIMED_OPS) < 500


def test_counted_work():
    """Against figures worked out apart from the code."""
    cases = {name: recorded(name, cuda=True) for name in TIMED_OPS}

    def of(op, case, name=None):
        return cases[name or op][op, case]

    bytes_moved, operations = of("mla_decode", "B=64 S=4096 N=64")
    assert bytes_moved == 64 * 4096 * 1152 + 64 * 64 * (576 + 512) * 2
    assert operations == pytest.approx(0.0365e12, rel=2e-3)
    assert of("fused_moe", "E=384 I=2048 T=1 uniform") == (8 * 24_772_608, 2 * 8 * 3 * 7168 * 2048)
    assert of("fused_moe", "E=384 I=2048 T=4096 uniform") == (384 * 24_772_608, pytest.approx(2.89e12, rel=2e-3))
    assert of("fused_moe", "E=384 I=2048 T=512 same")[0] == 8 * 24_772_608
    remote = of("fused_moe", "E=48 I=2048 T=4096 remote")
    assert remote[1] == pytest.approx(2.89e12 / 8, rel=0.05)
    assert of("moe_layer", "E=384 T=4096") == of("fused_moe", "E=384 I=2048 T=4096 uniform")
    assert of("mla_prefill", "T=4096 cached=0 N=64")[1] == pytest.approx(0.344e12, rel=2e-3)
    bytes_moved, operations = of("grouped_gemm_int4", "E=384 4096x7168 T=1 uniform", "grouped_gemm")
    assert (bytes_moved, operations) == (8 * 4096 * 7168 * 0.5625 + 8 * (7168 + 4096) * 2, 2 * 8 * 4096 * 7168)
    assert of("rms_norm", "T=4096 H=7168")[0] == 4 * 4096 * 7168 + 2 * 7168
    assert of("fused_add_rms_norm", "T=4096 H=7168", "rms_norm")[0] == (2 + 2 + 4 + 4) * 4096 * 7168 + 2 * 7168
    assert of("attention", "B=16 T=256 N=16 D=72") == (4 * 16 * 256 * 1152 * 2, 16 * 2 * 256 * 256 * 2304)
    assert of("layer_norm", "T=4144 H=1152")[0] == 4 * (4144 + 1) * 1152
    assert of("gelu", "T=1036 I=4608 erf")[0] == (4 * 1036 + 2) * 4608
    assert of("silu_and_mul", "T=4096 I=2048")[0] == 6 * 4096 * 2048
    assert of("dequantize_int4", "[2048, 7168]")[0] == 2.5625 * 2048 * 7168
    assert of("gemm", "o_proj T=8") == (2 * (7168 * 8192 + 8 * (7168 + 8192)), 2 * 8 * 7168 * 8192)


@pytest.mark.parametrize(("lengths", "Q"), [([5, 9], 1), ([4, 70, 8], 4)])
def test_pairs_that_decode_looks_at(lengths, Q):
    seen = sum(S - (Q - 1 - i) for S in lengths for i in range(Q))
    assert tokens_and_pairs(np.array(lengths, np.int32), Q) == (sum(lengths), seen)


def test_routing():
    rng, E = np.random.default_rng(0), shapes.EXPERTS
    for routing in ("uniform", "zipf", "same"):
        ids = shapes.routed_ids(rng, 1000, E, routing)
        assert ids.dtype == np.int32 and ids.shape == (1000, 8) and ids.min() >= 0 and ids.max() < E
        assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an expert twice for one token"
        loads = sorted(Counter(ids.ravel().tolist()).values())
        assert {"uniform": len(loads) == E and loads[-1] < 60, "zipf": loads[-1] > 500, "same": loads == [1000] * 8}[
            routing
        ]
    ids = shapes.routed_ids(rng, 1000, 48, "remote")
    assert ids.min() == -1 and ids.max() == 47 and 0.11 < (ids >= 0).mean() < 0.14


def test_arrays_of_a_gpu(monkeypatch):
    """With NumPy in CuPy's place, and a short period."""
    monkeypatch.setattr(arrays, "PERIOD", 1001)
    make, rng = arrays.Gpu(np), np.random.default_rng(0)
    x = make.normal(rng, 3, 700)
    assert x.dtype == make.activation == BF16 and x.shape == (3, 700)
    assert np.array_equal(x.ravel()[:1099], x.ravel()[1001:]) and len(np.unique(x)) > 100
    assert make.zeros(5, 7, dtype=np.float32).tolist() == [[0.0] * 7] * 5 and make.zeros(0, 7).shape == (0, 7)
    assert make.put(np.ones(3, BF16)).dtype == BF16 and make.float32(rng, 2, 3).dtype == np.float32
    (packed, scale), experts = make.experts(rng, 5, 64, 96)
    assert experts.shape == (5, 64, 96) and experts.quantized
    assert (packed.shape, packed.dtype, scale.shape, scale.dtype) == ((5, 64, 12), np.int32, (5, 64, 3), BF16)
    decoded = [reference.dequantize_int4(p, s) for p, s in zip(packed, scale, strict=True)]
    assert all(len(np.unique(packed[e] ^ packed[0])) == 1 and not np.array_equal(packed[e], packed[0]) for e in (1, 4))
    assert np.isfinite(np.float32(decoded)).all() and len(np.unique(decoded[0])) > 500
    (weights,), experts = make.experts(rng, 2, 8, 64, quantized=False)
    assert experts.shape == (2, 8, 64) and not experts.quantized and weights.dtype == BF16


class FakeCupy:
    """As much of CuPy as the harness of a GPU asks for; what is launched runs at once and takes 10 us by its clock."""

    __version__, ndarray = "fake", np.ndarray
    zeros, empty, empty_like, asarray = (staticmethod(f) for f in (np.zeros, np.empty, np.empty_like, np.asarray))
    copyto = staticmethod(np.copyto)

    def __init__(self):
        self.now, self.recording, self.evictions = 0.0, None, 0
        fake = self

        class Stream:
            ptr = 0

            def __init__(self, non_blocking):
                assert non_blocking

            def use(self):
                pass

            def synchronize(self):
                assert fake.recording is None, "not allowed while a graph is captured"

            def begin_capture(self):
                fake.recording = []

            def end_capture(self):
                work, fake.recording = fake.recording, None
                return SimpleNamespace(launch=lambda stream: [call() for call in work])

        class Event:
            def record(self, stream):
                self.time = fake.now

            def synchronize(self):
                pass

        properties = {"name": b"Fake GPU", "l2CacheSize": 1000, "major": 9, "minor": 0}
        properties |= {"multiProcessorCount": 132, "totalGlobalMem": 80 * 10**9}
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            Device=lambda: SimpleNamespace(id=0),
            MemoryPool=lambda: SimpleNamespace(malloc=None),
            using_allocator=lambda malloc: nullcontext(),
            get_elapsed_time=lambda start, stop: 1e3 * (stop.time - start.time),
            runtime=SimpleNamespace(
                getDeviceProperties=lambda index: properties,
                driverGetVersion=lambda: 13000,
                runtimeGetVersion=lambda: 13000,
                memGetInfo=lambda: (10 * 10**9, 80 * 10**9),
            ),
        )

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)

    def launch(self, seconds=10e-6):
        def work():
            self.now += seconds

        work() if self.recording is None else self.recording.append(work)


@pytest.fixture
def fake(monkeypatch):
    cupy = FakeCupy()

    class Array(np.ndarray):
        def max(self, out):
            assert self.nbytes == 4 * 1000, "four times the cache"
            cupy.evictions += 1
            cupy.launch(1)

        @property
        def data(self):
            return SimpleNamespace(memset_async=lambda value, nbytes, stream: cupy.launch(2e-6))

    monkeypatch.setattr(gpu._array, "gpu_arrays", lambda: cupy)
    monkeypatch.setattr(cupy, "zeros", lambda shape, dtype: np.zeros(shape, dtype).view(Array), raising=False)
    monkeypatch.setattr(roofline, "GIB", 2**12)
    monkeypatch.setattr(roofline, "BF16_ORDER", 64)
    monkeypatch.setattr(roofline.ops, "gemm", lambda x, weight, out: cupy.launch(2 * 64**3 / 800e12))
    monkeypatch.setattr(cupy, "copyto", lambda target, source: cupy.launch(2 * source.nbytes / 3e12), raising=False)
    monkeypatch.setattr(peers, "torch", lambda: None)
    monkeypatch.setattr(peers, "triton_grouped_gemm", lambda: None)
    return cupy


def test_lines_of_a_gpu(fake, capsys):
    harness = gpu.GpuHarness(quick=True)
    harness.header()
    out = capsys.readouterr().out
    assert "Fake GPU (sm 9.0, 132 multiprocessors" in out and "3000 GB/s copy, 800 TFLOP/s bf16" in out
    assert "peers: torch absent, triton absent" in out
    assert out.splitlines()[-1].split()[:8] == ["empty", "memset", "of", "4", "bytes", "2.0", "us", "±0%"]

    def other():
        return {"other": lambda: fake.launch(25e-6), "broken": lambda: 1 / 0, **peers.gemm(None, None)}

    before = fake.evictions
    harness.run("gemm", "a case", fake.launch, bytes_moved=15e6, operations=4e9, peers=other)
    assert fake.evictions > before
    line = capsys.readouterr().out
    assert line.split()[:6] == ["gemm", "a", "case", "10.0", "us", "±0%"]
    assert "10.0 us  1500 GB/s, 400 TFLOP/s " in line and " 50%     50%" in line
    assert line.rstrip().endswith("2.50x other, broken failed (ZeroDivisionError), torch absent")

    def fails():
        raise RuntimeError("gemm: this build has no CUDA kernel of it")

    harness.run("gemm", "b", fails)
    assert capsys.readouterr().out.split(maxsplit=2)[2] == "failed: gemm: this build has no CUDA kernel of it\n"
    assert not harness.room_for("gemm", "c", 9.5e9) and "10 GB, 10 GB are free" in capsys.readouterr().out
    assert harness.room_for("gemm", "c", 8e9)


def test_json_lines_of_a_gpu(fake, capsys):
    harness = gpu.GpuHarness(json_lines=True)
    harness.header()
    harness.run("op", "case", fake.launch, bytes_moved=3e6)
    header, empty, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert header["copy_bytes_per_second"] == pytest.approx(3e12) and header["peers"] == {"torch": None, "triton": None}
    assert empty["op"] == "empty" and line["bytes_per_second"] == pytest.approx(3e11)
    assert line["chained_seconds"] == pytest.approx(10e-6) and line["of_bf16"] is None and len(line["seconds"]) == 30


def test_page_of_results(fake, capsys):
    harness = gpu.GpuHarness(json_lines=True, quick=True)
    harness.header()
    harness.run("gemm", "a", fake.launch, bytes_moved=15e6, operations=4e9, peers=lambda: {"other": None})
    assert not harness.room_for("gemm", "b", 9.5e9)
    page = results_page.page("Fake chip; commit abc", capsys.readouterr().out.splitlines())
    assert "# Fake GPU, 20" in page and "Fake chip; commit abc. " in page and "moved 3000 GB/s" in page
    assert "| gemm | a | 10 | 10 | 1.5e+03 | 400 | 50% | 50% | other absent |" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10} and rows[-1].endswith("10 GB are free |")


def test_what_cannot_be_captured_is_timed_by_itself(fake, capsys):
    harness = gpu.GpuHarness(quick=True)

    def asks_the_gpu():
        harness.stream.synchronize()
        fake.launch()

    def refuses():
        if fake.recording is not None:
            raise RuntimeError("not while capturing")
        fake.launch()

    with pytest.raises(AssertionError):
        harness.run("op", "case", asks_the_gpu)
    harness.run("op", "case", refuses)
    assert capsys.readouterr().out.rstrip().endswith("not captured")


def test_the_emulator_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu._array, "gpu_arrays", lambda: np)
    with pytest.raises(RuntimeError, match="emulator"):
        gpu.GpuHarness()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gem"], "unknown benchmark 'gem'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda", "--threads", "2"], "--isa, --threads and --compare are for --device cpu"),
        (["--device", "cuda", "--isa", "avx2"], "--isa, --threads and --compare are for --device cpu"),
        (["--isa", "mmx"], "mmx"),
        (["--compare", "nowhere.jsonl"], "nowhere.jsonl: "),
    ],
)
def test_wrong_arguments(argv, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *argv])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert says in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, capsys):
    def absent():
        raise RuntimeError('device "cuda" needs an NVIDIA GPU')

    monkeypatch.setattr(gpu._array, "gpu_arrays", absent)
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cuda", "gemm"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture
def cpu(monkeypatch):
    """A harness of the CPU on a machine of 100 GB/s and 1000 GFLOP/s."""
    monkeypatch.setattr(harness.Roof, "measure", lambda: roofline.Roof(100e9, 1000e9, 1.0))
    monkeypatch.setattr(harness, "SPINNING", 0)
    return lambda **options: harness.Harness(quick=True, **options)


def test_lines_beside_peers(cpu, capsys):
    """A peer that gives the same but for one element, which is off by a tenth of the norm."""
    ours = np.ones(100, np.float32)
    theirs = ours + np.eye(1, 100, dtype=np.float32)[0]
    made = []

    def others():
        made.append(True)
        return {"other": lambda: theirs}

    cpu().run("gemm", "a", lambda: ours, cpu_peers=others)
    assert not made and len(capsys.readouterr().out.splitlines()) == 1
    cpu(peers=True).run("gemm", "a", lambda: ours, bytes_moved=1e3, cpu_peers=others)
    first, second = capsys.readouterr().out.splitlines()
    assert made and first.split()[:3] == ["gemm", "a", harness.ops.isa()]
    assert second.split()[:3] == ["gemm", "a", "other"] and second.endswith("x, apart by 1.0e-01")


def test_calls_alternate(cpu):
    """Each is called twice, the second call is timed."""
    calls = []
    cpu()._alternate([lambda: calls.append("ours"), lambda: calls.append("theirs")], least=3, budget=60, most=3)
    assert calls == ["ours", "ours", "theirs", "theirs"] * 3


def test_compared_with_an_earlier_run(cpu, tmp_path, capsys):
    lines = cpu(json_lines=True)
    lines.header()
    lines.report("gemm", "a T=1", [0.3], operations=3e9)
    lines.report("gemm", "a T=8", [0.6], operations=24e9)
    lines.report("gemm", "a T=1", [0.9], operations=3e9, engine="other")
    file = tmp_path / "before.jsonl"
    file.write_text(capsys.readouterr().out)
    later = cpu(before=results.medians(file))
    later.report("gemm", "a T=1", [0.2])
    later.report("gemm", "a T=1", [0.45], engine="other", note="a note")
    later.report("gemm", "b T=1", [0.2])
    ends = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["1.50x before", "a note, 2.00x before", "-"]

    header, cases = results.read(file)
    assert header["float32_operations_per_second"] == 1000e9
    assert plot.series(cases) == {"gemm": {f"a {harness.ops.isa()}": [(1, pytest.approx(1e10)), (8, 40e9)]}}


@pytest.mark.parametrize("text", ["", "op case isa", "[]", '{"commit": "a"}\n{"op": "gemm"}'])
def test_not_a_file_of_results(text, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"other.jsonl: .*; expected the output of python -m bench --json"):
        results.read(file)


def test_plot(cpu, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines, file, image = cpu(json_lines=True), tmp_path / "lines.jsonl", tmp_path / "rates.svg"
    lines.header()
    lines.report("gemm", "a T=1", [0.3], operations=3e9)
    file.write_text(capsys.readouterr().out)
    with pytest.raises(ValueError, match="no op in it has two cases"):
        plot.plot(file, image)
    lines.report("gemm", "a T=8", [0.6], operations=24e9)
    with file.open("a") as stream:
        stream.write(capsys.readouterr().out)
    plot.plot(file, image)
    assert image.read_text().startswith("<?xml")


def test_blocks_of_q4_0():
    """Against what the format means: a float16 scale, then values j and j + 16 in a byte, q + 8 each."""
    packed, scale = shapes.random_int4(shapes.rng(), 3, 64)
    blocks = ggml.q4_0(packed, scale)
    assert blocks.shape == (3, 2, 18)
    d, codes = np.ascontiguousarray(blocks[..., :2]).view(np.float16), blocks[..., 2:].astype(np.float64)
    values = d * (np.concatenate([codes % 16, codes // 16], axis=-1) - 8)
    assert np.array_equal(values.reshape(3, 64), baseline.dequantize_int4(packed, scale))


@pytest.fixture
def layer():
    """(matrices of each expert, (x, weights, ids), the layer's output in float64)"""
    rng, shape = shapes.rng(), (64, 256)
    arrays = [[shapes.random_int4(rng, *s) for s in (shape, shape, shape[::-1])] for _ in range(4)]
    x, ids = shapes.random_f32(rng, 5, 256), shapes.random_ids(rng, 5, 4)[:, :2].copy()
    weights = rng.random(ids.shape, np.float32)
    expected = np.zeros((5, 256))
    for t, k in np.ndindex(ids.shape):
        gate, up, down = (baseline.dequantize_int4(*matrix).astype(np.float64) for matrix in arrays[ids[t, k]])
        gated = gate @ x[t]
        expected[t] += weights[t, k] * (down @ (gated / (1 + np.exp(-gated)) * (up @ x[t])))
    return arrays, (x, weights, ids), expected


def test_experts_of_the_peers(layer):
    """Each peer that is installed computes the layer that ours computes."""
    arrays, case, expected = layer
    experts = cpu_peers.Experts(arrays)
    for activations, limit in {"float32": 1e-5, "int16": 2e-2}.items():
        for name, call in experts.calls(*case, activations).items():
            assert harness.relative_error(call(), expected) < limit, name


def test_graph_of_experts(layer):
    """With NumPy's operators in the place of onnxruntime's and OpenVINO's, which compute at once."""
    arrays, (x, weights, ids), expected = layer
    graph = SimpleNamespace(
        x=x,
        constant=lambda array: array,
        product=baseline.gemm_int4,
        rows=lambda x, indices: x[indices],
        mul=np.multiply,
        silu=lambda x: x / (1 + np.exp(-x)),
        concat=np.concatenate,
        sum=lambda x: x.sum(axis=1),
        call=lambda x, result: lambda: result,
    )
    assert harness.relative_error(expert_graph.experts(graph, x, weights, ids, arrays)(), expected) < 1e-6


def test_matrices_of_the_peers():
    """Each peer that is installed multiplies and attends as ours does."""
    rng, make = shapes.rng(), arrays.Host()
    x, weight, int4 = make.normal(rng, 3, 256), make.bf16(rng, 64, 256), make.int4(rng, 64, 256)
    q, kv, k_pe = make.normal(rng, 3, 2, 192), make.normal(rng, 5, 2, 256), make.normal(rng, 5, 64)
    cache, pages = make.bf16(rng, 1, 64, 576), np.zeros((1, 1), np.int32)
    ends = [np.array(values, np.int32) for values in ((0, 3), (0, 5), (2,))]
    scale = shapes.SOFTMAX_SCALE
    heads, patches = make.normal(rng, 1, 1, 64, 576), make.normal(rng, 3, 6, 2, 72)
    for calls, expected in (
        (cpu_peers.gemm(x, weight), baseline.gemm(x, weight)),
        (cpu_peers.gemm_int4(x, *int4), baseline.gemm_int4(x, *int4)),
        (cpu_peers.mla_prefill(q, kv, k_pe, 128, scale), ops.mla_prefill(q, kv, k_pe, *ends, scale)),
        (cpu_peers.attention(*patches, 2, 0.1), ops.attention(*patches, np.array([0, 3, 6], np.int32), 0.1)),
        (
            cpu_peers.mla_decode(heads, cache, pages, 512, scale),
            ops.mla_decode(heads, cache, pages, np.array([64], np.int32), 512, scale),
        ),
    ):
        for name, call in calls.items():
            result = call()
            assert harness.relative_error(result, expected.reshape(result.shape)) < 2e-2, name


def test_peers_that_are_not_installed(layer, monkeypatch):
    monkeypatch.setattr(cpu_peers, "module", lambda name: None)
    monkeypatch.setattr(ggml, "library", lambda engine: None)
    monkeypatch.setattr(cpu_peers.kt_experts, "extension", lambda: None)
    arrays, (x, weights, ids), _ = layer
    assert cpu_peers.Experts(arrays).calls(x, weights, ids, "int16") == {}
    assert cpu_peers.gemm(x, None) == cpu_peers.gemm_int4(x, None, None) == {}
    assert cpu_peers.mla_prefill(x, None, None, 128, 1.0) == cpu_peers.attention(x, None, None, 1, 1.0) == {}
    assert cpu_peers.mla_decode(x, np.zeros((1, 1, 1)), np.zeros((1, 1), np.int32), 1, 1.0) == {}
    assert cpu_peers.newton_schulz(x, 5) == cpu_peers.muon_step({}, {}, None, "") == {}


def test_a_module_that_lacks_its_package(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cpu_peers, "import_module", absent)
    assert cpu_peers.module("of an absent package") is None


class FakeLlama:
    """As much of llama.cpp's interface as bench.gguf_models asks for: the logits are the positions in the batch."""

    class Params(ctypes.Structure):
        names = "use_mmap", "use_extra_bufts", "n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"
        _fields_ = [(name, ctypes.c_int) for name in (*names, "flash_attn_type")]

    llama_model_default_params = llama_context_default_params = Params

    def __init__(self):
        self.loaded, self.cleared = [], 0

    def llama_batch_init(self, size, embeddings, sequences):
        names = "token", "pos", "n_seq_id", "logits"
        return SimpleNamespace(**{name: [None] * size for name in names}, seq_id=[[None] for _ in range(size)])

    def llama_backend_init(self):
        pass

    def llama_model_load_from_file(self, file, params):
        self.loaded.append((file, params.use_mmap, params.use_extra_bufts))
        return file != b"broken.gguf"

    def llama_model_get_vocab(self, model):
        return "vocabulary"

    def llama_vocab_n_tokens(self, vocab):
        return 4

    def llama_init_from_model(self, model, params):
        return params

    def llama_get_memory(self, context):
        return context

    def llama_memory_clear(self, memory, data):
        self.cleared += 1

    def llama_decode(self, context, batch):
        self.positions, last = batch.pos[: batch.n_tokens], batch.logits[: batch.n_tokens]
        assert last == [False] * (batch.n_tokens - 1) + [True]
        return 0

    def llama_get_logits_ith(self, context, i):
        assert i == len(self.positions) - 1
        return (ctypes.c_float * 4)(*self.positions, *[0.0] * (4 - len(self.positions)))


def test_model_of_llama_cpp(monkeypatch):
    fake = FakeLlama()
    monkeypatch.setattr(gguf_models, "import_module", lambda name: fake)
    model = gguf_models.LlamaModel("a.gguf", 100)
    assert fake.loaded == [(b"a.gguf", 0, 1)] and model._context.n_ctx == 100 and model._context.flash_attn_type == 1
    assert model.forward([5, 6, 7]).tolist() == [0, 1, 2, 0] and model.forward([8]).tolist() == [3, 0, 0, 0]
    model.clear()
    assert fake.cleared == 1 and model.forward([5]).tolist() == [0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="broken.gguf: llama.cpp cannot load it"):
        gguf_models.LlamaModel("broken.gguf", 100)
    with pytest.raises(AssertionError, match="Params has no mla"):
        gguf_models.IkModel("a.gguf", 100)


def test_models_in_turns(cpu, monkeypatch, capsys):
    """Every engine sees the same calls, and each has its line; the first round is not counted."""

    class Engine:
        def __init__(self, angle):
            self.logits, self.calls = np.array([math.cos(angle), math.sin(angle)]), []

        def clear(self):
            self.calls.append("clear")

        def forward(self, token_ids):
            self.calls.append(tuple(token_ids))
            return self.logits

    monkeypatch.setattr(bench_generate, "SPINNING", 0)
    engines = {"ours": Engine(0.0), "other": Engine(math.pi / 3), "third": Engine(math.pi / 2)}
    bench_generate.take_turns(cpu(json_lines=True), "int8", engines)
    assert engines["ours"].calls == engines["other"].calls == engines["third"].calls
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [line["isa"] for line in lines] == [harness.ops.isa(), "other", "third"] * 3
    assert [len(line["seconds"]) for line in lines[::3]] == [3, 3 * bench_generate.BURST, 3 * bench_generate.BURST]
    cosines = [line["note"].split(" ")[-1] for line in lines if line["note"]]
    assert cosines == ["0.5000", "0.0000"] * 3


def test_vision(rng):
    """The tower over tensors in the place of a checkpoint's gives what the oracle gives; the work by hand."""
    config = Config.from_dict(preset_config("tiny"))
    names = {name: shape for name, (shape, _) in expected_tensors(config).items() if name.startswith(("vis", "mm_"))}
    tensors = {name: bench_vision._random(name, shape) for name, shape in names.items()}
    grid, patches = (3, 4, 6), rng.integers(0, 256, (72, 588), np.uint8)
    features = bench_vision._ours("cpu", config.vision_config, tensors, patches, grid)()
    expected = reference.vision.encode(tensors, config.vision_config, patches / 127.5 - 1, grid)
    assert harness.relative_error(features, expected) < 1e-5
    products, pairs, projector = 10764 * (4 * 1152**2 + 2 * 1152 * 4304), 2 * 10764**2 * 1152, 2691 * 4608 * 11776
    work = 2 * (10764 * 588 * 1152 + 27 * (products + pairs) + projector)
    assert bench_vision.operations(bench_vision.GRIDS["1920x1080"], 27) == work


def test_muon(rng):
    """NumPy's and each installed peer's Newton-Schulz and step give what ours give; the work by hand."""
    g = shapes.random_f32(rng, 2, 24, 40)
    for call in (lambda: bench_muon.numpy_newton_schulz(g), *cpu_peers.newton_schulz(g, 5).values()):
        assert harness.relative_error(call(), newton_schulz(g)) < 1e-4
    sizes = {"experts": (2, 24, 40), "tall": (48, 16), "embed": (6, 5), "norm": (5,)}
    params, grads = ({name: shapes.random_f32(rng, *size) for name, size in sizes.items()} for _ in range(2))
    params = {name: np.float32(0.01) * w for name, w in params.items()}  # so that rounding them hides no difference
    for result in ("experts", "tall", "embed"):
        ours, baseline = ({name: w.copy() for name, w in params.items()} for _ in range(2))
        steps = cpu_peers.muon_step(params, grads, bench_muon.is_matrix, result)
        optimizer, numpy_muon = MuonClip(ours), bench_muon.NumpyMuon(baseline)
        for _ in range(3):
            optimizer.step(grads)
            numpy_muon.step(grads)
            theirs = {name: step() for name, step in steps.items()} | {"numpy": baseline[result]}
        change = ours[result] - params[result]
        for name, w in theirs.items():
            assert harness.relative_error(w - params[result], change) < (2e-2 if "bf16" in name else 1e-4), name
    # A: 10 x 10 x 40 multiply-adds, half of them done; 5 polynomials, 4 times P A P and the product of two P
    assert bench_muon.operations((3, 40, 10)) == 3 * (10 * 10 * 40 + (5 + 4 * 2 + 4) * 10**3 + 2 * 10 * 10 * 40)


def test_training(monkeypatch):
    """Each engine takes the same steps: its losses are ours, step by step."""
    monkeypatch.setattr(bench_training, "SEQUENCES", 3)
    monkeypatch.setattr(bench_training, "LENGTH", 8)
    params = parameters.initialise(bench_training.CONFIG, 0)
    engines = bench_training.engines(params, True)
    assert [name for name, *_ in engines] == ["", *(["torch"] if cpu_peers.module("torch_training") else [])]
    losses = []
    for _, gradients, update in engines:
        losses.append([])
        for _ in range(4):
            losses[-1].append(gradients())
            update()
    assert losses[0][3] < losses[0][0]
    assert all(np.allclose(of_peer, losses[0], rtol=1e-4) for of_peer in losses[1:])


def test_list(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--list"])
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == command.NAMES and all(len(line.split()) > 3 for line in lines)


def test_tiles_of_the_triton_peer():
    pytest.importorskip("triton")
    from bench.triton_grouped_gemm import tiles_of

    assert tiles_of(np.array([3, 0, 33, 16]), 16) == [(0, 0, 3), (2, 3, 36), (2, 19, 36), (2, 35, 36), (3, 36, 52)]
