"""The parameters of a model: one float32 array a name.

Names and shapes are those on disk (checkpoint.expected_tensors), but the routed experts of a layer are one array:
"...mlp.experts.gate_proj.weight" and up_proj [E, I, H], down_proj [E, H, I].
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from kimi_native.checkpoint import Checkpoint, expected_tensors
from kimi_native.config import Config
from kimi_native.ops.linear import GROUP

STD = 0.02  # of matrices at the start: config.json's initializer_range

_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")
_STACKED = ".mlp.experts."


@lru_cache(4)  # every step asks; of the published config it takes 0.2 s
def shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of the layers; vision where the config has a vision_config."""
    result = {}
    for name, (shape, _) in expected_tensors(config, quantized=False).items():
        stacked = _EXPERT.sub(_STACKED, name)
        result[stacked] = shape if stacked == name else (config.text_config.n_routed_experts, *shape)
    return MappingProxyType(result)


def initialise(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Parameters to start from: matrices normal with deviation STD, norms 1, biases 0.

    The values of a tensor depend on the seed, 0 to 2^32 - 1, and its name alone.
    """
    return {name: _initial(name, shape, seed) for name, shape in shapes(config).items()}


def _initial(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    random = np.random.RandomState([seed, zlib.crc32(name.encode())])  # frozen by NumPy's policy
    return (STD * random.standard_normal(shape)).astype(np.float32)


def load(folder) -> dict[str, np.ndarray]:
    """The parameters of a published checkpoint as float32: of bf16 the same values, of INT4 q * scale exactly.

    Raises ConfigError or CheckpointError, naming file or tensor, what was found and what was expected.
    """
    config, checkpoint = Config.from_folder(folder), Checkpoint(folder)
    params = {name: np.empty(shape, np.float32) for name, shape in shapes(config).items()}
    for name, array in params.items():
        for on_disk, part in published(name, array):
            _read(checkpoint, on_disk, part)
    return params


def _read(checkpoint: Checkpoint, name: str, out: np.ndarray) -> None:
    """One tensor into out, which has its shape."""
    packed = f"{name}_packed"
    if packed in checkpoint:
        rows, columns = out.shape
        words = checkpoint.tensor(packed, (rows, columns // 8), "I32")
        _decode(words, checkpoint.tensor(f"{name}_scale", (rows, columns // GROUP), "BF16"), out)
    else:
        dtype = "F32" if name.endswith("e_score_correction_bias") else "BF16"
        out[...] = checkpoint.tensor(name, out.shape, dtype)


def _decode(words: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """words int32 [rows, in / 8], scale bf16 [rows, in / GROUP]: q * scale into out [rows, in]. The product has 12
    bits, so float32 holds it where ops.dequantize_int4 rounds to bf16."""
    codes = out.reshape(*words.shape, 8)
    for nibble in range(8):
        codes[..., nibble] = (words >> 4 * nibble & 15) - 8
    groups = out.reshape(*scale.shape, GROUP)
    groups *= scale.astype(np.float32)[..., None]


def published(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name on disk, view) of the tensors that a parameter is on disk: one for each expert, or itself."""
    if _STACKED not in name:
        yield name, array
        return
    layer, projection = name.split(_STACKED)
    for expert, matrix in enumerate(array):
        yield f"{layer}{_STACKED}{expert}.{projection}", matrix


def check(params: dict, config: Config) -> None:
    """Raises ValueError for a parameter that is missing or has another shape, naming it."""
    for name, shape in shapes(config).items():
        found = list(params[name].shape) if name in params else "missing"
        if found != list(shape):
            raise ValueError(f"params: {name!r} is {found}, expected {list(shape)}")


def below(params: dict, prefix: str) -> dict:
    """Those whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}


def put_below(prefix: str, params: dict) -> dict:
    """With the prefix before each name: the way back."""
    return {prefix + name: array for name, array in params.items()}
