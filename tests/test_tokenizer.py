"""The tokenizer: the file, the pattern, special tokens, decoding in a stream."""

import base64
import itertools
import json
import random
from collections import Counter

import pytest
import tiktoken
from kimi_native.tokenizer import MAX_BLOCK, MAX_RUN, PATTERN, Tokenizer

BYTES = [bytes([i]) for i in range(256)]
TEXT = "the cat and the dog and the hen in the den, 你好世界 你好 the théâtre, 日本語の日本 🙂🙂 and then some " * 3


def merges(text, count):
    """Tokens of a byte-pair training on the words of `text`, most frequent pair first."""
    words = [[bytes([b]) for b in word.encode()] for word in text.split(" ")]
    tokens = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        tokens.append(a + b)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [a + b]
    return tokens


def write_vocabulary(folder, tokens=BYTES, added=None):
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    if added is not None:
        decoder = {str(i): {"content": name, "special": True} for i, name in added.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_folder(write_vocabulary(tmp_path, BYTES + merges(TEXT, 40)))


# The pattern

SPLITS = [
    ("I'm can't we'LL", ["I'm", " can't", " we'LL"]),
    ("你好世界test混排ABCdef123456", ["你好世界", "test", "混排", "ABCdef", "123", "456"]),
    ("CamelCaseWord HTTPServer", ["Camel", "Case", "Word", " HTTPServer"]),
    ("  lead\n\n x\t y  ", [" ", " lead", "\n\n", " x", "\t", " y", "  "]),
    ("日本語のテキスト 한국어", ["日本語", "のテキスト", " 한국어"]),
    ("1234567", ["123", "456", "7"]),
    ("A漢字b", ["A", "漢字", "b"]),
    ("a  \r\n \n b", ["a", "  \r\n \n", " b"]),
    (" ?!\n\nx", [" ?!\n\n", "x"]),
    ("_x.Y", ["_x", ".Y"]),
    ("e\u0301té漢e", ["e\u0301té", "漢", "e"]),
]


@pytest.mark.parametrize(("text", "pieces"), SPLITS)
def test_the_pattern_splits(text, pieces):
    assert "".join(pieces) == text
    ranks = {token: i for i, token in enumerate(dict.fromkeys(BYTES + [piece.encode() for piece in pieces]))}
    encoding = tiktoken.Encoding("split", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert [encoding.decode([i]) for i in encoding.encode_ordinary(text)] == pieces


# Encoding


def merged(token_ranks, piece):
    """Byte-pair merging of one piece by its definition."""
    parts = [bytes([b]) for b in piece]
    while True:
        pairs = [(token_ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in token_ranks]
        if not pairs:
            return [token_ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_encode_merges_the_lowest_rank_first(tokenizer):
    ranks = {token: i for i, token in enumerate(BYTES + merges(TEXT, 40))}
    for word in ["the", "then", "thethe", "théâtre", "你好世界", "hhenhe", "日本語", "zebra"]:
        assert tokenizer.encode(word) == merged(ranks, word.encode())
    assert len(tokenizer.encode("the")) == 1


def test_decode_inverts_encode(tokenizer):
    for text in [TEXT, "", "\x00\r\n\t", "🙂 e\u0301 \u202e", "<|im_end|>[BOS]", "a" * 100_001]:
        for special in (False, True):
            assert tokenizer.decode(tokenizer.encode(text, special=special)) == text


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_special_names_become_ids_only_on_request(tokenizer):
    text = "<|im_user|>hi<think>[EOS]<|im_endx"
    ids = tokenizer.encode(text, special=True)
    special = tokenizer.special_tokens
    middle = tokenizer.encode("hi")
    assert ids[: 2 + len(middle)] == [special["<|im_user|>"], *middle, special["<think>"]]
    assert ids[2 + len(middle) :] == [special["[EOS]"], *tokenizer.encode("<|im_endx")]
    assert not set(tokenizer.encode(text)) & set(special.values())


def test_split_special(tokenizer):
    ids = tokenizer.special_tokens
    assert tokenizer.split_special("a[BOS][EOS]b<|") == ["a", ids["[BOS]"], ids["[EOS]"], "b<|"]
    assert tokenizer.split_special("") == []


@pytest.mark.parametrize("run", ["a", " ", "\n", "\x1c", "你", "\u0301", "a ", "\n "])
def test_extreme_text_is_encoded(tokenizer, run):
    text = run * (2 * MAX_BLOCK)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_run_is_cut_where_it_gets_too_long(tmp_path):
    tokenizer = Tokenizer.from_folder(write_vocabulary(tmp_path, [*BYTES, b"aa"]))
    longest = "b" + "a" * (MAX_RUN - 1)
    head = [ord("b"), *[256] * (MAX_RUN // 2 - 1), ord("a")]
    assert tokenizer.encode(longest) == head
    assert tokenizer.encode(longest + "a") == [*head, ord("a")]  # one piece would end in another "aa"
    assert tokenizer.encode(longest + "a a") == [*head, *map(ord, "a a")]
    assert tokenizer.encode("a " + "a" * MAX_RUN) == [*map(ord, "a "), *[256] * (MAX_RUN // 2)]


def test_a_text_is_cut_into_blocks(tmp_path):
    tokenizer = Tokenizer.from_folder(write_vocabulary(tmp_path, [*BYTES, b"ab"]))
    assert MAX_BLOCK == 400_000  # one character into a word
    words = MAX_BLOCK // 3
    whole = [256, ord(" ")]
    assert tokenizer.encode("ab " * (words + 2)) == whole * words + [ord("a"), *b"b ", *whole]


# Special tokens


def test_special_tokens_follow_the_base_vocabulary(tokenizer):
    base = 256 + 40
    special = tokenizer.special_tokens
    assert tokenizer.vocab_size == base + 256
    assert sorted(special.values()) == list(range(base, base + 256))
    real = {
        "[BOS]": 163584,
        "[EOS]": 163585,
        "<|im_end|>": 163586,
        "<|im_user|>": 163587,
        "<|im_assistant|>": 163588,
        "<|start_header_id|>": 163590,
        "<|end_header_id|>": 163591,
        "[EOT]": 163593,
        "<|im_system|>": 163594,
        "<|tool_calls_section_begin|>": 163595,
        "<|tool_calls_section_end|>": 163596,
        "<|tool_call_begin|>": 163597,
        "<|tool_call_argument_begin|>": 163598,
        "<|tool_call_end|>": 163599,
        "<|im_middle|>": 163601,
        "<|media_begin|>": 163602,
        "<|media_content|>": 163603,
        "<|media_end|>": 163604,
        "<|media_pad|>": 163605,
        "<think>": 163606,
        "</think>": 163607,
        "[UNK]": 163838,
        "[PAD]": 163839,
    }
    assert {name: i - base + 163584 for name, i in special.items() if "reserved" not in name} == real
    assert special[f"<|reserved_token_{base + 5}|>"] == base + 5


def test_tokenizer_config_renames_the_ids_it_lists(tmp_path):
    tokenizer = Tokenizer.from_folder(write_vocabulary(tmp_path, added={256 + 5: "<|new|>", 256 + 22: "<muse>"}))
    assert tokenizer.special_tokens["<|new|>"] == 261
    assert tokenizer.special_tokens["<muse>"] == 278
    assert tokenizer.special_tokens["[BOS]"] == 256
    assert "<think>" not in tokenizer.special_tokens
    assert tokenizer.encode("<muse>", special=True) == [278]


def test_the_longest_special_name_wins(tmp_path):
    tokenizer = Tokenizer.from_folder(write_vocabulary(tmp_path, added={261: "<x", 262: "<x>"}))
    assert tokenizer.encode("<x><x", special=True) == [262, 261]


def test_a_tokenizer_config_without_added_tokens(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 262144}')
    assert Tokenizer.from_folder(write_vocabulary(tmp_path)).special_tokens["[BOS]"] == 256


def test_ids_moved_together_by_a_conversion_are_an_error(tmp_path):
    write_vocabulary(tmp_path, added={256 + 18: "<|media_pad|>"})
    with pytest.raises(ValueError, match=r"'<\|media_pad\|>' has ids 274 and 277, expected one id"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("i", [255, 512, -1])
def test_an_added_token_outside_the_reserved_range_is_an_error(tmp_path, i):
    write_vocabulary(tmp_path, added={i: "<|new|>"})
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: .* id {i}, expected 256\.\.511"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\xff",
        '{"added_tokens_decoder": []}',
        '{"added_tokens_decoder": {"x": {"content": "a"}}}',
        '{"added_tokens_decoder": {"256": "a"}}',
        '{"added_tokens_decoder": {"256": {}}}',
        '{"added_tokens_decoder": {"256": {"content": ""}}}',
        '{"added_tokens_decoder": {"256": {"content": 5}}}',
    ],
)
def test_a_malformed_tokenizer_config_is_an_error(tmp_path, text):
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*expected"):
        Tokenizer.from_folder(tmp_path)


# The file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"QUJ* 256", r"line 257: found b'QUJ\*', expected base64"),
        (b"QU*JD 256", r"line 257: found b'QU\*JD', expected base64"),
        (b"QUI 256", "line 257: found b'QUI', expected base64"),
        (b"QUI=", "line 257: found b'QUI=', expected a base64 token, a space and rank 256"),
        (b"QUI= 256 1", "line 257: found b'QUI= 256 1', expected a base64 token"),
        (b"", "line 257: found b'', expected a base64 token"),
        (b" 256", "line 257: found an empty token"),
        (b"QUI= 257", "line 257: found rank b'257', expected 256"),
        (b"QUI= -1", "line 257: found rank b'-1', expected 256"),
        (b"QUI= 0256", "line 257: found rank b'0256', expected 256"),
        (b"QUI= x", "line 257: found rank b'x', expected 256"),
        (b"QQ== 256", "line 257: found token b'A' again, expected it on line 66 only"),
    ],
)
def test_a_malformed_line_is_an_error(tmp_path, line, message):
    file = write_vocabulary(tmp_path) / "tiktoken.model"
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(file) in str(error.value)


def test_a_missing_byte_is_an_error(tmp_path):
    write_vocabulary(tmp_path, [b for b in BYTES if b != b"\x07"] + [b"ab"])
    with pytest.raises(ValueError, match="tiktoken.model: no token for byte 0x07, expected all 256"):
        Tokenizer.from_folder(tmp_path)


def test_every_truncation_of_the_file_is_an_error_or_a_whole_vocabulary(tmp_path):
    file = write_vocabulary(tmp_path, [*BYTES, b"ab", b"abc"]) / "tiktoken.model"
    whole = file.read_bytes()
    sizes = []
    for end in range(len(whole) - 20, len(whole)):
        file.write_bytes(whole[:end])
        try:
            sizes.append(Tokenizer.from_folder(tmp_path).vocab_size)
        except ValueError as error:
            assert str(file) in str(error)
    assert sizes[-1] == 258 + 256 and set(sizes) <= {512, 513, 514}


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiktoken.model"):
        Tokenizer.from_folder(tmp_path)


# Decoding


@pytest.mark.parametrize("bad", [-1, 552, 2**40])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer, bad):
    for decode in (tokenizer.token_bytes, tokenizer.stream().push, lambda i: tokenizer.decode([0, i])):
        with pytest.raises(ValueError, match=rf"token id is {bad}, expected 0\.\.551"):
            decode(bad)


def test_token_bytes(tokenizer):
    assert tokenizer.token_bytes(65) == b"A"
    assert tokenizer.token_bytes(tokenizer.special_tokens["<think>"]) == b"<think>"
    assert tokenizer.decode(iter([72, 105, 296])) == "Hi[BOS]"


def check_stream(tokenizer, ids):
    stream = tokenizer.stream()
    data, seen = b"", ""
    for i in ids:
        data += tokenizer.token_bytes(i)
        seen += stream.push(i)
        whole = data.decode("utf-8", "replace")
        assert whole.startswith(seen)
        # Held back: at most three bytes, none of them a character. CPython also holds back ED A0..BF, the
        # beginning of an encoded surrogate, though no character can come of it.
        assert whole[len(seen) :] in ("", "\ufffd", "\ufffd\ufffd")
        assert seen in [data[: len(data) - n].decode("utf-8", "replace") for n in range(4)]
    assert seen + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_a_stream_of_valid_text_gives_each_character_when_it_is_complete(tokenizer):
    text = "aé你🙂\u0301"
    stream = tokenizer.stream()
    assert [stream.push(b) for b in text.encode()] == [
        "a",
        "",
        "é",
        "",
        "",
        "你",
        "",
        "",
        "",
        "🙂",
        "",
        "\u0301",
    ]
    check_stream(tokenizer, tokenizer.encode(TEXT))


def test_a_stream_of_any_bytes_equals_decode(tokenizer):
    edges = list(b"\x41\x7f\x80\x8f\x90\x9f\xa0\xbf\xc1\xc2\xe0\xe4\xed\xef\xf0\xf4\xf5")
    for n in (1, 2, 3):
        for ids in itertools.product(edges, repeat=n):
            check_stream(tokenizer, ids)
    source = random.Random(0)
    for _ in range(300):
        check_stream(tokenizer, [source.choice(edges) for _ in range(12)])
        check_stream(tokenizer, [source.randrange(tokenizer.vocab_size) for _ in range(12)])
