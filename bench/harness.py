"""Measure a call with cold caches, compare it with the roof and the baseline, print a line.

What a time contains: one call of the public function from Python with its checks. Where an op takes `out=` the array is
given and has been written before; the others allocate their result, as in use. Before each call our own matrix-vector
product reads a buffer of three times the last-level cache on all threads: nothing of the case is left in a cache,
neither activations nor code, and the workers of the pool have not gone to sleep. The way from Python to the kernel
through cold caches takes tens of microseconds, most of what the cases with one token and no matrix show. Peers take
turns with ours, call by call, so that all of them see the same minute of the machine.
"""

import datetime
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
from kimi_native import ops
from ml_dtypes import bfloat16

from bench import cpu_peers
from bench.arrays import Host
from bench.roofline import Roof, last_level_cache

COLUMNS = "{:23}{:32}{:17}{:>10}  {:>6}  {:34}{:>7}  {}"

SPINNING = 0.1  # seconds for which the threads of OpenMP and kt-kernel may go on taking a core after a call


class Harness:
    """Runs cases and prints their lines. quick: fewer repeats. json_lines: JSON objects in place of the table. peers: a
    line below each case for each peer that has it. before: {(op, case, isa): median seconds} of an earlier run.

    A benchmark takes its arrays from `arrays` and its cases from bench.shapes, so it runs here and on bench.gpu's
    GpuHarness, which has the same methods.
    """

    cuda = hopper = False

    def __init__(self, quick: bool = False, json_lines: bool = False, peers: bool = False, before=None):
        self.quick, self.json_lines, self.peers, self.before = quick, json_lines, peers, before or {}
        self.arrays = Host()
        self.roof = Roof.measure()
        self._flush_weight = np.ones((3 * last_level_cache() // 2**14, 2**13), bfloat16)
        self._flush_x = np.ones((1, 2**13), np.float32)

    def header(self) -> None:
        """Which code ran where, and the roof."""
        facts = {
            "commit": commit(),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "chip": _chip(),
            "isa": ops.isa(),
            "threads": ops.num_threads(),
            "numpy": np.__version__,
            "read_bytes_per_second": self.roof.bandwidth,
            "float32_operations_per_second": self.roof.peak,
            "blas_threads": round(self.roof.blas_threads, 2),
            "last_level_cache_bytes": last_level_cache(),
            "peers": cpu_peers.versions() if self.peers else {},
        }
        if self.json_lines:
            print(json.dumps(facts), flush=True)
            return
        print("commit {commit}, {date}, {chip}, {isa}, threads: {threads}, NumPy {numpy}".format(**facts))
        if self.peers:
            found = (f"{name} {version or 'absent'}" for name, version in facts["peers"].items())
            print(f"peers: {', '.join(found)}")
        print(
            f"roof: {self.roof.bandwidth / 1e9:.1f} GB/s read, {self.roof.peak / 1e9:.0f} GFLOP/s float32 "
            f"(BLAS on {self.roof.blas_threads:.1f} threads); caches {last_level_cache() / 2**20:.0f} MiB\n"
        )
        columns = "op", "case", "isa", "median", "spread", "rate", "of roof", "vs baseline"
        print(COLUMNS.format(*columns), flush=True)

    def room_for(self, op: str, case: str, nbytes: float) -> bool:
        """Whether a case can have arrays of so many bytes; the CPU's cases are small."""
        return True

    def release(self) -> None:
        """Hand back the memory of arrays that are gone; the CPU does so by itself."""

    def run(
        self,
        op: str,
        case: str,
        call,
        *,
        bytes_moved: float = 0,
        operations: float = 0,
        baseline=None,
        peers=None,
        cpu_peers=None,
    ) -> None:
        """Time `call` and `baseline`, the same maths in NumPy, and print the line.

        bytes_moved: weights, inputs and outputs, each once. operations: two a multiply-add. peers: for GpuHarness.
        cpu_peers: a function that returns {name: call}, each timed in turn with ours and printed below it.
        """
        others = cpu_peers() if self.peers and cpu_peers else {}
        ours = call()
        errors = {name: relative_error(other(), ours) for name, other in others.items()}
        least, budget = (3, 0.1) if self.quick else (7, 0.7)
        seconds, *others_seconds = self._alternate([call, *others.values()], least, budget)
        slow = self._alternate([baseline], 1, 0.05 if self.quick else 0.3)[0] if baseline else []
        work = {"bytes_moved": bytes_moved, "operations": operations}
        self.report(op, case, seconds, **work, baseline_seconds=slow)
        for (name, error), theirs in zip(errors.items(), others_seconds, strict=True):
            ratio = statistics.median(theirs) / statistics.median(seconds)
            self.report(op, case, theirs, **work, engine=name, note=f"ours {ratio:.2f}x, apart by {error:.1e}")

    def report(
        self,
        op,
        case,
        seconds,
        *,
        bytes_moved=0,
        operations=0,
        tokens=0,
        baseline_seconds=(),
        engine="",
        note="",
    ) -> None:
        """Print the line of measured seconds (a list, one a repeat). tokens: of a call, for a rate in tokens/s.

        engine: the peer that was measured, in the place of the instruction set.
        """
        median, isa = statistics.median(seconds), engine or ops.isa()
        before = self.before.get((op, case, isa))
        line = measured(op, case, seconds, bytes_moved, operations, tokens, note) | {
            "isa": isa,
            "threads": ops.num_threads(),
            "of_roof": self.roof.seconds(bytes_moved, operations) / median or None,
            "vs_baseline": statistics.median(baseline_seconds) / median if baseline_seconds else None,
            "vs_before": before / median if before else None,
        }
        print(json.dumps(line) if self.json_lines else self._row(line), flush=True)

    def _alternate(self, calls, least: int, budget: float, most: int = 100) -> list[list[float]]:
        """Seconds of each call, in turns, until all have enough of them."""
        results = [[] for _ in calls]
        while not all(enough(seconds, least, budget, most) for seconds in results):
            for call, seconds in zip(calls, results, strict=True):
                if enough(seconds, least, budget, most):
                    continue
                if len(calls) > 1:
                    time.sleep(SPINNING)
                    call()  # threads that slept may wake up on one core and part only after a while
                ops.gemm(self._flush_x, self._flush_weight)
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
        return results

    def _row(self, line: dict) -> str:
        gb, gflop, tokens = (line[f"{unit}_per_second"] or 0.0 for unit in ("bytes", "operations", "tokens"))
        rates = [rate_text(gb / 1e9, "GB/s"), rate_text(gflop / 1e9, "GFLOP/s")]
        if gflop / self.roof.peak > gb / self.roof.bandwidth:
            rates.reverse()
        ratios = ("vs_baseline", "{:.1f}x numpy"), ("vs_before", "{:.2f}x before")
        remarks = [line["note"], *(text.format(line[key]) for key, text in ratios if line[key])]
        return COLUMNS.format(
            line["op"],
            line["case"],
            line["isa"],
            time_text(line["median_seconds"]),
            f"±{line['spread']:.0%}",
            ", ".join(filter(None, [rate_text(tokens, "tokens/s"), *rates])),
            f"{line['of_roof']:.0%}" if line["of_roof"] else "-",
            ", ".join(filter(None, remarks)) or "-",
        )


def enough(seconds: list[float], least: int, budget: float, most: int) -> bool:
    """Whether a call was repeated often enough: `least` times and then until the sum reaches the budget, at most `most`
    times. One that takes ten times the budget is not repeated.
    """
    total = sum(seconds)
    return len(seconds) == most or total >= budget and (len(seconds) >= least or total >= 10 * budget)


def measured(op: str, case: str, seconds, bytes_moved: float, operations: float, tokens: int, note: str) -> dict:
    """What a line has on every device."""
    median = statistics.median(seconds)
    return {
        "op": op,
        "case": case,
        "median_seconds": median,
        "spread": spread(seconds),
        "bytes_per_second": bytes_moved / median or None,
        "operations_per_second": operations / median or None,
        "tokens_per_second": tokens / median or None,
        "note": note or None,
        "seconds": seconds,
    }


def relative_error(result, expected) -> float:
    """The norm of the difference over that of what was expected."""
    return float(np.linalg.norm(result.astype(np.float32) - expected) / np.linalg.norm(expected))


def spread(seconds: list[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(seconds)


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def rate_text(value: float, unit: str) -> str:
    decimals = 0 if value >= 100 else 1 if value >= 1 else 3
    return f"{value:.{decimals}f} {unit}" if value else ""


def commit() -> str:
    """git describe, "-dirty" for uncommitted changes; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _chip() -> str:
    """The model name from /proc/cpuinfo, with family and model number where it has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    name = facts.get("model name", platform.machine())
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name
