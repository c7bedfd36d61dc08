"""Calls on the CPU that are written down once and made again."""

import gc
import os
import signal
import threading

import numpy as np
import pytest
from arrays import BF16, int4, normal, poison, same_bits
from kimi_native import ops
from kimi_native.ops.recording import Recording

T, H, WIDTH, E = 3, 96, 64, 5


@pytest.fixture
def layer(rng):
    """(x, layer): x float32 [T, H] is changed by the tests, layer(x) is a chain of ops on it."""
    up, down = ([int4(rng, *shape) for _ in range(E)] for shape in ((WIDTH, H), (H, WIDTH)))
    up, down = (ops.ExpertWeights(*zip(*each, strict=True)) for each in (up, down))
    norm, router = normal(rng, H, dtype=BF16), normal(rng, E, H, dtype=BF16)
    dense = ops.quantize_int8(normal(rng, 2 * H, H, dtype=BF16))
    bias = np.zeros(E, np.float32)

    def layer(x):
        h = ops.rms_norm(x, norm, 1e-5)
        weights, ids = ops.topk_sigmoid(ops.gemm(h, router), bias, 2)
        out = ops.silu_and_mul(ops.gemm_int8(h, *dense))
        return ops.fused_moe(h, weights, ids, up, up, down, out=out, activations="int16", accumulate=True)

    return normal(rng, T, H), layer


def test_replay_computes_with_what_the_arrays_hold_now(isa, rng, layer):
    x, layer = layer
    recording = Recording(lambda: layer(x))
    first = recording.launch()
    assert same_bits(first, layer(x))
    for _ in range(3):
        x[...] = normal(rng, T, H)
        assert recording.launch() is first
        assert same_bits(first, layer(x))


def test_ops_run_as_ever_while_they_are_written_down(layer):
    x, layer = layer
    results = []
    Recording(lambda: results.append(layer(x).copy()))
    assert same_bits(results[0], layer(x))


def test_memory_of_dropped_arrays_serves_again(rng):
    """A chain of any length takes two arrays; what is still referred to keeps its own."""
    x, square = normal(rng, 1, 64), normal(rng, 64, 64, dtype=BF16)
    kept = []

    def chain():
        y = x
        for i in range(20):
            y = ops.gemm(y, square)
            if i == 3:
                kept.append(y)
        return y

    recording = Recording(chain)
    result = recording.launch().copy()
    assert len(recording._blocks) == 1 + 3
    expected = x
    for i in range(20):
        expected = ops.gemm(expected, square)
        if i == 3:
            assert same_bits(kept[0], expected)
    x[...], kept[0][...] = 0, np.nan
    assert not recording.launch().any() and not kept[0].any()
    assert result.any()


def test_arrays_that_only_the_calls_refer_to_stay(rng):
    x, weight = normal(rng, 2, 64), normal(rng, 32, 64, dtype=BF16)
    expected = ops.gemm(x, weight)
    recording = Recording(lambda: ops.gemm(x.copy(), weight.copy()))
    gc.collect()
    others = [poison(2, 64) for _ in range(50)] + [poison(32, 64, dtype=BF16) for _ in range(50)]
    recording.launch()
    assert same_bits(recording.launch(), expected) and len(others) == 100


def test_a_call_that_fails_ends_the_recording(rng, layer):
    x, layer = layer

    def fails():
        ops.rms_norm(x, normal(rng, H - 1, dtype=BF16), 1e-5)

    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        Recording(fails)
    before = layer(x).copy()
    recording = Recording(lambda: layer(x))
    ops.rms_norm(x, normal(rng, H, dtype=BF16), 1e-5, out=x)  # not part of it
    x_now = x.copy()
    recording.launch(), recording.launch()
    assert same_bits(x, x_now) and not same_bits(recording.launch(), before)


def test_other_threads_are_not_written_down(rng, layer):
    x, layer = layer
    y, weight = normal(rng, 1, 64), normal(rng, 64, 64, dtype=BF16)

    def call():
        thread = threading.Thread(target=lambda: ops.gemm(y, weight, out=y_out))
        thread.start(), thread.join()
        return layer(x)

    y_out = poison(1, 64)
    recording = Recording(call)
    assert same_bits(y_out, ops.gemm(y, weight))
    y_out[...] = 7
    recording.launch(), recording.launch()
    assert (y_out == 7).all()


def test_a_long_replay_can_be_broken_off(rng):
    """By Ctrl-C, which raises between two calls instead of after all of them."""
    x, weight = normal(rng, 64, 1024), normal(rng, 2048, 1024, dtype=BF16)
    zeros = np.zeros((1, 2), np.float32), np.zeros((2, 2), BF16)

    def call():
        for _ in range(1500):
            ops.gemm(x, weight)
        ops.gemm(*zeros, out=result)

    result = poison(1, 2)
    recording = Recording(call)
    recording.launch()
    assert not result.any()
    result[...] = 7
    alarm = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        recording.launch()
    assert (result == 7).all()
