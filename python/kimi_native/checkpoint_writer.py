"""A checkpoint folder in the published layout: sharded safetensors with their index, which `checkpoint` reads."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kimi_native.checkpoint import DTYPES


@contextmanager
def new_folder(folder) -> Iterator[Path]:
    """Yields a new folder under a temporary name beside `folder`, which gets that name when the block has ended well.

    Raises FileExistsError where `folder` exists. A failure, of the block or of the renaming, leaves nothing.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder}: exists, expected a name for a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 codes [..., in] in -8..7 -> int32 words [..., in / 8]: code + 8 as a nibble, the first one lowest."""
    nibbles = (codes + np.int8(8)).view(np.uint8)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view("<i4")


def write_weights(
    folder: Path,
    tensors: dict[str, tuple[tuple[int, ...], str]],
    blocks: Callable[[str], Iterable[np.ndarray]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `tensors`, name -> (shape, safetensors dtype name) as in checkpoint.expected_tensors, and the index.

    Shards as published: one a layer, then the rest of the text model, the projector, the vision tower. blocks(name)
    gives the values of a tensor one after the other, in its dtype; a tensor without blocks stays a hole in the file,
    which reads as zero. progress(done, total) is called after each tensor. Raises TypeError for a block of another
    dtype and ValueError for blocks that are not the size of the tensor.
    """
    shards: dict[tuple[int, int], dict] = {}
    for name, spec in tensors.items():
        shards.setdefault(_placement(name), {})[name] = spec
    weight_map, total_size = {}, 0
    for number, (_, shard) in enumerate(sorted(shards.items()), 1):
        file = folder / f"model-{number:05}-of-{len(shards):06}.safetensors"
        done = len(weight_map)
        advance = (lambda n, done=done: progress(done + n, len(tensors))) if progress else None
        total_size += _write_shard(file, shard, blocks, advance)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _placement(name: str) -> tuple[int, int]:
    """A key that is equal for the tensors of one shard and sorts as the shards do."""
    if name.startswith("vision_tower."):
        return 3, 0
    if name.startswith("mm_projector."):
        return 2, 0
    _, in_layer, rest = name.partition(".layers.")
    return (0, int(rest.split(".")[0])) if in_layer else (1, 0)


def _write_shard(file: Path, tensors: dict, blocks: Callable, advance: Callable[[int], None] | None) -> int:
    """Write one safetensors file. Returns the bytes of its tensors. advance(n) is called after the n-th tensor."""
    # Larger items first keep every tensor aligned; weight_shapes side by side keep a file of holes small on disk.
    names = sorted(tensors, key=lambda name: (-DTYPES[tensors[name][1]].itemsize, not name.endswith(".weight_shape")))
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape, dtype = tensors[name]
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(names, 1):
            begin, end = header[name]["data_offsets"]
            stream.seek(8 + len(text) + begin)
            written = sum(stream.write(_bytes(name, tensors[name][1], block)) for block in blocks(name))
            if written not in (0, end - begin):
                raise ValueError(f"{name}: blocks of {written} bytes, expected {end - begin} or no blocks")
            if advance:
                advance(done)
        stream.truncate(8 + len(text) + position)
    return position


def _bytes(name: str, dtype: str, block: np.ndarray) -> bytes:
    if block.dtype != DTYPES[dtype]:
        raise TypeError(f"{name}: a block of {block.dtype}, expected {DTYPES[dtype]}")
    return block.tobytes()
