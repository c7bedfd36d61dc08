import collections
import ctypes
import json
import math
import mmap
import os
import random
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from kimi_native.checkpoint import MAX_HEADER_BYTES, Checkpoint, CheckpointError, expected_tensors
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config, published_config

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = np.arange(6, dtype="<f4").tobytes() + np.arange(4).astype(ml_dtypes.bfloat16).tobytes()


def shard(header, data=DATA):
    """The bytes of a safetensors file; a header that is no bytes is dumped as JSON and padded to 8."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def write(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    return folder


def write_index(folder, weight_map, **rest):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **rest}))
    return folder


def changed(name, **values):
    return HEADER | {name: HEADER.get(name, {}) | values}


def test_single_file(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, shard(HEADER)))
    assert checkpoint.names == ("a", "b") and len(checkpoint) == 2
    assert "a" in checkpoint and "c" not in checkpoint and "__metadata__" not in checkpoint
    assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert checkpoint.prefix == ""
    np.testing.assert_array_equal(checkpoint["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert checkpoint["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(checkpoint["b"].astype(float), [0, 1, 2, 3])
    entry = checkpoint.entries["b"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("BF16", (4,), 8)


@pytest.fixture
def pages(tmp_path):
    """A checkpoint with a tensor of 200 pages that begins and ends within a page, none of them in memory."""
    count = 200 * mmap.PAGESIZE
    header = {"a": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}
    file = tmp_path / "model.safetensors"
    write(tmp_path, shard(header, np.arange(count, dtype=np.uint8).tobytes()))
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Checkpoint(tmp_path)


def mapped_pages(checkpoint):
    """Pages of the checkpoint's one file that this process has mapped and read or written."""
    _, _, rest = Path("/proc/self/smaps").read_text().partition(str(checkpoint.files[0]))
    return int(rest.partition("Rss:")[2].split()[0]) * 1024 // mmap.PAGESIZE


def test_release(pages):
    view = pages["a"]
    assert view.sum() > 0 and mapped_pages(pages) >= 200
    pages.release(pages.entries["a"])
    assert mapped_pages(pages) <= 2  # which it shares with what lies before and behind it
    np.testing.assert_array_equal(view, np.arange(len(view), dtype=np.uint8))


def test_releasing_less_than_a_page_does_nothing(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, shard(HEADER)))
    checkpoint.release(checkpoint.entries["a"])
    np.testing.assert_array_equal(checkpoint["a"], np.arange(6, dtype=np.float32).reshape(2, 3))


def test_read_ahead(pages):
    entry, view = pages.entries["a"], pages["a"]
    first = view.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    in_memory = (ctypes.c_ubyte * 201)()

    def all_read():
        size = ctypes.c_size_t(201 * mmap.PAGESIZE)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), size, in_memory) == 0
        return all(byte & 1 for byte in in_memory)

    pages.read_ahead([entry])
    deadline = time.monotonic() + 60
    while not all_read():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert mapped_pages(pages) <= 16  # of the header: nothing was touched to read the rest


def test_views_are_read_only_and_share_memory(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, shard(HEADER)))
    assert np.shares_memory(checkpoint["a"], checkpoint["a"]) and not checkpoint["a"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        checkpoint["a"][0, 0] = 1
    view = checkpoint["a"]
    del checkpoint  # the view keeps the map alive
    assert view[1, 2] == 5


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("BOOL", np.bool_),
        ("U8", np.uint8),
        ("I8", np.int8),
        ("U16", np.uint16),
        ("I16", np.int16),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("U32", np.uint32),
        ("I32", np.int32),
        ("F32", np.float32),
        ("U64", np.uint64),
        ("I64", np.int64),
        ("F64", np.float64),
    ],
)
def test_dtypes(tmp_path, name, dtype):
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    header = {"x": {"dtype": name, "shape": [2, 2], "data_offsets": [0, values.nbytes]}}
    view = Checkpoint(write(tmp_path, shard(header, values.tobytes())))["x"]
    assert view.dtype == dtype and view.shape == (2, 2)
    np.testing.assert_array_equal(view, values)


