"""From logits to tokens: validation, penalties, seeds, and the distribution of what is drawn."""

import math

import numpy as np
import pytest
from kimi_native import SamplingParams
from kimi_native.sampling import Sampler
from reference import kept_tokens

VOCAB_SIZE = 40


@pytest.fixture
def logits(rng):
    return rng.normal(0, 1.5, (1, VOCAB_SIZE)).astype(np.float32)


def draw(sampler, logits, count):
    return [sampler.next(logits.copy()) for _ in range(count)]


# Parameters

BAD = {
    "temperature": [-0.1, math.inf, math.nan],
    "top_k": [-1, 1.0, 2.5, 2**31],
    "top_p": [0.0, -0.5, 1.0001, math.nan],
    "min_p": [-0.01, 1.01, math.nan],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "presence_penalty": [math.inf, -math.inf, math.nan],
    "frequency_penalty": [math.inf, -math.inf, math.nan],
    "seed": [-1, 1.5],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_parameter_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}, expected "):
        SamplingParams(**{name: value})


GOOD = {
    "temperature": [0, 0.0, 1e-3, 5.0],
    "top_k": [0, 1, 2**31 - 1, np.int64(7)],
    "top_p": [1e-9, 1, 1.0],
    "min_p": [0, 0.0, 1.0],
    "repetition_penalty": [0.5, 1, 2.0],
    "presence_penalty": [-2.0, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2.0],
    "seed": [None, 0, 2**64, np.int64(7)],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in GOOD.items() for value in values])
def test_parameter_in_range(name, value, logits):
    token = Sampler(SamplingParams(**{name: value}), [1, 2]).next(logits)
    assert 0 <= token < VOCAB_SIZE


def test_defaults_are_the_model_cards_for_thinking():
    assert SamplingParams() == SamplingParams(
        temperature=1.0,
        top_k=0,
        top_p=0.95,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=None,
    )


def test_unknown_parameter():
    with pytest.raises(TypeError, match="'top_q'"):
        SamplingParams(top_q=1)


# Penalties

PROMPT, OUTPUT = [3, 5, 5, 7], [5, 9, 9, 9, 11]  # 5 is in both, 3 and 7 in the prompt only


def after_output(**params):
    """A sampler that has drawn OUTPUT: each token was so likely that no penalty kept it away."""
    sampler = Sampler(SamplingParams(temperature=0.0, **params), PROMPT)
    for token in OUTPUT:
        one_hot = np.full((1, VOCAB_SIZE), -1e6, np.float32)
        one_hot[0, token] = 1e6
        assert sampler.next(one_hot) == token
    return sampler


def penalised(logits, repetition=1.0, presence=0.0, frequency=0.0):
    """float64 [V]: z / r or z * r for what was seen, then minus presence and count * frequency for the output."""
    z = np.float64(logits[0])
    for token in set(PROMPT) | set(OUTPUT):
        z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
    for token in set(OUTPUT):
        z[token] -= presence + frequency * OUTPUT.count(token)
    return z


