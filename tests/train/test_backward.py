"""Loss and gradients: finite differences in float64 through the oracles, then float32 against float64."""

import dataclasses
import math

import kimi_native as kn
import numpy as np
import oracles
import pytest
import reference.model
from arrays import same_bits
from kimi_native import make_tiny as tiny
from kimi_native import ops
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config
from kimi_native.train import backward, backward_mla, backward_mlp, backward_vision, params
from kimi_native.train.batch import NO_LOSS, Batch
from media_items import random_item

MODULES = backward, backward_mla, backward_mlp
SMALL = {  # numbers that differ, so that no axis passes for another
    "hidden_size": 12,
    "intermediate_size": 10,
    "kv_lora_rank": 9,
    "moe_intermediate_size": 7,
    "n_routed_experts": 5,
    "num_attention_heads": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "vocab_size": 23,
    "eos_token_id": 1,
}
IDLE = "model.layers.1.mlp.gate.e_score_correction_bias"  # of a layer whose expert 3 gets no token


def small_config(**changes):
    return Config.from_dict(preset_config("tiny-k2", experts="bf16") | SMALL | changes)


def random_params(config, dtype=np.float64, seed=0):
    """Large enough that attention and routing are far from uniform."""
    rng, values = np.random.default_rng(seed), {}
    for name, shape in params.shapes(config).items():
        normal = rng.standard_normal(shape)
        if len(shape) == 1:
            normal = 0.3 * normal + (0 if name.endswith("bias") else 1)
        elif "embed_tokens" not in name:
            normal *= 1.5 / math.sqrt(shape[-1])
        values[name] = normal.astype(dtype)
    return values


def random_batch(config, lengths, seed=0, media=()):
    """Tokens that repeat; after every fifth there is nothing to predict."""
    rng, ends = np.random.default_rng(seed), np.cumsum([0, *lengths]).astype(np.int32)
    ids = rng.integers(0, config.text_config.vocab_size // 2, ends[-1]).astype(np.int32)
    targets = rng.integers(0, config.text_config.vocab_size, ends[-1]).astype(np.int32)
    targets[::5] = NO_LOSS
    return Batch(ids, targets, ends, media)


def assert_gradient(loss, array, gradient, name):
    """Central differences of loss() along a random direction, the largest three and a random element of `array`."""
    assert gradient.shape == array.shape, f"{name}: {gradient.shape}, expected {array.shape}"
    rng, step = np.random.default_rng(1), 1e-5
    elements = [*np.argsort(-np.abs(gradient), axis=None)[:3], rng.integers(array.size)]
    directions = [rng.standard_normal(array.shape)]
    directions[0] /= np.linalg.norm(directions[0])  # as long as one element
    directions += [(np.arange(array.size) == element).reshape(array.shape) for element in elements]
    held = array.copy()
    for direction in directions:
        array[...] = held + step * direction
        above = loss()
        array[...] = held - step * direction
        difference = (above - loss()) / (2 * step)
        array[...] = held
        expected = float(np.sum(gradient * direction))
        # the curvature's share is of order step^2, that of rounding 1e-16 / step
        assert abs(difference - expected) <= 1e-6 * abs(expected) + 2e-9, f"{name}: {expected}, measured {difference}"


@pytest.fixture
def float64(monkeypatch):
    oracles.use(monkeypatch, *MODULES)


def check_block(forward, back, w, h):
    """forward(h) -> (out, saved), back(saved, dout) -> (dh, gradients of w)."""
    out, saved = forward(h)
    dout = np.random.default_rng(2).standard_normal(out.shape)
    dh, grads = back(saved, dout)

    def loss():
        return float(np.sum(forward(h)[0] * dout))

    assert grads.keys() == {name for name in w if not name.endswith("bias")}
    assert_gradient(loss, h, dh, "h")
    for name, gradient in grads.items():
        assert_gradient(loss, w[name], gradient, name)


def of_layer(config, layer, module, seed=0):
    return params.below(random_params(config, seed=seed), f"model.layers.{layer}.{module}.")


@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "rope"])
def test_attention(float64, yarn):
    config = small_config(**({} if yarn else {"rope_scaling": None})).text_config
    if yarn:  # tables whose magnitude is not 1, and frequencies that are blended
        scaling = dataclasses.replace(config.rope_scaling, mscale=2.0, original_max_position_embeddings=16)
        config = dataclasses.replace(config, rope_scaling=scaling)
    w, sequences = of_layer(config_of(config), 0, "self_attn"), backward_mla.Sequences.of(config, int32(0, 4, 4, 5, 12))
    check_block(
        lambda h: backward_mla.forward(w, config, h, sequences),
        lambda saved, dout: backward_mla.backward(w, config, h, sequences, saved, dout),
        w,
        h := np.random.default_rng(3).standard_normal((12, config.hidden_size)),
    )


