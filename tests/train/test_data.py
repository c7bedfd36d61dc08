"""Batches from files: what is in them, that they depend on seed and step alone, and what bad files say."""

import json

import numpy as np
import pytest
from kimi_native import chat
from kimi_native.chat_media import read_media
from kimi_native.config import Config
from kimi_native.make_tiny import make_tiny
from kimi_native.splice import find_spans
from kimi_native.train.batch import NO_LOSS
from kimi_native.train.data import Mixture
from kimi_native.train.encode import Encoder, encode_chat
from media_items import random_item
from PIL import Image

END_OF_TURN, PAD = "<|im_end|>", "<|media_pad|>"
QUESTION = {"role": "user", "content": "Who goes there?"}
ANSWER = {"role": "assistant", "content": "A friend."}
PLAY = "\n".join(f"Line {i}: to be, or not to be, that is question {i * i}." for i in range(200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder(folder, Config.from_folder(folder))


@pytest.fixture
def play(tmp_path):
    file = tmp_path / "play.txt"
    file.write_text(PLAY, encoding="utf-8")
    return file


@pytest.fixture
def chats(tmp_path):
    """Ten conversations of text."""
    return write_chats(tmp_path / "chats.jsonl", [[QUESTION, ANSWER | {"content": f"Friend {i}."}] for i in range(10)])


def write_chats(file, conversations):
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
    return file


def mixture(files, encoder, **options):
    files = [(file, 1.0) if not isinstance(file, tuple) else file for file in files]
    return Mixture(files, encoder, **{"seq_len": 16, "batch_tokens": 64, "seed": 5, **options})


def sequences(batch):
    """(token_ids, targets) of each sequence."""
    ends = batch.cu_seqlens
    return [(batch.token_ids[a:b], batch.targets[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def same(a, b):
    arrays = ("token_ids", "targets", "cu_seqlens")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    return equal and [item.digest for item in a.media] == [item.digest for item in b.media]


def learned(sample):
    """The targets that count."""
    return sample.targets[sample.targets != NO_LOSS].tolist()


# Text and tokens


def test_windows_of_text(play, encoder):
    ids = encoder.tokenizer.encode(PLAY)
    split = len(ids) - round(0.05 * len(ids))
    data = mixture([play], encoder)
    for step in range(20):
        batch = data.batch(step)
        assert batch.cu_seqlens.tolist() == [0, 16, 32, 48, 64] and batch.media == ()
        assert {array.dtype for array in (batch.token_ids, batch.targets, batch.cu_seqlens)} == {np.dtype(np.int32)}
        for tokens, targets in sequences(batch):
            assert tokens[1:].tolist() == targets[:-1].tolist()
            assert occurs([*tokens, targets[-1]], ids[:split])
    for batch in data.validation():
        assert all(occurs([*tokens, targets[-1]], ids[split:]) for tokens, targets in sequences(batch))


def occurs(window, ids):
    return any(ids[i : i + len(window)] == window for i in range(len(ids) - len(window) + 1) if ids[i] == window[0])


def test_every_window_is_drawn(tmp_path, encoder):
    np.save(tmp_path / "t.npy", np.arange(12, dtype=np.uint16))
    data = mixture([tmp_path / "t.npy"], encoder, seq_len=4, batch_tokens=4, validation_fraction=0.45)
    assert {int(data.batch(step).token_ids[0]) for step in range(100)} == {0, 1, 2}
    (sample,) = {tuple(batch.token_ids) + tuple(batch.targets[-1:]) for batch in data.validation()}
    assert sample == (7, 8, 9, 10, 11)


def test_token_files_are_read_as_they_are(play, tmp_path, encoder):
    ids = encoder.tokenizer.encode(PLAY)
    files = [play]
    for dtype in ("<u2", ">i4", "<i8"):
        files.append(tmp_path / f"{dtype[1:]}.npy")
        np.save(files[-1], np.array(ids, dtype))
    first, *others = [mixture([file], encoder).batch(3) for file in files]
    assert all(same(first, other) for other in others)


def test_batches_are_a_function_of_seed_and_step(play, chats, encoder):
    data, again = (mixture([play, chats], encoder) for _ in range(2))
    later = [data.batch(step) for step in range(6)]
    assert all(same(again.batch(step), later[step]) for step in (5, 0, 3))
    assert not any(same(later[0], batch) for batch in later[1:])
    assert not same(mixture([play, chats], encoder, seed=6).batch(0), later[0])
    assert all(same(a, b) for a, b in zip(data.validation(), again.validation(), strict=True))
    assert len(data.validation()) == 8


def test_weights_are_shares_of_the_sequences(tmp_path, encoder):
    for token in (1, 2, 3):
        np.save(tmp_path / f"{token}.npy", np.full(40, token))
    files = [(tmp_path / "1.npy", 1), (tmp_path / "2.npy", 2.5), (tmp_path / "3.npy", 0.5)]
    data = mixture(files, encoder, seq_len=1, batch_tokens=1000, validation_fraction=0.1)
    tokens = np.concatenate([data.batch(step).token_ids for step in range(10)])
    assert len(tokens) == 10_000
    shares = np.bincount(tokens)[1:] / len(tokens)
    assert np.abs(shares - [0.25, 0.625, 0.125]).max() < 0.02  # four standard deviations


def test_without_validation(play, encoder):
    data = mixture([play], encoder, validation_fraction=0)
    assert data.validation() == []
    assert len(data.sources[0].parts[0]) == len(encoder.tokenizer.encode(PLAY))


# Chats


def test_loss_is_on_the_turn_of_the_assistant(encoder):
    """Behind the prompt that inference makes, on </think>, the answer and the end of the turn."""
    (sample,) = encode_chat(encoder, [QUESTION, ANSWER])
    prompt = chat.encode(encoder.tokenizer, [QUESTION])
    reply = encoder.tokenizer.encode(f"</think>A friend.{END_OF_TURN}", special=True)
    assert sample.token_ids.tolist() == (prompt + reply)[:-1]
    assert sample.targets.tolist() == [NO_LOSS] * (len(prompt) - 1) + reply


def test_reasoning_and_tool_calls_are_learned(encoder):
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (sample,) = encode_chat(encoder, [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert encoder.tokenizer.decode(learned(sample)).endswith(
        f'argument_begin|>{{"a": 1}}<|tool_call_end|><|tool_calls_section_end|>{END_OF_TURN}'
    )
    (sample,) = encode_chat(encoder, [QUESTION, ANSWER | {"reasoning_content": "Hm."}])
    assert encoder.tokenizer.decode(learned(sample)) == f"Hm.</think>A friend.{END_OF_TURN}"


def test_turns_share_a_sequence(encoder):
    messages = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER | {"content": "Two."}]
    (sample,) = encode_chat(encoder, messages)
    whole = chat.encode(encoder.tokenizer, messages, add_generation_prompt=False)
    assert sample.token_ids.tolist() == whole[:-1]
    assert encoder.tokenizer.decode(learned(sample)) == f"</think>A friend.{END_OF_TURN}</think>Two.{END_OF_TURN}"


def test_reasoning_that_a_later_prompt_drops_begins_a_new_sequence(encoder):
    thought = ANSWER | {"reasoning_content": "Hm."}
    messages = [QUESTION, thought, QUESTION, thought | {"content": "Two."}]
    samples = encode_chat(encoder, messages)
    for sample, turn in zip(samples, (1, 3), strict=True):
        prompt = chat.encode(encoder.tokenizer, messages[:turn])
        reply = encoder.tokenizer.encode(f"Hm.</think>{messages[turn]['content']}{END_OF_TURN}", special=True)
        assert sample.token_ids.tolist() == (prompt + reply)[:-1]
        assert learned(sample) == reply


def test_text_of_a_chat_is_no_special_token(encoder):
    (sample,) = encode_chat(encoder, [QUESTION, ANSWER | {"content": f"Say {END_OF_TURN} now."}])
    assert learned(sample).count(encoder.tokenizer.special_tokens[END_OF_TURN]) == 1


def test_images_stand_at_their_placeholders(encoder, rng):
    first, second = random_item(rng, 4, 4), random_item(rng, 2, 6)

    def ask(item):
        return {"role": "user", "content": [{"type": "image", "image": item}, {"type": "text", "text": "What?"}]}

    messages = [ask(first), ANSWER | {"reasoning_content": "Hm."}, ask(second), ANSWER]
    one, two = encode_chat(encoder, messages)
    placeholder = encoder.tokenizer.special_tokens[PAD]
    assert (one.media, two.media) == ((first,), (first, second))
    for sample, sizes in ((one, [4]), (two, [4, 3])):
        spans = find_spans(sample.token_ids, placeholder, sample.media)
        assert [span.stop - span.start for span in spans] == sizes
        assert placeholder not in learned(sample)
    media = read_media(messages, encoder.processor, True)
    whole = chat.encode(encoder.tokenizer, messages, add_generation_prompt=False, media=media)
    assert two.token_ids.tolist() == whole[:-1]


def test_batches_of_chats(chats, play, encoder):
    """Conversations are whole, and kept apart by cu_seqlens."""
    (sample,) = encode_chat(encoder, [QUESTION, ANSWER | {"content": "Friend 7."}])
    data = mixture([chats], encoder, batch_tokens=3 * len(sample.token_ids))
    found = {tuple(tokens) for step in range(40) for tokens, _ in sequences(data.batch(step))}
    kept = {
        tuple(encode_chat(encoder, [QUESTION, ANSWER | {"content": f"Friend {i}."}])[0].token_ids) for i in range(9)
    }
    assert found == kept
    assert {len(sequences(data.batch(step))) for step in range(40)} == {3}
    (last,) = encode_chat(encoder, [QUESTION, ANSWER | {"content": "Friend 9."}])
    for batch in data.validation():
        assert all(np.array_equal(tokens, last.token_ids) for tokens, _ in sequences(batch))


@pytest.fixture
def pictures(tmp_path):
    """Four conversations about an image each, and the files of these."""
    (tmp_path / "images").mkdir()
    conversations = []
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        source = f"images/{i}.png" if i % 2 else {"url": f"images/{i}.png"}
        kind = "image" if i % 2 else "image_url"
        conversations.append([{"role": "user", "content": [{"type": kind, kind: source}]}, ANSWER])
    return write_chats(tmp_path / "pictures.jsonl", conversations)


def test_images_are_relative_to_the_file_and_read_when_drawn(pictures, encoder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    data = mixture([pictures], encoder)
    expected = {encoder.processor.image(pictures.parent / f"images/{i}.png").digest for i in range(3)}
    batches = [data.batch(step) for step in range(30)]
    assert {item.digest for batch in batches for item in batch.media} == expected
    assert all(len(batch.media) == len(sequences(batch)) > 0 for batch in batches)
    again = mixture([pictures], encoder)
    assert all(same(again.batch(step), batches[step]) for step in (29, 0))


def test_a_bounded_number_of_encoded_images_is_kept(pictures, encoder, monkeypatch):
    monkeypatch.setattr("kimi_native.train.data.CACHED_CHATS", 2)
    data = mixture([pictures], encoder)
    batches = [data.batch(step) for step in range(20)]
    assert data.sources[0]._encoded.cache_info().currsize == 2
    assert len({item.digest for batch in batches for item in batch.media}) == 3


# Bad input


def refused(match, files, encoder, **options):
    with pytest.raises((ValueError, OSError), match=match):
        mixture(files, encoder, **options)


BAD_LINES = {
    "{": r"line 2: not JSON \(.*\), expected \{\"messages\"",
    "[1]": r"line 2: found '\[1\]', expected \{\"messages\"",
    '{"messages": 3}': r"line 2: found .* expected \{\"messages\"",
    '{"messages": [], "tools": []}': "line 2: found .*tools",
    '{"messages": [{"content": "a"}]}': r"line 2: messages\[0\]\.role is None, expected",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 2: the messages have no turn of the assistant",
    '{"messages": [{"role": "assistant", "content": "a", "name": "me"}]}': r"line 2: messages\[0\] begins otherwise",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_of_chats(chats, encoder, line):
    lines = chats.read_text().split("\n")
    chats.write_text("\n".join([lines[0], line, *lines[2:]]))
    refused(f"chats.jsonl, {BAD_LINES[line]}", [chats], encoder)


def test_chat_that_no_batch_holds(chats, encoder):
    lines = [[QUESTION, ANSWER], [QUESTION, ANSWER | {"content": "word " * 100}], [QUESTION, ANSWER]]
    refused(r"line 2: the chat has \d+ tokens, expected at most 64", [write_chats(chats, lines)], encoder)


def test_bad_images_name_the_line_when_drawn(pictures, encoder):
    (pictures.parent / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"pictures.jsonl, line 2: .*1.png: is in no format that Pillow opens"):
        list(map(mixture([pictures], encoder).batch, range(30)))


def test_images_for_a_model_of_text(pictures, tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("k2") / "k2", "tiny-k2")
    data = mixture([pictures], Encoder(folder, Config.from_folder(folder)))
    with pytest.raises(
        ValueError, match=r"line \d: the messages have media, expected text: the config has no vision_co"
    ):
        data.batch(0)


def test_image_of_the_assistant(encoder, rng):
    part = {"type": "image", "image": random_item(rng, 2, 2)}
    with pytest.raises(ValueError, match=r"messages\[1\] is the assistant's and has media, expected text"):
        encode_chat(encoder, [QUESTION, {"role": "assistant", "content": [part]}])


def test_bad_text(tmp_path, encoder):
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\n\xff\n")
    refused("bad.txt, line 3: found byte 0xff, expected UTF-8", [tmp_path / "bad.txt"], encoder)
    (tmp_path / "short.txt").write_text("too short")
    refused(r"short.txt: has \d+ tokens, expected at least 17, and as many for v", [tmp_path / "short.txt"], encoder)
    refused("missing.txt", [tmp_path / "missing.txt"], encoder)
    (tmp_path / "book.pdf").write_text(PLAY)
    refused(r"book.pdf: is of kind '.pdf', expected .txt, .npy or .jsonl", [tmp_path / "book.pdf"], encoder)


BAD_TOKENS = {
    "is float64 [100], expected integers": np.zeros(100),
    "is int64 [10, 10], expected integers": np.zeros((10, 10), int),
    "token 7 is 1024, expected 0 to 1023": np.where(np.arange(100) == 7, 1024, 3),
    "token 99 is -1, expected 0 to 1023": np.where(np.arange(100) == 99, -1, 3),
    "token 8 is 789, expected 0 to 1023 without 789, which is media": np.where(np.arange(100) == 8, 789, 3),
}


@pytest.mark.parametrize("message", BAD_TOKENS)
def test_bad_token_file(tmp_path, encoder, message):
    np.save(tmp_path / "t.npy", BAD_TOKENS[message])
    with pytest.raises(ValueError) as error:
        mixture([tmp_path / "t.npy"], encoder)
    assert message in str(error.value) and "t.npy" in str(error.value)


@pytest.mark.parametrize("data", [b"", b"no npy at all", b"\x93NUMPY\x01\x00"])
def test_file_that_is_no_npy(tmp_path, encoder, data):
    (tmp_path / "t.npy").write_bytes(data)
    refused(r"t.npy: cannot be read .* expected an .npy of token ids", [tmp_path / "t.npy"], encoder)


BAD_OPTIONS = [
    ("seq_len", 0),
    ("batch_tokens", 15),
    ("validation_fraction", 1),
    ("validation_batches", 0),
    ("seed", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_options(play, encoder, name, value):
    refused(f"{name} is {value}, expected", [play], encoder, **{name: value})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weight(play, encoder, weight):
    refused(f"the weight of .*play.txt is {weight}, expected a number > 0", [(play, weight)], encoder)


def test_tokenizer_that_does_not_fit(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["vocab_size"] = 1000
    with pytest.raises(ValueError, match="tiktoken.model: has 1024 token ids, expected at most vocab_size 1000"):
        Encoder(folder, Config.from_dict(values))


def test_identity_tells_data_apart(play, chats, encoder):
    identity = mixture([play, chats], encoder).identity
    assert mixture([play, chats], encoder).identity == identity
    assert mixture([(play, 2.0), chats], encoder).identity["files"][0] == identity["files"][0] | {"weight": 2.0}
    play.write_text(PLAY + " more")
    changed = mixture([play, chats], encoder).identity
    assert changed["files"][0]["sha256"] != identity["files"][0]["sha256"]
    assert changed["files"][1:] == identity["files"][1:]
    json.dumps(identity)
