"""MuonClip: Newton-Schulz by its numbers, Muon and AdamW against float64 formulas, QK-Clip against layers' scores."""

import sys

import fake_cupy
import numpy as np
import pytest
import reference
from arrays import normal, same_bits
from close import assert_close
from kimi_native.checkpoint import expected_tensors
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config
from kimi_native.train import muonclip
from kimi_native.train.muonclip import AttentionHeads, MuonClip, mla_heads, newton_schulz, update_router_bias
from reference import model as reference_model

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalised(g, steps=5):
    """Newton-Schulz as it is written, in float64."""
    g = np.float64(g)
    if g.shape[0] > g.shape[1]:
        return orthogonalised(g.T, steps).T
    x = g / (np.linalg.norm(g) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


def apart(x, g):
    """How far x is from Newton-Schulz of g in float64: the largest singular value of the difference."""
    return np.linalg.norm(x - orthogonalised(g), 2)


def singular_values(x):
    return np.linalg.svd(np.float64(x), compute_uv=False)


def scalar_map(s, steps):
    """What Newton-Schulz makes of singular values s [K] of matrices of norm 1: those of diag(s, sqrt(1 - s^2))."""
    g = np.zeros((len(s), 2, 2), np.float32)
    g[:, 0, 0], g[:, 1, 1] = s, np.sqrt(1 - s**2)
    x = newton_schulz(g, steps)
    assert not x[:, 0, 1].any() and not x[:, 1, 0].any()
    return x[:, 0, 0]


def test_map_of_singular_values():
    s = np.geomspace(0.01, 1, 4001)
    expected = s.copy()
    for _ in range(5):
        expected = A * expected + B * expected**3 + C * expected**5
    mapped = scalar_map(s, 5)
    assert np.abs(mapped - expected).max() < 1e-5
    assert (round(float(mapped.min()), 3), round(float(mapped.max()), 3)) == (0.682, 1.134)
    assert round(float(scalar_map(np.geomspace(0.002, 1, 4001), 5).max()), 3) == 1.202
    assert round(float(scalar_map(s, 3).min()), 2) == 0.40
    tiny = np.array([1e-4])
    assert round(float(scalar_map(tiny, 5)[0]), 3) == 0.048
    assert round(float(scalar_map(tiny, 10)[0]), 3) == 0.755


@pytest.mark.parametrize(
    ("shape", "least", "most", "mean", "rms"),
    [
        ((256, 1024), 0.683, 1.134, 0.944, 0.191),
        ((512, 512), 0.0, 1.203, 0.923, 0.188),  # the smallest is 0.04 to 0.08, by chance
        ((64, 2048), 0.68, 0.90, 0.732, 0.147),
    ],
)
def test_gaussian_matrices(rng, shape, least, most, mean, rms):
    g = normal(rng, *shape)
    x = newton_schulz(g)
    s = singular_values(x)
    assert least <= s.min() + 1e-3 and s.max() <= most + 1e-3
    assert s.mean() == pytest.approx(mean, abs=3e-3)
    update = 0.2 * max(shape) ** 0.5 * np.float64(x)
    assert np.sqrt(np.mean(update**2)) == pytest.approx(rms, abs=1e-3)
    assert apart(x, g) < 1e-4  # 6e-5 was seen


def test_against_the_sign_of_the_matrix(rng):
    """The same singular vectors as U V^T, whose update has a root mean square of exactly 0.2."""
    g = normal(rng, 256, 1024)
    u, _, vt = np.linalg.svd(np.float64(g), full_matrices=False)
    sign = u @ vt
    assert 0.2 * np.sqrt(1024 * np.mean(sign**2)) == pytest.approx(0.2, rel=1e-12)
    x = newton_schulz(g)
    between = u.T @ x @ vt.T
    s = np.diag(between)
    assert np.abs(between - np.diag(s)).max() < 1e-5 and s.min() > 0.68 and s.max() < 1.135
    assert np.sum(x * sign) / np.linalg.norm(x) / np.linalg.norm(sign) > 0.98


def test_signal_of_rank_8_in_noise(rng):
    """Tiny directions are not lifted: most of the singular values stay small."""
    signal = normal(rng, 256, 8) @ normal(rng, 8, 1024)
    g = signal + normal(rng, 256, 1024, scale=0.01)
    x = newton_schulz(g)
    assert apart(x, g) < 2.0**-23 * A**8
    assert singular_values(x).mean() == pytest.approx(0.133, abs=0.01)
    assert 0.2 * np.sqrt(1024 * np.mean(np.float64(x) ** 2)) == pytest.approx(0.044, abs=0.003)


@pytest.mark.parametrize("least", [1e-3, 1e-6])
def test_spread_singular_values(rng, least):
    """From 1 down to the least, which float32 does not see beside 1 when squared."""
    (u, _), (v, _) = (np.linalg.qr(rng.standard_normal((rows, 128))) for rows in (128, 256))
    g = (u * np.geomspace(1, least, 128) @ v.T).astype(np.float32)
    assert apart(newton_schulz(g), g) < 2.0**-23 * A**8  # what the rounding of the first A has grown to in the last


@pytest.mark.parametrize("shape", [(64, 128), (40, 41), (1, 7), (1, 1)])
def test_the_transpose(rng, shape):
    """Gives the transpose, to the bit, whether it is a view or a copy."""
    g = normal(rng, 3, *shape)
    turned = newton_schulz(g.swapaxes(1, 2))
    assert same_bits(turned, newton_schulz(np.ascontiguousarray(g.swapaxes(1, 2))))
    assert same_bits(turned.swapaxes(1, 2), newton_schulz(g))


def test_batches(rng):
    """Over any leading axes, each matrix by itself; zeros stay zeros beside others; the argument stays."""
    g = normal(rng, 2, 3, 24, 40)
    g[1, 1] = 0
    before = g.copy()
    x = newton_schulz(g)
    assert same_bits(g, before) and not x[1, 1].any()
    for at in np.ndindex(2, 3):
        assert same_bits(x[at], newton_schulz(g[at]))


def test_scales_of_a_matrix(rng):
    g = normal(rng, 24, 40)
    for scale in (2.0**-100, 2.0**-14, 1.0, 2.0**50):  # of the smallest 1e-7, added to the norm, leaves next to nothing
        scaled = np.float32(scale) * g
        assert apart(newton_schulz(scaled), scaled) < 1e-4


@pytest.mark.parametrize(("g", "steps"), [(np.zeros(3, np.float32), 5), (np.zeros((3, 3), np.float32), 0)])
def test_newton_schulz_rejects(g, steps):
    with pytest.raises(ValueError, match="newton_schulz: g has shape .* steps is"):
        newton_schulz(g, steps)
    with pytest.raises(TypeError, match="matmul"):
        newton_schulz(np.zeros((3, 4)))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(rng, nesterov):
    """Four steps against the formula in float64, the learning rate a new one each time."""
    shapes = {"wide": (24, 40), "tall": (48, 16), "experts": (3, 16, 24)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    expected = {name: np.float64(w) for name, w in params.items()}
    momenta = {name: np.zeros(shape) for name, shape in shapes.items()}
    optimizer = MuonClip(params, momentum=0.9, weight_decay=0.2, nesterov=nesterov)
    for lr in (0.1, 0.05, 0.2, 0.1):
        grads = {name: normal(rng, *shape) for name, shape in shapes.items()}
        assert optimizer.step(grads, lr=lr) == 0
        for name, g in grads.items():
            m = momenta[name] = 0.9 * momenta[name] + g
            u = g + 0.9 * m if nesterov else m
            o = np.stack([orthogonalised(matrix) for matrix in u]) if u.ndim == 3 else orthogonalised(u)
            w = expected[name]
            expected[name] = w - lr * (o * 0.2 * max(w.shape[-2:]) ** 0.5 + 0.2 * w)
    for name, w in params.items():
        assert_close(w, expected[name], reduction=20 * max(w.shape))


def test_adamw(rng):
    """Of a matrix in blocks, a vector, a scalar and what only looks like matrices."""
    shapes = {"embed.weight": (2**10, 300), "norm": (33,), "scalar": (), "lm_head": (4, 5), "conv": (3, 2, 2, 2)}
    params = {name: np.asarray(normal(rng, *shape)) for name, shape in shapes.items()}
    expected = {name: np.float64(w) for name, w in params.items()}
    first, second = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    optimizer = MuonClip(params, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3)
    for step in range(1, 5):
        grads = {name: np.asarray(normal(rng, *shape)) for name, shape in shapes.items()}
        optimizer.step(grads)
        for name, g in grads.items():
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * np.float64(g) ** 2
            change = first[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-3)
            expected[name] -= 0.1 * (change + 0.2 * expected[name])
    assert all(name.split(".")[0] != "momentum" for name in optimizer.state_dict())
    for name, w in params.items():
        assert_close(w, expected[name], reduction=20, scale=1)


def test_decay_alone(rng):
    """Without gradients a step multiplies by 1 - lr weight_decay, matrices and vectors alike."""
    params = {"matrix": normal(rng, 8, 12), "norm": normal(rng, 9), "embed": normal(rng, 5, 4)}
    before = {name: w.copy() for name, w in params.items()}
    MuonClip(params, lr=0.5, weight_decay=0.1).step({name: np.zeros_like(w) for name, w in params.items()})
    for name, w in params.items():
        assert same_bits(w, before[name] * np.float32(0.95))


def test_who_updates_what(rng):
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "lm_head.weight": (6, 4),
        "vision_tower.patch_embed.pos_emb.weight": (3, 3, 4),
        "vision_tower.patch_embed.proj.weight": (4, 3, 2, 2),
        "model.layers.1.mlp.gate.e_score_correction_bias": (3,),
        "model.norm.weight": (4,),
        "model.layers.1.mlp.gate.weight": (3, 4),
        "model.layers.1.mlp.experts.up_proj.weight": (3, 2, 4),
        "mm_projector.proj.0.weight": (4, 4),
    }
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    named = list(shapes)
    state = MuonClip(params).state_dict()
    assert [name for name in state if name.startswith("momentum.")] == [f"momentum.{name}" for name in named[-3:]]
    moments = [f"first_moment.{name}" for name in (*named[:4], named[5])]
    assert [name for name in state if name.startswith("first_moment.")] == moments
    assert not any(name.startswith("momentum.") for name in MuonClip(params, muon=()).state_dict())
    mine = MuonClip(params, muon=["lm_head.weight"]).state_dict()
    assert [name for name in mine if name.startswith("momentum.")] == ["momentum.lm_head.weight"]


@pytest.mark.parametrize("room", [1, 3, 1000])
def test_grouping_changes_nothing(rng, room, monkeypatch):
    """Matrices of one shape go together, as many as there is room for; each gets what it would get alone."""
    shapes = {"a": (16, 24), "b": (4, 16, 24), "c": (16, 24), "tall": (24, 16), "d": (2, 16, 24)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    grads = {name: normal(rng, *shape) for name, shape in shapes.items()}
    alone = {name: w.copy() for name, w in params.items()}
    for name, w in alone.items():
        one = MuonClip({name: w})
        one.step({name: grads[name]})
        one.step({name: grads[name]})
    monkeypatch.setattr(muonclip, "GROUP_BYTES", room * 16 * 24 * 4)
    together = MuonClip(params)
    together.step(grads)
    together.step(grads)
    assert all(same_bits(params[name], alone[name]) for name in shapes)


def test_split_heads(rng):
    """Each head's rows as an expert's matrix."""
    params = {"q": normal(rng, 12, 8), "k": normal(rng, 12, 8), "o": normal(rng, 8, 12)}
    grads = {name: normal(rng, *w.shape) for name, w in params.items()}
    stacked = {name: w.copy().reshape((3, 4, 8) if name in "qk" else w.shape) for name, w in params.items()}
    MuonClip(stacked).step({name: g.reshape(stacked[name].shape) for name, g in grads.items()})
    MuonClip(params, heads=[AttentionHeads("q", "k", 3)], tau=None, split_heads=True).step(grads)
    assert all(same_bits(w, stacked[name].reshape(w.shape)) for name, w in params.items())


@pytest.fixture(scope="module")
def attention():
    """(config, heads of each layer, parameters of the attentions, input rows of each)"""
    config, rng = Config.from_dict(preset_config("tiny")), np.random.default_rng(5)
    shapes = {name: shape for name, (shape, _) in expected_tensors(config).items() if ".self_attn." in name}
    params = {name: normal(rng, *shape, scale=shape[-1] ** -0.5) for name, shape in shapes.items()}
    for name, w in params.items():
        if w.ndim == 1:
            params[name] = 1 + normal(rng, *w.shape, scale=0.1)
    text = config.text_config
    return config, mla_heads(config), params, normal(rng, text.num_hidden_layers, 24, text.hidden_size)


def largest_scores(config, heads, params, rows):
    """The largest score of each head of each layer, float64 [layers, N], by the float64 reference of attention."""
    largest, text = [], config.text_config
    for layer, h in zip(heads, np.float64(rows), strict=True):
        module = layer.q_b.removesuffix(".q_b_proj.weight")
        seen = np.zeros((len(h), text.num_attention_heads))

        def noting(*arguments, seen=seen):
            return reference.mla_prefill(*arguments, max_logits=seen)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference_model, "mla_prefill", noting)
            reference_model.attention(params, text, module, h)
        largest.append(seen.max(axis=0))
    return np.stack(largest)


def head_rows(w, heads):
    return w.reshape(heads.num_heads, -1, w.shape[1])


def test_clipped_heads_reach_tau(attention):
    """On the same input a clipped head's largest score is tau; the other heads, V, kv_a and momentum keep every bit."""
    config, heads, params, rows = attention
    before = largest_scores(config, heads, params, rows)
    tau = float(np.median(before))
    assert before.min() > 0 and len(heads) == config.text_config.num_hidden_layers
    params = {name: w.copy() for name, w in params.items()}
    kept = {name: w.copy() for name, w in params.items()}
    optimizer = MuonClip(params, tau=tau, heads=heads, lr=0.0)
    over = np.float32(before) > tau
    assert optimizer.step({name: np.ones_like(w) for name, w in params.items()}, list(np.float32(before))) == over.sum()
    after = largest_scores(config, heads, params, rows)
    assert 0 < over.sum() < over.size
    assert np.abs(after[over] / tau - 1).max() < 1e-6
    assert np.array_equal(after[~over], before[~over])
    touched = {name for layer in heads for name in (layer.q_b, layer.kv_b)}
    assert all(same_bits(w, kept[name]) for name, w in params.items() if name not in touched)
    for layer, clipped in zip(heads, over, strict=True):
        for name in (layer.q_b, layer.kv_b):
            assert same_bits(head_rows(params[name], layer)[~clipped], head_rows(kept[name], layer)[~clipped])
        nope = layer.qk_nope_head_dim
        values = head_rows(params[layer.kv_b], layer)[:, nope:]
        assert values.shape[1] == layer.v_head_dim
        assert same_bits(values, head_rows(kept[layer.kv_b], layer)[:, nope:])
    for name, m in optimizer.state_dict().items():
        assert not name.startswith("momentum.") or (m == 1).all()


def test_the_clip_comes_after_the_update(attention, rng):
    """It multiplies the updated weights by the factors of the step's own scores."""
    config, heads, params, rows = attention
    text, logits = config.text_config, normal(rng, len(heads), config.text_config.num_attention_heads, scale=80)
    plain, clipped = ({name: w.copy() for name, w in params.items()} for _ in range(2))
    grads = {name: normal(rng, *w.shape) for name, w in params.items()}
    assert MuonClip(plain, tau=None, heads=heads).step(grads, logits) == 0
    assert MuonClip(clipped, tau=50.0, heads=heads).step(grads, logits) == (logits > 50).sum() > 0
    dn, dr = text.qk_nope_head_dim, text.qk_rope_head_dim
    for layer, scores in zip(heads, logits, strict=True):
        gamma = np.minimum(1, 50 / np.maximum(np.float64(scores), 50))
        root, whole = np.float32(gamma**0.5)[:, None, None], np.float32(gamma)[:, None, None]
        q, kv = head_rows(plain[layer.q_b], layer), head_rows(plain[layer.kv_b], layer)
        q[:, :dn] *= root
        q[:, dn : dn + dr] *= whole
        kv[:, :dn] *= root
    assert all(same_bits(clipped[name], plain[name]) for name in params)


def test_plain_attention(rng):
    params = {"q": normal(rng, 12, 8), "k": normal(rng, 12, 8), "v": normal(rng, 12, 8)}
    kept, x = {name: w.copy() for name, w in params.items()}, rng.standard_normal((10, 8))

    def scores():
        q, k = ((x @ params[name].T).reshape(10, 3, 4) for name in "qk")
        return np.einsum("ind,jnd->nij", q, k).max(axis=(1, 2))

    before = scores()
    tau = float(np.median(before)) * 1.01
    optimizer = MuonClip(params, tau=tau, heads=[AttentionHeads("q", "k", 3)], lr=0.0)
    assert optimizer.step({name: np.zeros_like(w) for name, w in params.items()}, [np.float32(before)]) == 1
    high = int(before.argmax())
    assert scores()[high] == pytest.approx(tau, rel=1e-6)
    for name, w in params.items():
        same = (w.reshape(3, 4, 8) == kept[name].reshape(3, 4, 8)).all(axis=(1, 2))
        assert same.tolist() == [name == "v" or head != high for head in range(3)]


def test_scores_that_are_not_above_tau(rng):
    """tau itself, negative and zero scores leave every bit."""
    params = {"q": normal(rng, 12, 8), "k": normal(rng, 12, 8)}
    kept = {name: w.copy() for name, w in params.items()}
    optimizer = MuonClip(params, tau=5.0, heads=[AttentionHeads("q", "k", 4)], lr=0.0)
    zero = {name: np.zeros_like(w) for name, w in params.items()}
    assert optimizer.step(zero, [np.array([5, -1e9, 0, -0.0], np.float32)]) == 0
    assert all(same_bits(w, kept[name]) for name, w in params.items())


def test_router_bias():
    bias = np.array([0.5, 0.0, -0.25, 1.0], np.float32)
    update_router_bias(bias, np.array([10, 0, 4, 2]), 0.125)  # the mean is 4: signs -1, 1, 0, 1, whose mean is 1/4
    assert bias.tolist() == [0.5 - 0.15625, 0.09375, -0.25 - 0.03125, 1.09375]
    update_router_bias(bias, np.array([7, 7, 7, 7]), 0.125)
    update_router_bias(bias, np.array([9, 1, 0, 2]), 0.0)
    assert bias.tolist() == [0.5 - 0.15625, 0.09375, -0.25 - 0.03125, 1.09375]


@pytest.mark.parametrize(
    ("bias", "tokens", "error"),
    [
        (np.zeros(3), np.zeros(3, np.int64), TypeError),
        (np.zeros(3, np.float32), np.zeros(3), TypeError),
        (np.zeros(3, np.float32), np.zeros(4, np.int64), ValueError),
        (np.zeros((1, 3), np.float32), np.zeros((1, 3), np.int64), ValueError),
    ],
)
def test_router_bias_rejects(bias, tokens, error):
    with pytest.raises(error, match="update_router_bias: bias .* tokens_per_expert"):
        update_router_bias(bias, tokens, 0.1)


SHAPES = {"q": (12, 8), "k": (12, 8), "experts": (2, 8, 4), "norm": (8,), "embed": (6, 8)}
HEADS = [AttentionHeads("q", "k", 3)]
LOGITS = [np.array([90, 120, 300], np.float32)]


def made(rng):
    return {name: normal(rng, *shape) for name, shape in SHAPES.items()}


def test_resumed_bit_for_bit(rng, tmp_path):
    """Six steps in one go, and three, saved, loaded and three more."""
    params, grads = made(rng), [made(rng) for _ in range(6)]
    resumed = {name: w.copy() for name, w in params.items()}
    whole = MuonClip(params, heads=HEADS)
    for g in grads:
        assert whole.step(g, LOGITS) == 2
    first = MuonClip(resumed, heads=HEADS)
    for g in grads[:3]:
        first.step(g, LOGITS)
    np.savez(tmp_path / "state.npz", **first.state_dict())
    resumed = {name: w.copy() for name, w in resumed.items()}
    second = MuonClip(resumed, heads=HEADS)
    with np.load(tmp_path / "state.npz") as state:
        second.load_state_dict(state)
    for g in grads[3:]:
        second.step(g, LOGITS)
    assert second.state_dict().keys() == whole.state_dict().keys()
    assert all(same_bits(np.asarray(x), second.state_dict()[name]) for name, x in whole.state_dict().items())
    assert all(same_bits(w, resumed[name]) for name, w in params.items())


def test_a_state_that_does_not_fit(rng):
    optimizer = MuonClip(made(rng))
    optimizer.step(made(rng))
    state = {name: np.array(x) for name, x in optimizer.state_dict().items()}
    other = MuonClip(made(rng))
    for name, bad, message in (
        ("momentum.q", None, "state lacks momentum.q"),
        ("momentum.r", state["momentum.q"], "state has momentum.r"),
        ("first_moment.norm", np.ones(9, np.float32), r"first_moment.norm is float32 \[9\]"),
        ("second_moment.norm", np.ones(8), r"second_moment.norm is float64 \[8\]"),
        ("steps", np.float64(3), "steps is float64"),
    ):
        wrong = {key: x for key, x in {**state, name: bad}.items() if x is not None}
        with pytest.raises(ValueError, match=f"load_state_dict: {message}"):
            other.load_state_dict(wrong)
    assert other.steps == 0 and not any(x.any() for x in other.state_dict().values())


def with_value(value):
    def change(g):
        g = g.copy()
        g.flat[-1] = value
        return g

    return change


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("embed", None, ValueError, "embed has no gradient"),
        ("other", lambda g: g, ValueError, "a gradient for other, which is no parameter"),
        ("norm", lambda g: g[:, None], ValueError, r"gradient of norm has shape \[8, 1\], expected \[8\]"),
        ("q", lambda g: g.T, ValueError, r"gradient of q has shape \[8, 12\], expected \[12, 8\]"),
        ("experts", lambda g: g.astype(np.float64), TypeError, "gradient of experts is .* of float64, expected"),
        ("experts", lambda g: g.tolist(), TypeError, "gradient of experts is builtins.list of no dtype, expected"),
        ("embed", with_value(np.nan), FloatingPointError, "gradient of embed is not finite"),
        ("norm", with_value(-np.inf), FloatingPointError, "gradient of norm is not finite"),
        (
            "experts",
            with_value(1e16),
            FloatingPointError,
            "gradient of experts is not finite or its norm above 1e\\+15",
        ),
    ],
)
def test_gradients_that_are_refused(rng, name, change, error, message):
    params, grads = made(rng), made(rng)
    optimizer = MuonClip(params, heads=HEADS)
    optimizer.step(grads, LOGITS)
    kept, state = ({key: x.copy() for key, x in arrays.items()} for arrays in (params, optimizer.state_dict()))
    wrong = {key: g for key, g in grads.items() if key != name}
    if change is not None:
        wrong[name] = change(grads.get(name, grads["q"]))
    with pytest.raises(error, match=message):
        optimizer.step(wrong, LOGITS)
    assert all(same_bits(x, kept[key]) for key, x in params.items())
    assert all(same_bits(x, state[key]) for key, x in optimizer.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_logits": None}, ValueError, r"max_logits has arrays of shapes \[\], expected \[\(3,\)\]"),
        ({"max_logits": [LOGITS[0]] * 2}, ValueError, r"shapes \[\(3,\), \(3,\)\], expected \[\(3,\)\]"),
        ({"max_logits": [LOGITS[0][:2]]}, ValueError, r"shapes \[\(2,\)\], expected"),
        ({"max_logits": [np.array([1, np.inf, 1], np.float32)]}, FloatingPointError, r"max_logits\[0\]\[1\] .* is inf"),
        ({"max_logits": [np.array([1, 1, np.nan], np.float32)]}, FloatingPointError, r"max_logits\[0\]\[2\] .* is nan"),
        ({"max_logits": LOGITS, "lr": np.nan}, ValueError, "lr is nan"),
        ({"max_logits": LOGITS, "lr": -1.0}, ValueError, "lr is -1"),
    ],
)
def test_steps_that_are_refused(rng, arguments, error, message):
    params = made(rng)
    kept, optimizer = {name: w.copy() for name, w in params.items()}, MuonClip(params, heads=HEADS)
    with pytest.raises(error, match=f"step: .*{message}"):
        optimizer.step(made(rng), **arguments)
    assert all(same_bits(w, kept[name]) for name, w in params.items())
    assert not any(x.any() for x in optimizer.state_dict().values())


