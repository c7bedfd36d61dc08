"""Generation: stops, streaming, prompts, prefix reuse. Scripted models say an exact sequence of tokens."""

import shutil
from types import SimpleNamespace

import kimi_native as kn
import numpy as np
import pytest
from kimi_native import chat
from kimi_native import model as model_module
from kimi_native.cache import Cache, PagePool
from kimi_native.generate import Stats, encode_prompt, iter_tokens, prefill, stop_ids, stream_ids
from kimi_native.make_tiny import make_tiny
from kimi_native.tokenizer import Tokenizer
from PIL import Image

TOKENS = np.random.default_rng(2).integers(0, 768, 120).tolist()
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("generate") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return kn.load(folder, cache_dtype="float32", activations="float32")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


class Scripted:
    """A model that says the tokens of `script` one by one, whatever it is asked; `inputs` records what it is given."""

    bytes_per_token = 1000
    chat_template = None

    def __init__(self, tokenizer, script, context=1000):
        self.tokenizer, self.script, self.inputs = tokenizer, list(script), []
        text_config = SimpleNamespace(max_position_embeddings=context)
        self.config = SimpleNamespace(eos_token_id=tokenizer.special_tokens["[EOS]"], text_config=text_config)

    def new_cache(self, max_tokens):
        return Cache(PagePool(1, 10, 20), max_tokens)

    def forward(self, token_ids, cache, last_only=False, progress=None, media=None, media_progress=None):
        self.inputs.append(list(token_ids))
        cache.reserve(len(token_ids))
        cache.commit(list(token_ids))
        logits = np.zeros((1, self.tokenizer.vocab_size), np.float32)
        logits[0, self.script[len(self.inputs) - 1]] = 1000
        return logits


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    """Bytes -> ids of the tokens that stand for one byte each."""
    single = {tokenizer.token_bytes(i): i for i in range(768)}
    return lambda data: [single[bytes([byte])] for byte in data]


@pytest.fixture(scope="module")
def im_end(tokenizer):
    return tokenizer.special_tokens["<|im_end|>"]


@pytest.fixture
def say(tokenizer, byte_ids, im_end):
    """Pieces of a reply whose bytes come one token each, followed by <|im_end|>."""

    def pieces(reply, **options):
        data = reply if isinstance(reply, bytes) else reply.encode()
        model = Scripted(tokenizer, [*byte_ids(data), im_end])
        return list(stream_ids(model, [1, 2], **options))

    return pieces


# Text


@pytest.mark.parametrize(
    "reply", ["plain", "naïve Ünïcödé", "日本語、漢字", "🙂👩‍🚀🇪🇺", "e\u0301\u200d\ufeff", "a\U0010ffffb"]
)
def test_characters_are_not_split(say, reply):
    """Each byte is a token of its own; a piece comes when its character is complete."""
    assert say(reply) == list(reply)


def test_character_split_between_longer_tokens(tokenizer, byte_ids, im_end):
    tokens = [*tokenizer.encode("the "), *byte_ids("ü".encode()), *tokenizer.encode(" and"), im_end]
    pieces = list(stream_ids(Scripted(tokenizer, tokens), [1]))
    assert "".join(pieces) == "the ü and"
    assert "ü" in pieces


@pytest.mark.parametrize(
    "data, text",
    [
        (b"a\xe6\x97", "a\ufffd"),  # ends inside a character
        (b"\xe6\x97\x41", "\ufffdA"),
        (b"\xff\xfeb", "\ufffd\ufffdb"),
        (b"\xc3\xa4\x80\xc3\xa4", "ä\ufffdä"),
        ("\ufffd".encode(), "\ufffd"),  # a valid character
    ],
)
def test_invalid_bytes_become_replacement_characters(say, data, text):
    assert "".join(say(data)) == data.decode("utf-8", "replace") == text


def test_pieces_are_not_empty(say):
    assert all(say("日本", stop=["本当"]))
    assert say("") == []


def test_special_tokens_of_the_reply_are_text(tokenizer, im_end):
    think = [tokenizer.special_tokens[name] for name in ("</think>", "<|tool_calls_section_begin|>")]
    model = Scripted(tokenizer, [*think, im_end])
    assert "".join(stream_ids(model, [1])) == "</think><|tool_calls_section_begin|>"


# Stop strings


