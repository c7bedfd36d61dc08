"""Images and video through the vision tower of published width: time and peak memory, beside transformers.

The weights are random, and the tower has BLOCKS of its 27 blocks, QUICK_BLOCKS with --quick; each block takes the same
time. The note says so, and what encoding takes at its peak beyond the memory that the process had before, its weights
included. Each engine has a fresh process for each case; their calls take turns. Of a video one chunk of four frames is
encoded: all are alike and go one after the other.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from math import prod
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
from kimi_native import ops
from kimi_native.checkpoint import expected_tensors
from kimi_native.config import Config
from kimi_native.tiny_config import published_config
from ml_dtypes import bfloat16

from bench import cpu_peers, shapes
from bench.harness import SPINNING, enough, relative_error

BLOCKS, QUICK_BLOCKS = 3, 1
GRIDS = {  # frames, rows and columns of patches, after the published resizing
    "224x224": (1, 16, 16),
    "1920x1080": (1, 78, 138),
    "3840x2160": (1, 98, 172),
    "1280x720, 2 s of video": (4, 50, 86),
}


def bench(harness):
    blocks = QUICK_BLOCKS if harness.quick else BLOCKS
    least, budget = (1, 0.5) if harness.quick else (3, 5.0)
    beside = harness.peers and not harness.cuda and cpu_peers.module("torch_vision")
    names = ["cuda" if harness.cuda else "cpu", *(beside.DTYPES if beside else ())]
    for case, grid in GRIDS.items():
        engines = [Engine(name, grid, blocks) for name in names]
        while not all(enough(engine.seconds, least, budget, 100) for engine in engines):
            for engine in engines:
                time.sleep(SPINNING)
                engine.encode()
        work, ours = operations(grid, blocks), engines[0]
        note = f"{blocks} of 27 blocks" + (f", peak +{ours.peak / 2**20:.0f} MiB" if not harness.cuda else "")
        harness.report("vision", case, ours.seconds, operations=work, note=note)
        for other in engines[1:]:
            ratio = statistics.median(other.seconds) / statistics.median(ours.seconds)
            note = (
                f"peak +{other.peak / 2**20:.0f} MiB, ours {ratio:.2f}x and {ours.peak / other.peak:.2f} of the memory"
            )
            note += f", apart by {relative_error(other.features, ours.features):.1e}"
            harness.report("vision", case, other.seconds, operations=work, engine=other.name, note=note)
        for engine in engines:
            engine.process.shutdown()


def operations(grid, blocks: int) -> int:
    """Two a multiply-add, of products and attention."""
    c = Config.from_dict(published_config()).vision_config
    T, H, wide = prod(grid), c.vt_hidden_size, 4 * c.mm_hidden_size
    block = T * H * (4 * H + 2 * c.vt_intermediate_size) + 2 * T * T * H
    tokens = grid[1] * grid[2] // 4
    return 2 * (T * 3 * c.patch_size**2 * H + blocks * block + tokens * wide * (wide + c.text_hidden_size))


class Engine:
    """A tower in a fresh process. name: where ours runs, or a peer's."""

    def __init__(self, name: str, grid, blocks: int):
        self.name, self.seconds = name, []
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.process.submit(_load, name, grid, blocks, ops.isa(), ops.num_threads()).result()
        _, self.peak, self.features = self.process.submit(_encode).result()  # later calls find memory that was freed

    def encode(self) -> None:
        self.seconds.append(self.process.submit(_encode).result()[0])


_encoder = None  # of the fresh process: a function that returns features as a float32 NumPy array


def _load(name: str, grid, blocks: int, isa: str, threads: int) -> None:
    global _encoder
    ops.set_isa(isa)
    ops.set_num_threads(threads)
    values = published_config()
    values["vision_config"]["vt_num_hidden_layers"] = blocks
    config = Config.from_dict(values)
    shapes_of = {
        name: shape for name, (shape, _) in expected_tensors(config).items() if name.startswith(("vis", "mm_"))
    }
    tensors = {name: _random(name, shape) for name, shape in shapes_of.items()}
    patches = shapes.rng().integers(0, 256, (prod(grid), 3 * config.vision_config.patch_size**2), np.uint8)
    make = _ours if name in ("cpu", "cuda") else cpu_peers.module("torch_vision").encoder
    _encoder = make(name, config.vision_config, tensors, patches, grid)


def _random(name: str, shape) -> np.ndarray:
    rng, around = np.random.default_rng(crc32(name.encode())), 1 if name.endswith("weight") else 0
    normal = rng.standard_normal(shape, np.float32)
    return (around + 0.1 * normal if len(shape) == 1 else normal / prod(shape[1:]) ** 0.5).astype(bfloat16)


def _ours(device: str, config, tensors, patches, grid):
    from kimi_native.media import MediaItem
    from kimi_native.ops import gpu
    from kimi_native.ops._array import to_host
    from kimi_native.vision import VisionModel

    levels = np.tile(np.arange(256, dtype=np.float32) / 127.5 - 1, (3, 1))
    item = MediaItem("image", patches, grid, levels)
    model = VisionModel(config, Weights(tensors, gpu.put if device == "cuda" else np.asarray))
    return lambda: to_host(model.encode([item])[0]).astype(np.float32, copy=False)


class Weights:
    """The tensors in the place of a checkpoint's: as much of kimi_native.placement.Weights as the tower asks for."""

    def __init__(self, tensors, place, prefix: str = ""):
        self.tensors, self.place, self.prefix = tensors, place, prefix
        self.checkpoint = SimpleNamespace(tensor=lambda name, shape, dtype: tensors[name])

    def __truediv__(self, name: str) -> "Weights":
        return Weights(self.tensors, self.place, f"{self.prefix}{name}.")

    def tensor(self, name: str, *shape: int):
        return self.place(self.tensors[self.prefix + name])


def _encode():
    """(seconds, bytes at the peak beyond those before, features)"""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    started = time.perf_counter()
    features = _encoder()
    seconds = time.perf_counter() - started
    return seconds, _memory("VmHWM") - before, features


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
