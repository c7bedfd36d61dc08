"""top_k_top_p_sample: ids compare exactly; uniforms lie inside the intervals of the distribution."""

import numpy as np
import pytest
import reference
from arrays import BF16, assert_rejects, assert_rejects_faults, normal, same_bits, strided
from kimi_native import ops


def check_every_kept_token(on, logits, temperature, top_k, top_p, min_p):
    """The middle of a kept token's interval draws that token; the ends draw the first and a kept one."""
    ids, p = reference.kept_tokens(logits, temperature, top_k, top_p, min_p)
    wide = np.flatnonzero(p > 1e-4)  # an interval a float32 sum places well
    wide = np.unique(np.r_[wide[:8], wide[:: max(1, wide.size // 24)], wide[-8:]])
    middle = (np.cumsum(p) - p / 2)[wide].astype(np.float32)
    rows = np.repeat(logits[None], len(middle), axis=0)
    drawn = on(ops.top_k_top_p_sample, rows, middle, temperature, top_k, top_p, min_p)
    assert same_bits(drawn, ids[wide].astype(np.int32))
    edges = np.array([0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    first, last = on(ops.top_k_top_p_sample, rows[[0, 0]], edges, temperature, top_k, top_p, min_p)
    assert first == ids[0] and last in ids


@pytest.mark.parametrize("V", [1, 2, 7, 31, 257, 5003])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 5, 1.0, 0.0),
        (1.0, 0, 0.7123, 0.0),
        (1.0, 0, 1.0, 0.1234),
        (0.8, 40, 0.9512, 0.0517),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 1e-6, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1.0, 10**6, 1.0, 0.0),
        (0.0, 3, 0.5, 0.5),
    ],
)
def test_draws_from_the_kept_tokens(on, rng, V, temperature, top_k, top_p, min_p):
    logits = rng.permutation(np.linspace(-4, 4, V)).astype(np.float32)  # no two tokens alike
    check_every_kept_token(on, logits, temperature, top_k, top_p, min_p)


def test_model_vocabulary(on, rng):
    logits = normal(rng, 2, 163840, scale=3)
    logits[0, 163839] = 30
    uniform = np.array([0.5, 0.25], np.float32)
    assert on(ops.top_k_top_p_sample, logits, uniform, 0.0, 0, 1.0, 0.0).tolist() == [
        163839,
        int(logits[1].argmax()),
    ]
    assert on(ops.top_k_top_p_sample, logits[:1], uniform[:1], 1.0, 0, 0.95, 0.0).tolist() == [163839]
    expected = reference.top_k_top_p_sample(logits, uniform, 0.6, 50, 0.95, 0.0)
    assert same_bits(on(ops.top_k_top_p_sample, logits, uniform, 0.6, 50, 0.95, 0.0), expected)


def test_settings_per_row(on, rng):
    logits = np.stack([rng.permutation(np.linspace(-3, 3, 61)) for _ in range(5)]).astype(np.float32)
    uniform = np.array([0.31, 0.62, 0.93, 0.07, 0.5], np.float32)
    settings = (
        np.array([0, 1, 0.5, 2, 1], np.float32),
        np.array([0, 3, 0, 10, 0], np.int32),
        np.array([1, 1, 0.8021, 1, 0.3017], np.float32),
        np.array([0, 0, 0, 0.1519, 0], np.float32),
    )
    expected = reference.top_k_top_p_sample(logits, uniform, *settings)
    assert same_bits(on(ops.top_k_top_p_sample, logits, uniform, *settings), expected)
    for b in range(5):
        alone = on(
            ops.top_k_top_p_sample,
            logits[b : b + 1],
            uniform[b : b + 1],
            *(float(s[b]) if s.dtype != np.int32 else int(s[b]) for s in settings),
        )
        assert alone[0] == expected[b]


def test_ties_go_to_the_lower_index(on):
    logits = np.array([[1, 2, 2, 0, 2, 2]], np.float32)
    draw = lambda u, *settings: on(ops.top_k_top_p_sample, logits, np.array([u], np.float32), *settings)[0]  # noqa: E731
    assert draw(0.9, 0.0, 0, 1.0, 0.0) == 1
    assert [draw(u, 1.0, 2, 1.0, 0.0) for u in (0.1, 0.4, 0.6, 0.9)] == [1, 1, 2, 2]
    assert [draw(u, 1.0, 0, 1.0, 1.0) for u in (0.1, 0.3, 0.6, 0.9)] == [1, 2, 4, 5]


@pytest.mark.parametrize("V", [5, 1000, 5003])
def test_all_alike(on, V):
    """Every token is as likely: uniform is its place."""
    wanted = np.unique(np.linspace(0, V - 1, 9).astype(np.int32))
    rows, uniform = np.full((len(wanted), V), -2.5, np.float32), ((wanted + 0.5) / V).astype(np.float32)
    assert same_bits(on(ops.top_k_top_p_sample, rows, uniform, 0.7, 0, 1.0, 1.0), wanted)
    middle = on(ops.top_k_top_p_sample, rows, uniform, 0.7, 0, 0.5, 0.0)
    assert np.abs(middle - (wanted + 0.5) / 2).max() <= 1


@pytest.mark.parametrize("V", [40, 5003])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (17, 1.0, 0.0), (0, 0.4567, 0.0), (31, 0.9, 0.3)])
def test_many_ties(on, rng, V, top_k, top_p, min_p):
    logits = rng.integers(0, 5, (6, V)).astype(np.float32)
    logits[:, ::7], logits[:, 1::7] = -0.0, np.nan
    uniform = np.float32([0.037, 0.21, 0.433, 0.612, 0.84, 0.991])
    expected = reference.top_k_top_p_sample(logits, uniform, 1.3, top_k, top_p, min_p)
    assert same_bits(on(ops.top_k_top_p_sample, logits, uniform, 1.3, top_k, top_p, min_p), expected)


