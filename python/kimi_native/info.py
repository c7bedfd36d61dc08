"""What a checkpoint is: parameters and bytes by component, the cost of a token, what does not fit its config."""

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_native.checkpoint import DTYPES, Checkpoint, expected_tensors, mismatch
from kimi_native.config import Config, TextConfig

_SHOWN = 5  # tensors named per list

# What a name contains, in the order in which it decides.
_COMPONENTS = {
    "vision_tower.": "vision tower",
    "mm_projector.": "projector",
    "model.embed_tokens.": "embed_tokens",
    "lm_head.": "lm_head",
    ".self_attn.": "attention",
    "norm.": "layer norms",
    ".mlp.experts.": "routed experts",
    ".mlp.shared_experts.": "shared experts",
    ".mlp.gate.": "routers",
    ".mlp.": "dense MLP",
}
_UNEXPECTED = "unexpected"
_NOT_PER_TOKEN = ("vision tower", "projector", "embed_tokens")
_PARAMETERS_PER_ELEMENT = {"weight_packed": 8, "weight_scale": 0, "weight_shape": 0}


@dataclass(frozen=True)
class Component:
    """A part of the model. An INT4 word counts as 8 parameters, its scales and shapes as none."""

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """What `describe` found.

    `active_parameters` are those that one decoded token uses: lm_head and num_experts_per_tok routed experts
    are counted, the embedding table and vision are not. `bytes_per_token` are the weight bytes that it reads,
    counted likewise. `missing` and `unexpected` are tensor names, `mismatched` a sentence for each wrong
    shape or dtype.
    """

    folder: Path
    config: Config
    has_weights: bool
    num_files: int
    num_tensors: int
    components: tuple[Component, ...]
    active_parameters: int
    bytes_per_token: int
    cache_bytes_per_token: int
    quantization: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components)


def describe(folder, progress=None) -> Description:
    """Describe the checkpoint in `folder`; without any safetensors file, the layout that config.json asks for.

    Raises ConfigError or CheckpointError for a malformed file. Tensors that are missing, unexpected or of
    another shape or dtype than the config asks for are no error here, they are listed. progress(done, total) is
    called after each file's header.
    """
    folder = Path(folder)
    config = Config.from_folder(folder)
    text = config.text_config
    has_weights = any(folder.glob("*.safetensors*"))
    if has_weights:
        checkpoint = Checkpoint(folder, progress)
        expected = _expected_beside(config, checkpoint)
        found = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.entries.items()}
        both = [name for name in expected if name in found]
        problems = [mismatch(name, checkpoint.entries[name], *expected[name]) for name in both]
    else:
        expected = found = expected_tensors(config, text.quantization_config is not None)
        problems = []
    read = _components({n: spec for n, spec in expected.items() if not n.endswith(".weight_shape")}, expected)
    return Description(
        folder=folder,
        config=config,
        has_weights=has_weights,
        num_files=len(checkpoint.files) if has_weights else 0,
        num_tensors=len(found),
        components=_components(found, expected),
        active_parameters=_per_token(text, read, "parameters"),
        bytes_per_token=_per_token(text, read, "bytes"),
        cache_bytes_per_token=2 * text.num_hidden_layers * text.cache_width,
        quantization=_quantization(found),
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected),
        mismatched=tuple(problem for problem in problems if problem),
    )


def _expected_beside(config: Config, checkpoint: Checkpoint) -> dict:
    """The expected tensors, where each expert matrix is INT4 or bf16 by what the checkpoint holds for it."""
    packed = expected_tensors(config, True, checkpoint.prefix)
    plain = expected_tensors(config, False, checkpoint.prefix)
    bf16 = config.text_config.quantization_config is None
    result = {}
    for name, spec in (packed | plain).items():
        module, _, kind = name.rpartition(".")
        if ".mlp.experts." in name:
            unpacked = f"{module}.weight_packed" not in checkpoint
            if (unpacked and (bf16 or f"{module}.weight" in checkpoint)) != (kind == "weight"):
                continue
        result[name] = spec
    return result


