"""The tower and projector of training against the one that runs, the oracle and finite differences in float64."""

import dataclasses

import kimi_native as kn
import numpy as np
import pytest
import reference
from kimi_native.checkpoint import Checkpoint, expected_tensors
from kimi_native.make_tiny import make_tiny
from kimi_native.placement import Weights
from kimi_native.tiny_config import preset_config
from kimi_native.train import backward_vision
from kimi_native.vision import VisionModel
from media_items import random_item
from reference.vision import encode

CONFIG = kn.Config.from_dict(preset_config("tiny"))
# As small as can be with several heads, channels and layers: every part of it is differenced.
SMALL = {"vt_hidden_size": 16, "mm_hidden_size": 16, "vt_num_attention_heads": 2, "vt_intermediate_size": 12}
SMALL |= {"init_pos_emb_height": 4, "init_pos_emb_width": 6, "text_hidden_size": 10, "patch_size": 14}
SMALL_CONFIG = dataclasses.replace(CONFIG, vision_config=dataclasses.replace(CONFIG.vision_config, **SMALL))
NAMES = [name for name in expected_tensors(SMALL_CONFIG) if name.startswith(("vision_tower.", "mm_projector."))]


def random_params(rng, config, dtype):
    """Large enough for every nonlinearity to matter."""
    params = {}
    for name, (shape, _) in expected_tensors(config).items():
        if name.startswith(("vision_tower.", "mm_projector.")):
            wide = len(shape) > 1 and not name.endswith("pos_emb.weight")
            scale = 1.5 * np.prod(shape[1:]) ** -0.5 if wide else 0.5
            centre = 1.0 if "norm" in name and name.endswith(".weight") else 0.0
            params[name] = (centre + scale * rng.standard_normal(shape)).astype(dtype)
    return params


def mixed_items(rng):
    """Two grids, one of them twice with another between, and a chunk of video."""
    grids = [(2, 4), (4, 2), (2, 4)]
    return [random_item(rng, *grid) for grid in grids] + [random_item(rng, 2, 6, 3, "00:00:00.000")]


def random_drows(rng, items, config, dtype):
    shapes = [(item.tokens, config.vision_config.text_hidden_size) for item in items]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(backward_vision, "ops", reference)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(rng, in_float64, name):
    """Along a random direction of one parameter, and of its single numbers that of the largest gradient."""
    items, params = mixed_items(rng), random_params(rng, SMALL_CONFIG, np.float64)
    drows = random_drows(rng, items, SMALL_CONFIG, np.float64)

    def value():
        rows, _ = backward_vision.forward(params, SMALL_CONFIG, items)
        return sum(np.sum(r * d) for r, d in zip(rows, drows, strict=True))

    _, saved = backward_vision.forward(params, SMALL_CONFIG, items)
    grads = backward_vision.backward(params, SMALL_CONFIG, saved, drows)
    assert grads.keys() == params.keys()
    grad, param = grads[name], params[name]
    assert grad.shape == param.shape
    one = np.zeros(param.shape)
    one.flat[np.abs(grad).argmax()] = 1
    for direction in (rng.standard_normal(param.shape), one):
        h = 1e-5 / np.sqrt(np.mean(direction**2) * param.size)
        params[name] = param + h * direction
        above = value()
        params[name] = param - h * direction
        expected, scale = (above - value()) / (2 * h), np.linalg.norm(grad) * np.linalg.norm(direction)
        assert abs(np.sum(grad * direction) - expected) <= 1e-7 * scale and scale > 0


def test_forward_is_the_oracle(rng, in_float64):
    items, params = mixed_items(rng), random_params(rng, SMALL_CONFIG, np.float64)
    rows, _ = backward_vision.forward(params, SMALL_CONFIG, items)
    for item, found in zip(items, rows, strict=True):
        patches = np.float64(item.normalised(0, len(item.patches)))
        expected = encode(params, SMALL_CONFIG.vision_config, patches, item.grid)
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-6
        )  # tables are float32, as in the checkpoint's tower


def test_forward_is_what_runs(rng, tmp_path):
    """VisionModel.encode on a checkpoint, whose bf16 weights are exact in float32."""
    folder = make_tiny(tmp_path / "checkpoint")
    checkpoint = Checkpoint(folder)
    params = {name: np.float32(checkpoint[name]) for name in NAMES}
    items = mixed_items(rng) + [random_item(rng, 8, 12)]
    rows, _ = backward_vision.forward(params, CONFIG, items)
    encoded = VisionModel(CONFIG.vision_config, Weights(checkpoint, "")).encode(items)
    for found, expected in zip(rows, encoded, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())