def test_neighbours_in_the_last_bits(on):
    """Logits one unit in the last place apart are told apart, whatever their size."""
    for top in (1.0, 20.0, 300.0):
        row = np.full(9, top - 5, np.float32)
        row[[2, 6]] = np.nextafter(np.float32(top), np.float32(0)), top
        draw = on(ops.top_k_top_p_sample, row[None], np.float32([0.25]), 0.5, 1, 1.0, 0.0)
        assert draw[0] == 6
        assert on(ops.top_k_top_p_sample, row[None], np.float32([0.25]), 0.5, 2, 1.0, 0.0)[0] == 6
        assert on(ops.top_k_top_p_sample, row[None], np.float32([0.75]), 0.5, 2, 1.0, 0.0)[0] == 2


def test_top_p_keeps_the_token_that_reaches_it(on):
    """Probabilities 1/2, 1/4, 1/4: 0.5 keeps one token, anything above keeps the next."""
    logits = np.log(np.array([[0.25, 0.5, 0.25]])).astype(np.float32)
    last = np.array([0.999], np.float32)
    assert on(ops.top_k_top_p_sample, logits, last, 1.0, 0, 0.49, 0.0)[0] == 1
    assert on(ops.top_k_top_p_sample, logits, last, 1.0, 0, 0.51, 0.0)[0] == 0
    assert on(ops.top_k_top_p_sample, logits, last, 1.0, 0, 0.76, 0.0)[0] == 2


def test_top_p_applies_after_renormalising_the_top_k(on):
    """0.4, 0.3, 0.2, 0.1 cut to two becomes 4/7, 3/7: top_p 0.5 then keeps one token, not two."""
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]])).astype(np.float32)
    assert on(ops.top_k_top_p_sample, logits, np.array([0.99], np.float32), 1.0, 2, 0.5, 0.0)[0] == 3


def test_frequencies(on):
    """Evenly spaced uniforms draw each token as often as its probability says."""
    p, B = np.array([0.05, 0.5, 0.15, 0.3]), 200 if on.emulated else 2000
    uniform = ((np.arange(B) + 0.5) / B).astype(np.float32)
    rows = np.repeat(np.log(p).astype(np.float32)[None], B, axis=0)
    drawn = on(ops.top_k_top_p_sample, rows, uniform, 1.0, 0, 1.0, 0.0)
    assert np.abs(np.bincount(drawn, minlength=4) - B * p).max() <= 1


def test_nan_and_minus_inf_are_never_drawn(on):
    row = np.array([np.nan, -np.inf, 1, np.nan, 2, -np.inf], np.float32)
    uniform = np.linspace(0, 0.99999, 101).astype(np.float32)
    rows = np.repeat(row[None], 101, axis=0)
    assert set(on(ops.top_k_top_p_sample, rows, uniform, 1.0, 0, 1.0, 0.0).tolist()) == {2, 4}
    assert set(on(ops.top_k_top_p_sample, rows, uniform, 1.0, 6, 1.0, 0.0).tolist()) == {2, 4}
    assert set(on(ops.top_k_top_p_sample, rows, uniform, 0.0, 0, 1.0, 0.0).tolist()) == {4}


