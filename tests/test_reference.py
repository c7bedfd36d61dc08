"""The oracles against published values and identities that do not use them."""

from statistics import NormalDist
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import reference
from reference import model

BF16 = ml_dtypes.bfloat16

# YaRN of the published config, as float32 prints them
INVERSE_FREQUENCIES = [
    1.0, 0.713111103, 0.508527458, 0.362636536, 0.258600146, 0.184410617, 0.131505266, 0.0937778577,
    0.0668740347, 0.0437766574, 0.0284279585, 0.0182829555, 0.01161916, 0.00727411965, 0.00446584867,
    0.0026702038, 0.00153729669, 0.000834655075, 0.000408646069, 0.000158374969, 1.80702336e-05,
    1.28860838e-05, 9.18920978e-06, 6.55292706e-06, 4.67296513e-06, 3.33234311e-06, 2.37633071e-06,
    1.69458781e-06, 1.20842935e-06, 8.61744411e-07, 6.14519479e-07, 4.38220638e-07,
]  # fmt: skip


def yarn(factor=64.0, beta_fast=32.0):
    return SimpleNamespace(
        factor=factor,
        beta_fast=beta_fast,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
        original_max_position_embeddings=4096,
    )


def config(**changed):
    return SimpleNamespace(
        **{
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 3,
            "q_lora_rank": 20,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "rms_norm_eps": 1e-5,
            "mla_norm_eps": 1e-6,
            "rope_theta": 50000.0,
            "rope_scaling": yarn(),
            "routed_scaling_factor": 2.827,
            "norm_topk_prob": True,
            **changed,
        }
    )


