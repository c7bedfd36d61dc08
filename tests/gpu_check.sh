#!/usr/bin/env bash
# What is to be run on each kind of GPU: tests/gpu_check.sh OUT [PART...], or all parts, in this order:
#
#   build        the package for CUDA, and the emulator, into build/gpu_check, by the build tools that are installed
#   conformance  what instructions give the threads, against the emulator's record in tests/emulator/conformance.txt
#   tests        those marked cuda
#   memcheck     compute-sanitizer over the first case of each test of an op
#   racecheck    likewise
#   benches      python -m bench --device cuda
#   cpu          the tests of the CPU kernels and of the model, on every instruction set of the machine's processor
#   cpu_benches  python -m bench of the kernels that decoding spends its time in, on each but scalar
#
# Needs a GPU, nvcc, CuPy and what the build and the tests import, no network. No part takes ten minutes, one that fails
# does not stop the others, and several calls may share an OUT. It gets log.txt, conformance.txt (commit it as the
# emulator's record once the differences are understood), bench.jsonl, bench_<instruction set>.jsonl and results.md (commit it as
# bench/results/<chip>-<date>.md). The variable COMMIT names the commit where git does not.
set -uo pipefail
PARTS=(build conformance tests memcheck racecheck benches cpu cpu_benches)
declare -A LIMIT=([build]=420 [conformance]=90 [tests]=540 [memcheck]=300 [racecheck]=300 [benches]=560 [cpu]=400
  [cpu_benches]=400) # seconds

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$root" || exit 1
shift
for part in "$@"; do [ -n "${LIMIT[$part]-}" ] || { echo "no part $part: ${PARTS[*]}" >&2; exit 2; }; done
[ $# = 0 ] || PARTS=("$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/cuda/bin root out work

build() {
  python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target build/gpu_check/site \
    -Cbuild-dir=build/gpu_check/cmake -Ccmake.define.KIMI_CUDA=ON -Ccmake.define.KIMI_EMULATOR=ON . &&
    python3 -c 'from kimi_native import _C, _E; print("built", _C.__file__)'
}

conformance() {
  local capability record=tests/emulator/conformance.txt
  capability=$(nvidia-smi -i 0 --query-gpu=compute_cap --format=csv,noheader | tr -d .) || return
  [ "$capability" != 90 ] || capability=90a
  nvcc -std=c++20 -I csrc -gencode="arch=compute_$capability,code=sm_$capability" tests/emulator/conformance.cu \
    csrc/cuda/gpu.cu -o "$work/c" || return
  { echo "# From $(chip)."; "$work/c"; } > "$out/conformance.txt" || { tail -1 "$out/conformance.txt"; return 1; }
  # a chip other than sm_90 prints none of the last lines
  diff <(tail -n +2 "$record" | head -n "$(($(wc -l < "$out/conformance.txt") - 1))") \
    <(tail -n +2 "$out/conformance.txt") > "$work/differences"
  local status=$?
  head -40 "$work/differences"
  echo "$(grep -c '^>' "$work/differences") of $(($(wc -l < "$out/conformance.txt") - 1)) lines differ"
  return $status
}

tests() {
  python3 -c 'import kimi_native._E, cupy; assert cupy.is_available()' && python3 -m pytest -q -m cuda tests
}

# sanitizer TOOL: without CuPy's pool, in whose blocks overruns go unnoticed
sanitizer() {
  local cases
  mapfile -t cases < <(python3 -m pytest -q --collect-only -m cuda tests/ops | grep :: | awk -F'[' '!seen[$1]++')
  [ ${#cases[@]} -gt 0 ] || { echo "no tests marked cuda"; return 1; }
  compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 python3 -c '
import sys, cupy, pytest
cupy.cuda.set_allocator(None)
sys.exit(pytest.main(sys.argv[1:]))' -q -p no:cacheprovider "${cases[@]}"
}

memcheck() { sanitizer memcheck; }
racecheck() { sanitizer racecheck; }

benches() { python3 -m bench --device cuda --json > "$out/bench.jsonl" && echo "$(wc -l < "$out/bench.jsonl") lines"; }

isas() { python3 -c 'from kimi_native import ops; print(*ops.available_isas())'; }

cpu() {
  local isa
  python3 -m pytest -q -m "not cuda" -k cpu- tests/ops || return
  for isa in $(isas); do
    echo "the model on $isa"
    KIMI_ISA=$isa python3 -m pytest -q tests/test_model.py tests/test_golden.py tests/test_threads.py || return
  done
}

cpu_benches() {
  local isa
  for isa in $(isas); do
    [ "$isa" = scalar ] || python3 -m bench fused_moe gemm gemm_int8 mla_decode --isa "$isa" --quick --json \
      > "$out/bench_$isa.jsonl" || return
  done
  wc -l "$out"/bench_*.jsonl | tail -1
}

chip() { nvidia-smi -i 0 --query-gpu=name --format=csv,noheader; }

# results ABOUT: the page of the benches, and what became of each part when it was last run
results() {
  if [ -s "$out/bench.jsonl" ]; then
    python3 bench/results_page.py "$1" < "$out/bench.jsonl" || return
  else
    printf '# %s, %s\n\n%s.\n' "$(chip)" "$(date +%F)" "$1"
  fi
  printf '\n| part of `tests/gpu_check.sh` | exit status | seconds | its last line |\n|---|---|---|---|\n'
  tac "$out/parts" | awk '!seen[$2]++' | tac
}

main() {
  local toolkit commit about part started status failed=()
  chip > "$work/chip" || { echo "no GPU: nvidia-smi finds none"; return 1; }
  toolkit=$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p') || { echo "no nvcc on PATH"; return 1; }
  commit=$(git describe --always --dirty 2> "$work/git") || commit=${COMMIT:-unknown}
  about="$(chip), driver $(nvidia-smi -i 0 --query-gpu=driver_version --format=csv,noheader), nvcc $toolkit, commit $commit"
  echo "$about"
  export PYTHONPATH=$root/build/gpu_check/site${PYTHONPATH:+:$PYTHONPATH}
  for part in "${PARTS[@]}"; do
    printf '\n=== %s\n' "$part"
    started=$SECONDS
    timeout -k 5 "${LIMIT[$part]}" bash -uo pipefail -c "$part" 2>&1 | tee "$work/said"
    status=${PIPESTATUS[0]}
    [ "$status" != 124 ] || echo "stopped after ${LIMIT[$part]} s" | tee -a "$work/said"
    [ "$status" = 0 ] || failed+=("$part")
    echo "--- $part: exit $status, $((SECONDS - started)) s"
    echo "| $part | $status | $((SECONDS - started)) | $(grep . "$work/said" | tail -1 | tr -d '|') |" >> "$out/parts"
  done
  results "$about" > "$out/results.md" || failed+=(results)
  [ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; return 1; }
  echo "passed: ${PARTS[*]}"
}

export -f build conformance tests sanitizer memcheck racecheck benches isas cpu cpu_benches chip
main 2>&1 | tee -a "$out/log.txt"
exit "${PIPESTATUS[0]}"
