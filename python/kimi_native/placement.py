"""Which weights lie where, and whether they fit."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from kimi_native import ops
from kimi_native.checkpoint import Checkpoint, CheckpointError, Entry
from kimi_native.config import TextConfig
from kimi_native.ops import gpu
from kimi_native.ops.linear import GROUP
from kimi_native.ops.moe import DIGITS


def check_device(device: str, experts: str | None) -> None:
    """Raises ValueError for a device or a place of the experts that there is not."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected 'cpu' or 'cuda'")
    if experts not in (None, "cpu"):
        raise ValueError(f"experts is {experts!r}, expected None, for beside the rest, or 'cpu'")


def check_activations(activations: str) -> None:
    """Raises ValueError for a format of activations that there is not."""
    if activations not in DIGITS:
        raise ValueError(f"activations is {activations!r}, expected one of: {', '.join(DIGITS)}")


def check_dense(dense: str, device: str) -> None:
    """Raises ValueError for a format of dense weights that there is not, or not on this device."""
    if dense not in ("bfloat16", "int8"):
        raise ValueError(f"dense is {dense!r}, expected 'bfloat16' or 'int8'")
    if dense == "int8" and device == "cuda":
        raise ValueError("dense is 'int8', which is for device 'cpu' alone; expected 'bfloat16' with device 'cuda'")


def check_memory(config: TextConfig, room: dict[str, int], experts_on_host: bool, tokens: int, keys: int) -> None:
    """Raises RuntimeError with need and have if weights and the first `tokens` of a prompt do not fit on the GPU.

    room: bytes of the weights, dense and experts. keys: how many are expanded at once.
    """
    free, total = gpu.free_bytes()
    cache, work = tokens * config.num_hidden_layers * config.cache_width * 2, workspace_bytes(config, tokens, keys)
    weights, size = room["dense"] + (0 if experts_on_host else room["experts"]), gpu.gigabytes
    if weights + cache + work <= free:
        return
    message = (
        f'device "cuda" needs {size(weights + cache + work)}: weights {size(weights)}, cache of {tokens:,} tokens '
        f"{size(cache)}, workspace about {size(work)}; the GPU has {size(free)} free of {size(total)}"
    )
    if not experts_on_host and room["experts"]:
        message += f'. experts="cpu" (--experts cpu) leaves {size(room["experts"])} of experts in host memory'
    raise RuntimeError(message)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: MemAvailable, and no more than the limits of its control groups leave.

    Files that are cached count as available, as in MemAvailable: they give way.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(base) and (place / limit).exists() and (place / usage).exists():
                most, stat = (place / limit).read_text().strip(), (place / "memory.stat").read_text().split()
                names = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                files = sum(names.get(name, names.get(name.removeprefix("total_"), 0)) for name in _FILES)
                if most != "max":
                    available = min(available, int(most) - int((place / usage).read_text()) + files)
    return available


_FILES = ("total_active_file", "total_inactive_file")  # version 2 has them without "total_"