def random_tensors(rng, c, vocab_size=17):
    shapes = {
        "model.embed_tokens.weight": (vocab_size, c.hidden_size),
        "lm_head.weight": (vocab_size, c.hidden_size),
    }
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    for layer in range(c.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes[f"{attention}.q_a_proj.weight"] = (c.q_lora_rank, c.hidden_size)
        shapes[f"{attention}.q_b_proj.weight"] = (c.num_attention_heads * qk, c.q_lora_rank)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (
            c.kv_lora_rank + c.qk_rope_head_dim,
            c.hidden_size,
        )
        kv_width = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        shapes[f"{attention}.kv_b_proj.weight"] = (kv_width, c.kv_lora_rank)
        shapes[f"{attention}.o_proj.weight"] = (c.hidden_size, c.num_attention_heads * c.v_head_dim)
        modules = [mlp] if layer == 0 else [f"{mlp}.shared_experts"]
        if layer > 0:
            modules += [f"{mlp}.experts.{e}" for e in range(c.n_routed_experts)]
            shapes[f"{mlp}.gate.weight"] = (c.n_routed_experts, c.hidden_size)
        for module in modules:
            shapes[f"{module}.gate_proj.weight"] = (c.moe_intermediate_size, c.hidden_size)
            shapes[f"{module}.up_proj.weight"] = (c.moe_intermediate_size, c.hidden_size)
            shapes[f"{module}.down_proj.weight"] = (c.hidden_size, c.moe_intermediate_size)
    tensors = {name: rng.standard_normal(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    norms = {"model.norm.weight": c.hidden_size}
    for layer in range(c.num_hidden_layers):
        name = f"model.layers.{layer}"
        norms[f"{name}.input_layernorm.weight"] = norms[f"{name}.post_attention_layernorm.weight"] = c.hidden_size
        norms[f"{name}.self_attn.q_a_layernorm.weight"] = c.q_lora_rank
        norms[f"{name}.self_attn.kv_a_layernorm.weight"] = c.kv_lora_rank
        tensors[f"{name}.mlp.gate.e_score_correction_bias"] = 0.1 * rng.standard_normal(c.n_routed_experts)
    return tensors | {name: rng.uniform(0.5, 1.5, size) for name, size in norms.items()}


def test_inverse_frequencies_of_the_published_config():
    got = model.inverse_frequencies(config(qk_rope_head_dim=64))
    assert np.allclose(got, INVERSE_FREQUENCIES, rtol=2e-7, atol=0)


def test_inverse_frequencies_without_yarn_and_with_a_step():
    plain = model.inverse_frequencies(config(qk_rope_head_dim=64, rope_scaling=None))
    assert np.allclose(plain, [50000 ** (-i / 32) for i in range(32)], rtol=1e-14)
    step = model.inverse_frequencies(config(qk_rope_head_dim=64, rope_scaling=yarn(32.0, 1.0)))
    assert np.allclose(step[:20], plain[:20]) and np.allclose(step[20:], plain[20:] / 32)


@pytest.mark.parametrize(
    ("factor", "scale"), [(64, 0.14467962580268923), (32, 0.13086079996295005), (40, 0.1352337788608801)]
)
def test_softmax_scale(factor, scale):
    c = config(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=yarn(factor))
    assert model.softmax_scale(c) == pytest.approx(scale, rel=1e-15)


def test_int4_examples():
    words = np.array([[0x0FEDCBA9, 0x76543210, 0, 0]], np.uint32).view(np.int32)
    q = reference.exact_int4(words, np.ones((1, 1), BF16))[0]
    assert q[:16].tolist() == [1, 2, 3, 4, 5, 6, 7, -8, -8, -7, -6, -5, -4, -3, -2, -1]
    w = reference.dequantize_int4(words, np.array([[0.0123291015625]], BF16))[0].astype(float)
    assert (w[6], w[2], w[7]) == (0.08642578125, 0.037109375, -0.0986328125)


def test_dequantize_rounds_to_nearest_even_by_integers():
    """The top 16 bits of the exact float32 product, rounded by adding half, against the dtype's rounding."""
    scale = np.arange(0x0080, 0x7D00, dtype=np.uint16).view(BF16)[:, None]
    words = np.repeat(np.array([[0x76543210, 0xFEDCBA98, 0, 0]], np.uint32).view(np.int32), len(scale), axis=0)
    u = reference.exact_int4(words, scale).astype(np.float32).view(np.uint32)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(reference.dequantize_int4(words, scale).view(np.uint16), rounded)


def test_quantize_returns_what_it_packed(rng):
    q = rng.integers(-7, 8, (5, 64))
    q[:, ::32] = 7
    packed, scale = reference.quantize_int4(q * 0.25)
    assert (np.float64(scale) == 0.25).all()
    assert np.array_equal(reference.exact_int4(packed, scale), q * 0.25)
    assert packed[0].view(np.uint32)[0] == sum((int(v) + 8) << (4 * i) for i, v in enumerate(q[0, :8]))


def test_rms_norm_gives_unit_rows(rng):
    out = reference.rms_norm(7 * rng.standard_normal((4, 50)), np.ones(50), 0)
    assert np.allclose((out**2).mean(axis=1), 1)
    assert np.allclose(reference.rms_norm(np.full((1, 3), 2.0), [1, 2, 3], 12.0), [[0.5, 1, 1.5]])


def test_layer_norm_gives_rows_of_mean_0_and_variance_1(rng):
    out = reference.layer_norm(7 * rng.standard_normal((4, 50)) + 3, np.ones(50), np.zeros(50), 0)
    assert np.allclose(out.mean(axis=1), 0) and np.allclose(out.var(axis=1), 1)
    assert np.allclose(reference.layer_norm([[2.0, 4.0]], [1, 2], [5, 6], 3.0), [[4.5, 7]])


def test_gelu_by_its_definitions():
    """Of the normal distribution, and as 0.5 x (1 + tanh(u))."""
    x = np.array([[-3.0, -0.5, 0.0, 1.0, 2.0]])
    assert np.allclose(reference.gelu(x), x * [[NormalDist().cdf(v) for v in x[0]]], rtol=1e-12)
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    assert np.allclose(reference.gelu(x - 1, np.ones(5), tanh=True), 0.5 * x * (1 + np.tanh(u)))


def test_silu_and_mul_is_x_times_sigmoid():
    gate, up = np.array([[-2.0, 0.0, 3.0]]), np.array([[5.0, 7.0, 0.5]])
    expected = gate * (1 + np.tanh(gate / 2)) / 2 * up
    assert np.allclose(reference.silu_and_mul(np.concatenate([gate, up], axis=1)), expected)


@pytest.mark.parametrize("transpose_weight", [False, True])
def test_batched_gemm_is_a_product_per_head(rng, transpose_weight):
    x, weight = rng.standard_normal((4, 3, 5)), rng.standard_normal((3, 5, 6))
    out = reference.batched_gemm(x, weight if transpose_weight else weight.swapaxes(1, 2), transpose_weight)
    assert np.allclose(out, np.stack([x[:, n] @ weight[n] for n in range(3)], axis=1))


def test_rope_multiplies_complex_numbers(rng):
    x, angle = rng.standard_normal((3, 2, 8)), rng.uniform(0, 6, (5, 4))
    positions = np.array([4, 0, 2])
    out = reference.rope(x, np.cos(angle), np.sin(angle), positions)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle[positions])[:, None]
    assert np.allclose(out[..., 0::2], turned.real) and np.allclose(out[..., 1::2], turned.imag)


def test_prefill_is_softmax_attention_key_by_key(rng):
    T, N, dn, R, dv = 5, 2, 3, 2, 4
    q, kv, k_pe = (
        rng.standard_normal((T, N, dn + R)),
        rng.standard_normal((T, N, dn + dv)),
        rng.standard_normal((T, R)),
    )
    out, lse = reference.mla_prefill(q, kv, k_pe, [0, T], [0, T], [0], 0.7, return_lse=True)
    for t in range(T):
        for n in range(N):
            p = np.array([np.exp(0.7 * (q[t, n, :dn] @ kv[j, n, :dn] + q[t, n, dn:] @ k_pe[j])) for j in range(t + 1)])
            assert np.allclose(out[t, n], p @ kv[: t + 1, n, dn:] / p.sum())
            assert np.isclose(lse[t, n], np.log(p.sum()))


def test_attention_is_prefill_of_which_all_is_seen(rng):
    q, k, v = (rng.standard_normal((9, 2, 4)) for _ in range(3))
    ends, nothing = [0, 3, 3, 9], np.zeros((9, 0))
    kv = np.concatenate([k, v], axis=2)
    assert np.allclose(
        reference.attention(q, k, v, ends, 0.7), reference.mla_prefill(q, kv, nothing, ends, ends, [9, 9, 9], 0.7)
    )


def test_prefill_continues_a_state(rng):
    q, kv, k_pe = rng.standard_normal((3, 2, 5)), rng.standard_normal((9, 2, 7)), rng.standard_normal((9, 2))
    whole = reference.mla_prefill(q, kv, k_pe, [0, 3], [0, 9], [6], 1.0, return_lse=True)
    state = None
    for a, b in ((0, 0), (0, 4), (4, 9)):
        state = reference.mla_prefill(
            q, kv[a:b], k_pe[a:b], [0, 3], [0, b - a], [6 - a], 1.0, state=state, return_lse=True
        )
    assert np.allclose(state[0], whole[0]) and np.allclose(state[1], whole[1])


def test_absorbed_form_equals_naive_form(rng):
    """Decode over the latent cache gives the last row of prefill over expanded keys and values."""
    S, N, C, R, dn, dv = 7, 3, 6, 4, 5, 2
    latent, k_pe, q = (
        rng.standard_normal((S, C)),
        rng.standard_normal((S, R)),
        rng.standard_normal((1, N, dn + R)),
    )
    kv_b = rng.standard_normal((N, dn + dv, C))
    kv = np.einsum("sc,noc->sno", latent, kv_b)
    naive, lse = reference.mla_prefill(q, kv, k_pe, [0, 1], [0, S], [S - 1], 0.3, return_lse=True)
    absorbed = reference.batched_gemm(q[..., :dn], kv_b[:, :dn], transpose_weight=True)
    cache, slots = np.full((4, 3, C + R), np.nan), np.array([9, 10, 11, 0, 1, 2, 6])
    cache = reference.append_mla_cache(latent, k_pe, cache, slots)
    query = np.concatenate([absorbed, q[..., dn:]], axis=2)[:, None]
    out, lse_absorbed = reference.mla_decode(query, cache, np.array([[3, 0, 2]]), [S], C, 0.3, return_lse=True)
    assert np.allclose(reference.batched_gemm(out[:, 0], kv_b[:, dn:]), naive)
    assert np.allclose(lse_absorbed[:, 0], lse)


def test_router_by_hand():
    logits = np.log([[1.0, 3.0, 1 / 3, 1.0]])  # sigmoids 1/2, 3/4, 1/4, 1/2
    weights, ids = reference.topk_sigmoid(logits, np.array([0, 0, 1, 0]), 3, 2.0)
    assert ids.tolist() == [[2, 1, 0]]
    assert np.allclose(weights, [[1 / 3, 1, 2 / 3]])


def test_experts_by_parts(rng):
    """Permute, grouped products and unpermute agree with the fused form and with a loop over tokens."""
    x, E = rng.standard_normal((7, 8)), 5
    gate, up = ([rng.standard_normal((6, 8)) for _ in range(E)] for _ in range(2))
    down = [rng.standard_normal((8, 6)) for _ in range(E)]
    ids = np.array([[0, 1], [1, 0], [4, -1], [-1, -1], [3, 4], [0, 3], [1, 4]], np.int32)
    weights = rng.uniform(0, 1, ids.shape)
    rows, offsets, inverse = reference.moe_permute(x, ids, E)
    hidden = np.concatenate([reference.grouped_gemm(rows, each, offsets) for each in (gate, up)], axis=1)
    y = reference.grouped_gemm(reference.silu_and_mul(hidden), down, offsets)
    by_parts = reference.moe_unpermute(y, weights, inverse)
    looped = np.zeros_like(x)
    for t, k in np.argwhere(ids >= 0):
        e, h = ids[t, k], x[t]
        looped[t] += weights[t, k] * down[e] @ (gate[e] @ h / (1 + np.exp(-gate[e] @ h)) * (up[e] @ h))
    assert np.allclose(by_parts, looped)
    assert np.allclose(reference.fused_moe(x, weights, ids, gate, up, down), looped)


def test_sampling_by_hand():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    ids, p = reference.kept_tokens(logits, 1.0, 3, 1.0, 0.0)
    assert ids.tolist() == [1, 3, 2] and np.allclose(p, [4 / 9, 3 / 9, 2 / 9])
    assert reference.kept_tokens(logits, 1.0, 0, 0.65, 0.0)[0].tolist() == [1, 3]
    assert reference.kept_tokens(logits, 1.0, 0, 1.0, 0.45)[0].tolist() == [1, 3, 2]
    drawn = [int(reference.top_k_top_p_sample(logits[None], [u], 1.0, 0, 1.0, 0.0)[0]) for u in (0, 0.39, 0.41, 0.95)]
    assert drawn == [1, 1, 3, 0]


def test_model_is_causal_and_uses_every_tensor(rng):
    c = config()
    tensors = random_tensors(rng, c)
    ids = rng.integers(0, 17, 40)  # enough tokens that every expert is routed to

    used = set()

    class Recorder(dict):
        def __getitem__(self, name):
            used.add(name)
            return super().__getitem__(name)

    whole = model.logits(Recorder(tensors), c, ids)
    assert whole.shape == (40, 17) and np.isfinite(whole).all()
    dense_bias = {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(c.first_k_dense_replace)}
    assert used == set(tensors) - dense_bias
    assert np.allclose(model.logits(tensors, c, ids[:23]), whole[:23])
    assert not np.allclose(model.logits(tensors, c, ids[1:]), whole[1:])


def test_model_reads_packed_experts_as_their_exact_values(rng):
    c = config(hidden_size=32)
    packed, plain = random_tensors(rng, c), {}
    for name in [name for name in packed if ".experts." in name]:
        codes, scale = reference.quantize_int4(packed.pop(name))
        packed[f"{name}_packed"], packed[f"{name}_scale"] = codes, scale
        plain[name] = reference.exact_int4(codes, scale)
    plain |= {name: value for name, value in packed.items() if ".experts." not in name}
    ids = rng.integers(0, 17, 9)
    assert np.array_equal(model.logits(packed, c, ids), model.logits(plain, c, ids))


def test_rotated_scores_depend_on_the_distance_alone(rng):
    c = config(qk_rope_head_dim=64)
    cos, sin = model.rope_tables(c, 50)
    q, k = rng.standard_normal((2, 1, 1, 64))
    scores = [np.sum(reference.rope(q, cos, sin, [a + 9]) * reference.rope(k, cos, sin, [a])) for a in range(40)]
    assert np.allclose(scores, scores[0])
    assert not np.isclose(scores[0], np.sum(q * k))