def test_empty_and_scalar_tensors(tmp_path):
    header = {
        "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "last": {"dtype": "F32", "shape": [3, 0], "data_offsets": [4, 4]},
    }
    checkpoint = Checkpoint(write(tmp_path, shard(header, struct.pack("<f", 7))))
    assert checkpoint["empty"].shape == (0, 5) and checkpoint["last"].shape == (3, 0)
    assert checkpoint["scalar"].shape == () and checkpoint["scalar"] == 7
    assert len(Checkpoint(write(tmp_path, shard({}, b"")))) == 0


def test_index_with_shards(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(shard(HEADER))
    (tmp_path / "y.safetensors").write_bytes(shard({"b": HEADER["a"]}, DATA[:24]))
    folder = write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, metadata={"total_size": 48})
    checkpoint = Checkpoint(folder)
    assert [file.name for file in checkpoint.files] == ["x.safetensors", "y.safetensors"]
    assert checkpoint["b"].dtype == np.float32  # the b of the shard that the index names
    assert checkpoint.names == ("a", "b")


def test_index_goes_before_a_single_file(tmp_path):
    write(tmp_path, b"broken")
    (tmp_path / "x.safetensors").write_bytes(shard(HEADER))
    assert Checkpoint(write_index(tmp_path, {"a": "x.safetensors"})).names == ("a",)


def test_prefix(tmp_path):
    write(tmp_path, shard({"language_model.model.norm.weight": HEADER["a"]}, DATA[:24]))
    assert Checkpoint(tmp_path).prefix == "language_model."


def test_tensor(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, shard(HEADER)))
    assert checkpoint.tensor("a", (2, 3), "F32")[1, 0] == 3
    file = tmp_path / "model.safetensors"
    for name, shape, dtype, message in [
        ("a", (3, 2), "F32", f"{file}: tensor 'a' is F32 [2, 3], expected F32 [3, 2]"),
        ("a", (2, 3), "BF16", f"{file}: tensor 'a' is F32 [2, 3], expected BF16 [2, 3]"),
        ("c", (1,), "F32", f"{tmp_path}: has no tensor 'c', expected it among its 2 tensors"),
    ]:
        with pytest.raises(CheckpointError) as error:
            checkpoint.tensor(name, shape, dtype)
        assert str(error.value) == message
    with pytest.raises(CheckpointError, match="has no tensor 'c'"):
        checkpoint["c"]


def test_weight_shape_may_be_int64(tmp_path):
    header = {
        "m.weight_shape": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        "m.weight_packed": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]},
    }
    checkpoint = Checkpoint(write(tmp_path, shard(header, np.arange(4).tobytes())))
    np.testing.assert_array_equal(checkpoint.tensor("m.weight_shape", (2,), "I32"), [0, 1])
    with pytest.raises(CheckpointError, match=r"'m.weight_shape' is I64 \[2\], expected I32 or I64 \[3\]"):
        checkpoint.tensor("m.weight_shape", (3,), "I32")
    with pytest.raises(CheckpointError, match=r"'m.weight_packed' is I64 \[2\], expected I32 \[2\]"):
        checkpoint.tensor("m.weight_packed", (2,), "I32")