def _components(tensors: dict, expected: dict) -> tuple[Component, ...]:
    names = [*_COMPONENTS.values(), _UNEXPECTED]
    parameters, sizes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for name, (shape, dtype) in tensors.items():
        component = _UNEXPECTED
        if name in expected:
            component = next(label for part, label in _COMPONENTS.items() if part in name)
        elements = math.prod(shape)
        sizes[component] += elements * DTYPES[dtype].itemsize
        parameters[component] += elements * _PARAMETERS_PER_ELEMENT.get(name.rpartition(".")[2], 1)
    return tuple(Component(name, parameters[name], sizes[name]) for name in names if sizes[name])


def _per_token(text: TextConfig, components: tuple[Component, ...], what: str) -> int:
    """Parameters or bytes that a decoded token uses: num_experts_per_tok routed experts and all of the rest."""
    total = 0
    for component in components:
        count = getattr(component, what)
        if component.name == "routed experts":
            count = count * text.num_experts_per_tok // text.n_routed_experts
        if component.name not in _NOT_PER_TOKEN:
            total += count
    return total


def _quantization(tensors: dict) -> str:
    experts = [name.rpartition(".")[2] for name in tensors if ".mlp.experts." in name]
    packed, plain = experts.count("weight_packed"), experts.count("weight")
    if not packed:
        return "none"
    return f"INT4 in groups of 32: {packed:,} of {packed + plain:,} routed expert matrices"


def show(description: Description) -> None:
    """Print the description as tables on standard output."""
    parts = Table("component", "parameters", "bytes", "GiB")
    for column in parts.columns[1:]:
        column.justify = "right"
    for component in description.components:
        parts.add_row(component.name, f"{component.parameters:,}", *_size(component.bytes))
    parts.add_section()
    parts.add_row("total", f"{description.parameters:,}", *_size(description.bytes))
    facts = Table.grid(padding=(0, 2))
    for label, fact in _facts(description).items():
        facts.add_row(label, escape(fact))
    Console().print(facts, parts)


def _size(count: int) -> tuple[str, str]:
    return f"{count:,}", f"{count / 2**30:,.3f}"


def _facts(d: Description) -> dict[str, str]:
    text = d.config.text_config
    dense = text.first_k_dense_replace
    stored = f"{d.num_tensors:,} tensors in {d.num_files} files"
    context = text.max_position_embeddings
    cache = d.cache_bytes_per_token
    active = "with lm_head, without embedding table and vision"
    return {
        "folder": str(d.folder),
        "model": f"{d.config.model_type}, {', '.join(d.config.architectures)}",
        "layers": f"{text.num_hidden_layers}: {dense} dense, {text.num_hidden_layers - dense} MoE",
        "experts": f"{text.num_experts_per_tok} of {text.n_routed_experts}, {text.n_shared_experts} shared",
        "quantization": d.quantization,
        "weights": stored if d.has_weights else "no safetensors file; the figures are those of config.json",
        "active parameters": f"{d.active_parameters:,} per token, {active}",
        "weights read": f"{d.bytes_per_token:,} bytes ({_size(d.bytes_per_token)[1]} GiB) per decoded token",
        "cache (bf16)": f"{cache:,} bytes per token, {_size(cache * context)[1]} GiB at full context",
        "context": f"{context:,} tokens",
        "images, video": _vision(d),
        "missing": _list(d.missing),
        "unexpected": _list(d.unexpected),
        "wrong": _list(d.mismatched),
    }


def _vision(d: Description) -> str:
    vision = d.config.vision_config
    if vision is None:
        return "none: the config has no vision_config"
    if not any(component.name == "vision tower" for component in d.components):
        return "none: the checkpoint has no vision_tower tensors"
    layers, pixels = (
        vision.vt_num_hidden_layers,
        " x ".join(str(n * vision.patch_size) for n in vision.merge_kernel_size),
    )
    return f"{layers} layers of width {vision.vt_hidden_size:,}, a token for {pixels} pixels"


def _list(findings: tuple[str, ...]) -> str:
    """The count and the first few, one a line."""
    more = ["..."] if len(findings) > _SHOWN else []
    return "\n".join([f"{len(findings):,}", *findings[:_SHOWN], *more]) if findings else "none"
