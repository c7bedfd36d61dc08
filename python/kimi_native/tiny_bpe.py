"""A byte-pair vocabulary for the checkpoints of make_tiny, trained on text that ships with the package."""

from collections import Counter
from importlib import resources

import regex

from kimi_native.tokenizer import PATTERN


def train(text: str, size: int) -> list[bytes]:
    """`size` tokens in the order of their ranks: the 256 bytes, then one token a merge.

    Each merge joins the adjacent pairs whose joined bytes are the most frequent within the pieces that the
    tokenizer's pattern cuts; the smaller bytes win a tie. Raises ValueError when too few pairs of the text
    repeat.
    """
    pieces = Counter(piece.encode() for piece in regex.findall(PATTERN, text, flags=regex.V1))
    words = {piece: [bytes([byte]) for byte in piece] for piece in pieces}
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(tokens) < size:
        joined: Counter[bytes] = Counter()
        for piece, word in words.items():
            for left, right in zip(word, word[1:], strict=False):
                joined[left + right] += pieces[piece]
        token, count = min(joined.items(), key=lambda item: (-item[1], item[0]), default=(b"", 0))
        if count < 2:
            raise ValueError(f"size is {size}, expected at most {len(tokens)} for a text of {len(text)} characters")
        tokens[token] = None
        words = {piece: _merge(word, token) for piece, word in words.items()}
    return list(tokens)


def _merge(word: list[bytes], token: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for part in word:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def shipped_text() -> str:
    """Public-domain English, an article on human rights in many languages, and code."""
    return (resources.files("kimi_native") / "tiny_text.txt").read_text(encoding="utf-8")