TWICE = b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "a": 1}'
DTYPE_TWICE = b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [2, 3], "data_offsets": [0, 24]}}'
LONG_SHAPE = [1] * 33


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b"", "is 0 bytes long, expected at least 8", id="empty file"),
        pytest.param(b"1234567", "is 7 bytes long, expected at least 8", id="no header length"),
        pytest.param(struct.pack("<Q", 9) + b"12345678", "header length is 9, expected at most 8", id="long header"),
        pytest.param(
            struct.pack("<Q", 2**64 - 1) + b"{}", "header length is 18446744073709551615, expected at most", id="2^64-1"
        ),
        pytest.param(
            struct.pack("<Q", MAX_HEADER_BYTES + 1),
            "header length is 100000001, expected at most 100000000",
            id="limit",
        ),
        pytest.param(shard(b""), "header is not JSON .*, expected a JSON object", id="no header"),
        pytest.param(shard(b'{"a": '), "header is not JSON .*, expected a JSON object", id="half JSON"),
        pytest.param(shard(b"\xff\xfe{}"), "header is not JSON .*, expected a JSON object", id="not UTF-8"),
        pytest.param(shard(b"[" * 100_000), "header is not JSON .*, expected a JSON object", id="deep JSON"),
        pytest.param(shard(b'{"a": 1' + b"0" * 5000 + b"}"), "header is not JSON", id="number of 5001 digits"),
        pytest.param(shard([1]), r"header is \[1\], expected a JSON object", id="list"),
        pytest.param(shard(TWICE), "header has 'a' more than once, expected each name once", id="name twice"),
        pytest.param(shard(DTYPE_TWICE), "header has 'dtype' more than once, expected each name once", id="key twice"),
        pytest.param(shard(HEADER | {"__metadata__": {"n": 1}}), "__metadata__ is .*, expected an object of strings"),
        pytest.param(shard(HEADER | {"__metadata__": "pt"}), "__metadata__ is 'pt', expected an object of strings"),
        pytest.param(shard(HEADER | {"a": 3}), "tensor 'a' has 3, expected the keys dtype"),
        pytest.param(shard(changed("a", more=1)), "tensor 'a' has .*'more'.*, expected the keys dtype"),
        pytest.param(shard(HEADER | {"a": {"dtype": "F32"}}), r"tensor 'a' has \['dtype'\], expected the keys dtype"),
        pytest.param(shard(changed("a", dtype="F33")), "tensor 'a' has dtype 'F33', expected one of BOOL, .*BF16"),
        pytest.param(shard(changed("a", dtype=["F32"])), r"tensor 'a' has dtype \['F32'\], expected one of"),
        pytest.param(
            shard(changed("a", shape=[-2, -3])), r"tensor 'a' has shape \[-2, -3\], expected .* integers >= 0"
        ),
        pytest.param(
            shard(changed("a", shape=[2.0, 3])), r"tensor 'a' has shape \[2.0, 3\], expected .* integers >= 0"
        ),
        pytest.param(shard(changed("a", shape=[True, 6])), r"tensor 'a' has shape \[True, 6\], expected .* integers"),
        pytest.param(shard(changed("a", shape=6)), "tensor 'a' has shape 6, expected .* integers >= 0"),
        pytest.param(shard(changed("a", shape=[2, 3, *LONG_SHAPE])), "tensor 'a' has shape .*, expected at most 32"),
        pytest.param(
            shard(changed("a", shape=[2, 2])), r"has 24 bytes by data_offsets .*, expected those of F32 \[2, 2\]"
        ),
        pytest.param(shard(changed("a", shape=[2**62, 8])), "has 24 bytes by .*, expected those of F32", id="overflow"),
        pytest.param(
            shard(HEADER | {"c": {"dtype": "U8", "shape": [0, 2**62, 2**62], "data_offsets": [32, 32]}}),
            "tensor 'c' has shape .*, expected extents whose product is below",
            id="overflow of an empty tensor",
        ),
        pytest.param(shard(changed("a", data_offsets=[24])), r"data_offsets \[24\], expected two integers >= 0"),
        pytest.param(shard(changed("a", data_offsets=[0, 24, 32])), "data_offsets .*, expected two integers >= 0"),
        pytest.param(
            shard(changed("a", data_offsets=[-8, 16])), r"data_offsets \[-8, 16\], expected two integers >= 0"
        ),
        pytest.param(shard(changed("a", data_offsets=[24, 0])), r"data_offsets \[24, 0\], expected begin <= end <= 32"),
        pytest.param(shard(changed("b", data_offsets=[26, 34])), r"'b' has data_offsets \[26, 34\], expected .* <= 32"),
        pytest.param(shard(HEADER, DATA[:-1]), r"'b' has data_offsets \[24, 32\], expected begin <= end <= 31"),
        pytest.param(shard(changed("b", data_offsets=[20, 28])), "'b' begins at .*, overlapping 'a', expected"),
        pytest.param(
            shard(HEADER | {"c": HEADER["b"]}), "'c' begins at .*, overlapping 'b', expected", id="same place"
        ),
        pytest.param(
            shard({"b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}),
            "'b' begins at .*, leaving a hole after the header, expected",
        ),
        pytest.param(
            shard({"a": HEADER["a"]}),
            "is .* bytes long, expected .*, the end of 'a'",
            id="bytes behind the last tensor",
        ),
        pytest.param(
            shard(b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}} ', DATA[:24]),
            "'a' has its F32 values at byte 74 of the file, expected a multiple of 4",
            id="misaligned",
        ),
    ],
)
def test_malformed_shard(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{message}"):
        Checkpoint(write(tmp_path, content))


def test_header_of_the_longest_length_is_read(tmp_path):
    content = b"{}" + b" " * (MAX_HEADER_BYTES - 2)
    assert len(Checkpoint(write(tmp_path, shard(content, b"")))) == 0


def test_missing_files(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors, expected"
    ):
        Checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: cannot be mapped \(No such file.*\), expected a safetensors"
    ):
        Checkpoint(write_index(tmp_path, {"a": "x.safetensors"}))
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: cannot be mapped \(Is a directory\), expected a safetensors"
    ):
        Checkpoint(tmp_path)


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(shard(HEADER))
    message = r"x\.safetensors: has no tensor 'c', expected it there by model\.safetensors\.index\.json"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write_index(tmp_path, {"a": "x.safetensors", "c": "x.safetensors"}))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", "..", ".", "", "a\\b", "x\0", 3, None, ["x"]])
