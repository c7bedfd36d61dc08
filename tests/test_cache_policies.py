"""The hit rates by which the expert cache was chosen, on traces that can be followed by hand."""

import numpy as np
import pytest

from tests import cache_policies

LRU, LFU = 0, np.inf


@pytest.fixture
def small(monkeypatch):
    """One layer of four experts, one a token, eight tokens of which the last six count."""
    for name, value in {"LAYERS": 1, "EXPERTS": 4, "TOP_K": 1, "TOKENS": 8}.items():
        monkeypatch.setattr(cache_policies, name, value)


def hits(experts, slots, half_life):
    return round(6 * cache_policies.hit_rate(np.array(experts).reshape(8, 1, 1), slots, half_life))


@pytest.mark.parametrize(
    "experts, lru, lfu",
    [
        ([0, 1, 0, 1, 0, 1, 0, 1], 6, 6),  # all that is used fits
        ([0, 0, 0, 1, 2, 0, 1, 2], 1, 2),  # a cycle: LRU gives up what comes next
        ([0, 0, 0, 1, 2, 0, 1, 0], 2, 3),  # 0 is used most and stays
    ],
)
def test_hits_of_two_slots(small, experts, lru, lfu):
    assert hits(experts, 2, LRU) == lru
    assert hits(experts, 2, LFU) == lfu


def test_a_half_life_lies_between(small):
    """Used three times long ago, or twice just now: the last token asks for expert 0."""
    experts = [0, 0, 0, 1, 1, 2, 2, 0]
    assert hits(experts, 2, LFU) - hits(experts, 2, 0.5) == 1


def test_all_slots_miss_only_the_first_use(small):
    assert hits([0, 1, 2, 3, 0, 1, 2, 3], 4, 64) == 4


def test_traces(monkeypatch):
    monkeypatch.setattr(cache_policies, "TOKENS", 300)
    rng = np.random.default_rng(0)
    shares = {}
    for name, shape in cache_policies.TRACES.items():
        ids = cache_policies.trace(rng, *shape)
        assert ids.shape == (300, cache_policies.LAYERS, cache_policies.TOP_K)
        assert ids.min() >= 0 and ids.max() < cache_policies.EXPERTS
        assert all(len(set(chosen)) == cache_policies.TOP_K for chosen in ids.reshape(-1, cache_policies.TOP_K))
        counts = np.sort(np.bincount(ids[:, 0].ravel(), minlength=cache_policies.EXPERTS))
        shares[name] = counts[-20:].sum() / counts.sum()  # of the 20 experts used most
    assert shares["uniform"] < 0.12 < shares["topics"] < shares["ranks"] < shares["both strong"]
