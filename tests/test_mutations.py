"""What mutations.py finds in a kernel, and where it puts the faults."""

import re

import mutations

KERNEL = """
int host(int i, int n) { return i < n ? i : n; }
PTX_FN void step(const Row& p, int n) {
  const int i = min(int(threadIdx.x), p.last);  // i < n
  if (p.end <= i || i >= n) return;
  static_assert(kStages > 1);
  if constexpr (N > 8) shared[i] = p.rows && i < 4 ? p.rows[f(i > 2)] : 0;
  for (int k = 0; k < n; ++k) __syncthreads();
  if (Vector && fast) ptx::cp_async_wait<kStages - 2>();
  if (i > n) __syncwarp(1u << i);
}
"""


def test_finds():
    found = [(m.kind, m.was, m.becomes) for m in mutations.find("a.cu", KERNEL)]
    assert sorted(found) == sorted(
        [
            ("clamp", "min(int(threadIdx.x), p.last)", "int(threadIdx.x)"),
            ("clamp", "min(int(threadIdx.x), p.last)", "p.last"),
            ("guard", "p.end <= i", "false"),
            ("guard", "i >= n", "false"),
            ("guard", "p.rows", "true"),
            ("guard", "i < 4", "true"),
            ("guard", "i > 2", "true"),
            ("barrier", "__syncthreads()", "nothing"),
            ("guard", "fast", "true"),
            ("copy", "ptx::cp_async_wait<kStages - 2>()", "ptx::cp_async_wait<(kStages - 2) + 1>()"),
            ("guard", "i > n", "true"),
            ("guard", "i > n", "false"),
            ("barrier", "__syncwarp(1u << i)", "nothing"),
        ]
    )


def test_the_wider_fault_encloses_the_narrower():
    source = "PTX_FN void f() { if (min(a, 0) < n) return; }"
    text = mutations.instrumented(source, mutations.find("a.cu", source))
    asleep = "PTX_FN void f() { if ((!M && ((M ? (a) : min(a, 0)) < n))) return; }"
    assert re.sub(r"::kimi::mutant\(\d+u\)", "M", text).split("\n")[-1] == asleep


def test_numbers_outlive_other_lines():
    numbers = [m.number for m in mutations.find("a.cu", KERNEL)]
    assert len(set(numbers)) == len(numbers)
    assert [m.number for m in mutations.find("a.cu", KERNEL.replace("int host", "\n\nint host"))] == numbers