def test_shard_names_stay_in_the_folder(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "x").write_bytes(shard(HEADER))
    folder = write_index(tmp_path / "model", {"a": name})
    with pytest.raises(CheckpointError) as error:
        Checkpoint(folder)
    assert f"index.json: weight_map has 'a' in {name!r}, expected the name of a file in the folder" in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "index is not JSON .*, expected a JSON object"),
        (b"[]", r"index is \[\], expected a JSON object"),
        (b"{}", "weight_map is None, expected an object of file names"),
        (b'{"weight_map": {}}', "weight_map is {}, expected an object of file names"),
        (b'{"weight_map": ["a"]}', r"weight_map is \['a'\], expected an object of file names"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "index has 'a' more than once, expected each name once"),
    ],
)
def test_malformed_index(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"index.json: {message}"):
        Checkpoint(tmp_path)


def test_index_that_cannot_be_read(tmp_path):
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read \(Is a directory\), expected an index"):
        Checkpoint(tmp_path)


def damaged(content, random):
    """The bytes of a file with a few bytes changed, inserted or removed, or the end cut off."""
    content = bytearray(content)
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(content) - len(DATA))
        match random.randrange(5):
            case 0:
                content[place] ^= 1 << random.randrange(8)
            case 1:
                content[place] = random.choice(b'0129-+.eE"{}[]:,\\ \x00\xff')
            case 2:
                content.insert(place, random.choice(b'0129-.{}[],"'))
            case 3:
                del content[place]
            case 4:
                del content[random.randrange(place, len(content)) :]
        if len(content) <= len(DATA):
            break
    return bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_header_is_an_error_or_a_readable_checkpoint(tmp_path, seed):
    generator = random.Random(seed)
    refused = 0
    for _ in range(1000):
        write(tmp_path, damaged(shard(HEADER), generator))
        try:
            checkpoint = Checkpoint(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path / 'model.safetensors'}: ") and "expected" in str(error)
        else:
            for name in checkpoint.names:
                checkpoint[name].tobytes()
    assert refused > 500


def test_each_truncation_is_an_error(tmp_path):
    content = shard(HEADER)
    for length in range(len(content)):
        write(tmp_path, content[:length])
        with pytest.raises(CheckpointError, match="model.safetensors: .*expected"):
            Checkpoint(tmp_path)


def nbytes(tensors):
    return sum(math.prod(shape) * {"BF16": 2, "F32": 4, "I32": 4}[dtype] for shape, dtype in tensors.values())


