"""The float64 oracles in the place of kimi_native.ops: the very code of training then runs in float64."""

from functools import wraps
from types import SimpleNamespace

import reference


def _with_out(oracle):
    """An op writes into `out` where it is given one; the oracles return what they make."""

    @wraps(oracle)
    def op(*args, out=None, **options):
        result = oracle(*args, **options)
        if out is None:
            return result
        out[...] = result
        return out

    return op


OPS = SimpleNamespace(**{name: _with_out(getattr(reference, name)) for name in reference.__all__})


def use(monkeypatch, *modules):
    """Until the test ends."""
    for module in modules:
        monkeypatch.setattr(module, "ops", OPS)
