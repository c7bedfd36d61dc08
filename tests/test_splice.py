"""Media in the place of placeholders: the rows against the float64 reference and transformers, chunks, the caches.

Differences are the largest over all logits, in standard deviations of the expected logits.
"""

import itertools
import json
import shutil
from pathlib import Path

import kimi_native as kn
import numpy as np
import pytest
from kimi_native import model as model_module
from kimi_native.checkpoint import Checkpoint
from kimi_native.generate import Stats, iter_tokens, prefill
from kimi_native.make_tiny import make_tiny
from kimi_native.media import MediaItem
from kimi_native.splice import EncodedMedia, Span, cache_keys, find_spans
from media_items import LEVELS, random_item
from reference import model as reference
from reference import vision as reference_vision

FLOAT32 = 2e-5  # 1.1e-5 at most were seen; transformers in float32 is 7e-6 away from its float64 result
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("splice") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return kn.load(folder, cache_dtype="float32", activations="float32")


@pytest.fixture
def calls(model, monkeypatch):
    """How many items each call of the tower was given; what was encoded before is forgotten."""
    calls, encode = [], model.vision.encode

    def counted(items, progress=None):
        calls.append(len(items))
        return encode(items, progress)

    monkeypatch.setattr(model, "_encoded", EncodedMedia(counted, 1 << 30))
    return calls


PAD = 768 + 21
RNG = np.random.default_rng(0)
IMAGE, CLIP, SMALL = random_item(RNG, 6, 10), random_item(RNG, 8, 8, 3, "00:00:00.000"), random_item(RNG, 2, 2)
TEXT = RNG.integers(0, 768, 60).tolist()
MIXED = [*TEXT[:9], *[PAD] * 15, *TEXT[9:12], *[PAD] * 16, *TEXT[12:20], PAD, PAD, *TEXT[20:30]]
MEDIA = [IMAGE, CLIP, SMALL, SMALL]


def tensors_of(folder):
    checkpoint = Checkpoint(folder)
    return {name.removeprefix(checkpoint.prefix): checkpoint[name] for name in checkpoint.names}


def expected_logits(folder, config, token_ids, media):
    tensors = tensors_of(folder)
    rows = [
        reference_vision.encode(tensors, config.vision_config, item.normalised(0, len(item.patches)), item.grid)
        for item in media
    ]
    return reference.logits(tensors, config.text_config, token_ids, config.media_placeholder_token_id, rows)


@pytest.fixture(scope="module")
def expected(folder, model):
    return expected_logits(folder, model.config, MIXED, MEDIA)


def assert_near(actual, expected, tolerance=FLOAT32):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    away = np.abs(np.float64(actual) - expected).max() / expected.std()
    assert away <= tolerance


# Logits


def test_logits_of_mixed_media(model, expected):
    assert_near(model.forward(MIXED, model.new_cache(100), media=MEDIA), expected)


def test_logits_of_the_golden_vectors(tmp_path):
    """An image and a chunk of video through transformers' tower, projector and text model, in float64."""
    golden = Path(__file__).parent / "golden"
    facts, gold = json.loads((golden / "vision.json").read_text()), dict(np.load(golden / "vision.npz"))
    model = kn.load(
        make_tiny(tmp_path / "golden", **facts["checkpoint"]), cache_dtype="float32", activations="float32",
        mla_norm_eps=1e-6,
    )  # fmt: skip
    random, items = np.random.RandomState(facts["seed"]), []
    for grid in gold["grids"].tolist():
        patches = random.randint(0, 256, (np.prod(grid), 588), np.uint8)
        items.append(MediaItem("image" if grid[0] == 1 else "video", patches, tuple(grid), LEVELS, None))
    media, tokens = [items[i] for i in gold["splice_items"]], gold["splice_tokens"]
    assert_near(model.forward(tokens, model.new_cache(len(tokens)), media=media), gold["splice_logits"])


@pytest.mark.parametrize("chunk", [1, 7, 12, 24, 40])
def test_media_across_chunks(model, expected, calls, monkeypatch, chunk):
    """A chunk may begin and end anywhere in an item, which is encoded once."""
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", chunk)
    assert_near(model.forward(MIXED, model.new_cache(100), media=MEDIA), expected)
    assert sum(calls) == 3, "SMALL comes twice"