@pytest.mark.parametrize(
    "reply, stop, text",
    [
        ("abcENDdef", ["END"], "abc"),
        ("ENDdef", ["END"], ""),
        ("abcEND", ["END"], "abc"),
        ("abcEN", ["END"], "abcEN"),  # held back, then shown
        ("aEENENDb", ["END"], "aEEN"),
        ("ababac!", ["abac"], "ab"),
        ("aaab", ["aab"], "a"),
        ("one two", ["two", "one t"], ""),
        ("one two", ["o"], ""),
        ("one two", ["x", "e t", "tw"], "on"),
        ("xabcd", ["bcd", "abcX"], "xa"),
        ("日本語", ["本"], "日"),
        ("日本語", ["本当"], "日本語"),
        ("line\n\nnext", ["\n\n"], "line"),
        ("nothing", [], "nothing"),
        ("END", "END", ""),  # one string instead of a list
    ],
)
def test_stop_strings(say, reply, stop, text):
    stats = Stats()
    assert "".join(say(reply, stop=stop, stats=stats)) == text
    assert stats.finish_reason == "stop"


def test_stop_string_inside_one_token(tokenizer, im_end):
    (token,) = tokenizer.encode(" the")
    model = Scripted(tokenizer, [*tokenizer.encode("a"), token, *tokenizer.encode("b"), im_end])
    assert "".join(stream_ids(model, [1], stop=["th"])) == "a "
    assert len(model.inputs) == 2, "nothing is computed after the stop string"


def test_the_earliest_of_several_stop_strings_in_one_token(tokenizer):
    model = Scripted(tokenizer, [tokenizer.special_tokens["<|im_middle|>"]])
    for stop in (["middle", "im", "|>"], ["|>", "im", "middle"]):
        model.inputs.clear()
        assert "".join(stream_ids(model, [1], stop=stop)) == "<|"


def test_stop_string_made_of_special_tokens(tokenizer, im_end):
    model = Scripted(tokenizer, [*tokenizer.encode("hm"), tokenizer.special_tokens["</think>"], *tokenizer.encode("a")])
    assert "".join(stream_ids(model, [1], stop=["</think>"])) == "hm"


def test_only_a_possible_start_of_a_stop_string_is_held_back(say):
    assert say("aE bEN cEND", stop=["END"]) == ["a", "E ", "b", "EN ", "c"]
    assert say("xyz", stop=["yes"]) == ["x", "yz"]


def test_partial_stop_string_at_the_length_limit(say):
    stats = Stats()
    assert "".join(say("abEND", stop=["END"], max_new_tokens=4, stats=stats)) == "abEN"
    assert stats.finish_reason == "length"


@pytest.mark.parametrize("stop", [[""], ["a", ""], ""])
def test_empty_stop_string(say, stop):
    with pytest.raises(ValueError, match="stop holds an empty string"):
        say("abc", stop=stop)


# Stop tokens and lengths


@pytest.mark.parametrize("name", ["<|im_end|>", "[EOS]", "[EOT]"])
def test_stop_tokens(tokenizer, byte_ids, name):
    stats, script = Stats(), [*byte_ids(b"ab"), tokenizer.special_tokens[name], *byte_ids(b"c")]
    model = Scripted(tokenizer, script)
    assert list(iter_tokens(model, [1], stats=stats)) == script[:2]
    assert (stats.finish_reason, stats.output_tokens, len(model.inputs)) == ("stop", 2, 3)


def test_the_eos_of_the_config_stops(tokenizer, byte_ids):
    script = byte_ids(b"abc")
    model = Scripted(tokenizer, script)
    model.config.eos_token_id = script[1]
    assert list(iter_tokens(model, [1])) == script[:1]


def test_stop_ids(model):
    special = model.tokenizer.special_tokens
    assert stop_ids(model) == {special[name] for name in ("[EOS]", "<|im_end|>", "[EOT]")}
    without_tokenizer = SimpleNamespace(tokenizer=None, config=SimpleNamespace(eos_token_id=7))
    assert stop_ids(without_tokenizer) == {7}


def test_ignore_eos(tokenizer, byte_ids, im_end):
    stats, script = Stats(), [*byte_ids(b"a"), im_end, *byte_ids(b"b"), im_end]
    model = Scripted(tokenizer, script)
    assert list(iter_tokens(model, [1], 4, ignore_eos=True, stats=stats)) == script
    assert stats.finish_reason == "length"
    text = "".join(stream_ids(Scripted(tokenizer, script), [1], 3, ignore_eos=True))
    assert text == "a<|im_end|>b"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_new_tokens(tokenizer, byte_ids, count):
    stats, script = Stats(), byte_ids(b"abcdefgh")
    model = Scripted(tokenizer, script)
    assert list(iter_tokens(model, [1, 2, 3], count, stats=stats)) == script[:count]
    assert (stats.finish_reason, stats.output_tokens) == ("length", count)
    assert model.inputs == [[1, 2, 3], *([token] for token in script[: count - 1])]


