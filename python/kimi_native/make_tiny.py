"""Random checkpoints in exactly the published layout, to run and test without 595 GB.

    tiny        K2.5 in small: every kind of tensor, vision included, 3 layers
    tiny-k2     the same text model under the text-only names and config of K2-Thinking
    full-width  the real widths of attention, experts and router in 2 layers, text only; 1.2 GB on disk. The
                router's bias keeps to FULL_WIDTH_LIVE_EXPERTS; the other experts are holes that read as zero
    small       0.8 billion parameters in 8 layers of 64 experts, text only, no tokenizer; 0.6 GB on disk, to time
    full-size   the published config and its 64 shards as holes: headers, index, weight_shape; no tokenizer

The values of a tensor depend on the seed and its name alone and are made of integers, so that they are the
same on every machine and under every version of NumPy (RandomState is frozen by NumPy's policy).
"""

import base64
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from kimi_native.checkpoint import expected_tensors
from kimi_native.checkpoint_writer import new_folder, pack_int4, write_json, write_weights
from kimi_native.config import Config
from kimi_native.tiny_bpe import shipped_text, train
from kimi_native.tiny_config import BASE_TOKENS, PREPROCESSOR_CONFIG, preset_config
from kimi_native.tokenizer import NUM_RESERVED, SPECIAL_TOKENS

FULL_WIDTH_LIVE_EXPERTS = tuple(range(0, 384, 32))
PRESETS = ("tiny", "tiny-k2", "full-width", "small", "full-size")

_BLOCK = 2**20  # values drawn at a time; part of the definition of the values
_NORMAL_STD = math.sqrt(4 * (256**2 - 1) / 12)  # of the sum of four random bytes


def make_tiny(
    folder,
    preset: str = "tiny",
    *,
    seed: int = 0,
    experts: str = "int4",
    scale_bits: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a random checkpoint of one of PRESETS to `folder`, which must not exist, and return its path.

    experts: "int4" for packed routed experts, "bf16" for the very same values as plain bf16 weights.
    scale_bits: significant bits of the INT4 scales, 1 to 8 (all that bf16 has). Up to 5 every q * scale is
    exact in bf16, so that an INT4 and a bf16 copy of one seed hold equal weights whatever the order of
    rounding. progress(done, total) is called after each tensor. Raises ValueError for a bad argument and
    FileExistsError for an existing folder; a failure leaves nothing.
    """
    folder = Path(folder)
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    if experts not in ("int4", "bf16"):
        raise ValueError(f"experts is {experts!r}, expected 'int4' or 'bf16'")
    if not 1 <= scale_bits <= 8:
        raise ValueError(f"scale_bits is {scale_bits!r}, expected 1 to 8")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed!r}, expected 0 to 2^32 - 1")
    with new_folder(folder) as partial:
        values = preset_config(preset, experts)
        write_json(partial / "config.json", values)
        if preset not in ("small", "full-size"):
            write_tokenizer(partial, _vocabulary())
        generation = {"eos_token_id": values["bos_token_id"] + 2, "max_length": 262144}
        write_json(partial / "generation_config.json", generation)
        if "vision_config" in values:
            write_json(partial / "preprocessor_config.json", PREPROCESSOR_CONFIG)
        tensors = expected_tensors(Config.from_dict(values), quantized=experts == "int4")
        write_weights(partial, tensors, _Values(tensors, preset, seed, scale_bits).blocks, progress)
    return folder


@functools.cache
def _vocabulary() -> tuple[bytes, ...]:
    return tuple(train(shipped_text(), BASE_TOKENS))


def write_tokenizer(folder: Path, vocabulary: Sequence[bytes]) -> None:
    """tiktoken.model and tokenizer_config.json as published, for the byte-pair tokens in the order of their ranks."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(vocabulary)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(vocabulary) + offset): {
            "content": name,
            **flags,
            "special": "tool_call" not in name and "think" not in name,
        }
        for offset, name in SPECIAL_TOKENS.items()
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [
            name for offset, name in SPECIAL_TOKENS.items() if 2 <= offset < NUM_RESERVED - 2
        ],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    write_json(folder / "tokenizer_config.json", config)