@pytest.mark.parametrize(
    "repetition, presence, frequency",
    [(1.0, 0.0, 0.0), (1.7, 0.0, 0.0), (0.6, 0.0, 0.0), (1.0, 0.8, 0.0), (1.0, -0.8, 0.0)]
    + [(1.0, 0.0, 0.3), (1.0, 0.0, -0.3), (1.0, 0.8, -0.8), (1.3, 0.8, 0.3), (1.1, -0.5, 0.9)],
)
def test_penalties(logits, repetition, presence, frequency):
    assert (logits[0, [3, 5, 7, 9, 11]] > 0).any()
    assert (logits[0, [3, 5, 7, 9, 11]] < 0).any()
    sampler = after_output(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    expected = penalised(logits, repetition, presence, frequency)
    token = sampler.next(logits)
    assert logits[0] == pytest.approx(expected, rel=4e-7, abs=4e-7)
    assert token == np.argmax(expected)


@pytest.mark.parametrize(
    "params, first, then",
    [
        ({"presence_penalty": 1.0}, 2, [4, 8, 2, 2]),
        ({"frequency_penalty": 1.0}, 2, [4, 8, 2, 4]),
        ({"repetition_penalty": 2.0}, 4, [8, 2, 2, 2]),  # 2 is in the prompt
        ({}, 2, [2, 2, 2, 2]),
    ],
)
def test_penalties_count_what_is_drawn(params, first, then):
    """Logits 3.0, 2.9 and 2.8; a drawn token falls behind those that were not."""
    logits = np.full((1, 10), -50, np.float32)
    logits[0, [2, 4, 8]] = 3.0, 2.9, 2.8
    sampler = Sampler(SamplingParams(temperature=0.0, **params), [2])
    assert draw(sampler, logits, 5) == [first, *then]


# Seeds


def test_same_seed_same_tokens(logits):
    def tokens(seed):
        return draw(Sampler(SamplingParams(seed=seed), []), logits, 50)

    assert tokens(7) == tokens(7)
    assert len({tuple(tokens(seed)) for seed in range(10)}) == 10
    assert tokens(None) != tokens(None)


# What is drawn


@pytest.mark.parametrize("params", [{"top_k": 1}, {"temperature": 0.0}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_one_token_left(logits, params):
    best = int(np.argmax(logits))
    for seed in range(5):
        assert draw(Sampler(SamplingParams(**params, seed=seed), []), logits, 20) == [best] * 20


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[1, 3, 2, 3, 3]], np.float32)
    assert draw(Sampler(SamplingParams(temperature=0.0), []), logits, 3) == [1, 1, 1]


SETTINGS = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.4, "top_p": 1.0},
    {"temperature": 2.5, "top_p": 1.0},
    {"top_k": 6, "top_p": 1.0},
    {"top_p": 0.7},
    {"min_p": 0.15, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.08},
]
DRAWS = 6000


def chi_square_limit(freedom):
    """What chi-square exceeds once in 30,000 times (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(tokens, ids, probabilities):
    """(statistic, degrees of freedom); tokens expected less than 8 times count as one."""
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)[ids]
    expected = len(tokens) * probabilities
    rare = expected < 8
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    return np.sum((counts - expected)[used] ** 2 / expected[used]), np.count_nonzero(used) - 1


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution(logits, isa, setting):
    tokens = draw(Sampler(SamplingParams(**setting, seed=11), []), logits, DRAWS)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0} | setting
    ids, probabilities = kept_tokens(logits[0], **settings)
    assert set(tokens) <= set(ids.tolist())
    statistic, freedom = chi_square(tokens, ids, probabilities)
    assert freedom >= 3
    assert statistic < chi_square_limit(freedom)


def test_distribution_test_sees_a_wrong_temperature(logits):
    """Guards the test above: a temperature of 1.1 instead of 1 is found."""
    tokens = draw(Sampler(SamplingParams(temperature=1.1, top_p=1.0, seed=11), []), logits, DRAWS)
    statistic, freedom = chi_square(tokens, *kept_tokens(logits[0], 1.0, 0, 1.0, 0.0))
    assert statistic > chi_square_limit(freedom)


def test_distribution_with_penalties(logits):
    """The draws come from the penalised logits: a token of the prompt is drawn as its new logit says."""
    prompt = np.argsort(logits[0])[-3:].tolist()
    settings = [SamplingParams(repetition_penalty=3.0, top_p=1.0, seed=seed) for seed in range(3000)]
    tokens = [Sampler(params, prompt).next(logits.copy()) for params in settings]
    expected = np.float64(logits[0])
    expected[prompt] /= 3
    statistic, freedom = chi_square(tokens, *kept_tokens(expected, 1.0, 0, 1.0, 0.0))
    assert statistic < chi_square_limit(freedom)
