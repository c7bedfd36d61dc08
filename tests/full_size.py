"""A model larger than memory at full size: python -m tests.full_size DIR

Writes K2.5's published layout, 595 GB as sparse files, to DIR unless it is there, loads it, decodes tokens through all
61 layers, and prints what it took beside what the storage does by itself. DIR may be deleted afterwards.

Real random bytes: the routed experts of --layers layers (9.5 GB of disk each), all routers and norms, and the
embeddings of the tokens used, so that every layer of every token chooses experts of its own. The rest are holes, which
read as zero: the other experts, attention, the dense layer, the shared experts, lm_head. A hole takes memory as bytes
from a disk do, but no disk: so layers with real bytes are timed apart from those with holes.
"""

import argparse
import mmap
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from kimi_native import load, ops
from kimi_native.checkpoint import Checkpoint
from kimi_native.make_tiny import make_tiny

PIECE, TOTAL = 4 << 20, 400_000_000  # bytes of a read, and of all of them, when the storage is measured
FIRST_TOKEN = 1000
SCALE = 0x3C  # upper byte of the scales: bf16 values of about 0.01


def write_model(folder: Path, layers: int, tokens: int, preset: str = "full-size") -> None:
    partial = folder.with_name(folder.name + ".partial")
    checkpoint, rng = Checkpoint(make_tiny(partial, preset)), np.random.default_rng(0)
    noise = np.frombuffer(rng.bytes(64 << 20), np.uint8)
    for name, entry in checkpoint.entries.items():
        if name.endswith("embed_tokens.weight"):
            row = entry.nbytes // entry.shape[0]
            write(entry.file, entry.begin + FIRST_TOKEN * row, bfloat16(rng.standard_normal(tokens * row // 2)))
        elif name.endswith("norm.weight"):
            write(entry.file, entry.begin, bfloat16(np.ones(entry.nbytes // 2)))
        elif name.endswith("mlp.gate.weight"):
            write(entry.file, entry.begin, bfloat16(rng.standard_normal(entry.nbytes // 2) / entry.shape[1] ** 0.5))
        elif name.endswith("e_score_correction_bias"):
            write(entry.file, entry.begin, rng.normal(0, 0.1, entry.shape).astype(np.float32))
        elif ".mlp.experts." in name and layer_of(name) <= layers and not name.endswith("weight_shape"):
            start = int(rng.integers(len(noise) - entry.nbytes)) // 2 * 2
            values = noise[start : start + entry.nbytes]
            if name.endswith("weight_scale"):
                values = values.copy()
                values[1::2] = SCALE
            write(entry.file, entry.begin, values)
    os.sync()
    partial.rename(folder)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(file: Path, offset: int, values: np.ndarray) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(values.tobytes())


def layer_of(name: str) -> int:
    return int(name.partition(".layers.")[2].split(".")[0])


def storage(file: Path) -> dict[str, float]:
    """GB/s of some ways to read experts, TOTAL bytes in pieces from random places, by turns; medians of five."""
    pages = os.open(file, os.O_RDONLY)
    direct = os.open(file, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(pages).st_size // 4 * 3 // PIECE * PIECE  # the packed weights, which come first
    mapped = mmap.mmap(pages, 0, prot=mmap.PROT_READ)
    count = TOTAL // PIECE
    buffer = mmap.mmap(-1, count * PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = memoryview(buffer)

    def read(job, file=direct):
        number, place = job
        assert os.preadv(file, [memory[number * PIECE : (number + 1) * PIECE]], place) == PIECE

    def touch(job):
        return sum(mapped[job[1] : job[1] + PIECE : mmap.PAGESIZE])

    def populate(job):
        mapped.madvise(22, job[1], PIECE)  # MADV_POPULATE_READ

    def announce(job):
        mapped.madvise(mmap.MADV_WILLNEED, job[1], PIECE)

    ways = {
        "page faults, 2 threads": (2, [touch]),
        "MADV_POPULATE_READ, 8 threads": (8, [populate]),
        "MADV_WILLNEED, then MADV_POPULATE_READ, 8 threads": (8, [announce, populate]),
        "pread, 4 threads": (4, [lambda job: read(job, pages)]),
        "pread with O_DIRECT, 1 thread": (1, [read]),
        "pread with O_DIRECT, 4 threads": (4, [read]),
        "pread with O_DIRECT, 8 threads": (8, [read]),
    }
    rates = {name: [] for name in ways}
    for _ in range(5):
        for name, (threads, steps) in ways.items():
            mapped.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(pages, 0, 0, os.POSIX_FADV_DONTNEED)
            jobs = list(enumerate(random.sample(range(0, size, PIECE), count)))
            with ThreadPoolExecutor(threads) as pool:
                started = time.perf_counter()
                for step in steps:
                    list(pool.map(step, jobs))
                rates[name].append(TOTAL / (time.perf_counter() - started) / 1e9)
    os.posix_fadvise(pages, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(pages), os.close(direct)
    return {name: sorted(values)[2] for name, values in rates.items()}


class Peak:
    """The largest RssAnon and RssFile of this process while it is entered, looked at every 20 ms."""

    def __enter__(self):
        self.peak, self.done = {"RssAnon": 0, "RssFile": 0}, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()

    def _watch(self):
        while not self.done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(rest.split()[0]) * 1024)


def read_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def report(folder: Path, layers: int, tokens: int, expert_cache: str | None) -> None:
    print(f"{cpu_name()}, {ops.num_threads()} threads, {memory_total() / 2**30:.1f} GiB, {time.strftime('%Y-%m-%d')}")
    real = max(sorted(folder.glob("*.safetensors")), key=lambda file: file.stat().st_blocks)
    for name, rate in storage(real).items():
        print(f"storage: {rate:5.2f} GB/s  {name}")
    started = time.perf_counter()
    model = load(folder, expert_cache=expert_cache)
    print(
        f"load: {time.perf_counter() - started:.2f} s, {sum(f.stat().st_size for f in folder.iterdir()) / 1e9:.0f} GB"
    )
    cache, seconds = model.new_cache(tokens), []  # seconds: [tokens, MoE layers] in the routed experts
    for layer in model.layers[1:]:
        timed(layer.mlp, seconds)
    model._has_graph = lambda *_: False  # which would leave them out
    with Peak() as memory:
        for number in range(tokens):
            before = dict(vars(model.expert_cache)) if model.expert_cache else {}
            disk, started = read_from_disk(), time.perf_counter()
            seconds.append([])
            logits = model.forward([FIRST_TOKEN + number], cache)
            total = time.perf_counter() - started
            assert np.isfinite(logits).all()
            line = f"token {number + 1}: {total:6.2f} s, {(read_from_disk() - disk) / 1e9:5.2f} GB from the disk"
            if model.expert_cache:
                uses, misses = (vars(model.expert_cache)[name] - before[name] for name in ("uses", "misses"))
                read = (model.expert_cache.read_bytes - before["read_bytes"]) / 1e9
                line += f", {read:.2f} GB of experts read, {1 - misses / uses:.0%} hits"
            own, holes = seconds[-1][:layers], seconds[-1][layers:]
            mean = [1000 * sum(times) / max(1, len(times)) for times in (own, holes)]
            print(f"{line}; routed experts of a layer {mean[0]:.0f} ms real, {mean[1]:.0f} ms holes", flush=True)
    if model.expert_cache:
        expert = model.expert_cache.read_bytes / model.expert_cache.misses
        rate = 8 * expert / np.median([t for row in seconds[1:] or seconds for t in row[:layers]]) / 1e9
        print(f"{model.expert_cache.summary()}; {model.expert_cache.slots} slots")
        print(f"layers of real bytes: {rate:.2f} GB/s of chosen experts, multiplication included")
    print("peak memory: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.peak.items()))


def timed(mlp, seconds: list) -> None:
    routed = mlp._routed

    def measured(*arguments, **added_to):
        started = time.perf_counter()
        out = routed(*arguments, **added_to)
        seconds[-1].append(time.perf_counter() - started)
        return out

    mlp._routed = measured


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown chip")


def memory_total() -> int:
    return int(Path("/proc/meminfo").read_text().split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.full_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers with real bytes, 1 to 60 (default 2)")
    parser.add_argument("--tokens", type=int, default=3, help="tokens to decode (default 3)")
    parser.add_argument("--expert-cache", metavar="SIZE", help="as of kimi-native generate")
    args = parser.parse_args()
    if not args.folder.exists():
        write_model(args.folder, args.layers, 64)
    report(args.folder, args.layers, min(args.tokens, 64), args.expert_cache)


if __name__ == "__main__":
    main()
