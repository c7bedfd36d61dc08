import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from kimi_native.checkpoint import Checkpoint, expected_tensors
from kimi_native.config import Config
from kimi_native.make_tiny import FULL_WIDTH_LIVE_EXPERTS, make_tiny
from kimi_native.tiny_bpe import shipped_text, train
from kimi_native.tiny_config import published_config
from kimi_native.tokenizer import Tokenizer

EXPERT = "language_model.model.layers.1.mlp.experts.3.down_proj."


def unpack(checkpoint, module):
    """float64 weights [out, in] of a packed module, nibble by nibble."""
    words = checkpoint[f"{module}weight_packed"].astype(np.int64)
    codes = np.stack([(words >> (4 * k)) & 15 for k in range(8)], axis=-1).reshape(len(words), -1) - 8
    return codes, codes * np.repeat(checkpoint[f"{module}weight_scale"].astype(np.float64), 32, axis=1)


@pytest.mark.parametrize("preset, experts", [("tiny", "int4"), ("tiny", "bf16"), ("tiny-k2", "int4")])
def test_layout(tmp_path, preset, experts):
    folder = make_tiny(tmp_path / "model", preset, experts=experts)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    checkpoint, config = Checkpoint(folder), Config.from_folder(folder)
    found = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.entries.items()}
    assert found == expected_tensors(config, experts == "int4")
    assert (config.text_config.quantization_config is not None) == (experts == "int4")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in checkpoint.entries.values())
    names = [file.name for file in checkpoint.files]
    assert names == [f"model-{n:05}-of-{len(names):06}.safetensors" for n in range(1, len(names) + 1)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names


def test_published_placement(tmp_path):
    folder = make_tiny(tmp_path / "model", "full-size")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in {
        "language_model.model.layers.0.input_layernorm.weight": 1,
        "language_model.model.layers.1.mlp.experts.0.up_proj.weight_scale": 2,
        "language_model.model.layers.60.mlp.gate.weight": 61,
        "language_model.model.embed_tokens.weight": 62,
        "language_model.model.norm.weight": 62,
        "language_model.lm_head.weight": 62,
        "mm_projector.proj.2.bias": 63,
        "vision_tower.encoder.final_layernorm.bias": 64,
    }.items():
        assert weight_map[name] == f"model-{shard:05}-of-000064.safetensors"
    assert json.loads((folder / "config.json").read_text()) == published_config()
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 100_000_000
    checkpoint = Checkpoint(folder)
    assert {name: entry[1:3] for name, entry in checkpoint.entries.items()} == {
        name: (dtype, shape) for name, (shape, dtype) in expected_tensors(Config.from_folder(folder)).items()
    }
    shape = checkpoint["language_model.model.layers.60.mlp.experts.383.down_proj.weight_shape"]
    np.testing.assert_array_equal(shape, [7168, 2048])
    assert not checkpoint["language_model.model.layers.60.mlp.experts.383.down_proj.weight_packed"].any()


def keys(value):
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_tiny_config_has_the_published_keys(tmp_path):
    config = json.loads((make_tiny(tmp_path / "model") / "config.json").read_text())
    assert keys(config) == keys(published_config())
    text = config["text_config"]
    assert text["rope_scaling"] == published_config()["text_config"]["rope_scaling"]
    assert text["quantization_config"] == published_config()["text_config"]["quantization_config"]
    assert (text["vocab_size"], config["eos_token_id"], config["media_placeholder_token_id"]) == (1024, 769, 789)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == 770
    media = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())["media_proc_cfg"]
    assert (media["in_patch_limit"], media["patch_size"], media["merge_kernel_size"]) == (16384, 14, 2)


def test_text_only_config_is_flat(tmp_path):
    folder = make_tiny(tmp_path / "model", "tiny-k2")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "kimi_k2" and "text_config" not in config
    assert config["rope_scaling"]["beta_fast"] == 1.0 and "quantization_config" in config
    assert not (folder / "preprocessor_config.json").exists()
    assert Checkpoint(folder).prefix == ""


def digest(folder):
    """Over names and bytes of all tensors."""
    checkpoint, total = Checkpoint(folder), hashlib.sha256()
    for name in sorted(checkpoint.names):
        total.update(name.encode() + checkpoint[name].tobytes())
    return total.hexdigest()