@pytest.mark.parametrize("count", [0, -1])
def test_max_new_tokens_out_of_range(model, count):
    with pytest.raises(ValueError, match=f"max_new_tokens is {count}, expected at least 1"):
        kn.generate_tokens(model, [1], count)


def test_full_cache_ends_the_reply(tokenizer, byte_ids):
    """Each cached token is followed by one more, the last of which needs no row."""
    stats, script = Stats(), byte_ids(b"abcdefgh")
    model = Scripted(tokenizer, script)
    assert list(iter_tokens(model, [1, 2, 3], cache=model.new_cache(5), stats=stats)) == script[:3]
    assert stats.finish_reason == "length"


def test_context_ends_the_reply(tokenizer, byte_ids):
    model = Scripted(tokenizer, byte_ids(b"abcdefgh"), context=5)
    assert len(list(iter_tokens(model, [1, 2, 3]))) == 3


# Stats


def test_stats(tokenizer, byte_ids, im_end):
    model = Scripted(tokenizer, [*byte_ids(b"abc"), im_end])
    cache, stats = model.new_cache(100), Stats()
    cache.reserve(3)
    cache.commit([1, 2, 3])
    list(iter_tokens(model, [1, 2, 4, 5, 6], cache=cache, stats=stats))
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (5, 2, 3)
    assert stats.decode_steps == 3
    # Each step reads the weights and the rows in the cache, its own included: bf16 rows of 10 values.
    assert stats.decode_bytes == 3 * 1000 + (6 + 7 + 8) * 20
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


def test_summary():
    stats = Stats(12, 4, 5, prefill_seconds=2.0, decode_seconds=0.5, decode_steps=4, decode_bytes=10**9)
    assert stats.summary() == "prompt 12 tokens (4 cached), 4.00 tokens/s | output 5 tokens, 8.00 tokens/s, 2.00 GB/s"
    stats = Stats(12, 0, 1, prefill_seconds=2.0)
    assert stats.summary() == "prompt 12 tokens, 6.00 tokens/s | output 1 tokens, - tokens/s, - GB/s"


def test_stats_may_be_used_again(tokenizer, byte_ids):
    stats, script = Stats(), byte_ids(b"abcdefgh")
    for count in (3, 2):
        assert list(iter_tokens(Scripted(tokenizer, script), [1], count, stats=stats)) == script[:count]
        assert (stats.finish_reason, stats.output_tokens, stats.decode_steps) == ("length", count, count - 1)


# generate, stream and generate_tokens are one


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "stop": ["e"], "top_k": 50}], ids=str
)
def test_pieces_joined_are_the_reply(model, options):
    pieces = list(kn.stream(model, "Hello", 40, ignore_eos=True, **options))
    reply = kn.generate(model, "Hello", 40, ignore_eos=True, **options)
    assert "".join(pieces) == reply
    assert all(pieces)
    stop = options.pop("stop", None)
    tokens = kn.generate_tokens(model, encode_prompt(model, "Hello").token_ids, 40, ignore_eos=True, **options)
    text = model.tokenizer.decode(tokens)
    assert reply == (text.partition(stop[0])[0] if stop else text)


def test_greedy_generation_takes_the_largest_logit(model):
    tokens = kn.generate_tokens(model, TOKENS, 10, **GREEDY)
    logits = model.forward([*TOKENS, *tokens], model.new_cache(130))
    assert tokens == np.argmax(logits[len(TOKENS) - 1 : -1], axis=1).tolist()


def test_seeds(model):
    def reply(seed):
        return kn.generate_tokens(model, TOKENS, 10, seed=seed, ignore_eos=True)

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)


def test_bad_sampling_option(model):
    with pytest.raises(ValueError, match="top_p is 2"):
        kn.generate_tokens(model, TOKENS, top_p=2)
    with pytest.raises(TypeError, match="'top_q'"):
        kn.generate(model, "Hello", top_q=1)


# Prompts


