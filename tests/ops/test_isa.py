"""Instruction sets: which there are, choosing one, KIMI_ISA."""

import os
import subprocess
import sys

import pytest
import reference
from arrays import BF16, normal
from close import assert_close
from kimi_native import ops


def in_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_scalar_is_always_there_and_lowest():
    names = ops.available_isas()
    assert names[0] == "scalar" and len(set(names)) == len(names)
    assert ops.isa() in names


def test_set_isa_selects(isa, rng):
    assert ops.isa() == isa
    x, weight = normal(rng, 3, 65), normal(rng, 7, 65, dtype=BF16)
    assert_close(ops.gemm(x, weight), reference.gemm(x, weight), reduction=65)


def test_unknown_name_changes_nothing():
    before = ops.isa()
    with pytest.raises(ValueError, match="scalar"):
        ops.set_isa("sse9")
    with pytest.raises(TypeError):
        ops.set_isa(None)
    assert ops.isa() == before


def test_environment_forces_one(isa):
    done = in_new_process("from kimi_native import ops; print(ops.isa())", KIMI_ISA=isa)
    assert done.stdout.split() == [isa], done.stderr


def test_default_is_the_best_one():
    code = "import os; del os.environ['KIMI_ISA']; from kimi_native import ops; print(ops.isa())"
    done = in_new_process(code, KIMI_ISA="scalar")
    assert done.stdout.split() == ops.available_isas()[-1:], done.stderr


def test_unknown_environment_is_named():
    done = in_new_process("from kimi_native import ops; ops.isa()", KIMI_ISA="sse9")
    assert done.returncode != 0 and "KIMI_ISA" in done.stderr and "sse9" in done.stderr
    assert done.returncode > 0, "ended by a signal"


def test_number_of_threads_from_the_environment():
    done = in_new_process("from kimi_native import ops; print(ops.num_threads())", KIMI_NUM_THREADS="3")
    assert done.stdout.split() == ["3"], done.stderr
    done = in_new_process("from kimi_native import ops; ops.num_threads()", KIMI_NUM_THREADS="none")
    assert done.returncode > 0 and "KIMI_NUM_THREADS" in done.stderr