def memory_nodes() -> int:
    """Of the machine; 0 if the system does not say."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


def workspace_bytes(config: TextConfig, tokens: int, keys: int) -> int:
    """About what a chunk of a prompt takes on the GPU beside weights and cache, its last logits included."""
    c = config
    attention = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * 2
    expanded = (c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) + c.cache_width) * 2
    dense = 3 * c.intermediate_size * 2
    routed = c.num_experts_per_tok * (c.hidden_size * (2 + 4) + 3 * c.moe_intermediate_size * 2)
    activations = 6 * c.hidden_size * 2 + attention + max(dense, routed)
    return tokens * activations + keys * expanded + c.vocab_size * 4


def read_ahead(checkpoint: Checkpoint) -> None:
    """Begin to read what every token needs, if memory holds it: at several times the rate of page faults.

    Not with several memory nodes, where all of it would lie on the node of the one thread that asks for it; page faults
    come from all threads.
    """
    body = tuple(f"{checkpoint.prefix}{name}." for name in ("model.layers", "model.norm", "lm_head"))
    named = checkpoint.entries.items()
    dense = [entry for name, entry in named if name.startswith(body) and ".mlp.experts." not in name]
    if memory_nodes() <= 1 and sum(entry.nbytes for entry in dense) <= available_memory():
        checkpoint.read_ahead(sorted(dense, key=lambda entry: (entry.file, entry.begin)))


class Weights:
    """The tensors under one prefix of a checkpoint: weights / "mlp" goes down one name.

    With an upload they are placed on the GPU, the routed experts only unless they stay on the host. read_bytes and room
    add up what was asked for by kind, the bytes themselves and what they take in an upload: experts, and of the rest
    dense for every token, prompt for its chunks alone, originals of what is rounded. activations: what INT4 experts
    that stay on the host are multiplied by. dense: "int8" rounds what `linear` gives out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        upload: gpu.Upload | None = None,
        experts_on_host: bool = False,
        activations: str = "float32",
        dense: str = "bfloat16",
    ):
        self.checkpoint, self.prefix, self.upload, self.experts_on_host = checkpoint, prefix, upload, experts_on_host
        self.activations, self.dense = activations, dense
        self.read_bytes = dict.fromkeys(("dense", "prompt", "original", "rounded", "experts"), 0)
        self.room = self.read_bytes.copy()

    def __truediv__(self, name: str) -> "Weights":
        prefix = f"{self.prefix}{name}."
        below = Weights(self.checkpoint, prefix, self.upload, self.experts_on_host, self.activations, self.dense)
        below.read_bytes, below.room = self.read_bytes, self.room
        return below

    def tensor(self, name: str, *shape: int, dtype: str = "BF16", kind: str = "dense"):
        view = self.checkpoint.view(self._checked(name, shape, dtype, kind))
        return view if self.upload is None else self.upload(view)

    def linear(self, n_in: int, **outputs: int) -> list[tuple]:
        """The weights of these names, each (weight,) in bf16, (weight_packed, weight_scale) in INT4 iff weight_packed
        exists, or (weight, weight_scale) rounded to int8. If all are rounded they are one, one below the other.
        """
        parts = [self._weight(name, n_out, n_in) for name, n_out in outputs.items()]
        if len(parts) > 1 and all(arrays[0].dtype == np.int8 for arrays in parts):
            return [tuple(map(np.concatenate, zip(*parts, strict=True)))]
        return parts

    def _weight(self, name: str, n_out: int, n_in: int) -> tuple:
        if self.dense == "int8" and f"{self.prefix}{name}.weight_packed" not in self.checkpoint:
            entry = self._checked(f"{name}.weight", (n_out, n_in), "BF16", "original")
            arrays = self.rounded(f"{name}.weight", self.checkpoint.view(entry))
            self.checkpoint.release(entry)
            return arrays
        views = [self.checkpoint.view(entry) for entry in self._linear(name, n_out, n_in, "dense")]
        return tuple(views if self.upload is None else map(self.upload, views))

    def rounded(self, name: str, weight) -> tuple:
        """(int8, scales) of the tensor `name`, [..., out, in]."""
        *outer, n_in = weight.shape
        if n_in % GROUP:
            has = f"{self.prefix}{name}: has {n_in} inputs"
            raise CheckpointError(f'{has}, expected a multiple of {GROUP} for dense="int8"')
        quantized, scale = ops.quantize_int8(weight.reshape(-1, n_in))
        self.read_bytes["rounded"] += quantized.nbytes + scale.nbytes
        return quantized.reshape(weight.shape), scale.reshape(*outer, -1)

    def experts(self, name: str, count: int, n_out: int, n_in: int) -> "Experts":
        """One projection of all experts; they must agree on bf16 or INT4."""
        entries = [self._linear(f"experts.{e}.{name}", n_out, n_in, "experts") for e in range(count)]
        kinds = {len(e) for e in entries}
        if len(kinds) > 1:
            odd = next(e for e in range(count) if len(entries[e]) != len(entries[0]))
            raise CheckpointError(
                f"{self.prefix}experts.{odd}.{name}: is {'INT4' if len(entries[odd]) == 2 else 'bf16'}, expected the "
                f"format of expert 0, {'INT4' if len(entries[0]) == 2 else 'bf16'}"
            )
        experts = Experts(self.checkpoint, entries)
        if self.upload is not None and not self.experts_on_host:
            experts.weights = experts.placed(self.upload)
        return experts

    def _linear(self, name: str, n_out: int, n_in: int, kind: str) -> tuple[Entry, ...]:
        if f"{self.prefix}{name}.weight_packed" not in self.checkpoint:
            return (self._checked(f"{name}.weight", (n_out, n_in), "BF16", kind),)
        packed = self._checked(f"{name}.weight_packed", (n_out, n_in // 8), "I32", kind)
        return packed, self._checked(f"{name}.weight_scale", (n_out, n_in // 32), "BF16", kind)

    def _checked(self, name: str, shape: tuple[int, ...], dtype: str, kind: str) -> Entry:
        entry = self.checkpoint.entry(self.prefix + name, shape, dtype)
        self.read_bytes[kind] += entry.nbytes
        self.room[kind] += gpu.Upload.room(entry.nbytes)
        return entry


class Experts:
    """One projection of all experts of a layer. They are checked at load; what costs time is done at the first use.

    entries: of each expert (weight,) or (weight_packed, weight_scale).
    """

    def __init__(self, checkpoint: Checkpoint, entries: list[tuple[Entry, ...]]):
        self.checkpoint, self.entries = checkpoint, entries
        ops.ExpertWeights(*([checkpoint.view(entry)] for entry in entries[0]))  # the shape is that of all

    @cached_property
    def weights(self) -> ops.ExpertWeights:
        """Where they lie in the mapped files."""
        return self.placed(lambda view: view)

    def placed(self, place: Callable) -> ops.ExpertWeights:
        """place(view): the array to be used, of each view in the order of the experts."""
        arrays = [[place(self.checkpoint.view(entry)) for entry in expert] for expert in self.entries]
        return ops.ExpertWeights(*zip(*arrays, strict=True))
