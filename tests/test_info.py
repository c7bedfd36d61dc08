import json

import pytest
from kimi_native.checkpoint import CheckpointError
from kimi_native.config import ConfigError
from kimi_native.info import describe, show
from kimi_native.make_tiny import make_tiny
from kimi_native.tiny_config import published_config


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path / "tiny")


def parts(description):
    return {component.name: (component.parameters, component.bytes) for component in description.components}


PUBLISHED_PARTS = {
    "embed_tokens": (1_174_405_120, 2_348_810_240),
    "lm_head": (1_174_405_120, 2_348_810_240),
    "attention": (6_168_569_856, 12_337_139_712),
    "layer norms": (881_664, 1_763_328),
    "dense MLP": (396_361_728, 792_723_456),
    "shared experts": (2_642_411_520, 5_284_823_040),
    "routers": (165_173_760, 330_301_440 + 92_160),
    "routed experts": (1_014_686_023_680, 507_343_011_840 + 63_417_876_480 + 552_960),
    "vision tower": (416_866_032, 833_732_064),
    "projector": (54_277_888, 108_555_776),
}


def check_published(description):
    assert parts(description) == PUBLISHED_PARTS
    assert description.parameters == 1_026_879_376_368
    assert description.bytes == 595_148_192_736
    assert description.num_tensors == 208_550
    assert description.active_parameters == 31_687_095_808
    assert description.bytes_per_token == 32_986_413_056 + 92_160  # the bias of the routers is float32
    assert description.cache_bytes_per_token == 70_272
    assert description.quantization == "INT4 in groups of 32: 69,120 of 69,120 routed expert matrices"
    assert description.missing == description.unexpected == description.mismatched == ()


def test_published_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    description = describe(tmp_path)
    assert not description.has_weights
    check_published(description)
    show(description)
    printed = capsys.readouterr().out
    for text in [
        "1,026,879,376,368",
        "595,148,192,736",
        "554.275",
        "31,687,095,808",
        "70,272",
        "262,144",
        "kimi_k25",
        "27 layers of width 1,152, a token for 28 x 28 pixels",
    ]:
        assert text in printed
    assert "no safetensors file" in printed


def test_published_size_on_disk(tmp_path):
    description = describe(make_tiny(tmp_path / "full", "full-size"))
    assert description.has_weights and description.num_files == 64
    check_published(description)


def test_tiny(tiny):
    description = describe(tiny)
    attention = 64 * 128 + 64 + 4 * 48 * 64 + 80 * 128 + 64 + 4 * 64 * 64 + 128 * 128
    matrices = 2 * 32 * 3
    assert parts(description)["attention"] == (3 * attention, 2 * 3 * attention)
    assert parts(description)["routed experts"] == (matrices * 8192, matrices * (8192 // 2 + 8192 // 32 * 2 + 8))
    assert parts(description)["routers"] == (2 * (32 * 128 + 32), 2 * (2 * 32 * 128 + 4 * 32))
    norms, dense, shared, head = (2 * 3 + 1) * 128, 3 * 128 * 256, 2 * 3 * 128 * 64, 1024 * 128
    active = 3 * attention + norms + dense + shared + 2 * (32 * 128 + 32) + 2 * 8 * 3 * 8192 + head
    assert description.active_parameters == active
    assert description.cache_bytes_per_token == 3 * (64 + 16) * 2
    assert description.bytes == sum(f.stat().st_size - header_size(f) for f in tiny.glob("*.safetensors"))


def header_size(file):
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def test_bf16_and_text_only(tmp_path, capsys):
    plain = describe(make_tiny(tmp_path / "bf16", "tiny-k2", experts="bf16"))
    packed = describe(make_tiny(tmp_path / "int4", "tiny-k2"))
    assert (plain.quantization, plain.missing, plain.unexpected) == ("none", (), ())
    assert plain.parameters == packed.parameters and plain.active_parameters == packed.active_parameters
    assert plain.bytes > packed.bytes and plain.bytes_per_token > packed.bytes_per_token
    assert "vision tower" not in parts(packed)
    show(packed)
    assert "none: the config has no vision_config" in capsys.readouterr().out


def test_checkpoint_without_a_tower(tiny, capsys):
    edit_index(tiny, lambda names: [names.pop(name) for name in list(names) if name.startswith("vision_tower.")])
    show(describe(tiny))
    assert "none: the checkpoint has no vision_tower tensors" in capsys.readouterr().out


def edit_shard(file, edit):
    """Rewrite the header of a shard; the data stay where they are."""
    content = file.read_bytes()
    start = header_size(file)
    header = json.loads(content[8:start])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def edit_index(folder, edit):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_findings(tiny, capsys):
    norm, router = "language_model.model.norm.weight", "language_model.model.layers.1.mlp.gate.weight"
    bias = "language_model.model.layers.2.mlp.gate.e_score_correction_bias"

    def rename_norm(header):
        header["extra[red]"] = header.pop(norm)

    def reshape_router(header):
        header[router]["shape"].reverse()

    def retype_bias(header):
        header[bias]["dtype"] = "I32"

    edit_shard(tiny / "model-00004-of-000006.safetensors", rename_norm)
    edit_shard(tiny / "model-00002-of-000006.safetensors", reshape_router)
    edit_shard(tiny / "model-00003-of-000006.safetensors", retype_bias)
    edit_index(tiny, lambda weight_map: weight_map.update({"extra[red]": weight_map.pop(norm)}))
    description = describe(tiny)
    assert description.missing == (norm,)
    assert description.unexpected == ("extra[red]",)
    assert parts(description)["unexpected"] == (128, 256)
    assert description.mismatched == (
        f"tensor {router!r} is BF16 [128, 32], expected BF16 [32, 128]",
        f"tensor {bias!r} is I32 [32], expected F32 [32]",
    )
    show(description)
    printed = capsys.readouterr().out
    assert norm in printed and "extra[red]" in printed and "[128, 32]" in printed


def test_long_lists_show_a_count_and_the_first(tiny, capsys):
    edit_index(tiny, lambda weight_map: [weight_map.pop(name) for name in list(weight_map) if ".experts.1" in name])
    description = describe(tiny)
    assert len(description.missing) == 2 * 11 * 3 * 3
    assert description.missing[0] == "language_model.model.layers.1.mlp.experts.1.gate_proj.weight_packed"
    show(description)
    printed = capsys.readouterr().out
    assert "198" in printed and "..." in printed
    assert printed.count(".experts.1") == 5


def test_expert_stored_as_bf16_beside_packed_ones(tmp_path):
    """A module is INT4 where weight_packed exists and bf16 where weight does, whatever config.json says."""
    folder = make_tiny(tmp_path / "mixed", experts="bf16")
    config = json.loads((make_tiny(tmp_path / "int4") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    description = describe(folder)
    assert (description.missing, description.unexpected, description.quantization) == ((), (), "none")
    edit_index(folder, lambda weight_map: weight_map.pop("language_model.model.layers.1.mlp.experts.0.up_proj.weight"))
    assert [name.rpartition(".")[2] for name in describe(folder).missing] == [
        "weight_packed",
        "weight_scale",
        "weight_shape",
    ]


def test_broken_folders(tmp_path, tiny):
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        describe(tmp_path)
    (tiny / "model-00002-of-000006.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-000006.safetensors: cannot be mapped"):
        describe(tiny)
