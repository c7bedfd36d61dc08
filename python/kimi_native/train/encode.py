"""Text and messages to the tokens of training, by the files of a checkpoint's folder.

Chats have the token layout of inference: each of the assistant's turns stands behind the very prompt that generate
makes for it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_native import chat
from kimi_native.chat_media import media_parts, read_media
from kimi_native.config import Config
from kimi_native.media import MediaItem, MediaProcessor
from kimi_native.tokenizer import Tokenizer
from kimi_native.train.batch import NO_LOSS

_ENCODER_FILES = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


class Encoder:
    """Text and messages to token ids, by the files of a checkpoint's folder; `digest` is the SHA-256 of these files."""

    def __init__(self, folder, config: Config):
        """Raises FileNotFoundError without a tiktoken.model, ValueError for files that are malformed or do not fit."""
        folder, template = Path(folder), Path(folder) / "chat_template.jinja"
        self.config = config
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = template.read_text(encoding="utf-8") if template.exists() else None
        self.processor = MediaProcessor.from_folder(folder)
        found, most = self.tokenizer.vocab_size, config.text_config.vocab_size
        if found > most:
            raise ValueError(f"{folder / 'tiktoken.model'}: has {found} token ids, expected at most vocab_size {most}")
        files = [folder / name for name in _ENCODER_FILES]
        self.digest = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.exists())).hexdigest()

    def prompt(self, messages: Sequence[dict], media: list[list[MediaItem]], **options) -> list[int]:
        """Token ids of the messages; media: of these or of more messages, as read_media returns them."""
        mine = media[: sum(1 for _ in media_parts(messages))]
        return chat.encode(self.tokenizer, messages, template=self.template, media=mine, **options)


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence. token_ids, targets: int32 [n]; media: as in Batch."""

    token_ids: np.ndarray
    targets: np.ndarray
    media: tuple[MediaItem, ...] = ()


def encode_chat(encoder: Encoder, messages: Sequence[dict]) -> list[Sample]:
    """Sequences in which each of the assistant's turns stands behind its prompt; the loss is on these turns alone.

    A turn is all that the model writes after <think>: reasoning, </think>, content, tool calls and <|im_end|>, so that
    a message without reasoning teaches to close it at once. Turns share a sequence as long as the prompt of a later
    one repeats the earlier ones to the token; where it drops their reasoning, a new sequence begins.
    Raises ValueError for malformed messages or without an assistant's turn, MediaError for media that cannot be read.
    """
    messages = chat.check_messages(messages)
    media = read_media(messages, encoder.processor, local_files=True)
    if media and encoder.config.vision_config is None:
        raise ValueError("the messages have media, expected text: the config has no vision_config")
    samples, ids, learned, items = [], [], [], ()
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, reply = encoder.prompt(messages[:i], media), _reply(encoder, messages[: i + 1], media)
        if prompt[: len(ids)] != ids:
            samples.append(_sample(ids, learned, items))
            ids, learned = [], []
        learned += [False] * (len(prompt) - len(ids)) + [True] * len(reply)
        ids = prompt + reply
        items = tuple(item for part in media[: sum(1 for _ in media_parts(messages[:i]))] for item in part)
    if not ids:
        raise ValueError("the messages have no turn of the assistant, expected one")
    return [*samples, _sample(ids, learned, items)]


def _reply(encoder: Encoder, messages: list[dict], media: list[list[MediaItem]]) -> list[int]:
    """What the model writes as the last of the messages: all that follows the generation prompt."""
    where = f"messages[{len(messages) - 1}]"
    if any(media_parts(messages[-1:])):
        raise ValueError(f"{where} is the assistant's and has media, expected text")
    opened = encoder.prompt(messages[:-1], media, preserve_thinking=True)
    closed = encoder.prompt(messages, media, preserve_thinking=True, add_generation_prompt=False)
    if closed[: len(opened)] != opened:
        raise ValueError(f"{where} begins otherwise than the prompt for it ends, expected the assistant without a name")
    return closed[len(opened) :]


def _sample(ids: list[int], learned: list[bool], media: tuple[MediaItem, ...]) -> Sample:
    ids = np.array(ids, np.int32)
    return Sample(ids[:-1], np.where(learned[1:], ids[1:], np.int32(NO_LOSS)), media)
