"""Where arrays live: DLPack in place of the buffer protocol, and calls whose arrays lie in different places."""

import ctypes

import numpy as np
import pytest
from arrays import BF16, same_bits
from backends import backends
from kimi_native import _C

CPU, CUDA = 1, 2


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
CODES = {"i": 0, "u": 1, "f": 2}


class Elsewhere:
    """A NumPy array that offers itself through DLPack alone and claims to live on a device."""

    def __init__(self, array, device_type=CPU, device_id=0, code=None, strides=True, byte_offset=0):
        self.array, self.dtype = array, array.dtype
        dims = ctypes.c_int64 * array.ndim
        self.shape = dims(*array.shape)
        self.strides = dims(*(s // array.itemsize for s in array.strides)) if strides else None
        kind = CODES[array.dtype.kind] if code is None else code
        self.tensor = DLTensor(
            array.ctypes.data - byte_offset,
            device_type,
            device_id,
            array.ndim,
            kind,
            8 * array.itemsize,
            1,
            self.shape,
            self.strides,
            byte_offset,
        )
        self.streams = []

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)


def given(rng):
    """Arguments of rms_norm as the extension takes them: bf16 as uint16."""
    x, weight = rng.standard_normal((3, 8)).astype(np.float32), np.ones(8, BF16).view(np.uint16)
    return {"x": x, "weight": weight, "out": np.full((3, 8), np.nan, np.float32)}


def rms_norm(x, weight, out):
    _C.rms_norm(x, weight, out, 1e-5, 0)


@pytest.mark.parametrize("options", [{}, {"strides": False}, {"byte_offset": 16}])
def test_dlpack_reads_what_the_buffer_protocol_reads(rng, options):
    arrays = given(rng)
    rms_norm(**arrays)
    elsewhere = arrays | {"out": np.full((3, 8), np.nan, np.float32)}
    wrapped = {name: Elsewhere(a, **options) for name, a in elsewhere.items()}
    rms_norm(**wrapped)
    assert same_bits(elsewhere["out"], arrays["out"])
    assert wrapped["x"].streams == [-1], "a synchronising stream argument forbids graph capture"


def test_dlpack_strides_and_bfloat(rng):
    arrays = given(rng)
    rms_norm(**arrays)
    wide = np.zeros((3, 20), np.float32)
    wide[:, 4:12] = arrays["x"]
    out = np.full((3, 8), np.nan, np.float32)
    rms_norm(Elsewhere(wide[:, 4:12]), Elsewhere(arrays["weight"], code=4), out)
    assert same_bits(out, arrays["out"])


def test_dlpack_dtypes_are_checked(rng):
    arrays = given(rng)
    for bad in (arrays["x"].astype(np.float64), arrays["x"].view(np.int32)):
        with pytest.raises(TypeError, match="rms_norm: x is "):
            rms_norm(**arrays | {"x": Elsewhere(bad)})


def test_an_array_in_another_place_is_named(rng):
    arrays = given(rng)
    with pytest.raises(TypeError, match="rms_norm: weight is a CuPy array, expected a NumPy array like the first"):
        rms_norm(**arrays | {"weight": Elsewhere(arrays["weight"], CUDA)})


def test_a_misaligned_array_is_refused(rng):
    arrays = given(rng)
    shifted = np.zeros(3 * 8 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 8)
    for bad in (shifted, Elsewhere(shifted)):
        with pytest.raises(TypeError, match="rms_norm: x is a misaligned array, expected a NumPy array of float32"):
            rms_norm(**arrays | {"x": bad})


def test_gpus_must_agree(rng, emulator):
    x, weight = np.ones((3, 8), np.uint16), np.ones(8, np.uint16)
    placed = {"x": Elsewhere(x, CUDA, 1), "weight": Elsewhere(weight, CUDA), "out": Elsewhere(x.copy(), CUDA, 1)}
    with pytest.raises(ValueError, match="rms_norm: weight is on GPU 0, expected GPU 1"):
        emulator.extension.rms_norm(*placed.values(), 1e-5, 0)


def test_what_stands_in_the_way_of_a_gpu():
    if "cuda" in backends():
        _C.check_gpu(0)
        return
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels; .*KIMI_CUDA=ON|^device: .*(driver|device)"):
        _C.check_gpu(0)
    arrays = given(np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="^rms_norm: (this build has no CUDA kernel of it|device: )"):
        rms_norm(**{name: Elsewhere(array, CUDA) for name, array in arrays.items()})


def test_experts_must_share_a_place(rng):
    weights = [np.ones((8, 8), np.uint16) for _ in range(2)]
    with pytest.raises(TypeError, match=r"ExpertWeights: weights\[1\] is a CuPy array"):
        _C.ExpertTable([weights[0], Elsewhere(weights[1], CUDA)], [])


def test_experts_elsewhere_than_the_tokens_are_named(rng):
    experts = _C.ExpertTable([Elsewhere(np.ones((8, 8), np.uint16), CUDA)], [])
    x, offsets = np.ones((1, 8), np.float32), np.array([0, 1], np.int32)
    with pytest.raises(TypeError, match="grouped_gemm: experts is a CuPy array"):
        _C.grouped_gemm(x, experts, offsets, np.empty((1, 8), np.float32), 0)
