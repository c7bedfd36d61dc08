"""Export: what is on disk is what the forward pass of training saw, and everything that reads checkpoints reads it."""

import dataclasses
import json
import resource

import kimi_native as kn
import numpy as np
import pytest
from arrays import same_bits
from kimi_native import __main__ as cli
from kimi_native.checkpoint import Checkpoint, expected_tensors
from kimi_native.info import describe
from kimi_native.make_tiny import make_tiny
from kimi_native.tiny_config import published_config
from kimi_native.train import backward, params
from kimi_native.train.batch import NO_LOSS, Batch
from kimi_native.train.export import export
from kimi_native.train.qat import deployed
from PIL import Image
from reference import exact_int4
from reference import model as reference

FLOAT32 = 2e-5  # standard deviations of the logits, as in test_model.py
TOKENS = np.random.default_rng(0).integers(0, 1024, 48).tolist()
EXPERT = "language_model.model.layers.1.mlp.experts"


def masters_of(folder):
    """float32 values that are on no grid: those of the checkpoint and some noise."""
    random = np.random.default_rng(1)
    masters = params.load(folder)
    for w in masters.values():
        w *= 1 + np.float32(0.1) * random.standard_normal(w.shape, np.float32)
    return masters


@dataclasses.dataclass
class Case:
    source: object
    config: kn.Config
    masters: dict
    folder: object
    levels: int


@pytest.fixture(scope="module", params=[("tiny", 7), ("tiny-k2", 7), ("tiny", 1)], ids=str)
def case(request, tmp_path_factory):
    preset, levels = request.param
    parent = tmp_path_factory.mktemp("export")
    source = make_tiny(parent / "source", preset)
    config, masters = kn.Config.from_folder(source), masters_of(source)
    folder = export(masters, config, parent / "model", source, levels=levels)
    return Case(source, config, masters, folder, levels)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("export") / "source")


@pytest.fixture(scope="module")
def masters(source):
    return masters_of(source)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# What is on disk


def test_values_are_those_that_training_saw(case):
    found, expected = params.load(case.folder), deployed(case.masters, case.levels)
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def test_layout(case):
    checkpoint = Checkpoint(case.folder)
    found = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.entries.items()}
    assert found == expected_tensors(case.config)
    description = describe(case.folder)
    assert not description.missing and not description.unexpected and not description.mismatched
    assert "INT4 in groups of 32" in description.quantization


