import json
import re

import pytest
from kimi_native.config import Config, ConfigError, QuantizationConfig, RopeScaling
from kimi_native.tiny_config import preset_config, published_config

DELETE = object()


def changed(config, path, value):
    """The config with the key at a dotted path set to a value, or deleted."""
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    if value is DELETE:
        del section[key]
    else:
        section[key] = value
    return config


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_published_config(tmp_path):
    config = Config.from_folder(write(tmp_path, published_config()))
    text, vision = config.text_config, config.vision_config
    assert config.model_type == "kimi_k25"
    assert config.architectures == ("KimiK25ForConditionalGeneration",)
    assert (config.eos_token_id, config.media_placeholder_token_id) == (163585, 163605)
    assert (text.model_type, text.vocab_size, text.hidden_size) == ("kimi_k2", 163840, 7168)
    assert (text.num_hidden_layers, text.first_k_dense_replace, text.num_attention_heads) == (61, 1, 64)
    assert (text.q_lora_rank, text.kv_lora_rank) == (1536, 512)
    assert (text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim) == (128, 64, 128)
    assert (text.qk_head_dim, text.cache_width) == (192, 576)
    assert (text.intermediate_size, text.moe_intermediate_size) == (18432, 2048)
    assert (text.n_routed_experts, text.num_experts_per_tok, text.n_shared_experts) == (384, 8, 1)
    assert (text.norm_topk_prob, text.routed_scaling_factor) == (True, 2.827)
    assert (text.rms_norm_eps, text.mla_norm_eps) == (1e-5, 1e-5)
    assert (text.max_position_embeddings, text.rope_theta) == (262144, 50000.0)
    assert text.rope_scaling == RopeScaling(64.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert text.quantization_config == QuantizationConfig("compressed-tensors", "pack-quantized", 4, 32)
    assert (vision.vt_num_hidden_layers, vision.vt_hidden_size, vision.vt_num_attention_heads) == (27, 1152, 16)
    assert (vision.vt_intermediate_size, vision.mm_hidden_size, vision.text_hidden_size) == (4304, 1152, 7168)
    assert (vision.init_pos_emb_height, vision.init_pos_emb_width, vision.init_pos_emb_time) == (64, 64, 4)
    assert (vision.patch_size, vision.merge_kernel_size, vision.projector_ln_eps) == (14, (2, 2), 1e-5)


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_text_only_layout(model_type):
    config = Config.from_dict(changed(preset_config("tiny-k2"), "model_type", model_type))
    assert config.model_type == config.text_config.model_type == model_type
    assert config.vision_config is None and config.media_placeholder_token_id is None
    assert config.text_config.rope_scaling.beta_fast == 1.0
    assert config.text_config.quantization_config.group_size == 32


def test_quantization_config_at_the_top_of_a_vision_config():
    values = published_config()
    values["quantization_config"] = values["text_config"].pop("quantization_config")
    assert Config.from_dict(values) == Config.from_dict(published_config())
    del values["quantization_config"]
    assert Config.from_dict(values).text_config.quantization_config is None


def newer_rope(values):
    text = values["text_config"]
    scaling = text.pop("rope_scaling")
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": scaling.pop("type"), **scaling}
    return values


def test_rope_parameters_mean_the_same_as_rope_scaling():
    assert Config.from_dict(newer_rope(published_config())) == Config.from_dict(published_config())
    both = published_config()
    both["text_config"] |= newer_rope(published_config())["text_config"]
    assert Config.from_dict(both) == Config.from_dict(published_config())


def test_rope_spellings_that_disagree():
    both = published_config()
    both["text_config"] |= newer_rope(published_config())["text_config"]
    with pytest.raises(ConfigError, match=r"rope_parameters is .*, expected the same values as rope_scaling"):
        Config.from_dict(changed(both, "text_config.rope_scaling.factor", 32.0))
    outer = changed(newer_rope(published_config()), "text_config.rope_theta", 10000.0)
    with pytest.raises(ConfigError, match=r"rope_parameters\.rope_theta is 50000\.0, expected .* 10000\.0"):
        Config.from_dict(outer)


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}, DELETE])
def test_no_yarn(scaling):
    config = Config.from_dict(changed(published_config(), "text_config.rope_scaling", scaling))
    assert config.text_config.rope_scaling is None


def test_yarn_defaults():
    scaling = {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096}
    config = Config.from_dict(changed(published_config(), "text_config.rope_scaling", scaling))
    assert config.text_config.rope_scaling == RopeScaling(32.0, 4096, 32.0, 1.0, 1.0, 0.0)


def test_integers_stand_for_numbers_and_unknown_keys_are_ignored():
    values = changed(published_config(), "text_config.rope_theta", 50000)
    values["text_config"] |= {"temperature": "hot", "num_beams": -1}
    theta = Config.from_dict(values).text_config.rope_theta
    assert theta == 50000.0 and isinstance(theta, float)


