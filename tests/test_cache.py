"""The latent cache: which page holds what, and that nothing else is ever read."""

import random

import kimi_native as kn
import numpy as np
import pytest
from arrays import BF16, same_bits
from kimi_native import model as model_module
from kimi_native.cache import PAGE_SIZE, Cache, PagePool
from kimi_native.config import Config
from kimi_native.make_tiny import make_tiny
from kimi_native.tiny_config import published_config

TOKENS = np.random.default_rng(3).integers(0, 1024, 200).tolist()
OTHERS = TOKENS[::-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return kn.load(make_tiny(tmp_path_factory.mktemp("cache") / "tiny"))


def pool_for(model, pages):
    c = model.config.text_config
    return PagePool(c.num_hidden_layers, c.cache_width, pages, model.cache_dtype)


def small(pages=5, max_tokens=None):
    """A cache of two layers and rows of three values."""
    return Cache(PagePool(2, 3, pages, "float32"), pages * PAGE_SIZE if max_tokens is None else max_tokens)


def extend(cache, count):
    slots = cache.reserve(count)
    cache.commit(list(range(len(cache), len(cache) + count)))
    return slots


def state(cache):
    return list(cache.token_ids), cache.page_table.tolist(), list(cache.pool.free)


SIZES = [70, 1, 60, 1, 2, 66]  # both forms of attention


def logits(model, cache, tokens=TOKENS, sizes=SIZES):
    """Logits [T, V] of the tokens, given to the model in pieces of these sizes."""
    start, pieces = 0, []
    for size in sizes:
        pieces.append(model.forward(tokens[start : start + size], cache))
        start += size
    return np.concatenate(pieces)


# Pages


def test_pages_are_taken_as_needed():
    cache = small()
    assert (len(cache), cache.page_table.shape, len(cache.pool.free)) == (0, (1, 0), 5)
    slots = extend(cache, 1)
    assert (slots.dtype, slots.shape, len(cache.pool.free)) == (np.int64, (1,), 4)
    extend(cache, PAGE_SIZE - 1)
    assert len(cache.pool.free) == 4
    extend(cache, 1)
    assert len(cache.pool.free) == 3
    extend(cache, 4 * PAGE_SIZE - 1)
    assert (len(cache), len(cache.pool.free)) == (5 * PAGE_SIZE, 0)
    assert cache.page_table.dtype == np.int32
    assert sorted(cache.page_table[0]) == list(range(5))


def test_slots_follow_the_page_table():
    cache = small()
    cache.pool.free = [4, 1, 3, 0, 2]
    slots = np.concatenate([extend(cache, 60), extend(cache, 10), extend(cache, 130)])
    pages = cache.page_table[0].tolist()
    assert pages == [2, 0, 3, 1]
    assert slots.tolist() == [pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(200)]


def test_reserving_is_not_committing():
    cache = small()
    first = cache.reserve(100)
    assert len(cache) == 0
    assert cache.reserve(100).tolist() == first.tolist()
    assert cache.reserve(30).tolist() == first[:30].tolist()
    assert len(cache.pool.free) == 3
    cache.truncate(0)
    assert len(cache.pool.free) == 5


def test_truncate_returns_pages():
    cache = small()
    extend(cache, 200)
    before = cache.page_table.tolist()
    for length, free in [(193, 1), (192, 2), (65, 3), (64, 4), (1, 4), (0, 5)]:
        cache.truncate(length)
        assert cache.token_ids == list(range(length))
        assert len(cache.pool.free) == free
        assert cache.page_table.tolist() == [before[0][: 5 - free]]
    extend(cache, 200)
    assert cache.page_table.tolist() == before


@pytest.mark.parametrize("length", [-1, 11])
def test_truncate_out_of_range(length):
    cache = small()
    extend(cache, 10)
    before = state(cache)
    with pytest.raises(ValueError, match=f"cache: truncate to {length}, expected 0 to 10"):
        cache.truncate(length)
    assert state(cache) == before


def test_reserve_beyond_max_tokens():
    cache = small(max_tokens=100)
    extend(cache, 60)
    before = state(cache)
    with pytest.raises(ValueError, match="cache: 60 tokens and 41 more, expected at most max_tokens = 100"):
        cache.reserve(41)
    assert state(cache) == before
    assert len(extend(cache, 40)) == 40


def test_reserve_beyond_the_pool():
    pool = PagePool(1, 3, 3)
    one, two = Cache(pool, 10_000), Cache(pool, 10_000)
    extend(one, PAGE_SIZE + 1)
    before = state(two)
    with pytest.raises(ValueError, match="cache: needs 2 pages, the pool has 1 left"):
        two.reserve(PAGE_SIZE + 1)
    assert state(two) == before
    assert len(extend(two, PAGE_SIZE)) == PAGE_SIZE
    one.truncate(0)
    assert len(extend(two, PAGE_SIZE + 1)) == PAGE_SIZE + 1


def test_rows_come_in_the_order_of_positions():
    cache = small()
    cache.pool.free = [4, 1, 3, 0, 2]
    for layer in range(2):
        cache.layer(layer)[...] = np.nan
    for start, stop in [(0, 50), (50, 130), (130, 131)]:
        slots = extend(cache, stop - start)
        for layer in range(2):
            positions = np.arange(start, stop)[:, None] + 1000 * layer
            cache.layer(layer).reshape(-1, 3)[slots] = positions + np.array([0, 0.25, 0.5])
    for layer, start, stop in [(0, 0, 131), (1, 0, 131), (1, 63, 65), (0, 130, 131), (0, 7, 7)]:
        rows = cache.rows(layer, start, stop)
        assert rows.dtype == np.float32
        assert rows.tolist() == [[i + 1000 * layer + f for f in (0, 0.25, 0.5)] for i in range(start, stop)]


def test_random_calls_keep_the_books():
    """Two caches on one pool: no page is lost, held twice, or held without need."""
    rng, pool = random.Random(1), PagePool(1, 1, 12)
    caches = [Cache(pool, 600), Cache(pool, 600)]
    for _ in range(500):
        cache = rng.choice(caches)
        if rng.random() < 0.4:
            cache.truncate(rng.randint(0, len(cache)))
        else:
            count = rng.randint(1, 200)
            needed = -(-(len(cache) + count) // PAGE_SIZE) - cache.page_table.size
            if len(cache) + count > 600 or needed > len(pool.free):
                with pytest.raises(ValueError, match="cache: "):
                    cache.reserve(count)
            else:
                extend(cache, count)
        held = [page for each in caches for page in each.page_table[0].tolist()]
        assert sorted(held + pool.free) == list(range(12))
        assert [each.page_table.size for each in caches] == [-(-len(each) // PAGE_SIZE) for each in caches]


# What a model sees


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_free_pages_does_not_matter(model, isa, seed):
    cache = model.new_cache(200)
    cache.pool.free = random.Random(seed).sample(range(4), 4)
    assert cache.pool.free != model.new_cache(200).pool.free
    assert same_bits(logits(model, cache), logits(model, model.new_cache(200)))


@pytest.mark.parametrize("naive", [True, False, None], ids=["naive", "absorbed", "both"])
def test_unwritten_rows_are_not_read(model, isa, monkeypatch, naive):
    if naive is not None:
        monkeypatch.setattr(model_module, "prefers_naive", lambda *_: naive)
    results = []
    for poison in (0, np.nan, np.inf):
        cache = Cache(pool_for(model, 9), 200)
        cache.pool.pages[...] = poison
        cache.pool.free = [5, 0, 8, 3, 7, 1, 6, 4, 2]
        results.append(logits(model, cache))
    assert np.isfinite(results[0]).all()
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_truncated_rows_are_not_read(model, length):
    sizes, cache, fresh = [40, 1, 1], model.new_cache(200), model.new_cache(200)
    model.forward(OTHERS[:length], fresh)
    expected = logits(model, fresh, sizes=sizes)
    model.forward(OTHERS[:length], cache)
    slots = cache.page_table[0].repeat(PAGE_SIZE)[:length] * PAGE_SIZE + np.arange(length) % PAGE_SIZE
    model.forward(TOKENS[50:120], cache)
    cache.truncate(length)
    unwritten = np.setdiff1d(np.arange(cache.pool.pages[0, :, :, 0].size), slots)
    for layer in range(len(model.layers)):
        cache.layer(layer).reshape(-1, cache.pool.pages.shape[-1])[unwritten] = np.nan
    assert same_bits(logits(model, cache, sizes=sizes), expected)


def test_sequences_on_one_pool_do_not_see_each_other(model):
    pool = pool_for(model, 8)
    pool.free = [3, 6, 0, 5, 2, 7, 1, 4]
    one, two = Cache(pool, 200), Cache(pool, 200)
    start, pieces = 0, []
    for size in SIZES:
        stop = start + size
        pieces.append([model.forward(t[start:stop], cache) for t, cache in ((TOKENS, one), (OTHERS, two))])
        start = stop
    assert not set(one.page_table[0]) & set(two.page_table[0])
    for index, tokens in enumerate((TOKENS, OTHERS)):
        together = np.concatenate([piece[index] for piece in pieces])
        assert same_bits(together, logits(model, model.new_cache(200), tokens))


def test_model_runs_out_of_pages(model):
    """The pool may be smaller than max_tokens: what is written stays, and goes on when pages are there."""
    pool = pool_for(model, 3)
    one, two = Cache(pool, 200), Cache(pool, 200)
    model.forward(OTHERS[:100], one)
    model.forward(TOKENS[:60], two)
    with pytest.raises(ValueError, match="cache: needs 1 pages, the pool has 0 left"):
        model.forward(TOKENS[60:70], two)
    assert two.token_ids == TOKENS[:60]
    one.truncate(0)
    expected = logits(model, model.new_cache(200), sizes=[60, 10])
    assert same_bits(model.forward(TOKENS[60:70], two), expected[60:])


# Sizes


@pytest.mark.parametrize("dtype, expected", [("bfloat16", 70_272), ("float32", 140_544)])
def test_bytes_per_token_of_the_published_model(dtype, expected):
    c = Config.from_dict(published_config()).text_config
    assert PagePool(c.num_hidden_layers, c.cache_width, 0, dtype).bytes_per_token == expected
    assert PagePool(c.num_hidden_layers, c.cache_width, 2, dtype).pages.nbytes == 2 * PAGE_SIZE * expected


def test_new_cache_has_whole_pages_of_the_chosen_dtype(model):
    for max_tokens, pages in [(1, 1), (64, 1), (65, 2), (200, 4)]:
        cache = model.new_cache(max_tokens)
        assert cache.max_tokens == max_tokens
        assert cache.pool.pages.shape == (3, pages, PAGE_SIZE, 80)
        assert cache.pool.pages.dtype == BF16
        assert sorted(cache.pool.free) == list(range(pages))


def test_memory_is_committed_as_tokens_are_written(model):
    """126 MB for the whole context, of which a short prompt touches a few pages."""

    def committed():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    model.forward(TOKENS[:1], model.new_cache(1))
    before = committed()
    cache = model.new_cache(model.config.text_config.max_position_embeddings)
    assert cache.pool.pages.nbytes == 262144 * 480
    model.forward(TOKENS[:1], cache)
    assert committed() - before < 20_000


def test_unknown_dtype():
    with pytest.raises(ValueError, match="cache_dtype is 'float64', expected one of 'bfloat16', 'float32'"):
        PagePool(1, 1, 1, "float64")
