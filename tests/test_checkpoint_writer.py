import json

import numpy as np
import pytest
from kimi_native.checkpoint import DTYPES, Checkpoint
from kimi_native.checkpoint_writer import new_folder, pack_int4, write_json, write_weights

TENSORS = {
    "model.layers.0.a.weight": ((3, 5), "BF16"),
    "model.layers.0.a.weight_shape": ((2,), "I32"),
    "model.layers.1.b.weight": ((7,), "F32"),
    "model.norm.weight": ((4,), "BF16"),
    "mm_projector.pre_norm.weight": ((2, 2), "BF16"),
    "vision_tower.patch_embed.proj.bias": ((0,), "BF16"),
}


def values(name):
    shape, dtype = TENSORS[name]
    return np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[dtype])


def test_what_is_written_is_read(tmp_path):
    calls = []
    write_weights(tmp_path, TENSORS, lambda name: [values(name)], lambda *call: calls.append(call))
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names) == set(TENSORS)
    for name in TENSORS:
        assert checkpoint[name].dtype == values(name).dtype
        np.testing.assert_array_equal(checkpoint[name], values(name))
    assert calls == [(done, len(TENSORS)) for done in range(1, len(TENSORS) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in checkpoint.entries.values())
    shards = [int(file.removeprefix("model-")[:5]) for file in map(index["weight_map"].get, TENSORS)]
    assert shards == [1, 1, 2, 3, 4, 5]


def test_blocks_of_any_shape_follow_each_other(tmp_path):
    write_weights(tmp_path, TENSORS, lambda name: np.array_split(values(name).reshape(-1), 2))
    np.testing.assert_array_equal(Checkpoint(tmp_path)["model.layers.0.a.weight"], values("model.layers.0.a.weight"))


def test_a_tensor_without_blocks_reads_as_zero(tmp_path):
    write_weights(tmp_path, TENSORS, lambda name: [values(name)] if name == "model.norm.weight" else [])
    checkpoint = Checkpoint(tmp_path)
    for name in TENSORS:
        assert checkpoint[name].any() == (name == "model.norm.weight")


def test_blocks_of_another_size(tmp_path):
    with pytest.raises(ValueError, match=r"layers.0.a.weight: blocks of 28 bytes, expected 30 or no blocks"):
        write_weights(tmp_path, TENSORS, lambda name: [values(name).reshape(-1)[:14]])


def test_blocks_of_another_dtype(tmp_path):
    with pytest.raises(TypeError, match=r"layers.0.a.weight_shape: a block of float16, expected int32"):
        write_weights(tmp_path, TENSORS, lambda name: [np.zeros(TENSORS[name][0], np.float16)])


@pytest.mark.parametrize("shape", [(8,), (0,), (5, 64), (2, 3, 32)])
def test_pack_int4(rng, shape):
    """Against the words of compressed-tensors, built from one code at a time."""
    codes = rng.integers(-8, 8, shape, dtype=np.int8)
    words = np.zeros((*shape[:-1], shape[-1] // 8), np.uint32)
    for index in np.ndindex(shape):
        words[*index[:-1], index[-1] // 8] |= np.uint32((int(codes[index]) + 8) << 4 * (index[-1] % 8))
    packed = pack_int4(codes)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed, words.view(np.int32))


def test_new_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with new_folder(target) as partial:
        write_json(partial / "config.json", {"key": 1})
        assert not target.exists() and partial.parent == target.parent
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert json.loads((target / "config.json").read_text()) == {"key": 1}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "model") as partial:
        (partial / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_new_folder_keeps_what_appeared_meanwhile(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "model") as partial:
        (partial / "file").write_text("ours")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "file").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "theirs"


def test_existing_names_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with (
            pytest.raises(FileExistsError, match=f"{name}: exists, expected a name for a new folder"),
            new_folder(tmp_path / name),
        ):
            raise AssertionError("entered")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