def test_logits_without_tau(rng):
    """They are not needed, but what is not finite still stops the step."""
    optimizer = MuonClip(made(rng), tau=None)
    assert optimizer.step(made(rng)) == optimizer.step(made(rng), LOGITS) == 0
    with pytest.raises(FloatingPointError, match=r"max_logits\[1\]\[0\]"):
        optimizer.step(made(rng), [LOGITS[0], np.array([np.nan], np.float32)])


READ_ONLY = np.zeros((2, 2), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ({}, {}, ValueError, "params has nothing to train"),
        ({"gate.e_score_correction_bias": np.zeros(3, np.float32)}, {}, ValueError, "params has nothing to train"),
        (
            {"w": np.zeros((2, 2))},
            {},
            TypeError,
            "parameter w is numpy.ndarray of float64, expected a numpy array of float",
        ),
        ({"w": np.zeros((2, 3), np.float32).T}, {}, ValueError, "parameter w is not contiguous"),
        ({"w": READ_ONLY}, {}, ValueError, "parameter w is not contiguous or cannot be written"),
        ({}, {"lr": np.inf}, ValueError, "lr is inf"),
        ({}, {"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
        ({}, {"momentum": 1.0}, ValueError, "momentum is 1.0"),
        ({}, {"ns_steps": 0}, ValueError, "ns_steps is 0"),
        ({}, {"betas": (0.9, 1.0)}, ValueError, r"betas is \(0.9, 1.0\)"),
        ({}, {"eps": 0.0}, ValueError, "eps is 0.0"),
        ({}, {"tau": 0.0}, ValueError, "tau is 0.0"),
        ({"w": np.zeros(3, np.float32)}, {"muon": ["w"]}, ValueError, "muon names w, expected a parameter of two axes"),
        ({"w": np.zeros(3, np.float32)}, {"muon": ["v"]}, ValueError, "muon names v"),
        (
            {"q": np.zeros((4, 3), np.float32)},
            {"heads": [AttentionHeads("q", "k", 2)]},
            ValueError,
            "names k, which is",
        ),
        (
            {"q": np.zeros((4, 3), np.float32)},
            {"heads": [AttentionHeads("q", "q", 3)]},
            ValueError,
            r"q has shape \[4, 3\]",
        ),
        (
            {"q": np.zeros((10, 3), np.float32), "kv": np.zeros((10, 3), np.float32)},
            {"heads": [muonclip.MLAHeads("q", "kv", 2, 3, 2, 3)]},
            ValueError,
            r"kv has shape \[10, 3\], heads\[0\] expects 2 x 6 rows",
        ),
    ],
)
def test_optimizers_that_are_refused(params, options, error, message):
    with pytest.raises(error, match=f"MuonClip: .*{message}"):
        MuonClip(params, **options)


@pytest.fixture
def cupy(monkeypatch):
    module = fake_cupy.module(fake_cupy.Gpu())
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_on_the_gpu(rng, cupy):
    """With a stand-in for CuPy, which mixes with no NumPy array: the same steps, clips and state."""
    params, grads = made(rng), [made(rng) for _ in range(3)]
    placed = {name: cupy.asarray(w) for name, w in params.items()}
    host, gpu = (MuonClip(arrays, heads=HEADS) for arrays in (params, placed))
    for g in grads:
        ours = gpu.step({name: cupy.asarray(x) for name, x in g.items()}, [cupy.asarray(LOGITS[0])])
        assert ours == host.step(g, LOGITS) == 2
    for name, w in params.items():
        assert_close(placed[name].get(), np.float64(w), reduction=100)
    state = gpu.state_dict()
    assert state.keys() == host.state_dict().keys() and all(type(x) is np.ndarray for x in state.values())
    again = {name: cupy.asarray(w.get()) for name, w in placed.items()}
    resumed = MuonClip(again, heads=HEADS)
    resumed.load_state_dict(state)
    for optimizer in (gpu, resumed):
        optimizer.step({name: cupy.asarray(g) for name, g in grads[0].items()}, LOGITS)
    assert all(same_bits(again[name].get(), w.get()) for name, w in placed.items())


def test_gpu_arrays_and_numpy_arrays_do_not_mix(rng, cupy):
    params, grads = made(rng), made(rng)
    with pytest.raises(TypeError, match="parameter norm is cupy.ndarray of float32, expected a numpy array"):
        MuonClip({**params, "norm": cupy.asarray(params["norm"])})
    optimizer = MuonClip({name: cupy.asarray(w) for name, w in params.items()})
    placed = {name: cupy.asarray(g) for name, g in grads.items()}
    with pytest.raises(TypeError, match="gradient of q is numpy.ndarray of float32, expected a cupy array"):
        optimizer.step({**placed, "q": grads["q"]})
    with pytest.raises(FloatingPointError, match="gradient of q is not finite"):
        optimizer.step({**placed, "q": cupy.asarray(with_value(np.nan)(grads["q"]))})


def test_router_bias_on_the_gpu(cupy):
    bias = cupy.asarray(np.zeros(4, np.float32))
    update_router_bias(bias, np.array([10, 0, 4, 2]), 0.125)
    update_router_bias(bias, cupy.asarray(np.array([10, 0, 4, 2])), 0.125)
    assert bias.get().tolist() == [-0.3125, 0.1875, -0.0625, 0.1875]
