"""The vision tower and its projector against transformers in float64 (golden/make_vision_golden.py) and the oracle.

Differences are the largest over all features, in standard deviations of the features. transformers itself is 2e-6 away
from its float64 result in float32, and 6.6e-3 by root mean square in bf16.
"""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import kimi_native as kn
import numpy as np
import pytest
from arrays import BF16, same_bits
from golden.tensor_hash import hash_tensors
from kimi_native import vision
from kimi_native.checkpoint import Checkpoint, CheckpointError
from kimi_native.make_tiny import make_tiny
from kimi_native.media import MediaItem
from kimi_native.placement import Weights
from reference import vision as reference

ORACLE = 2e-6
FLOAT32 = 1e-5

FOLDER = Path(__file__).parent / "golden"
FACTS = json.loads((FOLDER / "vision.json").read_text())
GOLDEN = dict(np.load(FOLDER / "vision.npz"))
GRIDS = [tuple(grid) for grid in GOLDEN["grids"].tolist()]
LEVELS = np.tile(np.arange(256, dtype=np.float32) / 127.5 - 1, (3, 1))


def item_of(patches, grid):
    return MediaItem("image" if grid[0] == 1 else "video", patches, grid, LEVELS, None)


def random_item(random, grid):
    return item_of(random.randint(0, 256, (np.prod(grid), 588), np.uint8), grid)


def golden_items():
    random = np.random.RandomState(FACTS["seed"])
    return [random_item(random, grid) for grid in GRIDS]


ITEMS = golden_items()
EXPECTED = np.split(GOLDEN["features"], np.cumsum([item.tokens for item in ITEMS])[:-1])


