"""Fixtures: `on` repeats a test of an op on every backend, `isa` a test on each instruction set, `rng` is seeded by the
name of the test.

Backends: the instruction sets of this CPU; the CUDA kernels in the emulator, their threads in several orders, where the
extension _E is built; the CUDA kernels on a GPU where there is one. The report's header names them.
"""

import zlib

import numpy as np
import pytest
from backends import backends, instruction_sets


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a GPU")


def pytest_report_header():
    return f"backends under test: {', '.join(backends())}"


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", instruction_sets(), indirect=True)
    if "on" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.cuda]}
        metafunc.parametrize("on", [pytest.param(b, id=n, marks=marks.get(n, [])) for n, b in backends().items()])


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
