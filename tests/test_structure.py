"""Who may import and include whom, and the mirrors of each op. Reads the sources, runs nothing."""

import ast
import re
from pathlib import Path

import pytest
import reference
from kimi_native import ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "python" / "kimi_native", ROOT / "csrc"

# Leaves may be imported from anywhere and import leaves only.
LEAVES = {"checkpoint", "chat", "chat_media", "config", "info", "make_tiny", "media", "tokenizer", "tool_schema"}
LEAVES |= {"checkpoint_writer", "tiny_bpe", "tiny_config"}  # parts of make_tiny

# module -> what it may import beside leaves; also what those may import, except _C
ARROWS = {
    "ops": {"_C"},
    "cache": {"ops"},
    "sampling": {"ops"},
    "vision": {"placement"},
    "train": {"model"},
    "placement": {"ops"},
    "expert_cache": {"placement"},
    "splice": {"ops"},
    "step": {"cache"},
    "model": {"cache", "expert_cache", "placement", "sampling", "splice", "step", "vision"},
    "generate": {"model"},
    "engine": {"model"},
    "serve": {"generate", "engine"},
    "swarm": set(),
}
CUPY_FILES = {PACKAGE / "ops" / "_array.py", PACKAGE / "ops" / "_cublas.py"}
UNRESTRICTED = {"__init__", "__main__"}  # but for _C

# others' code, to compare with
TORCH_FILES = re.compile(r"tests/golden/.*|bench/(peers|(torch|triton)_\w+)\.py")
# what the emulator cannot run, and the files under csrc/cuda that have it for all others
CUDA_WORDS = {
    r"\basm\b": {"ptx.cuh", "hopper.cuh", "emu/fiber.h"},
    r"<<<": {"gpu.h"},
    r"\b__shared__\b": {"gpu.h", "emu/cuda_names.h"},
}

HELPER_HEADERS = {"expert_weights.h"}  # no op of its own
# no kernels of ours on the GPU: cuBLAS for two, CuPy for the next two, none for int8 and gradients
CPU_OPS = {"gemm", "batched_gemm", "matmul", "grouped_matmul", "gemm_int8"}
CPU_OPS |= {"mla_prefill_backward", "rms_norm_backward", "silu_and_mul_backward"}
FOLDERS = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "cpu": {"core", "ops", "cpu"},
    "cuda": {"core", "ops", "cuda"},
    "bindings": {"core", "ops", "cpu", "cuda", "bindings"},
}
ISA_INCLUDES = {"<immintrin.h>", '"cpu/kernels.h"', '"core/dtype.h"'}
C_HEADERS = {"<cstdint>", "<cstddef>", "<cstring>"}  # what the headers of an ISA file may bring along


