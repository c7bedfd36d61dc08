#!/usr/bin/env bash
# What is to be run once on each kind of GPU, from the root of a checkout:
#
#   bash tests/gpu_check.sh OUT [PART...]
#
# PART, all of them and in this order if none is named:
#   build        builds the package with CUDA and installs it for the python on PATH
#   conformance  compares the emulator's record of each instruction with the chip, bit for bit
#   tests        every test marked cuda
#   memcheck     compute-sanitizer over every 40th test of an op
#   racecheck    the same, for races in shared memory
#   benches      python -m bench --device cuda
#
# Needs a GPU, nvcc, and in that python CuPy, scikit-build-core, nanobind and what the tests need; no network. A part
# that fails does not stop the others. OUT gets log.txt, conformance.txt (commit it as tests/emulator/conformance.txt
# once the differences are understood), bench.jsonl and results.md (commit it as bench/results/<chip>-<date>.md).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
[ $# -ge 1 ] && [[ $1 != -* ]] || { sed -n '2,/^set/s/^# \?//p' "$0"; exit 2; }
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
shift
parts=("$@")
[ $# -gt 0 ] || parts=(build conformance tests memcheck racecheck benches)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/cuda/bin
exec > >(tee -a "$out/log.txt") 2>&1

gpu=$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader -i 0 2> /dev/null) ||
  { echo "no GPU: nvidia-smi finds none"; exit 1; }
nvcc=$(command -v nvcc) || { echo "no nvcc on PATH"; exit 1; }
python=$(command -v python || command -v python3) || { echo "no python on PATH"; exit 1; }
"$python" -c "import cupy" || { echo "no CuPy for $python"; exit 1; }
capability=$(cut -d, -f2 <<< "$gpu" | tr -d ' .')
architecture=$capability
[ "$capability" != 90 ] || architecture=90a
about="$gpu; $("$nvcc" --version | sed -n 's/.*release \([^,]*\).*/nvcc \1/p'); commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
echo "$about"

build() {
  "$python" -m pip install -q --no-build-isolation --no-deps --no-index -Ccmake.define.KIMI_CUDA=ON .
}

conformance() {
  "$nvcc" -std=c++20 -I csrc "-arch=sm_$architecture" tests/emulator/conformance.cu csrc/cuda/gpu.cu -o "$work/c" &&
    { echo "# From $gpu."; "$work/c"; } > "$out/conformance.txt" || return
  # a chip that is not sm_90 prints fewer lines
  tail -n +2 tests/emulator/conformance.txt | head -n "$(($(wc -l < "$out/conformance.txt") - 1))" |
    diff - <(tail -n +2 "$out/conformance.txt") | head -40
}

tests() { "$python" -m pytest -q -m cuda tests; }

# sanitizer TOOL: without CuPy's pool, in whose blocks overruns would go unnoticed
sanitizer() {
  local tests
  mapfile -t tests < <("$python" -m pytest -q --collect-only -m cuda tests/ops | grep :: | awk 'NR % 40 == 1')
  [ ${#tests[@]} -gt 0 ] || { echo "no tests marked cuda"; return 1; }
  compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 "$python" -c '
import sys, cupy, pytest
cupy.cuda.set_allocator(None)
sys.exit(pytest.main(sys.argv[1:]))' -q -p no:cacheprovider "${tests[@]}"
}
memcheck() { sanitizer memcheck; }
racecheck() { sanitizer racecheck; }

benches() {
  "$python" -m bench --device cuda --json > "$out/bench.jsonl"
  local status=$?
  "$python" bench/results_page.py "$about" < "$out/bench.jsonl" > "$out/results.md"
  return $status
}

declare -A limit=([build]=240 [conformance]=60 [tests]=300 [memcheck]=150 [racecheck]=150 [benches]=300) # seconds
export -f build conformance tests sanitizer memcheck racecheck benches
export about gpu nvcc python architecture out work

failed=()
for part in "${parts[@]}"; do
  [ -n "${limit[$part]:-}" ] || { echo "no part $part: ${!limit[*]}"; exit 2; }
  printf '\n=== %s\n' "$part"
  started=$SECONDS status=0
  timeout -k 5 "${limit[$part]}" bash -uo pipefail -c "$part" || status=$?
  [ $status = 0 ] || failed+=("$part (exit $status$([ $status != 124 ] || echo ", over ${limit[$part]} s"))")
  echo "--- $part: exit $status, $((SECONDS - started)) s"
done

[ ${#failed[@]} != 0 ] || { echo "all parts passed: ${parts[*]}"; exit 0; }
printf 'failed: %s\n' "${failed[@]}"
exit 1
