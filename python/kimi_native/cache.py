"""The paged latent cache: per token and layer one row, the latent and the rotated rope part of its key."""

import numpy as np
from ml_dtypes import bfloat16

from kimi_native.ops import gpu

PAGE_SIZE = 64  # tokens
DTYPES = {"bfloat16": np.dtype(bfloat16), "float32": np.dtype(np.float32)}


def check_dtype(dtype: str, device: str) -> None:
    """Raises ValueError for a cache_dtype that there is not, or not on this device."""
    if device == "cuda" and dtype != "bfloat16":
        raise ValueError(f"cache_dtype is {dtype!r}, expected 'bfloat16', the only one with device \"cuda\"")
    if dtype not in DTYPES:
        raise ValueError(f"cache_dtype is {dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")


class PagePool:
    """Pages for any number of sequences. On the CPU the system commits memory to a page when it is first written.

    pages: bfloat16, on the CPU also float32 [num_layers, num_pages, PAGE_SIZE, width], width = kv_lora_rank +
    qk_rope_head_dim. Raises RuntimeError with need and have if the GPU has not that much memory.
    """

    def __init__(self, num_layers: int, width: int, num_pages: int, dtype: str = "bfloat16", device: str = "cpu"):
        check_dtype(dtype, device)
        self.device, shape = device, (num_layers, num_pages, PAGE_SIZE, width)
        if device == "cuda":
            self.pages = gpu.empty(f"cache: room for {num_pages * PAGE_SIZE:,} tokens", shape, DTYPES[dtype])
        else:
            self.pages = np.empty(shape, DTYPES[dtype])
        self.free = list(range(num_pages - 1, -1, -1))

    @property
    def bytes_per_token(self) -> int:
        layers, _, _, width = self.pages.shape
        return layers * width * self.pages.itemsize


class Cache:
    """The rows of one sequence. token_ids[i] is the token at position i, so that a prefix can be used again.

    A step reserves slots, writes every layer, then commits; a step that is broken off leaves the cache as it was.
    """

    def __init__(self, pool: PagePool, max_tokens: int):
        self.pool = pool
        self.max_tokens = max_tokens
        self.token_ids: list[int] = []
        self._pages = 0  # in use
        pages = -(-max_tokens // PAGE_SIZE)
        self._table = np.empty((1, pages), np.int32)
        self._slots = np.empty(pages * PAGE_SIZE, np.int64)  # of each position that the pages in use have room for

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def page_table(self) -> np.ndarray:
        """int32 [1, pages in use]"""
        return self._table[:, : self._pages]

    def layer(self, index: int):
        """[num_pages, PAGE_SIZE, width], the layer's part of the pool."""
        return self.pool.pages[index]

    def reserve(self, count: int) -> np.ndarray:
        """Slots int64 [count] for the next tokens, taking pages as needed. ValueError when the cache is full."""
        end = len(self) + count
        if end > self.max_tokens:
            raise ValueError(
                f"cache: {len(self)} tokens and {count} more, expected at most max_tokens = {self.max_tokens}"
            )
        needed = -(-end // PAGE_SIZE) - self._pages
        if needed > len(self.pool.free):
            raise ValueError(f"cache: needs {needed} pages, the pool has {len(self.pool.free)} left")
        for _ in range(needed):
            page, start = self.pool.free.pop(), self._pages * PAGE_SIZE
            self._table[0, self._pages] = page
            self._slots[start : start + PAGE_SIZE] = np.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            self._pages += 1
        return self._slots[len(self) : end]

    def commit(self, token_ids: list[int]) -> None:
        """Declare the reserved slots of these tokens written."""
        self.token_ids += token_ids

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on and give its pages back."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cache: truncate to {length}, expected 0 to {len(self)}")
        del self.token_ids[length:]
        kept = -(-length // PAGE_SIZE)
        self.pool.free += self._table[0, kept : self._pages][::-1].tolist()
        self._pages = min(self._pages, kept)

    def rows(self, layer: int, start: int, stop: int):
        """Rows of positions start .. stop - 1, [stop - start, width] in order; float32, on the GPU bfloat16."""
        pages, slots = self.layer(layer), self._slots[start:stop]
        rows = pages.reshape(-1, pages.shape[-1])
        if self.pool.device == "cuda":  # as uint16: bf16 is a dtype that CuPy would compile the copy for
            return rows.view(np.uint16).take(gpu.put(slots), axis=0).view(rows.dtype)
        return rows[slots].astype(np.float32)