def test_large_logits_and_tiny_temperature_do_not_overflow(on):
    logits = np.array([[3e38, -3e38, 0], [-3e38, -2.9e38, -3e38], [1, 2, 3]], np.float32)
    uniform = np.array([0.9, 0.9, 0.9], np.float32)
    for temperature in (1.0, 1e-3, 1e-30, 1e-45):  # the inverse of the last is infinite
        for order, drawn in ((1, [0, 1]), (-1, [2, 1])):  # two results in turn: neither is left over from the last call
            rows = np.ascontiguousarray(logits[:, ::order])
            assert on(ops.top_k_top_p_sample, rows, uniform, temperature, 0, 1.0, 0.0).tolist()[:2] == drawn
    assert on(ops.top_k_top_p_sample, logits, uniform, 1e-3, 0, 1.0, 0.0)[2] == 2


def test_shapes(on, rng):
    assert on(
        ops.top_k_top_p_sample, np.zeros((0, 5), np.float32), np.zeros(0, np.float32), 1.0, 0, 1.0, 0.0
    ).shape == (0,)
    logits, uniform = normal(rng, 7, 33), rng.random(7, np.float32)
    expected = on(ops.top_k_top_p_sample, logits, uniform, 1.0, 0, 1.0, 0.0)
    assert same_bits(on(ops.top_k_top_p_sample, strided(logits), uniform, 1.0, 0, 1.0, 0.0), expected)


def test_input_is_not_changed(on, rng):
    logits = normal(rng, 3, 50)
    before = logits.copy()
    on(ops.top_k_top_p_sample, logits, np.full(3, 0.5, np.float32), 0.7, 5, 0.9, 0.1)
    assert same_bits(logits, before)


def test_what_cannot_be_drawn_from_on_the_gpu(on):
    """Settings and logits are not checked there: such a row gives -1, the others what they should."""
    if not on.cuda:
        return
    bad = {
        "uniform": [1.0, -0.1, np.nan, np.inf],
        "temperature": [-1.0, np.nan, np.inf],
        "top_k": [-1, -(2**31)],
        "top_p": [-0.1, 0.0, 1.5, np.nan],
        "min_p": [-0.1, 1.5, np.nan],
    }
    for name, values in bad.items():
        for value in values:
            given = arguments()
            given[name][1] = value
            assert on(ops.top_k_top_p_sample, **given).tolist() == [4, -1, 4], (name, value)
    for temperature in (0.0, 1.0):
        given = arguments() | {"temperature": temperature}
        given["logits"][0], given["logits"][1, 3] = [-np.inf, np.nan] * 4, np.inf
        assert on(ops.top_k_top_p_sample, **given).tolist() == [-1, -1, 0 if temperature == 0 else 4]
    assert on(ops.top_k_top_p_sample, np.zeros((2, 0), np.float32), np.zeros(2, np.float32)).tolist() == [-1, -1]


def arguments():
    return {
        "logits": np.ones((3, 8), np.float32),
        "uniform": np.full(3, 0.5, np.float32),
        "temperature": np.ones(3, np.float32),
        "top_k": np.zeros(3, np.int32),
        "top_p": np.ones(3, np.float32),
        "min_p": np.zeros(3, np.float32),
    }


def test_rejects():
    op = ops.top_k_top_p_sample
    for argument in ("logits", "uniform"):
        assert_rejects_faults(op, arguments(), argument)
    assert_rejects(op, arguments(), "logits", np.ones((3, 8), BF16), TypeError)
    for argument in arguments().keys() - {"logits"}:
        assert_rejects(op, arguments(), argument, arguments()[argument][:2], ValueError)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("uniform", 1.0),
        ("uniform", -0.1),
        ("uniform", np.nan),
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", np.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", np.nan),
    ],
)
def test_rejects_values(argument, bad):
    values = arguments()[argument]
    values[1] = bad
    assert_rejects(ops.top_k_top_p_sample, arguments(), argument, values, ValueError)


@pytest.mark.parametrize("row", [np.nan, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rejects_a_row_without_a_finite_logit(row, temperature):
    given = arguments() | {"temperature": temperature}
    given["logits"][2] = row
    with pytest.raises(ValueError, match=r"^top_k_top_p_sample: .*\blogits\b"):
        ops.top_k_top_p_sample(**given)


def test_rejects_an_empty_vocabulary():
    with pytest.raises(ValueError, match=r"^top_k_top_p_sample: .*\blogits\b"):
        ops.top_k_top_p_sample(np.zeros((1, 0), np.float32), np.zeros(1, np.float32), 1.0, 0, 1.0, 0.0)