def load(folder):
    config = kn.Config.from_folder(folder).vision_config
    return vision.VisionModel(config, Weights(Checkpoint(folder), ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("vision") / "checkpoint", **FACTS["checkpoint"])


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def assert_near(encoded, tolerance):
    """`encoded` are the features of all golden items."""
    for item, features, expected in zip(ITEMS, encoded, EXPECTED, strict=True):
        assert features.shape == expected.shape
        away = np.abs(np.float64(features) - expected).max() / GOLDEN["features"].std(dtype=np.float64)
        assert away <= tolerance, f"grid {item.grid}: {away:.3g} standard deviations, allowed {tolerance}"


def test_checkpoint_is_the_recorded_one(folder):
    """If this fails, make_tiny writes other values than when the golden files were made: make them anew."""
    assert hash_tensors(folder) == FACTS["sha256"]


def test_oracle(folder):
    tensors, config = Checkpoint(folder), kn.Config.from_folder(folder).vision_config
    assert_near([reference.encode(tensors, config, i.patches / 127.5 - 1, i.grid) for i in ITEMS], ORACLE)


def test_features(model, isa):
    encoded = model.encode(ITEMS)
    assert_near(encoded, FLOAT32)
    assert {features.dtype for features in encoded} == {np.dtype(np.float32)}


def test_features_by_the_kernels_for_the_gpu(folder, emulator):
    """At least as near as transformers in bf16, over all features; 5.8e-3 were seen."""
    encoded = load(folder).encode(ITEMS)
    assert {features.dtype for features in encoded} == {BF16}
    away = np.concatenate(encoded).astype(np.float64) - GOLDEN["features"]
    assert np.sqrt(np.mean(away**2)) <= FACTS["bf16_rms_difference"] * GOLDEN["features"].std(dtype=np.float64)


def test_items_do_not_see_each_other(model):
    """To the bit but for items of up to 8 patches, whose products sum in another order when they are alone."""
    for item, together in zip(ITEMS, model.encode(ITEMS), strict=True):
        (alone,) = model.encode([item])
        assert same_bits(alone, together) if len(item.patches) > 8 else np.allclose(alone, together, atol=1e-5)
    assert model.encode([]) == []


def test_groups_of_items_rows_and_heads_leave_the_bits(model, monkeypatch):
    items = [item for item in ITEMS if len(item.patches) > 8]
    whole, calls = model.encode(items), []
    monkeypatch.setattr(vision, "GROUP", 256)
    monkeypatch.setattr(model, "rows", 100)
    monkeypatch.setattr(model, "head_rows", 600)
    pieces = model.encode(items, lambda *progress: calls.append(progress))
    assert all(map(same_bits, pieces, whole))
    depth, patches = len(model.blocks), sum(len(item.patches) for item in items)
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {patches * depth} and done[-1] == patches * depth and sorted(set(done)) == list(done)
    assert [len(group) for group in vision._groups(items)] == [3, 1, 2, 2] and len(calls) == 4 * depth


def test_levels_of_a_channel_are_those_of_the_item(model):
    """The same features from other bytes, if these mean the same."""
    item = ITEMS[2]
    turned = dataclasses.replace(item, patches=255 - item.patches, levels=LEVELS[:, ::-1])
    assert all(map(same_bits, model.encode([turned]), model.encode([item])))


def test_memory_does_not_grow_with_the_number_of_items(model, monkeypatch):
    monkeypatch.setattr(vision, "GROUP", 256)
    items = [random_item(np.random.RandomState(i), (1, 16, 16)) for i in range(12)]

    def peak(items):
        tracemalloc.start()
        model.encode(items)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    one = peak(items[:1])
    features = sum(item.tokens for item in items) * model.config.text_hidden_size * 4
    assert features < 4 * one and peak(items) < 1.2 * one + features


@pytest.mark.parametrize("grid", [(8, 8), (2, 2), (6, 10), (30, 4), (12, 26)])
def test_resampled_positions(rng, grid):
    table = rng.standard_normal((8, 8, 12)).astype(BF16)
    expected = reference.positions(table, *grid)
    np.testing.assert_allclose(vision._resample(table, *grid), expected, rtol=0, atol=2e-6)
    if grid == table.shape[:2]:
        assert np.array_equal(vision._resample(table, *grid), table.reshape(64, 12))


def test_sinusoids():
    """Published values, of the published width."""
    times = vision.sinusoids(4, 1152)
    at = times[[1, 1, 1, 1, 3, 3], [0, 1, 575, 576, 0, 576]]
    expected = [0.84147102, 0.83279473, 1.0161187e-4, 0.54030228, 0.14112, -0.9899925]
    np.testing.assert_allclose(at, expected, rtol=1e-6)
    assert np.array_equal(times[0], [0] * 576 + [1] * 576)
    np.testing.assert_allclose(times, reference.time(4, 1152), rtol=0, atol=3e-7)


def test_rotation():
    """Pair 2 i turns with the column, 2 i + 1 with the row; the frequencies are the published ones, of width 72."""
    cos, sin = vision.rotation(2, 4, 6, 72).reshape(2, 2, 4, 6, 36)
    assert same_bits(cos[0], cos[1]) and same_bits(sin[0], sin[1])
    angles = np.arctan2(sin[0], cos[0])
    np.testing.assert_allclose(angles[0, 1, :5:2], [1.0, 0.599484205, 0.359381378], rtol=1e-6)
    assert not angles[0, 1, 1::2].any() and not angles[1, 0, 0::2].any()
    np.testing.assert_allclose(angles[1, 0, -5::2], [0.000464158948, 0.000278255931, 0.000166810103], rtol=1e-6)
    for ours, theirs in zip((cos, sin), reference.rotation(4, 6, 72), strict=True):
        np.testing.assert_allclose(ours[0].reshape(24, 36), theirs, rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("grid", "width", "says"),
    [
        ((5, 2, 2), 588, "items[1] has 5 frames, expected 1 to 4"),
        ((0, 2, 2), 588, "items[1] has 0 frames, expected 1 to 4"),
        ((1, 2, 3), 588, "items[1] has a grid of 2 x 3 patches, expected even numbers"),
        ((1, 0, 2), 588, "items[1] has a grid of 0 x 2 patches, expected even numbers"),
        ((1, 2, 2), 768, "items[1]: patches has shape [4, 768], expected [4, 588]"),
    ],
)
def test_items_that_do_not_fit(model, grid, width, says):
    bad = item_of(np.zeros((np.prod(grid), width), np.uint8), grid)
    with pytest.raises(ValueError) as error:
        model.encode([ITEMS[0], bad])
    assert str(error.value) == says


def test_tower_that_does_not_fit_its_config(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["init_pos_emb_width"] = 6
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"vision_tower.patch_embed.pos_emb.weight.*\[8, 6, 64\]"):
        load(other)
