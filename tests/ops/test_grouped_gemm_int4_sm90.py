"""grouped_gemm_int4(sm90=True): the kernel for Hopper GPUs, by wgmma and tensor copies."""

import numpy as np
import pytest
import reference
from arrays import BF16, int4, poison, same_bits, strided
from backends import backends
from close import assert_close
from kimi_native import ops

SHARED_PER_BLOCK = 227 << 10  # of a Hopper GPU


GPUS = [pytest.param(b, id=n, marks=[] if b.emulated else [pytest.mark.cuda]) for n, b in backends().items() if b.cuda]


@pytest.fixture(params=GPUS)
def gpu(request):
    """A Hopper GPU: emulated, or where there is one."""
    on = request.param
    if not on.emulated and on.cupy.cuda.Device().compute_capability != "90":
        pytest.skip("a kernel of Hopper GPUs, never run on one so far")
    with on.active():
        if on.emulated:
            on.extension.configure(*on.order, shared_per_block=SHARED_PER_BLOCK)
        yield on


def random_experts(on, rng, E, n_out, n_in, copy=np.copy):
    """(ExpertWeights, the matrices that they stand for: bf16(q * scale))."""
    pairs = [int4(rng, n_out, n_in) for _ in range(E)]
    packed, scales = [copy(p) for p, _ in pairs], [copy(s) for _, s in pairs]
    return on(ops.ExpertWeights, packed, scales), [np.float64(reference.dequantize_int4(*pair)) for pair in pairs]


def offsets_of(counts):
    return np.cumsum([0, *counts]).astype(np.int32)


def check(x, exact, offsets, out):
    """The products of bf16 values are exact, the sums float32, the result is rounded once."""
    reach = 4 * np.linalg.norm(np.float64(x), axis=1)[:, None] * np.sqrt(np.mean(exact[0] ** 2))
    assert_close(out, reference.grouped_gemm(x, exact, offsets), "bfloat16", reduction=x.shape[1], scale=reach)


def run(on, x, experts, offsets, **named):
    return on(ops.grouped_gemm_int4, x, experts, offsets, sm90=True, **named)


# in: one stage, several, more than the ring has. out: less than a tile of 256, several and a tail.
@pytest.mark.parametrize(
    ("n_in", "n_out", "counts"),
    [(128, 256, [64]), (256, 8, [1, 0, 97]), (128, 264, [0, 65, 3]), (768, 16, [129, 2]), (640, 520, [5])],
)
def test_aligned_shapes(gpu, rng, n_in, n_out, counts):
    experts, exact = random_experts(gpu, rng, len(counts), n_out, n_in)
    x = gpu.normal(rng, sum(counts), n_in)
    check(x, exact, offsets_of(counts), run(gpu, x, experts, offsets_of(counts)))


@pytest.mark.parametrize(
    ("n_in", "n_out", "counts"), [(32, 1, [3]), (96, 257, [1, 66, 0]), (160, 7, [0, 0, 128]), (608, 31, [2, 100])]
)
def test_tails(gpu, rng, n_in, n_out, counts):
    """Rows of scales and outputs that allow no wide access, the last stage partly empty."""
    experts, exact = random_experts(gpu, rng, len(counts), n_out, n_in)
    x = gpu.normal(rng, sum(counts), n_in)
    check(x, exact, offsets_of(counts), run(gpu, x, experts, offsets_of(counts)))


def test_many_small_experts_keep_the_ring_turning(gpu, rng):
    """More tiles than blocks, of one and three stages each, through four buffers."""
    for n_in in (128, 384):
        experts, exact = random_experts(gpu, rng, 40, 24, n_in)
        counts = rng.integers(0, 4, 40)
        x = gpu.normal(rng, counts.sum(), n_in)
        check(x, exact, offsets_of(counts), run(gpu, x, experts, offsets_of(counts)))


def test_most_experts(gpu, rng):
    """As many as the kernel's table holds."""
    pair = int4(rng, 8, 128)
    experts, counts = gpu(ops.ExpertWeights, [pair[0]] * 512, [pair[1]] * 512), np.zeros(512, int)
    counts[[0, 31, 32, 511]] = 1, 2, 1, 3
    x, exact = gpu.normal(rng, 7, 128), [np.float64(reference.dequantize_int4(*pair))] * 512
    check(x, exact, offsets_of(counts), run(gpu, x, experts, offsets_of(counts)))


def test_equals_plain_loops_bit_for_bit(gpu, rng):
    """Small integers and scales of powers of two: sums are exact, whatever their order. All sixteen nibbles occur."""
    packed = [int4(rng, 40, 256)[0] for _ in range(2)]
    scales = [(2.0 ** rng.integers(-3, 4, (40, 8))).astype(BF16) for _ in range(2)]
    x, offsets = rng.integers(-3, 4, (70, 256)).astype(gpu.dtype), offsets_of([5, 65])
    expected = reference.grouped_gemm(x, reference.ExpertWeights(packed, scales), offsets)
    out = run(gpu, x, gpu(ops.ExpertWeights, packed, scales), offsets)
    assert same_bits(out, expected.astype(np.float32).astype(BF16))


