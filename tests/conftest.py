"""Fixtures: `isa` repeats a test on each instruction set, `rng` is seeded by the name of the test."""

import os
import zlib

import numpy as np
import pytest


def instruction_sets():
    """The names to test: what the machine has, or only KIMI_ISA where that is set."""
    from kimi_native import ops

    forced = os.environ.get("KIMI_ISA")
    return [forced] if forced else ops.available_isas()


def pytest_report_header():
    return f"instruction sets under test: {', '.join(instruction_sets())}"


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", instruction_sets(), indirect=True)


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