def test_media_in_several_calls(model, expected):
    cache, cuts = model.new_cache(100), [0, 12 + 15, 12 + 15 + 16, len(MIXED)]
    media, logits = [[IMAGE], [CLIP], [SMALL, SMALL]], []
    for (start, stop), items in zip(itertools.pairwise(cuts), media, strict=True):
        logits.append(model.forward(MIXED[start:stop], cache, media=items))
    assert_near(np.concatenate(logits), expected)


def test_one_token_of_media(model, folder):
    tokens = [*TEXT[:20], PAD]
    cache = model.new_cache(30)
    model.forward(tokens[:-1], cache)
    logits = model.forward([PAD], cache, media=[SMALL])
    assert_near(logits, expected_logits(folder, model.config, tokens, [SMALL])[-1:])


def test_rows_in_place_of_items(model):
    rows = model.encode_media(MEDIA)
    assert [array.shape for array in rows] == [(15, 128), (16, 128), (1, 128), (1, 128)]
    assert all(array.dtype == np.float32 for array in rows)
    ours = model.forward(MIXED, model.new_cache(100), media=rows)
    assert np.array_equal(ours, model.forward(MIXED, model.new_cache(100), media=MEDIA))


def test_rows_replace_the_embedding(model):
    """Rows that are the embeddings of text give the logits of that text."""
    rows = model.embed_tokens[TEXT[5:9]].astype(np.float32)
    tokens = [*TEXT[:5], *[PAD] * 4, *TEXT[9:20]]
    logits = model.forward(tokens, model.new_cache(30), media=[rows])
    assert np.array_equal(logits, model.forward(TEXT[:20], model.new_cache(30)))


def test_without_media_a_placeholder_is_a_token(model, folder):
    tokens = [*TEXT[:5], PAD, *TEXT[5:9]]
    assert_near(model.forward(tokens, model.new_cache(30)), expected_logits(folder, model.config, tokens, []))


# Counts

