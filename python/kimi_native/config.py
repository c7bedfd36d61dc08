"""config.json as frozen dataclasses.

Fields carry the keys of config.json that matter to inference. A missing key, a wrong type or a value that
this package cannot honour is a ConfigError; every other key (training, generation and HF defaults) is
ignored. Source: config.json of moonshotai/Kimi-K2.5 and of its text-only relatives.
"""

import dataclasses
import json
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
_AT_LEAST_ZERO = {"at_least_zero": True}

# Keys with one supported value. A file may leave them out where that value is the default of the reference.
_TEXT_FIXED = {
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
_VISION_FIXED = {
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
}
_QUANTIZATION_WEIGHTS_FIXED = {
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
    "num_bits": 4,
    "group_size": 32,
}


class ConfigError(ValueError):
    """A config.json that cannot be used; the message names file, key, what was found and what is expected."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters (`rope_scaling`, or `rope_parameters` in newer files)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = field(default=1.0, metadata=_AT_LEAST_ZERO)
    mscale_all_dim: float = field(default=0.0, metadata=_AT_LEAST_ZERO)


@dataclass(frozen=True)
class QuantizationConfig:
    """The one supported kind: compressed-tensors `pack-quantized`, symmetric INT4 in groups of 32 inputs."""

    quant_method: str
    format: str
    num_bits: int
    group_size: int


@dataclass(frozen=True)
class TextConfig:
    """The text model. `rope_scaling` is None without YaRN, `quantization_config` is None for bf16 weights.

    `mla_norm_eps` is the epsilon of q_a_layernorm and kv_a_layernorm; references disagree on it (1e-6 in
    some), so it is a field of its own that defaults to rms_norm_eps.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    first_k_dense_replace: int = field(metadata=_AT_LEAST_ZERO)
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    n_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    mla_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    quantization_config: QuantizationConfig | None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values in the latent cache per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT and the patchmerger projector, under the names on disk."""

    patch_size: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    init_pos_emb_time: int
    vt_hidden_size: int
    vt_num_hidden_layers: int
    vt_num_attention_heads: int
    vt_intermediate_size: int
    mm_hidden_size: int
    text_hidden_size: int
    projector_ln_eps: float
    merge_kernel_size: tuple[int, int] = (2, 2)


@dataclass(frozen=True)
class Config:
    """A whole config.json; `vision_config` and `media_placeholder_token_id` are None for a text-only model.

    `eos_token_id` is the file's. The model ends a turn with <|im_end|>, which the tokenizer knows.
    """

    model_type: str
    architectures: tuple[str, ...]
    eos_token_id: int = field(metadata=_AT_LEAST_ZERO)
    text_config: TextConfig
    vision_config: VisionConfig | None
    media_placeholder_token_id: int | None = field(metadata=_AT_LEAST_ZERO)

    @classmethod
    def from_folder(cls, path, **overrides) -> "Config":
        """Read `path`/config.json; `overrides` replace keys of the text model, e.g. mla_norm_eps=1e-6.

        Raises ConfigError for an unusable file and TypeError for an override that is no field of TextConfig.
        """
        file = Path(path) / "config.json"
        try:
            values = json.loads(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}), expected a config.json") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not JSON ({error}), expected a JSON object") from error
        return cls.from_dict(values, source=str(file), **overrides)

    @classmethod
    def from_dict(cls, values: dict, *, source: str = "config.json", **overrides) -> "Config":
        """The Config of a parsed config.json; `source` names the file in errors. Errors as in from_folder."""
        allowed = {f.name for f in dataclasses.fields(TextConfig)} - {"model_type", "quantization_config"}
        for name in overrides:
            if name not in allowed:
                raise TypeError(f"override {name!r} is not a key of the text model, expected one of {sorted(allowed)}")
        top = _Section(values, f"{source} with overrides" if overrides else source)
        model_type = top.get("model_type", str)
        if model_type == "kimi_k25":
            text, vision = top.section("text_config"), top.section("vision_config")
        elif model_type in _TEXT_MODEL_TYPES:
            text, vision = top, None
        else:
            raise top.error("model_type", f"one of {['kimi_k25', *_TEXT_MODEL_TYPES]}")
        quantization = next((s for s in (text, top) if s.values.get("quantization_config") is not None), None)
        text_config = _read_text(text, quantization, overrides)
        config = cls(
            architectures=_read_architectures(top),
            text_config=text_config,
            vision_config=vision and _read_vision(vision, text_config),
            **top.read(cls, skip=("architectures", "text_config", "vision_config")),
        )
        for key in ("eos_token_id", "media_placeholder_token_id"):
            if (getattr(config, key) or 0) >= text_config.vocab_size:
                raise top.error(key, f"an id below vocab_size {text_config.vocab_size}")
        return config


_REQUIRED = object()
_JSON_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class _Section:
    """One JSON object of a file, with the path of keys that leads to it."""

    values: Any
    source: str
    prefix: str = ""

    def __post_init__(self):
        if not isinstance(self.values, dict):
            where = self.prefix.rstrip(".") or "the file"
            raise ConfigError(f"{self.source}: {where} is {self.values!r:.80}, expected an object")

    def error(self, key: str, expected: str) -> ConfigError:
        found = f"is {self.values[key]!r:.80}" if key in self.values else "is missing"
        return ConfigError(f"{self.source}: {self.prefix}{key} {found}, expected {expected}")

    def section(self, key: str) -> "_Section":
        if key not in self.values:
            raise self.error(key, "an object")
        return _Section(self.values[key], self.source, f"{self.prefix}{key}.")

    def get(self, key: str, kind: type, default: Any = _REQUIRED, at_least_zero: bool = False) -> Any:
        """The value of `key`. Numbers are positive (or zero) and fit int32 or float64; 64 may be 64.0."""
        if key not in self.values and default is not _REQUIRED:
            return default
        value = self.values.get(key)
        if kind not in (int, float):
            if not isinstance(value, kind):
                raise self.error(key, _JSON_NAMES[kind])
            return value
        limit = 2**31 - 1 if kind is int else sys.float_info.max
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not (0 <= value <= limit) or (value == 0 and not at_least_zero):
            raise self.error(key, f"{_JSON_NAMES[kind]} {'>= 0' if at_least_zero else '> 0'}")
        return kind(value)

    def read(self, cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields of a dataclass by their annotations; for `X | None` the key may be null or missing."""
        result = {}
        for f in dataclasses.fields(cls):
            if f.name in skip:
                continue
            options = typing.get_args(f.type)
            if type(None) in options and self.values.get(f.name) is None:
                result[f.name] = None
                continue
            default = _REQUIRED if f.default is dataclasses.MISSING else f.default
            result[f.name] = self.get(f.name, options[0] if options else f.type, default, **f.metadata)
        return result

    def check_fixed(self, fixed: dict[str, Any]) -> None:
        """Keys that have one supported value, where present; true does not pass for 1."""
        for key, expected in fixed.items():
            found = self.values.get(key, expected)
            if found != expected or isinstance(found, bool) != isinstance(expected, bool):
                raise self.error(key, json.dumps(expected))


def _read_architectures(top: _Section) -> tuple[str, ...]:
    names = top.get("architectures", list)
    if not names or not all(isinstance(name, str) for name in names):
        raise top.error("architectures", "a list of strings")
    return tuple(names)


def _read_text(text: _Section, quantization: _Section | None, overrides: dict[str, Any]) -> TextConfig:
    if text.values.get("q_lora_rank", 0) is None:
        raise text.error("q_lora_rank", "an integer > 0 (models without a query latent, such as Moonlight, do not run)")
    text.check_fixed(_TEXT_FIXED)
    defaults = {"mla_norm_eps": text.values.get("rms_norm_eps")}
    values = {**defaults, **text.values, **_read_rope(text), **overrides}
    text = _Section(values, text.source, text.prefix)
    if not isinstance(values["rope_scaling"], RopeScaling | None):
        raise text.error("rope_scaling", "None or a RopeScaling")
    config = TextConfig(
        rope_scaling=values["rope_scaling"],
        quantization_config=quantization and _read_quantization(quantization.section("quantization_config")),
        **text.read(TextConfig, skip=("rope_scaling", "quantization_config")),
    )
    _check_text(text, config)
    return config


def _check_text(text: _Section, config: TextConfig) -> None:
    if config.n_group != 1:
        raise text.error("n_group", "1 (routing in expert groups does not run)")
    if config.first_k_dense_replace > config.num_hidden_layers:
        raise text.error("first_k_dense_replace", f"at most num_hidden_layers {config.num_hidden_layers}")
    if config.num_experts_per_tok > config.n_routed_experts:
        raise text.error("num_experts_per_tok", f"at most n_routed_experts {config.n_routed_experts}")
    if config.qk_rope_head_dim % 2:
        raise text.error("qk_rope_head_dim", "an even number")
    if config.quantization_config is not None:
        for key in ("hidden_size", "moe_intermediate_size"):
            if getattr(config, key) % config.quantization_config.group_size:
                raise text.error(key, f"a multiple of group_size {config.quantization_config.group_size}")


def _read_rope(text: _Section) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling: rope_scaling + rope_theta, or rope_parameters."""
    spellings = [key for key in ("rope_scaling", "rope_parameters") if text.values.get(key) is not None]
    found = [_read_rope_scaling(text.section(key)) for key in spellings]
    if len(found) == 2 and found[0] != found[1]:
        raise text.error("rope_parameters", "the same values as rope_scaling")
    result = {"rope_scaling": found[0] if found else None}
    if "rope_parameters" in spellings and "rope_theta" in text.values["rope_parameters"]:
        inner = text.section("rope_parameters")
        result["rope_theta"] = inner.get("rope_theta", float)
        if text.get("rope_theta", float, result["rope_theta"]) != result["rope_theta"]:
            raise inner.error("rope_theta", f"the value of the outer rope_theta, {text.values['rope_theta']}")
    return result


def _read_rope_scaling(rope: _Section) -> RopeScaling | None:
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.get(key, str)
    if kind == "default":
        return None
    if kind != "yarn":
        raise rope.error(key, "yarn or default")
    rope.check_fixed({"truncate": True, "attention_factor": None})
    return RopeScaling(**rope.read(RopeScaling))


def _read_quantization(quantization: _Section) -> QuantizationConfig:
    method = quantization.get("quant_method", str)
    if method != "compressed-tensors":
        raise quantization.error("quant_method", "compressed-tensors: only bf16 and INT4 pack-quantized weights run")
    quantization.check_fixed({"format": "pack-quantized", "kv_cache_scheme": None})
    groups = quantization.section("config_groups")
    if not groups.values:
        raise quantization.error("config_groups", "at least one group")
    for name in groups.values:
        group = groups.section(name)
        group.check_fixed({"format": "pack-quantized", "input_activations": None, "output_activations": None})
        weights = group.section("weights")
        weights.check_fixed(_QUANTIZATION_WEIGHTS_FIXED)
    return QuantizationConfig(
        quant_method=method,
        format=quantization.get("format", str),
        num_bits=weights.get("num_bits", int),
        group_size=weights.get("group_size", int),
    )


def _read_vision(vision: _Section, text_config: TextConfig) -> VisionConfig:
    vision.check_fixed(_VISION_FIXED)
    config = VisionConfig(**vision.read(VisionConfig, skip=("merge_kernel_size",)))
    if config.text_hidden_size != text_config.hidden_size:
        raise vision.error("text_hidden_size", f"hidden_size {text_config.hidden_size} of text_config")
    if config.mm_hidden_size != config.vt_hidden_size:
        raise vision.error("mm_hidden_size", f"vt_hidden_size {config.vt_hidden_size}")
    if config.vt_hidden_size % (4 * config.vt_num_attention_heads):
        raise vision.error(
            "vt_hidden_size", f"a multiple of 4 x vt_num_attention_heads {config.vt_num_attention_heads}"
        )
    return config
