"""What one step of training sees."""

from dataclasses import dataclass

import numpy as np

from kimi_native.media import MediaItem

NO_LOSS = -1  # the target of a token after which nothing is to be predicted


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences one after the other.

    token_ids: int32 [T]. targets: int32 [T], for each the token that should follow, or NO_LOSS. cu_seqlens: int32
    [B + 1], where each sequence begins and ends. media: the items whose placeholder tokens stand in token_ids, one
    token for each of an item's `tokens`, in order of appearance.
    """

    token_ids: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray
    media: tuple[MediaItem, ...] = ()
