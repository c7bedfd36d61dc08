"""Fixtures: `on` repeats a test of an op on every backend, `isa` a test on each instruction set, `rng` is seeded by the
name of the test.

Backends: the instruction sets of this CPU; the CUDA kernels in the emulator, their threads in several orders, where the
extension _E is built; the CUDA kernels on a GPU where there is one. The report's header names them. `--backends PREFIX`
runs only the tests of ops, and only on the backends whose names begin so.
"""

import zlib

import numpy as np
import pytest
from arrays import BF16
from backends import backends, instruction_sets

FLOAT32 = np.dtype(np.float32)


def pytest_addoption(parser):
    parser.addoption("--backends", metavar="PREFIX", help="run only tests of ops, on backends whose names begin so")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a GPU")
    config.addinivalue_line("markers", "kernels(place): takes `on` only with the kernels for the cpu or for the gpu")
    if not chosen(config):
        raise pytest.UsageError(f"no backend begins with {config.option.backends}: there are {', '.join(backends())}")


def chosen(config):
    """name -> backend, of those under test."""
    return {name: b for name, b in backends().items() if name.startswith(config.option.backends or "")}


def pytest_report_header(config):
    return f"backends under test: {', '.join(chosen(config))}"


def pytest_collection_modifyitems(config, items):
    if config.option.backends:
        config.hook.pytest_deselected(items=[item for item in items if "on" not in item.fixturenames])
        items[:] = [item for item in items if "on" in item.fixturenames]


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", instruction_sets(), indirect=True)
    if "on" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("kernels")
        found = {n: b for n, b in chosen(metafunc.config).items() if not marker or b.cuda == (marker.args == ("gpu",))}
        marks = {"cuda": [pytest.mark.cuda]}
        if "cache_dtype" in metafunc.fixturenames:  # float32 on the CPU alone
            both = [(n, b, d) for n, b in found.items() for d in (BF16, FLOAT32) if not b.cuda or d == BF16]
            params = [pytest.param(b, d, id=f"{n}-{d}", marks=marks.get(n, [])) for n, b, d in both]
            metafunc.parametrize(("on", "cache_dtype"), params)
        else:
            metafunc.parametrize("on", [pytest.param(b, id=n, marks=marks.get(n, [])) for n, b in found.items()])


@pytest.fixture(autouse=True)
def _backend(request):
    """Puts the kernels of `on` in place for the test."""
    if "on" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("on").active():
        yield


@pytest.fixture
def emulator():
    """Puts the CUDA kernels in the emulator in place; skips where it is not built."""
    found = backends().get("emulated-ascending")
    if found is None:
        pytest.skip("the extension _E, the emulator, is not built")
    with found.active():
        yield found


@pytest.fixture
def isa(request):
    """Selects the instruction set for the test and restores the previous one; its value is the name."""
    from kimi_native import ops

    previous = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(previous)


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.originalname.encode()))
