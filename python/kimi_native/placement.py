"""Which weights lie where, and whether they fit."""

from kimi_native import ops
from kimi_native.checkpoint import Checkpoint, CheckpointError
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


def workspace_bytes(config: TextConfig, tokens: int, keys: int) -> int:
    """About what a chunk of a prompt takes on the GPU beside weights and cache, its last logits included."""
    c = config
    attention = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * 2
    expanded = (c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) + c.cache_width) * 2
    dense = 3 * c.intermediate_size * 2
    routed = c.num_experts_per_tok * (c.hidden_size * (2 + 4) + 3 * c.moe_intermediate_size * 2)
    activations = 6 * c.hidden_size * 2 + attention + max(dense, routed)
    return tokens * activations + keys * expanded + c.vocab_size * 4


class Weights:
    """The tensors under one prefix of a checkpoint: weights / "mlp" goes down one name.

    With an upload they are placed on the GPU, the routed experts only unless they stay on the host. read_bytes and room
    add up what was asked for, dense and experts: the bytes themselves, and what they take in an upload. activations:
    what INT4 experts that stay on the host are multiplied by. dense: "int8" rounds what `linear` gives out, experts
    excepted.
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
        self.read_bytes, self.room = {"dense": 0, "experts": 0}, {"dense": 0, "experts": 0}

    def __truediv__(self, name: str) -> "Weights":
        prefix = f"{self.prefix}{name}."
        below = Weights(self.checkpoint, prefix, self.upload, self.experts_on_host, self.activations, self.dense)
        below.read_bytes, below.room = self.read_bytes, self.room
        return below

    def tensor(self, name: str, *shape: int, dtype: str = "BF16", kind: str = "dense"):
        view = self.checkpoint.tensor(self.prefix + name, shape, dtype)
        self.read_bytes[kind] += view.nbytes
        self.room[kind] += gpu.Upload.room(view.nbytes)
        if self.upload is None or (kind == "experts" and self.experts_on_host):
            return view
        return self.upload(view)

    def linear(self, name: str, n_out: int, n_in: int, kind: str = "dense") -> tuple:
        """(weight,) in bf16, (weight_packed, weight_scale) in INT4 iff weight_packed exists, or (weight, weight_scale)
        rounded to int8.
        """
        if f"{self.prefix}{name}.weight_packed" not in self.checkpoint:
            if kind == "dense" and self.dense == "int8":
                return self._rounded(f"{self.prefix}{name}.weight", n_out, n_in)
            return (self.tensor(f"{name}.weight", n_out, n_in, kind=kind),)
        packed = self.tensor(f"{name}.weight_packed", n_out, n_in // 8, dtype="I32", kind=kind)
        return packed, self.tensor(f"{name}.weight_scale", n_out, n_in // 32, kind=kind)

    def _rounded(self, name: str, n_out: int, n_in: int) -> tuple:
        if n_in % GROUP:
            raise CheckpointError(f'{name}: has {n_in} inputs, expected a multiple of {GROUP} for dense="int8"')
        arrays = ops.quantize_int8(self.checkpoint.tensor(name, (n_out, n_in), "BF16"))
        self.read_bytes["dense"] += sum(array.nbytes for array in arrays)
        return arrays

    def experts(self, name: str, count: int, n_out: int, n_in: int) -> ops.ExpertWeights:
        """One projection of all experts; they must agree on bf16 or INT4."""
        arrays = [self.linear(f"experts.{e}.{name}", n_out, n_in, kind="experts") for e in range(count)]
        kinds = {len(a) for a in arrays}
        if len(kinds) > 1:
            odd = next(e for e in range(count) if len(arrays[e]) != len(arrays[0]))
            raise CheckpointError(
                f"{self.prefix}experts.{odd}.{name}: is {'INT4' if len(arrays[odd]) == 2 else 'bf16'}, expected the "
                f"format of expert 0, {'INT4' if len(arrays[0]) == 2 else 'bf16'}"
            )
        return ops.ExpertWeights(*zip(*arrays, strict=True))
