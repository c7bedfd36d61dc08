"""Caches that take turns at steps of one token, which are captured once for each of them: on the CPU and on the GPU."""

import numpy as np
from arrays import same_bits
from kimi_native.ops._array import to_host


def check_caches_taking_turns(model, tokens):
    """Pages are added, and tokens taken back; each cache gives the bits that it gives alone. Three caches in all."""

    def run(other=lambda: None):
        """Rows of the tokens from position 62 on, one by one; `other` takes a turn after each."""
        cache, rows = model.new_cache(200), []
        model.forward(tokens[:62], cache)
        for token in tokens[62:66]:
            rows.append(to_host(model.forward([token], cache)))
            other()
        cache.truncate(63)
        rows.append(to_host(model.forward([tokens[63]], cache)))
        return np.concatenate(rows)

    alone = run()
    assert same_bits(alone[4], alone[1])
    cache = model.new_cache(100)
    model.forward(tokens[:5], cache)
    assert same_bits(run(other=lambda: model.forward(tokens[5:6], cache)), alone)
    assert cache.token_ids == tokens[:5] + tokens[5:6] * 4