def test_every_nibble_at_every_place(gpu):
    """x picks one input each: out is the matrix itself, one rounding of q * scale and none after it."""
    nibbles = (np.arange(256)[:, None] * 7 + np.arange(128) * 3 + np.arange(128) // 16) % 16
    words = (nibbles.reshape(256, 16, 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1)
    packed = words.astype(np.uint32).view(np.int32)
    scale = (1 + np.arange(256 * 4).reshape(256, 4) / 128 % 1).astype(BF16)
    out = run(gpu, np.eye(128, dtype=gpu.dtype), gpu(ops.ExpertWeights, [packed], [scale]), offsets_of([128]))
    assert same_bits(np.ascontiguousarray(out.T), reference.dequantize_int4(packed, scale))


def test_misaligned_weights(gpu, rng):
    """Arrays that start at no multiple of 16 bytes, as tensors of a mapped file may."""

    def shifted(array):
        raw = np.empty(array.size + 1, array.dtype)
        raw[1:] = array.ravel()
        return raw[1:].reshape(array.shape)

    experts, exact = random_experts(gpu, rng, 2, 40, 256, copy=shifted)
    x = gpu.normal(rng, 9, 256)
    check(x, exact, offsets_of([4, 5]), run(gpu, x, experts, offsets_of([4, 5])))


def test_rows_of_no_expert_are_zero(gpu, rng):
    """Rows past the last offset are written, and not used."""
    for n_out in (40, 7):
        experts, exact = random_experts(gpu, rng, 3, n_out, 128)
        x, offsets, out = gpu.normal(rng, 9, 128), offsets_of([2, 0, 4]), poison(9, n_out, dtype=BF16)
        x[6:] = np.nan
        assert run(gpu, x, experts, offsets, out=out) is out
        assert same_bits(out[6:], np.zeros((3, n_out), BF16))
        check(x[:6], exact, offsets, out[:6].copy())


def test_nan_stays_in_its_row(gpu, rng):
    experts, _ = random_experts(gpu, rng, 2, 24, 128)
    x = gpu.normal(rng, 12, 128)
    x[3, 77] = np.nan
    out = run(gpu, x, experts, offsets_of([5, 7]))
    assert np.isnan(np.float32(out)).all(axis=1).tolist() == [row == 3 for row in range(12)]
    assert np.isfinite(np.float32(out[[0, 1, 2, *range(4, 12)]])).all()


def test_no_rows(gpu, rng):
    experts, _ = random_experts(gpu, rng, 3, 24, 128)
    assert run(gpu, gpu.normal(rng, 0, 128), experts, offsets_of([0, 0, 0])).shape == (0, 24)


@pytest.mark.parametrize("columns", [24, 21])
def test_strided_out_and_rows(gpu, rng, columns):
    """Rows of x 16-byte aligned, as the kernel needs; rows of out not, and with NaN between them."""
    experts, _ = random_experts(gpu, rng, 3, columns, 128)
    x, offsets, out = gpu.normal(rng, 9, 128), offsets_of([2, 0, 7]), strided(poison(9, columns, dtype=BF16))
    wide = np.full((9, 144), np.nan, BF16)
    wide[:, :128] = x
    run(gpu, wide[:, :128], experts, offsets, out=out)
    assert same_bits(out.copy(), run(gpu, x, experts, offsets))
    assert np.isnan(np.float32(out.base)).sum() == out.base.size - out.size


@pytest.mark.parametrize("offsets", [[0, -5, 3, 9], [7, 2, 2**31 - 1, -(2**31)], [9, 9, 9, 9], [2**31 - 1] * 4])
def test_hostile_offsets_touch_nothing_else(gpu, rng, offsets):
    """On the GPU nobody checks offsets: the result is undefined, the memory around it is safe."""
    experts, _ = random_experts(gpu, rng, 3, 24, 128)
    x, out = gpu.normal(rng, 9, 128), strided(poison(9, 24, dtype=BF16))
    run(gpu, x, experts, np.array(offsets, np.int32), out=out)
    around = np.ones(out.base.shape, bool)
    around[1:10, 1:25] = False
    assert np.isnan(np.float32(out.base))[around].all()


def test_refuses_what_it_does_not_fit(gpu, rng):
    experts, _ = random_experts(gpu, rng, 1, 8, 128)
    x = gpu.normal(rng, 4, 128)
    for bad in (strided(x), np.broadcast_to(x[:1], (4, 128))):
        with pytest.raises(RuntimeError, match="^grouped_gemm_int4: .*rows of x"):
            run(gpu, bad, experts, offsets_of([4]))
    if gpu.emulated:
        gpu.extension.configure(*gpu.order)
        with pytest.raises(RuntimeError, match="^grouped_gemm_int4: .*shared memory"):
            run(gpu, x, experts, offsets_of([4]))


def test_refuses_cpu_arrays(rng):
    packed, scale = int4(rng, 8, 128)
    experts, x = ops.ExpertWeights([packed], [scale]), np.ones((4, 128), np.float32)
    with pytest.raises(RuntimeError, match="^grouped_gemm_int4: sm90"):
        ops.grouped_gemm_int4(x, experts, offsets_of([4]), sm90=True)
