"""Media of random bytes, for tests that do not care how pictures become patches."""

import numpy as np
from kimi_native.media import MediaItem

LEVELS = np.tile(np.float32(np.arange(256) / 127.5 - 1), (3, 1))


def random_item(rng, gh, gw, frames=1, timestamp=None):
    """An image of gh x gw patches, with a timestamp a chunk of video."""
    patches = rng.integers(0, 256, (frames * gh * gw, 588), np.uint8)
    return MediaItem("video" if timestamp else "image", patches, (frames, gh, gw), LEVELS, timestamp)