def config_of(text_config):
    return dataclasses.replace(small_config(), text_config=text_config)


def int32(*values):
    return np.array(values, np.int32)


def test_dense_layer(float64):
    config = small_config()
    w, h = of_layer(config, 0, "mlp"), np.random.default_rng(3).standard_normal((6, 12))
    check_block(
        lambda h: backward_mlp.forward(w, config.text_config, h),
        lambda saved, dout: backward_mlp.backward(w, config.text_config, h, saved, dout),
        w,
        h,
    )


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["normalised", "plain"])
def test_mixture_of_experts(float64, top_k, norm_topk_prob):
    config = small_config(num_experts_per_tok=top_k, norm_topk_prob=norm_topk_prob)
    w, h = of_layer(config, 1, "mlp"), np.random.default_rng(3).standard_normal((9, 12))
    check_block(
        lambda h: backward_mlp.forward(w, config.text_config, h),
        lambda saved, dout: backward_mlp.backward(w, config.text_config, h, saved, dout),
        w,
        h,
    )


@pytest.fixture
def whole():
    """A model in float64 with a batch of sequences, one of them empty, one expert idle."""
    config = small_config()
    values = random_params(config)
    values[IDLE][3] = -10
    return values, config, random_batch(config, [7, 1, 0, 11, 3])


def test_whole_model(float64, whole):
    values, config, batch = whole
    result = backward.loss_and_gradients(*whole)
    assert result.grads.keys() == {name for name in values if not name.endswith("e_score_correction_bias")}
    assert len(np.unique(batch.token_ids)) < len(batch.token_ids)
    for name, gradient in result.grads.items():
        assert_gradient(lambda: backward.loss(*whole), values[name], gradient, name)


def test_idle_expert_and_unseen_tokens_have_gradient_zero(float64, whole):
    _, config, batch = whole
    result = backward.loss_and_gradients(*whole)
    assert result.tokens_per_expert[IDLE][3] == 0 and np.count_nonzero(result.tokens_per_expert[IDLE]) == 4
    for part in ("gate", "up", "down"):
        per_expert = np.abs(result.grads[f"model.layers.1.mlp.experts.{part}_proj.weight"]).max(axis=(1, 2))
        assert (per_expert > 0).tolist() == [True, True, True, False, True]
    touched = np.abs(result.grads["model.embed_tokens.weight"]).max(axis=1) > 0
    assert np.flatnonzero(touched).tolist() == np.unique(batch.token_ids).tolist()
    assert np.flatnonzero(touched).size < config.text_config.vocab_size


def on_disk(values):
    return {name: view for stacked, array in values.items() for name, view in params.published(stacked, array)}


def reference_logits(values, config, batch):
    """float64 [T, V] by tests/reference, a sequence at a time."""
    pieces = [batch.token_ids[a:b] for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True) if a < b]
    tensors = on_disk(values)
    return np.concatenate([reference.model.logits(tensors, config.text_config, ids) for ids in pieces])


def test_logits_and_loss_are_those_of_the_reference(float64, whole):
    values, config, batch = whole
    expected = reference_logits(values, config, batch)
    # the tables are float32 here
    np.testing.assert_allclose(backward.logits(*whole), expected, rtol=0, atol=1e-5)
    assert same_bits(backward.logits(*whole), backward.logits(*whole))
    log_p = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    at = np.flatnonzero(batch.targets != NO_LOSS)
    assert 0 < len(at) < len(batch.targets)
    wanted = -np.mean(log_p[at, batch.targets[at]])
    assert backward.loss(*whole) == pytest.approx(wanted, rel=1e-5)
    assert backward.loss_and_gradients(*whole).loss == pytest.approx(backward.loss(*whole), rel=1e-14)