def unit_of(path):
    """ "ops" for ops/linear.py, "cache" for cache.py: what the arrows speak about."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source, package="kimi_native"):
    """(units of kimi_native, other top-level packages) that a file of this package imports, at any depth."""
    units, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "kimi_native":
                units.add(rest[0] if rest else "__init__")
            else:
                others.add(first)
    return units, others


def reachable(unit):
    """Everything `unit` may import by the arrows."""
    allowed = set(ARROWS[unit])
    for below in ARROWS[unit] & ARROWS.keys():
        allowed |= reachable(below) - {"_C"}
    return allowed


def allowed_units(unit):
    if unit in UNRESTRICTED:
        return LEAVES | ARROWS.keys()
    return LEAVES | {unit} | (reachable(unit) if unit in ARROWS else set())


def includes(path):
    """The includes of a C++ file as written, with their quotes or brackets."""
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), re.M)


def cpp_files():
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def names_of(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CPP_FILES = cpp_files()
OP_HEADERS = sorted(p for p in (CSRC / "ops").glob("*.h") if p.name not in HELPER_HEADERS)


def test_sources_are_where_they_are_looked_for():
    assert len(PYTHON_FILES) > 10 and len(CPP_FILES) > 30 and len(OP_HEADERS) >= 15


def test_the_reader_of_imports():
    source = "import numpy as np\ndef f():\n    from ..model import Model\n    from .. import _C, ops\n    import a.b"
    assert imports(source, "kimi_native.ops") == ({"model", "_C", "ops"}, {"numpy", "a"})
    assert imports("from . import norm\nfrom .norm import x", "kimi_native.ops") == ({"ops"}, set())
    assert imports("from kimi_native import chat\nimport kimi_native.info") == ({"chat", "info"}, set())
    assert imports("from .cache import Cache") == ({"cache"}, set())


def test_the_arrows_allow_and_refuse():
    assert {"ops", "cache", "model", "config"} <= allowed_units("generate")
    assert "_C" in allowed_units("ops") and not any("_C" in allowed_units(u) for u in ARROWS.keys() - {"ops"})
    assert "model" not in allowed_units("cache") and "ops" not in allowed_units("config")
    assert "train" not in allowed_units("generate") and "generate" not in allowed_units("engine")


@pytest.mark.parametrize("path", PYTHON_FILES, ids=names_of(PYTHON_FILES))
def test_python_imports(path):
    unit = unit_of(path)
    assert unit in LEAVES | ARROWS.keys() | UNRESTRICTED, f"{unit} has no arrow: say who may import it"
    package = ".".join(("kimi_native", *path.relative_to(PACKAGE).parent.parts))
    units, others = imports(path.read_text(), package)
    assert units <= allowed_units(unit), f"{unit} may not import {sorted(units - allowed_units(unit))}"
    assert not others & {"cupy", "cupy_backends"} or path in CUPY_FILES, (
        "only ops/_array.py and ops/_cublas.py import CuPy"
    )


OTHER_PYTHON_FILES = sorted(p for folder in ("bench", "recipes", "tests") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES + OTHER_PYTHON_FILES, ids=names_of(PYTHON_FILES + OTHER_PYTHON_FILES))
def test_who_imports_torch(path):
    _, others = imports(path.read_text())
    assert not others & {"torch", "transformers", "triton"} or TORCH_FILES.fullmatch(str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", CPP_FILES, ids=names_of(CPP_FILES))
def test_cpp_includes(path):
    folder = path.relative_to(CSRC).parts[0]
    for written in includes(path):
        if written[0] == "<":
            continue
        name = written.strip('"')
        assert (CSRC / name).is_file(), f'{written} is not a path under csrc, as in "core/tensor.h"'
        target, *rest = name.split("/")
        assert target in FOLDERS[folder], f"{folder} may not include {written}"
        shared = path.parent == CSRC / "cpu" / "isa" and name.endswith(".h")
        assert target != "cpu" or rest[0] != "isa" or shared, f"{written}: only instruction sets share their headers"


ISA_FILES = sorted((CSRC / "cpu" / "isa").glob("*"))


@pytest.mark.parametrize("path", ISA_FILES, ids=names_of(ISA_FILES))
def test_instruction_set_files_include_next_to_nothing(path):
    """Shared inline code built with AVX-512 flags could be linked into common paths. scalar*.cpp have no such flags."""
    direct = {name for name in includes(path) if not name.startswith('"cpu/isa/')}
    assert direct <= ISA_INCLUDES | ({"<math.h>"} if path.stem.startswith("scalar") else set())
    pending, brought = [name for name in direct if name[0] == '"'], set()
    while pending:
        found = set(includes(CSRC / pending.pop().strip('"'))) - brought
        brought |= found
        pending += [name for name in found if name[0] == '"']
    assert {name for name in brought if name[0] == "<"} <= C_HEADERS
    assert re.search(r"\bnamespace \{", path.read_text()), "helpers belong in an anonymous namespace"


def test_only_isa_cpp_names_the_tables():
    tables = re.compile(rf"\b({'|'.join(path.stem for path in ISA_FILES)})_kernels\b")
    users = {path for path in CPP_FILES if tables.search(path.read_text())}
    sources = {path for path in ISA_FILES if path.suffix == ".cpp"}
    assert users == {*sources, CSRC / "cpu" / "isa.cpp", CSRC / "cpu" / "kernels.h"}


@pytest.mark.parametrize("word", CUDA_WORDS)
def test_words_of_cuda(word):
    """Inner loops of the CPU may hold the optimiser back by an empty asm."""
    comment = re.compile(r"//.*|/\*.*?\*/")
    users = {path for path in CPP_FILES if re.search(word, comment.sub("", path.read_text()))}
    users -= set(ISA_FILES) if word == r"\basm\b" else set()
    assert users == {CSRC / "cuda" / name for name in CUDA_WORDS[word]}


@pytest.mark.parametrize("header", OP_HEADERS, ids=[header.stem for header in OP_HEADERS])
def test_mirrors_of_an_op(header):
    """A header in csrc/ops has implementations, a test and a bench; its ops are public and have an oracle."""
    op = header.stem
    mirrors = [f"csrc/cpu/{op}.cpp", f"tests/ops/test_{op}.py", f"bench/bench_{op}.py"]
    mirrors += [] if op in CPU_OPS else [f"csrc/cuda/{op}.cu"]
    for mirror in mirrors:
        assert (ROOT / mirror).is_file(), f"{op} lacks {mirror}"
    declared = set(re.findall(r"^void (\w+)\(", header.read_text(), re.M))
    assert op in declared
    assert declared <= set(ops.__all__), "not in kimi_native.ops"
    assert declared <= set(reference.__all__), "no oracle"


def test_every_public_op_is_declared_in_a_header():
    declared = {name for header in OP_HEADERS for name in re.findall(r"^void (\w+)\(", header.read_text(), re.M)}
    settings = {"available_isas", "isa", "num_threads", "set_isa", "set_num_threads"}
    assert set(ops.__all__) == declared | settings | {"ExpertWeights"}