class _Values:
    """The contents of each tensor, as blocks of little-endian values; no blocks leave a hole.

    Linear weights have a standard deviation of 1/sqrt(inputs), embeddings of 1, norms lie around 1:
    activations, router logits and final logits then have a standard deviation of about 1.
    """

    def __init__(self, tensors: dict, preset: str, seed: int, scale_bits: int):
        self.tensors, self.preset, self.seed, self.scale_bits = tensors, preset, seed, scale_bits

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        shape, _ = self.tensors[name]
        module, _, kind = name.rpartition(".")
        if kind == "weight_shape":
            rows, words = self.tensors[f"{module}.weight_packed"][0]
            yield np.array([rows, 8 * words], "<i4")
        elif self._is_hole(name):
            return
        elif ".mlp.experts." in name:
            inputs = shape[1] * {"weight_packed": 8, "weight_scale": 32, "weight": 1}[kind]
            yield from self._expert(module, kind, math.prod(shape) // shape[1] * inputs, inputs)
        elif kind == "e_score_correction_bias":
            yield self._bias(name, shape[0])
        else:
            mean, std = _distribution(name, shape)
            for block in self._normal(name, math.prod(shape)):
                yield (mean + np.float32(std) * block).astype(ml_dtypes.bfloat16)

    def _is_hole(self, name: str) -> bool:
        if self.preset == "full-width" and ".mlp.experts." in name:
            return int(name.split(".experts.")[1].split(".")[0]) not in FULL_WIDTH_LIVE_EXPERTS
        return self.preset == "full-size"

    def _bias(self, name: str, count: int) -> np.ndarray:
        bias = np.float32(0.1) * next(self._normal(name, count))
        if self.preset == "full-width":
            bias[list(FULL_WIDTH_LIVE_EXPERTS)] += 2  # a sigmoid is at most 1, so these always win
        return bias.astype("<f4")

    def _expert(self, module: str, kind: str, count: int, inputs: int) -> Iterator[np.ndarray]:
        """One part of an expert matrix of `count` weights; all parts come from the same draws."""
        for block in self._normal(f"{module}.weight", count):
            codes, scales = _quantize(block * np.float32(1 / math.sqrt(inputs)), self.scale_bits)
            if kind == "weight_scale":
                yield scales
            elif kind == "weight_packed":
                yield pack_int4(codes)
            else:
                product = codes.reshape(-1, 32).astype(np.float32) * scales.astype(np.float32)[:, None]
                yield product.astype(ml_dtypes.bfloat16)

    def _normal(self, name: str, count: int) -> Iterator[np.ndarray]:
        """`count` float32 values, nearly normal with deviation 1: scaled sums of four random bytes."""
        random = np.random.RandomState([self.seed, zlib.crc32(name.encode())])
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            draws = np.frombuffer(random.bytes(4 * size), np.uint8).reshape(4, size)
            yield (draws.sum(0, dtype=np.int16) - 510).astype(np.float32) * np.float32(1 / _NORMAL_STD)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a bf16 tensor."""
    if name.endswith(".bias"):
        return 0.0, 0.1
    if len(shape) == 1:
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if name.endswith("pos_emb.weight"):
        return 0.0, 0.5
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def _quantize(weights: np.ndarray, scale_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 weights [n] -> int8 codes [n] in -7..7, bf16 scales [n / 32]: absmax / 7, rounded."""
    groups = weights.reshape(-1, 32)
    mantissa, exponent = np.frexp(np.abs(groups).max(1) / np.float32(7))
    scales = np.ldexp(np.rint(mantissa * 2**scale_bits) / np.float32(2**scale_bits), exponent)
    codes = np.clip(np.rint(groups / scales[:, None]), -7, 7).astype(np.int8)
    return codes.reshape(-1), scales.astype(ml_dtypes.bfloat16)