def test_values_are_the_same_for_ever(tmp_path):
    assert digest(make_tiny(tmp_path / "a")) == "ecdeb9676bf23fc0fc293a3902197c7458ac869ca19b4bfd726d73ead409a3c7"
    assert (
        digest(make_tiny(tmp_path / "b", "tiny-k2", seed=7, experts="bf16", scale_bits=4))
        == "c096eba1b0f57e0180d3916d3e3a652b73cac8a35b03aacd0726f5693bf53528"
    )


def test_vocabulary_is_the_same_for_ever(tmp_path):
    ranks = (make_tiny(tmp_path / "model") / "tiktoken.model").read_bytes()
    assert hashlib.sha256(ranks).hexdigest() == "83e93c5266041f480b786d702e2c6b94c6aa4975c79d89202fc5a7a29da053ed"


def test_seeds_and_tensors_differ(tmp_path):
    a, b = Checkpoint(make_tiny(tmp_path / "a", seed=1)), Checkpoint(make_tiny(tmp_path / "b", seed=2))
    up, gate = EXPERT.replace("down", "up") + "weight_packed", EXPERT.replace("down", "gate") + "weight_packed"
    assert (a[up] != b[up]).any() and (a[up] != a[gate]).any()


def test_distributions(tmp_path):
    checkpoint = Checkpoint(make_tiny(tmp_path / "model"))

    def moments(name):
        values = checkpoint[name].astype(np.float64)
        return values.mean(), values.std()

    layer = "language_model.model.layers.1."
    for name, mean, std in [
        ("language_model.model.embed_tokens.weight", 0, 1),
        ("language_model.lm_head.weight", 0, 128**-0.5),
        (f"{layer}self_attn.o_proj.weight", 0, 128**-0.5),
        (f"{layer}self_attn.kv_b_proj.weight", 0, 64**-0.5),
        (f"{layer}mlp.gate.weight", 0, 128**-0.5),
        (f"{layer}input_layernorm.weight", 1, 0.1),
        (f"{layer}self_attn.q_a_layernorm.weight", 1, 0.1),
        (f"{layer}mlp.gate.e_score_correction_bias", 0, 0.1),
        ("vision_tower.patch_embed.proj.weight", 0, 588**-0.5),
        ("vision_tower.encoder.blocks.0.wqkv.bias", 0, 0.1),
    ]:
        found_mean, found_std = moments(name)
        assert found_std == pytest.approx(std, rel=0.25), name
        assert abs(found_mean - mean) < std * 4 / checkpoint[name].size ** 0.5, name


def test_int4_codes_and_scales(tmp_path):
    checkpoint = Checkpoint(make_tiny(tmp_path / "model"))
    codes, weights = unpack(checkpoint, EXPERT)
    assert codes.shape == (128, 64)
    np.testing.assert_array_equal(checkpoint[f"{EXPERT}weight_shape"], [128, 64])
    assert checkpoint[f"{EXPERT}weight_shape"].dtype == np.int32
    assert (codes.min(), codes.max()) == (-7, 7)
    assert (np.abs(codes).reshape(128, 2, 32).max(2) == 7).all()  # scale = absmax / 7
    assert weights.std() == pytest.approx(64**-0.5, rel=0.1)


@pytest.mark.parametrize("scale_bits", [1, 4, 8])
def test_scales_have_few_significant_bits(tmp_path, scale_bits):
    checkpoint = Checkpoint(make_tiny(tmp_path / "model", scale_bits=scale_bits))
    mantissa, _ = np.frexp(checkpoint[f"{EXPERT}weight_scale"].astype(np.float64))
    steps = mantissa * 2**scale_bits
    assert (steps == np.round(steps)).all()
    assert scale_bits == 1 or (steps % 2 == 1).any()


