"""The routed experts of a model larger than memory: those used most stay in memory, others are read when chosen.

Page faults read a mapped file at a fraction of what a disk can do, and the pages push out those of the weights that
every token needs. So experts are read past the page cache (O_DIRECT), a few tensors at a time, into slots of our own
memory, each as large as one expert. docs/memory.md has the measurements.
"""

import errno
import mmap
import os
import re
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_native import ops
from kimi_native.checkpoint import DTYPES, CheckpointError, Entry
from kimi_native.placement import Experts, available_memory

READERS = 4  # reads under way at a time; more gained nothing, one alone depends on the disk
BLOCK = 4096  # what O_DIRECT wants offsets, lengths and addresses to be multiples of
RESERVE = 2_000_000_000  # bytes left to latent cache, scratch, interpreter and other programs
HALF_LIFE = 64  # tokens after which a use counts half

Layer = tuple[Experts, Experts, Experts]  # gate, up, down


class Resident(NamedTuple):
    """An expert in a slot: its arrays, by projection, are good once `reads` are done."""

    slot: int
    arrays: list[list[np.ndarray]]
    reads: list[Future]


def parse_bytes(size: int | str) -> int:
    """12_000_000_000 for "12GB"; kB, MB, GB and TB are powers of 1000. Raises ValueError for anything else."""
    units = {None: 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])b)?", str(size).lower())
    if found is None:
        raise ValueError(f"expert_cache is {size!r}, expected bytes as in 12000000000 or '12GB'")
    return int(float(found[1]) * units[found[2]])


def slot_bytes(layers: list[Layer]) -> int:
    """Memory that one expert takes, with room for whole blocks around each of its tensors."""
    return max(sum(_span(e.nbytes) for projection in layer for e in projection.entries[0]) for layer in layers)