def test_prompt_forms(model):
    tokenizer = model.tokenizer
    message = {"role": "user", "content": "Hello"}
    prompt = (chat.encode(tokenizer, [message]), [])
    assert encode_prompt(model, "Hello") == encode_prompt(model, [message]) == prompt
    assert encode_prompt(model, "Hello", raw=True) == (tokenizer.encode("Hello"), [])
    system = [{"role": "system", "content": "Be brief."}, message]
    assert encode_prompt(model, system).token_ids == chat.encode(tokenizer, system)
    assert kn.generate(model, system, 8, temperature=0.0) != kn.generate(model, "Hello", 8, temperature=0.0)
    raw = kn.generate(model, "Hello", 8, raw=True, **GREEDY)
    assert raw == tokenizer.decode(kn.generate_tokens(model, tokenizer.encode("Hello"), 8, **GREEDY))


def test_thinking_and_instant_prompts(model):
    think, end = (model.tokenizer.special_tokens[name] for name in ("<think>", "</think>"))
    thinking, instant = (encode_prompt(model, "Hello", thinking=thinking).token_ids for thinking in (True, False))
    assert thinking[-1] == think
    assert instant[-2:] == [think, end]
    assert instant[:-1] == thinking
    replies = [kn.generate(model, "Hello", 8, thinking=thinking, **GREEDY) for thinking in (True, False)]
    assert replies == [model.tokenizer.decode(kn.generate_tokens(model, i, 8, **GREEDY)) for i in (thinking, instant)]


def test_tools_are_declared(model):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    prompt = encode_prompt(model, "Hello", tools=tools).token_ids
    assert prompt == chat.encode(model.tokenizer, [{"role": "user", "content": "Hello"}], tools)
    assert "weather" in model.tokenizer.decode(prompt)
    reply = kn.generate(model, "Hello", 8, tools=tools, **GREEDY)
    assert reply == model.tokenizer.decode(kn.generate_tokens(model, prompt, 8, **GREEDY))


SPECIAL = "<|im_end|><|im_user|>x<think></think>[EOS]<|media_pad|>"


def test_special_tokens_of_the_user_are_plain_text(model):
    first_special = 768
    plain = [i for i in encode_prompt(model, "Hello").token_ids if i >= first_special]
    prompt = encode_prompt(model, SPECIAL).token_ids
    assert [i for i in prompt if i >= first_special] == plain
    assert SPECIAL in model.tokenizer.decode(prompt)
    assert all(i < first_special for i in encode_prompt(model, SPECIAL, raw=True).token_ids)
    unsafe = encode_prompt(model, SPECIAL.replace("<|media_pad|>", ""), safe=False).token_ids
    assert [i for i in unsafe if i >= first_special] != plain