WRONG = {
    "too many rows": (
        [1, *[PAD] * 14],
        [IMAGE],
        "has 14 media placeholders (id 789), expected 15",
    ),
    "too few": ([*[PAD] * 16, 2], [IMAGE], "has 16 media placeholders (id 789), expected 15"),
    "none": ([1, 2], [SMALL], "has 0 media placeholders (id 789), expected 1"),
    "no media": ([1, PAD, PAD], [], "has 2 media placeholders (id 789), expected 0, one for each row of 0 media items"),
    "gap": ([*[PAD] * 14, 3, PAD], [IMAGE], "media[0] has 15 rows, token_ids has 14 placeholders in a row for it"),
    "order": (
        [*[PAD] * 15, 3, *[PAD] * 16],
        [CLIP, IMAGE],
        "media[0] has 16 rows, token_ids has 15 placeholders in a row for it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_count(model, calls, name):
    tokens, media, message = WRONG[name]
    cache = model.new_cache(50)
    with pytest.raises(ValueError) as error:
        model.forward(tokens, cache, media=media)
    assert message in str(error.value)
    assert len(cache) == 0 and calls == []
    with pytest.raises(ValueError):
        kn.generate_tokens(model, tokens, media=media)


WRONG_ROWS = [np.zeros((15, 127), np.float32), np.zeros((15, 128)), np.zeros((0, 128), np.float32), "photo.png"]


@pytest.mark.parametrize("rows", WRONG_ROWS, ids=["width", "dtype", "empty", "str"])
def test_wrong_rows(model, rows):
    with pytest.raises(ValueError, match=r"media\[0\] is .*, expected a MediaItem or rows of float32 \[tokens, 128\]"):
        model.forward([PAD] * 15, model.new_cache(50), media=[rows])


def test_spans():
    tokens = [5, 9, 9, 9, 6, 9, 7]
    spans = find_spans(tokens, 9, [np.zeros((1, 4)), np.zeros((2, 4)), SMALL])
    assert [(span.start, span.stop) for span in spans] == [(1, 2), (2, 4), (5, 6)]
    assert find_spans(tokens, None, []) == find_spans([], 9, []) == []


def test_keys_depend_on_the_content():
    twin = MediaItem("image", IMAGE.patches.copy(), IMAGE.grid, LEVELS, None)
    other = MediaItem("image", IMAGE.patches ^ (np.arange(588) == 0).astype(np.uint8), IMAGE.grid, LEVELS, None)
    keys = [Span(0, 15, item).key for item in (IMAGE, twin, other)]
    assert keys[0] == keys[1] != keys[2]
    rows = np.ones((2, 4), np.float32)
    assert Span(0, 2, rows).key == Span(5, 7, rows.copy()).key != Span(0, 2, rows + 1).key
    assert cache_keys([5, 9, 9, 6], [Span(1, 3, rows)]) == [5, *[Span(1, 3, rows).key] * 2, 6]
    assert Span(1, 3, rows).key < 0


# Models that take text alone


def test_checkpoint_without_a_tower(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    tower = [name for name in index["weight_map"] if name.startswith(("vision_tower.", "mm_projector."))]
    for name in tower:
        del index["weight_map"][name]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    model = kn.load(copy)
    assert model.vision is None
    assert kn.generate(model, "Hello", 4, **GREEDY) == kn.generate(kn.load(folder), "Hello", 4, **GREEDY)
    refused = pytest.raises(ValueError, match=r"takes no images or video: the checkpoint has no tensors vision_tower\.")
    for call in (
        lambda: model.encode_media([SMALL]),
        lambda: model.forward([PAD], model.new_cache(9), media=[SMALL]),
        lambda: kn.generate(model, "Hello", images=[SMALL]),
    ):
        with refused:
            call()
    rows = np.zeros((1, 128), np.float32)
    assert model.forward([PAD], model.new_cache(9), media=[rows]).shape == (1, 1024)


def test_text_only_model(tmp_path):
    model = kn.load(make_tiny(tmp_path / "k2", "tiny-k2"))
    with pytest.raises(ValueError, match="takes no images or video: it has no vision_config"):
        kn.generate(model, "Hello", images=["x.png"])
    with pytest.raises(ValueError, match=r"has 0 media placeholders \(id None\), expected 1"):
        model.forward([PAD], model.new_cache(9), media=[np.zeros((1, 128), np.float32)])


def test_unknown_preprocessor_config_leaves_text_alone(tmp_path):
    folder = make_tiny(tmp_path / "newer")
    (folder / "preprocessor_config.json").write_text('{"media_proc_cfg": {"new_key": 1}}')
    model = kn.load(folder)
    assert isinstance(kn.generate(model, "Hello", max_new_tokens=1), str)
    with pytest.raises(ValueError, match="preprocessor_config.json: media_proc_cfg.new_key is unknown"):
        kn.generate(model, "Hello", images=[np.zeros((9, 9, 3), np.uint8)])


def test_bytes_per_token_leave_the_tower_out(model, folder, tmp_path):
    assert model.bytes_per_token == kn.load(make_tiny(tmp_path / "k2", "tiny-k2")).bytes_per_token


# What was encoded


def test_second_question_about_an_image(model, calls):
    for tokens in ([*[PAD] * 15, *TEXT[:5]], [*TEXT[:7], *[PAD] * 15, *TEXT[9:12]]):
        model.forward(tokens, model.new_cache(50), media=[IMAGE])
    twin = MediaItem("image", IMAGE.patches.copy(), IMAGE.grid, LEVELS, None)
    model.forward([PAD] * 15, model.new_cache(50), media=[twin])
    assert calls == [1]


def encoder(size=100):
    """EncodedMedia with room for `size` bytes over an encoder of 4 bytes a token, and the digests it was asked for."""
    asked = []

    def encode(items, progress):
        asked.extend(item.digest for item in items)
        if progress:
            progress(1, 2)
        return [np.full((item.tokens, 1), item.patches[0, 0], np.float32) for item in items]

    return EncodedMedia(encode, size), asked


def test_encoded_media_are_bounded():
    items = [random_item(RNG, 2, 10) for _ in range(6)]  # 20 bytes each
    encoded, asked = encoder(100)
    encoded.rows(items[:5])
    encoded.rows(items[:1])
    assert encoded.nbytes == 100 and len(asked) == 5
    encoded.rows(items[5:])  # gives up items[1], unused for longest
    encoded.rows([items[0], items[2]])
    assert encoded.nbytes == 100 and len(asked) == 6
    encoded.rows([items[1]])
    assert encoded.nbytes == 100 and asked[6:] == [items[1].digest]


def test_more_media_in_a_call_than_are_kept():
    items = [random_item(RNG, 2, 10) for _ in range(8)]
    encoded, asked = encoder(50)
    rows = encoded.rows(items)
    assert [int(r[0, 0]) for r in rows] == [int(item.patches[0, 0]) for item in items]
    assert encoded.nbytes == 160 and len(asked) == 8
    encoded.rows(items[:1])
    assert encoded.nbytes <= 50 and len(asked) == 8


def test_equal_media_in_a_call_are_encoded_once():
    encoded, asked = encoder()
    one, other = encoded.rows([SMALL, SMALL])
    assert one is other and asked == [SMALL.digest]


def test_broken_off_encoding_leaves_nothing():
    def encode(items, progress):
        raise KeyboardInterrupt

    encoded = EncodedMedia(encode, 100)
    with pytest.raises(KeyboardInterrupt):
        encoded.rows([SMALL])
    assert encoded.nbytes == 0


def test_progress_of_encoding(model, calls):
    """Items that are encoded, in patches times layers of the tower."""
    seen = []
    for _ in range(2):
        options = {"media": MEDIA, "media_progress": lambda *call: seen.append(call)}
        model.forward(MIXED, model.new_cache(100), **options)
    patches, layers = 60 + 3 * 64 + 4, 2
    assert all(items == [IMAGE, CLIP, SMALL] and total == patches * layers for items, _, total in seen)
    assert seen[-1][1] == patches * layers and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


# The latent cache


def test_a_cached_image_is_not_encoded_again(model, calls):
    cache, stats = model.new_cache(200), Stats()
    prompt = [*TEXT[:9], *[PAD] * 15, *TEXT[9:20]]
    reply = list(iter_tokens(model, prompt, 5, cache=cache, media=[IMAGE], **GREEDY))
    assert all(key < 0 for key in cache.token_ids[9:24])
    model._encoded = EncodedMedia(
        model._encoded.encode, 1 << 30
    )  # forgets the rows, the latent cache does not need them
    second = [*prompt, *reply, *TEXT[20:25]]
    again = list(iter_tokens(model, second, 5, cache=cache, media=[IMAGE], stats=stats, **GREEDY))
    assert stats.cached_tokens == len(prompt) + 4 and calls == [1]
    assert again == kn.generate_tokens(model, second, 5, media=[IMAGE], **GREEDY)


def test_another_image_in_the_same_place(model, calls):
    """The placeholders are equal, the cache is not taken for it."""
    cache, stats, other = model.new_cache(100), Stats(), random_item(RNG, 6, 10)
    prompt = [*TEXT[:9], *[PAD] * 15, *TEXT[9:20]]
    kn.generate_tokens(model, prompt, 3, cache=cache, media=[IMAGE], **GREEDY)
    reply = kn.generate_tokens(model, prompt, 3, cache=cache, media=[other], stats=stats, **GREEDY)
    assert stats.cached_tokens == 9
    assert reply == kn.generate_tokens(model, prompt, 3, media=[other], **GREEDY)
    kn.generate_tokens(model, prompt, 3, cache=cache, stats=stats, **GREEDY)
    assert stats.cached_tokens == 9, "placeholders that stand for nothing are others again"


@pytest.mark.parametrize("cached", [9, 10, 20, 23, 24, 25, 30])
def test_an_item_that_the_cache_has_in_part(model, expected, cached):
    """As Ctrl-C between two chunks leaves it: all of the item is computed again."""
    cache = model.new_cache(100)
    model.forward(MIXED, cache, media=MEDIA)
    cache.truncate(cached)
    logits, shared = prefill(model, MIXED, cache, media=MEDIA)
    assert shared == (9 if cached < 24 else cached if cached <= 27 else 27)
    assert_near(logits, expected[-1:])


def test_a_prompt_that_ends_in_media(model):
    """Its last token is computed again for the logits, and so the item that it belongs to."""
    cache = model.new_cache(100)
    first, _ = prefill(model, MIXED[:24], cache, media=[IMAGE])
    again, shared = prefill(model, MIXED[:24], cache, media=[IMAGE])
    assert shared == 9
    assert again == pytest.approx(first, abs=1e-4)


def test_media_that_do_not_fit_into_the_cache(model, calls):
    with pytest.raises(ValueError, match="the prompt has 63 tokens, expected at most the cache's max_tokens = 40"):
        kn.generate_tokens(model, MIXED, cache=model.new_cache(40), media=MEDIA)
    assert calls == []
