"""tests/gpu_check.sh with stand-ins for the GPU's programs: what runs, what a failing part does, what is written."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu_check.sh"
HEADER = {"gpu": "Fake", "date": "2026-01-02T03:04:05", "copy_bytes_per_second": 3e12, "peers": {}, "cupy": "14"}
HEADER["bf16_operations_per_second"] = 8e14
PYTHON = """#!/bin/bash
echo "python $*" >> "$CALLS"
case "$*" in
  *results_page*) exec "$REAL_PYTHON" "$@" ;;
  *collect-only*) for i in $(seq 81); do echo "tests/ops/test_x.py::test[$i]"; done ;;
  *bench*) echo "$HEADER" ;;
  *"-m cuda tests"*) exit "${TESTS_STATUS:-0}" ;;
esac
"""
NVCC = """#!/bin/bash
echo "nvcc $*" >> "$CALLS"
[ "$1" != --version ] || { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
while [ "$1" != -o ]; do shift; done
printf '#!/bin/bash\\ntail -n +2 tests/emulator/conformance.txt\\n' > "$2"; chmod +x "$2"
"""
STUBS = {
    "nvidia-smi": '#!/bin/bash\necho "Fake H100, 9.0, 580.1"\n',
    "nvcc": NVCC,
    "compute-sanitizer": '#!/bin/bash\necho "sanitizer" $* >> "$CALLS"\n',
    "python": PYTHON,
}


@pytest.fixture
def check(tmp_path):
    """Runs the script with stubs first on PATH; returns (exit status, output, calls of the stubs)."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    real = subprocess.run(["which", "python3"], capture_output=True, text=True, check=True).stdout.strip()

    def run(*arguments, without=(), **environment):
        for name in without:
            (folder / name).unlink()
        calls.write_text("")
        variables = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls), "HEADER": json.dumps(HEADER)}
        done = subprocess.run(
            ["bash", SCRIPT, *arguments],
            env=os.environ | variables | {"REAL_PYTHON": real} | environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, calls.read_text().splitlines()

    return run


def test_all_parts(check, tmp_path):
    status, output, calls = check(str(tmp_path / "out"))
    assert status == 0 and output.rstrip().endswith(
        "all parts passed: build conformance tests memcheck racecheck benches"
    )
    assert any("pip install" in c and "KIMI_CUDA=ON" in c and "--no-index" in c for c in calls)
    assert any("-arch=sm_90a" in c for c in calls)
    sanitized = [c for c in calls if c.startswith("sanitizer")]
    assert ["memcheck" in c for c in sanitized] == [True, False] and "racecheck" in sanitized[1]
    assert all("test[1] " in c and "test[41] " in c and c.endswith("test[81]") for c in sanitized)
    out = tmp_path / "out"
    assert (out / "conformance.txt").read_text().startswith("# From Fake H100, 9.0, 580.1.\n")
    assert "Fake H100, 9.0, 580.1; nvcc 13.0; commit" in (out / "results.md").read_text()
    assert json.loads((out / "bench.jsonl").read_text()) == HEADER and "=== benches" in (out / "log.txt").read_text()


def test_a_part_that_fails(check, tmp_path):
    status, output, calls = check(str(tmp_path), "tests", "benches", TESTS_STATUS="3")
    assert status == 1 and output.rstrip().endswith("failed: tests (exit 3)")
    assert "python -m bench --device cuda --json" in calls and not any("pip" in c for c in calls)


@pytest.mark.parametrize(
    ("arguments", "without", "says"),
    [
        ([], [], "bash tests/gpu_check.sh OUT"),
        (["OUT", "everything"], [], "no part everything"),
        (["OUT"], ["nvidia-smi"], "no GPU"),
    ],
)
def test_refuses(check, tmp_path, arguments, without, says):
    arguments = [str(tmp_path) if a == "OUT" else a for a in arguments]
    status, output, calls = check(*arguments, without=without)
    assert status != 0 and says in output and not any("pip" in c for c in calls)