def _span(nbytes: int) -> int:
    return -(-(nbytes + BLOCK - 1) // BLOCK) * BLOCK


def budget(asked: int | None, layers: list[Layer], dense: int, experts: int, top_k: int) -> int | None:
    """Bytes for the experts of `layers`, or None if they stay mapped: all of them fit, or 0 was asked for.

    asked: as in Model.load, None takes what is available beside `dense`, bytes that every token reads, and RESERVE, at
    the least two layers' choices of one token.
    """
    if asked is not None:
        return asked or None
    left = available_memory() - RESERVE - dense
    return None if experts <= left else max(left, 2 * top_k * slot_bytes(layers))


class ExpertCache:
    """uses, hits and misses count the experts that a layer needed, each once a call; read_bytes are of the misses."""

    def __init__(self, layers: list[Layer], budget: int):
        """Raises ValueError for a budget, in bytes, of less than two experts."""
        self.layers, self.slot_bytes = layers, slot_bytes(layers)
        self.slots = min(budget // self.slot_bytes, sum(len(gate.entries) for gate, _, _ in layers))
        if self.slots < 2:
            raise ValueError(
                f"expert_cache is {budget} bytes, expected at least {2 * self.slot_bytes}, those of two experts"
            )
        self.memory = mmap.mmap(-1, self.slots * self.slot_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.files = {}
        for layer in layers:
            for file in {entry.file for projection in layer for expert in projection.entries for entry in expert}:
                if file not in self.files:
                    self.files[file] = _open(file)
                    weakref.finalize(self, os.close, self.files[file])
        # By layer * E + expert. An expert is in memory if it owns its slot: that is written last when it comes and
        # first when it goes, so that a call broken off by Ctrl-C leaves nothing half done.
        self.residents: dict[int, Resident] = {}
        self.owners = np.full(self.slots, -1)
        self.heat = np.full((len(layers), len(layers[0][0].entries)), -np.inf)  # log2 of the uses, of late ones most
        self.tokens = np.zeros(len(layers))
        self.uses = self.misses = self.read_bytes = 0
        self._start_readers()
        _caches.add(self)

    def _start_readers(self) -> None:
        """In a forked child too, which has neither the readers nor what they were about to write."""
        self.readers = ThreadPoolExecutor(READERS, "expert-reader")
        self.lock = threading.Lock()  # a second Python thread would give up experts that this one multiplies with
        for key, resident in list(self.residents.items()):
            if resident.reads:
                self.owners[resident.slot] = -1
                del self.residents[key]

    @property
    def hits(self) -> int:
        return self.uses - self.misses

    @property
    def hit_rate(self) -> float:
        """Of the experts that were needed, the share that was in memory."""
        return self.hits / max(1, self.uses)

    def summary(self) -> str:
        size = self.slots * self.slot_bytes / 1e9
        return f"expert cache {size:.1f} GB, {self.hit_rate:.0%} hits, {self.read_bytes / 1e9:.1f} GB read"

    def read_ahead(self, layer: int, topk_ids) -> None:
        """Begin to read what fused_moe, called next with these ids, would have to wait for."""
        with self.lock:
            group = self._groups(layer, np.unique(topk_ids))[0]
            self._start(group, group)

    def fused_moe(self, layer: int, x, topk_weights, topk_ids, activations: str):
        """ops.fused_moe with the experts of a layer, of which there may be more than slots.

        They are then taken in ascending groups of half the slots, one read while another is multiplied. Adding up the
        groups differs from one sum in the last bits; what is in memory makes no difference.
        """
        with self.lock:
            return self._fused_moe(layer, x, topk_weights, topk_ids, activations)

    def _fused_moe(self, layer, x, topk_weights, topk_ids, activations):
        ids, local, counts = np.unique(topk_ids, return_inverse=True, return_counts=True)
        local = local.reshape(topk_ids.shape).astype(np.int32)
        self.tokens[layer] += len(x)
        age = self.tokens[layer] / HALF_LIFE
        self.heat[layer, ids] = np.logaddexp2(self.heat[layer, ids], np.log2(counts) + age)
        self.uses += len(ids)
        groups = self._groups(layer, ids)
        self._start(groups[0], groups[0])
        if len(x) == 1 and len(groups[0]) == topk_ids.size:
            return self._one_token(groups[0], x, topk_weights[:, np.argsort(topk_ids[0])], activations)
        size, out = len(groups[0]), None
        for i, group in enumerate(groups):
            if i + 1 < len(groups):
                self._start(groups[i + 1], group + groups[i + 1])
            projections = self._finish(group)
            ids_here = local - np.int32(i * size)
            ids_here[(ids_here < 0) | (ids_here >= size)] = -1
            part = ops.fused_moe(x, topk_weights, ids_here, *projections, activations=activations)
            out = part if out is None else out + part
        return out

    def _one_token(self, keys: list[int], x, weights, activations: str):
        """x [1, H] by its experts, ascending as are their weights [1, K]: what is there first, while the rest is read.

        Each expert has a row of its own, and rows are added in the order of ops.fused_moe, so that no bit depends on
        what was there.
        """
        there = np.array([all(read.done() for read in self.residents[key].reads) for key in keys])
        rows = np.empty((len(keys), x.shape[1]), np.float32)
        for part in filter(len, (np.flatnonzero(there), np.flatnonzero(~there))):
            experts = self._finish([keys[i] for i in part])
            ids, ones = np.arange(len(part), dtype=np.int32)[:, None], np.ones((len(part), 1), np.float32)
            rows[part] = ops.fused_moe(np.repeat(x, len(part), 0), ones, ids, *experts, activations=activations)
        return ops.moe_unpermute(rows, weights, np.arange(len(keys), dtype=np.int32)[None])

    def _groups(self, layer: int, ids: np.ndarray) -> list[list[int]]:
        """The keys of ascending ids: all of them if there are slots for them, or groups of half the slots."""
        size = len(ids) if len(ids) <= self.slots else self.slots // 2
        keys = (layer * self.heat.shape[1] + ids).tolist()
        return [keys[start : start + size] for start in range(0, len(keys), size)]

    def _is_resident(self, key: int) -> bool:
        return key in self.residents and self.owners[self.residents[key].slot] == key

    def _start(self, group: list[int], kept: list[int]) -> None:
        """Have the missing experts of `group` read into slots that no expert of `kept` has."""
        missing = [key for key in group if not self._is_resident(key)]
        self.misses += len(missing)
        for key, slot in zip(missing, self._free_slots(len(missing), kept), strict=True):
            layer, expert = divmod(key, self.heat.shape[1])
            position, resident = slot * self.slot_bytes, Resident(slot, [], [])
            try:
                for projection in self.layers[layer]:
                    resident.arrays.append([])
                    for entry in projection.entries[expert]:
                        first = entry.begin // BLOCK * BLOCK
                        resident.reads.append(self.readers.submit(self._read, entry, first, position))
                        at = position + entry.begin - first
                        resident.arrays[-1].append(np.ndarray(entry.shape, DTYPES[entry.dtype], self.memory, at))
                        self.read_bytes += entry.nbytes
                        position += _span(entry.nbytes)
                self.residents[key] = resident
                self.owners[slot] = key
            except BaseException:
                wait(resident.reads)
                raise

    def _free_slots(self, count: int, kept: list[int]) -> list[int]:
        """`count` slots, those never used first, then those whose experts were used least, which are given up."""
        heat = np.where(self.owners < 0, -np.inf, self.heat.ravel()[self.owners])
        heat[[self.residents[key].slot for key in kept if self._is_resident(key)]] = np.inf
        slots = np.argpartition(heat, count - 1)[:count].tolist() if count else []
        for slot in slots:
            if self.owners[slot] >= 0:
                self._give_up(int(self.owners[slot]))
        return slots

    def _give_up(self, key: int) -> None:
        resident = self.residents[key]
        wait(resident.reads)  # there are some if a call was broken off, and they write to the slot
        self.owners[resident.slot] = -1
        del self.residents[key]

    def _finish(self, group: list[int]) -> list[ops.ExpertWeights]:
        """The three projections of the experts of `group`, as soon as they are there."""
        residents = [self.residents[key] for key in group]
        for key, resident in zip(group, residents, strict=True):
            try:
                for read in resident.reads:
                    read.result()
            except Exception:
                self._give_up(key)
                raise
            resident.reads.clear()
        return [ops.ExpertWeights(*zip(*(r.arrays[i] for r in residents), strict=True)) for i in range(3)]

    def _read(self, entry: Entry, first: int, position: int) -> None:
        """The blocks from `first` to the end of a tensor into the memory at `position`. Runs in a reader."""
        length = -(-(entry.end - first) // BLOCK) * BLOCK
        done = 0
        with memoryview(self.memory) as memory:
            while True:
                try:
                    with memory[position + done : position + length] as rest:
                        count = os.preadv(self.files[entry.file], [rest], first + done)
                except OSError as error:
                    raise CheckpointError(f"{entry.file}: cannot be read ({error.strerror}), expected bytes") from error
                if first + done + count >= entry.end:
                    return
                if count < BLOCK:
                    raise CheckpointError(
                        f"{entry.file}: ends at byte {first + done + count}, expected {entry.end}, a tensor's end: "
                        "it was longer when it was loaded"
                    )
                done += count // BLOCK * BLOCK


_caches = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [cache._start_readers() for cache in _caches])


def _open(file: Path) -> int:
    """For reads past the page cache, or through it on a filesystem that has no others."""
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(file, os.O_RDONLY)
