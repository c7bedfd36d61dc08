"""The calls of ops on the CPU, written down once and made again without Python: what gpu.Graph is on the GPU."""

import math
import sys
from collections.abc import Callable

import numpy as np

from kimi_native import _C
from kimi_native.ops import _array


class Recording:
    """What a function calls on the CPU, made again and again.

    call() must do nothing with arrays but give them to ops: what NumPy computes between them is not written down. Every
    array stays where it is. It runs once; the first launch() returns what that gave. Ops of another instruction set
    than that of the recording may ask for more memory: after ops.set_isa a new one is needed.
    """

    def __init__(self, call: Callable[[], object]):
        self._calls, self._kept, self._new = _C.Recording(), [], True
        self._blocks = [np.empty(0, np.uint8)]  # the first is never given out: it has the references of a free one
        self.address = self._calls.address
        _array.here.recording = self
        try:
            self._result = call()
        finally:
            _array.here.recording = None

    def launch(self):
        """Make the calls, without the GIL. Returns the same result each time, with what it now holds."""
        if not self._new:
            self._calls.replay()
        self._new = False
        return self._result

    def empty(self, shape, dtype) -> np.ndarray:
        """A new array, in memory that earlier ones had and nobody refers to any more, or in more memory."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        references = [sys.getrefcount(block) for block in self._blocks]
        pairs = zip(self._blocks, references, strict=True)
        free = [block for block, count in pairs if count == references[0] and len(block) >= nbytes > 0]
        block = min(free, key=len, default=None)
        if block is None:
            block = np.empty(nbytes, np.uint8)
            self._blocks.append(block)
        return block[:nbytes].view(dtype).reshape(shape)

    def keep(self, arguments) -> None:
        """Arrays that an op was given. Those of empty() have their memory kept already."""
        for x in arguments:
            if isinstance(x, np.ndarray) and not any(x.base is block for block in self._blocks):
                self._kept.append(x)
