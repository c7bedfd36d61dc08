"""gpu_check.sh without a GPU: stand-ins for the programs that it calls show what it asks of them and reports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["build", "conformance", "tests", "memcheck", "racecheck", "benches", "cpu", "cpu_benches"]

PROGRAMS = {
    "nvidia-smi": """case "$*" in
  *compute_cap*) echo 9.0;; *driver*) echo 580.1;; *) echo "NVIDIA H100 80GB HBM3";;
esac""",
    "nvcc": """[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit
out=${*: -1}
printf '#!/bin/sh\\ntail -n +2 %s/tests/emulator/conformance.txt | %s\\n' "$PWD" "${CHANGE:-cat}" > "$out"
chmod +x "$out\"""",
    "compute-sanitizer": """[ "$2" != "${BROKEN-}" ] || { echo "1 hazard"; exit 9; }
echo "ERROR SUMMARY: 0 errors\"""",
    "git": "echo abc1234",
    "python3": """case "$*" in
  *results_page*) exec "$PYTHON" "$@";;
  *"-m bench"*) cat "$BENCH";;
  *--collect-only*) printf '%s\\n' 'a.py::x[cuda-1]' 'a.py::x[cuda-2]' 'a.py::y[cuda]' '3 tests collected';;
  *available_isas*) echo scalar avx2 avx512;;
  *"-m pytest"*) echo "on ${KIMI_ISA-any}" >> "$CALLED"; echo "3 passed in 1.00s";;
esac""",
}
BENCH = [
    {
        "gpu": "NVIDIA H100 80GB HBM3",
        "date": "2026-01-02T03:04:05",
        "cupy": "14.2.0",
        "peers": {"torch": None},
        "copy_bytes_per_second": 3e12,
        "bf16_operations_per_second": 8e14,
    },
    {
        "op": "rms_norm",
        "case": "T=512",
        "median_seconds": 5e-6,
        "spread": 0.02,
        "chained_seconds": None,
        "bytes_per_second": 2.7e12,
        "operations_per_second": None,
        "of_copy": 0.9,
        "of_bf16": None,
        "peers": {"torch": 9e-6, "triton": "absent"},
        "note": None,
        "seconds": [5e-6],
    },
    {"op": "grouped_gemm", "case": "T=4096", "note": "not run: 90 GB, 80 GB are free"},
]


@pytest.fixture
def check(tmp_path):
    programs, out = tmp_path / "programs", tmp_path / "out"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        program = programs / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/called"\n{body}\n')
        program.chmod(0o755)
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in BENCH))

    def run(*parts, status=0, **environment):
        environment = {"PYTHON": sys.executable, "BENCH": str(tmp_path / "bench.jsonl"), **environment}
        environment["CALLED"] = str(tmp_path / "called")
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "tests" / "gpu_check.sh", out, *parts],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=60,
        )
        assert done.returncode == status, done.stdout + done.stderr
        pages = {path.name: path.read_text() for path in out.glob("*")}
        return done.stdout, pages, (tmp_path / "called").read_text()

    return run


def test_all_parts_and_what_they_leave(check):
    said, pages, called = check()
    assert [line.split()[1] for line in said.splitlines() if line.startswith("===")] == PARTS
    assert said.endswith(f"passed: {' '.join(PARTS)}\n") and pages["log.txt"] == said
    assert pages["conformance.txt"].startswith("# From NVIDIA H100 80GB HBM3.\nshuffles 0 ")
    assert "pip install -q --no-index --no-deps --no-build-isolation" in called
    assert "code=sm_90a tests/emulator/conformance.cu" in called
    assert all(f"--tool {tool}" in called for tool in ("memcheck", "racecheck"))
    assert called.count("no:cacheprovider a.py::x[cuda-1] a.py::y[cuda]\n") == 2  # the first case of each test
    assert all(f"on {isa}\n" in called for isa in ("scalar", "avx2", "avx512"))
    assert set(pages) >= {"bench_avx2.jsonl", "bench_avx512.jsonl"} and "bench_scalar.jsonl" not in pages
    page = pages["results.md"]
    assert page.startswith("# NVIDIA H100 80GB HBM3, 2026-01-02\n")
    assert "NVIDIA H100 80GB HBM3, driver 580.1, nvcc 13.0, commit abc1234." in page
    assert "| rms_norm | T=512 | 5 |  | 2.7e+03 |" in page and "not run: 90 GB" in page
    assert re.search(r"^\| tests \| 0 \| \d+ \| 3 passed in 1.00s \|$", page, re.M)


def test_a_failing_part_stops_no_other(check):
    said, pages, _ = check("memcheck", "racecheck", "tests", status=1, BROKEN="memcheck")
    assert "--- memcheck: exit 9" in said and "--- racecheck: exit 0" in said and "--- tests: exit 0" in said
    assert said.endswith("failed: memcheck\n")
    assert pages["results.md"].startswith("# NVIDIA H100 80GB HBM3, 20") and "| memcheck | 9 |" in pages["results.md"]


def test_a_chip_that_differs_from_the_emulator(check):
    said, pages, _ = check("conformance", status=1, CHANGE="sed s/shuffles.3.*/other/")
    assert "> other" in said and "1 of 504 lines differ" in said and "\nother\n" in pages["conformance.txt"]
    check("conformance", CHANGE="head -200")  # of the instructions that it has


def test_a_later_call_adds_to_the_report(check):
    check("tests", "memcheck", status=1, BROKEN="memcheck")
    _, pages, _ = check("memcheck", "benches")
    rows = [line.split(" | ")[:2] for line in pages["results.md"].splitlines()[-3:]]
    assert rows == [["| tests", "0"], ["| memcheck", "0"], ["| benches", "0"]]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [([], 2, "OUT [PART...]"), (["benchs"], 2, "no part benchs"), (["tests"], 1, "no GPU")],
)
def test_refuses(tmp_path, arguments, status, says):
    folder = [tmp_path] if arguments else []
    command = ["bash", ROOT / "tests" / "gpu_check.sh", *folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == status and says in done.stdout + done.stderr
