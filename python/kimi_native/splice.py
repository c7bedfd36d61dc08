"""Media among tokens: which placeholders stand for which item, and the rows of what was encoded last."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kimi_native.media import MediaItem
from kimi_native.ops._array import to_host


@dataclass(frozen=True)
class Span:
    """Tokens start .. stop - 1 are the placeholders of this item: a MediaItem, or its rows [stop - start, H]."""

    start: int
    stop: int
    item: object

    @property
    def key(self) -> int:
        """What the latent cache has in place of these tokens' ids, which are equal for all media: from the content."""
        is_item = isinstance(self.item, MediaItem)
        digest = self.item.digest if is_item else hashlib.sha256(to_host(self.item).tobytes()).digest()
        return -1 - int.from_bytes(digest)


def find_spans(token_ids, placeholder: int | None, media: Sequence) -> list[Span]:
    """The span of each item of `media`, in order. placeholder: the id that stands for media, None if there is none.

    Raises ValueError unless there is one placeholder for each row, those of an item without a gap.
    """
    at = np.flatnonzero(np.asarray(token_ids) == (-1 if placeholder is None else placeholder))
    sizes = [item.tokens if isinstance(item, MediaItem) else len(item) for item in media]
    if len(at) != sum(sizes):
        raise ValueError(
            f"token_ids has {len(at)} media placeholders (id {placeholder}), expected {sum(sizes)}, one for each row "
            f"of {len(sizes)} media items"
        )
    spans, begin = [], 0
    for index, (item, size) in enumerate(zip(media, sizes, strict=True)):
        mine = at[begin : begin + size]
        together = int(np.argmax(np.append(np.diff(mine) != 1, True))) + 1
        if together != size:
            raise ValueError(f"media[{index}] has {size} rows, token_ids has {together} placeholders in a row for it")
        spans.append(Span(int(mine[0]), int(mine[-1]) + 1, item))
        begin += size
    return spans


def cache_keys(token_ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """What the latent cache has for these tokens: their ids, and Span.key for media."""
    keys = list(token_ids)
    for span in spans:
        keys[span.start : span.stop] = [span.key] * (span.stop - span.start)
    return keys


class EncodedMedia:
    """Rows of media by content: those used last, up to `limit` bytes. What one call asks for it gets in any case."""

    def __init__(self, encode: Callable, limit: int):
        """encode: VisionModel.encode."""
        self.encode, self.limit = encode, limit
        self._rows: OrderedDict[bytes, object] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def rows(self, items: Sequence[MediaItem], progress: Callable | None = None) -> list:
        """Of each item, encoding what is not here. progress(items being encoded, done, total)."""
        missing = {item.digest: item for item in items if item.digest not in self._rows}
        if missing:
            new = list(missing.values())
            report = (lambda done, total: progress(new, done, total)) if progress else None
            self._rows.update(zip(missing, self.encode(new, report), strict=True))
        asked = [item.digest for item in items]
        for digest in asked:
            self._rows.move_to_end(digest)
        result = [self._rows[digest] for digest in asked]
        while self.nbytes > self.limit and len(self._rows) > len(set(asked)):
            self._rows.popitem(last=False)
        return result