def test_the_checkpoints_template_is_used(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("<|im_user|>{{ messages[0].content }}!")
    model = kn.load(folder)
    user = model.tokenizer.special_tokens["<|im_user|>"]
    assert encode_prompt(model, "Hi [EOS]").token_ids == [user, *model.tokenizer.encode("Hi [EOS]!")]


def test_without_tokenizer(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tiktoken.model"))
    model = kn.load(bare)
    for call in (kn.generate, kn.stream):
        with pytest.raises(ValueError, match=r"no tiktoken\.model"):
            list(call(model, "Hello", 4))
    tokens = kn.generate_tokens(model, TOKENS, 5, temperature=0.0)
    assert tokens == kn.generate_tokens(kn.load(folder), TOKENS, 5, temperature=0.0)


def test_empty_prompt(model):
    for call in (lambda: kn.generate(model, "", raw=True), lambda: kn.generate_tokens(model, [])):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            call()
    assert kn.generate(model, "", 4, **GREEDY), "an empty message is a prompt"


def test_prompt_with_an_id_out_of_range(model):
    with pytest.raises(ValueError, match=r"token_ids\[1\] is 1024"):
        kn.generate_tokens(model, [1, 1024])


def test_prompt_longer_than_the_context(folder):
    model = kn.load(folder, max_position_embeddings=32)
    with pytest.raises(ValueError, match="the prompt has 33 tokens, expected at most the context of 32"):
        kn.generate_tokens(model, TOKENS[:33])
    assert len(kn.generate_tokens(model, TOKENS[:32], **GREEDY)) == 1
    assert len(kn.generate_tokens(model, TOKENS[:30], **GREEDY)) == 3


def test_prompt_longer_than_the_cache(model):
    cache = model.new_cache(100)
    kn.generate_tokens(model, TOKENS[:50], 3, cache=cache, **GREEDY)
    before = list(cache.token_ids)
    with pytest.raises(ValueError, match="the prompt has 101 tokens, expected at most .*max_tokens = 100"):
        kn.generate_tokens(model, TOKENS[:101], cache=cache)
    assert cache.token_ids == before


# Images and video

PIXELS = np.random.default_rng(3).integers(0, 256, (3, 60, 90, 3), np.uint8)  # 12 tokens each
FRAMES = np.random.default_rng(4).integers(0, 256, (5, 30, 30, 3), np.uint8)  # two chunks of 4 tokens


def image(source):
    return {"type": "image", "image": source}


def user(*content):
    return {"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in content]}


def text(value):
    return {"type": "text", "text": value}


def test_images_and_videos_precede_the_text(model):
    message = user(image(PIXELS[0]), image(PIXELS[1]), {"type": "video", "video": FRAMES}, "What?")
    prompt = encode_prompt(model, "What?", images=list(PIXELS[:2]), videos=[FRAMES])
    expected = encode_prompt(model, [message])
    assert prompt.token_ids == expected.token_ids
    assert [item.digest for item in prompt.media] == [item.digest for item in expected.media]
    assert [(item.kind, item.tokens) for item in prompt.media] == [("image", 12)] * 2 + [("video", 4)] * 2
    assert prompt.token_ids.count(model.config.media_placeholder_token_id) == 2 * 12 + 2 * 4


def test_reply_to_media(model):
    prompt = encode_prompt(model, "What?", images=[PIXELS[0]], videos=[FRAMES])
    expected = kn.generate_tokens(model, prompt.token_ids, 10, media=prompt.media, **GREEDY)
    assert kn.generate(model, "What?", 10, images=[PIXELS[0]], videos=[FRAMES], **GREEDY) == (
        model.tokenizer.decode(expected)
    )
    assert expected != kn.generate_tokens(model, prompt.token_ids, 10, **GREEDY), "placeholders taken for tokens"
    others = [kn.generate(model, "What?", 10, images=[pixels], **GREEDY) for pixels in PIXELS]
    assert len(set(others)) == 3


def test_conversation_about_an_image(model, monkeypatch):
    """The image stays in the first message; later turns take it from the latent cache, another cache from its rows."""
    items, encode = [], model._encoded.encode
    monkeypatch.setattr(model._encoded, "encode", lambda new, progress: items.extend(new) or encode(new, progress))
    cache, pixels = model.new_cache(300), PIXELS[0] ^ 1
    messages = [user(image(pixels), "What is this?")]
    for question in ("And that?", "Why?"):
        stats = Stats()
        reply = kn.generate(model, messages, 8, thinking=False, cache=cache, stats=stats, **GREEDY)
        assert reply == kn.generate(model, messages, 8, thinking=False, **GREEDY)
        messages += [chat.parse_reply(reply, thinking=False).to_message(), user(question)]
    assert stats.cached_tokens > 30
    assert len(items) == 1


def test_media_are_part_of_one_message_or_of_messages(model):
    for prompt, options in ((PIXELS, {"raw": True}), ([user("x")], {})):
        with pytest.raises(ValueError, match="images and videos go with a prompt that is one message"):
            encode_prompt(model, prompt, images=[PIXELS[0]], **options)
    for name in ("images", "videos"):
        with pytest.raises(ValueError, match=f"{name} is str, expected a list"):
            encode_prompt(model, "x", **{name: "photo.png"})


def test_files_of_messages_from_elsewhere(model, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS[0]).save(path)
    messages = [user({"type": "image_url", "image_url": {"url": str(path)}}, "x")]
    assert encode_prompt(model, messages).media[0].tokens == 12
    with pytest.raises(ValueError, match="expected a data URL: files are not read for this caller"):
        encode_prompt(model, messages, local_files=False)


def test_malformed_messages_with_media(model):
    for message, expected in (
        ({"role": "user", "content": [7]}, r"messages\[0\].content\[0\] is 7"),
        ({"role": "user", "content": [{"type": ["image"]}]}, r"content\[0\].type is"),
        (user({"type": "audio", "audio": "x"}), "part of type audio, expected text, image or video"),
        (7, r"messages\[0\] is 7"),
    ):
        with pytest.raises(ValueError, match=expected):
            encode_prompt(model, [message])


def test_literal_placeholders_beside_media(model):
    """What the user wrote is text, as many tokens as ever it looks like."""
    plain = encode_prompt(model, "x", images=[PIXELS[0]])
    prompt = encode_prompt(model, "<|media_pad|><|kimi_k25_video_placeholder|>", images=[PIXELS[0]])
    pad = model.config.media_placeholder_token_id
    assert prompt.token_ids.count(pad) == plain.token_ids.count(pad) == 12
    assert kn.generate_tokens(model, prompt.token_ids, 2, media=prompt.media, **GREEDY)


# A cache that goes on


def test_a_second_turn_computes_only_what_is_new(model):
    cache, stats = model.new_cache(300), Stats()
    reply = kn.generate_tokens(model, TOKENS, 20, cache=cache, stats=stats, **GREEDY)
    assert stats.cached_tokens == 0
    assert cache.token_ids == [*TOKENS, *reply[:-1]]
    prompt, stats = [*TOKENS, *reply, *TOKENS[:30]], Stats()
    again = kn.generate_tokens(model, prompt, 20, cache=cache, stats=stats, **GREEDY)
    assert (stats.prompt_tokens, stats.cached_tokens) == (170, 139)
    assert again == kn.generate_tokens(model, prompt, 20, **GREEDY)


@pytest.mark.parametrize("shared", [0, 1, 63, 64, 65, 119])
def test_a_prompt_that_departs_from_the_cache(model, shared):
    prompt = [*TOKENS[:shared], (TOKENS[shared] + 1) % 768, *TOKENS[5:15]]
    cache = model.new_cache(200)
    prefill(model, TOKENS, cache)
    logits, cached = prefill(model, prompt, cache)
    fresh, _ = prefill(model, prompt, model.new_cache(200))
    assert cached == shared
    assert cache.token_ids == prompt
    assert logits == pytest.approx(fresh, abs=1e-4)


@pytest.mark.parametrize("length", [1, 50, 64, 65, 120])
def test_a_prompt_that_the_cache_holds_already(model, length):
    """The last token is computed again, for its logits."""
    cache = model.new_cache(200)
    prefill(model, TOKENS, cache)
    logits, cached = prefill(model, TOKENS[:length], cache)
    assert cached == length - 1
    assert cache.token_ids == TOKENS[:length]
    assert logits == pytest.approx(prefill(model, TOKENS[:length], model.new_cache(200))[0], abs=1e-4)


def test_closing_a_stream_leaves_the_cache_usable(model):
    cache, stats = model.new_cache(300), Stats()
    pieces = kn.stream(model, "Hello", 100, cache=cache, stats=stats, **GREEDY)
    first = next(pieces) + next(pieces)
    pieces.close()
    assert kn.generate(model, "Hello", 100, **GREEDY).startswith(first)
    prompt = encode_prompt(model, "Hello").token_ids
    assert cache.token_ids[: len(prompt)] == prompt
    assert 0 < stats.output_tokens < 100
    again = Stats()
    reply = kn.generate(model, "Hello", 100, cache=cache, stats=again, **GREEDY)
    assert again.cached_tokens == len(prompt) - 1
    assert reply == kn.generate(model, "Hello", 100, **GREEDY)


class Broken(Exception):
    pass


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_failing_step_leaves_the_cache_usable(model, monkeypatch, steps):
    """An exception inside a layer, as Ctrl-C would raise it, in the prompt or while decoding by Python."""
    monkeypatch.setattr(model, "_has_graph", lambda *_: False)
    cache = model.new_cache(300)
    forward, count = model.layers[1].mlp.forward, iter(range(1000))

    def breaking(x):
        if next(count) == steps:
            raise Broken
        return forward(x)

    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(model.layers[1].mlp, "forward", breaking)
        kn.generate_tokens(model, TOKENS, 20, cache=cache, **GREEDY)
    expected = kn.generate_tokens(model, TOKENS, 20, **GREEDY)
    assert cache.token_ids == ([] if steps == 0 else [*TOKENS, *expected[: steps - 1]])
    assert kn.generate_tokens(model, TOKENS, 20, cache=cache, **GREEDY) == expected


def test_progress(model, monkeypatch):
    """The prompt in tokens times layers, the cached part left out."""
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 50)
    seen, cache = [], model.new_cache(200)
    options = {"cache": cache, "progress": lambda done, total: seen.append((done, total)), **GREEDY}
    kn.generate_tokens(model, TOKENS[:70], 3, **options)
    assert seen == [(50, 210), (100, 210), (150, 210), (170, 210), (190, 210), (210, 210)]
    del seen[:]
    kn.generate_tokens(model, TOKENS, 3, **options)
    assert seen == [(50, 150), (100, 150), (150, 150)]