def test_packed_experts(case):
    """Against compressed-tensors' layout written out: 8 codes a word along the inputs, low nibble first, q + 8."""
    checkpoint = Checkpoint(case.folder)
    root = "language_model." if case.config.vision_config else ""
    stacked = f"{root}model.layers.2.mlp.experts.down_proj.weight"
    expected = deployed(case.masters, case.levels)[stacked]
    for expert in (0, 31):
        module = f"{root}model.layers.2.mlp.experts.{expert}.down_proj"
        words = checkpoint[f"{module}.weight_packed"].view(np.uint32)
        scale = checkpoint[f"{module}.weight_scale"]
        rows, columns = checkpoint[f"{module}.weight_shape"]
        assert (rows, columns) == expected[expert].shape == (128, 64)
        for row in range(0, rows, 17):
            for column in range(columns):
                nibble = int(words[row, column // 8]) >> 4 * (column % 8) & 15
                assert (nibble - 8) * float(scale[row, column // 32]) == expected[expert, row, column]
        assert np.abs(exact_int4(words, np.ones_like(scale))).max() == case.levels


def test_other_files_are_those_of_the_source(case):
    found, expected = files_of(case.folder), files_of(case.source)
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] == expected[name]) == (not name.endswith(".safetensors")), name


def test_exporting_again_gives_the_same_bytes(case, tmp_path):
    again = export(params.load(case.folder), case.config, tmp_path / "again", case.folder, levels=case.levels)
    assert files_of(again) == files_of(case.folder)


@pytest.mark.parametrize("preset", ["tiny", "tiny-k2"])
def test_a_published_checkpoint_comes_back_byte_for_byte(tmp_path, preset):
    source = make_tiny(tmp_path / "source", preset, seed=3)
    export(params.load(source), kn.Config.from_folder(source), tmp_path / "model", source)
    assert files_of(tmp_path / "model") == files_of(source)


@pytest.mark.parametrize("preset", ["tiny", "tiny-k2"])
def test_config_says_that_the_experts_are_int4(tmp_path, preset):
    source = make_tiny(tmp_path / "bf16", preset, experts="bf16")
    export(params.load(source), kn.Config.from_folder(source), tmp_path / "model", source)
    written, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", source))
    text = before.get("text_config", before)
    assert "quantization_config" not in text
    text["quantization_config"] = published_config()["text_config"]["quantization_config"]
    assert written == before


def test_files_from_a_dict(source, masters, tmp_path):
    files = {name: content for name, content in files_of(source).items() if "safetensors" not in name}
    config = kn.Config.from_folder(source)
    export(masters, config, tmp_path / "from-dict", files | {"LICENSE": b"text"})
    expected = files_of(export(masters, config, tmp_path / "from-folder", source))
    assert files_of(tmp_path / "from-dict") == expected | {"LICENSE": b"text"}


def test_which_files_of_a_folder_are_copied(masters, tmp_path):
    source = make_tiny(tmp_path / "source")
    (source / "figures").mkdir()
    (source / ".hidden").write_text("")
    (source / "model.safetensors").write_text("")
    (source / "README.md").write_text("read")
    (source / "chat_template.jinja").symlink_to("README.md")
    export(masters, kn.Config.from_folder(source), tmp_path / "model", source)
    found = files_of(tmp_path / "model")
    assert not {"figures", ".hidden", "model.safetensors"} & found.keys()
    assert found["README.md"] == found["chat_template.jinja"] == b"read"
    assert not (tmp_path / "model" / "chat_template.jinja").is_symlink()


def test_progress(source, masters, tmp_path):
    calls = []
    config = kn.Config.from_folder(source)
    export(masters, config, tmp_path / "model", source, progress=lambda *call: calls.append(call))
    total = len(expected_tensors(config))
    assert calls == [(done, total) for done in range(1, total + 1)]


# What it computes


def reference_logits(case, tokens):
    """float64 [T, V] of deployed(masters), without prefix and one matrix an expert."""
    tensors = {
        on_disk.removeprefix("language_model."): matrix
        for name, w in deployed(case.masters, case.levels).items()
        for on_disk, matrix in params.published(name, w)
    }
    return reference.logits(tensors, case.config.text_config, tokens)


def assert_near(found, expected):
    assert np.abs(found - expected).max() <= FLOAT32 * expected.std()


def test_logits_are_those_of_the_values_that_training_saw(case):
    model = kn.load(case.folder, activations="float32", cache_dtype="float32")
    found = model.forward(TOKENS, model.new_cache(len(TOKENS)))
    assert_near(found, reference_logits(case, TOKENS))
    ids = np.array(TOKENS, np.int32)
    batch = Batch(ids, np.append(ids[1:], np.int32(NO_LOSS)), np.array([0, len(ids)], np.int32))
    assert_near(found, backward.logits(deployed(case.masters, case.levels), case.config, batch))


def test_greedy_tokens_are_those_of_the_values_that_training_saw(case):
    model = kn.load(case.folder, activations="float32", cache_dtype="float32")
    found = list(kn.generate_tokens(model, TOKENS, max_new_tokens=12, temperature=0.0))
    assert len(found) == 12
    logits = reference_logits(case, [*TOKENS, *found])
    assert logits.argmax(axis=1)[len(TOKENS) - 1 : -1].tolist() == found


def test_command_line(case, tmp_path, capsys):
    assert cli.main(["info", str(case.folder)]) == 0
    assert "INT4" in capsys.readouterr().out
    Image.new("RGB", (56, 56), "teal").save(tmp_path / "teal.png")
    image = ["--image", str(tmp_path / "teal.png")] if case.config.vision_config else []
    options = ["--model", str(case.folder), "--max-new-tokens", "4", "--temperature", "0", *image]
    assert cli.main(["generate", *options, "Hello"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "4 tokens" in err


# What fails


@pytest.mark.parametrize("limit", [0, 10_000, 300_000])
def test_a_full_disk_leaves_nothing(source, masters, tmp_path, limit):
    """No file may grow beyond the limit: the first to be copied, the tokenizer, a shard."""
    config = kn.Config.from_folder(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(masters, config, tmp_path / "model", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_existing_folder(source, masters, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model: exists, expected a name for a new folder"):
        export(masters, kn.Config.from_folder(source), tmp_path / "model", source)
    assert list((tmp_path / "model").iterdir()) == []


def without(name):
    return lambda masters: masters.pop(name)


def with_value(name, value):
    return lambda masters: masters.update({name: value})


def with_nan(name):
    def change(masters):
        masters[name] = masters[name].copy()
        masters[name].flat[5] = np.nan

    return change


UP, NORM = f"{EXPERT}.up_proj.weight", "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(UP), rf"export: {UP} is missing, expected all \d+ parameters of the config"),
        (with_value("model.norm.weight", np.ones(128, np.float32)), r"export: model.norm.weight is unexpected"),
        (with_value(NORM, np.ones(64, np.float32)), rf"export: {NORM} is float32 \[64\], expected float32 \[128\]"),
        (with_value(NORM, np.ones(128)), rf"export: {NORM} is float64 \[128\], expected float32 \[128\]"),
        (with_nan(UP), f"export: {UP} has a value that is not finite"),
        (with_nan(NORM), f"export: {NORM} has a value that is not finite"),
    ],
)
def test_params_that_do_not_fit(source, masters, tmp_path, change, message):
    changed = dict(masters)
    change(changed)
    with pytest.raises(ValueError, match=message):
        export(changed, kn.Config.from_folder(source), tmp_path / "model", source)
    assert list(tmp_path.iterdir()) == []


def test_levels_that_do_not_fit(source, masters, tmp_path):
    with pytest.raises(ValueError, match="levels is 8, expected 1 to 7"):
        export(masters, kn.Config.from_folder(source), tmp_path / "model", source, levels=8)
    assert list(tmp_path.iterdir()) == []


def test_config_of_another_model(source, masters, tmp_path):
    config = kn.Config.from_folder(source, mla_norm_eps=1e-6)
    message = r"source/config.json has text_config.mla_norm_eps 1e-05, expected 1e-06, that of config"
    with pytest.raises(ValueError, match=message):
        export(masters, config, tmp_path / "model", source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "export: config.json is missing"),
        ({"config.json": b"{"}, "export: config.json is not JSON .*, expected a JSON object"),
        ({"config.json": b"[]"}, "config.json: the file is .*, expected an object"),
    ],
)
def test_config_that_is_none(source, masters, tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        export(masters, kn.Config.from_folder(source), tmp_path / "model", files)
    assert list(tmp_path.iterdir()) == []


def test_masters_stay_as_they_are(source, masters, tmp_path):
    before = {name: w.copy() for name, w in masters.items()}
    export(masters, kn.Config.from_folder(source), tmp_path / "model", source)
    for name in masters:
        assert same_bits(masters[name], before[name]), name