def test_max_logits_and_tokens_per_expert_are_those_of_the_reference(float64, whole, monkeypatch):
    values, config, batch = whole
    c, largest, chosen = config.text_config, [], []
    prefill, topk = reference.model.mla_prefill, reference.model.topk_sigmoid

    def recorded_prefill(q, kv, k_pe, *rest):
        scores = np.full((len(q), c.num_attention_heads), np.nan)
        out = prefill(q, kv, k_pe, *rest)
        for t in range(len(q)):  # keys 0 .. t, one head at a time
            for n in range(c.num_attention_heads):
                keys = np.concatenate([kv[: t + 1, n, : c.qk_nope_head_dim], k_pe[: t + 1]], axis=1)
                scores[t, n] = rest[-1] * (keys @ q[t, n]).max()
        largest.append(scores.max(axis=0))
        return out

    def recorded_topk(*args):
        weights, ids = topk(*args)
        chosen.append(np.bincount(ids.ravel(), minlength=c.n_routed_experts))
        return weights, ids

    monkeypatch.setattr(reference.model, "mla_prefill", recorded_prefill)
    monkeypatch.setattr(reference.model, "topk_sigmoid", recorded_topk)
    reference_logits(values, config, batch)
    result = backward.loss_and_gradients(*whole)
    per_layer = np.max(np.reshape(largest, (-1, c.num_hidden_layers, c.num_attention_heads)), axis=0)
    np.testing.assert_allclose(np.stack(result.max_logits), per_layer, rtol=0, atol=1e-5)
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    counts = np.sum(np.reshape(chosen, (-1, 2, c.n_routed_experts)), axis=0)
    assert {name: counts.tolist() for name, counts in result.tokens_per_expert.items()} == dict(
        zip(names, counts.tolist(), strict=True)
    )
    assert all(counts.dtype == np.int64 for counts in result.tokens_per_expert.values())


def test_the_head_in_pieces(float64, monkeypatch):
    config = small_config()
    values, batch = random_params(config), random_batch(config, [150, 90])
    whole = backward.loss_and_gradients(values, config, batch)
    monkeypatch.setattr(backward, "LOGITS", 0)  # 64 tokens, three pieces
    pieces = backward.loss_and_gradients(values, config, batch)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-13)
    assert backward.loss(values, config, batch) == pytest.approx(whole.loss, rel=1e-13)
    for name, gradient in whole.grads.items():
        np.testing.assert_allclose(pieces.grads[name], gradient, rtol=0, atol=1e-12 * np.abs(gradient).max())


def small_config_with_vision():
    values = preset_config("tiny", experts="bf16")
    values["text_config"] |= SMALL
    values["vision_config"] |= {"vt_num_hidden_layers": 1, "text_hidden_size": SMALL["hidden_size"]}
    return Config.from_dict(values | {"media_placeholder_token_id": 20, "eos_token_id": 1})


def test_media_rows_stand_for_placeholders(float64, monkeypatch):
    """The placeholder's embedding learns nothing from them, tower and projector do."""
    oracles.use(monkeypatch, backward_vision)
    config, rng = small_config_with_vision(), np.random.default_rng(4)
    values = random_params(config)
    batch = random_batch(config, [9, 8], media=(random_item(rng, 2, 6), random_item(rng, 4, 2)))
    batch.token_ids[2:5] = batch.token_ids[11:13] = 20
    result = backward.loss_and_gradients(values, config, batch)
    assert result.grads.keys() == {name for name in values if not name.endswith("e_score_correction_bias")}
    assert not result.grads["language_model.model.embed_tokens.weight"][20].any()
    for name in (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_a_proj.weight",
        "mm_projector.proj.2.weight",
        "vision_tower.patch_embed.proj.weight",
    ):
        assert_gradient(lambda: backward.loss(values, config, batch), values[name], result.grads[name], name)
    batch.token_ids[15] = 20
    with pytest.raises(ValueError, match="6 media placeholders"):
        backward.loss(values, config, batch)


def test_without_media_vision_has_gradient_zero_and_a_placeholder_is_a_token(float64):
    config = Config.from_dict(preset_config("tiny"))
    values = random_params(config)
    batch = random_batch(config, [5])
    batch.token_ids[2] = config.media_placeholder_token_id
    result = backward.loss_and_gradients(values, config, batch)
    assert result.grads.keys() == {name for name in values if not name.endswith("e_score_correction_bias")}
    vision = [name for name in values if name.startswith(("vision_tower.", "mm_projector."))]
    assert vision and not any(result.grads[name].any() for name in vision)
    assert result.grads["language_model.model.embed_tokens.weight"][batch.token_ids[2]].any()


ERRORS = {
    "token": (dict(token_ids=int32(1, 23, 2)), r"token_ids\[1\] is 23, expected 0 <= id < vocab_size 23"),
    "negative token": (dict(token_ids=int32(1, 2, -1)), r"token_ids\[2\] is -1"),
    "target": (dict(targets=int32(-2, 1, 1)), r"targets\[0\] is -2, expected -1 <= id"),
    "targets": (dict(targets=int32(1, 1)), "targets has 2 tokens, expected 3"),
    "no target": (dict(targets=int32(-1, -1, -1)), "targets has 3 times NO_LOSS, expected at least one"),
    "too long": (dict(cu_seqlens=int32(0, 4)), r"cu_seqlens is \[0, 4\], expected to ascend from 0 to 3"),
    "not from 0": (dict(cu_seqlens=int32(1, 3)), "cu_seqlens is"),
    "descending": (dict(cu_seqlens=int32(0, 2, 1, 3)), "cu_seqlens is"),
    "no sequence": (dict(cu_seqlens=int32(0)), "cu_seqlens is"),
    "int64": (dict(token_ids=np.array([1, 2, 3])), r"token_ids is int64 \[3\], expected int32"),
    "two axes": (dict(targets=int32(1, 2, 3)[None]), r"targets is int32 \[1, 3\], expected int32 with one axis"),
}