@pytest.mark.parametrize("scale_bits", [4, 8])
def test_bf16_experts_hold_the_values_of_the_int4_ones(tmp_path, scale_bits):
    packed = Checkpoint(make_tiny(tmp_path / "int4", seed=3, scale_bits=scale_bits))
    plain = Checkpoint(make_tiny(tmp_path / "bf16", seed=3, scale_bits=scale_bits, experts="bf16"))
    for module in (EXPERT, EXPERT.replace("down", "gate")):
        _, weights = unpack(packed, module)
        np.testing.assert_array_equal(plain[f"{module}weight"], weights.astype(np.float32).astype(ml_dtypes.bfloat16))
        if scale_bits == 4:
            np.testing.assert_array_equal(plain[f"{module}weight"].astype(np.float64), weights)  # no rounding at all
    for name in packed.names:
        if ".mlp.experts." not in name:
            np.testing.assert_array_equal(packed[name].view(np.uint8), plain[name].view(np.uint8))


def test_full_width(tmp_path):
    folder = make_tiny(tmp_path / "model", "full-width")
    checkpoint, config = Checkpoint(folder), Config.from_folder(folder)
    text = config.text_config
    assert (text.hidden_size, text.num_attention_heads, text.n_routed_experts) == (7168, 64, 384)
    assert (text.q_lora_rank, text.kv_lora_rank, text.moe_intermediate_size) == (1536, 512, 2048)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 1_500_000_000
    bias = checkpoint["model.layers.1.mlp.gate.e_score_correction_bias"]
    others = np.delete(bias, FULL_WIDTH_LIVE_EXPERTS)
    assert bias[list(FULL_WIDTH_LIVE_EXPERTS)].min() > others.max() + 1  # beyond any difference of two sigmoids
    assert len(FULL_WIDTH_LIVE_EXPERTS) >= text.num_experts_per_tok
    for expert in (0, 1, 32, 383):
        live = expert in FULL_WIDTH_LIVE_EXPERTS
        assert checkpoint[f"model.layers.1.mlp.experts.{expert}.up_proj.weight_packed"][-1].any() == live
        assert checkpoint[f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale"][-1].any() == live
        shape = checkpoint[f"model.layers.1.mlp.experts.{expert}.up_proj.weight_shape"]
        np.testing.assert_array_equal(shape, [2048, 7168])
    down = checkpoint["model.layers.0.mlp.down_proj.weight"]
    assert down[-1].astype(np.float64).std() == pytest.approx(9216**-0.5, rel=0.1)
    shutil.rmtree(folder)  # pytest would keep the gigabyte


def test_tokenizer(tmp_path):
    folder = make_tiny(tmp_path / "model")
    tokenizer, config = Tokenizer.from_folder(folder), Config.from_folder(folder)
    assert tokenizer.vocab_size == config.text_config.vocab_size == 1024
    assert tokenizer.special_tokens["[EOS]"] == config.eos_token_id
    assert tokenizer.special_tokens["<|media_pad|>"] == config.media_placeholder_token_id
    assert tokenizer.special_tokens["<|im_end|>"] == 770
    assert tokenizer.special_tokens["[PAD]"] == 1023
    for text in (shipped_text(), "naïve 🙂 日本語 \x00\t\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = shipped_text()
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added["770"]["content"] == "<|im_end|>" and added["770"]["special"]
    assert added["790"]["content"] == "<think>" and not added["790"]["special"]


def test_training_merges_the_most_frequent_pair():
    assert train("abab abab abab", 259) == [*(bytes([i]) for i in range(256)), b"ab", b"abab", b" abab"]
    assert train("xz\nxz\nab\nab", 257)[256:] == [b"ab"]  # a tie


def test_training_text_too_short():
    with pytest.raises(ValueError, match="size is 300, expected at most 260 for a text of 11 characters"):
        train("hello hello", 300)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"preset": "huge"}, "preset is 'huge', expected one of tiny, tiny-k2, full-width, small, full-size"),
        ({"experts": "fp8"}, "experts is 'fp8', expected 'int4' or 'bf16'"),
        ({"scale_bits": 0}, "scale_bits is 0, expected 1 to 8"),
        ({"scale_bits": 9}, "scale_bits is 9, expected 1 to 8"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_tiny(tmp_path / "model", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_existing_target(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "link"):
        with pytest.raises(FileExistsError, match=f"{name}: exists, expected a name for a new folder"):
            make_tiny(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kimi_native.checkpoint_writer._write_shard", fail)
    with pytest.raises(OSError, match="No space left"):
        make_tiny(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
