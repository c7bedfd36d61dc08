"""Parameters: names and shapes, the values to start from, and what a published checkpoint holds."""

import dataclasses
import shutil

import numpy as np
import pytest
from arrays import same_bits
from kimi_native import make_tiny as tiny
from kimi_native.checkpoint import Checkpoint, CheckpointError, expected_tensors
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config
from kimi_native.train import params
from reference import exact_int4


def config_of(preset):
    return Config.from_dict(preset_config(preset))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("params") / "tiny")


@pytest.mark.parametrize("preset", ["tiny", "tiny-k2"])
def test_shapes_are_those_on_disk_with_the_experts_of_a_layer_stacked(preset):
    config = config_of(preset)
    found = params.shapes(config)
    on_disk = {
        part: view.shape
        for name, shape in found.items()
        for part, view in params.published(name, np.broadcast_to(np.float32(0), shape))
    }
    assert on_disk == {name: shape for name, (shape, _) in expected_tensors(config, quantized=False).items()}
    prefix = "language_model." if preset == "tiny" else ""
    assert found[f"{prefix}model.layers.1.mlp.experts.down_proj.weight"] == (32, 128, 64)
    assert f"{prefix}model.layers.0.mlp.experts.down_proj.weight" not in found
    assert ("mm_projector.proj.2.bias" in found) == (preset == "tiny")


def test_published_views_share_memory_with_the_parameter():
    stacked = np.zeros((2, 3, 4), np.float32)
    parts = dict(params.published("model.layers.3.mlp.experts.up_proj.weight", stacked))
    assert list(parts) == [f"model.layers.3.mlp.experts.{e}.up_proj.weight" for e in (0, 1)]
    parts["model.layers.3.mlp.experts.1.up_proj.weight"][...] = 7
    assert np.all(stacked[1] == 7) and not np.any(stacked[0] == 7)
    shared = "model.layers.3.mlp.shared_experts.up_proj.weight"
    assert [(name, view is stacked) for name, view in params.published(shared, stacked)] == [(shared, True)]


def test_initial_values():
    config = config_of("tiny")
    values = params.initialise(config, seed=3)
    assert {name: array.shape for name, array in values.items()} == params.shapes(config)
    for name, array in values.items():
        assert array.dtype == np.float32, name
        if name.endswith("bias"):
            assert not array.any(), name
        elif array.ndim == 1:
            assert np.all(array == 1), name
        else:  # five deviations of the mean and of the deviation of a sample
            assert abs(array.mean()) < 5 * 0.02 / np.sqrt(array.size), name
            assert abs(array.std() / 0.02 - 1) < 5 / np.sqrt(2 * array.size), name


def test_initial_values_depend_on_seed_and_name_alone():
    config = config_of("tiny-k2")
    shallow = dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, num_hidden_layers=2))
    values, again, other = (params.initialise(*args) for args in ((config, 0), (shallow, 0), (config, 1)))
    assert all(same_bits(again[name], values[name]) for name in again)
    matrices = [name for name, array in values.items() if array.ndim > 1]
    assert not any(np.array_equal(values[name], other[name]) for name in matrices)
    assert len({values[name].tobytes() for name in matrices}) == len(matrices)


@pytest.mark.parametrize("experts", ["int4", "bf16"])
def test_load_gives_the_values_on_disk(experts, tmp_path):
    folder = tiny.make_tiny(tmp_path / "tiny", experts=experts)
    checkpoint, config = Checkpoint(folder), Config.from_folder(folder)
    loaded = params.load(folder)
    assert {name: array.shape for name, array in loaded.items()} == params.shapes(config)
    parts = {part: view for name, array in loaded.items() for part, view in params.published(name, array)}
    assert ("language_model.model.layers.1.mlp.experts.0.up_proj.weight" in checkpoint) == (experts == "bf16")
    for name, view in parts.items():
        packed = f"{name}_packed"
        exact = exact_int4(checkpoint[packed], checkpoint[f"{name}_scale"]) if packed in checkpoint else None
        assert same_bits(view, np.float32(checkpoint[name] if exact is None else exact)), name


def test_every_code_of_int4_is_decoded(folder):
    codes, scale = np.empty((1, 32), np.float32), np.array([[0.5]], tiny.ml_dtypes.bfloat16)
    words = np.array([[0x76543210, -0x01234568, 0x76543210, -0x01234568]], np.int32)  # the second is 0xFEDCBA98
    params._decode(words, scale, codes)
    assert codes.tolist() == [[0.5 * (n - 8) for n in range(16)] * 2]


def test_load_names_what_is_missing_or_malformed(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    index = broken / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.2.mlp.gate.weight", "layers.2.mlp.gate.height"))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate\.(height|weight)"):
        params.load(broken)
    text = (folder / "config.json").read_text()
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text(text.replace('"kv_lora_rank": 64', '"kv_lora_rank": 32'))
    with pytest.raises(CheckpointError, match=r"kv_a_proj_with_mqa\.weight.*\[80, 128\].*\[48, 128\]"):
        params.load(other)
