"""Ops and threads: their number changes no bit, Python threads do not disturb each other, a fork works."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from arrays import BF16, int4, normal, poison, same_bits
from kimi_native import ops


def calls():
    """name -> function without arguments that returns a list of arrays; shapes large enough to be split."""
    rng = np.random.default_rng(5)
    x, weight, norm = normal(rng, 19, 352), normal(rng, 301, 352, dtype=BF16), normal(rng, 352, dtype=BF16)
    packed, scale = int4(rng, 301, 352)
    per_head, heads = normal(rng, 19, 12, 40), normal(rng, 12, 56, 40, dtype=BF16)
    angle, positions = (
        rng.uniform(0, 6, (64, 20)).astype(np.float32),
        rng.integers(0, 64, 19).astype(np.int32),
    )
    cos, sin = np.cos(angle), np.sin(angle)
    logits, bias = normal(rng, 19, 96), normal(rng, 96)
    weights, ids = ops.topk_sigmoid(logits, bias, 6)
    rows, offsets, inverse = ops.moe_permute(x, ids, 96)
    int4_up, int4_down = int4(rng, 64, 352), int4(rng, 352, 64)
    bf16_up, bf16_down = normal(rng, 64, 352, dtype=BF16), normal(rng, 352, 64, dtype=BF16)
    up, down = (ops.ExpertWeights(*([each] * 96 for each in pair)) for pair in (int4_up, int4_down))
    plain_up, plain_down = (ops.ExpertWeights([each] * 96) for each in (bf16_up, bf16_down))
    cu_q, cu_k, causal = np.int32([0, 40, 41, 90]), np.int32([0, 40, 340, 389]), np.int32([0, 299, 0])
    q, kv, k_pe = normal(rng, 90, 5, 48), normal(rng, 389, 5, 56), normal(rng, 389, 16)
    prefill = q, kv, k_pe, cu_q, cu_k, causal, 0.2
    attended, largest = ops.mla_prefill(*prefill, return_lse=True), poison(90, 5)
    cache, pages = normal(rng, 40, 64, 80, dtype=BF16), rng.permutation(40).astype(np.int32).reshape(2, 20)
    query, seq_lens = normal(rng, 2, 3, 20, 80), np.int32([1270, 333])
    tall, matrices, groups = normal(rng, 700, 70), normal(rng, 3, 70, 50), np.int32([0, 500, 500, 690])
    uniform, slots = rng.random(19, np.float32), rng.permutation(60)[:19]

    def in_place(op, *arguments):
        changed = normal(np.random.default_rng(6), 19, 352)
        return [op(x, changed, *arguments), changed]

    def append():
        filled = poison(20, 3, 372, dtype=BF16)
        ops.append_mla_cache(x, per_head[:, 0, :20], filled, slots)
        return [filled]

    def fused_append():
        filled = poison(20, 3, 352, dtype=BF16)
        ops.fused_append_mla_cache(x, norm[:312], cos, sin, positions, filled, slots, 1e-6)
        return [filled]

    return {
        "rms_norm": lambda: [ops.rms_norm(x, norm, 1e-5)],
        "rms_norm_backward": lambda: list(ops.rms_norm_backward(tall, tall[0], 1e-5, tall)),
        "matmul": lambda: [ops.matmul(tall, tall.T)],
        "matmul symmetric": lambda: [ops.matmul(tall, tall.T, symmetric=True)],
        "grouped_matmul": lambda: [ops.grouped_matmul(tall, matrices, groups)],
        "grouped_matmul over rows": lambda: [ops.grouped_matmul(tall.T, tall, groups)],
        "fused_add_rms_norm": lambda: in_place(ops.fused_add_rms_norm, norm, 1e-5),
        "gemm": lambda: [ops.gemm(x, weight)],
        "gemm of one row": lambda: [ops.gemm(x[:1], weight)],
        "batched_gemm": lambda: [ops.batched_gemm(per_head, heads)],
        "batched_gemm transposed": lambda: [ops.batched_gemm(per_head, heads[:, :40], transpose_weight=True)],
        "gemm_int4": lambda: [ops.gemm_int4(x, packed, scale)],
        "gemm_int4 of one row": lambda: [ops.gemm_int4(x[:1], packed, scale)],
        "quantize_int8": lambda: list(ops.quantize_int8(weight)),
        "gemm_int8": lambda: [ops.gemm_int8(x, *ops.quantize_int8(weight))],
        "gemm_int8 of one row": lambda: [ops.gemm_int8(x[:1], *ops.quantize_int8(weight))],
        "dequantize_int4": lambda: [ops.dequantize_int4(packed, scale)],
        "quantize_int4": lambda: list(ops.quantize_int4(x)),
        "layer_norm": lambda: [ops.layer_norm(x, norm, norm, 1e-5)],
        "gelu": lambda: [ops.gelu(x, norm, tanh) for tanh in (False, True)],
        "silu_and_mul": lambda: [ops.silu_and_mul(x)],
        "silu_and_mul_backward": lambda: [ops.silu_and_mul_backward(x, x[:, 176:])],
        "rope": lambda: [ops.rope(per_head, cos, sin, positions)],
        "append_mla_cache": append,
        "fused_append_mla_cache": fused_append,
        "attention": lambda: [ops.attention(q, q, q, cu_q, 0.2)],
        "mla_prefill": lambda: [*ops.mla_prefill(*prefill, return_lse=True, max_logits=largest), largest],
        "mla_prefill_backward": lambda: list(ops.mla_prefill_backward(*prefill, *attended, 2 * attended[0])),
        "mla_decode": lambda: list(ops.mla_decode(query, cache, pages, seq_lens, 64, 0.2, return_lse=True)),
        "mla_decode of one sequence": lambda: [ops.mla_decode(query[:1], cache, pages[:1], seq_lens[:1], 64, 0.2)],
        "mla_decode int16": lambda: [ops.mla_decode(query, cache, pages, seq_lens, 64, 0.2, activations="int16")],
        "topk_sigmoid": lambda: list(ops.topk_sigmoid(logits, bias, 6)),
        "moe_permute": lambda: list(ops.moe_permute(x, ids, 96)),
        "moe_unpermute": lambda: [ops.moe_unpermute(rows, weights, inverse)],
        "grouped_gemm": lambda: [ops.grouped_gemm(rows, plain_up, offsets)],
        "grouped_gemm_int4": lambda: [ops.grouped_gemm_int4(rows, up, offsets)],
        "fused_moe": lambda: [ops.fused_moe(x, weights, ids, plain_up, plain_up, plain_down)],
        "fused_moe INT4": lambda: [ops.fused_moe(x, weights, ids, up, up, down)],
        "fused_moe INT4 of one row": lambda: [ops.fused_moe(x[:1], weights[:1], ids[:1], up, up, down)],
        "fused_moe INT4 int16": lambda: [ops.fused_moe(x, weights, ids, up, up, down, activations="int16")],
        "fused_moe INT4 int8": lambda: [ops.fused_moe(x, weights, ids, up, up, down, activations="int8")],
        "top_k_top_p_sample": lambda: [ops.top_k_top_p_sample(logits, uniform, 0.8, 20, 0.9, 0.01)],
    }


@pytest.fixture
def threads():
    """Restores the number of threads after the test."""
    previous = ops.num_threads()
    yield
    ops.set_num_threads(previous)


def assert_same(name, got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"{name}: result {i} differs"


def test_every_op_is_covered():
    settings = {"ExpertWeights", "available_isas", "isa", "num_threads", "set_isa", "set_num_threads"}
    assert {name.split()[0] for name in calls()} == set(ops.__all__) - settings


def test_number_of_threads_changes_no_bit(isa, threads):
    for name, call in calls().items():
        ops.set_num_threads(1)
        expected = call()
        for count in (2, 5):
            ops.set_num_threads(count)
            assert_same(f"{name} with {count} threads", call(), expected)


def test_settings(threads):
    ops.set_num_threads(3)
    assert ops.num_threads() == 3
    for bad in (0, -1, 10**6):
        with pytest.raises(ValueError, match="set_num_threads"):
            ops.set_num_threads(bad)
    assert ops.num_threads() == 3


def test_python_threads_at_once(threads):
    ops.set_num_threads(3)
    work = calls()
    expected = {name: call() for name, call in work.items()}
    failures, start = [], threading.Barrier(4)

    def repeat(shift):
        try:
            start.wait()
            names = list(work)
            for name in (names[shift:] + names[:shift]) * 5:
                assert_same(name, work[name](), expected[name])
        except BaseException as error:  # reported by the main thread
            failures.append(error)

    workers = [threading.Thread(target=repeat, args=(6 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


def wait_for(child, seconds):
    """The exit status of a child process, which is killed after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed: it did not end"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_computes(threads):
    """The pool's workers do not survive a fork; the child must not wait for them."""
    ops.set_num_threads(3)
    work = calls()
    expected = {name: call() for name, call in work.items()}
    child = os.fork()
    if child == 0:
        try:
            for name, call in work.items():
                assert_same(name, call(), expected[name])
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert wait_for(child, 60) == 0
    assert_same("parent", work["gemm"](), expected["gemm"])