def test_mla_norm_eps_of_the_file():
    config = Config.from_dict(changed(published_config(), "text_config.mla_norm_eps", 1e-6))
    assert (config.text_config.mla_norm_eps, config.text_config.rms_norm_eps) == (1e-6, 1e-5)


def test_overrides(tmp_path):
    folder = write(tmp_path, newer_rope(published_config()))
    config = Config.from_folder(folder, mla_norm_eps=1e-6, num_hidden_layers=2, rope_theta=1e4, rope_scaling=None)
    text = config.text_config
    assert (text.mla_norm_eps, text.num_hidden_layers, text.rope_theta) == (1e-6, 2, 1e4)
    assert text.rope_scaling is None and text.rms_norm_eps == 1e-5
    scaling = RopeScaling(8.0, 64)
    assert Config.from_folder(folder, rope_scaling=scaling).text_config.rope_scaling == scaling


@pytest.mark.parametrize("name", ["mla_norm_epsilon", "vt_hidden_size", "model_type", "quantization_config"])
def test_unknown_override(tmp_path, name):
    with pytest.raises(TypeError, match=f"{name}.*expected one of.*mla_norm_eps"):
        Config.from_folder(write(tmp_path, published_config()), **{name: 1})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"hidden_size": "wide"}, r"text_config\.hidden_size is 'wide', expected an integer > 0"),
        ({"rope_scaling": 2.0}, r"text_config\.rope_scaling is 2\.0, expected None or a RopeScaling"),
        ({"num_experts_per_tok": 385}, r"num_experts_per_tok is 385, expected at most n_routed_experts 384"),
    ],
)
def test_bad_override(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=r"config\.json with overrides: .*" + message):
        Config.from_folder(write(tmp_path, published_config()), **overrides)


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("model_type", "kimi_vl", "one of .*kimi_k25.*kimi_k2.*deepseek_v3"),
        ("model_type", DELETE, "a string"),
        ("text_config", DELETE, "an object"),
        ("text_config", [1], "an object"),
        ("vision_config", None, "an object"),
        ("vision_config", DELETE, "an object"),
        ("architectures", DELETE, "a list"),
        ("architectures", [], "a list of strings"),
        ("architectures", [3], "a list of strings"),
        ("eos_token_id", -1, "an integer >= 0"),
        ("eos_token_id", 163840, "an id below vocab_size 163840"),
        ("eos_token_id", [163585, 163586], "an integer >= 0"),
        ("media_placeholder_token_id", 163840, "an id below vocab_size 163840"),
        ("media_placeholder_token_id", "pad", "an integer >= 0"),
        ("text_config.hidden_size", DELETE, "an integer > 0"),
        ("text_config.hidden_size", None, "an integer > 0"),
        ("text_config.hidden_size", 0, "an integer > 0"),
        ("text_config.hidden_size", -7168, "an integer > 0"),
        ("text_config.hidden_size", 7168.0, "an integer > 0"),
        ("text_config.hidden_size", "7168", "an integer > 0"),
        ("text_config.hidden_size", True, "an integer > 0"),
        ("text_config.hidden_size", 2**31, "an integer > 0"),
        ("text_config.hidden_size", 7170, "a multiple of group_size 32"),
        ("text_config.moe_intermediate_size", 2040, "a multiple of group_size 32"),
        ("text_config.first_k_dense_replace", -1, "an integer >= 0"),
        ("text_config.first_k_dense_replace", 62, "at most num_hidden_layers 61"),
        ("text_config.num_experts_per_tok", 385, "at most n_routed_experts 384"),
        ("text_config.n_shared_experts", None, "an integer > 0"),
        ("text_config.qk_rope_head_dim", 63, "an even number"),
        ("text_config.q_lora_rank", None, "an integer > 0 .*Moonlight"),
        ("text_config.norm_topk_prob", 1, "true or false"),
        ("text_config.rms_norm_eps", DELETE, "a number > 0"),
        ("text_config.rms_norm_eps", float("nan"), "a number > 0"),
        ("text_config.rms_norm_eps", 0, "a number > 0"),
        ("text_config.rope_theta", float("inf"), "a number > 0"),
        ("text_config.rope_theta", 10**400, "a number > 0"),
        ("text_config.rope_theta", DELETE, "a number > 0"),
        ("text_config.n_group", 8, "1 "),
        ("text_config.n_group", DELETE, "an integer > 0"),
        ("text_config.topk_group", 4, "1"),
        ("text_config.topk_method", "greedy", '"noaux_tc"'),
        ("text_config.scoring_func", "softmax", '"sigmoid"'),
        ("text_config.hidden_act", "gelu", '"silu"'),
        ("text_config.attention_bias", True, "false"),
        ("text_config.attention_bias", 0, "false"),
        ("text_config.moe_layer_freq", 2, "1"),
        ("text_config.moe_layer_freq", True, "1"),
        ("text_config.num_nextn_predict_layers", 1, "0"),
        ("text_config.tie_word_embeddings", True, "false"),
        ("text_config.rope_scaling", "yarn", "an object"),
        ("text_config.rope_scaling.type", "linear", "yarn or default"),
        ("text_config.rope_scaling.type", DELETE, "a string"),
        ("text_config.rope_scaling.factor", DELETE, "a number > 0"),
        ("text_config.rope_scaling.factor", "64", "a number > 0"),
        ("text_config.rope_scaling.mscale_all_dim", -1.0, "a number >= 0"),
        ("text_config.rope_scaling.original_max_position_embeddings", 0, "an integer > 0"),
        ("text_config.rope_scaling.truncate", False, "true"),
        ("text_config.rope_scaling.attention_factor", 1.0, "null"),
        ("text_config.quantization_config", "int4", "an object"),
        ("text_config.quantization_config.quant_method", "fp8", "compressed-tensors: only bf16 and INT4"),
        ("text_config.quantization_config.format", "marlin-24", '"pack-quantized"'),
        ("text_config.quantization_config.format", DELETE, "a string"),
        ("text_config.quantization_config.kv_cache_scheme", {"num_bits": 8}, "null"),
        ("text_config.quantization_config.config_groups", {}, "at least one group"),
        ("text_config.quantization_config.config_groups.group_0", 4, "an object"),
        ("text_config.quantization_config.config_groups.group_0.format", "int-quantized", '"pack-quantized"'),
        ("text_config.quantization_config.config_groups.group_0.weights", None, "an object"),
        ("text_config.quantization_config.config_groups.group_0.weights.num_bits", 8, "4"),
        ("text_config.quantization_config.config_groups.group_0.weights.num_bits", DELETE, "an integer > 0"),
        ("text_config.quantization_config.config_groups.group_0.weights.group_size", 128, "32"),
        ("text_config.quantization_config.config_groups.group_0.weights.symmetric", False, "true"),
        ("text_config.quantization_config.config_groups.group_0.weights.type", "float", '"int"'),
        ("text_config.quantization_config.config_groups.group_0.weights.strategy", "channel", '"group"'),
        ("text_config.quantization_config.config_groups.group_0.weights.actorder", "group", "null"),
        ("text_config.quantization_config.config_groups.group_0.input_activations", {"num_bits": 8}, "null"),
        ("vision_config.vt_hidden_size", DELETE, "an integer > 0"),
        ("vision_config.mm_hidden_size", 1024, "vt_hidden_size 1152"),
        ("vision_config.text_hidden_size", 4096, "hidden_size 7168 of text_config"),
        ("vision_config.mm_projector_type", "patchmergerv2", '"patchmerger"'),
        ("vision_config.merge_type", "mean", '"sd2_tpool"'),
        ("vision_config.merge_kernel_size", [4, 4], r"\[2, 2\]"),
        ("vision_config.pos_emb_type", "rope", '"divided_fixed"'),
        ("vision_config.video_attn_type", "frame", '"spatial_temporal"'),
        ("vision_config.projector_hidden_act", "relu", '"gelu"'),
        ("vision_config.projector_ln_eps", "small", "a number > 0"),
    ],
)
def test_refused_values(tmp_path, path, value, expected):
    folder = write(tmp_path, changed(published_config(), path, value))
    found = "is missing" if value is DELETE else f"is {value!r:.70}"
    with pytest.raises(ConfigError) as error:
        Config.from_folder(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'config.json'}: {path} {found}"), message
    assert re.search(f"expected {expected}", message), message


def test_vision_heads_must_divide():
    with pytest.raises(
        ConfigError, match="vt_hidden_size is 1152, expected a multiple of 4 x vt_num_attention_heads 5"
    ):
        Config.from_dict(changed(published_config(), "vision_config.vt_num_attention_heads", 5))


def test_fp8_checkpoint_is_refused_by_name():
    values = preset_config("tiny-k2")
    values["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    with pytest.raises(ConfigError, match="quant_method is 'fp8', expected .*only bf16 and INT4 pack-quantized"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1]", r"the file is \[1\], expected an object"),
        (b"{}", "model_type is missing, expected a string"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        Config.from_folder(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="config.json: cannot be read .*, expected a config.json"):
        Config.from_folder(tmp_path)


def test_values_without_file():
    with pytest.raises(ConfigError, match="config.json: the file is None, expected an object"):
        Config.from_dict(None)
