"""Images and video as parts of messages: reading them, and their places in the prompt."""

import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from kimi_native.media import MediaItem, MediaProcessor, prompt_text

KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}

_PAD = "<|media_pad|>"
_VIDEO = "<|kimi_k25_video_placeholder|>"
_PLACE = re.compile("|".join(map(re.escape, (_PAD, _VIDEO))))


def media_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, part) of each image and video in the messages, which chat.check_messages has checked."""
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if part["type"] in KINDS:
                yield f"messages[{i}].content[{j}]", part


def without_source(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a template sees of a part: of an image or a video that it is one, not its bytes."""
    return {"type": part["type"], part["type"]: ""} if part["type"] in KINDS else part


def read_media(messages, processor: MediaProcessor, local_files: bool) -> list[list[MediaItem]]:
    """What each image and video part of the messages holds, in order: an image is one item, a video one a chunk.

    A part is {"type": T, T: source}, T one of KINDS; the source may stand in {"url": source}. A source is what
    MediaProcessor.image or .video takes, a file:// URL, or items that these returned. Without local_files, for messages
    that come from elsewhere, a string must be a data URL.
    Raises ValueError naming the part, and MediaError.
    """
    return [_items(where, part, processor, local_files) for where, part in media_parts(messages)]


def _items(where: str, part: Mapping[str, Any], processor: MediaProcessor, local_files: bool) -> list[MediaItem]:
    name = part["type"]
    kind, source, where = KINDS[name], part.get(name), f"{where}.{name}"
    if isinstance(source, Mapping):
        source, where = source.get("url"), f"{where}.url"
    if source is None:
        raise ValueError(f"{where} is missing, expected the {kind}: a path, its bytes or a data URL")
    items = [source] if isinstance(source, MediaItem) else source
    if isinstance(items, list) and items and all(isinstance(item, MediaItem) for item in items):
        kinds = [item.kind for item in items]
        if kinds != ["image"] if kind == "image" else set(kinds) != {"video"}:
            expected = "one image" if kind == "image" else "the chunks of a video"
            raise ValueError(f"{where} is items of kind {', '.join(kinds)}, expected {expected}")
        return items
    if isinstance(source, str | PathLike) and not str(source).startswith("data:"):
        if not local_files:
            raise ValueError(f"{where} is {str(source)!r:.80}, expected a data URL: files are not read for this caller")
        source = _path(where, str(source))
    return [processor.image(source)] if kind == "image" else processor.video(source)


def _path(where: str, source: str) -> str:
    """A file:// URL as a path; anything else as it is."""
    if not source.startswith("file:"):
        return source
    url = urlsplit(source)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise ValueError(f"{where} is {source!r:.80}, expected file:///PATH, a file of this machine")
    return url2pathname(url.path)


def expand(prompt: str, media: Sequence[Sequence[MediaItem]]) -> str:
    """The prompt with <|media_pad|> once for each token of its image, and each video's chunks in place of the
    placeholder.

    media: the items of each part, as read_media returns them. Raises ValueError unless the prompt has a place of the
    right kind for each, in this order.
    """
    places = ["video" if place == _VIDEO else "image" for place in _PLACE.findall(prompt)]
    kinds = [items[0].kind for items in media]
    if places != kinds:
        raise ValueError(
            f"the prompt has places for {len(places)} media ({', '.join(places) or 'none'}), expected one for each of "
            f"the {len(kinds)} in the messages ({', '.join(kinds) or 'none'})"
        )
    texts = iter([_text(items) for items in media])
    return _PLACE.sub(lambda _: next(texts), prompt)


def _text(items: Sequence[MediaItem]) -> str:
    """What stands in a place: for an image its placeholders, whose frame the template wrote; for a video its chunks."""
    if items[0].kind == "image":
        return _PAD * items[0].tokens
    return "".join(prompt_text([item]).replace(_PAD, _PAD * item.tokens) for item in items)
