"""A checkpoint folder as NumPy views under the names on disk.

Shards are mapped, never copied: a view costs address space until its bytes are read. All headers are parsed
and checked when the folder is opened, so that a damaged file is found at load and not in the middle of a
generation.

The safetensors format: 8 bytes little-endian header length, a JSON header, the tensor bytes. As the format
demands, the tensors cover the bytes after the header exactly: no overlap, no hole, nothing behind the last
one. Beyond the format, each tensor must start at a multiple of its item size in the file, because views are
used where they lie.
"""

import gc
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


_ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_KEYS = frozenset(("dtype", "shape", "data_offsets"))


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names file, what was found and what was expected."""


class Entry(NamedTuple):
    """Where a tensor lies: safetensors dtype name, shape, first byte and end in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@contextmanager
def no_collections() -> Iterator[None]:
    """Keeps the garbage collector from walking, again and again, the hundred thousands of objects that a load makes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Checkpoint:
    """model.safetensors.index.json with its shards, or a single model.safetensors.

    `checkpoint[name]` is a read-only NumPy view on the map (BF16 as ml_dtypes.bfloat16). `entries` maps each
    name to its Entry. Tensors of a shard that the index does not name are not part of the checkpoint. Raises
    CheckpointError for anything that is missing or malformed.
    """

    @no_collections()
    def __init__(self, folder, progress: Callable[[int, int], None] | None = None):
        """progress(done, total) is called after each file's header."""
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            weight_map = _read_index(index)
            files = [self.folder / shard for shard in sorted(set(weight_map.values()))]
        elif single.exists():
            weight_map, files = None, [single]
        else:
            raise CheckpointError(f"{self.folder}: has neither {index.name} nor {single.name}, expected one")
        self._maps = {file: _map_file(file) for file in files}
        headers = {}
        for file, data in self._maps.items():
            headers[file.name] = _read_header(file, data)
            if progress:
                progress(len(headers), len(files))
        if weight_map is None:
            self.entries: dict[str, Entry] = headers[single.name]
        else:
            self.entries = _follow_index(index, weight_map, headers)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._maps)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def prefix(self) -> str:
        """What stands before `model.` and `lm_head.` in the text model's names: "language_model." or ""."""
        return "language_model." if any(name.startswith("language_model.") for name in self.entries) else ""

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.view(self._entry(name))

    def view(self, entry: Entry) -> np.ndarray:
        """The view of one of `entries`."""
        return np.ndarray(entry.shape, DTYPES[entry.dtype], self._maps[entry.file], entry.begin)

    def entry(self, name: str, shape: tuple[int, ...], dtype: str) -> Entry:
        """The Entry of a tensor that must have this shape and this dtype ("BF16", "F32", "I32", ...)."""
        entry = self._entry(name)
        problem = mismatch(name, entry, shape, dtype)
        if problem:
            raise CheckpointError(f"{entry.file}: {problem}")
        return entry

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The view of a tensor that must have this shape and this dtype."""
        return self.view(self.entry(name, shape, dtype))

    def read_ahead(self, entries: list[Entry]) -> None:
        """Begin to read tensors into the page cache, in this order, while the caller goes on."""

        def announce():
            for file, in_file in groupby(entries, lambda entry: entry.file):
                with suppress(OSError), file.open("rb") as stream:  # whoever uses the tensors will meet the error
                    for entry in in_file:
                        os.posix_fadvise(stream.fileno(), entry.begin, entry.nbytes, os.POSIX_FADV_WILLNEED)

        Thread(target=announce, name="read-ahead", daemon=True).start()

    def release(self, entry: Entry) -> None:
        """Give back the memory of a tensor that will not be used again; if it is, it is read again."""
        first, end = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE, entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            self._maps[entry.file].madvise(mmap.MADV_DONTNEED, first, end - first)

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}, expected it among its {len(self)} tensors")
        return entry


def mismatch(name: str, entry: Entry, shape: tuple[int, ...], dtype: str) -> str | None:
    """What is wrong with a tensor of which this shape and dtype are expected, or None."""
    if entry.dtype == dtype and entry.shape == shape:
        return None
    # weight_shape is int32 in the published files and int64 by the default of compressed-tensors.
    allowed = ("I32", "I64") if name.endswith(".weight_shape") and dtype == "I32" else (dtype,)
    if entry.dtype in allowed and entry.shape == tuple(shape):
        return None
    found = f"{entry.dtype} {list(entry.shape)}"
    return f"tensor {name!r} is {found}, expected {' or '.join(allowed)} {list(shape)}"


def _read_index(file: Path) -> dict[str, str]:
    try:
        index = _parse_json(f"{file}: index", file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}), expected an index") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is {weight_map!r:.80}, expected an object of file names")
    usable = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in usable:
            continue
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(c in shard for c in "/\\\0"):
            raise CheckpointError(
                f"{file}: weight_map has {name!r} in {shard!r:.80}, expected the name of a file in the folder"
            )
        usable.add(shard)
    return weight_map


def _follow_index(index: Path, weight_map: dict[str, str], headers: dict[str, dict[str, Entry]]) -> dict[str, Entry]:
    entries = {}
    for name, shard in weight_map.items():
        entry = headers[shard].get(name)
        if entry is None:
            raise CheckpointError(f"{index.parent / shard}: has no tensor {name!r}, expected it there by {index.name}")
        entries[name] = entry
    return entries


def _map_file(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"{file}: is {size} bytes long, expected at least 8 for the header length")
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be mapped ({error.strerror}), expected a safetensors file") from error


def _read_header(file: Path, data: mmap.mmap) -> dict[str, Entry]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header length is {length}, expected at most {MAX_HEADER_BYTES}")
    start = 8 + length
    if start > len(data):
        raise CheckpointError(
            f"{file}: header length is {length}, expected at most {len(data) - 8}, the bytes that follow it"
        )
    header = _parse_json(f"{file}: header", data[8:start])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is {metadata!r:.80}, expected an object of strings")
    entries = {name: _parse_tensor(file, name, value, start, len(data)) for name, value in header.items()}
    _check_coverage(file, entries, start, len(data))
    return entries


def _parse_json(where: str, text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, in which no object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where} has {twice!r:.80} more than once, expected each name once")
        return result

    try:
        decoded = text.decode("utf-8")
        value = json.loads(decoded)
        # A hook takes three times as long. Each pair has a colon, so the text has more than the value if one was lost.
        if decoded.count(":") != _count_pairs(value):
            value = json.loads(decoded, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}), expected a JSON object") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {value!r:.80}, expected a JSON object")
    return value


def _count_pairs(value: Any) -> int:
    """Of an object and the objects that are its values; a text that has more inside those has more colons too."""
    if not isinstance(value, dict):
        return 0
    return len(value) + sum(len(inner) for inner in value.values() if isinstance(inner, dict))


def _parse_tensor(file: Path, name: str, value: Any, start: int, size: int) -> Entry:
    """One header entry of a file of `size` bytes; its offsets count from `start`, the end of the header."""

    def error(found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name!r} has {found}, expected {expected}")

    if not isinstance(value, dict) or value.keys() != _KEYS:
        found = sorted(value) if isinstance(value, dict) else value
        raise error(f"{found!r:.80}", "the keys dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"dtype {dtype!r:.80}", f"one of {', '.join(DTYPES)}")
    if not _is_list_of_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise error(f"shape {shape!r:.80}", f"at most {MAX_DIMENSIONS} integers >= 0")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise error(f"data_offsets {offsets!r:.80}", "two integers >= 0")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise error(f"data_offsets {offsets!r:.80}", f"begin <= end <= {size - start}, the bytes after the header")
    itemsize = _ITEMSIZES[dtype]
    nbytes = math.prod(shape) * itemsize
    if nbytes != end - begin:
        raise error(f"{end - begin} bytes by data_offsets {offsets}", f"those of {dtype} {shape!r:.80}")
    if nbytes == 0 and math.prod(extent for extent in shape if extent) >= 2**59:
        raise error(f"shape {shape!r:.80}", "extents whose product is below 2^59")
    if (start + begin) % itemsize:
        raise error(f"its {dtype} values at byte {start + begin} of the file", f"a multiple of {itemsize}")
    return Entry(file, dtype, tuple(shape), start + begin, start + end)


def _is_list_of_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    # A loop since `all` takes twice as long and this runs 400,000 times; type() since a bool is an int.
    for size in value:  # noqa: SIM110
        if type(size) is not int or size < 0:
            return False
    return True


def _check_coverage(file: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """The tensors must follow each other from `start` to the end of the file without overlap or hole."""
    position, previous = start, "the header"
    for begin, end, name in sorted((entry.begin, entry.end, name) for name, entry in entries.items()):
        if begin != position:
            what = "overlapping" if begin < position else "leaving a hole after"
            raise CheckpointError(f"{file}: tensor {name!r} begins at {begin}, {what} {previous}, expected {position}")
        position, previous = end, repr(name)
    if position != size:
        raise CheckpointError(f"{file}: is {size} bytes long, expected {position}, the end of {previous}")


def root(config) -> str:
    """What stands before `model.` and `lm_head.` in the published names of a Config's tensors."""
    return "language_model." if config.model_type == "kimi_k25" else ""