@pytest.mark.parametrize("function", [backward.loss_and_gradients, backward.loss, backward.logits])
@pytest.mark.parametrize("case", ERRORS)
def test_a_batch_that_does_not_fit_is_refused(float64, function, case):
    changes, message = ERRORS[case]
    batch = dataclasses.replace(Batch(int32(1, 2, 3), int32(2, 3, 4), int32(0, 3)), **changes)
    with pytest.raises(ValueError, match=f"^batch: .*{message}"):
        function(random_params(small_config()), small_config(), batch)


def test_a_loss_that_is_not_finite_is_named(float64, whole):
    values, config, batch = whole
    name = "model.layers.1.mlp.experts.down_proj.weight"
    values[name][4, 0, 0] = np.nan
    for function in (backward.loss_and_gradients, backward.loss):
        with pytest.raises(FloatingPointError, match=f"^loss is nan, .*parameter '{name}' is not finite"):
            function(values, config, batch)
    values[name][4, 0, 0] = 0
    values["model.layers.1.mlp.shared_experts.down_proj.weight"] *= 1e300
    values["model.layers.1.mlp.shared_experts.up_proj.weight"] *= 1e300
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="what enters layer 2 is not finite"):
        backward.loss_and_gradients(values, config, batch)


@pytest.mark.parametrize("function", [backward.loss_and_gradients, backward.loss, backward.logits])
def test_parameters_that_do_not_fit_are_named(float64, whole, function):
    values, config, batch = whole
    name = "model.layers.2.mlp.experts.up_proj.weight"
    with pytest.raises(ValueError, match=rf"^params: '{name}' is \[4, 7, 12\], expected \[5, 7, 12\]"):
        function(values | {name: values[name][1:]}, config, batch)
    del values[name]
    with pytest.raises(ValueError, match=rf"^params: '{name}' is missing, expected \[5, 7, 12\]"):
        function(values, config, batch)


FLOAT32 = 5e-6  # of the largest logit or, of each gradient, its norm; 2.3e-6 at most were seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("backward") / "tiny")


def test_float32_logits_are_those_of_the_model(folder):
    """Each sequence in a cache of its own."""
    model, values = kn.load(folder, cache_dtype="float32", activations="float32"), params.load(folder)
    batch = random_batch(model.config, [70, 1, 30])
    found = backward.logits(values, model.config, batch)
    assert found.dtype == np.float32
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        expected = model.forward(batch.token_ids[begin:end], model.new_cache(int(end - begin)))
        assert np.abs(found[begin:end] - expected).max() <= FLOAT32 * np.abs(expected).max()


@pytest.fixture(scope="module")
def published(folder):
    config = Config.from_folder(folder)
    return params.load(folder), config, random_batch(config, [120, 1, 40, 60])


def test_float32_gradients_are_those_in_float64(published, monkeypatch):
    values, config, batch = published
    found = backward.loss_and_gradients(*published)
    assert all(gradient.dtype == np.float32 for gradient in found.grads.values())
    oracles.use(monkeypatch, *MODULES)
    wide = {name: array.astype(np.float64) for name, array in values.items()}
    expected = backward.loss_and_gradients(wide, config, batch)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert {k: v.tolist() for k, v in found.tokens_per_expert.items()} == {
        k: v.tolist() for k, v in expected.tokens_per_expert.items()
    }
    for mine, wanted in zip(found.max_logits, expected.max_logits, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5)
    for name, gradient in expected.grads.items():
        assert np.linalg.norm(found.grads[name] - gradient) <= FLOAT32 * np.linalg.norm(gradient), name


def test_threads_change_no_bit(published):
    threads = ops.num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            ops.set_num_threads(count)
            results.append(backward.loss_and_gradients(*published))
    finally:
        ops.set_num_threads(threads)
    first = results[0]
    for other in results[1:]:
        assert other.loss == first.loss
        assert all(same_bits(other.grads[name], gradient) for name, gradient in first.grads.items())
        assert all(map(same_bits, other.max_logits, first.max_logits))
