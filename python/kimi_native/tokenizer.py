"""Kimi's tokenizer: byte-level BPE over `tiktoken.model`, followed by 256 reserved special tokens."""

import base64
import binascii
import codecs
import json
import operator
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

NUM_RESERVED = 256

# The named special tokens, counted from the end of the base vocabulary; others are `<|reserved_token_{id}|>`.
SPECIAL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# Pre-tokenization, in the syntax of Rust's regex (`&&` intersects classes). The first match wins.
PATTERN = "|".join(
    [
        r"\p{Han}+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Longer stretches are cut before the pattern sees them: its engine would overflow its stack.
MAX_BLOCK = 400_000
MAX_RUN = 25_000


class Tokenizer:
    """Text to token ids and back.

    `vocab_size` counts base and reserved tokens; `special_tokens` maps the names of the latter to ids.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int]):
        """`ranks`: token bytes -> id, all of 0..n-1; `special_tokens`: name -> id, all of n..n+255."""
        self.special_tokens = special_tokens
        self.vocab_size = len(ranks) + len(special_tokens)
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
        )
        names = sorted(special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, names))})")

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads `tiktoken.model` and, where present, the `added_tokens_decoder` of `tokenizer_config.json`.

        Raises FileNotFoundError without a `tiktoken.model`, ValueError naming the file for a malformed one.
        """
        folder = Path(path)
        ranks = _read_ranks(folder / "tiktoken.model")
        first = len(ranks)
        names = {i: SPECIAL_TOKENS.get(i - first, f"<|reserved_token_{i}|>") for i in _reserved(first)}
        config = folder / "tokenizer_config.json"
        if config.exists():
            names |= _read_added_tokens(config, first)
        return cls(ranks, _by_name(names, folder))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`, none added. A lone surrogate is encoded as U+FFFD.

        `special=True` turns the names of special tokens into their ids; otherwise they are plain text.
        """
        if not special:
            return [i for block in _blocks(text) for i in self._encoding.encode_ordinary(block)]
        ids: list[int] = []
        for piece in self.split_special(text):
            ids += [piece] if isinstance(piece, int) else self.encode(piece)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cuts `text` at the names of special tokens: these as ids, what lies between them as strings."""
        pieces = self._special_pattern.split(text)
        return [self.special_tokens[p] if i % 2 else p for i, p in enumerate(pieces) if p]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, for a special one its name. An id outside the vocabulary is a ValueError."""
        token_id = operator.index(token_id)
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id is {token_id}, expected 0..{self.vocab_size - 1}")
        return self._encoding.decode_single_token_bytes(token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. An id outside the vocabulary is a ValueError."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one by one. The pieces and the flush together are `Tokenizer.decode` of all ids.

    A piece ends at a character boundary; only bytes that may still become a character are held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, which may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What was held back: U+FFFD for an unfinished character, else empty."""
        return self._utf8.decode(b"", final=True)


def _reserved(first: int) -> range:
    return range(first, first + NUM_RESERVED)


def _read_ranks(file: Path) -> dict[bytes, int]:
    """`tiktoken.model`: line i is `base64(token) i`."""
    ranks: dict[bytes, int] = {}
    for rank, line in enumerate(file.read_bytes().splitlines()):
        where = f"{file}, line {rank + 1}"
        token = _parse_line(line, rank, where)
        if token in ranks:
            raise ValueError(f"{where}: found token {token!r} again, expected it on line {ranks[token] + 1} only")
        ranks[token] = rank
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ValueError(f"{file}: no token for byte {missing[0]:#04x}, expected all 256 single bytes")
    return ranks


def _parse_line(line: bytes, rank: int, where: str) -> bytes:
    fields = line.split(b" ")
    if len(fields) != 2:
        raise ValueError(f"{where}: found {line[:80]!r}, expected a base64 token, a space and rank {rank}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: found {fields[0][:80]!r}, expected base64 ({error})") from None
    if not token:
        raise ValueError(f"{where}: found an empty token, expected at least one byte")
    if fields[1] != b"%d" % rank:
        raise ValueError(f"{where}: found rank {fields[1][:80]!r}, expected {rank} (ranks count up from 0)")
    return token


def _read_added_tokens(file: Path, first: int) -> dict[int, str]:
    """`added_tokens_decoder` of `tokenizer_config.json`: id -> name, ids within the reserved range."""
    try:
        entries = json.loads(file.read_bytes()).get("added_tokens_decoder", {})
        names = {int(i): entry["content"] for i, entry in entries.items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        form = 'an object whose "added_tokens_decoder" maps ids to objects with "content"'
        raise ValueError(f"{file}: {type(error).__name__}: {error}, expected {form}") from None
    for i, name in names.items():
        if i not in _reserved(first):
            raise ValueError(f"{file}: added_tokens_decoder has id {i}, expected {first}..{first + NUM_RESERVED - 1}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{file}: added_tokens_decoder names {i} {name!r}, expected a non-empty string")
    return names


def _by_name(names: dict[int, str], folder: Path) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, name in names.items():
        if ids.setdefault(name, i) != i:
            raise ValueError(f"{folder}: special token {name!r} has ids {ids[name]} and {i}, expected one id")
    return ids


def _blocks(text: str) -> Iterator[str]:
    """Blocks of at most MAX_BLOCK characters; no stretch of only space or only non-space exceeds MAX_RUN."""
    for start in range(0, len(text), MAX_BLOCK):
        block = text[start : start + MAX_BLOCK]
        cut = 0
        for run in re.finditer(r"\s+|\S+", block):  # \s is str.isspace
            for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield block[cut:end]
                cut = end
        yield block[cut:]
