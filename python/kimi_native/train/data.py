"""Text, token files and chats, mixed by weight into batches of whole sequences.

A batch is a function of the seed and the step alone, so a resumed run needs no state of a generator.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from kimi_native import chat
from kimi_native.chat_media import KINDS, media_parts
from kimi_native.train.batch import Batch
from kimi_native.train.encode import Encoder, Sample, encode_chat

CACHED_CHATS = 512  # with media, as encoded


def _held_out(file: Path, count: int, fraction: float, least: int, what: str) -> int:
    """How many of the last of `count` things are kept for validation, so that `least` are left on either side."""
    held_out = max(round(count * fraction), least) if fraction else 0
    if count - held_out < least:
        expected = f"at least {least}" + (f", and as many for validation ({fraction:.0%})" if fraction else "")
        raise ValueError(f"{file}: has {count} {what}, expected {expected}")
    return held_out


class Tokens:
    """Random windows of one long row of tokens, each a sequence of `length` tokens."""

    def __init__(self, file: Path, tokens: np.ndarray, length: int, validation_fraction: float):
        split = len(tokens) - _held_out(file, len(tokens), validation_fraction, length + 1, "tokens")
        self.length, self.parts = length, (tokens[:split], tokens[split:])

    def draw(self, rng: np.random.Generator, held_out: bool) -> list[Sample]:
        tokens = self.parts[held_out]
        start = int(rng.integers(len(tokens) - self.length))
        window = np.array(tokens[start : start + self.length + 1], np.int32)
        return [Sample(window[:-1], window[1:])]


class Chats:
    """Conversations, one a line. Those of text are encoded once; with media when drawn, and the last ones are kept."""

    def __init__(self, file: Path, encoder: Encoder, most: int, validation_fraction: float):
        """most: tokens of a conversation."""
        self.file, self.encoder, self.most = file, encoder, most
        self.chats = [self._text_or_messages(n, line) for n, line in enumerate(_lines(file), 1) if line.strip()]
        self.split = len(self.chats) - _held_out(file, len(self.chats), validation_fraction, 1, "chats")
        self._encoded = lru_cache(CACHED_CHATS)(self._encode)

    def draw(self, rng: np.random.Generator, held_out: bool) -> list[Sample]:
        first, end = (self.split, len(self.chats)) if held_out else (0, self.split)
        drawn = self.chats[int(rng.integers(first, end))]
        return self._encoded(*drawn) if isinstance(drawn, tuple) else drawn

    def _text_or_messages(self, number: int, line: str):
        """Samples of a chat without media, (line number, the line) of one with media."""
        try:
            messages = chat.check_messages(_messages(line))
        except ValueError as error:
            raise ValueError(f"{self.file}, line {number}: {error}") from error
        return (number, line) if any(media_parts(messages)) else self._encode(number, line)

    def _encode(self, number: int, line: str) -> list[Sample]:
        try:
            samples = encode_chat(self.encoder, _resolved(_messages(line), self.file.parent))
            tokens = sum(len(sample.token_ids) for sample in samples)
            if tokens > self.most:
                raise ValueError(f"the chat has {tokens} tokens, expected at most {self.most}, those of a batch")
        except ValueError as error:
            raise ValueError(f"{self.file}, line {number}: {error}") from error
        return samples


def _messages(line: str) -> list:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not JSON ({error}), expected {{"messages": [...]}}') from error
    if not isinstance(values, dict) or values.keys() != {"messages"} or not isinstance(values["messages"], list):
        raise ValueError(f'found {line.strip()!r:.80}, expected {{"messages": [...]}}')
    return values["messages"]


def _resolved(messages: Sequence[dict], folder: Path) -> list[dict]:
    """The messages with the paths of their media relative to `folder`."""

    def path(source):
        is_path = isinstance(source, str) and not source.startswith(("data:", "file:")) and "://" not in source
        return str(folder / source) if is_path else source

    def resolved(part):
        kind = part["type"]
        if kind not in KINDS or kind not in part:
            return part
        source = part[kind]
        return part | {kind: source | {"url": path(source.get("url"))} if isinstance(source, dict) else path(source)}

    def content(value):
        return [resolved(part) for part in value] if isinstance(value, list) else value

    return [message | {"content": content(message.get("content"))} for message in messages]


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: found byte {data[error.start]:#04x}, expected UTF-8") from error


def _lines(file: Path) -> list[str]:
    return _text(file).split("\n")  # splitlines would also cut at separators inside JSON strings


def _token_file(file: Path, encoder: Encoder) -> np.ndarray:
    """The mapped array of an .npy, once all of its values have been checked."""
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read ({error}), expected an .npy of token ids") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{file}: is {tokens.dtype} {list(tokens.shape)}, expected integers [tokens]")
    vocabulary, placeholder = encoder.config.text_config.vocab_size, encoder.config.media_placeholder_token_id
    bad = (tokens < 0) | (tokens >= vocabulary)
    if placeholder is not None:
        bad |= tokens == placeholder
    if bad.any():
        at = int(bad.argmax())
        expected = f"0 to {vocabulary - 1}" + ("" if placeholder is None else f" without {placeholder}, which is media")
        raise ValueError(f"{file}: token {at} is {tokens[at]}, expected {expected}")
    return tokens


def open_source(file, encoder: Encoder, seq_len: int, batch_tokens: int, validation_fraction: float) -> Tokens | Chats:
    """The source of a file by its suffix: .txt (UTF-8 text), .npy (integers [tokens]) or .jsonl (chats).

    A line of .jsonl is {"messages": [...]}; relative paths of images and videos count from the file's folder.
    Raises ValueError naming file and line, or OSError.
    """
    file = Path(file)
    if file.suffix == ".jsonl":
        return Chats(file, encoder, batch_tokens, validation_fraction)
    if file.suffix == ".npy":
        tokens = _token_file(file, encoder)
    elif file.suffix == ".txt":
        tokens = np.array(encoder.tokenizer.encode(_text(file)), np.int32)
    else:
        raise ValueError(f"{file}: is of kind {file.suffix!r}, expected .txt, .npy or .jsonl")
    return Tokens(file, tokens, seq_len, validation_fraction)


class Mixture:
    """Batches of sequences drawn from files, each as often as its weight says.

    A batch takes whole sequences, a conversation's together, until the next one would exceed batch_tokens. The last
    validation_fraction of each file's tokens or chats is kept for validation, of which validation_batches batches are
    drawn in the same way, the same ones each time. `identity` says what the batches depend on.
    """

    def __init__(
        self,
        files: Sequence[tuple[str | Path, float]],
        encoder: Encoder,
        *,
        seq_len: int,
        batch_tokens: int,
        seed: int = 0,
        validation_fraction: float = 0.05,
        validation_batches: int = 8,
    ):
        """files: (path, weight), as open_source takes them. Raises ValueError naming argument or file, or OSError."""
        _check(bool(files), "files", list(files), "at least one file")
        for file, weight in files:
            _check(0 < weight < float("inf"), f"the weight of {file}", weight, "a number > 0")
        _check(seed >= 0, "seed", seed, "at least 0")
        _check(seq_len >= 1, "seq_len", seq_len, "at least 1")
        _check(batch_tokens >= seq_len, "batch_tokens", batch_tokens, f"at least seq_len {seq_len}")
        _check(0 <= validation_fraction < 1, "validation_fraction", validation_fraction, "0 up to below 1")
        _check(validation_batches >= 1, "validation_batches", validation_batches, "at least 1")
        self.seed, self.batch_tokens = seed, batch_tokens
        self.sources = [open_source(f, encoder, seq_len, batch_tokens, validation_fraction) for f, _ in files]
        self.validation_batches = validation_batches if validation_fraction else 0
        weights = np.cumsum([float(weight) for _, weight in files])
        self._shares = weights / weights[-1]
        self.identity = {
            "files": [{"name": Path(f).name, "sha256": _digest(f), "weight": float(weight)} for f, weight in files],
            "encoder": encoder.digest,
            "seq_len": seq_len,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "validation_fraction": validation_fraction,
            "validation_batches": validation_batches,
        }

    def batch(self, step: int) -> Batch:
        """The batch of step 0, 1, ...; the same for the same seed and step."""
        return self._draw([self.seed, 0, step], held_out=False)

    def validation(self) -> list[Batch]:
        return [self._draw([self.seed, 1, i], held_out=True) for i in range(self.validation_batches)]

    def _draw(self, key: list[int], held_out: bool) -> Batch:
        rng = np.random.default_rng(key)
        samples, tokens = [], 0
        while True:
            source = self.sources[int(np.searchsorted(self._shares, rng.random(), side="right"))]
            drawn = source.draw(rng, held_out)
            tokens += sum(len(sample.token_ids) for sample in drawn)
            if tokens > self.batch_tokens:
                return pack(samples)
            samples += drawn


def pack(samples: Sequence[Sample]) -> Batch:
    """The samples one after the other."""
    lengths = [len(sample.token_ids) for sample in samples]
    return Batch(
        np.concatenate([sample.token_ids for sample in samples]),
        np.concatenate([sample.targets for sample in samples]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        tuple(item for sample in samples for item in sample.media),
    )


def _check(condition: bool, name: str, found, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {found!r}, expected {expected}")


def _digest(file) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