def assert_close(grads, expected, tolerance):
    """To the norm of each gradient."""
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        away = np.linalg.norm(np.float64(grad) - expected[name]) / np.linalg.norm(expected[name])
        assert grad.shape == expected[name].shape and away <= tolerance, f"{name}: {away:.3g}, allowed {tolerance}"


def test_gradients_in_float32(rng, monkeypatch):
    """Against float64 ones; 1.6e-6 of the norm of each were seen."""
    items, params = mixed_items(rng), random_params(rng, CONFIG, np.float32)
    drows = random_drows(rng, items, CONFIG, np.float32)
    _, saved = backward_vision.forward(params, CONFIG, items)
    grads = backward_vision.backward(params, CONFIG, saved, drows)
    assert {grad.dtype for grad in grads.values()} == {np.dtype(np.float32)}
    monkeypatch.setattr(backward_vision, "ops", reference)
    exact = {name: np.float64(param) for name, param in params.items()}
    _, saved = backward_vision.forward(exact, CONFIG, items)
    assert_close(grads, backward_vision.backward(exact, CONFIG, saved, drows), 5e-6)


@pytest.mark.parametrize("scores", [1, 150, backward_vision.SCORES])
def test_items_together_are_items_one_by_one(rng, in_float64, monkeypatch, scores):
    """However many attend together: rows of each item, and the sum of their gradients."""
    monkeypatch.setattr(backward_vision, "SCORES", scores)
    items, params = mixed_items(rng) + mixed_items(rng), random_params(rng, SMALL_CONFIG, np.float64)
    drows = random_drows(rng, items, SMALL_CONFIG, np.float64)
    rows, saved = backward_vision.forward(params, SMALL_CONFIG, items)
    assert len(saved.groups) == {1: 8, 150: 5}.get(scores, 3)
    grads, total = backward_vision.backward(params, SMALL_CONFIG, saved, drows), dict.fromkeys(params, 0)
    for item, found, drow in zip(items, rows, drows, strict=True):
        (alone,), saved = backward_vision.forward(params, SMALL_CONFIG, [item])
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-13)
        for name, grad in backward_vision.backward(params, SMALL_CONFIG, saved, [drow]).items():
            total[name] = total[name] + grad
    assert_close(grads, total, 1e-12)


def test_gelu_backward_at_its_ends(in_float64, monkeypatch):
    """Its derivative at 0, of which the quotient gelu(x) / x says nothing, and where it is that of 0 and of x."""
    monkeypatch.setattr(backward_vision, "PIECE", 4)
    x = np.array([0.0, -0.0, 5e-324, 1e-30, -60.0, 60.0])
    for tanh in (False, True):
        d = np.full(6, 2.0)
        with np.errstate(all="raise", under="ignore"):
            backward_vision._gelu_backward(x, reference.gelu(x, tanh=tanh), d, tanh)
        np.testing.assert_allclose(d, [1, 1, 1, 1, 0, 2], rtol=0, atol=1e-15)


def test_no_items(rng):
    params = random_params(rng, SMALL_CONFIG, np.float32) | {"language_model.model.norm.weight": np.ones(3, np.float32)}
    rows, saved = backward_vision.forward(params, SMALL_CONFIG, [])
    grads = backward_vision.backward(params, SMALL_CONFIG, saved, [])
    assert rows == [] and sorted(grads) == sorted(NAMES)
    assert all(not grad.any() and grad.shape == params[name].shape for name, grad in grads.items())


def message_of(error, call, *arguments):
    with pytest.raises(error) as raised:
        call(*arguments)
    return str(raised.value)


def test_what_does_not_fit(rng, in_float64):
    params, items = random_params(rng, SMALL_CONFIG, np.float64), mixed_items(rng)
    odd = random_item(rng, 2, 3)
    says = message_of(ValueError, backward_vision.forward, params, SMALL_CONFIG, [items[0], odd])
    assert says == "items[1] has a grid of 2 x 3 patches, expected even numbers"
    text = dataclasses.replace(CONFIG, vision_config=None)
    says = message_of(ValueError, backward_vision.forward, params, text, items)
    assert says == "backward_vision.forward: config has no vision_config, expected one for 4 items"
    rows, saved = backward_vision.forward(params, SMALL_CONFIG, items)
    says = message_of(ValueError, backward_vision.backward, params, SMALL_CONFIG, saved, rows[:3])
    assert says == "backward_vision.backward: drows has 3 arrays, expected 4"
    bad = [*rows[:3], rows[3][:2]]
    says = message_of(ValueError, backward_vision.backward, params, SMALL_CONFIG, saved, bad)
    assert says == "backward_vision.backward: drows[3] has shape [2, 10], expected [3, 10]"
    del params["mm_projector.proj.0.bias"]
    assert "mm_projector.proj.0.bias" in message_of(KeyError, backward_vision.forward, params, SMALL_CONFIG, items)
