"""The emulated instructions give what conformance.txt records."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def test_instructions_give_what_is_recorded(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no g++ to build kernels for the emulator with")
    program = tmp_path / "conformance"
    sources = [HERE / "conformance.cu", ROOT / "csrc" / "cuda" / "gpu.cu"]
    options = ["-std=c++20", "-w", f"-I{ROOT / 'csrc'}", "-DKIMI_EMULATOR", "-x", "c++"]
    subprocess.run(["g++", *options, *sources, "-o", program], check=True)
    printed = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60).stdout
    recorded = (HERE / "conformance.txt").read_text().splitlines()
    assert recorded[0].startswith("# ")  # who gave these lines
    assert printed.splitlines() == recorded[1:]
