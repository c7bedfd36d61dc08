"""Measure calls on a GPU as the harness does on the CPU: cold caches, medians, the roof, peers, a line a case.

A call is captured into a CUDA graph, so that Python and launching take no part, and each replay is timed by events.
Before each, a kernel reads a buffer of four times the L2 cache: nothing of the case is left there, nothing waits to be
written back, and the graph is in the queue before the GPU gets to it. Calls that take 5 ms and more are not captured,
nor those that cannot be. Calls under 100 us also run 20 in a row in one graph, with what they share left in the cache:
"chained" is what one adds there, which for the smallest is mostly the launch of a kernel. Next to that, "cold" has the
two events and the start of the graph in it, about as much as the line "empty" shows.
"""

import datetime
import json
import statistics
import time

import numpy as np
from kimi_native.ops import _array

from bench import peers as peers_module
from bench.arrays import Gpu
from bench.harness import commit, enough, measured, rate_text, time_text
from bench.roofline import GpuRoof

COLUMNS = "{:24}{:36}{:>10} {:>6} {:>10}  {:32}{:>8}{:>8}  {}"
CHAIN, CHAINED_BELOW, CAPTURED_BELOW = 20, 100e-6, 5e-3  # calls, seconds, seconds


class GpuHarness:
    """Runs cases on the current GPU. Its methods are those of bench.harness.Harness."""

    cuda = True

    def __init__(self, quick: bool = False, json_lines: bool = False):
        self.quick, self.json_lines = quick, json_lines
        self.cupy = cupy = _array.gpu_arrays()
        if cupy is np:
            raise RuntimeError("the emulator's times say nothing; use a GPU")
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.use()
        self.arrays = Gpu(cupy)
        self._properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.hopper = self._properties["major"] == 9
        self._cache = cupy.zeros(self._properties["l2CacheSize"], np.float32)  # four times its bytes
        self._sink = cupy.zeros((), np.float32)
        self.roof = GpuRoof.measure(cupy, self.arrays, lambda call: self._seconds(call, evict=False))
        self.release()

    def header(self) -> None:
        """Which code ran where, and the roof."""
        runtime, properties = self.cupy.cuda.runtime, self._properties
        facts = {
            "commit": commit(),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "gpu": properties["name"].decode(),
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "multiprocessors": properties["multiProcessorCount"],
            "memory_bytes": properties["totalGlobalMem"],
            "l2_cache_bytes": properties["l2CacheSize"],
            "driver": runtime.driverGetVersion(),
            "cuda": runtime.runtimeGetVersion(),
            "cupy": self.cupy.__version__,
            "peers": peers_module.versions(),
            "copy_bytes_per_second": self.roof.copy,
            "bf16_operations_per_second": self.roof.bf16,
        }
        if self.json_lines:
            print(json.dumps(facts), flush=True)
        else:
            found = ", ".join(f"{name} {version or 'absent'}" for name, version in facts["peers"].items())
            print(
                "commit {commit}, {date}, {gpu} (sm {compute_capability}, {multiprocessors} multiprocessors, "
                "L2 {l2:.0f} MiB), CUDA {cuda}, driver {driver}, CuPy {cupy}".format(
                    **facts, l2=facts["l2_cache_bytes"] / 2**20
                )
            )
            print(
                f"roof: {self.roof.copy / 1e9:.0f} GB/s copy, {self.roof.bf16 / 1e12:.0f} TFLOP/s bf16 by cuBLAS; "
                f"peers: {found}\n"
            )
            columns = "op", "case", "cold", "spread", "chained", "rate", "of copy", "of bf16", "vs peers"
            print(COLUMNS.format(*columns), flush=True)
        self.run("empty", "memset of 4 bytes", lambda: self._sink.data.memset_async(0, 4, self.stream))

    def room_for(self, op: str, case: str, nbytes: float) -> bool:
        """Whether a case can have arrays of so many bytes; prints its line if not."""
        self.release()
        free, _ = self.cupy.cuda.runtime.memGetInfo()
        if nbytes < 0.9 * free:
            return True
        self._failed(op, case, f"not run: {nbytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        return False

    def release(self) -> None:
        """Hand the memory of arrays that are gone back."""
        self.stream.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()
        peers_module.release()

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
        """Time `call` and print the line, and that of a call that fails. baseline, cpu_peers: for the CPU's harness.

        peers: a function that returns {name: call or None for one that is not installed} of the same maths by others.
        """
        try:
            seconds, chained, note = self._measured(call)
        except (RuntimeError, MemoryError) as error:
            return self._failed(op, case, f"failed: {error}".splitlines()[0])
        measures = {"bytes_moved": bytes_moved, "operations": operations}
        self.report(op, case, seconds, **measures, chained=chained, peers=self._compared(peers), note=note)

    def report(
        self, op, case, seconds, *, bytes_moved=0, operations=0, tokens=0, chained=None, peers=None, note=""
    ) -> None:
        """Print the line of measured seconds (a list, one a repeat). tokens: of a call, for a rate in tokens/s.

        peers: median seconds of each or what became of it.
        """
        median = statistics.median(seconds)
        line = measured(op, case, seconds, bytes_moved, operations, tokens, note) | {
            "chained_seconds": chained,
            "of_copy": bytes_moved / median / self.roof.copy or None,
            "of_bf16": operations / median / self.roof.bf16 or None,
            "peers": peers or {},
        }
        print(json.dumps(line) if self.json_lines else self._row(line), flush=True)

    def _failed(self, op: str, case: str, note: str) -> None:
        line = {"op": op, "case": case, "note": note}
        print(json.dumps(line) if self.json_lines else f"{op:24}{case:36}{note}", flush=True)

    def _row(self, line: dict) -> str:
        median, chained = line["median_seconds"], line["chained_seconds"]
        gb, tflop, tokens = (line[f"{unit}_per_second"] or 0.0 for unit in ("bytes", "operations", "tokens"))
        rates = rate_text(tokens, "tokens/s"), rate_text(gb / 1e9, "GB/s"), rate_text(tflop / 1e12, "TFLOP/s")
        peers = line["peers"].items()
        beside = [f"{t / median:.2f}x {name}" if isinstance(t, float) else f"{name} {t}" for name, t in peers]
        return COLUMNS.format(
            line["op"],
            line["case"],
            time_text(median),
            f"±{line['spread']:.0%}",
            time_text(chained) if chained else "-",
            ", ".join(filter(None, rates)),
            f"{line['of_copy']:.0%}" if line["of_copy"] else "-",
            f"{line['of_bf16']:.0%}" if line["of_bf16"] else "-",
            ", ".join(filter(None, [line["note"], *beside])) or "-",
        )

    def _measured(self, call) -> tuple[list[float], float | None, str]:
        """(seconds of each cold call, seconds of a chained one, note)"""
        launch, note = self._launch(call)
        seconds, chained = self._seconds(launch), None
        if statistics.median(seconds) < CHAINED_BELOW and not note:
            chain = self._seconds(self._captured(call, CHAIN), evict=False)
            chained = statistics.median(chain) / CHAIN
        return seconds, chained, note

    def _compared(self, peers) -> dict[str, float | str]:
        """Median seconds of each peer's cold call, or what became of it. Others' code may raise whatever it likes."""
        try:
            calls = peers() if peers else {}
        except Exception as error:
            return {"peers": f"failed ({type(error).__name__})"}
        found = {}
        for name, call in calls.items():
            try:
                found[name] = statistics.median(self._seconds(self._launch(call)[0])) if call else "absent"
            except Exception as error:
                found[name] = f"failed ({type(error).__name__})"
        return found

    def _launch(self, call):
        """(what starts the call on the GPU, note): the replay of its graph, or the call itself."""
        call()
        self.stream.synchronize()
        started = time.perf_counter()
        call()
        self.stream.synchronize()
        if time.perf_counter() - started >= CAPTURED_BELOW:
            return call, ""
        try:
            return getattr(call, "captured", lambda: self._captured(call, 1))(), ""
        except RuntimeError:
            return call, "not captured"

    def _captured(self, call, times: int):
        """A function that replays `times` calls. What they allocate comes from a pool of the graph's own and stays."""
        pool = self.cupy.cuda.MemoryPool()
        with self.cupy.cuda.using_allocator(pool.malloc):
            call()  # the pool is filled before the capture begins
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                for _ in range(times):
                    call()
            finally:
                graph = self.stream.end_capture()

        def replay(pool=pool):
            graph.launch(self.stream)

        replay()
        self.stream.synchronize()
        return replay

    def _seconds(self, launch, evict: bool = True) -> list[float]:
        """Seconds of each launch by the GPU's clock."""
        least, most, budget = (3, 8, 0.03) if self.quick else (5, 30, 0.1)
        start, stop = (self.cupy.cuda.Event() for _ in range(2))
        seconds = []
        while not enough(seconds, least, budget, most):
            if evict:
                self._cache.max(out=self._sink)
            start.record(self.stream)
            launch()
            stop.record(self.stream)
            stop.synchronize()
            seconds.append(self.cupy.cuda.get_elapsed_time(start, stop) / 1e3)
        return seconds