def expected_tensors(
    config, quantized: bool = True, prefix: str | None = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every tensor of the published layout for a Config: name -> (shape, safetensors dtype name).

    quantized: routed experts as weight_packed, weight_scale and weight_shape; else as bf16 weight.
    prefix: what stands before `model.` and `lm_head.`, by default `root`. Vision tower and projector are listed when
    the config has a vision_config.
    """
    text = config.text_config
    if prefix is None:
        prefix = root(config)
    tensors = {f"{prefix}model.embed_tokens.weight": ((text.vocab_size, text.hidden_size), "BF16")}
    for layer in range(text.num_hidden_layers):
        dense = layer < text.first_k_dense_replace
        parts = _attention(text) | (
            _mlp("mlp", text.hidden_size, text.intermediate_size) if dense else _moe(text, quantized)
        )
        tensors |= {f"{prefix}model.layers.{layer}.{name}": value for name, value in parts.items()}
    tensors[f"{prefix}model.norm.weight"] = ((text.hidden_size,), "BF16")
    tensors[f"{prefix}lm_head.weight"] = ((text.vocab_size, text.hidden_size), "BF16")
    if config.vision_config is not None:
        tensors |= _vision(config.vision_config)
    return tensors


def _attention(text) -> dict:
    hidden, heads = text.hidden_size, text.num_attention_heads
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (text.q_lora_rank, hidden),
        "self_attn.q_a_layernorm": (text.q_lora_rank,),
        "self_attn.q_b_proj": (heads * text.qk_head_dim, text.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa": (text.cache_width, hidden),
        "self_attn.kv_a_layernorm": (text.kv_lora_rank,),
        "self_attn.kv_b_proj": (heads * (text.qk_nope_head_dim + text.v_head_dim), text.kv_lora_rank),
        "self_attn.o_proj": (hidden, heads * text.v_head_dim),
    }
    return {f"{name}.weight": (shape, "BF16") for name, shape in shapes.items()}


def _mlp_shapes(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def _mlp(name: str, hidden: int, width: int) -> dict:
    return {f"{name}.{part}.weight": (shape, "BF16") for part, shape in _mlp_shapes(hidden, width).items()}


def _moe(text, quantized: bool) -> dict:
    experts, hidden, width = text.n_routed_experts, text.hidden_size, text.moe_intermediate_size
    tensors = {
        "mlp.gate.weight": ((experts, hidden), "BF16"),
        "mlp.gate.e_score_correction_bias": ((experts,), "F32"),
    }
    tensors |= _mlp("mlp.shared_experts", hidden, width * text.n_shared_experts)
    for expert in range(experts):
        for part, (rows, columns) in _mlp_shapes(hidden, width).items():
            module = f"mlp.experts.{expert}.{part}"
            if quantized:
                tensors[f"{module}.weight_packed"] = ((rows, columns // 8), "I32")
                tensors[f"{module}.weight_scale"] = ((rows, columns // 32), "BF16")
                tensors[f"{module}.weight_shape"] = ((2,), "I32")
            else:
                tensors[f"{module}.weight"] = ((rows, columns), "BF16")
    return tensors


def _vision(vision) -> dict:
    width, inner = vision.vt_hidden_size, vision.vt_intermediate_size
    merged = math.prod(vision.merge_kernel_size) * vision.mm_hidden_size
    grid = (vision.init_pos_emb_height, vision.init_pos_emb_width)
    block = {
        "norm0": (width,),
        "norm1": (width,),
        "wqkv": (3 * width, width),
        "wo": (width, width),
        "mlp.fc0": (inner, width),
        "mlp.fc1": (width, inner),
    }
    modules = {"vision_tower.patch_embed.proj": (width, 3, vision.patch_size, vision.patch_size)}
    for layer in range(vision.vt_num_hidden_layers):
        modules |= {f"vision_tower.encoder.blocks.{layer}.{name}": shape for name, shape in block.items()}
    modules |= {
        "vision_tower.encoder.final_layernorm": (width,),
        "mm_projector.pre_norm": (vision.mm_hidden_size,),
        "mm_projector.proj.0": (merged, merged),
        "mm_projector.proj.2": (vision.text_hidden_size, merged),
    }
    tensors = {"vision_tower.patch_embed.pos_emb.weight": ((*grid, width), "BF16")}
    for name, shape in modules.items():
        tensors[f"{name}.weight"] = (shape, "BF16")
        tensors[f"{name}.bias"] = (shape[:1], "BF16")
    return tensors