def test_expected_tensors_of_the_published_config():
    tensors = expected_tensors(Config.from_dict(published_config()))
    assert len(tensors) == 208_550
    assert nbytes(tensors) == 595_148_192_736
    assert sum(math.prod(shape) for shape, _ in tensors.values()) == 170_738_182_128
    assert collections.Counter(dtype for _, dtype in tensors.values())["F32"] == 60
    layer = "language_model.model.layers.60."
    for name, spec in {
        "language_model.model.embed_tokens.weight": ((163840, 7168), "BF16"),
        "language_model.lm_head.weight": ((163840, 7168), "BF16"),
        "language_model.model.norm.weight": ((7168,), "BF16"),
        "language_model.model.layers.0.mlp.down_proj.weight": ((7168, 18432), "BF16"),
        f"{layer}input_layernorm.weight": ((7168,), "BF16"),
        f"{layer}self_attn.q_b_proj.weight": ((12288, 1536), "BF16"),
        f"{layer}self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), "BF16"),
        f"{layer}self_attn.kv_b_proj.weight": ((16384, 512), "BF16"),
        f"{layer}self_attn.o_proj.weight": ((7168, 8192), "BF16"),
        f"{layer}mlp.gate.weight": ((384, 7168), "BF16"),
        f"{layer}mlp.gate.e_score_correction_bias": ((384,), "F32"),
        f"{layer}mlp.shared_experts.up_proj.weight": ((2048, 7168), "BF16"),
        f"{layer}mlp.experts.383.gate_proj.weight_packed": ((2048, 896), "I32"),
        f"{layer}mlp.experts.383.gate_proj.weight_scale": ((2048, 224), "BF16"),
        f"{layer}mlp.experts.383.down_proj.weight_packed": ((7168, 256), "I32"),
        f"{layer}mlp.experts.383.down_proj.weight_scale": ((7168, 64), "BF16"),
        f"{layer}mlp.experts.383.down_proj.weight_shape": ((2,), "I32"),
        "vision_tower.patch_embed.proj.weight": ((1152, 3, 14, 14), "BF16"),
        "vision_tower.patch_embed.proj.bias": ((1152,), "BF16"),
        "vision_tower.patch_embed.pos_emb.weight": ((64, 64, 1152), "BF16"),
        "vision_tower.encoder.blocks.26.norm1.bias": ((1152,), "BF16"),
        "vision_tower.encoder.blocks.26.wqkv.weight": ((3456, 1152), "BF16"),
        "vision_tower.encoder.blocks.26.mlp.fc0.bias": ((4304,), "BF16"),
        "vision_tower.encoder.final_layernorm.weight": ((1152,), "BF16"),
        "mm_projector.pre_norm.bias": ((1152,), "BF16"),
        "mm_projector.proj.0.weight": ((4608, 4608), "BF16"),
        "mm_projector.proj.2.bias": ((7168,), "BF16"),
    }.items():
        assert tensors[name] == spec, name
    assert f"{layer}mlp.gate_proj.weight" not in tensors
    assert "language_model.model.layers.0.mlp.gate.weight" not in tensors


def test_expected_tensors_unquantized_and_text_only():
    config = Config.from_dict(preset_config("tiny-k2"))
    tensors = expected_tensors(config, quantized=False)
    assert all(name.startswith(("model.", "lm_head.")) for name in tensors)
    assert tensors["model.layers.2.mlp.experts.31.down_proj.weight"] == ((128, 64), "BF16")
    assert not any("weight_" in name for name in tensors)
    prefixed = expected_tensors(config, quantized=False, prefix="language_model.")
    assert prefixed == {f"language_model.{name}": spec for name, spec in tensors.items()}


def test_index_may_link_to_shards_elsewhere(tmp_path):
    """Hub caches keep shards as links into a folder of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(shard(HEADER))
    os.symlink("../blobs/0123", tmp_path / "snapshot" / "x.safetensors")
    assert Checkpoint(write_index(tmp_path / "snapshot", {"a": "x.safetensors"}))["a"][1, 2] == 5
